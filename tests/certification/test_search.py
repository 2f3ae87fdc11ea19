from __future__ import annotations

import math

import pytest
import torch

from grood_cert.certification.search import search_radius


def search(function, margin, limit=1.0, precision=1e-3, hint=0.5, low=0.0, high=math.inf, least=0.0):
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
        least=least,
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
    equal, _ = search(lambda eps: torch.full_like(eps, 0.5), [0.5])
    assert equal.tolist() == [0]  # S = gamma is not proved


def test_a_search_ends_where_no_smaller_ball_is_of_interest():
    def exploding(eps):
        return 1e15 * eps

    known, tried = search(exploding, [1.0, 1e13], high=0.5, least=1e-3)  # roots 1e-15 and 0.01
    assert known[0] == 0 and 0.0099 < float(known[1]) < 0.01
    eps = [value for index, value, _ in tried if index == 0]
    assert len(eps) <= 3 and sum(value <= 1e-3 for value in eps) == 1  # where it fails, it ends
    without, all_tried = search(exploding, [1.0, 1e13], high=0.5)
    assert without[1] == known[1] and sum(index == 0 for index, *_ in all_tried) == 12
    _, none = search(exploding, 1.0, high=1e-4, least=1e-3)
    assert not none
