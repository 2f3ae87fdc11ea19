r"""A network as a graph of operations that bounds can be pushed through: plain data, which needs no code to be loaded.

Node 0 is the image, the last node the logits. Every operation is a linear map, an activation, a maximum pool or the
addition of two nodes (`operations`, `activations`); `capture` makes graphs of modules, `builder` of other sources.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from grood_cert.errors import InputError
from grood_cert.interval import ROUNDING
from grood_cert.networks import activations, operations
from grood_cert.networks.activations import Activation
from grood_cert.networks.operations import (
    Addition,
    AveragePool,
    Convolution,
    LinearMap,
    MaxPool,
    Pad,
    Permute,
    Reshape,
    Scale,
    Selection,
    Separable,
    Transposed,
)
from grood_cert.networks.transposes import Transposes

Operation = LinearMap | Activation | MaxPool | Addition
Deployment = Literal["float64", "float32"]
_NUMBERS = ("weight", "factor", "rows", "columns", "bias", "summed")  # fields that are tensors
_LARGEST = 2**28  # entries of a value for one image
AGREEMENT = 1e-9
_KINDS: dict[str, type[Any]] = {
    name: kind
    for module in (operations, activations)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and issubclass(kind, Operation)
}


@dataclass(frozen=True)
class Node:
    """One layer.

    Attributes:
        operation: What it does; None for the image.
        inputs: Numbers of the nodes it reads.
        shape: Shape of its value without the batch.
        name: Name in the network, for messages.
    """

    operation: Operation | None
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    name: str

    @property
    def size(self) -> int:
        """Number of entries of its value."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Graph:
    """A network in eval mode as nodes in execution order.

    Attributes:
        nodes: Node 0 is the image, the last one the logits.
        deployment: The arithmetic in which the network will be evaluated; bounds cover its rounding (`bounds.rounding`).
    """

    nodes: tuple[Node, ...]
    deployment: Deployment = "float64"

    def deployed(self, deployment: Deployment) -> Graph:
        """The same network, evaluated in another arithmetic.

        Raises:
            InputError: If the arithmetic is unknown, or what an operation computes in it is not known well enough.
        """
        if deployment not in get_args(Deployment):
            raise InputError(f"unknown deployment {deployment!r}; use one of {', '.join(get_args(Deployment))}")
        resampled = [node.name for node in self.nodes if isinstance(node.operation, Separable)]
        if deployment != "float64" and resampled:
            raise InputError(
                f"{resampled[0]} resamples: frameworks round its weights as they like, so nothing can be proved about it in "
                f"{deployment}; use the deployment float64"
            )
        return replace(self, deployment=deployment)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of one image."""
        return self.nodes[0].shape

    @property
    def classes(self) -> int:
        """Number of logits K."""
        return self.nodes[-1].shape[0]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next((tensor.device for node in self.nodes for tensor in _tensors(node.operation)), torch.device("cpu"))

    @functools.cached_property
    def single(self) -> Graph:
        """The same operations in float32, to search with."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.float() if tensor.is_floating_point() else tensor

        return replace(self, nodes=tuple(replace(node, operation=mapped(node.operation, cast)) for node in self.nodes))

    @functools.cached_property
    def transposes(self) -> Transposes:
        """Products with the transposes of its linear maps."""
        return Transposes()

    @property
    def nonlinear(self) -> tuple[int, ...]:
        """Numbers of the activations and maximum pools, in execution order."""
        return tuple(i for i, node in enumerate(self.nodes) if isinstance(node.operation, Activation | MaxPool))

    def values(self, images: Tensor, softening: Callable[[int, Tensor], Tensor | float] | None = None) -> list[Tensor]:
        """The value of every node.

        Args:
            images: Shape (B, C, H, W).
            softening: For searches: called with an activation's number and input, answers the width over which its
                kink is smoothed.

        Returns:
            One tensor a node, the logits last.
        """
        found = [images]
        for number, node in enumerate(self.nodes[1:], 1):
            inputs = [found[i] for i in node.inputs]
            operation = node.operation
            if isinstance(operation, Addition):
                found.append(inputs[0] + inputs[1])
            elif softening is not None and isinstance(operation, Activation):
                found.append(operation.softened(inputs[0], softening(number, inputs[0])))
            else:
                assert operation is not None
                found.append(operation(inputs[0]))
        return found

    def __call__(self, images: Tensor) -> Tensor:
        """The logits, shape (B, K)."""
        return deque(self._run(images), maxlen=1)[0]

    def largest(self, images: Tensor) -> float:
        """The largest magnitude of any value on the way, of which rounding is a share."""
        return max(float(value.abs().max()) for value in self._run(images) if value.numel())

    def agrees(self, images: Tensor, logits: Tensor) -> Tensor:
        """Where the graph gives these logits, up to rounding; where they are not finite, nothing is asked.

        Args:
            images: Shape (B, C, H, W), float64.
            logits: What the network gives for them, shape (B, K).

        Returns:
            Shape (B,), bool.
        """
        finite = torch.isfinite(logits).all(1)
        same = torch.ones_like(finite)
        if bool(finite.any()):
            expected = logits[finite]
            rounding = AGREEMENT * float(expected.abs().max()) + ROUNDING * self.largest(images[finite])
            close = torch.isclose(self(images[finite]), expected, rtol=AGREEMENT, atol=rounding)
            same[finite] = close.all(1) & math.isfinite(rounding)
        return same

    def _run(self, images: Tensor) -> Iterator[Tensor]:
        """The value of every node but the image, each let go after its last reader."""
        found: dict[int, Tensor] = {0: images}
        last = {origin: number for number, node in enumerate(self.nodes) for origin in node.inputs}
        for number, node in enumerate(self.nodes[1:], 1):
            inputs = [found[origin] for origin in node.inputs]
            operation = node.operation
            assert operation is not None
            found[number] = inputs[0] + inputs[1] if isinstance(operation, Addition) else operation(inputs[0])
            yield found[number]
            for origin in node.inputs:
                if last[origin] == number:
                    found.pop(origin, None)

    def to_plain(self) -> list[dict[str, Any]]:
        """The nodes as plain containers, numbers and tensors on the CPU, as `from_plain` reads them.

        Tensors are float32 where that loses nothing, as after training.
        """
        return [
            {
                "name": node.name,
                "inputs": list(node.inputs),
                "shape": list(node.shape),
                "operation": _plain(node.operation),
            }
            for node in self.nodes
        ]

    @staticmethod
    def from_plain(content: Any) -> Graph:
        """Read what `to_plain` wrote; every shape is worked out anew.

        Raises:
            InputError: If it is no graph.

        Example:
            >>> scale = operations.Scale(torch.tensor(2.0).double(), None)
            >>> graph = Graph((Node(None, (), (3,), "image"), Node(scale, (0,), (3,), "double")))
            >>> Graph.from_plain(graph.to_plain())(torch.ones(1, 3).double())
            tensor([[2., 2., 2.]], dtype=torch.float64)
        """
        try:
            nodes: list[Node] = []
            for item in content:
                name, inputs = str(item["name"]), tuple(int(i) for i in item["inputs"])
                operation = _revived(item["operation"])
                shape = tuple(int(size) for size in item["shape"])
                if (operation is None) != (not nodes) or len(inputs) != arity(operation):
                    raise InputError(f"node {name}: it does not read what it computes from")
                if any(not 0 <= i < len(nodes) for i in inputs):
                    raise InputError(f"node {name}: it reads a node that does not come before it")
                if min(shape, default=1) < 0 or math.prod(shape) > _LARGEST:
                    raise InputError(f"node {name}: no value has the shape {shape}")
                if operation is not None:
                    _check(operation, [nodes[i].shape for i in inputs], shape, name)
                nodes.append(Node(operation, inputs, shape, name))
            if len(nodes) < 2 or len(nodes[-1].shape) != 1 or not nodes[-1].size:
                raise InputError("it has no logits")
            return Graph(tuple(nodes))
        except Exception as error:
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            raise InputError(f"this is no graph of a network ({kind}{' '.join(str(error).split())[:160]})") from error


def _check(operation: Operation, shapes: list[tuple[int, ...]], shape: tuple[int, ...], name: str) -> None:
    """Refuse an operation of which forward pass, transpose and facts for proofs would not belong together.

    Sizes are worked out before anything is computed: a small file must not ask for a large value.
    """
    source = shapes[0]
    match operation:
        case Activation():
            own = {key: value for key, value in vars(operation).items() if key in ("slope", "alpha", "beta")}
            fits = all(type(value) is float and 0 <= value < math.inf for value in own.values())
            fits = fits and operation == type(operation)(**own)  # what follows from the function is no field of its own
            fits = fits and own.get("slope", 0) <= 1 and min(own.get("alpha", 1), own.get("beta", 1)) > 0
        case Convolution() | AveragePool() | MaxPool():
            fits = tuple(operation.input_size) == source[1:]
        case Transposed():
            layer = operation.operation
            fits = isinstance(layer, Convolution) and layer.bias is None and tuple(layer.input_size) == shape[1:]
        case Reshape():
            fits = operation.input_shape == source and operation.output_shape == shape
        case Permute():
            fits = sorted(operation.order) == list(range(len(source)))
        case Pad():
            sizes = zip(source, operation.margins, strict=True)
            fits = shape == tuple(size + before + after for size, (before, after) in sizes)
        case Selection():
            axis, index = operation.axis, operation.index
            fits = 0 <= axis < len(source) and operation.length == source[axis] and index.dtype == torch.int64
            fits = fits and bool(((index >= 0) & (index < source[axis])).all())
        case Scale():
            fits = source == shape
        case _:
            fits = True
    for part in (operation, operation.operation) if isinstance(operation, Transposed) else (operation,):
        numbers = {key: value for key, value in vars(part).items() if key in _NUMBERS}
        fits = fits and all(
            (isinstance(value, Tensor) and value.is_floating_point()) or (value is None and key in ("bias", "summed"))
            for key, value in numbers.items()
        )
        fits = fits and (numbers.get("summed") is None or _sums_up(numbers["bias"], numbers["summed"]))
    with torch.device("meta"):
        found = shape_after(mapped(operation, lambda tensor: tensor.to("meta")), shapes) if fits else None
    if found != shape or shape_after(operation, shapes) != shape:
        raise InputError(f"node {name}: its {type(operation).__name__} does not lead from shape {source} to {shape}")


def _sums_up(bias: Tensor | None, summed: Tensor) -> bool:
    return bias is not None and bias.shape == summed.shape and bool((summed >= bias.abs()).all())


def arity(operation: Operation | None) -> int:
    """How many nodes an operation reads; None is the image."""
    return 0 if operation is None else 2 if isinstance(operation, Addition) else 1


def shape_after(operation: Operation, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of an operation's value, without the batch.

    Raises:
        InputError: If the operation does not take values of these shapes.
    """
    if isinstance(operation, Addition):
        if shapes[0] != shapes[1]:
            raise InputError(f"an addition of shapes {shapes[0]} and {shapes[1]}")
        return shapes[0]
    tensor = next(iter(_tensors(operation)), torch.zeros(()))
    kind = tensor.dtype if tensor.is_floating_point() else torch.float64
    try:
        with torch.no_grad():
            found = operation(torch.zeros(1, *shapes[0], dtype=kind, device=tensor.device))
    except (RuntimeError, IndexError) as error:
        raise InputError(
            f"{type(operation).__name__} does not take a value of shape {shapes[0]} ({str(error).splitlines()[0]})"
        ) from error
    if len(found) != 1:
        raise InputError(f"{type(operation).__name__} does not keep the images of a batch apart")
    return tuple(found.shape[1:])


def _tensors(operation: Operation | None) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(operation, note)
    return found


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An operation with every tensor changed, in the order of its fields."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return replace(value, **{name: mapped(part, change) for name, part in parts.items()})
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        single = value.float() if value.is_floating_point() else value
        return single.clone() if torch.equal(single.to(value.dtype), value) else value.clone()
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _revived(value: Any) -> Any:
    if isinstance(value, Mapping):
        fields = {name: _revived(part) for name, part in value.items() if name != "kind"}
        if value["kind"] not in _KINDS:
            raise InputError(f"unknown operation {value['kind']!r}")
        return _KINDS[value["kind"]](**fields)
    if isinstance(value, list):
        return tuple(_revived(part) for part in value)
    if isinstance(value, Tensor):
        if (
            type(value) is not Tensor
            or value.layout != torch.strided
            or value.dtype not in (torch.float64, torch.float32, torch.int64)
        ):
            raise InputError(f"it holds a tensor of another kind, {value.dtype}")
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise InputError("it holds a tensor larger than its numbers")
        if not bool(torch.isfinite(value).all()):
            raise InputError("it holds numbers that are not finite")
        return value.double() if value.is_floating_point() else value
    return value
