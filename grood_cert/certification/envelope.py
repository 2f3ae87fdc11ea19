"""Bounds of S on a grid of eps that gather whatever any stage proves."""

from __future__ import annotations

import torch
from torch import Tensor

from grood_cert.certification.outcomes import Outcome


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
        outcome: The `Outcome` of the stage that first certified each ball, 0 if none did, shape (B, E).
        radius: Largest eps certified, 0 if none, shape (B,).
        stage: The `Outcome` of the stage that certified it.

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

    def record(self, index: Tensor, eps: Tensor, lower: Tensor, upper: Tensor, stage: str) -> None:
        """Add S_lb and S_ub proved on balls of these samples, NaN where they were not; smaller balls gain as well."""
        inside = self.grid <= eps[:, None]
        lower = torch.where(torch.isfinite(lower), lower, -torch.inf)
        upper = torch.where(torch.isfinite(upper), upper, torch.inf)
        gain = torch.where(inside, lower[:, None], -torch.inf), torch.where(inside, upper[:, None], torch.inf)
        self.lower[index] = torch.maximum(self.lower[index], gain[0])
        self.upper[index] = torch.minimum(self.upper[index], gain[1])
        proved = upper < self.gamma if self.kind == "id" else lower > self.gamma
        self.certify(index[proved], eps[proved], stage)

    def certify(self, index: Tensor, eps: Tensor, stage: str) -> None:
        """Note that a stage proved the decision on balls of these samples."""
        proof = Outcome.of(stage)
        new = (self.grid <= eps[:, None]) & (self.outcome[index] == 0) & (eps[:, None] > 0)
        self.outcome[index] = torch.where(new, proof, self.outcome[index])
        better = eps > self.radius[index]
        self.radius[index[better]], self.stage[index[better]] = eps[better], proof

    def deviation(self, lower: Tensor, upper: Tensor, index: Tensor | slice = slice(None)) -> Tensor:
        """How far bounds let S move towards gamma; below the margin only if they prove the decision."""
        score, margin = self.score[index], self.margin[index]
        if lower.dim() == 2:
            score, margin = score[:, None], margin[:, None]
        proved = upper < self.gamma if self.kind == "id" else lower > self.gamma
        moved = upper - score if self.kind == "id" else score - lower
        return torch.where(proved, moved, torch.maximum(moved, margin))
