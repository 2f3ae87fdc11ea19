"""Weights under which intervals keep their width: the law of their size, and radii through a deep network."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from grood_cert.ball import Ball
from grood_cert.bounds.intervals import intervals
from grood_cert.networks.capture import capture
from grood_cert.system.reporting import SILENT
from grood_cert.training import run as training
from grood_cert.training.initialisation import keep_interval_width
from tests.training.examples import experiment, small


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(300, 400), 300),
        (nn.Linear(400, 300, bias=False), 400),
        (nn.Conv2d(20, 80, 3), 20 * 9),
        (nn.Conv2d(40, 80, (3, 5), groups=4), 10 * 15),
    ],
)
def test_the_variance_of_a_weight_is_2_pi_over_the_squared_number_of_inputs(layer, inputs):
    torch.manual_seed(0)
    keep_interval_width(layer)
    weight = layer.weight.detach().double()
    assert float(weight.var()) * inputs**2 / (2 * math.pi) == pytest.approx(1, rel=6 * math.sqrt(2 / weight.numel()))
    assert abs(float(weight.mean())) < 6 * float(weight.std()) / math.sqrt(weight.numel())
    assert layer.bias is None or not layer.bias.any()


def radii(network: nn.Module, shape: tuple[int, int, int], eps: float) -> list[float]:
    """Mean radii of the inputs of the ReLUs over some balls in the middle of the box, in units of eps."""
    graph = capture(network.double().eval(), shape)
    center = 0.5 + 0.1 * torch.randn(8, *shape, dtype=torch.float64).clamp(-3, 3)
    found = intervals(graph, Ball(center, eps, "linf"))
    inputs = [found[graph.nodes[number].inputs[0]] for number in graph.nonlinear]
    return [float((upper - lower).mean()) / 2 / eps for lower, upper in inputs]


def deep(kind: str) -> tuple[nn.Sequential, tuple[int, int, int]]:
    layers: list[nn.Module] = []
    if kind == "dense":
        for inputs in (196, *[400] * 7):
            layers += [nn.Linear(inputs, 400), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(400, 5)), (1, 14, 14)
    for inputs in (1, *[32] * 7):
        layers += [nn.Conv2d(inputs, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 196, 5)), (1, 14, 14)


@pytest.mark.parametrize("kind", ["dense", "convolutions"])
def test_radii_stay_of_order_1_through_a_deep_network(kind):
    torch.manual_seed(0)
    network, shape = deep(kind)
    before = radii(network, shape, 0.01)
    keep_interval_width(network)
    after = radii(network, shape, 0.01)
    assert before[-1] > 1000 * before[0]
    assert 1.5 < after[0] < 2.5, "the first layer, whose inputs are no ReLUs, doubles the radius"
    assert all(after[0] / 3 < radius < 3 * after[0] for radius in after)


def test_batch_norm_is_left_as_it_is_and_a_run_starts_from_these_weights():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    nn.init.constant_(network[1].weight, 3.0)
    nn.init.constant_(network[1].bias, -2.0)
    keep_interval_width(network)
    assert network[1].weight.tolist() == [3, 3] and network[1].bias.tolist() == [-2, -2]
    data, starts = experiment(), {}
    for init in ("default", "ibp"):
        for seed in (0, 0, 1):
            recipe = replace(small(network={"width": 200, "init": init}), seed=seed)
            network = training._network(recipe, training.architecture_of(recipe, data), SILENT)
            weight = next(layer for layer in network.modules() if isinstance(layer, nn.Linear)).weight
            assert starts.setdefault((init, seed), weight).equal(weight), "a seed gives the same weights"
    assert not starts["ibp", 0].equal(starts["ibp", 1])
    found = [float(starts[init, 0].detach().std()) for init in ("default", "ibp")]
    assert found == pytest.approx([1 / math.sqrt(3 * 64), math.sqrt(2 * math.pi) / 64], rel=0.05)
