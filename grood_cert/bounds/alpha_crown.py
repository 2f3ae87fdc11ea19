r"""Bounds of S with every free parameter of the proof optimised: slopes, softmax weights, chords and multipliers.

Below an unstable leaky ReLU any line with a slope alpha between the leak and 1 is sound; U1 of
`grood_cert.bounds.score` holds for any p in the simplex; L1 for any slopes kappa between 0 and those of the chords. So

    S <= -( LB_alpha[softmax theta] + H(softmax theta) )        for all alpha, theta,
    S >= -( M + log( sum_k e^(u_k - M) - kappa . u + UB_alpha[kappa] ) )        for all alpha, kappa,

and all of them are optimised together (alpha-CROWN), on balls or on parts of them (`domains`). The upper bound is a
concave problem in p whose optimum is that of the convex relaxation of the whole network with its score; the lower bound
maximises a convex function, which chords only enclose, so tight intervals of the logits matter: each end of each logit
is optimised as a row of its own first. Written are the bounds of the energy with T = 1; other scores and temperatures
are such bounds, of images z of the logits in place of f (`grood_cert.bounds.reduction`).

To prove S <= t on a set it is enough to look at its part V = {S >= t}, and on V the linear condition c . f + d >= 0
holds, with c = -p, d = -t - H(p) by U1's argument (for S >= t, V = {S <= t} and c = kappa,
d = sum_k e^(u_k - M) - kappa . u - e^(-t - M) by L1's). Near the robust radius V is a small corner of the ball, hence
the gain of tightening on it.

Bounds are moved outward by what rounding can do (`rounding`).

References:
    Xu et al., "Fast and Complete: Enabling Complete Verification with Rapid and Massively Parallel Incomplete
    Verifiers", ICLR 2021 (alpha-CROWN).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.bounds.domains import Condition, Domains, cases, emptied, neurons, root, tightened
from grood_cert.bounds.engine import Side, sign_of
from grood_cert.bounds.free_pullback import SLOPE_RATE, FreePullback, Passage, descend
from grood_cert.bounds.hidden import Preactivations
from grood_cert.bounds.reduction import Reduction, reduction, worst
from grood_cert.bounds.rounding import largest_of, of_score
from grood_cert.bounds.score import chord_lower, chord_slopes, gibbs_upper
from grood_cert.interval import ROUNDING, Interval
from grood_cert.networks.graph import Graph
from grood_cert.scores import ENERGY, Score, energy

_WEIGHT_RATE = 0.1
_MULTIPLIER_RATE = 0.6  # relative to the row's largest coefficient at the layer
_LOGIT_STEPS = 10
_LEAST_THETA = -8.0
_NARROW = 1e-6  # an interval of a logit that is not worth cutting


class ScoreProof:
    r"""An upper bound of a case of sign * S on each domain as a function of its proof's parameters, (B, P) -> (B,).

    The parameters are those of the lines, then for a gibbs proof theta; for a chord proof the shares of the chord
    slopes and the multipliers of the lower and upper ends of the outputs z.

    Attributes:
        pullback: The backward pass.
        low: Lower ends of the outputs, shape (B, size).
        high: Upper ends.
        start: Parameters of the plain bounds U1 with p = softmax f(x) and L1, shape (B, P).
        smallest: Lower ends of the admissible parameters.
        largest: Upper ends.
    """

    def __init__(self, domains: Domains, reduction: Reduction) -> None:
        self.pullback = FreePullback(domains.graph, domains.ball, domains.inputs, domains.signs)
        self.low, self.high = domains.outputs
        self._gibbs, self._entropy, self._head = reduction.proof == "gibbs", reduction.entropy, domains.head
        self._lines = neurons(domains.graph)
        self._node = len(domains.graph.nodes) - 1
        ones = torch.ones_like(self.low)
        infinite = torch.full_like(ones, torch.inf)
        if self._gibbs:
            with torch.no_grad():
                center = self._head.image(domains.graph(domains.ball.center))
            tails = self.theta(center), -infinite, infinite
        else:
            tails = (
                torch.cat([ones, 0 * ones, 0 * ones], 1),
                torch.zeros_like(ones).repeat(1, 3),
                torch.cat([ones, infinite, infinite], 1),
            )
            self.chords = chord_slopes(self.low, self.high)
        heads = self.pullback.start, self.pullback.smallest, self.pullback.largest
        self.start, self.smallest, self.largest = (
            torch.cat([head, tail], 1) for head, tail in zip(heads, tails, strict=True)
        )

    def single(self) -> ScoreProof:
        """The same in float32 and without margins, to search with."""
        found = copy.copy(self)
        found.pullback, found.low, found.high = self.pullback.single(), self.low.float(), self.high.float()
        if not self._gibbs:
            found.chords = self.chords.float()
        return found

    def theta(self, outputs: Tensor) -> Tensor:
        """What gives the softmax weights p to start from at some outputs; without entropy, near the largest of them."""
        if self._entropy:
            return outputs
        width = ((self.high - self.low).mean(1, keepdim=True) / 2).clamp(min=torch.finfo(outputs.dtype).tiny)
        return ((outputs - outputs.amax(1, keepdim=True)) / width).clamp(min=_LEAST_THETA)

    def __call__(self, values: Tensor, passage: Passage | None = None) -> Tensor:
        """The bound; with a passage moved outward for rounding."""
        lines, tail = values[:, : self._lines].unsqueeze(1), values[:, self._lines :]
        if self._gibbs:
            weights = torch.softmax(tail, -1)
            row_upper = self._row(-weights, lines, passage)
            bound = gibbs_upper(-row_upper, weights, self._entropy)
        else:
            kappa, low, high = self.parts(tail)
            row_upper = self._row(kappa + low - high, lines, passage)
            offset = (high * self.high - low * self.low).sum(-1)
            if passage is not None:
                offset = offset + ROUNDING * (high * self.high.abs() + low * self.low.abs()).sum(-1)
            bound = -chord_lower(row_upper + offset, kappa, self.high)
        return bound + ROUNDING * (1 + bound.abs()) if passage is not None else bound

    def _row(self, row: Tensor, lines: Tensor, passage: Passage | None) -> Tensor:
        rows = self._head.rows(row.unsqueeze(1), self.pullback.graph.classes)
        bound = self.pullback.upper({self._node: rows}, lines, passage)
        if passage is not None:
            bound = bound + passage.margin
        return bound.squeeze(1)

    def rate(self, values: Tensor) -> Tensor:
        """First steps of Adam; multipliers, which have the size of the row, take theirs from its largest coefficient."""
        passage, rate = Passage(), torch.full_like(values, _WEIGHT_RATE)
        with torch.no_grad():
            self(values, passage)
        rate[:, : self._lines] = SLOPE_RATE
        for number, place in self.pullback.places.items():
            size = passage.coefficients[number].abs().flatten(1).amax(1, keepdim=True)
            rate[:, place] = torch.where(torch.isinf(self.largest[:, place]), _MULTIPLIER_RATE * size, SLOPE_RATE)
        return rate

    def parts(self, tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chord proof: slopes kappa and the multipliers of the lower and the upper ends, in units of the slopes."""
        share, low, high = tail.chunk(3, -1)
        unit = self.chords.amax(-1, keepdim=True)
        return self.chords * share, unit * low, unit * high

    def chord_slack(self, values: Tensor, outputs: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Chord proof: distance of the lines of L1 from e^(z - M) at given z, and where their intervals may be cut.

        Args:
            values: Parameters.
            outputs: z, shape (B, size).
            share: How much of each line's largest distance is added.

        Returns:
            Distances, -1 where an interval is too narrow to be cut, and cuts: half way between z and the place
            of the largest distance, a tenth of the width away from both ends; shape (B, size) each.
        """
        kappa = self.parts(values[:, self._lines :])[0]
        largest = self.high.amax(-1, keepdim=True)

        def distance(points: Tensor) -> Tensor:
            return kappa * (points - self.high) + torch.exp(self.high - largest) - torch.exp(points - largest)

        def inside(points: Tensor, margin: Tensor | float = 0.0) -> Tensor:
            return torch.maximum(torch.minimum(points, self.high - margin), self.low + margin)

        width = self.high - self.low
        widest = inside(kappa.clamp(min=torch.finfo(kappa.dtype).tiny).log() + largest)
        slack = distance(inside(outputs)) + share * distance(widest)
        return torch.where(width > _NARROW, slack, -1.0), inside((inside(outputs) + widest) / 2, width / 10)

    def condition(self, values: Tensor, level: float) -> Condition:
        """The pair c, d with c . f + d >= 0 wherever the case is at least the level, by the proof with these parameters."""
        tail = values[:, self._lines :]
        if self._gibbs:
            weights = torch.softmax(tail, -1)
            constant = self._entropy * torch.xlogy(weights, weights).sum(-1) - level
            return self._pulled(-weights), constant + ROUNDING * (1 + constant.abs() + abs(level))
        kappa = self.parts(tail)[0]
        largest = self.high.amax(-1, keepdim=True)
        products = kappa * self.high
        wanted = torch.exp((level - largest).clamp(max=1)).squeeze(-1)
        constant = torch.exp(self.high - largest).sum(-1) - products.sum(-1) - wanted
        return self._pulled(kappa), constant + ROUNDING * (1 + wanted * (1 + abs(level)) + products.abs().sum(-1))

    def _pulled(self, row: Tensor) -> Tensor:
        """A row of the outputs as a row of the logits."""
        return self._head.rows(row.unsqueeze(1), self.pullback.graph.classes).squeeze(1)


def optimise(proof: ScoreProof, steps: int, start: Tensor | None = None) -> tuple[Tensor, Tensor, Passage]:
    """Best bound of each case found, moved outward, infinite where there is none; its parameters and its passage."""
    first = proof.start if start is None else start
    first = torch.maximum(torch.minimum(first, proof.largest), proof.smallest)
    values = first
    if steps:
        values = descend(proof.single(), first, proof.smallest, proof.largest, proof.rate(first), steps)
    passage = Passage()
    with torch.no_grad():
        bound = proof(values, passage)
    return torch.where(torch.isfinite(bound), bound, torch.inf), values, passage


def plain(domains: Domains, reduction: Reduction) -> Tensor:
    """The best of the plain bounds of each case: U0 and U1, or L0 and L1."""
    lower, upper = domains.outputs
    if reduction.proof == "chord":
        per_logit = -energy(upper)
    else:
        per_logit = energy(lower) if reduction.entropy else -lower.amax(1)
    per_logit = per_logit + ROUNDING * (1 + torch.maximum(lower.abs(), upper.abs()).amax(1))
    proof = ScoreProof(domains, reduction)
    found = [torch.where(torch.isfinite(per_logit), per_logit, torch.inf), optimise(proof, 0)[0]]
    if reduction.proof == "gibbs":
        middle = torch.cat([proof.start[:, : -lower.shape[1]], proof.theta((lower + upper) / 2)], 1)
        found.append(optimise(proof, 0, middle)[0])
    return torch.stack(found).amin(0)


def optimised_bounds(
    graph: Graph,
    ball: Ball,
    side: Side,
    hidden: Preactivations | Sequence[Interval],
    steps: int = 20,
    hidden_steps: int = 0,
    score: Score = ENERGY,
) -> Tensor:
    r"""S_ub or S_lb over each ball with all parameters of the proof optimised together.

    Args:
        graph: The network.
        ball: Batch of balls, float64.
        side: "upper" or "lower".
        hidden: Bounds of the inputs of its nonlinear layers (see `preactivations`).
        steps: Adam steps; 0 gives the plain bounds.
        hidden_steps: Steps for the ends of every unstable neuron of the hidden layers, which cost far more.
        score: S.

    Returns:
        Bounds, shape (B,), never looser than U1 or L1 with CROWN on the same hidden bounds; NaN where not proved.

    Raises:
        InputError: If the side is unknown or the bounds do not fit the network.

    Example:
        >>> from grood_cert.networks.capture import capture
        >>> from grood_cert.bounds.hidden import preactivations
        >>> layers = torch.nn.Flatten(), torch.nn.Linear(4, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3)
        >>> graph = capture(torch.nn.Sequential(*layers).eval(), (1, 2, 2))
        >>> ball = Ball(torch.full((2, 1, 2, 2), 0.5).double(), torch.tensor([0.1, 0.2]).double(), "linf")
        >>> hidden = preactivations(graph, ball)
        >>> optimised_bounds(graph, ball, "upper", hidden) <= optimised_bounds(graph, ball, "upper", hidden, steps=0)
        tensor([True, True])
    """
    reduced, count = reduction(score, side), len(ball.center)
    whole, proved = root(graph, ball, hidden)
    if (constant := reduced.constant(graph.classes)) is not None:
        return torch.where(proved, constant, torch.full_like(ball.eps, torch.nan))
    domains, sample = cases(whole, reduced)
    bound = plain(domains, reduced)
    if steps:
        if hidden_steps:
            domains = tightened(domains, range(1, len(graph.nonlinear)), hidden_steps)
        if reduced.proof == "chord":
            domains = tightened(domains, [len(graph.nonlinear)], min(steps, _LOGIT_STEPS))
        domains, empty = emptied(domains)
        proved[sample[empty]] = False  # a ball is not empty: something is wrong
        bound = torch.minimum(bound, optimise(ScoreProof(domains, reduced), steps)[0])
    found = reduced.outer(worst(bound, sample, count))
    found = found + of_score(score, graph, found, largest_of(*whole.outputs))
    return torch.where(proved & torch.isfinite(found), sign_of(side) * found, torch.nan)
