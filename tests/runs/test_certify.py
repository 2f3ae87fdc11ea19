from __future__ import annotations

import csv
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from grood_cert import detector
from grood_cert.ball import Ball
from grood_cert.bounds import crosscheck
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.crown import NativeNetwork, NativeRelaxation
from grood_cert.bounds.engine import lirpa_version
from grood_cert.bounds.score import score_bounds
from grood_cert.certification import stages
from grood_cert.certification.cascade import Cascade
from grood_cert.certification.settings import Settings
from grood_cert.data import ImageSet, experiment_of, load_set
from grood_cert.errors import InputError, SoundnessError
from grood_cert.results.columns import SCHEMAS, header
from grood_cert.results.table import Table, manifest_path
from grood_cert.runs import certify as certification
from grood_cert.runs.batches import subset

# Real runs


@pytest.fixture(scope="module")
def loaded(model):
    return detector.load(model)


@pytest.fixture(scope="module")
def result(rows_file):
    return Table.read(rows_file, "certification")


def images_of(loaded, result, mask):
    experiment = experiment_of(loaded.origin.recipe)
    sets = {images.name: images for images in (experiment.test, *experiment.ood)}
    picked = zip(result["set"][mask].tolist(), result["index"][mask].tolist(), strict=True)
    return torch.stack([sets[name].images[index] for name, index in picked]).double()


def test_rows_tell_the_truth_about_their_samples(loaded, result):
    everything = np.ones(len(result), bool)
    images = images_of(loaded, result, everything)
    np.testing.assert_allclose(loaded.scores(images).numpy(), result["score"], rtol=1e-12)
    assert (result["prediction"] == loaded.network(images).argmax(1).numpy()).all()
    assert (result["accepted"] == (result["score"] <= loaded.gamma)).all()
    right = (result["accepted"] == 1) == result.of_kind("id")
    assert ((result["status"] == "misdecided") == ~right).all()
    assert (result["radius_certified"][~right] == 0).all() and (result["radius_attack"][~right] == 0).all()
    assert ((result["status"] == "certified") == (result["radius_certified"] > 0)).all()
    assert (result["status"] == "certified").sum() > len(result) / 2


def test_rows_of_a_folder_name_the_files(loaded, model, tmp_path):
    """Those of the images drawn; rows of other sets name none."""
    for name, count in (("cat", 3), ("dog", 2)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((8, 8), 40 * number + 100 * (name == "dog"), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{number}.png")
    sets = [load_set(str(tmp_path / "pets"), shape=loaded.shape), load_set("digits:8", shape=loaded.shape)]
    settings = Settings(eps=(0.01,), stages=("ibp",), effort="fast")
    result = certification.run(loaded, model, sets, settings, tmp_path, limit=4)
    with (tmp_path / "rows.csv").open(newline="") as stream:
        files = [row["file"] for row in csv.DictReader(stream)]
    assert files == result["file"].tolist() and files[4:] == [""] * 4
    for index, file, score in zip(result["index"][:4], files, result["score"], strict=False):
        pixels = torch.from_numpy(np.asarray(Image.open(tmp_path / "pets" / file)) / np.float32(255))
        assert torch.equal(sets[0].images[int(index)], pixels[None])
        assert float(loaded.scores(pixels[None, None].double())) == pytest.approx(score, rel=1e-12)


def test_each_radius_is_proved_again_by_a_fresh_engine(loaded, result):
    for kind in ("id", "ood"):
        mask = result.of_kind(kind) & (result["status"] == "certified")
        eps = torch.tensor(result["radius_certified"][mask])
        ball = Ball(images_of(loaded, result, mask), eps, "linf")
        bounds = score_bounds(LirpaNetwork(loaded.network, (1, 8, 8), "crown"), ball)
        proved = bounds.upper < loaded.gamma if kind == "id" else bounds.lower > loaded.gamma
        assert bool(proved.all())


def test_the_chain_and_the_envelopes(result):
    assert (result["radius_certified"] <= result["radius_attack"]).all()
    assert (result["radius_certified_per_logit"] <= result["radius_certified"]).all()
    score, grid = result["score"][:, None], result.grid
    assert (grid["s_lb"] <= grid["s_attack_min"]).all() and (grid["s_attack_max"] <= grid["s_ub"]).all()
    assert (grid["s_attack_min"] <= score).all() and (score <= grid["s_attack_max"]).all()
    assert (np.diff(grid["s_ub"], axis=1) >= 0).all() and (np.diff(grid["s_lb"], axis=1) <= 0).all()
    assert (np.diff(grid["s_attack_max"], axis=1) >= 0).all() and (np.diff(grid["s_attack_min"], axis=1) <= 0).all()


def test_radii_agree_with_the_grid(result):
    inside = result.of_kind("id") & (result["status"] != "misdecided")
    for column, eps in enumerate(result.eps):
        proved = result.grid["s_ub"][inside, column] < result.gamma
        assert (result["radius_certified"][inside][proved] >= eps).all()
        broken = result["radius_attack"][inside] <= eps
        assert (result.grid["s_attack_max"][inside, column][broken] > result.gamma).all()


def test_the_manifest_says_what_was_done(result, model, loaded):
    manifest = result.manifest
    assert manifest["model"]["sha256"] and manifest["gamma"] == loaded.gamma
    assert (manifest["norm"], manifest["engine"], manifest["dtype"]) == ("linf", "auto", "float64")
    assert manifest["stages"] == ["ibp", "crown"]
    assert manifest["versions"]["auto_LiRPA"] == lirpa_version()
    check, sets = manifest["cross_check"], len(manifest["data"])
    assert (manifest["bounded_by"], check["engine"], check["version"]) == ("native", "auto_lirpa", lirpa_version())
    assert check["balls"] == check["same_lines"] == 4 * sets and 0 < check["largest_disagreement"] < 1e-9
    assert {entry["set"] for entry in manifest["data"]} == set(result["set"])
    assert manifest["failures"] == {} and manifest["seconds"] > 0 and manifest["limit"] == 12


def test_subset_is_seeded_and_names_its_positions():
    images = ImageSet("x", "id", torch.rand(20, 1, 2, 2), torch.arange(20), tuple(map(str, range(20))))
    chosen, index = subset(images, 5, seed=3)
    assert len(chosen) == 5 and torch.equal(chosen.labels, index) and torch.equal(index, index.sort().values)
    assert torch.equal(subset(images, 5, seed=3)[1], index)
    assert len(subset(images, 0, seed=3)[0]) == len(subset(images, 99, seed=3)[0]) == 20


# What must not pass


def test_an_unsound_bound_is_caught_by_the_attack(loaded, monkeypatch, tmp_path, model):
    """A bound engine that shrinks the ball to a tenth: the attack finds points outside, and the run stops."""

    def shrunk(bounded, ball, method=None, *rest):
        return score_bounds(bounded, Ball(ball.center, ball.eps / 10, ball.norm), method)

    monkeypatch.setattr(stages, "score_bounds", shrunk)
    images = experiment_of(loaded.origin.recipe).test
    with pytest.raises(SoundnessError, match="outside their proved bounds") as caught:
        certification.run(loaded, model, [images], Settings(eps=(0.1,), stages=("ibp", "crown")), tmp_path, limit=4)
    with np.load(caught.value.counterexample) as archive:
        evidence = dict(archive)
    bounds, attacked = evidence["s_upper"], evidence["s_attack_maximum"]
    points = torch.from_numpy(evidence["counterexample"])
    assert ((attacked > bounds) | (evidence["s_attack_minimum"] < evidence["s_lower"])).all()
    assert np.abs(evidence["counterexample"] - evidence["image"]).max() <= 0.1 + 1e-12
    assert len(loaded.scores(points)) == len(bounds)
    assert not (tmp_path / "rows.csv").exists()


def test_engines_that_contradict_each_other_end_the_run(loaded, monkeypatch, tmp_path, model):
    """A native bound that is too tight by a millionth: no attack comes that close, the other engine does."""
    rows_of = NativeRelaxation.rows

    def shifted(self, coefficients, method=None):
        lower, upper = rows_of(self, coefficients, method)
        return lower, upper - 1e-6

    monkeypatch.setattr(NativeRelaxation, "rows", shifted)
    images, settings = experiment_of(loaded.origin.recipe).test, Settings(eps=(0.01, 0.03), stages=("ibp", "crown"))
    (tmp_path / "rows.csv").write_text("precious")
    with pytest.raises(SoundnessError, match="the bound engines contradict each other") as caught:
        certification.run(loaded, model, [images], settings, tmp_path, limit=4)
    with np.load(caught.value.counterexample) as archive:
        assert archive["eps"].tolist() == [0.01, 0.03, 0.01, 0.03] and archive["image"].shape == (4, 1, 8, 8)
        assert (np.abs(archive["native_upper"] - archive["other_upper"]) > 1e-7).any()
    assert (tmp_path / "rows.csv").read_text() == "precious"


def test_a_cross_check_is_the_same_however_many_balls_are_bounded_at_once(loaded, monkeypatch):
    """Both ends of the grid of each of the first images: one call, or one a ball."""
    images = experiment_of(loaded.origin.recipe).test
    choice = Cascade(loaded, Settings(eps=(0.01, 0.02, 0.03), effort="fast")).choice
    assert certification.balls_together(choice.bounded.graph) == 64
    calls = []
    relax = NativeNetwork.relax
    monkeypatch.setattr(NativeNetwork, "relax", lambda self, ball: calls.append(ball.eps.tolist()) or relax(self, ball))
    found = []
    for together in ((1, 1), (8, 64)):
        monkeypatch.setattr(certification, "_TOGETHER", together)
        calls.clear()
        found.append(certification.cross_checked(choice, loaded.score, [images], (0.01, 0.02, 0.03), "linf"))
        assert set(map(tuple, calls)) == ({(0.01,), (0.03,)} if together == (1, 1) else {(0.01, 0.03, 0.01, 0.03)})
    alone, at_once = found
    assert alone["balls"] == at_once["balls"] == 4 and alone["same_lines"] == at_once["same_lines"]
    assert max(alone["largest_disagreement"], at_once["largest_disagreement"]) < 1e-8


def test_a_named_engine_is_not_cross_checked_and_a_missing_one_is_left_out(loaded, monkeypatch, tmp_path, model):
    images, settings = experiment_of(loaded.origin.recipe).test, Settings(eps=(0.01,), stages=("ibp",), effort="fast")
    for engine in ("native", "auto_lirpa"):
        chosen = dataclasses.replace(settings, engine=engine)
        found = certification.run(loaded, model, [images], chosen, tmp_path / engine, limit=2)
        assert (found.manifest["bounded_by"], found.manifest["cross_check"]) == (engine, None)
    monkeypatch.setattr(certification, "lirpa_version", lambda: None)
    found = certification.run(loaded, model, [images], settings, tmp_path / "auto", limit=2)
    assert found.manifest["cross_check"] == {"left_out": "auto_LiRPA is not installed"}


def test_a_cross_check_of_nothing_is_none(loaded, monkeypatch, tmp_path, model):
    monkeypatch.setattr(crosscheck, "score_bounds", lambda *arguments: 1 / 0)
    images, settings = experiment_of(loaded.origin.recipe).test, Settings(eps=(0.01,), stages=("ibp",), effort="fast")
    found = certification.run(loaded, model, [images], settings, tmp_path, limit=2)
    assert found.manifest["cross_check"] == {"left_out": "there was no ball that both engines could bound"}
    assert certification.agreement(found.manifest["cross_check"]).startswith("no cross-check of the bounds: ")


class Reshaped(torch.nn.Module):
    """The same function, written otherwise."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images.reshape(-1, 1, 8, 8).transpose(2, 3).transpose(3, 2) * 1.0)


def test_how_a_network_is_written_changes_nothing(loaded, tmp_path, model):
    images, settings = experiment_of(loaded.origin.recipe).test, Settings(eps=(0.01, 0.03), effort="fast")
    strange = dataclasses.replace(loaded, network=Reshaped(loaded.network).eval(), architecture=None)
    found = certification.run(strange, model, [images], settings, tmp_path / "strange", limit=4)
    plain = certification.run(loaded, model, [images], settings, tmp_path / "plain", limit=4)
    assert found.manifest["bounded_by"] == "native" and found.manifest["cross_check"]["balls"] > 0
    np.testing.assert_allclose(found["radius_certified"], plain["radius_certified"], rtol=1e-6)
    assert (found["radius_certified"] > 0).any()


def test_existing_rows_are_not_overwritten(loaded, model, tmp_path):
    (tmp_path / "rows.csv").write_text("precious")
    images = experiment_of(loaded.origin.recipe).test
    with pytest.raises(InputError, match="exists already; choose another --out, or add --force"):
        certification.run(loaded, model, [images], Settings(eps=(0.1,), stages=("ibp", "crown")), tmp_path)
    assert (tmp_path / "rows.csv").read_text() == "precious"


# The file format


def test_rows_read_back_what_was_written(rows_file, result):
    with rows_file.open() as stream:
        names = next(csv.reader(stream))
    assert names == header("certification", result.eps)
    assert set(SCHEMAS["certification"].columns) <= set(names)
    assert json.loads(manifest_path(rows_file).read_text())["eps"] == list(result.eps)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("radius_attack", "radius"), "missing 'radius_attack'"),
        (lambda text: text.splitlines()[0] + "\n", "holds no rows"),
        (lambda text: "", "holds no rows"),
        (
            lambda text: re.sub(r",certified,(\w+),[^,]*", r",certified,\1,nan", text),
            "radius_certified: nan is not finite",
        ),
        (lambda text: text.replace(",certified,", ",maybe,"), "not the rows of a certification"),
        (lambda text: text[: len(text) // 2], "not the rows of a certification"),
        (lambda text: text.replace("digits:0-5,id,", "digits:0-5,who,"), "not the rows of a certification"),
    ],
)
def test_damaged_rows_are_refused(rows_file, tmp_path, damage, message):
    (tmp_path / "rows.json").write_text(rows_file.with_suffix(".json").read_text())
    path = tmp_path / "rows.csv"
    path.write_text(damage(rows_file.read_text()))
    with pytest.raises(InputError, match=message):
        Table.read(path, "certification")


def test_missing_or_foreign_manifest(rows_file, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(rows_file.read_text())
    with pytest.raises(InputError, match=r"rows\.json: no such file"):
        Table.read(path, "certification")
    for text in ("nonsense", "[]", '{"eps": [0.1]}', '{"eps": [0.01, 0.03, 0.1]}'):
        path.with_suffix(".json").write_text(text)
        with pytest.raises(InputError, match="not the rows of a certification"):
            Table.read(path, "certification")
