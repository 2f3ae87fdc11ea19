from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from grood_cert import certification, detector, lirpa, rows, runs, training
from grood_cert.ball import Ball
from grood_cert.certification import Certifier, Settings, search_radius
from grood_cert.data import ImageSet
from grood_cert.detector import Architecture, Detector
from grood_cert.energy import energy
from grood_cert.errors import InputError, SoundnessError
from grood_cert.lirpa import BoundedNetwork
from grood_cert.recipe import Recipe
from grood_cert.score_bounds import ScoreBounds, score_bounds


def detector_of(network, shape, gamma):
    network = network.double().eval().requires_grad_(False)
    architecture = Architecture("mlp", shape, 1, (0.0,), (1.0,), {})
    return Detector(network, gamma, architecture, ("0",), Recipe(), {}, {}, {})


def one_logit(weight, bias=0.0):
    layer = nn.Linear(len(weight), 1)
    with torch.no_grad():
        layer.weight.copy_(weight[None])
        layer.bias.fill_(bias)
    return nn.Sequential(nn.Flatten(), layer).double()


# Closed form


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("kind", ["id", "ood"])
@pytest.mark.parametrize("method", ["crown", "crown-ibp"])
def test_radius_of_one_linear_logit_is_exact(norm, kind, method):
    """K = 1, f = w.x + b: the certified radius is |S - gamma| / ||w||_q, to 1e-9."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(9, generator=generator).double()
    images = 0.45 + 0.1 * torch.rand(7, 1, 3, 3, generator=generator).double()
    network = one_logit(weight, 0.2)
    score = energy(network(images)).detach()
    gamma = float(score.max() + 0.01 if kind == "id" else score.min() - 0.01)
    settings = Settings(eps=(0.01, 0.1), norm=norm, method=method, precision=1e-10)
    got = Certifier(detector_of(network, (1, 3, 3), gamma), settings).certify(images, kind)
    exact = (score - gamma).abs() / weight.norm(p={"linf": 1, "l2": 2, "l1": torch.inf}[norm])
    assert bool((exact < 0.4).all())  # no face of the pixel box in reach
    for name in ("radius_certified", "radius_certified_per_logit"):
        torch.testing.assert_close(got[name], exact, rtol=0, atol=1e-9)
        assert bool((got[name] <= exact).all())
    torch.testing.assert_close(got["radius_gradient_norm_estimate"], exact, rtol=1e-9, atol=0)
    torch.testing.assert_close(got["radius_attack"], exact, rtol=1e-3, atol=0)


# The search


def search(function, margin, limit=1.0, precision=1e-3, hint=0.5, calls=None, low=0.0, high=math.inf):
    margin = torch.as_tensor(margin, dtype=torch.float64).reshape(-1)
    tried = []

    def evaluate(index, eps):
        value = function(eps)
        tried.extend(zip(index.tolist(), eps.tolist(), (value < margin[index]).tolist(), strict=True))
        return value

    full = torch.full_like
    radius = search_radius(
        evaluate,
        margin,
        full(margin, low),
        function(full(margin, low)) if low else full(margin, 0.0),
        full(margin, high),
        function(full(margin, high)) if math.isfinite(high) else full(margin, math.nan),
        full(margin, hint),
        limit,
        precision,
    )
    for index, value in enumerate(radius.tolist()):  # every returned value was itself proved
        assert value in (0.0, low) or (index, value, True) in tried
    return radius, tried


@pytest.mark.parametrize("power", [1.0, 1.3, 2.0, 4.0])
@pytest.mark.parametrize("root", [1e-4, 0.03, 0.5, 0.999])
@pytest.mark.parametrize("hint", [1e-3, 0.4, 1.0])
def test_search_finds_the_root_of_a_power(power, root, hint):
    radius, tried = search(lambda eps: 3 * eps**power, 3 * root**power, hint=hint)
    assert root * (1 - 2e-3) <= float(radius) < root
    assert len(tried) <= 12


def test_search_is_cheap_from_a_bracket():
    _, tried = search(lambda eps: eps + 20 * eps**2, 0.2, low=0.02, high=0.1)
    assert len(tried) <= 5


def test_search_on_bounds_that_misbehave():
    never, _ = search(lambda eps: torch.full_like(eps, math.nan), [0.5, 1.0])
    assert never.tolist() == [0, 0]
    always, tried = search(lambda eps: eps * 0, [0.5, 1.0])
    assert always.tolist() == [1.0, 1.0] and len(tried) <= 24
    stepped, _ = search(lambda eps: torch.where(eps < 0.2, 0.0, 9.0).double(), 1.0)
    assert 0.19 < float(stepped) < 0.2
    jagged, _ = search(lambda eps: eps * (1 + 0.5 * torch.sin(200 * eps)), 0.2)
    assert 0 < float(jagged) < 0.4
    gone, _ = search(lambda eps: torch.where(eps > 0.1, math.nan, eps), 0.5)
    assert 0.099 < float(gone) <= 0.1
    wrong_side, tried = search(lambda eps: eps * 0, [0.0])
    assert wrong_side.tolist() == [0] and not tried


# Real runs


@pytest.fixture(scope="module")
def loaded(model):
    return detector.load(model)


@pytest.fixture(scope="module")
def result(rows_file):
    return rows.read(rows_file)


def images_of(loaded, result, mask):
    experiment = training.experiment_of(loaded.recipe)
    sets = {images.name: images for images in (experiment.test, *experiment.ood)}
    picked = zip(result["set"][mask].tolist(), result["index"][mask].tolist(), strict=True)
    return torch.stack([sets[name].images[index] for name, index in picked]).double()


def test_rows_tell_the_truth_about_their_samples(loaded, result):
    everything = np.ones(len(result), bool)
    images = images_of(loaded, result, everything)
    np.testing.assert_allclose(loaded.score(images).numpy(), result["score"], rtol=1e-12)
    assert (result["prediction"] == loaded.network(images).argmax(1).numpy()).all()
    assert (result["accepted"] == (result["score"] <= loaded.gamma)).all()
    right = (result["accepted"] == 1) == result.of_kind("id")
    assert ((result["status"] == "misdecided") == ~right).all()
    assert (result["radius_certified"][~right] == 0).all() and (result["radius_attack"][~right] == 0).all()
    assert ((result["status"] == "certified") == (result["radius_certified"] > 0)).all()
    assert (result["status"] == "certified").sum() > len(result) / 2


def test_each_radius_is_proved_again_by_a_fresh_engine(loaded, result):
    for kind in ("id", "ood"):
        mask = result.of_kind(kind) & (result["status"] == "certified")
        eps = torch.tensor(result["radius_certified"][mask])
        ball = Ball(images_of(loaded, result, mask), eps, "linf")
        bounds = score_bounds(BoundedNetwork(loaded.network, (1, 8, 8), "crown"), ball)
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
    assert (manifest["norm"], manifest["method"], manifest["dtype"]) == ("linf", "crown", "float64")
    assert manifest["versions"]["auto_LiRPA"] == lirpa.version()
    assert {entry["set"] for entry in manifest["data"]} == set(result["set"])
    assert manifest["failures"] == {} and manifest["seconds"] > 0 and manifest["limit"] == 12


def test_batches_do_not_matter(loaded):
    """Formal columns are the same whichever samples share a batch (attacks draw random starts)."""
    images = training.experiment_of(loaded.recipe).test.images[:5]
    settings = Settings(eps=(0.02, 0.05))
    together = Certifier(loaded, settings).certify(images, "id")
    for index in range(5):
        alone = Certifier(loaded, settings).certify(images[index : index + 1], "id")
        for name in ("s_lb", "s_ub"):
            torch.testing.assert_close(alone[name], together[name][index : index + 1], rtol=0, atol=1e-9)


def test_eps_zero_and_the_whole_box(loaded):
    images = training.experiment_of(loaded.recipe).test.images[:3]
    got = Certifier(loaded, Settings(eps=(0.0, 1.0))).certify(images, "id")
    for name in ("s_lb", "s_ub", "s_attack_min", "s_attack_max"):
        torch.testing.assert_close(got[name][:, 0], got["score"], rtol=1e-9, atol=1e-9)
    assert bool((got["s_ub"][:, 1] > loaded.gamma).all())


def test_subset_is_seeded_and_names_its_positions():
    images = ImageSet("x", "id", torch.rand(20, 1, 2, 2), torch.arange(20), tuple(map(str, range(20))))
    chosen, index = runs.subset(images, 5, seed=3)
    assert len(chosen) == 5 and torch.equal(chosen.labels, index) and torch.equal(index, index.sort().values)
    assert torch.equal(runs.subset(images, 5, seed=3)[1], index)
    assert len(runs.subset(images, 0, seed=3)[0]) == len(runs.subset(images, 99, seed=3)[0]) == 20


# What must not pass


def test_an_unsound_bound_is_caught_by_the_attack(loaded, monkeypatch, tmp_path, model):
    """A bound engine that shrinks the ball to a tenth: the attack finds points outside, and the run stops."""

    def shrunk(bounded, ball):
        return score_bounds(bounded, Ball(ball.center, ball.eps / 10, ball.norm))

    monkeypatch.setattr(certification, "score_bounds", shrunk)
    images = training.experiment_of(loaded.recipe).test
    with pytest.raises(SoundnessError, match="outside their proved bounds") as caught:
        certification.run(loaded, model, [images], Settings(eps=(0.1,)), tmp_path, limit=4)
    with np.load(caught.value.counterexample) as archive:
        evidence = dict(archive)
    bounds, attacked = evidence["s_upper"], evidence["s_attack_maximum"]
    points = torch.from_numpy(evidence["counterexample"])
    assert ((attacked > bounds) | (evidence["s_attack_minimum"] < evidence["s_lower"])).all()
    assert np.abs(evidence["counterexample"] - evidence["image"]).max() <= 0.1 + 1e-12
    assert len(loaded.score(points)) == len(bounds)
    assert not (tmp_path / "rows.csv").exists()


def test_a_radius_beyond_the_attack_is_caught(loaded, monkeypatch):
    """Bounds that are right on the grid but prove everything elsewhere: only the radii betray them."""

    def boastful(bounded, ball):
        bounds = score_bounds(bounded, ball)
        if float(ball.eps[0]) == 0.01:
            return bounds
        everywhere = torch.full_like(bounds.upper, -1e6)
        return ScoreBounds(bounds.lower, everywhere, bounds.lower_per_logit, everywhere)

    monkeypatch.setattr(certification, "score_bounds", boastful)
    images = training.experiment_of(loaded.recipe).test.images[:4]
    with pytest.raises(SoundnessError, match="exceed the distance of a counterexample"):
        Certifier(loaded, Settings(eps=(0.01,))).certify(images, "id")


@pytest.mark.parametrize("failure", [AssertionError("boom"), RuntimeError("shapes"), KeyError("x"), MemoryError()])
def test_an_exception_in_the_engine_means_not_certified(loaded, monkeypatch, failure):
    def fails(bounded, ball):
        raise failure

    monkeypatch.setattr(certification, "score_bounds", fails)
    certifier = Certifier(loaded, Settings(eps=(0.01, 0.02)))
    got = certifier.certify(training.experiment_of(loaded.recipe).test.images[:4], "id")
    assert got["radius_certified"].tolist() == got["radius_certified_per_logit"].tolist() == [0.0] * 4
    assert bool(torch.isnan(got["s_lb"]).all()) and bool(torch.isnan(got["s_ub"]).all())
    ((message, count),) = certifier.failures.items()
    assert message.startswith(type(failure).__name__) and count >= 8


def test_interruption_is_not_swallowed(loaded, monkeypatch):
    def interrupted(bounded, ball):
        raise KeyboardInterrupt

    monkeypatch.setattr(certification, "score_bounds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Certifier(loaded, Settings(eps=(0.01,))).certify(torch.zeros(1, 1, 8, 8), "id")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": ()}, "no eps given"),
        ({"eps": (-0.1,)}, "eps -0.1: expected a number from 0 to 1"),
        ({"eps": (math.nan,)}, "eps nan: expected a number"),
        ({"eps": (math.inf,)}, "eps inf: expected a number"),
        ({"eps": (1.5,)}, "eps 1.5: expected a number from 0 to 1"),
        ({"eps": (0.2, 0.1)}, "ascending and without repetition, got 0.2 before 0.1"),
        ({"eps": (0.1, 0.1)}, "ascending and without repetition"),
        ({"norm": "l7"}, "unknown norm 'l7'; use one of linf, l2, l1"),
        ({"method": "magic"}, "unknown method 'magic'; use one of ibp, crown-ibp, crown, alpha-crown"),
        ({"precision": 0.0}, "precision must lie between 0 and 1"),
        ({"batch_size": 0}, "batch size must be 1 or more"),
    ],
)
def test_settings_are_checked(loaded, changes, message):
    with pytest.raises(InputError, match=message):
        Certifier(loaded, dataclasses.replace(Settings(eps=(0.1,)), **changes))
    dataclasses.replace(Settings(eps=(0.1, 7.9)), norm="l2").check((1, 8, 8))


def test_existing_rows_are_not_overwritten(loaded, model, tmp_path):
    (tmp_path / "rows.csv").write_text("precious")
    images = training.experiment_of(loaded.recipe).test
    with pytest.raises(InputError, match="exists already; choose another --out, or add --force"):
        certification.run(loaded, model, [images], Settings(eps=(0.1,)), tmp_path)
    assert (tmp_path / "rows.csv").read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.float().eval(), "proofs need a float64 network, got torch.float32"),
        (lambda n: n.train(), "train mode"),
    ],
)
def test_only_the_network_that_proofs_are_about_is_certified(loaded, change, message):
    network = change(copy.deepcopy(loaded.network))
    with pytest.raises(InputError, match=message):
        Certifier(dataclasses.replace(loaded, network=network), Settings(eps=(0.1,)))


# The file format


def test_rows_read_back_what_was_written(rows_file, result):
    with rows_file.open() as stream:
        header = next(csv.reader(stream))
    assert header == rows.header(result.eps)
    assert set(rows.COLUMNS) <= set(header)
    assert json.loads(rows.manifest_path(rows_file).read_text())["eps"] == list(result.eps)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("radius_attack", "radius"), "missing 'radius_attack'"),
        (lambda text: text.splitlines()[0] + "\n", "holds no rows"),
        (lambda text: "", "holds no rows"),
        (
            lambda text: re.sub(r",certified,[^,]*", ",certified,nan", text),
            "values of radius_certified that are not finite",
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
        rows.read(path)


def test_missing_or_foreign_manifest(rows_file, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(rows_file.read_text())
    with pytest.raises(InputError, match=r"rows\.json: no such file"):
        rows.read(path)
    for text in ("nonsense", "[]", '{"eps": [0.1]}', '{"eps": [0.01, 0.03, 0.1]}'):
        path.with_suffix(".json").write_text(text)
        with pytest.raises(InputError, match="not the rows of a certification"):
            rows.read(path)
