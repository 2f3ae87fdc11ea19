from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from grood_cert import attacks
from grood_cert.ball import NORMS, Ball
from grood_cert.bounds.alpha_crown import optimised_bounds
from grood_cert.bounds.backward import Pullback
from grood_cert.bounds.hidden import preactivations
from grood_cert.bounds.score import gibbs_upper
from grood_cert.errors import InputError
from grood_cert.networks.architectures import Normalize, resnet_small
from grood_cert.networks.capture import capture
from grood_cert.scores import energy

SHAPE = (1, 4, 4)
EPS = {"linf": 0.15, "l2": 0.5, "l1": 1.5}


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def leaky():
    layers = nn.Linear(16, 10), nn.LeakyReLU(0.2), nn.Linear(10, 6), nn.LeakyReLU(0.2), nn.Linear(6, 3)
    return nn.Sequential(nn.Flatten(), *layers)


def conv():
    convolution = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(convolution, nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))


def residual():
    return resnet_small(Normalize([0.5], [0.5]), SHAPE, 3, width=2)


def mixed():
    layers = nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 6), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(6, 3))


def make(build, seed=0, scale=2.0):
    torch.manual_seed(seed)
    network = build().double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale)
    return network.requires_grad_(False)


def balls(norm, count=4, shape=SHAPE, seed=1):
    images = torch.rand(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Ball(images, torch.full((count,), EPS[norm], dtype=torch.float64), norm)


def points_in(ball, count=400, seed=2):
    """Random points of every ball and points on its rim, shape (count B, ...), ball after ball."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, *ball.center.shape, dtype=torch.float64, generator=generator) * 2 - 1
    noise[: count // 2] = noise[: count // 2].sign()
    many = Ball(ball.center.repeat(count, 1, 1, 1), ball.eps.repeat(count), ball.norm)
    return many.project(many.center + many.per_pixel(many.eps) * noise.flatten(0, 1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("build", [mlp, leaky, conv, residual, mixed])
def test_bounds_hold_and_are_never_looser_than_plain_ones(build, norm):
    network = make(build)
    graph, ball = capture(network, SHAPE), balls(norm)
    hidden = preactivations(graph, ball)
    effort = attacks.AttackEffort.preset("fast")
    (seen,) = attacks.extremes(network, [ball], torch.Generator().manual_seed(0), effort)
    relaxed = Pullback(graph, ball)
    for number, interval in zip(graph.nonlinear, hidden.inputs, strict=True):
        relaxed.add(number, *interval)
    weights = torch.softmax(network(ball.center), -1)
    plain = gibbs_upper(-relaxed.upper(len(graph.nodes) - 1, -weights.unsqueeze(1))[:, 0], weights)
    upper, lower = (optimised_bounds(graph, ball, side, hidden, 0) for side in ("upper", "lower"))
    assert bool((upper <= plain + 1e-9).all())
    for hidden_steps in (0, 4) if norm == "linf" else (4,):
        best_upper = optimised_bounds(graph, ball, "upper", hidden, 8, hidden_steps)
        best_lower = optimised_bounds(graph, ball, "lower", hidden, 8, hidden_steps)
        assert bool((best_upper <= upper).all() and (best_lower >= lower).all())
        assert bool((seen.maximum <= best_upper).all() and (seen.minimum >= best_lower).all())
    score = energy(network(points_in(ball))).reshape(-1, len(ball.center))
    assert bool((score.amax(0) <= best_upper).all() and (score.amin(0) >= best_lower).all())
    if build is not mixed:
        assert bool((best_upper < upper - 1e-6).any() and (best_lower > lower + 1e-6).any())


def test_upper_bound_reaches_the_exact_maximum_of_a_linear_network():
    network = make(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), scale=4.0)
    graph, ball = capture(network, SHAPE), balls("linf", 3)
    found = optimised_bounds(graph, ball, "upper", preactivations(graph, ball), 150)

    def lse(pixels, shape=SHAPE):
        pixels = torch.tensor(pixels, requires_grad=True)
        value = -energy(network(pixels.reshape(1, *shape))).squeeze()
        value.backward()
        return float(value.detach()), pixels.grad.numpy()

    for index in range(3):
        box = list(zip(ball.lower[index].flatten().tolist(), ball.upper[index].flatten().tolist(), strict=True))
        start = ball.center[index].flatten().numpy()
        exact = -minimize(lse, start, jac=True, bounds=box, method="L-BFGS-B", options={"ftol": 1e-14}).fun
        assert exact <= float(found[index]) <= exact + 2e-3


@pytest.mark.parametrize("norm", NORMS)
def test_one_logit_is_exact(norm):
    network = make(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 1)))
    graph, ball = capture(network, SHAPE), balls(norm)
    hidden = preactivations(graph, ball)
    value = network(ball.center).squeeze(1)
    for side, sign in (("upper", -1), ("lower", 1)):
        reach = ball.support(sign * network[1].weight.unsqueeze(0).expand(4, -1, -1)).squeeze(1)
        expected = -(value + sign * reach)
        torch.testing.assert_close(optimised_bounds(graph, ball, side, hidden, 5), expected, rtol=0, atol=1e-9)


def test_what_is_not_proved_is_nan():
    network = make(mlp)
    graph, ball = capture(network, SHAPE), balls("linf")
    hidden = preactivations(graph, ball).inputs
    broken = [(lower.clone(), upper.clone()) for lower, upper in hidden]
    broken[1][0][0, 0] = torch.nan
    broken[0][0][1, 0] = -torch.inf
    broken[1][0][2, 0] = broken[1][1][2, 0] + 1
    for side in ("upper", "lower"):
        got = optimised_bounds(graph, ball, side, broken, 3)
        assert got.isnan().tolist() == [True, True, True, False]
    with torch.no_grad():
        graph.nodes[2].operation.weight.fill_(torch.nan)
    assert bool(optimised_bounds(graph, ball, "upper", preactivations(graph, ball), 3).isnan().all())


def test_wrong_arguments_are_refused():
    graph, ball = capture(make(mlp), SHAPE), balls("linf")
    hidden = preactivations(graph, ball)
    with pytest.raises(InputError, match="use upper or lower"):
        optimised_bounds(graph, ball, "both", hidden)
    with pytest.raises(InputError, match="2 nonlinear layers, got 1"):
        optimised_bounds(graph, ball, "upper", hidden.inputs[:1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu():
    network, ball = make(conv), balls("l2")
    moved = Ball(ball.center.cuda(), ball.eps.cuda(), ball.norm)
    for side in ("upper", "lower"):
        graph, there = capture(network, SHAPE), capture(make(conv).cuda(), SHAPE)
        expected = optimised_bounds(graph, ball, side, preactivations(graph, ball), 8)
        got = optimised_bounds(there, moved, side, preactivations(there, moved), 8)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-6, atol=1e-6)
