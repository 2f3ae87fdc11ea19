"""The worst score that training can lower: bounds are sound, attacks stay inside, trained outliers end up certified."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from grood_cert.ball import Ball
from grood_cert.errors import InputError
from grood_cert.networks import architectures
from grood_cert.networks.capture import capture
from grood_cert.scores import energy
from grood_cert.sections import ObjectiveSection
from grood_cert.training import certified_loss as module
from grood_cert.training.certified_loss import adversarial_points, certified_loss, energy_interval
from grood_cert.training.objective import Roles, energy_loss, objective
from tests.training.examples import with_batch_statistics

METHODS = ("ibp", "crown-ibp")


def pooled() -> nn.Sequential:
    return nn.Sequential(
        architectures.Normalize([0.4], [0.3]),
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.1),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = pooled() if name == "pooled" else architectures.build(name, (1, 8, 8), 5, [0.4], [0.3], width=8)
    network = network.double()
    network(2 * torch.rand(16, 1, 8, 8, dtype=torch.float64))  # running statistics of their own
    return network


def images_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ball_of(images: torch.Tensor, eps: float) -> Ball:
    return Ball(images, torch.full((len(images),), eps, dtype=images.dtype), "linf")


def extremes(network: nn.Module, ball: Ball) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest score found: random points and corners of the ball, and sign-gradient ascent both ways."""
    generator = torch.Generator().manual_seed(0)
    center = ball.center
    noise = 2 * torch.rand(20, *center.shape, dtype=torch.float64, generator=generator) - 1
    noise[1::2] = noise[1::2].sign()
    moved = torch.stack([ball.project(center + step * ball.per_pixel(ball.eps)) for step in noise])
    score = energy(network(torch.cat([center, *moved]))).detach().reshape(-1, len(center))
    lowest, highest = score.amin(0), score.amax(0)
    both = Ball(center.repeat(2, 1, 1, 1), ball.eps.repeat(2), ball.norm)
    sign = torch.ones(2, len(center), dtype=torch.float64)
    sign[1] = -1
    points = both.center
    for _ in range(10):
        points = points.detach().requires_grad_(True)
        score = energy(network(points))
        (gradient,) = torch.autograd.grad(score.sum(), points)
        points = both.project(points + 0.3 * both.per_pixel(sign.flatten() * both.eps) * gradient.sign())
        score = energy(network(points)).detach().reshape(2, -1)
        lowest, highest = torch.minimum(lowest, score.amin(0)), torch.maximum(highest, score.amax(0))
    return lowest, highest


@pytest.mark.parametrize("name", ["mlp", "conv-small", "resnet-small", "pooled"])
@pytest.mark.parametrize("method", METHODS)
def test_bounds_hold_against_attack_and_are_exact_at_radius_zero(name, method):
    network, images = build(name), images_of(8)
    bounds = {eps: energy_interval(network, ball_of(images, eps), method) for eps in (0.0, 0.01, 0.1)}
    network.eval()
    score = energy(network(images))
    torch.testing.assert_close(bounds[0.0][0], score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bounds[0.0][1], score, rtol=1e-9, atol=1e-9)
    for eps in (0.01, 0.1):
        lowest, highest = extremes(network, ball_of(images, eps))
        assert bool((bounds[eps][0] <= lowest).all()) and bool((highest <= bounds[eps][1]).all())


@pytest.mark.parametrize("name", ["conv-small", "resnet-small"])
def test_a_linear_row_never_loosens_the_interval(name):
    network, ball = build(name), ball_of(images_of(8), 0.02)
    lower, upper = energy_interval(network, ball, "ibp")
    tighter_lower, tighter_upper = energy_interval(network, ball, "crown-ibp")
    assert bool((tighter_lower >= lower).all()) and bool((tighter_upper <= upper).all())
    assert bool((tighter_lower > lower).any()) and bool((tighter_upper < upper).any())


def test_a_linear_network_in_closed_form():
    """One logit: S = -(w . x + b), worst case eps ||w||_1 while the box is out of reach."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).double()
    images = 0.2 + 0.6 * images_of(5)
    score, reach = energy(network(images)), 0.1 * network[1].weight.abs().sum()
    for method in METHODS:
        lower, upper = energy_interval(network, ball_of(images, 0.1), method)
        torch.testing.assert_close(lower, score - reach, rtol=1e-9, atol=0)
        torch.testing.assert_close(upper, score + reach, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_at_radius_zero_it_is_the_energy_loss_of_the_eval_mode_network(method, mix):
    network, inside, outside = build("resnet-small"), images_of(6), images_of(9, 1)
    section = ObjectiveSection(m_in=-1.9, m_out=-1.5, certified="both", certified_method=method, certified_mix=mix)
    both = certified_loss(network, inside, outside, 0.0, section)
    alone = certified_loss(network, inside, outside, 0.0, replace(section, certified="ood"))
    network.eval()
    score_id, score_aux = energy(network(inside)), energy(network(outside))
    torch.testing.assert_close(both, energy_loss(score_id, score_aux, -1.9, -1.5), rtol=1e-7, atol=0)
    torch.testing.assert_close(
        alone, energy_loss(torch.full_like(score_id, -9.0), score_aux, -1.9, -1.5), rtol=1e-7, atol=0
    )


MIXED = ObjectiveSection(m_in=-2.5, m_out=-1.0, certified="both", certified_mix=0.3)


@pytest.mark.parametrize("method", METHODS)
def test_its_derivative_agrees_with_finite_differences(method):
    network, inside, outside = build("conv-small"), images_of(3), images_of(4, 1)
    section = replace(MIXED, certified_method=method, certified_mix=1.0)
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(certified_loss(network, inside, outside, 0.02, section), parameters)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        directions = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in parameters]
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += sign * 1e-7 * direction
                values.append(float(certified_loss(network, inside, outside, 0.02, section)))
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += 1e-7 * direction
        got = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        assert got == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-4)


def slow_interval(network: nn.Sequential, image: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """S_lb and S_ub of one image of an mlp, by the signs of the weights, neuron by neuron."""
    low, high = (image - eps).clamp(0, 1), (image + eps).clamp(0, 1)
    low, high = ((end - network[0].mean) / network[0].std for end in (low, high))
    low, high = low.flatten(), high.flatten()
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    for layer in layers:
        ends = []
        for near, far in ((low, high), (high, low)):
            rows = zip(layer.weight, layer.bias, strict=True)
            ends.append(torch.stack([torch.where(row > 0, row * near, row * far).sum() + bias for row, bias in rows]))
        low, high = ends if layer is layers[-1] else (end.clamp(min=0) for end in ends)
    return -high.exp().sum().log(), -low.exp().sum().log()


def slow_attack(network: nn.Module, image: torch.Tensor, start: torch.Tensor, eps: float, sign: int) -> torch.Tensor:
    """Three steps of 2 eps / 3 along the sign of the gradient of sign * S, pixel by pixel into the ball and the box."""
    point = start
    for _ in range(3):
        point = point.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(sign * -network(point[None]).exp().sum().log(), point)
        moved = (point + 2 * eps / 3 * torch.sign(slope)).detach()
        ends = zip(moved.flatten().tolist(), image.flatten().tolist(), strict=True)
        pixels = [min(max(to, center - eps, 0.0), center + eps, 1.0) for to, center in ends]
        point = torch.tensor(pixels, dtype=torch.float64).reshape(image.shape)
    return point


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_values_and_gradients_against_a_slow_reference(mix):
    """Sample by sample; the outliers have the first places in the draw of the attack's first points."""
    network, inside, outside, eps = build("mlp"), images_of(3), images_of(4, 1), 0.05
    section = replace(MIXED, m_in=-2.2, m_out=-1.5, certified_mix=mix)
    loss = certified_loss(network, inside, outside, eps, section, torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    noise = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = torch.zeros((), dtype=torch.float64)
    for number, image in enumerate([*outside, *inside]):
        aux, low, high = number < 4, (image - eps).clamp(0, 1), (image + eps).clamp(0, 1)
        end = slow_attack(network, image, low + noise[number].double() * (high - low), eps, -1 if aux else 1)
        attacked = -network(end[None]).exp().sum().log()
        bounds = slow_interval(network, image, eps)
        assert bool(bounds[0] <= attacked) and bool(attacked <= bounds[1])
        for share, score in ((1 - mix, attacked), (mix, bounds[0] if aux else bounds[1])):
            missing = section.m_out - score if aux else score - section.m_in
            expected = expected + share * missing.clamp(min=0) ** 2 / (4 if aux else 3)
    assert bool(loss > 0)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for got, right in zip(gradients, torch.autograd.grad(expected, list(network.parameters())), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["conv-small", "pooled"])
def test_attacks_stay_inside_and_climb(name):
    network = build(name).eval()
    graph, ball = capture(network, (1, 8, 8)), ball_of(images_of(16), 0.1)
    sign = torch.tensor([1.0, -1.0]).repeat(8).double()
    start = adversarial_points(graph, ball, sign, 1, torch.Generator().manual_seed(1))
    points = adversarial_points(graph, ball, sign, 5, torch.Generator().manual_seed(1))
    for found in (start, points):
        assert not found.requires_grad
        assert bool(((found >= ball.lower) & (found <= ball.upper)).all())
        assert float(ball.lower.min()) >= 0 and float(ball.upper.max()) <= 1
    gain = sign * (energy(network(points)) - energy(network(ball.center)))
    assert bool((gain > 0).all())
    again = adversarial_points(graph, ball, sign, 5, torch.Generator().manual_seed(1))
    assert torch.equal(points, again)


def test_attack_and_bound_meet_where_the_score_is_linear():
    """The worst of all corners of the ball, enumerated: both parts of the mix are it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 1)).double()
    inside, outside = (torch.rand(3, 1, 2, 3, dtype=torch.float64) for _ in range(2))
    corners = torch.cartesian_prod(*[torch.tensor([-0.2, 0.2], dtype=torch.float64)] * 6).reshape(-1, 1, 2, 3)
    scores = [energy(network((images[:, None] + corners).clamp(0, 1).flatten(0, 1))) for images in (inside, outside)]
    worst = energy_loss(scores[0].reshape(3, -1).amax(1), scores[1].reshape(3, -1).amin(1), -0.5, 0.5)
    for mix in (0.0, 0.4, 1.0):
        section = replace(MIXED, m_in=-0.5, m_out=0.5, certified_mix=mix)
        torch.testing.assert_close(certified_loss(network, inside, outside, 0.2, section), worst, rtol=1e-9, atol=0)


def test_what_has_no_share_is_not_computed(monkeypatch):
    network, inside, outside = build("mlp"), images_of(3), images_of(4, 1)

    def refuse(*given):
        raise AssertionError("not asked for")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_interval", refuse)
        assert bool(certified_loss(network, inside, outside, 0.1, replace(MIXED, certified_mix=0.0)) > 0)
    monkeypatch.setattr(module, "adversarial_points", refuse)
    assert bool(certified_loss(network, inside, outside, 0.1, replace(MIXED, certified_mix=1.0)) > 0)


def test_balls_are_around_the_pixels_that_training_noise_leaves_in_the_box():
    network, noise = build("mlp"), torch.randn(9, 1, 8, 8, dtype=torch.float64)
    inside, outside = images_of(4) + 0.3 * noise[:4], images_of(5, 1) + 0.3 * noise[4:]
    losses = [
        certified_loss(network, first, second, 0.05, MIXED, torch.Generator().manual_seed(0))
        for first, second in ((inside, outside), (inside.clamp(0, 1), outside.clamp(0, 1)))
    ]
    assert torch.equal(losses[0], losses[1]) and bool(losses[0] > 0)


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.4, 1.0])
@pytest.mark.parametrize("certified", ["ood", "both"])
def test_radius_and_weight_grow_over_the_ramp(progress, certified):
    network, inside, outside = build("resnet-small"), images_of(6), images_of(9, 1)
    labels, chosen = torch.arange(6) % 5, torch.arange(9) < 5
    plain = ObjectiveSection(lambda_grad=0.0, m_in=-2.5, m_out=-1.0)
    weights = replace(
        plain, certified=certified, certified_eps=0.04, certified_ramp=0.4, lambda_certified=0.3, certified_mix=0.7
    )
    roles = Roles(chosen, torch.ones(9, dtype=torch.bool))
    twin, fixed = copy.deepcopy(network), with_batch_statistics(network, torch.cat([inside, outside]))
    draws, drawn = (torch.Generator().manual_seed(3) for _ in range(2))
    terms = objective(network, inside, labels, outside, weights, roles=roles, progress=progress, generator=draws)
    expected = objective(twin, inside, labels, outside, plain, roles=roles).total
    grown = min(1.0, progress / 0.4)
    if grown > 0:
        loss = certified_loss(fixed, inside, outside[chosen], grown * 0.04, weights, drawn).detach()
        torch.testing.assert_close(terms.certified, loss, rtol=1e-8, atol=0)
        expected = expected + grown * 0.3 * loss
    torch.testing.assert_close(terms.total, expected, rtol=1e-8, atol=0)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), f"{key}: bounds must not move running statistics"


_BALLS = ObjectiveSection(
    lambda_S=0.0, lambda_grad=0.0, m_in=-10.0, m_out=10.0, certified="both", certified_eps=0.002, certified_ramp=0.0
)
OVER_BALLS = {
    "ibp": _BALLS,
    "crown-ibp": replace(_BALLS, certified_method="crown-ibp"),
    "attack": replace(_BALLS, certified_mix=0.0, certified_eps=0.05),
    "slope": ObjectiveSection(
        lambda_S=0.0, lambda_grad=1.0, m_in=100.0, m_out=-100.0, slope="interval", slope_eps=0.002
    ),
}


def over_balls(network: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of one batch plus a term over balls, and that without it; running statistics stay as they were."""
    state, generator = copy.deepcopy(network.state_dict()), torch.Generator().manual_seed(4)
    terms = objective(
        network, images_of(6), torch.arange(6) % 5, images_of(9, 1), OVER_BALLS[name], generator=generator
    )
    for key, buffer in network.named_buffers():
        buffer.copy_(state[key])
    return terms.total, terms.cross_entropy


@pytest.mark.parametrize("name", OVER_BALLS)
def test_what_batch_norm_takes_out_again_changes_no_term_over_balls(name):
    """Values shifted and scaled before BatchNorm: the loss is the same, and so must the bounds be."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 5)).double()
    found = []
    for scale in (1.0, 0.5):
        with torch.no_grad():
            for layer in (network[0], network[3]):
                layer.weight.mul_(scale)
                layer.bias.add_(1 - scale)
            for layer in (network[1], network[4]):
                layer.eps *= scale**2  # which alone knows of the scale
        found.append([float(value.detach()) for value in over_balls(network, name)])
    (total, entropy), other = found
    assert total > entropy + 0.1 and other == pytest.approx([total, entropy], rel=1e-9)


@pytest.mark.parametrize("name", OVER_BALLS)
def test_terms_over_balls_know_that_the_statistics_of_a_batch_depend_on_the_parameters(name):
    """Finite differences over all parameters in random directions, against the gradient."""
    network = build("resnet-small")
    parameters = list(network.parameters())
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(over_balls(network, name)[0], parameters)])
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        directions = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in parameters]
        values = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += sign * 1e-7 * direction
            values.append(float(over_balls(network, name)[0].detach()))
        got = float(gradient @ torch.cat([direction.flatten() for direction in directions]))
        assert got == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-4)


def test_a_layer_of_batch_norm_that_is_used_twice_is_refused_unless_it_is_frozen():
    norm = nn.BatchNorm2d(4)
    layers = [nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), norm, nn.Flatten(), nn.Linear(64, 5)]
    network = nn.Sequential(*layers).double()
    with pytest.raises(
        InputError, match=r"and 1 is used twice; freeze the statistics \(optimizer.batch_norm_momentum = 0"
    ):
        over_balls(network, "ibp")
    norm.eval()
    total, entropy = over_balls(network, "ibp")
    assert bool(total > entropy)


def test_a_layer_that_cannot_be_bounded_is_named():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    with pytest.raises(InputError, match="layer 2: layer_norm cannot be bounded"):
        energy_interval(network, ball_of(images_of(2), 0.1), "ibp")


@pytest.fixture(scope="module")
def digits():
    """0 to 5 are ID, 6 and 7 outliers; every other one is for training."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    inside, outside = (labels < 6).nonzero().squeeze(1), ((labels == 6) | (labels == 7)).nonzero().squeeze(1)
    return images, labels, (inside[::2], inside[1::2]), (outside[::2], outside[1::2])


def trained(
    digits, weights: ObjectiveSection, name: str, warmup: int = 0, steps: int = 100
) -> tuple[float, float, float]:
    """Accuracy, and the shares of held-out outliers that stay above, and ID below, the middle of the margins.

    After `warmup` steps without the certified term BatchNorm layers are kept in eval mode.
    """
    torch.set_num_threads(1)
    images, labels, (train, test), (train_aux, test_aux) = digits
    torch.manual_seed(0)
    network = architectures.build(name, (1, 8, 8), 6, [0.3], [0.37])
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(-warmup, steps):
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train(step < 0)
        first, second = train[torch.randperm(len(train))[:64]], train_aux[torch.randperm(len(train_aux))[:64]]
        progress = max(0.0, step / steps)
        terms = objective(network, images[first], labels[first], images[second], weights, progress=progress)
        assert bool(terms.total.isfinite())
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    network = network.double().eval()
    accuracy = float((network(images[test].double()).argmax(1) == labels[test]).double().mean())
    middle = (weights.m_in + weights.m_out) / 2
    found = {}
    for key, chosen in (("id", test), ("aux", test_aux)):
        ball = ball_of(images[chosen[:60]].double(), 0.03)
        with torch.no_grad():
            found[key] = energy_interval(network, ball, "crown-ibp")
        lowest, highest = extremes(network, ball)
        assert bool((found[key][0] <= lowest).all()) and bool((highest <= found[key][1]).all()), "sound after training"
    outside, inside = found["aux"][0] > middle, found["id"][1] < middle
    return accuracy, float(outside.double().mean()), float(inside.double().mean())


CERTIFIED = ObjectiveSection(lambda_grad=0.0, certified="ood", certified_eps=0.03, lambda_certified=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_training_certifies_outliers_on_a_network_without_batch_norm(digits, method):
    accuracy, outside, _ = trained(digits, replace(CERTIFIED, certified_method=method), "conv-small")
    assert accuracy > 0.95 and outside > 0.85


def test_without_the_term_little_is_certified(digits):
    accuracy, outside, _ = trained(digits, replace(CERTIFIED, certified="none"), "conv-small")
    assert accuracy > 0.95 and outside < 0.3


def test_training_certifies_both_sides(digits):
    accuracy, outside, inside = trained(digits, replace(CERTIFIED, certified="both"), "conv-small", steps=150)
    assert accuracy > 0.95 and outside > 0.85 and inside > 0.7


def test_training_certifies_outliers_with_batch_norm_held_in_eval_mode(digits):
    accuracy, outside, _ = trained(digits, CERTIFIED, "resnet-small", warmup=60)
    assert accuracy > 0.9 and outside > 0.5
