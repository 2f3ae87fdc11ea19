"""Rows in float32: exact arithmetic and float64 evaluations lie inside bounds that are hardly wider than those of float64."""

import itertools
from fractions import Fraction

import pytest
import torch
from torch import nn

from grood_cert.ball import Ball
from grood_cert.bounds import single_rows
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.hidden import Hidden
from grood_cert.bounds.linear_rows import FullRows
from grood_cert.bounds.score import score_bounds
from grood_cert.bounds.single_rows import constants_error, row_terms, sums_in_float32
from grood_cert.networks.activations import LeakyReLU
from grood_cert.networks.capture import capture
from grood_cert.networks.graph import Graph, Node
from grood_cert.networks.operations import (
    AveragePool,
    Convolution,
    Dense,
    Pad,
    Reshape,
    Scale,
    Selection,
    Separable,
    Transposed,
)
from grood_cert.scores import Energy
from tests.bounds.cancellation import SHAPE, cancelling, exactly, excess, points
from tests.bounds.test_crown import NETWORKS, ball_of, built, rows_of
from tests.bounds.test_crown import SHAPE as IMAGE

pytestmark = pytest.mark.skipif(
    not sums_in_float32(torch.device("cpu")), reason="float32 sums of this machine are not known well enough"
)


def single(network, shape, method, graph):
    bounded = NativeNetwork(network, shape, method, graph=graph, single=True)
    assert bounded.single
    return bounded


@pytest.mark.parametrize("method", ["crown-ibp", "crown"])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_rows_enclose_what_exact_arithmetic_gives_where_units_cancel(scale, method):
    rows = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]], dtype=torch.float64)
    for seed in range(4):
        network = cancelling(seed, scale)
        bounded = single(network, SHAPE, method, capture(network, SHAPE))
        image = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for eps in (0.0, 1e-9, 1e-3):
            ball = Ball(image, torch.tensor([eps], dtype=torch.float64), "linf")
            lower, upper = bounded.relax(ball).rows(rows)
            for point in points(ball):
                (one, two), _ = exactly(network, point)
                for value, low, high in zip((one, two, one - two), lower[0].tolist(), upper[0].tolist(), strict=True):
                    assert excess(value, low, high) <= 0


@pytest.mark.parametrize("name", NETWORKS)
def test_points_are_enclosed_by_bounds_as_tight_as_those_of_float64(name):
    """Balls of radius 0 leave nothing but rounding: without margins they enclose nothing."""
    network, graph = built(name)
    narrow, wide = single(network, IMAGE, "crown", graph), NativeNetwork(network, IMAGE, "crown", graph=graph)
    for norm, scale in (("linf", 0.0), ("l2", 1e-7), ("linf", 1.0), ("l1", 1.0)):
        ball, rows = ball_of(norm, scale=scale), rows_of(3)
        lower, upper = narrow.relax(ball).rows(rows)
        with torch.no_grad():
            value = (rows @ network(ball.center).unsqueeze(2)).squeeze(2)
        assert bool(((lower <= value) & (value <= upper)).all())
        low, high = wide.relax(ball).rows(rows)
        assert bool(((upper - lower) - (high - low) <= 2e-3 * (1 + value.abs()) + 2e-3 * (high - low)).all())


def test_scores_use_them():
    network, graph = built("conv")
    ball = ball_of(scale=0.0)
    found = score_bounds(single(network, IMAGE, "crown", graph), ball)
    exact = score_bounds(NativeNetwork(network, IMAGE, "crown", graph=graph), ball)
    assert bool(((found.lower < exact.lower) & (exact.upper < found.upper)).all())
    assert bool((found.upper - found.lower < 1e-3).all())


@pytest.mark.parametrize("last", [nn.Identity(), nn.Sigmoid()], ids=["plain", "sigmoid"])
@pytest.mark.parametrize("size", [1.0, 1e-40, 1e-46])
def test_rows_that_are_no_float32_numbers(size, last):
    """Next to large biases nothing else is rounded."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2), last
    network = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        layers[3].weight.mul_(1e-3)
        layers[3].bias.copy_(
            torch.tensor([1000.0, 2000.0]) if isinstance(last, nn.Identity) else torch.tensor([9.0, 7.0])
        )
    bounded = single(network, SHAPE, "crown", capture(network, SHAPE))
    image = torch.rand(1, *SHAPE, dtype=torch.float64)
    rows = size * torch.tensor([[[0.1, 0.0], [0.7, 0.3], [1 / 3, -0.2], [1e-30, 0.9]]], dtype=torch.float64)
    lower, upper = bounded.relax(Ball(image, torch.zeros(1, dtype=torch.float64), "linf")).rows(rows)
    values = [Fraction(value) for value in network(image)[0].tolist()]
    for row, low, high in zip(rows[0].tolist(), lower[0].tolist(), upper[0].tolist(), strict=True):
        assert excess(sum(Fraction(c) * value for c, value in zip(row, values, strict=True)), low, high) <= 0
    found = score_bounds(bounded, Ball(image, torch.zeros(1, dtype=torch.float64), "linf"))
    value = float(Energy().value(network(image)).detach())
    assert float(found.lower) <= value <= float(found.upper)


@pytest.mark.parametrize("weights", [(1e30, 1e-23, 1e-23), (1e30, 1e12, 1e-42)], ids=str)
def test_what_underflows_is_not_lost(weights):
    """In float32 a row vanishes on the way, or a weight loses its last digits; `capture` would refuse such values."""
    nodes = [Node(None, (), (1,), "image")]
    for weight in weights:
        layer = Dense(torch.full((1, 1), weight, dtype=torch.float64), None)
        nodes.append(Node(layer, (len(nodes) - 1,), (1,), f"layer{len(nodes)}"))
        nodes.append(Node(LeakyReLU(), (len(nodes) - 1,), (1,), f"relu{len(nodes)}"))
    graph, ball = (
        Graph(tuple(nodes[:-1])),
        Ball(torch.full((1, 1), 0.5, dtype=torch.float64), torch.tensor([0.0]), "linf"),
    )
    hidden = Hidden(graph, ball, "crown", single=True)
    last = len(graph.nodes) - 1
    lower, upper = hidden.relaxed.linear(last, torch.ones(1, 1, 1), 2**20)
    value, margin = Fraction(0.5), float(hidden.margin(last))
    for weight in weights:
        value *= Fraction(weight)
    assert not float(lower) <= value <= float(upper)
    assert excess(value, float(lower) - margin, float(upper) + margin) <= 0


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("dilation", "groups"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_as_many_terms_as_there_are(stride, dilation, groups):
    layer = Convolution(torch.ones(4, 2 // groups, 3, 4), None, (stride, 1), (1, 2), (dilation, 1), groups, (30, 30))
    outputs = layer.linear(torch.ones(1, 2, 30, 30)).shape
    assert int(layer.transpose(torch.ones(outputs)).max()) == row_terms(layer)
    pool = AveragePool((3, 4), (stride, 1), (1, 1), (30, 30))
    spread = pool.transpose(torch.ones_like(pool.linear(torch.ones(1, 1, 30, 30)))) * 12
    assert round(float(spread.max())) == row_terms(pool)


def test_terms_of_other_layers():
    assert row_terms(Dense(torch.zeros(3, 7), None)) == 3
    assert row_terms(Separable(torch.zeros(2, 5), torch.zeros(3, 4))) == 5
    assert row_terms(Selection(0, torch.tensor([1, 1, 0]), 2)) == 3
    assert row_terms(Scale(torch.ones(3), None)) == 1
    layer = Convolution(torch.ones(4, 2, 3, 3), None, (1, 1), (1, 1), (1, 1), 1, (8, 8))
    assert row_terms(Transposed(layer)) == 1  # of rows in float64
    assert row_terms(Reshape((4,), (2, 2))) == row_terms(Pad(((0, 1),))) == 0


def test_a_sum_of_constants_holds_however_it_is_taken():
    """One after another, all rounded the same way, with rows that are no numbers of few bits."""
    size = 4096
    constants = torch.full((size,), 0.1, dtype=torch.float64)
    above = (constants + constants_error(constants, size)).float()
    below = (constants - constants_error(constants, size)).float()
    row = torch.full((size,), 1 / 3, dtype=torch.float32)
    exact = sum(Fraction(float(a)) * Fraction(0.1) for a in row)
    for moved, sign in ((above, 1), (below, -1)):
        total = torch.tensor(0.0)
        for product in row * moved:
            total = total + product
        assert sign * (Fraction(float(total)) - exact) >= 0


def test_constants_of_lines_pay_for_their_sums(monkeypatch):
    """The upper bound is attained at a corner; sums in float32 lose as much as they may."""
    size, shape = 4096, (1, 64, 64)
    layers = nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(size, 1)
    network = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        for layer, weight, bias in ((network[0], 1.0, -0.5), (network[3], 0.25, 0.0)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
    bounded = single(network, shape, "crown", capture(network, shape))
    plain = FullRows.dot

    def pessimistic(rows, view):
        exact = plain(rows.to(torch.float64), view.double())
        if rows.values.dtype == torch.float64:
            return exact
        return exact - size * single_rows.UNIT * plain(
            rows.with_values(rows.values.abs()).to(torch.float64), view.abs().double()
        )

    monkeypatch.setattr(FullRows, "dot", pessimistic)
    image = torch.full((1, *shape), 0.5, dtype=torch.float64)
    _, upper = bounded.relax(Ball(image, torch.full((1,), 0.25, dtype=torch.float64), "linf")).rows(
        torch.ones(1, 1, 1).double()
    )
    reached = 0.25 * size * 0.25
    assert reached <= float(upper) <= 1.001 * reached


def test_transposed_layers_stay_float64(monkeypatch):
    """Their rows take a forward convolution, of which nothing is known in float32."""
    torch.manual_seed(0)
    layers = nn.ConvTranspose2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2)
    network = nn.Sequential(*layers).double().eval()
    bounded, kinds = single(network, IMAGE, "crown", capture(network, IMAGE)), []
    plain = Convolution.linear
    monkeypatch.setattr(
        Convolution, "linear", lambda self, values: (kinds.append(values.dtype), plain(self, values))[1]
    )
    lower, upper = bounded.relax(ball_of()).rows(rows_of(3, 2))
    assert set(kinds) == {torch.float64} and bool((lower < upper).all())


@pytest.mark.parametrize("widths", [(3, 50, 1), (200, 1, 4), (2, 2, 2)])
def test_what_is_off_in_a_chain_adds_up(widths):
    """All layers are positive and all errors as large as they may be, and in the same direction."""
    generator = torch.Generator().manual_seed(0)
    sizes, nodes = (7, *widths), [Node(None, (), (7,), "image")]
    image = value = worst = torch.rand(1, 7, dtype=torch.float64, generator=generator)
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        weight = torch.rand(outputs, inputs, dtype=torch.float64, generator=generator)
        layer = Dense(weight, None)
        nodes.append(Node(layer, (number,), (outputs,), f"layer{number}"))
        share = (outputs + 3) * single_rows.UNIT  # as many sums, the weight, the row, its only reader
        value, worst = layer(value), layer(worst) * (1 + share / (1 - share))
    hidden = Hidden(Graph(tuple(nodes)), Ball(image, torch.zeros(1, dtype=torch.float64), "linf"), "crown", single=True)
    off = hidden.margin(len(widths))
    assert bool(((worst - value <= off) & (off <= 1.2 * (worst - value))).all())


def test_nothing_is_proved_where_a_chain_is_too_long(monkeypatch):
    network, graph = built("linear in a row")
    monkeypatch.setattr(single_rows, "_LARGEST_SHARE", 1e-6)
    lower, upper = single(network, IMAGE, "crown", graph).relax(ball_of()).rows(rows_of(3))
    assert bool((lower.isnan() & upper.isnan()).all())


def test_float32_is_not_used_where_products_may_be_rounded(monkeypatch):
    network, graph = built("conv")
    bounded, ball, rows = NativeNetwork(network, IMAGE, "crown", graph=graph, single=True), ball_of(), rows_of(3)
    exact = NativeNetwork(network, IMAGE, "crown", graph=graph).relax(ball).rows(rows)[0]
    relaxation = bounded.relax(ball)  # asked again and again

    def used():
        alike = bool((relaxation.rows(rows)[0] == exact).all())
        assert bounded.single != alike
        return bounded.single

    assert used()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not used()
    assert not NativeNetwork(network, IMAGE, "crown", graph=graph).single
    for name, mode in itertools.product(("ONEDNN", "DNNL"), ("BF16", "any")):
        with monkeypatch.context() as changed:
            changed.setenv(f"{name}_DEFAULT_FPMATH_MODE", mode)
            assert not used()
    with monkeypatch.context() as changed:
        changed.setattr("platform.machine", lambda: "aarch64")
        assert not used()
    with monkeypatch.context() as changed:
        changed.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
        assert not used()
    with monkeypatch.context() as changed:
        changed.setattr(torch.backends.mkldnn, "conv", type("Conv", (), {"fp32_precision": "bf16"}), raising=False)
        assert not used()
    assert used()
