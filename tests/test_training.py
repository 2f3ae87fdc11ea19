from __future__ import annotations

import csv
import dataclasses
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from grood_cert import detector as detectors
from grood_cert import metrics, training
from grood_cert.data import Experiment, ImageSet
from grood_cert.energy import energy
from grood_cert.errors import InputError, RunError
from grood_cert.recipe import OptimizerSection, Recipe, from_dict

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
    assert sorted(os.listdir(out)) == ["log.csv", "model.pt"]
    assert steps == {"announced": 6, "done": 6}  # 90 images, at most 40 a batch, 2 epochs
    with (out / "log.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [item.name for item in dataclasses.fields(training.Epoch)]
    assert [{key: float(value) for key, value in row.items()} for row in rows] == [
        dataclasses.asdict(epoch) for epoch in epochs
    ]
    loaded = detectors.load(out / "model.pt")
    assert loaded.recipe == recipe
    assert loaded.class_names == ("0", "1", "2", "3", "4", "5")
    assert loaded.metrics == detector.metrics and loaded.gamma == detector.gamma


def test_gamma_and_metrics_follow_from_the_splits(finished):
    """Recomputed from the checkpoint and the images alone."""
    recipe, out, _, _, _ = finished
    loaded, data = detectors.load(out / "model.pt"), training.experiment_of(recipe)
    scores = energy(loaded.network(data.calibration.images.double())).numpy()
    rank = -(-95 * (len(scores) + 1) // 100)
    assert loaded.gamma == np.sort(scores)[rank - 1]
    assert loaded.calibration == {"samples": 217, "percent": 95}
    logits = loaded.network(data.test.images.double())
    assert loaded.metrics["accuracy"] == float((logits.argmax(1) == data.test.labels).double().mean())
    assert list(loaded.metrics["ood"]) == list(recipe.data.ood)
    for item in data.ood:
        record = loaded.metrics["ood"][item.name]
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
def test_schedule_starts_at_lr_and_ends_at_1e_6(epochs):
    section = OptimizerSection(name="sgd", lr=0.01, epochs=epochs)
    optimizer = training._optimizer(nn.Linear(1, 1), section)
    steps = 7 * epochs
    schedule = training._schedule(optimizer, section, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0.01
    assert rates[-1] == pytest.approx(1e-6, rel=1e-9)
    middle = [1e-6 + (0.01 - 1e-6) * (1 + math.cos(math.pi * step / (steps - 1))) / 2 for step in range(steps)]
    assert rates == pytest.approx(middle, rel=1e-9)


def test_constant_schedule():
    section = OptimizerSection(name="adam", lr=0.01, schedule="constant")
    optimizer = training._optimizer(nn.Linear(1, 1), section)
    schedule = training._schedule(optimizer, section, 4)
    for _ in range(4):
        assert optimizer.param_groups[0]["lr"] == 0.01
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"), [(20, 8, [7, 7, 6]), (9, 8, [5, 4]), (8, 8, [8]), (1, 8, [1])]
)
def test_an_epoch_sees_every_image_once_in_even_batches(monkeypatch, count, batch_size, sizes):
    """No last batch of one sample, on which BatchNorm would stumble, unless there is but one."""
    data = experiment(train=count, auxiliary=6)
    recipe = small(network={"name": "resnet18", "width": 4}, optimizer={"batch_size": batch_size, "epochs": 2})
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = training.objective

    def watch(network, images_id, labels, images_aux, weights):
        seen.append((images_id, images_aux))
        for image, label in zip(images_id, labels, strict=True):
            (index,) = [i for i in range(count) if torch.equal(data.train.images[i], image)]
            assert data.train.labels[index] == label
        return original(network, images_id, labels, images_aux, weights)

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
    poisoned = data.train.images.clone()
    data.train.images[:] = float("nan")
    with pytest.raises(RunError, match=r"training diverged in epoch 2: .*lower optimizer\.lr"):
        next(epochs)
    data.train.images[:] = poisoned
    assert all(torch.equal(good[key], value) for key, value in network.state_dict().items())
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_a_run_that_diverges_leaves_no_model(tmp_path):
    recipe = small(optimizer={"name": "sgd", "lr": 1e8, "schedule": "constant"}, data={"train_limit": 200})
    training.run(small(), tmp_path / "a")
    with pytest.raises(RunError, match="training diverged in epoch 1"):
        training.run(recipe, tmp_path / "a", force=True)
    assert os.listdir(tmp_path / "a") == [], "neither a new model nor the log of another run"


def test_a_step_that_ends_in_nan_is_divergence_too(monkeypatch):
    """The loss of the last step was finite, the weights after it are not."""
    recipe, data = small(optimizer={"epochs": 1}), experiment()
    network = network_of(recipe, data)
    network[-1].weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(RunError, match="training diverged in epoch 1"):
        list(training.fit(network, data, recipe))
    assert all(value.isfinite().all() for value in network.state_dict().values())


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
    ("recipe", "options", "message"),
    [
        ({"data": {"auxiliary": "digits:0"}}, {}, "auxiliary set 'digits:0' and ID set 'digits:0-5' share class 0"),
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


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*run: "):
        training.run(small(), tmp_path / "run")


def test_a_folder_in_place_of_the_model_is_refused(tmp_path):
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(InputError, match=r"cannot replace .*model\.pt: "):
        training.run(small(), tmp_path, force=True)
