"""What proofs say of balls that hold a planted point: nothing may be certified there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grood_cert.ball import Ball
from grood_cert.bounds.engine import METHODS, lirpa_version
from grood_cert.bounds.engines import build
from grood_cert.bounds.score import score_bounds
from grood_cert.certification.cascade import Cascade
from grood_cert.certification.outcomes import LINEAR, STAGES
from grood_cert.certification.settings import Settings
from grood_cert.errors import RunError
from grood_cert.lipschitz.bound import local_lipschitz
from grood_cert.networks.capture import capture
from grood_cert.runs.batches import generator
from tests.planted.nets import Planted

ENGINES = ("native",) if lirpa_version() is None else ("native", "auto_lirpa")


@dataclass(frozen=True)
class Finding:
    """What became of one network.

    Attributes:
        planted: The network.
        faults: False claims, in words.
        radius: Certified radius by all stages.
        attack: Distance of the nearest point that the run's attack found; infinite if none.
        word: What became of the ball that holds the point.
    """

    planted: Planted
    faults: list[str]
    radius: float
    attack: float
    word: str


def bound_faults(planted: Planted, engines: tuple[str, ...] = ENGINES) -> list[str]:
    """Bounds of S on the ball, by these engines and every method, that exclude its value at the planted point."""
    detector, eps, found = planted.detector, planted.distance, []
    ball = Ball(planted.image, eps, planted.recipe.norm)
    score, start = (float(detector.scores(points)) for points in (planted.point, planted.image))
    graph = capture(detector.network, detector.shape)
    for engine in engines:
        for method in METHODS:
            try:
                bounded = build(engine, detector.network, detector.shape, method, graph).bounded
            except RunError:  # auto_LiRPA knows neither SiLU nor GELU, and claims nothing
                assert engine == "auto_lirpa"
                continue
            bounds = score_bounds(bounded, ball, method, detector.score)
            lower, upper = float(bounds.lower), float(bounds.upper)
            if not lower <= score <= upper:
                found.append(f"{engine} {method}: [{lower}, {upper}] without {score}")
    constant = float(local_lipschitz(graph, ball, score=detector.score).auto)
    if not constant * eps >= abs(score - start):
        found.append(f"Lipschitz constant {constant} for a change of {abs(score - start)} over {eps}")
    return found


def stage_faults(planted: Planted, stages: tuple[str, ...]) -> Finding:
    """Run the cascade with these stages on the ball that ends at the planted point, and on one of half its radius."""
    eps = planted.distance
    settings = Settings((eps / 2, eps), planted.recipe.norm, stages=stages, engine="native")
    found = Cascade(planted.detector, settings).certify(planted.image, planted.recipe.kind, generator(0, 0))
    outcome, radius = found.outcomes[0][1], float(found.radius_certified)
    faults = []
    if outcome.certifies:
        faults.append(f"{outcome.word} certifies the ball of {eps}")
    if not radius < eps:
        faults.append(f"certified radius {radius}, planted point at {eps}")
    return Finding(planted, faults, radius, float(found.radius_attack), outcome.word)


def check(planted: Planted) -> Finding:
    """All bounds, each stage by itself (the refining ones after CROWN), and all of them."""
    faults = bound_faults(planted)
    for stage in STAGES:
        faults += stage_faults(planted, (stage,) if stage in LINEAR else ("crown", stage)).faults
    whole = stage_faults(planted, STAGES)
    return Finding(planted, [*faults, *whole.faults], whole.radius, whole.attack, whole.word)


def table(findings: list[Finding], missed: list[dict[str, bool]]) -> str:
    """One line a network, and counts."""
    lines = [
        "| network | planted at | certified | share | nearest attack | its ball | missed by |",
        "|---|---|---|---|---|---|---|",
    ]
    for finding, misses in zip(findings, missed, strict=True):
        distance = finding.planted.distance
        names = ", ".join(name for name, miss in misses.items() if miss) or "none"
        lines.append(
            f"| {finding.planted.recipe.name} | {distance:.3f} | {finding.radius:.3f} | {finding.radius / distance:.2f} | "
            f"{finding.attack:.3f} | {finding.word} | {names} |"
        )
    shares = torch.tensor([finding.radius / finding.planted.distance for finding in findings])
    all_miss = sum(all(misses.values()) for misses in missed)
    summary = (
        f"{len(findings)} networks; all three attacks miss {all_miss} of them. Certified over planted radius: median "
        f"{float(shares.median()):.2f}, largest {float(shares.max()):.2f}. False claims: "
        f"{sum(len(finding.faults) for finding in findings)}."
    )
    lines += ["", summary]
    return "\n".join(lines)
