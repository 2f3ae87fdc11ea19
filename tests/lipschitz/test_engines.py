"""Our Lipschitz bounds beside those of another engine: auto_LiRPA's JacobianOP, where 0.4 or newer is installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grood_cert.ball import Ball
from grood_cert.bounds import auto_lirpa
from grood_cert.bounds.graph import trace
from grood_cert.bounds.hidden import preactivations
from grood_cert.bounds.simplex import Weights
from grood_cert.errors import InputError, RunError
from grood_cert.lipschitz.estimates import uniform_in_ball
from grood_cert.lipschitz.interval import norm_of_box
from grood_cert.lipschitz.jacobian_crown import jacobian_crown
from grood_cert.networks.architectures import Normalize


def networks():
    torch.manual_seed(0)
    dense = [nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]
    conv = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return {
        "dense": nn.Sequential(*dense),
        "convolution": nn.Sequential(Normalize([0.4], [0.3]), *conv, nn.Linear(36, 3)),
    }


def ball_of(eps, norm="linf", count=1):
    images = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(2)).double()
    return Ball(images, torch.full((count,), eps).double(), norm)


@pytest.mark.skipif(auto_lirpa._is_old(), reason="auto_LiRPA 0.3 has no JacobianOP")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dense", "convolution"])
@pytest.mark.parametrize("eps", [0.005, 0.03])
def test_jacobian_crown_and_jacobian_op_bound_the_same_gradient(name, eps):
    network = networks()[name].double().eval().requires_grad_(False)
    ball, weights = ball_of(eps), torch.tensor([0.2, 0.5, 0.3]).double()
    lower, upper = auto_lirpa.gradient_bounds(network, (1, 6, 6), ball, weights)
    graph = trace(network, (1, 6, 6))
    known = preactivations(graph, ball)
    ours = jacobian_crown(graph, known, "linf", Weights.fixed(weights[None]))
    theirs = norm_of_box(lower.flatten(1), upper.flatten(1), "linf")
    found = torch.zeros(1).double()
    for points in uniform_in_ball(ball, 300, torch.Generator().manual_seed(0)):
        images = points.requires_grad_(True)
        (gradient,) = torch.autograd.grad((network(images) @ weights).sum(), images)
        assert bool(((lower - 1e-9 <= gradient) & (gradient <= upper + 1e-9)).all())
        found = torch.maximum(found, gradient.abs().sum().reshape(1))
    assert float(found) <= float(ours) * (1 + 1e-9) and float(found) <= float(theirs) * (1 + 1e-9)
    assert float(ours) <= 1.5 * float(theirs)


def test_what_the_cross_check_refuses():
    network = networks()["dense"].double().eval()
    for ball in (ball_of(0.1, "l2"), ball_of(0.1, count=2)):
        with pytest.raises(InputError, match="expected one l_inf ball"):
            auto_lirpa.gradient_bounds(network, (1, 6, 6), ball, torch.ones(3).double())
    if auto_lirpa._is_old():
        with pytest.raises(RunError, match=r"cannot bound Jacobians; this needs 0\.4 or newer"):
            auto_lirpa.gradient_bounds(network, (1, 6, 6), ball_of(0.1), torch.ones(3).double())
