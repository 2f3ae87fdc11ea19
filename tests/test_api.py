from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import grood_cert as gc
from grood_cert import api
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.score import score_bounds
from grood_cert.errors import InputError

SHAPE = (1, 2, 3)
WEIGHT = torch.tensor([0.5, -1.0, 0.25, 1.5, -0.75, 1.0], dtype=torch.float64)


def images_of(count: int, seed: int = 0) -> torch.Tensor:
    return 0.4 + 0.2 * torch.rand(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear() -> gc.Detector:
    """S(x) = -(w . x): each ball's bounds and each radius are known; the threshold divides the images."""
    layer = nn.Linear(6, 1).double()
    with torch.no_grad():
        layer.weight.copy_(WEIGHT[None])
        layer.bias.zero_()
    network = nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False)
    return gc.Detector(network, float(-(images_of(9).flatten(1) @ WEIGHT).median()) + 1e-3, SHAPE)


def hidden() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_a_bound_that_its_own_centre_contradicts_ends_the_call(monkeypatch):
    real = api.bounds.score_bounds

    def shifted(*arguments):
        found = real(*arguments)
        return dataclasses.replace(found, lower=found.lower + 1, upper=found.upper + 1)

    monkeypatch.setattr(api.bounds, "score_bounds", shifted)
    with pytest.raises(gc.SoundnessError, match="9 scores lie outside their proved bounds"):
        gc.score_bounds(linear(), images_of(9), 0.001)


DUAL = {"linf": 1, "l2": 2, "l1": math.inf}


@pytest.mark.parametrize("norm", DUAL)
def test_certify_proves_the_decision_at_x(norm):
    detector, images, slope = linear(), images_of(9), float(torch.linalg.vector_norm(WEIGHT, DUAL[norm]))
    found = gc.certify(detector, images, [0.001, 0.05], norm=norm, effort="fast")
    score = -(images.flatten(1) @ WEIGHT)
    exact = (score - detector.gamma).abs() / slope
    torch.testing.assert_close(found.score, score)
    assert found.accepted.any() and not found.accepted.all()
    assert bool((found.radius <= exact).all() and (found.radius > 0.95 * exact).all())
    torch.testing.assert_close(found.attack_radius, exact, rtol=1e-3, atol=0)
    for column, eps in enumerate((0.001, 0.05)):
        torch.testing.assert_close(found.upper[:, column], score + eps * slope)
        torch.testing.assert_close(found.lower[:, column], score - eps * slope)
    for sample, outcomes in enumerate(found.outcome):
        assert [outcome.certifies for outcome in outcomes] == [eps < exact[sample] for eps in (0.001, 0.05)]


def test_a_number_gives_one_entry_a_sample():
    detector, images = linear(), images_of(5)
    one, grid = (gc.certify(detector, images, eps, effort="fast") for eps in (0.02, [0.02]))
    assert one.lower.shape == one.upper.shape == (5,) and grid.lower.shape == (5, 1)
    assert torch.equal(one.lower, grid.lower[:, 0]) and torch.equal(one.radius, grid.radius)
    assert torch.equal(gc.certify(detector, images, np.float64(0.02), effort="fast").lower, one.lower)
    assert one.outcome == [row[0] for row in grid.outcome]
    assert str(one.outcome[0]).startswith("certified by")


def test_the_truth_counts_misdecisions():
    detector, images = linear(), images_of(9)
    accepted = detector.predict(images).accepted
    for truth, right in (("id", accepted), ("ood", ~accepted)):
        found = gc.certify(detector, images, 0.001, truth=truth, effort="fast")
        assert torch.equal(found.radius > 0, right)
        assert [outcome is gc.Outcome.MISDECISION for outcome in found.outcome] == (~right).tolist()


def test_radii_come_back_in_the_order_of_the_images():
    """Accepted and rejected images, more than one batch of each, interleaved: each radius belongs to its image."""
    detector, images = linear(), images_of(150, seed=1)
    found = gc.certify(detector, images, 0.01, effort="fast")
    exact = (found.score - detector.gamma).abs() / WEIGHT.abs().sum()
    assert bool((found.radius <= exact).all() and (found.radius > 0.95 * exact).all())
    assert torch.equal(found.accepted, detector.predict(images).accepted)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: gc.Detector(model.double(), -1.0, SHAPE)])
def test_score_bounds_are_those_of_the_engine(wrap):
    images = images_of(4)
    found = gc.score_bounds(wrap(hidden()), images.float(), 0.05, "l2")
    network = hidden().double()
    wanted = score_bounds(NativeNetwork(network, SHAPE, "crown"), gc.Ball(images.float().double(), 0.05, "l2"))
    assert torch.equal(found.lower, wanted.lower) and torch.equal(found.upper, wanted.upper)


@pytest.mark.parametrize("norm", DUAL)
def test_the_lipschitz_bound_of_a_linear_score_is_exact(norm):
    detector, exact = linear(), torch.linalg.vector_norm(WEIGHT, DUAL[norm])
    found = gc.lipschitz_bound(detector, images_of(3), 0.1, norm)
    torch.testing.assert_close(found, exact.expand(3))
    assert bool((found >= exact).all())


def test_attack_finds_points_with_the_other_decision():
    detector, images = linear(), images_of(9)
    found = gc.attack(detector, images, "l2")
    assert torch.equal(detector.predict(found.points).accepted, ~detector.predict(images).accepted)
    torch.testing.assert_close((found.points - images).flatten(1).norm(dim=1), found.radius)


def test_a_smoothed_detector_is_calibrated_anew_and_keeps_its_word():
    """The smoothed score of a linear S is S: gamma and radii are known up to the noise of 400 draws."""
    detector, inside, images = linear(), images_of(60, seed=2), images_of(9)
    smoothed = gc.smooth(detector, 0.25, calibration=inside, n=400, dtype="float64")
    wanted = dataclasses.replace(detector, gamma=float(detector.scores(inside).sort().values[57]))
    assert smoothed.gamma == pytest.approx(wanted.gamma, abs=0.1)
    found = smoothed.certify(images, [0.05, 0.1])
    score = detector.scores(images).numpy()
    exact = np.abs(score - smoothed.gamma) / float(WEIGHT.norm())
    sides = {"accepted": score < smoothed.gamma, "rejected": score > smoothed.gamma}
    for sample, decision in enumerate(found.decision):
        assert decision == "abstained" or (sides[decision][sample] and found.radius[sample] <= exact[sample])
    assert found.alpha == 0.001 and found.lower.shape == (9, 2)
    assert (found.lower <= score[:, None]).all() and (score[:, None] <= found.upper).all()
    assert smoothed.certify(images, 0.05).lower.shape == (9,)


def test_certify_sets_writes_what_the_command_writes_and_goes_on(tmp_path):
    detector, inside, outside = linear(), images_of(7), images_of(5, seed=3).square()
    sets = {"id": (inside, torch.arange(7) % 2), "svhn": DataLoader(TensorDataset(outside), batch_size=2)}
    work = {"eps": [0.01, 0.05], "effort": "fast", "batch_size": 3, "out": tmp_path / "run"}
    table = gc.certify_sets(detector, sets, **work)
    assert table["set"].tolist() == ["id"] * 7 + ["svhn"] * 5 and table.complete
    assert table["kind"].tolist() == ["id"] * 7 + ["ood"] * 5
    assert table["label"].tolist()[:7] == [0, 1] * 3 + [0]
    alone = gc.certify(detector, outside, [0.01, 0.05], truth="ood", effort="fast")
    np.testing.assert_allclose(table["radius_certified"][7:], alone.radius.numpy(), rtol=0.02)
    before = (tmp_path / "run" / "rows.csv").read_bytes()
    assert len(gc.certify_sets(detector, sets, **work)) == 12
    assert (tmp_path / "run" / "rows.csv").read_bytes() == before
    assert gc.Table.read(tmp_path / "run" / "rows.csv").eps == (0.01, 0.05)


def test_another_network_does_not_continue_a_run(tmp_path):
    detector, sets = linear(), {"id": images_of(3)}
    gc.certify_sets(detector, sets, 0.01, out=tmp_path, effort="fast")
    other = linear()
    with torch.no_grad():
        other.network[1].weight += 0.01
    with pytest.raises(InputError, match="another"):
        gc.certify_sets(other, sets, 0.01, out=tmp_path, effort="fast")


class Gate(nn.Module):
    """Two functions with the same layers and weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.doubled = network, False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.network(images)
        return logits + logits if self.doubled else logits


def test_other_code_with_the_same_weights_does_not_continue_a_run(tmp_path):
    network, sets = Gate(linear().network).eval(), {"id": images_of(3)}
    work = {"out": tmp_path, "effort": "fast"}
    gc.certify_sets(gc.Detector(network, -1.0, SHAPE), sets, 0.01, **work)
    gc.certify_sets(gc.Detector(network, -1.0, SHAPE), sets, 0.01, **work)
    network.doubled = True
    with pytest.raises(InputError, match="another run"):
        gc.certify_sets(gc.Detector(network, -1.0, SHAPE), sets, 0.01, **work)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, x: d.predict(d.network.train() and x), "train mode"),
        (lambda d, x: gc.Detector(d.network, math.inf, SHAPE), "gamma is inf; expected a finite number"),
        (lambda d, x: gc.certify(d, x, "0.02"), "eps '0.02': expected a number"),
        (lambda d, x: gc.score_bounds(d, x, [0.01, 0.02]), "expected one number"),
        (lambda d, x: gc.lipschitz_bound(d, x, None), "eps None: expected a number"),
        (lambda d, x: gc.Detector.calibrate("model", x), "expected a torch.nn.Module, got str"),
        (lambda d, x: gc.certify_sets(d, {"ID": x}, 0.1, out="unused"), "the set to be accepted is called 'id'"),
        (
            lambda d, x: gc.certify_sets(d, {"id": x, "b": x.clone()}, 0.1, out="unused"),
            "'id' and 'b' hold the same images",
        ),
        (lambda d, x: gc.certify(d, x, -0.1), "eps -0.1: expected a number from 0 to 1"),
        (lambda d, x: gc.certify(d, x, [0.2, 0.1]), "ascending"),
        (lambda d, x: gc.certify(d, x, []), "no eps given"),
        (lambda d, x: gc.certify(d, x, "8/255"), "eps '8/255': expected a number, or a list of numbers"),
        (lambda d, x: gc.certify(d, x, 0.1, norm="l7"), "unknown norm 'l7'"),
        (lambda d, x: gc.certify(d, x, 0.1, effort="heroic"), "unknown effort 'heroic'"),
        (lambda d, x: gc.certify(d, x, 0.1, engine="steam"), "unknown engine 'steam'"),
        (lambda d, x: gc.certify(d, x, 0.1, truth="svhn"), "unknown truth 'svhn'; use 'id', 'ood' or None"),
        (lambda d, x: gc.certify(d, x[0], 0.1), r"expected shape \(N, 1, 2, 3\), got \(1, 2, 3\); .* x\[None\]"),
        (lambda d, x: gc.certify(d, x * 255, 0.1), r"all must lie in \[0, 1\]"),
        (lambda d, x: gc.score_bounds(d, x, -1.0), "eps -1.0: expected a number from 0 to 1"),
        (lambda d, x: gc.score_bounds(d, x, 0.1, method="magic"), "unknown method 'magic'"),
        (lambda d, x: gc.score_bounds(d.network.train(), x, 0.1), "train mode"),
        (lambda d, x: gc.score_bounds(d, x[..., :2], 0.1), r"expected shape \(N, 1, 2, 3\), got"),
        (lambda d, x: gc.score_bounds(d.network, x[..., :2], 0.1), r"does not take images of shape \(1, 2, 2\)"),
        (lambda d, x: gc.lipschitz_bound(d, x, 0.1, "l7"), "unknown norm 'l7'"),
        (lambda d, x: gc.lipschitz_bound(hidden().train(), x, 0.1), "train mode"),
        (lambda d, x: gc.attack(d, x, "l7"), "unknown norm 'l7'"),
        (lambda d, x: gc.attack(d, x, effort="lazy"), "unknown attack effort 'lazy'"),
        (lambda d, x: gc.attack(d, x[:0]), "got none"),
        (lambda d, x: gc.smooth(d, -1.0, calibration=x), "sigma must be a positive number"),
        (lambda d, x: gc.smooth(d, 0.1, calibration=x[:18]), "18 calibration scores cannot hold"),
        (lambda d, x: gc.smooth(d, 0.1, calibration=x, n=3), "3 draws certify nothing"),
        (lambda d, x: gc.smooth(d, 0.1, calibration=x, n=100).certify(x, -1.0), "eps -1.0: expected"),
        (lambda d, x: gc.certify(d.network, x, 0.1), "expected a Detector, got Sequential; make one with Detector.cal"),
        (lambda d, x: gc.attack(d.network, x), "expected a Detector, got Sequential"),
        (lambda d, x: gc.smooth(d.network, 0.1, calibration=x), "expected a Detector, got Sequential"),
        (lambda d, x: gc.certify_sets(d.network, {"id": x}, 0.1, out="unused"), "expected a Detector, got Sequential"),
        (lambda d, x: gc.certify_sets(d, x, 0.1, out="unused"), "no image sets given; name them"),
        (lambda d, x: gc.certify_sets(d, {}, 0.1, out="unused"), "no image sets given"),
        (lambda d, x: gc.certify_sets(d, {"id": "mnist"}, 0.1, out="unused"), "'id': expected a tensor"),
        (lambda d, x: gc.certify_sets(d, {"id": x[..., :2]}, 0.1, out="unused"), r"id: expected shape \(N, 1, 2, 3\)"),
        (lambda d, x: gc.load("nowhere.pt"), "nowhere.pt: no such checkpoint"),
    ],
)
def test_wrong_calls_are_refused_in_one_line(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        call(linear(), images_of(19))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_seed_draws_the_attack():
    detector = gc.Detector.calibrate(hidden(), images_of(40))
    first, again = (gc.attack(detector, images_of(4), seed=5).radius for _ in range(2))
    assert torch.equal(first, again)


# Scores


@pytest.mark.parametrize("score", [gc.Energy(2.0), gc.MaxLogit(), gc.MSP(3.0)], ids=str)
def test_any_score_from_calibration_to_certified_sets(score, tmp_path, quick_attacks):
    """Every stage of a full effort, both sides, with the attack's check of every proof; then another score is refused."""
    inside, outside = images_of(60), images_of(4).square()
    detector = gc.Detector.calibrate(hidden(), inside, score=score, tpr=90)
    network = detector.network
    assert detector.gamma == float(score.value(network(inside.double())).sort().values[54])
    stages = "crown", "lipschitz", "alpha-crown", "branch-and-bound"
    found = gc.certify(detector, inside[:2], [0.01, 0.05], stages=stages, effort="default")
    assert torch.equal(found.score, score.value(network(inside[:2].double())))
    assert bool((found.radius <= found.attack_radius).all() and (found.radius > 0).any())
    bounds = gc.score_bounds(detector, inside[:2], 0.05)
    assert bool((bounds.lower <= found.lower[:, 1] + 1e-9).all() and (found.upper[:, 1] <= bounds.upper + 1e-9).all())
    named = gc.score_bounds(network, inside[:2], 0.05, score=score)
    torch.testing.assert_close(named.upper, bounds.upper)
    slope = gc.lipschitz_bound(detector, inside[:2], 0.05)
    assert bool((gc.lipschitz_bound(network, inside[:2], 0.05, score=score) == slope).all())
    smoothed = gc.smooth(detector, sigma=0.1, calibration=inside, n=100)
    assert smoothed.gamma < 0 and smoothed.certify(outside, 0.05).radius.shape == (4,)
    sets = {"id": inside[:4], "other": outside}
    table = gc.certify_sets(detector, sets, [0.01, 0.05], out=tmp_path, effort="fast")
    assert table.manifest["score"] == str(score)
    right = table["status"] != "misdecided"
    assert bool((table["radius_certified"] <= table["radius_attack"]).all()) and bool(right.any())
    with pytest.raises(gc.InputError, match="holds another run"):
        gc.certify_sets(
            dataclasses.replace(detector, score=gc.Energy()), sets, [0.01, 0.05], out=tmp_path, effort="fast"
        )


def test_what_is_no_score_is_refused():
    with pytest.raises(gc.InputError, match=r"expected a score such as Energy\(\) or MSP\(\), got 'msp'"):
        gc.Detector.calibrate(hidden(), images_of(60), score="msp")
    with pytest.raises(gc.InputError, match="expected a score such as"):
        gc.score_bounds(hidden(), images_of(2), 0.1, score="msp")
