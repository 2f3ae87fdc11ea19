"""Lipschitz bounds of any score lie above every slope that can be seen, and close to it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from grood_cert.ball import NORMS, Ball
from grood_cert.bounds.hidden import preactivations
from grood_cert.lipschitz.bound import _apart, local_lipschitz
from grood_cert.lipschitz.estimates import sampled_gradient_norm_estimate, secant_estimate, uniform_in_ball
from grood_cert.networks.capture import capture
from grood_cert.networks.graph import Graph
from grood_cert.scores import MSP, Energy, MaxLogit

SCORES = [Energy(0.5), Energy(10.0), MaxLogit(), MSP(0.5), MSP(1.0), MSP(10.0)]
SHAPE = (1, 2, 2)


def network(classes: int) -> nn.Sequential:
    torch.manual_seed(classes)
    layers = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, classes)
    built = nn.Sequential(nn.Flatten(), *layers).double().eval()
    with torch.no_grad():
        built[1].weight.mul_(3)
        built[5].weight.mul_(4)
    return built


@functools.cache
def captured(classes: int) -> tuple[nn.Sequential, Graph]:
    """A network and its graph, to be left as they are."""
    return network(classes), capture(network(classes), SHAPE)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [1, 2, 10])
@pytest.mark.parametrize("score", SCORES, ids=str)
def test_every_bound_lies_above_every_slope(score, classes, norm):
    (net, graph), generator = captured(classes), torch.Generator().manual_seed(0)
    images = torch.rand(2, *SHAPE, generator=generator).double()
    ball = Ball(images, {"linf": 0.05, "l2": 0.08, "l1": 0.15}[norm], norm)
    bounds = local_lipschitz(graph, ball, fixed_head=True, score=score)
    points = uniform_in_ball(ball, 100, generator)
    slope = sampled_gradient_norm_estimate(graph, ball, 200, generator, score)
    slope = torch.maximum(slope, secant_estimate(graph, ball, points, score))
    for name, bound in bounds.methods.items():
        assert bool((slope <= bound * (1 + 1e-9)).all()), name
    with torch.no_grad():
        rise = score.value(net(points.flatten(0, 1))).reshape(len(points), -1) - score.value(net(images))
    repeated = Ball(images.repeat(len(points), 1, 1, 1), ball.eps.repeat(len(points)), norm)
    distance = repeated.distance(points.flatten(0, 1)).reshape(rise.shape)
    assert bool((rise <= bounds.fixed_head * distance * (1 + 1e-9) + 1e-12).all())
    if norm == "linf":
        assert bool((bounds.auto <= 2 * slope + 1e-12).all()), "no looser than the largest slope seen by a factor of 2"


@pytest.mark.parametrize("score", [MaxLogit(), MSP(0.5)], ids=str)
def test_at_a_point_the_bound_is_the_gradient(score):
    net = network(4)
    images = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    graph, ball = capture(net, SHAPE), Ball(images, 0.0, "l2")
    slope = sampled_gradient_norm_estimate(graph, ball, 1, torch.Generator().manual_seed(0), score)
    for name in ("hull", "interval", "jacobian-crown"):
        bound = local_lipschitz(graph, ball, methods=[name], score=score).auto
        if name != "hull" or score == MaxLogit():
            torch.testing.assert_close(bound, slope, rtol=1e-8, atol=0)


def test_ties_are_covered():
    """|y| at y = 0: both logits can be the largest, and their hull holds slopes of 1 in l_1 balls."""
    layer = nn.Linear(4, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0]]))
        layer.bias.zero_()
    graph = capture(nn.Sequential(nn.Flatten(), layer).eval(), SHAPE)
    ball = Ball(torch.full((1, *SHAPE), 0.5).double(), 0.1, "l1")
    assert local_lipschitz(graph, ball, score=MaxLogit()).auto.item() == pytest.approx(1)
    assert local_lipschitz(graph, ball, score=MSP()).auto.item() == pytest.approx(0.5)  # p' = p (1 - p) |2 y'|


def test_what_is_not_proved_has_no_bound():
    net = network(3)
    graph, ball = capture(net, SHAPE), Ball(torch.full((2, *SHAPE), 0.5).double(), 0.1, "linf")
    known = preactivations(graph, ball)
    for score in (Energy(2.0), MaxLogit(), MSP()):
        broken = known.at(torch.tensor([0, 1]))
        broken.gaps[1][0] = torch.nan
        broken.proved[0] = False
        found = local_lipschitz(graph, ball, broken, ["jacobian-crown", "interval"], True, score=score)
        assert torch.isinf(found.auto[0]) and torch.isnan(found.fixed_head[0]) and torch.isfinite(found.auto[1])


@pytest.mark.parametrize("last_dense", [True, False])
def test_the_graph_of_distances_to_one_logit(last_dense):
    net = network(4)
    if not last_dense:
        net = nn.Sequential(*net, nn.LeakyReLU(0.5)).eval()
    graph, images = capture(net, SHAPE), torch.rand(5, *SHAPE).double()
    logits = graph(images)
    for k in range(4):
        wanted = (logits - logits[:, [k]])[:, torch.arange(4) != k] / 2
        torch.testing.assert_close(_apart(graph, k, 2.0)(images), wanted)
