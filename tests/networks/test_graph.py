"""Graphs as plain data, and bounds of pre-activations against hand arithmetic, sampling and auto_LiRPA."""

import math

import pytest
import torch
from torch import nn

from grood_cert.ball import Ball
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.hidden import logit_rows, preactivations
from grood_cert.errors import InputError
from grood_cert.lipschitz.bound import best_of, local_lipschitz
from grood_cert.networks.activations import ELU, LeakyReLU, Sigmoid
from grood_cert.networks.architectures import build
from grood_cert.networks.capture import capture
from grood_cert.networks.graph import Graph, Node
from grood_cert.networks.operations import (
    Convolution,
    Dense,
    MaxPool,
    Pad,
    Permute,
    Reshape,
    Scale,
    Selection,
)
from grood_cert.networks.rebuild import Rebuilt
from tests.networks import layered
from tests.networks.layered import NAMES


def ball_of(images, eps):
    return Ball(images, torch.full((len(images),), eps, dtype=torch.float64), "linf")


def test_intervals_and_crown_by_hand():
    # z = (x1 + x2, x1 - x2), x in [.4, .6]^2: z in [.8, 1.2] x [-.2, .2]; f = relu(z1) + relu(z2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double().eval()
    network.requires_grad_(False)
    network[1].weight[:] = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    network[1].bias[:] = 0.0
    network[3].weight[:], network[3].bias[:] = 1.0, 0.0
    graph = capture(network, (1, 1, 2))
    ball = ball_of(torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), 0.1)
    for source, logits in (("ibp", (0.8, 1.4)), ("crown", (0.8, 1.3))):
        known = preactivations(graph, ball, source)
        torch.testing.assert_close(known.inputs[0][0], torch.tensor([[0.8, -0.2]]).double())
        torch.testing.assert_close(known.inputs[0][1], torch.tensor([[1.2, 0.2]]).double())
        # crown, upper: z1 + (z2 + .2) / 2 = 1.5 x1 + .5 x2 + .1 <= 1.3; lower: z1 + 0 with u = -l
        assert float(known.logits[0]) == pytest.approx(logits[0])
        assert float(known.logits[1]) == pytest.approx(logits[1])


def test_crown_agrees_with_auto_lirpa():
    torch.manual_seed(0)
    network = build("conv-small", (1, 8, 8), 4, [0.3], [0.4], width=2).double().eval().requires_grad_(False)
    images = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    ball = ball_of(images, 0.02)
    known = preactivations(capture(network, (1, 8, 8)), ball)
    rows = torch.eye(4, dtype=torch.float64).expand(4, -1, -1)
    lower, upper = LirpaNetwork(network, (1, 8, 8), "crown").relax(ball).rows(rows)
    torch.testing.assert_close(known.logits[0], lower, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(known.logits[1], upper, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bounds_on_top_of_auto_lirpa_are_those_on_top_of_our_crown(norm):
    torch.manual_seed(0)
    network = build("conv-small", (1, 8, 8), 4, [0.3], [0.4], width=2).double().eval().requires_grad_(False)
    graph = capture(network, (1, 8, 8))
    ball = Ball(torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0.0, 0.01, 0.05]).double(), norm)
    relaxation = LirpaNetwork(network, (1, 8, 8), "crown").relax(ball)
    rows = relaxation.rows(logit_rows(4).expand(3, -1, -1))
    known = preactivations(graph, ball, "ibp", given=relaxation.preactivations(), given_rows=rows)
    assert bool(known.proved.all())
    theirs, ours = local_lipschitz(graph, ball, known), local_lipschitz(graph, ball)
    for name, bound in ours.methods.items():
        torch.testing.assert_close(theirs.methods[name], bound, rtol=1e-3, atol=0.0)


def test_a_graph_survives_as_plain_data_that_opens_without_running_code(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.PReLU(3), nn.MaxPool2d(2, ceil_mode=True), nn.GELU()]
    graph = capture(nn.Sequential(*layers, nn.Flatten(), nn.Linear(27, 3)).eval(), (1, 5, 5))
    torch.save(graph.to_plain(), tmp_path / "graph.pt")
    again = Graph.from_plain(torch.load(tmp_path / "graph.pt", weights_only=True))
    images = torch.rand(4, 1, 5, 5, dtype=torch.float64)
    assert torch.equal(again(images), graph(images))
    assert [node.name for node in again.nodes] == [node.name for node in graph.nodes]
    torch.testing.assert_close(Rebuilt(again)(images), graph(images), rtol=1e-12, atol=1e-12)


def broken(plain, case):
    node = next(item for item in plain if item["operation"] and item["operation"]["kind"] == "Dense")
    if case == "kind":
        node["operation"]["kind"] = "eval"
    elif case == "shape":
        node["shape"] = [4]
    elif case == "order":
        node["inputs"] = [len(plain)]
    elif case == "field":
        node["operation"]["code"] = "print()"
    elif case == "nan":
        node["operation"]["weight"][0, 0] = torch.nan
    elif case == "image":
        plain.pop(0)
    else:
        plain.clear()
    return plain


@pytest.mark.parametrize("case", ["kind", "shape", "order", "field", "nan", "image", "empty"])
def test_what_is_no_graph_is_refused(case):
    plain = capture(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval(), (1, 2, 2)).to_plain()
    with pytest.raises(InputError, match="no graph of a network"):
        Graph.from_plain(broken(plain, case))


def plain_of(operation, source, target):
    """A file of one operation and a linear head."""
    head = Dense(torch.ones(2, math.prod(target), dtype=torch.float64), None)
    nodes = [Node(None, (), source, "image"), Node(operation, (0,), target, "it")]
    nodes += [Node(Reshape(target, (math.prod(target),)), (1,), (math.prod(target),), "flat")]
    return Graph((*nodes, Node(head, (2,), (2,), "head"))).to_plain()


ONE = torch.ones((), dtype=torch.float64)
INDEX = torch.tensor([0, 1])
KERNEL = torch.ones(1, 1, 1, 1, dtype=torch.float64)
ODD = {
    "slope": (LeakyReLU(1.5), (1, 4, 4), (1, 4, 4)),
    "alpha": (ELU(-1.0), (1, 4, 4), (1, 4, 4)),
    "a claimed derivative": (Sigmoid(steepest=0.0), (1, 4, 4), (1, 4, 4)),
    "input size": (Convolution(KERNEL, None, (1, 1), (0, 0), (1, 1), 1, (5, 4)), (1, 4, 4), (1, 4, 4)),
    "pool size": (MaxPool((2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1), (6, 4)), (1, 4, 4), (1, 2, 2)),
    "shapes": (Reshape((4, 4), (16,)), (1, 4, 4), (16,)),
    "a split batch": (Reshape((1, 4, 4), (8,)), (1, 4, 4), (8,)),
    "order": (Permute((0, 0, 1)), (1, 4, 4), (1, 1, 4)),
    "index": (Selection(1, INDEX + 3, 4), (1, 4, 4), (1, 2, 4)),
    "negative index": (Selection(1, INDEX - 1, 4), (1, 4, 4), (1, 2, 4)),
    "length": (Selection(1, INDEX, 5), (1, 4, 4), (1, 2, 4)),
    "a growing factor": (Scale(ONE.expand(3, 1, 1).clone(), None), (1, 4, 4), (3, 4, 4)),
    "a bias over the batch": (Scale(ONE, ONE.expand(3, 1, 4, 4).clone()), (1, 4, 4), (1, 4, 4)),
    "huge": (Pad(((0, 0), (0, 0), (0, 10**9))), (1, 4, 4), (1, 4, 10**9 + 4)),
    "huge and hidden": (Pad(((0, 0), (0, 0), (0, 10**12))), (1, 4, 4), (1, 4, 4)),
    "a number for a bias": (Scale(ONE, torch.nan), (1, 4, 4), (1, 4, 4)),
    "whole numbers": (Scale(INDEX[1], None), (1, 4, 4), (1, 4, 4)),
    "complex": (Scale(ONE.to(torch.complex128), None), (1, 4, 4), (1, 4, 4)),
}


@pytest.mark.parametrize("case", ODD)
def test_operations_whose_proofs_would_not_be_about_them_are_refused(case):
    operation, source, target = ODD[case]
    if case.startswith("huge"):
        plain = plain_of(LeakyReLU(), source, source)
        plain[1] |= {"shape": list(target), "operation": {"kind": "Pad", "margins": operation.margins, "bias": None}}
    else:
        plain = plain_of(operation, source, target)
    with pytest.raises(InputError, match="no graph of a network"):
        Graph.from_plain(plain)


def test_a_small_file_cannot_ask_for_much_memory():
    plain = plain_of(Scale(ONE, None), (1, 4, 4), (1, 4, 4))
    plain[1]["operation"]["factor"] = ONE.expand(10**6, 10**6)
    with pytest.raises(InputError, match="larger than its numbers"):
        Graph.from_plain(plain)


def small_graph():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 3)).eval()
    return capture(network, (1, 4, 4)), ball_of(torch.rand(3, 1, 4, 4, dtype=torch.float64), 0.05)


def test_bounds_from_elsewhere_are_intersected():
    graph, ball = small_graph()
    own = preactivations(graph, ball)
    rows = logit_rows(3)
    value = graph(ball.center) @ rows.T
    wide = value - 1e9, value + 1e9
    again = preactivations(graph, ball, "ibp", given=own.inputs, given_rows=wide)
    for mine, theirs in zip(again.inputs, own.inputs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    # maximum pools may be left out of the list
    once = preactivations(graph, ball, "ibp", given=own.inputs[:1])
    torch.testing.assert_close(once.inputs[0], own.inputs[0], rtol=1e-9, atol=1e-9)
    loose = [(lower - 1, upper + 1) for lower, upper in own.inputs]
    for mine, theirs in zip(preactivations(graph, ball, given=loose).inputs, own.inputs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0)
    assert bool(own.proved.all() and again.proved.all())


def test_bounds_that_do_not_fit_are_refused():
    graph, ball = small_graph()
    own = preactivations(graph, ball)
    with pytest.raises(InputError, match="2 nonlinear layers, got 3"):
        preactivations(graph, ball, given=[*own.inputs, own.inputs[0]])
    with pytest.raises(InputError, match="expected shape"):
        preactivations(graph, ball, given=[(own.inputs[0][0][:1], own.inputs[0][1][:1])])
    with pytest.raises(InputError, match="6 rows"):
        preactivations(graph, ball, given_rows=(torch.zeros(3, 3), torch.zeros(3, 3)))


@pytest.mark.parametrize("poison", [float("nan"), 1e6])
def test_crossed_or_nan_bounds_prove_nothing_for_their_sample_only(poison):
    graph, ball = small_graph()
    lower, upper = (end.clone() for end in preactivations(graph, ball).inputs[0])
    lower[1, 0, 0, 0] = poison  # NaN, or above the true upper bound
    known = preactivations(graph, ball, given=[(lower, upper)])
    assert known.proved.tolist() == [True, False, True]
    bounds = local_lipschitz(
        graph, ball, known, methods=["product-active", "interval", "jacobian-crown"], fixed_head=True
    )
    assert torch.isinf(bounds.auto).tolist() == [False, True, False]
    assert bounds.provenance[1] == "none"
    assert torch.isnan(bounds.fixed_head).tolist() == [False, True, False]
    # the product over the whole space does not stand on those bounds
    assert local_lipschitz(graph, ball, known).provenance[1] == "product"


def test_a_crossing_that_the_relu_hides_is_seen():
    # both ends are negative, so the layers after the ReLU see a unit that is merely off
    graph, ball = small_graph()
    lower, upper = (end.clone() for end in preactivations(graph, ball).inputs[0])
    off = (upper[1] < 0).nonzero()[0]
    upper[(1, *off)] = lower[(1, *off)] - 1
    assert preactivations(graph, ball, given=[(lower, upper)]).proved.tolist() == [True, False, True]


def test_nan_infinite_and_negative_bounds_never_win():
    nan, inf = float("nan"), float("inf")
    methods = {"a": torch.tensor([nan, 2.0, inf, -1.0]), "b": torch.tensor([3.0, nan, nan, 4.0])}
    auto, provenance = best_of(methods)
    assert auto.tolist() == [3.0, 2.0, inf, 4.0]
    assert provenance == ("b", "a", "none", "b")


def test_wrong_calls_are_refused():
    graph, ball = small_graph()
    with pytest.raises(InputError, match="unknown Lipschitz method 'crown'"):
        local_lipschitz(graph, ball, methods=["crown"])
    with pytest.raises(InputError, match="float64"):
        local_lipschitz(graph, Ball(ball.center.float(), ball.eps.float(), "linf"))
    with pytest.raises(InputError, match="shape"):
        local_lipschitz(graph, ball_of(torch.rand(1, 1, 5, 5).double(), 0.1))
    with pytest.raises(InputError, match="not negative"):
        ball_of(ball.center, -0.1)
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        ball_of(ball.center + 1, 0.1)


@pytest.mark.parametrize("source", ["ibp", "crown"])
def test_batched_alone_and_in_small_blocks_are_the_same(source):
    graph, ball = small_graph()
    known = preactivations(graph, ball, source)
    together = local_lipschitz(graph, ball, known)
    blocks = local_lipschitz(graph, ball, preactivations(graph, ball, source, memory=1), memory=1)
    for name, bound in together.methods.items():
        torch.testing.assert_close(blocks.methods[name], bound, rtol=1e-10, atol=0.0)
    for i in range(3):
        single = ball_of(ball.center[i : i + 1], 0.05)
        alone = local_lipschitz(graph, single, preactivations(graph, single, source))
        for name, bound in together.methods.items():
            torch.testing.assert_close(alone.methods[name], bound[i : i + 1], rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_rebuilt_network_is_captured_again(name):
    graph = layered.build(name)
    again = capture(Rebuilt(graph), layered.SHAPE)
    images = torch.rand(3, *layered.SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(again(images), graph(images), rtol=1e-12, atol=1e-12)
