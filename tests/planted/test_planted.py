"""A flip that attacks miss is in the ball: no engine, stage, constant or radius may say otherwise."""

import pytest
import torch

from grood_cert.certification.outcomes import STAGES
from tests.planted.check import ENGINES, bound_faults, stage_faults
from tests.planted.nets import flips, is_planted, load

PLANTED = load()
NAMES = [one.recipe.name for one in PLANTED]
CHOSEN = PLANTED[::7]  # for what takes long


def test_there_are_both_kinds_norms_and_smooth_networks():
    assert len(PLANTED) >= 20 and len(set(NAMES)) == len(NAMES)
    for name, values in {"kind": ("id", "ood"), "norm": ("linf", "l2"), "architecture": ("mlp", "conv")}.items():
        assert set(values) <= {getattr(one.recipe, name) for one in PLANTED}
    assert {one.recipe.activation for one in PLANTED} - {"relu", "leaky"}


@pytest.mark.parametrize("planted", PLANTED, ids=NAMES)
def test_no_bound_excludes_the_planted_point(planted):
    assert is_planted(planted) and bool(flips(planted, planted.point))
    assert bound_faults(planted, ENGINES if any(planted is one for one in CHOSEN) else ("native",)) == []


@pytest.mark.parametrize("planted", CHOSEN, ids=[one.recipe.name for one in CHOSEN])
def test_no_stage_certifies_the_ball_of_a_planted_point(planted):
    finding = stage_faults(planted, STAGES)
    assert finding.faults == [] and finding.radius < planted.distance


def test_a_claim_that_is_wrong_would_be_seen(monkeypatch):
    """Scores that no bound knows of are outside the bounds."""
    planted = PLANTED[0]
    monkeypatch.setattr(type(planted.detector), "scores", lambda self, points: torch.full((1,), 1e6))
    assert bound_faults(planted, ("native",))
