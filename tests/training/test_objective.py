from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from grood_cert.errors import InputError
from grood_cert.networks import architectures
from grood_cert.sections import ObjectiveSection
from grood_cert.training.objective import Roles, Terms, energy_loss, gradient_shares, objective
from tests.training.examples import with_batch_statistics

WEIGHTS = ObjectiveSection(lambda_S=0.3, lambda_grad=0.7, m_in=-1.9, m_out=-1.7)
ENERGY_ONLY = ObjectiveSection(lambda_S=0.3, lambda_grad=0.0, m_in=-1.9, m_out=-1.7)


def smooth_network(classes: int = 5) -> nn.Sequential:
    """tanh in place of ReLU, so that finite differences see no kinks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, classes)).double()


def build(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return architectures.build(name, (1, 8, 8), 5, [0.4], [0.3], width=8).double()


def batch(count_id: int = 6, count_aux: int = 9, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count_id + count_aux, 1, side, side, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 5, (count_id,), generator=generator)
    return images[:count_id], labels, images[count_id:]


def score_of(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """-log sum exp f(x) of one image, written out."""
    return -network(image[None])[0].exp().sum().log()


def reference(network: nn.Module, images, labels, outliers, weights: ObjectiveSection) -> dict[str, torch.Tensor]:
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
    weights = ObjectiveSection(0.3, 0.7, m_in, m_out)
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
    """Scores on both sides of both margins and on them: L_grad counts the samples past theirs, L_S the others."""
    score_id = torch.tensor([-9.0, -8.0, -7.0])  # past, on and short of m_in = -8
    score_aux = torch.tensor([-3.0, -2.0, -1.0])  # short of, on and past m_out = -2
    assert (3 * gradient_shares(score_id, score_aux, -8.0, -2.0)).tolist() == [1, 1, 0, 0, 1, 1]
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


def test_all_inactive_means_no_penalty_and_finite_gradients():
    network, data = build("conv-small"), batch()
    terms = objective(network, *data, ObjectiveSection(0.3, 0.7, m_in=-100.0, m_out=100.0))
    assert terms.gradient == 0
    assert terms.active_gradient_id == terms.active_gradient_aux == 0
    assert parameter_gradient(network, terms.total).isfinite().all()


def test_a_flat_network_has_finite_gradients():
    """Every ReLU dead: the slope is exactly 0, where a hand-written root of a sum of squares has derivative NaN."""
    network, data = build("mlp"), batch()
    with torch.no_grad():
        network[2].weight.zero_()
        network[2].bias.fill_(-1.0)
    terms = objective(network, *data, ObjectiveSection(0.3, 0.7, m_in=100.0, m_out=200.0))
    assert terms.active_gradient_id == 1 and terms.gradient == 0
    assert parameter_gradient(network, terms.total).isfinite().all()


def test_parameter_gradient_by_finite_differences():
    network, data = smooth_network(), batch(side=4)
    weights = ObjectiveSection(
        lambda_S=0.0, lambda_grad=1.0, m_in=100.0, m_out=-100.0
    )  # all active, none near a margin
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


def test_the_slope_is_that_of_each_sample_under_the_statistics_of_the_batch():
    """With BatchNorm: as if the batch's mean and variance stood in the buffers of the network in eval mode."""
    network, (images, labels, outliers) = build("resnet18"), batch()
    weights = ObjectiveSection(lambda_S=0.3, lambda_grad=0.7, m_in=100.0, m_out=-100.0)
    fixed = with_batch_statistics(network, torch.cat([images, outliers]))
    terms = objective(network, images, labels, outliers, weights)
    expected = reference(fixed, images, labels, outliers, weights)
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


@pytest.mark.parametrize("name", ["conv-small", "resnet-small"])
def test_the_interval_slope_at_radius_zero_is_the_gradient_norm_and_grows_with_the_radius(name):
    network, data = build(name).eval(), batch()
    weights = replace(WEIGHTS, m_in=100.0, m_out=-100.0)
    point = objective(copy.deepcopy(network), *data, weights).gradient
    found = [
        objective(copy.deepcopy(network), *data, replace(weights, slope="interval", slope_eps=eps)).gradient
        for eps in (0.0, 0.05, 0.1)
    ]
    torch.testing.assert_close(found[0], point, rtol=1e-6, atol=0)
    assert found[0] < found[1] < found[2]


def authors_step(
    network: nn.Module, images, labels, outliers, weights: ObjectiveSection, std: torch.Tensor
) -> torch.Tensor:
    """One loss of the authors' training script, from method.md section 2: two train-mode passes, division by N."""
    together = torch.cat([images, outliers])
    logits = network(together)
    score = -logits.logsumexp(1)
    loss_s = (functional.relu(score[: len(images)] - weights.m_in) ** 2).mean()
    loss_s = loss_s + (functional.relu(weights.m_out - score[len(images) :]) ** 2).mean()
    together = together.clone().requires_grad_(True)
    score = -network(together).logsumexp(1)
    inside, outside = score[: len(images)], score[len(images) :]
    scalar = functional.relu(outside - weights.m_out).mean() - functional.relu(weights.m_in - inside).mean()
    (gradient,) = torch.autograd.grad(scalar, together, create_graph=True)
    penalty = (gradient * std).flatten(1).norm(dim=1).sum() / len(together)
    cross_entropy = functional.cross_entropy(logits[: len(images)], labels)
    return cross_entropy + weights.lambda_S * loss_s + weights.lambda_grad * penalty


@pytest.mark.parametrize("coordinates", ["pixels", "normalised"])
def test_reference_reduction_is_the_authors_step_to_the_number(coordinates):
    weights = replace(WEIGHTS, reduction="reference", coordinates=coordinates)
    network, data = build("resnet-small"), batch()
    twin = copy.deepcopy(network)
    terms = objective(network, *data, weights)
    expected = authors_step(twin, *data, weights, torch.tensor(0.3 if coordinates == "normalised" else 1.0))
    assert terms.gradient > 0
    torch.testing.assert_close(terms.total, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        parameter_gradient(network, terms.total), parameter_gradient(twin, expected), rtol=1e-10, atol=1e-14
    )
    for key, value in twin.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key


@pytest.mark.parametrize("lambda_grad", [0.0, 0.7])
def test_reference_reduction_moves_running_statistics_twice_whatever_the_weight(lambda_grad):
    network = build("resnet-small")
    weights = replace(WEIGHTS, reduction="reference", lambda_grad=lambda_grad)
    terms = objective(network, *batch(), weights)
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert layers and all(layer.num_batches_tracked == 2 for layer in layers)
    assert terms.gradient > 0


@pytest.mark.parametrize(("count_id", "count_aux", "ratio"), [(64, 64, 128), (64, 128, 192), (32, 64, 96)])
@pytest.mark.parametrize("name", ["mlp", "resnet-small"])
def test_paper_over_reference_is_the_batch_size(name, count_id, count_aux, ratio):
    """GReg at batch 64, GReg+ at 64 and at 32; with BatchNorm in eval mode as well as without it."""
    network, data = build(name).eval(), batch(count_id, count_aux)
    weights = ObjectiveSection(lambda_S=0.0, lambda_grad=1.0, m_in=-1.8, m_out=-1.8)
    paper = objective(network, *data, weights)
    reference_ = objective(network, *data, replace(weights, reduction="reference"))
    assert 0 < paper.active_gradient_id + paper.active_gradient_aux
    torch.testing.assert_close(paper.gradient / reference_.gradient, torch.tensor(float(ratio)).double())
    cross_entropy = parameter_gradient(network, objective(network, *data, replace(weights, lambda_grad=0.0)).total)
    torch.testing.assert_close(
        parameter_gradient(network, paper.total) - cross_entropy,
        ratio * (parameter_gradient(network, reference_.total) - cross_entropy),
        rtol=1e-8,
        atol=1e-12,
    )


@pytest.mark.parametrize("times", [2, 4, 8])
def test_repeating_the_batch_divides_the_reference_penalty(times):
    network, (images, labels, outliers) = build("conv-small"), batch()
    weights = replace(WEIGHTS, reduction="reference")
    once = objective(network, images, labels, outliers, weights)
    again = objective(
        network, images.repeat(times, 1, 1, 1), labels.repeat(times), outliers.repeat(times, 1, 1, 1), weights
    )
    torch.testing.assert_close(once.gradient, times * again.gradient, rtol=1e-12, atol=0)


def test_a_slope_per_normalised_unit_is_std_times_that_per_pixel():
    network, data = build("conv-small"), batch()
    pixels = objective(network, *data, WEIGHTS).gradient
    for penalty in ("exact", "fast"):
        units = objective(network, *data, replace(WEIGHTS, coordinates="normalised", penalty=penalty)).gradient
        torch.testing.assert_close(units, 0.3 * pixels, rtol=1e-6, atol=0)
    with pytest.raises(InputError, match="one Normalize layer, this one has 0"):
        objective(smooth_network(), *batch(side=4), replace(WEIGHTS, coordinates="normalised"))


@pytest.mark.parametrize("lambda_grad", [0.0, 0.7])
def test_outlier_exposure_is_cross_entropy_to_uniform(lambda_grad):
    network, (images, labels, outliers) = build("conv-small"), batch()
    terms = objective(network, images, labels, outliers, replace(WEIGHTS, outlier_loss="oe", lambda_grad=lambda_grad))
    expected = functional.cross_entropy(network(outliers), torch.full((9, 5), 0.2, dtype=torch.float64))
    torch.testing.assert_close(terms.energy, expected.detach(), rtol=1e-12, atol=0)
    slope = reference(network, images, labels, outliers, WEIGHTS)["gradient"]
    total = functional.cross_entropy(network(images), labels) + 0.3 * expected + lambda_grad * slope
    torch.testing.assert_close(terms.total, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        parameter_gradient(network, terms.total), parameter_gradient(network, total), rtol=1e-9, atol=1e-14
    )


def test_no_outlier_loss_is_plain_cross_entropy():
    network, (images, labels, outliers) = build("conv-small"), batch()
    terms = objective(network, images, labels, outliers, ObjectiveSection(lambda_grad=0.0, outlier_loss="none"))
    torch.testing.assert_close(terms.total, functional.cross_entropy(network(images), labels), rtol=1e-12, atol=0)
    assert terms.energy == terms.gradient == terms.certified == 0


@pytest.mark.parametrize("outlier_loss", ["energy", "oe"])
def test_roles_choose_who_enters_which_loss(outlier_loss):
    """Each loss is that of a batch of its own outliers alone."""
    network, (images, labels, outliers) = build("conv-small"), batch()
    weights = replace(WEIGHTS, outlier_loss=outlier_loss)
    inside, outside = torch.arange(9) < 4, torch.arange(9) >= 3
    terms = objective(network, images, labels, outliers, weights, roles=Roles(inside, outside))
    first = objective(network, images, labels, outliers[inside], weights)
    second = objective(network, images, labels, outliers[outside], weights)
    for key, expected in (
        ("energy", first.energy),
        ("active_energy_aux", first.active_energy_aux),
        ("gradient", second.gradient),
        ("active_gradient_aux", second.active_gradient_aux),
    ):
        torch.testing.assert_close(getattr(terms, key), expected, rtol=1e-12, atol=0)
    nobody = torch.zeros(9, dtype=torch.bool)
    empty = objective(network, images, labels, outliers, weights, roles=Roles(nobody, nobody))
    assert parameter_gradient(network, empty.total).isfinite().all()
    assert empty.active_energy_aux == empty.active_gradient_aux == 0


def first_order(network: nn.Module, images, labels, outliers, weights: ObjectiveSection) -> torch.Tensor:
    """CE + lambda_S L_S + lambda_grad L_grad, the first-order worst case written out, every pass on one image."""
    total = torch.zeros((), dtype=torch.float64)
    for image, label in zip(images, labels, strict=True):
        total = total - network(image[None])[0].softmax(0)[label].log() / len(images)
    for part, side, margin in ((images, 1.0, weights.m_in), (outliers, -1.0, weights.m_out)):
        for image in part:
            image = image.clone().requires_grad_(True)
            score = score_of(network, image)
            (gradient,) = torch.autograd.grad(score, image, create_graph=True)
            steepest = sum(entry.abs() for entry in gradient.flatten())
            for weight, worst in (
                (weights.lambda_S, score),
                (weights.lambda_grad, score + side * weights.slope_eps * steepest),
            ):
                if side * (worst - margin) > 0:
                    total = total + weight * (worst - margin) ** 2 / len(part)
    return total


@pytest.mark.parametrize("name", ["conv-small", "mlp"])
@pytest.mark.parametrize(("penalty", "precision"), [("exact", 1e-9), ("fast", 1e-4), ("stochastic", 1e-9)])
def test_the_first_order_worst_case_is_its_formula_sample_by_sample(name, penalty, precision):
    """Some samples short of their margins, some beyond, some beyond by more than a move of slope_eps takes back."""
    network, data = build(name), batch(5, 6)
    scores = torch.stack([score_of(network, image) for image in torch.cat([data[0], data[2]])]).detach()
    m_in, m_out = (float(part.sort().values[2:4].mean()) for part in (scores[:5], scores[5:]))
    options = {"slope": "first-order", "slope_eps": 0.01, "penalty": penalty, "penalty_share": 1.0}
    weights = ObjectiveSection(0.3, 0.7, m_in, m_out, **options)
    terms, expected = objective(network, *data, weights), first_order(network, *data, weights)
    assert 0 < terms.energy < terms.gradient
    torch.testing.assert_close(terms.total, expected, rtol=1e-12, atol=0)
    got, wanted = parameter_gradient(network, terms.total), parameter_gradient(network, expected)
    assert (got - wanted).norm() <= precision * wanted.norm()


def test_the_first_order_worst_case_of_a_linear_score_is_its_worst_case():
    """One logit: S = -(w . x + b). Interval bounds are exact, so the certified loss is the same number."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).double()
    images, _, outliers = batch(4, 5, side=4)
    images, outliers = 0.2 + 0.6 * images, 0.2 + 0.6 * outliers  # balls of 0.1 stay in the pixel box
    options = {"m_in": -0.4, "m_out": 0.3, "certified": "both", "certified_eps": 0.1, "certified_ramp": 0.0}
    weights = ObjectiveSection(lambda_grad=1.0, slope="first-order", slope_eps=0.1, **options)
    terms = objective(network, images, torch.zeros(4, dtype=torch.long), outliers, weights)
    assert terms.energy < terms.gradient
    torch.testing.assert_close(terms.gradient, terms.certified, rtol=1e-12, atol=0)


def test_the_first_order_worst_case_gains_nothing_by_a_smaller_scale():
    """Scores twice as near to the middle of the margins: slopes are halved, which GReg rewards and this does not."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).double()
    images, labels, outliers = torch.full((2, 1, 4, 4), 0.5).double(), torch.zeros(2, dtype=torch.long), None
    weight, found = network[1].weight.detach(), {}
    images, outliers = images + 0.4 * weight.sign().reshape(1, 4, 4), images - 0.4 * weight.sign().reshape(1, 4, 4)
    reach = float(0.4 * weight.abs().sum())
    with torch.no_grad():
        network[1].bias.copy_(-0.5 * weight.sum())
    for scale in (1.0, 0.5):
        with torch.no_grad():
            network[1].weight.mul_(scale), network[1].bias.mul_(scale)
        for slope in ("gradient-norm", "first-order"):
            weights = ObjectiveSection(m_in=-0.4 * reach, m_out=0.4 * reach, slope=slope, slope_eps=0.1)
            found[slope, scale] = float(objective(network, images, labels, outliers, weights).gradient)
    assert found["gradient-norm", 0.5] == pytest.approx(found["gradient-norm", 1.0] / 2)
    assert found["first-order", 1.0] == 0 < found["first-order", 0.5]


def test_roles_choose_whose_worst_case_is_trained():
    network, (images, labels, outliers) = build("conv-small"), batch()
    weights, chosen = replace(WEIGHTS, slope="first-order", slope_eps=0.05), torch.arange(9) >= 3
    terms = objective(network, images, labels, outliers, weights, roles=Roles(~chosen, chosen))
    alone = objective(network, images, labels, outliers[chosen], weights)
    torch.testing.assert_close(terms.gradient, alone.gradient, rtol=1e-12, atol=0)
