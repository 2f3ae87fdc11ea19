from __future__ import annotations

import dataclasses
import math

import pytest

from grood_cert.certification.outcomes import LINEAR, STAGES
from grood_cert.certification.settings import EFFORTS, Settings
from grood_cert.errors import InputError


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
def test_settings_are_checked(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(Settings(eps=(0.1,)), **changes).check((1, 8, 8))
    dataclasses.replace(Settings(eps=(0.1, 7.9)), norm="l2").check((1, 8, 8))


def test_a_cascade_runs_its_stages_in_their_order():
    assert Settings((0.1,), stages=("branch-and-bound", "crown", "ibp")).cascade == ("ibp", "crown", "branch-and-bound")
    assert Settings((0.1,), stages=("branch-and-bound", "crown", "ibp")).linear == ("ibp", "crown")
    assert Settings((0.1,), effort="max").cascade == STAGES and Settings((0.1,), effort="max").linear == LINEAR
    assert all(set(effort.stages) <= set(STAGES) for effort in EFFORTS.values())
