from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from grood_cert import detector
from grood_cert.ball import Ball
from grood_cert.certification import stages, state
from grood_cert.certification.cascade import Cascade
from grood_cert.certification.outcomes import STAGES, Outcome
from grood_cert.certification.settings import EFFORTS, Settings
from grood_cert.data import experiment_of
from grood_cert.lipschitz.bound import local_lipschitz
from grood_cert.runs.batches import generator

pytestmark = pytest.mark.usefixtures("quick_attacks", "captured_once")
LINEAR = ("ibp", "crown")
WORK = {"lipschitz": "local_lipschitz", "alpha-crown": "optimised_bounds", "branch-and-bound": "branch_and_bound"}


@pytest.fixture(scope="module")
def loaded(mlp_model):
    return detector.load(mlp_model)


@pytest.fixture(scope="module")
def images(loaded):
    return experiment_of(loaded.origin.recipe).test.images


def certify(loaded, settings, images, kind="id"):
    return Cascade(loaded, settings).certify(images, kind, generator(settings.seed, 0))


@pytest.fixture
def plain(loaded, images):
    """What the linear stages alone prove."""
    return certify(loaded, settings_of(), images[:4])


def settings_of(*refining, eps=(0.001, 0.08), **changes):
    return Settings(eps=eps, stages=(*LINEAR, *refining), engine="native", effort="fast", **changes)


@pytest.fixture
def undecided(loaded, images):
    """A grid with an eps at which the linear stages and the attack leave one of the first four images."""
    found = certify(loaded, settings_of(), images[:4])
    proved, attacked = found.radius_certified, found.radius_attack
    place = int(torch.where(proved > 0, attacked / proved, 0).argmax())
    return 0.001, float(proved[place] + attacked[place]) / 2


def same(one, other, *names):
    """The named columns are equal, NaN where NaN."""
    for name in names:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True)


def test_the_table_holds_every_stage_in_its_order(loaded):
    assert tuple(stage.name for stage in Cascade(loaded, Settings((0.1,), effort="max")).stages) == STAGES


# What goes wrong is no proof


@pytest.mark.parametrize("failure", [AssertionError("boom"), RuntimeError("shapes"), KeyError("x"), MemoryError()])
def test_an_exception_in_the_engine_means_not_certified(loaded, images, monkeypatch, failure):
    def fails(bounded, ball, method=None, *rest):
        raise failure

    monkeypatch.setattr(stages, "score_bounds", fails)
    cascade = Cascade(loaded, Settings(eps=(0.01, 0.02), stages=LINEAR, effort="fast"))
    got = cascade.certify(images[:4], "id", generator(0, 0))
    assert got.radius_certified.tolist() == [0.0] * 4
    assert bool(torch.isnan(got.s_lb).all()) and bool(torch.isnan(got.s_ub).all())
    ((message, count),) = cascade.failures.items()
    assert message.startswith(type(failure).__name__) and count >= 8


@pytest.mark.parametrize(
    ("stage", "failure"), [*((stage, RuntimeError("boom")) for stage in WORK), ("alpha-crown", MemoryError())]
)
def test_an_exception_in_a_refining_stage_adds_nothing(loaded, images, plain, monkeypatch, stage, failure):
    def fails(*arguments, **options):
        raise failure

    monkeypatch.setattr(stages, WORK[stage], fails)
    cascade = Cascade(loaded, settings_of(stage))
    got = cascade.certify(images[:4], "id", generator(0, 0))
    same(got, plain, "radius_certified", "stage", "outcome", "s_lb", "s_ub", "radius_attack")
    assert (
        not torch.nan_to_num(got.radius_lipschitz_fixed_point).any()
        and not torch.nan_to_num(got.radius_lipschitz_path).any()
    )
    ((message, count),) = cascade.failures.items()
    assert message.startswith(type(failure).__name__) and count >= 4


def test_an_exception_costs_only_the_balls_it_was_met_on(loaded, images, monkeypatch):
    """Lipschitz bounds that fail on every other call still give what the others prove."""
    monkeypatch.setattr(stages, "_PATH_POINTS", 4)
    calls = itertools.count()

    def fails(*arguments, **options):
        if next(calls) % 2:
            raise RuntimeError("boom")
        return local_lipschitz(*arguments, **options)

    whole = certify(loaded, settings_of("lipschitz"), images[:4])
    monkeypatch.setattr(stages, "local_lipschitz", fails)
    got = certify(loaded, settings_of("lipschitz"), images[:4])
    for name in ("radius_lipschitz_fixed_point", "radius_lipschitz_path"):
        assert bool((0 < getattr(got, name)[got.right]).all())
    assert bool((got.radius_lipschitz_path <= whole.radius_lipschitz_path).all())


# Memory


def test_lipschitz_bounds_are_halved_where_memory_runs_out(loaded, images, monkeypatch):
    """What fits keeps its radii; a sample that never fits is not proved and takes nobody with it."""
    monkeypatch.setattr(stages, "_PATH_POINTS", 3)
    whole = certify(loaded, settings_of("lipschitz"), images[:5])
    sizes = []

    def poor(graph, ball, *arguments, **options):
        sizes.append(len(ball.eps))
        if len(ball.eps) > 2 or bool((ball.center == images[4]).flatten(1).all(1).any()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return local_lipschitz(graph, ball, *arguments, **options)

    monkeypatch.setattr(stages, "local_lipschitz", poor)
    cascade = Cascade(loaded, settings_of("lipschitz"))
    got = cascade.certify(images[:5], "id", generator(0, 0))
    assert {5, 3, 2, 1} >= set(sizes) and 2 in sizes
    for name, precision in (("radius_lipschitz_fixed_point", 1e-3), ("radius_lipschitz_path", 1e-9)):
        torch.testing.assert_close(getattr(got, name)[:4], getattr(whole, name)[:4], rtol=precision, atol=0)
        assert getattr(got, name)[4] == 0 < getattr(whole, name)[4]
    ((message, _),) = cascade.failures.items()
    assert message.startswith("OutOfMemoryError")


@pytest.mark.parametrize("stage", WORK)
def test_no_stage_bounds_more_balls_at_once_than_allowed(loaded, images, monkeypatch, stage):
    sizes, real = [], getattr(stages, WORK[stage])
    monkeypatch.setitem(EFFORTS, "fast", dataclasses.replace(EFFORTS["fast"], steps=5, nodes=12, rounds=2))

    def watched(graph, ball, *arguments, **options):
        sizes.append(len(ball.eps))
        return real(graph, ball, *arguments, **options)

    monkeypatch.setattr(stages, WORK[stage], watched)
    settings = settings_of(stage, precision=0.02)
    whole = certify(loaded, settings, images[:2])
    assert max(sizes) == 2
    sizes.clear()
    limited = Cascade(loaded, settings, together=1).certify(images[:2], "id", generator(0, 0))
    assert max(sizes) == 1
    torch.testing.assert_close(limited.radius_certified, whole.radius_certified, rtol=1e-6, atol=1e-9)


# Time


@pytest.mark.parametrize("stage", WORK)
def test_no_stage_begins_a_proof_after_its_time(loaded, images, undecided, monkeypatch, stage):
    def never(*arguments, **options):
        raise AssertionError("time is up")

    monkeypatch.setattr(stages, WORK[stage], never)
    cascade = Cascade(loaded, settings_of(stage, eps=undecided, time_limit=1e-6))
    got = cascade.certify(images[:6], "id", generator(0, 0))
    same(got, certify(loaded, settings_of(eps=undecided), images[:6]), "radius_certified", "stage", "s_lb", "s_ub")
    assert not cascade.failures
    names = {outcome.word for outcomes in got.outcomes for outcome in outcomes}
    assert "timeout" in names and "undecided" not in names and stage not in names


def test_lipschitz_keeps_what_it_proved_in_time(loaded, images, undecided, monkeypatch):
    """The clock stands still until the sixth bound, then it is past any deadline."""
    calls = itertools.count(1)
    clock = [0.0]

    def counted(*arguments, **options):
        if next(calls) == 6:
            clock[0] = 1e9
        return local_lipschitz(*arguments, **options)

    whole = certify(loaded, settings_of("lipschitz", eps=undecided), images[:4])
    monkeypatch.setattr(state.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stages, "local_lipschitz", counted)
    got = certify(loaded, settings_of("lipschitz", eps=undecided, time_limit=100.0), images[:4])
    assert next(calls) == 7  # no bound was begun after that
    assert bool((got.radius_lipschitz_fixed_point <= whole.radius_lipschitz_fixed_point).all())
    assert bool((got.radius_lipschitz_fixed_point[got.right] > 0).all())
    assert not got.radius_lipschitz_path.any()  # its bounds come after
    assert Outcome.TIMEOUT in set(itertools.chain(*got.outcomes))


# Lipschitz constants


@pytest.mark.parametrize("kind", ["id", "ood", "noise"])
def test_the_constant_of_a_fixed_head_proves_nothing_about_ood(loaded, images, monkeypatch, kind):
    """S lies below its tangent in f, not above it: p0 . f bounds S from above only."""
    heads = []

    def tiny(graph, ball, *arguments, **options):
        found = local_lipschitz(graph, ball, *arguments, **options)
        heads.append(found.fixed_head is not None)
        return dataclasses.replace(found, fixed_head=found.auto / 2 if found.fixed_head is not None else None)

    monkeypatch.setattr(stages, "local_lipschitz", tiny)
    cascade = Cascade(loaded, settings_of("lipschitz"))
    (stage,) = (stage for stage in cascade.stages if stage.name == "lipschitz")
    eps = torch.full((3,), 0.01).double()
    ball = Ball(images[:3].double(), eps, "linf")
    expected = local_lipschitz(stage.graph, ball, stage.hidden(ball), ("jacobian-crown",)).auto
    standing = state.State(ball.center, kind, "linf", None, None, None, None, float("inf"), None)
    got = stage.constant(standing, torch.arange(3), eps)
    assert torch.equal(got, expected / 2 if kind == "id" else expected)
    assert set(heads) == {kind == "id"}
