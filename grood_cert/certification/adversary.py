"""The other side of the bracket: what attacks find against a batch, and the check of every proof against it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grood_cert import attacks
from grood_cert.ball import Ball
from grood_cert.certification.envelope import Envelope
from grood_cert.certification.settings import EFFORTS, Settings
from grood_cert.detector import Detector
from grood_cert.errors import SoundnessError


class Adversary:
    """Attacks a batch: nearest points with the other decision, and extremes of S on the eps grid.

    Args:
        detector: Network, score and gamma.
        settings: Balls and effort.
        images: Shape (B, C, H, W).
        kind: "id", or anything else for OOD.
        right: Samples decided rightly at x; any other is its own counterexample, at distance 0.
        generator: Random starting points.

    Attributes:
        radius: Distance of the nearest point found with the other decision, infinity if there is none, shape (B,).
        points: That point, or x.
        seen: Extremes of S found in the balls of the grid, after `search_grid`.
    """

    def __init__(
        self,
        detector: Detector,
        settings: Settings,
        images: Tensor,
        kind: str,
        right: Tensor,
        generator: torch.Generator,
    ) -> None:
        self.images, self.points, self.radius = images, images.clone(), images.new_zeros(len(images))
        self.seen: list[attacks.Extremes] = []
        self._detector, self._gamma, self._settings = detector, detector.gamma, settings
        self._effort = EFFORTS[settings.effort]
        self._inside, self._right = kind == "id", right
        if bool(right.any()):
            found = attacks.minimum_norm(
                detector.network,
                images[right],
                self._gamma,
                settings.norm,
                generator,
                self._effort.attack,
                detector.score,
            )
            self.radius[right], self.points[right] = found.radius, found.points

    def search_grid(self, generator: torch.Generator) -> None:
        """Attack the balls of the grid."""
        network, score, norm = self._detector.network, self._detector.score, self._settings.norm
        balls = [Ball(self.images, value, norm) for value in self._settings.eps]
        side: attacks.Side = "maximum" if self._inside else "minimum"
        wanted = None if self._effort.both_extremes else side
        self.seen = attacks.extremes(network, balls, generator, self._effort.attack, score, self.points, wanted)
        for found in self.seen:
            flipped = found.maximum > self._gamma if self._inside else found.minimum <= self._gamma
            self.add(self._right & flipped, found.argmax if self._inside else found.argmin)

    def add(self, flipped: Tensor, points: Tensor) -> None:
        """Keep points with the other decision that lie nearer than the nearest so far."""
        distance = Ball(self.images, torch.zeros_like(self.radius), self._settings.norm).distance(points)
        nearer = flipped & (distance < self.radius)
        self.radius = torch.where(nearer, distance, self.radius)
        self.points = torch.where(self._per_pixel(nearer), points, self.points)

    def check_radius(self, name: str, certified: Tensor) -> None:
        """No certified radius exceeds the distance of a counterexample.

        Raises:
            SoundnessError: If one does.
        """
        self._refute(
            certified > self.radius,
            f"of {name} exceed the distance of a counterexample",
            {"counterexample": self.points, name: certified, "radius_attack": self.radius},
        )

    def check_envelope(self, envelope: Envelope) -> None:
        """Every point that an attack on the grid visited scores inside the envelope.

        Raises:
            SoundnessError: If one does not.
        """
        for column, seen in enumerate(self.seen):
            lower, upper, eps = envelope.lower[:, column], envelope.upper[:, column], envelope.grid[column]
            above = seen.maximum > upper
            self._refute(
                above | (seen.minimum < lower),
                f"points inside the ball of eps {float(eps):g} score outside their proved bounds",
                {
                    "counterexample": torch.where(self._per_pixel(above), seen.argmax, seen.argmin),
                    "eps": eps.expand_as(lower),
                    "s_lower": lower,
                    "s_upper": upper,
                    "s_attack_minimum": seen.minimum,
                    "s_attack_maximum": seen.maximum,
                },
            )

    def _refute(self, wrong: Tensor, what: str, evidence: Mapping[str, Tensor]) -> None:
        if bool(wrong.any()):
            raise SoundnessError(
                f"{int(wrong.sum())} {what}: no certificate of this run can be trusted",
                {name: values[wrong].cpu().numpy() for name, values in {"image": self.images, **evidence}.items()},
            )

    def _per_pixel(self, mask: Tensor) -> Tensor:
        return mask.reshape(-1, *[1] * (self.images.dim() - 1))
