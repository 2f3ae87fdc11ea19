"""The stages of the cascade: what each tries on which balls. All prove through one guard, and add to one state."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grood_cert.ball import Ball, largest_eps
from grood_cert.bounds.alpha_crown import optimised_bounds
from grood_cert.bounds.branching import Branched, branch_and_bound
from grood_cert.bounds.engine import BoundedNetwork, Method
from grood_cert.bounds.hidden import Preactivations, engine_preactivations
from grood_cert.bounds.rounding import evaluation_error
from grood_cert.bounds.score import ScoreBounds, score_bounds
from grood_cert.certification.envelope import Envelope
from grood_cert.certification.guard import Guard
from grood_cert.certification.search import search_radius
from grood_cert.certification.settings import EFFORTS, Effort, Settings
from grood_cert.certification.state import State
from grood_cert.interval import ROUNDING
from grood_cert.lipschitz.bound import local_lipschitz, running_minimum
from grood_cert.lipschitz.radius import fixed_point_radius, path_radius
from grood_cert.networks.graph import Graph
from grood_cert.scores import Score

_FIRST_SHARE = 0.7  # of the attack radius: where a search starts that knows nothing
_LEAST_SHARE = 1e-3  # of the attack radius: a linear stage that certifies no such ball searches no smaller one
_PATH_POINTS = 10  # of the path integral of Lipschitz bounds
_REFINEMENTS = 5  # balls that alpha-crown tries for one sample


@dataclass(frozen=True)
class Means:
    """What stages prove with.

    Attributes:
        settings: What to certify.
        gamma: Threshold.
        score: S.
        shape: Of an image, (C, H, W).
        bounded: The network inside its bound engine.
        guard: What every proof goes through.
    """

    settings: Settings
    gamma: float
    score: Score
    shape: tuple[int, int, int]
    bounded: BoundedNetwork
    guard: Guard

    @property
    def graph(self) -> Graph:
        """The network as a graph of operations."""
        return self.bounded.graph

    @property
    def limit(self) -> float:
        """Largest eps that makes sense."""
        return largest_eps(self.shape, self.settings.norm)

    @property
    def effort(self) -> Effort:
        """How much work to spend."""
        return EFFORTS[self.settings.effort]


@dataclass(frozen=True)
class _Bound:
    """One bound a ball; NaN where it was not proved."""

    bound: Tensor


class Stage(ABC):
    """One way of proving decisions.

    Attributes:
        name: Its word in `outcomes`.
    """

    name: str

    def __init__(self, means: Means) -> None:
        self.means = means

    @abstractmethod
    def run(self, state: State) -> None:
        """Add what this stage proves about a batch."""


class Linear(Stage):
    """Linear bounds of S on the grid; the last such stage then searches the largest ball that they certify.

    Args:
        means: What to prove with.
        method: How the network is relaxed.
    """

    def __init__(self, means: Means, method: Method) -> None:
        super().__init__(means)
        self.name, self.method = method, method
        linear = means.settings.linear
        self.first, self.last = method == linear[0], method == linear[-1]

    def run(self, state: State) -> None:
        """Bound the grid, then search."""
        for column, value in enumerate(self.means.settings.eps):
            needed = torch.ones_like(state.right)
            if not (self.first or self.means.effort.everywhere):
                needed = state.right & (state.envelope.outcome[:, column] == 0) & (state.adversary.radius > value)
            index = needed.nonzero().squeeze(1)
            if len(index):
                self.bound(state, index, torch.full_like(state.envelope.score[index], value))
        if self.last:
            self._search(state, state.envelope)
        if self.last and self.means.settings.per_logit:
            self._search(state, state.per_logit)
            state.radii["radius_certified_per_logit"] = state.per_logit.radius

    def bound(self, state: State, index: Tensor, eps: Tensor) -> ScoreBounds:
        """Bound S on balls of some samples and record it."""

        def prove(ball: Ball) -> ScoreBounds:
            return score_bounds(self.means.bounded, ball, self.method, self.means.score)

        def unproved(balls: int) -> ScoreBounds:
            nothing = eps.new_full((balls,), torch.nan)
            return ScoreBounds(nothing, nothing, nothing, nothing)

        bound = self.means.guard.prove(prove, unproved, state, index, eps, timed=False)
        state.envelope.record(index, eps, bound.lower, bound.upper, self.method)
        state.per_logit.record(index, eps, bound.lower_per_logit, bound.upper_per_logit, self.method)
        return bound

    def _search(self, state: State, envelope: Envelope) -> None:
        """Search the largest ball that the bounds of an envelope certify, from what is known on the grid."""
        grid, known = envelope.grid, envelope.deviation(envelope.lower, envelope.upper)
        proved = known < envelope.margin[:, None]
        low = torch.where(proved, grid, 0).amax(1)
        high = torch.where(~proved & (grid > low[:, None]), grid, torch.inf).amin(1)

        def at(eps: Tensor, default: float) -> Tensor:
            hit = grid == eps[:, None]
            return torch.where(hit.any(1), torch.where(hit, known, 0).sum(1), default)

        def evaluate(index: Tensor, eps: Tensor) -> Tensor:
            bound = self.bound(state, index, eps)
            if envelope is state.envelope:
                return envelope.deviation(bound.lower, bound.upper, index)
            return envelope.deviation(bound.lower_per_logit, bound.upper_per_logit, index)

        # Balls beyond the attack may be left to cheaper stages; their loose deviation would mislead the search.
        bounded = (high < state.adversary.radius) | self.means.effort.everywhere | self.first
        search_radius(
            evaluate,
            torch.where(state.right, envelope.margin, 0.0),
            low=low,
            low_deviation=torch.where(low > 0, at(low, 0.0), 0.0),
            high=high,
            high_deviation=torch.where(bounded, at(high, torch.nan), torch.nan),
            first=(_FIRST_SHARE * state.adversary.radius).clamp(max=self.means.limit),
            limit=self.means.limit,
            precision=self.means.settings.precision,
            least=_LEAST_SHARE * torch.where(torch.isfinite(state.adversary.radius), state.adversary.radius, 0.0),
        )


class Refinement(Stage):
    """A stage that stands on the linear bounds of hidden layers and logits, and on the graph of the network.

    Raises:
        InputError: If the network has a layer that no refinement can bound.
    """

    def __init__(self, means: Means) -> None:
        super().__init__(means)
        self.graph = means.graph

    def hidden(self, ball: Ball) -> Preactivations:
        """Bounds of the hidden layers and logits by the linear engine, intersected with intervals."""
        return engine_preactivations(self.means.bounded, self.graph, ball)

    def prove(self, bound: Callable[[Ball], Tensor], state: State, index: Tensor, eps: Tensor) -> Tensor:
        """Through the guard, one bound a ball; NaN where it was not proved."""
        return self.means.guard.prove(
            lambda ball: _Bound(bound(ball)),
            lambda balls: _Bound(eps.new_full((balls,), torch.nan)),
            state,
            index,
            eps,
        ).bound

    def furthest(self, state: State, share: float) -> Tensor:
        """This share of the attack radius, or of the largest eps that makes sense where no attack succeeded."""
        radius = state.adversary.radius
        return share * torch.where(torch.isfinite(radius), radius, self.means.limit)


class Lipschitz(Refinement):
    """Radii and an envelope from local Lipschitz bounds.

    OOD needs the constant L of S; for ID the constant of p0 . f, p0 = softmax f(x), is enough, since S lies below its
    tangent in f (for MSP: that of minus the probability of the largest logit at x, which S lies below). The smaller of
    the two may be taken at each eps, also along a path: every bound of S is a supremum over a set of softmax weights
    that contains p0 (of classes that contains this one), with the network's slopes independent of them, so it bounds
    the slope of p0 . f as well.

    The search and the integration grid go beyond the attack radius, so that a wrong bound shows.
    """

    name = "lipschitz"

    def run(self, state: State) -> None:
        """Both radii of every sample, and bounds on the grid of the path integral."""
        envelope = state.envelope
        furthest = torch.where(state.right, 1.25 * state.adversary.radius, 0.0).clamp(max=self.means.limit)
        everyone, largest = torch.arange(len(furthest), device=furthest.device), float(furthest.max())
        error = self.evaluation_error(state, everyone, torch.full_like(furthest, largest))
        rounding = ROUNDING * (1 + envelope.score.abs()) + 2 * error
        margin = torch.where(state.right, envelope.margin - rounding, 0.0).clamp(min=0)
        radii = dict.fromkeys(("fixed_point", "path"), torch.zeros_like(margin))
        if largest > 0:
            grid = furthest.clamp(min=largest * 1e-6)[:, None] * torch.arange(1, _PATH_POINTS + 1).to(margin)
            grid = (grid / _PATH_POINTS).clamp(max=self.means.limit)
            fixed_point = fixed_point_radius(lambda eps: self.constant(state, everyone, eps), margin, largest)
            slopes = torch.stack([self.constant(state, everyone, eps) for eps in grid.T], 1)
            radii = {"fixed_point": fixed_point, "path": path_radius(grid, slopes, margin)}
        for name, radius in radii.items():
            state.radii[f"radius_lipschitz_{name}"] = radius
            envelope.certify(everyone, radius, self.name)
        if largest > 0:
            steps = torch.diff(grid, dim=1, prepend=torch.zeros_like(grid[:, :1]))
            moved = (running_minimum(slopes) * steps).cumsum(1) * (1 + _PATH_POINTS * ROUNDING)
            for eps, distance in zip(grid.T, moved.T, strict=True):
                far = distance + rounding
                bound = envelope.score + far if state.kind == "id" else envelope.score - far
                state.record(everyone, eps, bound, self.name)

    def evaluation_error(self, state: State, index: Tensor, eps: Tensor) -> Tensor:
        """How far evaluations of S may be off on balls of some samples; infinite where it was not proved."""

        def error(ball: Ball) -> Tensor:
            hidden = self.hidden(ball)
            found = evaluation_error(self.graph, ball, hidden.inputs, hidden.logits, self.means.score)
            return torch.where(hidden.proved, found, torch.nan)

        return torch.nan_to_num(self.prove(error, state, index, eps), nan=torch.inf)

    def constant(self, state: State, index: Tensor, eps: Tensor) -> Tensor:
        """L on balls of some samples; NaN or infinite where it was not proved."""

        def bound(ball: Ball) -> Tensor:
            inside = state.kind == "id"
            bounds = local_lipschitz(
                self.graph, ball, self.hidden(ball), ("jacobian-crown",), fixed_head=inside, score=self.means.score
            )
            return bounds.auto if bounds.fixed_head is None else torch.fmin(bounds.auto, bounds.fixed_head)

        return self.prove(bound, state, index, eps)


class AlphaCrown(Refinement):
    """The largest ball that optimised linear bounds certify, between the certified and the attack radius."""

    name = "alpha-crown"
    beyond = 1.1  # attack radii: how far it tries, so that a wrong bound shows

    def run(self, state: State) -> None:
        """Search the largest ball of every open sample."""
        envelope, limit = state.envelope, self.means.limit

        def bound(ball: Ball) -> Tensor:
            steps, score = self.means.effort.steps, self.means.score
            return optimised_bounds(self.graph, ball, state.side, self.hidden(ball), steps=steps, score=score)

        def evaluate(index: Tensor, eps: Tensor) -> Tensor:
            return state.record(index, eps, self.prove(bound, state, index, eps), self.name)

        open_ = torch.zeros_like(envelope.score)
        open_[state.open(self.means.settings.precision)] = 1.0
        furthest = self.furthest(state, self.beyond)
        start = torch.where(envelope.radius > 0, envelope.radius, furthest / 4)
        zero = torch.zeros_like(open_)
        search_radius(
            evaluate,
            envelope.margin * open_,
            low=zero,
            low_deviation=zero,
            high=furthest.clamp(max=limit),
            high_deviation=torch.full_like(open_, torch.nan),
            first=(start * furthest).sqrt().clamp(max=limit),
            limit=limit,
            precision=self.means.settings.precision,
            evaluations=_REFINEMENTS,
        )


class BranchAndBound(Refinement):
    """Bisection between the certified and the attack radius with branch and bound.

    A point with the other decision that it meets is a counterexample too.
    """

    name = "branch-and-bound"
    beyond = 1.02

    def run(self, state: State) -> None:
        """Bisect for every open sample."""
        envelope, settings, effort = state.envelope, self.means.settings, self.means.effort

        def prove(ball: Ball) -> Branched:
            seconds = max(state.deadline - time.monotonic(), 0.0) if settings.time_limit > 0 else None
            return branch_and_bound(
                self.graph,
                ball,
                self.means.gamma,
                state.side,
                nodes=effort.nodes,
                seconds=seconds,
                score=self.means.score,
            )

        def unproved(balls: int) -> Branched:
            nothing, no = envelope.score.new_full((balls,), torch.nan), state.right.new_zeros(balls)
            points = state.images.new_zeros((balls, *state.images.shape[1:]))
            return Branched(nothing, no, no, points, no.long(), no)

        failed = self.furthest(state, self.beyond).clamp(max=self.means.limit)
        for _ in range(effort.rounds):
            index = state.open(settings.precision)
            index = index[failed[index] > envelope.radius[index] * (1 + settings.precision)]
            if not len(index):
                return
            eps = (envelope.radius[index] + failed[index]) / 2
            found = self.means.guard.prove(prove, unproved, state, index, eps)
            state.record(index, eps, found.bound, self.name)
            state.timed_out[index] |= found.timed_out
            points, flipped = state.images.clone(), torch.zeros_like(state.right)
            points[index], flipped[index] = found.points, found.refuted
            state.adversary.add(flipped, points)
            failed[index] = torch.where(envelope.radius[index] < eps, eps, failed[index])
            failed = torch.minimum(failed, self.beyond * state.adversary.radius)


_REFINING: tuple[type[Refinement], ...] = (Lipschitz, AlphaCrown, BranchAndBound)


def stages_of(means: Means) -> list[Stage]:
    """The stages that the settings name, in their order."""
    linear = [Linear(means, method) for method in means.settings.linear]
    return [*linear, *(stage(means) for stage in _REFINING if stage.name in means.settings.cascade)]
