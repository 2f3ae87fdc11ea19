from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from grood_cert import attacks
from grood_cert.ball import Ball
from grood_cert.bounds import branching
from grood_cert.bounds.alpha_crown import optimised_bounds
from grood_cert.bounds.branching import _halved, _Leaves, branch_and_bound
from grood_cert.bounds.hidden import preactivations
from grood_cert.errors import InputError
from grood_cert.networks.architectures import Normalize, resnet_small
from grood_cert.networks.capture import capture
from grood_cert.scores import energy

SIDES = ("upper", "lower")
PLANE = (1, 1, 2)
TOLERANCE = {"upper": 5e-3, "lower": 5e-2}


def flat(*layers):
    return nn.Sequential(nn.Flatten(), *layers).double().eval()


def shallow(seed, hidden=5, classes=3, slope=0.0):
    """One hidden layer over two pixels, with strong bends inside the box."""
    torch.manual_seed(seed)
    network = flat(nn.Linear(2, hidden), nn.LeakyReLU(slope) if slope else nn.ReLU(), nn.Linear(hidden, classes))
    with torch.no_grad():
        network[1].weight.mul_(5)
        network[1].bias.copy_(-(network[1].weight * torch.rand(hidden, 2)).sum(1))
        network[3].weight.mul_(3)
    return network


def degenerate():
    """Pairs of equal and of opposite neurons, a neuron that is always 0 and one that is never on."""
    network = shallow(5, hidden=8)
    with torch.no_grad():
        weight, bias = network[1].weight, network[1].bias
        weight[1], bias[1] = weight[0], bias[0]
        weight[3], bias[3] = -weight[2], -bias[2]
        weight[4], bias[4] = 0.0, 0.0
        bias[5] = -50.0
    return network


def deep(seed):
    torch.manual_seed(seed)
    return flat(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


NETWORKS = {
    **{f"shallow-{seed}": (lambda seed=seed: shallow(seed)) for seed in range(2)},
    "leaky": lambda: shallow(7, slope=0.1),
    "one-logit": lambda: shallow(8, classes=1),
    "degenerate": degenerate,
}


def whole_box(count=1, shape=PLANE):
    """Balls that are the pixel box [0, 1]^d."""
    return Ball(torch.full((count, *shape), 0.5).double(), torch.full((count,), 0.5).double(), "linf")


def score_of(network, pixels):
    with torch.no_grad():
        return energy(network(torch.as_tensor(pixels, dtype=torch.float64).reshape(-1, *PLANE))).numpy()


def exact_minimum(network):
    """Min S over the box: LSE is convex on every cell of the arrangement of the kinks, so a vertex attains it."""
    weight, bias = (part.detach().numpy() for part in (network[1].weight, network[1].bias))
    lines = [*zip(weight, bias, strict=True), *(((1, 0), -e) for e in (0, 1)), *(((0, 1), -e) for e in (0, 1))]
    corners = []
    for (first, c), (second, d) in itertools.combinations(lines, 2):
        matrix = np.array([first, second], dtype=float)
        if abs(np.linalg.det(matrix)) > 1e-12:
            corners.append(np.linalg.solve(matrix, [-c, -d]))
    corners = np.array(corners)
    inside = ((corners >= -1e-12) & (corners <= 1 + 1e-12)).all(1)
    return score_of(network, corners[inside].clip(0, 1)).min()


def exact_maximum(network):
    """Max S over the box: from the best point of every cell of a grid, the convex LSE is minimised in that cell."""
    weight, bias = (part.detach() for part in (network[1].weight, network[1].bias))
    axis = torch.linspace(0, 1, 61, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    score = torch.as_tensor(score_of(network, grid))
    pattern = ((grid @ weight.T + bias) > 0).long()
    best = -np.inf
    for cell in pattern.unique(dim=0):
        here = (pattern == cell).all(1)
        start = grid[here][score[here].argmax()]
        side = torch.where(cell > 0, 1.0, -1.0).double()
        constraint = {
            "type": "ineq",
            "fun": lambda x, side=side: (side * (weight @ torch.as_tensor(x) + bias)).numpy(),
            "jac": lambda x, side=side: (side[:, None] * weight).numpy(),
        }
        options = {"ftol": 1e-12, "maxiter": 25}
        found = minimize(
            lambda x: -float(score_of(network, x)[0]),
            start,
            bounds=[(0, 1)] * 2,
            constraints=constraint,
            options=options,
        )
        point = found.x.clip(0, 1)
        best = max(best, float(score_of(network, point)[0]), float(score[here].max()))
    return best


def test_a_gap_that_closes_with_the_logarithm_of_the_domains_is_foreseen():
    """From 4 to 3 with 16 domains, four doublings: twelve more close it. Without progress it never closes."""
    used, first, left = torch.tensor([16, 16, 4]), torch.tensor([4.0, 4.0, 2.0]), torch.tensor([3.0, 4.0, 2.5])
    assert branching._expected(used, first, left).tolist() == [16.0, math.inf, math.inf]


@pytest.mark.parametrize("side", SIDES)
def test_a_ball_that_is_given_up_is_not_proved(monkeypatch, side):
    """A gamma that enough nodes prove, as the next test sees."""
    monkeypatch.setattr(branching, "_PATIENCE", 1e-9)
    monkeypatch.setattr(branching, "_TRIED", 3)
    network = shallow(1)
    exact, sign = (exact_maximum(network), 1) if side == "upper" else (exact_minimum(network), -1)
    gamma = exact + sign * TOLERANCE[side]
    found = branch_and_bound(capture(network, PLANE), whole_box(), gamma, side, nodes=24, batch=1)
    assert not bool(found.decided) and int(found.nodes) == 3
    assert sign * (float(found.bound) - gamma) >= 0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NETWORKS)
def test_enough_nodes_reach_the_exact_extreme(name, side):
    """A gamma beyond the exact extreme is proved, one inside is not: no leaf is lost, no split is unsound."""
    network = NETWORKS[name]()
    graph = capture(network, PLANE)
    exact, sign = (exact_maximum(network), 1) if side == "upper" else (exact_minimum(network), -1)
    outside = branch_and_bound(graph, whole_box(), exact + sign * TOLERANCE[side], side, nodes=1000)
    assert bool(outside.decided) and not bool(outside.refuted)
    assert sign * float(outside.bound) >= sign * exact
    inside = branch_and_bound(graph, whole_box(), exact - sign * TOLERANCE[side], side, nodes=1000, steps=4)
    assert not bool(inside.decided)
    assert sign * float(inside.bound) >= sign * exact - 1e-9
    if bool(inside.refuted):
        score = float(score_of(network, inside.points)[0])
        assert sign * score >= sign * (exact - sign * TOLERANCE[side])


def test_two_halves_are_the_whole():
    """Random values of neurons and logits inside a leaf lie in the half on their side of the split, and only there."""
    generator = torch.Generator().manual_seed(0)
    count, total, classes = 12, 5, 3
    branch = torch.arange(count) % (total + classes)
    ones = torch.ones(count, dtype=torch.float64)
    cut = torch.rand(count, dtype=torch.float64, generator=generator) - 0.5
    wide, narrow = ones.unsqueeze(1).repeat(1, total), ones.unsqueeze(1).repeat(1, classes)
    signs = torch.zeros(count, total, dtype=torch.int8)
    parents = _Leaves(
        torch.arange(count),
        branch * 0,
        signs,
        -wide,
        wide,
        -narrow,
        narrow,
        wide,
        ones,
        branch,
        cut,
        branch,
    )
    children = _halved(parents)
    upper, lower = children.at(torch.arange(count)), children.at(torch.arange(count) + count)
    assert torch.equal(upper.sample, parents.sample) and torch.equal(lower.sample, parents.sample)
    place = torch.where(branch < total, 0.0, cut)
    for _ in range(200):
        values = torch.rand(count, total + classes, dtype=torch.float64, generator=generator) * 2 - 1
        above = values.gather(1, branch.unsqueeze(1)).squeeze(1) >= place
        for half, expected in ((upper, above), (lower, ~above)):
            low, high = torch.cat([half.lower, half.outputs_lower], 1), torch.cat([half.upper, half.outputs_upper], 1)
            assert torch.equal(((values >= low) & (values <= high)).all(1), expected)
            inside = (half.signs * values[:, :total] >= 0).all(1) | (branch >= total)
            assert torch.equal(inside | ~expected, torch.ones_like(inside))


@pytest.mark.parametrize("side", SIDES)
def test_two_hidden_layers_against_a_grid(side):
    """What a fine grid finds, with the gap that the gradient allows between its points."""
    sign = 1 if side == "upper" else -1
    axis = torch.linspace(0, 1, 501, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    for seed in range(2):
        network = deep(seed)
        graph = capture(network, PLANE)
        extreme = sign * float((sign * torch.as_tensor(score_of(network, grid))).max())
        steep = np.prod([np.linalg.norm(network[i].weight.detach().numpy(), 2) for i in (1, 3, 5)])
        slack = steep * 0.001 * np.sqrt(2) + TOLERANCE[side]
        assert bool(branch_and_bound(graph, whole_box(), extreme + sign * slack, side, nodes=500, steps=4).decided)
        missed = branch_and_bound(graph, whole_box(), extreme - sign * 1e-6, side, nodes=200, steps=4)
        assert not bool(missed.decided) and sign * float(missed.bound) >= sign * extreme


def conv():
    torch.manual_seed(2)
    convolution = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(convolution, nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()


def mlp():
    torch.manual_seed(3)
    return flat(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def residual():
    torch.manual_seed(4)
    return resnet_small(Normalize([0.5], [0.5]), (1, 4, 4), 3, width=2).double().eval()


@pytest.mark.parametrize(("build", "norm"), [(mlp, "linf"), (conv, "l1"), (residual, "l2")])
def test_bounds_hold_in_three_norms(build, norm):
    network = build()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    graph = capture(network, (1, 4, 4))
    eps = {"linf": 0.2, "l2": 0.7, "l1": 2.0}[norm]
    images = torch.rand(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ball = Ball(images, torch.tensor([eps, eps / 2, eps], dtype=torch.float64), norm)
    effort = attacks.AttackEffort.preset("fast")
    (seen,) = attacks.extremes(network, [ball], torch.Generator().manual_seed(0), effort)
    hidden = preactivations(graph, ball)
    for side, extreme in (("upper", seen.maximum), ("lower", seen.minimum)):
        sign = 1 if side == "upper" else -1
        plain = optimised_bounds(graph, ball, side, hidden, 0)
        gamma = float((extreme + plain)[0] / 2)  # the first ball has work to do
        found = branch_and_bound(graph, ball, gamma, side, nodes=12, steps=4)
        assert bool((sign * found.bound >= sign * extreme).all())
        assert bool((sign * found.bound <= sign * plain).all())
        assert bool((found.nodes <= 12).all())
        assert found.decided.tolist() == (sign * found.bound < sign * gamma).tolist()
        beyond = branch_and_bound(graph, ball, float(extreme[0]), side, nodes=4, steps=4)
        assert not bool(beyond.decided[0])
        assert bool((ball.distance(beyond.points) <= ball.eps * (1 + 1e-12)).all())


@pytest.mark.parametrize("side", SIDES)
def test_refuting_points_are_in_the_ball_and_on_the_wrong_side(side):
    network = mlp()
    graph, ball = capture(network, (1, 4, 4)), whole_box(3, (1, 4, 4))
    ball = Ball(ball.center + torch.linspace(-0.2, 0.2, 3).double().reshape(3, 1, 1, 1), ball.eps / 2, "linf")
    sign = 1 if side == "upper" else -1
    score = energy(network(ball.center)).detach()
    found = branch_and_bound(graph, ball, float(score.mean()), side, nodes=200)
    assert bool((found.refuted | found.decided).all()) and bool(found.refuted.any())
    assert not bool((found.refuted & found.decided).any())
    at = energy(network(found.points)).detach()
    wrong = at > score.mean() if side == "upper" else at <= score.mean()
    assert torch.equal(wrong & found.refuted, found.refuted)
    assert bool((sign * found.bound >= sign * at)[found.refuted].all())
    assert bool((ball.distance(found.points) <= ball.eps).all())
    assert torch.equal(found.points[~found.refuted], ball.center[~found.refuted])


@pytest.mark.parametrize("side", SIDES)
def test_a_single_violating_corner_is_never_certified(side):
    """S passes gamma only where all six pixels are nearly 1, a corner of 1e-6 of the box."""
    network = flat(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 2))
    sign = 1 if side == "upper" else -1
    with torch.no_grad():
        network[1].weight.fill_(1.0)
        network[1].bias.fill_(-5.5)
        network[3].weight.fill_(-4.0 * sign)
        network[3].bias.fill_(0.0)
    graph, ball = capture(network, (1, 1, 6)), whole_box(1, (1, 1, 6))
    corner = -float(np.log(2)) + sign * 2.0
    for nodes in (1, 3, 100):
        found = branch_and_bound(graph, ball, corner - sign * 0.01, side, nodes)
        assert not bool(found.decided) and bool(found.refuted)
    assert bool(branch_and_bound(graph, ball, corner + sign * 0.01, side, 100).decided)


@pytest.mark.parametrize("side", SIDES)
def test_gamma_at_the_exact_bound_is_not_enough(side):
    sign = 1 if side == "upper" else -1
    network = flat(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.0, 1.0]]))
        network[1].bias.fill_(-1.0)
        network[3].weight.fill_(-1.0 * sign)
        network[3].bias.fill_(0.0)
    graph = capture(network, PLANE)
    assert not bool(branch_and_bound(graph, whole_box(), float(sign), side, 100).decided)  # S reaches sign itself
    assert bool(branch_and_bound(graph, whole_box(), sign * (1 + 1e-6), side, 100).decided)


def test_results_are_deterministic_and_a_batch_is_its_samples():
    network = mlp()
    graph = capture(network, (1, 4, 4))
    images = torch.rand(4, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    eps = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    gamma = float(energy(network(images)).detach().max()) + 0.1
    first, again = (branch_and_bound(graph, Ball(images, eps, "linf"), gamma, "upper", 60) for _ in range(2))
    assert torch.equal(first.bound, again.bound) and torch.equal(first.nodes, again.nodes)
    for index in range(4):
        alone = branch_and_bound(graph, Ball(images[[index]], eps[[index]], "linf"), gamma, "upper", 60, batch=16)
        if bool(alone.decided) and bool(first.decided[index]):
            continue
        assert bool(alone.refuted) == bool(first.refuted[index])


def test_budgets():
    network = shallow(1)
    graph = capture(network, PLANE)
    gamma = exact_minimum(network) - 1e-4
    one = branch_and_bound(graph, whole_box(), gamma, "lower", 1)
    few = branch_and_bound(graph, whole_box(), gamma, "lower", 21)
    assert one.nodes.tolist() == [1] and not bool(one.decided) and not bool(one.timed_out)
    assert 1 < int(few.nodes) <= 21 and float(few.bound) > float(one.bound)
    late = branch_and_bound(graph, whole_box(), gamma, "lower", 3000, seconds=0.0)
    assert bool(late.timed_out) and not bool(late.decided)
    assert float(late.bound) <= exact_minimum(network)


def test_nan_weights_prove_nothing():
    network = mlp()
    with torch.no_grad():
        network[1].weight[0, 0] = torch.nan
    graph = capture(mlp(), (1, 4, 4))
    with torch.no_grad():
        graph.nodes[2].operation.weight.copy_(network[1].weight)
    found = branch_and_bound(graph, whole_box(2, (1, 4, 4)), 100.0, "upper", 50)
    assert bool(found.bound.isnan().all()) and not bool(found.decided.any()) and not bool(found.refuted.any())


def test_wrong_arguments_are_refused():
    network = flat(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(InputError, match=r"layer 2: .*not Tanh"):
        branch_and_bound(capture(network, PLANE), whole_box(), 0.0, "upper", 10)
    graph = capture(shallow(0), PLANE)
    with pytest.raises(InputError, match="gamma must be finite"):
        branch_and_bound(graph, whole_box(), float("nan"), "upper", 10)
    with pytest.raises(InputError, match="at least 1"):
        branch_and_bound(graph, whole_box(), 0.0, "upper", 0)
    with pytest.raises(InputError, match="use upper or lower"):
        branch_and_bound(graph, whole_box(), 0.0, "sideways", 10)


def test_the_benchmark_orders_its_methods(model, monkeypatch):
    from benchmarks import tightness

    monkeypatch.setattr(tightness, "_PRECISION", 0.1)
    records = tightness.measure(model, samples=1, nodes=(4,))
    assert [tuple(record) for record in records] == [tightness.COLUMNS] * len(records)
    for kind in ("id", "ood"):
        shares = [record["median"] for record in records if record["kind"] == kind]
        assert len(shares) == 3 and 0 < shares[0] <= shares[1] <= shares[2] < 1
