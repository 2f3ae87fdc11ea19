from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import beta

from grood_cert import detector, metrics
from grood_cert.certification.smoothing import SmoothingSettings, default_eps, smoothed_scores
from grood_cert.data import experiment_of
from grood_cert.errors import InputError, RunError
from grood_cert.results.columns import DECISIONS, SCHEMAS, header
from grood_cert.results.curves import smoothed_fpr_curve, smoothed_radius_curve
from grood_cert.results.summary import detection
from grood_cert.results.table import Table
from grood_cert.runs import smooth
from grood_cert.runs.merge import merge
from grood_cert.runs.shards import Shard
from grood_cert.scores import score_gradient
from tests.recorder import Recorder


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_network_that_scores_nan_gets_no_gamma(model, tmp_path):
    loaded = detector.load(model)
    experiment = experiment_of(loaded.origin.recipe)
    with torch.no_grad():
        next(loaded.network.parameters()).fill_(math.inf)
    settings = SmoothingSettings(0.25, (0.1,), n=20)
    with pytest.raises(RunError, match="scores NaN under noise"):
        smooth.run(loaded, model, experiment.calibration, [experiment.test], settings, tmp_path)


# The run


@pytest.fixture(scope="module")
def smoothed(model, tmp_path_factory):
    loaded = detector.load(model)
    experiment = experiment_of(loaded.origin.recipe)
    folder = tmp_path_factory.mktemp("smoothed")
    settings = SmoothingSettings(sigma=0.3, eps=default_eps(0.3, (1, 8, 8)), n=200, alpha=0.01, calibration_limit=60)
    heard = Recorder()
    result = smooth.run(
        loaded,
        model,
        experiment.calibration,
        [experiment.test, *experiment.ood],
        settings,
        folder,
        limit=12,
        reporter=heard,
    )
    return SimpleNamespace(
        detector=loaded,
        model=model,
        experiment=experiment,
        folder=folder,
        settings=settings,
        rows=result,
        stages=[(stage, total) for stage, total, _ in heard.stages],
        steps=heard.steps,
    )


def test_files_of_a_run(smoothed):
    result, settings = smoothed.rows, smoothed.settings
    assert smoothed.stages == [("calibrating", 60), ("certifying", len(result))] and sum(smoothed.steps) == 60 + len(
        result
    )
    again = Table.read(smoothed.folder / "smoothing.csv")
    for name in SCHEMAS["smoothing"].columns:
        np.testing.assert_array_equal(again[name], result[name])
    for name in SCHEMAS["smoothing"].grid:
        np.testing.assert_array_equal(again.grid[name], result.grid[name])
    manifest = json.loads((smoothed.folder / "smoothing.json").read_text())
    expected = {"sigma": 0.3, "n": 200, "alpha": 0.01, "dtype": "float32", "norm": "l2", "method": "smoothing"}
    assert expected.items() <= manifest.items() and manifest["gamma_base"] == smoothed.detector.gamma
    assert (result["sigma"] == 0.3).all() and (result["n"] == 200).all() and (result["alpha"] == settings.alpha).all()
    with (smoothed.folder / "smoothing-calibration.csv").open(newline="") as stream:
        medians = [float(record["median_estimate"]) for record in csv.DictReader(stream)]
    assert len(medians) == 60
    assert manifest["gamma"] == sorted(medians)[-(-95 * 61 // 100) - 1] == result.gamma  # split-conformal
    exact = smoothed.detector.scores(smoothed.experiment.test.images[result["index"][result["kind"] == "id"]])
    np.testing.assert_allclose(result["score"][result["kind"] == "id"], exact, rtol=1e-12)


def test_no_name_is_shared_with_deterministic_results():
    identity = {"set", "kind", "index", "file", "label", "score", "status"}
    formal, smoothed = ({*schema.columns, *schema.grid} for schema in (SCHEMAS["certification"], SCHEMAS["smoothing"]))
    assert formal & smoothed == identity


def test_decisions_radii_and_bounds_of_a_run_agree(smoothed):
    result = smoothed.rows
    below, above, n = result["draws_below"], result["draws_above"], 200
    accepted, rejected = (beta.ppf(0.005, hits, n - hits + 1) > 0.5 for hits in (below, above))
    assert (result["decision"] == np.where(accepted, "accepted", np.where(rejected, "rejected", "abstained"))).all()
    right = np.where(result["kind"] == "id", accepted, rejected)
    assert ((result["status"] == "certified") == right).all() and ((result["radius_smoothed"] > 0) == right).all()
    assert ((result["status"] == "abstained") == ~(accepted | rejected)).all()
    assert {"certified", "abstained"} <= set(result["status"]) and set(result["decision"]) == {*DECISIONS}
    lower, upper = result.grid["s_lb_smoothed"], result.grid["s_ub_smoothed"]
    proved = np.where((result["kind"] == "id")[:, None], upper < result.gamma, lower > result.gamma)
    eps = np.array(result.eps)
    assert proved.any()
    assert (result["radius_smoothed"][:, None] >= np.where(proved, eps, 0)).all()
    assert ((lower <= result["median_estimate"][:, None]) & (result["median_estimate"][:, None] <= upper)).all()


def test_no_attack_inside_a_certified_radius_succeeds(smoothed):
    """Steps along the gradient of S towards gamma, judged by 1000 fresh draws: the decision of the detector stands."""
    result, network = smoothed.rows, smoothed.detector.network
    sets = {images.name: images for images in (smoothed.experiment.test, *smoothed.experiment.ood)}
    for row in np.flatnonzero(result["status"] == "certified"):
        image = sets[result["set"][row]].images[result["index"][row]].double()
        inside = result["kind"][row] == "id"
        noise = 0.3 * torch.randn(64, *image.shape, generator=generator(1), dtype=torch.float64)
        direction = score_gradient(network, image + noise)[1].mean(0) * (1 if inside else -1)
        moved = image + 0.95 * result["radius_smoothed"][row] * direction / direction.norm()
        draws = smoothed_scores(network, moved, 0.3, 1000, generator(2), 1000).numpy()
        share = np.mean(draws < result.gamma if inside else draws > result.gamma)
        assert share > 0.5 - 3 * math.sqrt(0.25 / 1000)


def test_what_is_read_off_the_rows(smoothed):
    result = smoothed.rows
    inside = result["kind"] == "id"
    counted = result.summary()
    assert [record["set"] for record in counted] == list(dict.fromkeys(result["set"]))
    for record in counted:
        assert record["certified"] + record["abstained"] + record["misdecided"] == record["samples"] == 12
    found = detection(result)
    for record in found:
        outside = result["set"] == record["set"]
        for column, label in (("score", "base"), ("median_estimate", "smoothed_estimate")):
            assert record[f"auroc_{label}"] == metrics.auroc(result[column][inside], result[column][outside])
            assert record[f"fpr95_id_{label}"] == metrics.fpr95_id(result[column][inside], result[column][outside])
    fpr = smoothed_fpr_curve(result)
    ood = [r["fpr95_id_smoothed_estimate"] for r in found if r["kind"] == "ood"]
    assert fpr.eps.tolist() == [0.0, *result.eps] and fpr.certified[0] == pytest.approx(np.mean(ood), abs=1e-15)
    assert (np.diff(fpr.certified) >= 0).all()
    decisions = smoothed_radius_curve(result, {"id": inside}).certified
    assert decisions[0] == pytest.approx(np.mean(result["status"][inside] == "certified")) and decisions[-1] == 0


def test_an_interrupted_run_and_shards_give_the_same_rows(smoothed, tmp_path):
    class Interrupted(Exception):
        pass

    class Interrupting(Recorder):
        def advance(self, steps=1, counts=None):
            super().advance(steps, counts)
            if len(self.steps) == 9:
                raise Interrupted

    experiment, settings, heard = smoothed.experiment, smoothed.settings, Recorder()
    work = smoothed.detector, smoothed.model, experiment.calibration, [experiment.test, *experiment.ood], settings
    with pytest.raises(Interrupted):  # in the second stage: the first has 8 batches
        smooth.run(*work, tmp_path, limit=12, reporter=Interrupting())
    assert not Table.read(tmp_path / "smoothing.csv", partial=True).complete
    smooth.run(*work, tmp_path, limit=12, reporter=heard)
    assert [stage for stage, _, _ in heard.stages] == ["certifying"]
    expected = (smoothed.folder / "smoothing.csv").read_bytes()
    assert (tmp_path / "smoothing.csv").read_bytes() == expected
    for index in (1, 0):
        smooth.run(*work, tmp_path, limit=12, shard=Shard(index, 2))
    shards = [tmp_path / f"smoothing-{number}-of-2.csv" for number in (1, 2)]
    merge(shards, tmp_path / "merged.csv")
    assert (tmp_path / "merged.csv").read_bytes() == expected


def test_unusable_runs_are_refused_before_any_work(smoothed, tmp_path):
    work = smoothed.detector, smoothed.model, smoothed.experiment.calibration, [smoothed.experiment.test]
    with pytest.raises(InputError, match="exists already"):
        smooth.run(*work, SmoothingSettings(0.3, (0.1,)), smoothed.folder)
    with pytest.raises(InputError, match="at least 19"):
        smooth.run(*work, SmoothingSettings(0.2, (0.1,), calibration_limit=18), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["status", "radius", "column", "manifest", "empty"])
def test_foreign_rows_are_refused(smoothed, tmp_path, damage):
    path = tmp_path / "smoothing.csv"
    text = (smoothed.folder / "smoothing.csv").read_text()
    manifest = (smoothed.folder / "smoothing.json").read_text()
    if damage == "status":
        text = text.replace(",certified,", ",undecided,")
    elif damage == "radius":
        line = next(line for line in text.splitlines() if ",certified," in line)
        radius = line.split(",")[header("smoothing", ()).index("radius_smoothed")]
        text = text.replace(radius, "inf")
    elif damage == "column":
        text = text.replace("draws_below", "something")
    elif damage == "manifest":
        manifest = manifest.replace("gamma_base", "something")
    else:
        text = text.splitlines()[0] + "\n"
    path.write_text(text)
    (tmp_path / "smoothing.json").write_text(manifest)
    with pytest.raises(InputError, match=r"smoothing\.csv"):
        Table.read(path)
