"""Pre-activation bounds for the Lipschitz bounds, from a bound engine: auto_LiRPA or our own."""

from __future__ import annotations

from grood_cert.ball import Ball
from grood_cert.bounds.graph import Graph
from grood_cert.bounds.hidden import Preactivations, logit_rows, preactivations
from grood_cert.bounds.score import Bounded


def engine_preactivations(bounded: Bounded, graph: Graph, ball: Ball) -> Preactivations:
    """Bounds of the pre-activations, logits and softmax weights by the engine's method, intersected with intervals.

    Args:
        bounded: The network inside its bound engine.
        graph: The same network.
        ball: Batch of balls.

    Returns:
        The intersection; samples whose bounds are not finite or cross are marked as not proved.
    """
    relaxation = bounded.relax(ball)
    rows = logit_rows(graph.classes).to(ball.center).expand(len(ball.center), -1, -1)
    return preactivations(graph, ball, "ibp", relaxation.preactivations(), relaxation.rows(rows))
