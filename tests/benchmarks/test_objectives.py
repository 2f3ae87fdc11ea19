"""The benchmark of training objectives: what it averages, what it reuses, and what it says of the trade-off."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks import objectives as benchmark
from grood_cert import detector
from grood_cert.data import experiment_of, load_set
from grood_cert.errors import InputError
from grood_cert.recipe import find, load
from grood_cert.training import run as training

TINY = benchmark.Setup(
    "tiny", "digits-greg", ("objective.certified_eps=0.01", "optimizer.epochs=1", "data.train_limit=270"), 0.1
)
SEEDS = (0, 1)


def test_mean_and_spread_are_those_of_the_runs_and_runs_are_reused(tmp_path, monkeypatch):
    measured = benchmark.measure(TINY, benchmark.greg(0.1), tmp_path, SEEDS)
    files = sorted((tmp_path / "tiny/objective.lambda_grad=0.1").glob("*/model.pt"))
    runs = [detector.load(file) for file in files]
    assert [run.origin.recipe.seed for run in runs] == list(SEEDS)
    for (metric, name), (mean, sd) in measured.items():
        if metric == "auroc" and name != "mean":
            values = [run.origin.metrics["ood"][name]["auroc"] for run in runs]
            assert (mean, sd) == pytest.approx((statistics.mean(values), statistics.stdev(values)))
    real = [measured["fpr95_id", name][0] for name in ("digits:8,9", "photo-patches")]
    assert measured["fpr95_id", "mean"][0] == pytest.approx(statistics.mean(real)), "noise is in no mean over sets"

    monkeypatch.setattr(training, "run", lambda *args, **kwargs: pytest.fail("trained again"))
    assert benchmark.measure(TINY, benchmark.greg(0.1), tmp_path, SEEDS) == measured
    other = benchmark.Setup("tiny", "digits-greg", (*TINY.settings, "objective.m_in=-7"), 0.1)
    with pytest.raises(InputError, match=r"trained with objective\.m_in = -6\.0, not -7\.0; choose another --out"):
        benchmark.measure(other, benchmark.greg(0.1), tmp_path, SEEDS)


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    setup = benchmark.Setup("tiny", "digits-greg", ("optimizer.epochs=2", "data.train_limit=160"), 0.1)
    whole = benchmark.trained(setup, benchmark.greg(0.1), 0, tmp_path / "whole")
    through = training.run

    def killed(*args, **kwargs):
        def report(epoch):
            if epoch.epoch == 2:
                raise KeyboardInterrupt

        return through(*args, **kwargs, report=report)

    monkeypatch.setattr(training, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        benchmark.trained(setup, benchmark.greg(0.1), 0, tmp_path / "cut")
    monkeypatch.setattr(training, "run", through)
    assert benchmark.trained(setup, benchmark.greg(0.1), 0, tmp_path / "cut").origin == whole.origin


@pytest.mark.parametrize("name", ["CE", "OE", "GReg+", "GReg, certified"])
def test_every_objective_trains(name, tmp_path):
    changes = benchmark.objectives(0.1)[name]
    measured = benchmark.measure(TINY, changes, tmp_path, SEEDS)
    assert np.isfinite(list(measured.values())).all()


def test_only_the_objective_differs():
    base = load(find("digits-greg"))
    for changes in (*benchmark.objectives(0.3).values(), *benchmark.penalties(0.3).values()):
        chosen = load(find("digits-greg"), changes + benchmark.DIGITS.settings)
        assert (chosen.data, chosen.network, chosen.optimizer) == (base.data, base.network, base.optimizer)
    for name, shipped in {"CE": "ce", "OE": "oe", "Energy": "energy"}.items():
        changes = benchmark.objectives(0.1)[name]
        chosen, other = load(find("digits-greg"), changes + benchmark.DIGITS.settings), load(find(f"digits-{shipped}"))
        unused = {"certified_eps": other.objective.certified_eps}
        assert dataclasses.replace(chosen.objective, **unused) == other.objective


@pytest.mark.parametrize(
    ("slope", "accuracy", "words"),
    [
        (3.0, 0.985, "or less at lambda_grad = 0.1"),
        (3.5, 0.985, "or less at no lambda_grad tried"),  # on ID the norm is cut 2.9-fold
        (3.0, 0.975, "or less at no lambda_grad tried"),  # 1.5 points lost
    ],
)
def test_the_verdict(slope, accuracy, words, capsys):
    def measured(slope, accuracy):
        values = {("accuracy", "id"): accuracy, ("auroc", "mean"): 0.9, ("fpr95_id", "mean"): 0.3}
        values |= {("gradient_norm", "id"): slope, ("gradient_norm", "ood"): slope / 2}
        return {key: (value, 0.01) for key, value in values.items()}

    rows = {"0": measured(10.0, 0.99), "0.1": measured(slope, accuracy)}
    benchmark.print_tradeoff("digits", rows)
    assert capsys.readouterr().out.splitlines()[-2].endswith(words)
    gain = benchmark.tradeoff(rows["0"], rows["0.1"])
    assert gain["cut_id"] == pytest.approx(10 / slope) and gain["loss"] == pytest.approx(100 * (0.99 - accuracy))


@pytest.mark.skipif(not benchmark.ARRAYS.is_dir(), reason="no shared/data next to the repository")
def test_the_arrays_are_the_shared_images(tmp_path):
    setup = benchmark.arrays(benchmark.ARRAYS, tmp_path)
    chosen = load(find(setup.recipe), setup.settings)
    experiment = experiment_of(chosen)
    assert len(experiment.train) == 3000 and len(experiment.test) == 800 and len(experiment.auxiliary) == 1619
    assert [Path(images.name).stem for images in experiment.ood] == ["tin32_ood", "cifar100_test", "dtd32_a"]
    assert load_set(chosen.data.id).images.shape == (8000, 3, 32, 32)


def test_without_the_arrays_the_digits_remain(tmp_path, monkeypatch, capsys):
    tried = []
    numbers = {("auroc", "digits:8,9"): (0.9, 0.01), ("fpr95_id", "digits:8,9"): (0.3, 0.01)}
    numbers |= {(metric, "mean"): (0.5, 0.01) for metric in ("auroc", "fpr95_id")}
    numbers |= {
        ("accuracy", "id"): (0.9, 0.01),
        ("gradient_norm", "id"): (3.0, 0.1),
        ("gradient_norm", "ood"): (2, 0.1),
    }
    monkeypatch.setattr(benchmark, "measure", lambda setup, *rest: tried.append(setup.name) or numbers)
    benchmark.main(tmp_path / "runs", tmp_path / "table.csv", tmp_path / "nowhere")
    printed = capsys.readouterr()
    assert set(tried) == {"digits"} and "cifar-arrays is left out: there is no" in printed.err
    assert "| GReg+ | 0.900 ± 0.010 | 0.900 ± 0.010 / 0.300 ± 0.010 | 3.000 ± 0.100 |" in printed.out
    lines = (tmp_path / "table.csv").read_text().splitlines()
    runs = 6 + len(benchmark.LAMBDAS) - 2 + 2  # energy and GReg are in two tables, exact is GReg
    assert lines[0] == ",".join(benchmark.COLUMNS) and len(lines) == 1 + runs * len(numbers)
