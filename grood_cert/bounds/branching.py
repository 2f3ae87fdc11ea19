r"""Branch and bound of S over a ball: the ball is cut into domains until the worst of them is decided.

A domain fixes the sign of some unstable (leaky) ReLUs, where the relaxation is then exact, and for a chord proof may cut
the interval of an output (for the energy: a logit), where the chord of e^z then lies closer. Each domain has a proof of
its own: slopes, multipliers, and weights p or chords of `grood_cert.bounds.alpha_crown`, started from its parent's. So
splitting closes all gaps, that of the concavity of S included. Where a bound of S has several cases
(`grood_cert.bounds.reduction`), each of them is a domain at the root. With sign = 1 for an upper and -1 for a lower bound,

    sign * S <= max over the domains of their bounds,

and domains are pruned only once their bound is on the right side of gamma, or proved empty by a crossed interval.

Only points whose case is at least t, just below where it means sign * S = sign * gamma, can spoil a proof. Where the root is
undecided the inputs of its hidden layers (and the outputs) are bounded anew on that part alone, and so are those of
every undecided domain: in each layer the few neurons with the largest relaxations. From then on the claim is that the cases
are at most max(t, bounds of the domains), still for the ball.

*Budget.* The gap of the worst domain closes in proportion to the logarithm of the number of domains, as a rule; a ball
that would need eight times its budget at the pace so far is given up.

*Where to split.* At the minimiser x* of a domain's proof the slack, bound minus true value, is a sum over neurons and
outputs: |a_j| times the distance of the neuron's line from the neuron at x* (a_j the row's coefficient), and the
distance of chord and exponential. The largest is split, with a fifth of the largest distance on the interval added.

References:
    Wang et al., "Beta-CROWN", NeurIPS 2021; Bunel et al., "Branch and Bound for Piecewise Linear Neural Network
    Verification", JMLR 2020; Kotha et al., "Provably Bounding Neural Network Preimages", NeurIPS 2023.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.bounds.alpha_crown import ScoreProof, optimise, plain
from grood_cert.bounds.domains import Domains, cases, emptied, root, tightened
from grood_cert.bounds.engine import Side, sign_of
from grood_cert.bounds.free_pullback import Passage
from grood_cert.bounds.hidden import preactivations
from grood_cert.bounds.reduction import Head, reduction, worst
from grood_cert.bounds.rounding import largest_of, of_score
from grood_cert.errors import InputError, RunError
from grood_cert.interval import Interval
from grood_cert.networks.activations import LeakyReLU
from grood_cert.networks.graph import Graph
from grood_cert.scores import ENERGY, Score

_ROOT_STEPS = 20  # of Adam, for the undivided ball
_LOGIT_STEPS = 5
_TIGHTENING_STEPS = 4  # for the ends of hidden neurons
_ROOT_TIGHTENED = 64  # neurons of each hidden layer that are bounded anew at the root
_TIGHTENED = 8  # and on every domain
_WIDEST = 256  # unstable neurons: of a layer with more, a few make no difference
_LARGEST_GAP_SHARE = 0.2
_STRICTNESS = 1e-9
_POLISH = 10  # times the steps for a domain that cannot be split any more
_RETRY = 2  # times the steps for a domain whose bound is no better than its parent's
_TRIED = 15  # domains of a ball, and at least an eighth of its budget, before its pace is looked at
_PATIENCE = 8  # budgets that a ball may be expected to need
# Instead of a place to split: optimise a little longer; optimise for long; nothing to be done.
_AGAIN, _WHOLE, _NOWHERE = -1, -2, -3


@dataclass(frozen=True)
class Branched:
    """What branch and bound found out about each ball.

    Attributes:
        bound: S_ub or S_lb over the whole ball, shape (B,); NaN where not proved.
        decided: S_ub < gamma or S_lb > gamma, strictly.
        refuted: A point of the ball on the wrong side of gamma was met: S > gamma for an upper, S <= gamma for a lower
            bound.
        points: That point, shape (B, C, H, W); the centre where there is none.
        nodes: Domains bounded; one optimised for longer, not split, counts twice.
        timed_out: Undecided because the seconds were over.
    """

    bound: Tensor
    decided: Tensor
    refuted: Tensor
    points: Tensor
    nodes: Tensor
    timed_out: Tensor


@dataclass(frozen=True)
class _Leaves:
    """Open domains: their state, bound of their case of sign * S, and where they will be split."""

    sample: Tensor
    case: Tensor
    signs: Tensor  # int8
    lower: Tensor  # of the inputs of all neurons
    upper: Tensor
    outputs_lower: Tensor
    outputs_upper: Tensor
    values: Tensor
    bound: Tensor
    branch: Tensor  # a neuron, N + an output, or _AGAIN, _WHOLE or _NOWHERE
    cut: Tensor  # where an output is cut
    neuron: Tensor  # the best neuron to split, or _WHOLE

    def at(self, index: Tensor) -> _Leaves:
        return _Leaves(*(getattr(self, field.name)[index] for field in fields(self)))

    def joined(self, other: _Leaves) -> _Leaves:
        return _Leaves(*(torch.cat([getattr(self, field.name), getattr(other, field.name)]) for field in fields(self)))

    def __len__(self) -> int:
        return len(self.sample)


class _Pool:
    """Open leaves in slots that are used again, so that a leaf is copied only when it is made."""

    def __init__(self, leaves: _Leaves) -> None:
        self._leaves = leaves
        self.open = torch.ones(len(leaves), dtype=torch.bool, device=leaves.sample.device)

    @property
    def all(self) -> _Leaves:
        return self._leaves

    def worst(self, count: int) -> Tensor:
        """The largest bound of each ball's open leaves, -inf where there is none, shape (count,)."""
        bound, sample = self._leaves.bound[self.open], self._leaves.sample[self.open]
        return bound.new_full((count,), -torch.inf).scatter_reduce(0, sample, bound, "amax")

    def put(self, leaves: _Leaves) -> None:
        free = (~self.open).nonzero().squeeze(1)
        if len(free) < len(leaves):
            more = max(len(leaves) - len(free), len(self.open))
            index = torch.zeros(more, dtype=torch.long, device=free.device)
            self._leaves = self._leaves.joined(self._leaves.at(index))
            self.open = torch.cat([self.open, torch.zeros_like(index, dtype=torch.bool)])
            free = (~self.open).nonzero().squeeze(1)
        slots = free[: len(leaves)]
        for field in fields(leaves):
            getattr(self._leaves, field.name)[slots] = getattr(leaves, field.name)
        self.open[slots] = True


def check_graph(graph: Graph) -> None:
    """Refuse networks with other nonlinear layers than ReLU and leaky ReLU.

    Raises:
        InputError: Naming the layer.
    """
    if not graph.nonlinear:
        raise InputError("branch and bound splits ReLUs, and the network has none; linear bounds are all there is")
    for number in graph.nonlinear:
        node = graph.nodes[number]
        if not isinstance(node.operation, LeakyReLU):
            raise InputError(
                f"layer {node.name}: branch and bound splits ReLU and leaky ReLU alone, not {type(node.operation).__name__}"
            )


class _Search:
    """Branch and bound over a batch of balls that are all proved and undecided at their roots."""

    def __init__(
        self, graph: Graph, ball: Ball, gamma: float, score: Score, side: Side, nodes: int, batch: int, steps: int
    ) -> None:
        self.graph, self.ball, self.nodes, self.batch, self.steps = graph, ball, nodes, batch, steps
        self.gamma, self.score, self.side, self.reduction = gamma, score, side, reduction(score, side)
        self.goal = self.reduction.inner(gamma - sign_of(side) * _slack(graph, score, gamma))
        self.level = self.goal - _STRICTNESS * (1 + abs(self.goal))
        outputs = [len(graph.nonlinear)] if self.reduction.proof == "chord" else []  # where their intervals matter
        self.places = [*range(1, len(graph.nonlinear)), *outputs]
        self.shapes = [graph.nodes[number].shape for number in graph.nonlinear]
        self.sizes = [graph.nodes[number].size for number in graph.nonlinear]
        self.refuted = torch.zeros(len(ball.center), dtype=torch.bool, device=ball.center.device)
        self.points = ball.center.clone()

    def wrong(self, score: Tensor) -> Tensor:
        """Whether a score refutes the claim."""
        return score > self.gamma if self.side == "upper" else score <= self.gamma

    def solve(self, sample: Tensor, domains: Domains, start: Tensor | None, steps: int) -> tuple[_Leaves, Tensor]:
        """Bound domains, look at the minimisers of their proofs, and choose where to split them.

        Returns:
            The leaves, and what the relaxation of each neuron adds to their bounds at most, shape (D, N).
        """
        proof = ScoreProof(domains, self.reduction)
        bound, values, passage = optimise(proof, steps, start)
        assert passage.image is not None
        points = domains.ball.maximiser(passage.image)[:, 0].unflatten(1, domains.ball.center.shape[1:])
        points = domains.ball.project(points)
        with torch.no_grad():
            nodes = self.graph.values(points)
            hit = self.wrong(self.score.value(nodes[-1])).nonzero().squeeze(1)
            self.refuted[sample[hit]] = True
            self.points[sample[hit]] = points[hit]
            branch, cut, neuron, largest = self._split_at(proof, domains, values, passage, nodes)
        leaves = _Leaves(
            sample,
            domains.head.case,
            domains.signs.to(torch.int8),
            torch.cat([lower.flatten(1) for lower, _ in domains.inputs], 1),
            torch.cat([upper.flatten(1) for _, upper in domains.inputs], 1),
            *domains.outputs,
            values,
            bound,
            branch,
            cut,
            neuron,
        )
        return leaves, largest

    def _split_at(
        self, proof: ScoreProof, domains: Domains, values: Tensor, passage: Passage, nodes: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pullback = proof.pullback
        scores, gaps = [], []
        for number, (lower, upper) in pullback.inputs.items():
            operation = self.graph.nodes[number].operation
            assert isinstance(operation, LeakyReLU)
            inputs = torch.maximum(torch.minimum(nodes[self.graph.nodes[number].inputs[0]], upper), lower)
            row = passage.coefficients[number].squeeze(1)
            _, _, slope_high, constant_high = pullback.lines[number]
            slope_low = pullback.slopes(number, values.unsqueeze(1)).squeeze(1)
            above = slope_high * inputs + constant_high - operation(inputs)
            below = operation(inputs) - slope_low * inputs
            slack = torch.where(row > 0, row * above, -row * below)
            below = torch.minimum((slope_low - operation.slope) * -lower, (1 - slope_low) * upper)
            largest = torch.where(row > 0, row * constant_high, -row * below)
            gaps.append(torch.where(pullback.unstable[number], largest, 0.0).flatten(1))
            score = slack + _LARGEST_GAP_SHARE * largest + torch.finfo(row.dtype).tiny
            scores.append(torch.where(pullback.unstable[number], score, -1.0).flatten(1))
        score, neuron = torch.cat(scores, 1).max(1)
        neuron = torch.where(score > 0, neuron, _WHOLE)
        cut = torch.zeros_like(proof.low)
        if self.reduction.proof == "chord":
            score, cut = proof.chord_slack(values, domains.head.image(nodes[-1]), _LARGEST_GAP_SHARE)
            scores.append(score)
        best, branch = torch.cat(scores, 1).max(1)
        output = (branch - domains.signs.shape[1]).clamp(min=0)
        cut = cut.gather(1, output.unsqueeze(1)).squeeze(1)
        return torch.where(best > 0, branch, _WHOLE), cut, neuron, torch.cat(gaps, 1)

    def tighten(self, domains: Domains, values: Tensor, weight: Tensor, count: int) -> tuple[Domains, Tensor]:
        """Intervals that hold where a domain's case is at least the level, and which domains that empties."""
        condition = ScoreProof(domains, self.reduction).condition(values, self.level)
        lines = values[:, : domains.signs.shape[1]]
        return emptied(
            tightened(domains, self.places, _TIGHTENING_STEPS, lines, condition, most=_WIDEST, foremost=(weight, count))
        )

    def domains(self, leaves: _Leaves) -> Domains:
        """Leaves as domains."""
        inputs: list[Interval] = [
            (lower.unflatten(1, shape), upper.unflatten(1, shape))
            for lower, upper, shape in zip(
                leaves.lower.split(self.sizes, 1), leaves.upper.split(self.sizes, 1), self.shapes, strict=True
            )
        ]
        ball = Ball(self.ball.center[leaves.sample], self.ball.eps[leaves.sample], self.ball.norm)
        outputs = leaves.outputs_lower, leaves.outputs_upper
        head = Head(self.reduction.kind, self.reduction.divisor, leaves.case)
        return Domains(self.graph, ball, tuple(inputs), leaves.signs.to(leaves.lower.dtype), outputs, head)

    def children(self, parents: _Leaves) -> _Leaves:
        """Both halves of every leaf, bounded; those proved empty are gone. Leaves not to be split are optimised for longer."""
        found = []
        for kind, factor in ((_AGAIN, _RETRY), (_WHOLE, _POLISH)):
            if bool((parents.branch == kind).any()):
                found.append(self.polished(parents.at(parents.branch == kind), factor * self.steps))
        if bool((parents.branch >= 0).any()):
            found.append(self.halves(parents.at(parents.branch >= 0)))
        return functools.reduce(_Leaves.joined, found)

    def polished(self, leaves: _Leaves, steps: int) -> _Leaves:
        """Leaves optimised for longer; where that does not help, a neuron is split, and without one they are given up."""
        found, _ = self.solve(leaves.sample, self.domains(leaves), leaves.values, steps)
        found = replace(found, bound=torch.minimum(found.bound, leaves.bound))
        stuck = leaves.bound - found.bound <= _STRICTNESS * (1 + leaves.bound.abs())
        branch = torch.where(stuck & (found.neuron >= 0), found.neuron, found.branch)  # a cut did not help before
        given_up = stuck & (found.branch < 0) & (leaves.branch == _WHOLE)
        return replace(found, branch=torch.where(given_up, _NOWHERE, branch))

    def halves(self, parents: _Leaves) -> _Leaves:
        """Both halves of every leaf, bounded; those that stay undecided are tightened and bounded again."""
        children = _halved(parents)
        steps = self.steps // 2 if self.places else self.steps
        leaves, weight = self.solve(children.sample, self.domains(children), children.values, steps)
        leaves = replace(leaves, bound=torch.minimum(leaves.bound, children.bound))
        open_ = leaves.bound >= self.goal
        if self.places and bool(open_.any()):
            some = leaves.at(open_)
            domains, empty = self.tighten(self.domains(some), some.values, weight[open_], _TIGHTENED)
            found, _ = self.solve(some.sample, domains, some.values, self.steps)
            found = replace(found, bound=torch.minimum(found.bound, some.bound))
            leaves = leaves.at(~open_).joined(found.at(~empty))
            parent = torch.cat([children.bound[~open_], children.bound[open_][~empty]])
        else:
            parent = children.bound
        stagnant = (leaves.bound >= parent) & (leaves.branch >= 0)  # the steps did not carry the proof over to the half
        return replace(leaves, branch=torch.where(stagnant, _AGAIN, leaves.branch))

    def run(self, first: _Leaves, deadline: float) -> tuple[Tensor, Tensor, Tensor]:
        """The worst case of every ball, numbers of domains bounded, and who ran out of time."""
        count = len(self.refuted)
        used = torch.ones(count, dtype=torch.long, device=self.refuted.device)
        worst = torch.full((count,), self.level, dtype=torch.float64, device=used.device)  # of what is closed
        closed = first.bound < self.goal
        worst = worst.scatter_reduce(0, first.sample[closed], first.bound[closed], "amax")
        pool = _Pool(first.at(~closed))
        late, hopeless = torch.zeros_like(self.refuted), torch.zeros_like(self.refuted)
        gap = pool.worst(count) - self.goal
        while True:
            leaves = pool.all
            wanted = pool.open & ~(self.refuted | hopeless)[leaves.sample] & (leaves.branch > _NOWHERE)
            chosen = _worst_first(leaves, wanted, (self.nodes - used) // 2)[: self.batch]
            if not len(chosen):
                break
            if time.monotonic() > deadline:
                late[leaves.sample[wanted]] = True
                break
            parents = leaves.at(chosen)
            pool.open[chosen] = False
            used = used + 2 * torch.bincount(parents.sample, minlength=count)
            found = self.children(parents)
            closed = found.bound < self.goal
            worst = worst.scatter_reduce(0, found.sample[closed], found.bound[closed], "amax")
            pool.put(found.at(~closed))
            hopeless = (used >= max(_TRIED, self.nodes // 8)) & ~(
                _expected(used, gap, pool.worst(count) - self.goal) < math.log2(_PATIENCE * self.nodes)
            )
        return torch.maximum(worst, pool.worst(count)), used, late


def _expected(used: Tensor, first: Tensor, left: Tensor) -> Tensor:
    """log2 of the domains that close a gap, of which so much is left, at the pace so far; infinite without progress."""
    doublings = used.to(left).log2()
    pace = (first - left) / doublings
    return torch.where(pace > 0, doublings + left / pace, torch.inf)


def _slack(graph: Graph, score: Score, gamma: float) -> float:
    """What an evaluation of S near gamma may be off, so that a goal this far below proves S < gamma."""
    return float(of_score(score, graph, torch.tensor(gamma, dtype=torch.float64), torch.tensor(0.0)))


def _halved(parents: _Leaves) -> _Leaves:
    """Leaves split where they say, first the upper halves, then the lower ones."""
    count, total = len(parents), parents.signs.shape[1]
    children = parents.at(torch.arange(count, device=parents.sample.device).repeat(2))
    above = torch.arange(2 * count, device=parents.sample.device) < count
    neuron = children.branch < total
    for mask, sign, ends in ((neuron & above, 1, children.lower), (neuron & ~above, -1, children.upper)):
        row = mask.nonzero().squeeze(1)
        children.signs[row, children.branch[row]] = sign
        ends[row, children.branch[row]] = 0.0
    for mask, ends in ((~neuron & above, children.outputs_lower), (~neuron & ~above, children.outputs_upper)):
        row = mask.nonzero().squeeze(1)
        ends[row, children.branch[row] - total] = children.cut[row]
    return children


def _worst_first(leaves: _Leaves, wanted: Tensor, quota: Tensor) -> Tensor:
    """Slots of wanted leaves: the worst of every sample, then their second worst, and so on up to its quota."""
    slots = wanted.nonzero().squeeze(1)
    slots = slots[leaves.bound[slots].argsort(descending=True, stable=True)]
    sample = leaves.sample[slots]
    by_sample = sample.argsort(stable=True)
    counts = torch.bincount(sample, minlength=len(quota))
    begins = counts.cumsum(0) - counts
    rank = torch.empty_like(sample)
    rank[by_sample] = torch.arange(len(sample), device=sample.device) - begins[sample[by_sample]]
    allowed = rank < quota[sample]
    return slots[allowed][rank[allowed].argsort(stable=True)]


def branch_and_bound(
    graph: Graph,
    ball: Ball,
    gamma: float,
    side: Side,
    nodes: int,
    seconds: float | None = None,
    batch: int = 512,
    steps: int = 10,
    score: Score = ENERGY,
) -> Branched:
    r"""Bound S over each ball, splitting it until S_ub < gamma or S_lb > gamma is proved or the budget is spent.

    Without a time limit the result is a function of the arguments alone.

    Args:
        graph: A network whose only nonlinear layers are ReLU and leaky ReLU.
        ball: Batch of balls, float64.
        gamma: Threshold.
        side: "upper" to prove S < gamma, "lower" to prove S > gamma.
        nodes: Most domains to bound for each ball; 1 does not split.
        seconds: Most seconds to search; looked at between batches.
        batch: Leaves split at once.
        steps: Adam steps for each domain.
        score: S.

    Returns:
        Bounds that hold on the whole ball whatever gamma is, decided or not.

    Raises:
        InputError: If the network has other nonlinear layers, or an argument makes no sense.
        RunError: If a whole ball is proved empty, which shows that bounds are wrong.

    Example:
        >>> from grood_cert.networks.capture import capture
        >>> layers = torch.nn.Flatten(), torch.nn.Linear(4, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3)
        >>> graph = capture(torch.nn.Sequential(*layers).eval(), (1, 2, 2))
        >>> ball = Ball(torch.full((1, 1, 2, 2), 0.5).double(), torch.tensor([0.1]).double(), "linf")
        >>> branch_and_bound(graph, ball, 0.0, "upper", nodes=8).decided
        tensor([True])
    """
    check_graph(graph)
    if not math.isfinite(gamma):
        raise InputError(f"gamma must be finite, got {gamma}")
    if min(nodes, batch) < 1 or steps < 0:
        raise InputError(f"nodes and batch must be at least 1 and steps not negative, got {nodes}, {batch} and {steps}")
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    sign, reduced, count = sign_of(side), reduction(score, side), len(ball.center)
    whole, proved = root(graph, ball, preactivations(graph, ball))
    refuted, timed_out = torch.zeros_like(proved), torch.zeros_like(proved)
    points, used = ball.center.clone(), torch.ones_like(proved, dtype=torch.long)
    if (constant := reduced.constant(graph.classes)) is not None:
        bound, index = torch.where(proved, sign * constant, torch.full_like(ball.eps, torch.inf)), used[:0]
    else:
        domains, sample = cases(whole, reduced)
        value = plain(domains, reduced)
        bound = torch.where(proved, reduced.outer(worst(value, sample, count)), torch.inf)
        index = (proved & ~(bound < sign * gamma - _slack(graph, score, gamma))).nonzero().squeeze(1)
    if len(index):
        place = torch.full_like(used, -1)
        place[index] = torch.arange(len(index), device=index.device)
        own = (place[sample] >= 0).nonzero().squeeze(1)
        search = _Search(
            graph, Ball(ball.center[index], ball.eps[index], ball.norm), gamma, score, side, nodes, batch, steps
        )
        found, used[index], timed_out[index] = _below_root(
            search, domains.at(own), place[sample[own]], value[own], deadline
        )
        bound[index], refuted[index], points[index] = reduced.outer(found), search.refuted, search.points
    bound = bound + of_score(score, graph, bound, largest_of(*whole.outputs))
    bound = torch.where(torch.isfinite(bound), sign * bound, torch.nan)
    decided = bound < gamma if side == "upper" else bound > gamma
    return Branched(bound, decided, refuted, points, used, timed_out & ~decided & ~refuted)


def _below_root(
    search: _Search, domains: Domains, sample: Tensor, bound: Tensor, deadline: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Optimise the bounds of all cases of whole balls, and branch where that does not decide them.

    Returns:
        The worst case of every ball, numbers of domains bounded, and who ran out of time.
    """
    outputs = [place for place in search.places if place == len(domains.graph.nonlinear)]
    domains, empty = emptied(tightened(domains, outputs, _LOGIT_STEPS))
    if bool(empty.any()):
        raise RunError(f"{int(empty.sum())} whole balls were proved empty: their bounds cannot be trusted")
    count = len(search.refuted)
    leaves, weight = search.solve(sample, domains, None, _ROOT_STEPS)
    bound = torch.minimum(bound, leaves.bound)
    used, late = torch.ones_like(search.refuted, dtype=torch.long), torch.zeros_like(search.refuted)
    open_ = ((bound >= search.goal) & ~search.refuted[sample]).nonzero().squeeze(1)
    if search.nodes < 3 or not len(open_):
        return worst(bound, sample, count), used, late
    leaves, domains = leaves.at(open_), domains.at(open_)
    domains, empty = search.tighten(domains, leaves.values, weight[open_], _ROOT_TIGHTENED)
    leaves, _ = search.solve(sample[open_], domains, leaves.values, search.steps)
    leaves = replace(leaves, bound=torch.where(empty, search.level, torch.minimum(leaves.bound, bound[open_])))
    found, used, late = search.run(leaves, deadline)
    bound[open_] = torch.minimum(bound[open_], found[sample[open_]])
    return worst(bound, sample, count), used, late
