r"""Certification: formal bounds of S on an eps grid, certified radii, and the attack that brackets both.

For an input whose decision at x is right (ID accepted, OOD rejected) the *certified radius* is an eps for which

    ID:  S_ub(x; eps) < gamma           OOD:  S_lb(x; eps) > gamma

was proved. It is searched for by secant steps on the bound, and only a value that was itself proved is returned, so
the bound need not be monotone in eps. Beside it stand the distance of the nearest counterexample an attack found (an
upper bracket) and the gradient-norm radius, which is an estimate and can exceed both.

On every batch the chain `certified <= attack` and `S_lb <= S(x') <= S_ub` for every point any attack visited are
checked; a violation raises `SoundnessError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grood_cert import attack, rows, runs
from grood_cert.ball import Ball, Norm, dual_norm, largest_eps
from grood_cert.data import ImageSet
from grood_cert.detector import Detector
from grood_cert.energy import energy, energy_gradient
from grood_cert.errors import InputError, SoundnessError
from grood_cert.lipschitz.bound import local_lipschitz
from grood_cert.lipschitz.engine import engine_preactivations
from grood_cert.lipschitz.radius import fixed_point_radius, path_radius
from grood_cert.lirpa import BoundedNetwork, Method
from grood_cert.native.graph import trace
from grood_cert.rows import GRID_COLUMNS, Rows, from_records, grid_column
from grood_cert.score_bounds import ScoreBounds, score_bounds

_EVALUATIONS = 12
_FIRST_SHARE = 0.7  # of the attack radius: where the search starts
_LIPSCHITZ_RADII = ("radius_lipschitz_fixed_point", "radius_lipschitz_path")
_PATH_POINTS = 10  # of the path integral of Lipschitz bounds
_ROUNDING = 1e-12  # relative error allowed to a score
_GROWTH = 1.3  # log-log slope of the bound's deviation in eps, until two points tell


@dataclass(frozen=True)
class Settings:
    """What to certify.

    Attributes:
        eps: Grid of radii in pixel units, ascending, without repetition.
        norm: Norm of the balls.
        method: How the bound engine relaxes the network.
        precision: Relative precision at which the radius search stops.
        batch_size: Samples bounded together.
        seed: Seed of the attacks' starting points.
        lipschitz: Whether to prove radii from local Lipschitz bounds too.
    """

    eps: tuple[float, ...]
    norm: Norm = "linf"
    method: Method = "crown"
    precision: float = 1e-3
    batch_size: int = 64
    seed: int = 0
    lipschitz: bool = False

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse settings that make no sense for images of this shape.

        Raises:
            InputError: Naming what is wrong.
        """
        runs.check_balls(self.eps, self.norm, self.method, self.batch_size, shape)
        if not 0 < self.precision < 1:
            raise InputError(f"precision must lie between 0 and 1, got {self.precision!r}")


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
) -> Tensor:
    r"""Largest eps found with deviation(eps) < margin, for each sample; every value returned was itself proved.

    The deviation D(eps) = S_ub - S (ID) or S - S_lb (OOD) grows at least linearly, about like a power of eps, so the
    next eps comes from the line through the bracket's ends in log-log coordinates, aimed just below the margin, and
    from bisection where that line is unknown or has missed twice. The search of a sample ends when
    margin / D(low) - 1 <= precision, or after a fixed number of evaluations.

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
    for _ in range(_EVALUATIONS):
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


def _decreasing(values: Tensor) -> Tensor:
    """Running minimum from the right along the last axis; NaN counts as infinite and stays NaN where nothing is left."""
    least = (
        torch.nan_to_num(values, nan=torch.inf, posinf=torch.inf, neginf=torch.nan).flip(-1).cummin(-1).values.flip(-1)
    )
    return torch.where(torch.isfinite(least), least, torch.full_like(least, torch.nan))


class Certifier:
    """Certifies batches of images against one detector.

    Args:
        detector: Network and gamma.
        settings: What to certify.

    Attributes:
        failures: Messages of exceptions in the bound engine with the number of bounds lost to each; those bounds count
            as not proved.

    Raises:
        InputError: If the settings make no sense for the detector.
        RunError: If the bound engine is missing or cannot convert the network.
    """

    def __init__(self, detector: Detector, settings: Settings) -> None:
        shape = detector.architecture.shape
        settings.check(shape)
        runs.check_network(detector.network)
        self.settings = settings
        self.gamma = detector.gamma
        self.network = detector.network
        self.failures: dict[str, int] = {}
        self._bounded = BoundedNetwork(detector.network, shape, settings.method)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._limit = largest_eps(shape, settings.norm)
        self._graph = trace(detector.network, shape) if settings.lipschitz else None

    @property
    def method(self) -> str:
        """The method in force: the one asked for, unless the engine had to fall back."""
        return self._bounded.method

    def certify(self, images: Tensor, kind: str) -> dict[str, Tensor]:
        """The columns of `grood_cert.rows` that are computed, and `right`, each of shape (B,) or (B, len(eps)).

        Args:
            images: Shape (B, C, H, W), pixels in [0, 1].
            kind: "id" (to be accepted), "ood" or "noise" (to be rejected).

        Raises:
            SoundnessError: If an attack contradicts a proof.
        """
        norm = self.settings.norm
        images = images.to(next(self.network.parameters()))
        with torch.no_grad():
            logits = self.network(images)
        score = energy(logits)
        accepted = score <= self.gamma
        right = accepted if kind == "id" else ~accepted
        margin = torch.where(right, (self.gamma - score).abs(), torch.zeros_like(score))
        slope = dual_norm(energy_gradient(self.network, images)[1], norm)
        adversarial = self._attack(images, right)
        columns, deviations = self._grid(images, score, kind, adversarial)
        radii = {
            name: self._radius(images, score, kind, margin, name, deviation, adversarial.radius)
            for name, deviation in deviations.items()
        }
        # Both are proofs of the same statement, so the better one holds.
        radii["radius_certified"] = torch.maximum(*radii.values())
        certain = (margin - _ROUNDING * (1 + score.abs())).clamp(min=0)
        radii |= self._lipschitz_radii(images, kind, certain, adversarial.radius)
        for name, radius in radii.items():
            _check_chain(images, adversarial, name, radius)
        return {
            "right": right,
            "prediction": logits.argmax(1),
            "score": score,
            "accepted": accepted.long(),
            **radii,
            "radius_attack": adversarial.radius,
            "radius_gradient_norm_estimate": torch.where(right, margin / slope, torch.zeros_like(margin)),
            "gradient_norm_estimate": slope,
            **columns,
        }

    def _lipschitz_radii(self, images: Tensor, kind: str, margin: Tensor, attack_radius: Tensor) -> dict[str, Tensor]:
        """Radii from local Lipschitz bounds, NaN if not asked for; an exception proves nothing and is counted.

        OOD needs the constant L of S; for ID the constant of p0 . f, p0 = softmax f(x), is enough, since S lies below
        its tangent in f. The smaller of the two may be taken at each eps, also along a path: every bound of S is a
        supremum over a set of softmax weights that contains p0, with the network's slopes independent of them, so it
        bounds the slope of p0 . f as well.

        The search and the integration grid go beyond the attack radius, so that a wrong bound shows.
        """
        found = dict.fromkeys(_LIPSCHITZ_RADII, torch.full_like(margin, torch.nan))
        if self._graph is None:
            return found
        found = dict.fromkeys(_LIPSCHITZ_RADII, torch.zeros_like(margin))
        graph = self._graph
        furthest = (1.25 * attack_radius).clamp(max=self._limit)

        def bound(eps: Tensor) -> Tensor:
            ball = Ball(images, eps, self.settings.norm)
            known = engine_preactivations(self._bounded, graph, ball)
            bounds = local_lipschitz(graph, ball, known, ("jacobian-crown",), fixed_head=kind == "id")
            return bounds.auto if bounds.fixed_head is None else torch.fmin(bounds.auto, bounds.fixed_head)

        try:
            largest = float(furthest.max())
            if largest > 0:
                fixed_point = fixed_point_radius(bound, margin, largest)
                grid = furthest.clamp(min=largest * 1e-6)[:, None] * torch.arange(1, _PATH_POINTS + 1).to(margin)
                grid = (grid / _PATH_POINTS).clamp(max=self._limit)
                bounds = torch.stack([bound(eps) for eps in grid.T], 1)
                found = dict(zip(_LIPSCHITZ_RADII, (fixed_point, path_radius(grid, bounds, margin)), strict=True))
        except Exception as error:  # noqa: BLE001  (whatever went wrong, nothing was proved)
            self._count_failure(error, len(images))
        return found

    def _count_failure(self, error: Exception, bounds: int) -> None:
        message = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        self.failures[message] = self.failures.get(message, 0) + bounds

    def _attack(self, images: Tensor, right: Tensor) -> attack.MinimumNorm:
        """Nearest flipped points; a sample that is wrong at x is its own, at distance 0."""
        radius, points = torch.zeros(len(images)).to(images), images.clone()
        if bool(right.any()):
            found = attack.minimum_norm(self.network, images[right], self.gamma, self.settings.norm, self._generator)
            radius[right], points[right] = found.radius, found.points
        return attack.MinimumNorm(radius, points)

    def _bounds(self, images: Tensor, eps: Tensor) -> ScoreBounds:
        """Bounds of S, all NaN where the engine raised an exception, which is counted."""
        ball = Ball(images, eps, self.settings.norm)
        try:
            return score_bounds(self._bounded, ball)
        except Exception as error:  # noqa: BLE001  (whatever went wrong, nothing was proved)
            self._count_failure(error, len(images))
            nan = torch.full_like(eps, torch.nan)
            return ScoreBounds(nan, nan, nan, nan)

    def _deviations(self, bound: ScoreBounds, score: Tensor, kind: str) -> dict[str, Tensor]:
        """How far each bound lets S move towards gamma; below the margin only if the decision is proved."""

        def towards_gamma(lower: Tensor, upper: Tensor) -> Tensor:
            proved = upper < self.gamma if kind == "id" else lower > self.gamma
            deviation = upper - score if kind == "id" else score - lower
            return torch.where(proved, deviation, torch.maximum(deviation, (self.gamma - score).abs()))

        return {
            "radius_certified": towards_gamma(bound.lower, bound.upper),
            "radius_certified_per_logit": towards_gamma(bound.lower_per_logit, bound.upper_per_logit),
        }

    def _grid(
        self, images: Tensor, score: Tensor, kind: str, adversarial: attack.MinimumNorm
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Bounds and attacks on the eps grid, and the deviations the radius search starts from; all (B, len(eps)).

        A bound on a ball holds on every ball inside it, so formal envelopes take the best over larger eps. A witness
        lies in every larger ball, so attacks carry theirs along.
        """
        columns: dict[str, list[Tensor]] = {name: [] for name in GRID_COLUMNS}
        deviations: dict[str, list[Tensor]] = {}
        high, low = adversarial.points, adversarial.points
        for value in self.settings.eps:
            eps = torch.full_like(score, value)
            bound = self._bounds(images, eps)
            ball = Ball(images, eps, self.settings.norm)
            seen = attack.extremes(self.network, ball, self._generator, high, low)
            high, low = seen.argmax, seen.argmin
            _check_inside(images, eps, bound, seen)
            for name, column in zip(GRID_COLUMNS, (bound.lower, bound.upper, seen.minimum, seen.maximum), strict=True):
                columns[name].append(column)
            for name, column in self._deviations(bound, score, kind).items():
                deviations.setdefault(name, []).append(column)
        stacked = {name: torch.stack(values, 1) for name, values in columns.items()}
        stacked["s_ub"], stacked["s_lb"] = _decreasing(stacked["s_ub"]), -_decreasing(-stacked["s_lb"])
        return stacked, {name: _decreasing(torch.stack(values, 1)) for name, values in deviations.items()}

    def _radius(
        self, images: Tensor, score: Tensor, kind: str, margin: Tensor, name: str, known: Tensor, hint: Tensor
    ) -> Tensor:
        """Search one radius column, starting from the deviations known on the grid."""
        grid = torch.tensor(self.settings.eps).to(score).expand_as(known)
        proved = known < margin[:, None]
        low = torch.where(proved, grid, 0).amax(1)
        high = torch.where(~proved & (grid > low[:, None]), grid, torch.inf).amin(1)

        def at(eps: Tensor, default: float) -> Tensor:
            hit = grid == eps[:, None]
            return torch.where(hit.any(1), torch.where(hit, known, 0).sum(1), default)

        def evaluate(index: Tensor, eps: Tensor) -> Tensor:
            return self._deviations(self._bounds(images[index], eps), score[index], kind)[name]

        return search_radius(
            evaluate,
            margin,
            low=low,
            low_deviation=torch.where(low > 0, at(low, 0.0), 0.0),
            high=high,
            high_deviation=at(high, torch.nan),
            first=(_FIRST_SHARE * hint).clamp(max=self._limit),
            limit=self._limit,
            precision=self.settings.precision,
        )


def _check_chain(images: Tensor, adversarial: attack.MinimumNorm, name: str, certified: Tensor) -> None:
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


def _check_inside(images: Tensor, eps: Tensor, bound: ScoreBounds, seen: attack.Extremes) -> None:
    below, above = seen.minimum < bound.lower, seen.maximum > bound.upper
    wrong = below | above
    if bool(wrong.any()):
        points = torch.where(above.reshape(-1, *[1] * (images.dim() - 1)), seen.argmax, seen.argmin)
        raise SoundnessError(
            f"{int(wrong.sum())} points inside the ball of eps {float(eps[0]):g} score outside their proved bounds: no "
            "certificate of this run can be trusted",
            {
                "image": images[wrong].cpu().numpy(),
                "counterexample": points[wrong].cpu().numpy(),
                "eps": eps[wrong].cpu().numpy(),
                **{f"s_{name}": getattr(bound, name)[wrong].cpu().numpy() for name in ("lower", "upper")},
                **{f"s_attack_{name}": getattr(seen, name)[wrong].cpu().numpy() for name in ("minimum", "maximum")},
            },
        )


def certify(certifier: Certifier, sets: Sequence[ImageSet], limit: int = 0) -> Iterator[list[dict[str, Any]]]:
    """Certify sets of images batch by batch.

    Args:
        certifier: Detector and settings.
        sets: Image sets; their `kind` says which decision is right.
        limit: Most images of each set, 0 for all; `runs.subset` says which.

    Yields:
        One record a sample, with the columns of `grood_cert.rows`, a batch at a time.

    Raises:
        SoundnessError: If an attack contradicts a proof.
    """
    settings = certifier.settings
    for images, records in runs.batches(sets, limit, settings.batch_size, settings.seed):
        columns = {name: value.tolist() for name, value in certifier.certify(images.images, images.kind).items()}
        columns["label"] = images.labels.tolist()
        for position, record in enumerate(records):
            for name, values in columns.items():
                if name in GRID_COLUMNS:
                    record |= {grid_column(name, eps): v for eps, v in zip(settings.eps, values[position], strict=True)}
                else:
                    record[name] = values[position]
            proved = record["radius_certified"] > 0
            record["status"] = "misdecided" if not record.pop("right") else "certified" if proved else "undecided"
        yield records


def run(
    detector: Detector,
    model: Path,
    sets: Sequence[ImageSet],
    settings: Settings,
    out: Path,
    *,
    limit: int = 0,
    force: bool = False,
    begin: Callable[[int], None] = lambda samples: None,
    advance: Callable[[int], None] = lambda samples: None,
) -> Rows:
    """Certify a detector and write `rows.csv` and its manifest `rows.json` to a folder.

    Args:
        detector: The detector.
        model: The checkpoint it came from, named and hashed in the manifest.
        sets: Image sets.
        settings: What to certify.
        out: Folder; made if absent.
        limit: Most images of each set, 0 for all.
        force: Overwrite rows that are already there.
        begin: Called once with the number of samples.
        advance: Called after every batch with its size.

    Raises:
        InputError: If settings, sets or folder are unusable.
        RunError: If the bound engine is missing or cannot convert the network.
        SoundnessError: If an attack contradicts a proof; the evidence is saved as `counterexample.npz`.
    """
    target = out / "rows.csv"
    certifier = Certifier(detector, settings)
    runs.check_target(target, limit, force)

    def manifest() -> dict[str, Any]:
        return runs.manifest(detector, model, sets, limit, settings) | {
            "method": certifier.method,
            "method_asked": settings.method,
            "largest_eps": largest_eps(detector.architecture.shape, settings.norm),
            "failures": certifier.failures,
        }

    batches, samples = certify(certifier, sets, limit), runs.size(sets, limit)
    return from_records(*runs.execute(target, rows.header(settings.eps), batches, manifest, samples, begin, advance))
