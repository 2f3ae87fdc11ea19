r"""Random balls, points of theirs, and a search of its own for points where a score is extreme.

Nothing is shared with the package's attacks: points are drawn, moved and kept inside here, and a point counts only if its
distance, computed in extended precision, is at most eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grood_cert.ball import Ball, Norm
from grood_cert.scores import MSP, Score
from tests.soundness.networks import Dice
from tests.soundness.precision import LONG, distance, long

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
EPS = 0.0, 1e-12, 1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.2, 0.4, 1.0
Logits = Callable[[Tensor], Tensor]


def random_balls(dice: Dice, shape: tuple[int, ...], count: int, norm: Norm | None = None) -> Ball:
    """Balls of one norm around images inside the box, on its faces, in its corners; some of radius 0, some the box."""
    norm = norm or dice.pick(*NORMS)
    centers, radii = [], []
    for _ in range(count):
        image = dice.uniform(*shape)
        eps = dice.pick(*EPS)
        way = dice.pick("inside", "inside", "faces", "corner", "level", "touching", "near")
        if way == "faces":
            image = torch.where(dice.uniform(*shape) < 0.5, image.round(), image)
        elif way == "corner":
            image = image.round()
        elif way == "level":
            image = torch.full(shape, dice.pick(0.0, 0.5, 1.0), dtype=torch.float64)
        elif way == "touching":
            low = torch.full_like(image, min(eps, 1.0))
            image = torch.where(dice.uniform(*shape) < 0.5, low, 1 - low)
        elif way == "near":
            image = image.round().clamp(1e-13, 1 - 1e-13)
        if norm != "linf" and dice.chance(0.5):
            eps = min(eps * math.prod(shape) ** (0.5 if norm == "l2" else 1.0), math.prod(shape))
        centers.append(image)
        radii.append(eps)
    return Ball(torch.stack(centers), torch.tensor(radii, dtype=torch.float64), norm)


def within(ball: Ball, points: Tensor) -> Tensor:
    """Which points lie in their balls and in the pixel box, shape (P, B) of points (P, B, C, H, W)."""
    near = distance(points, ball.center, ball.norm) <= ball.eps.numpy().astype(LONG)
    box = ((points >= 0) & (points <= 1)).flatten(2).all(2)
    return torch.from_numpy(np.asarray(near)) & box


def pulled_in(ball: Ball, points: Tensor) -> Tensor:
    """Points near the given ones that lie in the balls; the centre where rounding leaves no other."""
    points = points.clamp(0, 1)
    center, eps = ball.center, ball.per_pixel(ball.eps)
    if ball.norm == "linf":
        points = torch.maximum(torch.minimum(points, center + eps), center - eps).clamp(0, 1)
        for _ in range(2):
            far = torch.from_numpy(np.asarray(np.abs(long(points) - long(center)) > long(eps)))
            points = torch.where(far, torch.nextafter(points, center.expand_as(points)), points)
    else:
        order = 2 if ball.norm == "l2" else 1
        unit = 1.2e-16 * center[0].numel()
        for ulps in (0, 1, 4):
            length = torch.linalg.vector_norm((points - center).flatten(2), ord=order, dim=2)
            share = ((ball.eps - ulps * unit).clamp(min=0) / length.clamp(min=1e-300)).clamp(max=1)
            outside = ~within(ball, points)
            moved = center + (points - center) * share.reshape(*share.shape, *[1] * (center.dim() - 1))
            points = torch.where(outside.reshape(*outside.shape, *[1] * (center.dim() - 1)), moved, points)
    inside = within(ball, points)
    return torch.where(inside.reshape(*inside.shape, *[1] * (center.dim() - 1)), points, center)


def random_points(dice: Dice, ball: Ball, count: int) -> Tensor:
    """The centre, vertices, points of the boundary and of the inside, shape (P, B, C, H, W)."""
    shape = count, *ball.center.shape
    eps, ones = ball.per_pixel(ball.eps), [1] * ball.center.dim()
    size = ball.center[0].numel()
    if ball.norm == "linf":
        vertices = (dice.uniform(*shape) < 0.5).double() * 2 - 1
        mixed = torch.where(dice.uniform(*shape) < 0.3, dice.uniform(*shape) * 2 - 1, vertices)
        inside = dice.uniform(*shape) * 2 - 1
    elif ball.norm == "l2":
        vertices = dice.normal(*shape)
        vertices = vertices * (dice.uniform(*shape) < dice.pick(0.3, 1.0))
        mixed = dice.normal(*shape)
        vertices, mixed = (
            v / torch.linalg.vector_norm(v.flatten(2), dim=2).clamp(min=1e-9).reshape(*shape[:2], *ones[1:])
            for v in (vertices, mixed)
        )
        inside = mixed * dice.uniform(*shape[:2], *ones[1:]) ** (1 / size)
    else:
        index = torch.randint(size, shape[:2], generator=dice.generator)
        sign = (dice.uniform(*shape[:2]) < 0.5).double() * 2 - 1
        vertices = torch.zeros(*shape[:2], size, dtype=torch.float64)
        vertices = vertices.scatter(2, index.unsqueeze(2), sign.unsqueeze(2)).reshape(shape)
        mixed = -torch.log1p(-dice.uniform(*shape)) * ((dice.uniform(*shape) < 0.5).double() * 2 - 1)
        mixed = mixed / mixed.abs().flatten(2).sum(2).clamp(min=1e-9).reshape(*shape[:2], *ones[1:])
        inside = mixed * dice.uniform(*shape[:2], *ones[1:])
    offsets = torch.cat([vertices, mixed, inside])
    points = pulled_in(ball, ball.center + offsets * eps)
    return torch.cat([ball.center.unsqueeze(0), points])


def _climbed(logits: Logits, ball: Ball, start: Tensor, objective: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """Points climbed from `start`, shape (R, B, ...), by steps along the steepest direction of the ball's norm."""
    points, best = start, start
    ones = [1] * (ball.center.dim() - 1)
    with torch.no_grad():
        highest = objective(logits(points.flatten(0, 1))).reshape(points.shape[:2])
    eps = ball.per_pixel(ball.eps)
    for step in range(steps):
        with torch.enable_grad():
            moving = points.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(objective(logits(moving.flatten(0, 1))).sum(), moving)
        flat = torch.nan_to_num(gradient).flatten(2)
        if ball.norm == "linf":
            move = flat.sign()
        elif ball.norm == "l2":
            move = flat / torch.linalg.vector_norm(flat, dim=2, keepdim=True).clamp(min=1e-300)
        else:
            keep = 1 + step % 2
            chosen = flat.abs().topk(min(keep, flat.shape[2]), dim=2).indices
            move = torch.zeros_like(flat).scatter(2, chosen, flat.gather(2, chosen).sign() / keep)
        length = 2.0 * 0.5**step if step % 5 else 1.0
        points = pulled_in(ball, points + length * eps * move.reshape(points.shape))
        with torch.no_grad():
            value = objective(logits(points.flatten(0, 1))).reshape(points.shape[:2])
        better = value > highest
        highest = torch.where(better, value, highest)
        best = torch.where(better.reshape(*better.shape, *ones), points, best)
    return best


def _exchanged(logits: Logits, ball: Ball, start: Tensor, objective: Callable[[Tensor], Tensor], rounds: int) -> Tensor:
    """The best point of each ball after moving one pixel at a time to its ends, shape (B, ...)."""
    size, eps = start[0].numel(), ball.per_pixel(ball.eps)
    unit = torch.eye(size, dtype=torch.float64).reshape(size, 1, *start.shape[1:])
    best = start
    with torch.no_grad():
        highest = objective(logits(best))
        for _ in range(rounds):
            if ball.norm == "l1":
                other = torch.cat([ball.center + eps * unit, ball.center - eps * unit, best + eps * unit / 2])
            else:
                ends = (ball.center + eps).expand_as(best), (ball.center - eps).expand_as(best)
                other = torch.cat([torch.where(unit > 0, end.unsqueeze(0), best.unsqueeze(0)) for end in ends])
            other = pulled_in(ball, other)
            value = objective(logits(other.flatten(0, 1))).reshape(len(other), -1)
            found, place = value.max(0)
            better = found > highest
            if not bool(better.any()):
                break
            chosen = other[place, torch.arange(len(place))]
            highest = torch.where(better, found, highest)
            best = torch.where(ball.per_pixel(better), chosen, best)
    return best


def order(score: Score, sign: float) -> Callable[[Tensor], Tensor]:
    """What to climb for a large or a small score: S itself, or for MSP the log odds, which do not saturate."""

    def odds(logits: Tensor) -> Tensor:
        assert isinstance(score, MSP)
        if logits.shape[1] == 1:
            return 0 * logits[:, 0]
        top = logits.topk(2, 1).values
        rest = torch.logsumexp(logits / score.temperature, 1) * score.temperature
        return sign * (rest - top[:, 0] - 1e-3 * (top[:, 0] - top[:, 1]))

    return odds if isinstance(score, MSP) else lambda logits: sign * score.value(logits)


def extreme_points(
    dice: Dice, ball: Ball, logits: Logits, score: Score, points: Tensor, steps: int = 8, restarts: int = 3
) -> Tensor:
    """Points where S is large and where it is small, shape (P, B, C, H, W)."""
    found = []
    with torch.no_grad():
        values: Any = logits(points.flatten(0, 1))
    for sign in (1.0, -1.0):
        objective = order(score, sign)
        value = objective(values).reshape(points.shape[:2])
        start = value.topk(min(restarts, len(points)), 0).indices
        first = points[start, torch.arange(points.shape[1])]
        climbed = _climbed(logits, ball, first, objective, steps)
        with torch.no_grad():
            height = objective(logits(climbed.flatten(0, 1))).reshape(climbed.shape[:2])
        best = climbed[height.argmax(0), torch.arange(climbed.shape[1])]
        found += [climbed, _exchanged(logits, ball, best, objective, 3).unsqueeze(0)]
    return torch.cat(found)
