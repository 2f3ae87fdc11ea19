"""Sweeps: the cells are all combinations, each is the detector that its recipe alone would give, and nothing is done twice."""

from __future__ import annotations

import csv

import pytest

from grood_cert import detector
from grood_cert.certification.settings import Settings
from grood_cert.errors import InputError, RunError
from grood_cert.lipschitz.analyser import AnalysisSettings
from grood_cert.recipe import load
from grood_cert.runs import sweep
from grood_cert.runs.shards import Shard
from grood_cert.training import run as training
from tests.recorder import Recorder

TINY = """
name = "tiny"
seed = 5
[optimizer]
epochs = 1
batch_size = 256
[network]
name = "mlp"
width = 8
hidden_layers = 1
[data]
ood = ["digits:8,9"]
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def test_cells_are_all_combinations(tiny, tmp_path):
    grid = {"objective.lambda_grad": ("0", "0.1"), "optimizer.lr": ("0.1", "0.2", "0.3")}
    cells = sweep.cells(tiny, grid, 2, tmp_path)
    found = [(c.recipe.objective.lambda_grad, c.recipe.optimizer.lr, c.recipe.seed) for c in cells]
    assert found == [(a, b, seed) for a in (0.0, 0.1) for b in (0.1, 0.2, 0.3) for seed in (5, 6)]
    assert (
        len({cell.folder for cell in cells}) == 12
        and cells[0].name == cells[0].recipe.name == "lambda_grad=0,lr=0.1-seed=5"
    )
    assert {cell.recipe.optimizer.epochs for cell in sweep.cells(tiny, grid, 1, tmp_path, ["optimizer.epochs=3"])} == {
        3
    }
    sets = sweep.cells(tiny, dict([sweep.axis('data.ood=["digits:8"],["digits:9","uniform-noise"]')]), 1, tmp_path)
    assert [cell.recipe.data.ood for cell in sets] == [("digits:8",), ("digits:9", "uniform-noise")]
    assert all("/" not in cell.name and '"' not in cell.name for cell in sets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objective.lambda_grad", "expected KEY=VALUE,VALUE"),
        ("=1,2", "expected KEY=VALUE,VALUE"),
        ("objective.lambda_grad=0,,1", "expected KEY=VALUE,VALUE"),
        ("objective.lambda_grad=0,0", "named twice"),
        ("seed=1,2", "sets the seed itself"),
        ("name=a,b", "sets the name itself"),
    ],
)
def test_axes_that_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        sweep.axis(text)


def test_cells_that_are_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r"did you mean objective\.lambda_grad"):
        sweep.cells(tiny, {"objective.lamda_grad": ("0",)}, 1, tmp_path)
    with pytest.raises(InputError, match="0 seeds"):
        sweep.cells(tiny, {"objective.lambda_grad": ("0",)}, 0, tmp_path)
    with pytest.raises(InputError, match="folders of the same name"):
        sweep.cells(tiny, {"data.id": ("digits:0 1", "digits:0/1")}, 1, tmp_path)


def test_a_sweep_is_its_trainings_and_goes_on(tiny, tmp_path):
    cells = sweep.cells(tiny, {"objective.lambda_grad": ("0", "0.1")}, 1, tmp_path / "sweep")
    certifying = Settings((0.01, 0.02), stages=("ibp",), engine="native", effort="fast")
    assert sweep.lacking(cells[0], True, False) == ["train", "certify"]
    sweep.run(cells, certifying, None, limits=sweep.Limits(2), shard=Shard.parse("2/2"))
    assert [sweep.lacking(cell, True, False) for cell in cells] == [["train", "certify"], []]
    written = {path: path.read_bytes() for path in cells[1].folder.iterdir()}
    sweep.run(cells, certifying, None, limits=sweep.Limits(2))
    assert {path: path.read_bytes() for path in cells[1].folder.iterdir()} == written
    found = sweep.collected(cells, True, False)
    assert [len(measured.rows) for measured in found] == [4, 4] and found[0].slopes is None
    alone = training.run(load(tiny, ["objective.lambda_grad=0.1", 'name="lambda_grad=0.1-seed=5"']), tmp_path / "alone")
    assert (tmp_path / "alone" / "model.pt").read_bytes() == cells[1].model.read_bytes()
    assert alone.gamma == found[1].rows.gamma == detector.load(cells[1].model).gamma
    others = sweep.cells(tiny, {"objective.lambda_grad": ("0", "0.1")}, 1, tmp_path / "sweep", ["optimizer.lr=0.01"])
    with pytest.raises(InputError, match=r"of another recipe \(optimizer.lr = 0.002, not 0.01\)"):
        sweep.run(others, certifying, None, limits=sweep.Limits(2))
    with pytest.raises(InputError, match="3 shards for 2 cells"):
        sweep.run(cells, certifying, None, shard=Shard.parse("3/3"))
    with pytest.raises(InputError, match=r"limit must be 0 \(all\) or more, got -1"):
        sweep.Limits(-1)
    with pytest.raises(InputError, match="unknown effort"):
        sweep.run(cells, Settings((0.01,), effort="much"), None)


def test_a_sweep_is_drawn(tiny, tmp_path):
    cells = sweep.cells(
        tiny, {"objective.lambda_grad": ("0", "0.3"), "optimizer.lr": ("0.002",)}, 2, tmp_path / "sweep"
    )
    slopes = AnalysisSettings((0.01,), samples=4, ascents=1, clever_batches=0)
    sweep.run(
        cells, Settings((0.01,), stages=("ibp",), engine="native", effort="fast"), slopes, limits=sweep.Limits(3, 1)
    )
    found = sweep.collected(cells, True, True)
    files = sweep.draw(found, tmp_path / "sweep")
    names = ["sweep.csv", "objective-lr=0.002.png", "worst-case.png"]
    assert [path.name for path in files] == names and all(path.stat().st_size for path in files)
    with (tmp_path / "sweep" / "sweep.csv").open() as stream:
        records = list(csv.DictReader(stream))
    assert [(r["objective.lambda_grad"], r["seed"], r["kind"]) for r in records] == [
        (value, seed, kind) for value in ("0", "0.3") for seed in ("5", "6") for kind in ("id", "ood")
    ]
    printed = sweep.over_seeds(found)
    assert list(printed) == ["digits:0-5", "digits:8,9"]
    two = [one.rows.manifest["metrics"]["accuracy"] for one in found[:2]]
    mean, half = sum(two) / 2, abs(two[0] - two[1]) / 2
    assert printed["digits:0-5"][0]["group"] == "lambda_grad=0,lr=0.002"
    assert printed["digits:0-5"][0]["accuracy"] == f"{mean:.3g} ±{half:.2g}"
    for one in found:  # what was found by search never exceeds what was proved
        assert (one.slopes["ascended_estimate"] <= one.slopes["bound"]).all()


def test_a_cell_that_fails_does_not_keep_the_others(tiny, tmp_path, monkeypatch):
    cells = sweep.cells(tiny, {"objective.lambda_grad": ("0", "0.1", "1")}, 1, tmp_path)
    done = []

    def train(cell, *rest):
        done.append(cell.recipe.objective.lambda_grad)
        if done[-1] == 0.1:
            raise RunError("training diverged")

    monkeypatch.setattr(sweep, "measure", lambda cell, *rest, **more: train(cell))
    reporter = Recorder()
    with pytest.raises(RunError, match=r"1 of 3 cells failed: lambda_grad=0.1-seed=5 \(training diverged\)"):
        sweep.run(cells, None, None, reporter=reporter)
    assert done == [0.0, 0.1, 1.0]
