from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from grood_cert.errors import InputError
from grood_cert.interop import worst_case
from grood_cert.interop.worst_case import worst_case_scores
from grood_cert.scores import MSP, Energy, MaxLogit


@pytest.mark.parametrize("score", [Energy(), Energy(3.0), MaxLogit(), MSP()], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_point_of_the_ball_is_beyond_the_bound(detector, inside, norm, score):
    detector = dataclasses.replace(detector, score=score)
    x = inside[0][:8].double()
    eps = 0.05
    low, high = (worst_case_scores(detector, x, eps, bound, norm) for bound in ("lower", "upper"))
    clean = worst_case_scores(detector, x)
    assert torch.equal(clean, detector.scores(x)) and bool(((low < clean) & (clean < high)).all())
    steps = torch.randn(500, 1, *x.shape[1:], generator=torch.Generator().manual_seed(0)).double()
    steps = steps.sign() * eps if norm == "linf" else steps / steps.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1) * eps
    points = (x + steps).clamp(0, 1)
    scores = detector.scores(points.flatten(0, 1)).view(500, len(x))
    assert bool(((low <= scores) & (scores <= high)).all())


def test_nothing_proved_is_the_worst_of_all(detector, inside, monkeypatch):
    nan = torch.full((3,), torch.nan).double()
    monkeypatch.setattr(worst_case, "score_bounds", lambda *_: SimpleNamespace(lower=nan, upper=nan))
    x = inside[0][:3]
    assert worst_case_scores(detector, x, 0.1).tolist() == [-torch.inf] * 3
    assert worst_case_scores(detector, x, 0.1, "upper").tolist() == [torch.inf] * 3


def test_settings_that_make_no_sense(detector, inside):
    for arguments, message in (
        ((0.1, "middle"), "unknown bound 'middle'; use 'lower' or 'upper'"),
        ((-0.1,), "eps"),
        ((0.1, "lower", "l7"), "norm"),
    ):
        with pytest.raises(InputError, match=message):
            worst_case_scores(detector, inside[0], *arguments)
    with pytest.raises(InputError, match=r"all must lie in \[0, 1\]"):
        worst_case_scores(detector, inside[0] * 2)
