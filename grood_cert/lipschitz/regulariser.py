r"""A formal Lipschitz bound to train on: GReg's point gradient replaced by what holds on the whole ball.

    R(x) = norm of max(|a|, |b|),    [a, b] the one-pass interval of grad S over B(x, eps)  >=  L(B)

Intervals run forwards for the pre-activations (they decide which derivatives are 0, 1 or open and which softmax
weights are possible) and backwards for the gradient; see `interval`. The result is differentiable in the parameters
almost everywhere: ranges of derivatives of piecewise linear activations are locally constant, everything else is
smooth or a maximum. At eps = 0 it equals ||grad S(x)||_q, GReg's quantity.
"""

from __future__ import annotations

from torch import Tensor, nn

from grood_cert.ball import Ball
from grood_cert.bounds.graph import live_graph
from grood_cert.bounds.hidden import preactivations
from grood_cert.lipschitz.interval import gradient_intervals, norm_of_box


def interval_lipschitz(network: nn.Module, ball: Ball) -> Tensor:
    r"""Differentiable upper bound of the local Lipschitz constant of S; formula and proof above.

    In float64 it is a certificate like the others; in float32, as used in training, it is one up to rounding.

    Args:
        network: f in any mode; BatchNorm is read with its running statistics.
        ball: Batch of balls in the network's floating-point type.

    Returns:
        Shape (B,), carries the graph to the network's parameters.
    """
    graph = live_graph(network, tuple(ball.center.shape[1:]))
    known = preactivations(graph, ball, "ibp")
    lower, upper = gradient_intervals(graph, known.slopes, known.weights)
    return norm_of_box(lower.flatten(1), upper.flatten(1), ball.norm)
