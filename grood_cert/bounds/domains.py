r"""Parts of balls on which some neurons keep one sign, and optimised linear bounds on them.

Below an unstable leaky ReLU (l < 0 < u) any line through 0 with a slope alpha between the leak and 1 is sound. The parts
of a ball on which some neurons keep one sign s_j and the outputs z stay in an interval are bounded as a ball is; what is
known there enters with Lagrange multipliers beta, mu, nu >= 0 (beta-CROWN):

    max { a . z : s_j z_j >= 0, l <= f <= u }  <=  max a . z + sum_j beta_j s_j z_j + mu . (f - l) + nu . (u - f),

where f stands for the images of the logits that the proof is about (`reduction`). A neuron has a slope while it is unstable and a multiplier once its sign is fixed, so one number each is stored. All of
them are optimised by projected Adam steps through the backward pass; every iterate is a proof, the best one is kept.

*Tightening.* Intervals of hidden neurons and of outputs are optimised rows. Where it is enough to look at a part V of
the domain on which a linear condition c . f + d >= 0 holds,

    max { z_j : x in V }  <=  max z_j + lambda (c . f + d)        for all lambda >= 0,

and a crossed interval proves V empty (INVPROP). Above the layer of z_j the condition takes lines of its own, once for all
rows: lambda (c . f + d) <= lambda (r . z + d') there, r . z + d' its bound by values of that layer.

Bounds are moved outward by what rounding can do (`rounding`): lines by their charges, a multiplier's term beta s_j z_j by
beta times how far z_j may be off. A sign is that of the neuron as it is evaluated.

References:
    Wang et al., "Beta-CROWN", NeurIPS 2021; Kotha et al., "Provably Bounding Neural Network Preimages", NeurIPS 2023
    (INVPROP).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from grood_cert.ball import Ball
from grood_cert.bounds.free_pullback import FreePullback, Passage, descend_by_signs
from grood_cert.bounds.hidden import DEFAULT_MEMORY, Preactivations
from grood_cert.bounds.reduction import Head, Reduction
from grood_cert.errors import InputError
from grood_cert.interval import ROUNDING, Interval, crossed, ordered
from grood_cert.networks.activations import LeakyReLU
from grood_cert.networks.graph import Graph

Condition = tuple[Tensor, Tensor]
_FIRST_PRICE = 0.5  # lambda to start from, in units of width / depth of the condition at x


@dataclass(frozen=True)
class Domains:
    """Parts of balls on which some neurons keep one sign.

    Attributes:
        graph: The network.
        ball: The balls, one a domain.
        inputs: Bounds of the input of every nonlinear layer on the domain, shape (B, *layer) each.
        signs: Fixed signs of the neurons of all leaky ReLUs, one layer after the other, shape (B, N): 1 for z >= 0, -1
            for z <= 0, 0 for open.
        outputs: Bounds of the images of the logits that a proof is about on the domain, shape (B, size) each.
        head: Which images they are.
    """

    graph: Graph
    ball: Ball
    inputs: tuple[Interval, ...]
    signs: Tensor
    outputs: Interval
    head: Head

    def __len__(self) -> int:
        return len(self.signs)

    def at(self, index: Tensor) -> Domains:
        """Some of the domains."""
        return Domains(
            self.graph,
            Ball(self.ball.center[index], self.ball.eps[index], self.ball.norm),
            tuple((lower[index], upper[index]) for lower, upper in self.inputs),
            self.signs[index],
            (self.outputs[0][index], self.outputs[1][index]),
            self.head.at(index),
        )


def neurons(graph: Graph, before: int | None = None) -> int:
    """Number of leaky ReLUs in the network, N, or in the nodes before a given one."""
    nodes = graph.nodes[:before]
    return sum(node.size for node in nodes if isinstance(node.operation, LeakyReLU))


def _place_of(graph: Graph, layer: int) -> slice:
    """Where the neurons of a leaky ReLU are among all of them."""
    start = neurons(graph, layer)
    return slice(start, start + graph.nodes[layer].size)


def _unit_rows(index: Tensor, size: int) -> Tensor:
    """Rows +e_i, then -e_i, for some units i; index of shape (B, U)."""
    rows = torch.zeros(*index.shape, size, dtype=torch.float64, device=index.device)
    rows.scatter_(2, index.unsqueeze(-1), 1.0)
    return torch.cat([rows, -rows], 1)


def tightened(
    domains: Domains,
    places: Sequence[int],
    steps: int,
    start: Tensor | None = None,
    condition: Condition | None = None,
    memory: int = DEFAULT_MEMORY,
    most: int | None = None,
    foremost: tuple[Tensor, int] | None = None,
) -> Domains:
    r"""Both ends of unstable neurons of some layers, or of every output, as optimised rows.

    Args:
        domains: The domains.
        places: Which nonlinear layers, counted in execution order; their number stands for the outputs.
        steps: Steps of the parameters of every row.
        start: First parameters of every row, shape (B, N); CROWN's if absent.
        condition: c, shape (B, K), and d, shape (B,), with c . f + d >= 0 wherever it matters: the result holds there.
        memory: Bytes that blocks of rows may take.
        most: Layers with more unstable neurons are left as they are.
        foremost: A weight of every neuron, shape (B, N), and how many neurons of each layer to look at: the unstable ones
            with the largest weights. All of them if absent.

    Returns:
        The domains with their intervals intersected with what was found; ends may cross, see `emptied`.
    """
    graph, output = domains.graph, len(domains.graph.nodes) - 1
    widest = max(node.size for node in graph.nodes)
    for place in places:
        last = place == len(graph.nonlinear)
        node = output if last else graph.nodes[graph.nonlinear[place]].inputs[0]
        interval = domains.outputs if last else domains.inputs[place]
        lower, upper = (end.flatten(1) for end in interval)
        needed = torch.ones_like(lower, dtype=torch.bool) if last else (lower < 0) & (upper > 0)
        if most is not None and not last:
            needed = needed & (needed.sum(1, keepdim=True) <= most)
        count, weight = int(needed.sum(1).max()), needed.to(lower)
        if foremost is not None and not last:
            count = min(count, foremost[1])
            weight = torch.where(needed, foremost[0][:, _place_of(graph, graph.nonlinear[place])], -torch.inf)
        order = weight.argsort(dim=1, descending=True, stable=True)[:, :count]
        for index in order.split(max(1, memory // (8 * 2 * len(domains) * widest)), 1) if count else ():
            rows = _unit_rows(index, lower.shape[1])
            rows = domains.head.rows(rows, graph.classes) if last else rows.unflatten(-1, graph.nodes[node].shape)
            low, high = _row_bounds(domains, node, rows, steps, start, condition)
            own = needed.gather(1, index)  # the others only fill up the rows of samples that need fewer
            low, high = torch.where(own, low, -torch.inf), torch.where(own, high, torch.inf)
            lower = lower.scatter(1, index, torch.fmax(lower.gather(1, index), low))
            upper = upper.scatter(1, index, torch.fmin(upper.gather(1, index), high))
        found = lower.reshape(interval[0].shape), upper.reshape(interval[1].shape)
        if last:
            domains = replace(domains, outputs=found)
        else:
            domains = replace(domains, inputs=(*domains.inputs[:place], found, *domains.inputs[place + 1 :]))
    return domains


def _row_bounds(
    domains: Domains, node: int, rows: Tensor, steps: int, start: Tensor | None, condition: Condition | None
) -> Interval:
    """Bounds of rows of a node and their negatives, shape (B, U); each has lines and a multiplier lambda of its own.

    Lines are those below the node. Above it the condition takes the first ones, once for all rows.
    """
    graph, units = domains.graph, rows.shape[1] // 2
    crossed, lines = sum(number <= node for number in graph.nonlinear), neurons(graph, node + 1)
    pullback = FreePullback(graph, domains.ball, domains.inputs[:crossed], domains.signs[:, :lines])
    search = pullback.single()
    pushed: dict[int, Tensor] = {}
    unit = offset = torch.zeros_like(rows.flatten(2)[..., 0])
    if condition is not None:
        pushed, offset, depth = _pushed(domains, node, start, condition)
        with torch.no_grad():
            reach = search.upper({node: rows.float()}, search.start.unsqueeze(1)).double()
        unit = (reach[:, :units] + reach[:, units:]).clamp(min=0).repeat(1, 2) / depth.unsqueeze(1)

    def bound(
        pullback: FreePullback,
        rows: Tensor,
        unit: Tensor,
        offset: Tensor,
        pushed: Mapping[int, Tensor],
        parameters: Tensor,
        passage: Passage | None = None,
    ) -> Tensor:
        sources, price = {node: rows}, parameters[..., lines] * unit
        for number, row in pushed.items():
            term = price.reshape(*price.shape, *[1] * (row.dim() - 2)) * row
            sources[number] = sources[number] + term if number in sources else term
        extra = price * offset
        value = pullback.upper(sources, parameters[..., :lines], passage) + extra
        return value if passage is None else value + passage.margin + ROUNDING * extra.abs()

    def extended(part: Tensor, price: float) -> Tensor:
        return functional.pad(part, (0, 1), value=price).unsqueeze(1).expand(-1, rows.shape[1], -1)

    smallest, largest = extended(pullback.smallest, 0.0), extended(pullback.largest, torch.inf)
    first = extended(pullback.start if start is None else start[:, :lines], _FIRST_PRICE)
    parameters = torch.maximum(torch.minimum(first, largest), smallest)
    if steps:
        single = {number: row.float() for number, row in pushed.items()}
        function = functools.partial(bound, search, rows.float(), unit.float(), offset.float(), single)
        parameters = descend_by_signs(function, parameters, smallest, largest, steps)
    with torch.no_grad():
        value = bound(pullback, rows, unit, offset, pushed, parameters, Passage())
    return -value[:, units:], value[:, :units]


def _pushed(
    domains: Domains, node: int, start: Tensor | None, condition: Condition
) -> tuple[dict[int, Tensor], Tensor, Tensor]:
    """A condition as rows on nodes up to a given one and an offset, moved outward; and how deep in it the centre lies."""
    coefficients, constant = condition
    pullback, passage = FreePullback(domains.graph, domains.ball, domains.inputs, domains.signs), Passage()
    values = (
        pullback.start if start is None else torch.maximum(torch.minimum(start, pullback.largest), pullback.smallest)
    )
    with torch.no_grad():
        depth = ((coefficients * domains.graph(domains.ball.center)).sum(1) + constant).abs().clamp(min=1e-3)
        outputs = {len(domains.graph.nodes) - 1: coefficients.unsqueeze(1)}
        rows, offset = pullback.down_to(node, outputs, values.unsqueeze(1), passage)
        offset = offset + passage.margin + constant.unsqueeze(1)
        return rows, offset + ROUNDING * offset.abs(), depth


def emptied(domains: Domains) -> tuple[Domains, Tensor]:
    """Domains with their intervals in order, and which of them an interval crossed beyond rounding proves empty."""
    empty = torch.zeros(len(domains), dtype=torch.bool, device=domains.signs.device)
    for lower, upper in (*domains.inputs, domains.outputs):
        empty = empty | crossed(lower, upper).flatten(1).any(1)
    inputs = tuple((torch.minimum(*ends), torch.maximum(*ends)) for ends in domains.inputs)
    outputs = torch.minimum(*domains.outputs), torch.maximum(*domains.outputs)
    return replace(domains, inputs=inputs, outputs=outputs), empty


def root(graph: Graph, ball: Ball, hidden: Preactivations | Sequence[Interval]) -> tuple[Domains, Tensor]:
    """The balls as domains with the logits as outputs, and which of them have finite ordered bounds."""
    signs = torch.zeros(len(ball.center), neurons(graph), dtype=torch.float64, device=ball.center.device)
    head = Head("all", 1.0, torch.zeros_like(ball.eps, dtype=torch.long))
    if isinstance(hidden, Preactivations):
        return Domains(graph, ball, hidden.inputs, signs, hidden.logits, head), hidden.proved
    if len(hidden) != len(graph.nonlinear):
        raise InputError(f"expected bounds of {len(graph.nonlinear)} nonlinear layers, got {len(hidden)}")
    infinite = torch.full((len(signs), graph.classes), torch.inf, dtype=torch.float64, device=signs.device)
    domains = Domains(graph, ball, tuple(hidden), signs, (-infinite, infinite), head)
    domains = tightened(domains, [len(graph.nonlinear)], 0)
    proved = torch.ones_like(signs[:, 0] if signs.shape[1] else infinite[:, 0], dtype=torch.bool)
    for lower, upper in (*domains.inputs, domains.outputs):
        proved = proved & ordered(lower, upper)
    return domains, proved


def cases(domains: Domains, reduction: Reduction) -> tuple[Domains, Tensor]:
    """The domains of all cases of a proof about some balls, and which ball each is of.

    Outputs that are differences of logits are bounded as rows of their own where the proof reads their intervals.

    Args:
        domains: One a ball, with the logits as outputs.
        reduction: Of the score.
    """
    with torch.no_grad():
        logits = domains.graph(domains.ball.center)
    sample, head = reduction.cases(logits, *domains.outputs)
    domains = domains.at(sample)
    domains = replace(domains, outputs=head.interval(*domains.outputs), head=head)
    if head.kind == "others" and reduction.proof == "chord":
        domains = tightened(domains, [len(domains.graph.nonlinear)], 0)
    return domains, sample
