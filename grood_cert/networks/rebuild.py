"""A graph as a plain PyTorch module: what auto_LiRPA sees of a network, and what a saved foreign network becomes.

Nothing of the module that a graph was captured from is left in it: no hooks, no classes, no conditions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grood_cert.networks.activations import LeakyReLU, Sigmoid, Tanh
from grood_cert.networks.graph import Graph, Node, Operation, mapped
from grood_cert.networks.operations import (
    Addition,
    AveragePool,
    Convolution,
    Dense,
    MaxPool,
    Pad,
    Reshape,
    Scale,
    channelwise,
)

_DIAGONAL = 4096  # entries of a vector up to which a diagonal map is written as a matrix


class Rebuilt(nn.Module):
    """A network made of a graph; f: (B, C, H, W) -> (B, K), in eval mode, without gradients to its parameters.

    Args:
        graph: The graph.

    Example:
        >>> from grood_cert.networks.capture import capture
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> Rebuilt(capture(network, (1, 2, 2))).layers
        ModuleList(
          (0): Flatten(start_dim=1, end_dim=-1)
          (1): Linear(in_features=4, out_features=3, bias=True)
          (2): ReLU()
          (3): Linear(in_features=3, out_features=2, bias=True)
        )
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.layers = nn.ModuleList(_layer(node, graph) for node in graph.nodes[1:])
        self._inputs = tuple(node.inputs for node in graph.nodes[1:])
        self._last = {origin: number for number, node in enumerate(graph.nodes) for origin in node.inputs}
        self.to(graph.device, torch.float64).requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        found = {0: images}
        for number, (layer, inputs) in enumerate(zip(self.layers, self._inputs, strict=True), 1):
            found[number] = layer(*(found[origin] for origin in inputs))
            for origin in inputs:
                if self._last[origin] == number:
                    found.pop(origin, None)
        return found[len(self.layers)]


class Sum(nn.Module):
    """The sum of two values."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """First + second."""
        return first + second


class Apply(nn.Module):
    """An operation that no module of PyTorch is; its tensors are parameters, or buffers if they count.

    Args:
        operation: The operation.
    """

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self._operation = operation
        self._names: list[str] = []

        def register(tensor: Tensor) -> Tensor:
            self._names.append(f"tensor{len(self._names)}")
            if tensor.is_floating_point():
                self.register_parameter(self._names[-1], nn.Parameter(tensor.detach().clone()))
            else:
                self.register_buffer(self._names[-1], tensor.clone())
            return tensor

        mapped(operation, register)

    def forward(self, values: Tensor) -> Tensor:
        """The operation's value."""
        names = iter(self._names)
        operation = mapped(self._operation, lambda _: getattr(self, next(names)))
        return operation(values)  # type: ignore[no-any-return]


def _layer(node: Node, graph: Graph) -> nn.Module:
    operation, source = node.operation, graph.nodes[node.inputs[0]].shape
    if isinstance(operation, Addition):
        return Sum()
    if isinstance(operation, Convolution):
        bias = None if operation.bias is None else channelwise(operation.bias, node.shape)
        if (bias is None) == (operation.bias is None):
            return _convolution(operation, bias)
    if isinstance(operation, Dense):
        return _linear(operation.weight, operation.bias)
    if isinstance(operation, Scale):
        return _diagonal(operation, source)
    if isinstance(operation, Pad) and not any(end for pair in operation.margins[1:] for end in pair):
        return _placed(operation, node.shape, source)
    if isinstance(operation, AveragePool) and operation.bias is None:
        return nn.AvgPool2d(operation.kernel, operation.stride, operation.padding)
    if isinstance(operation, MaxPool) and operation.dilation == (1, 1):
        (top, bottom), (left, right) = operation.padding
        if top == bottom <= operation.kernel[0] // 2 and left == right <= operation.kernel[1] // 2:
            return nn.MaxPool2d(operation.kernel, operation.stride, (top, left))
    if isinstance(operation, Reshape) and len(node.shape) == 1 and operation.bias is None:
        return nn.Flatten()
    if isinstance(operation, LeakyReLU):
        return nn.LeakyReLU(operation.slope) if operation.slope else nn.ReLU()
    if type(operation) in (Sigmoid, Tanh):
        return nn.Sigmoid() if type(operation) is Sigmoid else nn.Tanh()
    assert operation is not None
    return Apply(operation)


def _convolution(layer: Convolution, bias: Tensor | None) -> nn.Conv2d:
    weight = layer.weight
    channels, kernel = weight.shape[1] * layer.groups, (weight.shape[2], weight.shape[3])
    options = layer.stride, layer.padding, layer.dilation, layer.groups
    made = nn.Conv2d(channels, weight.shape[0], kernel, *options, bias is not None)
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().reshape(-1).clone())
    return made


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().reshape(-1).clone())
    return made


def _pointwise(matrix: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> nn.Module:
    """A matrix over the first axis of a vector or an image."""
    if len(shape) == 1:
        return _linear(matrix, bias)
    weight, size = matrix[..., None, None], (shape[1], shape[2])
    return _convolution(Convolution(weight, None, (1, 1), (0, 0), (1, 1), 1, size), bias)


def _diagonal(scale: Scale, shape: tuple[int, ...]) -> nn.Module:
    """A diagonal map as a layer, which auto_LiRPA 0.3 gets right, unlike products and sums that broadcast."""
    factor, bias = (None if part is None else channelwise(part, shape) for part in (scale.factor, scale.bias))
    if len(shape) not in (1, 3) or factor is None or (bias is None) != (scale.bias is None) or shape[0] > _DIAGONAL:
        return Apply(scale)
    return _pointwise(torch.diag(factor), bias, shape)


def _placed(pad: Pad, target: tuple[int, ...], shape: tuple[int, ...]) -> nn.Module:
    """Channels put between zeros, or cut, as a layer of zeros and ones."""
    bias = None if pad.bias is None else channelwise(pad.bias, target)
    if len(shape) not in (1, 3) or (bias is None) != (pad.bias is None) or max(shape[0], target[0]) > _DIAGONAL:
        return Apply(pad)
    units = torch.eye(shape[0], dtype=torch.float64)
    return _pointwise(Pad((pad.margins[0], (0, 0)))(units.unsqueeze(0))[0], bias, shape)
