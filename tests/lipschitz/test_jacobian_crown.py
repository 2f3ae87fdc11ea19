"""Our Lipschitz bounds beside those of another engine: auto_LiRPA's JacobianOP, where 0.4 or newer is installed."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from grood_cert.ball import Ball
from grood_cert.bounds import auto_lirpa
from grood_cert.bounds.auto_lirpa_repair import is_old, library, running
from grood_cert.bounds.folding import folded
from grood_cert.bounds.hidden import preactivations
from grood_cert.bounds.simplex import SoftmaxWeights
from grood_cert.lipschitz.estimates import uniform_in_ball
from grood_cert.lipschitz.interval import norm_of_box
from grood_cert.lipschitz.jacobian_crown import jacobian_crown
from grood_cert.networks.architectures import Normalize
from grood_cert.networks.capture import capture
from grood_cert.networks.rebuild import Rebuilt


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


def gradient_bounds(network, ball, weights):
    """Bounds of the gradient of p . f over one l_inf ball by JacobianOP (Shi et al., NeurIPS 2022)."""
    jacobian = importlib.import_module("auto_LiRPA.jacobian").JacobianOP
    head = nn.Linear(len(weights), 1, bias=False, dtype=torch.float64).requires_grad_(False)
    head.weight.copy_(weights[None])

    class Gradient(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = Rebuilt(folded(capture(network, tuple(ball.center.shape[1:])), borders=False))
            self.head = head

        def forward(self, images):
            return jacobian.apply(self.head(self.network(images)), images).flatten(1)

    with running():
        module = library().BoundedModule(Gradient(), ball.center, bound_opts={"conv_mode": "matrix", "verbosity": 0})
        inputs = library().BoundedTensor(ball.center, auto_lirpa._perturbation_class()(ball))
        lower, upper = module.compute_jacobian_bounds(inputs)
    return lower.detach().reshape(ball.center.shape), upper.detach().reshape(ball.center.shape)


@pytest.mark.skipif(is_old(), reason="auto_LiRPA 0.3 has no JacobianOP")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dense", "convolution"])
@pytest.mark.parametrize("eps", [0.005, 0.03])
def test_jacobian_crown_and_jacobian_op_bound_the_same_gradient(name, eps):
    network = networks()[name].double().eval().requires_grad_(False)
    ball, weights = ball_of(eps), torch.tensor([0.2, 0.5, 0.3]).double()
    lower, upper = gradient_bounds(network, ball, weights)
    graph = capture(network, (1, 6, 6))
    known = preactivations(graph, ball)
    ours = jacobian_crown(graph, known, "linf", SoftmaxWeights.fixed(weights[None]))
    theirs = norm_of_box(lower.flatten(1), upper.flatten(1), "linf")
    found = torch.zeros(1).double()
    for points in uniform_in_ball(ball, 300, torch.Generator().manual_seed(0)):
        images = points.requires_grad_(True)
        (gradient,) = torch.autograd.grad((network(images) @ weights).sum(), images)
        assert bool(((lower - 1e-9 <= gradient) & (gradient <= upper + 1e-9)).all())
        found = torch.maximum(found, gradient.abs().sum().reshape(1))
    assert float(found) <= float(ours) * (1 + 1e-9) and float(found) <= float(theirs) * (1 + 1e-9)
    assert float(ours) <= 1.5 * float(theirs)
