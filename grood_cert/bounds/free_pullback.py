r"""The backward pass of CROWN with its lines left free, and the descent that chooses them.

Below an unstable leaky ReLU any line through 0 with a slope alpha between the leak and 1 is sound, and a sign s_j that is
known of a neuron enters with a multiplier beta_j >= 0; so every choice of the parameters is a bound (alpha-, beta-CROWN,
see `domains`).

*Derivatives.* Rows a are pulled back through row = a W, and a_j above the line of its sign: so the bound is linear in
every row on the way, with the derivative

    d bound / d row(node) = v(node),        v(image) the maximiser of row . x' on the ball,    v = W v + b,
                                            behind an activation  v = the line above if a_j > 0, else the line below:

the values on a path through the relaxed network, one pass forwards. Hence d bound / d alpha_j = min(a_j, 0) v_j and
d bound / d beta_j = s_j v_j, with v_j the neuron's input: no autograd.

*Precision.* Any admissible parameters are a proof, so they are searched for in float32, without margins; the proof with
what was found is computed in float64.

References:
    Xu et al., "Fast and Complete: Enabling Complete Verification with Rapid and Massively Parallel Incomplete
    Verifiers", ICLR 2021; Wang et al., "Beta-CROWN", NeurIPS 2021.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.bounds.linear_rows import over_rows, through_pool
from grood_cert.bounds.rounding import follow
from grood_cert.interval import Interval
from grood_cert.networks.activations import Activation, LeakyReLU
from grood_cert.networks.graph import Graph
from grood_cert.networks.operations import Addition, LinearMap, MaxPool

SLOPE_RATE = 0.3  # first step of a slope
_LAST_STEP = 0.5  # of Adam, relative to the first one
_ROW_RATE, _LAST_ROW_STEP = 0.4, 0.2  # the same of steps by signs


@dataclass
class Passage:
    """What a row met on its way back to the image, filled in by the backward pass: for branching and rounding.

    Attributes:
        image: Its coefficients at the image, shape (B, R, d).
        coefficients: Its coefficients behind every nonlinear layer it crossed, shape (B, R, *layer) each.
        slopes: Those of the lines below, there, but for pools.
        crossed: Numbers of the nodes it was on, the last first, but for the image.
        margin: What rounding can do beyond the charges of lines, shape (B, R).
    """

    image: Tensor | None = None
    coefficients: dict[int, Tensor] = field(default_factory=dict)
    slopes: dict[int, Tensor] = field(default_factory=dict)
    crossed: list[int] = field(default_factory=list)
    margin: Tensor | float = 0.0


class FreePullback:
    r"""The backward pass over domains, differentiable in the parameters of its lines.

    Args:
        graph: The network.
        ball: Balls.
        inputs: Bounds of the inputs of the first nonlinear layers, all that rows will cross.
        signs: Fixed signs, see `Domains`.
        exact: Whether bounds are moved outward for rounding; else they are for searches.

    Attributes:
        rounding: How far every node may be off on the domains.
        start: CROWN's parameters, shape (B, N): a slope for an unstable neuron, 0 for any other.
        largest: Largest admissible parameters: 1, infinity for multipliers, 0 where there is nothing to choose.
        smallest: Smallest admissible parameters.
        unstable: Where each leaky ReLU has a slope to choose, shape (B, *layer).
        places: Which parameters are those of each leaky ReLU.
    """

    def __init__(self, graph: Graph, ball: Ball, inputs: Sequence[Interval], signs: Tensor, exact: bool = True) -> None:
        self.graph, self.ball, self.signs = graph, ball, signs
        self.inputs = dict(zip(graph.nonlinear, inputs, strict=False))
        self.rounding = follow(graph, ball, inputs) if exact else None
        self.lines: dict[int, tuple[Tensor, Tensor | None, Tensor, Tensor]] = {}
        self.places: dict[int, slice] = {}
        self.unstable: dict[int, Tensor] = {}
        self.start = torch.zeros_like(signs)
        self.smallest = torch.zeros_like(signs)
        self.largest = torch.zeros_like(signs).masked_fill(signs != 0, torch.inf)
        # upper bounds of what maximum pools read, the entry of each window that leads, and whether it is the maximum
        self._pools: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._fixed: dict[int, Tensor] = {}  # slopes below that are not free, 0 where they are
        self._free: dict[int, Tensor] = {}  # 1 where a slope is free, else 0
        self._signed: dict[int, Tensor] = {}  # signs of the neurons of leaky ReLUs, where there are any
        place = 0
        for number, (lower, upper) in self.inputs.items():
            operation = graph.nodes[number].operation
            if isinstance(operation, MaxPool):
                alone = (operation.routing(lower, upper)[0] > 0).any(2)
                self._pools[number] = upper, operation.leaders(lower, upper)[0], alone
                continue
            assert isinstance(operation, Activation)
            below, constant_low, above, constant_high = operation.lines(lower, upper)
            if self.rounding is not None:
                charge = self.rounding.charges[number]
                constant_low, constant_high = constant_low - charge, constant_high + charge
            flat = self.rounding is None and isinstance(operation, LeakyReLU)
            self.lines[number] = below, None if flat else constant_low, above, constant_high
            if not isinstance(operation, LeakyReLU):
                continue
            part = slice(place, place + graph.nodes[number].size)
            self.places[number], place = part, part.stop
            self.unstable[number] = (lower < 0) & (upper > 0)
            self._fixed[number] = below.masked_fill(self.unstable[number], 0.0).unsqueeze(1)
            self._free[number] = self.unstable[number].to(signs).unsqueeze(1)
            if bool(signs[:, part].any()):
                self._signed[number] = signs[:, part].unflatten(1, graph.nodes[number].shape).unsqueeze(1)
            open_ = self.unstable[number].flatten(1)
            self.start[:, part] = torch.where(open_, below.flatten(1), 0.0)
            self.smallest[:, part] = open_.to(signs) * operation.slope
            self.largest[:, part].masked_fill_(open_, 1.0)

    def single(self) -> FreePullback:
        """The same in float32 and without margins, to search with."""
        ball = Ball(self.ball.center.float(), self.ball.eps.float(), self.ball.norm)
        inputs = [(lower.float(), upper.float()) for lower, upper in self.inputs.values()]
        return FreePullback(self.graph.single, ball, inputs, self.signs.float(), exact=False)

    def slopes(self, number: int, values: Tensor) -> Tensor:
        """Slope of the line below each neuron of a leaky ReLU, shape (B, R, *layer); values of shape (B, R, N)."""
        return torch.addcmul(self._fixed[number], self._own(number, values), self._free[number])

    def _own(self, number: int, values: Tensor) -> Tensor:
        """The parameters of a leaky ReLU in the shape of its layer."""
        own: Tensor = values[..., self.places[number]].unflatten(-1, self.graph.nodes[number].shape)
        return own

    def upper(self, rows: Mapping[int, Tensor], values: Tensor, passage: Passage | None = None) -> Tensor:
        r"""UB of the sum of a . value(node) over some nodes, on each domain.

        Args:
            rows: a for each node, shape (B, R, *layer).
            values: Admissible parameters, shape (B, R, N) or (B, 1, N).
            passage: Filled with what the rows met; there are no derivatives then.

        Returns:
            Shape (B, R).
        """
        if passage is not None:
            with torch.no_grad():
                return self.backwards(rows, values, passage)
        bound: Tensor = _Upper.apply(self, tuple(rows), values, *rows.values())  # type: ignore[no-untyped-call]
        return bound

    def backwards(self, rows: Mapping[int, Tensor], values: Tensor, passage: Passage) -> Tensor:
        """The same, without derivatives."""
        pending, constants = self.down_to(0, rows, values, passage)
        passage.image = pending[0].flatten(2)
        center = self.ball.center.flatten(1).unsqueeze(-1)
        return (passage.image @ center).squeeze(-1) + self.ball.support(passage.image) + constants

    def down_to(
        self, last: int, rows: Mapping[int, Tensor], values: Tensor, passage: Passage
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Rows on nodes up to a given one, and a constant: their sum with it lies above the sum of the given rows.

        Args:
            last: Number of the last node that is not crossed.
            rows: a for each node, shape (B, R, *layer).
            values: Admissible parameters, shape (B, R, N) or (B, 1, N).
            passage: Filled with what the rows met.

        Returns:
            A row for each node that was met, and constants of shape (B, R).
        """
        graph, pending = self.graph, dict(rows)
        first = next(iter(rows.values()))
        constants = torch.zeros(first.shape[:2]).to(first)
        for number, row in rows.items():
            self._note(passage, number, row)
        for number in range(max(pending), last, -1):
            if number not in pending:
                continue
            row = pending.pop(number)
            current = graph.nodes[number]
            operation, dimensions = current.operation, len(current.shape)
            passage.crossed.append(number)
            if isinstance(operation, LinearMap):
                if operation.bias is not None:
                    bias = operation.bias.expand(current.shape).reshape(-1)
                    constants = constants + row.flatten(2) @ bias
                row = over_rows(functools.partial(graph.transposes, number, operation), row, dimensions)
            elif not isinstance(operation, Addition):
                passage.coefficients[number] = row
                if isinstance(operation, MaxPool):
                    row, term = self._through_pool(number, operation, row)
                else:
                    row, term = self._through_activation(number, row, values, passage)
                constants = constants + term
            for target in current.inputs:
                pending[target] = pending[target] + row if target in pending else row
        return pending, constants

    def _through_activation(self, number: int, row: Tensor, values: Tensor, passage: Passage) -> tuple[Tensor, Tensor]:
        # torch.where is ten times as slow as a product where its condition changes from entry to entry
        slope_low, constant_low, slope_high, constant_high = self.lines[number]
        positive, negative = row.clamp(min=0), row.clamp(max=0)
        constant = _dot(positive, constant_high)
        if constant_low is not None:
            constant = constant + _dot(negative, constant_low)
        passed = positive * slope_high.unsqueeze(1)
        below = self.slopes(number, values) if number in self.places else slope_low.unsqueeze(1)
        passage.slopes[number] = below
        passed = torch.addcmul(passed, negative, below)
        if number in self._signed:
            push = self._own(number, values) * self._signed[number]
            self._note(passage, self.graph.nodes[number].inputs[0], push)
            passed = passed + push
        return passed, constant

    def _through_pool(self, number: int, operation: MaxPool, row: Tensor) -> tuple[Tensor, Tensor]:
        passed, constant = through_pool(operation, row.flatten(3), *self._pools[number])
        if self.rounding is not None:
            constant = constant + _dot(row.abs(), self.rounding.charges[number])
        return passed, constant

    def _note(self, passage: Passage, number: int, rows: Tensor) -> None:
        """Rows that start at a node: it may be off."""
        if self.rounding is not None:
            passage.margin = passage.margin + _dot(rows.abs(), self.rounding.margin(number))

    def path(self, passage: Passage) -> tuple[dict[int, Tensor], Tensor]:
        """Values v(node) on the path of rows through the relaxed network, and derivatives in the parameters, (B, R, N)."""
        assert passage.image is not None
        nodes = self.graph.nodes
        found = {0: self.ball.maximiser(passage.image).unflatten(2, nodes[0].shape)}
        slopes = torch.zeros(*passage.image.shape[:2], self.signs.shape[1]).to(passage.image)
        for number in reversed(passage.crossed):
            node = nodes[number]
            operation, first = node.operation, found[node.inputs[0]]
            if isinstance(operation, Addition):
                found[number] = first + found[node.inputs[1]]
            elif isinstance(operation, LinearMap):
                found[number] = over_rows(operation, first, len(nodes[node.inputs[0]].shape))
            elif isinstance(operation, MaxPool):
                found[number] = self._pooled(number, operation, first, passage.coefficients[number])
            else:
                found[number] = self._along(number, first, passage, slopes)
        return found, slopes

    def _along(self, number: int, inputs: Tensor, passage: Passage, slopes: Tensor) -> Tensor:
        """What the path makes of an activation's input; notes the derivatives in its parameters."""
        _, constant_low, slope_high, constant_high = self.lines[number]
        row = passage.coefficients[number]
        if number in self.places:
            choice = row.clamp(max=0) * self._free[number]
            if number in self._signed:
                choice = choice + self._signed[number]
            slopes[..., self.places[number]] = (choice * inputs).flatten(2)
        below = passage.slopes[number] * inputs
        if constant_low is not None:
            below = below + constant_low.unsqueeze(1)
        above = torch.addcmul(constant_high.unsqueeze(1), inputs, slope_high.unsqueeze(1))
        return torch.lerp(below, above, row.sign().clamp_(min=0))

    def _pooled(self, number: int, operation: MaxPool, inputs: Tensor, row: Tensor) -> Tensor:
        """What the path makes of a maximum pool's input: the leader, or the constant above all."""
        upper, best, alone = self._pools[number]
        entries = operation.windows(inputs.flatten(0, 1), 0.0).unflatten(0, inputs.shape[:2])
        leader = (entries * best.unsqueeze(1)).sum(3).reshape(row.shape)
        constant = ((row > 0).flatten(3) & ~alone.unsqueeze(1)).reshape(row.shape)
        return torch.where(constant, operation(upper).unsqueeze(1), leader)


class _Upper(torch.autograd.Function):
    """`FreePullback.upper` with the derivatives of its path."""

    @staticmethod
    def forward(ctx: Any, pullback: FreePullback, nodes: tuple[int, ...], values: Tensor, *rows: Tensor) -> Tensor:
        ctx.pullback, ctx.nodes, ctx.passage = pullback, nodes, Passage()
        ctx.save_for_backward(values)
        return pullback.backwards(dict(zip(nodes, rows, strict=True)), values, ctx.passage)

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        (values,), (weight,) = ctx.saved_tensors, weights
        found, slopes = ctx.pullback.path(ctx.passage)
        slopes = weight.unsqueeze(-1) * slopes
        slopes = slopes.sum(1, keepdim=True) if values.shape[1] < slopes.shape[1] else slopes
        rows = (found[node] * weight.reshape(*weight.shape, *[1] * (found[node].dim() - 2)) for node in ctx.nodes)
        return None, None, slopes, *rows


def _dot(rows: Tensor, constants: Tensor) -> Tensor:
    """Products of rows of shape (B, R, *layer) with constants of shape (B, *layer), shape (B, R)."""
    return (rows.flatten(2) @ constants.flatten(1).unsqueeze(-1)).squeeze(-1)


def descend(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    smallest: Tensor,
    largest: Tensor,
    rate: Tensor | float,
    steps: int,
) -> Tensor:
    r"""Projected Adam steps in float32 on a sum of independent functions; the best iterate of each, admissible.

    Args:
        function: Values of shape (..., P), float32, to one number each, shape (...).
        start: First iterate, admissible.
        smallest: Lower ends of the admissible box.
        largest: Upper ends.
        rate: First step of each parameter; the last one is half of it.
        steps: Steps; 0: the start.

    Returns:
        Where the smallest numbers were found, shape (..., P), in the floating-point type of the start.

    Example:
        >>> zero = torch.zeros(1, 1)
        >>> descend(lambda v: (v - 3).square().sum(-1), zero, zero, zero + 2, 1.0, 9)
        tensor([[2.]])
    """
    rate = rate.float() if isinstance(rate, Tensor) else rate
    first, second = torch.zeros_like(start.float()), torch.zeros_like(start.float())

    def move(step: int, slope: Tensor) -> Tensor:
        slope = torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)
        first.lerp_(slope, 0.1)
        second.lerp_(slope.square_(), 0.01)
        found = (second / (1 - 0.99 ** (step + 1))).sqrt_().add_(1e-8).reciprocal_().mul_(first)
        return found.mul_(rate * (_LAST_STEP ** (step / steps) / (1 - 0.9 ** (step + 1))))

    return _descended(function, start, smallest, largest, steps, move)


def descend_by_signs(
    function: Callable[[Tensor], Tensor], start: Tensor, smallest: Tensor, largest: Tensor, steps: int
) -> Tensor:
    """The same by steps against the signs of the derivatives, for slopes of rows; as good there, at half the cost.

    Example:
        >>> zero = torch.zeros(1, 1)
        >>> descend_by_signs(lambda v: (v - 3).square().sum(-1), zero, zero, zero + 1, 9)
        tensor([[1.]])
    """

    def move(step: int, slope: Tensor) -> Tensor:
        return slope.sign_().mul_(_ROW_RATE * _LAST_ROW_STEP ** (step / steps))

    return _descended(function, start, smallest, largest, steps, move)


def _descended(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    smallest: Tensor,
    largest: Tensor,
    steps: int,
    move: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """The best iterate, admissible; `move` makes of the number of a step and the derivative what to go down by."""
    if not steps or not start.numel():
        return start
    values, low, high = start.float(), smallest.float(), largest.float()
    best, where = torch.full_like(values[..., 0], torch.inf), values
    for step in range(steps + 1):
        last = step == steps
        with torch.set_grad_enabled(not last):
            values = values.detach().requires_grad_(not last)
            found = function(values)
        better = found.detach() < best
        best = torch.where(better, found.detach(), best)
        where = torch.where(better.unsqueeze(-1), values.detach(), where)
        if last:
            break
        (slope,) = torch.autograd.grad(found.sum(), values)
        values = torch.maximum(torch.minimum(values.detach() - move(step, slope), high), low)
    return torch.maximum(torch.minimum(where.to(start), largest), smallest)
