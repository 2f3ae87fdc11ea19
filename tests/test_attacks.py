from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import nn

from benchmarks import attacks as attacks_benchmark
from grood_cert import attacks, detector
from grood_cert.attacks import AttackEffort
from grood_cert.ball import Ball
from grood_cert.data import experiment_of
from grood_cert.errors import InputError
from grood_cert.networks import architectures
from grood_cert.scores import energy, score_gradient

NORMS = ["linf", "l2", "l1"]
ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(weight, bias=0.0):
    """f = W x + b with one row a logit."""
    layer = nn.Linear(weight.shape[-1], len(torch.atleast_2d(weight)))
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.as_tensor(bias).expand(layer.bias.shape))
    return nn.Sequential(nn.Flatten(), layer).double().eval().requires_grad_(False)


def length(offset, norm):
    return torch.linalg.vector_norm(offset.flatten(1), ord=ORDER[norm], dim=1)


def cheapest(weight, start, gain, norm):
    """min ||d||_p over a . d >= gain in the box, by a general solver: (length, feasible)."""
    size = len(start)
    if norm == "l2":
        bounds = list(zip(-start, 1 - start, strict=True))
        reach = {"type": "ineq", "fun": lambda d: weight @ d - gain, "jac": lambda d: weight}
        first = np.where(weight > 0, 1 - start, -start)
        result = minimize(
            lambda d: d @ d, first, jac=lambda d: 2 * d, bounds=bounds, constraints=[reach], options={"ftol": 1e-15}
        )
        return math.sqrt(result.fun)
    extra = 1 if norm == "linf" else size  # variables d and t with |d_i| <= t, or <= t_i
    t = np.ones((size, 1)) if norm == "linf" else np.eye(size)
    eye = np.eye(size)
    above = np.vstack([np.hstack([eye, -t]), np.hstack([-eye, -t]), np.hstack([-weight, np.zeros(extra)])])
    limits = np.concatenate([np.zeros(2 * size), [-gain]])
    box = [*zip(-start, 1 - start, strict=True), *[(0, None)] * extra]
    return linprog(np.concatenate([np.zeros(size), np.ones(extra)]), above, limits, bounds=box).fun


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("side", ["id", "ood"])
def test_minimum_norm_of_one_linear_logit(norm, side):
    """S = -(w.x + b) and no face of the pixel box in reach: the nearest flip lies at |S - gamma| / ||w||_q."""
    weight = torch.tensor([0.7, -0.4, 0.2, 0.9]).double()
    images = 0.5 + 0.05 * torch.rand(6, 1, 2, 2, generator=generator()).double()
    network = linear(weight, 0.1)
    score = energy(network(images))
    gamma = float(score.max() + 0.05 if side == "id" else score.min() - 0.05)
    found = attacks.minimum_norm(network, images, gamma, norm, generator())
    exact = (score - gamma).abs() / weight.norm(p=DUAL[norm])
    assert bool((found.radius >= exact * (1 - 1e-9)).all())
    torch.testing.assert_close(found.radius, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_minimum_norm_against_the_faces_of_the_pixel_box(norm):
    """Pixels at 0 and 1 can move one way only; a general solver knows the exact distance."""
    draw = torch.rand(8, 1, 2, 3, generator=generator(1)).double()
    images = (1.6 * draw - 0.3).clamp(0, 1)
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.1, 0.8]).double()
    network = linear(weight)
    score = energy(network(images))
    gamma = float(score.min()) - 0.4  # S falls where w.x rises
    found = attacks.minimum_norm(network, images, gamma, norm, generator())
    reachable = torch.where(weight > 0, 1 - images.flatten(1), images.flatten(1)) @ weight.abs() > score - gamma
    assert bool(reachable.any()) and torch.equal(torch.isfinite(found.radius), reachable)
    for index in reachable.nonzero().flatten().tolist():
        exact = cheapest(weight.numpy(), images[index].flatten().numpy(), float(score[index]) - gamma, norm)
        assert float(found.radius[index]) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("side", ["id", "ood"])
def test_minimum_norm_of_two_opposite_logits(norm, side):
    """f = (z, -z) with z = w.x + b: S = -log(2 cosh z), flipped at |z| = arcosh(e^-gamma / 2): two hyperplanes."""
    weight = torch.tensor([1.5, -1.0, 0.5, 2.0]).double()
    images = 0.5 + 0.02 * torch.rand(6, 1, 2, 2, generator=generator()).double()
    network = linear(torch.stack([weight, -weight]), torch.tensor([0.5, -0.5]) if side == "id" else 0.0)
    z = network(images)[:, 0]
    level = float(z.abs().min()) - 0.3 if side == "id" else float(z.abs().max()) + 0.3
    gamma = -math.log(2 * math.cosh(level))
    found = attacks.minimum_norm(network, images, gamma, norm, generator())
    torch.testing.assert_close(found.radius, (z.abs() - level).abs() / weight.norm(p=DUAL[norm]), rtol=1e-5, atol=0)


def test_minimum_norm_of_two_logits_against_a_general_solver():
    """LSE(W x) <= -gamma is convex, so a local solver finds the exact l_2 distance to it, box included."""
    weights = torch.tensor([[2.0, -1.0, 0.5, 1.0], [-0.5, 1.5, 1.0, 0.3]]).double()
    images = torch.rand(5, 1, 2, 2, generator=generator(2)).double()
    network = linear(weights)
    gamma = float(energy(network(images)).max()) + 0.3
    found = attacks.minimum_norm(network, images, gamma, "l2", generator())
    for image, radius in zip(images.flatten(1).numpy(), found.radius.tolist(), strict=True):
        flip = {"type": "ineq", "fun": lambda y: -gamma - np.logaddexp(*(weights.numpy() @ y))}
        exact = minimize(
            lambda y, x=image: (y - x) @ (y - x), image * 0, bounds=[(0, 1)] * 4, constraints=[flip], tol=1e-14
        )
        assert exact.success and radius == pytest.approx(math.sqrt(exact.fun), rel=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_towards_and_onto_solve_their_linear_problems(norm):
    draw = generator(3)
    images = (1.4 * torch.rand(40, 1, 2, 4, generator=draw).double() - 0.2).clamp(0, 1)
    slopes = torch.randn(images.shape, generator=draw).double()
    slopes[:3] *= 0 * slopes[:3] + torch.tensor([0.0, 1e-8, 1e8]).double().reshape(3, 1, 1, 1)
    eps = torch.rand(40, generator=draw).double() * {"linf": 0.5, "l2": 1.0, "l1": 2.0}[norm]
    ball = Ball(images, eps, norm)
    best = attacks.towards(slopes, ball)
    gain = (slopes * (best - images)).flatten(1).sum(1)
    torch.testing.assert_close(gain, ball.support(slopes.flatten(1).unsqueeze(1)).squeeze(1), rtol=1e-9, atol=1e-12)
    # The two problems are each other's inverse wherever the ball binds.
    move = attacks.onto(slopes, images, gain, norm)
    torch.testing.assert_close((slopes * move).flatten(1).sum(1), gain, rtol=1e-9, atol=1e-12)
    assert bool((length(move, norm) <= eps * (1 + 1e-9)).all())
    for index in range(3, 12):
        exact = cheapest(slopes[index].flatten().numpy(), images[index].flatten().numpy(), float(gain[index]), norm)
        assert float(length(move[index : index + 1], norm)) == pytest.approx(exact, rel=1e-5)
    assert bool(((images + move >= -1e-12) & (images + move <= 1 + 1e-12)).all())
    falling = attacks.onto(slopes, images, -gain / 10, norm)
    reached = (slopes * falling).flatten(1).sum(1)
    walls = torch.where(slopes > 0, -images, 1 - images)
    floor = (slopes * walls).flatten(1).sum(1)
    torch.testing.assert_close(reached, torch.maximum(-gain / 10, floor), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_a_score_on_gamma_is_not_flipped(norm):
    """S(x) = gamma, without rounding: x is accepted, and only a point with a larger S has the other decision."""
    network, images = linear(torch.ones(4).double()), torch.full((1, 1, 2, 2), 0.5).double()
    found = attacks.minimum_norm(network, images, -2.0, norm, generator())
    assert float(found.radius) > 0 and float(energy(network(found.points))) > -2.0


def test_nothing_to_find_is_an_infinite_radius():
    network = linear(torch.tensor([0.1, 0.1, 0.1, 0.1]).double())
    images = torch.full((2, 1, 2, 2), 0.5).double()
    found = attacks.minimum_norm(network, images, -50.0, "linf", generator())
    assert bool(torch.isinf(found.radius).all())
    assert torch.equal(found.points, images)


class Saddle(nn.Module):
    """f = (z, -z) with z = w.x + b: at z = 0 the softmax-weighted gradient vanishes, though no logit is flat."""

    def __init__(self, weight, bias):
        super().__init__()
        self.register_buffer("weight", weight)
        self.bias = bias

    def forward(self, images):
        z = images.flatten(1) @ self.weight + self.bias
        return torch.stack([z, -z], 1)


def test_only_a_climb_of_one_logit_leaves_a_flat_score():
    """x is a stationary point of S, exactly, in either precision."""
    network = Saddle(torch.tensor([2.0, -1.0, 0.5, 4.0]).double(), -2.75).eval()
    images = torch.full((1, 1, 2, 2), 0.5).double()
    assert not score_gradient(network, images)[1].any()
    level = 0.6
    gamma = -math.log(2 * math.cosh(level))
    blind = attacks.minimum_norm(network, images, gamma, "linf", generator(), AttackEffort(30, 0, 1))
    assert bool(torch.isinf(blind.radius))
    found = attacks.minimum_norm(network, images, gamma, "linf", generator(), AttackEffort(30, 0, 2))
    assert float(found.radius) == pytest.approx(level / 7.5, rel=1e-6)
    ball = Ball(images, torch.tensor([0.1]).double(), "linf")
    blind, seen = (attacks.extremes(network, [ball], generator(), AttackEffort(30, 0, 1, 30, r))[0] for r in (0, 1))
    assert float(blind.minimum) == pytest.approx(-math.log(2))
    assert float(seen.minimum) == pytest.approx(-math.log(2 * math.cosh(0.75)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return architectures.build("conv-small", (1, 8, 8), 5, [0.3], [0.3], width=4).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trained(model):
    """A trained detector, ID test images it accepts and OOD images it rejects."""
    loaded = detector.load(model)
    experiment = experiment_of(loaded.origin.recipe)
    images = torch.cat([experiment.test.images[:16], *(ood.images[:8] for ood in experiment.ood)]).double()
    return loaded, images


@pytest.mark.parametrize("norm", NORMS)
def test_points_are_witnesses(network, norm):
    """Whatever is returned lies at its stated distance, in the pixel box, and has the other decision."""
    images = torch.rand(20, 1, 8, 8, generator=generator()).double()
    score = energy(network(images))
    gamma = float(score.median()) + 1e-4
    found = attacks.minimum_norm(network, images, gamma, norm, generator())
    hit = torch.isfinite(found.radius)
    assert bool(hit.any())
    points = found.points[hit]
    torch.testing.assert_close(length(points - images[hit], norm), found.radius[hit], rtol=1e-12, atol=0)
    assert bool(((points >= 0) & (points <= 1)).all())
    assert bool(((energy(network(points)) <= gamma) != (score[hit] <= gamma)).all())


@pytest.mark.parametrize("norm", NORMS)
def test_extremes_stay_in_the_ball_and_beat_random_search(network, norm):
    images = torch.rand(5, 1, 8, 8, generator=generator()).double()
    eps = torch.full((5,), {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm]).double()
    ball = Ball(images, eps, norm)
    (seen,) = attacks.extremes(network, [ball], generator())
    for points, value in ((seen.argmin, seen.minimum), (seen.argmax, seen.maximum)):
        assert bool((ball.distance(points) <= eps * (1 + 1e-12)).all())
        assert bool(((points >= 0) & (points <= 1)).all())
        torch.testing.assert_close(energy(network(points)), value, rtol=1e-12, atol=1e-12)
    for index in range(200):
        noise = torch.rand(images.shape, generator=generator(index)).double() * 2 - 1
        if norm != "linf":
            noise = noise / length(noise, norm).reshape(-1, 1, 1, 1)
        score = energy(network((images + ball.per_pixel(eps) * noise).clamp(0, 1)))
        assert bool((seen.minimum <= score).all()) and bool((score <= seen.maximum).all())


@pytest.mark.parametrize("norm", NORMS)
def test_extremes_of_a_linear_score_are_exact(norm):
    weight = torch.tensor([0.7, -0.4, 0.2, 0.9]).double()
    images = torch.full((3, 1, 2, 2), 0.5).double()
    ball = Ball(images, torch.tensor([0.0, 0.1, 0.4]).double(), norm)
    (seen,) = attacks.extremes(linear(weight), [ball], generator())
    center, move = -0.5 * float(weight.sum()), ball.eps * weight.norm(p=DUAL[norm])
    torch.testing.assert_close(seen.maximum, center + move, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(seen.minimum, center - move, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_nested_balls_are_searched_as_one(trained, norm):
    """Each ball holds its points and those of the smaller ones; together they are found as well as one by one."""
    loaded, images = trained
    grid = {"linf": (0.0, 0.02, 0.05, 0.1), "l2": (0.0, 0.1, 0.3, 0.6), "l1": (0.0, 0.3, 0.8, 1.5)}[norm]
    balls = [Ball(images, eps, norm) for eps in grid]
    nearest = attacks.minimum_norm(loaded.network, images, loaded.gamma, norm, generator())
    nested = attacks.extremes(loaded.network, balls, generator(), AttackEffort.preset("fast"), points=nearest.points)
    clean, given = loaded.scores(images), loaded.scores(nearest.points)
    gained = []
    for ball, seen in zip(balls, nested, strict=True):
        for points, value in ((seen.argmin, seen.minimum), (seen.argmax, seen.maximum)):
            assert bool((ball.distance(points) <= ball.eps * (1 + 1e-9)).all())
            torch.testing.assert_close(loaded.scores(points), value, rtol=1e-12, atol=1e-12)
        inside = nearest.radius <= ball.eps
        assert bool(((seen.minimum <= given) & (given <= seen.maximum))[inside].all())
        (alone,) = attacks.extremes(loaded.network, [ball], generator(), AttackEffort(ascent=30))
        gained.append(
            torch.stack([seen.maximum - clean, clean - seen.minimum, alone.maximum - clean, clean - alone.minimum])
        )
    for smaller, larger in itertools.pairwise(nested):
        assert bool((larger.minimum <= smaller.minimum).all()) and bool((smaller.maximum <= larger.maximum).all())
    assert not gained[0].any()
    up, down, up_alone, down_alone = torch.stack(gained).mean((0, 2))
    assert float(up) >= 0.98 * float(up_alone) and float(down) >= 0.98 * float(down_alone)


def textbook_pgd(network, ball, sign, steps):
    """Madry et al. 2018: equal steps of 2.5 eps / steps along the steepest direction, the best point counts."""
    points, best = ball.center, sign * energy(network(ball.center))
    for _ in range(steps):
        gradient = sign * score_gradient(network, points)[1]
        if ball.norm == "l1":
            flat = gradient.flatten(1)
            top = flat.abs().argmax(1, keepdim=True)
            step = torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign()).reshape(gradient.shape)
        else:
            step = gradient.sign() if ball.norm == "linf" else gradient / ball.per_pixel(length(gradient, "l2"))
        points = ball.project(points + ball.per_pixel(2.5 * ball.eps / steps) * step)
        best = torch.maximum(best, sign * energy(network(points)))
    return best


@pytest.mark.parametrize("norm", NORMS)
def test_a_search_is_not_weaker_than_textbook_pgd(trained, norm):
    """With equally many steps from the same start, both ways, averaged over samples."""
    loaded, images = trained
    ball = Ball(images, torch.full((len(images),), {"linf": 0.1, "l2": 0.6, "l1": 1.5}[norm]).double(), norm)
    (seen,) = attacks.extremes(loaded.network, [ball], generator(), AttackEffort(ascent=30, restarts=0, logits=0))
    clean = loaded.scores(images)
    for sign, value in ((1, seen.maximum), (-1, -seen.minimum)):
        moved, reference = value - sign * clean, textbook_pgd(loaded.network, ball, sign, 30) - sign * clean
        assert float(moved.mean()) >= 0.995 * float(reference.mean())


@pytest.mark.parametrize("norm", NORMS)
def test_more_effort_finds_nearer_points(trained, norm):
    loaded, images = trained[0], trained[1][::5]
    efforts = [AttackEffort(4, 0, 1), AttackEffort.preset("fast"), AttackEffort(), AttackEffort(40, 2, 6)]
    means = [
        float(attacks.minimum_norm(loaded.network, images, loaded.gamma, norm, generator(), effort).radius.mean())
        for effort in efforts
    ]
    assert all(more <= less * (1 + 1e-4) for less, more in itertools.pairwise(means))
    assert means[-1] < means[0]


def test_the_attack_is_seeded(network):
    images = torch.rand(4, 1, 8, 8, generator=generator()).double()
    gamma = float(energy(network(images)).median())
    first, second = (
        attacks.minimum_norm(network, images, gamma, "l2", generator(), AttackEffort(5, 2, 2)) for _ in range(2)
    )
    assert torch.equal(first.radius, second.radius) and torch.equal(first.points, second.points)


@pytest.mark.parametrize("norm", NORMS)
def test_samples_do_not_influence_one_another(network, norm):
    """Without random starts, a batch gives what its samples give alone, whichever of them finish early."""
    images = torch.rand(4, 1, 8, 8, generator=generator()).double()
    gamma = float(energy(network(images)).median()) - 0.01
    effort = AttackEffort(20, 0, 3)
    together = attacks.minimum_norm(network, images, gamma, norm, generator(), effort)
    alone = [attacks.minimum_norm(network, image[None], gamma, norm, generator(), effort) for image in images]
    torch.testing.assert_close(together.radius, torch.cat([found.radius for found in alone]), rtol=1e-3, atol=0)
    ball = Ball(images, torch.full((4,), {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm]).double(), norm)
    (seen,) = attacks.extremes(network, [ball], generator(), effort)
    for index in range(4):
        part = Ball(images[index : index + 1], ball.eps[:1], norm)
        (single,) = attacks.extremes(network, [part], generator(), effort)
        torch.testing.assert_close(seen.minimum[index : index + 1], single.minimum, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(seen.maximum[index : index + 1], single.maximum, rtol=1e-3, atol=1e-4)


class NotANumber(nn.Module):
    """One linear logit that is NaN above a level; with level -inf it is NaN everywhere."""

    def __init__(self, level):
        super().__init__()
        self.level = level
        self.weight = nn.Parameter(torch.ones(4).double(), requires_grad=False)

    def forward(self, images):
        z = images.flatten(1) @ self.weight
        return torch.where(z > self.level, torch.nan, z).unsqueeze(1)


@pytest.mark.parametrize("level", [-math.inf, 2.5])
def test_a_score_that_is_no_number_is_no_witness(level):
    """x lies at z = 2, S <= gamma needs z >= 3, and above the level there are only NaN."""
    images = torch.full((1, 1, 2, 2), 0.5).double()
    network = NotANumber(level).eval()
    found = attacks.minimum_norm(network, images, -3.0, "linf", generator())
    assert bool(torch.isinf(found.radius).all()) and torch.equal(found.points, images)
    ball = Ball(images, torch.tensor([0.5]).double(), "linf")
    (seen,) = attacks.extremes(network, [ball], generator())
    if math.isinf(level):
        assert bool(seen.minimum.isnan()) and bool(seen.maximum.isnan())
    else:
        assert -2.5 <= float(seen.minimum) <= float(seen.maximum) == pytest.approx(0)


def test_a_centre_without_a_score_hides_no_other_point():
    images = torch.full((1, 1, 2, 2), 0.5).double()
    ball = Ball(images, torch.tensor([0.5]).double(), "linf")
    (seen,) = attacks.extremes(NotANumber(1.5).eval(), [ball], generator(), points=0 * images)
    assert -1.5 <= float(seen.minimum) <= float(seen.maximum) == 0


def test_a_sharp_network_in_float32_costs_no_truth():
    """S rises by 1e4 within 1e-4 of a pixel: float32 cannot place the border, float64 does."""
    weight = torch.tensor([1e8, -1e8, 0.0, 0.0]).double()
    images = torch.tensor([0.3, 0.3, 0.5, 0.5]).double().reshape(1, 1, 2, 2)
    found = attacks.minimum_norm(linear(weight), images, -1e4, "linf", generator())
    assert 5e-5 * (1 - 1e-9) <= float(found.radius) <= 5e-5 * (1 + 1e-4)


def test_attacks_benchmark(model, monkeypatch):
    """The attack is not weaker than the bisection of textbook PGD it is measured against, here a shorter one."""
    monkeypatch.setattr(attacks_benchmark, "ROUNDS", 6)
    monkeypatch.setattr(attacks_benchmark, "STEPS", 15)
    records = attacks_benchmark.measure(model, 4, ("l2",), ("default",))
    assert {record["effort"] for record in records} == {"pgd-bisection", "default"}
    for record in records:
        assert tuple(record) == attacks_benchmark.COLUMNS
        assert record["ratio"] <= 1.005


def test_effort_is_checked():
    with pytest.raises(InputError, match="restarts and logits >= 0"):
        AttackEffort(restarts=-1)
    with pytest.raises(InputError, match="rounds and ascent >= 1"):
        AttackEffort(rounds=0)
    with pytest.raises(InputError, match="fast, default, max"):
        AttackEffort.preset("thorough")
    for name in attacks.PRESETS:
        assert AttackEffort.preset(name)
