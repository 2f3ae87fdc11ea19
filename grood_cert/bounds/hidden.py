r"""Sound bounds of every pre-activation and of the logits over a ball: intervals, CROWN, and bounds from elsewhere.

*Intervals.* One layer at a time (`intervals`).

*CROWN.* Linear bounds, see `backward`. Computed are those of entries whose derivative the intervals leave open, and of
those whose range the intervals of a later layer read. Where no nonlinear layer lies before, rows are exact: for l_2 and
l_1 balls, whose box is larger, they are computed for "ibp" as well; for l_inf one layer's interval is as good.

Diagonal layers are folded into their neighbours first (`folding`).

Sources are intersected: largest lower, smallest upper bound. Each is moved outward by what rounding can do (`rounding`),
to the network's evaluation and to the bound. A sample whose bounds cross or are not finite is *not proved*.

References:
    Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions", NeurIPS 2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.bounds.backward import Pullback
from grood_cert.bounds.engine import BoundedNetwork, Source
from grood_cert.bounds.folding import folded
from grood_cert.bounds.intervals import through
from grood_cert.bounds.rounding import Rounding
from grood_cert.bounds.simplex import SoftmaxWeights, difference_rows, gaps, weights_of_gaps
from grood_cert.bounds.single_rows import RowErrors, start
from grood_cert.errors import InputError
from grood_cert.interval import Interval, intersect, ordered
from grood_cert.networks.activations import Activation
from grood_cert.networks.graph import Graph, Node
from grood_cert.networks.operations import Addition, LinearMap, MaxPool

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
        gaps: Bounds of f_j - f_k, shape (B, K, K) each.
        weights: The set of possible softmax weights.
        proved: Whether all bounds of a sample are finite and ordered, shape (B,).
    """

    inputs: tuple[Interval, ...]
    slopes: tuple[Interval, ...]
    logits: Interval
    gaps: Interval
    weights: SoftmaxWeights
    proved: Tensor

    def at(self, index: Tensor) -> Preactivations:
        """Those of some balls."""

        def part(interval: Interval) -> Interval:
            return interval[0][index], interval[1][index]

        return Preactivations(
            tuple(map(part, self.inputs)),
            tuple(map(part, self.slopes)),
            part(self.logits),
            part(self.gaps),
            SoftmaxWeights(self.weights.lower[index], self.weights.upper[index]),
            self.proved[index],
        )


def slopes_of(operation: object, lower: Tensor, upper: Tensor) -> Interval:
    """Range of the derivative of a nonlinear layer whose input lies in [lower, upper]."""
    if isinstance(operation, Activation):
        return operation.slopes(lower, upper)
    assert isinstance(operation, MaxPool)
    return operation.routing(lower, upper)


def _wanted(operation: object, lower: Tensor, upper: Tensor, last: bool) -> Tensor:
    """Entries of a nonlinear layer's input whose tighter bounds could make a difference."""
    if isinstance(operation, Activation):
        low, high = operation.slopes(lower, upper)
        undecided = low < high
        if last:
            return undecided
        low, high = operation.values(lower, upper)
        return undecided | (low < high)
    assert isinstance(operation, MaxPool)
    alone, possible = operation.routing(lower, upper)
    return operation.spread(possible - alone if last else possible) > 0


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


class Hidden:
    """Bounds of every layer of a network over a batch of balls, and its linear relaxation.

    Args:
        graph: The network, folded.
        ball: Batch of balls, float64.
        source: "ibp" for intervals alone, "crown" for linear bounds on top.
        given: Bounds of the inputs of the nonlinear layers from elsewhere, intersected with ours.
        memory: Bytes that blocks of rows may take.
        single: Whether rows are pulled back in float32 (`single_rows`).

    Attributes:
        inputs: Bounds of the input of every nonlinear node, by its number, in execution order.
        intervals: Bounds of the value of every node.
        rounding: How far every node may be off.
        relaxed: Pulls rows of any node back to the image.
        proved: Whether the bounds of all inputs are finite and ordered, shape (B,).
    """

    def __init__(
        self,
        graph: Graph,
        ball: Ball,
        source: Source,
        given: Sequence[Interval] | None = None,
        memory: int = DEFAULT_MEMORY,
        single: bool = False,
    ) -> None:
        self.graph = graph
        self.ball = ball
        self.source = source
        self.inputs: dict[int, Interval] = {}
        self.intervals: list[Interval] = [(ball.lower, ball.upper)]
        self.rounding = Rounding(graph, ball)
        self.relaxed = Pullback(graph, ball, single)
        self._row_errors = RowErrors(graph, self.rounding.magnitudes[0]) if single else None
        self.proved = torch.ones(len(ball.center), dtype=torch.bool, device=ball.center.device)
        self._exact = ball.norm == "linf"
        self._memory = memory
        self._affine = {0}  # nodes that depend on the image linearly
        known = _given(given, graph, len(ball.center))
        for number, node in enumerate(graph.nodes[1:], 1):
            if isinstance(node.operation, LinearMap | Addition):
                self._before_linear(number, node)
                value = through(node.operation, [self.intervals[origin] for origin in node.inputs])
                self.rounding.linear()
                if self._row_errors is not None:
                    self._row_errors.linear(self.rounding.magnitudes)
                margin = self.rounding.margin(number)
                self.intervals.append((value[0] - margin, value[1] + margin))
            else:
                self._before_nonlinear(number, node, known.get(number))

    def _sharpen(self, origin: int, wanted: Tensor) -> None:
        """Intersect the interval of a node with linear bounds of the wanted entries.

        Of no others: a block may hold some, and what a sample gets must not depend on its batch.
        """
        lower, upper = self.relaxed.bounds(origin, wanted.flatten(1), self._memory)
        lower = torch.where(wanted, lower.reshape(wanted.shape), -torch.inf)
        upper = torch.where(wanted, upper.reshape(wanted.shape), torch.inf)
        margin = self.margin(origin)
        self.intervals[origin] = intersect(self.intervals[origin], (lower - margin, upper + margin))

    def margin(self, number: int) -> Tensor:
        """How far linear bounds of the entries of a node are moved outward for rounding, shape (B, *node)."""
        margin = self.rounding.margin(number)
        return margin if self._row_errors is None else margin + self._row_errors.error(number)

    def linear(self, rows: Tensor, closed: Mapping[int, Interval] | None = None) -> Interval:
        """Bounds of rows of the logits, moved outward for rounding.

        Args:
            rows: Rows c, shape (B, R, K), float64.
            closed: See `Pullback.linear`.

        Returns:
            lower, upper: Shape (B, R) each.
        """
        last = len(self.graph.nodes) - 1
        if self._row_errors is None:
            lower, upper = self.relaxed.linear(last, rows, self._memory, closed)
            margin = (rows.abs() @ self.margin(last).unsqueeze(-1)).squeeze(-1)
            return lower - margin, upper + margin
        single, scales = start(rows)
        lower, upper = self.relaxed.linear(last, single, self._memory, closed)
        lost = (rows / scales - single).abs() @ self.rounding.magnitudes[last].unsqueeze(-1)
        margin = (lost + single.to(rows).abs() @ self.margin(last).unsqueeze(-1)).squeeze(-1)
        return (lower - margin) * scales.squeeze(-1), (upper + margin) * scales.squeeze(-1)

    def _before_linear(self, number: int, node: Node) -> None:
        if self._affine.issuperset(node.inputs):
            self._affine.add(number)
        elif not self._exact:  # a sum of what depends on the image linearly and of what does not
            for source in self._affine.intersection(node.inputs) - {0}:
                self._sharpen(source, torch.ones_like(self.intervals[source][0], dtype=torch.bool))

    def _before_nonlinear(self, number: int, node: Node, given: Interval | None) -> None:
        operation, origin = node.operation, node.inputs[0]
        linear = self.source == "crown" or (origin in self._affine and not self._exact)
        if linear and not (self._exact and self.graph.nodes[origin].inputs == (0,)):
            self._sharpen(origin, _wanted(operation, *self.intervals[origin], number == self.graph.nonlinear[-1]))
        if given is not None:
            self.intervals[origin] = intersect(self.intervals[origin], given)
        lower, upper = self.intervals[origin]
        self.proved = self.proved & ordered(lower, upper)
        self.inputs[number] = lower, upper
        self.intervals.append(self.rounding.nonlinear(lower, upper))
        charge = self.rounding.charges[number]
        if self._row_errors is not None:
            charge = charge + self._row_errors.nonlinear(lower, upper, self.rounding.magnitudes)
        self.relaxed.add(number, lower, upper, charge)


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
    known = Hidden(folded(graph), ball, source, given, memory)
    logits, between = _logits(known, given_rows)
    weights = weights_of_gaps(*between)
    slopes = tuple(
        slopes_of(known.graph.nodes[number].operation, lower, upper) for number, (lower, upper) in known.inputs.items()
    )
    proved = known.proved & ordered(*logits) & ordered(weights.lower, weights.upper)
    return Preactivations(tuple(known.inputs.values()), slopes, logits, between, weights, proved)


def engine_preactivations(bounded: BoundedNetwork, graph: Graph, ball: Ball) -> Preactivations:
    """Bounds of the pre-activations, logits and softmax weights by an engine's method, intersected with intervals.

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


def _logits(known: Hidden, given: Interval | None) -> tuple[Interval, Interval]:
    """Bounds of the logits, and of their differences."""
    logits = known.intervals[-1]
    batch, classes = logits[0].shape
    rows = logit_rows(classes).to(logits[0])
    if given is not None and (given[0].shape != (batch, len(rows)) or given[1].shape != (batch, len(rows))):
        raise InputError(
            f"expected bounds of {len(rows)} rows, shape {(batch, len(rows))}, got {tuple(given[0].shape)}"
        )
    if known.source == "crown":
        used = rows if classes <= _PAIRWISE_UP_TO else rows[:classes]
        found = known.linear(used.expand(batch, -1, -1))
        if len(used) < len(rows):
            pad = torch.full((batch, len(rows) - classes), torch.inf).to(rows)
            found = torch.cat([found[0], -pad], 1), torch.cat([found[1], pad], 1)
        given = found if given is None else intersect(given, found)
    if given is None:
        return logits, gaps(*logits)
    lower, upper = given
    logits = intersect(logits, (lower[:, :classes], upper[:, :classes]))
    return logits, gaps(*logits, (lower[:, classes:], upper[:, classes:]))
