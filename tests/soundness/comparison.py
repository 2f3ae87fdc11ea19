r"""Claims against points: quickly in float64 by the network itself, and where that looks wrong, by the referee.

A violation is what extended precision confirms: the exact value exceeds the limit by more than the bound of the error with
which it was computed. Bounds of S must hold for the float64 run too. Of other claims (slopes, secants), which are about exact
arithmetic, a float64 run alone proves nothing wrong; such cases are counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grood_cert.ball import Ball, Norm, dual_norm
from grood_cert.scores import Score
from tests.soundness.claims import Claim, Subject
from tests.soundness.precision import LONG, Referee, distance, long

_JUDGED = 4  # points of a claim that the referee looks at


@dataclass(frozen=True)
class Violation:
    """A point that contradicts a claim.

    Attributes:
        stage: Who made it.
        kind: Of which kind.
        ball: Which ball of the batch.
        point: Where, shape (C, H, W).
        limit: What was claimed.
        value: What is true there, by the referee.
        excess: By how much, beyond the error of the referee.
    """

    stage: str
    kind: str
    ball: int
    point: Tensor
    limit: float
    value: float
    excess: float


@dataclass
class Tally:
    """Counts of comparisons, by stage and score."""

    proved: Counter[tuple[str, str]] = field(default_factory=Counter)
    unproved: Counter[tuple[str, str]] = field(default_factory=Counter)
    compared: Counter[tuple[str, str]] = field(default_factory=Counter)
    violated: Counter[tuple[str, str]] = field(default_factory=Counter)
    judged: int = 0
    rounding: float = 0.0  # largest relative excess of a float64 run, 1 + |S| being 1
    rounded: int = 0

    def add(self, other: Tally) -> None:
        """Sum up."""
        for name in ("proved", "unproved", "compared", "violated"):
            getattr(self, name).update(getattr(other, name))
        self.judged += other.judged
        self.rounded += other.rounded
        self.rounding = max(self.rounding, other.rounding)


class Evidence:
    """Points of a batch of balls, and what the network gives there.

    Args:
        subject: The network.
        ball: The balls.
        points: Shape (P, B, C, H, W), all inside; the first ones are the centres.
    """

    def __init__(self, subject: Subject, ball: Ball, points: Tensor) -> None:
        self.subject, self.ball, self.points = subject, ball, points
        self._referee: Referee | None = None
        self._norms: dict[tuple[str, Norm], Tensor] = {}
        with torch.no_grad():
            self.logits = subject.network(points.flatten(0, 1)).reshape(*points.shape[:2], -1)
        self.distance = torch.from_numpy(distance(points, ball.center, ball.norm).astype(np.float64))

    @property
    def referee(self) -> Referee:
        """In extended precision."""
        if self._referee is None:
            self._referee = Referee(self.subject.graph)
        return self._referee

    def score(self, score: Score) -> Tensor:
        """S, shape (P, B)."""
        return score.value(self.logits)

    def layer(self, number: int) -> Tensor:
        """The input of a nonlinear layer, shape (P, B, *layer)."""
        graph = self.subject.graph
        with torch.no_grad():
            values = graph.values(self.points.flatten(0, 1))
        return values[graph.nodes[graph.nonlinear[number]].inputs[0]].unflatten(0, tuple(self.points.shape[:2]))

    def gradient_norm(self, score: Score) -> Tensor:
        """||grad S||_q, shape (P, B)."""
        key = str(score), self.ball.norm
        if key not in self._norms:
            with torch.enable_grad():
                points = self.points.flatten(0, 1).requires_grad_(True)
                (gradient,) = torch.autograd.grad(score.value(self.subject.graph(points)).sum(), points)
            self._norms[key] = dual_norm(gradient.detach(), self.ball.norm).reshape(self.points.shape[:2])
        return self._norms[key]


def measured(claim: Claim, evidence: Evidence, score: Score) -> tuple[Tensor, Tensor]:
    """What is measured at each point in float64, and the limit there, shape (P, B) each."""
    kind, limit = claim.kind, claim.limit
    if claim.kind == "layer":
        assert claim.upper is not None
        value = evidence.layer(claim.layer)
        excess = torch.maximum(value - claim.upper, limit - value).flatten(2).amax(2)
        return excess, torch.where(claim.proved, 0.0, torch.nan).expand_as(excess)
    if kind == "slope":
        value = evidence.gradient_norm(score)
    elif kind.startswith("row"):
        assert claim.row is not None
        value = (evidence.logits @ claim.row) * (1 if kind == "row upper" else -1)
    else:
        value = evidence.score(score)
        if kind == "secant":
            return (value - value[0]).abs(), limit * evidence.distance
        if kind == "rise":
            return value - value[0], limit * evidence.distance
        if kind.startswith("radius"):
            sign = 1.0 if kind == "radius id" else -1.0
            inside = evidence.distance <= limit
            return torch.where(inside, sign * (value - claim.gamma), -torch.inf), torch.zeros_like(value)
        if kind.startswith("decided"):
            sign = 1.0 if kind == "decided upper" else -1.0
            return sign * (value - claim.gamma), limit.expand_as(value)
        value = value if kind == "upper" else -value
    return value, limit.expand_as(value)


def judged(claim: Claim, evidence: Evidence, score: Score, place: int, ball: int) -> tuple[Any, Any]:
    """The same at one point in extended precision: the value less the limit, and the bound of its error."""
    referee, point = evidence.referee, evidence.points[place, ball].unsqueeze(0)
    center, kind = evidence.ball.center[ball].unsqueeze(0), claim.kind
    if kind == "layer":
        assert claim.upper is not None
        node = referee.graph.nodes[referee.graph.nonlinear[claim.layer]]
        value, error = referee.values(point)[node.inputs[0]]
        low, high = long(claim.limit[ball].flatten()), long(claim.upper[ball].flatten())
        excess = np.maximum(value[0] - high, low - value[0])
        worst = int((excess - error[0]).argmax())
        return excess[worst], error[0][worst]
    limit = LONG(float(claim.limit[ball]))
    if kind == "slope":
        value, error = referee.gradient_norm(point, score, evidence.ball.norm)
        return value[0] - limit, error[0]
    if kind.startswith("row"):
        assert claim.row is not None
        logits, error = referee.values(point)[-1]
        row = long(claim.row)
        sign = 1 if kind == "row upper" else -1
        return sign * (logits[0] @ row) - limit, (error[0] + 1e-18 * np.abs(logits[0])) @ np.abs(row)
    value, error = (part[0] for part in referee.score(point, score))
    if kind in ("secant", "rise"):
        base, more = (part[0] for part in referee.score(center, score))
        moved = value - base if kind == "rise" else abs(value - base)
        return moved - limit * distance(point[0], center[0], evidence.ball.norm), error + more
    if kind.startswith(("radius", "decided")):
        sign = 1 if kind in ("radius id", "decided upper") else -1
        return sign * (value - LONG(claim.gamma)), error
    return (value if kind == "upper" else -value) - limit, error


def compare(claim: Claim, evidence: Evidence, score: Score, tally: Tally) -> list[Violation]:
    """Hold a claim against all points of the evidence."""
    key = claim.stage, str(score)
    proved = claim.proved
    tally.proved[key] += int(proved.sum())
    tally.unproved[key] += int((~proved).sum())
    if claim.kind == "true":
        wrong = (claim.limit < 0).nonzero().flatten().tolist()
        tally.violated[key] += len(wrong)
        return [Violation(*_named(claim), i, evidence.ball.center[i], 0.0, -1.0, 1.0) for i in wrong]
    if claim.kind.startswith("found"):
        return _found(claim, evidence, score, tally)
    value, limit = measured(claim, evidence, score)
    tally.compared[key] += int(torch.isfinite(value[:, proved]).sum())
    excess = torch.where(proved, torch.nan_to_num(value, nan=-torch.inf) - limit, -torch.inf)
    if claim.kind == "radius ood":  # equality is the other decision
        excess = torch.where(excess == 0, torch.finfo(torch.float64).tiny, excess)
    found = []
    for ball in (excess.amax(0) > 0).nonzero().flatten().tolist():
        for place in excess[:, ball].topk(min(_JUDGED, len(excess))).indices.tolist():
            if not excess[place, ball] > 0:
                continue
            tally.judged += 1
            true, error = judged(claim, evidence, score, place, ball)
            if true > error:
                tally.violated[key] += 1
                bound = float(claim.limit[ball]) if claim.limit.dim() == 1 else 0.0
                value_there = float(true) + (bound if claim.kind not in ("layer", "secant", "rise") else 0.0)
                point = evidence.points[place, ball]
                found.append(Violation(*_named(claim), ball, point, bound, value_there, float(true - error)))
                break
            tally.rounded += 1
            if claim.kind in ("upper", "lower"):  # bounds of S cover what float64 makes of it
                above = float(excess[place, ball])
                tally.rounding = max(tally.rounding, above / (1 + abs(float(value[place, ball]))))
                tally.violated[key] += 1
                bound, point = float(claim.limit[ball]), evidence.points[place, ball]
                found.append(Violation(*_named(claim), ball, point, bound, float(value[place, ball]), above))
                break
    return found


def _named(claim: Claim) -> tuple[str, str]:
    return claim.stage, claim.kind


def _found(claim: Claim, evidence: Evidence, score: Score, tally: Tally) -> list[Violation]:
    """Points that the package says have the other decision: they do, and lie in their balls but for rounding."""
    assert claim.points is not None
    sign = 1.0 if claim.kind == "found upper" else -1.0
    found = []
    for ball in claim.proved.nonzero().flatten().tolist():
        point = claim.points[ball : ball + 1]
        tally.compared[claim.stage, str(score)] += 1
        value, error = (part[0] for part in evidence.referee.score(point, score))
        away = distance(point[0], evidence.ball.center[ball], evidence.ball.norm) - LONG(float(evidence.ball.eps[ball]))
        outside = float(away) > 1e-12 * (1 + float(evidence.ball.eps[ball]))
        outside = outside or bool(((point < 0) | (point > 1)).any())
        if outside or sign * (value - LONG(claim.gamma)) < -error - 1e-12 * (1 + abs(value)):
            tally.violated[claim.stage, str(score)] += 1
            found.append(
                Violation(*_named(claim), ball, point[0], claim.gamma, float(value), float(abs(value - claim.gamma)))
            )
    return found
