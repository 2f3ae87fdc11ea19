r"""Activation functions with the two facts that bounds need: the range of sigma and of sigma' on an interval.

The derivative of a ReLU at its kink is set valued (Clarke): [0, 1]. The range is therefore {1} only if l > 0 and {0}
only if u < 0, both strict; l = u = 0 gives [0, 1]. Ranges of smooth functions follow from where sigma' rises and
falls, and are widened by 1e-12 relative and 1e-15 absolute for rounding.
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
_GELU_MINIMUM = -0.7517915246935645  # GELU'(x) = 0
_SQRT_TWO = math.sqrt(2)


class Activation(ABC):
    """An elementwise function sigma.

    Attributes:
        steepest: sup |sigma'| over the real line.
        lowest_slope: inf sigma' over the real line.
    """

    steepest: float
    lowest_slope: float = 0.0

    @abstractmethod
    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""

    @abstractmethod
    def slopes(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest element of the (Clarke) derivative on [lower, upper]."""

    def values(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest sigma on [lower, upper]; here for an increasing sigma."""
        return self(lower), self(upper)

    def lines(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Lines around sigma on [l, u]: slope and constant below, slope and constant above.

        With s the smallest derivative on the interval, the mean value theorem gives
        sigma(l) + s (z - l) <= sigma(z) <= sigma(u) - s (u - z).
        """
        slope = self.slopes(lower, upper)[0]
        return slope, self(lower) - slope * lower, slope, self(upper) - slope * upper

    def softened(self, values: Tensor, width: Tensor | float) -> Tensor:
        """A smooth stand-in for a function with a kink, for searches only; a smooth function is its own."""
        del width
        return self(values)


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

    def lines(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _widened(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return low - low.abs() * ROUNDING - _ABSOLUTE, high + high.abs() * ROUNDING + _ABSOLUTE


@dataclass(frozen=True)
class Sigmoid(Activation):
    """1 / (1 + e^-z); sigma' rises up to 0 and falls after."""

    steepest: float = 0.25

    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""
        return torch.sigmoid(values)

    def _derivative(self, values: Tensor) -> Tensor:
        return torch.sigmoid(values) * torch.sigmoid(-values)

    def slopes(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The smaller end, and the end nearest to 0."""
        nearest = torch.minimum(torch.maximum(torch.zeros_like(lower), lower), upper)
        low = torch.minimum(self._derivative(lower), self._derivative(upper))
        low, high = _widened(low, self._derivative(nearest))
        return low.clamp(min=0), high


@dataclass(frozen=True)
class Tanh(Sigmoid):
    """Tanh z = 2 sigmoid(2z) - 1, with the same shape of derivative."""

    steepest: float = 1.0

    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""
        return torch.tanh(values)

    def _derivative(self, values: Tensor) -> Tensor:
        return 4 * torch.sigmoid(2 * values) * torch.sigmoid(-2 * values)


@dataclass(frozen=True)
class Softplus(Activation):
    """log(1 + e^(beta z)) / beta, with an increasing derivative sigmoid(beta z).

    torch switches to z where beta z > 20; the difference to the function proved about is below 2.1e-9 / beta.
    """

    beta: float = 1.0
    steepest: float = 1.0

    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""
        return functional.softplus(values, self.beta)

    def slopes(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends; 1 where torch has switched to the identity."""
        low, high = _widened(torch.sigmoid(self.beta * lower), torch.sigmoid(self.beta * upper))
        return low.clamp(min=0), torch.where(self.beta * upper >= 20, torch.ones_like(high), high)

    def values(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends, apart by what torch's switch can cost."""
        return self(lower) - 2.1e-9 / self.beta * (self.beta * upper > 20), self(upper) + 2.1e-9 / self.beta * (
            self.beta * upper > 20
        )

    def lines(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The mean-value lines around the range that covers torch's switch."""
        slope = self.slopes(lower, upper)[0]
        low, high = self.values(lower, upper)
        return slope, low - slope * lower, slope, high - slope * upper


@dataclass(frozen=True)
class GELU(Activation):
    """The function z Phi(z); sigma'' = phi(z) (2 - z^2), so sigma' rises exactly on [-sqrt 2, sqrt 2]."""

    steepest: float = 1.1289041452  # the value at sqrt 2, rounded up
    lowest_slope: float = -0.1289041452

    def __call__(self, values: Tensor) -> Tensor:
        """sigma(z)."""
        result: Tensor = functional.gelu(values)
        return result

    def _derivative(self, values: Tensor) -> Tensor:
        density = torch.exp(-values.square() / 2) / math.sqrt(2 * math.pi)
        cumulative: Tensor = 0.5 * torch.special.erfc(-values / _SQRT_TWO)
        return cumulative + values * density

    def slopes(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The ends, and the turning points -sqrt 2 and sqrt 2 where they lie inside."""
        ends = self._derivative(lower), self._derivative(upper)
        low, high = torch.minimum(*ends), torch.maximum(*ends)
        for turn in (-_SQRT_TWO, _SQRT_TWO):
            inside = (lower <= turn) & (upper >= turn)
            value = self._derivative(torch.full_like(low, turn))
            low = torch.where(inside, torch.minimum(low, value), low)
            high = torch.where(inside, torch.maximum(high, value), high)
        return _widened(low, high)

    def values(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The ends, and the minimum at -0.7518 where it lies inside."""
        ends = self(lower), self(upper)
        low = torch.minimum(*ends)
        inside = (lower <= _GELU_MINIMUM) & (upper >= _GELU_MINIMUM)
        bottom = self(torch.full_like(low, _GELU_MINIMUM)) - _ABSOLUTE
        return torch.where(inside, torch.minimum(low, bottom), low), torch.maximum(*ends)
