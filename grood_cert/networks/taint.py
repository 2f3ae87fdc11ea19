r"""What a network does with the numbers of its images, seen while it runs.

`torch.export` follows a network on stand-ins for its images, and a network may do something else on real ones: it reads
their numbers where that can be hidden (numpy, an address, an exception that it swallows), or asks whether it is being
exported. Here it runs on real images. Memory that was computed from them is tainted: to read it outside of operators is
refused, and the operators on it are written down, to be compared with those of what was exported.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from grood_cert.errors import InputError, said
from grood_cert.networks.graph import AGREEMENT

_READING = frozenset(  # functions of tensors that hand numbers to Python without an operator
    (
        *("numpy", "tolist", "data_ptr", "const_data_ptr", "storage", "untyped_storage", "_typed_storage"),
        *("__array__", "__dlpack__", "__reduce_ex__", "__repr__", "__format__"),
    )
)
_SILENT = frozenset(  # operators that change no number
    (
        *("clone", "_to_copy", "copy_", "copy", "lift_fresh", "lift_fresh_copy", "contiguous"),
        *("_assert_tensor_metadata", "_assert_async", "_functional_assert_async", "_assert_scalar"),
    )
)


@dataclass(frozen=True)
class Step:
    """An operator on what comes from the images.

    Attributes:
        name: The operator.
        constants: Its arguments that do not come from them: numbers, and tensors such as weights.
    """

    name: str
    constants: tuple[Any, ...]

    def equals(self, other: Step) -> bool:
        """Whether the other is the same operator with the same constants."""
        pairs = zip(self.constants, other.constants, strict=False)
        return (
            self.name == other.name
            and len(self.constants) == len(other.constants)
            and all(_equal(first, second) for first, second in pairs)
        )


def steps(network: Callable[[Tensor], Tensor], images: Tensor) -> list[Step]:
    """Run a network and write down the operators on what comes from the images, but for views and copies.

    Args:
        network: f.
        images: Shape (B, C, H, W); cloned.

    Raises:
        InputError: If numbers of the images are read by Python, or random numbers are drawn.

    Example:
        >>> [step.name for step in steps(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU()), torch.rand(1, 1, 2, 2))]
        ['addmm', 'relu']
    """
    own = images.clone()
    taint = _Taint(own)
    try:
        with torch.no_grad(), _still(), _Reading(taint), taint:
            network(own)
    except InputError:
        raise
    except Exception as error:
        reason = said(error)[:160]
        raise InputError(f"the network cannot be followed while it runs ({type(error).__name__}: {reason})") from error
    if taint.read:
        raise InputError(
            "the network cannot be captured: Python conditions or numbers hang on values of the image "
            f"(it reads them by {taint.read}); write it without them"
        )
    return taint.steps


class _Taint(TorchDispatchMode):
    """Follows images through operators.

    Args:
        images: Where taint starts.

    Attributes:
        steps: Operators on tainted memory.
        read: The first function that handed tainted numbers to Python; empty if none did.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.read = ""
        self._held = [images]  # so that no memory is used again
        self._memory = {_memory(images)}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        tainted = self.holds([args, named])
        constants = tuple(_constants([args, named], self.holds)) if tainted else ()
        found = function(*args, **named)
        if tainted:
            schema, name = function._schema, function._schema.name.split("::")[-1]
            if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags):
                self.read = self.read or name
            view = any(result.alias_info and not result.alias_info.is_write for result in schema.returns)
            if not view and name not in _SILENT:
                self.steps.append(Step(name, constants))
            written = [
                value
                for argument, value in zip(schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            for tensor in _tensors([found, written, named.get("out")]):
                self._held.append(tensor)
                self._memory.add(_memory(tensor))
        return found

    def holds(self, values: Any) -> bool:
        """Whether one of the values comes from the images."""
        return any(_memory(tensor) in self._memory for tensor in _tensors(values))


class _Reading(TorchFunctionMode):
    """Notes functions that read numbers without an operator."""

    def __init__(self, taint: _Taint) -> None:
        super().__init__()
        self._taint = taint

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in _READING and self._taint.holds(args):
            self._taint.read = self._taint.read or name
        return function(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _constants(value: Any, tainted: Callable[[Any], bool]) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _constants(part, tainted)
    elif isinstance(value, Mapping):
        yield from _constants([value[key] for key in sorted(value)], tainted)
    elif not (isinstance(value, Tensor) and tainted(value)):
        yield value


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.allclose(
            first.double(), second.double(), rtol=AGREEMENT, atol=0.0, equal_nan=True
        )
    return type(first) is type(second) and (first == second or first is second)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))


@contextmanager
def _still() -> Iterator[None]:
    """Refuse what draws random numbers, and put them back."""
    own, numpy_own = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        before = _random_state()
        try:
            yield
            after = _random_state()
        finally:
            random.setstate(own)
            np.random.set_state(numpy_own)
    if before != after:
        raise InputError("the network draws random numbers in eval mode; it cannot be captured")


def _random_state() -> tuple[bytes, ...]:
    """Where the generators that all share stand: torch's, Python's and numpy's."""
    return torch.get_rng_state().numpy().tobytes(), pickle.dumps(random.getstate()), pickle.dumps(np.random.get_state())


def state(network: nn.Module) -> list[Any]:
    """What a network keeps from call to call: its numbers, and attributes of its modules that are no tensors.

    Example:
        >>> network = nn.Linear(2, 2)
        >>> network.calls = 3
        >>> before = state(network)
        >>> network.calls += 1
        >>> before == state(network)
        False
    """
    tensors = [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.layout == torch.strided]
    rows = [torch.atleast_1d(tensor.detach().cpu()).clone(memory_format=torch.contiguous_format) for tensor in tensors]
    numbers = [row.view(torch.uint8).numpy() for row in rows]  # `contiguous` keeps odd strides where a size is 1
    return [[array.tobytes() for array in numbers], [attributes(module) for module in network.modules()]]


def attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, to be compared with themselves later; tensors and modules among them do not count."""
    return {name: _kept(value) for name, value in vars(module).items() if name not in _PARTS}


_PARTS = frozenset(vars(nn.Module()))


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor | nn.Module):
        return None
    if callable(value):
        return id(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_kept(part) for part in value]
    if isinstance(value, Mapping):
        return [(str(key), _kept(part)) for key, part in value.items()]
    with suppress(Exception):
        return pickle.dumps(value)
    return None
