r"""A network as a graph of layers that bounds can be pushed through.

`trace` reads a network with torch.fx and turns it into nodes in execution order; node 0 is the image, the last node
the logits. Supported are linear, convolution, BatchNorm (eval), the package's `Normalize`, average, global average
and maximum pooling, flatten, addition, and ReLU, leaky ReLU, sigmoid, tanh, softplus and GELU, as modules or as
functions. Anything else is refused by name: an unknown layer is not certified. Before a graph is returned it has
reproduced the network on random images.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from grood_cert.errors import InputError, RunError
from grood_cert.networks import activations
from grood_cert.networks.activations import Activation
from grood_cert.networks.architectures import Normalize
from grood_cert.networks.checks import check_eval
from grood_cert.networks.operations import Addition, AveragePool, Convolution, Dense, LinearMap, MaxPool, Reshape, Scale

Operation = LinearMap | Activation | MaxPool | Addition
_AGREEMENT = 1e-9


class UntraceableError(InputError):
    """What a network computes hangs on values or shapes in Python code: a trace would hold one path of it alone."""


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
        network: The module that was traced, float64 copy.
    """

    nodes: tuple[Node, ...]
    network: nn.Module

    @property
    def classes(self) -> int:
        """Number of logits K."""
        return self.nodes[-1].shape[0]

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        return _device_of(self.network)

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
        return self.values(images)[-1]


def _device_of(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, Normalize) or super().is_leaf_module(module, qualified_name)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _refuse(name: str, what: str) -> InputError:
    return InputError(f"layer {name}: {what} cannot be bounded; see grood_cert.networks.graph for what can")


def _convolution(layer: nn.Conv2d, shape: tuple[int, ...], name: str) -> Operation:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise _refuse(name, f"Conv2d with padding {layer.padding!r} of mode {layer.padding_mode!r}")
    bias = None if layer.bias is None else layer.bias.reshape(-1, 1, 1)
    size = (shape[1], shape[2])
    options = (_pair(layer.stride), _pair(layer.padding), _pair(layer.dilation), layer.groups)
    return Convolution(layer.weight, bias, *options, size)


def _linear(layer: nn.Linear, shape: tuple[int, ...], name: str) -> Operation:
    if len(shape) != 1:
        raise _refuse(name, f"Linear on values of shape {shape} (flatten them first)")
    return Dense(layer.weight, layer.bias)


def _batch_norm(layer: nn.BatchNorm1d | nn.BatchNorm2d, shape: tuple[int, ...], name: str) -> Operation:
    if layer.running_mean is None or layer.running_var is None:
        raise _refuse(name, "BatchNorm without running statistics")
    factor = (layer.running_var + layer.eps).rsqrt()
    if layer.weight is not None:
        factor = factor * layer.weight
    shift = -layer.running_mean * factor
    if layer.bias is not None:
        shift = shift + layer.bias
    ones = [1] * (len(shape) - 1)
    return Scale(factor.reshape(-1, *ones), shift.reshape(-1, *ones))


def _normalize(layer: Normalize, shape: tuple[int, ...], name: str) -> Operation:
    del shape, name
    return Scale(1 / layer.std, -layer.mean / layer.std)


def _flatten(layer: nn.Flatten, shape: tuple[int, ...], name: str) -> Operation:
    if layer.start_dim != 1 or layer.end_dim not in (-1, len(shape)):
        raise _refuse(name, f"Flatten of dimensions {layer.start_dim} to {layer.end_dim}")
    return Reshape(shape, (math.prod(shape),))


def _average_pool(layer: nn.AvgPool2d, shape: tuple[int, ...], name: str) -> Operation:
    padding = _pair(layer.padding)
    if layer.ceil_mode or layer.divisor_override or (padding != (0, 0) and not layer.count_include_pad):
        raise _refuse(name, "AvgPool2d with ceil_mode, divisor_override or count_include_pad=False")
    return AveragePool(_pair(layer.kernel_size), _pair(layer.stride), padding, (shape[1], shape[2]))


def _global_average_pool(layer: nn.AdaptiveAvgPool2d, shape: tuple[int, ...], name: str) -> Operation:
    if layer.output_size not in (1, (1, 1)):
        raise _refuse(name, f"AdaptiveAvgPool2d({layer.output_size})")
    size = (shape[1], shape[2])
    return AveragePool(size, size, (0, 0), size)


def _max_pool(layer: nn.MaxPool2d, shape: tuple[int, ...], name: str) -> Operation:
    if layer.ceil_mode or layer.return_indices or _pair(layer.dilation) != (1, 1):
        raise _refuse(name, "MaxPool2d with ceil_mode, dilation or return_indices")
    high, wide = _pair(layer.padding)
    padding = (high, high), (wide, wide)
    return MaxPool(_pair(layer.kernel_size), _pair(layer.stride), padding, (1, 1), (shape[1], shape[2]))


def _leaky(layer: nn.LeakyReLU, shape: tuple[int, ...], name: str) -> Operation:
    del shape
    if not 0 <= layer.negative_slope <= 1:
        raise _refuse(name, f"LeakyReLU with slope {layer.negative_slope}, outside [0, 1],")
    return activations.LeakyReLU(layer.negative_slope)


def _softplus(layer: nn.Softplus, shape: tuple[int, ...], name: str) -> Operation:
    del shape
    if layer.threshold != 20 or not layer.beta > 0:
        raise _refuse(name, "Softplus with a threshold other than 20 or a beta that is not positive")
    return activations.Softplus(float(layer.beta))


def _gelu(layer: nn.GELU, shape: tuple[int, ...], name: str) -> Operation:
    del shape
    if layer.approximate != "none":
        raise _refuse(name, f"GELU(approximate={layer.approximate!r})")
    return activations.GELU()


_MODULES: dict[type[nn.Module], Callable[[Any, tuple[int, ...], str], Operation]] = {
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    Normalize: _normalize,
    nn.Flatten: _flatten,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _global_average_pool,
    nn.MaxPool2d: _max_pool,
    nn.LeakyReLU: _leaky,
    nn.Softplus: _softplus,
    nn.GELU: _gelu,
    nn.ReLU: lambda layer, shape, name: activations.LeakyReLU(),
    nn.Sigmoid: lambda layer, shape, name: activations.Sigmoid(),
    nn.Tanh: lambda layer, shape, name: activations.Tanh(),
}
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_ADDITIONS = (operator.add, torch.add, operator.iadd)
_FUNCTIONS: dict[Any, nn.Module] = {
    functional.relu: nn.ReLU(),
    torch.relu: nn.ReLU(),
    "relu": nn.ReLU(),
    torch.sigmoid: nn.Sigmoid(),
    "sigmoid": nn.Sigmoid(),
    torch.tanh: nn.Tanh(),
    "tanh": nn.Tanh(),
}


def _is_flatten(call: fx.Node) -> bool:
    if call.target not in (torch.flatten, "flatten"):
        return False
    arguments = dict(zip(("start_dim", "end_dim"), call.args[1:], strict=False)) | dict(call.kwargs)
    return bool(arguments.get("start_dim") == 1 and arguments.get("end_dim", -1) == -1)


def _operation(call: fx.Node, modules: dict[str, nn.Module], shape: tuple[int, ...]) -> Operation | None:
    """The operation of one traced call; None for the identity."""
    if call.op == "call_module":
        layer = modules[str(call.target)]
        if isinstance(layer, _IDENTITIES):
            return None
        if type(layer) not in _MODULES:
            raise _refuse(str(call.target), type(layer).__name__)
        return _MODULES[type(layer)](layer, shape, str(call.target))
    if call.op in ("call_function", "call_method"):
        if call.target in _ADDITIONS and len(call.all_input_nodes) >= 1 and not call.kwargs:
            if all(isinstance(argument, fx.Node) for argument in call.args):
                return Addition()
        elif call.target in _FUNCTIONS and set(call.kwargs) <= {"inplace"} and len(call.args) == 1:
            layer = _FUNCTIONS[call.target]
            return _MODULES[type(layer)](layer, shape, call.name)
        elif _is_flatten(call):
            return Reshape(shape, (math.prod(shape),))
    raise _refuse(call.name, f"{call.op.replace('_', ' ')} {getattr(call.target, '__name__', call.target)}")


def _nodes(network: nn.Module, shape: tuple[int, ...]) -> tuple[Node, ...]:
    try:
        traced = _Tracer().trace(network)
    except (fx.proxy.TraceError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UntraceableError(
            f"the network cannot be traced into a graph: {reason}; write it without conditions"
        ) from error
    modules = dict(network.named_modules())
    device = _device_of(network)
    nodes = [Node(None, (), shape, "image")]
    number: dict[fx.Node, int] = {}
    for call in traced.nodes:
        if call.op == "placeholder":
            if number:
                raise InputError("the network must take one argument, the images")
            number[call] = 0
            continue
        if call.op == "output":
            result = call.args[0]
            if not isinstance(result, fx.Node) or number[result] != len(nodes) - 1:
                raise InputError("the network must return one tensor of logits, computed last")
            continue
        arguments = [argument for argument in call.args if isinstance(argument, fx.Node)]
        if not all(argument in number for argument in arguments) or not arguments:
            raise _refuse(call.name, f"{call.op} {call.target}")
        inputs = tuple(number[argument] for argument in arguments)
        operation = _operation(call, modules, nodes[inputs[0]].shape)
        if operation is None:
            number[call] = inputs[0]
            continue
        number[call] = len(nodes)
        name = str(call.target) if call.op == "call_module" else call.name
        nodes.append(Node(operation, inputs, _shape_after(operation, [nodes[i].shape for i in inputs], device), name))
    if len(nodes[-1].shape) != 1:
        raise InputError(
            f"the network must return logits of shape (B, K), got (B, {', '.join(map(str, nodes[-1].shape))})"
        )
    return tuple(nodes)


def _shape_after(operation: Operation, shapes: list[tuple[int, ...]], device: torch.device) -> tuple[int, ...]:
    if isinstance(operation, Addition):
        if shapes[0] != shapes[1]:
            raise InputError(f"an addition of shapes {shapes[0]} and {shapes[1]} (broadcasting) cannot be bounded")
        return shapes[0]
    if isinstance(operation, Activation):
        return shapes[0]
    if isinstance(operation, Dense):
        return (operation.weight.shape[0],)
    kind = operation.weight.dtype if isinstance(operation, Convolution) else torch.float32
    with torch.no_grad():
        return tuple(operation(torch.zeros(1, *shapes[0], dtype=kind, device=device)).shape[1:])


def trace(network: nn.Module, shape: tuple[int, ...]) -> Graph:
    r"""Read a network into a graph.

    Args:
        network: f: (B, *shape) -> (B, K) in eval mode, normalisation included. Copied to float64.
        shape: Shape (C, H, W) of one image.

    Returns:
        A graph that equals the network to 1e-9 on random images.

    Raises:
        InputError: If a module is in train mode (BatchNorm would use the batch, dropout would be active), or holds a
            layer that cannot be bounded; the message names it.
        RunError: If the graph does not reproduce the network.

    Example:
        >>> graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), (1, 2, 2))
        >>> [node.name for node in graph.nodes], graph.classes
        (['image', '0', '1', '2', '3'], 2)
    """
    check_eval(network)
    network = copy.deepcopy(network).double().eval().requires_grad_(False)
    graph = Graph(_nodes(network, shape), network)
    images = torch.rand(5, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(graph.device)
    with torch.no_grad():
        expected, got = network(images), graph(images)
    scale = float(expected.abs().max())
    if expected.shape != got.shape or not torch.allclose(expected, got, rtol=_AGREEMENT, atol=_AGREEMENT * scale):
        raise RunError("the traced graph does not reproduce the network on random images; nothing about it is proved")
    return graph


def live_graph(network: nn.Module, shape: tuple[int, ...]) -> Graph:
    r"""The graph over the network's own parameters, as in eval mode whatever the mode, for use inside training.

    Gradients flow to the parameters. BatchNorm reads its running statistics and dropout is the identity: the graph
    is that of the network that will be certified. Trace again after each optimiser step if there is BatchNorm.

    Args:
        network: The network in training.
        shape: Shape (C, H, W) of one image.

    Returns:
        A graph that shares the parameters.
    """
    return Graph(_nodes(network, shape), network)
