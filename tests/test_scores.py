from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from grood_cert.errors import InputError
from grood_cert.networks import architectures
from grood_cert.scores import (
    MSP,
    SCORES,
    Energy,
    MaxLogit,
    energy,
    gradient_norm_estimate,
    named,
    parse,
    score_gradient,
)


def linear(weight: torch.Tensor, bias: torch.Tensor, shape: tuple[int, int, int]) -> nn.Sequential:
    layer = nn.Linear(*weight.T.shape).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return nn.Sequential(nn.Flatten(), layer)


def test_energy_is_minus_log_sum_exp():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(50, 4, dtype=torch.float64, generator=generator)
    for row, score in zip(logits.tolist(), energy(logits).tolist(), strict=True):
        assert score == pytest.approx(-math.log(sum(map(math.exp, row))), rel=1e-14)
    for row, score in zip(logits.tolist(), energy(logits, temperature=3.0).tolist(), strict=True):
        assert score == pytest.approx(-3 * math.log(sum(math.exp(value / 3) for value in row)), rel=1e-14)


def test_energy_laws():
    """Adding c to every logit lowers S by c; |S(z) - S(z')| <= max |z - z'|; one logit: S = -f."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 100, 6, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(energy(first + 2.5), energy(first) - 2.5, rtol=1e-14, atol=1e-14)
    assert ((energy(first) - energy(second)).abs() <= (first - second).abs().amax(-1)).all()
    assert torch.equal(energy(first[:, :1]), -first[:, 0])


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[800.0, 0.0], [-800.0, -800.0]], dtype=torch.float64)
    torch.testing.assert_close(energy(logits), torch.tensor([-800.0, 800 - math.log(2)], dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
def test_other_scores_by_their_definition(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 5, dtype=torch.float64, generator=generator)
    maxima, msp = MaxLogit().value(logits).tolist(), MSP(temperature).value(logits).tolist()
    for row, maximum, softmax in zip(logits.tolist(), maxima, msp, strict=True):
        parts = [math.exp(value / temperature) for value in row]
        assert maximum == -max(row)
        assert softmax == pytest.approx(-max(parts) / sum(parts), rel=1e-14)


def test_energy_becomes_max_logit_as_the_temperature_falls():
    """max f <= T LSE(f / T) <= max f + T log K."""
    logits = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 0.1, 1e-3):
        gap = MaxLogit().value(logits) - Energy(temperature).value(logits)
        assert bool((gap >= -1e-12).all()) and bool((gap <= temperature * math.log(6) + 1e-12).all())


@pytest.mark.parametrize("name", SCORES)
def test_every_score_is_low_for_a_confident_prediction(name):
    confident, unsure = torch.tensor([9.0, 0.0, 0.0]), torch.tensor([0.1, 0.0, 0.0])
    assert named(name).value(confident) < named(name).value(unsure)


@pytest.mark.parametrize("score", [Energy(), Energy(3.0), MaxLogit(), MSP(), MSP(0.5)])
def test_orders_increase_with_the_score_and_lie_below_those_of_single_classes(score):
    logits = 4 * torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value, order = score.value(logits), score.order(logits)
    torch.testing.assert_close(torch.tensor([score.order_at(gamma) for gamma in value.tolist()]).double(), order)
    assert bool((order[value.argsort()].diff() >= 0).all())
    for k in range(5):
        classes = torch.full((200,), k)
        assert bool((score.of_class(logits, classes) >= order - 1e-12).all())
    torch.testing.assert_close(MSP(2.0).of_class(logits, logits.argmax(1)), MSP(2.0).order(logits))


def test_the_order_of_msp_does_not_saturate():
    logits = torch.tensor([[0.0, 900.0, 3.0]], dtype=torch.float64, requires_grad=True)
    assert MSP().value(logits.detach()).item() == -1
    (gradient,) = torch.autograd.grad(MSP().order(logits).sum(), logits)
    assert MSP().order(logits.detach()).item() == pytest.approx(3 - 900 + math.log1p(math.exp(-3)))
    assert float(gradient[0, 1]) == pytest.approx(-1) and float(gradient.sum()) == pytest.approx(0)
    assert float(MSP().order_at(-1.0)) < -700 and float(MSP().order_at(0.5)) > 700


def test_msp_of_one_class_is_minus_one():
    logits = torch.randn(7, 1, dtype=torch.float64, requires_grad=True)
    assert bool((MSP().value(logits) == -1).all())
    (gradient,) = torch.autograd.grad(MSP().order(logits).sum(), logits)
    assert bool((gradient == 0).all())


@pytest.mark.parametrize("score", [Energy(), Energy(2.0), Energy(0.1 + 0.2), MaxLogit(), MSP(), MSP(1e-3), MSP(1e20)])
def test_scores_are_read_from_their_text(score):
    assert parse(str(score)) == score


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("margin", "unknown score 'margin'; use one of energy, max-logit, msp"),
        ("energy:T=zero", "expected energy, energy:T=2, max-logit, msp or msp:T=2"),
        ("energy:temperature=2", "expected energy, energy:T=2"),
        ("max-logit:T=2", "score 'max-logit:T=2': expected"),
        ("msp:T=0", "a temperature must be a number above 0, got 0.0"),
        ("msp:T=inf", "a temperature must be a number above 0, got inf"),
    ],
)
def test_texts_that_name_no_score(text, message):
    with pytest.raises(InputError, match=message):
        parse(text)


def test_gradient_of_a_linear_network_in_closed_form():
    """grad S = -W^T softmax(W x + b); its norms are the dual ones: l_1 for l_inf balls, l_2 for l_2 balls."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, dtype=torch.float64, generator=generator)
    bias = torch.randn(5, dtype=torch.float64, generator=generator)
    images = torch.rand(7, 3, 2, 2, dtype=torch.float64, generator=generator)
    network = linear(weight, bias, (3, 2, 2))
    expected = -torch.softmax(images.flatten(1) @ weight.T + bias, 1) @ weight
    score, gradient = score_gradient(network, images)
    torch.testing.assert_close(gradient.flatten(1), expected, rtol=1e-12, atol=0)
    assert torch.equal(score, energy(network(images)).detach())
    assert not score.requires_grad and not gradient.requires_grad
    torch.testing.assert_close(gradient_norm_estimate(network, images, "linf"), expected.abs().sum(1))
    torch.testing.assert_close(gradient_norm_estimate(network, images, "l2"), expected.square().sum(1).sqrt())


def test_gradients_are_in_pixel_units():
    """Normalisation inside the network: the slope per pixel is 1/std of the slope per normalised unit."""
    torch.manual_seed(0)
    narrow = architectures.build("mlp", (1, 2, 2), 3, [0.0], [0.25], hidden_layers=1).double()
    wide = architectures.build("mlp", (1, 2, 2), 3, [0.0], [1.0], hidden_layers=1).double()
    wide.load_state_dict({**narrow.state_dict(), "0.std": torch.ones(1, 1, 1)})
    images = torch.rand(4, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(
        gradient_norm_estimate(narrow, images, "l2"), 4 * gradient_norm_estimate(wide, 4 * images, "l2")
    )


@pytest.mark.parametrize("name", ["conv-small", "mlp", "resnet-small", "resnet18"])
def test_sample_by_sample_by_finite_differences(name):
    """In eval mode every sample has its own gradient, whatever shares its batch."""
    torch.manual_seed(0)
    network = architectures.build(name, (1, 8, 8), 4, [0.5], [0.3], width=4).double().eval()
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    _, gradient = score_gradient(network, images)
    direction = torch.randn_like(images)
    with torch.no_grad():
        rise = (energy(network(images + 1e-6 * direction)) - energy(network(images - 1e-6 * direction))) / 2e-6
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), rise, rtol=1e-6, atol=1e-9)
    alone = torch.cat([score_gradient(network, image[None])[1] for image in images])
    torch.testing.assert_close(gradient, alone, rtol=1e-10, atol=1e-14)


def test_works_where_gradients_are_switched_off():
    network = linear(torch.ones(1, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), (1, 2, 2))
    with torch.no_grad():
        _, gradient = score_gradient(network, torch.zeros(1, 1, 2, 2, dtype=torch.float64))
    assert torch.equal(gradient, -torch.ones(1, 1, 2, 2, dtype=torch.float64))
    assert all(parameter.grad is None for parameter in network.parameters())
