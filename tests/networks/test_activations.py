"""Ranges of activations, of their derivatives, and the lines around them, against dense samples and torch itself."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from grood_cert.networks.activations import (
    ELU,
    GELU,
    Hardswish,
    LeakyReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
    TanhGELU,
)

DOUBLE = torch.float64
FUNCTIONS = {
    "relu": (LeakyReLU(), nn.ReLU()),
    "leaky": (LeakyReLU(0.2), nn.LeakyReLU(0.2)),
    "sigmoid": (Sigmoid(), nn.Sigmoid()),
    "tanh": (Tanh(), nn.Tanh()),
    "softplus": (Softplus(), nn.Softplus()),
    "steep softplus": (Softplus(4.0), nn.Softplus(4.0)),
    "gelu": (GELU(), nn.GELU()),
    "tanh gelu": (TanhGELU(), nn.GELU("tanh")),
    "silu": (SiLU(), nn.SiLU()),
    "hardswish": (Hardswish(), nn.Hardswish()),
    "elu": (ELU(), nn.ELU()),
    "flat elu": (ELU(0.3), nn.ELU(0.3)),
    "steep elu": (ELU(1.7), nn.ELU(1.7)),
}
SPECIAL = [0.0, -3.0, 3.0, -1.5, 20.0, 5.0]  # kinks, and where torch switches


def intervals(function, seed=0):
    """Of every width and place, with kinks, turning points and the bottom inside, at an end, and just outside."""
    generator = torch.Generator().manual_seed(seed)
    middle = 6 * torch.randn(300, generator=generator, dtype=DOUBLE)
    width = 10 ** (torch.rand(300, generator=generator, dtype=DOUBLE) * 12 - 10)
    pairs = [(middle - width, middle + width)]
    turns = [*SPECIAL, *getattr(function, "turns", ())] + ([function.bottom] if function.bottom else [])
    for turn in turns:
        for left, right in ((0.0, 1e-9), (1e-9, 0.0), (0.0, 0.0), (0.1, 0.2), (0.0, 3.0), (30.0, 2.0), (1.0, 30.0)):
            pairs.append((torch.tensor([turn - left], dtype=DOUBLE), torch.tensor([turn + right], dtype=DOUBLE)))
    lower, upper = (torch.cat(ends) for ends in zip(*pairs, strict=True))
    return lower, upper


def points_of(function, lower, upper):
    """Dense samples of each interval, its ends and special points inside, shape (samples, n)."""
    share = torch.linspace(0, 1, 401, dtype=DOUBLE).unsqueeze(1)
    points = torch.minimum(lower + (upper - lower) * share, upper)
    turns = torch.tensor([*SPECIAL, *getattr(function, "turns", ()), function.bottom or 0.0], dtype=DOUBLE).unsqueeze(1)
    return torch.cat([points, upper.unsqueeze(0), torch.clamp(turns, lower, upper)])


def derivative(module, points):
    points = points.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(module(points).sum(), points)
    return found


def lines_hold(lines, values, points, slack):
    slope_low, constant_low, slope_high, constant_high = lines
    below, above = slope_low * points + constant_low, slope_high * points + constant_high
    return bool((below <= values + slack).all() and (above >= values - slack).all())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ranges_and_lines_hold_on_dense_samples(name):
    function, module = FUNCTIONS[name]
    lower, upper = intervals(function)
    points = points_of(function, lower, upper)
    values, slopes = module(points), derivative(module, points)
    torch.testing.assert_close(function(points), values, rtol=0.0, atol=0.0)
    low, high = function.values(lower, upper)
    assert bool(((values >= low - 1e-15 * (1 + points.abs())) & (values <= high + 1e-15 * (1 + points.abs()))).all())
    width = (upper - lower).clamp(min=1e-9)
    tight = (low - values.amin(0)).abs().clamp(min=(high - values.amax(0)).abs())
    assert bool((tight <= 0.02 * width * function.steepest + 5e-9).all())
    low, high = function.slopes(lower, upper)
    assert bool(((slopes >= low - 1e-14) & (slopes <= high + 1e-14)).all())
    assert function.lowest_slope <= float(slopes.min()) and float(slopes.max()) <= function.steepest
    lines = function.lines(lower, upper)
    assert all(bool(torch.isfinite(line).all()) for line in lines)
    assert lines_hold(lines, values, points, 1e-14 * (1 + points.abs()))


@dataclass(frozen=True)
class ForgetsTheTurns(SiLU):
    """A derivative taken to be monotone."""

    turns = ()


@dataclass(frozen=True)
class ForgetsTheBottom(SiLU):
    """Values taken to be monotone."""

    bottom = None


@dataclass(frozen=True)
class ForgetsTheMiddle(SiLU):
    """Lines through the ends alone."""

    def lines(self, lower, upper):
        slope = (self(upper) - self(lower)) / (upper - lower)
        constant = self(lower) - slope * lower
        return slope, constant, slope, constant


def test_wrong_functions_are_seen():
    lower, upper = torch.tensor([-4.0, -2.0, 1.0], dtype=DOUBLE), torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE)
    points = points_of(SiLU(), lower, upper)
    values, slopes = SiLU()(points), derivative(nn.SiLU(), points)
    assert lines_hold(SiLU().lines(lower, upper), values, points, 1e-14)
    assert not lines_hold(ForgetsTheMiddle().lines(lower, upper), values, points, 1e-14)
    assert bool((slopes > ForgetsTheTurns().slopes(lower, upper)[1] + 1e-3).any())
    assert bool((values < ForgetsTheBottom().values(lower, upper)[0] - 1e-3).any())


def hulls(values, points):
    """Distance in the middle between the lowest line above and the highest line below the samples."""
    middle = (points[0] + points[-1]) / 2
    found = 0.0
    for sign in (1, -1):
        low, high = torch.full_like(middle, -3.0), torch.full_like(middle, 3.0)
        for _ in range(22):
            slope = (low + high) / 2
            best = (sign * (values - slope * points)).argmax(0)
            more = points.gather(0, best.unsqueeze(0))[0] > middle
            more = more if sign > 0 else ~more
            low, high = torch.where(more, slope, low), torch.where(more, high, slope)
        found = found + (sign * (values - slope * points)).amax(0) + sign * slope * middle
    return found


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("relu", "leaky")])
def test_lines_are_near_the_best_and_never_worse_than_those_of_the_mean_value_theorem(name):
    function, _ = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(1)
    middle = 3 * torch.randn(100, generator=generator, dtype=DOUBLE)
    width = 10 ** (torch.rand(100, generator=generator, dtype=DOUBLE) * 2 - 1)
    lower, upper = middle - width / 2, middle + width / 2
    slope_low, constant_low, slope_high, constant_high = function.lines(lower, upper)
    area = (slope_high - slope_low) * middle + constant_high - constant_low
    points = torch.minimum(lower + width * torch.linspace(0, 1, 501, dtype=DOUBLE).unsqueeze(1), upper)
    assert float(area.sum()) <= (1.2 if name == "steep elu" else 1.06) * float(hulls(function(points), points).sum())
    slope = function.slopes(lower, upper)[0]
    plain = function(upper) - function(lower) - slope * width
    assert bool((area <= plain + 1e-8).all())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_lines_around_points_huge_and_infinite_intervals(name):
    function, module = FUNCTIONS[name]
    for value in (0.0, -0.75, 3.0, -3.0, 1e-300, 123.456, -1e300, 1e300):
        lower = torch.tensor([value], dtype=DOUBLE)
        for upper in (lower, lower + abs(value) * 1e-16, torch.nextafter(lower, lower + 1e308)):
            lines = function.lines(lower, upper)
            assert all(bool(torch.isfinite(line).all()) for line in lines)
            ends = torch.stack([lower, upper])
            assert lines_hold(lines, module(ends), ends, 1e-14 * (1 + ends.abs()))
    for lower, upper in ((-1e300, 1e300), (-1e300, 1.0), (-1.0, 1e300), (-1e8, 1e4)):
        ends = torch.tensor([lower], dtype=DOUBLE), torch.tensor([upper], dtype=DOUBLE)
        lines = function.lines(*ends)
        assert all(bool(torch.isfinite(line).all()) for line in lines)
        points = points_of(function, *ends)
        assert lines_hold(lines, module(points), points, 1e-14 * (1 + points.abs()))
    if name in ("sigmoid", "tanh"):
        infinite = torch.tensor([math.inf], dtype=DOUBLE)
        assert [float(line) for line in function.lines(-infinite, infinite)] == [0.0, 1.0 * -(name == "tanh"), 0.0, 1.0]


@pytest.mark.parametrize("name", ["tanh", "gelu", "hardswish", "elu"])
def test_derivatives_of_lines_agree_with_finite_differences(name):
    function, _ = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(2)
    lower = torch.randn(40, generator=generator, dtype=DOUBLE)
    upper = lower + torch.rand(40, generator=generator, dtype=DOUBLE) + 0.01
    middle = (lower + upper) / 2

    def height(lower, upper):
        slope_low, constant_low, slope_high, constant_high = function.lines(lower, upper)
        return (slope_high - 2 * slope_low) * middle + constant_high - 2 * constant_low

    ends = lower.requires_grad_(True), upper.requires_grad_(True)
    found = torch.autograd.grad(height(*ends).sum(), ends)
    for index, gradient in enumerate(found):
        moved = [[end.detach() + sign * 1e-6 * (place == index) for place, end in enumerate(ends)] for sign in (1, -1)]
        expected = (height(*moved[0]) - height(*moved[1])).detach() / 2e-6
        near = (gradient - expected).abs() < 1e-5 * (1 + expected.abs())
        assert float(near.double().mean()) > 0.9  # another cell may take over in between
    point = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    assert bool(torch.isfinite(torch.autograd.grad(sum(function.lines(point, point)).sum(), point)[0]).all())


def test_stated_extremes_of_derivatives_are_reached():
    for function in (GELU(), TanhGELU(), SiLU()):
        low, high = function.derivative(torch.tensor(function.turns, dtype=DOUBLE)).tolist()
        assert function.lowest_slope <= low <= function.lowest_slope + 1e-9
        assert function.steepest - 1e-9 <= high <= function.steepest
        points = torch.linspace(-9, 9, 100001, dtype=DOUBLE)
        torch.testing.assert_close(function.derivative(points), derivative(function, points), rtol=1e-9, atol=1e-14)
        rises = function.derivative(points).diff() > 1e-15
        inside = (points[1:] > function.turns[0] + 1e-3) & (points[:-1] < function.turns[1] - 1e-3)
        outside = ((points[1:] < function.turns[0] - 1e-3) | (points[:-1] > function.turns[1] + 1e-3)) & (
            points[1:].abs() < 7
        )
        assert bool(rises[inside].all()) and not bool(rises[outside].any())
        assert float(derivative(function, torch.tensor([function.bottom], dtype=DOUBLE))) == pytest.approx(0, abs=1e-14)
