"""Scores in files: how they are told apart, and what cannot be read."""

from __future__ import annotations

import numpy as np
import pytest

from grood_cert.conventions import evaluate
from grood_cert.errors import InputError
from grood_cert.results.evaluation import (
    all_conventions,
    figures,
    in_kind,
    is_result,
    read_scores,
    sets_of_table,
)
from tests.results.examples import random_certification, slopes


def written(folder, text, name="scores.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def told(sets):
    return [(each.name, each.kind, each.scores.tolist()) for each in sets]


def test_sets_are_told_apart_by_kind_and_name(tmp_path):
    for text, expected in (
        ("score\n1\n-inf\n", [("scores", "", [1.0, -np.inf])]),
        ("set,score\nID,1\nsvhn,2\n\nid,3\n", [("ID", "id", [1.0]), ("svhn", "ood", [2.0]), ("id", "id", [3.0])]),
        ("kind, score\nid,1\nOOD,2e1\n", [("id", "id", [1.0]), ("ood", "ood", [20.0])]),
        ("\ufeffscore,kind,set\n1,id,x\n2,noise,n\n3,ood,y\n", [("x", "id", [1.0]), ("n", "noise", [2.0]), ("y", "ood", [3.0])]),
    ):  # fmt: skip
        assert told(read_scores(written(tmp_path, text))) == expected
    np.save(tmp_path / "s.npy", np.array([1, 2], np.int16))
    assert told(read_scores(tmp_path / "s.npy")) == [("s", "", [1.0, 2.0])]
    np.save(tmp_path / "s.npy", np.array([1, 2], np.float32))
    assert read_scores(tmp_path / "s.npy")[0].scores.dtype == np.float32


def test_labels_and_predictions_compare_as_numbers_or_as_names(tmp_path):
    text = "kind,score,label,prediction\nid,0,3,3.0\nid,1,cat,dog\nid,2,cat, cat\nid,3,1,2\nood,2,,\n"
    found = figures(read_scores(written(tmp_path, text)))
    assert {record["figure"]: record["value"] for record in found}["accuracy"] == 0.5
    text = "kind,score,label,prediction\nid,0,3,\nood,2,,\n"
    assert "accuracy" not in {record["figure"] for record in figures(read_scores(written(tmp_path, text)))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no column 'score' \(--column names another\)"),
        ("a,b\n1,2\n", "no column 'score' .*; it has 'a', 'b'"),
        ("score,score\n1,2\n", "two columns have the same name"),
        ("score\n", "holds no scores"),
        ("score,kind\n1\n", "line 2: 1 cells under 2 names"),
        ("score\n1\nx\n", "line 3, score: 'x' is no number"),
        ("score\n1\n\n \n", "line 4, score: ' ' is no number"),
        ("score\nNaN\n", r"line 2, score: a score is not a number \(nan\)"),
        ("score,kind\n1,in\n", "line 2, kind: 'in' is none of id, ood, noise"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, text, message):
    with pytest.raises(InputError, match=rf"scores\.csv: {message}"):
        read_scores(written(tmp_path, text))


def test_files_of_another_form_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv: No such file"):
        read_scores(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"read from \.csv and \.npy"):
        read_scores(written(tmp_path, "1", "scores.txt"))
    for content in (b"", b"\x93NUMPY", b"junk"):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.npy: "):
            read_scores(tmp_path / "a.npy")
    for values in (np.zeros((2, 2)), np.array(["x"]), np.array([True])):
        np.save(tmp_path / "a.npy", values)
        with pytest.raises(InputError, match="expected one list of numbers"):
            read_scores(tmp_path / "a.npy")
    (tmp_path / "b.csv").write_bytes(b"score\n\xff\n")
    with pytest.raises(InputError, match=r"b\.csv: "):
        read_scores(tmp_path / "b.csv")


def test_every_set_is_measured_against_all_id_samples():
    rows = random_certification(1)
    found = figures(sets_of_table(rows), ("grood", "dos", "grood"))
    inside = rows["score"][rows.of_kind("id")]
    classes = {"labels": rows["label"][rows.of_kind("id")], "predictions": rows["prediction"][rows.of_kind("id")]}
    for name, kind in (("a", "ood"), ("b", "ood"), ("n", "noise")):
        for convention in ("grood", "dos"):
            expected = evaluate(inside, rows["score"][rows["set"] == name], convention, **classes)
            own = [record for record in found if (record["set"], record["convention"]) == (name, convention)]
            assert {record["figure"]: record["value"] for record in own} == expected
            assert {(record["kind"], record["samples_id"], record["samples_ood"]) for record in own} == {(kind, 40, 40)}


def test_what_a_set_is_can_be_said_from_outside(tmp_path):
    plain = read_scores(written(tmp_path, "score\n1\n2\n"))
    noise = read_scores(written(tmp_path, "kind,score\nnoise,3\n"))
    found = figures([*in_kind(plain, "id"), *in_kind(noise, "ood")], high="id", intervals=True)
    auroc = next(record for record in found if record["figure"] == "auroc")
    assert (auroc["kind"], auroc["value"], auroc["low"], auroc["high"]) == ("noise", 0.0, 0.0, 0.0)
    with pytest.raises(InputError, match="set 'noise' is of kind noise by its file, but is given as id"):
        in_kind(noise, "id")
    with pytest.raises(InputError, match="what its samples are is not said"):
        figures(plain)
    with pytest.raises(InputError, match="no OOD scores given"):
        figures(in_kind(plain, "id"))
    with pytest.raises(InputError, match="no ID scores given"):
        figures(noise)
    with pytest.raises(InputError, match="two OOD sets are called 'noise'"):
        figures([*in_kind(plain, "id"), *noise, *noise])


def test_results_are_told_from_other_files(tmp_path):
    random_certification(1).write(tmp_path / "rows.csv")
    assert is_result(tmp_path / "rows.csv") and not is_result(tmp_path / "rows.npy")
    written(tmp_path, "{}", "scores.json")
    assert not is_result(tmp_path / "scores.csv")
    written(tmp_path, "{", "scores.json")
    with pytest.raises(InputError, match=r"scores\.json, beside scores\.csv, cannot be read"):
        is_result(tmp_path / "scores.csv")
    with pytest.raises(InputError, match="the rows of a certification hold no column 'x' of scores"):
        sets_of_table(random_certification(1), "x")
    with pytest.raises(InputError, match="no scores to evaluate"):
        sets_of_table(slopes([("id", 0.1, 1.0, 1.5, 2.0)]))


def test_conventions():
    assert all_conventions([]) == ["grood"] and all_conventions(["dos", "greg"]) == ["dos", "greg"]
    assert len(all_conventions(["all"])) == 7
    with pytest.raises(InputError, match=r"unknown convention 'oe'; use one of grood, .* or all"):
        all_conventions(["oe"])
