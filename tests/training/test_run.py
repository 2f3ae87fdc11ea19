from __future__ import annotations

import csv
import dataclasses
import os
import re

import numpy as np
import pytest
import torch
from torch import nn

from grood_cert import detector as detectors
from grood_cert import metrics
from grood_cert.data import experiment_of
from grood_cert.errors import InputError, RunError
from grood_cert.networks import architectures
from grood_cert.recipe import from_dict
from grood_cert.runs.progress import describe
from grood_cert.scores import energy
from grood_cert.training import run as training
from grood_cert.training.evaluation import best_epoch
from grood_cert.training.loop import Epoch, fit
from grood_cert.training.run import architecture_of
from tests.recorder import Recorder
from tests.training.examples import SMALL, bad_images, experiment, needs_gpu, network_of, small


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    recipe = small()
    epochs: list[Epoch] = []
    recorder = Recorder()
    detector = training.run(recipe, out, reporter=recorder, report=epochs.append)
    return recipe, out, detector, epochs, recorder


def test_a_run_leaves_a_checkpoint_and_a_log(finished):
    recipe, out, detector, epochs, recorder = finished
    assert {"log.csv", "model.pt"} <= {*os.listdir(out)} <= {"log.csv", "model.pt", "best.pt"}, "no trace of the state"
    assert recorder.stages == [("train digits-greg", 6, "steps")]  # 90 images, at most 40 a batch, 2 epochs
    assert sum(recorder.steps) == 6
    with (out / "log.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [item.name for item in dataclasses.fields(Epoch)]
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


def test_a_run_that_diverges_leaves_no_model(tmp_path):
    recipe = small(optimizer={"name": "sgd", "lr": 1e8, "schedule": "constant"}, data={"train_limit": 200})
    training.run(small(), tmp_path / "a")
    with pytest.raises(RunError, match=r"training diverged in epoch 1.* begin again, with --force or another --out$"):
        training.run(recipe, tmp_path / "a", force=True)
    assert {*os.listdir(tmp_path / "a")} == {"last.pt", "failed.txt"}, "neither a new model nor the log of another run"
    for resume, words in ((False, "another --out$"), (True, "--resume would take the same steps and end the same$")):
        with pytest.raises(RunError, match=f"a: training diverged in epoch 1: .*lower optimizer.lr.*{words}"):
            training.run(recipe, tmp_path / "a", resume=resume)
    (line,) = describe(tmp_path / "a")
    assert line.startswith("model.pt: training diverged in epoch 1") and "--resume" not in line
    training.run(small(), tmp_path / "a", force=True)
    assert {*os.listdir(tmp_path / "a")}.isdisjoint({"last.pt", "failed.txt"})
    assert {*os.listdir(tmp_path / "a")} >= {"model.pt", "log.csv"}


def test_a_run_without_an_epoch_to_keep_is_not_resumed(tmp_path):
    recipe = small(evaluation={"keep": "best", "accuracy_floor": 0.999}, data={"train_limit": 60})
    with pytest.raises(RunError, match=r"no epoch reached an ID accuracy of 0.999.*lower .* begin again"):
        training.run(recipe, tmp_path)
    with pytest.raises(RunError, match=r"no epoch reached .* --resume would take the same steps"):
        training.run(recipe, tmp_path, resume=True)
    assert "no epoch reached" in describe(tmp_path)[0]


def test_a_log_that_was_damaged_after_the_last_epoch_is_written_again(finished, tmp_path, monkeypatch):
    recipe = finished[0]
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(training, "_detector", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        training.run(recipe, tmp_path)
    before = (tmp_path / "log.csv").read_bytes()
    (tmp_path / "log.csv").write_text("epoch\n")
    training.run(recipe, tmp_path, resume=True)
    assert (tmp_path / "log.csv").read_bytes() == before


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


def test_architecture_normalises_by_the_training_images():
    data = experiment(shape=(3, 4, 4))
    data.train.images[:, 2] = 0.25
    architecture = architecture_of(small(network={"name": "mlp", "hidden_layers": 3, "width": 0}), data)
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
def test_force_keeps_a_run_when_the_network_cannot_be_bounded(tmp_path, objective, monkeypatch):
    def normed(normalize, shape, classes):
        size = shape[0] * shape[1] * shape[2]
        return architectures.Classifier(normalize, nn.Flatten(), nn.LayerNorm(size), nn.Linear(size, classes))

    monkeypatch.setitem(architectures.NETWORKS, "mlp", normed)
    (tmp_path / "model.pt").write_text("finished")
    recipe = small(network={"name": "mlp"}, objective=objective)
    monkeypatch.setattr(
        training, "architecture_of", lambda *given: dataclasses.replace(architecture_of(*given), options={})
    )
    with pytest.raises(InputError, match="layer 2: layer_norm cannot be bounded"):
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
    recorder = Recorder()
    with pytest.raises(InputError) as caught:
        training.run(small(**sections), tmp_path / "run", reporter=recorder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not recorder.stages and not (tmp_path / "run").exists()


def test_pretrained_weights_are_the_start_and_must_fit(tmp_path):
    training.run(small(), tmp_path / "a")
    start = detectors.load(tmp_path / "a/model.pt").network.state_dict()
    recorder = Recorder()
    still = {"lr": 1e-12, "name": "sgd", "weight_decay": 0.0, "epochs": 1, "lr_min": 0.0}
    recipe = small(network={"pretrained": str(tmp_path / "a/model.pt")}, optimizer=still)
    training.run(recipe, tmp_path / "b", reporter=recorder)
    assert "tensors loaded" in recorder.lines[0]
    for name, value in detectors.load(tmp_path / "b/model.pt").network.state_dict().items():
        torch.testing.assert_close(value, start[name], rtol=0, atol=1e-6)
    other = small(network={"pretrained": str(tmp_path / "a/model.pt")}, data={"id": "digits:0-4", "train_limit": 60})
    with pytest.raises(InputError) as caught:
        training.run(other, tmp_path / "c")
    assert "shape" in str(caught.value) and not (tmp_path / "c").exists()


def test_a_collapsed_classifier_is_warned_of(tmp_path):
    recorder = Recorder()
    still = {"lr": 1e-12, "lr_min": 0.0, "name": "sgd", "epochs": 2}
    training.run(small(optimizer=still), tmp_path / "a", reporter=recorder)
    said = recorder.lines
    assert len(said) == 2
    assert said[0].startswith("warning: epoch 1: ID accuracy 0.") and "is below 0.250, the classifier has" in said[0]
    assert not (tmp_path / "a/best.pt").exists(), "no such epoch is a candidate"
    recorder.lines.clear()
    training.run(small(optimizer=still, evaluation={"accuracy_floor": 0}), tmp_path / "b", reporter=recorder)
    assert all("is below 0.167" in message for message in recorder.lines)
    with pytest.raises(RunError, match=r"no epoch reached an ID accuracy of 0\.250, so there is none to keep"):
        training.run(small(optimizer=still, evaluation={"keep": "best"}), tmp_path / "c")


def test_margins_that_no_sample_passes_are_warned_of(tmp_path):
    recorder = Recorder()
    training.run(small(objective={"m_in": -1000.0, "m_out": 1000.0}), tmp_path, reporter=recorder)
    (line,) = (line for line in recorder.lines if "m_in" in line)
    assert "no ID image scored below m_in = -1000 and no outlier above m_out = 1000" in line
    assert re.search(
        r"scores of ID run from -[0-9.]+ to -?[0-9.]+, of outliers from -[0-9.]+ to -?[0-9.]+; choose", line
    )


def test_the_best_epoch_is_calibrated_on_images_that_did_not_choose_it(tmp_path):
    recipe = small(
        optimizer={"epochs": 6, "lr": 0.02, "schedule": "constant"},
        data={"train_limit": 0},
        evaluation={"keep": "best"},
        objective={"lambda_grad": 0},
    )
    epochs: list[Epoch] = []
    states: dict[int, dict[str, torch.Tensor]] = {}
    detector = training.run(recipe, tmp_path, report=epochs.append)
    data = experiment_of(recipe)
    chosen = best_epoch([dataclasses.asdict(epoch) for epoch in epochs], 0.25)
    torch.manual_seed(recipe.seed)
    replica = architecture_of(recipe, data).build()
    for epoch in fit(replica, data, recipe):
        states[epoch.epoch] = {name: value.clone() for name, value in replica.state_dict().items()}
    assert chosen is not None and epochs[chosen - 1].fpr95_id == min(epoch.fpr95_id for epoch in epochs)
    for name, value in detector.network.state_dict().items():
        assert torch.equal(value, states[chosen][name].double())
    replica.load_state_dict(states[chosen])
    logits = replica(data.calibration.images[::2])
    accuracy = float((logits.argmax(1) == data.calibration.labels[::2]).double().mean())
    assert epochs[chosen - 1].accuracy == accuracy, "the choice looks at every second calibration image"
    scores = detector.scores(data.calibration.images[1::2]).numpy()
    rank = -(-95 * (len(scores) + 1) // 100)
    assert detector.gamma == np.sort(scores)[rank - 1], "and gamma at the others"
    assert detector.origin.calibration["samples"] == len(data.calibration) // 2


def test_normalisation_is_the_recipe_s_or_that_of_the_training_images():
    data = experiment()
    usual = architecture_of(small(), data)
    assert usual.mean == pytest.approx([float(data.train.images.double().mean())])
    chosen = architecture_of(small(network={"mean": [0.25], "std": [2]}), data)
    assert (chosen.mean, chosen.std) == ((0.25,), (2,)) and float(chosen.build()[0].std) == 2
    with pytest.raises(InputError, match=r"network\.mean and network\.std have 3 values, the images 1 channels"):
        architecture_of(small(network={"mean": [0.5] * 3, "std": [0.2] * 3}), data)


def test_channels_last_is_refused_on_a_cpu(tmp_path):
    """Before anything is written; torch would corrupt memory."""
    recipe, data = small(compute={"channels_last": True}), experiment()
    message = r"compute\.channels_last = true is for a GPU; use --device cuda, or --set compute\.channels_last=false"
    with pytest.raises(InputError, match=message):
        training.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=message):
        next(fit(network_of(recipe, data), data, recipe))


@needs_gpu
def test_a_model_trained_with_channels_last_is_stored_as_usual(tmp_path):
    recipe = small(network={"name": "conv-small", "width": 2}, compute={"channels_last": True}, optimizer={"epochs": 1})
    training.run(recipe, tmp_path, device="cuda")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(value.is_contiguous() for value in content["state_dict"].values())


def test_two_runs_do_not_share_a_folder(tmp_path):
    class Second(Recorder):
        def begin(self, stage, total, unit="samples"):
            with pytest.raises(InputError, match="another process is writing"):
                training.run(small(), tmp_path, force=True)
            super().begin(stage, total, unit)

    second = Second()
    training.run(small(optimizer={"epochs": 1}), tmp_path, reporter=second)
    assert second.stages


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*run: "):
        training.run(small(), tmp_path / "run")


def test_a_folder_in_place_of_the_model_is_refused(tmp_path):
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(InputError, match=r"cannot replace .*model\.pt: "):
        training.run(small(), tmp_path, force=True)
