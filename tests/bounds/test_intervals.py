"""Interval arithmetic: it holds, is exact for one layer, and is the one way of training and of certificates."""

import pytest
import torch
from torch import nn

from grood_cert.ball import Ball
from grood_cert.bounds.folding import folded
from grood_cert.bounds.hidden import Hidden
from grood_cert.bounds.intervals import intervals
from grood_cert.networks.architectures import _Residual
from grood_cert.networks.capture import capture

SHAPE = (2, 4, 4)


def graph_of(*layers):
    torch.manual_seed(0)
    return folded(capture(nn.Sequential(*layers).double().eval(), SHAPE))


def ball_of(eps=0.1, norm="linf"):
    return Ball(torch.rand(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), eps, norm)


def networks():
    return {
        "pools": [
            nn.Conv2d(2, 3, 3, padding=1),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(3, 2),
        ],
        "paths": [nn.Conv2d(2, 3, 3, padding=1), nn.LeakyReLU(0.1), _Residual(3, 3, 1), nn.Flatten(), nn.Linear(48, 2)],
    }


@pytest.mark.parametrize("name", networks())
def test_values_of_all_layers_lie_inside(name):
    graph, ball = graph_of(*networks()[name]), ball_of()
    found, generator = intervals(graph, ball), torch.Generator().manual_seed(2)
    for _ in range(50):
        noise = torch.rand(ball.center.shape, dtype=torch.float64, generator=generator) * 2 - 1
        values = graph.values(ball.project(ball.center + 0.2 * noise))
        for value, (lower, upper) in zip(values, found, strict=True):
            assert bool((lower - 1e-12 <= value).all() and (value <= upper + 1e-12).all())


def test_one_linear_layer_is_exact():
    graph, ball = graph_of(nn.Flatten(), nn.Linear(32, 2)), ball_of()
    layer = graph.nodes[2].operation
    low, high = ball.lower.flatten(1), ball.upper.flatten(1)
    expected = torch.where(layer.weight > 0, high[:, None], low[:, None])
    torch.testing.assert_close(intervals(graph, ball)[-1][1], (layer.weight * expected).sum(2) + layer.bias)


@pytest.mark.parametrize("name", networks())
def test_certificates_stand_on_the_same_numbers_moved_outward(name):
    graph, ball = graph_of(*networks()[name]), ball_of()
    known = Hidden(graph, ball, "ibp")
    sizes = known.rounding.magnitudes
    for (lower, upper), (low, high), size in zip(intervals(graph, ball), known.intervals, sizes, strict=True):
        assert bool((low <= lower).all() and (upper <= high).all())
        assert bool(((lower - low) <= 1e-10 * (1 + size)).all() and ((high - upper) <= 1e-10 * (1 + size)).all())
