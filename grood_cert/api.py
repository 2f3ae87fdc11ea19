r"""The verbs of the package on tensors, each a few lines over the modules that do the work.

Images are tensors (N, C, H, W) of pixels in [0, 1]; eps is a number, or a list of numbers, in pixel units. Results hold
one entry a sample, and a second axis, one entry an eps, where a list was given. What was not proved is NaN, or a radius
of 0: compare with `<`, and NaN counts as not certified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from grood_cert import attacks, metrics
from grood_cert.ball import Ball, Norm, check_eps
from grood_cert.bounds import score as bounds
from grood_cert.bounds.engine import Method
from grood_cert.bounds.engines import Engine, build
from grood_cert.bounds.score import ScoreBounds
from grood_cert.certification import smoothing
from grood_cert.certification.cascade import Cascade, Certificates
from grood_cert.certification.outcomes import Outcome
from grood_cert.certification.settings import Settings
from grood_cert.data.tensors import image_set
from grood_cert.detector import Detector
from grood_cert.errors import InputError, SoundnessError
from grood_cert.lipschitz.bound import local_lipschitz
from grood_cert.networks.capture import capture
from grood_cert.networks.checks import check_eval, check_pixels, count_classes
from grood_cert.networks.graph import Deployment
from grood_cert.results.table import Table
from grood_cert.runs import certify as certification
from grood_cert.runs.batches import generator
from grood_cert.scores import ENERGY, Score
from grood_cert.system.reporting import SILENT, Reporter

Eps = float | Sequence[float]


def _grid(eps: Eps) -> tuple[float, ...]:
    try:
        if isinstance(eps, str | bool):
            raise TypeError
        return tuple(float(value) for value in np.atleast_1d(np.asarray(eps)))
    except (TypeError, ValueError):
        raise InputError(f"eps {eps!r}: expected a number, or a list of numbers") from None


def _check_detector(detector: Detector) -> None:
    if not isinstance(detector, Detector):
        what = type(detector).__name__
        raise InputError(f"expected a Detector, got {what}; make one with Detector.calibrate(model, id_images)")


@dataclass(frozen=True, eq=False)
class Certified:
    """What is proved about the decisions of a detector on some images.

    Attributes:
        score: S(x), shape (N,).
        accepted: S(x) <= gamma, shape (N,).
        radius: Largest eps found whose whole ball is proved to keep the decision; 0 if none, shape (N,).
        attack_radius: Distance of the nearest point found with the other decision; infinite if none, shape (N,).
        attack_points: Those points; x where there is none.
        lower: Proved lower bound of S over the ball of each eps; NaN if none.
        upper: Proved upper bound.
        outcome: What became of the ball of each eps.
        certificates: All that was found, see `grood_cert.certification.cascade`.
        failures: Messages of exceptions in bound engines, with the number of balls left unproved by each.
    """

    score: Tensor
    accepted: Tensor
    radius: Tensor
    attack_radius: Tensor
    attack_points: Tensor
    lower: Tensor
    upper: Tensor
    outcome: list[Outcome] | list[list[Outcome]]
    certificates: Certificates
    failures: Mapping[str, int]


def certify(
    detector: Detector,
    x: Tensor,
    eps: Eps,
    *,
    norm: Norm = "linf",
    effort: str = "default",
    stages: str | Sequence[str] = (),
    engine: Engine = "auto",
    truth: Literal["id", "ood"] | None = None,
    seed: int = 0,
    time_limit: float = 0.0,
    deployment: Deployment = "float64",
) -> Certified:
    """Prove that the decisions of a detector hold on whole balls around images; an attack brackets them.

    Args:
        detector: The detector.
        x: Images.
        eps: Radius of the balls, or an ascending list of radii; the certified radius is searched beyond them.
        norm: "linf", "l2" or "l1".
        effort: "fast", "default" or "max".
        stages: One stage of proof or more in place of the effort's.
        engine: "auto", "native" or "auto_lirpa": who gives linear bounds.
        truth: What all images are; the others are misdecided, with radius 0. None: the decision at x is the right one.
        seed: Seed of the attacks.
        time_limit: Seconds a sample may take on average; 0: no limit.
        deployment: "float64" or "float32": where the network will be evaluated; bounds cover what it rounds.

    Raises:
        InputError: If images or settings make no sense, or no engine can bound the network.
        SoundnessError: If an attack contradicts a proof.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 1)).double().eval()
        >>> with torch.no_grad():
        ...     _ = network[1].weight.fill_(1.0), network[1].bias.fill_(0.0)
        >>> x = torch.full((1, 1, 2, 2), 0.5)  # S(x) = -2; with gamma = -1 the true radius is 1 / 4
        >>> found = certify(Detector(network, -1.0, (1, 2, 2)), x, [0.1, 0.3])
        >>> 0.24 < float(found.radius) < 0.25 <= float(found.attack_radius) < 0.26
        True
        >>> [outcome.word for outcome in found.outcome[0]]
        ['ibp', 'attack']
    """
    _check_detector(detector)
    if truth not in (None, "id", "ood"):
        raise InputError(f"unknown truth {truth!r}; use 'id', 'ood' or None")
    accepted = detector.predict(x).accepted
    settings = Settings(
        _grid(eps),
        norm,
        effort=effort,
        stages=(stages,) if isinstance(stages, str) else tuple(stages),
        engine=engine,
        seed=seed,
        time_limit=time_limit,
        deployment=deployment,
    )
    cascade = Cascade(detector, settings)
    inside = accepted if truth is None else torch.full_like(accepted, truth == "id")
    order: list[Tensor] = []
    parts: list[Certificates] = []
    for kind, chosen in (("id", inside), ("ood", ~inside)):
        for index in chosen.nonzero().squeeze(1).split(settings.batch_size):
            if len(index):
                parts.append(cascade.certify(x[index.to(x.device)], kind, generator(seed, len(parts))))
                order.append(index)
    back = torch.cat(order).argsort()
    found = Certificates(
        **{item.name: torch.cat([getattr(part, item.name) for part in parts])[back] for item in fields(Certificates)}
    )
    single = np.ndim(eps) == 0
    return Certified(
        score=found.score,
        accepted=found.accepted.bool(),
        radius=found.radius_certified,
        attack_radius=found.radius_attack,
        attack_points=found.points,
        lower=found.s_lb[:, 0] if single else found.s_lb,
        upper=found.s_ub[:, 0] if single else found.s_ub,
        outcome=[row[0] for row in found.outcomes] if single else found.outcomes,
        certificates=found,
        failures=cascade.failures,
    )


def _network(model: nn.Module | Detector, x: Tensor, eps: float, norm: Norm) -> nn.Module:
    """The network of a call about one eps, after images and eps have been checked."""
    network = model.network if isinstance(model, Detector) else model
    if len(_grid(eps)) != 1:
        raise InputError(f"eps {eps!r}: expected one number")
    check_pixels(x, model.shape if isinstance(model, Detector) else None)
    check_eps([eps], norm, x.shape[1:])
    check_eval(network)
    count_classes(network, tuple(x.shape[1:]))
    return network


def _score(model: nn.Module | Detector, score: Score | None) -> Score:
    """The score that a call is about."""
    if score is None:
        return model.score if isinstance(model, Detector) else ENERGY
    if not isinstance(score, Score):
        raise InputError(f"expected a score such as Energy() or MSP(), got {score!r}")
    return score


def score_bounds(
    model: nn.Module | Detector,
    x: Tensor,
    eps: float,
    norm: Norm = "linf",
    *,
    score: Score | None = None,
    method: Method = "crown",
    engine: Engine = "auto",
) -> ScoreBounds:
    """Bounds `.lower` <= S(x') <= `.upper` over the ball around each image; NaN where nothing was proved.

    Args:
        model: A detector, or f in eval mode on pixels in [0, 1]; copied to float64.
        x: Images.
        eps: Radius of the balls.
        norm: "linf", "l2" or "l1".
        score: S; None: the detector's, or the energy.
        method: "ibp", "crown-ibp" or "crown".
        engine: "auto", "native" or "auto_lirpa".

    Raises:
        InputError: If images or settings make no sense, or no engine can bound the network.
        SoundnessError: If S(x) itself lies outside the bounds.

    Example:
        >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval(), torch.rand(2, 1, 2, 2)
        >>> found = score_bounds(model, x, eps=0.02)
        >>> bool((found.lower < found.upper).all())
        True
    """
    bounded = build(engine, _network(model, x, eps, norm), tuple(x.shape[1:]), method).bounded
    weight = next(bounded.network.parameters(), torch.empty(0))
    ball = Ball(x.detach().to(weight.device, torch.float64), eps, norm)
    rule = _score(model, score)
    found = bounds.score_bounds(bounded, ball, method, rule)
    with torch.no_grad():
        at_center = rule.value(bounded.network(ball.center))
    outside = (at_center < found.lower) | (at_center > found.upper)
    if bool(outside.any()):
        raise SoundnessError(
            f"{int(outside.sum())} scores lie outside their proved bounds: no bound of this network can be trusted",
            {"image": ball.center[outside].cpu().numpy(), "score": at_center[outside].cpu().numpy()},
        )
    return found


def lipschitz_bound(
    model: nn.Module | Detector, x: Tensor, eps: float, norm: Norm = "linf", *, score: Score | None = None
) -> Tensor:
    """The smallest proved L with |S(x') - S(x)| <= L ||x' - x|| in the ball around each image; infinite if none.

    Args:
        model: A detector, or f in eval mode on pixels in [0, 1]; copied to float64.
        x: Images.
        eps: Radius of the balls.
        norm: "linf", "l2" or "l1".
        score: S; None: the detector's, or the energy.

    Raises:
        InputError: If images or settings make no sense, or a layer cannot be bounded.

    Example:
        >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval(), torch.rand(2, 1, 2, 2)
        >>> lipschitz_bound(model, x, eps=0.02).shape
        torch.Size([2])
    """
    graph = capture(_network(model, x, eps, norm), tuple(x.shape[1:]))
    ball = Ball(x.to(graph.device, torch.float64), eps, norm)
    return local_lipschitz(graph, ball, score=_score(model, score)).auto


def attack(
    detector: Detector, x: Tensor, norm: Norm = "linf", *, effort: str = "default", seed: int = 0
) -> attacks.MinimumNorm:
    """The nearest points found with the other decision: `.radius`, infinite where there is none, and `.points`.

    Args:
        detector: The detector.
        x: Images.
        norm: "linf", "l2" or "l1".
        effort: "fast", "default" or "max".
        seed: Seed of the starting points.

    Raises:
        InputError: If images or settings make no sense.

    Example:
        >>> detector = Detector(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double().eval(), -9.0, (1, 2, 2))
        >>> attack(detector, torch.rand(2, 1, 2, 2)).radius  # all is rejected
        tensor([inf, inf], dtype=torch.float64)
    """
    _check_detector(detector)
    check_pixels(x, detector.shape)
    check_eps([0.0], norm, detector.shape)
    images, preset = x.to(next(detector.network.parameters())), attacks.AttackEffort.preset(effort)
    return attacks.minimum_norm(
        detector.network, images, detector.gamma, norm, generator(seed, 0), preset, detector.score
    )


@dataclass(frozen=True, eq=False)
class SmoothedCertified:
    """What holds for the smoothed detector in l_2, each sample with probability 1 - alpha over the noise.

    Attributes:
        alpha: Probability that what is said of a sample claims too much.
        decision: "accepted", "rejected" or "abstained".
        radius: l_2 radius within which that decision stays; 0 where it abstained, shape (N,).
        lower: Lower bound of the smoothed score over the ball of each eps; NaN if none.
        upper: Upper bound.
    """

    alpha: float
    decision: list[str]
    radius: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Smoothed:
    """A smoothed detector: it accepts x iff the median of S(x + noise) is at most gamma.

    Attributes:
        detector: Whose score is smoothed.
        settings: Noise, draws and level.
        gamma: Threshold, from smoothed scores of ID images.
    """

    detector: Detector
    settings: smoothing.SmoothingSettings
    gamma: float

    def certify(self, x: Tensor, eps: Eps) -> SmoothedCertified:
        """Certify images in l_2, each with probability 1 - alpha.

        Args:
            x: Images.
            eps: Radius of the balls on which the score is bounded, or several.

        Raises:
            InputError: If images or eps make no sense.
        """
        check_pixels(x, self.detector.shape)
        settings = replace(self.settings, eps=_grid(eps))
        smoother = smoothing.Smoother(self.detector, settings)
        draws = np.stack([smoother.draws(image, "test", "x", index) for index, image in enumerate(x)])
        sides = [
            smoothing.smoothed_radius(hits, settings.n, settings.sigma, settings.alpha)
            for hits in smoothing.draws_beyond(draws, self.gamma)
        ]
        decision = np.select([side > 0 for side in sides], ["accepted", "rejected"], "abstained")
        bounds = smoothing.smoothed_bounds(draws, settings.eps, settings.sigma, settings.alpha)
        lower, upper = (np.where(np.isfinite(bound), bound, np.nan) for bound in bounds)
        single = np.ndim(eps) == 0
        return SmoothedCertified(
            alpha=settings.alpha,
            decision=decision.tolist(),
            radius=np.maximum(*sides),
            lower=lower[:, 0] if single else lower,
            upper=upper[:, 0] if single else upper,
        )


def smooth(
    detector: Detector,
    sigma: float,
    *,
    calibration: Any,
    n: int = 1000,
    alpha: float = 1e-3,
    tpr: int = 95,
    dtype: smoothing.Dtype = "float32",
    seed: int = 0,
) -> Smoothed:
    """Smooth a detector with Gaussian noise, and calibrate it anew; for networks of any size.

    Args:
        detector: The detector.
        sigma: Standard deviation of the noise, in pixel units.
        calibration: ID images that the model was not trained on, as `certify_sets` takes them.
        n: Draws of noise for each image.
        alpha: Probability that what is said of a sample claims too much.
        tpr: Percent of ID to accept.
        dtype: Arithmetic of the noisy passes: "float32", "bfloat16" or "float64".
        seed: Seed of the noise.

    Raises:
        InputError: If images or settings make no sense, or there are too few images.

    Example:
        >>> detector = Detector(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double().eval(), 0.0, (1, 2, 2))
        >>> smoothed = smooth(detector, sigma=0.25, calibration=torch.rand(19, 1, 2, 2), n=100)
        >>> smoothed.certify(torch.rand(2, 1, 2, 2), eps=0.1).alpha
        0.001
    """
    _check_detector(detector)
    settings = smoothing.SmoothingSettings(sigma, (0.0,), n=n, alpha=alpha, dtype=dtype, seed=seed)
    images = image_set(calibration, "calibration", "id")
    check_pixels(images.images, detector.shape, "calibration")
    smoother = smoothing.Smoother(detector, settings)
    metrics.calibrated_threshold(range(len(images)), tpr)  # refuses too few images
    draws = (smoother.draws(image, "calibration", images.name, index) for index, image in enumerate(images.images))
    medians = [float(smoothing.median_estimate(values)) for values in draws]
    return Smoothed(detector, settings, metrics.calibrated_threshold(medians, tpr))


def certify_sets(
    detector: Detector,
    sets: Mapping[str, Any],
    eps: Eps,
    *,
    out: Path | str,
    norm: Norm = "linf",
    effort: str = "default",
    stages: str | Sequence[str] = (),
    engine: Engine = "auto",
    limit: int = 0,
    batch_size: int = 64,
    seed: int = 0,
    deployment: Deployment = "float64",
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Table:
    """Certify a detector on image sets, as the command `certify` does; an interrupted call goes on where it was.

    Args:
        detector: The detector.
        sets: By name: tensors, pairs (images, labels), datasets or loaders. The set "id" holds images to be accepted,
            all others images to be rejected.
        eps: Radii in pixel units, ascending.
        out: Folder of `rows.csv` and its manifest `rows.json`.
        norm: "linf", "l2" or "l1".
        effort: "fast", "default" or "max".
        stages: One stage of proof or more in place of the effort's.
        engine: "auto", "native" or "auto_lirpa".
        limit: Most images of each set, 0 for all.
        batch_size: Images bounded together.
        seed: Seed of the attacks and of the choice of images.
        deployment: "float64" or "float32": where the network will be evaluated; bounds cover what it rounds.
        force: Start afresh, whatever is in the folder.
        reporter: Hears how far it has got.

    Raises:
        InputError: If sets, settings or folder make no sense, or the folder holds another run.
        SoundnessError: If an attack contradicts a proof.

    Example:
        >>> import tempfile
        >>> detector = Detector(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double().eval(), -1.0, (1, 2, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sets = {"id": torch.rand(2, 1, 2, 2), "svhn": torch.rand(3, 1, 2, 2)}
        ...     table = certify_sets(detector, sets, eps=[0.01, 0.1], out=folder, effort="fast")
        >>> table["set"].tolist(), table.grid["s_ub"].shape
        (['id', 'id', 'svhn', 'svhn', 'svhn'], (5, 2))
    """
    _check_detector(detector)
    if not isinstance(sets, Mapping) or not sets:
        raise InputError("no image sets given; name them, such as {'id': images, 'svhn': others}")
    for name in sets:
        if name != "id" and name.casefold() == "id":
            raise InputError(f"image set {name!r}: the set to be accepted is called 'id'")
    chosen = [image_set(data, name, "id" if name == "id" else "ood") for name, data in sets.items()]
    first: dict[str, str] = {}
    for images in chosen:
        check_pixels(images.images[:1], detector.shape, images.name)
        other = first.setdefault(images.content_hash(), images.name)
        if other != images.name:
            raise InputError(f"image sets {other!r} and {images.name!r} hold the same images; give each set once")
    settings = Settings(
        _grid(eps),
        norm,
        effort=effort,
        stages=(stages,) if isinstance(stages, str) else tuple(stages),
        engine=engine,
        batch_size=batch_size,
        seed=seed,
        deployment=deployment,
    )
    return certification.run(detector, None, chosen, settings, Path(out), limit=limit, force=force, reporter=reporter)
