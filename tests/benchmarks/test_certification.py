"""The certification benchmark and the figure of costs: small runs of their functions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis import cost_growth
from benchmarks import certification as benchmark
from grood_cert import detector, recipe
from grood_cert.ball import Ball
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.score import score_bounds
from grood_cert.certification.settings import Settings
from grood_cert.errors import InputError
from grood_cert.results.columns import OUTCOMES
from grood_cert.scores import energy


@pytest.fixture(scope="module")
def loaded(model):
    return detector.load(model)


@pytest.fixture(scope="module")
def sets(loaded):
    return benchmark.test_sets(loaded)


def test_the_plain_way_bounds_the_score(loaded, sets):
    images, eps = sets[0].images[:3].double(), 0.03
    plain = benchmark.PlainScore(loaded.network, images[:1])
    ball = Ball(images, torch.full((3,), eps, dtype=torch.float64), "linf")
    ours = score_bounds(LirpaNetwork(loaded.network, loaded.shape, "crown"), ball)
    corners = ball.lower + (ball.upper - ball.lower) * torch.randint(0, 2, (200, *images.shape)).double()
    seen = energy(loaded.network(corners.flatten(0, 1))).reshape(200, 3)
    theirs = plain.bounds(images, ball.eps)
    assert bool(((theirs["lower"] <= seen.amin(0)) & (seen.amax(0) <= theirs["upper"])).all())
    for bound, own, sign in ((theirs["lower"], ours.lower, 1), (theirs["upper"], ours.upper, -1)):
        assert bool((sign * bound <= sign * own + 1e-9).all())  # ours are never looser
    for side in ("lower", "upper"):
        alone = torch.cat([plain.bounds(images[i : i + 1], ball.eps[i : i + 1], (side,))[side] for i in range(3)])
        torch.testing.assert_close(alone, theirs[side], rtol=1e-12, atol=1e-12)
        exact = plain.bounds(images, 0 * ball.eps, (side,))[side]
        torch.testing.assert_close(exact, loaded.scores(images), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("kind", "sign"), [("id", 1), ("ood", -1)])
def test_radii_of_a_linear_score(kind, sign):
    """One logit, S = -w . x: ours is margin / ||w||_1, from below; the plain one bisects the bounds of the library."""
    layer = torch.nn.Linear(4, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0, 0.5, 0.5]]))
        layer.bias.zero_()
    network = torch.nn.Sequential(torch.nn.Flatten(), layer).eval().requires_grad_(False)
    images = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    gamma, exact = float(energy(network(images[:1]))) + sign * 0.4, 0.1
    furthest = torch.tensor([exact, torch.inf], dtype=torch.float64)
    found = benchmark.searched_radii(NativeNetwork(network, (1, 2, 2), "crown"), images, kind, gamma, furthest, 1e-3)
    assert ((0.999 * exact <= found) & (found < exact)).all()
    plain = benchmark.PlainScore(network, images[:1])
    for rounds, both in ((7, False), (14, True)):
        found = benchmark.plain_radii(plain, images, kind, gamma, furthest, rounds, both)
        assert bool(((0 < found) & (found < exact)).all())  # the exponential and the logarithm cost something even here
        for eps, proves in ((found, True), (found + furthest.clamp(max=1) / 2**rounds, False)):
            bounds = plain.bounds(images, eps)
            proved = bounds["upper"] < gamma if kind == "id" else bounds["lower"] > gamma
            assert proved.tolist() == [proves] * 2


def test_throughput(loaded, sets):
    records = benchmark.throughput(loaded, sets, samples=4, repeats=1, engines=("native",))
    assert [tuple(record) for record in records] == [benchmark.THROUGHPUT_COLUMNS[1:]] * 5
    by_way = {record["way"]: record for record in records}
    plain, alone = by_way["plain, batched"], by_way["plain, one at a time"]
    assert plain["ratio"] == plain["not_below_plain"] == alone["not_below_plain"] == 1
    assert by_way["plain, batched, with attack"]["cpu_seconds"] > plain["cpu_seconds"]
    ours = by_way["native, bounds only"]
    assert ours["not_below_plain"] == 1 and ours["median_id"] >= 0.99 * alone["median_id"] >= 0.98 * plain["median_id"]
    assert np.isfinite([record["radii_per_second"] for record in records]).all()


def test_tightness(loaded, model, sets, tmp_path):
    settings = Settings((0.01, 0.05), effort="fast", engine="native")
    medians, stages = benchmark.tightness(loaded, model, sets, settings, tmp_path, samples=4)
    assert [(record["effort"], record["kind"]) for record in medians] == [("fast", "id"), ("fast", "ood")]
    for record, stage in zip(medians, stages, strict=True):
        assert tuple(record) == benchmark.TIGHTNESS_COLUMNS[1:] and tuple(stage) == benchmark.STAGE_COLUMNS[1:]
        assert 0 <= record["smallest"] <= record["certified_to_attack"] <= 1
        samples = 4 * sum(images.kind == stage["kind"] for images in sets)
        assert sum(stage[name] for name in OUTCOMES) == 2 * samples


@pytest.mark.parametrize("name", benchmark.NETWORKS)
def test_recipes_of_networks_load(name):
    file, settings = benchmark.NETWORKS[name]
    network = recipe.load(benchmark._REPOSITORY / "train" / f"{file}.toml", settings).network
    assert network.name in ("mlp", "conv-small", "resnet-small")


@pytest.mark.parametrize("name", ["CIFAR conv-small", "Fashion-MNIST conv-small"])
def test_some_need_their_arrays(name, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "_SHARED", tmp_path / "shared/data")
    with pytest.raises(InputError, match="no image sets in shared/data"):
        benchmark.trained(name, tmp_path)


@pytest.mark.parametrize(
    ("part", "given", "message"),
    [
        ("throughput", {"effort": ["fast"]}, "throughput does not use --effort; leave it out"),
        ("throughput", {"engine": "native", "effort": ["max"]}, "does not use --effort and --engine"),
        ("throughput", {"time_limit": 5.0}, "throughput does not use --time-limit"),
        ("tightness", {"repeats": 2}, "tightness does not use --repeats"),
        ("unseen", {"repeats": 2}, "unseen does not use --repeats"),
        ("tightness", {"effort": ["fast"], "time_limit": 5.0}, "a time limit stops refining stages"),
        ("unseen", {"engine": "magic"}, "unknown 'magic'; use one of auto"),
    ],
)
def test_options_that_a_part_does_not_use_are_refused(part, given, message, tmp_path):
    with pytest.raises(InputError, match=message):
        benchmark.main(part, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_cost_growth(monkeypatch, tmp_path):
    small = cost_growth.Case(samples=2, width=2)
    monkeypatch.setattr(
        cost_growth,
        "PANELS",
        {"samples": {2: small}, "eps": {value: replace(small, eps=value) for value in (0.01, 0.1)}},
    )
    cost_growth.main(tmp_path / "cost.png", repeats=1)
    assert (tmp_path / "cost.png").read_bytes()[:4] == b"\x89PNG"
    lines = (tmp_path / "cost.csv").read_text().splitlines()
    assert lines[0] == ",".join(cost_growth.COLUMNS) and len(lines) == 1 + 2 * 3
    for record in cost_growth.measure(small, 1):  # the search finds the eps that its margin comes from, from below
        assert 1 - 2 * cost_growth.PRECISION < record["radius_to_eps"] <= 1
