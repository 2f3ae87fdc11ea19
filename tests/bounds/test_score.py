from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grood_cert import attacks
from grood_cert.ball import Ball
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.engine import METHODS
from grood_cert.bounds.score import chord_lower, chord_slopes, gibbs_upper, score_bounds
from grood_cert.networks import architectures
from grood_cert.networks.capture import capture
from grood_cert.scores import energy

# Linear networks have nothing to optimise, and auto_LiRPA 0.3 cannot optimise residual ones: it says so and goes on.


def ball_around(images, eps, norm="linf"):
    return Ball(images, torch.full((len(images),), float(eps), dtype=images.dtype), norm)


def linear(weight, bias):
    """A linear f on images of shape (1, 1, d)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return nn.Sequential(nn.Flatten(), layer).double().eval()


def random_network(name, seed, scale=1.0, classes=4, **options):
    torch.manual_seed(seed)
    network = architectures.build(name, (1, 6, 6), classes, [0.4], [0.3], **options).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale)
    return network


# What is not a bound


class _Engine:
    """A bound engine that answers what it is told."""

    method = "crown"

    def __init__(self, network, lower, upper):
        self.network, self.graph, self.answer = network, capture(network, (1, 1, 2)), (lower, upper)

    def relax(self, ball):
        return self

    def rows(self, coefficients, method=None):
        shape = coefficients.shape[:2]
        return tuple(torch.as_tensor(value, dtype=torch.float64).expand(shape).clone() for value in self.answer)


@pytest.mark.parametrize(
    "answer", [(torch.nan, 1.0), (0.0, torch.nan), (-torch.inf, 1.0), (0.0, torch.inf), (1.0, 0.0)]
)
def test_nan_infinite_or_crossed_answers_prove_nothing(answer):
    network = linear(torch.eye(2), torch.zeros(2))
    bounds = score_bounds(_Engine(network, *answer), ball_around(torch.full((3, 1, 1, 2), 0.5).double(), 0.1))
    for value in vars(bounds).values():
        assert bool(torch.isnan(value).all())
        assert not bool((value < 1e9).any()) and not bool((value > -1e9).any())


def test_joint_bounds_that_contradict_the_logits_prove_nothing():
    """Each logit lies in [0, 1], so no mean of them in [50, 60]: S_ub < S_lb, and nothing holds."""

    class Contradictory(_Engine):
        def rows(self, coefficients, method=None):
            unit = coefficients.eq(1).any(2)
            return tuple(
                torch.where(unit, single, joint).double()
                for single, joint in zip((0.0, 1.0), (50.0, 60.0), strict=True)
            )

    network = linear(torch.eye(2), torch.zeros(2))
    bounds = score_bounds(Contradictory(network, 0.0, 1.0), ball_around(torch.full((1, 1, 1, 2), 0.5).double(), 0.1))
    assert all(bool(torch.isnan(value).all()) for value in vars(bounds).values())


# The formulas alone, on boxes of logits


@given(
    seed=st.integers(0, 10**6),
    classes=st.sampled_from([1, 2, 3, 10]),
    scale=st.sampled_from([1e-9, 1e-3, 1.0, 30.0, 1e3]),
    center=st.sampled_from([0.0, 5.0, -40.0, 95.0, -1e3, 1e3]),
    degenerate=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_formulas_hold_on_every_point_of_a_box_of_logits(seed, classes, scale, center, degenerate):
    generator = torch.Generator().manual_seed(seed)
    lower = center + scale * torch.randn(classes, generator=generator, dtype=torch.float64)
    width = scale * torch.rand(classes, generator=generator, dtype=torch.float64)
    if degenerate:
        width[torch.rand(classes, generator=generator) < 0.5] = 0
    upper = lower + width
    slopes = chord_slopes(lower, upper)
    weights = torch.softmax(torch.randn(classes, generator=generator, dtype=torch.float64), -1)
    lowest = chord_lower((slopes * upper).sum(), slopes, upper)
    highest = gibbs_upper((weights * lower).sum(), weights)
    points = lower + width * torch.rand(200, classes, generator=generator, dtype=torch.float64)
    corners = torch.stack([lower, upper, *(torch.where(torch.rand(classes) < 0.5, lower, upper) for _ in range(20))])
    score = energy(torch.cat([points, corners]))
    slack = 1e-9 * (1 + upper.abs().max())
    assert bool((lowest <= score + slack).all()) and bool((score <= highest + slack).all())
    # On a box UB[kappa] = kappa . u, so the chords give L0 itself: nothing was dropped.
    assert lowest == pytest.approx(float(energy(upper)), rel=1e-9, abs=1e-9)


def test_the_chord_is_sharper_than_the_box_when_logits_move_together():
    """z = (t, -t), t in [-1, 1]: the chord row is constant, so L1 = -log(2 cosh 1) where L0 = -log(2 e)."""
    lower, upper = torch.tensor([-1.0, -1.0]).double(), torch.tensor([1.0, 1.0]).double()
    slopes = chord_slopes(lower, upper)
    assert float(chord_lower(torch.zeros(()).double(), slopes, upper)) == pytest.approx(
        -float(torch.tensor(2.0).log() + torch.cosh(torch.tensor(1.0)).log()), abs=1e-6
    )


# Closed forms


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_one_linear_logit_is_exact(method, norm):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 9, generator=generator).double()
    network = linear(weight, torch.tensor([0.3]))
    images = 0.3 + 0.4 * torch.rand(5, 1, 3, 3, generator=generator).double()
    eps = 0.05
    bounds = score_bounds(LirpaNetwork(network, (1, 3, 3), method), ball_around(images, eps, norm))
    score = -(images.flatten(1) @ weight.double().T).squeeze(1) - network[1].bias
    move = eps * weight.double().norm(p={"linf": 1, "l2": 2, "l1": torch.inf}[norm])
    if method == "ibp" and norm != "linf":  # interval propagation only knows the box around the ball
        move = eps * weight.double().norm(p=1)
        assert bool((bounds.upper <= score + move + 1e-9).all())
    else:
        torch.testing.assert_close(bounds.upper, score + move, rtol=0, atol=1e-9)
        torch.testing.assert_close(bounds.lower, score - move, rtol=0, atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 100.0, -100.0, 700.0, -700.0])
def test_large_logits_neither_overflow_nor_clip(offset):
    """Two opposite linear logits a + w.x, a - w.x: S = -a - log(2 cosh(w.x)), known on the whole ball.

    Covers logits above 88 (exp overflows in float32 and in a composed graph) and S above 27.6 (a clamped logarithm).
    """
    weight = torch.tensor([[2.0, -1.0]]).double()
    network = linear(torch.cat([weight, -weight]), torch.tensor([offset, offset]))
    images = torch.tensor([[[[0.5, 0.5]]]]).double()
    bounds = score_bounds(LirpaNetwork(network, (1, 1, 2), "crown"), ball_around(images, 0.1))
    low, high = 0.5 - 0.3, 0.5 + 0.3  # w . x at the centre, and eps ||w||_1
    exact_upper = -offset - torch.log(2 * torch.cosh(torch.tensor(low, dtype=torch.float64)))
    exact_lower = -offset - torch.log(2 * torch.cosh(torch.tensor(high, dtype=torch.float64)))
    assert bounds.upper.item() >= exact_upper.item() - 1e-9
    assert bounds.lower.item() <= exact_lower.item() + 1e-9
    assert bounds.upper.item() == pytest.approx(exact_upper.item(), abs=0.05)
    assert bounds.lower.item() == pytest.approx(exact_lower.item(), abs=0.05)


def exact_extremes(network, images, eps, points=4001):
    """Extremes of S for one pixel: a fine grid of a function whose slope is bounded, per image."""
    t = torch.linspace(-eps, eps, points, dtype=torch.float64)
    grid = (images.reshape(-1, 1) + t).clamp(0, 1)
    with torch.no_grad():
        score = torch.stack([energy(network(row.reshape(-1, 1, 1, 1))) for row in grid])
    return score.amin(1), score.amax(1)


@pytest.mark.parametrize("method", METHODS)
def test_one_dimensional_networks_against_a_fine_grid(method):
    """Everything an adversary can do with one pixel is on a grid; includes images at the edge of the box."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    images = torch.tensor([0.0, 0.02, 0.3, 0.5, 0.77, 1.0]).double().reshape(-1, 1, 1, 1)
    for eps in (0.0, 1e-9, 0.05, 0.3):
        bounds = score_bounds(LirpaNetwork(network, (1, 1, 1), method), ball_around(images, eps))
        minimum, maximum = exact_extremes(network, images, eps)
        assert bool((bounds.lower <= minimum).all()) and bool((maximum <= bounds.upper).all())
        if eps <= 1e-9:
            torch.testing.assert_close(bounds.lower, minimum, rtol=0, atol=1e-7)
            torch.testing.assert_close(bounds.upper, maximum, rtol=0, atol=1e-7)


# Adversaries


@functools.cache
def captured(name, seed, scale, *options):
    network = random_network(name, seed, scale, **dict(options))
    return network, capture(network, (1, 6, 6))


@functools.cache
def bounded_by_auto_lirpa(name, seed, scale, method, *options):
    network, graph = captured(name, seed, scale, *options)
    return LirpaNetwork(network, (1, 6, 6), method, graph=graph)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, method) for name in ("conv-small", "mlp") for method in METHODS), ("resnet18", "crown-ibp")],
)
def test_no_attacked_or_sampled_point_escapes(name, norm, method):
    options = {"conv-small": {"width": 4}, "mlp": {"width": 16}, "resnet18": {"width": 2}}[name]
    for seed, (scale, eps) in enumerate([(1.0, 0.05), (3.0, 0.02), (1e-3, 0.3)][: 1 if name == "resnet18" else 3]):
        network, _ = captured(name, seed, scale, *options.items())
        images = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(seed)).double().round(decimals=1)
        bounded = bounded_by_auto_lirpa(name, seed, scale, method, *options.items())
        ball = ball_around(images, eps, norm)
        bounds = score_bounds(bounded, ball)
        assert bool(torch.isfinite(bounds.lower).all()) and bool(torch.isfinite(bounds.upper).all())
        effort = attacks.AttackEffort(ascent=10, restarts=0, logits=1)
        (seen,) = attacks.extremes(network, [ball], torch.Generator().manual_seed(0), effort)
        assert bool((bounds.lower <= seen.minimum).all()) and bool((seen.maximum <= bounds.upper).all())
        assert bool((bounds.lower >= bounds.lower_per_logit).all())
        assert bool((bounds.upper <= bounds.upper_per_logit).all())


def test_vertices_of_small_balls_stay_inside():
    """All 2^9 vertices of an l_inf ball: where linear pieces dominate, extremes are vertices."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 3)).double().eval()
    image = torch.full((1, 1, 3, 3), 0.5).double()
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=9))).double().reshape(-1, 1, 3, 3)
    bounded = LirpaNetwork(network, (1, 3, 3), "crown")
    for eps in (0.01, 0.1, 0.5):
        bounds = score_bounds(bounded, ball_around(image, eps))
        with torch.no_grad():
            score = energy(network(image + eps * corners))
        assert bounds.lower.item() <= score.min().item() and score.max().item() <= bounds.upper.item()


def test_joint_bounds_gain_where_logits_share_their_movement():
    """A common mode a.x in every logit cancels nothing per logit, but one row sees it whole."""
    torch.manual_seed(1)
    weight = torch.randn(5, 9)
    network = linear(weight - weight.mean(0), torch.zeros(5))  # sum of the logits is constant
    image = torch.full((1, 1, 3, 3), 0.5).double()
    bounds = score_bounds(LirpaNetwork(network, (1, 3, 3), "crown"), ball_around(image, 0.1))
    score = energy(network(image)).item()
    assert bounds.upper.item() - score < 0.6 * (bounds.upper_per_logit.item() - score)


# Symmetries


def test_adding_a_constant_to_all_logits_shifts_the_bounds():
    network = random_network("mlp", 0, width=12)
    images = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    before = score_bounds(LirpaNetwork(network, (1, 6, 6), "crown"), ball_around(images, 0.05))
    with torch.no_grad():
        network[-1].bias.add_(7.0)
    after = score_bounds(LirpaNetwork(network, (1, 6, 6), "crown"), ball_around(images, 0.05))
    torch.testing.assert_close(after.lower, before.lower - 7, rtol=0, atol=1e-9)
    torch.testing.assert_close(after.upper, before.upper - 7, rtol=0, atol=1e-9)


def test_a_sample_is_bounded_alike_alone_and_in_a_batch():
    network = random_network("conv-small", 0, width=4)
    images = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    bounded = LirpaNetwork(network, (1, 6, 6), "crown")
    together = score_bounds(bounded, ball_around(images, 0.03))
    for index in range(6):
        alone = score_bounds(bounded, ball_around(images[index : index + 1], 0.03))
        torch.testing.assert_close(alone.upper, together.upper[index : index + 1], rtol=0, atol=1e-9)
        torch.testing.assert_close(alone.lower, together.lower[index : index + 1], rtol=0, atol=1e-9)
