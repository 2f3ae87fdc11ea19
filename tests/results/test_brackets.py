"""Metrics read off tables: against the curves, and against brute force over pairs."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from grood_cert.confidence import bootstrap
from grood_cert.errors import InputError, SoundnessError
from grood_cert.results.brackets import brackets_of, smoothed_metrics
from grood_cert.results.curves import PERTURBED, fpr_curve, smoothed_fpr_curve
from tests.results.examples import EPS, random_certification, smoothing


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    few = functools.partial(bootstrap, resamples=60)
    monkeypatch.setattr("grood_cert.guarantees.bootstrap", few)
    monkeypatch.setattr("grood_cert.results.brackets.bootstrap", few)


@pytest.mark.parametrize("perturbed", PERTURBED)
def test_they_are_the_figures_of_the_curve_and_gauc_is_a_count_of_pairs(perturbed):
    rows = random_certification(1, share_nan=0.3)
    curve = {(record["set"], record["eps"]): record for record in fpr_curve(rows, perturbed).sets}
    found = brackets_of(rows, perturbed, EPS)
    assert [(record["set"], record["eps"]) for record in found] == [(name, eps) for eps in EPS for name in "ab"]
    inside = rows.of_kind("id")
    for record in found:
        expected, place, mask = (
            curve[record["set"], record["eps"]],
            EPS.index(record["eps"]),
            rows["set"] == record["set"],
        )
        for name in ("fpr95_id_attacked", "fpr95_id_certified"):
            assert record[name] == pytest.approx(expected[name], abs=1e-12)
        assert record["fpr95_id"] == pytest.approx(curve[record["set"], 0.0]["fpr95_id_certified"], abs=1e-12)
        upper = rows.grid["s_ub"][inside, place] if perturbed != "ood" else rows["score"][inside]
        lower = rows.grid["s_lb"][mask, place] if perturbed != "id" else rows["score"][mask]
        assert record["auroc_certified"] == np.mean([a < b for a, b in itertools.product(upper, lower)])
        assert (record["samples_id"], record["samples_ood"]) == (40, 40)
        stays = rows.grid["s_ub"][inside, place] < 0 if perturbed != "ood" else rows["score"][inside] <= 0
        assert record["tpr_at_gamma_certified"] == np.mean(stays)


def test_the_middle_of_the_grid_is_what_is_read_without_eps():
    assert {record["eps"] for record in brackets_of(random_certification(2))} == {EPS[0]}


def test_intervals_hold_the_figures():
    rows = random_certification(3)
    plain, found = brackets_of(rows), brackets_of(rows, with_intervals=True)
    for before, record in zip(plain, found, strict=True):
        assert {name: record[name] for name in before} == before
        metrics = [name for name in before if name[:3] in ("aur", "aup", "fpr", "tpr")]
        assert len(metrics) == 21 and len(record) == len(before) + 2 * len(metrics)
        assert all(record[f"{name}_low"] <= record[name] <= record[f"{name}_high"] for name in metrics)
    curve = next(record for record in fpr_curve(rows).sets if record["eps"] == EPS[0])
    for end in ("low", "high"):
        assert found[0][f"fpr95_id_certified_{end}"] == pytest.approx(curve[f"fpr95_id_certified_{end}"], abs=1e-12)


def test_what_contradicts_a_proof_is_an_error():
    rows = random_certification(4)
    lower = rows.grid["s_lb"].copy()
    lower[np.flatnonzero(rows["set"] == "a")[3], 0] = 99.0
    with pytest.raises(SoundnessError, match="1 OOD scores are worse than what is proved, at first that of sample 3"):
        brackets_of(replace(rows, grid={**rows.grid, "s_lb": lower}))


def test_what_is_not_there_is_refused():
    rows = random_certification(5)
    with pytest.raises(InputError, match=r"eps 0\.3 is not on the grid of the rows; use one of 0\.1, 0\.2"):
        brackets_of(rows, eps=[0.3])
    with pytest.raises(InputError, match="unknown side 'noise'"):
        brackets_of(rows, "noise")
    with pytest.raises(InputError, match="no OOD set"):
        brackets_of(random_certification(5, kinds=(("id", "in"), ("noise", "n"))))


def test_smoothing():
    rows = smoothing(
        [("id", "in", -1.0, -1.0 - k, "accepted", "certified", 0.3, (-1.5, -2.0)) for k in range(19)]
        + [("ood", "a", 1.0, median, "rejected", "certified", 0.3, lower) for median, lower in
           ((1.0, (0.5, -0.5)), (0.0, (-1.0, -3.0)), (2.0, (0.1, -math.inf)), (-1.0, (-math.inf, -math.inf)))]
    )  # fmt: skip
    found = smoothed_metrics(rows, EPS)
    fpr = smoothed_fpr_curve(rows)
    curve = dict(zip(fpr.eps, fpr.certified, strict=True))
    assert [record["fpr95_id_smoothed"] for record in found] == [curve[eps] for eps in EPS] == [0.5, 0.75]
    assert [record["fpr95_id_estimate"] for record in found] == [curve[0.0]] * 2 == [0.25] * 2
    assert found[0]["auroc_smoothed"] == (19 + 18 + 19 + 0) / (4 * 19)
    assert found[0]["auroc_estimate"] == (19 + 19 + 19 + 18.5) / (4 * 19)
    assert (found[0]["alpha"], found[0]["sigma"], found[0]["n"]) == (0.01, 0.1, 10)
    record = smoothed_metrics(rows, with_intervals=True)[0]
    for name in ("auroc_smoothed", "fpr95_id_smoothed", "auroc_estimate", "fpr95_id_estimate"):
        assert record[f"{name}_low"] <= record[name] <= record[f"{name}_high"]
