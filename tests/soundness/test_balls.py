"""Points lie where they are said to lie, and the search finds what there is to find."""

import pytest
import torch
from torch import nn

from grood_cert.ball import Ball
from grood_cert.scores import MSP, Energy, MaxLogit
from tests.soundness.balls import NORMS, extreme_points, pulled_in, random_balls, random_points, within
from tests.soundness.networks import Dice


@pytest.mark.parametrize("norm", NORMS)
def test_points_are_inside(norm):
    for seed in range(20):
        dice = Dice(seed)
        ball = random_balls(dice, (2, 2, 3), 6, norm)
        points = random_points(dice, ball, 8)
        assert bool(within(ball, points).all())
        assert torch.equal(points[0], ball.center)


@pytest.mark.parametrize("norm", NORMS)
def test_boundary_and_corners_are_reached(norm):
    dice = Dice(1)
    ball = Ball(torch.full((1, 1, 2, 2), 0.5).double(), 0.25, norm)
    away = ball.distance(random_points(dice, ball, 20).flatten(0, 1).expand(-1, 1, 2, 2))
    assert float(away.amax()) == pytest.approx(0.25)
    assert 0 < float(away[away > 0].amin()) < 0.24


@pytest.mark.parametrize("eps", [1e-12, 1e-9, 1e-4, 0.3, 1.0])
@pytest.mark.parametrize("norm", NORMS)
def test_points_of_the_boundary_stay_there(norm, eps):
    dice = Dice(3)
    ball = Ball(dice.uniform(5, 1, 2, 2), eps, norm)
    offsets = dice.normal(50, 5, 1, 2, 2)
    away = ball.distance(pulled_in(ball, ball.center + 8 * eps * offsets).flatten(0, 1).unflatten(0, (50, 5))[0])
    room = ball.distance((ball.center + 8 * eps * offsets[0]).clamp(0, 1))
    assert bool((away >= torch.minimum(room, ball.eps) - 1e-14).all())


@pytest.mark.parametrize("score", [Energy(), MaxLogit(), MSP()], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_the_search_reaches_the_ends_of_a_linear_network(norm, score):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double().eval().requires_grad_(False)
    network[1].weight.copy_(torch.tensor([[1.0, -2.0, 0.5, 3.0], [-1.0, 2.0, -0.5, -3.0]]))
    network[1].bias.copy_(torch.tensor([5.0, -5.0]))
    dice = Dice(2)
    ball = Ball(torch.full((1, 1, 2, 2), 0.5).double(), 0.25, norm)
    points = extreme_points(dice, ball, network, score, random_points(dice, ball, 4))
    assert bool(within(ball, points).all())
    found = network(points.flatten(0, 1))[:, 0]
    at_center = float(network(ball.center)[0, 0])
    gain = 0.25 * {"linf": 6.5, "l2": 14.25**0.5, "l1": 3.0}[norm]
    assert float(found.amax()) == pytest.approx(at_center + gain, rel=1e-3)
    assert float(found.amin()) == pytest.approx(at_center - gain, rel=1e-3)
