r"""Fewer layers, the same function: diagonal maps are merged into the linear layer before or behind them.

With D = diag(d) and a linear layer W x + b,

    D (W x + b) + s = (D W) x + (D b + s),        W (D x + s) + b = (W D) x + (W s + b).

W s of a zero-padded convolution differs near the border, so a shift in front of one becomes a bias of the output's
shape. Merged are normalisation and BatchNorm; a diagonal map whose value is read twice stays.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from grood_cert.networks.builder import reached
from grood_cert.networks.graph import Graph, Node
from grood_cert.networks.operations import Convolution, Dense, LinearMap, Reshape, Scale, channelwise

_Layer = Convolution | Dense | Scale


def _plus(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _times(factor: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else factor * bias


def _reshaped(part: Tensor | None, source: tuple[int, ...], target: tuple[int, ...]) -> Tensor | None:
    return None if part is None else part.expand(source).reshape(target)


def _shift(operation: LinearMap, bias: Tensor | None, shape: tuple[int, ...], alike: bool) -> Tensor:
    """W s for a shift s; the same number for all places of a channel if they are alike."""
    assert bias is not None
    shift = operation.linear(bias.expand(shape).unsqueeze(0)).squeeze(0)
    return shift[:, :1, :1] if alike else shift


def _constants(
    bias: Tensor | None, summed: Tensor | None, shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """A bias and what was summed to get it, of the same shape."""
    bias, summed = _constant(bias, shape), _constant(summed, shape)
    if bias is not None and summed is not None:
        summed = summed.expand(torch.broadcast_shapes(bias.shape, summed.shape))
    return bias, summed


def _constant(bias: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A bias as layers hold it, (K,) or (C, 1, 1), where it is one number a channel."""
    values = None if bias is None else channelwise(bias, shape)
    return bias if values is None else values.reshape(-1, *[1] * (len(shape) - 1))


def _behind(operation: _Layer, scale: Scale, shape: tuple[int, ...]) -> _Layer | None:
    """The layer followed by the diagonal map, on a value of the given shape; None if that is no such layer."""
    bias = _plus(_times(scale.factor, operation.bias), scale.bias)
    summed = _plus(_times(scale.factor.abs(), operation.size), scale.size)
    if isinstance(operation, Scale):
        return Scale(operation.factor * scale.factor, bias, summed)
    factor = channelwise(scale.factor, shape)
    if factor is None:
        return None
    weight = operation.weight * factor.reshape(-1, *[1] * (operation.weight.dim() - 1))
    bias, summed = _constants(bias, summed, shape)
    return replace(operation, weight=weight, bias=bias, summed=summed)


def _before(scale: Scale, operation: _Layer, node: Node, shape: tuple[int, ...], borders: bool) -> _Layer | None:
    """The diagonal map, whose value has the given shape, followed by the layer; None if that is no such layer."""
    factor = channelwise(scale.factor, shape)
    convolution = isinstance(operation, Convolution)
    if isinstance(operation, Scale) or factor is None or (isinstance(operation, Convolution) and operation.groups != 1):
        return None
    bias, summed, padded = operation.bias, operation.size, isinstance(operation, Convolution) and any(operation.padding)
    if scale.bias is not None:
        if padded and not borders:
            return None
        alike = convolution and not padded and channelwise(scale.bias, shape) is not None
        bias = _plus(_shift(operation, scale.bias, shape, alike), bias)
        summed = _plus(_shift(operation.absolute(), scale.size, shape, alike), summed)
    weight = operation.weight * factor.reshape(-1, *[1] * (operation.weight.dim() - 2))
    bias, summed = _constants(bias, summed, node.shape)
    return replace(operation, weight=weight, bias=bias, summed=summed)


def folded(graph: Graph, borders: bool = True) -> Graph:
    r"""The graph without the diagonal maps that a neighbouring layer can take over.

    Args:
        graph: Any graph; gradients flow through the new weights to the old.
        borders: Whether a shift in front of zero padding may become a bias of the output's shape.

    Returns:
        A graph of the same function whose nonlinear layers are the same, in the same order.

    Example:
        >>> from torch import nn
        >>> from grood_cert.networks.capture import capture
        >>> network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> graph = capture(network.eval(), (1, 2, 2))
        >>> [node.name for node in graph.nodes], [node.name for node in folded(graph).nodes]
        (['image', '0', '1', '2', '3', '4'], ['image', '1', '2', '3', '4'])
    """
    readers = Counter(i for node in graph.nodes for i in node.inputs)
    nodes: list[Node] = []  # with those that were merged into another
    place: dict[int, int] = {}
    for number, node in enumerate(graph.nodes):
        inputs = tuple(place[i] for i in node.inputs)
        operation, merged = node.operation, None
        source = nodes[inputs[0]] if inputs and readers[node.inputs[0]] == 1 else None
        if source is not None and isinstance(operation, Scale) and isinstance(source.operation, _Layer):
            merged = _behind(source.operation, operation, node.shape)
            if merged is not None:
                nodes.append(Node(merged, source.inputs, node.shape, source.name))
        elif source is not None and isinstance(source.operation, Scale):
            scale = source.operation
            if isinstance(operation, Reshape) and operation.bias is None:
                parts = (scale.factor, scale.bias, scale.summed)
                nodes.append(Node(operation, source.inputs, node.shape, node.name))
                factor, bias, summed = (_reshaped(part, source.shape, node.shape) for part in parts)
                assert factor is not None
                merged = Scale(factor, bias, summed)
                nodes.append(Node(merged, (len(nodes) - 1,), node.shape, source.name))
            elif isinstance(operation, _Layer):
                merged = _before(scale, operation, node, source.shape, borders)
                if merged is not None:
                    nodes.append(replace(node, operation=merged, inputs=source.inputs))
        if merged is None:
            nodes.append(replace(node, inputs=inputs))
        place[number] = len(nodes) - 1
    return replace(graph, nodes=reached(nodes))
