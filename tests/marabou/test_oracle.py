"""A part of `python -m tests.marabou`: one detector, every property that intervals leave open."""

import dataclasses
import warnings

import pytest

pytest.importorskip("maraboupy", reason="maraboupy has wheels for Python 3.11 and older only")

from tests.marabou import oracle


def test_marabou_contradicts_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = oracle.cases(0, "dense", 1, tmp_path / "case")
    assert [case.disagreement for case in found if case.disagreement] == []
    assert {case.verdict for case in found} == {"sat", "unsat"} and len(found) >= 5
    assert all(case.certified == (case.verdict == "unsat") for case in found if case.exact)
    assert any(case.certified for case in found) and any(case.attacked for case in found)


AGREED = oracle.Case("a", True, False, False, False, "unsat", False, False, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"bounded": True, "verdict": "sat", "violated": True},
        {"certified": True, "verdict": "sat", "crossed": True},
        {"attacked": True},
        {"verdict": "sat", "outside": True},
        {"certified": True, "verdict": "sat", "violated": True},
    ],
)
def test_a_contradiction_is_called_one(changes):
    assert not AGREED.disagreement
    assert dataclasses.replace(AGREED, **changes).disagreement
