r"""Sound bounds of every pre-activation and of the logits over a ball: intervals, CROWN, and bounds from elsewhere.

*Intervals.* |x - c| <= r gives |W x - W c| <= |W| r coordinate by coordinate; monotone functions map ends to ends.

*CROWN.* A row a . z is pulled back to the image. Linear layers: a -> W^T a, the bias joins the constant. An
activation obeys lower and upper lines on its interval; for an upper bound of a . sigma(z) the positive entries of a take
the upper lines and the negative ones the lower. A maximum pool takes as lower line its entry with the largest lower
bound, as upper line that entry if no other can win, else the constant max u. At the image the ball's support
function closes the argument: max over x' in B of a . x' = a . x + max a . (x' - x). Each step replaces a function by a
pointwise larger one, so the result is an upper bound.

Sources are intersected: largest lower, smallest upper bound. Each is first moved outward by 1e-12 of
|W| |x| + |b|, the magnitude of what was summed (|x| of an activation is the larger of |sigma(z)| and |z|), so
exact-arithmetic claims survive rounding. A sample whose bounds
cross or are not finite is *not proved*.

References:
    Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions", NeurIPS 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.errors import InputError
from grood_cert.native.activations import Activation
from grood_cert.native.graph import Graph
from grood_cert.native.operations import Addition, LinearMap, MaxPool
from grood_cert.native.rows import UnitRows, over_rows, unit_blocks
from grood_cert.native.simplex import Weights, difference_rows, softmax_weights

Source = Literal["ibp", "crown"]
Interval = tuple[Tensor, Tensor]
ROUNDING = 1e-12
_PAIRWISE_UP_TO = 20
DEFAULT_MEMORY = 2**24  # blocks that stay in cache: twice as fast as large ones


@dataclass(frozen=True)
class Preactivations:
    """Bounds over each ball of a batch.

    Attributes:
        inputs: Bounds of the input of every nonlinear layer, in execution order; shape (B, *layer) each.
        slopes: Range of the derivative of every nonlinear layer: of sigma' for an activation, of the routing of each
            (window, entry) for a maximum pool.
        logits: Bounds of the logits, shape (B, K) each.
        weights: The set of possible softmax weights.
        proved: Whether all bounds of a sample are finite and ordered, shape (B,).
    """

    inputs: tuple[Interval, ...]
    slopes: tuple[Interval, ...]
    logits: Interval
    weights: Weights
    proved: Tensor


def _linear_interval(operation: LinearMap, lower: Tensor, upper: Tensor) -> Interval:
    """Image of a box."""
    absolute = operation.absolute()
    center, radius = operation((lower + upper) / 2), absolute.linear((upper - lower) / 2)
    return center - radius, center + radius


def _outward(lower: Tensor, upper: Tensor, magnitude: Tensor) -> Interval:
    return lower - ROUNDING * magnitude, upper + ROUNDING * magnitude


def _intersect(first: Interval, second: Interval) -> Interval:
    return torch.maximum(first[0], second[0]), torch.minimum(first[1], second[1])


class Rows:
    """Pulls rows at a node back to the image, through nonlinear layers whose inputs are already bounded."""

    def __init__(self, graph: Graph, ball: Ball) -> None:
        self._graph = graph
        self._ball = ball
        self._inputs: dict[int, Interval] = {}
        self._lines: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def add(self, number: int, lower: Tensor, upper: Tensor) -> None:
        """Tell the bounds of the input of a nonlinear node."""
        self._inputs[number] = lower, upper
        operation = self._graph.nodes[number].operation
        if isinstance(operation, Activation):
            self._lines[number] = operation.lines(lower, upper)

    def upper(self, node: int, rows: Tensor, units: UnitRows | None = None) -> Tensor:
        """UB of a . value(node); rows in shared form (n, *shape) when `units` deals them out, else (B, R, *shape).

        Returns:
            Shape (B, R), or (B, 2 U) with `units`.
        """
        graph = self._graph
        pending: dict[int, Tensor] = {node: rows}
        constants: Tensor | float = 0.0

        def own(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
            return units.own(tensor) if units is not None and tensor.dim() == len(shape) + 1 else tensor

        def send(target: int, tensor: Tensor) -> None:
            if target in pending:
                shape = graph.nodes[target].shape
                if pending[target].dim() != tensor.dim():
                    pending[target], tensor = own(pending[target], shape), own(tensor, shape)
                tensor = pending[target] + tensor
            pending[target] = tensor

        shared: Tensor | None = None  # constants of the shared rows
        for number in range(node, 0, -1):
            if number not in pending:
                continue
            row = pending.pop(number)
            current = graph.nodes[number]
            operation, shape = current.operation, current.shape
            if isinstance(operation, LinearMap):
                if operation.bias is not None:
                    term = (row * operation.bias).sum(tuple(range(-len(shape), 0)))
                    if units is not None and term.dim() == 1:
                        shared = term if shared is None else shared + term
                    else:
                        constants = constants + term
                send(current.inputs[0], over_rows(operation.transpose, row, len(shape)))
            elif isinstance(operation, Addition):
                for target in current.inputs:
                    send(target, row)
            elif isinstance(operation, Activation):
                row = own(row, shape)
                slope_low, constant_low, slope_high, constant_high = (line.unsqueeze(1) for line in self._lines[number])
                positive, negative = row.clamp(min=0), row.clamp(max=0)
                term = (
                    positive.flatten(2) @ constant_high.flatten(2).mT + negative.flatten(2) @ constant_low.flatten(2).mT
                )
                constants = constants + term.squeeze(-1)
                send(current.inputs[0], positive * slope_high + negative * slope_low)
            else:
                assert isinstance(operation, MaxPool)
                row, term = self._through_pool(number, operation, own(row, shape))
                constants = constants + term
                send(current.inputs[0], row)
        image = own(pending[0], graph.nodes[0].shape).flatten(2)
        if shared is not None and units is not None:
            constants = constants + units.own(shared)
        return (image @ self._ball.center.flatten(1).unsqueeze(-1)).squeeze(-1) + self._ball.support(image) + constants

    def _through_pool(self, number: int, pool: MaxPool, row: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = self._inputs[number]
        low = pool.windows(lower, -torch.inf)
        best = torch.zeros_like(low).scatter(2, low.argmax(2, keepdim=True), 1.0)
        decided = (pool.routing(lower, upper)[0] > 0).any(2)
        positive, negative = row.clamp(min=0).flatten(3), row.clamp(max=0).flatten(3)  # (B, R, C, windows)
        undecided = positive * (~decided).unsqueeze(1)
        constant = (undecided * pool(upper).flatten(2).unsqueeze(1)).sum((2, 3))
        entries = (negative + positive - undecided).unsqueeze(3) * best.unsqueeze(1)
        return over_rows(pool.spread, entries, 3), constant

    def bounds(self, node: int, needed: Tensor, memory: int) -> Interval:
        """Bounds of the needed entries of a node, infinite elsewhere; `needed` and the result have shape (B, N)."""
        size, shape = self._graph.nodes[node].size, self._graph.nodes[node].shape
        lower = torch.full_like(needed, -torch.inf, dtype=torch.float64)
        upper = torch.full_like(needed, torch.inf, dtype=torch.float64)
        widest = max(item.size for item in self._graph.nodes[: node + 1])
        for index, units in unit_blocks(needed, 8 * 4 * widest, memory):
            value = self.upper(node, units.start(size, shape), units)
            upper.scatter_(1, index, value[:, : index.shape[1]])
            lower.scatter_(1, index, -value[:, index.shape[1] :])
        return lower, upper


def slopes_of(operation: object, lower: Tensor, upper: Tensor) -> Interval:
    """Range of the derivative of a nonlinear layer whose input lies in [lower, upper]."""
    if isinstance(operation, Activation):
        return operation.slopes(lower, upper)
    assert isinstance(operation, MaxPool)
    return operation.routing(lower, upper)


def _undecided(operation: object, lower: Tensor, upper: Tensor) -> Tensor:
    """Entries whose tighter bounds could make a difference."""
    if isinstance(operation, Activation):
        low, high = operation.slopes(lower, upper)
        return low < high
    assert isinstance(operation, MaxPool)
    alone, possible = operation.routing(lower, upper)
    return operation.spread(possible - alone) > 0


def _given(bounds: Sequence[Interval] | None, graph: Graph, batch: int) -> dict[int, Interval]:
    if bounds is None:
        return {}
    numbers = graph.nonlinear
    if len(bounds) != len(numbers):
        numbers = tuple(i for i in numbers if isinstance(graph.nodes[i].operation, Activation))
    if len(bounds) != len(numbers):
        raise InputError(f"expected bounds of {len(graph.nonlinear)} nonlinear layers, got {len(bounds)}")
    for number, (lower, upper) in zip(numbers, bounds, strict=True):
        shape = (batch, *graph.nodes[graph.nodes[number].inputs[0]].shape)
        if tuple(lower.shape) != shape or tuple(upper.shape) != shape:
            raise InputError(
                f"bounds of the input of layer {graph.nodes[number].name}: expected shape {shape}, "
                f"got {tuple(lower.shape)} and {tuple(upper.shape)}"
            )
    return dict(zip(numbers, bounds, strict=True))


def logit_rows(classes: int) -> Tensor:
    """Rows whose bounds make the best softmax weights: each logit, then each difference; shape (R, K), float64."""
    return torch.cat([torch.eye(classes, dtype=torch.float64), difference_rows(classes)])


def preactivations(
    graph: Graph,
    ball: Ball,
    source: Source = "crown",
    given: Sequence[Interval] | None = None,
    given_rows: Interval | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Preactivations:
    r"""Bound the input of every nonlinear layer, the logits and the softmax weights over each ball.

    Intervals are always computed; CROWN sharpens, layer by layer, those entries whose derivative they leave open, and
    bounds given from another engine are intersected with both.

    Args:
        graph: The network.
        ball: Batch of balls, float64.
        source: "ibp" for intervals alone, "crown" for the linear relaxation on top.
        given: Bounds of the inputs of the nonlinear layers in execution order (with or without maximum pools),
            shape (B, *layer) each.
        given_rows: Bounds of the rows `logit_rows(K)` of the logits, shape (B, R) each.
        memory: Bytes that blocks of rows may take.

    Returns:
        The intersection.

    Raises:
        InputError: If given bounds do not fit the network.
    """
    if source not in ("ibp", "crown"):
        raise InputError(f"unknown source of bounds {source!r}; use ibp or crown")
    batch, nodes = len(ball.center), graph.nodes
    known = _given(given, graph, batch)
    relaxed = Rows(graph, ball)
    proved = torch.ones(batch, dtype=torch.bool, device=ball.center.device)
    intervals: list[Interval] = [(ball.lower, ball.upper)]
    magnitudes: list[Tensor] = [torch.maximum(ball.lower.abs(), ball.upper.abs())]
    inputs: list[Interval] = []
    slopes: list[Interval] = []
    for number, node in enumerate(nodes[1:], 1):
        operation, origin = node.operation, node.inputs[0]
        lower, upper = intervals[origin]
        if isinstance(operation, LinearMap):
            lower, upper = _linear_interval(operation, lower, upper)
            magnitude = operation.absolute()(magnitudes[origin])
        elif isinstance(operation, Addition):
            other = node.inputs[1]
            lower, upper = lower + intervals[other][0], upper + intervals[other][1]
            magnitude = magnitudes[origin] + magnitudes[other]
        else:
            if source == "crown":
                needed = _undecided(operation, lower, upper).flatten(1)
                found = relaxed.bounds(origin, needed, memory)
                found = found[0].reshape(lower.shape), found[1].reshape(lower.shape)
                lower, upper = _intersect((lower, upper), _outward(*found, magnitudes[origin]))
            if number in known:
                lower, upper = _intersect((lower, upper), _outward(*known[number], magnitudes[origin]))
            proved &= _ordered(lower, upper)
            intervals[origin] = lower, upper
            before = torch.maximum(lower.abs(), upper.abs())  # lines around a flat activation cancel terms of this size
            inputs.append((lower, upper))
            slopes.append(slopes_of(operation, lower, upper))
            relaxed.add(number, lower, upper)
            if isinstance(operation, Activation):
                lower, upper = operation.values(lower, upper)
            else:
                assert isinstance(operation, MaxPool)
                lower, upper, before = operation(lower), operation(upper), operation(before)
            magnitude = torch.maximum(torch.maximum(lower.abs(), upper.abs()), before)
        intervals.append(_outward(lower, upper, magnitude))
        magnitudes.append(magnitude)
    logits, weights = _logits(graph, relaxed, source, intervals[-1], magnitudes[-1], given_rows)
    proved &= _ordered(*logits) & _ordered(weights.lower, weights.upper)
    return Preactivations(tuple(inputs), tuple(slopes), logits, weights, proved)


def _ordered(lower: Tensor, upper: Tensor) -> Tensor:
    return (torch.isfinite(lower) & torch.isfinite(upper) & (lower <= upper)).flatten(1).all(1)


def _logits(
    graph: Graph, relaxed: Rows, source: Source, logits: Interval, magnitude: Tensor, given: Interval | None
) -> tuple[Interval, Weights]:
    classes, batch = graph.classes, len(magnitude)
    rows = logit_rows(classes).to(magnitude)
    if given is not None and (given[0].shape != (batch, len(rows)) or given[1].shape != (batch, len(rows))):
        raise InputError(
            f"expected bounds of {len(rows)} rows, shape {(batch, len(rows))}, got {tuple(given[0].shape)}"
        )
    if source == "crown":
        used = rows if classes <= _PAIRWISE_UP_TO else rows[:classes]
        count = len(used)
        both = torch.cat([used, -used]).expand(batch, -1, -1)
        value = relaxed.upper(len(graph.nodes) - 1, both)
        found = -value[:, count:], value[:, :count]
        if len(used) < len(rows):
            pad = torch.full((batch, len(rows) - count), torch.inf).to(magnitude)
            found = torch.cat([found[0], -pad], 1), torch.cat([found[1], pad], 1)
        given = found if given is None else _intersect(given, found)
    if given is None:
        return logits, softmax_weights(*logits)
    lower, upper = _outward(*given, magnitude @ rows.abs().T)
    logits = _intersect(logits, (lower[:, :classes], upper[:, :classes]))
    return logits, softmax_weights(*logits, (lower[:, classes:], upper[:, classes:]))
