from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from grood_cert import attacks
from grood_cert.attacks import MinimumNorm
from grood_cert.certification.adversary import Adversary
from grood_cert.certification.envelope import Envelope
from grood_cert.certification.settings import Settings
from grood_cert.detector import Detector
from grood_cert.errors import SoundnessError

EPS = (0.1, 0.2)


def detector_of(gamma):
    """f = x_1 + x_2."""
    layer = nn.Linear(2, 1).double()
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(0.0)
    return Detector(nn.Sequential(nn.Flatten(), layer).eval(), gamma, (1, 1, 2))


@pytest.fixture
def adversary():
    """At (0.5, 0.5), accepted, and at (0.1, 0.1), not; attacks reach S = -1 -+ 2 eps and -0.2 -+ 2 eps."""
    images = torch.tensor([0.5, 0.1], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, 1, 1, 2)
    generator = torch.Generator().manual_seed(0)
    found = Adversary(detector_of(-0.5), Settings(EPS), images, "id", torch.tensor([True, False]), generator)
    found.search_grid(generator)
    return found


def envelope(lower, upper):
    """One that holds these bounds of the first image, and true ones of the second."""
    found = Envelope(EPS, torch.tensor([-1.0, -0.2], dtype=torch.float64), -0.5, "id")
    found.lower[:] = torch.tensor([lower, [-0.5, -0.7]])
    found.upper[:] = torch.tensor([upper, [0.1, 0.1]])
    return found


def test_attacks_reach_the_exact_extremes_and_the_exact_radius(adversary):
    for seen, lowest, highest in zip(
        adversary.seen, ([-1.2, -0.4], [-1.4, -0.6]), ([-0.8, 0.0], [-0.6, 0.0]), strict=True
    ):
        assert seen.minimum.tolist() == pytest.approx(lowest, abs=1e-9)
        assert seen.maximum.tolist() == pytest.approx(highest, abs=1e-9)
    assert adversary.radius.tolist() == [pytest.approx(0.25, abs=1e-6), 0.0]  # a wrong decision is broken at x
    assert torch.equal(adversary.points[1], adversary.images[1])


@pytest.mark.parametrize("kind", ["id", "ood"])
def test_fast_searches_only_the_extremes_that_rates_depend_on(kind):
    images = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    gamma = 5.0 if kind == "id" else -5.0  # no ball holds the other decision
    found = Adversary(detector_of(gamma), Settings(EPS, effort="fast"), images, kind, torch.tensor([True]), generator)
    found.search_grid(generator)
    lowest, highest = ([-1.0, -1.0], [-0.8, -0.6]) if kind == "id" else ([-1.2, -1.4], [-1.0, -1.0])
    assert [float(seen.minimum) for seen in found.seen] == pytest.approx(lowest, abs=1e-9)
    assert [float(seen.maximum) for seen in found.seen] == pytest.approx(highest, abs=1e-9)


@pytest.mark.parametrize(("kind", "gamma"), [("id", -0.5), ("ood", -1.5)])
def test_the_grid_finds_what_the_search_of_the_nearest_missed(monkeypatch, kind, gamma):
    """S = -1 moves by 2 eps, so the ball of 0.3 holds points beyond gamma and that of 0.2 none."""
    monkeypatch.setattr(
        attacks,
        "minimum_norm",
        lambda network, images, *rest: MinimumNorm(torch.full((len(images),), math.inf).double(), images.clone()),
    )
    images = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    settings = Settings((0.1, 0.2, 0.3, 0.4), effort="fast")
    found = Adversary(detector_of(gamma), settings, images, kind, torch.tensor([True]), generator)
    found.search_grid(generator)
    assert 0.25 <= float(found.radius) <= 0.3 + 1e-9
    score = -float(found.points.sum())
    assert score > gamma if kind == "id" else score <= gamma


def test_what_attacks_scored_inside_the_envelope_passes(adversary):
    adversary.check_envelope(envelope([-1.21, -1.41], [-0.79, -0.59]))
    adversary.check_envelope(envelope([-math.inf] * 2, [math.inf] * 2))


@pytest.mark.parametrize(
    ("lower", "upper", "eps"),
    [
        ([-1.19, -1.41], [-0.79, -0.59], "0.1"),
        ([-1.21, -1.39], [-0.79, -0.59], "0.2"),
        ([-1.21, -1.41], [-0.81, -0.59], "0.1"),
        ([-1.21, -1.41], [-0.79, -0.61], "0.2"),
    ],
)
def test_a_score_outside_the_envelope_is_raised_on_either_side_and_at_every_eps(adversary, lower, upper, eps):
    with pytest.raises(SoundnessError, match=f"1 points inside the ball of eps {eps} score outside") as caught:
        adversary.check_envelope(envelope(lower, upper))
    point = torch.from_numpy(caught.value.evidence["counterexample"])
    score = -float(point.sum())
    column = EPS.index(float(eps))
    assert score < lower[column] or score > upper[column]  # the evidence shows it


def test_a_radius_beyond_a_counterexample_is_raised(adversary):
    adversary.check_radius("radius", torch.tensor([0.2499, 0.0]).double())
    for radius in ([0.2501, 0.0], [0.2499, 1e-9]):
        with pytest.raises(SoundnessError, match="1 of radius exceed the distance of a counterexample"):
            adversary.check_radius("radius", torch.tensor(radius).double())


def test_only_nearer_points_with_the_other_decision_are_kept(adversary):
    before, point = adversary.radius.clone(), adversary.images.clone()
    for first, flipped, expected in ((0.2, True, 0.25), (0.3, False, 0.25), (0.3, True, 0.2), (0.26, True, 0.2)):
        point[0] = first  # at a distance of 0.5 - first
        adversary.add(torch.tensor([flipped, False]), point)
        assert float(adversary.radius[0]) == pytest.approx(expected, abs=1e-6)
    assert adversary.points[0].flatten().tolist() == [0.3, 0.3] and adversary.radius[1] == before[1] == 0
