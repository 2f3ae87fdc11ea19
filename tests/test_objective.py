from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from grood_cert import networks
from grood_cert.objective import Terms, Weights, energy_loss, gradient_loss, objective

WEIGHTS = Weights(lambda_S=0.3, lambda_grad=0.7, m_in=-1.9, m_out=-1.7)
ENERGY_ONLY = Weights(lambda_S=0.3, lambda_grad=0.0, m_in=-1.9, m_out=-1.7)


def smooth_network(classes: int = 5) -> nn.Sequential:
    """tanh in place of ReLU, so that finite differences see no kinks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, classes)).double()


def build(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return networks.build(name, (1, 8, 8), 5, [0.4], [0.3], width=8).double()


def batch(count_id: int = 6, count_aux: int = 9, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count_id + count_aux, 1, side, side, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 5, (count_id,), generator=generator)
    return images[:count_id], labels, images[count_id:]


def score_of(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """-log sum exp f(x) of one image, written out."""
    return -network(image[None])[0].exp().sum().log()


def reference(network: nn.Module, images, labels, outliers, weights: Weights) -> dict[str, torch.Tensor]:
    """The formula as printed, sample by sample, every network pass on one image (no BatchNorm)."""

    def slope(image: torch.Tensor) -> torch.Tensor:
        image = image.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(score_of(network, image), image, create_graph=True)
        return gradient.square().sum().sqrt()

    cross_entropy = hinge_id = hinge_aux = slope_id = slope_aux = torch.zeros((), dtype=torch.float64)
    for image, label in zip(images, labels, strict=True):
        score = score_of(network, image)
        cross_entropy = cross_entropy - network(image[None])[0].softmax(0)[label].log() / len(images)
        if score >= weights.m_in:
            hinge_id = hinge_id + (score - weights.m_in) ** 2 / len(images)
        if score <= weights.m_in:
            slope_id = slope_id + slope(image) / len(images)
    for image in outliers:
        score = score_of(network, image)
        if score <= weights.m_out:
            hinge_aux = hinge_aux + (weights.m_out - score) ** 2 / len(outliers)
        if score >= weights.m_out:
            slope_aux = slope_aux + slope(image) / len(outliers)
    energy, gradient = hinge_id + hinge_aux, slope_id + slope_aux
    total = cross_entropy + weights.lambda_S * energy + weights.lambda_grad * gradient
    return {"total": total, "cross_entropy": cross_entropy, "energy": energy, "gradient": gradient}


def parameter_gradient(network: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    parts = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(part.flatten() for part in parts if part is not None)])


@pytest.mark.parametrize("name", ["conv-small", "mlp"])
def test_equals_the_printed_formula_sample_by_sample(name):
    network, data = build(name), batch()
    scores = torch.stack([score_of(network, image) for image in torch.cat([data[0], data[2]])]).detach()
    m_in, m_out = (float(part.sort().values[2:4].mean()) for part in (scores[:6], scores[6:]))  # between two scores
    weights = Weights(0.3, 0.7, m_in, m_out)
    terms, expected = objective(network, *data, weights), reference(network, *data, weights)
    assert 0 < terms.active_gradient_id < 1, "the test needs samples on both sides of the margins"
    assert 0 < terms.active_gradient_aux < 1
    for key, value in expected.items():
        torch.testing.assert_close(getattr(terms, key), value, rtol=1e-12, atol=0, check_dtype=False)
    torch.testing.assert_close(
        parameter_gradient(network, terms.total), parameter_gradient(network, expected["total"]), rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("times", [2, 4])
def test_repeating_the_batch_changes_nothing(times):
    network, (images, labels, outliers) = build("conv-small"), batch()
    once = objective(network, images, labels, outliers, WEIGHTS)
    again = objective(
        network, images.repeat(times, 1, 1, 1), labels.repeat(times), outliers.repeat(times, 1, 1, 1), WEIGHTS
    )
    assert once.gradient > 0
    for key in vars(once):
        torch.testing.assert_close(getattr(once, key), getattr(again, key), rtol=1e-12, atol=0)


def test_indicators_point_the_right_way():
    """Scores on both sides of both margins and on them; each norm a power of two, so that the sum tells who counted."""
    score_id = torch.tensor([-9.0, -8.0, -7.0])  # past, on and short of m_in = -8
    score_aux = torch.tensor([-3.0, -2.0, -1.0])  # short of, on and past m_out = -2
    norms = torch.tensor([1.0, 2.0, 4.0])
    nothing = torch.zeros(3)
    assert 3 * gradient_loss(norms, nothing, score_id, score_aux, -8.0, -2.0) == 1 + 2
    assert 3 * gradient_loss(nothing, norms, score_id, score_aux, -8.0, -2.0) == 2 + 4
    assert energy_loss(score_id, torch.tensor([0.0]), -8.0, -2.0) == torch.tensor(1 / 3)
    assert energy_loss(torch.tensor([-9.0]), score_aux, -8.0, -2.0) == torch.tensor(1 / 3)
    assert energy_loss(torch.tensor([-5.0]), torch.tensor([-6.0]), -8.0, -2.0) == 9 + 16


def test_active_shares_count_the_indicators():
    network, (images, labels, outliers) = build("mlp"), batch()
    terms = objective(network, images, labels, outliers, WEIGHTS)
    score_id = torch.stack([score_of(network, image) for image in images])
    score_aux = torch.stack([score_of(network, image) for image in outliers])
    assert terms.active_energy_id == (score_id >= -1.9).sum() / 6
    assert terms.active_gradient_id == (score_id <= -1.9).sum() / 6
    torch.testing.assert_close(terms.active_energy_aux, (score_aux <= -1.7).sum() / 9)
    torch.testing.assert_close(terms.active_gradient_aux, (score_aux >= -1.7).sum() / 9)


def test_no_gradient_flows_through_the_indicators():
    score_id = torch.tensor([-9.0, -8.0, -7.0], requires_grad=True)
    score_aux = torch.tensor([-3.0, -2.0, -1.0], requires_grad=True)
    norms = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    gradients = torch.autograd.grad(
        gradient_loss(norms, norms, score_id, score_aux, -8.0, -2.0),
        [norms, score_id, score_aux],
        allow_unused=True,
    )
    assert torch.equal(3 * gradients[0], torch.tensor([1.0, 2.0, 1.0]))
    assert all(gradient is None or not gradient.any() for gradient in gradients[1:])


def test_all_inactive_means_no_penalty_and_finite_gradients():
    network, data = build("conv-small"), batch()
    terms = objective(network, *data, Weights(0.3, 0.7, m_in=-100.0, m_out=100.0))
    assert terms.gradient == 0
    assert terms.active_gradient_id == terms.active_gradient_aux == 0
    assert parameter_gradient(network, terms.total).isfinite().all()


def test_a_flat_network_has_finite_gradients():
    """Every ReLU dead: the slope is exactly 0, where a hand-written root of a sum of squares has derivative NaN."""
    network, data = build("mlp"), batch()
    with torch.no_grad():
        network[2].weight.zero_()
        network[2].bias.fill_(-1.0)
    terms = objective(network, *data, Weights(0.3, 0.7, m_in=100.0, m_out=200.0))
    assert terms.active_gradient_id == 1 and terms.gradient == 0
    assert parameter_gradient(network, terms.total).isfinite().all()


def test_parameter_gradient_by_finite_differences():
    network, data = smooth_network(), batch(side=4)
    weights = Weights(lambda_S=0.0, lambda_grad=1.0, m_in=100.0, m_out=-100.0)  # all active, none near a margin
    parameters = list(network.parameters())

    def penalty() -> torch.Tensor:
        terms = objective(network, *data, weights)
        return terms.total - terms.cross_entropy

    gradients = torch.autograd.grad(objective(network, *data, weights).total, parameters)
    cross_entropy = functional.cross_entropy(network(data[0]), data[1])
    gradients = [a - b for a, b in zip(gradients, torch.autograd.grad(cross_entropy, parameters), strict=True)]
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        directions = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in parameters]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += sign * 1e-5 * direction
            values.append(float(penalty().detach()))
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter -= sign * 1e-5 * direction
        expected = (values[0] - values[1]) / 2e-5
        got = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["conv-small", "resnet18"])
def test_weight_zero_is_energy_fine_tuning(name):
    """CE + lambda_S L_S as Liu et al. write it, and only the one ordinary forward pass."""
    network, (images, labels, outliers) = build(name), batch()
    twin = copy.deepcopy(network)
    passes = []
    network.register_forward_hook(lambda module, inputs, output: passes.append(inputs[0].requires_grad))
    terms = objective(network, images, labels, outliers, ENERGY_ONLY)
    logits = twin(torch.cat([images, outliers]))
    free_energy = -logits.logsumexp(1)
    loss_s = (functional.relu(free_energy[:6] + 1.9) ** 2).mean() + (
        functional.relu(-1.7 - free_energy[6:]) ** 2
    ).mean()
    expected = functional.cross_entropy(logits[:6], labels) + 0.3 * loss_s
    torch.testing.assert_close(terms.total, expected, rtol=1e-13, atol=0)
    assert torch.equal(parameter_gradient(network, terms.total), parameter_gradient(twin, expected))
    assert passes == [False], "one pass, and none that tracks the pixels"
    assert terms.gradient == 0


@pytest.mark.parametrize("weights", [WEIGHTS, ENERGY_ONLY])
def test_running_statistics_move_once_a_step(weights):
    """new = 0.9 old + 0.1 batch statistics, of the whole batch: ID and auxiliary images together."""
    network, (images, labels, outliers) = build("resnet18"), batch()
    convolution, norm = network[1], network[2]
    with torch.no_grad():
        values = convolution(network[0](torch.cat([images, outliers]))).transpose(0, 1).flatten(1)
    objective(network, images, labels, outliers, weights).total.backward()
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(layers) == 20
    assert all(layer.num_batches_tracked == 1 and layer.training for layer in layers)
    torch.testing.assert_close(norm.running_mean, 0.1 * values.mean(1))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * values.var(1))


def test_id_and_auxiliary_images_share_one_batch_norm_batch():
    network, (images, labels, outliers) = build("resnet18"), batch()
    twin = copy.deepcopy(network)
    logits = twin(torch.cat([images, outliers]))
    terms = objective(network, images, labels, outliers, WEIGHTS)
    torch.testing.assert_close(terms.cross_entropy, functional.cross_entropy(logits[:6], labels), rtol=1e-12, atol=0)
    apart = functional.cross_entropy(copy.deepcopy(twin)(images), labels)
    assert not torch.isclose(apart, terms.cross_entropy, rtol=1e-3), "the test must be able to tell the two apart"


def test_penalised_slope_is_that_of_the_eval_mode_network():
    """With BatchNorm: per-sample gradients of the network that is certified, its statistics after this step."""
    network, (images, labels, outliers) = build("resnet18"), batch()
    weights = Weights(lambda_S=0.3, lambda_grad=0.7, m_in=100.0, m_out=-100.0)
    terms = objective(network, images, labels, outliers, weights)
    expected = reference(copy.deepcopy(network).eval(), images, labels, outliers, weights)
    torch.testing.assert_close(terms.gradient, expected["gradient"].detach(), rtol=1e-10, atol=0)
    assert network.training and all(module.training for module in network.modules())


def test_layers_frozen_by_the_caller_stay_frozen():
    network, data = build("resnet18"), batch()
    network[2].eval()
    objective(network, *data, WEIGHTS)
    assert not network[2].training and network[2].num_batches_tracked == 0


def test_terms_share_no_graph_but_the_total():
    terms = objective(build("mlp"), *batch(), WEIGHTS)
    assert isinstance(terms, Terms)
    assert terms.total.requires_grad
    assert not any(value.requires_grad for key, value in vars(terms).items() if key != "total")
