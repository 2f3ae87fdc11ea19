"""True records are not contradicted; a record with any one cell changed is found out, or the docs say why it is not."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import grood_cert
from grood_cert import detector
from grood_cert.certification.settings import Settings
from grood_cert.certification.smoothing import SmoothingSettings
from grood_cert.data import experiment_of
from grood_cert.errors import InputError
from grood_cert.lipschitz.analyser import AnalysisSettings
from grood_cert.results.checksum import KEY, Checksum
from grood_cert.results.columns import SCHEMAS
from grood_cert.results.table import Table
from grood_cert.runs import analyse, certify, smooth
from grood_cert.runs.merge import merge
from grood_cert.runs.shards import Shard
from grood_cert.runs.verification import claims
from grood_cert.runs.verification import run as verification
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
            options.setdefault("calibration", self.tables["smoothing-calibration"])
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
        Change("score", "by a millionth, and what follows", with_estimate("score", 1 - 1e-6), "contradicted", "score, computed again"),
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


# Manifests: each entry is changed, with the checksum recomputed


@dataclass(frozen=True)
class Entry:
    """An entry of a manifest, by its last name, what it becomes, and who finds it, in the words of the docs."""

    name: str
    value: object
    finder: str
    kinds: tuple[str, ...] = tuple(SCHEMAS)


SMOOTHED, SMOOTHING, MEDIANS = ("smoothing", "smoothing-calibration"), ("smoothing",), ("smoothing-calibration",)
BOUNDED, ROWS, SLOPES = ("certification", "lipschitz"), ("certification",), ("lipschitz",)
ENTRIES = (
    Entry("kind", "another", "invariants"),
    Entry("schema", 2, "invariants"),
    Entry("norm", "l2", "contradicted", BOUNDED),
    Entry("norm", "linf", "invariants", SMOOTHED),
    Entry("eps", [0.001, 1.0], "invariants", ("certification", "smoothing", "lipschitz")),
    Entry("eps", [0.001, 1.0], "its rows", MEDIANS),
    Entry("gamma", 7.5, "invariants", ROWS),
    Entry("gamma", 7.5, "contradicted", ("smoothing", "smoothing-calibration", "lipschitz")),
    Entry("gamma_base", 7.5, "contradicted", SMOOTHED),
    Entry("model.sha256", "0" * 64, "refused"),
    Entry("model.name", "another", "contradicted"),
    Entry("recipe", None, "contradicted"),
    Entry("metrics", None, "contradicted"),
    Entry("imported", {"source": "net.onnx"}, "contradicted"),
    Entry("score", "max-logit", "contradicted"),
    Entry("calibration.samples", 9, "contradicted"),
    Entry("calibration.percent", 90, "contradicted"),
    Entry("calibration.set", "nowhere", "contradicted", SMOOTHING),
    Entry("guarantee", "It is true.", "contradicted", SMOOTHING),
    Entry("data.set", "nowhere", "invariants"),
    Entry("data.kind", "noise", "invariants"),
    Entry("data.images", 1000, "contradicted"),
    Entry("data.sha256", "0" * 64, "refused"),
    Entry("limit", 3, "contradicted"),
    Entry("seed", 1, "contradicted"),
    Entry("shard", "2/2", "contradicted"),
    Entry("complete", False, "invariants"),
    Entry("samples_done", 3, "invariants"),
    Entry("of_samples", 1000, "invariants"),
    Entry("batches", 1000, "invariants"),
    Entry("of_batches", 1000, "invariants"),
    Entry("rows", 1000, "invariants"),
    Entry("sigma", 0.5, "invariants", SMOOTHING),
    Entry("n", 1000, "invariants", SMOOTHING),
    Entry("alpha", 1e-6, "invariants", SMOOTHING),
    *(Entry(name, value, "its rows", MEDIANS) for name, value in (("sigma", 0.26), ("n", 101), ("alpha", 1e-6))),
    Entry("calibration_limit", 40, "contradicted", SMOOTHING),
    Entry("calibration_limit", 40, "its rows", MEDIANS),
    Entry("method", "exact", "contradicted", SMOOTHED),
    Entry("method", "guess", "refused", SLOPES),
    Entry("dtype", "float16", "contradicted", BOUNDED),
    Entry("dtype", "float64", "contradicted", SMOOTHING),
    Entry("dtype", "float64", "its rows", MEDIANS),
    Entry("largest_eps", 2.0, "contradicted", ROWS),
    Entry("deployment", "float32", "not found again", ROWS),
    Entry("stages", ["ibp"], "invariants", ROWS),
    Entry("bounded_by", "marabou", "invariants", BOUNDED),
    Entry("time_limit", 5.0, "refused", ROWS),
    Entry("engine", "auto_lirpa", "nothing", BOUNDED),
    *(Entry(name, value, "nothing", ROWS) for name, value in (("effort", "max"), ("precision", 0.5), ("per_logit", False))),
    *(Entry(f"cross_check.{name}", 1000, "nothing", ROWS) for name in ("balls", "same_lines", "largest_disagreement")),
    *(Entry(f"cross_check.{name}", "another", "nothing", ROWS) for name in ("engine", "version")),
    *(Entry(name, 1000, "nothing", SLOPES) for name in ("samples", "ascents")),
    Entry("clever_batches", 30, "nothing", SLOPES),
    Entry("memory", 2**30, "nothing", (*SMOOTHED, *SLOPES)),
    Entry("batch_size", 5, "nothing"),
    *(Entry(name, "another", "nothing") for name in ("model.path", "device", "machine", "finished", "command")),
    *(Entry(f"versions.{name}", "9", "nothing") for name in ("grood_cert", "torch", "numpy", "python", "auto_LiRPA")),
    *(Entry(name, 9, "nothing") for name in ("bytes", "seconds", "peak_memory", "proofs", "shards")),
    Entry("failures", {"another": 1}, "nothing"),
)  # fmt: skip


def leaves(value, name=""):
    """The names of a manifest's entries; those of a list are named alike."""
    if isinstance(value, dict) and value and name not in ("recipe", "metrics"):
        return {leaf for key, inner in value.items() for leaf in leaves(inner, f"{name}.{key}" if name else key)}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return leaves(value[0], name)
    return {name}


def with_entry(manifest, entry):
    changed = json.loads(json.dumps(manifest))
    *path, last = entry.name.split(".")
    place = changed
    for key in path:
        place = place[key]
    place = place[0] if isinstance(place, list) else place
    assert place[last] != entry.value
    place[last] = entry.value
    return changed


def written(table, manifest, path):
    """The rows of a table beside a manifest, with the checksum of both."""
    table.write(path)
    whole = json.loads(path.with_suffix(".json").read_text()) | manifest
    with path.open(newline="") as stream:
        whole[KEY] = Checksum(csv.DictReader(stream)).of(whole)
    path.with_suffix(".json").write_text(json.dumps(whole))
    return path


def without_trying(monkeypatch):
    """`verify` without what it tries on samples: all that it says of manifests but norm and deployment."""
    monkeypatch.setattr(verification, "_parts", lambda *arguments: [])
    monkeypatch.setattr(claims, "Analyser", lambda *about: SimpleNamespace(batch_size=64))


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_entry_of_a_manifest_is_changed(runs, kind, monkeypatch, tmp_path):
    without_trying(monkeypatch)
    table = runs.tables[kind]
    entries = [entry for entry in ENTRIES if kind in entry.kinds]
    assert {entry.name for entry in entries} == leaves(dict(table.manifest)) - {KEY}
    everything = dict(table.manifest)
    for number, entry in enumerate(entries):
        path = written(table, with_entry(table.manifest, entry), tmp_path / f"{number}.csv")
        if entry.finder == "invariants":
            with pytest.raises(InputError, match=r"[0-9]+\.csv"):
                Table.read(path)
        elif entry.finder == "refused":
            with pytest.raises(InputError):
                runs.verify(Table.read(path))
        elif entry.finder == "contradicted" and entry.name != "norm":
            assert contradicted(runs.verify(Table.read(path))), entry.name
        elif entry.finder in ("nothing", "its rows"):
            everything = with_entry(everything, entry)
    found = runs.verify(Table.read(written(table, everything, tmp_path / "all.csv")))
    assert not contradicted(found) and not missed(found)


def test_the_docs_say_who_finds_each_entry_of_a_manifest():
    text = DOCS.read_text(encoding="utf-8").partition("changes of manifests")[2].partition("</details>")[0]
    said = []
    for names, kinds, finder in re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \|", text, re.MULTILINE):
        kinds = SCHEMAS if kinds == "all" else kinds.split(", ")
        said += [(name, kind, finder) for name in re.findall(r"`(.*?)`", names) for kind in kinds]
    assert sorted(said) == sorted((entry.name, kind, entry.finder) for entry in ENTRIES for kind in entry.kinds)


def test_medians_of_other_noise_are_found_from_the_smoothed_rows(runs, monkeypatch):
    without_trying(monkeypatch)
    medians = runs.tables["smoothing-calibration"]
    for entry in ENTRIES:
        if entry.finder == "its rows":
            other = Table(with_entry(medians.manifest, entry), medians.columns, medians.grid)
            found = runs.verify(runs.tables["smoothing"], calibration=other)
            assert contradicted(found) == {"what the manifest says of the calibration"}, entry.name


@pytest.mark.parametrize(
    ("name", "finds"),
    [("norm", "gradient_norm_estimate, computed again"), ("deployment", "s_lb and s_ub, bounded again by auto_lirpa")],
)
def test_another_norm_or_arithmetic_is_found_by_what_is_tried(runs, name, finds, monkeypatch):
    monkeypatch.setattr(claims.CertificationClaims, "_attack", lambda *arguments: None)
    monkeypatch.setattr(
        claims.CertificationClaims, "_proved_again", lambda self, part, ball: np.full(len(ball.eps), True)
    )
    table = runs.tables["certification"]
    (entry,) = (entry for entry in ENTRIES if entry.name == name and "certification" in entry.kinds)
    found = runs.verify(Table(with_entry(table.manifest, entry), table.columns, table.grid), limit=1)
    assert finds in (contradicted(found) if entry.finder == "contradicted" else missed(found))


def shard_of(table, number, count=2, **manifest):
    """The rows of a shard, as a run of it would have written them."""
    drawn = Shard(number, count).of([*dict.fromkeys(table["set"].tolist())])  # batches are of a set here
    mask = np.isin(table["set"], drawn)
    progress = {
        "samples_done": int(mask.sum()),
        "of_samples": int(mask.sum()),
        "batches": len(drawn),
        "of_batches": len(drawn),
    }
    whole = {**table.manifest, "shard": f"{number + 1}/{count}", "rows": int(mask.sum()), **progress, **manifest}
    grid = {name: values[mask] for name, values in table.grid.items()}
    return Table(whole, {name: values[mask] for name, values in table.columns.items()}, grid)


def test_shards_are_true_as_they_are_and_false_otherwise(runs, monkeypatch, tmp_path):
    without_trying(monkeypatch)
    whole = runs.tables["certification"]
    paths = []
    for number in range(2):
        part = shard_of(whole, number)
        paths.append(written(part, {}, tmp_path / f"rows-{number + 1}-of-2.csv"))
        assert not contradicted(runs.verify(Table.read(paths[-1])))
        assert contradicted(runs.verify(shard_of(whole, number, shard=f"{2 - number}/2"))) == {"samples"}
        assert contradicted(runs.verify(tampered(part, Change("index", "", unused, "", kind=part["kind"][0])))) == {
            "samples"
        }
        text = paths[-1].read_text().splitlines()
        twice = tmp_path / "twice.csv"
        twice.write_text("\n".join([*text[:-1], text[1], ""]))
        manifest = json.loads(paths[-1].with_suffix(".json").read_text())
        with twice.open(newline="") as stream:
            manifest[KEY] = Checksum(csv.DictReader(stream)).of(manifest)
        twice.with_suffix(".json").write_text(json.dumps(manifest))
        for read in (Table.read, lambda path: merge([path, *paths], tmp_path / "merged.csv")):
            with pytest.raises(InputError, match=r"second time|samples_done"):
                read(twice)
    merge(paths, tmp_path / "merged.csv")
    merged = Table.read(tmp_path / "merged.csv")
    assert not contradicted(runs.verify(merged)) and merged["score"].tolist() == whole["score"].tolist()
    assert contradicted(runs.verify(Table({**merged.manifest, "shard": "1/2"}, merged.columns, merged.grid))) == {
        "samples"
    }


@pytest.mark.parametrize("kind", SCHEMAS)
def test_what_is_not_found_is_in_the_docs(runs, kind):
    table = tampered(runs.tables[kind], *(change for change in CHANGES[kind] if change.finder == "nothing"))
    found = runs.verify(table)
    assert not contradicted(found) and not missed(found)
    text = DOCS.read_text(encoding="utf-8")
    for change in CHANGES[kind]:
        assert f"| `{change.column}` | {change.words} | {change.finder} |" in text, who(change)
