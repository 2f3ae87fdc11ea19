"""A run that is killed goes on as if nothing had happened, and one that cannot go on says why."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grood_cert.errors import InputError, RunError
from grood_cert.recipe import Recipe, from_dict
from grood_cert.runs.progress import describe
from grood_cert.training import checkpoint
from grood_cert.training import run as training
from grood_cert.training.evaluation import best_epoch
from grood_cert.training.loop import Epoch
from grood_cert.training.step import Steps
from tests.recorder import Recorder

# Everything that draws random numbers or keeps a state: picked outliers, augmentation, stochastic penalty, BatchNorm,
# Adam; with parts that differ in size.
SETTINGS = {
    "data": {"train_limit": 100, "ood": ["digits:8,9"]},
    "network": {"name": "resnet-small", "width": 2},
    "objective": {"penalty": "stochastic", "penalty_share": 0.5, "m_in": -1.5, "m_out": -1.4},
    "sampling": {"method": "energy", "pool": 60},
    "optimizer": {"epochs": 3, "batch_size": 21, "accumulate": 2, "warmup_steps": 2},
    "augmentation": {"flip": True, "crop_padding": 1, "noise_sigma": 0.1},
    "evaluation": {"accuracy_floor": 0.0},
}
STEPS = 5  # an epoch
TIMED = ("seconds", "samples_per_second", "gradient_share")

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from grood_cert.training import run as training
from grood_cert.recipe import load
from grood_cert.system.reporting import Silent

torch.set_num_threads(1)
class Killer(Silent):
    steps = 0

    def advance(self, steps=1, counts=None):
        self.steps += steps
        if self.steps == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
training.run(load(folder / "recipe.toml"), folder / "run", checkpoint_steps=2, reporter=Killer())
"""


def recipe_of(**sections) -> Recipe:
    return from_dict({**SETTINGS, **{name: {**SETTINGS.get(name, {}), **values} for name, values in sections.items()}})


def log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as stream:
        return [{key: value for key, value in row.items() if key not in TIMED} for row in csv.DictReader(stream)]


class Interrupted(Recorder):
    """Ends the run, as Ctrl-C does, after so many steps."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def advance(self, steps=1, counts=None):
        super().advance(steps, counts)
        if sum(self.steps) == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    training.run(recipe_of(), folder)
    return folder


@pytest.fixture
def begun(tmp_path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        training.run(recipe_of(), tmp_path / "run", reporter=Interrupted(STEPS + 1))
    return tmp_path / "run"


def assert_same(folder: Path, whole: Path) -> None:
    assert (folder / "model.pt").read_bytes() == (whole / "model.pt").read_bytes()
    assert (folder / "best.pt").read_bytes() == (whole / "best.pt").read_bytes()
    assert log(folder) == log(whole)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole)) == ["best.pt", "log.csv", "model.pt"]


def test_a_run_killed_in_mid_epoch_resumes_to_the_same_bytes(tmp_path, whole):
    """SIGKILL after step 8 of 15, the third of the second epoch: one step later than what was saved last."""
    (tmp_path / "recipe.toml").write_text(recipe_of().to_toml())
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(STEPS + 3)]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (2, 2) and len(state["rows"]) == 1
    recorder = Recorder()
    training.run(recipe_of(), tmp_path / "run", resume=True, reporter=recorder)
    assert [total for _, total, _ in recorder.stages] == [3 * STEPS - STEPS - 2]
    assert not [name for name in os.listdir(tmp_path / "run") if name.endswith(".lock")]
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(("every", "lifetime"), [(0, STEPS + 1), (2, 3)])
def test_a_run_interrupted_again_and_again(tmp_path, whole, every, lifetime):
    """After every few steps, one more than it takes to save something new."""
    attempts = 0
    while not (tmp_path / "model.pt").exists():
        with contextlib.suppress(KeyboardInterrupt):
            reporter = Interrupted(lifetime)
            training.run(recipe_of(), tmp_path, resume=attempts > 0, checkpoint_steps=every, reporter=reporter)
        attempts += 1
        assert attempts < 15
    assert attempts > 2
    assert_same(tmp_path, whole)


def test_the_state_is_saved_before_the_first_step_and_gone_after_the_last(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        training.run(recipe_of(), tmp_path, reporter=Interrupted(1))
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (1, 0)
    assert state["recipe"] == recipe_of().to_dict()


def test_a_run_killed_in_the_evaluation_resumes_with_it(tmp_path, whole, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "evaluate", killed)
        training.run(recipe_of(), tmp_path)
    epochs: list[Epoch] = []
    training.run(recipe_of(), tmp_path, resume=True, report=epochs.append)
    assert not epochs
    assert_same(tmp_path, whole)


def test_a_run_killed_after_its_model_was_written_is_finished_by_resume(tmp_path, whole, monkeypatch):
    """Between the last two touches of its folder: the model is there, and so is the state."""

    def written(files, detector):
        detector.save(files.model)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training._Files, "finish", written)
        training.run(recipe_of(), tmp_path)
    assert {"model.pt", "last.pt"} <= set(os.listdir(tmp_path))
    assert describe(tmp_path) == ["model.pt: trained"]
    training.run(recipe_of(), tmp_path, resume=True)
    assert_same(tmp_path, whole)
    with pytest.raises(InputError, match="this run is finished"):
        training.run(recipe_of(), tmp_path, resume=True)


def test_resume_with_another_recipe_names_the_difference(begun):
    with pytest.raises(InputError) as caught:
        training.run(recipe_of(optimizer={"lr": 0.5}, evaluation={"keep": "best"}), begun, resume=True)
    assert "last.pt: the run began with optimizer.lr = 0.002, not 0.5; resume it with its own recipe" in str(
        caught.value
    )


def test_resume_with_other_images(begun, monkeypatch):
    original = training.experiment_of

    def other(*arguments):
        data = original(*arguments)
        return dataclasses.replace(data, train=dataclasses.replace(data.train, images=data.train.images / 2))

    monkeypatch.setattr(training, "experiment_of", other)
    with pytest.raises(InputError, match="the run began with other training images"):
        training.run(recipe_of(), begun, resume=True)


def test_what_cannot_be_resumed(tmp_path, begun, whole):
    with pytest.raises(InputError, match=r"last\.pt: no such file, so there is nothing to resume"):
        training.run(recipe_of(), tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(InputError, match=r"model\.pt exists: this run is finished, there is nothing to resume"):
        training.run(recipe_of(), whole, resume=True)
    with pytest.raises(InputError, match="--force begins a run again and --resume continues it"):
        training.run(recipe_of(), begun, resume=True, force=True)
    with pytest.raises(InputError, match=r"last\.pt is of an unfinished run; add --resume to continue it, or --force"):
        training.run(recipe_of(), begun)
    content = (begun / "last.pt").read_bytes()
    for damaged in (content[:1000], b""):
        (begun / "last.pt").write_bytes(damaged)
        with pytest.raises(InputError, match=r"not a state of a grood-cert run, but (empty|a truncated)"):
            training.run(recipe_of(), begun, resume=True)
    torch.save({"format": "another"}, begun / "last.pt")
    with pytest.raises(InputError, match=r"not a state of a grood-cert run; expected the last\.pt of a run that was"):
        training.run(recipe_of(), begun, resume=True)


def test_the_weights_of_the_best_epoch_are_missed_by_name(tmp_path):
    with pytest.raises(
        InputError, match=r"best\.pt: no such file, and it held the weights of the best epoch so far; beg"
    ):
        checkpoint.load_weights(tmp_path / "best.pt")


def test_force_begins_again(begun, whole):
    training.run(recipe_of(), begun, force=True)
    assert_same(begun, whole)


def test_a_loss_that_is_no_number_keeps_the_last_good_state(tmp_path, whole, monkeypatch):
    folder = tmp_path / "run"
    original = Steps.take

    def poisoned(self, step, parts):
        return None if step == STEPS + 2 else original(self, step, parts)

    again = f"--set network.pretrained={folder / 'best.pt'} with another --out"
    with monkeypatch.context() as patch, pytest.raises(RunError, match=f"training diverged in epoch 2.*{again}"):
        patch.setattr(Steps, "take", poisoned)
        training.run(recipe_of(), folder)
    started = recipe_of(network={"pretrained": str(folder / "best.pt")}, optimizer={"epochs": 1})
    training.run(started, tmp_path / "another")
    (folder / "failed.txt").unlink()  # as on a machine where the steps are others
    assert torch.load(folder / "last.pt", weights_only=True)["progress"]["epoch"] == 2
    training.run(recipe_of(), folder, resume=True)
    assert_same(folder, whole)


def test_a_full_disk_stops_the_run_and_keeps_the_last_good_file(tmp_path):
    """The kernel refuses to write more than 100 kB to a file."""
    path = tmp_path / "last.pt"
    checkpoint.save_weights(path, 1, {"a": torch.zeros(100)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(RunError) as caught:
            checkpoint.save_weights(path, 2, {"a": torch.zeros(100_000)})
        with pytest.raises(RunError, match="nothing of it is saved yet: make room, then give the same command"):
            checkpoint.save_weights(tmp_path / "other" / "last.pt", 1, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot write" in str(caught.value) and "File too large" in str(caught.value)
    assert "what it last saved is kept: make room, then add --resume" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {*os.listdir(tmp_path)} == {"last.pt", "other"} and checkpoint.load_weights(path)["a"].shape == (100,)


def test_best_weights_are_those_of_the_epoch(whole):
    content = torch.load(whole / "best.pt", weights_only=True)
    rows = [{key: float(value) for key, value in row.items()} for row in log(whole)]
    assert content["epoch"] == best_epoch(rows, 1 / 6)
    assert checkpoint.load_weights(whole / "best.pt").keys() == content["state_dict"].keys()
    with pytest.raises(InputError, match=r"model\.pt: not a file of grood-cert weights; expected the best.pt"):
        checkpoint.load_weights(whole / "model.pt")


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_what_is_resumed_runs_no_code(begun, name):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(begun / "exploded"),)

    torch.save({"format": "state of a grood-cert run", "a": Bomb()}, begun / name)
    with pytest.raises(InputError, match=r"runs \w+\.mkdir when it is opened"):
        (checkpoint.load_weights(begun / name) if name == "best.pt" else training.run(recipe_of(), begun, resume=True))
    assert not (begun / "exploded").exists()
