r"""What a bound engine is: its methods, and what it is asked for.

An engine holds a network f and gives sound bounds of rows of its logits over balls,

    LB[c] <= c . f(x') <= UB[c]        for all x' in B.

`grood_cert.bounds.crown` is our own, `grood_cert.bounds.auto_lirpa` the adapter of auto_LiRPA.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor, nn

from grood_cert.ball import Ball
from grood_cert.errors import InputError
from grood_cert.interval import Interval
from grood_cert.networks.graph import Graph

Method = Literal["ibp", "crown-ibp", "crown"]
Side = Literal["upper", "lower"]
Source = Literal["ibp", "crown"]


@dataclass(frozen=True)
class Way:
    """How a method bounds a network; the other stages ask for nothing else.

    Attributes:
        hidden: Where bounds of the hidden layers come from: intervals, or linear bounds intersected with them.
        rows: Where those of rows of the logits come from: rows pulled back to the last nonlinear layer and closed by
            its intervals, or pulled back to the image.
    """

    hidden: Source
    rows: Source


METHODS: dict[Method, Way] = {
    "ibp": Way(hidden="ibp", rows="ibp"),
    "crown-ibp": Way(hidden="ibp", rows="crown"),
    "crown": Way(hidden="crown", rows="crown"),
}


def way_of(method: str) -> Way:
    """How a method bounds a network.

    Raises:
        InputError: If there is no such method.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
    return METHODS[method]


class Relaxation(Protocol):
    """Bounds of rows of the logits over one batch of balls."""

    def rows(self, coefficients: Tensor, method: Method | None = None) -> Interval:
        """LB[c] and UB[c], shape (B, S) each, of every row c of `coefficients`, shape (B, S, K); NaN: not proved."""
        ...

    def preactivations(self) -> list[Interval]:
        """Bounds of the input of every nonlinear layer, in execution order."""
        ...


class BoundedNetwork(Protocol):
    """A network inside a bound engine."""

    @property
    def method(self) -> Method:
        """How it bounds the network."""
        ...

    @property
    def network(self) -> nn.Module:
        """The network f, in eval mode and float64."""
        ...

    @property
    def graph(self) -> Graph:
        """The same network as a graph of operations, which the bounds are about."""
        ...

    def relax(self, ball: Ball) -> Relaxation:
        """Prepare bounds over a batch of balls."""
        ...


def sign_of(side: Side) -> int:
    """+1 for an upper bound, -1 for a lower one: bounds of sign * S from above.

    Raises:
        InputError: If the side is neither.

    Example:
        >>> sign_of("upper"), sign_of("lower")
        (1, -1)
    """
    if side not in get_args(Side):
        raise InputError(f"unknown side {side!r}; use upper or lower")
    return 1 if side == "upper" else -1


def lirpa_version() -> str | None:
    """Version of the installed auto_LiRPA; None if it is not installed."""
    try:
        return importlib.metadata.version("auto-LiRPA")
    except importlib.metadata.PackageNotFoundError:
        return None
