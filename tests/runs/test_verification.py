"""True records are not contradicted; a record with any one cell changed is found out, or the docs say why it is not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import grood_cert
from grood_cert import detector
from grood_cert.certification.settings import Settings
from grood_cert.certification.smoothing import SmoothingSettings
from grood_cert.data import experiment_of
from grood_cert.errors import InputError
from grood_cert.lipschitz.analyser import AnalysisSettings
from grood_cert.results.checksum import KEY
from grood_cert.results.columns import SCHEMAS
from grood_cert.results.table import Table
from grood_cert.runs import analyse, certify, smooth
from grood_cert.runs.verification.run import verify
from tests.recorder import Recorder
from tests.results.examples import changed

DOCS = Path(grood_cert.__file__).parents[1] / "docs" / "trust.md"


class Runs:
    """One small run of each kind, and what it takes to check them."""

    def __init__(self, model, folder):
        self.model, self.folder, self.detector = model, folder, detector.load(model)
        experiment = experiment_of(self.detector.origin.recipe)
        self.sets, self.calibration = [experiment.test, experiment.ood[0]], experiment.calibration
        about = self.detector, model
        bounds = Settings(eps=(0.01, 0.03), effort="fast", per_logit=True, batch_size=4)
        self.tables = {"certification": certify.run(*about, self.sets, bounds, folder / "whole", limit=4)}
        noise = SmoothingSettings(sigma=0.25, eps=(0.1, 1.0), n=100, calibration_limit=30)
        self.tables["smoothing"] = smooth.run(*about, self.calibration, self.sets, noise, folder, limit=6)
        self.tables["smoothing-calibration"] = Table.read(folder / "smoothing-calibration.csv")
        slopes = AnalysisSettings((0.02,), samples=8, clever_batches=2, ascents=1)
        self.tables["lipschitz"] = analyse.run(*about, self.sets[:1], slopes, folder, limit=1)

    def verify(self, table, **options):
        sets = [self.calibration] if table.kind == "smoothing-calibration" else self.sets
        if table.kind == "smoothing":
            options["calibration"] = self.tables["smoothing-calibration"]
        return verify(table, self.detector, self.model, sets, **{"every": 1, **options})


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    return Runs(model, tmp_path_factory.mktemp("runs"))


def contradicted(found):
    return {claim for claim, check in found.checks.items() if check.contradicted}


def missed(found):
    """Checks that did not find again all that they looked for."""
    return {claim for claim, check in found.checks.items() if check.repeated not in (None, check.checked)}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_true_record_is_not_contradicted(runs, kind):
    heard, table = Recorder(), runs.tables[kind]
    found = runs.verify(table, reporter=heard)
    assert not contradicted(found) and not missed(found) and not found.contradictions
    samples = len(set(zip(table["set"].tolist(), table["index"].tolist(), strict=True)))
    assert found.checks["samples"].checked == samples >= sum(heard.steps) > 0
    assert found.checks["score, computed again"].checked == len(table)


def test_samples_are_those_that_every_and_limit_name(runs):
    table = runs.tables["smoothing"]
    for options, tried in (({"every": 1}, (12,)), ({"every": 4}, (2, 3, 4)), ({"every": 9, "limit": 1}, (0, 1, 2))):
        assert getattr(runs.verify(table, **options).checks.get("draws_below, fresh noise"), "checked", 0) in tried
    with pytest.raises(InputError, match="--every and --limit must be 0 or more"):
        runs.verify(table, every=-1)


# Tampering: each change is found by the checksum and, where that is computed again, by the invariants or by a check


@dataclass(frozen=True)
class Change:
    """What is changed in a row, and who finds it: the invariants, a check that contradicts it, one that does not find it
    again, or nothing."""

    column: str
    words: str
    cells: Callable[[Table, int], dict]
    finder: str
    claim: str = ""
    kind: str = "id"


def other(column, value):
    return lambda table, row: {column: value}


def scaled(column, factor):
    return lambda table, row: {column: table[column][row] * factor}


def shifted(column, by):
    return lambda table, row: {column: table[column][row] + by}


def between(column, low, high, share=0.5):
    return lambda table, row: {column: table[low][row] + share * (table[high][row] - table[low][row])}


def unused(table, row):
    there = table["index"][(table["set"] == table["set"][row])].tolist()
    return {"index": next(index for index in range(100) if index not in there)}


def on_grid(column, value):
    """A grid column at every eps, from a function of the table and the row."""
    return lambda table, row: {column: tuple(np.broadcast_to(value(table, row), len(table.eps)).tolist())}


def with_estimate(column, factor):
    """Score or slope, and the estimate that follows from both."""

    def cells(table, row):
        found = {name: table[name][row] for name in ("score", "gradient_norm_estimate")}
        found[column] *= factor
        radius = abs(found["score"] - table.gamma) / found["gradient_norm_estimate"]
        return {column: found[column], "radius_gradient_norm_estimate": radius}

    return cells


NAMES = (
    Change("set", "another name", other("set", "nowhere"), "invariants"),
    Change("kind", "id becomes ood", other("kind", "ood"), "invariants"),
    Change("index", "another image", unused, "contradicted", "samples"),
    Change("file", "another name", other("file", "x.png"), "contradicted", "samples"),
)
CHANGES = {
    "certification": (
        *NAMES,
        Change("label", "plus 1", shifted("label", 1), "contradicted", "label, computed again"),
        Change("prediction", "another class", lambda t, r: {"prediction": (t["prediction"][r] + 1) % 6}, "contradicted", "prediction, computed again"),
        Change("score", "by a millionth", scaled("score", 1 + 1e-6), "invariants"),
        Change("score", "by a millionth, and what follows", with_estimate("score", 1 + 1e-6), "contradicted", "score, computed again"),
        Change("accepted", "the other decision", lambda t, r: {"accepted": 1 - t["accepted"][r]}, "invariants"),
        Change("status", "another", other("status", "undecided"), "invariants"),
        Change("stage", "a stage of the run that proves less", other("stage", "ibp"), "nothing"),
        Change("stage", "a stage that the run did not have", other("stage", "lipschitz"), "invariants"),
        Change("radius_certified", "just below the attack", between("radius_certified", "radius_certified", "radius_attack", 0.999), "not found again", "radius_certified, proved again"),
        Change("radius_certified", "beyond the attack", lambda t, r: {"radius_certified": 1.01 * t["radius_attack"][r]}, "invariants"),
        Change("radius_certified_per_logit", "up to radius_certified", lambda t, r: {"radius_certified_per_logit": t["radius_certified"][r]}, "nothing"),
        Change("radius_certified_per_logit", "beyond radius_certified", lambda t, r: {"radius_certified_per_logit": 1.01 * t["radius_certified"][r]}, "invariants"),
        Change("radius_lipschitz_fixed_point", "up to radius_certified", lambda t, r: {"radius_lipschitz_fixed_point": t["radius_certified"][r]}, "nothing"),
        Change("radius_lipschitz_fixed_point", "beyond radius_certified", lambda t, r: {"radius_lipschitz_fixed_point": 1.01 * t["radius_certified"][r]}, "invariants"),
        Change("radius_lipschitz_path", "up to radius_certified", lambda t, r: {"radius_lipschitz_path": t["radius_certified"][r]}, "nothing"),
        Change("radius_lipschitz_path", "beyond radius_certified", lambda t, r: {"radius_lipschitz_path": 1.01 * t["radius_certified"][r]}, "invariants"),
        Change("radius_attack", "nearer, beyond radius_certified", between("radius_attack", "radius_certified", "radius_attack", 0.9), "nothing"),
        Change("radius_attack", "within radius_certified", scaled("radius_attack", 0.01), "invariants"),
        Change("radius_gradient_norm_estimate", "by a millionth", scaled("radius_gradient_norm_estimate", 1 + 1e-6), "invariants"),
        Change("gradient_norm_estimate", "by 5 %", scaled("gradient_norm_estimate", 1.05), "invariants"),
        Change("gradient_norm_estimate", "by 5 %, and what follows", with_estimate("gradient_norm_estimate", 1.05), "contradicted", "gradient_norm_estimate, computed again"),
        Change("s_lb", "up to what attacks reached", on_grid("s_lb", lambda t, r: t.grid["s_attack_min"][r]), "not found again", "s_lb and s_ub, bounded again by auto_lirpa"),
        Change("s_lb", "weaker", on_grid("s_lb", lambda t, r: t.grid["s_lb"][r] - 1), "nothing"),
        Change("s_lb", "above the score", on_grid("s_lb", lambda t, r: t["score"][r] + 1), "invariants"),
        Change("s_ub", "down to what attacks reached", on_grid("s_ub", lambda t, r: t.grid["s_attack_max"][r]), "not found again", "s_lb and s_ub, bounded again by auto_lirpa", "ood"),
        Change("s_ub", "weaker", on_grid("s_ub", lambda t, r: t.grid["s_ub"][r] + 1e-6), "nothing"),
        Change("s_ub", "below the score", on_grid("s_ub", lambda t, r: t["score"][r] - 1), "invariants"),
        Change("s_attack_min", "down to s_lb", on_grid("s_attack_min", lambda t, r: t.grid["s_lb"][r]), "nothing"),
        Change("s_attack_min", "below s_lb", on_grid("s_attack_min", lambda t, r: t.grid["s_lb"][r] - 1), "invariants"),
        Change("s_attack_max", "up to s_ub", on_grid("s_attack_max", lambda t, r: t.grid["s_ub"][r]), "nothing"),
        Change("s_attack_max", "above s_ub", on_grid("s_attack_max", lambda t, r: t.grid["s_ub"][r] + 1), "invariants"),
        Change("outcome", "a stage of the run that proves less", on_grid("outcome", lambda t, r: "ibp"), "nothing"),
        Change("outcome", "attack", on_grid("outcome", lambda t, r: "attack"), "invariants"),
    ),
    "smoothing": (
        *NAMES,
        Change("label", "plus 1", shifted("label", 1), "contradicted", "label, computed again"),
        Change("score", "by a millionth", scaled("score", 1 + 1e-6), "contradicted", "score, computed again"),
        Change("median_estimate", "within the noise", shifted("median_estimate", 1e-3), "nothing"),
        Change("median_estimate", "beyond the noise", shifted("median_estimate", -50), "contradicted", "median_estimate, fresh noise"),
        Change("draws_below", "one fewer", shifted("draws_below", -1), "contradicted", "radius_smoothed, computed again"),
        Change("draws_above", "one fewer, of OOD", shifted("draws_above", -1), "contradicted", "radius_smoothed, computed again", "ood"),
        Change("draws_above", "more than there are", other("draws_above", 100), "invariants"),
        Change("decision", "another", other("decision", "rejected"), "invariants"),
        Change("status", "another", other("status", "abstained"), "invariants"),
        Change("radius_smoothed", "by 1 %", scaled("radius_smoothed", 1.01), "contradicted", "radius_smoothed, computed again"),
        *(Change(name, "another", scaled(name, 2), "invariants") for name in ("sigma", "n", "alpha")),
        Change("s_lb_smoothed", "within the noise", lambda t, r: {"s_lb_smoothed": (t.grid["s_lb_smoothed"][r, 0] + 1e-3, None)}, "nothing"),
        Change("s_lb_smoothed", "up to s_ub_smoothed", lambda t, r: {"s_lb_smoothed": (t.grid["s_ub_smoothed"][r, 0], None)}, "contradicted", "s_lb_smoothed, fresh noise"),
        Change("s_lb_smoothed", "where draws prove nothing", lambda t, r: {"s_lb_smoothed": (None, t.grid["s_lb_smoothed"][r, 0] - 9)}, "contradicted", "s_lb_smoothed, infinite or not"),
        Change("s_ub_smoothed", "within the noise", lambda t, r: {"s_ub_smoothed": (t.grid["s_ub_smoothed"][r, 0] - 1e-3, None)}, "nothing"),
        Change("s_ub_smoothed", "down to s_lb_smoothed", lambda t, r: {"s_ub_smoothed": (t.grid["s_lb_smoothed"][r, 0], None)}, "contradicted", "s_ub_smoothed, fresh noise", "ood"),
    ),
    "smoothing-calibration": (
        *NAMES,
        Change("score", "by a millionth", scaled("score", 1 + 1e-6), "contradicted", "score, computed again"),
        Change("median_estimate", "within the noise", shifted("median_estimate", 1e-3), "nothing"),
        Change("median_estimate", "beyond the noise", shifted("median_estimate", -50), "contradicted", "median_estimate, fresh noise"),
    ),
    "lipschitz": (
        *NAMES,
        Change("score", "by a millionth", scaled("score", 1 + 1e-6), "contradicted", "score, computed again"),
        Change("eps", "another", other("eps", 0.03), "invariants"),
        Change("gradient_norm_estimate", "by a tenth of a percent", scaled("gradient_norm_estimate", 0.999), "contradicted", "gradient_norm_estimate, computed again"),
        *(Change(f"{name}_estimate", "below the bound", between(f"{name}_estimate", f"{name}_estimate", "bound", 0.1), "nothing") for name in ("sampled", "ascended", "secant")),
        *(Change(f"{name}_estimate", "above the bound", lambda t, r, name=name: {f"{name}_estimate": 1.1 * t["bound"][r]}, "invariants") for name in ("gradient_norm", "sampled", "ascended", "secant")),
        Change("clever_estimate", "half", scaled("clever_estimate", 0.5), "nothing"),
        Change("clever_p_value", "another", other("clever_p_value", 0.9), "nothing"),
        Change("clever_fitted", "another", lambda t, r: {"clever_fitted": 1 - t["clever_fitted"][r]}, "nothing"),
        Change("bound", "down to the ascended slope", lambda t, r: {"bound": 1.0001 * max(t[f"{n}_estimate"][r] for n in ("ascended", "sampled", "secant"))}, "not found again", "bounds, proved again"),
        Change("bound", "below the ascended slope", lambda t, r: {"bound": 0.5 * t["ascended_estimate"][r]}, "invariants"),
        *(Change(f"bound_{name}", "down to the smallest", lambda t, r, name=name: {f"bound_{name}": 1.0001 * t["bound"][r]}, "not found again", "bounds, proved again") for name in ("product", "product_active", "hull", "interval")),
        *(Change(f"bound_{name}", "by 5 %", scaled(f"bound_{name}", 0.95), "invariants") for name in ("jacobian_crown", "jacobian_crown_corners")),
        Change("provenance", "another method", other("provenance", "product"), "invariants"),
        Change("bound_fixed_head", "by 5 %", scaled("bound_fixed_head", 0.95), "not found again", "bounds, proved again"),
    ),
}  # fmt: skip


def row_of(table, kind):
    """A row of which all is known: right, certified, with an attack; the first of them, which is tried."""
    wanted = table["kind"] == kind
    if table.kind == "certification":
        wanted &= (table["status"] == "certified") & np.isfinite(table["radius_attack"])
    if table.kind == "smoothing":
        wanted &= (table["status"] == "certified") & (table["draws_below"] + table["draws_above"] == table["n"])
    return int(np.flatnonzero(wanted)[0])


def tampered(table, *changes):
    for change in changes:
        row = row_of(table, change.kind)
        table = changed(table, row, **change.cells(table, row))
    return table


def who(change):
    return f"{change.column}: {change.words}"


EACH = [pytest.param(kind, change, id=f"{kind}-{who(change)}") for kind in CHANGES for change in CHANGES[kind]]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_column_is_changed(kind):
    assert {change.column for change in CHANGES[kind]} == {*SCHEMAS[kind].columns, *SCHEMAS[kind].grid}


@pytest.mark.parametrize(("kind", "change"), EACH)
def test_a_changed_cell_is_found_by_the_checksum_or_the_invariants(runs, kind, change, tmp_path):
    path, table = tmp_path / "rows.csv", tampered(runs.tables[kind], change)
    table.write(path)
    if change.finder == "invariants":
        with pytest.raises(InputError, match=r"line [0-9]+, "):
            Table.read(path)
    else:
        Table.read(path)
    manifest = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(manifest | {KEY: runs.tables[kind].manifest[KEY]}))
    with pytest.raises(InputError):
        Table.read(path)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_changed_cell_is_found_by_a_check(runs, kind):
    changes = CHANGES[kind]
    for change in changes:
        if change.claim == "samples":
            assert contradicted(runs.verify(tampered(runs.tables[kind], change))) == {"samples"}
    found = runs.verify(tampered(runs.tables[kind], *(c for c in changes if c.claim not in ("", "samples"))))
    for claim in {change.claim for change in changes if change.finder == "contradicted"} - {"samples"}:
        assert found.checks[claim].contradicted, claim
    unfounded = Counter(change.claim for change in changes if change.finder == "not found again")
    for claim, count in unfounded.items():
        assert found.checks[claim].checked >= found.checks[claim].repeated + count, claim


@pytest.mark.parametrize("kind", SCHEMAS)
def test_what_is_not_found_is_in_the_docs(runs, kind):
    table = tampered(runs.tables[kind], *(change for change in CHANGES[kind] if change.finder == "nothing"))
    found = runs.verify(table)
    assert not contradicted(found) and not missed(found)
    text = DOCS.read_text(encoding="utf-8")
    for change in CHANGES[kind]:
        assert f"| `{change.column}` | {change.words} | {change.finder} |" in text, who(change)
