"""Every oracle against brute force: dense grids of points, and results by hand."""

import math

import pytest
import torch
from torch import nn

from grood_cert.ball import Ball
from grood_cert.networks.capture import capture
from grood_cert.scores import MSP, Energy, MaxLogit
from tests.soundness.balls import pulled_in, random_balls, within
from tests.soundness.exact import truths
from tests.soundness.networks import FAMILY, Dice, random_network

SCORES = Energy(), Energy(0.1), MaxLogit(), MSP()


def dense(ball, count=4000):
    """Many points of each ball."""
    dice = Dice("dense")
    offsets = dice.uniform(count, *ball.center.shape) * 2.4 - 1.2
    return pulled_in(ball, ball.center + offsets * ball.per_pixel(ball.eps))


def found_by(oracle, graph, ball, score):
    return next((truth for truth in truths(graph, ball, score, True) if truth.oracle == oracle), None)


@pytest.mark.parametrize(
    ("oracle", "profile", "scores"),
    [
        ("closed form", "linear", (Energy(), MaxLogit())),
        ("line", "line", SCORES),
        ("arrangement", "one hidden layer", SCORES),
        ("MILP", "few units", (MaxLogit(),)),
    ],
)
def test_no_point_lies_beyond(oracle, profile, scores):
    compared = exact = 0
    for number in range(60):
        made = random_network(5, FAMILY * number, profile)
        if profile == "linear" and made.network(torch.zeros(1, *made.shape).double()).shape[1] > 1:
            continue
        graph = capture(made.network, made.shape)
        ball = random_balls(Dice("exact", number), made.shape, 3)
        score = scores[number % len(scores)]
        truth = found_by(oracle, graph, ball, score)
        if truth is None:
            continue
        compared += 1
        points = pulled_in(ball, truth.points)
        assert bool(within(ball, points).all())
        grid = score.value(graph(dense(ball).flatten(0, 1))).reshape(-1, 3)
        attained = score.value(graph(points.flatten(0, 1))).reshape(-1, 3)
        slack = 1e-5 * (1 + grid.abs().amax())  # HiGHS keeps each constraint to 1e-6
        for smallest, largest, low, high, least, most in zip(
            truth.smallest, truth.largest, grid.amin(0), grid.amax(0), attained.amin(0), attained.amax(0), strict=True
        ):
            if math.isfinite(smallest):
                assert smallest <= low + slack, made.name
                assert least == pytest.approx(float(smallest), abs=float(slack))
                exact += 1
            if math.isfinite(largest):
                assert largest >= high - slack, made.name
                assert most == pytest.approx(float(largest), abs=float(slack))
                exact += 1
        if compared == 6:
            break
    assert compared == 6
    assert exact >= 12


def tent():
    """One pixel, one logit: |x - 1/2|."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double().requires_grad_(False)
    network[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    network[1].bias.copy_(torch.tensor([-0.5, 0.5]))
    network[3].weight.fill_(1.0)
    network[3].bias.zero_()
    return capture(network.eval(), (1, 1, 1))


def test_by_hand():
    ball = Ball(torch.full((1, 1, 1, 1), 0.625).double(), 0.25, "linf")
    for oracle in ("line", "arrangement", "MILP"):
        truth = found_by(oracle, tent(), ball, MaxLogit())
        assert float(truth.smallest) == pytest.approx(-0.375), oracle
        assert float(truth.largest) == pytest.approx(0.0, abs=1e-12), oracle


def test_a_ball_of_radius_zero_is_left_to_points():
    ball = Ball(torch.full((1, 1, 1, 1), 0.5).double(), 0.0, "linf")
    assert found_by("arrangement", tent(), ball, Energy()) is None
