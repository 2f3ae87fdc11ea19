from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch

from grood_cert import detector
from grood_cert.data import experiment_of
from grood_cert.errors import InputError
from grood_cert.results.table import Table
from grood_cert.runs.verdicts import COLUMNS, Verdict, judge, read_verdicts, write_verdicts


@pytest.fixture(scope="module")
def undecided(model, rows_file):
    """A detector, the rows of its certification and its sets."""
    loaded, read = detector.load(model), Table.read(rows_file)
    experiment = experiment_of(loaded.origin.recipe)
    return loaded, read, [experiment.test, *experiment.ood]


def evidence(instance, image, loaded, eps, crossing):
    """A point of the ball as the competition writes it: far along the gradient, or the centre."""
    point = image.double().flatten()
    if crossing:
        from grood_cert import attacks
        from grood_cert.ball import Ball

        ball = Ball(image.double()[None], torch.tensor([eps]).double(), "linf")
        (seen,) = attacks.extremes(loaded.network, [ball], torch.Generator().manual_seed(0))
        point = (seen.argmax if instance["kind"] == "id" else seen.argmin).flatten()
    pairs = "\n ".join(f"(X_{i} {value!r})" for i, value in enumerate(point.tolist()))
    return f"sat\n({pairs}\n (Y_0 0.5))\n"


def manifest(loaded, read, sets, model_hash, refuted_eps):
    """Instances of the first right samples of two kinds, on balls in which a counterexample is known."""
    instances = []
    for kind in ("id", "ood"):
        mask = (read["kind"] == kind) & (read["status"] != "misdecided") & (read["radius_attack"] < refuted_eps)
        for position in np.flatnonzero(mask)[:2]:
            name, index = str(read["set"][position]), int(read["index"][position])
            instances.append({"name": f"{kind}-{index}", "set": name, "kind": kind, "index": index})
    return {
        "model": {"sha256": model_hash},
        "gamma": loaded.gamma,
        "norm": "linf",
        "eps": refuted_eps,
        "instances": instances,
    }


def test_counterexamples_are_believed_only_if_the_score_crosses_gamma(undecided, model, tmp_path):
    loaded, read, sets = undecided
    exported = manifest(loaded, read, sets, read.manifest["model"]["sha256"], 0.2)
    (tmp_path / "instances.json").write_text(json.dumps(exported))
    answers = tmp_path / "answers"
    answers.mkdir()
    by_name = {images.name: images for images in sets}
    for at, instance in enumerate(exported["instances"]):
        image = by_name[instance["set"]].images[instance["index"]]
        (answers / f"{instance['name']}.txt").write_text(evidence(instance, image, loaded, 0.2, at % 2 == 0))
    records = write_verdicts(loaded, model, tmp_path, sets, answers, "test 1.0")
    assert [record["refuted"] for record in records] == [1, 0, 1, 0]
    assert not any(record["certified_external"] for record in records)
    for record in records:
        accepted = record["score_counterexample"] <= loaded.gamma
        assert record["refuted"] == (accepted != (record["kind"] == "id"))
    assert tuple(records[0]) == tuple(COLUMNS)
    assert (tmp_path / "verdicts.csv").read_text().startswith(",".join(COLUMNS))
    # A point outside the ball is no evidence about it: it is pulled in first.
    far = Verdict("sat", tuple([1.0] * 64))
    image = by_name[exported["instances"][0]["set"]].images[exported["instances"][0]["index"]].double()
    (record, *_) = judge(loaded, {**exported, "eps": 1e-6}, sets, {exported["instances"][0]["name"]: far}, "t")
    assert record["score_counterexample"] == pytest.approx(float(loaded.scores(image[None])), abs=1e-3)


def test_verdicts_of_the_competition(tmp_path):
    """Columns vary between verifiers and years; only .vnnlib cells and known words count."""
    (tmp_path / "results.csv").write_text(
        "category,onnx,vnnlib,prepare_time,result,time\n"
        "x,./model.onnx,./vnnlib/a.vnnlib,1.0,unsat,3.2\n"
        "x,./model.onnx,./vnnlib/b.vnnlib.gz,1.0,sat,0.2\n"
        "x,./model.onnx,c.vnnlib,1.0,run_instance_timeout,300\n"
        "x,./model.onnx,d.vnnlib,1.0,error_exit_code_1,3\n"
        "x,./model.onnx,e.vnnlib,1.0, holds ,3\n"
        "x,./model.onnx,f.vnnlib,1.0,,3\n"
    )
    with gzip.open(tmp_path / "b.counterexample.gz", "wt") as stream:
        stream.write("((X_0 1.5e-1)\n(X_1 .5)\n(Y_0 -2.0))\n")
    found = read_verdicts(tmp_path / "results.csv")
    words = {name: verdict.verdict for name, verdict in found.items()}
    assert words == {"a": "unsat", "b": "sat", "c": "timeout", "d": "unknown", "e": "unsat", "f": "unknown"}
    assert found["b"].counterexample == (0.15, 0.5) and found["a"].counterexample is None


def test_verdicts_of_single_runs(tmp_path):
    for name, text in {
        "a": "unsat 12 0 0\n",  # Marabou's summary file
        "b": "sat\n((X_0 0.25)\n (X_2 0.5))\n",  # a pixel is missing: no counterexample
        "c": "",
        "d": "UNSATISFIED\n",
    }.items():
        (tmp_path / f"{name}.txt").write_text(text)
    found = read_verdicts(tmp_path)
    assert [found[name].verdict for name in "abcd"] == ["unsat", "sat", "unknown", "unknown"]
    assert found["b"].counterexample is None


def test_results_that_cannot_be_used(undecided, model, tmp_path):
    loaded, read, sets = undecided
    empty = tmp_path / "empty.csv"
    empty.write_text("nothing,here\n")
    with pytest.raises(InputError, match="no verdicts"):
        read_verdicts(empty)
    with pytest.raises(InputError, match="cannot read"):
        read_verdicts(tmp_path / "absent.csv")
    both = tmp_path / "both.csv"
    both.write_text("m.onnx,a.vnnlib,sat\nm.onnx,a.vnnlib,unsat\n")
    with pytest.raises(InputError, match="both sat and unsat"):
        read_verdicts(both)
    with pytest.raises(InputError, match="not written by grood-cert vnnlib"):
        write_verdicts(loaded, model, tmp_path, sets, both, "test")
    exported = manifest(loaded, read, sets, read.manifest["model"]["sha256"], 0.2)
    with pytest.raises(InputError, match="were not exported"):
        judge(loaded, exported, sets, {"stranger": Verdict("unsat")}, "test")
    first = exported["instances"][0]["name"]
    with pytest.raises(InputError, match="of 2 pixels"):
        judge(loaded, exported, sets, {first: Verdict("sat", (0.1, 0.2))}, "test")
    (tmp_path / "instances.json").write_text(json.dumps(exported | {"gamma": loaded.gamma + 1}))
    with pytest.raises(InputError, match="was not exported from"):
        write_verdicts(loaded, model, tmp_path, sets, both, "test")


def test_a_verifier_certifies_in_its_own_column(undecided):
    loaded, read, sets = undecided
    exported = manifest(loaded, read, sets, "", 0.2)
    names = [instance["name"] for instance in exported["instances"]]
    verdicts = dict(zip(names, map(Verdict, ("unsat", "timeout", "sat")), strict=False))
    records = judge(loaded, exported, sets, verdicts, "abc 1.0")
    assert [record["certified_external"] for record in records] == [1, 0, 0, 0]
    assert [record["verdict"] for record in records] == ["unsat", "timeout", "sat", "missing"]
    assert not any(record["refuted"] for record in records)
