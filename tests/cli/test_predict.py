from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from grood_cert import detector
from grood_cert.data import load_set


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four digits as 8-bit pictures, one of them RGB, in a folder of their own; and what they show."""
    folder = tmp_path_factory.mktemp("some") / "pictures"
    folder.mkdir()
    bytes_ = (torch.cat([load_set("digits:0,1").images[:2], load_set("digits:8").images[:2]]) * 255).round().byte()
    for index, image in enumerate(bytes_):
        Image.fromarray(image[0].numpy()).convert("RGB" if index == 3 else "L").save(folder / f"{index}.png")
    return folder, bytes_ / 255


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_one_image_is_answered_in_words(call, model, pictures):
    folder, images = pictures
    loaded = detector.load(model)
    said = loaded.predict(images)
    assert {True, False} <= set(said.accepted.tolist())
    for index in (said.accepted.tolist().index(True), said.accepted.tolist().index(False)):
        code, out, _ = call("predict", model, folder / f"{index}.png")
        verdict = "in-distribution (ID)" if said.accepted[index] else "out-of-distribution (OOD)"
        assert code == 0 and out.startswith(f"{folder / f'{index}.png'} is {verdict}")
        assert f"energy S = {float(said.score[index]):.6g}, lies" in out
        assert f"threshold gamma = {loaded.gamma:.6g}" in out and "accepts 95 % of ID images" in out
        assert f"  class    {loaded.class_names[int(said.label[index])]} is" in out


def test_many_images_as_table_csv_and_json_lines(call, model, pictures, tmp_path):
    """The same numbers, which are the detector's own, whatever the images come in."""
    folder, images = pictures
    loaded = detector.load(model)
    said = loaded.predict(images)
    np.save(tmp_path / "x.npy", images.numpy())
    files = [folder / f"{index}.png" for index in range(4)]
    for given, names in (
        ([folder], list(map(str, files))),
        (files, list(map(str, files))),
        ([tmp_path / "x.npy"], [f"{tmp_path / 'x.npy'}[{index}]" for index in range(4)]),
        ([files[0], tmp_path / "x.npy"], [str(files[0]), *(f"{tmp_path / 'x.npy'}[{index}]" for index in range(4))]),
    ):
        code, out, err = call("predict", model, *given, "--format", "csv")
        found = rows(out)
        assert code == 0 and list(found[0]) == ["file", "score", "gamma", "accepted", "class"]
        assert [row["file"] for row in found] == names
        assert [float(row["score"]) for row in found[-4:]] == pytest.approx(said.score.tolist(), rel=1e-9)
        assert [row["accepted"] == "true" for row in found[-4:]] == said.accepted.tolist()
        assert {float(row["gamma"]) for row in found} == {loaded.gamma}
        assert ("1 of 4 images made grey from RGB" in err) == (given[-1] != tmp_path / "x.npy")
    out_file = tmp_path / "new" / "x.jsonl"
    code, out, _ = call("predict", model, folder, "--out", out_file)
    records = [json.loads(line) for line in out_file.read_text().splitlines()]
    assert code == 0 and out == f"wrote 4 predictions to {out_file}\n"
    assert [record["accepted"] for record in records] == said.accepted.tolist()
    code, out, _ = call("predict", model, folder)
    count = int(said.accepted.sum())
    assert code == 0 and f"{count} of 4 images accepted as ID, {4 - count} rejected as OOD" in out
    code, out, _ = call("predict", model, folder, "--gamma", "1000")
    assert "4 of 4 images accepted as ID" in out and "gamma: as given by --gamma" in out


def test_decisions_are_certified_and_attacked(call, model, pictures):
    """Radii bracket the decision; no sampled point of a certified ball is decided otherwise."""
    folder, images = pictures
    loaded = detector.load(model)
    code, out, _ = call("predict", model, folder, "--eps", "0.005,0.3", "--effort", "fast", "--format", "csv")
    assert code == 0
    for image, row in zip(images, rows(out), strict=True):
        certified, attacked = float(row["radius_certified"]), float(row["radius_attack"])
        assert 0 < certified <= attacked and row["outcome@0.3"] == "attack"
        near = image + certified * (2 * torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1)
        accepted = loaded.predict(near.clamp(0, 1)).accepted
        assert bool((accepted == (row["accepted"] == "true")).all())
    code, out, _ = call("predict", model, folder / "0.png", "--eps", "0.005", "--norm", "l2", "--effort", "fast")
    assert code == 0 and "no change of l_2 norm up to 0." in out and "eps 0.005    certified by " in out


def test_what_predict_refuses(refused, model, pictures, tmp_path):
    folder, _ = pictures
    Image.new("L", (20, 10)).save(tmp_path / "large.png")
    (tmp_path / "bad.png").write_bytes(b"nonsense")
    (tmp_path / "moving.gif").write_bytes(b"GIF89a")
    np.save(tmp_path / "x.npy", np.zeros((2, 5, 5)))
    there = tmp_path / "there.csv"
    there.write_text("kept")
    for arguments, message in (
        (
            [tmp_path / "large.png"],
            "large.png' is 10x20, the model expects 8x8; resize it first, or ask for it (--resize",
        ),
        ([tmp_path / "x.npy"], "'x.npy' has images of 5x5, the model expects 8x8; resize them first, or ask for it"),
        ([tmp_path / "bad.png"], "bad.png' is empty: it holds no readable image ('"),
        ([tmp_path / "moving.gif"], "moving.gif' is of a kind that is not read; pictures end in .jpg"),
        (["none.png"], "picture 'none.png' does not exist"),
        (["nothing"], "there is no image set 'nothing'"),
        ([folder, "--norm", "l2"], "--norm is for certifying; give --eps too"),
        ([folder, "--eps", "0.1", "--norm", "l7"], "unknown norm 'l7'"),
        ([folder, "--eps", "0.2,0.1"], "eps"),
        ([folder, "--eps", "0.1", "--effort", "lots"], "unknown effort 'lots'"),
        ([folder, "--gamma", "nan"], "gamma must be a finite number"),
        ([folder, "--format", "xml"], "unknown format 'xml'; use one of table, csv, jsonl"),
        ([folder, "--format", "csv", "--out", tmp_path / "a.jsonl"], "written to a file that ends in .csv"),
        ([folder, "--format", "table", "--out", tmp_path / "a.csv"], "a table goes to the screen"),
        ([folder, "--out", tmp_path / "a.txt"], "ends in .csv or .jsonl"),
        ([folder, "--out", there], "there.csv exists already; choose another --out, or add --force"),
        ([f"{folder}@!{there}", "--out", there, "--force"], "there.csv, which is read; choose another --out"),
        ([folder, "--force"], "--force is for the file that --out names"),
    ):
        assert message in refused("predict", model, *arguments)
    assert there.read_text() == "kept" and not (tmp_path / "a.csv").exists()
    assert "no such checkpoint" in refused("predict", tmp_path / "none.pt", folder)


def test_resize(call, model, tmp_path):
    Image.new("L", (20, 10)).save(tmp_path / "large.png")
    np.save(tmp_path / "x.npy", np.zeros((2, 5, 5)))
    code, out, err = call("predict", model, tmp_path / "large.png", tmp_path / "x.npy", "--resize", "--format", "csv")
    scores = [float(row["score"]) for row in rows(out)]
    assert code == 0 and scores == pytest.approx([scores[0]] * 3), "all are black"
    assert "1 of 1 images fitted to 8x8" in err and "2 of 2 images fitted to 8x8" in err
