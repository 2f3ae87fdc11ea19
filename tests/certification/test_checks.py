"""What the cascade checks and how it puts its parts together, on networks of two pixels."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

from grood_cert.attacks import MinimumNorm
from grood_cert.ball import Ball
from grood_cert.bounds import engines
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.score import ScoreBounds, score_bounds
from grood_cert.certification import adversary, stages
from grood_cert.certification.cascade import Cascade
from grood_cert.certification.outcomes import Outcome
from grood_cert.certification.settings import Settings
from grood_cert.detector import Detector
from grood_cert.errors import SoundnessError
from grood_cert.lipschitz.bound import LipschitzBounds
from grood_cert.networks.builder import Builder
from grood_cert.scores import energy

SHAPE = 1, 1, 2
IMAGE = torch.tensor([0.4, 0.6], dtype=torch.float64).reshape(1, *SHAPE)


def linear():
    """f = x_1 + x_2, so S falls by 2 eps at most, and rises by as much."""
    layer = nn.Linear(2, 1).double()
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(0.0)
    return nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False)


def curved():
    torch.manual_seed(3)
    layers = nn.Flatten(), nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3)
    network = nn.Sequential(*layers).double().eval().requires_grad_(False)
    network[3].weight.mul_(8)
    return network


def by_hand(network, shape):
    """The graph of such a network, which spares exporting it."""
    builder = Builder(shape)
    value = builder.reshape(builder.image, (2,))
    for layer in list(network)[1:]:
        weighted = isinstance(layer, nn.Linear)
        value = builder.linear(value, layer.weight, layer.bias) if weighted else builder.relu(value)
    return builder.graph(value)


@pytest.fixture(autouse=True)
def without_export(monkeypatch):
    monkeypatch.setattr(engines, "capture", by_hand)


def cascade_of(network, gamma, **settings):
    return Cascade(
        Detector(network, gamma, SHAPE), Settings(**{"eps": (0.0,), "engine": "native", "effort": "fast", **settings})
    )


def run(cascade, images=IMAGE, kind="id"):
    return cascade.certify(images, kind, torch.Generator().manual_seed(0))


def around(network, kind, distance=0.05):
    """A gamma at some distance from S(x), on the right side."""
    return float(energy(network(IMAGE))) + (distance if kind == "id" else -distance)


def words(found):
    return [outcome.word for outcome in found.outcomes[0]]


# Decisions


def test_a_score_on_gamma_is_accepted_and_never_certified():
    found = run(cascade_of(linear(), -1.0, eps=(0.0, 0.1), stages=("crown",)))
    assert found.score.tolist() == [-1.0] and found.accepted.tolist() == [1] and found.right.tolist() == [True]
    assert words(found) == ["undecided", "attack"]
    assert found.radius_certified.tolist() == [0.0]
    found = run(cascade_of(linear(), -1.0, eps=(0.0, 0.1), stages=("crown",)), kind="ood")
    assert words(found) == ["misdecision", "misdecision"] and found.right.tolist() == [False]


@pytest.mark.parametrize("kind", ["id", "ood"])
def test_a_wrong_decision_is_no_certificate_of_any_stage(kind):
    """All stages would prove the decision that is made, which is the wrong one."""
    gamma = around(linear(), "ood" if kind == "id" else "id", 0.5)
    found = run(cascade_of(linear(), gamma, eps=(0.0, 0.1), stages=("ibp", "crown"), per_logit=True), kind=kind)
    assert words(found) == ["misdecision"] * 2 and Outcome.numbered(int(found.stage)) is Outcome.MISDECISION
    for name in ("radius_certified", "radius_certified_per_logit", "radius_attack", "radius_gradient_norm_estimate"):
        assert getattr(found, name).tolist() == [0.0], name


@pytest.mark.parametrize("kind", ["id", "ood"])
def test_bounds_attacks_and_outcomes_of_a_linear_score_are_exact(kind):
    """gamma lies 0.5 away: the radius is 0.25, what lies below is proved, what lies above is attacked."""
    gamma = around(linear(), kind, 0.5)
    settings = {"eps": (0.1, 0.24, 0.26, 0.3), "stages": ("ibp", "crown"), "precision": 1e-9, "effort": "default"}
    found = run(cascade_of(linear(), gamma, **settings), kind=kind)
    moved = 2 * torch.tensor(settings["eps"], dtype=torch.float64)
    for name, expected in (("s_lb", -1 - moved), ("s_ub", -1 + moved)):
        torch.testing.assert_close(getattr(found, name)[0], expected, rtol=0, atol=1e-9)
    for name, expected in (("s_attack_min", -1 - moved), ("s_attack_max", -1 + moved)):
        torch.testing.assert_close(getattr(found, name)[0], expected, rtol=0, atol=1e-9)
    assert words(found) == ["ibp", "ibp", "attack", "attack"]
    assert float(found.radius_certified) == pytest.approx(0.25, abs=1e-6) == float(found.radius_attack)


def test_where_nothing_is_proved_bounds_are_nan(monkeypatch):
    nothing = torch.tensor([math.nan]).double()
    monkeypatch.setattr(stages, "score_bounds", lambda *arguments: ScoreBounds(nothing, nothing, nothing, nothing))
    found = run(cascade_of(linear(), -0.5, eps=(0.1, 0.3), stages=("crown",)))
    assert bool(torch.isnan(found.s_lb).all()) and bool(torch.isnan(found.s_ub).all())
    assert words(found) == ["undecided", "attack"]


@pytest.mark.parametrize("kind", ["id", "ood"])
def test_the_per_logit_radius_is_proved_by_each_logit_alone(kind):
    network = curved()
    gamma = around(network, kind)
    found = run(cascade_of(network, gamma, stages=("crown",), per_logit=True, precision=1e-4), kind=kind)
    alone, joint = found.radius_certified_per_logit, found.radius_certified
    assert 0 < float(alone) < 0.95 * float(joint)
    bounded = NativeNetwork(network, SHAPE, "crown", graph=by_hand(network, SHAPE))
    for share, proved in ((1.0, True), (1.001, False)):
        bounds = score_bounds(bounded, Ball(IMAGE, share * alone, "linf"))
        low, high = float(bounds.lower_per_logit), float(bounds.upper_per_logit)
        assert (high < gamma if kind == "id" else low > gamma) == proved


@pytest.mark.parametrize("kind", ["id", "ood"])
@pytest.mark.parametrize("stage", ["lipschitz", "alpha-crown", "branch-and-bound"])
def test_an_exception_of_a_refining_stage_proves_nothing(monkeypatch, kind, stage):
    def fails(*arguments, **options):
        raise RuntimeError("boom")

    for name in ("local_lipschitz", "optimised_bounds", "branch_and_bound"):
        monkeypatch.setattr(stages, name, fails)
    network = curved()
    settings = {"eps": (0.001, 0.02, 0.2), "precision": 1e-3}
    cascade = cascade_of(network, around(network, kind), stages=("ibp", stage), **settings)
    found = run(cascade, kind=kind)
    plain = run(cascade_of(network, around(network, kind), stages=("ibp",), **settings), kind=kind)
    assert words(found) == words(plain) and cascade.failures == {"RuntimeError: boom": sum(cascade.failures.values())}
    for name in ("radius_certified", "s_lb", "s_ub"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), rtol=0, atol=0, equal_nan=True)
    assert not torch.nan_to_num(found.radius_lipschitz_path).any()


# Lies


def test_the_network_must_be_the_captured_one_at_the_images():
    network = linear()
    cascade = cascade_of(network, -0.5)
    network.register_forward_hook(lambda module, inputs, out: out + 1e-3 * (inputs[0] == IMAGE).all().to(out))
    with pytest.raises(SoundnessError, match="disagree on 1 images"):
        run(cascade)


def test_the_network_must_be_the_captured_one_where_attacks_end():
    network = linear()
    cascade = cascade_of(network, -0.5)
    network.register_forward_hook(
        lambda module, inputs, out: out + 1e-3 * (inputs[0] - 0.5).abs().amax().gt(0.2).to(out)
    )
    with pytest.raises(SoundnessError, match="disagree on 1 images"):
        run(cascade)


def half_way(state_gamma, network):
    """A number between S(x) and gamma: it holds at x, and claims all balls."""
    return (float(energy(network(IMAGE))) + state_gamma) / 2


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_bounds_that_attacked_scores_leave_are_caught(monkeypatch, side):
    """No decision falls and no radius is wrong: only the scores betray bounds that stand still."""

    def still(bounded, ball, *rest):
        true, here = score_bounds(bounded, ball, *rest), energy(bounded.network(ball.center))
        lower, upper = (here, true.upper) if side == "lower" else (true.lower, here)
        return ScoreBounds(lower, upper, true.lower_per_logit, true.upper_per_logit)

    monkeypatch.setattr(stages, "score_bounds", still)
    with pytest.raises(SoundnessError, match="score outside their proved bounds"):
        run(cascade_of(linear(), 5.0, eps=(0.1, 0.2), stages=("crown",), effort="default"))


@pytest.mark.parametrize("kind", ["id", "ood"])
@pytest.mark.parametrize("stage", ["lipschitz", "alpha-crown", "branch-and-bound"])
def test_a_refining_stage_that_claims_too_much_is_caught_by_the_attack(monkeypatch, quick_attacks, kind, stage):
    """What it says holds on the grid, which is the image alone: only the radius can betray it."""
    network = curved()
    gamma = around(network, kind)
    claim = half_way(gamma, network)

    def constant(graph, ball, *arguments, **options):
        tiny = torch.full_like(ball.eps, 1e-3)
        return LipschitzBounds({}, tiny, ("none",), None)

    def optimised(graph, ball, *arguments, **options):
        return torch.full_like(ball.eps, claim)

    def branched(graph, ball, *arguments, **options):
        no = torch.zeros_like(ball.eps, dtype=torch.bool)
        return stages.Branched(torch.full_like(ball.eps, claim), ~no, no, ball.center, no.long(), no)

    monkeypatch.setattr(stages, "local_lipschitz", constant)
    monkeypatch.setattr(stages, "optimised_bounds", optimised)
    monkeypatch.setattr(stages, "branch_and_bound", branched)
    effort = "max" if stage == "branch-and-bound" else "fast"  # which bisects often enough
    cascade = cascade_of(network, gamma, effort=effort, stages=("ibp", stage), precision=1e-4)
    with pytest.raises(SoundnessError, match="exceed the distance of a counterexample"):
        run(cascade, kind=kind)


@pytest.mark.parametrize("joint", [True, False])
def test_a_linear_stage_that_claims_too_much_is_caught_by_the_attack(monkeypatch, joint):
    """Joint bounds lie, or those of each logit alone."""
    claim = torch.tensor([-0.75]).double()

    def boastful(bounded, ball, *rest):
        true = score_bounds(bounded, ball, *rest)
        both = (claim, true.upper_per_logit) if joint else (true.upper, claim)
        return ScoreBounds(true.lower, both[0], true.lower_per_logit, both[1])

    monkeypatch.setattr(stages, "score_bounds", boastful)
    name = "radius_certified" if joint else "radius_certified_per_logit"
    with pytest.raises(SoundnessError, match=f"1 of {name} exceed"):
        run(cascade_of(linear(), -0.5, stages=("crown",), per_logit=True))


# Branch and bound


def answers(monkeypatch, timed_out=False, refuted=False, point=IMAGE, bound=math.nan):
    """Branch and bound says so of every ball; what it was asked is listed."""
    asked = []

    def branched(graph, ball, gamma, side, **options):
        asked.append(options)
        no = torch.zeros_like(ball.eps, dtype=torch.bool)
        points = point.expand_as(ball.center)
        return stages.Branched(torch.full_like(ball.eps, bound), no, no | refuted, points, no.long(), no | timed_out)

    monkeypatch.setattr(stages, "branch_and_bound", branched)
    return asked


@pytest.mark.parametrize("kind", ["id", "ood"])
def test_a_timeout_of_branch_and_bound_proves_nothing_and_is_told(monkeypatch, kind):
    network = curved()
    gamma = around(network, kind)
    plain = run(cascade_of(network, gamma, eps=(1e-4, 0.001), stages=("ibp",)), kind=kind)
    radius = float(plain.radius_certified)
    middle = (radius + float(plain.radius_attack)) / 2
    assert 0 < radius < middle < float(plain.radius_attack)
    settings = {"eps": (radius / 2, middle, 1.0), "time_limit": 1000.0}
    plain = run(cascade_of(network, gamma, eps=settings["eps"], stages=("ibp",)), kind=kind)
    asked = answers(monkeypatch, timed_out=True)
    found = run(cascade_of(network, gamma, stages=("ibp", "branch-and-bound"), **settings), kind=kind)
    assert words(plain) == ["ibp", "undecided", "attack"] and words(found) == ["ibp", "timeout", "attack"]
    for name in ("radius_certified", "s_lb", "s_ub"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), rtol=0, atol=0, equal_nan=True)
    assert asked and all(0 < options["seconds"] <= 1000 for options in asked)


def test_without_a_time_limit_branch_and_bound_has_none(monkeypatch):
    network = curved()
    asked = answers(monkeypatch)
    run(cascade_of(network, around(network, "id"), stages=("ibp", "branch-and-bound")))
    assert asked and all(options["seconds"] is None for options in asked)


def test_a_counterexample_of_branch_and_bound_is_one(monkeypatch):
    """The attack finds nothing; branch and bound meets a point with the other decision, or says that it met none."""

    def blind(network, images, *rest):
        return MinimumNorm(torch.full((len(images),), torch.inf).double(), images.clone())

    monkeypatch.setattr(adversary.attacks, "minimum_norm", blind)
    point = IMAGE - 0.3  # S = -0.4 > gamma
    for refuted in (True, False):
        answers(monkeypatch, refuted=refuted, point=point)
        found = run(cascade_of(linear(), -0.5, stages=("ibp", "branch-and-bound"), precision=1e-3))
        assert float(found.radius_attack) == (pytest.approx(0.3) if refuted else math.inf)
        assert torch.equal(found.points[0], point[0] if refuted else IMAGE[0])


# Time


@pytest.mark.parametrize(("now", "late"), [(2.5, False), (3.5, True)])
def test_the_time_limit_is_for_every_sample_of_a_batch(monkeypatch, now, late):
    """Three images at a second each: refining stages begin until three seconds are over."""
    network = curved()
    cascade = cascade_of(network, around(network, "id"), eps=(0.001,), stages=("ibp", "alpha-crown"), time_limit=1.0)
    ticks = iter([0.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks, now))
    asked = []
    monkeypatch.setattr(stages, "optimised_bounds", lambda graph, ball, *a, **o: asked.append(0) or ball.eps * math.nan)
    run(cascade, IMAGE.expand(3, *SHAPE))
    assert bool(asked) == (not late)
