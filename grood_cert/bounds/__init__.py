"""Sound bounds of the score over balls: a network as a graph, intervals, linear bounds, branch and bound, two engines."""
