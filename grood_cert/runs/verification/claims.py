r"""What the rows of each kind claim, tried again on some samples with random numbers that the run did not have.

*Certifications.* Fresh attacks search every ball of the grid, and the ball of `radius_certified`: what they find must lie within
s_lb and s_ub, and may not flip a certified decision. The other bound engine bounds S on the same balls by the run's linear
method; both enclose S there, so their intervals meet. A bound is *repeated* where the other engine's is as tight, a radius where
either engine proves the decision on its whole ball again, the run's own also by alpha-CROWN and by branch and bound.

*Smoothing.* n fresh scores are drawn under noise. Let c of n recorded draws lie on a side of gamma, and c' of n fresh ones. If
both are draws of the same score, c' given c + c' is hypergeometric; and if x is the k-th smallest of the recorded ones, the
number of fresh draws below it is beta-binomial with n, k and n - k + 1, whatever the score's distribution (ties only
lower both tails). Either is a contradiction in a tail of probability a / (2 T), T the number of such tests, so

    P(a true record is contradicted by chance) <= a = 1e-4        in one call, over the fresh draws and those of the run.

Radius, decision and status follow from the counts, and are computed again.

*Lipschitz analyses.* Slopes found by a fresh search (sampled and ascended gradients, secants) exceed no bound; the bounds are
computed again from the other engine's bounds of the hidden layers, or from those of the run's own.

References:
    Fisher, "The Design of Experiments", 1935 (the hypergeometric test of two shares); Wilks, Annals of Mathematical
    Statistics 1942 (order statistics and future draws).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grood_cert import attacks
from grood_cert.ball import Ball, dual_norm
from grood_cert.bounds.alpha_crown import optimised_bounds
from grood_cert.bounds.branching import branch_and_bound
from grood_cert.bounds.engine import Method, Side
from grood_cert.bounds.engines import Choice, build
from grood_cert.bounds.hidden import engine_preactivations
from grood_cert.bounds.score import score_bounds
from grood_cert.certification.adversary import Adversary
from grood_cert.certification.envelope import Envelope
from grood_cert.certification.settings import EFFORTS, Settings
from grood_cert.certification.smoothing import (
    Smoother,
    SmoothingSettings,
    draws_beyond,
    order_statistics,
    smoothed_radius,
)
from grood_cert.detector import Detector
from grood_cert.errors import InputError, RunError
from grood_cert.lipschitz.analyser import Analyser, AnalysisSettings
from grood_cert.lipschitz.bound import local_lipschitz
from grood_cert.lipschitz.estimates import (
    ascended_gradient_norm_estimate,
    gradient_norm_estimate,
    sampled_gradient_norm_estimate,
    secant_estimate,
)
from grood_cert.networks.capture import capture
from grood_cert.networks.graph import Deployment
from grood_cert.results.columns import LIPSCHITZ_METHODS, SCHEMAS
from grood_cert.results.invariants import line
from grood_cert.results.table import Table
from grood_cert.runs.verification.findings import Findings, Part
from grood_cert.scores import score_gradient

FALSE_ALARM = 1e-4  # of all statistical tests of a call together
_AGREEMENT = 1e-8  # relative: what the engines' margins, and other machines, do to a bound
_SLOPES = 1e-6  # the same for gradient norms
_RADII = ("radius_certified", "radius_certified_per_logit", "radius_lipschitz_fixed_point", "radius_lipschitz_path")
_BOUNDS = ("bound", "bound_fixed_head", *(f"bound_{name.replace('-', '_')}" for name in LIPSCHITZ_METHODS))
_SettingsOf = TypeVar("_SettingsOf", Settings, SmoothingSettings, AnalysisSettings)


class Claims(ABC, Generic[_SettingsOf]):
    """The claims of a table.

    Args:
        table: The rows.
        detector: The detector, with the gamma of the rows.
        found: Where checks are counted.

    Attributes:
        batch_size: Samples in a batch of the run.
        together: Samples to try together.
        method: How the bound engines bound the network.
        deployment: The arithmetic whose rounding they cover.

    Raises:
        InputError: If the manifest's settings make no sense.
    """

    kind: type[_SettingsOf]
    together = 64
    method: Method
    deployment: Deployment = "float64"

    def __init__(self, table: Table, detector: Detector, found: Findings) -> None:
        self.table, self.detector, self.found = table, detector, found
        self.settings: _SettingsOf = _settings(self.kind, table.manifest, detector.shape)

    @property
    def batch_size(self) -> int:
        """Samples in a batch of the run."""
        return self.settings.batch_size

    @abstractmethod
    def check(self, part: Part) -> None:
        """Try some samples."""

    @functools.cached_property
    def engines(self) -> list[Choice]:
        """The other bound engine, where it takes the network, and that of the run.

        Raises:
            InputError: If the manifest names none.
        """
        own = self.table.manifest.get("bounded_by")
        if own not in ("native", "auto_lirpa"):
            raise InputError(f"the manifest's bounded_by is {own!r}; expected native or auto_lirpa")
        other = "native" if own == "auto_lirpa" else "auto_lirpa"
        network, shape = self.detector.network, self.detector.shape
        graph = capture(network, shape).deployed(self.deployment)
        engines: list[Choice] = []
        try:
            engines.append(build(other, network, shape, self.method, graph))
        except (InputError, RunError) as error:
            self.found.note(f"bounds by {other}", f"left out: {error}")
        return [*engines, build(own, network, shape, self.method, graph)]

    def images(self, part: Part) -> Tensor:
        """The images as the network takes them."""
        return part.images.to(next(self.detector.network.parameters()))

    def again(self, part: Part, column: str, values: NDArray[Any], slack: float) -> None:
        """Count a column of numbers that is computed again."""
        recorded = self.table[column][part.rows]
        near = (np.abs(values - recorded) <= slack * (1 + np.abs(values))) | (values == recorded)
        self.found.compare(self.table, column, part.rows, ~(near | (np.isnan(values) & np.isnan(recorded))), values)


def _settings(kind: type[_SettingsOf], manifest: Mapping[str, Any], shape: tuple[int, int, int]) -> _SettingsOf:
    """The settings that a manifest holds."""
    try:
        names = [field.name for field in dataclasses.fields(kind) if field.name in manifest]
        given: dict[str, Any] = {
            name: tuple(manifest[name]) if isinstance(manifest[name], list) else manifest[name] for name in names
        }
        settings: _SettingsOf = kind(**given)
        settings.check(shape)
    except (TypeError, KeyError, ValueError, AttributeError, InputError) as error:
        raise InputError(f"the manifest's settings make no sense ({error})") from None
    return settings


class CertificationClaims(Claims[Settings]):
    """The claims of a certification."""

    kind = Settings

    def __init__(self, table: Table, detector: Detector, found: Findings) -> None:
        super().__init__(table, detector, found)
        self.method, self.deployment = self.settings.linear[-1], self.settings.deployment

    def check(self, part: Part) -> None:
        """Attack, and bound again."""
        images, table = self.images(part), self.table
        with torch.no_grad():
            score = self.detector.score.value(self.detector.network(images))
        slope = dual_norm(score_gradient(self.detector.network, images, self.detector.score)[1], self.settings.norm)
        self.again(part, "gradient_norm_estimate", slope.cpu().numpy(), _SLOPES)
        envelope = Envelope(self.settings.eps, score, self.detector.gamma, part.kind)
        for bound, name in ((envelope.lower, "s_lb"), (envelope.upper, "s_ub")):
            recorded = torch.from_numpy(table.grid[name][part.rows]).to(bound)
            bound.copy_(torch.where(torch.isnan(recorded), bound, recorded))
        radius = torch.from_numpy(table["radius_certified"][part.rows]).to(score)
        self._attack(part, images, envelope, radius)
        for column, eps in enumerate(self.settings.eps):
            self._bound(
                part, Ball(images, eps, self.settings.norm), envelope.lower[:, column], envelope.upper[:, column]
            )
        proved = radius > 0
        again = self._proved_again(part, Ball(images[proved], radius[proved], self.settings.norm))
        self.found.add("radius_certified, proved again", ~again & False, "", {}, again)

    def _attack(self, part: Part, images: Tensor, envelope: Envelope, radius: Tensor) -> None:
        inside, found, generator = part.kind == "id", self.found, part.generator
        right = (envelope.score <= self.detector.gamma) == inside
        adversary = Adversary(self.detector, self.settings, images, part.kind, right, generator)
        adversary.search_grid(generator)
        balls = len(images) * len(self.settings.eps)
        found.attempt("s_lb and s_ub, attacked afresh", balls, lambda: adversary.check_envelope(envelope))
        for name in _RADII:
            values = self.table[name][part.rows]
            if not np.isnan(values).all():
                check = functools.partial(adversary.check_radius, name, torch.from_numpy(values).to(radius))
                found.attempt(f"{name}, attacked afresh", int((values > 0).sum()), check)
        ball = Ball(images, radius, self.settings.norm)
        effort = EFFORTS[self.settings.effort].attack
        (seen,) = attacks.extremes(
            self.detector.network, [ball], generator, effort, self.detector.score, adversary.points
        )
        flipped = seen.maximum > self.detector.gamma if inside else seen.minimum <= self.detector.gamma
        points, certified = seen.argmax if inside else seen.argmin, radius > 0
        found.add(
            "balls of radius_certified, attacked afresh",
            (flipped & certified)[certified].cpu(),
            "points inside have the other decision",
            {"image": images[flipped & certified].cpu(), "counterexample": points[flipped & certified].cpu()},
        )

    def _bound(self, part: Part, ball: Ball, lower: Tensor, upper: Tensor) -> None:
        if len(self.engines) < 2:
            return
        other = self.engines[0]
        least, most = _score_bounds(other, ball, self.settings, self.detector)
        known = torch.isfinite(least) & torch.isfinite(most)
        slack = _AGREEMENT * (1 + torch.nan_to_num(most).abs())
        apart = known & ~(torch.maximum(lower, least) <= torch.minimum(upper, most) + slack)
        self.found.add(
            f"s_lb and s_ub, bounded again by {other.engine}",
            apart[known].cpu(),
            f"at eps {float(ball.eps[0]):g} the intervals do not meet: one of them is false",
            {"image": ball.center[apart].cpu(), "eps": ball.eps[apart].cpu()}
            | {"s_lb": lower[apart].cpu(), "s_ub": upper[apart].cpu(), "other_lb": least[apart].cpu()}
            | {"other_ub": most[apart].cpu()},
            ((least >= lower - slack) & (most <= upper + slack))[known].cpu(),
        )

    def _proved_again(self, part: Part, ball: Ball) -> NDArray[np.bool_]:
        """Whether the decision is proved on each ball again, by whichever means."""
        gamma, score, effort = self.detector.gamma, self.detector.score, EFFORTS[self.settings.effort]
        side: Side = "upper" if part.kind == "id" else "lower"
        graph, own = self.engines[-1].bounded.graph, self.engines[-1].bounded

        def linear(choice: Choice, ball: Ball) -> Tensor:
            return _score_bounds(choice, ball, self.settings, self.detector)[side == "upper"]

        def optimised(ball: Ball) -> Tensor:
            hidden = engine_preactivations(own, graph, ball)
            return optimised_bounds(graph, ball, side, hidden, effort.steps, score=score)

        def branched(ball: Ball) -> Tensor:
            return branch_and_bound(graph, ball, gamma, side, effort.nodes, score=score).bound

        ways: list[Callable[[Ball], Tensor]] = [
            *(functools.partial(linear, engine) for engine in self.engines),
            optimised,
            branched,
        ]
        done = torch.zeros_like(ball.eps, dtype=torch.bool)
        for way in ways:
            index = (~done).nonzero().squeeze(1)
            if not len(index):
                break
            with contextlib.suppress(Exception):  # whatever it is, nothing was proved
                bound = way(Ball(ball.center[index], ball.eps[index], ball.norm))
                done[index] = bound < gamma if side == "upper" else bound > gamma
        return np.asarray(done.cpu().numpy())


def _score_bounds(choice: Choice, ball: Ball, settings: Settings, detector: Detector) -> tuple[Tensor, Tensor]:
    """S_lb and S_ub, NaN where nothing is proved."""
    try:
        bounds = score_bounds(choice.bounded, ball, settings.linear[-1], detector.score)
    except Exception:  # noqa: BLE001  (whatever it is, nothing was proved)
        nothing = torch.full_like(ball.eps, torch.nan)
        return nothing, nothing
    return bounds.lower, bounds.upper


class SmoothingClaims(Claims[SmoothingSettings]):
    """The claims of smoothed rows, or of their calibration."""

    kind = SmoothingSettings
    together = 8

    def __init__(self, table: Table, detector: Detector, found: Findings) -> None:
        super().__init__(table, detector, found)
        self.smoother = Smoother(detector, self.settings)
        levels = 2 * len(self.settings.eps) if table.grid else 0
        counts = 2 if table.grid else 0
        self.level = FALSE_ALARM / (2 * len(table) * (counts + 1 + levels))
        if table.grid:
            self._check_consequences()

    def _check_consequences(self) -> None:
        """What follows from the counts of all rows."""
        table, settings = self.table, self.settings
        rows = np.arange(len(table))
        accepted, rejected = (
            smoothed_radius(table[name], settings.n, settings.sigma, settings.alpha)
            for name in ("draws_below", "draws_above")
        )
        decision = np.select([accepted > 0, rejected > 0], ["accepted", "rejected"], "abstained")
        self.found.compare(table, "decision", rows, table["decision"] != decision, decision)
        radius = np.where(table.of_kind("id"), accepted, rejected)
        wrong = ~(np.abs(table["radius_smoothed"] - radius) <= _AGREEMENT)
        self.found.compare(table, "radius_smoothed", rows, wrong, radius)

    def check(self, part: Part) -> None:
        """Draw afresh."""
        from scipy.stats import betabinom, hypergeom

        table, n = self.table, self.settings.n
        name = f"{part.name} {part.generator.initial_seed()}"  # of noise that --seed changes
        for row, image, index in zip(part.rows.tolist(), part.images, part.index.tolist(), strict=True):
            draws = self.smoother.draws(image, "verification", name, index)
            if np.isnan(draws).any() or np.isnan(table["median_estimate"][row]):
                self.found.note("median_estimate, fresh noise", "left out where a score under noise is nan")
                continue
            if table.grid:
                for name, fresh in zip(
                    ("draws_below", "draws_above"), draws_beyond(draws, self.detector.gamma), strict=True
                ):
                    both = int(table[name][row]) + int(fresh)
                    tails = hypergeom.cdf(fresh, 2 * n, both, n), hypergeom.sf(fresh - 1, 2 * n, both, n)
                    self._test(row, name, min(tails), f"{table[name][row]} of {n}, fresh ones {fresh}")
            for name, value, rank in self._ranked(row):
                fewest, most = int((draws < value).sum()), int((draws <= value).sum())
                law = betabinom(n, rank, n - rank + 1)
                tail = min(law.cdf(most), law.sf(fewest - 1))
                words = f"{value:.6g} is draw {rank} of {n} in order, but {fewest} fresh ones lie below it"
                self._test(row, name, tail, words)

    def _ranked(self, row: int) -> list[tuple[str, float, int]]:
        """Recorded order statistics of a row: column, value and rank; bounds that must be infinite are checked here."""
        table, settings, n = self.table, self.settings, self.settings.n
        found = [("median_estimate", float(table["median_estimate"][row]), (n + 1) // 2)]
        for column, eps in enumerate(settings.eps if table.grid else ()):
            ranks = order_statistics(n, 0.5, eps / settings.sigma, settings.alpha / (2 * len(settings.eps)))
            for name, rank in zip(SCHEMAS["smoothing"].grid, ranks, strict=True):
                value = float(table.grid[name][row, column])
                if rank is None or not np.isfinite(value):
                    wrong = (rank is None) == np.isfinite(value)
                    words = f"{line(row)} says {value} at eps {eps:g}, where draw {rank} of {n} is the bound"
                    self.found.add(f"{name}, infinite or not", [wrong], words, {"row": row}, [not wrong])
                else:
                    found.append((name, value, rank))
        return found

    def _test(self, row: int, name: str, tail: float, words: str) -> None:
        claim = f"{name}, fresh noise"
        message = f"{line(row)}: {words} (probability {tail:.1g}, below {self.level:.1g})"
        self.found.add(claim, [not tail >= self.level], message, {"row": row, "probability": tail})


class LipschitzClaims(Claims[AnalysisSettings]):
    """The claims of a Lipschitz analysis."""

    kind = AnalysisSettings
    together = 16

    def __init__(self, table: Table, detector: Detector, found: Findings) -> None:
        super().__init__(table, detector, found)
        self.analyser = Analyser(detector, self.settings)
        self.method = self.settings.method

    @property
    def batch_size(self) -> int:
        """Samples in a batch of the run."""
        return self.analyser.batch_size

    def check(self, part: Part) -> None:
        """Search slopes, and bound again, at every eps."""
        images, table = self.images(part), self.table
        for eps in self.settings.eps:
            same = (table["set"] == part.name) & (table["kind"] == part.kind) & (table["eps"] == eps)
            row_of = {int(table["index"][row]): row for row in np.flatnonzero(same)}
            rows = np.array([row_of[index] for index in part.index.tolist()])
            self._check_at(dataclasses.replace(part, rows=rows), Ball(images, eps, self.settings.norm))

    def _check_at(self, part: Part, ball: Ball) -> None:
        graph, score, generator, rows = self.analyser.graph, self.detector.score, part.generator, part.rows
        at_center = gradient_norm_estimate(graph, ball, score)
        self.again(part, "gradient_norm_estimate", at_center.cpu().numpy(), _SLOPES)
        ascended, argument = ascended_gradient_norm_estimate(graph, ball, generator, self.settings.ascents, score=score)
        sampled = sampled_gradient_norm_estimate(graph, ball, self.settings.samples, generator, score)
        (seen,) = attacks.extremes(self.detector.network, [ball], generator, score=score)
        secant = secant_estimate(graph, ball, torch.stack([argument, seen.argmax, seen.argmin]), score)
        slopes = torch.stack([at_center, sampled, ascended, secant]).amax(0).cpu().numpy()
        rises = self._rise(ball, seen.argmax).cpu().numpy()
        for name in _BOUNDS:
            bound, slope = self.table[name][rows], rises if name == "bound_fixed_head" else slopes
            wrong = slope > bound * (1 + _AGREEMENT) + _AGREEMENT * (bound == 0)
            first = int(np.argmax(wrong))
            self.found.add(
                "bounds, fresh search of slopes",
                wrong[~np.isnan(bound)],
                f"{line(int(rows[first]))}, {name} is {bound[first]:.6g}, a slope of {slope[first]:.6g} was found",
                {"image": ball.center.cpu()[torch.from_numpy(wrong)], "slope": slope[wrong], name: bound[wrong]},
            )
        self._bound(part, ball)

    def _rise(self, ball: Ball, points: Tensor) -> Tensor:
        """(S(x') - S(x)) / ||x' - x|| at one point of each ball, 0 where that is x."""
        network, score = self.detector.network, self.detector.score
        with torch.no_grad():
            center = score.value(network(ball.center))
            risen = score.value(network(points)) - center - _AGREEMENT * (1 + center.abs())
        distance = ball.distance(points)
        return torch.where(distance > 0, risen.clamp(min=0) / distance, 0.0)

    def _bound(self, part: Part, ball: Ball) -> None:
        recorded = {name: self.table[name][part.rows] for name in _BOUNDS}
        repeated = {name: np.zeros(len(ball.eps), dtype=bool) for name in _BOUNDS}
        for choice in self.engines:
            graph = choice.bounded.graph
            with contextlib.suppress(Exception):  # whatever it is, nothing was proved
                known = engine_preactivations(choice.bounded, graph, ball)
                score, memory = self.detector.score, self.settings.memory
                bounds = local_lipschitz(graph, ball, known, fixed_head=True, memory=memory, score=score)
                again = {f"bound_{name.replace('-', '_')}": bound for name, bound in bounds.methods.items()}
                again["bound"] = bounds.auto
                if bounds.fixed_head is not None:
                    again["bound_fixed_head"] = bounds.fixed_head
                for name, bound in again.items():
                    repeated[name] |= bound.cpu().numpy() <= recorded[name] * (1 + _AGREEMENT)
        for name, mask in repeated.items():
            claimed = ~np.isnan(recorded[name])
            self.found.add("bounds, proved again", np.zeros(int(claimed.sum())), "", {}, mask[claimed])


CLAIMS: dict[str, Any] = {
    "certification": CertificationClaims,
    "smoothing": SmoothingClaims,
    "smoothing-calibration": SmoothingClaims,
    "lipschitz": LipschitzClaims,
}
