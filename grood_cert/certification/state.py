"""What is known about a batch on its way through the cascade."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from grood_cert.ball import Ball, Norm
from grood_cert.bounds.engine import Side
from grood_cert.certification.adversary import Adversary
from grood_cert.certification.envelope import Envelope


@dataclass
class State:
    """A batch between its proofs and its attacks; stages read and add to it.

    Attributes:
        images: Shape (B, C, H, W).
        kind: "id", or anything else for OOD.
        norm: Norm of the balls.
        right: Samples decided rightly at x.
        envelope: All that was proved.
        per_logit: What bounds of each logit alone proved.
        adversary: All that attacks found.
        deadline: When time is up, on the monotonic clock.
        timed_out: Samples for which a stage stopped because time was up.
        radii: Further certified radii, by the name of their column.
    """

    images: Tensor
    kind: str
    norm: Norm
    right: Tensor
    envelope: Envelope
    per_logit: Envelope
    adversary: Adversary
    deadline: float
    timed_out: Tensor
    radii: dict[str, Tensor] = field(default_factory=dict)

    @property
    def side(self) -> Side:
        """The bound that decides."""
        return "upper" if self.kind == "id" else "lower"

    def ball(self, index: Tensor, eps: Tensor) -> Ball:
        """Balls of these samples."""
        return Ball(self.images[index], eps, self.norm)

    def record(self, index: Tensor, eps: Tensor, bound: Tensor, stage: str) -> Tensor:
        """Add the bounds that decide, proved on balls of these samples; the deviations they allow."""
        nothing = bound.new_full(bound.shape, float("nan"))
        lower, upper = (nothing, bound) if self.kind == "id" else (bound, nothing)
        self.envelope.record(index, eps, lower, upper, stage)
        return self.envelope.deviation(lower, upper, index)

    def late(self, index: Tensor) -> bool:
        """Whether time is up; notes it for these samples."""
        if time.monotonic() <= self.deadline:
            return False
        self.timed_out[index] = True
        return True

    def open(self, precision: float) -> Tensor:
        """Samples whose certified and attack radii leave room between them, and time: indices."""
        gap = self.right & (self.adversary.radius > self.envelope.radius * (1 + precision))
        index = gap.nonzero().squeeze(1)
        return index[:0] if self.late(index) else index
