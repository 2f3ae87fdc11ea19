from __future__ import annotations

import copy
import csv
import dataclasses
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from grood_cert import detector as detectors
from grood_cert import metrics
from grood_cert.data import Experiment, ImageSet, StoredImages, experiment_of
from grood_cert.errors import InputError, RunError
from grood_cert.recipe import OptimizerSection, Recipe, from_dict
from grood_cert.scores import energy
from grood_cert.training import run as training

SMALL = {
    "data": {"train_limit": 90, "ood": ["digits:8,9", "uniform-noise"]},
    "network": {"name": "mlp", "width": 8},
    "optimizer": {"epochs": 2, "batch_size": 40},
}


def small(**sections) -> Recipe:
    return from_dict({**SMALL, **{name: {**SMALL.get(name, {}), **values} for name, values in sections.items()}})


def images(count: int, classes: int, seed: int, shape: tuple[int, int, int] = (1, 8, 8), kind: str = "id") -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    return ImageSet(
        name=f"{kind}-{seed}",
        kind=kind,
        images=torch.rand(count, *shape, generator=generator),
        labels=torch.arange(count) % classes,
        class_names=tuple(map(str, range(classes))),
    )


def experiment(train: int = 20, auxiliary: int = 10, **options) -> Experiment:
    return Experiment(
        train=images(train, 3, 0, **options),
        calibration=images(25, 3, 1, **options),
        test=images(25, 3, 2, **options),
        auxiliary=images(auxiliary, 1, 3, kind="ood", **options),
        auxiliary_heldout=images(10, 1, 4, kind="ood", **options),
        ood=(images(12, 1, 5, kind="ood", **options), images(12, 1, 6, kind="noise", **options)),
    )


def network_of(recipe: Recipe, data: Experiment) -> nn.Sequential:
    torch.manual_seed(0)
    return training.architecture_of(recipe, data).build()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    recipe = small()
    epochs: list[training.Epoch] = []
    steps = {"announced": 0, "done": 0}

    def advance() -> None:
        steps["done"] += 1

    detector = training.run(
        recipe, out, begin=lambda count: steps.update(announced=count), advance=advance, report=epochs.append
    )
    return recipe, out, detector, epochs, steps


def test_a_run_leaves_a_checkpoint_and_a_log(finished):
    recipe, out, detector, epochs, steps = finished
    assert {"log.csv", "model.pt"} <= {*os.listdir(out)} <= {"log.csv", "model.pt", "best.pt"}, "no trace of the state"
    assert steps == {"announced": 6, "done": 6}  # 90 images, at most 40 a batch, 2 epochs
    with (out / "log.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [item.name for item in dataclasses.fields(training.Epoch)]
    assert [{key: float(value) for key, value in row.items()} for row in rows] == [
        dataclasses.asdict(epoch) for epoch in epochs
    ]
    loaded = detectors.load(out / "model.pt")
    assert loaded.origin.recipe == recipe
    assert loaded.class_names == ("0", "1", "2", "3", "4", "5")
    assert loaded.origin.metrics == detector.origin.metrics and loaded.gamma == detector.gamma


def test_gamma_and_metrics_follow_from_the_splits(finished):
    """Recomputed from the checkpoint and the images alone."""
    recipe, out, _, _, _ = finished
    loaded, data = detectors.load(out / "model.pt"), experiment_of(recipe)
    scores = energy(loaded.network(data.calibration.images.double())).numpy()
    rank = -(-95 * (len(scores) + 1) // 100)
    assert loaded.gamma == np.sort(scores)[rank - 1]
    assert loaded.origin.calibration == {"samples": 217, "percent": 95}
    logits = loaded.network(data.test.images.double())
    assert loaded.origin.metrics["accuracy"] == float((logits.argmax(1) == data.test.labels).double().mean())
    assert list(loaded.origin.metrics["ood"]) == list(recipe.data.ood)
    for item in data.ood:
        record = loaded.origin.metrics["ood"][item.name]
        outside = energy(loaded.network(item.images.double())).numpy()
        assert (record["kind"], record["samples"]) == (item.kind, len(item))
        assert record["auroc"] == metrics.auroc(energy(logits).numpy(), outside)
        assert record["fpr95_id"] == metrics.fpr95_id(energy(logits).numpy(), outside)
        assert record["fpr95_ood"] == metrics.fpr95_ood(energy(logits).numpy(), outside)


@pytest.mark.parametrize("name", ["conv-small", "resnet18"])
def test_two_runs_give_the_same_bytes(name, tmp_path):
    """On the CPU, whatever the global generator was used for before."""
    recipe = small(
        network={"name": name, "width": 2}, data={"train_limit": 40, "ood": ["digits:8"]}, optimizer={"epochs": 1}
    )
    training.run(recipe, tmp_path / "a")
    torch.rand(7)
    before = torch.random.get_rng_state()
    training.run(recipe, tmp_path / "b")
    assert torch.equal(before, torch.random.get_rng_state()), "a run must not touch the caller's random numbers"
    assert (tmp_path / "a" / "model.pt").read_bytes() == (tmp_path / "b" / "model.pt").read_bytes()
    training.run(dataclasses.replace(recipe, seed=1), tmp_path / "c")
    first, other = (detectors.load(tmp_path / run / "model.pt").network.state_dict() for run in "ac")
    assert not torch.equal(first["1.weight"], other["1.weight"])


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
    (epoch,) = training.fit(network, data, recipe)
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
    rates = [training.learning_rate(section, step, steps) for step in range(steps)]
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
    rates = [training.learning_rate(multistep, step, 20) for step in range(20)]  # 5 steps an epoch
    assert rates == pytest.approx([0.1] * 10 + [0.01] * 5 + [0.001] * 5)
    constant = OptimizerSection(lr=0.4, schedule="constant", warmup_steps=3)
    assert [training.learning_rate(constant, step, 9) for step in range(6)] == pytest.approx(
        [0.1, 0.2, 0.3] + [0.4] * 3
    )
    cosine = OptimizerSection(lr=0.4, warmup_steps=3, lr_min=0.1)
    rates = [training.learning_rate(cosine, step, 8) for step in range(8)]
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
    rates = [epoch.learning_rate for epoch in training.fit(network, data, recipe)]
    assert rates == [0.25, 0.125, 0.125, 0.0625]
    torch.testing.assert_close(before - bias, torch.full_like(bias, 2 * sum(rates)))


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"), [(20, 8, [7, 7, 6]), (9, 8, [5, 4]), (8, 8, [8]), (1, 8, [1])]
)
def test_an_epoch_sees_every_image_once_in_even_batches(monkeypatch, count, batch_size, sizes):
    """No last batch of one sample, on which BatchNorm would stumble, unless there is but one."""
    data = experiment(train=count, auxiliary=6)
    recipe = small(
        network={"name": "resnet18", "width": 4},
        optimizer={"batch_size": batch_size, "epochs": 2},
        objective={"lambda_grad": 0},
    )
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = training.objective

    def watch(network, images_id, labels, images_aux, weights, **options):
        seen.append((images_id, images_aux))
        for image, label in zip(images_id, labels, strict=True):
            (index,) = [i for i in range(count) if torch.equal(data.train.images[i], image)]
            assert data.train.labels[index] == label
        return original(network, images_id, labels, images_aux, weights, **options)

    monkeypatch.setattr(training, "objective", watch)
    epochs = list(training.fit(network_of(recipe, data), data, recipe))
    assert len(epochs) == 2 and all(math.isfinite(epoch.loss) for epoch in epochs)
    assert [len(batch) for batch, _ in seen] == 2 * sizes
    assert [len(batch) for _, batch in seen] == 2 * sizes
    for start in (0, len(sizes)):
        epoch = torch.cat([batch for batch, _ in seen[start : start + len(sizes)]])
        assert sorted(epoch.flatten(1).sum(1).tolist()) == sorted(data.train.images.flatten(1).sum(1).tolist())
    if count >= 6:
        outliers = torch.cat([batch for _, batch in seen[: len(sizes)]]).flatten(1).sum(1).tolist()
        counts = [outliers.count(value) for value in data.auxiliary.images.flatten(1).sum(1).tolist()]
        assert sum(counts) == count and max(counts) - min(counts) <= 1, "outliers in turn, none left out"


def test_the_order_is_reshuffled_every_epoch():
    generator = torch.Generator().manual_seed(0)
    first, second = (training._order(50, 50, generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert len(set(training._order(50, 20, generator).tolist())) == 20
    assert sorted(training._order(3, 9, generator).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_log_measures_the_network_after_the_epoch():
    recipe, data = small(optimizer={"epochs": 1}), experiment()
    network = network_of(recipe, data)
    (epoch,) = training.fit(network, data, recipe)
    assert not network.training
    logits = network(data.calibration.images)
    assert epoch.accuracy == pytest.approx(float((logits.argmax(1) == data.calibration.labels).float().mean()))
    inside, outside = (energy(network(part.images)).detach() for part in (data.calibration, data.auxiliary_heldout))
    assert epoch.fpr95_id == metrics.fpr95_id(inside, outside)
    slopes = [
        torch.autograd.functional.jacobian(lambda x: energy(network(x)), image[None]).norm()
        for image in data.auxiliary_heldout.images
    ]
    assert epoch.gradient_norm_aux == pytest.approx(float(torch.stack(slopes).mean()), rel=1e-5)


def test_divergence_is_a_run_error_and_restores_the_last_good_epoch():
    recipe, data = small(optimizer={"name": "sgd", "lr": 0.01, "epochs": 5}), experiment()
    network = network_of(recipe, data)
    epochs = training.fit(network, data, recipe)
    next(epochs)
    good = {key: value.clone() for key, value in network.state_dict().items()}
    data.train.images[:] = float("nan")
    with pytest.raises(RunError, match=r"training diverged in epoch 2: .*lower optimizer\.lr"):
        next(epochs)
    assert all(torch.equal(good[key], value) for key, value in network.state_dict().items())
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_a_run_that_diverges_leaves_no_model(tmp_path):
    recipe = small(optimizer={"name": "sgd", "lr": 1e8, "schedule": "constant"}, data={"train_limit": 200})
    training.run(small(), tmp_path / "a")
    with pytest.raises(RunError, match="training diverged in epoch 1"):
        training.run(recipe, tmp_path / "a", force=True)
    assert os.listdir(tmp_path / "a") == ["last.pt"], "neither a new model nor the log of another run"


def test_a_step_that_ends_in_nan_is_divergence_too(monkeypatch):
    """The loss of the last step was finite, the weights after it are not."""
    recipe, data = small(optimizer={"epochs": 1}), experiment()
    network = network_of(recipe, data)
    network[-1].weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(RunError, match="training diverged in epoch 1"):
        list(training.fit(network, data, recipe))
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_divergence_with_bounds_names_their_settings():
    recipe, data = small(objective={"certified": "ood", "certified_eps": 0.1}), experiment()
    network = network_of(recipe, data)
    network[-1].weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(
        RunError, match=r"lower optimizer\.lr, objective\.lambda_certified, objective\.certified_eps, obj"
    ):
        list(training.fit(network, data, recipe))


def test_a_network_that_never_meets_an_outlier_is_the_same_whatever_they_are(tmp_path):
    """BatchNorm, momentum and the order of the ID images: nothing of them may follow from outliers that no term sees."""
    states = []
    for run, changes in {
        "a": {},
        "b": {"data": {"auxiliary": "digits:7"}},
        "c": {"data": {"auxiliary": "digits:6"}, "sampling": {"method": "energy", "pool": 84}},
    }.items():
        recipe = small(
            network={"name": "resnet-small", "width": 2},
            objective={"outlier_loss": "none", "lambda_S": 0, "lambda_grad": 0},
            augmentation={"noise_sigma": 0.1},
            **{"data": {}, **changes},
        )
        training.run(recipe, tmp_path / run)
        states.append(detectors.load(tmp_path / run / "model.pt").network.state_dict())
    assert any("running_var" in name for name in states[0])
    for other in states[1:]:
        assert all(value.numpy().tobytes() == other[name].numpy().tobytes() for name, value in states[0].items())


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
    seen, original = [], training.objective

    def watch(network, images_id, labels, images_aux, weights, **options):
        seen.append((len(images_id), len(images_aux)))
        return original(network, images_id, labels, images_aux, weights, **options)

    monkeypatch.setattr(training, "objective", watch)
    list(training.fit(network_of(recipe, experiment()), experiment(), recipe))
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
    training._Steps(network.train(), data, recipe, torch.device("cpu")).take(0, inside, outside)
    assert len(expected) > 4
    for name, mean in expected.items():
        torch.testing.assert_close(network.get_buffer(name), mean)


def test_a_step_that_is_no_number_leaves_the_running_statistics():
    recipe, data = small(network={"name": "resnet-small", "width": 2}), experiment()
    network = network_of(recipe, data).train()
    before = {name: value.clone() for name, value in network.named_buffers() if "running" in name}
    data.train.images[3] = float("nan")
    steps = training._Steps(network, data, recipe, torch.device("cpu"))
    assert steps.take(0, torch.arange(5), torch.arange(5)) is None
    assert all(torch.equal(network.get_buffer(name), value) for name, value in before.items())


def test_architecture_normalises_by_the_training_images():
    data = experiment(shape=(3, 4, 4))
    data.train.images[:, 2] = 0.25
    architecture = training.architecture_of(small(network={"name": "mlp", "hidden_layers": 3, "width": 0}), data)
    pixels = data.train.images.double().numpy()
    assert architecture.mean == pytest.approx(pixels.mean(axis=(0, 2, 3)), rel=1e-12)
    assert architecture.std[:2] == pytest.approx(pixels.std(axis=(0, 2, 3))[:2], rel=1e-12)
    assert architecture.std[2] == 1.0, "a constant channel is centred, not blown up"
    assert architecture.options == {"hidden_layers": 3}
    assert (architecture.shape, architecture.classes) == ((3, 4, 4), 3)


def test_a_run_does_not_overwrite_another(tmp_path):
    training.run(small(optimizer={"epochs": 1}), tmp_path)
    before = (tmp_path / "model.pt").read_bytes()
    with pytest.raises(InputError, match=r"model\.pt exists already; .*--force"):
        training.run(small(), tmp_path)
    assert (tmp_path / "model.pt").read_bytes() == before
    training.run(small(), tmp_path, force=True)
    assert (tmp_path / "model.pt").read_bytes() != before


@pytest.mark.parametrize(
    "objective",
    [
        {"slope": "interval", "slope_eps": 0.01},
        {"certified": "ood", "certified_eps": 0.01},
        {"certified": "both", "certified_eps": 0.01, "certified_method": "crown-ibp"},
    ],
)
def test_force_keeps_a_run_when_the_network_cannot_be_bounded(tmp_path, objective):
    (tmp_path / "model.pt").write_text("finished")
    recipe = small(network={"name": "densenet-bc-100"}, objective=objective)
    with pytest.raises(InputError, match=r"layer cat: .* cannot be bounded"):
        training.run(recipe, tmp_path, force=True)
    assert os.listdir(tmp_path) == ["model.pt"] and (tmp_path / "model.pt").read_text() == "finished"


def test_force_keeps_a_run_when_the_images_cannot_be_trained_on(tmp_path, monkeypatch):
    (tmp_path / "model.pt").write_text("finished")
    data = bad_images(train=torch.full((20, 1, 8, 8), 255.0))
    monkeypatch.setattr(training, "experiment_of", lambda *arguments: data)
    with pytest.raises(InputError, match="has pixels from 255 to 255"):
        training.run(small(), tmp_path, force=True)
    assert (tmp_path / "model.pt").read_text() == "finished"


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ({"data": {"auxiliary": "digits:0"}}, {}, "auxiliary set 'digits:0' and ID set 'digits:0-5' share class 0"),
        ({"data": {"id": "digits:0"}}, {}, "'digits:0' has one class; give labels (.npz) or more classes"),
        ({"data": {"ood": ["digits:0-5"]}}, {}, "OOD set 'digits:0-5' and ID set"),
        (
            {"data": {"calibration_share": 0.01}},
            {},
            "11 calibration scores cannot hold a 95 % quantile; use at least 19",
        ),
        ({"data": {"id": "cifar10"}}, {}, "data set 'cifar10' is not in "),
        ({}, {"device": "abacus"}, "device 'abacus' cannot be used here; use cpu"),
        ({}, {"device": "meta"}, "device 'meta' cannot be used here; use cpu"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path, recipe, options, message):
    with pytest.raises(InputError) as caught:
        training.run(from_dict({**SMALL, **recipe}), tmp_path / "run", data_dir=tmp_path, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def bad_images(train: torch.Tensor | None = None, labels: torch.Tensor | None = None, auxiliary=None) -> Experiment:
    data = experiment()
    changed = {} if train is None else {"images": train}
    changed |= {} if labels is None else {"labels": labels}
    outliers = data.auxiliary if auxiliary is None else dataclasses.replace(data.auxiliary, images=auxiliary)
    return dataclasses.replace(data, train=dataclasses.replace(data.train, **changed), auxiliary=outliers)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            bad_images(train=torch.full((20, 1, 8, 8), float("nan"))),
            "'id-0' has pixels from nan to nan; all must lie in",
        ),
        (
            bad_images(train=torch.full((20, 1, 8, 8), 255.0)),
            "'id-0' has pixels from 255 to 255; all must lie in [0, 1]",
        ),
        (
            bad_images(train=torch.full((20, 1, 8, 8), 255, dtype=torch.uint8)),
            "pixels of type torch.uint8; divide them",
        ),
        (bad_images(auxiliary=torch.rand(5, 1, 8, 8) - 0.5), "'ood-3' has pixels from -0."),
        (bad_images(auxiliary=torch.zeros(0, 1, 8, 8)), "'ood-3' is empty; training needs ID images and auxiliary"),
        (bad_images(labels=torch.arange(20)), "labels of 'id-0' run from 0 to 19; 3 classes are 0..2"),
        (bad_images(labels=torch.full((20,), -1)), "labels of 'id-0' run from -1 to -1; 3 classes are 0..2"),
    ],
)
def test_images_and_labels_that_cannot_be_trained_on(data, message):
    with pytest.raises(InputError) as caught:
        next(training.fit(network_of(small(), experiment()), data, small()))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_network_with_other_classes_than_the_labels():
    network = network_of(small(), experiment())
    network[-1] = nn.Linear(8, 5)
    with pytest.raises(InputError, match="the network has 5 logits, 'id-0' has 3 classes"):
        next(training.fit(network, experiment(), small()))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((60, 8, 8), 255.0), "has pixels from 255 to 255; float pixels must lie in [0, 1]"),
        (np.full((60, 8, 8), np.nan), "has pixels that are NaN or infinite"),
        (np.full((60, 8, 8), 255), "has pixels of type int64; they must be uint8, or float in [0, 1]"),
        (np.zeros((0, 8, 8)), "is empty"),
    ],
)
def test_files_that_cannot_be_trained_on(tmp_path, pixels, message):
    np.savez(tmp_path / "aux.npz", images=pixels)
    recipe = small(data={"auxiliary": str(tmp_path / "aux.npz")})
    with pytest.raises(InputError) as caught:
        training.run(recipe, tmp_path / "run")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"sampling": {"method": "energy", "pool": 70}},
            "a pool of 70 candidates is too small: a step of 40 ID images",
        ),
        (
            {"sampling": {"method": "energy", "pool": 500}},
            "sampling.pool = 500, but there are only 90 auxiliary outliers",
        ),
        ({"optimizer": {"accumulate": 31}}, "a batch of 30 ID images cannot be cut into 31 parts (processes: 1, "),
        (
            {"optimizer": {"warmup_steps": 6}},
            "optimizer.warmup_steps = 6, but the run has 6 steps in all",
        ),
        ({"objective": {"slope": "interval", "penalty": "fast"}}, 'slope = "interval" is differentiated exactly'),
        ({"network": {"pretrained": "nowhere.pt"}}, "nowhere.pt"),
    ],
)
def test_settings_that_do_not_fit_the_images_are_refused_before_training(tmp_path, sections, message):
    begun = []
    with pytest.raises(InputError) as caught:
        training.run(small(**sections), tmp_path / "run", begin=begun.append)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not begun and not (tmp_path / "run").exists()


def test_pretrained_weights_are_the_start_and_must_fit(tmp_path):
    training.run(small(), tmp_path / "a")
    start = detectors.load(tmp_path / "a/model.pt").network.state_dict()
    said: list[str] = []
    still = {"lr": 1e-12, "name": "sgd", "weight_decay": 0.0, "epochs": 1, "lr_min": 0.0}
    recipe = small(network={"pretrained": str(tmp_path / "a/model.pt")}, optimizer=still)
    training.run(recipe, tmp_path / "b", say=said.append)
    assert "tensors loaded" in said[0]
    for name, value in detectors.load(tmp_path / "b/model.pt").network.state_dict().items():
        torch.testing.assert_close(value, start[name], rtol=0, atol=1e-6)
    other = small(network={"pretrained": str(tmp_path / "a/model.pt")}, data={"id": "digits:0-4", "train_limit": 60})
    with pytest.raises(InputError) as caught:
        training.run(other, tmp_path / "c")
    assert "shape" in str(caught.value) and not (tmp_path / "c").exists()


def test_other_scores_are_reported_at_the_temperature_of_the_recipe(tmp_path):
    recipe = small(evaluation={"temperature": 10.0})
    detector = training.run(recipe, tmp_path)
    data = experiment_of(recipe)
    inside = detector.network(data.test.images.double())
    for item in data.ood:
        outside = detector.network(item.images.double())
        found = detector.origin.metrics["ood"][item.name]
        expected = {
            "energy": [-10 * (logits / 10).exp().sum(1).log() for logits in (inside, outside)],
            "max-logit": [-logits.max(1).values for logits in (inside, outside)],
            "max-softmax": [-(logits / 10).softmax(1).max(1).values for logits in (inside, outside)],
        }
        assert set(found["scores"]) == set(expected)
        for name, (low, high) in expected.items():
            record = found["scores"][name]
            assert record["auroc"] == pytest.approx(metrics.auroc(low.numpy(), high.numpy()), abs=1e-9)
            assert record["fpr95_id"] == pytest.approx(metrics.fpr95_id(low.numpy(), high.numpy()), abs=1e-9)
        assert found["auroc"] == metrics.auroc(energy(inside).numpy(), energy(outside).numpy()), "S itself: T = 1"


def test_a_collapsed_classifier_is_warned_of(tmp_path):
    said: list[str] = []
    still = {"lr": 1e-12, "lr_min": 0.0, "name": "sgd", "epochs": 2}
    training.run(small(optimizer=still), tmp_path / "a", say=said.append)
    assert len(said) == 2
    assert said[0].startswith("warning: epoch 1: ID accuracy 0.") and "is below 0.250, the classifier has" in said[0]
    assert not (tmp_path / "a/best.pt").exists(), "no such epoch is a candidate"
    said.clear()
    training.run(small(optimizer=still, evaluation={"accuracy_floor": 0}), tmp_path / "b", say=said.append)
    assert all("is below 0.167" in message for message in said)
    with pytest.raises(RunError, match=r"no epoch reached an ID accuracy of 0\.250, so there is none to keep"):
        training.run(small(optimizer=still, evaluation={"keep": "best"}), tmp_path / "c")


def test_best_epoch():
    def row(epoch, accuracy, fpr):
        return {"epoch": epoch, "accuracy": accuracy, "fpr95_id": fpr}

    rows = [
        row(1, 0.1, 0.0),
        row(2, 0.9, 0.2),
        row(3, 0.8, 0.1),
        row(4, 0.85, 0.1),
        row(5, 0.85, 0.1),
        row(6, 0.9, 0.3),
    ]
    assert training.best_epoch(rows, 0.5) == 5
    assert training.best_epoch(rows[:3], 0.5) == 3
    assert training.best_epoch(rows, 0.0) == 1
    assert training.best_epoch(rows, 0.95) is None


def test_the_best_epoch_is_calibrated_on_images_that_did_not_choose_it(tmp_path):
    recipe = small(
        optimizer={"epochs": 6, "lr": 0.02, "schedule": "constant"},
        data={"train_limit": 0},
        evaluation={"keep": "best"},
        objective={"lambda_grad": 0},
    )
    epochs: list[training.Epoch] = []
    states: dict[int, dict[str, torch.Tensor]] = {}
    detector = training.run(recipe, tmp_path, report=epochs.append)
    data = experiment_of(recipe)
    chosen = training.best_epoch([dataclasses.asdict(epoch) for epoch in epochs], 0.25)
    torch.manual_seed(recipe.seed)
    replica = training.architecture_of(recipe, data).build()
    for epoch in training.fit(replica, data, recipe):
        states[epoch.epoch] = {name: value.clone() for name, value in replica.state_dict().items()}
    assert chosen is not None and epochs[chosen - 1].fpr95_id == min(epoch.fpr95_id for epoch in epochs)
    for name, value in detector.network.state_dict().items():
        assert torch.equal(value, states[chosen][name].double())
    replica.load_state_dict(states[chosen])
    logits = replica(data.calibration.images[::2])
    accuracy = float((logits.argmax(1) == data.calibration.labels[::2]).double().mean())
    assert epochs[chosen - 1].accuracy == accuracy, "the choice looks at every second calibration image"
    scores = detector.score(data.calibration.images[1::2]).numpy()
    rank = -(-95 * (len(scores) + 1) // 100)
    assert detector.gamma == np.sort(scores)[rank - 1], "and gamma at the others"
    assert detector.origin.calibration["samples"] == len(data.calibration) // 2


def test_the_probe_of_the_gradient_term_changes_nothing(monkeypatch):
    """Same weights, statistics and random numbers, whether it is timed or not; BatchNorm, stochastic penalty."""
    recipe = small(
        network={"name": "resnet-small", "width": 2},
        objective={"penalty": "stochastic", "penalty_share": 0.5, "m_in": 5.0, "m_out": 6.0},
        augmentation={"noise_sigma": 0.1},
    )
    data = experiment()
    probed, plain = network_of(recipe, data), network_of(recipe, data)
    shares = [epoch.gradient_share for epoch in training.fit(probed, data, recipe)]
    assert len(set(shares)) == 1 and 0 < shares[0] < 1, "timed once in so short a run"
    monkeypatch.setattr(training._Steps, "gradient_share", lambda *arguments: 0.0)
    list(training.fit(plain, data, recipe))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in probed.state_dict().items())


def test_without_the_gradient_term_there_is_nothing_to_time():
    (epoch,) = training.fit(
        network_of(small(), experiment()), experiment(), small(objective={"lambda_grad": 0}, optimizer={"epochs": 1})
    )
    assert epoch.gradient_share == 0 and epoch.samples_per_second > 0


def test_picked_outliers_reach_the_objective_with_their_roles(monkeypatch):
    recipe = small(sampling={"method": "energy", "pool": 9}, optimizer={"batch_size": 4, "epochs": 1})
    data, seen = experiment(train=20, auxiliary=30), []
    original = training.objective

    def watch(network, images_id, labels, images_aux, weights, **options):
        seen.append((images_aux, options["roles"], options["progress"]))
        return original(network, images_id, labels, images_aux, weights, **options)

    monkeypatch.setattr(training, "objective", watch)
    monkeypatch.setattr(training._Steps, "gradient_share", lambda *arguments: 0.0)
    list(training.fit(network_of(recipe, data), data, recipe))
    assert [progress for _, _, progress in seen] == [0.0, 0.2, 0.4, 0.6, 0.8]
    for images_aux, roles, _ in seen:
        assert len(images_aux) == 8 and len(roles.energy) == len(roles.gradient) == 8
        assert len(images_aux.unique(dim=0)) == 8, "no outlier twice in a step"
        assert all(any(torch.equal(image, other) for other in data.auxiliary.images) for image in images_aux)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="channels last is for a GPU")


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
    (first, *_), (second, *_) = (
        list(training.fit(network_of(recipe, data), data, recipe, device)) for recipe in (usual, other)
    )
    assert second.loss == pytest.approx(first.loss, rel=0.02)
    assert second.gradient_norm_id == pytest.approx(first.gradient_norm_id, rel=0.2)


def test_a_compiled_network_trains_as_it_is_written(monkeypatch):
    """By tracing alone: generating and compiling C++ takes half a minute, and is torch's own business."""
    compiled: list[nn.Module] = []

    def traced(network: nn.Module) -> object:
        compiled.append(network)
        return compiler(network, backend="aot_eager")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    sections = {"objective": {"penalty": "fast", "m_in": -1.0, "m_out": -0.5}, "optimizer": {"batch_size": 10}}
    data, networks = experiment(), []
    for recipe in (small(**sections), small(**sections, compute={"compile": True})):
        networks.append(network_of(recipe, data))
        losses = [epoch.gradient_loss for epoch in training.fit(networks[-1], data, recipe)]
        assert max(losses) > 0
    assert compiled == networks[1:]
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_images_that_are_read_as_they_are_used_train_the_same_network():
    data = experiment()

    def stored(images: ImageSet) -> ImageSet:
        kept = images.images.numpy()
        read = StoredImages(lambda positions: torch.from_numpy(kept[positions]), images.shape, np.arange(len(kept)))
        return dataclasses.replace(images, images=read)

    lazy = dataclasses.replace(
        data,
        train=stored(data.train),
        calibration=stored(data.calibration),
        auxiliary=stored(data.auxiliary),
        auxiliary_heldout=stored(data.auxiliary_heldout),
    )
    recipe = small(augmentation={"noise_sigma": 0.1})
    networks = [network_of(recipe, images) for images in (data, lazy)]
    for network, images in zip(networks, (data, lazy), strict=True):
        list(training.fit(network, images, recipe))
    assert all(torch.equal(*pair) for pair in zip(*(network.parameters() for network in networks), strict=True))


def test_channels_last_is_refused_on_a_cpu(tmp_path):
    """Before anything is written; torch would corrupt memory."""
    recipe, data = small(compute={"channels_last": True}), experiment()
    message = r"compute\.channels_last = true is for a GPU; use --device cuda, or --set compute\.channels_last=false"
    with pytest.raises(InputError, match=message):
        training.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=message):
        next(training.fit(network_of(recipe, data), data, recipe))


@needs_gpu
def test_a_model_trained_with_channels_last_is_stored_as_usual(tmp_path):
    recipe = small(network={"name": "conv-small", "width": 2}, compute={"channels_last": True}, optimizer={"epochs": 1})
    training.run(recipe, tmp_path, device="cuda")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(value.is_contiguous() for value in content["state_dict"].values())


def test_two_runs_do_not_share_a_folder(tmp_path):
    def second(steps: int) -> None:
        with pytest.raises(InputError, match="another process is writing"):
            training.run(small(), tmp_path, force=True)

    training.run(small(optimizer={"epochs": 1}), tmp_path, begin=second)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*run: "):
        training.run(small(), tmp_path / "run")


def test_a_folder_in_place_of_the_model_is_refused(tmp_path):
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(InputError, match=r"cannot replace .*model\.pt: "):
        training.run(small(), tmp_path, force=True)
