"""The bound engines by name, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.engine import BoundedNetwork, Method, way_of
from grood_cert.errors import InputError
from grood_cert.networks.capture import capture
from grood_cert.networks.graph import Graph

Engine = Literal["auto", "native", "auto_lirpa"]
ENGINES: tuple[str, ...] = get_args(Engine)


@dataclass(frozen=True)
class Choice:
    """A network inside the engine that bounds it.

    Attributes:
        engine: "native" or "auto_lirpa".
        bounded: The network.
    """

    engine: Engine
    bounded: BoundedNetwork


def build(
    engine: str,
    network: nn.Module,
    shape: tuple[int, ...],
    method: Method,
    graph: Graph | None = None,
    single: bool = False,
) -> Choice:
    """Put a network into an engine.

    Args:
        engine: "native", "auto_lirpa", or "auto": the native one, which takes every graph; runs have it cross-checked.
        network: The model f: (B, C, H, W) -> (B, K) in eval mode, normalisation included.
        shape: Shape (C, H, W) of one image.
        method: How to bound it.
        graph: The network as a graph, if it has been captured already.
        single: Whether the native engine may compute linear bounds in float32, where the machine is fit for it.

    Raises:
        InputError: If engine or method are unknown, a module is in train mode, or the network cannot be captured; the
            message says why.
        RunError: If the engine asked for is missing or wrong on this machine, or cannot bound the network.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> build("auto", network, (1, 2, 2), "crown").engine
        'native'
    """
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}; use one of {', '.join(ENGINES)}")
    way_of(method)
    graph = graph or capture(network, shape)
    if engine != "auto_lirpa":
        return Choice("native", NativeNetwork(network, shape, method, graph=graph, single=single))
    from grood_cert.bounds.auto_lirpa import LirpaNetwork

    return Choice("auto_lirpa", LirpaNetwork(network, shape, method, graph=graph))
