"""The trainable bound: a bound, GReg's quantity at eps = 0, differentiable, and lower after training on it."""

import pytest
import torch
from torch import nn

from grood_cert.ball import Ball, dual_norm
from grood_cert.lipschitz.estimates import ascended_gradient_norm_estimate
from grood_cert.lipschitz.interval import interval_lipschitz
from grood_cert.networks.architectures import Normalize
from grood_cert.networks.capture import capture
from grood_cert.scores import score_gradient


def network_of(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [Normalize([0.4], [0.3]), nn.Conv2d(1, 3, 3, 1, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 6), nn.Softplus(), nn.Linear(6, 3)).to(dtype)


def ball_of(images, eps, norm="linf"):
    return Ball(images, torch.full((len(images),), eps).to(images), norm)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_bounds_what_ascent_finds_and_is_the_gradient_norm_at_eps_zero(norm):
    network = network_of()
    images = torch.rand(6, 1, 4, 4, dtype=torch.float64)
    network(images)  # moves the running statistics
    exact = dual_norm(score_gradient(network.eval(), images)[1], norm)
    network.train()
    torch.testing.assert_close(
        interval_lipschitz(network, ball_of(images, 0.0, norm)).detach(), exact, rtol=1e-8, atol=0.0
    )
    bound = interval_lipschitz(network, ball_of(images, 0.05, norm)).detach()
    graph = capture(network.eval(), (1, 4, 4))
    ball = ball_of(images, 0.05, norm)
    found, _ = ascended_gradient_norm_estimate(graph, ball, torch.Generator().manual_seed(0), restarts=2, steps=10)
    assert bool((found <= bound).all())


@pytest.mark.parametrize("eps", [0.0, 0.03])
def test_its_derivative_agrees_with_finite_differences(eps):
    network = network_of().eval()
    images = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    parameters = [p.detach().clone().requires_grad_(True) for p in network.parameters()]
    names = [name for name, _ in network.named_parameters()]
    interval_lipschitz(network, ball_of(images, eps))  # exports it; what stands in for parameters cannot be exported

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images):
            return interval_lipschitz(self.network, ball_of(images, eps)).sum()

    def value(*tensors):
        named = {"network." + name: tensor for name, tensor in zip(names, tensors, strict=True)}
        return torch.func.functional_call(Call(), named, (images,))

    assert torch.autograd.gradcheck(value, parameters, eps=1e-7, atol=1e-5, rtol=1e-4, fast_mode=True)


def trained(weight):
    network = network_of(torch.float32)
    images = torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = (images.mean((1, 2, 3)) > 0.5).long()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(12):
        bound = interval_lipschitz(network, ball_of(images, 0.02)).mean()
        loss = nn.functional.cross_entropy(network(images), labels) + weight * bound
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())
        optimizer.step()
    assert network.training
    return interval_lipschitz(network, ball_of(images, 0.02)).mean().item()


def test_training_on_it_lowers_it_in_float32():
    assert trained(10.0) < 0.5 * trained(0.0)
