"""Training a detector: objective, penalty, sampling of outliers, loop, and the run around them."""
