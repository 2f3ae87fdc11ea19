r"""What rounding can do: a running error analysis of the network's evaluation and of the bounds themselves.

*Evaluations.* In an arithmetic with unit roundoff u (2^-53 in float64, 2^-24 in float32) a sum of n products is computed
with an error of at most gamma_n = n u / (1 - n u) of the sum of their absolute values, in whatever order and with or
without fused multiplications. An evaluation of the network therefore computes at each node

    v_i = W v_j + b + delta_i,        |delta_i| <= gamma_n m_i,        m_i = |W| |v_j| + |b|,

and at an activation sigma(v_j) + delta_i with |delta_i| <= 16 u (|v_j| + |sigma(v_j)|); ReLU and maximum are exact.
Bounds are proved *for all such delta at once*: they hold in exact arithmetic (delta = 0), for the float64 evaluation
that attacks are judged by, and for every evaluation in `Graph.deployment`, in any batch and order of summation.

*Between two nonlinear nodes* errors add up: with s the sum of the gamma_n on the way and m <- |W| m + |b| carried
along, the value z is off by at most s m(z) from the exact linear map of the values that the nonlinear nodes before gave.
Intervals of z are moved outward by s m(z). Where layers were merged (BatchNorm), |b| is what was summed to get b
(`LinearMap.summed`), so what cancelled while merging is covered too.

*Lines.* Around sigma on the interval of z, k z + c is moved outward by

    charge = s k m(z) + 16 u (|z| + |sigma|),        k the steepest slope on the interval.

A row a of sigma that is pulled back through the line pays |a| . charge, which covers what was rounded between this node
and the nonlinear nodes before, since |W^T a| . m <= |a| . |W| m: for the evaluation (delta) and for the row itself,
whose products are rounded in float64. At the end a row c of the logits pays |c| . s m. So what cancels between two
layers is charged where it cancels, in proportion to what the bound makes of it.

*Forwards.* Where rows are not ours (auto_LiRPA), errors are carried forward, E <- |W| E, E <- k E + charge: the
worst case over all rows, looser by what |W| loses against W. Intervals are moved outward before lines are drawn.

Our own arithmetic is float64 too; s holds 1e-12 for it, which is 9000 u, and 2 u a term beyond.

References:
    Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., chapter 3 (gamma_n, running error analysis).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.bounds.intervals import through
from grood_cert.interval import ROUNDING, STEPS, Interval
from grood_cert.networks.activations import Activation, LeakyReLU
from grood_cert.networks.graph import Graph, Operation
from grood_cert.networks.operations import (
    Addition,
    AveragePool,
    Convolution,
    Dense,
    LinearMap,
    MaxPool,
    Selection,
    Separable,
    Transposed,
)
from grood_cert.scores import Score

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24}
_LARGEST_SHARE = 0.01  # beyond it nothing is proved


def terms(operation: LinearMap) -> int:
    """The most products that an entry of W x or of W^T y sums up."""
    match operation:
        case Dense(weight=weight):
            return max(weight.shape)
        case Convolution():
            area = operation.kernel[0] * operation.kernel[1]
            return max(operation.weight.shape[1], operation.weight.shape[0] // operation.groups) * area
        case AveragePool():
            return operation.kernel[0] * operation.kernel[1]
        case Separable():
            return sum(operation.rows.shape) + sum(operation.columns.shape)
        case Transposed():
            return terms(operation.operation)
        case Selection():
            return len(operation.index)
        case _:
            return 1


class Rounding:
    """The sizes of what is summed at every node over a batch of balls, followed node by node.

    Args:
        graph: The network.
        ball: Batch of balls.
        forwards: Whether to carry errors forwards too.

    Attributes:
        magnitudes: m at every node so far, shape (B, *node) each.
        charges: By how much lines around every nonlinear node so far are moved outward, shape (B, *node).
        errors: What nonlinear nodes before every node so far may have been off, if carried; shape (B, *node).
    """

    def __init__(self, graph: Graph, ball: Ball, forwards: bool = False) -> None:
        self.graph = graph
        self.magnitudes = [torch.maximum(ball.lower.abs(), ball.upper.abs())]
        self.charges: dict[int, Tensor] = {}
        self.errors = [torch.zeros_like(ball.center)] if forwards else []
        self._nonlinear = frozenset(graph.nonlinear)
        self._unit = UNIT[graph.deployment]
        self._terms = [graph.nodes[0].size]  # of our own sums since the last nonlinear node
        self._roundings = [2]  # of an evaluation: the image may be rounded too

    def share(self, number: int) -> float:
        """Which share of m the linear map that leads to a node may be off; 0 if nothing is computed on the way."""
        own, evaluated = self._terms[number], self._roundings[number]
        return 0.0 if own == evaluated == 0 else self._share(own, evaluated)

    def _share(self, own: int, evaluated: int) -> float:
        share = evaluated * self._unit
        if not share <= _LARGEST_SHARE:
            return torch.inf
        return ROUNDING + 2 * UNIT["float64"] * own + share / (1 - share)

    def margin(self, number: int) -> Tensor:
        """How far the linear map that leads to a node may be off, shape (B, *node)."""
        return self.share(number) * self.magnitudes[number]

    def linear(self) -> None:
        """Go on to the next node, a linear one."""
        number = len(self.magnitudes)
        node = self.graph.nodes[number]
        operation, inputs = node.operation, node.inputs
        own, evaluated = (max(counts[i] for i in inputs) for counts in (self._terms, self._roundings))
        if isinstance(operation, Addition):
            summed = sum(self.magnitudes[i] for i in inputs)
            assert isinstance(summed, Tensor)
            if self.errors:
                self.errors.append(self.errors[inputs[0]] + self.errors[inputs[1]])
        else:
            assert isinstance(operation, LinearMap)
            absolute = operation.absolute()
            summed = absolute(self.magnitudes[inputs[0]])
            if self.errors:
                self.errors.append(absolute.linear(self.errors[inputs[0]]))
        if isinstance(operation, Addition) or not (operation.moves and operation.bias is None):
            count = terms(operation) if isinstance(operation, LinearMap) else 1
            own, evaluated = own + count + node.size, evaluated + count + STEPS
        elif isinstance(operation, Selection):
            own += terms(operation)
        self.magnitudes.append(summed)
        self._terms.append(own)
        self._roundings.append(evaluated)

    def advance(self) -> int:
        """Go on over all linear nodes up to the next nonlinear one, or to the end; the number of the next node."""
        nodes = self.graph.nodes
        while (number := len(self.magnitudes)) < len(nodes) and number not in self._nonlinear:
            self.linear()
        return number

    def nonlinear(self, lower: Tensor, upper: Tensor) -> Interval:
        """Go on to the next node, a nonlinear one, whose input lies in [lower, upper]; the interval of its value."""
        number = len(self.magnitudes)
        node = self.graph.nodes[number]
        operation, origin = node.operation, node.inputs[0]
        assert operation is not None
        low, high = through(operation, [(lower, upper)])
        size, read = torch.maximum(low.abs(), high.abs()), torch.maximum(lower.abs(), upper.abs())
        share, own = (
            self._share(self._terms[origin] + node.size, self._roundings[origin]),
            self._share(node.size, STEPS),
        )
        exact = _is_exact(operation)
        if isinstance(operation, Activation):
            slopes = operation.slopes(lower, upper)
            steepest = torch.maximum(slopes[0].abs(), slopes[1].abs())
            change = torch.zeros_like(size) if exact else own * (size + read)
            charge = share * steepest * self.magnitudes[origin] + (own * size if exact else change)
            carried = steepest * self.errors[origin] if self.errors else None
        else:
            assert isinstance(operation, MaxPool)
            change = torch.zeros_like(size)
            charge = share * operation(self.magnitudes[origin]) + own * size
            carried = operation(self.errors[origin]) if self.errors else None
        self.charges[number] = charge
        if carried is not None:
            self.errors.append(carried + charge)
        self.magnitudes.append(size + change)
        self._terms.append(0)
        self._roundings.append(0)
        return low - change, high + change

    def error(self, number: int) -> Tensor:
        """How far an evaluation may be off at a node, if errors are carried, shape (B, *node)."""
        return self.errors[number] + self.margin(number)


def _is_exact(operation: Operation) -> bool:
    """Whether a nonlinear operation rounds nothing."""
    return isinstance(operation, MaxPool) or operation == LeakyReLU()


def of_score(score: Score, graph: Graph, value: Tensor, largest: Tensor) -> Tensor:
    """How far an evaluation of S from its logits may be off in the graph's deployment, shape (...).

    Args:
        score: S.
        graph: The network.
        value: S, or a bound of it near which it matters, shape (...).
        largest: max_k |f_k|, shape (...).
    """
    return score.roundoff(value, graph.classes, largest, UNIT[graph.deployment])


def largest_of(lower: Tensor, upper: Tensor) -> Tensor:
    """max_k |f_k| of logits in intervals of shape (B, K), shape (B,)."""
    return torch.maximum(lower.abs(), upper.abs()).amax(1)


def evaluation_error(graph: Graph, ball: Ball, inputs: Sequence[Interval], logits: Interval, score: Score) -> Tensor:
    """How far an evaluation of S may be off on each ball, errors carried forwards, shape (B,).

    S moves by at most max(1, 1 / T) times what any logit moves.

    Args:
        graph: The network.
        ball: Batch of balls, float64.
        inputs: Bounds of the inputs of all nonlinear nodes.
        logits: Bounds of the logits, shape (B, K).
        score: S.
    """
    error = follow(graph, ball, inputs, forwards=True).error(len(graph.nodes) - 1).amax(1)
    largest = largest_of(*logits)
    return max(1.0, 1 / getattr(score, "temperature", 1.0)) * error + of_score(score, graph, largest, largest)


def follow(graph: Graph, ball: Ball, inputs: Sequence[Interval], forwards: bool = False) -> Rounding:
    """The analysis of a network up to the first nonlinear node whose input is not bounded, or to the logits.

    Args:
        graph: The network.
        ball: Batch of balls, float64.
        inputs: Bounds of the inputs of the first nonlinear nodes, in execution order.
        forwards: Whether to carry errors forwards too.
    """
    rounding = Rounding(graph, ball, forwards)
    for lower, upper in inputs:
        rounding.advance()
        rounding.nonlinear(lower, upper)
    rounding.advance()
    return rounding
