r"""Interval arithmetic through a network, one layer at a time.

|x - c| <= r gives |W x - W c| <= |W| r coordinate by coordinate; monotone functions map ends to ends. Nothing is moved
outward here: `hidden` does so where a certificate is wanted (`rounding`).
"""

from __future__ import annotations

from collections.abc import Sequence

from grood_cert.ball import Ball
from grood_cert.interval import Interval
from grood_cert.networks.activations import Activation
from grood_cert.networks.graph import Graph, Operation
from grood_cert.networks.operations import Addition, LinearMap, MaxPool


def through(operation: Operation | None, inputs: Sequence[Interval]) -> Interval:
    """Bounds of a layer's value from those of what it reads."""
    lower, upper = inputs[0]
    if isinstance(operation, LinearMap) and operation.moves:
        return operation(lower), operation(upper)
    if isinstance(operation, LinearMap):
        center = operation((lower + upper).div_(2))
        radius = operation.absolute().linear((upper - lower).div_(2))
        return center - radius, center + radius
    if isinstance(operation, Addition):
        return lower + inputs[1][0], upper + inputs[1][1]
    if isinstance(operation, Activation):
        return operation.values(lower, upper)
    assert isinstance(operation, MaxPool)
    return operation(lower), operation(upper)


def intervals(graph: Graph, ball: Ball) -> list[Interval]:
    """Bounds of the value of every node over a batch of balls, up to rounding; differentiable."""
    found = [(ball.lower, ball.upper)]
    for node in graph.nodes[1:]:
        found.append(through(node.operation, [found[origin] for origin in node.inputs]))
    return found
