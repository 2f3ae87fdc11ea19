r"""Lower estimates of the local Lipschitz constant L = ess sup over B of ||grad S||_q. None of them proves anything.

Each is the dual gradient norm, or the slope of a secant, at points that were looked at, so it lies below L (a gradient
on a kink, which autograd picks from the Clarke set, is the only exception, of measure zero). The strongest is the
maximum by ascent: it is what a formal bound is compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grood_cert.ball import Ball, Norm, dual_norm
from grood_cert.interval import ROUNDING
from grood_cert.networks.activations import Activation
from grood_cert.networks.graph import Graph
from grood_cert.scores import ENERGY, Score

_SOFTENINGS = (0.0, 0.3, 1.0)
_CHUNK = 4096


def uniform_in_ball(ball: Ball, count: int, generator: torch.Generator) -> Tensor:
    r"""Points uniform in the l_p ball, clipped to the pixel box.

    l_inf: uniform in the cube. l_2: a uniform direction times eps U^(1/d). l_1: signs times E_j / sum_{i <= d+1} E_i
    with E exponential. Clipping towards the box shrinks every coordinate of the offset, so the points stay inside.

    Args:
        ball: Batch of balls.
        count: Points a ball.
        generator: Random numbers.

    Returns:
        Shape (count, B, *image).
    """
    center = ball.center
    shape = (count, *center.shape)
    axes = tuple(range(2, len(shape)))
    size = center[0].numel()

    def draw(kind: str) -> Tensor:
        sample = torch.randn if kind == "normal" else torch.rand
        return sample(shape, generator=generator, dtype=center.dtype).to(center.device)

    norm = ball.norm
    if norm == "linf":
        offset = 2 * draw("uniform") - 1
    elif norm == "l2":
        offset = draw("normal")
        radius = torch.rand((count, len(center)), generator=generator, dtype=center.dtype).to(center.device) ** (
            1 / size
        )
        length = torch.linalg.vector_norm(offset.flatten(2), dim=2)
        offset = offset * (radius / length).reshape(count, len(center), *[1] * len(axes))
    else:
        weight = -torch.log1p(-draw("uniform"))
        last = -torch.log1p(-torch.rand((count, len(center)), generator=generator, dtype=center.dtype)).to(
            center.device
        )
        total = weight.sum(axes) + last
        offset = weight * (draw("normal")).sign() / total.reshape(count, len(center), *[1] * len(axes))
    return (center + offset * ball.per_pixel(ball.eps)).clamp(0, 1)


def _norms(graph: Graph, images: Tensor, norm: Norm, score: Score) -> Tensor:
    """||grad S||_q at each image, shape (N,)."""
    found = []
    for batch in images.split(_CHUNK):
        with torch.enable_grad():
            batch = batch.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(score.value(graph(batch)).sum(), batch)
        found.append(dual_norm(gradient.detach(), norm))
    return torch.cat(found)


def gradient_norm_estimate(graph: Graph, ball: Ball, score: Score = ENERGY) -> Tensor:
    r"""||grad S(x)||_q at the centre, shape (B,): the paper's "constant", a lower estimate."""
    return _norms(graph, ball.center, ball.norm, score)


def sampled_gradient_norm_estimate(
    graph: Graph, ball: Ball, count: int, generator: torch.Generator, score: Score = ENERGY
) -> Tensor:
    r"""Largest ||grad S||_q over the centre and `count` uniform points of each ball, shape (B,)."""
    best = gradient_norm_estimate(graph, ball, score)
    for points in uniform_in_ball(ball, count, generator).split(max(1, _CHUNK // len(best))):
        norms = _norms(graph, points.flatten(0, 1), ball.norm, score).reshape(len(points), -1)
        best = torch.maximum(best, norms.amax(0))
    return best


def secant_estimate(graph: Graph, ball: Ball, points: Tensor, score: Score = ENERGY) -> Tensor:
    r"""Largest |S(x') - S(x)| / ||x' - x||_p over given points of each ball, which lies below L on a convex set.

    What rounding may have added to the difference, 1e-12 (1 + |S(x)|), is taken off: between near points it is all there is.

    Args:
        graph: The network.
        ball: Batch of balls.
        points: Shape (count, B, *image); points equal to x count 0.
        score: S.

    Returns:
        Shape (B,).
    """
    with torch.no_grad():
        center = score.value(graph(ball.center))
        best = torch.zeros_like(center)
        for point in points:
            distance = ball.distance(point)
            risen = (score.value(graph(point)) - center).abs() - ROUNDING * (1 + center.abs())
            slope = risen.clamp(min=0) / distance
            best = torch.maximum(best, torch.where(distance > 0, slope, torch.zeros_like(slope)))
    return best


def _spread(graph: Graph, ball: Ball, generator: torch.Generator) -> dict[int, Tensor]:
    """How far each activation's input moves over a few random points of the ball (at corners for l_inf)."""
    points = uniform_in_ball(ball, 8, generator)
    if ball.norm == "linf":
        points = (ball.center + (points - ball.center).sign() * ball.per_pixel(ball.eps)).clamp(0, 1)
    with torch.no_grad():
        values = [graph.values(point) for point in points]
    found = {}
    for number in graph.nonlinear:
        if isinstance(graph.nodes[number].operation, Activation):
            inputs = torch.stack([value[graph.nodes[number].inputs[0]] for value in values])
            found[number] = (inputs.amax(0) - inputs.amin(0)).clamp(min=1e-12 * (1 + inputs.abs().amax(0)))
    return found


def _steepest(gradient: Tensor, norm: Norm, keep: int) -> Tensor:
    """A unit step of the ball's norm along which a linear function climbs: signs, direction, or a few pixels."""
    flat = gradient.flatten(1)
    if norm == "linf":
        move = flat.sign()
    elif norm == "l2":
        move = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp(min=1e-300)
    else:
        chosen = flat.abs().topk(min(keep, flat.shape[1]), dim=1).indices
        move = torch.zeros_like(flat).scatter(1, chosen, flat.gather(1, chosen).sign() / chosen.shape[1])
    return move.reshape(gradient.shape)


def ascended_gradient_norm_estimate(
    graph: Graph,
    ball: Ball,
    generator: torch.Generator,
    restarts: int = 4,
    steps: int = 30,
    score: Score = ENERGY,
) -> tuple[Tensor, Tensor]:
    r"""Largest ||grad S||_q found by ascent inside each ball: the reference for tightness.

    Inside a linear region of a ReLU network only the curvature of LSE shows in the gradient of ||grad S||; crossing a
    kink changes it in jumps that a gradient does not see. Ascent therefore follows the gradient of the dual norm of a
    *softened* network, whose kinks are smoothed over a multiple (0, 0.3, 1) of the distance that each pre-activation
    moves within the ball, and judges every point by the true network. It starts from the centre and from random
    points, and ends with random perturbations of the best point, kept when the true norm grows.

    Args:
        graph: The network.
        ball: Batch of balls.
        generator: Random numbers.
        restarts: Starting points for each softening.
        steps: Steps of each ascent, geometrically shrinking from eps / 2 to eps / 50; as many perturbations after.
        score: S.

    Returns:
        The largest norm, shape (B,), and the point, shape (B, *image).
    """
    norm = ball.norm
    best, argument = gradient_norm_estimate(graph, ball, score), ball.center.clone()

    def see(points: Tensor) -> None:
        nonlocal best, argument
        value = _norms(graph, points, norm, score)
        better = value > best
        best = torch.where(better, value, best)
        argument = torch.where(ball.per_pixel(better), points, argument)

    spread = _spread(graph, ball, generator)
    starts = [ball.center, *uniform_in_ball(ball, max(0, restarts - 1), generator)]
    for softening in _SOFTENINGS:
        for turn, start in enumerate([*starts, argument]):
            points = start
            for step in range(steps):
                with torch.enable_grad():
                    points = points.detach().requires_grad_(True)
                    width = None if softening == 0 else lambda number, _, scale=softening: scale * spread[number]
                    value = score.value(graph.values(points, width)[-1])
                    (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=True)
                    size = dual_norm(gradient, norm).sum()
                    uphill = (
                        torch.autograd.grad(size, points, allow_unused=True)[0]
                        if size.requires_grad
                        else torch.zeros_like(points)
                    )
                    uphill = torch.zeros_like(points) if uphill is None else torch.nan_to_num(uphill)
                move = _steepest(uphill.detach(), norm, keep=2 ** (turn % 4))
                length = ball.per_pixel(ball.eps) * 0.5 * 0.04 ** (step / max(1, steps - 1))
                points = ball.project(points.detach() + length * move)
                see(points)
    for step in range(steps):
        noise = uniform_in_ball(ball, 1, generator)[0] - ball.center
        if norm == "linf":
            share = 0.3 * 0.1 ** (step / max(1, steps - 1))
            flipped = torch.rand(noise.shape, generator=generator, dtype=noise.dtype).to(noise.device) < share
            wall = ball.center + noise.sign() * ball.per_pixel(ball.eps)
            see(ball.project(torch.where(flipped, wall, argument)))
        else:
            see(ball.project(argument + noise * 0.5 * 0.04 ** (step / max(1, steps - 1))))
    return best, argument
