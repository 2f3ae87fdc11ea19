"""The scripts of train/, analysis/ and benchmarks/ run on a small result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from analysis import objective_to_radius, radius_scatter
from benchmarks import bounds, clustering, step_time
from benchmarks import lipschitz as lipschitz_benchmark
from grood_cert.results.table import Table

KEPT = Path(__file__).parents[1] / "results"


def test_radius_scatter(rows_file, tmp_path):
    radius_scatter.main(rows_file, tmp_path / "scatter.png")
    assert (tmp_path / "scatter.png").read_bytes()[:4] == b"\x89PNG"
    drawing = radius_scatter.figure(Table.read(rows_file))
    for axes in drawing.axes:
        (note,) = [text.get_text() for text in axes.texts if text.get_text().startswith("refuted of")]
        assert note.replace("\n", " ").endswith(" 0 certified radii")
        assert axes.get_xlim() == axes.get_ylim() and axes.get_aspect() == 1


def test_objective_to_radius_draws_what_is_kept(tmp_path):
    objective_to_radius.main(KEPT / "lambda-grad.csv", tmp_path / "objective.png")
    assert (tmp_path / "objective.png").read_bytes()[:4] == b"\x89PNG"


def test_bounds_benchmark(model):
    records = bounds.measure(model, samples=4, repeats=1, methods=("ibp", "crown"))
    assert len(records) == 2 * sum(map(len, bounds.EPS.values()))
    for record in records:
        assert tuple(record) == bounds.COLUMNS
        for side in ("upper", "lower"):  # no bound is tighter than what an attack reached
            assert 1 <= record[f"{side}_joint"] <= record[f"{side}_per_logit"] + 1e-9
    assert np.isfinite([record["ms_per_sample"] for record in records]).all()


def test_lipschitz_benchmark(small_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(lipschitz_benchmark, "EPS", {"linf": (0.03,), "l2": (0.2,)})
    tiny = replace(small_recipe, optimizer=replace(small_recipe.optimizer, epochs=2))
    records = lipschitz_benchmark.measure("MLP-3", "greg", tmp_path, tiny, samples=2, repeats=1, batch=2)
    assert len(records) == 2 * sum(map(len, lipschitz_benchmark.EPS.values()))
    for record in records:
        assert tuple(record) == lipschitz_benchmark.COLUMNS
        assert 1 - 1e-9 <= record["auto"] <= min(record[name] for name in lipschitz_benchmark.METHODS) + 1e-9


def test_step_time_benchmark():
    records = step_time.measure("resnet-small", 2, 1, 0.5)
    assert len(records) == 11 and all(tuple(record) == step_time.COLUMNS for record in records)


def test_clustering_benchmark():
    assert all(tuple(record) == clustering.COLUMNS for record in clustering.measure((200,), 1))
