"""Rounding: exact rational arithmetic, float64 and float32 evaluations in any batch lie inside the bounds.

Networks here cancel on purpose: pairs of hidden units of a size s whose differences have the size 1. A margin that knows
sizes since the last activation only misses their values by up to 1e-16 s and more.
"""

import functools
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from grood_cert import attacks
from grood_cert.ball import Ball
from grood_cert.bounds.alpha_crown import optimised_bounds
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.branching import branch_and_bound
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.engine import lirpa_version
from grood_cert.bounds.folding import folded
from grood_cert.bounds.hidden import preactivations
from grood_cert.bounds.rounding import UNIT, Rounding, terms
from grood_cert.bounds.score import score_bounds
from grood_cert.errors import InputError
from grood_cert.lipschitz.bound import METHODS, local_lipschitz
from grood_cert.networks import activations, operations
from grood_cert.networks.capture import capture
from grood_cert.networks.graph import Graph, Node
from grood_cert.scores import MSP, Energy, MaxLogit
from tests.bounds.cancellation import SHAPE, cancelling, exactly, excess, points

SCALES = 1.0, 1e3, 1e5, 1e7
ABSENT = pytest.mark.skipif(lirpa_version() is None, reason="auto_LiRPA is not installed")
ENGINES = NativeNetwork, pytest.param(LirpaNetwork, marks=ABSENT)


def assert_inside(bounded, scores_at):
    """Scores that an evaluation gives at points of small balls lie inside the bounds of the balls."""
    for seed in range(8):
        for ball in balls(seed)[:2]:
            found = score_bounds(bounded, ball)
            for point in points(ball):
                with torch.no_grad():
                    scores = scores_at(point)
                assert bool((found.lower <= scores).all()) and bool((scores <= found.upper).all())


@functools.cache
def captured(seed, scale):
    """A network that cancels and its graph, to be left as they are."""
    network = cancelling(seed, scale)
    return network, capture(network, SHAPE)


def balls(seed):
    image = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [Ball(image, torch.tensor([eps], dtype=torch.float64), "linf") for eps in (0.0, 1e-9, 1e-3, 0.1)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", SCALES)
def test_rows_enclose_what_exact_and_float64_arithmetic_give(engine, scale):
    rows = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]], dtype=torch.float64)
    for seed in range(2):
        network, graph = captured(seed, scale)
        bounded = [engine(network, SHAPE, method, graph=graph) for method in ("ibp", "crown-ibp", "crown")]
        for ball in balls(seed):
            bounds = [part.relax(ball).rows(rows) for part in bounded]
            assert all(bool(torch.isfinite(end).all()) for pair in bounds for end in pair)
            for point in points(ball):
                with torch.no_grad():
                    rounded = [Fraction(value) for value in network(point)[0].tolist()]
                (one, two), _ = exactly(network, point)
                for lower, upper in bounds:
                    ends = list(zip(lower[0].tolist(), upper[0].tolist(), strict=True))
                    for value, pair in zip((one, two, one - two, *rounded), (*ends, *ends), strict=False):
                        assert excess(value, *pair) <= 0


@pytest.mark.parametrize("scale", SCALES)
def test_refined_bounds_enclose_what_exact_arithmetic_gives(scale):
    score = MaxLogit()  # rational, unlike the energy
    for seed in range(2):
        network, graph = captured(seed, scale)
        for ball in balls(seed)[1:]:
            hidden = preactivations(graph, ball)
            upper = optimised_bounds(graph, ball, "upper", hidden, 5, score=score)
            lower = optimised_bounds(graph, ball, "lower", hidden, 5, score=score)
            middle = float(score.value(network(ball.center)).detach())
            above = branch_and_bound(graph, ball, middle + 1e-3, "upper", 12, score=score).bound
            below = branch_and_bound(graph, ball, middle - 1e-3, "lower", 12, score=score).bound
            found = [(float(lower), float(upper)), (float(below), float(above))]
            for point in points(ball):
                value = -max(exactly(network, point)[0])
                assert all(excess(value, *pair) <= 0 for pair in found)


@pytest.mark.parametrize("scale", SCALES)
def test_lipschitz_bounds_hold_for_exact_gradients(scale):
    for seed in range(2):
        network = cancelling(seed, scale, classes=1)  # S = -f, so its gradient is rational
        graph = capture(network, SHAPE)
        for ball in balls(seed):
            bounds = local_lipschitz(graph, ball, methods=METHODS)
            for point in points(ball)[:3]:
                slope = sum(abs(part) for part in exactly(network, point)[1])
                for name, bound in bounds.methods.items():
                    assert slope <= Fraction(float(bound)), name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ratio", [1e5, 1e7])
def test_a_batchnorm_with_a_mean_far_from_0(engine, ratio):
    """|mean| / std is `ratio`; merged into the layer before, its bias forgets what cancelled."""
    torch.manual_seed(0)
    network = (
        nn.Sequential(nn.Flatten(), nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    )
    with torch.no_grad():
        network[1].bias.add_(ratio)
        network[2].running_mean.fill_(ratio)
        network[2].running_var.fill_(1.0)
    assert_inside(engine(network, SHAPE, "crown"), lambda point: Energy().value(network(point.repeat(5, 1, 1, 1))))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ratio", [1e5, 1e7])
def test_a_batchnorm_whose_bias_takes_its_mean_back(engine, ratio):
    """Nothing of `ratio` is left in what it adds; an evaluation that centres first still rounds values of that size."""
    torch.manual_seed(0)
    norm, rest = nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    network = nn.Sequential(nn.Flatten(), norm, rest).double().eval()
    with torch.no_grad():
        norm.running_mean.fill_(ratio)
        norm.running_var.uniform_(0.5, 2)
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias.copy_(ratio * factor)
    assert_inside(
        engine(network, SHAPE, "crown"),
        lambda point: Energy().value(rest((point.flatten(1) - ratio) * factor + norm.bias)),
    )


def test_merged_layers_remember_what_was_summed():
    torch.manual_seed(0)
    layers = (
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 2),
    )
    network = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        for layer in (network[0], network[2]):
            layer.running_mean.normal_(std=100)
            layer.running_var.uniform_(0.5, 2)
    graph = capture(network, (2, 4, 4))
    ball = Ball(torch.rand(3, 2, 4, 4, dtype=torch.float64), torch.full((3,), 0.1, dtype=torch.float64), "linf")
    sizes = []
    for part in (graph, folded(graph)):
        rounding = Rounding(part, ball)
        number = rounding.advance()
        sizes.append(rounding.magnitudes[part.nodes[number].inputs[0]])
    torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-12, atol=0)
    assert float(sizes[0].min()) > 100


def convolutional(seed):
    torch.manual_seed(seed)
    layers = (
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.LeakyReLU(0.1)),
        nn.Linear(16, 10),
    )
    network = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.mul_(3)
        network[1].running_mean.normal_()
        network[1].running_var.uniform_(0.1, 2)
    return network


@functools.cache
def captured_convolutional(seed):
    """In float64 and its graph; its weights are float32 numbers."""
    network = convolutional(seed).double()
    return network, capture(network, (1, 12, 12))


@pytest.mark.parametrize("score", [Energy(3.0), MaxLogit(), MSP(), MSP(0.5)], ids=str)
def test_the_float32_network_stays_inside_bounds_for_its_deployment(score):
    """In balls of radius 0, where nothing but rounding is left, alone and in batches; and under attack in others."""
    outside = 0
    for seed in range(2):
        network, graph = captured_convolutional(seed)
        images = torch.rand(16, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
        exact, single = (
            NativeNetwork(network.double(), (1, 12, 12), "crown", graph=graph.deployed(kind)) for kind in UNIT
        )
        for eps in (0.0, 0.01):
            ball = Ball(images.double(), torch.full((16,), eps, dtype=torch.float64), "linf")
            found, strict = score_bounds(single, ball, score=score), score_bounds(exact, ball, score=score)
            assert bool((found.lower < strict.lower).all()) and bool((strict.upper < found.upper).all())
            points = images
            if eps:
                generator = torch.Generator().manual_seed(seed)
                (extremes,) = attacks.extremes(
                    network.double(),
                    [ball],
                    generator,
                    attacks.AttackEffort(ascent=6, restarts=0, logits=1),
                    score,
                )
                points = torch.minimum(torch.maximum(extremes.argmax, ball.lower), ball.upper).float()
                outer = Ball(images.double(), torch.full((16,), eps + 1e-7, dtype=torch.float64), "linf")
                found = score_bounds(single, outer, score=score)  # the points were rounded
            network.float()
            with torch.no_grad():
                runs = [
                    torch.cat([score.value(network(part)) for part in points.split(size)]) for size in (1, 2, 7, 16)
                ]
            network.double()
            for run in runs:
                assert bool((found.lower <= run.double()).all()) and bool((run.double() <= found.upper).all())
                outside += int(((run.double() < strict.lower) | (run.double() > strict.upper)).sum())
    assert outside > 0 or isinstance(score, MaxLogit)  # else the deployment float32 would not be needed


@pytest.mark.parametrize(
    "kind",
    [
        activations.Sigmoid(),
        activations.Tanh(),
        activations.Softplus(),
        activations.Softplus(5.0),
        activations.GELU(),
        activations.TanhGELU(),
        activations.SiLU(),
        activations.ELU(1.5),
        activations.Hardswish(),
        activations.LeakyReLU(0.1),
    ],
    ids=repr,
)
def test_activations_round_as_little_as_is_said(kind):
    values = torch.cat([torch.linspace(-30, 30, 200001), torch.logspace(-6, 2, 2000), -torch.logspace(-6, 2, 2000)])
    exact, single = kind(values.double()), kind(values).double()
    allowed = 16 * UNIT["float32"] * (values.double().abs() + exact.abs()) + 3e-9  # torch's switch of softplus
    assert bool(((single - exact).abs() <= allowed).all())


@pytest.mark.parametrize(
    "score", [Energy(), Energy(0.1), Energy(20.0), MaxLogit(), MSP(), MSP(0.1), MSP(20.0)], ids=str
)
@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
def test_scores_round_as_little_as_is_said(score, classes):
    for scale in (1e-3, 1.0, 30.0, 1e3):
        logits = torch.randn(500, classes, generator=torch.Generator().manual_seed(0)) * scale
        exact, single = score.value(logits.double()), score.value(logits).double()
        allowed = score.roundoff(exact, classes, logits.abs().amax(1).double(), UNIT["float32"])
        assert bool(((single - exact).abs() <= allowed).all())
        threshold = (exact.float().double() - exact).abs()  # a threshold rounded to float32
        assert bool((threshold <= allowed).all())


@pytest.mark.parametrize("classes", [3, 10, 1000])
def test_an_evaluation_of_the_score_rounds_where_the_network_does_not(classes):
    layer = nn.Linear(3, classes).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    network = nn.Sequential(nn.Flatten(), layer).eval()
    single = NativeNetwork(network, SHAPE, "crown", graph=capture(network, SHAPE).deployed("float32"))
    found = score_bounds(single, balls(0)[0])
    assert float(found.lower) <= float(Energy().value(torch.zeros(1, classes))) <= float(found.upper)


def test_a_long_sum_may_be_taken_one_after_another():
    """All units are equal, and every partial sum is rounded to the same side for long stretches."""
    shape, image = (1, 32, 64), torch.full((1, 1, 32, 64), 0.1)
    width = image.numel()
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(width, 1)).double().eval()
    with torch.no_grad():
        for layer in (network[0], network[-1]):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    graph = capture(network, shape).deployed("float32")
    ball, score = Ball(image.double(), torch.tensor([1e-9], dtype=torch.float64), "linf"), MaxLogit()
    value = -float(np.cumsum(np.full(width, 0.1, np.float32))[-1])
    hidden, near = preactivations(graph, ball), 1e-12 * width
    assert abs(value + 0.1 * width) > 1e-6 * width
    for engine in (NativeNetwork, LirpaNetwork)[: 1 + (lirpa_version() is not None)]:
        found = score_bounds(engine(network, shape, "crown", graph=graph), ball, score=score)
        assert float(found.lower) <= value <= float(found.upper)
    for side, sign in (("lower", 1.0), ("upper", -1.0)):
        assert sign * float(optimised_bounds(graph, ball, side, hidden, 3, score=score)) <= sign * value
        assert sign * float(branch_and_bound(graph, ball, value + near, side, 8, score=score).bound) <= sign * value


def test_sums_are_as_long_as_they_are():
    weight = torch.zeros(6, 2, 3, 5)
    convolution = operations.Convolution(weight, None, (1, 1), (0, 0), (1, 1), 2, (9, 9))
    assert terms(operations.Dense(torch.zeros(3, 7), None)) == 7
    assert terms(convolution) == 45  # 2 channels in and 3 out a group
    assert terms(operations.Transposed(convolution)) == 45
    assert terms(operations.AveragePool((3, 2), (1, 1), (0, 0), (9, 9))) == 6
    assert terms(operations.Reshape((4,), (2, 2))) == 1


def test_nothing_is_proved_where_sums_are_too_long_for_the_arithmetic():
    nodes = [Node(None, (), (1, 1, 400000), "image")]
    nodes.append(Node(operations.Reshape((1, 1, 400000), (400000,)), (0,), (400000,), "flat"))
    nodes.append(Node(operations.Dense(torch.zeros(1, 400000).double(), None), (1,), (1,), "sum"))
    ball = Ball(torch.zeros(1, 1, 1, 400000).double(), torch.zeros(1).double(), "linf")
    for kind, known in (("float64", True), ("float32", False)):
        rounding = Rounding(Graph(tuple(nodes)).deployed(kind), ball)
        rounding.advance()
        assert bool(np.isfinite(rounding.share(2))) is known


def test_resampling_is_not_deployed_in_float32():
    network = (
        nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Flatten(), nn.Linear(16, 2)).double().eval()
    )
    graph = capture(network, (1, 2, 2))
    with pytest.raises(InputError, match="resamples"):
        graph.deployed("float32")
    with pytest.raises(InputError, match="unknown deployment 'float16'"):
        graph.deployed("float16")
