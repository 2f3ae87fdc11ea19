"""Bounds through every operation and activation hold what is seen in the ball, by every method and in every norm."""

from __future__ import annotations

import pytest
import torch

from grood_cert.ball import Ball
from grood_cert.bounds import backward
from grood_cert.bounds.alpha_crown import optimised_bounds
from grood_cert.bounds.branching import branch_and_bound
from grood_cert.bounds.engine import METHODS, way_of
from grood_cert.bounds.folding import folded
from grood_cert.bounds.hidden import DEFAULT_MEMORY, Hidden, logit_rows, preactivations
from grood_cert.networks.activations import LeakyReLU
from grood_cert.networks.operations import Pad
from grood_cert.scores import energy
from tests.networks.layered import ACTIVATIONS, CLASSES, NAMES, SHAPE, build

EPS = {"linf": 0.06, "l2": 0.4, "l1": 1.0}
SCORED = (
    *("pad", "selection", "upsampling", "transposed", "dilated max pool", "max pool in ceil mode", "dense block"),
    *("gelu", "silu", "hardswish", "steep elu"),
)
ROWS = logit_rows(CLASSES)


def ball_of(norm, batch=3, scale=1.0):
    images = torch.rand(batch, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    images[0, :, :2] = images[0, :, :2].round()  # touches the walls of the box
    return Ball(images, scale * EPS[norm] * torch.linspace(0.3, 1, batch, dtype=torch.float64), norm)


def points_of(ball, count=60):
    """Inside the ball and on its vertices, shape (count, B, C, H, W)."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for turn in range(count):
        noise = torch.randn(ball.center.shape, dtype=torch.float64, generator=generator)
        if ball.norm == "linf":
            noise = noise.sign() if turn % 2 else noise / 3
        elif ball.norm == "l2":
            noise = noise / ball.per_pixel(noise.flatten(1).norm(dim=1))
        else:
            spike = torch.zeros_like(noise).flatten(1)
            spike.scatter_(1, noise.flatten(1).abs().argmax(1, keepdim=True), 1.0)
            noise = spike.reshape(noise.shape) * noise.sign()
        found.append(ball.project(ball.center + ball.per_pixel(ball.eps) * noise))
    return torch.stack(found)


def climbed(function, ball, steps=6):
    """Points where a function of images, (B, C, H, W) to (B,), is large."""
    points = ball.center
    for _ in range(steps):
        points = points.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(function(points).sum(), points)
        step = (
            gradient.sign()
            if ball.norm == "linf"
            else gradient / (1e-30 + ball.per_pixel(gradient.flatten(1).norm(dim=1)))
        )
        points = ball.project(points.detach() + 0.4 * ball.per_pixel(ball.eps) * step)
    return points.detach()


def seen_of(graph, ball):
    """Smallest and largest product of the logits with `ROWS` that is met in the ball."""
    rows, count = torch.cat([ROWS, -ROWS]), len(ball.center)
    many = Ball(ball.center.repeat(len(rows), 1, 1, 1), ball.eps.repeat(len(rows)), ball.norm)
    wanted = rows.repeat_interleave(count, 0)
    reached = climbed(lambda images: (graph(images) * wanted).sum(1), many)
    values = graph(torch.cat([points_of(ball).flatten(0, 1), reached])) @ ROWS.T
    values = values.reshape(-1, count, len(ROWS))
    return values.amin(0), values.amax(0)


def bounds_of(graph, ball, method):
    """Bounds of the rows as the native engine makes them."""
    small = folded(graph)
    hidden = Hidden(small, ball, way_of(method).hidden)
    closed = {number: hidden.intervals[number] for number in small.nonlinear} if method == "ibp" else None
    rows = ROWS.expand(len(ball.center), -1, -1)
    assert bool(hidden.proved.all())
    return hidden.relaxed.linear(len(small.nodes) - 1, rows, DEFAULT_MEMORY, closed)


@pytest.mark.parametrize("name", NAMES)
def test_bounds_hold_what_is_seen_in_the_ball(name):
    graph = build(name)
    torch.testing.assert_close(folded(graph)(ball_of("linf").center), graph(ball_of("linf").center))
    for norm in EPS:
        ball = ball_of(norm)
        low, high = seen_of(graph, ball)
        widths = {}
        for method in METHODS:
            lower, upper = bounds_of(graph, ball, method)
            assert bool((lower <= low + 1e-9).all() and (high <= upper + 1e-9).all()), (norm, method)
            widths[method] = float((upper - lower).sum())
        assert widths["crown"] < widths["crown-ibp"] * 1.02 and widths["crown"] < widths["ibp"]
        assert widths["crown"] < 20 * float((high - low).sum())  # and are worth something
    point = ball_of("linf", scale=0.0)
    value = graph(point.center) @ ROWS.T
    for method in METHODS:
        lower, upper = bounds_of(graph, point, method)
        torch.testing.assert_close(lower, value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(upper, value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["pad", "pad and cut", "dense block", "inception", "average pool", "scale of columns"])
@pytest.mark.parametrize("norm", EPS)
def test_rows_over_windows_and_over_whole_layers_are_the_same(name, norm, monkeypatch):
    graph, ball = build(name), ball_of(norm)
    narrow, used = bounds_of(graph, ball, "crown"), []
    kept = backward.windows
    monkeypatch.setattr(backward, "windows", lambda *arguments: used.append(kept(*arguments)))
    wide = bounds_of(graph, ball, "crown")
    assert any(found is not None for found in used)
    for one, other in zip(narrow, wide, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_transpose_that_forgets_a_margin_is_seen(monkeypatch):
    graph, ball = build("pad and cut"), ball_of("linf")
    low, high = seen_of(graph, ball)
    right = Pad.transpose
    monkeypatch.setattr(Pad, "transpose", lambda pad, values: right(pad, values).roll(1, -1))
    lower, upper = bounds_of(graph, ball, "crown-ibp")
    assert not bool((lower <= low + 1e-9).all() and (high <= upper + 1e-9).all())


@pytest.mark.parametrize("name", SCORED)
def test_optimised_and_branched_bounds_of_the_score_hold(name):
    graph, ball = build(name), ball_of(("linf", "l2")[len(name) % 2], batch=2)
    points = [*points_of(ball, 30)]
    points += [climbed(lambda images, sign=sign: sign * energy(graph(images)), ball) for sign in (1, -1)]
    scores = torch.stack([energy(graph(batch)) for batch in points])
    hidden = preactivations(graph, ball)
    for side, sign in (("upper", 1), ("lower", -1)):
        worst = (sign * scores).amax(0)
        plain, better = (sign * optimised_bounds(graph, ball, side, hidden, steps) for steps in (0, 2))
        assert bool((worst <= better + 1e-9).all() and (better <= plain + 1e-9).all())
        if all(isinstance(graph.nodes[i].operation, LeakyReLU) for i in graph.nonlinear):
            gamma = float(sign * (0.5 * worst + 0.5 * plain).mean())
            found = branch_and_bound(graph, ball, gamma, side, nodes=4, steps=1)
            assert bool((worst <= sign * found.bound + 1e-9).all())
            assert not bool((found.decided & (worst >= sign * gamma)).any())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_linear_bounds_are_tighter_than_intervals_for_every_activation(name):
    graph, ball = build(name), ball_of("linf")
    lower, upper = bounds_of(graph, ball, "crown-ibp")
    low, high = bounds_of(graph, ball, "ibp")
    assert float((upper - lower).sum()) < float((high - low).sum())


def test_data_that_only_moves_keeps_its_bounds_exactly():
    graph = build("pad and cut")
    ball = ball_of("linf")
    hidden = Hidden(graph, ball, "ibp")
    number = next(i for i, node in enumerate(graph.nodes) if isinstance(node.operation, Pad))
    pad, read = graph.nodes[number].operation, hidden.intervals[graph.nodes[number].inputs[0]]
    for got, end in zip(hidden.intervals[number], read, strict=True):
        assert torch.equal(got, pad(end))
