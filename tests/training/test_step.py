from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn

from grood_cert.errors import InputError
from grood_cert.scores import energy
from grood_cert.sections import OptimizerSection
from grood_cert.training import step as steps
from grood_cert.training.loop import fit
from grood_cert.training.step import Steps, learning_rate
from tests.training.examples import experiment, needs_gpu, network_of, small


def test_one_step_is_plain_sgd_on_the_objective():
    """One full batch: the order of the samples is of no matter, so the step can be written down."""
    data = experiment(train=20, auxiliary=20)
    data = dataclasses.replace(
        data,
        train=dataclasses.replace(data.train, images=data.train.images.double()),
        auxiliary=dataclasses.replace(data.auxiliary, images=data.auxiliary.images.double()),
    )
    twin = network_of(small(network={"name": "conv-small"}), data).double()
    ordered_id, ordered_aux = (
        energy(twin(part.images)).detach().sort().values for part in (data.train, data.auxiliary)
    )
    m_in, m_out = float(ordered_id[6:8].mean()), float(ordered_aux[12:14].mean())  # some samples on either side
    recipe = small(
        network={"name": "conv-small"},
        optimizer={"name": "sgd", "lr": 0.05, "momentum": 0.0, "weight_decay": 0.01, "epochs": 1, "batch_size": 20},
        objective={"m_in": m_in, "m_out": m_out, "lambda_S": 0.3, "lambda_grad": 0.2},
    )
    network = network_of(recipe, data).double()
    (epoch,) = fit(network, data, recipe)
    inside = data.train.images.clone().requires_grad_(True)
    outside = data.auxiliary.images.clone().requires_grad_(True)
    logits = twin(inside)
    score_id, score_aux = -logits.logsumexp(1), -twin(outside).logsumexp(1)
    norm_id, norm_aux = (
        torch.autograd.grad(score.sum(), pixels, create_graph=True)[0].flatten(1).norm(dim=1)
        for score, pixels in ((score_id, inside), (score_aux, outside))
    )
    cross_entropy = nn.functional.cross_entropy(logits, data.train.labels)
    hinge_id, hinge_aux = (score_id >= m_in) * (score_id - m_in) ** 2, (score_aux <= m_out) * (m_out - score_aux) ** 2
    hinge = hinge_id.mean() + hinge_aux.mean()
    slope = ((score_id <= m_in) * norm_id).mean() + ((score_aux >= m_out) * norm_aux).mean()
    assert hinge > 0 and slope > 0
    (cross_entropy + 0.3 * hinge + 0.2 * slope).backward()
    for got, start in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, start - 0.05 * (start.grad + 0.01 * start), rtol=1e-9, atol=1e-12)
    assert epoch.gradient_loss == pytest.approx(float(slope.detach()), rel=1e-6)
    assert epoch.energy_loss == pytest.approx(float(hinge.detach()), rel=1e-6)
    assert epoch.cross_entropy == pytest.approx(float(cross_entropy.detach()), rel=1e-6)
    assert epoch.loss == pytest.approx(epoch.cross_entropy + 0.3 * epoch.energy_loss + 0.2 * epoch.gradient_loss)


@pytest.mark.parametrize("epochs", [1, 3])
def test_cosine_starts_at_lr_and_ends_at_lr_min(epochs):
    """The authors' scheduler: base rate times a cosine from 1 to lr_min / base; base 0.01 ends at 1e-6."""
    section, steps = OptimizerSection(lr=0.01, epochs=epochs), 7 * epochs
    rates = [learning_rate(section, step, steps) for step in range(steps)]
    assert rates[0] == 0.01
    assert rates[-1] == pytest.approx(1e-6, rel=1e-9)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.01)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 1, eta_min=1e-6)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates == pytest.approx(expected, rel=1e-6)


def test_multistep_constant_and_warm_up():
    multistep = OptimizerSection(lr=0.1, schedule="multistep", milestones=(2, 3), factor=0.1, epochs=4)
    rates = [learning_rate(multistep, step, 20) for step in range(20)]  # 5 steps an epoch
    assert rates == pytest.approx([0.1] * 10 + [0.01] * 5 + [0.001] * 5)
    constant = OptimizerSection(lr=0.4, schedule="constant", warmup_steps=3)
    assert [learning_rate(constant, step, 9) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3] + [0.4] * 3)
    cosine = OptimizerSection(lr=0.4, warmup_steps=3, lr_min=0.1)
    rates = [learning_rate(cosine, step, 8) for step in range(8)]
    half = 0.15 / 2**0.5
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.25 + half, 0.25, 0.25 - half, 0.1])


def test_each_step_uses_its_rate():
    """With a gradient fixed at 1 and plain SGD, the weights tell the sum of the rates."""
    data = experiment()
    sections = {"name": "sgd", "lr": 0.25, "momentum": 0.0, "weight_decay": 0.0, "epochs": 4, "batch_size": 10}
    recipe = small(optimizer={**sections, "schedule": "multistep", "milestones": [1, 3], "factor": 0.5})
    network = network_of(recipe, data)
    bias = network[-1].bias
    bias.register_hook(torch.ones_like)
    before = bias.detach().clone()
    rates = [epoch.learning_rate for epoch in fit(network, data, recipe)]
    assert rates == [0.25, 0.125, 0.125, 0.0625]
    torch.testing.assert_close(before - bias, torch.full_like(bias, 2 * sum(rates)))


@pytest.mark.parametrize("clip_norm", [0.0, 0.01, 1000.0])
def test_a_gradient_that_is_too_long_is_shortened(clip_norm):
    """Parts of a batch are clipped together: plain SGD with rate 1 moves the weights by no more than clip_norm."""
    data, moves = experiment(), []
    sections = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 20, "accumulate": 2}
    for clip in (0.0, clip_norm):
        recipe = small(optimizer={**sections, "clip_norm": clip, "schedule": "constant"})
        network = network_of(recipe, data)
        before = nn.utils.parameters_to_vector(network.parameters()).detach()
        steps = Steps(network, data, recipe, torch.device("cpu"))
        steps.take(0, steps.read(torch.arange(20), torch.arange(10).repeat(2)))
        moves.append(nn.utils.parameters_to_vector(network.parameters()).detach() - before)
    length = float(moves[0].norm())
    assert 0.01 < length < 1000
    factor = 0.01 / length if clip_norm == 0.01 else 1.0
    torch.testing.assert_close(moves[1], factor * moves[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        {"certified": "both", "certified_eps": 0.1, "certified_mix": 0.5},
        {"certified": "ood", "certified_eps": 0.1, "certified_method": "crown-ibp"},
        {"slope": "interval", "slope_eps": 0.01},
    ],
)
def test_training_noise_goes_with_terms_over_balls(objective):
    recipe = small(objective=objective, augmentation={"noise_sigma": 0.3}, optimizer={"epochs": 2})
    assert len(list(fit(network_of(recipe, experiment()), experiment(), recipe))) == 2


@pytest.mark.parametrize(
    "objective",
    [
        {"lambda_S": 0.1},
        {"lambda_grad": 0.1},
        {"reduction": "reference"},
        {"certified": "ood", "certified_eps": 0.1},
    ],
)
def test_outliers_are_in_the_batch_as_soon_as_a_term_looks_at_them(objective, monkeypatch):
    recipe = small(objective={"lambda_S": 0, "lambda_grad": 0, **objective}, optimizer={"epochs": 1})
    seen, original = [], steps.objective

    def watch(network, images_id, labels, images_aux, weights, **options):
        seen.append((len(images_id), len(images_aux)))
        return original(network, images_id, labels, images_aux, weights, **options)

    monkeypatch.setattr(steps, "objective", watch)
    list(fit(network_of(recipe, experiment()), experiment(), recipe))
    assert seen and all(inside == outside for inside, outside in seen)


def test_parts_of_a_batch_move_the_running_statistics_once():
    """A step of 5 images in parts of 3 and 2: the mean of what each part alone does to the statistics, by their shares."""
    data = experiment(train=5, auxiliary=5)
    recipe = small(
        network={"name": "resnet-small", "width": 2},
        objective={"lambda_grad": 0},
        optimizer={"batch_size": 5, "accumulate": 2},
    )
    network = network_of(recipe, data)
    expected = {name: torch.zeros_like(value) for name, value in network.named_buffers() if "running" in name}
    inside, outside = torch.tensor([4, 0, 2, 1, 3]), torch.tensor([1, 3, 0, 4, 2])
    for part, share in ((slice(0, 3), 0.6), (slice(3, 5), 0.4)):
        twin = copy.deepcopy(network).train()
        twin(torch.cat([data.train.images[inside[part]], data.auxiliary.images[outside[part]]]))
        for name, mean in expected.items():
            mean += share * twin.get_buffer(name)
    taking = Steps(network.train(), data, recipe, torch.device("cpu"))
    taking.take(0, taking.read(inside, outside))
    assert len(expected) > 4
    for name, mean in expected.items():
        torch.testing.assert_close(network.get_buffer(name), mean)


@pytest.mark.parametrize("objective", [{"lambda_grad": 0}, {"m_in": 5.0, "m_out": 6.0}])
@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_running_statistics_move_by_the_share_of_the_recipe(momentum, objective):
    """Towards mean and unbiased variance of the batch; 0 leaves them alone, and the loss is that of the eval-mode network."""
    data = experiment(train=6, auxiliary=6)
    recipe = small(
        network={"name": "resnet-small", "width": 2},
        objective=objective,
        optimizer={"name": "sgd", "momentum": 0.0, "batch_size": 6, "batch_norm_momentum": momentum},
    )
    network = network_of(recipe, data)
    first = next(layer for layer in network if isinstance(layer, nn.BatchNorm2d))
    first.running_mean.uniform_(-1, 1)
    first.running_var.uniform_(1, 2)
    before, weight = copy.deepcopy(network).eval(), first.weight.detach().clone()
    batch = torch.cat([data.train.images, data.auxiliary.images])
    seen = network[1](network[0](batch)).detach().transpose(0, 1).flatten(1)  # what the first BatchNorm is given
    taking = Steps(network, data, recipe, torch.device("cpu"))
    taking.begin()
    terms = taking.take(0, taking.read(torch.arange(6), torch.arange(6)))
    for name, value in (("running_mean", seen.mean(1)), ("running_var", seen.var(1))):
        expected = torch.lerp(before[2].get_buffer(name), value, momentum)
        torch.testing.assert_close(first.get_buffer(name), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(first.weight, weight), "its weights are trained in any case"
    assert all(layer.training for layer in network.modules() if layer not in taking.layers or momentum)
    if momentum == 0:
        for name, value in before.named_buffers():
            assert torch.equal(network.get_buffer(name), value), name
        loss = nn.functional.cross_entropy(before(data.train.images), data.train.labels).detach()
        assert float(terms[steps.TERMS.index("cross_entropy")]) == pytest.approx(float(loss), rel=1e-5)


def test_a_step_that_is_no_number_leaves_the_running_statistics():
    recipe, data = small(network={"name": "resnet-small", "width": 2}), experiment()
    network = network_of(recipe, data).train()
    before = {name: value.clone() for name, value in network.named_buffers() if "running" in name}
    data.train.images[3] = float("nan")
    steps = Steps(network, data, recipe, torch.device("cpu"))
    assert steps.take(0, steps.read(torch.arange(5), torch.arange(5))) is None
    assert all(torch.equal(network.get_buffer(name), value) for name, value in before.items())


def test_the_probe_of_the_gradient_term_changes_nothing(monkeypatch):
    """Same weights, statistics and random numbers, whether it is timed or not; BatchNorm, stochastic penalty."""
    recipe = small(
        network={"name": "resnet-small", "width": 2},
        objective={"penalty": "stochastic", "penalty_share": 0.5, "m_in": 5.0, "m_out": 6.0},
        augmentation={"noise_sigma": 0.1},
    )
    data = experiment()
    probed, plain = network_of(recipe, data), network_of(recipe, data)
    shares = [epoch.gradient_share for epoch in fit(probed, data, recipe)]
    assert len(set(shares)) == 1 and 0 < shares[0] < 1, "timed once in so short a run"
    monkeypatch.setattr(Steps, "gradient_share", lambda *arguments: 0.0)
    list(fit(plain, data, recipe))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in probed.state_dict().items())


def test_without_the_gradient_term_there_is_nothing_to_time():
    (epoch,) = fit(
        network_of(small(), experiment()), experiment(), small(objective={"lambda_grad": 0}, optimizer={"epochs": 1})
    )
    assert epoch.gradient_share == 0 and epoch.samples_per_second > 0


def test_picked_outliers_reach_the_objective_with_their_roles(monkeypatch):
    recipe = small(sampling={"method": "energy", "pool": 9}, optimizer={"batch_size": 4, "epochs": 1})
    data, seen = experiment(train=20, auxiliary=30), []
    original = steps.objective

    def watch(network, images_id, labels, images_aux, weights, **options):
        seen.append((images_aux, options["roles"], options["progress"]))
        return original(network, images_id, labels, images_aux, weights, **options)

    monkeypatch.setattr(steps, "objective", watch)
    monkeypatch.setattr(Steps, "gradient_share", lambda *arguments: 0.0)
    list(fit(network_of(recipe, data), data, recipe))
    assert [progress for _, _, progress in seen] == [0.0, 0.2, 0.4, 0.6, 0.8]
    for images_aux, roles, _ in seen:
        assert len(images_aux) == 8 and len(roles.energy) == len(roles.gradient) == 8
        assert len(images_aux.unique(dim=0)) == 8, "no outlier twice in a step"
        assert all(any(torch.equal(image, other) for other in data.auxiliary.images) for image in images_aux)


@pytest.mark.parametrize("name", ["mlp", "resnet-small"])
def test_a_compiled_network_trains_as_it_is_written(name, monkeypatch):
    """By tracing alone: generating and compiling C++ takes half a minute, and is torch's own business."""
    compiled: list[nn.Module] = []

    def traced(network: nn.Module) -> object:
        compiled.append(network)
        return compiler(network, backend="aot_eager")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    sections = {
        "network": {"name": name, "width": 2},
        "objective": {"penalty": "fast", "m_in": -1.0, "m_out": -0.5},
        "optimizer": {"batch_size": 10},
    }
    data, networks = experiment(), []
    for recipe in (small(**sections), small(**sections, compute={"compile": True})):
        networks.append(network_of(recipe, data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about itself
            losses = [epoch.gradient_loss for epoch in fit(networks[-1], data, recipe)]
        assert max(losses) > 0
    assert compiled == networks[1:]
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("compute", "device"),
    [
        ({"precision": "bf16"}, "cpu"),
        pytest.param({"channels_last": True}, "cuda", marks=needs_gpu),
        pytest.param({"precision": "bf16", "channels_last": True}, "cuda", marks=needs_gpu),
    ],
)
def test_other_arithmetic_trains_the_same_network_nearly(compute, device):
    """Against float32 in the usual layout: the loss agrees as far as bfloat16's 8 bits carry."""
    data = experiment(shape=(3, 8, 8))
    sections = {"network": {"name": "resnet-small", "width": 2}, "objective": {"penalty": "fast"}}
    usual, other = small(**sections), small(**sections, compute=compute)
    (first, *_), (second, *_) = (list(fit(network_of(recipe, data), data, recipe, device)) for recipe in (usual, other))
    assert second.loss == pytest.approx(first.loss, rel=0.02)
    assert second.gradient_norm_id == pytest.approx(first.gradient_norm_id, rel=0.2)


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_off_in_training_unless_asked_for(allowed):
    """In the passes forwards and backwards; what was set before is set again."""

    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision() != "highest"

    data, recipe, seen, before = experiment(), small(optimizer={"epochs": 1}), [], flags()
    network = network_of(recipe, data)
    for register in (network.register_forward_hook, network[-1].register_full_backward_hook):
        register(lambda *_: seen.append(flags()) if network.training else None)
    if allowed:
        recipe = small(optimizer={"epochs": 1}, compute={"precision": "tf32"})
        with pytest.raises(
            InputError, match=r'"tf32" is for a GPU; use --device cuda, or --set compute\.precision=float32'
        ):
            Steps(network, data, recipe, torch.device("cpu"))
        step = Steps(network, data, small(optimizer={"epochs": 1}), torch.device("cpu"))
        step.recipe = recipe
        network.train()
        assert step.take(0, step.read(torch.arange(20), torch.arange(10))) is not None
    else:
        list(fit(network, data, recipe))
    assert set(seen) == {(allowed, allowed)} and flags() == before
