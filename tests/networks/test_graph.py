"""Tracing, refusals, and bounds of pre-activations against hand arithmetic, sampling and auto_LiRPA."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from grood_cert.ball import Ball
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.hidden import logit_rows, preactivations
from grood_cert.errors import InputError, RunError
from grood_cert.lipschitz.bound import best_of, local_lipschitz
from grood_cert.networks.architectures import build
from grood_cert.networks.graph import trace


def ball_of(images, eps):
    return Ball(images, torch.full((len(images),), eps, dtype=torch.float64), "linf")


class Function(nn.Module):
    def __init__(self, function, layer=None):
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, images):
        return self.function(images if self.layer is None else self.layer(images))


def last(channels=1):
    return [nn.Flatten(), nn.Linear(16 * channels, 2)]


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        ([nn.PReLU()], "PReLU"),
        ([nn.ELU()], "ELU"),
        ([nn.GELU(approximate="tanh")], "tanh"),
        ([nn.Softplus(threshold=5)], "threshold"),
        ([nn.LeakyReLU(1.5)], "1.5"),
        ([nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")], "reflect"),
        ([nn.AvgPool2d(2, padding=1, count_include_pad=False)], "count_include_pad"),
        ([nn.MaxPool2d(2, ceil_mode=True)], "ceil_mode"),
        ([nn.AdaptiveAvgPool2d(2)], "AdaptiveAvgPool2d"),
        ([nn.BatchNorm2d(1, track_running_stats=False)], "running statistics"),
        ([Function(torch.exp)], "exp"),
        ([Function(lambda x: x * 2)], "mul"),
        ([Function(lambda x: x + 1)], "add"),
        ([Function(lambda x: x - x.mean())], "mean"),
        ([Function(lambda x: functional.dropout(x, 0.5, True))], "dropout"),
        ([Function(lambda x: x if x.sum() > 0 else -x)], "traced"),
        ([nn.InstanceNorm2d(1)], "InstanceNorm2d"),
    ],
)
def test_what_cannot_be_bounded_is_refused_by_name(layers, name):
    network = nn.Sequential(*layers, *last()).eval()
    with pytest.raises(InputError, match=name):
        trace(network, (1, 4, 4))


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm2d(1), nn.ReLU()])
def test_train_mode_anywhere_is_refused(layer):
    network = nn.Sequential(layer, *last()).eval()
    layer.train()
    with pytest.raises(InputError, match="train mode"):
        trace(network, (1, 4, 4))


def test_a_layer_that_works_in_place_on_a_shared_value_does_not_pass_for_the_network():
    class Trap(nn.Module):
        def forward(self, images):
            shifted = images + images
            return functional.relu(shifted - shifted) + shifted

    with pytest.raises((InputError, RunError)):
        trace(nn.Sequential(Trap(), *last()).eval(), (1, 4, 4))

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.activation = nn.Conv2d(1, 1, 1), nn.ReLU(inplace=True)

        def forward(self, images):
            value = self.layer(images)
            return self.activation(value) + value  # value has been overwritten

    network = nn.Sequential(Hidden(), *last()).eval()
    with torch.no_grad():
        network[0].layer.weight.fill_(-1.0)
    with pytest.raises(RunError, match="reproduce"):
        trace(network, (1, 4, 4))


def test_functional_forms_and_eval_dropout_are_read():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Dropout(), nn.Linear(32, 3)

        def forward(self, images):
            hidden = torch.relu(self.conv(images))
            hidden = self.drop(torch.tanh(hidden) + hidden)
            return self.head(torch.flatten(hidden.sigmoid(), 1))

    graph = trace(Net().eval(), (1, 4, 4))
    assert len(graph.nonlinear) == 3


def test_intervals_and_crown_by_hand():
    # z = (x1 + x2, x1 - x2), x in [.4, .6]^2: z in [.8, 1.2] x [-.2, .2]; f = relu(z1) + relu(z2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double().eval()
    network.requires_grad_(False)
    network[1].weight[:] = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    network[1].bias[:] = 0.0
    network[3].weight[:], network[3].bias[:] = 1.0, 0.0
    graph = trace(network, (1, 1, 2))
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
    known = preactivations(trace(network, (1, 8, 8)), ball)
    rows = torch.eye(4, dtype=torch.float64).expand(4, -1, -1)
    lower, upper = LirpaNetwork(network, (1, 8, 8), "crown").relax(ball).rows(rows)
    torch.testing.assert_close(known.logits[0], lower, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(known.logits[1], upper, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bounds_on_top_of_auto_lirpa_are_those_on_top_of_our_crown(norm):
    torch.manual_seed(0)
    network = build("conv-small", (1, 8, 8), 4, [0.3], [0.4], width=2).double().eval().requires_grad_(False)
    graph = trace(network, (1, 8, 8))
    ball = Ball(torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0.0, 0.01, 0.05]).double(), norm)
    relaxation = LirpaNetwork(network, (1, 8, 8), "crown").relax(ball)
    rows = relaxation.rows(logit_rows(4).expand(3, -1, -1))
    known = preactivations(graph, ball, "ibp", given=relaxation.preactivations(), given_rows=rows)
    assert bool(known.proved.all())
    theirs, ours = local_lipschitz(graph, ball, known), local_lipschitz(graph, ball)
    for name, bound in ours.methods.items():
        torch.testing.assert_close(theirs.methods[name], bound, rtol=1e-3, atol=0.0)


def small_graph():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 3)).eval()
    return trace(network, (1, 4, 4)), ball_of(torch.rand(3, 1, 4, 4, dtype=torch.float64), 0.05)


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
