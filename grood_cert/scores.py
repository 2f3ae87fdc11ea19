r"""The scores S of a detector, each a value that every stage takes: proofs, attacks, Lipschitz bounds, smoothing.

    Energy(T)      S(x) = -T log sum_k e^(f_k(x) / T)          "energy", "energy:T=2"
    MaxLogit()     S(x) = -max_k f_k(x)                        "max-logit"
    MSP(T)         S(x) = -max_k softmax(f(x) / T)_k           "msp", "msp:T=2"

All of them are low in-distribution (ID) and high out-of-distribution (OOD): an input is accepted as ID iff its score is
at most gamma. As T falls to 0, the energy becomes the max-logit score.

*Orders.* MSP saturates: where logits lie far apart it is -1 up to rounding and its gradient vanishes. So attacks climb
an increasing function of S in its place. For one class k,

    softmax(f / T)_k = 1 / (1 + e^Q_k),        Q_k = log sum_{j != k} e^((f_j - f_k) / T),

so MSP orders inputs as min_k Q_k does; the other scores are their own order. An order that one class k alone gives is
never below that of all (-f_k for energy and max-logit, Q_k for MSP): lowering it lowers S.

References:
    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020;
    Hendrycks & Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks",
    ICLR 2017 (MSP);
    Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022 (max-logit).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from grood_cert.ball import Norm, dual_norm
from grood_cert.errors import InputError
from grood_cert.interval import STEPS

_LARGEST_ORDER = 750.0  # e^750 is infinite


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Energy S = -T logsumexp(f / T).

    Args:
        logits: f, shape (..., K).
        temperature: T > 0.

    Returns:
        Shape (...).

    Example:
        >>> energy(torch.tensor([[0.0, 0.0]]))
        tensor([-0.6931])
    """
    return -temperature * torch.logsumexp(logits / temperature, dim=-1)


class Score(ABC):
    """A score of logits, low in-distribution.

    Attributes:
        name: Its word.
    """

    name: ClassVar[str]

    @abstractmethod
    def value(self, logits: Tensor) -> Tensor:
        """S of logits of shape (..., K), shape (...)."""

    @abstractmethod
    def of_class(self, logits: Tensor, classes: Tensor) -> Tensor:
        """The order that one class a sample gives, never below `order`; logits (B, K) and classes (B,) to (B,)."""

    @abstractmethod
    def roundoff(self, value: Tensor, classes: int, largest: Tensor, unit: float) -> Tensor:
        """How far an evaluation of S from given logits may be off, shape (...); of a bound of S: how far to move it.

        It covers the rounding of a threshold near S as well. Powers e^-t with an argument rounded by u (t + |m|) weigh at
        most e^-t t <= 1 in a sum, hence a number for each class.

        Args:
            value: S, shape (...).
            classes: K.
            largest: max_k |f_k|, shape (...).
            unit: Unit roundoff u of the arithmetic.
        """

    def order(self, logits: Tensor) -> Tensor:
        """An increasing function of S that does not saturate, shape (...)."""
        return self.value(logits)

    def order_at(self, gamma: float) -> float:
        """The same function of a threshold."""
        return gamma

    def __str__(self) -> str:
        """Its text in manifests, checkpoints and recipes, which `parse` reads."""
        temperature = getattr(self, "temperature", 1.0)
        return self.name if temperature == 1 else f"{self.name}:T={temperature!r}".removesuffix(".0")


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise InputError(f"a temperature must be a number above 0, got {temperature!r}")


def _of_class(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(-1, classes.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Energy(Score):
    """S = -T logsumexp(f / T).

    Raises:
        InputError: If T is not a positive number.

    Example:
        >>> Energy().value(torch.zeros(1, 2)), str(Energy(2.0))
        (tensor([-0.6931]), 'energy:T=2')
    """

    temperature: float = 1.0
    name: ClassVar[str] = "energy"

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def value(self, logits: Tensor) -> Tensor:
        """S of logits of shape (..., K)."""
        return energy(logits, self.temperature)

    def roundoff(self, value: Tensor, classes: int, largest: Tensor, unit: float) -> Tensor:
        """4 u (|S| + T (K + 16))."""
        del largest
        return 4 * unit * (value.abs() + self.temperature * (classes + STEPS))

    def of_class(self, logits: Tensor, classes: Tensor) -> Tensor:
        """-f_k."""
        return -_of_class(logits, classes)


@dataclass(frozen=True)
class MaxLogit(Score):
    """S = -max_k f_k.

    Example:
        >>> MaxLogit().value(torch.tensor([[1.0, 3.0]]))
        tensor([-3.])
    """

    name: ClassVar[str] = "max-logit"

    def value(self, logits: Tensor) -> Tensor:
        """S of logits of shape (..., K)."""
        return -logits.amax(-1)

    def roundoff(self, value: Tensor, classes: int, largest: Tensor, unit: float) -> Tensor:
        """2 u |S|, for the threshold alone."""
        del classes, largest
        return 2 * unit * value.abs()

    def of_class(self, logits: Tensor, classes: Tensor) -> Tensor:
        """-f_k."""
        return -_of_class(logits, classes)


@dataclass(frozen=True)
class MSP(Score):
    """S = -max_k softmax(f / T)_k, in [-1, -1/K].

    Where logits lie far apart it rounds to -1 and inputs tie; use float64.

    Raises:
        InputError: If T is not a positive number.

    Example:
        >>> MSP().value(torch.zeros(1, 2)), MSP().order(torch.zeros(1, 2))
        (tensor([-0.5000]), tensor([0.]))
    """

    temperature: float = 1.0
    name: ClassVar[str] = "msp"

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def value(self, logits: Tensor) -> Tensor:
        """S of logits of shape (..., K)."""
        return -torch.softmax(logits / self.temperature, -1).amax(-1)

    def roundoff(self, value: Tensor, classes: int, largest: Tensor, unit: float) -> Tensor:
        """4 u |S| (K + 16), and a |S| (1 - |S|) with a = 4 u max |f| / T unless T = 1, where a quotient is rounded.

        Moved by that, S rises and falls with S as long as a < 1 / 2; infinite from 1 / 4 on.
        """
        size = value.abs()
        count = 4 * unit * size * (classes + STEPS)
        if self.temperature == 1:
            return count
        spread = 4 * unit * largest / self.temperature
        return torch.where(spread < 0.25, count + spread * size * (1 - size).clamp(min=0), torch.inf)

    def of_class(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Q_k."""
        if logits.shape[-1] == 1:
            return 0 * logits.squeeze(-1)  # S is -1 everywhere
        own = classes.unsqueeze(-1)
        others = (logits - logits.gather(-1, own)).scatter(-1, own, -torch.inf)
        return torch.logsumexp(others / self.temperature, -1)

    def order(self, logits: Tensor) -> Tensor:
        """min_k Q_k."""
        return self.of_class(logits, logits.argmax(-1))

    def order_at(self, gamma: float) -> float:
        """log((1 + gamma) / -gamma), kept finite outside (-1, 0), where S decides nothing."""
        if gamma >= 0:
            return _LARGEST_ORDER
        return max(math.log1p(gamma) - math.log(-gamma), -_LARGEST_ORDER) if gamma > -1 else -_LARGEST_ORDER


ENERGY = Energy()
SCORES: dict[str, type[Score]] = {kind.name: kind for kind in (Energy, MaxLogit, MSP)}


def named(name: str, temperature: float = 1.0) -> Score:
    """The score of a name at a temperature, which max-logit does not have.

    Raises:
        InputError: If there is no such score, or the temperature is not positive.

    Example:
        >>> named("msp", 2.0), named("max-logit", 2.0)
        (MSP(temperature=2.0), MaxLogit())
    """
    if name not in SCORES:
        raise InputError(f"unknown score {name!r}; use one of {', '.join(SCORES)}")
    kind = SCORES[name]
    return kind() if kind is MaxLogit else kind(temperature)  # type: ignore[call-arg]


def parse(text: str) -> Score:
    """The score that a text names: "energy", "energy:T=2", "max-logit", "msp", "msp:T=0.5".

    Raises:
        InputError: If it names none.

    Example:
        >>> parse("energy:T=2"), parse(str(MSP(0.5))) == MSP(0.5)
        (Energy(temperature=2.0), True)
    """
    name, colon, setting = text.partition(":")
    key, _, value = setting.partition("=")
    if not colon:
        return named(name)
    try:
        temperature = float(value)
    except ValueError:
        temperature = math.nan
    if key != "T" or math.isnan(temperature) or name == MaxLogit.name:
        raise InputError(f"score {text!r}: expected energy, energy:T=2, max-logit, msp or msp:T=2")
    return named(name, temperature)


def score_gradient(network: nn.Module, images: Tensor, score: Score = ENERGY) -> tuple[Tensor, Tensor]:
    r"""Score and its gradient with respect to the pixels, sample by sample.

    Differentiates sum_i S(x_i): equal to the per-sample gradients as long as samples do not influence one another,
    so the network must be in eval mode if it holds BatchNorm.

    Args:
        network: f, normalisation included.
        images: Pixels in [0, 1], shape (B, C, H, W).
        score: S.

    Returns:
        S(x_i), shape (B,), and grad S(x_i), shape (B, C, H, W); both detached.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(2, 1))  # one logit w.x + b: grad S = -w
        >>> _, gradient = score_gradient(network, torch.zeros(3, 1, 1, 2))
        >>> torch.equal(gradient[2].flatten(), -network[1].weight.detach().flatten())
        True
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        value = score.value(network(images))
        (gradient,) = torch.autograd.grad(value.sum(), images)
    return value.detach(), gradient.detach()


def gradient_norm_estimate(network: nn.Module, images: Tensor, norm: Norm, score: Score = ENERGY) -> Tensor:
    r"""||grad S(x)||_q in the dual of the ball's norm: a lower *estimate* of the local Lipschitz constant.

    Args:
        network: f in eval mode, normalisation included.
        images: Pixels in [0, 1], shape (B, C, H, W).
        norm: Norm of the ball, "linf" (q = 1), "l2" (q = 2) or "l1" (q = inf).
        score: S.

    Returns:
        Shape (B,), per pixel unit.
    """
    return dual_norm(score_gradient(network, images, score)[1], norm)
