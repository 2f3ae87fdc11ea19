r"""Bounds of S with every free parameter of the proof optimised: slopes, softmax weights, chords and multipliers.

Below an unstable leaky ReLU (l < 0 < u) any line through 0 with a slope alpha between the leak and 1 is sound; U1 of
`grood_cert.bounds.score` holds for any p in the simplex; L1 for any slopes kappa between 0 and those of the chords. So

    S <= -( LB_alpha[softmax theta] + H(softmax theta) )        for all alpha, theta,
    S >= -( M + log( sum_k e^(u_k - M) - kappa . u + UB_alpha[kappa] ) )        for all alpha, kappa,

and all of them are optimised together by projected Adam steps through the backward pass (alpha-CROWN). Every iterate is
a proof, the best one is kept. The upper bound is a concave problem in p whose optimum is that of the convex relaxation
of the whole network with its score; the lower bound maximises a convex function, which chords only enclose, so tight
intervals of the logits matter: each end of each logit is optimised as a row of its own first.

*Tightening.* Intervals of hidden neurons and logits are optimised rows too. To prove S <= t on a set it is enough to look
at its part V = {S >= t}, and on V the linear condition c . f + d >= 0 holds, with c = -p, d = -t - H(p) by U1's argument
(for S >= t, V = {S <= t} and c = kappa, d = sum_k e^(u_k - M) - kappa . u - e^(-t - M) by L1's). So

    max { z_j : x in V }  <=  max z_j + lambda (c . f + d)        for all lambda >= 0,

and a crossed interval proves V empty. Near the robust radius V is a small corner of the ball, hence the gain (INVPROP).

*Domains.* The parts of a ball on which some neurons keep one sign s_j and the logits stay in an interval are bounded in
the same way. What is known there enters with Lagrange multipliers beta, mu, nu >= 0 (beta-CROWN):

    max { a . z : s_j z_j >= 0, l <= f <= u }  <=  max a . z + sum_j beta_j s_j z_j + mu . (f - l) + nu . (u - f).

A neuron has a slope while it is unstable and a multiplier once its sign is fixed, so one number each is stored.

Bounds are moved outward by 1e-12 of the size of what was summed.

References:
    Xu et al., "Fast and Complete: Enabling Complete Verification with Rapid and Massively Parallel Incomplete
    Verifiers", ICLR 2021 (alpha-CROWN); Wang et al., "Beta-CROWN", NeurIPS 2021; Kotha et al., "Provably Bounding
    Neural Network Preimages", NeurIPS 2023 (INVPROP).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from grood_cert.ball import Ball
from grood_cert.bounds.activations import Activation, LeakyReLU
from grood_cert.bounds.graph import Graph, Node
from grood_cert.bounds.hidden import DEFAULT_MEMORY, ROUNDING, Interval, Preactivations
from grood_cert.bounds.linear_rows import over_rows
from grood_cert.bounds.operations import Addition, LinearMap, MaxPool
from grood_cert.bounds.score import chord_lower, chord_slopes, gibbs_upper
from grood_cert.errors import InputError
from grood_cert.scores import energy

Side = Literal["upper", "lower"]
_SLOPE_RATE = 0.3  # first step of Adam, per parameter
_WEIGHT_RATE = 0.1
_MULTIPLIER_RATE = 0.6  # relative to the row's largest coefficient at the layer
_LAST_STEP = 0.5  # relative to the first one
_LOGIT_STEPS = 10
_FIRST_PRICE = 0.5  # lambda to start from, in units of width / depth of the condition at x
_CROSSING = 1e-9
_NARROW = 1e-6  # an interval of a logit that is not worth cutting
Condition = tuple[Tensor, Tensor]


def sign_of(side: Side) -> int:
    """+1 for an upper bound, -1 for a lower one: bounds of sign * S from above.

    Raises:
        InputError: If the side is neither.

    Example:
        >>> sign_of("upper"), sign_of("lower")
        (1, -1)
    """
    if side not in ("upper", "lower"):
        raise InputError(f"unknown side {side!r}; use upper or lower")
    return 1 if side == "upper" else -1


@dataclass(frozen=True)
class Domains:
    """Parts of balls on which some neurons keep one sign.

    Attributes:
        graph: The network.
        ball: The balls, one a domain.
        inputs: Bounds of the input of every nonlinear layer on the domain, shape (B, *layer) each.
        signs: Fixed signs of the neurons of all leaky ReLUs, one layer after the other, shape (B, N): 1 for z >= 0, -1
            for z <= 0, 0 for open.
        logits: Bounds of the logits on the domain, shape (B, K) each.
    """

    graph: Graph
    ball: Ball
    inputs: tuple[Interval, ...]
    signs: Tensor
    logits: Interval

    def __len__(self) -> int:
        return len(self.signs)

    def at(self, index: Tensor) -> Domains:
        """Some of the domains."""
        return Domains(
            self.graph,
            Ball(self.ball.center[index], self.ball.eps[index], self.ball.norm),
            tuple((lower[index], upper[index]) for lower, upper in self.inputs),
            self.signs[index],
            (self.logits[0][index], self.logits[1][index]),
        )


def neurons(graph: Graph) -> int:
    """Number of leaky ReLUs in the network, N."""
    return sum(
        graph.nodes[number].size for number in graph.nonlinear if isinstance(graph.nodes[number].operation, LeakyReLU)
    )


@dataclass
class Passage:
    """What a row met on its way back to the image, filled in by the backward pass: for branching and rounding.

    Attributes:
        image: Its coefficients at the image, shape (B, R, d).
        coefficients: Its coefficients behind every nonlinear layer it crossed, shape (B, R, *layer) each.
        biases: Sum of |a| |b| over the biases b it met, shape (B, R).
    """

    image: Tensor | None = None
    coefficients: dict[int, Tensor] = field(default_factory=dict)
    biases: Tensor | float = 0.0


class Relaxation:
    r"""The backward pass over domains, differentiable in the parameters of its lines.

    Args:
        graph: The network.
        ball: Balls.
        inputs: Bounds of the inputs of the first nonlinear layers, all that rows will cross.
        signs: Fixed signs, see `Domains`.

    Attributes:
        start: CROWN's parameters, shape (B, N): a slope for an unstable neuron, 0 for any other.
        largest: Largest admissible parameters: 1, infinity for multipliers, 0 where there is nothing to choose.
        smallest: Smallest admissible parameters.
    """

    def __init__(self, graph: Graph, ball: Ball, inputs: Sequence[Interval], signs: Tensor) -> None:
        self.graph, self.ball, self.signs = graph, ball, signs
        self.inputs = dict(zip(graph.nonlinear, inputs, strict=False))
        self.lines: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.places: dict[int, slice] = {}
        self.unstable: dict[int, Tensor] = {}
        self.start = torch.zeros_like(signs)
        self.smallest = torch.zeros_like(signs)
        self.largest = torch.zeros_like(signs).masked_fill(signs != 0, torch.inf)
        place = 0
        for number, (lower, upper) in self.inputs.items():
            operation = graph.nodes[number].operation
            if not isinstance(operation, Activation):
                continue
            self.lines[number] = operation.lines(lower, upper)
            if not isinstance(operation, LeakyReLU):
                continue
            part = slice(place, place + graph.nodes[number].size)
            self.places[number], place = part, part.stop
            self.unstable[number] = (lower < 0) & (upper > 0)
            open_ = self.unstable[number].flatten(1)
            self.start[:, part] = torch.where(open_, self.lines[number][0].flatten(1), 0.0)
            self.smallest[:, part] = open_.to(signs) * operation.slope
            self.largest[:, part].masked_fill_(open_, 1.0)

    def slopes(self, number: int, values: Tensor) -> Tensor:
        """Slope of the line below each neuron of a leaky ReLU, shape (B, R, *layer); values of shape (B, R, N)."""
        own = values[..., self.places[number]].unflatten(-1, self.graph.nodes[number].shape)
        return torch.where(self.unstable[number].unsqueeze(1), own, self.lines[number][0].unsqueeze(1))

    def upper(self, rows: Mapping[int, Tensor], values: Tensor, passage: Passage | None = None) -> Tensor:
        r"""UB of the sum of a . value(node) over some nodes, on each domain.

        Args:
            rows: a for each node, shape (B, R, *layer).
            values: Admissible parameters, shape (B, R, N) or (B, 1, N).
            passage: Filled with what the rows met.

        Returns:
            Shape (B, R).
        """
        graph = self.graph
        pending = dict(rows)
        constants: Tensor | float = 0.0
        for number in range(max(pending), 0, -1):
            if number not in pending:
                continue
            row = pending.pop(number)
            current = graph.nodes[number]
            operation, dimensions = current.operation, len(current.shape)
            if isinstance(operation, LinearMap):
                if operation.bias is not None:
                    axes = tuple(range(-dimensions, 0))
                    constants = constants + (row * operation.bias).sum(axes)
                    if passage is not None:
                        passage.biases = passage.biases + (row.abs() * operation.bias.abs()).sum(axes)
                row = over_rows(operation.transpose, row, dimensions)
            elif not isinstance(operation, Addition):
                if passage is not None:
                    passage.coefficients[number] = row
                if isinstance(operation, MaxPool):
                    row, term = self._through_pool(number, operation, row)
                else:
                    row, term = self._through_activation(number, row, values)
                constants = constants + term
            for target in current.inputs:
                pending[target] = pending[target] + row if target in pending else row
        image = pending[0].flatten(2)
        if passage is not None:
            passage.image = image
        return (image @ self.ball.center.flatten(1).unsqueeze(-1)).squeeze(-1) + self.ball.support(image) + constants

    def _through_activation(self, number: int, row: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        slope_low, constant_low, slope_high, constant_high = (line.unsqueeze(1) for line in self.lines[number])
        positive, negative = row.clamp(min=0), row.clamp(max=0)
        constant = (positive.flatten(2) @ constant_high.flatten(2).mT).squeeze(-1)
        if number not in self.places:
            constant = constant + (negative.flatten(2) @ constant_low.flatten(2).mT).squeeze(-1)
            return positive * slope_high + negative * slope_low, constant
        shape = self.graph.nodes[number].shape
        push = values[..., self.places[number]] * self.signs[:, self.places[number]].unsqueeze(1)
        row = positive * slope_high + negative * self.slopes(number, values) + push.unflatten(-1, shape)
        return row, constant

    def _through_pool(self, number: int, pool: MaxPool, row: Tensor) -> tuple[Tensor, Tensor]:
        """Below: the entry with the largest lower bound; above: that entry if no other can win, else the constant."""
        lower, upper = self.inputs[number]
        low = pool.windows(lower, -torch.inf)
        best = torch.zeros_like(low).scatter(2, low.argmax(2, keepdim=True), 1.0)
        decided = (pool.routing(lower, upper)[0] > 0).any(2)
        positive, negative = row.clamp(min=0).flatten(3), row.clamp(max=0).flatten(3)  # (B, R, C, windows)
        undecided = positive * (~decided).unsqueeze(1)
        constant = (undecided * pool(upper).flatten(2).unsqueeze(1)).sum((2, 3))
        entries = (negative + positive - undecided).unsqueeze(3) * best.unsqueeze(1)
        return over_rows(pool.spread, entries, 3), constant

    def margin(self, passage: Passage) -> Tensor:
        """Rounding: 1e-12 of the size of what was summed on the way, shape (B, R)."""
        farthest = torch.maximum(self.ball.lower.abs(), self.ball.upper.abs()).flatten(1)
        assert passage.image is not None
        size = (passage.image.abs() @ farthest.unsqueeze(-1)).squeeze(-1) + passage.biases
        for number, row in passage.coefficients.items():
            lower, upper = self.inputs[number]
            reach = torch.maximum(lower.abs(), upper.abs()).flatten(1)
            if isinstance(self.graph.nodes[number].operation, MaxPool):
                size = size + row.abs().flatten(2).sum(2) * reach.amax(1, keepdim=True)
            else:
                size = size + (row.abs().flatten(2) @ reach.unsqueeze(-1)).squeeze(-1)
        return ROUNDING * size


def descend(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    smallest: Tensor,
    largest: Tensor,
    rate: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor]:
    r"""Projected Adam steps on a sum of independent functions; the best iterate of each.

    Args:
        function: Values of shape (..., P) to one number each, shape (...).
        start: First iterate, admissible.
        smallest: Lower ends of the admissible box.
        largest: Upper ends.
        rate: First step of each parameter; the last one is half of it.
        steps: Steps.

    Returns:
        Smallest numbers, shape (...), and where they were found, shape (..., P).

    Example:
        >>> zero = torch.zeros(1, 1)
        >>> best, where = descend(lambda v: (v - 3).square().sum(-1), zero, zero, zero + 2, torch.ones(1), 9)
        >>> where
        tensor([[2.]])
    """
    values = start
    best, where = torch.full_like(start[..., 0], torch.inf), start
    first, second = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            values = values.detach().requires_grad_(step < steps)
            found = function(values)
        better = found.detach() < best
        best = torch.where(better, found.detach(), best)
        where = torch.where(better.unsqueeze(-1), values.detach(), where)
        if not found.requires_grad:  # the last step, or nothing to choose
            break
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(found.sum(), values)
        slope = torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)
        first, second = first.lerp(slope, 0.1), second.lerp(slope.square(), 0.01)
        move = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        values = torch.maximum(
            torch.minimum(values.detach() - rate * _LAST_STEP ** (step / steps) * move, largest), smallest
        )
    return best, where


class Objective:
    r"""An upper bound of sign * S on each domain as a function of all parameters of its proof, (B, P) -> (B,).

    The parameters are those of the lines, then for the upper side theta; for the lower side the shares of the chord
    slopes and the multipliers of the lower and upper ends of the logits.

    Attributes:
        relaxation: The backward pass.
        low: Lower ends of the logits, shape (B, K).
        high: Upper ends.
        start: Parameters of the plain bounds U1 with p = softmax f(x) and L1, shape (B, P).
        smallest: Lower ends of the admissible parameters.
        largest: Upper ends.
    """

    def __init__(self, domains: Domains, side: Side) -> None:
        self.relaxation = Relaxation(domains.graph, domains.ball, domains.inputs, domains.signs)
        self.low, self.high = domains.logits
        self._side = side
        self._lines = neurons(domains.graph)
        self._node = len(domains.graph.nodes) - 1
        ones = torch.ones_like(self.low)
        infinite = torch.full_like(ones, torch.inf)
        if side == "upper":
            with torch.no_grad():
                logits = domains.graph(domains.ball.center)
            tails = logits, -infinite, infinite
        else:
            tails = (
                torch.cat([ones, 0 * ones, 0 * ones], 1),
                torch.zeros_like(ones).repeat(1, 3),
                torch.cat([ones, infinite, infinite], 1),
            )
            self.chords = chord_slopes(self.low, self.high)
        heads = self.relaxation.start, self.relaxation.smallest, self.relaxation.largest
        self.start, self.smallest, self.largest = (
            torch.cat([head, tail], 1) for head, tail in zip(heads, tails, strict=True)
        )

    def __call__(self, values: Tensor, passage: Passage | None = None) -> Tensor:
        """The bound; with a passage moved outward for rounding."""
        lines, tail = values[:, : self._lines].unsqueeze(1), values[:, self._lines :]
        if self._side == "upper":
            weights = torch.softmax(tail, -1)
            row_upper = self._row(-weights, lines, passage)
            bound = gibbs_upper(-row_upper, weights)
        else:
            kappa, low, high = self.parts(tail)
            row_upper = self._row(kappa + low - high, lines, passage)
            offset = (high * self.high - low * self.low).sum(-1)
            if passage is not None:
                offset = offset + ROUNDING * (high * self.high.abs() + low * self.low.abs()).sum(-1)
            bound = -chord_lower(row_upper + offset, kappa, self.high)
        return bound + ROUNDING * (1 + bound.abs()) if passage is not None else bound

    def _row(self, row: Tensor, lines: Tensor, passage: Passage | None) -> Tensor:
        bound = self.relaxation.upper({self._node: row.unsqueeze(1)}, lines, passage)
        if passage is not None:
            bound = bound + self.relaxation.margin(passage)
        return bound.squeeze(1)

    def rate(self, values: Tensor) -> Tensor:
        """First steps of Adam; multipliers, which have the size of the row, take theirs from its largest coefficient."""
        passage, rate = Passage(), torch.full_like(values, _WEIGHT_RATE)
        with torch.no_grad():
            self(values, passage)
        rate[:, : self._lines] = _SLOPE_RATE
        for number, place in self.relaxation.places.items():
            size = passage.coefficients[number].abs().flatten(1).amax(1, keepdim=True)
            rate[:, place] = torch.where(torch.isinf(self.largest[:, place]), _MULTIPLIER_RATE * size, _SLOPE_RATE)
        return rate

    def parts(self, tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lower side: slopes kappa and the multipliers of the lower and the upper ends, in units of the slopes."""
        share, low, high = tail.chunk(3, -1)
        unit = self.chords.amax(-1, keepdim=True)
        return self.chords * share, unit * low, unit * high

    def chord_slack(self, values: Tensor, logits: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Lower side: distance of the lines of L1 from e^(z - M) at given logits, and where their intervals may be cut.

        Args:
            values: Parameters.
            logits: Shape (B, K).
            share: How much of each line's largest distance is added.

        Returns:
            Distances, -1 where an interval is too narrow to be cut, and cuts: half way between the logit and the place
            of the largest distance, a tenth of the width away from both ends; shape (B, K) each.
        """
        kappa = self.parts(values[:, self._lines :])[0]
        largest = self.high.amax(-1, keepdim=True)

        def distance(points: Tensor) -> Tensor:
            return kappa * (points - self.high) + torch.exp(self.high - largest) - torch.exp(points - largest)

        def inside(points: Tensor, margin: Tensor | float = 0.0) -> Tensor:
            return torch.maximum(torch.minimum(points, self.high - margin), self.low + margin)

        width = self.high - self.low
        widest = inside(kappa.clamp(min=torch.finfo(kappa.dtype).tiny).log() + largest)
        slack = distance(inside(logits)) + share * distance(widest)
        return torch.where(width > _NARROW, slack, -1.0), inside((inside(logits) + widest) / 2, width / 10)

    def condition(self, values: Tensor, level: float) -> Condition:
        """The pair c, d with c . f + d >= 0 wherever sign * S >= level, by the proof with these parameters."""
        tail = values[:, self._lines :]
        if self._side == "upper":
            weights = torch.softmax(tail, -1)
            constant = torch.xlogy(weights, weights).sum(-1) - level
            return -weights, constant + ROUNDING * (1 + constant.abs() + abs(level))
        kappa = self.parts(tail)[0]
        largest = self.high.amax(-1, keepdim=True)
        products = kappa * self.high
        wanted = torch.exp((level - largest).clamp(max=1)).squeeze(-1)
        constant = torch.exp(self.high - largest).sum(-1) - products.sum(-1) - wanted
        return kappa, constant + ROUNDING * (1 + wanted * (1 + abs(level)) + products.abs().sum(-1))


def _unit_rows(index: Tensor, origin: Node) -> Tensor:
    """Rows +e_i, then -e_i, for the units i of a node; index of shape (B, U)."""
    rows = torch.zeros(*index.shape, origin.size, dtype=torch.float64, device=index.device)
    rows.scatter_(2, index.unsqueeze(-1), 1.0)
    both: Tensor = torch.cat([rows, -rows], 1).unflatten(-1, origin.shape)
    return both


def tightened(
    domains: Domains,
    places: Sequence[int],
    steps: int,
    start: Tensor | None = None,
    condition: Condition | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Domains:
    r"""Both ends of every unstable neuron of some layers, or of every logit, as optimised rows.

    Args:
        domains: The domains.
        places: Which nonlinear layers, counted in execution order; their number stands for the logits.
        steps: Adam steps.
        start: First parameters of every row, shape (B, N); CROWN's if absent.
        condition: c, shape (B, K), and d, shape (B,), with c . f + d >= 0 wherever it matters: the result holds there.
        memory: Bytes that blocks of rows may take.

    Returns:
        The domains with their intervals intersected with what was found; ends may cross, see `emptied`.
    """
    graph, output = domains.graph, len(domains.graph.nodes) - 1
    widest = max(node.size for node in graph.nodes)
    for place in places:
        last = place == len(graph.nonlinear)
        node = output if last else graph.nodes[graph.nonlinear[place]].inputs[0]
        interval = domains.logits if last else domains.inputs[place]
        lower, upper = (end.flatten(1) for end in interval)
        needed = torch.ones_like(lower, dtype=torch.bool) if last else (lower < 0) & (upper > 0)
        count = int(needed.sum(1).max())
        order = needed.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
        for index in order.split(max(1, memory // (8 * 2 * len(domains) * widest)), 1) if count else ():
            low, high = _row_bounds(domains, node, index, steps, start, condition)
            own = needed.gather(1, index)  # the others only fill up the rows of samples that need fewer
            low, high = torch.where(own, low, -torch.inf), torch.where(own, high, torch.inf)
            lower = lower.scatter(1, index, torch.fmax(lower.gather(1, index), low))
            upper = upper.scatter(1, index, torch.fmin(upper.gather(1, index), high))
        found = lower.reshape(interval[0].shape), upper.reshape(interval[1].shape)
        if last:
            domains = replace(domains, logits=found)
        else:
            domains = replace(domains, inputs=(*domains.inputs[:place], found, *domains.inputs[place + 1 :]))
    return domains


def _row_bounds(
    domains: Domains, node: int, index: Tensor, steps: int, start: Tensor | None, condition: Condition | None
) -> Interval:
    """Bounds of some units of a node, shape (B, U); each row has lines and a multiplier lambda of its own."""
    graph, output = domains.graph, len(domains.graph.nodes) - 1
    relaxation = Relaxation(graph, domains.ball, domains.inputs, domains.signs)
    rows = _unit_rows(index, graph.nodes[node])
    lines = relaxation.start.shape[1]
    unit = torch.zeros_like(rows.flatten(2)[..., 0])
    if condition is not None:
        coefficients, constant = condition
        with torch.no_grad():
            depth = ((coefficients * graph(domains.ball.center)).sum(1) + constant).abs().clamp(min=1e-3)
            reach = relaxation.upper({node: rows}, relaxation.start.unsqueeze(1))
        unit = (reach[:, : index.shape[1]] + reach[:, index.shape[1] :]).clamp(min=0).repeat(1, 2) / depth.unsqueeze(1)

    def bound(parameters: Tensor, passage: Passage | None = None) -> Tensor:
        sources, extra = {node: rows}, torch.zeros_like(unit)
        if condition is not None:
            price = parameters[..., lines] * unit
            pushed = price.unsqueeze(-1) * coefficients.unsqueeze(1)
            sources[output] = sources[output] + pushed if node == output else pushed
            extra = price * constant.unsqueeze(1)
        value = relaxation.upper(sources, parameters[..., :lines], passage) + extra
        return value if passage is None else value + relaxation.margin(passage) + ROUNDING * extra.abs()

    def extended(part: Tensor, price: float) -> Tensor:
        return functional.pad(part, (0, 1), value=price).unsqueeze(1).expand(-1, rows.shape[1], -1)

    smallest, largest = extended(relaxation.smallest, 0.0), extended(relaxation.largest, torch.inf)
    first = extended(relaxation.start if start is None else start, _FIRST_PRICE)
    first = torch.maximum(torch.minimum(first, largest), smallest)
    rate = torch.full_like(first[0, 0], _SLOPE_RATE)
    _, parameters = descend(bound, first, smallest, largest, rate, steps)
    with torch.no_grad():
        value = bound(parameters, Passage())
    return -value[:, index.shape[1] :], value[:, : index.shape[1]]


def emptied(domains: Domains) -> tuple[Domains, Tensor]:
    """Domains with their intervals in order, and which of them an interval crossed beyond rounding proves empty."""
    empty = torch.zeros(len(domains), dtype=torch.bool, device=domains.signs.device)
    for lower, upper in (*domains.inputs, domains.logits):
        scale = 1 + torch.maximum(lower.abs(), upper.abs())
        crossed = (lower - upper > _CROSSING * scale) & torch.isfinite(lower) & torch.isfinite(upper)
        empty = empty | crossed.flatten(1).any(1)
    inputs = tuple((torch.minimum(*ends), torch.maximum(*ends)) for ends in domains.inputs)
    logits = torch.minimum(*domains.logits), torch.maximum(*domains.logits)
    return replace(domains, inputs=inputs, logits=logits), empty


def optimise(objective: Objective, steps: int, start: Tensor | None = None) -> tuple[Tensor, Tensor, Passage]:
    """Best bound of sign * S found, moved outward, infinite where there is none; its parameters and its passage."""
    first = objective.start if start is None else start
    first = torch.maximum(torch.minimum(first, objective.largest), objective.smallest)
    values = first
    if steps:
        rate = objective.rate(first)
        _, values = descend(objective, first, objective.smallest, objective.largest, rate, steps)
    passage = Passage()
    with torch.no_grad():
        bound = objective(values, passage)
    return torch.where(torch.isfinite(bound), bound, torch.inf), values, passage


def plain(domains: Domains, side: Side) -> Tensor:
    """The best of the bounds of `score_bounds`, U0 and U1 or L0 and L1, as a bound of sign * S."""
    lower, upper = domains.logits
    per_logit = energy(lower) if side == "upper" else -energy(upper)
    per_logit = per_logit + ROUNDING * (1 + torch.maximum(lower.abs(), upper.abs()).amax(1))
    objective = Objective(domains, side)
    found = [torch.where(torch.isfinite(per_logit), per_logit, torch.inf), optimise(objective, 0)[0]]
    if side == "upper":
        classes = lower.shape[1]
        middle = torch.cat([objective.start[:, :-classes], (lower + upper) / 2], 1)
        found.append(optimise(objective, 0, middle)[0])
    return torch.stack(found).amin(0)


def root(graph: Graph, ball: Ball, hidden: Preactivations | Sequence[Interval]) -> tuple[Domains, Tensor]:
    """The balls as domains, and which of them have finite ordered bounds."""
    signs = torch.zeros(len(ball.center), neurons(graph), dtype=torch.float64, device=ball.center.device)
    if isinstance(hidden, Preactivations):
        return Domains(graph, ball, hidden.inputs, signs, hidden.logits), hidden.proved
    if len(hidden) != len(graph.nonlinear):
        raise InputError(f"expected bounds of {len(graph.nonlinear)} nonlinear layers, got {len(hidden)}")
    infinite = torch.full((len(signs), graph.classes), torch.inf, dtype=torch.float64, device=signs.device)
    domains = Domains(graph, ball, tuple(hidden), signs, (-infinite, infinite))
    domains = tightened(domains, [len(graph.nonlinear)], 0)
    proved = torch.ones_like(signs[:, 0] if signs.shape[1] else infinite[:, 0], dtype=torch.bool)
    for lower, upper in (*domains.inputs, domains.logits):
        proved = proved & (torch.isfinite(lower) & torch.isfinite(upper) & (lower <= upper)).flatten(1).all(1)
    return domains, proved


def optimised_bounds(
    graph: Graph,
    ball: Ball,
    side: Side,
    hidden: Preactivations | Sequence[Interval],
    steps: int = 20,
    hidden_steps: int = 0,
) -> Tensor:
    r"""S_ub or S_lb over each ball with all parameters of the proof optimised together.

    Args:
        graph: The network.
        ball: Batch of balls, float64.
        side: "upper" or "lower".
        hidden: Bounds of the inputs of its nonlinear layers (see `preactivations`).
        steps: Adam steps; 0 gives the plain bounds.
        hidden_steps: Adam steps for the ends of every unstable neuron of the hidden layers, which cost far more.

    Returns:
        Bounds, shape (B,), never looser than U1 or L1 with CROWN on the same hidden bounds; NaN where not proved.

    Raises:
        InputError: If the side is unknown or the bounds do not fit the network.

    Example:
        >>> from grood_cert.bounds.graph import trace
        >>> from grood_cert.bounds.hidden import preactivations
        >>> layers = torch.nn.Flatten(), torch.nn.Linear(4, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3)
        >>> graph = trace(torch.nn.Sequential(*layers).eval(), (1, 2, 2))
        >>> ball = Ball(torch.full((2, 1, 2, 2), 0.5).double(), torch.tensor([0.1, 0.2]).double(), "linf")
        >>> hidden = preactivations(graph, ball)
        >>> optimised_bounds(graph, ball, "upper", hidden) <= optimised_bounds(graph, ball, "upper", hidden, steps=0)
        tensor([True, True])
    """
    sign = sign_of(side)
    domains, proved = root(graph, ball, hidden)
    bound = plain(domains, side)
    if steps:
        if hidden_steps:
            domains = tightened(domains, range(1, len(graph.nonlinear)), hidden_steps)
        if side == "lower":
            domains = tightened(domains, [len(graph.nonlinear)], min(steps, _LOGIT_STEPS))
        domains, empty = emptied(domains)
        proved = proved & ~empty  # a ball is not empty: something is wrong
        bound = torch.minimum(bound, optimise(Objective(domains, side), steps)[0])
    return torch.where(proved & torch.isfinite(bound), sign * bound, torch.nan)
