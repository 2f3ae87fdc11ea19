from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from grood_cert import detector
from grood_cert.ball import Ball
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.engines import ENGINES
from grood_cert.bounds.score import ScoreBounds, score_bounds
from grood_cert.certification import cascade
from grood_cert.certification.cascade import OUTCOMES, Certifier, Envelope, Settings, search_radius
from grood_cert.data import experiment_of
from grood_cert.detector import Detector
from grood_cert.errors import InputError, SoundnessError
from grood_cert.runs import saving as runs
from grood_cert.scores import energy

LINEAR = ("ibp", "crown")


@pytest.fixture(scope="module")
def loaded(model):
    return detector.load(model)


@pytest.fixture(scope="module")
def images(loaded):
    return experiment_of(loaded.origin.recipe).test.images


def certify(loaded, settings, images, kind="id"):
    return Certifier(loaded, settings).certify(images, kind, runs.generator(settings.seed, 0))


def detector_of(network, shape, gamma):
    return Detector(network.double().eval().requires_grad_(False), gamma, shape)


def one_logit(weight, bias=0.0):
    layer = nn.Linear(len(weight), 1)
    with torch.no_grad():
        layer.weight.copy_(weight[None])
        layer.bias.fill_(bias)
    return nn.Sequential(nn.Flatten(), layer).double()


# Closed form


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("kind", ["id", "ood"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stage", ["crown", "crown-ibp"])
def test_radius_of_one_linear_logit_is_exact(norm, kind, stage, engine):
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


# The envelope


def test_an_envelope_counts_each_bound_for_all_smaller_balls():
    def tensors(*values):
        return [torch.tensor(value, dtype=torch.float64) for value in values]

    envelope = Envelope((0.1, 0.2, 0.3), *tensors([-3.0, -3.0]), -1.0, "id")
    both = torch.arange(2)
    envelope.record(both, *tensors([0.25, 0.05], [-9.0, -4.0], [-2.0, -2.5]), "ibp")
    assert envelope.upper.tolist() == [[-2, -2, math.inf], [math.inf] * 3]
    envelope.record(both, *tensors([0.1, 0.3], [math.nan] * 2, [-2.5, -1.0]), "crown")
    assert envelope.upper.tolist() == [[-2.5, -2, math.inf], [-1, -1, -1]]
    assert envelope.lower[:, 0].tolist() == [-9, -math.inf]
    assert envelope.radius.tolist() == [0.25, 0.05]  # S_ub = gamma proves nothing
    assert [[OUTCOMES[code] for code in row] for row in envelope.outcome.tolist()] == [
        ["ibp", "ibp", "undecided"],
        ["undecided"] * 3,
    ]


# Real detectors


def test_each_stage_decides_and_is_named(loaded, images):
    """Whatever stages run, what is certified is inside the attack radius; each one added proves at least as much."""
    before = torch.zeros(4).double()
    chosen = images[:4]
    for stages in (("ibp",), ("ibp", "crown"), ("ibp", "crown", "alpha-crown"), cascade.STAGES):
        settings = Settings(eps=(0.001, 0.03, 0.3), stages=stages, engine="native")
        got = certify(loaded, settings, chosen)
        radius = got["radius_certified"]
        assert bool((radius <= got["radius_attack"]).all()) and bool((radius >= before * (1 - 1e-2)).all())
        before = radius
        used = {OUTCOMES[code] for code in got["outcome"].flatten().tolist()}
        assert used <= {*stages, "attack", "misdecision", "undecided"}
        decided = got["outcome"][got["right"]]
        proved = (decided >= 1) & (decided <= len(cascade.STAGES))
        eps = torch.tensor(settings.eps).double()
        assert torch.equal(proved, (eps <= radius[got["right"], None]))
        attacked = [OUTCOMES[code] == "attack" for code in decided[:, 2].tolist()]
        assert all(attacked)  # at eps 0.3 every decision is broken
    assert float((before[got["right"]] / got["radius_attack"][got["right"]]).median()) > 0.75
    assert OUTCOMES[int(got["stage"][got["right"]][0])] in ("alpha-crown", "branch-and-bound", "lipschitz")


def test_a_radius_of_refining_stages_is_proved_by_enumerating_a_small_net():
    """One hidden layer of three ReLUs in the plane: a grid of 10^6 points per ball finds no crossing."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double().requires_grad_(False)
    images = torch.full((1, 1, 1, 2), 0.5).double()
    steps = torch.linspace(-1, 1, 801).double()
    square = torch.cartesian_prod(steps, steps)
    for kind, offset in (("id", 0.01), ("ood", -0.01)):
        gamma = float(energy(network(images))) + offset
        settings = Settings(eps=(0.01,), effort="max", precision=1e-3)
        got = certify(detector_of(copy.deepcopy(network), (1, 1, 2), gamma), settings, images, kind)
        radius = float(got["radius_certified"])
        assert 0 < radius <= float(got["radius_attack"])
        score = energy(network((images.flatten() + radius * square).reshape(-1, 1, 1, 2)))
        assert bool((score < gamma).all() if kind == "id" else (score > gamma).all())
        beyond = energy(network((images.flatten() + 1.03 * radius * square).reshape(-1, 1, 1, 2)))
        assert bool((beyond > gamma).any() if kind == "id" else (beyond <= gamma).any())  # and it is nearly the largest


def test_a_radius_takes_few_bounds(loaded, images, monkeypatch):
    """1 % relative precision with no grid to start from: at most 8 bounds a sample in the median."""
    counts = torch.zeros(24)
    real = Certifier._bound

    def counted(self, batch, index, eps, method):
        counts[index] += 1
        return real(self, batch, index, eps, method)

    monkeypatch.setattr(Certifier, "_bound", counted)
    got = certify(loaded, Settings(eps=(1e-9,), stages=("crown",), engine="native"), images[:24])
    counts -= 1  # the grid's own
    certified = got["radius_certified"] > 0
    assert float(counts[certified].median()) <= 8
    larger = torch.where(certified, got["radius_certified"] * 1.012, 0.0)
    ball = Ball(images[:24].double(), larger, "linf")
    bounds = score_bounds(NativeNetwork(loaded.network, (1, 8, 8), "crown"), ball)
    assert float((bounds.upper[certified] < loaded.gamma).double().mean()) < 0.1  # 1.2 % more is not proved


def test_skipping_what_is_decided_costs_no_radius(loaded, images):
    """Effort "fast" bounds fewer balls of the grid; its radii end at the same precision all the same."""
    settings = Settings(eps=(0.01, 0.03, 0.05, 0.08, 0.12, 0.2), stages=LINEAR, engine="native")
    fast, whole = (
        certify(loaded, dataclasses.replace(settings, effort=name), images[:24]) for name in ("fast", "default")
    )
    assert bool((fast["radius_certified"] >= whole["radius_certified"] * (1 - 2 * settings.precision)).all())


def test_engines_agree(loaded, images):
    settings = Settings(eps=(0.01, 0.03), stages=("ibp", "crown"))
    one, other = (
        certify(loaded, dataclasses.replace(settings, engine=name), images[:6]) for name in ("native", "auto_lirpa")
    )
    for name in ("s_lb", "s_ub"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one["radius_certified"], other["radius_certified"], rtol=2e-2, atol=0)


def test_batches_do_not_matter(loaded, images):
    """Formal columns are the same whichever samples share a batch (attacks draw random starts)."""
    settings = Settings(eps=(0.02, 0.05), stages=LINEAR)
    together = certify(loaded, settings, images[:3])
    for index in range(3):
        alone = certify(loaded, settings, images[index : index + 1])
        for name in ("s_lb", "s_ub"):
            torch.testing.assert_close(alone[name], together[name][index : index + 1], rtol=0, atol=1e-9)


def test_few_balls_together_prove_the_same(loaded, images, monkeypatch):
    """A limit on the balls bounded at once, and memory that runs out, change nothing but the rounding."""
    settings = Settings(eps=(0.02, 0.05), stages=(*LINEAR, "alpha-crown"), engine="native")
    whole = certify(loaded, settings, images[:6])
    limited = Certifier(loaded, settings)
    limited.together = 4
    real = cascade.score_bounds

    def poor(bounded, ball, method=None):
        if len(ball.eps) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(bounded, ball, method)

    found = [limited.certify(images[:6], "id", runs.generator(0, 0))]
    monkeypatch.setattr(cascade, "score_bounds", poor)
    starved = Certifier(loaded, settings)
    found.append(starved.certify(images[:6], "id", runs.generator(0, 0)))
    assert not limited.failures and not starved.failures
    for got in found:
        for name in ("s_lb", "s_ub", "radius_certified"):
            torch.testing.assert_close(got[name], whole[name], rtol=1e-6, atol=1e-9)


def test_a_time_limit_leaves_balls_undecided(loaded, images):
    settings = Settings(eps=(0.001, 0.08), stages=(*LINEAR, "alpha-crown", "branch-and-bound"), engine="native")
    got = certify(loaded, dataclasses.replace(settings, time_limit=1e-6), images[:6])
    plain = certify(loaded, dataclasses.replace(settings, stages=LINEAR), images[:6])
    torch.testing.assert_close(got["radius_certified"], plain["radius_certified"], rtol=0, atol=0)
    names = [OUTCOMES[code] for code in got["outcome"].flatten().tolist()]
    assert "timeout" in names and "undecided" not in names


def test_eps_zero_and_the_whole_box(loaded, images):
    got = certify(loaded, Settings(eps=(0.0, 1.0), stages=LINEAR), images[:3])
    for name in ("s_lb", "s_ub", "s_attack_min", "s_attack_max"):
        torch.testing.assert_close(got[name][:, 0], got["score"], rtol=1e-9, atol=1e-9)
    assert bool((got["s_ub"][:, 1] > loaded.gamma).all())


def test_a_radius_beyond_the_attack_is_caught(loaded, images, monkeypatch):
    """Bounds that are right on the grid but prove everything elsewhere: only the radii betray them."""

    def boastful(bounded, ball, method=None):
        bounds = score_bounds(bounded, ball, method)
        if float(ball.eps[0]) == 0.01:
            return bounds
        everywhere = (loaded.score(ball.center) + loaded.gamma) / 2  # true on the grid, false near the attack radius
        return ScoreBounds(bounds.lower, everywhere, bounds.lower_per_logit, everywhere)

    monkeypatch.setattr(cascade, "score_bounds", boastful)
    with pytest.raises(SoundnessError, match="exceed the distance of a counterexample"):
        certify(loaded, Settings(eps=(0.01,), stages=LINEAR), images[:4])


@pytest.mark.parametrize("name", ["optimised_bounds", "branch_and_bound"])
def test_a_refining_stage_that_lies_is_caught(loaded, images, monkeypatch, name):
    def boastful(graph, ball, *arguments, **options):
        proved = torch.full_like(ball.eps, loaded.gamma - 1)
        if name == "optimised_bounds":
            return proved
        no = torch.zeros(len(proved), dtype=torch.bool)
        return cascade.Branched(proved, ~no, no, ball.center, no.long(), no)

    monkeypatch.setattr(cascade, name, boastful)
    stage = "alpha-crown" if name == "optimised_bounds" else "branch-and-bound"
    with pytest.raises(SoundnessError):
        certify(loaded, Settings(eps=(0.01, 0.2), effort="max", stages=("crown", stage), engine="native"), images[:4])


@pytest.mark.parametrize("failure", [AssertionError("boom"), RuntimeError("shapes"), KeyError("x"), MemoryError()])
def test_an_exception_in_the_engine_means_not_certified(loaded, images, monkeypatch, failure):
    def fails(bounded, ball, method=None):
        raise failure

    monkeypatch.setattr(cascade, "score_bounds", fails)
    certifier = Certifier(loaded, Settings(eps=(0.01, 0.02), stages=LINEAR))
    got = certifier.certify(images[:4], "id", runs.generator(0, 0))
    assert got["radius_certified"].tolist() == [0.0] * 4
    assert bool(torch.isnan(got["s_lb"]).all()) and bool(torch.isnan(got["s_ub"]).all())
    ((message, count),) = certifier.failures.items()
    assert message.startswith(type(failure).__name__) and count >= 8


def test_interruption_is_not_swallowed(loaded, monkeypatch):
    def interrupted(bounded, ball, method=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(cascade, "score_bounds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        certify(loaded, Settings(eps=(0.01,)), torch.zeros(1, 1, 8, 8))


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
        ({"effort": "heroic"}, "unknown effort 'heroic'; use one of fast, default, max"),
        ({"stages": ("magic",)}, "unknown stage 'magic'; use some of ibp, crown-ibp, crown, lipschitz"),
        ({"stages": ("alpha-crown",)}, "the stages need one of ibp, crown-ibp, crown"),
        ({"engine": "steam"}, "unknown engine 'steam'; use one of auto, native, auto_lirpa"),
        ({"time_limit": -1.0}, "time limit must be 0"),
        ({"precision": 0.0}, "precision must lie between 0 and 1"),
        ({"batch_size": 0}, "batch size must be 1 or more"),
    ],
)
def test_settings_are_checked(loaded, changes, message):
    with pytest.raises(InputError, match=message):
        Certifier(loaded, dataclasses.replace(Settings(eps=(0.1,)), **changes))
    dataclasses.replace(Settings(eps=(0.1, 7.9)), norm="l2").check((1, 8, 8))


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
