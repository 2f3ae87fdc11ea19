r"""The cascade: stages of proof from cheap to tight over balls of growing eps, only what is undecided goes on.

For an input whose decision at x is right (ID accepted, OOD rejected), a ball of radius eps is *certified* if

    ID:  S_ub(x; eps) < gamma           OOD:  S_lb(x; eps) > gamma

was proved. The stages, in this order:

    ibp, crown-ibp, crown    bounds of S from linear bounds of the logits (`grood_cert.bounds.score`)
    lipschitz                |S(x') - S(x)| <= integral of L, L a local Lipschitz bound (`grood_cert.lipschitz`)
    alpha-crown              the same bounds of S with every free parameter optimised (`grood_cert.bounds.alpha_crown`)
    branch-and-bound         cases over the signs of unstable ReLUs (`grood_cert.bounds.branching`)

All bounds feed one *envelope*, S_lb(x; eps_j) and S_ub(x; eps_j) on the eps grid. A bound on a ball holds on every ball
inside it, so each one counts for all smaller eps of the grid: envelopes are monotone, and know nothing of gamma, which
only chooses where the expensive stages are spent. The certified radius is the largest eps at which a ball was proved;
it is searched for by secant steps and only proved values are returned, so no bound need be monotone in eps.

On the other side stands an attack: the distance of the nearest point found with the other decision. `certified <= attack`
and S_lb <= S(x') <= S_ub for every point that an attack reports are checked on every batch; a violation raises
`SoundnessError`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, get_args

import torch
from torch import Tensor

from grood_cert import attacks
from grood_cert.ball import Ball, Norm, check_eps, dual_norm, largest_eps
from grood_cert.bounds.alpha_crown import optimised_bounds
from grood_cert.bounds.branching import Branched, branch_and_bound
from grood_cert.bounds.engine import METHODS, ROUNDING, Method, Side
from grood_cert.bounds.engines import ENGINES, Engine, build
from grood_cert.bounds.graph import trace
from grood_cert.bounds.hidden import Preactivations, engine_preactivations
from grood_cert.bounds.score import ScoreBounds, score_bounds
from grood_cert.detector import Detector, check_network
from grood_cert.errors import InputError, SoundnessError
from grood_cert.lipschitz.bound import local_lipschitz, running_minimum
from grood_cert.lipschitz.radius import fixed_point_radius, path_radius
from grood_cert.results.columns import OUTCOMES, STAGES, Stage
from grood_cert.scores import energy, energy_gradient
from grood_cert.system.memory import split_on_memory_error

LINEAR: tuple[str, ...] = tuple(METHODS)

_EVALUATIONS = 12
_REFINEMENTS = 5  # balls that alpha-crown tries for one sample
_FIRST_SHARE = 0.7  # of the attack radius: where a search starts that knows nothing
_BEYOND = {"alpha-crown": 1.1, "branch-and-bound": 1.02}  # attack radii: how far they try, so that a wrong bound shows
_PATH_POINTS = 10  # of the path integral of Lipschitz bounds
_GROWTH = 1.3  # log-log slope of the bound's deviation in eps, until two points tell
_CODE = {name: code for code, name in enumerate(OUTCOMES)}


@dataclass(frozen=True)
class Effort:
    """How much work a certification spends.

    Attributes:
        stages: Stages of the cascade.
        everywhere: Whether the linear stages bound every ball of the grid, so that the envelope is as good at other
            thresholds; else they skip balls that a cheaper stage decided.
        steps: Optimisation steps of alpha-crown.
        nodes: Most cases that branch-and-bound may open for one ball.
        rounds: Balls that branch-and-bound may try for one sample.
        attack: How hard the attacks search.
    """

    stages: tuple[Stage, ...]
    everywhere: bool
    steps: int
    nodes: int
    rounds: int
    attack: attacks.Effort


_LINEAR_ONLY: tuple[Stage, ...] = ("ibp", "crown")
_REFINED: tuple[Stage, ...] = ("ibp", "crown", "alpha-crown", "branch-and-bound")
EFFORTS: dict[str, Effort] = {
    "fast": Effort(_LINEAR_ONLY, False, 0, 0, 0, attacks.Effort.preset("fast")),
    "default": Effort(_REFINED, True, steps=20, nodes=64, rounds=4, attack=attacks.Effort.preset("default")),
    "max": Effort(get_args(Stage), True, steps=50, nodes=2000, rounds=6, attack=attacks.Effort.preset("max")),
}


@dataclass(frozen=True)
class Settings:
    """What to certify.

    Attributes:
        eps: Grid of radii in pixel units, ascending, without repetition.
        norm: Norm of the balls.
        effort: "fast", "default" or "max", a key of `EFFORTS`.
        stages: Stages of the cascade in place of the effort's; empty: the effort's.
        engine: Who gives linear bounds: "native", "auto_lirpa", or "auto": the native one where it takes the network.
        precision: Relative precision at which a radius search stops.
        batch_size: Samples bounded together.
        seed: Seed of the attacks' starting points and of the choice of samples.
        time_limit: Seconds a sample may take on average over its batch before refining stages stop; 0: no limit. With
            a limit, results depend on the machine.
        per_logit: Whether to search radii from bounds of each logit alone too, for comparison.
    """

    eps: tuple[float, ...]
    norm: Norm = "linf"
    effort: str = "default"
    stages: tuple[Stage, ...] = ()
    engine: Engine = "auto"
    precision: float = 1e-2
    batch_size: int = 64
    seed: int = 0
    time_limit: float = 0.0
    per_logit: bool = False

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse settings that make no sense for images of this shape.

        Raises:
            InputError: Naming what is wrong.
        """
        check_eps(self.eps, self.norm, shape)
        if self.batch_size < 1:
            raise InputError(f"batch size must be 1 or more, got {self.batch_size}")
        if self.effort not in EFFORTS:
            raise InputError(f"unknown effort {self.effort!r}; use one of {', '.join(EFFORTS)}")
        for stage in self.stages:
            if stage not in STAGES:
                raise InputError(f"unknown stage {stage!r}; use some of {', '.join(STAGES)}")
        if not set(self.cascade) & set(LINEAR):
            raise InputError(f"the stages need one of {', '.join(LINEAR)}: the others stand on their bounds")
        if self.engine not in ENGINES:
            raise InputError(f"unknown engine {self.engine!r}; use one of {', '.join(ENGINES)}")
        if not 0 < self.precision < 1:
            raise InputError(f"precision must lie between 0 and 1, got {self.precision!r}")
        if not 0 <= self.time_limit < float("inf"):
            raise InputError(f"time limit must be 0 (none) or more seconds, got {self.time_limit!r}")

    @property
    def cascade(self) -> tuple[Stage, ...]:
        """The stages in their order."""
        chosen = self.stages or EFFORTS[self.effort].stages
        return tuple(stage for stage in get_args(Stage) if stage in chosen)


Evaluate = Callable[[Tensor, Tensor], Tensor]


def search_radius(
    evaluate: Evaluate,
    margin: Tensor,
    low: Tensor,
    low_deviation: Tensor,
    high: Tensor,
    high_deviation: Tensor,
    first: Tensor,
    limit: float,
    precision: float,
    evaluations: int = _EVALUATIONS,
) -> Tensor:
    r"""Largest eps found with deviation(eps) < margin, for each sample; every value returned was itself proved.

    The deviation D(eps) = S_ub - S (ID) or S - S_lb (OOD) grows at least linearly, about like a power of eps, so the
    next eps comes from the line through the bracket's ends in log-log coordinates, aimed just below the margin, and
    from bisection where that line is unknown or has missed twice. The search of a sample ends when
    margin / D(low) - 1 <= precision, when the bracket is that narrow, or after a fixed number of evaluations.

    Args:
        evaluate: (indices, eps) -> D, shape (len(indices),); NaN where nothing was proved.
        margin: |gamma - S(x)|, shape (B,); samples with margin <= 0 get radius 0.
        low: Largest eps proved so far, 0 if none, shape (B,).
        low_deviation: D(low).
        high: Smallest eps known to fail, infinity if none, shape (B,).
        high_deviation: D(high), NaN if unknown.
        first: First eps to try where nothing is known, shape (B,).
        limit: Largest eps that makes sense.
        precision: Relative precision.
        evaluations: Most evaluations of a sample.

    Returns:
        Shape (B,).

    Example:
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> square = lambda index, eps: eps**2
        >>> search_radius(square, one / 4, zero, zero, one / 0, one * torch.nan, one, 9.0, 1e-4)
        tensor([0.5000])
    """
    low, low_deviation, high, high_deviation = (t.clone() for t in (low, low_deviation, high, high_deviation))
    growth = torch.full_like(margin, _GROWTH)
    misses = torch.zeros_like(margin)  # in a row
    target = margin * (1 - precision / 2)
    for _ in range(evaluations):
        active = (margin > low_deviation * (1 + precision)) & (low < limit) & (high > low * (1 + precision))
        if not bool(active.any()):
            break
        bounded = torch.isfinite(high)
        bracket = bounded & (low_deviation > 0) & (high_deviation > low_deviation)
        slope = torch.where(bracket, (high_deviation / low_deviation).log() / (high / low).log(), growth)
        secant = low * (target / low_deviation) ** (1 / slope.clamp(min=0.5))
        below = high * (target / high_deviation).clamp(max=0.9)  # right or too low wherever D is convex
        start = torch.where(torch.isfinite(below), below, torch.minimum(first, high / 2))
        guess = torch.where(low > 0, secant, start)
        middle = torch.where(bounded, (low + high) / 2, torch.maximum(4 * low, torch.full_like(low, limit / 4096)))
        blind = ~torch.isfinite(guess) | (bounded & (low > 0) & ~bracket & (guess > middle)) | (misses >= 2)
        guess = torch.where(blind, middle, guess)
        narrow, wide = low + 0.01 * (high - low), low + 0.99 * (high - low)
        guess = torch.where(bounded, torch.maximum(torch.minimum(guess, wide), narrow), guess)
        eps = guess.clamp(max=limit)
        index = active.nonzero().squeeze(1)
        got = torch.full_like(margin, torch.nan)
        got[index] = evaluate(index, eps[index])
        proved = active & (got < margin)
        failed = active & ~proved
        rise = (got / low_deviation).log() / (eps / low).log()
        growth = torch.where(proved & torch.isfinite(rise) & (rise > 0.5), rise, growth)
        low, low_deviation = torch.where(proved, eps, low), torch.where(proved, got, low_deviation)
        high, high_deviation = torch.where(failed, eps, high), torch.where(failed, got, high_deviation)
        misses = torch.where(failed, misses + 1, 0)
    return low


class Envelope:
    r"""What was proved about a batch so far: bounds of S on the eps grid, and the largest certified ball of each sample.

    Args:
        eps: The grid.
        score: S(x), shape (B,).
        gamma: Threshold.
        kind: "id", or anything else for OOD.

    Attributes:
        lower: S_lb on the grid, shape (B, E), -infinity where nothing was proved; non-increasing in eps.
        upper: S_ub on the grid, infinity where nothing was proved; non-decreasing.
        outcome: Code in `OUTCOMES` of the stage that first certified each ball, 0 if none did, shape (B, E).
        radius: Largest eps certified, 0 if none, shape (B,).
        stage: Code of the stage that certified it.

    Example:
        >>> envelope = Envelope((0.1, 0.2), torch.tensor([-3.0]), -1.0, "id")
        >>> everyone = torch.tensor([0])
        >>> envelope.record(everyone, torch.tensor([0.15]), torch.tensor([-9.0]), torch.tensor([-2.0]), "crown")
        >>> envelope.upper, envelope.radius
        (tensor([[-2., inf]]), tensor([0.1500]))
    """

    def __init__(self, eps: tuple[float, ...], score: Tensor, gamma: float, kind: str) -> None:
        self.grid = torch.tensor(eps, dtype=score.dtype, device=score.device)
        self.gamma, self.kind, self.score = gamma, kind, score
        self.margin = (gamma - score if kind == "id" else score - gamma).clamp(min=0)
        shape = len(score), len(eps)
        self.lower = score.new_full(shape, -torch.inf)
        self.upper = score.new_full(shape, torch.inf)
        self.outcome = torch.zeros(shape, dtype=torch.long, device=score.device)
        self.radius = torch.zeros_like(score)
        self.stage = torch.zeros(len(score), dtype=torch.long, device=score.device)

    def record(self, index: Tensor, eps: Tensor, lower: Tensor, upper: Tensor, stage: Stage) -> None:
        """Add S_lb and S_ub proved on balls of these samples, NaN where they were not; smaller balls gain as well."""
        inside = self.grid <= eps[:, None]
        lower = torch.where(torch.isfinite(lower), lower, -torch.inf)
        upper = torch.where(torch.isfinite(upper), upper, torch.inf)
        gain = torch.where(inside, lower[:, None], -torch.inf), torch.where(inside, upper[:, None], torch.inf)
        self.lower[index] = torch.maximum(self.lower[index], gain[0])
        self.upper[index] = torch.minimum(self.upper[index], gain[1])
        proved = upper < self.gamma if self.kind == "id" else lower > self.gamma
        self.certify(index[proved], eps[proved], stage)

    def certify(self, index: Tensor, eps: Tensor, stage: Stage) -> None:
        """Note that a stage proved the decision on balls of these samples."""
        new = (self.grid <= eps[:, None]) & (self.outcome[index] == 0) & (eps[:, None] > 0)
        self.outcome[index] = torch.where(new, _CODE[stage], self.outcome[index])
        better = eps > self.radius[index]
        self.radius[index[better]], self.stage[index[better]] = eps[better], _CODE[stage]

    def deviation(self, lower: Tensor, upper: Tensor, index: Tensor | slice = slice(None)) -> Tensor:
        """How far bounds let S move towards gamma; below the margin only if they prove the decision."""
        score, margin = self.score[index], self.margin[index]
        if lower.dim() == 2:
            score, margin = score[:, None], margin[:, None]
        proved = upper < self.gamma if self.kind == "id" else lower > self.gamma
        moved = upper - score if self.kind == "id" else score - lower
        return torch.where(proved, moved, torch.maximum(moved, margin))


_Result = TypeVar("_Result", bound=Any)


@dataclass(frozen=True)
class _Bound:
    bound: Tensor


@dataclass
class _Batch:
    """A batch on its way through the cascade."""

    images: Tensor
    kind: str
    right: Tensor
    envelope: Envelope
    per_logit: Envelope
    witness: attacks.MinimumNorm
    deadline: float
    timed_out: Tensor
    seen: list[attacks.Extremes] = field(default_factory=list)

    @property
    def side(self) -> Side:
        """The bound that decides."""
        return "upper" if self.kind == "id" else "lower"


class Certifier:
    """Certifies batches of images against one detector.

    Args:
        detector: Network and gamma.
        settings: What to certify.

    Attributes:
        settings: As given; the refining stages are left out where "auto" took auto_LiRPA and no stages were named.
        choice: The engine of the linear bounds.
        together: Most balls bounded at once, None: all of a batch.
        failures: Messages of exceptions in bound engines with the number of balls lost to each; those balls count as
            not proved.

    Raises:
        InputError: If the settings make no sense for the detector, or a stage cannot bound one of its layers.
        RunError: If the bound engine is missing or cannot convert the network.
    """

    def __init__(self, detector: Detector, settings: Settings) -> None:
        shape = detector.shape
        settings.check(shape)
        check_network(detector.network)
        self.gamma = detector.gamma
        self.network = detector.network
        self.together: int | None = None
        self.failures: dict[str, int] = {}
        self.effort = EFFORTS[settings.effort]
        self._linear = cast(list[Method], [stage for stage in settings.cascade if stage in LINEAR])
        self.choice = build(settings.engine, detector.network, shape, self._linear[-1])
        self._bounded = self.choice.bounded
        if self.choice.note and not settings.stages:
            settings = dataclasses.replace(settings, stages=tuple(self._linear))
        self.settings = settings
        refining = set(settings.cascade) - set(LINEAR)
        self._graph = trace(detector.network, shape) if refining else None
        self._limit = largest_eps(shape, settings.norm)

    def certify(self, images: Tensor, kind: str, generator: torch.Generator) -> dict[str, Tensor]:
        """The columns of a certification that are computed, and `right`, each of shape (B,) or (B, len(eps)).

        Args:
            images: Shape (B, C, H, W), pixels in [0, 1].
            kind: "id" (to be accepted), "ood" or "noise" (to be rejected).
            generator: Random numbers of the attacks.

        Raises:
            SoundnessError: If an attack contradicts a proof.
        """
        norm, settings = self.settings.norm, self.settings
        images = images.to(next(self.network.parameters()))
        with torch.no_grad():
            logits = self.network(images)
        score = energy(logits)
        accepted = score <= self.gamma
        right = accepted if kind == "id" else ~accepted
        allowance = settings.time_limit * len(images) if settings.time_limit > 0 else torch.inf
        envelope = Envelope(settings.eps, score, self.gamma, kind)
        batch = _Batch(
            images=images,
            kind=kind,
            right=right,
            envelope=envelope,
            per_logit=Envelope(settings.eps, score, self.gamma, kind),
            witness=self._attack(images, right, generator),
            deadline=time.monotonic() + allowance,
            timed_out=torch.zeros_like(right),
        )
        self._attack_grid(batch, generator)
        for method in self._linear:
            self._bound_grid(batch, method)
        self._linear_radius(batch, envelope, "joint")
        if settings.per_logit:
            self._linear_radius(batch, batch.per_logit, "per_logit")
        lipschitz = self._lipschitz(batch) if "lipschitz" in settings.cascade else {}
        if "alpha-crown" in settings.cascade:
            self._alpha(batch)
        if "branch-and-bound" in settings.cascade:
            self._branch(batch)
        unknown = torch.full_like(score, torch.nan)
        radii = {
            "radius_certified": envelope.radius,
            "radius_certified_per_logit": batch.per_logit.radius if settings.per_logit else unknown,
            "radius_lipschitz_fixed_point": lipschitz.get("fixed_point", unknown),
            "radius_lipschitz_path": lipschitz.get("path", unknown),
        }
        _check_inside(batch)
        for name, radius in radii.items():
            _check_chain(images, batch.witness, name, radius)
        slope = dual_norm(energy_gradient(self.network, images)[1], norm)
        return {
            "right": right,
            "prediction": logits.argmax(1),
            "score": score,
            "accepted": accepted.long(),
            "stage": torch.where(right, envelope.stage, _CODE["misdecision"]),
            **radii,
            "radius_attack": batch.witness.radius,
            "radius_gradient_norm_estimate": torch.where(right, envelope.margin / slope, torch.zeros_like(score)),
            "gradient_norm_estimate": slope,
            "s_lb": _proved(envelope.lower),
            "s_ub": _proved(envelope.upper),
            "outcome": self._outcomes(batch),
            "points": batch.witness.points,
            "s_attack_min": torch.stack([seen.minimum for seen in batch.seen], 1),
            "s_attack_max": torch.stack([seen.maximum for seen in batch.seen], 1),
        }

    def probe(self, images: Tensor) -> None:
        """Bound some balls together as `certify` does, to see how much memory that takes."""
        images = images.to(next(self.network.parameters()))
        eps = images.new_full((len(images),), self.settings.eps[-1])
        score_bounds(self._bounded, Ball(images, eps, self.settings.norm), self._linear[-1])

    def _outcomes(self, batch: _Batch) -> Tensor:
        """Code of what became of each (sample, eps)."""
        found = batch.envelope.outcome
        open_ = found == 0
        attacked = batch.envelope.grid >= batch.witness.radius[:, None]
        found = torch.where(open_ & batch.timed_out[:, None], _CODE["timeout"], found)
        found = torch.where(open_ & attacked, _CODE["attack"], found)
        return torch.where(batch.right[:, None], found, _CODE["misdecision"])

    # The other side of the bracket.

    def _attack(self, images: Tensor, right: Tensor, generator: torch.Generator) -> attacks.MinimumNorm:
        """Nearest flipped points; a sample that is wrong at x is its own, at distance 0."""
        radius, points = images.new_zeros(len(images)), images.clone()
        if bool(right.any()):
            found = attacks.minimum_norm(
                self.network, images[right], self.gamma, self.settings.norm, generator, self.effort.attack
            )
            radius[right], points[right] = found.radius, found.points
        return attacks.MinimumNorm(radius, points)

    def _attack_grid(self, batch: _Batch, generator: torch.Generator) -> None:
        """Extremes of S that attacks reach on the grid; a witness lies in every larger ball, so they carry theirs along."""
        high = low = batch.witness.points
        found: list[attacks.Extremes] = []
        for value in self.settings.eps:
            ball = Ball(batch.images, torch.full_like(batch.envelope.score, value), self.settings.norm)
            seen = attacks.extremes(self.network, ball, generator, high, low, effort=self.effort.attack)
            high, low = seen.argmax, seen.argmin
            flipped = seen.maximum > self.gamma if batch.kind == "id" else seen.minimum <= self.gamma
            self._add_witness(batch, batch.right & flipped, high if batch.kind == "id" else low)
            found.append(seen)
        batch.seen = found

    def _add_witness(self, batch: _Batch, flipped: Tensor, points: Tensor) -> None:
        """Keep points with the other decision that lie nearer than the nearest so far."""
        distance = Ball(batch.images, torch.zeros_like(batch.witness.radius), self.settings.norm).distance(points)
        nearer = flipped & (distance < batch.witness.radius)
        mask = nearer.reshape(-1, *[1] * (points.dim() - 1))
        batch.witness = attacks.MinimumNorm(
            torch.where(nearer, distance, batch.witness.radius), torch.where(mask, points, batch.witness.points)
        )

    # Linear bounds.

    def _count_failure(self, error: Exception, balls: int) -> None:
        message = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        self.failures[message] = self.failures.get(message, 0) + balls

    def _guarded(
        self,
        prove: Callable[[Ball], _Result],
        unproved: Callable[[int], _Result],
        batch: _Batch,
        index: Tensor,
        eps: Tensor,
    ) -> _Result:
        """Prove something about balls of some samples, as many at once as memory allows.

        Where memory runs out, the balls are halved. Any other exception proves nothing and is counted.
        """

        def failed(error: Exception, samples: int) -> _Result:
            self._count_failure(error, samples)
            return unproved(samples)

        def attempt(index: Tensor, eps: Tensor) -> _Result:
            return prove(Ball(batch.images[index], eps, self.settings.norm))

        size = self.together or len(index)
        parts = [
            part
            for items in zip(index.split(size), eps.split(size), strict=True)
            for part in split_on_memory_error(attempt, items, failed)
        ]
        joined = (torch.cat([getattr(part, item.name) for part in parts]) for item in dataclasses.fields(parts[0]))
        whole: _Result = type(parts[0])(*joined)
        return whole

    def _bound(self, batch: _Batch, index: Tensor, eps: Tensor, method: Method) -> dict[str, Tensor]:
        """Bound S on balls of some samples and record it; an exception proves nothing and is counted.

        Returns:
            The deviations D(eps) of the joint and of the per-logit bounds, NaN where the engine failed.
        """

        def unproved(samples: int) -> ScoreBounds:
            nothing = eps.new_full((samples,), torch.nan)
            return ScoreBounds(nothing, nothing, nothing, nothing)

        bound = self._guarded(lambda ball: score_bounds(self._bounded, ball, method), unproved, batch, index, eps)
        stage = cast(Stage, method)
        batch.envelope.record(index, eps, bound.lower, bound.upper, stage)
        batch.per_logit.record(index, eps, bound.lower_per_logit, bound.upper_per_logit, stage)
        return {
            "joint": batch.envelope.deviation(bound.lower, bound.upper, index),
            "per_logit": batch.envelope.deviation(bound.lower_per_logit, bound.upper_per_logit, index),
        }

    def _bound_grid(self, batch: _Batch, method: Method) -> None:
        """One linear stage on the grid."""
        first = method == self._linear[0]
        for column, value in enumerate(self.settings.eps):
            needed = torch.ones_like(batch.right)
            if not (first or self.effort.everywhere):
                needed = batch.right & (batch.envelope.outcome[:, column] == 0) & (batch.witness.radius > value)
            index = needed.nonzero().squeeze(1)
            if len(index):
                self._bound(batch, index, torch.full_like(batch.envelope.score[index], value), method)

    def _linear_radius(self, batch: _Batch, envelope: Envelope, key: str) -> None:
        """Search the largest ball that linear bounds certify, from what is known on the grid."""
        grid, known = envelope.grid, envelope.deviation(envelope.lower, envelope.upper)
        proved = known < envelope.margin[:, None]
        low = torch.where(proved, grid, 0).amax(1)
        high = torch.where(~proved & (grid > low[:, None]), grid, torch.inf).amin(1)

        def at(eps: Tensor, default: float) -> Tensor:
            hit = grid == eps[:, None]
            return torch.where(hit.any(1), torch.where(hit, known, 0).sum(1), default)

        # Balls beyond the attack may be left to cheaper stages; their loose deviation would mislead the search.
        bounded = (high < batch.witness.radius) | self.effort.everywhere | (len(self._linear) == 1)
        search_radius(
            lambda index, eps: self._bound(batch, index, eps, self._linear[-1])[key],
            torch.where(batch.right, envelope.margin, 0.0),
            low=low,
            low_deviation=torch.where(low > 0, at(low, 0.0), 0.0),
            high=high,
            high_deviation=torch.where(bounded, at(high, torch.nan), torch.nan),
            first=(_FIRST_SHARE * batch.witness.radius).clamp(max=self._limit),
            limit=self._limit,
            precision=self.settings.precision,
        )

    # Stages that refine what is undecided.

    def _open(self, batch: _Batch) -> Tensor:
        """Samples whose certified and attack radii leave room between them, and time: indices."""
        gap = batch.witness.radius > batch.envelope.radius * (1 + self.settings.precision)
        late = time.monotonic() > batch.deadline
        if late:
            batch.timed_out |= batch.right & gap
        return (batch.right & gap & (not late)).nonzero().squeeze(1)

    def _hidden(self, ball: Ball) -> Preactivations:
        """Bounds of the hidden layers and logits by the linear engine, intersected with intervals."""
        assert self._graph is not None
        return engine_preactivations(self._bounded, self._graph, ball)

    def _lipschitz(self, batch: _Batch) -> dict[str, Tensor]:
        """Radii and an envelope from local Lipschitz bounds.

        OOD needs the constant L of S; for ID the constant of p0 . f, p0 = softmax f(x), is enough, since S lies below
        its tangent in f. The smaller of the two may be taken at each eps, also along a path: every bound of S is a
        supremum over a set of softmax weights that contains p0, with the network's slopes independent of them, so it
        bounds the slope of p0 . f as well.

        The search and the integration grid go beyond the attack radius, so that a wrong bound shows.
        """
        envelope = batch.envelope
        found = dict.fromkeys(("fixed_point", "path"), torch.zeros_like(envelope.score))
        furthest = torch.where(batch.right, 1.25 * batch.witness.radius, 0.0).clamp(max=self._limit)
        margin = torch.where(batch.right, envelope.margin - ROUNDING * (1 + envelope.score.abs()), 0.0).clamp(min=0)
        everyone = torch.arange(len(margin), device=margin.device)

        def bound(eps: Tensor) -> Tensor:
            assert self._graph is not None
            ball = Ball(batch.images, eps, self.settings.norm)
            bounds = local_lipschitz(
                self._graph, ball, self._hidden(ball), ("jacobian-crown",), fixed_head=batch.kind == "id"
            )
            return bounds.auto if bounds.fixed_head is None else torch.fmin(bounds.auto, bounds.fixed_head)

        try:
            largest = float(furthest.max())
            if largest > 0:
                fixed_point = fixed_point_radius(bound, margin, largest)
                grid = furthest.clamp(min=largest * 1e-6)[:, None] * torch.arange(1, _PATH_POINTS + 1).to(margin)
                grid = (grid / _PATH_POINTS).clamp(max=self._limit)
                slopes = torch.stack([bound(eps) for eps in grid.T], 1)
                found = {"fixed_point": fixed_point, "path": path_radius(grid, slopes, margin)}
        except Exception as error:  # noqa: BLE001  (whatever went wrong, nothing was proved)
            self._count_failure(error, len(margin))
            return found
        for radius in found.values():
            envelope.certify(everyone, radius, "lipschitz")
        if largest > 0:
            steps = torch.diff(grid, dim=1, prepend=torch.zeros_like(grid[:, :1]))
            moved = (running_minimum(slopes) * steps).cumsum(1) * (1 + _PATH_POINTS * ROUNDING)
            nothing = torch.full_like(margin, torch.nan)
            for eps, distance in zip(grid.T, moved.T, strict=True):
                far = distance + ROUNDING * (1 + envelope.score.abs())
                lower = nothing if batch.kind == "id" else envelope.score - far
                upper = envelope.score + far if batch.kind == "id" else nothing
                envelope.record(everyone, eps, lower, upper, "lipschitz")
        return found

    def _alpha(self, batch: _Batch) -> None:
        """Search the largest ball that optimised bounds certify, between the certified and the attack radius."""
        envelope, graph = batch.envelope, self._graph
        assert graph is not None

        def prove(ball: Ball) -> _Bound:
            steps = self.effort.steps or EFFORTS["default"].steps
            return _Bound(optimised_bounds(graph, ball, batch.side, self._hidden(ball), steps=steps))

        def unproved(samples: int) -> _Bound:
            return _Bound(envelope.score.new_full((samples,), torch.nan))

        def evaluate(index: Tensor, eps: Tensor) -> Tensor:
            got = torch.full_like(eps, torch.nan)
            if time.monotonic() > batch.deadline:
                batch.timed_out[index] = True
                return got
            bound = self._guarded(prove, unproved, batch, index, eps).bound
            lower, upper = (got, bound) if batch.kind == "id" else (bound, got)
            envelope.record(index, eps, lower, upper, "alpha-crown")
            return envelope.deviation(lower, upper, index)

        open_ = torch.zeros_like(envelope.score)
        open_[self._open(batch)] = 1.0
        furthest = _BEYOND["alpha-crown"] * torch.where(
            torch.isfinite(batch.witness.radius), batch.witness.radius, self._limit
        )
        start = torch.where(envelope.radius > 0, envelope.radius, furthest / 4)
        zero = torch.zeros_like(open_)
        search_radius(
            evaluate,
            envelope.margin * open_,
            low=zero,
            low_deviation=zero,
            high=furthest.clamp(max=self._limit),
            high_deviation=torch.full_like(open_, torch.nan),
            first=(start * furthest).sqrt().clamp(max=self._limit),
            limit=self._limit,
            precision=self.settings.precision,
            evaluations=_REFINEMENTS,
        )

    def _branch(self, batch: _Batch) -> None:
        """Bisect between the certified and the attack radius with branch and bound.

        A point with the other decision that it meets is a witness too.
        """
        envelope, graph = batch.envelope, self._graph
        assert graph is not None
        nodes, rounds = self.effort.nodes or EFFORTS["default"].nodes, self.effort.rounds or EFFORTS["default"].rounds

        def prove(ball: Ball) -> Branched:
            seconds = max(batch.deadline - time.monotonic(), 0.0) if self.settings.time_limit > 0 else None
            return branch_and_bound(graph, ball, self.gamma, batch.side, nodes=nodes, seconds=seconds)

        def unproved(samples: int) -> Branched:
            nothing, no = envelope.score.new_full((samples,), torch.nan), batch.right.new_zeros(samples)
            points = batch.images.new_zeros((samples, *batch.images.shape[1:]))
            return Branched(nothing, no, no, points, no.long(), no)

        beyond = _BEYOND["branch-and-bound"]
        failed = beyond * torch.where(torch.isfinite(batch.witness.radius), batch.witness.radius, self._limit)
        failed = failed.clamp(max=self._limit)
        for _ in range(rounds):
            index = self._open(batch)
            index = index[failed[index] > envelope.radius[index] * (1 + self.settings.precision)]
            if not len(index):
                return
            eps = (envelope.radius[index] + failed[index]) / 2
            found = self._guarded(prove, unproved, batch, index, eps)
            nothing = torch.full_like(eps, torch.nan)
            lower, upper = (nothing, found.bound) if batch.kind == "id" else (found.bound, nothing)
            envelope.record(index, eps, lower, upper, "branch-and-bound")
            batch.timed_out[index] |= found.timed_out
            points, flipped = batch.images.clone(), torch.zeros_like(batch.right)
            points[index], flipped[index] = found.points, found.refuted
            self._add_witness(batch, flipped, points)
            failed[index] = torch.where(envelope.radius[index] < eps, eps, failed[index])
            failed = torch.minimum(failed, beyond * batch.witness.radius)


def _proved(bound: Tensor) -> Tensor:
    """An infinite bound is no bound: NaN."""
    return torch.where(torch.isfinite(bound), bound, torch.nan)


def _check_chain(images: Tensor, adversarial: attacks.MinimumNorm, name: str, certified: Tensor) -> None:
    wrong = certified > adversarial.radius
    if bool(wrong.any()):
        raise SoundnessError(
            f"{int(wrong.sum())} of {name} exceed the distance of a counterexample: no certificate of this run can be "
            "trusted",
            {
                "image": images[wrong].cpu().numpy(),
                "counterexample": adversarial.points[wrong].cpu().numpy(),
                name: certified[wrong].cpu().numpy(),
                "radius_attack": adversarial.radius[wrong].cpu().numpy(),
            },
        )


def _check_inside(batch: _Batch) -> None:
    """Every point that an attack on the grid visited scores inside the envelope."""
    for column, seen in enumerate(batch.seen):
        lower, upper = batch.envelope.lower[:, column], batch.envelope.upper[:, column]
        above = seen.maximum > upper
        wrong = above | (seen.minimum < lower)
        if bool(wrong.any()):
            points = torch.where(above.reshape(-1, *[1] * (batch.images.dim() - 1)), seen.argmax, seen.argmin)
            eps = batch.envelope.grid[column].expand_as(lower)
            raise SoundnessError(
                f"{int(wrong.sum())} points inside the ball of eps {float(eps[0]):g} score outside their proved "
                "bounds: no certificate of this run can be trusted",
                {
                    "image": batch.images[wrong].cpu().numpy(),
                    "counterexample": points[wrong].cpu().numpy(),
                    "eps": eps[wrong].cpu().numpy(),
                    "s_lower": lower[wrong].cpu().numpy(),
                    "s_upper": upper[wrong].cpu().numpy(),
                    "s_attack_minimum": seen.minimum[wrong].cpu().numpy(),
                    "s_attack_maximum": seen.maximum[wrong].cpu().numpy(),
                },
            )
