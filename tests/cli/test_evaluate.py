from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest

from grood_cert.conventions import evaluate
from grood_cert.results.table import Table

SCORES = "kind,set,score,label,prediction\nid,digits,0,1,1\nid,digits,1,1,0\nood,svhn,1,,\nood,svhn,2,,\nood,dtd,5,,\n"


@pytest.fixture
def scores(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text(SCORES)
    return path


def line(out, word):
    found = next(line for line in out.splitlines() if line.strip().startswith(word))
    return found.split(word, 1)[1].split()


def test_figures_of_each_set_and_their_mean(call, scores):
    code, out, err = call("evaluate", scores)
    assert (code, err) == (0, "")
    assert "2 ID samples against those of each set; percent, as grood; high = OOD" in out
    assert line(out, "AUROC") == ["87.50", "100.00", "93.75"]
    assert line(out, "FPR95, ID positive") == ["50.00", "0.00", "25.00"]
    assert line(out, "OSCR") == ["50.00", "50.00", "50.00"]
    assert line(out, "samples") == ["2", "1"]
    out = call("evaluate", scores, "--tpr", "50", "--intervals")[1]
    assert "FPR50, ID positive" in out and "[" in out
    out = call("evaluate", scores, "--convention", "dos", "--convention", "prood")[1]
    assert line(out, "AUC") == ["75.00", "100.00", "87.50"] and "percent, as dos" in out


def test_confidences_are_turned_around_and_a_wrong_direction_is_noticed(call, scores):
    code, out, err = call("evaluate", scores, "--high", "id")
    assert code == 0 and "high = ID" in out and line(out, "AUROC") == ["12.50", "0.00", "6.25"]
    assert "warning: every AUROC is below 50 %; if ood has the high scores, give --high ood" in err


def test_files_of_one_set_each_and_figures_in_files(call, tmp_path):
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(0, 1, 30), rng.normal(1, 1, 20)
    np.save(tmp_path / "id.npy", inside)
    (tmp_path / "svhn.csv").write_text("energy\n" + "".join(f"{value!r}\n" for value in outside.tolist()))
    np.save(tmp_path / "dtd.npy", outside + 1)
    arguments = ("evaluate", tmp_path / "id.npy", "--ood", tmp_path / "svhn.csv", "--column", "energy")
    assert call(*arguments, "--ood", tmp_path / "dtd.npy", "--out", tmp_path / "f.csv", "--intervals")[0] == 0
    records = list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))
    expected = evaluate(inside, outside, intervals=True)
    for record in records[: len(records) // 2]:
        assert record["set"] == "svhn" and float(record["value"]) == expected[record["figure"]]
        assert float(record["low"]) == expected[f"{record['figure']}_low"]
    assert call(*arguments, "--convention", "all", "--out", tmp_path / "f.json")[0] == 0
    content = json.loads((tmp_path / "f.json").read_text())
    assert (content["high_scores"], content["column"]) == ("ood", "energy")
    found = {(each["convention"], each["figure"]): each["value"] for each in content["figures"]}
    assert found["openood", "FPR@95"] == expected["fpr95_ood"] and len({name for name, _ in found}) == 7


def test_rows_of_a_certification_and_predictions(call, rows_file, model, tmp_path):
    rows = Table.read(rows_file)
    inside = rows["score"][rows.of_kind("id")]
    out = call("evaluate", rows_file)[1]
    first = next(name for name in rows.sets("ood"))
    expected = evaluate(inside, rows["score"][rows["set"] == first])["auroc"]
    assert line(out, "AUROC")[0] == f"{100 * expected:.2f}" and "ID accuracy" in out
    for name in ("digits:0-5", "uniform-noise"):
        assert call("predict", model, name, "--out", tmp_path / f"{name[:3]}.csv")[0] == 0
    code, out, _ = call("evaluate", tmp_path / "dig.csv", "--ood", tmp_path / "uni.csv")
    assert code == 0 and float(line(out, "AUROC")[0]) > 50


def test_bad_calls(refused, scores, rows_file, tmp_path):
    there = tmp_path / "there.csv"
    there.write_text("mine")
    plain = tmp_path / "plain.csv"
    plain.write_text("score\n1\n")
    for arguments, message in (
        ((tmp_path / "none.csv",), "none.csv: No such file"),
        ((plain,), "what its samples are is not said"),
        ((plain, "--ood", tmp_path), "read from .csv and .npy"),
        ((scores, "--ood", plain), "set 'svhn' is of kind ood by its file, but is given as id"),
        ((scores, "--column", "x"), "no column 'x'"),
        ((scores, "--high", "up"), "--high 'up': the class with high scores is ood or id"),
        ((scores, "--convention", "oe"), "unknown convention 'oe'"),
        ((scores, "--convention", "dos", "--tpr", "90"), "dos prints FPR at 95 % alone"),
        ((scores, "--tpr", "0.95"), "percent: expected a number from 1 to 100"),
        ((scores, "--tpr", "nan"), "percent: expected a number from 1 to 100"),
        ((scores, "--out", there), "exists already"),
        ((scores, "--out", scores, "--force"), "is read"),
        ((scores, "--out", tmp_path / "f.txt"), "ends in .csv or .json"),
        ((scores, "--force"), "give --out too"),
        ((rows_file, "--high", "id"), "holds S of this package"),
        ((rows_file, "--column", "accepted"), "no column 'accepted' of scores"),
    ):
        assert message in refused("evaluate", *arguments)
    assert there.read_text() == "mine" and scores.read_text() == SCORES


def test_an_unfinished_run_needs_partial(call, refused, rows_file, tmp_path):
    rows = tmp_path / "rows.csv"
    shutil.copy(rows_file, rows)
    manifest = json.loads(rows_file.with_suffix(".json").read_text()) | {"complete": False, "sha256": None}
    rows.with_suffix(".json").write_text(json.dumps(manifest))
    assert "is unfinished" in refused("evaluate", rows)
    code, _, err = call("evaluate", rows, "--partial")
    assert code == 0 and "is unfinished" in err
