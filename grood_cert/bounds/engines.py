"""The bound engines by name, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.engine import BoundedNetwork, Method, way_of
from grood_cert.errors import InputError, RunError
from grood_cert.networks.checks import check_eval
from grood_cert.networks.graph import UntraceableError

Engine = Literal["auto", "native", "auto_lirpa"]
ENGINES: tuple[str, ...] = get_args(Engine)


@dataclass(frozen=True)
class Choice:
    """A network inside the engine that bounds it.

    Attributes:
        engine: "native" or "auto_lirpa".
        bounded: The network.
        note: Why "auto" did not take the native engine, as a line; empty if it did.
    """

    engine: Engine
    bounded: BoundedNetwork
    note: str = ""


def build(engine: str, network: nn.Module, shape: tuple[int, ...], method: Method) -> Choice:
    """Put a network into an engine.

    Args:
        engine: "native", "auto_lirpa", or "auto": the native one where it takes the network, else auto_LiRPA.
        network: The model f: (B, C, H, W) -> (B, K) in eval mode, normalisation included.
        shape: Shape (C, H, W) of one image.
        method: How to bound it.

    Raises:
        InputError: If engine or method are unknown, a module is in train mode, or the engine ("auto": neither of them)
            can bound the network, or Python conditions decide what it computes; the message says why.
        RunError: If the engine asked for is missing or wrong on this machine.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> build("auto", network, (1, 2, 2), "crown").engine
        'native'
    """
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}; use one of {', '.join(ENGINES)}")
    way_of(method)
    check_eval(network)
    if engine == "auto_lirpa":
        return Choice("auto_lirpa", _lirpa(network, shape, method))
    try:
        return Choice("native", NativeNetwork(network, shape, method))
    except UntraceableError:
        raise  # auto_LiRPA would follow one path through it without a word
    except (InputError, RunError) as error:
        if engine == "native":
            raise
        reason = str(error)
    try:
        bounded = _lirpa(network, shape, method)
    except (InputError, RunError) as error:
        raise InputError(f"no engine can bound this network: native: {reason}; auto_lirpa: {error}") from None
    return Choice(
        "auto_lirpa", bounded, f"bounds by auto_LiRPA, since the native engine cannot take the network: {reason}"
    )


def _lirpa(network: nn.Module, shape: tuple[int, ...], method: Method) -> BoundedNetwork:
    from grood_cert.bounds.auto_lirpa import LirpaNetwork

    return LirpaNetwork(network, shape, method)
