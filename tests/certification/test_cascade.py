from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from grood_cert import detector
from grood_cert.attacks import AttackEffort
from grood_cert.ball import Ball
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.engines import ENGINES
from grood_cert.bounds.score import ScoreBounds, score_bounds
from grood_cert.certification import stages
from grood_cert.certification.cascade import Cascade
from grood_cert.certification.outcomes import STAGES, Outcome
from grood_cert.certification.settings import EFFORTS, Settings
from grood_cert.data import experiment_of
from grood_cert.detector import Detector
from grood_cert.errors import InputError, SoundnessError
from grood_cert.runs.batches import generator
from grood_cert.scores import energy

pytestmark = pytest.mark.usefixtures("quick_attacks", "captured_once")
CHEAP = ("ibp", "crown")


@pytest.fixture(scope="module")
def loaded(mlp_model):
    return detector.load(mlp_model)


@pytest.fixture(scope="module")
def images(loaded):
    return experiment_of(loaded.origin.recipe).test.images


def certify(loaded, settings, images, kind="id"):
    return Cascade(loaded, settings).certify(images, kind, generator(settings.seed, 0))


def detector_of(network, shape, gamma):
    return Detector(network.double().eval().requires_grad_(False), gamma, shape)


def one_logit(weight, bias=0.0):
    layer = nn.Linear(len(weight), 1)
    with torch.no_grad():
        layer.weight.copy_(weight[None])
        layer.bias.fill_(bias)
    return nn.Sequential(nn.Flatten(), layer).double()


# Closed form


WAYS = [*(("crown", engine) for engine in ENGINES), ("crown-ibp", "native")]
SIDES = [("linf", "id"), ("l2", "ood"), ("l1", "id"), ("linf", "ood"), ("l2", "id"), ("l1", "ood")]


@pytest.mark.parametrize(
    ("stage", "engine", "norm", "kind"),  # every side by the plain way, half of them by each other one
    [
        (*way, *side)
        for place, way in enumerate(WAYS)
        for side in (SIDES if way == ("crown", "native") else SIDES[place % 2 :: 2])
    ],
)
def test_radius_of_one_linear_logit_is_exact(stage, engine, norm, kind):
    """K = 1, f = w.x + b: the certified radius is |S - gamma| / ||w||_q, to 1e-9."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(9, generator=generator).double()
    images = 0.45 + 0.1 * torch.rand(7, 1, 3, 3, generator=generator).double()
    network = one_logit(weight, 0.2)
    score = energy(network(images)).detach()
    gamma = float(score.max() + 0.01 if kind == "id" else score.min() - 0.01)
    settings = Settings((0.01, 0.1), norm, stages=(stage,), engine=engine, precision=1e-10, per_logit=True)
    got = certify(detector_of(network, (1, 3, 3), gamma), settings, images, kind)
    exact = (score - gamma).abs() / weight.norm(p={"linf": 1, "l2": 2, "l1": torch.inf}[norm])
    assert bool((exact < 0.4).all())  # no face of the pixel box in reach
    for name in ("radius_certified", "radius_certified_per_logit"):
        torch.testing.assert_close(getattr(got, name), exact, rtol=0, atol=1e-9)
        assert bool((getattr(got, name) <= exact).all())
    torch.testing.assert_close(got.radius_gradient_norm_estimate, exact, rtol=1e-9, atol=0)
    torch.testing.assert_close(got.radius_attack, exact, rtol=1e-3, atol=0)


# Real detectors


def test_each_stage_decides_and_is_named(loaded, images, monkeypatch):
    """Whatever stages run, what is certified is inside the attack radius; each one added proves at least as much."""
    monkeypatch.setitem(EFFORTS, "default", dataclasses.replace(EFFORTS["default"], nodes=16, rounds=2))
    monkeypatch.setattr(stages, "_PATH_POINTS", 4)
    before = torch.zeros(2).double()
    chosen = images[:2]
    for chosen_stages in (("ibp",), ("ibp", "crown"), ("ibp", "crown", "alpha-crown"), STAGES):
        settings = Settings(eps=(0.001, 0.03, 0.3), stages=chosen_stages, engine="native")
        got = certify(loaded, settings, chosen)
        radius = got.radius_certified
        assert bool((radius <= got.radius_attack).all()) and bool((radius >= before * (1 - 1e-2)).all())
        before = radius
        used = {Outcome.numbered(code).word for code in got.outcome.flatten().tolist()}
        assert used <= {*chosen_stages, "attack", "misdecision", "undecided"}
        decided = got.outcome[got.right]
        proved = (decided >= 1) & (decided <= len(STAGES))
        eps = torch.tensor(settings.eps).double()
        assert torch.equal(proved, (eps <= radius[got.right, None]))
        attacked = [Outcome.numbered(code).word == "attack" for code in decided[:, 2].tolist()]
        assert all(attacked)  # at eps 0.3 every decision is broken
    assert float((before[got.right] / got.radius_attack[got.right]).median()) > 0.75
    assert Outcome.numbered(int(got.stage[got.right][0])).word in ("alpha-crown", "branch-and-bound", "lipschitz")


def test_a_radius_of_refining_stages_is_proved_by_enumerating_a_small_net(monkeypatch):
    """One hidden layer of three ReLUs in the plane: a grid of 10^6 points per ball finds no crossing."""
    attacked = dataclasses.replace(EFFORTS["max"], attack=AttackEffort.preset("max"))
    monkeypatch.setitem(EFFORTS, "max", attacked)
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double().requires_grad_(False)
    images = torch.full((1, 1, 1, 2), 0.5).double()
    steps = torch.linspace(-1, 1, 801).double()
    square = torch.cartesian_prod(steps, steps)
    for kind, offset in (("id", 0.01), ("ood", -0.01)):
        gamma = float(energy(network(images))) + offset
        settings = Settings(eps=(0.01,), effort="max", precision=1e-3)
        got = certify(detector_of(copy.deepcopy(network), (1, 1, 2), gamma), settings, images, kind)
        radius = float(got.radius_certified)
        assert 0 < radius <= float(got.radius_attack)
        score = energy(network((images.flatten() + radius * square).reshape(-1, 1, 1, 2)))
        assert bool((score < gamma).all() if kind == "id" else (score > gamma).all())
        beyond = energy(network((images.flatten() + 1.03 * radius * square).reshape(-1, 1, 1, 2)))
        assert bool((beyond > gamma).any() if kind == "id" else (beyond <= gamma).any())  # and it is nearly the largest


def test_a_radius_takes_few_bounds(loaded, images, monkeypatch):
    """1 % relative precision with no grid to start from: at most 8 bounds a sample in the median."""
    counts = torch.zeros(24)
    real = stages.Linear.bound

    def counted(self, state, index, eps):
        counts[index] += 1
        return real(self, state, index, eps)

    monkeypatch.setattr(stages.Linear, "bound", counted)
    got = certify(loaded, Settings(eps=(1e-9,), stages=("crown",), engine="native"), images[:24])
    counts -= 1  # the grid's own
    certified = got.radius_certified > 0
    assert float(counts[certified].median()) <= 8
    larger = torch.where(certified, got.radius_certified * 1.012, 0.0)
    ball = Ball(images[:24].double(), larger, "linf")
    bounds = score_bounds(NativeNetwork(loaded.network, (1, 8, 8), "crown"), ball)
    assert float((bounds.upper[certified] < loaded.gamma).double().mean()) < 0.1  # 1.2 % more is not proved


def test_skipping_what_is_decided_costs_no_radius(loaded, images):
    """Effort "fast" bounds fewer balls of the grid; its radii end at the same precision all the same."""
    settings = Settings(eps=(0.01, 0.03, 0.05, 0.08, 0.12, 0.2), stages=CHEAP, engine="native")
    fast, whole = (
        certify(loaded, dataclasses.replace(settings, effort=name), images[:12]) for name in ("fast", "default")
    )
    assert bool((fast.radius_certified >= whole.radius_certified * (1 - 2 * settings.precision)).all())


def test_engines_agree(loaded, images):
    settings = Settings(eps=(0.01, 0.03), stages=("ibp", "crown"))
    one, other = (
        certify(loaded, dataclasses.replace(settings, engine=name), images[:6]) for name in ("native", "auto_lirpa")
    )
    for name in ("s_lb", "s_ub"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.radius_certified, other.radius_certified, rtol=2e-2, atol=0)


def test_batches_do_not_matter(loaded, images):
    """Formal columns are the same whichever samples share a batch (attacks draw random starts)."""
    settings = Settings(eps=(0.02, 0.05), stages=CHEAP)
    together = certify(loaded, settings, images[:3])
    for index in range(3):
        alone = certify(loaded, settings, images[index : index + 1])
        for name in ("s_lb", "s_ub"):
            expected = getattr(together, name)[index : index + 1]
            torch.testing.assert_close(getattr(alone, name), expected, rtol=0, atol=1e-9)


def test_few_balls_together_prove_the_same(loaded, images, monkeypatch):
    """A limit on the balls bounded at once, and memory that runs out, change nothing but the rounding."""
    settings = Settings(eps=(0.02, 0.05), stages=(*CHEAP, "alpha-crown"), engine="native")
    whole = certify(loaded, settings, images[:6])
    limited = Cascade(loaded, settings, together=4)
    real = stages.score_bounds

    def poor(bounded, ball, method=None, *rest):
        if len(ball.eps) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(bounded, ball, method)

    found = [limited.certify(images[:6], "id", generator(0, 0))]
    monkeypatch.setattr(stages, "score_bounds", poor)
    starved = Cascade(loaded, settings)
    found.append(starved.certify(images[:6], "id", generator(0, 0)))
    assert not limited.failures and not starved.failures
    for got in found:
        for name in ("s_lb", "s_ub", "radius_certified"):
            torch.testing.assert_close(getattr(got, name), getattr(whole, name), rtol=1e-6, atol=1e-9)


def test_eps_zero_and_the_whole_box(loaded, images):
    got = certify(loaded, Settings(eps=(0.0, 1.0), stages=CHEAP), images[:3])
    for name in ("s_lb", "s_ub", "s_attack_min", "s_attack_max"):
        torch.testing.assert_close(getattr(got, name)[:, 0], got.score, rtol=1e-9, atol=1e-9)
    assert bool((got.s_ub[:, 1] > loaded.gamma).all())


def test_a_radius_beyond_the_attack_is_caught(loaded, images, monkeypatch):
    """Bounds that are right on the grid but prove everything elsewhere: only the radii betray them."""

    def boastful(bounded, ball, method=None, *rest):
        bounds = score_bounds(bounded, ball, method)
        if float(ball.eps[0]) == 0.01:
            return bounds
        everywhere = (loaded.scores(ball.center) + loaded.gamma) / 2  # true on the grid, false near the attack radius
        return ScoreBounds(bounds.lower, everywhere, bounds.lower_per_logit, everywhere)

    monkeypatch.setattr(stages, "score_bounds", boastful)
    with pytest.raises(SoundnessError, match="exceed the distance of a counterexample"):
        certify(loaded, Settings(eps=(0.01,), stages=CHEAP), images[:4])


@pytest.mark.parametrize("name", ["optimised_bounds", "branch_and_bound"])
def test_a_refining_stage_that_lies_is_caught(loaded, images, monkeypatch, name):
    def boastful(graph, ball, *arguments, **options):
        proved = torch.full_like(ball.eps, loaded.gamma - 1)
        if name == "optimised_bounds":
            return proved
        no = torch.zeros(len(proved), dtype=torch.bool)
        return stages.Branched(proved, ~no, no, ball.center, no.long(), no)

    monkeypatch.setattr(stages, name, boastful)
    stage = "alpha-crown" if name == "optimised_bounds" else "branch-and-bound"
    with pytest.raises(SoundnessError):
        certify(loaded, Settings(eps=(0.01, 0.2), stages=("crown", stage), engine="native"), images[:4])


def test_interruption_is_not_swallowed(loaded, monkeypatch):
    def interrupted(bounded, ball, method=None, *rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "score_bounds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        certify(loaded, Settings(eps=(0.01,)), torch.zeros(1, 1, 8, 8))


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
        Cascade(dataclasses.replace(loaded, network=network), Settings(eps=(0.1,)))


def test_settings_that_make_no_sense_are_refused(loaded):
    with pytest.raises(InputError, match="no eps given"):
        Cascade(loaded, Settings(eps=()))
    with pytest.raises(InputError, match="at least one ball"):
        Cascade(loaded, Settings(eps=(0.1,)), together=0)


def test_outcomes_are_sentences(loaded, images):
    got = certify(loaded, Settings(eps=(0.001, 0.3), stages=CHEAP, engine="native"), images[:4])
    found = {outcome for outcomes in got.outcomes for outcome in outcomes}
    assert "broken: an attack found a point of the ball with the other decision" in set(map(str, found))
    for outcomes, radius in zip(got.outcomes, got.radius_certified.tolist(), strict=True):
        assert [outcome.certifies for outcome in outcomes] == [radius >= 0.001, radius >= 0.3]
    assert all(Outcome.of(outcome.word) is outcome and Outcome.numbered(outcome) is outcome for outcome in Outcome)
    assert {outcome.word for outcome in Outcome if outcome.certifies} == {*STAGES, "envelope"}


def test_a_network_that_is_no_longer_what_was_captured_ends_the_run(loaded, images):
    """Proofs are about the graph: a network that has changed since must not be attacked in its place."""
    changed = dataclasses.replace(loaded, network=copy.deepcopy(loaded.network))
    cascade = Cascade(changed, Settings(eps=(0.01,), effort="fast"))
    with torch.no_grad():
        changed.network[-1].bias[0] += 1e-6
    with pytest.raises(SoundnessError, match="the network and the graph that was captured of it disagree on 2 images"):
        cascade.certify(images[:2], "id", torch.Generator().manual_seed(0))
