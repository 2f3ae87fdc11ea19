"""Products of operator norms against closed forms, on graphs written by hand."""

from __future__ import annotations

import math

import pytest
import torch

from grood_cert.ball import Ball
from grood_cert.bounds.hidden import preactivations
from grood_cert.lipschitz import product
from grood_cert.lipschitz.product import active_product_bound, operator_norm, product_bound, torus_norm
from grood_cert.networks.activations import SiLU, Tanh
from grood_cert.networks.builder import Builder
from grood_cert.networks.operations import Convolution, Separable

NORMS = "linf", "l2", "l1"
DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def column(kernel, length, padding, dilation=1):
    weight = torch.tensor(kernel, dtype=torch.float64).reshape(1, 1, -1, 1)
    return Convolution(weight, None, (1, 1), (padding, 0), (dilation, 1), 1, (length, 1))


@pytest.mark.parametrize("length", range(1, 9))
def test_the_torus_is_large_enough_for_zero_padding(length):
    """(1, -1, 1) over a series is the matrix tridiag(1, -1, 1): its norm is 1 + 2 cos(pi / (n + 1))."""
    exact = 1 + 2 * math.cos(math.pi / (length + 1))
    assert exact * (1 - 1e-12) <= torus_norm(column((1, -1, 1), length, 1)) <= 3 * (1 + 1e-9)


@pytest.mark.parametrize("length", range(3, 9))
def test_the_torus_knows_holes(length):
    """With holes of 2 the series falls apart into its even and its odd entries."""
    half = -(-length // 2)
    exact = 1 + 2 * math.cos(math.pi / (half + 1))
    assert exact * (1 - 1e-12) <= torus_norm(column((1, -1, 1), length, 2, 2)) <= 3 * (1 + 1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_large_maps_are_bounded_without_unrolling(norm, monkeypatch):
    """The same numbers as above; rows and columns of 3 entries of size 1 each."""
    monkeypatch.setattr(product, "_UNROLLED_ENTRIES", 0)
    exact = 1 + math.sqrt(2) if norm == "l2" else 3.0
    found = operator_norm(column((1, -1, 1), 3, 1), (1, 3, 1), norm)
    assert exact <= found <= 3.0 * (1 + 1e-9)
    wide = Separable(row(3.0, 4.0), row(6.0, 8.0))  # of norm 5 * 10 in l_2; the only row sums up to 98, columns to 32
    found = operator_norm(wide, (1, 2, 2), norm)
    assert found == pytest.approx({"linf": 98.0, "l2": 50.0, "l1": 32.0}[norm], rel=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_one_linear_layer_has_the_dual_norm_of_its_longest_row(norm):
    builder = Builder((1, 1, 2))
    weight = torch.tensor([[3.0, -4.0], [1.0, 1.0]], dtype=torch.float64)
    graph = builder.graph(builder.linear(builder.reshape(builder.image, (2,)), weight, None))
    assert product_bound(graph, norm) == pytest.approx(float(weight[0].norm(p=DUAL[norm])), rel=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_an_entry_in_two_windows_counts_twice(norm):
    """Windows (1, 2) and (2, 3) of three pixels, their maxima added: the middle one counts twice."""
    builder = Builder((1, 3, 1))
    pooled = builder.max_pool(builder.image, (2, 1), (1, 1))
    graph = builder.graph(builder.linear(builder.reshape(pooled, (2,)), row(1.0, 1.0), None))
    assert product_bound(graph, norm) >= 2.0 * (1 - 1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("apart", [False, True])
def test_branches_add_up_unless_they_are_apart(norm, apart):
    """tanh(x) + tanh(x) has slope 2 at 0; (tanh(x), tanh(x)) one of slope 1 in each of two logits."""
    builder = Builder((1, 1, 1))
    value = builder.reshape(builder.image, (1,))
    first, second = (builder.activation(builder.scale(value, sign), Tanh()) for sign in (1.0, 1.0 + 1e-9))
    joined = builder.concatenation([first, second], 0) if apart else builder.sum(first, second)
    exact = 1.0 if apart else 2.0  # of one logit
    bound = product_bound(builder.graph(joined), norm)
    assert exact <= bound <= {"linf": 1.0, "l2": math.sqrt(2), "l1": 2.0}[norm] * exact * (1 + 1e-6)


def test_slopes_that_fall_and_slopes_above_one_have_their_size():
    """SiLU has slope 1.0998 at 2.4 and -0.0998 at -2.4."""
    builder = Builder((1, 1, 1))
    value = builder.scale(builder.reshape(builder.image, (1,)), 1.0, -2.4 - 0.5)  # from -2.9 to -1.9
    graph = builder.graph(builder.activation(value, SiLU()))
    assert product_bound(graph, "linf") >= 1.0998393194
    ball = Ball(torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), 0.4, "linf")
    assert 0.0998393194 <= float(active_product_bound(graph, preactivations(graph, ball), "linf")) < 0.1


def test_units_that_may_switch_count_as_if_on():
    """relu(x - 1/4) + relu(x - 3/4) on [0.3, 0.8]: the first is on, the second may be, so the slope reaches 2."""
    builder = Builder((1, 1, 1))
    both = builder.linear(builder.reshape(builder.image, (1,)), torch.ones(2, 1).double(), -row(0.25, 0.75)[0])
    graph = builder.graph(builder.linear(builder.relu(both), row(1.0, 1.0), None))
    center = torch.full((1, 1, 1, 1), 0.55, dtype=torch.float64)
    for eps, expected in ((0.25, 2.0), (0.1, 1.0), (0.01, 1.0)):
        found = float(active_product_bound(graph, preactivations(graph, Ball(center, eps, "linf")), "linf"))
        assert expected * (1 - 1e-9) <= found <= expected * (1 + 1e-9), eps


def test_what_is_not_proved_has_no_active_product():
    builder = Builder((1, 1, 1))
    graph = builder.graph(builder.relu(builder.reshape(builder.image, (1,))))
    ball = Ball(torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), 0.1, "linf")
    crossed = [(torch.ones(1, 1).double(), -torch.ones(1, 1).double())]
    assert math.isnan(float(active_product_bound(graph, preactivations(graph, ball, given=crossed), "linf")))
