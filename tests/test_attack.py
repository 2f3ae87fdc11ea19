from __future__ import annotations

import pytest
import torch
from scipy.optimize import brentq
from torch import nn

from grood_cert import attack, networks
from grood_cert.ball import Ball
from grood_cert.energy import energy


def generator():
    return torch.Generator().manual_seed(0)


def linear(weight, bias):
    layer = nn.Linear(len(weight), 1)
    with torch.no_grad():
        layer.weight.copy_(weight[None])
        layer.bias.fill_(bias)
    return nn.Sequential(nn.Flatten(), layer).double().requires_grad_(False)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("side", ["id", "ood"])
def test_minimum_norm_of_one_linear_logit(norm, side):
    """S = -(w.x + b) and no face of the pixel box in reach: the nearest flip lies at |S - gamma| / ||w||_q."""
    weight = torch.tensor([0.7, -0.4, 0.2, 0.9]).double()
    images = 0.5 + 0.05 * torch.rand(6, 1, 2, 2, generator=generator()).double()
    network = linear(weight, 0.1)
    score = energy(network(images)).detach()
    gamma = float(score.max() + 0.05 if side == "id" else score.min() - 0.05)
    found = attack.minimum_norm(network, images, gamma, norm, generator())
    exact = (score - gamma).abs() / weight.norm(p={"linf": 1, "l2": 2, "l1": torch.inf}[norm])
    assert bool((found.radius >= exact * (1 - 1e-9)).all())
    torch.testing.assert_close(found.radius, exact, rtol=1e-6 if norm == "linf" else 1e-3, atol=0)


def test_minimum_norm_against_the_faces_of_the_pixel_box():
    """Pixels at 0 and 1 can move one way only; the exact l_inf distance is the root of a monotone function."""
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    image = torch.tensor([1.0, 0.0, 0.6, 0.95]).double().reshape(1, 1, 2, 2)
    network = linear(weight, 0.0)
    score = float(energy(network(image)))
    gamma = score - 0.3

    def lowest(eps):  # S falls where w.x rises
        flat = image.flatten()
        best = torch.where(weight > 0, (flat + eps).clamp(max=1), (flat - eps).clamp(min=0))
        return -float(weight @ best) - gamma

    # All gain in the box: x_0 and x_1 sit at their best already, x_2 gains 0.2, x_3 gains 0.15.
    exact = brentq(lowest, 0, 1)
    assert exact > 0.3 / float(weight.abs().sum()) * 1.5
    found = attack.minimum_norm(network, image, gamma, "linf", generator())
    assert float(found.radius) == pytest.approx(exact, rel=1e-3)


def test_nothing_to_find_is_an_infinite_radius():
    network = linear(torch.tensor([0.1, 0.1, 0.1, 0.1]).double(), 0.0)
    images = torch.full((2, 1, 2, 2), 0.5).double()
    found = attack.minimum_norm(network, images, -50.0, "linf", generator(), rounds=3)
    assert bool(torch.isinf(found.radius).all())
    assert torch.equal(found.points, images)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return networks.build("conv-small", (1, 8, 8), 5, [0.3], [0.3], width=4).double().eval()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_points_are_witnesses(network, norm):
    """Whatever is returned lies at its stated distance, in the pixel box, and has the other decision."""
    images = torch.rand(20, 1, 8, 8, generator=generator()).double()
    score = energy(network(images)).detach()
    gamma = float(score.median())
    found = attack.minimum_norm(network, images, gamma, norm, generator())
    assert bool(torch.isfinite(found.radius).any())
    hit = torch.isfinite(found.radius)
    points = found.points[hit]
    offset = (points - images[hit]).flatten(1)
    distance = torch.linalg.vector_norm(offset, ord={"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1)
    torch.testing.assert_close(distance, found.radius[hit], rtol=1e-12, atol=0)
    assert bool(((points >= 0) & (points <= 1)).all())
    flipped = (energy(network(points)) <= gamma) != (score[hit] <= gamma)
    assert bool(flipped.all())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_extremes_stay_in_the_ball_and_beat_random_search(network, norm):
    images = torch.rand(5, 1, 8, 8, generator=generator()).double()
    eps = torch.full((5,), {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm]).double()
    ball = Ball(images, eps, norm)
    seen = attack.extremes(network, ball, generator(), images, images)
    for points, value in ((seen.argmin, seen.minimum), (seen.argmax, seen.maximum)):
        assert bool((ball.distance(points) <= eps * (1 + 1e-12)).all())
        assert bool(((points >= 0) & (points <= 1)).all())
        torch.testing.assert_close(energy(network(points)).detach(), value, rtol=1e-12, atol=1e-12)
    for index in range(200):
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(index)).double() * 2 - 1
        if norm != "linf":
            noise = noise / noise.flatten(1).norm(p={"l2": 2, "l1": 1}[norm], dim=1).reshape(-1, 1, 1, 1)
        score = energy(network((images + ball.per_pixel(eps) * noise).clamp(0, 1))).detach()
        assert bool((seen.minimum <= score).all()) and bool((score <= seen.maximum).all())


def test_extremes_of_a_linear_score_are_exact():
    weight = torch.tensor([0.7, -0.4, 0.2, 0.9]).double()
    images = torch.full((3, 1, 2, 2), 0.5).double()
    ball = Ball(images, torch.tensor([0.0, 0.1, 0.4]).double(), "linf")
    seen = attack.extremes(linear(weight, 0.0), ball, generator(), images, images)
    center = -0.5 * float(weight.sum())
    move = ball.eps * weight.abs().sum()
    torch.testing.assert_close(seen.maximum, center + move)
    torch.testing.assert_close(seen.minimum, center - move)


def test_the_attack_is_seeded(network):
    images = torch.rand(4, 1, 8, 8, generator=generator()).double()
    first, second = (attack.minimum_norm(network, images, -1.7, "linf", generator(), rounds=4) for _ in range(2))
    assert torch.equal(first.radius, second.radius) and torch.equal(first.points, second.points)
