r"""Bounds by interval arithmetic on the gradient (Fast-Lip type) and the softmax hull.

For fixed head weights p let G_n be the gradient of p . f with respect to node n. Backwards through the network,

    G_in = W^T G_out  (linear),      G_in = m G_out,  m in sigma'([l, u])  (activation),      sums where paths meet,

so intervals of every G_n follow from interval arithmetic: [c - r, c + r] -> W^T c -+ |W|^T r, and products of
intervals by their corners. They hold for every x' of the ball, because every derivative that occurs there lies in its
range (Clarke derivatives at kinks included). With J_k the gradient of logit k and P the set of softmax weights:

    hull       ||J^T p||_q <= max_k ||J_k||_q  over k with p_k > 0 in P         (p is a convex combination)
    interval   g_j in [min over P of p . J_lo[:, j], max over P of p . J_hi[:, j]],     p >= 0,

intersected with the intervals that one pass with p itself ranging over P gives; the layer before the logits is then
exact, as p -> W^T p is maximised over P by the knapsack.

*A bound to train on.* At eps = 0 the one-pass interval is the gradient itself, so R(x) = norm of max(|a|, |b|), with
[a, b] the interval over B(x, eps), is GReg's quantity, and for eps > 0 it is one that holds on the whole ball. Ranges
of derivatives of piecewise linear activations are locally constant, everything else is smooth or a maximum: R is
differentiable in the parameters almost everywhere.

References:
    Weng et al., "Towards Fast Computation of Certified Robustness for ReLU Networks" (Fast-Lip), ICML 2018;
    Zhang et al., "RecurJac", AAAI 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grood_cert.ball import DUAL_ORDER, Ball, Norm
from grood_cert.bounds.hidden import Preactivations, preactivations
from grood_cert.bounds.simplex import SoftmaxWeights
from grood_cert.interval import ROUNDING, Interval
from grood_cert.networks.activations import Activation
from grood_cert.networks.capture import live_graph
from grood_cert.networks.graph import Graph
from grood_cert.networks.operations import Addition, LinearMap, MaxPool

Sharpen = Callable[[int, Tensor, Tensor, Tensor], Interval]


def product_interval(slopes: Interval, lower: Tensor, upper: Tensor) -> Interval:
    """[s_l, s_u] x [a, b]: the extremes of the four corners."""
    corners = slopes[0] * lower, slopes[0] * upper, slopes[1] * lower, slopes[1] * upper
    return (
        torch.minimum(torch.minimum(corners[0], corners[1]), torch.minimum(corners[2], corners[3])),
        torch.maximum(torch.maximum(corners[0], corners[1]), torch.maximum(corners[2], corners[3])),
    )


@dataclass(frozen=True)
class Gradient:
    """Bounds of the gradient with respect to a node.

    Attributes:
        lower: Lower ends, shape (B, *node).
        upper: Upper ends.
        magnitude: What was summed since the last nonlinear node, in absolute values: rounding is a share of it.
    """

    lower: Tensor
    upper: Tensor
    magnitude: Tensor

    def plus(self, other: Gradient) -> Gradient:
        """Where paths meet."""
        return Gradient(self.lower + other.lower, self.upper + other.upper, self.magnitude + other.magnitude)


def _of_box(lower: Tensor, upper: Tensor) -> Gradient:
    return Gradient(lower, upper, torch.maximum(lower.abs(), upper.abs()))


def _through_linear(operation: LinearMap, found: Gradient) -> Gradient:
    absolute = operation.absolute()
    center = operation.transpose((found.lower + found.upper) / 2)
    radius = absolute.transpose((found.upper - found.lower) / 2)
    magnitude = absolute.transpose(found.magnitude)
    return Gradient(center - radius - ROUNDING * magnitude, center + radius + ROUNDING * magnitude, magnitude)


def _head(operation: LinearMap, weights: SoftmaxWeights, shape: tuple[int, ...]) -> Gradient:
    """W^T p over P, exactly: each entry is a linear function of p."""
    classes = weights.lower.shape[1]
    identity = torch.eye(classes, dtype=weights.lower.dtype, device=weights.lower.device)
    rows = operation.transpose(identity).flatten(1).T.expand(len(weights.lower), -1, -1)
    lower, upper = (end.reshape(-1, *shape) for end in (-weights.maximum(-rows), weights.maximum(rows)))
    magnitude = operation.absolute().transpose(weights.upper)
    return Gradient(lower - ROUNDING * magnitude, upper + ROUNDING * magnitude, magnitude)


def gradient_intervals(
    graph: Graph, slopes: tuple[Interval, ...], weights: SoftmaxWeights, refine: Sharpen | None = None
) -> Gradient:
    r"""Intervals of the gradient of p . f with respect to the image, for all p in P and all slopes in their ranges.

    Args:
        graph: The network.
        slopes: Ranges of the derivatives of the nonlinear layers, in execution order.
        weights: P, a batch that fits that of the slopes.
        refine: Called with each nonlinear node, the interval of the gradient with respect to its *output* and its
            magnitude; answers a sound interval inside it. Nodes come in reverse execution order.

    Returns:
        Those with respect to the image.
    """
    ranges = dict(zip(graph.nonlinear, slopes, strict=True))
    last = len(graph.nodes) - 1
    pending: dict[int, Gradient] = {last: _of_box(weights.lower, weights.upper)}

    def send(target: int, found: Gradient) -> None:
        pending[target] = pending[target].plus(found) if target in pending else found

    for number in range(last, 0, -1):
        if number not in pending:
            continue
        found = pending.pop(number)
        node = graph.nodes[number]
        operation = node.operation
        if isinstance(operation, LinearMap):
            if number == last:
                send(node.inputs[0], _head(operation, weights, graph.nodes[node.inputs[0]].shape))
            else:
                send(node.inputs[0], _through_linear(operation, found))
        elif isinstance(operation, Addition):
            for target in node.inputs:
                send(target, found)
        else:
            lower, upper = found.lower, found.upper
            if refine is not None:
                lower, upper = refine(number, lower, upper, found.magnitude)
            if isinstance(operation, Activation):
                send(node.inputs[0], _of_box(*product_interval(ranges[number], lower, upper)))
            else:
                assert isinstance(operation, MaxPool)
                low, high = product_interval(
                    ranges[number], lower.flatten(2).unsqueeze(2), upper.flatten(2).unsqueeze(2)
                )
                send(node.inputs[0], _of_box(operation.spread(low), operation.spread(high)))
    return pending[0]


def norm_of_box(lower: Tensor, upper: Tensor, norm: Norm) -> Tensor:
    """The largest dual norm of a vector in a box: the norm of max(|a|, |b|); last axis, norm of the ball."""
    largest = torch.maximum(lower.abs(), upper.abs())
    length: Tensor = torch.linalg.vector_norm(largest, ord=DUAL_ORDER[norm], dim=-1)
    return length


def jacobian_intervals(graph: Graph, slopes: tuple[Interval, ...], batch: int) -> Interval:
    """Intervals of every J_k, shape (B, K, d): one backward pass with the K unit heads of every sample."""
    classes = graph.classes
    heads = torch.eye(classes, dtype=torch.float64, device=graph.device).repeat(batch, 1)
    repeated = tuple((low.repeat_interleave(classes, 0), high.repeat_interleave(classes, 0)) for low, high in slopes)
    found = gradient_intervals(graph, repeated, SoftmaxWeights.fixed(heads))
    return found.lower.flatten(1).reshape(batch, classes, -1), found.upper.flatten(1).reshape(batch, classes, -1)


def interval_bounds(graph: Graph, known: Preactivations, norm: Norm) -> tuple[Tensor, Tensor]:
    r"""The hull and the interval bound of the local Lipschitz constant of S; formulas and proof above.

    Args:
        graph: The network.
        known: Bounds over the balls.
        norm: Norm of the balls.

    Returns:
        max_k ||J_k||_q over the classes k that P knows, and the interval bound, shape (B,) each; moved up by 1e-12 for rounding.
    """
    batch = len(known.proved)
    lower, upper = jacobian_intervals(graph, known.slopes, batch)
    hull = norm_of_box(lower, upper, norm).masked_fill(known.weights.upper <= 0, 0.0).amax(1)
    margin = ROUNDING * (known.weights.upper.unsqueeze(1) @ torch.maximum(lower.abs(), upper.abs())).squeeze(1)
    low, high = -known.weights.maximum(-lower.mT) - margin, known.weights.maximum(upper.mT) + margin
    once = gradient_intervals(graph, known.slopes, known.weights)
    low, high = torch.maximum(low, once.lower.flatten(1)), torch.minimum(high, once.upper.flatten(1))
    return hull * (1 + ROUNDING), norm_of_box(low, high, norm) * (1 + ROUNDING)


def interval_lipschitz(network: nn.Module, ball: Ball, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
    r"""Differentiable upper bound of the local Lipschitz constant of S; formula and proof above.

    In float64 it is a certificate like the others; in float32, as used in training, it is one up to rounding.

    Args:
        network: f in any mode; BatchNorm is read with its running statistics, unless others are given.
        ball: Batch of balls in the network's floating-point type.
        buffers: As for `grood_cert.networks.capture.live_graph`.

    Returns:
        Shape (B,), carries the graph to the network's parameters.
    """
    graph = live_graph(network, tuple(ball.center.shape[1:]), buffers)
    known = preactivations(graph, ball, "ibp")
    found = gradient_intervals(graph, known.slopes, known.weights)
    return norm_of_box(found.lower.flatten(1), found.upper.flatten(1), ball.norm)
