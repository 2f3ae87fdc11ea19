"""Estimates against closed forms; they stay inside the ball and below the proofs."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from grood_cert.ball import Ball
from grood_cert.errors import InputError
from grood_cert.lipschitz.bound import local_lipschitz
from grood_cert.lipschitz.clever import clever_estimate, clever_radius_estimate, reverse_weibull_end_point
from grood_cert.lipschitz.estimates import (
    ascended_gradient_norm_estimate,
    gradient_norm_estimate,
    sampled_gradient_norm_estimate,
    secant_estimate,
    uniform_in_ball,
)
from grood_cert.networks.capture import capture

NORMS = ("linf", "l2", "l1")


def ball_of(images, eps, norm):
    eps = torch.full((len(images),), eps, dtype=torch.float64)
    return Ball(images, eps, norm)


def two_logits(size, weight):
    """f = (w . x, 0): S' = -sigmoid(w . x) w, so the constant has a closed form."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(size, 2)).double().eval().requires_grad_(False)
    network[1].weight[0], network[1].weight[1], network[1].bias[:] = weight, 0.0, 0.0
    return capture(network, (1, 1, size))


@pytest.mark.parametrize("norm", NORMS)
def test_ascent_finds_the_closed_form_and_the_others_stay_below(norm):
    generator = torch.Generator().manual_seed(0)
    weight = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    graph, images = two_logits(3, weight), torch.full((2, 1, 1, 3), 0.5, dtype=torch.float64)
    ball = ball_of(images, 0.2, norm)
    length = {"linf": 3.5, "l2": float(weight.norm()), "l1": 2.0}[norm]  # dual norm of w
    exact = length / (1 + math.exp(-(0.75 + 0.2 * length)))
    found, point = ascended_gradient_norm_estimate(graph, ball, generator)
    assert bool((ball.distance(point) <= 0.2 + 1e-12).all())
    assert found.tolist() == pytest.approx([exact, exact], rel=1e-3)
    assert bool((found <= exact * (1 + 1e-12)).all())
    sampled = sampled_gradient_norm_estimate(graph, ball, 50, generator)
    assert bool((gradient_norm_estimate(graph, ball) <= sampled).all() and (sampled <= exact).all())
    secant = secant_estimate(graph, ball, torch.stack([point, images]))  # the point x itself counts 0
    assert bool((secant > 0.9 * found).all() and (secant <= exact).all())
    for bound in local_lipschitz(graph, ball).methods.values():
        assert bool((bound >= exact * (1 - 1e-12)).all())


def test_the_secant_of_a_ball_too_small_to_be_seen_is_no_slope():
    """Between points that float64 hardly tells apart the difference of S is its rounding, which no bound covers."""
    weight = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    graph, images = two_logits(3, weight), torch.full((1, 1, 1, 3), 0.5, dtype=torch.float64)
    for eps in (1e-300, 1e-16, 1e-13, 1e-9):
        ball = ball_of(images, eps, "linf")
        points = uniform_in_ball(ball, 200, torch.Generator().manual_seed(0))
        secant = secant_estimate(graph, ball, points)
        assert bool((secant <= local_lipschitz(graph, ball).auto * (1 + 1e-9)).all())


def test_ascent_crosses_kinks_that_a_gradient_does_not_see():
    # f = relu(x - .6): S is flat at the centre; only a point beyond the kink shows the slope
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double().eval()
    network.requires_grad_(False)
    network[1].weight[:], network[1].bias[:], network[3].weight[:] = 1.0, -0.599, 5.0
    graph = capture(network, (1, 1, 1))
    ball = ball_of(torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), 0.1, "linf")
    assert gradient_norm_estimate(graph, ball).item() == 0.0
    assert ascended_gradient_norm_estimate(graph, ball, torch.Generator().manual_seed(0))[0].item() == 5.0


@pytest.mark.parametrize("norm", NORMS)
def test_uniform_points_have_the_right_radial_law_and_stay_in_box_and_ball(norm):
    generator = torch.Generator().manual_seed(0)
    inner = ball_of(torch.full((1, 1, 1, 4), 0.5, dtype=torch.float64), 0.3, norm)
    points = uniform_in_ball(inner, 4000, generator)[:, 0]
    distance = torch.stack([inner.distance(point[None])[0] for point in points]).numpy()
    # ||x' - x|| / eps has the law of U^(1/d) in every norm
    assert stats.kstest((distance / 0.3) ** 4, "uniform").pvalue > 1e-5
    assert abs(points.mean() - 0.5) < 0.01
    edge = ball_of(torch.tensor([[[[0.0, 1.0, 0.5, 0.1]]]], dtype=torch.float64), 0.3, norm)
    for point in uniform_in_ball(edge, 200, generator):
        assert bool((point >= 0).all() and (point <= 1).all() and (edge.distance(point) <= 0.3 + 1e-12).all())


def test_l1_ball_support_is_the_linear_programme():
    from scipy.optimize import linprog

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        images = torch.rand(1, 1, 1, 4, generator=generator, dtype=torch.float64)
        ball = ball_of(images, 0.6, "l1")
        row = torch.randn(1, 1, 4, generator=generator, dtype=torch.float64)
        center = images.flatten().numpy()
        split = np.hstack([row[0, 0].numpy(), -row[0, 0].numpy()])  # x' - x = up - down
        bounds = [(0, 1 - c) for c in center] + [(0, c) for c in center]
        exact = -linprog(-split, A_ub=np.ones((1, 8)), b_ub=[0.6], bounds=bounds).fun
        assert float(ball.support(row)) == pytest.approx(exact, rel=1e-9)


def test_clever_recovers_a_known_end_point_and_is_seeded():
    sample = stats.weibull_max.rvs(2.5, loc=7.0, scale=2.0, size=500, random_state=1)
    end, p_value, fitted = reverse_weibull_end_point(sample)
    assert fitted
    assert end == pytest.approx(7.0, rel=0.03)
    assert p_value > 0.01
    weight = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    graph, images = two_logits(3, weight), torch.full((2, 1, 1, 3), 0.5, dtype=torch.float64)
    ball = ball_of(images, 0.2, "linf")
    first = clever_estimate(graph, ball, torch.Generator().manual_seed(3), 40, 64)
    again = clever_estimate(graph, ball, torch.Generator().manual_seed(3), 40, 64)
    assert torch.equal(first.lipschitz_estimate, again.lipschitz_estimate)
    exact = 3.5 / (1 + math.exp(-(0.75 + 0.2 * 3.5)))
    assert bool(first.fitted.all())
    assert bool((first.lipschitz_estimate >= first.sample_maximum_estimate).all())
    assert first.lipschitz_estimate.tolist() == pytest.approx([exact, exact], rel=0.05)


@pytest.mark.parametrize("maxima", [np.full(50, 3.0), np.array([1.0]), np.array([0.0, 0.0]), np.array([1.0, np.inf])])
def test_clever_falls_back_to_the_sample_maximum_and_says_so(maxima):
    end, p_value, fitted = reverse_weibull_end_point(maxima)
    assert not fitted
    assert end == maxima.max()
    assert np.isnan(p_value)


def test_clever_fit_never_falls_below_the_sample():
    generator = np.random.default_rng(0)
    for _ in range(20):
        maxima = generator.choice([generator.normal(size=60), generator.exponential(size=60), generator.pareto(1, 60)])
        end, _, _ = reverse_weibull_end_point(maxima)
        assert end >= maxima.max()
        assert np.isfinite(end)


def test_clever_radius_grows_with_the_ball():
    graph = two_logits(3, torch.tensor([0.02, -0.01, 0.005], dtype=torch.float64))
    ball = ball_of(torch.full((1, 1, 1, 3), 0.5, dtype=torch.float64), 0.01, "linf")
    margin = torch.tensor([1e-3], dtype=torch.float64)
    radius = clever_radius_estimate(graph, ball, margin, torch.Generator().manual_seed(0), doublings=4, batches=10)
    # slope about .5 * .035, so m / L is about .057: beyond the first ball, inside 16 times it
    assert radius.item() == pytest.approx(1e-3 / (0.035 * 0.5), rel=0.03)
    with pytest.raises(InputError, match="batch"):
        clever_estimate(graph, ball, torch.Generator(), 0, 10)
