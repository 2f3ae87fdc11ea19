from __future__ import annotations

import csv
import functools
import json
import shutil

from grood_cert.confidence import bootstrap


def test_a_table_goes_to_the_screen_or_to_a_file(call, rows_file, tmp_path, monkeypatch):
    code, out, err = call("table", rows_file)
    assert code == 0 and err == "" and out.startswith("| model") and "FPR95 certified" in out
    for name, start in (("t.md", "| model"), ("t.tex", "% l_inf"), ("t.csv", "model,set,eps")):
        assert call("table", rows_file, "--eps", "0.01,0.1", "--out", tmp_path / name)[0] == 0
        assert (tmp_path / name).read_text().startswith(start)
    records = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert {record["eps"] for record in records} == {"0.01", "0.1"}
    assert all(float(r["fpr95_id"]) <= float(r["fpr95_id_attacked"]) <= float(r["fpr95_id_certified"]) for r in records)
    monkeypatch.setattr("grood_cert.guarantees.bootstrap", functools.partial(bootstrap, resamples=20))
    assert " [" in call("table", rows_file, "--intervals")[1]
    assert call("table", rows_file, "--format", "latex", "--perturb", "both")[1].startswith("% l_inf, ID and OOD move")


def test_bad_calls(refused, rows_file, tmp_path):
    there = tmp_path / "there.md"
    there.write_text("mine")
    copy = tmp_path / "rows.csv"
    shutil.copy(rows_file, copy)
    shutil.copy(rows_file.with_suffix(".json"), copy.with_suffix(".json"))
    for arguments, message in (
        (("--out", there), "exists already"),
        (("--out", copy, "--force"), "is read"),
        (("--out", tmp_path / "t.pdf"), "ends in .md or .tex or .csv"),
        (("--out", tmp_path / "t.md", "--format", "csv"), "ends in .csv"),
        (("--format", "html"), "unknown format 'html'; use one of markdown, latex, csv"),
        (("--force",), "give --out too"),
        (("--eps", "0.5"), "not on the grid"),
        (("--eps", "x"), "expected a number"),
        (("--perturb", "noise"), "unknown side 'noise'"),
        (("--label", "a", "--label", "b"), "2 labels for 1 rows files"),
    ):
        assert message in refused("table", copy, *arguments)
    assert there.read_text() == "mine"
    assert "no such file" in refused("table", tmp_path / "none.csv")


def test_an_unfinished_run_needs_partial(call, refused, rows_file, tmp_path):
    rows = tmp_path / "rows.csv"
    shutil.copy(rows_file, rows)
    manifest = json.loads(rows_file.with_suffix(".json").read_text())
    manifest |= {"complete": False, "of_samples": manifest["rows"] + 5, "sha256": None}
    rows.with_suffix(".json").write_text(json.dumps(manifest))
    assert "is unfinished" in refused("table", rows)
    code, out, err = call("table", rows, "--partial")
    assert code == 0 and "is unfinished" in out and "warning: " in err
