"""Rows that grood-cert cannot have written are refused, also where their checksum fits; rows that it wrote are read."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from grood_cert.errors import InputError
from grood_cert.results.invariants import check_invariants
from grood_cert.results.table import Table
from tests.results.examples import EPS, changed, random_certification, slopes, smoothing

ROWS = random_certification(3)
DATA = [
    {"set": name, "kind": kind, "images": 160}
    for kind, name in (("id", "in"), ("ood", "a"), ("ood", "b"), ("noise", "n"))
]


def some(kind, **wanted):
    """A row of ROWS of this kind with a radius between the two eps, a finite attack radius and these cells."""
    chosen = (ROWS["kind"] == kind) & np.isfinite(ROWS["radius_attack"])
    for name, value in wanted.items():
        chosen &= ROWS[name] == value
    return int(np.flatnonzero(chosen)[0])


ID, OOD = some("id", status="certified"), some("ood", status="certified")
WRONG = some("id", status="misdecided")


def test_what_is_written_is_read(tmp_path):
    for seed in range(5):
        check_invariants(random_certification(seed, share_nan=0.3))
    check_invariants(replace(ROWS, manifest={**ROWS.manifest, "data": DATA}))
    ROWS.write(tmp_path / "rows.csv")
    assert len(Table.read(tmp_path / "rows.csv")) == len(ROWS)


CASES = {
    "a radius beyond the attack": (ID, {"radius_certified": 5.0}, "radius_certified: 5.0 exceeds the attack radius"),
    "a negative radius": (ID, {"radius_certified_per_logit": -0.5}, "radius_certified_per_logit: -0.5 is negative"),
    "another radius": (ID, {"radius_lipschitz_path": 9.0}, "radius_lipschitz_path: 9.0 exceeds the attack radius"),
    "a radius that counts as none": (ID, {"radius_lipschitz_path": (ROWS["radius_certified"][ID] + ROWS["radius_attack"][ID]) / 2}, "radius_lipschitz_path: .* exceeds radius_certified"),
    "another estimate": (ID, {"radius_gradient_norm_estimate": 77.0}, "radius_gradient_norm_estimate: 77.0 does not follow"),
    "another score": (ID, {"score": 5.0}, "accepted: 1 does not follow from the score and gamma 0"),
    "another score, the same decision": (ID, {"score": -99.0}, "s_lb@0.1: .* exceeds the score"),
    "another decision": (OOD, {"accepted": 1}, "accepted: 1 does not follow from the score and gamma 0"),
    "another status": (ID, {"status": "undecided"}, "status: undecided does not follow"),
    "another stage": (ID, {"stage": "undecided"}, "stage: undecided does not follow"),
    "a wrong decision is certified": (WRONG, {"radius_certified": 0.1}, "radius_certified: 0.1 certifies a wrong decision"),
    "bounds that cross": (ID, {"s_lb": (9.0, 9.0)}, "s_lb@0.1: 9.0 exceeds the score"),
    "an upper bound below the score": (OOD, {"s_ub": (-9.0, -9.0)}, "s_ub@0.1: -9.0 lies below the score"),
    "an attack below the bound": (ID, {"s_attack_min": (None, -99.0)}, "s_lb@0.2: .* exceeds what an attack reached"),
    "an attack above the bound": (ID, {"s_attack_max": (None, 99.0)}, "s_ub@0.2: .* lies below what an attack reached"),
    "an attack weaker than the image itself": (ID, {"s_attack_min": (9.0, 9.0)}, "s_attack_min@0.1: 9.0 exceeds the score"),
    "a larger ball with a better bound": (ID, {"s_ub": (99.0, None)}, "s_ub@0.2: .* lies below the one of a smaller eps"),
    "a proof of a larger ball": (ID, {"outcome": (None, "crown"), "radius_certified": 0.15, "radius_certified_per_logit": 0.1, "radius_attack": 0.19}, "outcome@0.2: crown does not follow from radius_certified"),
    "an attack that was none": (ID, {"outcome": (None, "attack"), "radius_certified": 0.15, "radius_certified_per_logit": 0.1, "radius_attack": 0.5}, "outcome@0.2: attack does not follow"),
    "a ball twice": (ID + 1, {"index": int(ROWS["index"][ID])}, "index: [0-9]+ occurs for the second time in its set"),
    "no position": (ID, {"index": -1}, "index: -1 is no position of an image"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "cells", "message"), CASES.values(), ids=CASES)
def test_rows_that_contradict_themselves_are_refused(row, cells, message):
    with pytest.raises(ValueError, match=rf"^line {row + 2 if 'index' not in cells else '[0-9]+'}, {message}"):
        check_invariants(changed(ROWS, row, **cells))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"gamma": "x"}, "its manifest's gamma is 'x', not a finite number"),
        ({"gamma": math.inf}, "its manifest's gamma is inf"),
        ({"eps": [0.2, 0.1]}, "are not ascending numbers"),
        ({"eps": [-0.1, 0.2]}, "are not ascending numbers"),
        ({"data": DATA[:2]}, "line 82, set: b of kind ood is none of the manifest's image sets"),
        ({"data": [{**entry, "images": 30} for entry in DATA]}, "line 32, index: 30 is beyond the 30 images"),
    ],
)
def test_a_manifest_that_is_not_of_the_rows_is_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        check_invariants(replace(ROWS, manifest={**ROWS.manifest, **entries}))


def test_proofs_are_by_stages_of_the_manifest():
    check_invariants(replace(ROWS, manifest={**ROWS.manifest, "stages": ["ibp", "crown"]}))
    with pytest.raises(ValueError, match="stage: crown is none of the manifest's stages"):
        check_invariants(replace(ROWS, manifest={**ROWS.manifest, "stages": ["ibp"]}))


def test_a_sample_of_another_kind_is_refused():
    table = changed(ROWS, OOD, {"data": DATA}, kind="id")
    with pytest.raises(ValueError, match=rf"line {OOD + 2}, (set: a of kind id is none|accepted|status|outcome)"):
        check_invariants(table)


def test_line_and_column_are_said_of_a_file_whose_checksum_fits(tmp_path):
    changed(ROWS, ID, radius_certified=5.0).write(tmp_path / "rows.csv")
    with pytest.raises(
        InputError, match=rf"rows\.csv: .*line {ID + 2}, radius_certified: 5\.0 exceeds the attack radius"
    ):
        Table.read(tmp_path / "rows.csv")


def test_smoothing():
    rows = [("id", "in", -1.0, -1.0, "accepted", "certified", 0.3, (-1.5, -2.0))]
    rows.append(("ood", "a", -1.0, -1.0, "accepted", "misdecided", 0.0, (-1.5, -2.0)))
    table = smoothing(rows)
    check_invariants(table)
    for row, cells, message in (
        (1, {"radius_smoothed": 0.1}, "radius_smoothed: 0.1 certifies what is not right"),
        (0, {"status": "misdecided"}, "status: misdecided does not follow from the decision"),
        (0, {"draws_below": 11}, "draws_below: 11 is no count"),
        (0, {"draws_above": 9}, "draws_above: 9 is no count"),
        (0, {"draws_below": 3}, "decision: accepted contradicts the draws"),
        (0, {"alpha": 1.5}, "alpha: 1.5 is no probability"),
        (0, {"sigma": 0.0}, "sigma: 0.0 is no standard deviation"),
        (0, {"s_ub_smoothed": (-9.0, None)}, "s_lb_smoothed@0.1: -1.5 exceeds the upper bound"),
        (0, {"s_lb_smoothed": (None, 0.0)}, "s_lb_smoothed@0.2: 0.0 exceeds the one of a smaller eps"),
    ):
        with pytest.raises(ValueError, match=f"line {row + 2}, {message}"):
            check_invariants(changed(table, row, **cells))
    for name in ("sigma", "n", "alpha"):
        with pytest.raises(ValueError, match=f"line 2, {name}: .* is not the manifest's"):
            check_invariants(replace(table, manifest={**table.manifest, name: 0.5}))


def test_lipschitz():
    table = slopes([("id", EPS[0], 1.0, 1.5, 2.0), ("id", EPS[1], 1.0, 1.6, 2.5)])
    same = changed(table, 1, index=0)
    check_invariants(same)
    for row, cells, message in (
        (0, {"ascended_estimate": 2.1}, "ascended_estimate: 2.1 exceeds the proved bound"),
        (1, {"bound": 1.7}, "bound: 1.7 lies below the one of a smaller eps"),
        (0, {"bound": math.nan}, "bound: nan is no constant"),
        (0, {"bound_interval": 1.9}, "bound_interval: 1.9 lies below the smallest of all bounds"),
        (0, {"provenance": "hull"}, "provenance: hull is not the method with the smallest bound"),
        (1, {"eps": 0.7}, "eps: 0.7 is not on the manifest's grid"),
        (1, {"eps": EPS[0]}, "index: 0 occurs for the second time"),
    ):
        with pytest.raises(ValueError, match=f"line {row + 2}, {message}"):
            check_invariants(changed(same, row, **cells))
