from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from grood_cert.errors import InputError
from grood_cert.metrics import auroc, fpr95_id
from grood_cert.results.columns import SCHEMAS
from grood_cert.results.summary import DETECTION, RADII, SLOPES, balls_decided, detection
from grood_cert.results.table import Table
from tests.results.examples import certification, random_certification, sample, slopes, smoothing


def test_radius_summary():
    records = [
        sample("id", "in", -1.0, [(0.0,) * 4] * 2, radius=0.2, attack=0.4),
        sample("id", "in", -1.0, [(0.0,) * 4] * 2, radius=0.3, attack=0.4),
        sample("id", "in", -1.0, [(0.0,) * 4] * 2, radius=0.0, attack=0.5, status="undecided"),
        sample("id", "in", 1.0, [(0.0,) * 4] * 2, radius=0.0, attack=0.0, status="misdecided"),
        sample("ood", "a", -1.0, [(0.0,) * 4] * 2, radius=0.0, attack=0.0, status="misdecided"),
    ]
    inside, outside = certification(records).summary()
    assert (inside["samples"], inside["certified"], inside["undecided"], inside["misdecided"]) == (4, 2, 1, 1)
    assert inside["radius_certified"] == 0.2 and inside["radius_attack"] == 0.4
    assert inside["certified_to_attack"] == pytest.approx(0.5)
    assert outside["radius_certified"] is None and outside["certified_to_attack"] is None


def test_balls_are_counted_by_what_decided_them():
    found = random_certification(0, samples=3)
    outcomes = np.full_like(found.grid["outcome"], "crown").astype("U20")
    outcomes[:3] = [["ibp", "attack"], ["ibp", "ibp"], ["envelope", "undecided"]]
    first, *others = balls_decided(replace(found, grid={**found.grid, "outcome": outcomes}))
    assert first == {"set": "in", "kind": "id", "undecided": 1, "ibp": 3, "crown": 0, "attack": 1, "envelope": 1}
    assert [record["set"] for record in others] == ["a", "b", "n"] and all(r["crown"] == 6 for r in others)


SMOOTHED = smoothing(
    [
        *(("id", "in", -3.0, -3.0 + i / 10, "accepted", "certified", 0.1 * i, (-4.0, -5.0)) for i in range(1, 4)),
        ("id", "in", -0.5, -0.4, "abstained", "abstained", 0.0, (-4.0, -5.0)),
        ("id", "in", 2.0, 2.0, "rejected", "misdecided", 0.0, (1.0, 0.5)),
        ("ood", "a", 1.0, 1.5, "rejected", "certified", 0.3, (1.0, -math.inf)),
        ("ood", "a", -1.0, -1.5, "accepted", "misdecided", 0.0, (-2.0, -3.0)),
        ("noise", "n", -1.0, -1.5, "accepted", "misdecided", 0.0, (-2.0, -3.0)),
    ]
)


def test_smoothing_summary():
    inside, outside, noise = SMOOTHED.summary()
    assert inside == {"set": "in", "kind": "id", "samples": 5, "certified": 3, "abstained": 1, "misdecided": 1} | {
        "radius_smoothed": pytest.approx(0.15)  # the middle of 0, 0.1, 0.2, 0.3
    }
    assert outside["radius_smoothed"] == 0.3 and outside["misdecided"] == 1
    assert noise["radius_smoothed"] is None and noise["kind"] == "noise"


def test_detection_before_and_after_smoothing():
    found = detection(SMOOTHED)
    assert [record["set"] for record in found] == ["a", "n"] and all(set(DETECTION) < set(record) for record in found)
    inside, outside = SMOOTHED.of_kind("id"), SMOOTHED["set"] == "a"
    for column, label in (("score", "base"), ("median_estimate", "smoothed_estimate")):
        values = SMOOTHED[column][inside], SMOOTHED[column][outside]
        assert found[0][f"auroc_{label}"] == auroc(*values) and found[0][f"fpr95_id_{label}"] == fpr95_id(*values)


def test_calibration_summary():
    manifest = {"kind": "smoothing-calibration", "schema": 1, "norm": "l2", "model": {}, "eps": [0.1]}
    names = {"set": "in", "kind": "id", "file": "", "score": 0.0}
    records = [names | {"index": index, "median_estimate": float(index)} for index in range(19)]
    (found,) = Table.of(records, manifest).summary()
    assert found == {"set": "in", "kind": "id", "samples": 19, "gamma": 18.0}
    with pytest.raises(InputError, match="use at least 19"):
        Table.of(records[:18], manifest).summary()


def test_lipschitz_summary():
    records = [
        ("id", 0.1, 1.0, 2.0, 3.0),
        ("id", 0.2, 1.0, 4.0, 8.0),
        ("id", 0.1, 0.0, 0.0, 5.0),
        ("ood", 0.1, 1.0, 1.0, 2.0),
    ]
    near, far, outside = slopes([*records, ("ood", 0.1, 2.0, 0.0, 2.0)]).summary()
    assert {"bound": 4.0, "ascended_estimate": 1.0, "tightness": 1.5, "samples": 2}.items() <= near.items()
    assert (far["eps"], far["tightness"], outside["kind"], outside["bound"]) == (0.2, 2.0, "ood", 2.0)
    (still,) = slopes([("id", 0.1, 0.0, 0.0, 0.0)]).summary()
    assert still["tightness"] is None and set(SLOPES) < set(still)


def test_words_are_of_columns_that_there_are():
    assert {name for name in RADII if name.startswith("radius")} < set(SCHEMAS["certification"].columns)
    assert set(SLOPES) - {"samples", "tightness"} < set(SCHEMAS["lipschitz"].columns)
    assert np.isfinite([record["radius_attack"] for record in random_certification(0).summary()]).all()
