r"""A Lipschitz analysis: every estimate and every bound of the local constant, for each sample and each eps.

Its columns are documented in `grood_cert.results.columns`. Constants are per pixel unit, in the dual of the ball's norm.

On every batch the chain (gradient norm, sampled, ascended, secant) <= every bound is checked; a violation raises
`SoundnessError`. CLEVER extrapolates and may exceed the truth, so it is outside the chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grood_cert import attacks
from grood_cert.ball import Ball, Norm, check_eps
from grood_cert.bounds.engine import Method
from grood_cert.bounds.engines import Engine, build
from grood_cert.bounds.hidden import DEFAULT_MEMORY, engine_preactivations
from grood_cert.detector import Detector, check_network
from grood_cert.errors import InputError, SoundnessError
from grood_cert.lipschitz.bound import local_lipschitz, running_minimum
from grood_cert.lipschitz.clever import clever_estimate
from grood_cert.lipschitz.estimates import (
    ascended_gradient_norm_estimate,
    gradient_norm_estimate,
    sampled_gradient_norm_estimate,
    secant_estimate,
)

_LOWER = ("gradient_norm_estimate", "sampled_estimate", "ascended_estimate", "secant_estimate")
_CLEVER = ("clever_estimate", "clever_p_value", "clever_fitted")
_SHARES = (0.01, 0.1, 0.3, 0.6, 1.0)  # of the way to where an attack or the ascent ended: where secants are taken
_SLACK = 1e-9
_COPIES = 8  # arrays of the size of a layer that interval propagation holds for each logit


@dataclass(frozen=True)
class AnalysisSettings:
    """What to analyse.

    Attributes:
        eps: Radii in pixel units, ascending, without repetition.
        norm: Norm of the balls.
        method: Engine method for the pre-activation bounds.
        engine: Who gives them: "native", "auto_lirpa", or "auto": the native one.
        samples: Points sampled in each ball.
        clever_batches: Batch maxima of CLEVER; 0 leaves CLEVER out.
        ascents: Starting points of the gradient ascent.
        memory: Bytes that blocks of rows, and the interval Jacobians of a batch, may take each.
        batch_size: Most samples analysed together.
        seed: Seed of all sampling.
    """

    eps: tuple[float, ...]
    norm: Norm = "linf"
    method: Method = "crown"
    engine: Engine = "auto"
    samples: int = 256
    clever_batches: int = 50
    ascents: int = 4
    memory: int = DEFAULT_MEMORY
    batch_size: int = 64
    seed: int = 0

    def check(self, shape: tuple[int, int, int] | None) -> None:
        """Refuse settings that make no sense for images of this shape; None: of any shape.

        Raises:
            InputError: Naming what is wrong.
        """
        check_eps(self.eps, self.norm, shape)
        if self.batch_size < 1:
            raise InputError(f"batch size must be 1 or more, got {self.batch_size}")
        if self.method not in ("ibp", "crown-ibp", "crown"):
            raise InputError(f"unknown method {self.method!r}; use ibp, crown-ibp or crown")
        for name, least in (("samples", 1), ("clever_batches", 0), ("ascents", 1), ("memory", 2**16)):
            if getattr(self, name) < least:
                raise InputError(f"{name.replace('_', ' ')} must be {least} or more, got {getattr(self, name)}")


class Analyser:
    """Analyses batches of images against one detector.

    Args:
        detector: Network and score; gamma plays no part.
        settings: What to analyse.

    Attributes:
        choice: The engine of the pre-activation bounds.
        score: S.

    Raises:
        InputError: If the settings make no sense for the detector, or a layer of its network is not supported.
        RunError: If the bound engine is missing or cannot convert the network.
    """

    def __init__(self, detector: Detector, settings: AnalysisSettings) -> None:
        shape = detector.shape
        settings.check(shape)
        check_network(detector.network)
        self.settings, self.score = settings, detector.score
        self.network = detector.network
        self.choice = build(settings.engine, detector.network, shape, settings.method)
        self.graph = self.choice.bounded.graph

    @property
    def batch_size(self) -> int:
        """Samples analysed together: as set, or fewer if the interval Jacobians of so many would exceed the memory."""
        neurons = max(node.size for node in self.graph.nodes)
        sample = _COPIES * 8 * self.graph.classes * neurons
        return max(1, min(self.settings.batch_size, self.settings.memory // sample))

    def analyse(self, images: Tensor, generator: torch.Generator) -> list[dict[str, Any]]:
        """All columns but those that name a sample, as one dictionary of lists for each eps.

        Args:
            images: Shape (B, C, H, W), pixels in [0, 1].
            generator: Random numbers of all sampling.

        Raises:
            SoundnessError: If an estimate from below exceeds a formal bound.
        """
        images = images.to(next(self.network.parameters()))
        with torch.no_grad():
            score = self.score.value(self.network(images))
        pages: list[dict[str, Any]] = []
        best: list[Tensor] = []
        for value in self.settings.eps:
            ball = Ball(images, torch.full_like(score, value), self.settings.norm)
            page: dict[str, Any] = {"score": score, "eps": torch.full_like(score, value)}
            page |= self._estimates(ball, generator)
            known = engine_preactivations(self.choice.bounded, self.graph, ball)
            bounds = local_lipschitz(
                self.graph, ball, known, fixed_head=True, memory=self.settings.memory, score=self.score
            )
            page |= {f"bound_{name.replace('-', '_')}": bound for name, bound in bounds.methods.items()}
            page |= {"bound": bounds.auto, "provenance": bounds.provenance, "bound_fixed_head": bounds.fixed_head}
            _check_chain(images, page)
            pages.append(page)
            best.append(bounds.auto)
        for page, bound in zip(pages, running_minimum(torch.stack(best, 1)).T, strict=True):
            page["bound"] = bound
            _check_chain(images, page)
        return [{k: v.tolist() if isinstance(v, Tensor) else list(v) for k, v in page.items()} for page in pages]

    def _estimates(self, ball: Ball, generator: torch.Generator) -> dict[str, Tensor]:
        settings, score = self.settings, self.score
        at_center = gradient_norm_estimate(self.graph, ball, score)
        ascended, argument = ascended_gradient_norm_estimate(self.graph, ball, generator, settings.ascents, score=score)
        (seen,) = attacks.extremes(self.network, [ball], generator, score=score)
        ends = torch.stack([argument, seen.argmax, seen.argmin])
        segments = torch.cat([ball.center + share * (ends - ball.center) for share in _SHARES])
        found = {
            "gradient_norm_estimate": at_center,
            "sampled_estimate": sampled_gradient_norm_estimate(self.graph, ball, settings.samples, generator, score),
            "ascended_estimate": ascended,
            "secant_estimate": secant_estimate(self.graph, ball, segments, score),
        }
        nan = torch.full_like(at_center, torch.nan)
        if settings.clever_batches:
            clever = clever_estimate(self.graph, ball, generator, settings.clever_batches, settings.samples, score)
            fitted = clever.fitted.to(at_center)
            return found | dict(zip(_CLEVER, (clever.lipschitz_estimate, clever.p_value, fitted), strict=True))
        return found | dict.fromkeys(_CLEVER, nan)


def _check_chain(images: Tensor, page: dict[str, Any]) -> None:
    largest = torch.stack([page[name] for name in _LOWER]).amax(0)
    for name, bound in page.items():
        if not name.startswith("bound") or name == "bound_fixed_head":
            continue
        wrong = largest > bound * (1 + _SLACK) + _SLACK * (bound == 0)
        if bool(wrong.any()):
            raise SoundnessError(
                f"{int(wrong.sum())} slopes found by search exceed {name} at eps {float(page['eps'][0]):g}: no bound of "
                "this run can be trusted",
                {
                    "image": images[wrong].cpu().numpy(),
                    name: bound[wrong].cpu().numpy(),
                    **{lower: page[lower][wrong].cpu().numpy() for lower in _LOWER},
                },
            )
