"""Cards against counts made from the rows by hand."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from grood_cert.errors import InputError
from grood_cert.results import card as cards
from grood_cert.results.card import Result
from tests.results.examples import random_certification, slopes, smoothing

SMOOTHED = [
    ("id", "in", -1.0, -1.0, "accepted", "certified", 0.3, (-1.5, -2.0)),
    ("ood", "a", -1.0, -1.0, "accepted", "misdecided", 0.0, (-1.5, -2.0)),
]
MANIFEST = {"stages": ["ibp", "crown"], "effort": "fast", "engine": "auto", "deployment": "float64"}


def named(table, name, sha256, **more):
    return dataclasses.replace(table, manifest={**table.manifest, "model": {"name": name, "sha256": sha256}, **more})


@pytest.fixture
def runs(tmp_path):
    """Folders of two detectors: certifications of both, smoothing and a Lipschitz analysis of one."""
    for name, table in (
        ("one/rows", named(random_certification(0), "one", "a1", **MANIFEST)),
        ("one/smoothing", named(smoothing(SMOOTHED), "one", "a1", sigma=0.1, n=10)),
        ("one/lipschitz", named(slopes([("id", 0.1, 1.0, 2.0, 4.0), ("ood", 0.1, 1.0, 3.0, 5.0)]), "one", "a1")),
        ("two/rows", named(random_certification(1, 0.3), "two", "b2", **MANIFEST)),
    ):
        path = tmp_path / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        table.write(path)
    return tmp_path


def test_results_are_found_in_files_and_folders(runs):
    everything = cards.found([runs])
    assert [(result.path.parent.name, result.table.kind) for result in everything] == [
        ("one", "lipschitz"),
        ("one", "certification"),
        ("one", "smoothing"),
        ("two", "certification"),
    ]
    named = cards.found([runs / "two" / "rows.csv", runs / "one", runs / "two"])  # nothing twice
    assert len(named) == 4 and named[0].path.parent.name == "two"
    (runs / "one" / "notes.csv").write_text("a,b\n1,2\n")
    (runs / "one" / "rows-1-of-2.csv").write_bytes((runs / "one" / "rows.csv").read_bytes())
    part = json.loads((runs / "one" / "rows.json").read_text()) | {"shard": "1/2"}
    (runs / "one" / "rows-1-of-2.json").write_text(json.dumps(part))
    assert len(cards.found([runs])) == 4  # other tables and shards are no results of their own


def test_results_are_sorted_by_detector(runs):
    groups = cards.by_detector(cards.found([runs]))
    assert {name: [result.table.kind for result in group] for name, group in groups.items()} == {
        "one": ["certification", "smoothing", "lipschitz"],
        "two": ["certification"],
    }
    assert list(cards.by_detector(cards.found([runs]), ["x", "y"])) == ["x", "y"]


def test_two_detectors_of_one_name_are_called_by_their_folders(tmp_path):
    for folder, sha256 in (("first", "a1"), ("second", "b2")):
        (tmp_path / folder).mkdir()
        named(random_certification(0), "same", sha256).write(tmp_path / folder / "rows.csv")
    assert list(cards.by_detector(cards.found([tmp_path]))) == ["first", "second"]


def test_the_numbers_are_those_of_the_rows(runs):
    content = cards.card(cards.by_detector(cards.found([runs])), "title")
    json.dumps(content, allow_nan=False)
    certified = content["detectors"][1]["results"][0]
    table = random_certification(1, 0.3)
    assert [page["samples"] for page in certified["sets"]] == [40, 40, 40, 40]
    gamma = sorted(table["score"][table["kind"] == "id"])[37]  # 38 of 40 are 95 %
    for record in certified["fpr95_id"]:
        scores = table["score"][table["set"] == record["set"]]
        if record["eps"] == 0:
            assert record["fpr95_id_certified"] == record["fpr95_id_attacked"] == np.mean(scores <= gamma)
        else:
            lower = table.grid["s_lb"][table["set"] == record["set"], table.eps.index(record["eps"])]
            assert record["fpr95_id_certified"] == np.mean([not value > gamma for value in lower])
    for page in certified["summary"]:
        assert page["misdecided"] == Counter(table["status"][table["set"] == page["set"]])["misdecided"]
    for page in certified["refuted"]:
        rows = (table["set"] == page["set"]) & (table["status"] != "misdecided")
        assert page["samples"] == rows.sum()
        assert page["refuted"] == np.sum(table["radius_gradient_norm_estimate"][rows] > table["radius_attack"][rows])


def test_what_was_proved_is_told_from_what_is_probable(runs):
    content = cards.card(cards.by_detector(cards.found([runs])), "title")
    forms = {result["kind"]: result["form"] for page in content["detectors"] for result in page["results"]}
    assert forms == {"certification": "proved", "smoothing": "probabilistic", "lipschitz": "proved"}
    smoothing = content["detectors"][0]["results"][1]
    assert smoothing["alpha"] == 0.01 and any("0.1" in line and "10 draws" in line for line in smoothing["words"])
    assert any("probability alpha" in line for line in content["limits"])
    alone = cards.card({"two": [Result(runs / "two" / "rows.csv", random_certification(1))]}, "title")
    assert not any("moothing" in line for line in alone["limits"])


def test_what_is_unfinished_is_said(runs):
    page = json.loads((runs / "two" / "rows.json").read_text())
    content = named(random_certification(1), "two", "b2", **MANIFEST, complete=False, samples_done=160, of_samples=400)
    content.write(runs / "two" / "rows.csv")
    assert page["rows"] == 160
    with pytest.raises(InputError, match="unfinished, 160 of 400"):
        cards.found([runs])
    told = cards.card(cards.by_detector(cards.found([runs], partial=True)), "title")
    assert not told["complete"]
    assert any("160 of 400" in line for line in told["detectors"][1]["results"][0]["words"])


def test_what_cards_refuse(runs, tmp_path):
    with pytest.raises(InputError, match="no result to report on"):
        (tmp_path / "empty").mkdir()
        cards.found([tmp_path / "empty"])
    everything = cards.found([runs])
    for labels, message in (
        (["x"], "1 labels for 2 detectors"),
        (["x", " "], "empty label"),
        (["x", "x"], "same name"),
    ):
        with pytest.raises(InputError, match=message):
            cards.by_detector(everything, labels)
    named(random_certification(3), "one", "a1", **MANIFEST).write(runs / "one" / "again.csv")
    with pytest.raises(InputError, match=r"again.csv and .*rows.csv are both the rows of a certification"):
        cards.by_detector(cards.found([runs]))
