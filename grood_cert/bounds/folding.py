r"""Fewer layers, the same function: diagonal maps are merged into the linear layer before or behind them.

With D = diag(d) and a linear layer W x + b,

    D (W x + b) + s = (D W) x + (D b + s),        W (D x + s) + b = (W D) x + (W s + b).

W s of a zero-padded convolution differs near the border, so a shift in front of one becomes a bias of the output's
shape. Merged are normalisation and BatchNorm; a diagonal map whose value is read twice stays.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import Tensor

from grood_cert.networks.graph import Graph, Node
from grood_cert.networks.operations import Convolution, Dense, Reshape, Scale


def _plus(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _times(factor: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else factor * bias


def _per_channel(scale: Scale, shape: tuple[int, ...]) -> bool:
    """Whether a diagonal map on values of this shape has one factor, or one for each channel."""
    factor = scale.factor
    return factor.numel() == 1 or (factor.dim() == len(shape) and factor.numel() == len(factor) == shape[0])


def _behind(operation: Convolution | Dense | Scale, scale: Scale) -> Convolution | Dense | Scale:
    """The layer followed by the diagonal map."""
    bias = _plus(_times(scale.factor, operation.bias), scale.bias)
    if isinstance(operation, Scale):
        return Scale(operation.factor * scale.factor, bias)
    outputs = len(operation.weight)
    factor = scale.factor.reshape(-1).expand(outputs)
    return replace(
        operation, weight=operation.weight * factor.reshape(-1, *[1] * (operation.weight.dim() - 1)), bias=bias
    )


def _before(scale: Scale, operation: Convolution | Dense, shape: tuple[int, ...]) -> Convolution | Dense:
    """The diagonal map, whose value has the given shape, followed by the layer."""
    bias = operation.bias
    if scale.bias is not None:
        bias = _plus(operation.linear(scale.bias.expand(shape).unsqueeze(0)).squeeze(0), bias)
    factor = scale.factor.reshape(-1).expand(shape[0])
    return replace(
        operation, weight=operation.weight * factor.reshape(-1, *[1] * (operation.weight.dim() - 2)), bias=bias
    )


def folded(graph: Graph) -> Graph:
    r"""The graph without the diagonal maps that a neighbouring layer can take over.

    Args:
        graph: Any graph; gradients flow through the new weights to the old.

    Returns:
        A graph of the same function whose nonlinear layers are the same, in the same order.

    Example:
        >>> from torch import nn
        >>> from grood_cert.networks.graph import trace
        >>> network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> graph = trace(network.eval(), (1, 2, 2))
        >>> [node.name for node in graph.nodes], [node.name for node in folded(graph).nodes]
        (['image', '0', '1', '2', '3', '4'], ['image', '1', '2', '3', '4'])
    """
    readers = Counter(i for node in graph.nodes for i in node.inputs)
    nodes: list[Node] = []  # with those that were merged into another
    place: dict[int, int] = {}
    for number, node in enumerate(graph.nodes):
        inputs = tuple(place[i] for i in node.inputs)
        operation = node.operation
        source = nodes[inputs[0]] if inputs and readers[node.inputs[0]] == 1 else None
        if (
            isinstance(operation, Scale)
            and source is not None
            and (
                isinstance(source.operation, Scale)
                or (isinstance(source.operation, Convolution | Dense) and _per_channel(operation, source.shape))
            )
        ):
            merged = _behind(source.operation, operation)
            nodes.append(replace(source, operation=merged))
        elif (
            source is not None
            and isinstance(source.operation, Scale)
            and isinstance(operation, Reshape)
            and operation.bias is None
        ):
            scale = source.operation
            factor = scale.factor.expand(source.shape).reshape(node.shape)
            bias = None if scale.bias is None else scale.bias.expand(source.shape).reshape(node.shape)
            nodes.append(Node(operation, source.inputs, node.shape, node.name))
            nodes.append(Node(Scale(factor, bias), (len(nodes) - 1,), node.shape, source.name))
        elif (
            source is not None
            and isinstance(source.operation, Scale)
            and _per_channel(source.operation, source.shape)
            and (isinstance(operation, Dense) or (isinstance(operation, Convolution) and operation.groups == 1))
        ):
            nodes.append(
                replace(node, operation=_before(source.operation, operation, source.shape), inputs=source.inputs)
            )
        else:
            nodes.append(replace(node, inputs=inputs))
        place[number] = len(nodes) - 1
    return Graph(_reached(nodes), graph.network)


def _reached(nodes: list[Node]) -> tuple[Node, ...]:
    """The nodes that the last one needs, and the image, renumbered."""
    needed = {0, len(nodes) - 1}
    for number in range(len(nodes) - 1, -1, -1):
        if number in needed:
            needed.update(nodes[number].inputs)
    place = {number: new for new, number in enumerate(sorted(needed))}
    return tuple(
        replace(node, inputs=tuple(place[i] for i in node.inputs))
        for number, node in enumerate(nodes)
        if number in needed
    )
