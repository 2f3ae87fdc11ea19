"""The referee computes what the network computes, and its errors are errors."""

import numpy as np
import pytest
import torch
from torch import nn

from grood_cert.ball import dual_norm
from grood_cert.networks.capture import capture
from grood_cert.scores import MSP, Energy, MaxLogit, score_gradient
from tests.networks.layered import NAMES, SHAPE, build
from tests.soundness.precision import LONG, Referee, distance, score_of

SCORES = Energy(), Energy(0.1), MaxLogit(), MSP(2.0)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_torchs(name):
    graph = build(name)
    referee = Referee(graph)
    points = torch.rand(1 + (name != "gelu"), *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for (value, error), expected in zip(referee.values(points), graph.values(points), strict=True):
        got = expected.reshape(len(points), -1).numpy()
        assert np.abs(value - got).max() <= 2.1e-9 * (name == "softplus") + 1e-13 * (1 + np.abs(got).max())
        assert float(error.max()) <= 1e-14
    for score in SCORES:
        value, gradient = score_gradient(graph, points, score)
        tolerance = 1e-8 if name == "softplus" else 1e-12
        assert np.allclose(referee.score(points, score)[0].astype(float), value, rtol=tolerance, atol=tolerance)
        for norm in ("linf", "l2", "l1"):
            found, error = referee.gradient_norm(points, score, norm)
            assert np.allclose(found.astype(float), dual_norm(gradient, norm), rtol=tolerance, atol=tolerance)
            assert float(error.max()) <= 1e-12


@pytest.mark.skipif(np.finfo(LONG).eps > 1e-18, reason="long double is no wider than float64 here")
def test_what_cancels_is_resolved_and_the_error_says_how_far():
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 1)).double().eval().requires_grad_(False)
    network[1].weight.copy_(torch.tensor([[1.0, 2.0**-20], [1.0, 0.0]]))
    network[1].bias.copy_(torch.tensor([1e8, 1e8]))
    network[2].weight.copy_(torch.tensor([[1.0, -1.0]]))
    network[2].bias.fill_(0.25)
    # 2^-20 x2 is all that is left
    point = torch.tensor([[[[0.3, 2.0**-10]]]], dtype=torch.float64)
    graph = capture(network, (1, 1, 2))
    value, error = Referee(graph).values(point)[-1]
    true = 0.25 + 2.0**-30
    assert abs(float(network(point)) - true) > 1e-10
    assert abs(float(value[0, 0]) - true) <= float(error[0, 0]) <= 1e-9


def test_scores_far_apart():
    logits = np.array([[1000.0, -1000.0], [0.0, 0.0]], dtype=LONG)
    assert score_of(logits, Energy())[0] == -1000
    assert score_of(logits, MSP()).tolist() == [-1, -0.5]
    assert score_of(logits, MaxLogit()).tolist() == [-1000, 0]


def test_distances():
    points = torch.tensor([[[[0.5, 0.25]]]]).double()
    found = [float(distance(points, torch.zeros_like(points), norm)[0]) for norm in ("linf", "l2", "l1")]
    assert found == pytest.approx([0.5, 0.3125**0.5, 0.75])
