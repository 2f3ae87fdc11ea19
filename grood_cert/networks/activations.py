r"""Activation functions with the two facts that bounds need: the range of sigma and of sigma' on an interval.

The derivative of a ReLU at its kink is set valued (Clarke): [0, 1]. The range is therefore {1} only if l > 0 and {0}
only if u < 0, both strict; l = u = 0 gives [0, 1]. Ranges of smooth functions follow from where sigma' rises and
falls, and are widened by 1e-12 relative and 1e-15 absolute for rounding.

*Lines.* sigma(z) <= k z + c holds on [l, u] for any slope k and c = max sigma(z) - k z. The interval is cut into cells;
on a cell [x, y] with sigma' in [s, t] the mean value theorem bounds g(z) = sigma(z) - k z from both ends,

    g(z) <= g(x) + (t - k)(z - x),        g(z) <= g(y) + (k - s)(y - z),

and c is the largest of these bounds. The slope is the one that makes the line lowest in the middle of [l, u], which is
the smallest area under it, by bisection over the cells' ends. Lines below are the same for -sigma.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from grood_cert.interval import ROUNDING

_ABSOLUTE = 1e-15
_SQRT_TWO = math.sqrt(2)
_CUBIC = 0.044715
_FAR = 50.0  # where derivatives have reached their limits
_CELLS = 8  # even: the middle is an end of two
_BISECTIONS = 7
_BLOCK = 2**14  # intervals at a time
_ULPS = 16.0  # rounding of a line's constant

Lines = tuple[Tensor, Tensor, Tensor, Tensor]


class Activation(ABC):
    """An elementwise function sigma.

    Attributes:
        steepest: sup |sigma'| over the real line.
        lowest_slope: inf sigma' over the real line.
        bottom: Where sigma turns from falling to rising; None if it is increasing.
    """

    steepest: float
    lowest_slope: float = 0.0
    bottom: float | None = None

    @abstractmethod
    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""

    @abstractmethod
    def slopes(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest element of the (Clarke) derivative on [lower, upper]."""

    def slopes_between(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """The same on each cell between neighbours of a rising sequence, shape (cells + 1, n) to (cells, n)."""
        return self.slopes(ends[:-1], ends[1:])

    def error(self, upper: Tensor) -> Tensor | float:
        """How far torch's sigma may lie from the function proved about, beyond rounding, for all z <= upper."""
        del upper
        return 0.0

    def values(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest sigma on [lower, upper]: the ends, and the bottom where it lies inside."""
        first, last, error = self(lower), self(upper), self.error(upper)
        if self.bottom is None:
            return (first - error, last + error) if isinstance(error, Tensor) or error else (first, last)
        low = torch.minimum(first, last)
        inside = (lower <= self.bottom) & (upper >= self.bottom)
        lowest = self(torch.full_like(low, self.bottom)) - _ABSOLUTE
        return torch.where(inside, torch.minimum(low, lowest), low), torch.maximum(first, last)

    def lines(self, lower: Tensor, upper: Tensor) -> Lines:
        r"""Lines around sigma on [l, u]: slope and constant below, slope and constant above; proof at the top.

        On each side the better one in the middle of that proof's line and the mean value theorem's with the smallest
        derivative s, sigma(l) + s (z - l) <= sigma(z) <= sigma(u) - s (u - z). Level lines around infinite intervals.
        """
        blocks = zip(lower.flatten().split(_BLOCK), upper.flatten().split(_BLOCK), strict=True)
        below, below_constant, above, above_constant = zip(*(self._lines(*ends) for ends in blocks), strict=True)
        parts = below, below_constant, above, above_constant
        first, second, third, fourth = (torch.cat(part).reshape(lower.shape) for part in parts)
        return first, second, third, fourth

    def _lines(self, lower: Tensor, upper: Tensor) -> Lines:
        """The same for vectors."""
        cells = _Cells(self, lower, upper)
        level = ~torch.isfinite(upper - lower)
        lowest, highest = self.values(lower, upper)
        slope, middle = cells.smallest, (lower + upper) / 2
        found: list[Tensor] = []
        for sign, end, extreme in ((-1, lower, lowest), (1, upper, highest)):
            plain = self(end) + sign * self.error(upper) - slope * end
            better, constant = cells.line(sign)
            wins = sign * (better * middle + constant) < sign * (slope * middle + plain)
            found.append(torch.where(level, 0.0, torch.where(wins, better, slope)))
            found.append(torch.where(level, extreme, torch.where(wins, constant, plain)))
        return found[0], found[1], found[2], found[3]

    def softened(self, values: Tensor, width: Tensor | float) -> Tensor:
        """A smooth stand-in for a function with a kink, for searches only; a smooth function is its own."""
        del width
        return self(values)


class _Cells:
    """Intervals, shape (n,), cut into cells, and the lines that follow; notation at the top.

    Attributes:
        smallest: Smallest derivative on each interval.
    """

    def __init__(self, function: Activation, lower: Tensor, upper: Tensor) -> None:
        share = torch.arange(_CELLS).to(lower).unsqueeze(1) / _CELLS
        inner = torch.minimum(lower + (upper - lower) * share, upper)
        self._ends = torch.cat([inner, upper.unsqueeze(0)])
        self._values, self._error = function(self._ends), function.error(upper)
        self._low, self._high = function.slopes_between(self._ends)
        self.smallest, self._largest = self._low.amin(0), self._high.amax(0)
        size = torch.maximum(lower.abs(), upper.abs()) * (self.smallest.abs() + self._largest.abs())
        self._margin = _ULPS * torch.finfo(lower.dtype).eps * (size + self._values.abs().amax(0))

    def line(self, sign: int) -> tuple[Tensor, Tensor]:
        """Slope and constant of the line above (sign 1) or below (sign -1)."""
        slope = self.smallest + (self._largest - self.smallest) * self._share(sign)
        gap = sign * (self._values - slope * self._ends) + self._error
        rise, fall = (self._high - slope, slope - self._low) if sign > 0 else (slope - self._low, self._high - slope)
        both = rise + fall
        meeting = (rise / (both + (both == 0))).clamp(0, 1)
        inside = torch.lerp(gap[:-1], gap[1:], meeting) + meeting * fall.clamp(min=0) * self._ends.diff(dim=0)
        top = torch.maximum(inside.amax(0), gap.amax(0))
        return slope, sign * (top + self._margin)

    def _share(self, sign: int) -> Tensor:
        """Where the best slope lies between the smallest and the largest derivative, as a share of the way."""
        half = _CELLS // 2
        with torch.no_grad():
            arm = sign * (self._ends[half] - self._ends)
            heights, reach = sign * self._values + self.smallest * arm, (self._largest - self.smallest) * arm
            share, step = torch.zeros_like(self.smallest), 0.5
            for _ in range(_BISECTIONS):
                there = torch.addcmul(heights, share + step, reach)
                first, last = there[:half].amax(0), there[half + 1 :].amax(0)
                share, step = share + step * (last > first if sign > 0 else first > last), step / 2
            return share + step


@dataclass(frozen=True)
class LeakyReLU(Activation):
    """max(z, slope z) with 0 <= slope <= 1; slope 0 is the ReLU."""

    slope: float = 0.0
    steepest: float = 1.0

    @property
    def lowest_slope(self) -> float:  # type: ignore[override]
        """The slope left of the kink."""
        return self.slope

    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""
        return functional.relu(values) if self.slope == 0 else functional.leaky_relu(values, self.slope)

    def slopes(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Strict at the kink: l = u = 0 gives [slope, 1]."""
        one = torch.ones_like(lower)
        return torch.where(lower > 0, one, self.slope * one), torch.where(upper < 0, self.slope * one, one)

    def lines(self, lower: Tensor, upper: Tensor) -> Lines:
        r"""CROWN: the chord above; below, slope 1 if the chord is steeper than 1/2 (ReLU: u > -l), else the leak.

        Any slope between the two is sound.
        """
        unstable = (lower < 0) & (upper > 0)
        chord = (upper - self.slope * lower) / (upper - lower)
        stable = torch.where(lower >= 0, torch.ones_like(lower), torch.full_like(lower, self.slope))
        high = torch.where(unstable, chord, stable)
        constant = torch.where(unstable, torch.maximum((self.slope - high) * lower, (1 - high) * upper), 0.0)
        steep = torch.where(chord > 0.5, torch.ones_like(lower), torch.full_like(lower, self.slope))
        return torch.where(unstable, steep, stable), torch.zeros_like(lower), high, constant

    def softened(self, values: Tensor, width: Tensor | float) -> Tensor:
        """The kink smoothed: slope z + (1 - slope) width softplus(z / width)."""
        return self.slope * values + (1 - self.slope) * width * functional.softplus(values / width)


@dataclass(frozen=True)
class ELU(Activation):
    """The function z for z > 0 and alpha (e^z - 1) below, alpha > 0; the derivative at 0 is all between alpha and 1."""

    alpha: float = 1.0

    @property
    def steepest(self) -> float:  # type: ignore[override]
        """At 0, from one side or the other."""
        return max(1.0, self.alpha)

    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""
        return functional.elu(values, self.alpha)

    def slopes(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative alpha e^z rises up to 0; strict there."""
        one = torch.ones_like(lower)
        low, high = _widened(self.alpha * lower.clamp(max=0).exp(), self.alpha * upper.clamp(max=0).exp())
        low = torch.where(lower > 0, one, torch.where(upper < 0, low, low.clamp(max=1)))
        high = torch.where(lower > 0, one, torch.where(upper < 0, high, one * self.steepest))
        return low.clamp(min=0), high.clamp(max=self.steepest)


@dataclass(frozen=True)
class Hardswish(Activation):
    """The function z min(max(z + 3, 0), 6) / 6: 0 up to -3, z from 3 on, z (z + 3) / 6 between."""

    steepest: float = 1.5
    lowest_slope: float = -0.5
    bottom = -1.5

    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""
        return functional.hardswish(values)

    def slopes(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """(2 z + 3) / 6 on what lies between the kinks, which belong to both sides; 0 below, 1 above."""
        between = (lower <= 3) & (upper >= -3)
        ends = _widened((2 * lower.clamp(-3, 3) + 3) / 6, (2 * upper.clamp(-3, 3) + 3) / 6)
        low, high = (torch.where(between, end, other) for end, other in zip(ends, (torch.inf, -torch.inf), strict=True))
        for side, slope in ((lower <= -3, 0.0), (upper >= 3, 1.0)):
            low, high = torch.where(side, low.clamp(max=slope), low), torch.where(side, high.clamp(min=slope), high)
        return low.clamp(min=self.lowest_slope), high.clamp(max=self.steepest)


def _widened(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return low - low.abs() * ROUNDING - _ABSOLUTE, high + high.abs() * ROUNDING + _ABSOLUTE


class Smooth(Activation):
    """A function with a continuous derivative.

    Attributes:
        turns: Where sigma' changes between rising and falling.
    """

    turns: tuple[float, ...] = ()

    @abstractmethod
    def derivative(self, values: Tensor) -> Tensor:
        """sigma'(z)."""

    def slopes(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The ends, and the turning points where they lie inside."""
        return self._slopes(lower, upper, self.derivative(lower), self.derivative(upper))

    def slopes_between(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """The same on each cell between neighbours of a rising sequence, shape (cells + 1, n) to (cells, n)."""
        found = self.derivative(ends)
        return self._slopes(ends[:-1], ends[1:], found[:-1], found[1:])

    def _slopes(self, lower: Tensor, upper: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """From the derivatives at both ends."""
        low, high = torch.minimum(first, last), torch.maximum(first, last)
        for turn in self.turns:
            inside = ((lower <= turn) & (upper >= turn)).to(low)
            value = self.derivative(low.new_tensor(turn))
            low = torch.lerp(low, torch.minimum(low, value), inside)
            high = torch.lerp(high, torch.maximum(high, value), inside)
        low, high = _widened(low, high)
        return low.clamp(min=self.lowest_slope), high.clamp(max=self.steepest)


@dataclass(frozen=True)
class Sigmoid(Smooth):
    """1 / (1 + e^-z); sigma' rises up to 0 and falls after."""

    steepest: float = 0.25
    turns = (0.0,)

    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""
        return torch.sigmoid(values)

    def derivative(self, values: Tensor) -> Tensor:
        """sigma(z) sigma(-z)."""
        return torch.sigmoid(values) * torch.sigmoid(-values)


@dataclass(frozen=True)
class Tanh(Smooth):
    """Tanh z = 2 sigmoid(2z) - 1, with the same shape of derivative."""

    steepest: float = 1.0
    turns = (0.0,)

    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""
        return torch.tanh(values)

    def derivative(self, values: Tensor) -> Tensor:
        """1 - tanh^2 z, without cancellation."""
        return 4 * torch.sigmoid(2 * values) * torch.sigmoid(-2 * values)


@dataclass(frozen=True)
class Softplus(Smooth):
    """log(1 + e^(beta z)) / beta, with an increasing derivative sigmoid(beta z).

    torch switches to z where beta z > 20; the difference to the function proved about is below 2.1e-9 / beta.
    """

    beta: float = 1.0
    steepest: float = 1.0

    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""
        return functional.softplus(values, self.beta)

    def error(self, upper: Tensor) -> Tensor:
        """What torch's switch can cost."""
        return 2.1e-9 / self.beta * (self.beta * upper > 20).to(upper)

    def derivative(self, values: Tensor) -> Tensor:
        """Of the function proved about."""
        return torch.sigmoid(self.beta * values)

    def _slopes(self, lower: Tensor, upper: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Up to 1 where torch has switched to the identity."""
        low, high = super()._slopes(lower, upper, first, last)
        return low, torch.where(self.beta * upper >= 20, torch.ones_like(high), high)


@dataclass(frozen=True)
class GELU(Smooth):
    """The function z Phi(z); sigma'' = phi(z) (2 - z^2), so sigma' rises exactly on [-sqrt 2, sqrt 2]."""

    steepest: float = 1.1289041452  # the value at sqrt 2, rounded up
    lowest_slope: float = -0.1289041452
    turns = (-_SQRT_TWO, _SQRT_TWO)
    bottom = -0.7517915246935645

    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""
        result: Tensor = functional.gelu(values)
        return result

    def derivative(self, values: Tensor) -> Tensor:
        """Phi(z) + z phi(z)."""
        values = values.clamp(-_FAR, _FAR)
        density = torch.exp(-values.square() / 2) / math.sqrt(2 * math.pi)
        cumulative: Tensor = 0.5 * torch.special.erfc(-values / _SQRT_TWO)
        return cumulative + values * density


@dataclass(frozen=True)
class TanhGELU(Smooth):
    r"""The function z (1 + tanh v) / 2 with v = sqrt(2 / pi) (z + a z^3), a = 0.044715.

    sigma'' has the sign of 1 - sqrt(2 / pi) z tanh(v) (1 + 3 a z^2)^2 / (1 + 6 a z^2). What is subtracted rises with
    |z|, so sigma' rises exactly between the two turns.
    """

    steepest: float = 1.1289930687
    lowest_slope: float = -0.1289930687
    turns = (-1.4185040087908284, 1.4185040087908284)
    bottom = -0.7524614220710163

    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""
        result: Tensor = functional.gelu(values, approximate="tanh")
        return result

    def derivative(self, values: Tensor) -> Tensor:
        """(1 + tanh v) / 2 + z v' (1 - tanh^2 v) / 2, without cancellation."""
        values = values.clamp(-_FAR, _FAR)
        factor, square = math.sqrt(2 / math.pi), values.square()
        inner = 2 * factor * values * (1 + _CUBIC * square)
        rise = factor * (1 + 3 * _CUBIC * square)
        return torch.sigmoid(inner) * (1 + 2 * values * rise * torch.sigmoid(-inner))


@dataclass(frozen=True)
class SiLU(Smooth):
    """The function z sigmoid(z); sigma'' has the sign of 2 - z tanh(z / 2), which falls in |z|."""

    steepest: float = 1.0998393202  # the value at the turn, rounded up
    lowest_slope: float = -0.0998393202
    turns = (-2.3993572805154677, 2.3993572805154677)
    bottom = -1.2784645427610738

    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""
        return functional.silu(values)

    def derivative(self, values: Tensor) -> Tensor:
        """Sigmoid(z) (1 + z sigmoid(-z))."""
        values = values.clamp(-_FAR, _FAR)
        return torch.sigmoid(values) * (1 + values * torch.sigmoid(-values))
