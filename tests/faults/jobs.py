"""Small runs of every command that takes time, what each leaves when nothing disturbs it, and what goes on with it."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.forks import Child, command, report

RECIPE = """
name = "tiny"
[data]
id = "digits:0-3"
auxiliary = "digits:4,5"
ood = ["digits:8,9"]
train_limit = 60
[network]
name = "mlp"
width = 6
hidden_layers = 1
[optimizer]
epochs = 3
batch_size = 20
[augmentation]
flip = false
[evaluation]
accuracy_floor = 0.0
"""
TIMED = {"seconds", "samples_per_second", "gradient_share"}  # of log.csv
_PASSING = {"seconds", "peak_memory", "finished", "command", "sha256", "failures"}  # of a manifest
TEMPORARY = re.compile(r"\..+-[0-9a-f]{16}\.\w+|\..+\.lock")


@dataclass(frozen=True)
class Job:
    """A run of a command line.

    Attributes:
        name: What it is called.
        prepare: Puts what it reads into an empty folder.
        action: What it does with the folder; called in a child. Called again, it goes on.
        lost: What of its reports (`heard`) the folder no longer shows; empty if nothing was lost.
        done: Whether the folder shows that there is nothing to go on with, so that the command would refuse.
    """

    name: str
    prepare: Callable[[Path], None]
    action: Callable[[Path], None]
    lost: Callable[[Path, tuple[str, ...]], str]
    done: Callable[[Path], bool] = lambda folder: False


def listening() -> None:
    """In a child: report what the command's bar is told to be done."""
    from grood_cert.cli import output

    class Listening(output.Bar):
        def begin(self, stage: str, total: int, unit: str = "samples") -> None:
            report(f"stage {stage}")
            super().begin(stage, total, unit)

        def advance(self, steps: int = 1, counts: Any = None) -> None:
            report(f"done {steps}")
            super().advance(steps, counts)

        def say(self, line: str) -> None:
            if line.startswith("epoch"):
                report("epoch")
            super().say(line)

    output.Bar = Listening  # type: ignore[misc]


def _nothing_lost(folder: Path, heard: tuple[str, ...]) -> str:
    return ""


def _samples_lost(rows: dict[str, str]) -> Callable[[Path, tuple[str, ...]], str]:
    """Rows of samples that were reported as done, by the stage that saves them."""

    def lost(folder: Path, heard: tuple[str, ...]) -> str:
        done: dict[str, int] = {}
        stage = ""
        for line in heard:
            word, _, rest = line.partition(" ")
            if word == "stage":
                stage = rest
            elif word == "done":
                done[stage] = done.get(stage, 0) + int(rest)
        for name, samples in done.items():
            manifest = json.loads((folder / rows[name]).with_suffix(".json").read_text())
            if manifest["samples_done"] < samples:
                return f"{name}: {samples} samples reported, {manifest['samples_done']} saved"
        return ""

    return lost


def _epochs_lost(folder: Path, heard: tuple[str, ...]) -> str:
    epochs = heard.count("epoch")
    if epochs and not (folder / "model.pt").exists():
        with (folder / "log.csv").open(newline="") as stream:
            logged = len(list(csv.DictReader(stream)))
        if logged < epochs:
            return f"{epochs} epochs reported, {logged} logged"
        from grood_cert.system.torch_files import opened

        begun = opened(folder / "last.pt")["progress"]["epoch"]
        if begun < epochs:
            return f"{epochs} epochs reported, and {begun} is done again"
    return ""


def _is_trained(folder: Path) -> bool:
    return (folder / "model.pt").exists() and not (folder / "last.pt").exists()


def _train(folder: Path) -> None:
    resume = ["--resume"] if (folder / "last.pt").exists() else []
    recipe = folder.parent / "recipe.toml"
    command(["train", recipe, "--out", folder, "--checkpoint-steps", "2", "--device", "cpu", *resume], listening)()


def _certify(folder: Path, *options: str) -> None:
    given = "--stages ibp,crown --eps 0.01,0.05 --limit 9 --batch-size 3 --precision 0.1 --engine native --no-figure"
    model = folder.parent / "model.pt"
    command(["certify", model, "--out", folder, "--device", "cpu", *given.split(), *options], listening)()


def _smooth(folder: Path) -> None:
    given = "--sigma 0.2 --n 32 --alpha 0.01 --calibration-limit 20 --limit 9 --batch-size 3 --eps 0.1"
    command(["smooth", folder.parent / "model.pt", "--out", folder, "--device", "cpu", *given.split()], listening)()


def _merge(folder: Path) -> None:
    parts = [folder / f"rows-{number}-of-3.csv" for number in (1, 2, 3)]
    command(["merge", *parts, "--out", folder / "rows.csv"])()


def _sweep(folder: Path) -> None:
    given = "--grid objective.lambda_grad=0,0.1 --eps 0.02 --limit 2 --lipschitz-limit 4 --effort fast --device cpu"
    command(["sweep", folder.parent / "recipe.toml", "--out", folder, *given.split()])()


def _empty(folder: Path) -> None:
    folder.mkdir()


def _shards(folder: Path) -> None:
    shutil.copytree(folder.parent / "shards", folder)


JOBS = [
    Job("train", _empty, _train, _epochs_lost, _is_trained),
    Job("certify", _empty, _certify, _samples_lost({"certifying": "rows.csv"})),
    Job(
        "smooth",
        _empty,
        _smooth,
        _samples_lost({"calibrating": "smoothing-calibration.csv", "certifying": "smoothing.csv"}),
    ),
    Job("sweep", _empty, _sweep, _nothing_lost),
    Job("merge", _shards, _merge, _nothing_lost, lambda folder: (folder / "rows.csv").exists()),
]


def load_everything() -> None:
    """Import what the runs need, once, in the process that the children are forked off; it starts no thread."""
    import importlib
    import pkgutil

    import torch

    import grood_cert
    from grood_cert.data import experiment_of
    from grood_cert.networks.capture import capture
    from grood_cert.recipe import Recipe

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(grood_cert.__path__, "grood_cert."):
        if module.name != "grood_cert.__main__":
            importlib.import_module(module.name)
    importlib.import_module("train.sweep")
    experiment_of(Recipe())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        grood_cert.cli.app(["recipe", "list"], standalone_mode=True)
    layers = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)
    ).eval()
    capture(layers, (1, 2, 2))  # the first one loads the compiler


def prepared(root: Path) -> None:
    """A recipe, a detector and the shards of a certification, which the jobs in folders below read."""
    (root / "recipe.toml").write_text(RECIPE)
    ended = Child(lambda: _train(root / "trained")).wait()
    assert ended.code == 0, ended.said
    shutil.copy(root / "trained" / "model.pt", root)
    (root / "shards").mkdir()
    for number in (1, 2, 3):
        ended = Child(lambda number=number: _certify(root / "shards", "--shard", f"{number}/3")).wait()
        assert ended.code == 0, ended.said


def content(folder: Path) -> dict[str, object]:
    """What the files of a folder hold, without times and what else may differ from run to run; by path.

    Temporary files and locks count too: a finished run leaves none.
    """
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            name = str(file.relative_to(folder))
            found[name] = file.read_bytes()
            if file.suffix == ".json":
                manifest = json.loads(file.read_text())
                entries = {key: value for key, value in manifest.items() if key not in _PASSING}
                found[name] = entries | {"model": manifest["model"] | {"path": ""}} if "model" in manifest else entries
            elif file.name in ("log.csv", "sweep.csv"):
                with file.open(newline="") as stream:
                    rows = list(csv.DictReader(stream))
                found[name] = [{key: value for key, value in row.items() if key not in TIMED} for row in rows]
    return found


def half_written(folder: Path) -> str:
    """The first file that a reader would stumble over; empty if there is none. Temporary files are named by a dot."""
    from grood_cert.results.checksum import check_sum
    from grood_cert.results.table import manifest_path, read_cells
    from grood_cert.system.torch_files import opened

    for file in sorted(folder.rglob("*")):
        if not file.is_file() or TEMPORARY.fullmatch(file.name):
            continue
        try:
            if file.suffix == ".pt":
                opened(file)
            elif file.suffix == ".json":
                json.loads(file.read_text())
            elif file.name in ("log.csv", "sweep.csv"):
                with file.open(newline="") as stream:
                    assert all(None not in row.values() for row in csv.DictReader(stream))
            elif file.suffix == ".csv" and manifest_path(file).exists():
                check_sum(*read_cells(file))
            elif file.suffix == ".csv":
                return f"{file.name} without a manifest"
        except Exception as error:  # noqa: BLE001  (whatever a reader raises)
            return f"{file.name}: {error!r}"
    return ""
