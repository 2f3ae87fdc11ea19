"""Bounds of any score, by every proof and on both sides, against points, closed forms and the algebra of the scores."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from grood_cert import attacks
from grood_cert.ball import NORMS, Ball
from grood_cert.bounds.alpha_crown import optimised_bounds
from grood_cert.bounds.branching import branch_and_bound
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.hidden import preactivations
from grood_cert.bounds.reduction import Head, possible_winners
from grood_cert.bounds.score import _log_sum_of_others, score_bounds
from grood_cert.lipschitz.estimates import uniform_in_ball
from grood_cert.networks.capture import capture
from grood_cert.networks.graph import Graph
from grood_cert.scores import MSP, Energy, MaxLogit

SCORES = [Energy(0.5), Energy(10.0), MaxLogit(), MSP(0.5), MSP(1.0), MSP(10.0)]
SHAPE = (1, 2, 2)
EPS = {"linf": 0.1, "l2": 0.15, "l1": 0.3}


def network(classes: int) -> nn.Sequential:
    torch.manual_seed(classes)
    layers = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, classes)
    built = nn.Sequential(nn.Flatten(), *layers).double().eval()
    with torch.no_grad():
        built[1].weight.mul_(3)
        built[5].weight.mul_(4)
    return built


@functools.cache
def captured(classes: int) -> tuple[nn.Sequential, Graph]:
    """A network and its graph, to be left as they are."""
    return network(classes), capture(network(classes), SHAPE)


def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Sequential:
    layer = nn.Linear(*weight.T.shape).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return nn.Sequential(nn.Flatten(), layer).eval()


def balls(norm: str, count: int = 2) -> Ball:
    images = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    return Ball(images, EPS[norm], norm)


def seen(net, ball, score):
    """Lowest and highest score at random points of each ball, at points near its surface, and where attacks lead."""
    points = uniform_in_ball(ball, 200, torch.Generator().manual_seed(1))
    repeated = Ball(ball.center.repeat(len(points), 1, 1, 1), ball.eps.repeat(len(points)), ball.norm)
    corners = repeated.project(repeated.center + 9 * (points.flatten(0, 1) - repeated.center))
    with torch.no_grad():
        values = score.value(net(torch.cat([points.flatten(0, 1), corners]))).reshape(-1, len(ball.center))
    (found,) = attacks.extremes(
        net, [ball], torch.Generator().manual_seed(0), attacks.AttackEffort(8, 0, 1, 8, 1), score
    )
    return torch.minimum(values.amin(0), found.minimum), torch.maximum(values.amax(0), found.maximum)


@pytest.mark.parametrize(
    ("score", "classes", "norm"),
    [
        (score, classes, norm)
        for place, score in enumerate(SCORES)
        for classes in (1, 2, 10)
        for norm in (*NORMS, *NORMS)[place % 3 :][: 2 if classes == 10 else 1]
    ],
    ids=str,
)
def test_every_bound_contains_every_point(score, classes, norm):
    (net, graph), ball = captured(classes), balls(norm)
    low, high = seen(net, ball, score)
    for method in ("ibp", "crown"):
        found = score_bounds(NativeNetwork(net, SHAPE, method, graph=graph), ball, score=score)
        assert bool((found.lower <= low).all() and (high <= found.upper).all())
        assert bool((found.lower_per_logit <= found.lower).all() and (found.upper <= found.upper_per_logit).all())
    hidden = preactivations(graph, ball)
    lower, upper = (optimised_bounds(graph, ball, side, hidden, 4, score=score) for side in ("lower", "upper"))
    assert bool((lower <= low).all() and (high <= upper).all())
    if norm != NORMS[SCORES.index(score) % 3] or classes != 10:  # each score in one norm: branching takes its time
        return
    for side, gamma in (("lower", float(low.median())), ("upper", float(high.median()))):
        branched = branch_and_bound(graph, ball, gamma, side, 8, score=score)
        inside, truth = (
            (branched.bound <= low, low > gamma) if side == "lower" else (high <= branched.bound, high < gamma)
        )
        assert bool(inside.all()) and not bool((branched.decided & ~truth).any())


@pytest.mark.parametrize("score", [MaxLogit(), MSP(2.0), Energy(3.0)], ids=str)
def test_branch_and_bound_decides_what_lies_just_beyond_the_truth(score):
    """On the upper side of MSP the class of x is the largest all over the ball: its proof knows no other."""
    net = network(3)
    with torch.no_grad():
        net[5].bias[0] += 4
    ball = Ball(balls("linf", 1).center, 0.3, "linf")
    graph, (low, high) = capture(net, SHAPE), seen(net, ball, score)
    gap = 0.1 * float(high - low)
    for side, gamma in (("lower", float(low) - gap), ("upper", float(high) + gap)):
        assert bool(branch_and_bound(graph, ball, gamma, side, 400, score=score).decided), side


def test_two_linear_logits_in_closed_form():
    """Max softmax of (a . x, 0) is 1 / (1 + e^-|a . x| / T), and a . x moves by eps ||a||_1."""
    weight = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]).double()
    net, ball = (
        linear(weight, torch.tensor([0.3, 0.0], dtype=torch.float64)),
        Ball(torch.full((1, *SHAPE), 0.5).double(), 0.1, "linf"),
    )
    ends = torch.tensor([1.05 - 0.35, 1.05 + 0.35], dtype=torch.float64)
    low, high = -torch.sigmoid(ends[1] / 2), -torch.sigmoid(ends[0] / 2)
    graph = capture(net, SHAPE)
    for method in ("ibp", "crown"):
        found = score_bounds(NativeNetwork(net, SHAPE, method), ball, score=MSP(2.0))
        torch.testing.assert_close(found.lower, low[None], rtol=1e-10, atol=0)
        torch.testing.assert_close(found.upper, high[None], rtol=1e-10, atol=0)
        found = score_bounds(NativeNetwork(net, SHAPE, method), ball, score=MaxLogit())
        torch.testing.assert_close(torch.stack([found.lower, found.upper]), -ends.flip(0)[:, None], rtol=1e-10, atol=0)
    for side, exact in (("lower", low), ("upper", high)):
        bound = optimised_bounds(graph, ball, side, preactivations(graph, ball), 0, score=MSP(2.0))
        torch.testing.assert_close(bound, exact[None], rtol=1e-10, atol=0)


def test_a_tie_needs_several_logits_at_once():
    """At f = (y, -y), y = 0, the largest logit is never below 0: only p = (1/2, 1/2) says so."""
    weight = torch.tensor([[1.0, 1.0, 0.0, 0.0], [-1.0, -1.0, 0.0, 0.0]]).double()
    net, ball = (
        linear(weight, torch.tensor([-1.0, 1.0]).double()),
        Ball(torch.full((1, *SHAPE), 0.5).double(), 0.1, "linf"),
    )
    found = score_bounds(NativeNetwork(net, SHAPE, "crown"), ball, score=MaxLogit())
    assert found.upper.item() == pytest.approx(0.0, abs=1e-9) and found.upper_per_logit.item() == pytest.approx(0.2)
    assert found.lower.item() == pytest.approx(-0.2)
    found = score_bounds(NativeNetwork(net, SHAPE, "crown"), ball, score=MSP())
    assert found.lower.item() == pytest.approx(-float(torch.sigmoid(torch.tensor(0.4)))) and found.upper.item() >= -0.5


def test_the_energy_tends_to_max_logit_as_the_temperature_falls():
    net, ball = network(10), balls("linf")
    bounded = NativeNetwork(net, SHAPE, "crown")
    cold, limit = (score_bounds(bounded, ball, score=score) for score in (Energy(1e-6), MaxLogit()))
    torch.testing.assert_close(cold.lower, limit.lower, rtol=0, atol=1e-4)
    assert bool((limit.upper <= cold.upper + 1e-4).all())
    torch.testing.assert_close(cold.upper_per_logit, limit.upper_per_logit, rtol=0, atol=1e-4)


def test_msp_of_one_class_is_minus_one_and_nothing_is_certified_at_it():
    net, ball = network(1), balls("linf")
    found = score_bounds(NativeNetwork(net, SHAPE, "crown"), ball, score=MSP())
    assert bool((found.lower <= -1).all() and (found.upper >= -1).all() and (found.upper - found.lower < 1e-10).all())
    graph = capture(net, SHAPE)
    for side in ("lower", "upper"):
        assert not bool(branch_and_bound(graph, ball, -1.0, side, 10, score=MSP()).decided.any())
    assert bool(branch_and_bound(graph, ball, -0.9, "upper", 10, score=MSP()).decided.all())


def test_confident_logits_keep_bounds_of_msp_inside_its_range():
    weight = 1e3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    net, ball = linear(weight, torch.zeros(5).double()), balls("linf")
    for score in (MSP(), MSP(1e-3)):
        found = score_bounds(NativeNetwork(net, SHAPE, "crown"), ball, score=score)
        low, high = seen(net, ball, score)
        assert bool((found.lower <= low).all() and (high <= found.upper).all())
        assert bool((found.lower >= -1 - 1e-11).all() and (found.upper <= 1e-11).all())


def test_heads_are_what_they_say():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    case = torch.tensor([0, 1, 2, 3, 4, 2])
    own = logits.gather(1, case[:, None])
    others = torch.stack([row[torch.arange(5) != k] for row, k in zip(logits, case, strict=True)])
    wanted = {"all": logits / 2, "one": own / 2, "others": (others - own) / 2}
    for kind, expected in wanted.items():
        head = Head(kind, 2.0, case)
        torch.testing.assert_close(head.image(logits), expected)
        assert head.size(5) == expected.shape[1]
        rows = torch.randn(6, 3, expected.shape[1], dtype=torch.float64, generator=generator)
        pulled = (head.rows(rows, 5) @ logits.unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(pulled, (rows @ expected.unsqueeze(2)).squeeze(2))
        low, high = head.interval(logits - 0.1, logits + 0.2)
        assert bool((low <= expected).all() and (expected <= high).all())
    low, high = Head("one", -1.0, case).interval(own.expand(6, 5) - 0.1, own.expand(6, 5) + 0.2)
    torch.testing.assert_close(torch.cat([low, high], 1), torch.cat([-own - 0.2, -own + 0.1], 1))


def test_sums_of_others_and_possible_winners():
    values = 30 * torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in range(6):
        others = torch.logsumexp(values[:, torch.arange(6) != k], 1)
        torch.testing.assert_close(_log_sum_of_others(values)[:, k], others)
    assert bool((_log_sum_of_others(values[:, :1]) == -torch.inf).all())
    lower, upper = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[1.0, 3.0, 2.0]])
    assert possible_winners(lower, upper).tolist() == [[False, True, True]]
    assert bool(possible_winners(lower * torch.nan, upper).all())
