r"""The adversary: looks inside the same ball for points that contradict a proof, and brackets the certified radius.

An attack never proves anything. What it finds is a *witness*: a point whose score was evaluated in float64, so its
distance is a true upper bound of the exact robust radius.

References:
    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018 (PGD);
    Brendel et al., "Accurate, reliable and fast robustness evaluation", NeurIPS 2019 (minimum-norm attacks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grood_cert.ball import Ball, Norm, dual_norm, largest_eps
from grood_cert.energy import energy

_STEPS = 30
_ROUNDS = 14
_BISECTIONS = 40
_MOMENTUM = 0.75
_PIXELS_PER_STEP = 16  # an l_1 step moves one pixel in so many
_DUAL: dict[Norm, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}


@dataclass(frozen=True)
class Extremes:
    """Smallest and largest score among *all* points an attack visited in each ball, the centre included.

    Attributes:
        minimum: Shape (B,).
        maximum: Shape (B,).
        argmin: Where the minimum was seen, shape (B, C, H, W).
        argmax: Where the maximum was seen.
    """

    minimum: Tensor
    maximum: Tensor
    argmin: Tensor
    argmax: Tensor


def _where(mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.where(mask.reshape(-1, *[1] * (first.dim() - 1)), first, second)


class _Watch:
    """Extremes seen so far."""

    def __init__(self, network: nn.Module, ball: Ball) -> None:
        with torch.no_grad():
            score = energy(network(ball.center))
        self.minimum = self.maximum = score
        self.argmin = self.argmax = ball.center

    def see(self, points: Tensor, score: Tensor) -> None:
        lower, higher = score < self.minimum, score > self.maximum
        self.argmin, self.minimum = _where(lower, points, self.argmin), torch.where(lower, score, self.minimum)
        self.argmax, self.maximum = _where(higher, points, self.argmax), torch.where(higher, score, self.maximum)

    @property
    def extremes(self) -> Extremes:
        return Extremes(self.minimum, self.maximum, self.argmin, self.argmax)


def _ascend(network: nn.Module, ball: Ball, direction: Tensor, points: Tensor, watch: _Watch, steps: int) -> None:
    r"""Projected gradient steps on direction * S: signs for l_inf, unit gradients for l_2, few pixels for l_1.

    The step shrinks from eps to eps / 50 along a geometric schedule.
    """
    velocity = torch.zeros_like(points)
    for step in range(steps + 1):
        with torch.enable_grad():
            points = points.detach().requires_grad_(True)
            score = energy(network(points))
            (gradient,) = torch.autograd.grad((direction * score).sum(), points)
        points = points.detach()
        watch.see(points, score.detach())
        if step == steps:
            return
        velocity = _MOMENTUM * velocity + _unit(gradient, ball.norm, ball)
        size = ball.eps * 0.02 ** (step / max(1, steps - 1))
        points = ball.project(points + ball.per_pixel(size) * _steepest(velocity, ball, points))


def _unit(gradient: Tensor, norm: Norm, ball: Ball) -> Tensor:
    """Scaled to dual norm 1; 0 stays 0."""
    return gradient / ball.per_pixel(dual_norm(gradient, norm).clamp(min=torch.finfo(gradient.dtype).tiny))


def _steepest(gradient: Tensor, ball: Ball, points: Tensor) -> Tensor:
    """A direction of p-norm 1 along which a linear function grows fastest; for l_1 shared by a few pixels with room."""
    if ball.norm == "linf":
        return gradient.sign()
    if ball.norm == "l2":
        return _unit(gradient, "l2", ball)
    free = torch.where(gradient > 0, points < 1, points > 0)
    flat = torch.where(free, gradient, 0.0).flatten(1)
    few = flat.abs().topk(max(1, flat.shape[1] // _PIXELS_PER_STEP), dim=1).indices
    move = torch.zeros_like(flat).scatter(1, few, flat.gather(1, few).sign() / few.shape[1])
    return move.reshape(gradient.shape)


def _random_points(ball: Ball, generator: torch.Generator) -> Tensor:
    noise = torch.rand(ball.center.shape, generator=generator, dtype=ball.center.dtype).to(ball.center.device) * 2 - 1
    if ball.norm != "linf":
        noise = noise / ball.per_pixel(dual_norm(noise, _DUAL[ball.norm]))
    return ball.project(ball.center + ball.per_pixel(ball.eps) * noise)


def extremes(
    network: nn.Module, ball: Ball, generator: torch.Generator, high: Tensor, low: Tensor, steps: int = _STEPS
) -> Extremes:
    """Search each ball for high and for low scores, from a random point and from one given point each.

    Args:
        network: f in eval mode, in the ball's floating-point type.
        ball: Batch of balls.
        generator: Random numbers of the starts.
        high: Where to start the search for high scores, projected into the ball; the centre will do.
        low: Where to start the search for low scores.
        steps: Gradient steps from each start.

    Returns:
        Extremes over every point visited, the projected starts included.
    """
    watch = _Watch(network, ball)
    for sign, start in ((1, high), (-1, low)):
        direction = torch.full_like(ball.eps, sign)
        for points in (ball.project(start), _random_points(ball, generator)):
            _ascend(network, ball, direction, points, watch, steps)
    return watch.extremes


def _targeted_start(network: nn.Module, ball: Ball, index: Tensor, steps: int = 8) -> Tensor:
    """Climb one logit a sample; where GReg has flattened S, the softmax-weighted gradient alone leads nowhere."""
    points = ball.center
    for _ in range(steps):
        with torch.enable_grad():
            points = points.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(network(points).gather(1, index.unsqueeze(1)).sum(), points)
        points = ball.project(points.detach() + ball.per_pixel(ball.eps / 4) * _steepest(gradient, ball, points))
    return points


@dataclass(frozen=True)
class MinimumNorm:
    """Nearest points found on the wrong side of gamma.

    Attributes:
        radius: ||x' - x||_p, shape (B,); infinity where no such point was found.
        points: The points x', shape (B, C, H, W); x itself where none was found.
    """

    radius: Tensor
    points: Tensor


def minimum_norm(
    network: nn.Module,
    images: Tensor,
    gamma: float,
    norm: Norm,
    generator: torch.Generator,
    steps: int = _STEPS,
    rounds: int = _ROUNDS,
) -> MinimumNorm:
    r"""Upper bracket of the robust radius: the nearest point found whose decision S <= gamma differs from x's.

    Bisection over eps of PGD on S from the centre, a random point and, in turn, a point that climbs one of the
    logits. Each success is pulled towards x along the segment as far as the decision stays flipped, which is where
    most of the precision comes from. Every returned point was evaluated in float64 and lies in the pixel box.

    Args:
        network: f in eval mode and float64.
        images: x, shape (B, C, H, W).
        gamma: Threshold.
        norm: Norm of the distance.
        generator: Random numbers of the starts.
        steps: Gradient steps from each start.
        rounds: Bisection rounds.

    Returns:
        Radii and points.
    """
    with torch.no_grad():
        logits = network(images)
    accepted = energy(logits) <= gamma
    direction = torch.where(accepted, 1.0, -1.0).to(images)
    ranking = logits.argsort(1, descending=True)
    limit = largest_eps(images.shape[1:], norm)
    best = torch.full((len(images),), torch.inf, dtype=images.dtype, device=images.device)
    points = images
    failed = torch.zeros_like(best)
    eps = torch.full_like(best, limit)
    for turn in range(rounds):
        ball = Ball(images, eps, norm)
        watch = _Watch(network, ball)
        starts = [
            ball.center,
            _random_points(ball, generator),
            _targeted_start(network, ball, ranking[:, turn % ranking.shape[1]]),
        ]
        if turn > 0:
            starts.append(ball.project(points))
        for start in starts:
            _ascend(network, ball, direction, start, watch, steps)
        found = _where(accepted, watch.argmax, watch.argmin)
        candidate, distance = _shorten(network, images, found, accepted, gamma, norm)
        better = distance < best
        points, best = _where(better, candidate, points), torch.where(better, distance, best)
        failed = torch.where(torch.isfinite(distance), failed, torch.maximum(failed, eps))
        eps = torch.where(torch.isfinite(best), torch.minimum((failed + best) / 2, best), torch.full_like(best, limit))
        eps = torch.where(failed > 0.97 * best, 0.99 * best, eps)  # once more, with other starts
    return MinimumNorm(best, points)


def _shorten(
    network: nn.Module, images: Tensor, points: Tensor, accepted: Tensor, gamma: float, norm: Norm
) -> tuple[Tensor, Tensor]:
    """Bisect the segments from x to the points for the nearest flipped decision; infinite distance where none is."""

    def flipped(candidates: Tensor) -> Tensor:
        with torch.no_grad():
            score = energy(network(candidates))
        return torch.where(accepted, score > gamma, score <= gamma)

    good = flipped(points)
    low, high = (
        torch.zeros(len(images), dtype=images.dtype, device=images.device),
        torch.ones_like(good, dtype=images.dtype),
    )
    offset = points - images
    best = points
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        candidates = images + offset * middle.reshape(-1, *[1] * (images.dim() - 1))
        success = flipped(candidates)
        best = _where(success & good, candidates, best)
        high, low = torch.where(success, middle, high), torch.where(success, low, middle)
    infinite = torch.full_like(high, torch.inf)
    distance = Ball(images, torch.zeros_like(high), norm).distance(best)
    return _where(good, best, images), torch.where(good, distance, infinite)
