r"""Rows in float32: what they may be off, and where they may be used.

Rows a on the values of a node (`linear_rows`) are pulled back in float32, u = 2^-24; intervals, constants of linear layers
and what closes a row at the image stay float64. Two to ten times as many convolutions a second are worth it.

*Linear layers.* Let W^T sum up n products an entry. In place of W^T a comes a' with

    |a' - W^T a| <= (n + 2 + r) u / (1 - (n + 2 + r) u)  |W|^T |a|:

n sums in any order, with or without fused multiplications; one rounding of the weight, one to spare, and r where the rows
of r readers are added. With m(v) >= |v| as in `rounding`, the value a . z changes by at most |a| . E(z),

    E(z) = |W| E(v) + g(n + 2 + r) |W| m(v),        E = 0 behind a nonlinear node,        g(n) = 1.03 n u.

1.03 covers the denominator and what the error of one layer becomes in those before, 1 / 0.99 and e^0.0102, while the roundings
in a chain of linear layers are at most 0.01 / u; beyond it E is infinite.

*Starts.* A row c is scaled by a power of two, to a largest entry in [1, 2), and rounded to c', which costs |c - c'| . m of the
node where it starts; m counts biases and constants, whatever layers c' passes. Units and rows of weights are exact.

*Lines.* The slope k of a line and its product with a are rounded, and so are the constants c of a (leaky) ReLU and their sum
over the n neurons (of other nonlinear layers that sum is float64). Lines are moved outward further, by

    k (E(z) + g(3 + r) m(z))  +  (n + 2) u / (1 - 2 (n + 2) u) |c|,

k the steepest slope on the interval. m bounds values of the network: each step compares two functions of its points.

A maximum pool passes entries on and sums at most n windows in one: g(n + 3 + r) m(z), as maximum over the window.

*Underflow* loses at most 2^-126 in an operation, whatever the row, or times the row where weights, slopes or constants vanish.
Fewer than 2^24 operations meet in an entry, so the first is less than 2^-100 of sum (m + 1) over all nodes so far, and rows
start with a norm of 1 at least; the second is less than 2^-100 sum m(v) in E, 2^-100 (m(z) + 1) at a line. What overflows is
not finite, hence no proof.

*Where.* All this needs products that are summed as they are: no Winograd or Fourier transform, no factors rounded to fewer
bits. torch's transposed convolutions and matrix products on x86 are such, unless it was told otherwise
(`sums_in_float32`, asked whenever balls are bounded); forward convolutions may not be, so transposed layers stay float64.

References:
    Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., chapter 3 (running error analysis).
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from grood_cert.bounds import rounding
from grood_cert.networks.activations import Activation
from grood_cert.networks.graph import Graph
from grood_cert.networks.operations import (
    Addition,
    AveragePool,
    Convolution,
    Dense,
    LinearMap,
    MaxPool,
    Selection,
    Separable,
)

UNIT = rounding.UNIT["float32"]
_LARGEST_SHARE = 0.01  # beyond it nothing is proved
_UNDERFLOW = 2.0**-100


def sums_in_float32(device: torch.device) -> bool:
    """Whether float32 transposed convolutions and matrix products are known to sum up products of float32 numbers.

    Example:
        >>> sums_in_float32(torch.device("meta"))
        False
    """
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    modes = (os.environ.get(f"{name}_DEFAULT_FPMATH_MODE", "") for name in ("ONEDNN", "DNNL"))
    if any(mode.upper() not in ("", "STRICT") for mode in modes):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    backend = torch.backends.mkldnn
    parts = (torch.backends, backend, getattr(backend, "conv", None), getattr(backend, "matmul", None))
    try:
        told = [torch.get_float32_matmul_precision(), *(getattr(part, "fp32_precision", "none") for part in parts)]
    except RuntimeError:  # it was told in two ways
        return False
    return all(word in ("none", "ieee", "highest") for word in told)


def row_terms(operation: LinearMap) -> int:
    """The most products that an entry of W^T y sums up, but for those with 0; 0 where entries are only moved.

    Example:
        >>> convolution = Convolution(torch.ones(5, 3, 4, 4), None, (2, 2), (1, 1), (1, 1), 1, (8, 8))
        >>> int(convolution.transpose(torch.ones(1, 5, 4, 4)).max()), row_terms(convolution)
        (20, 20)
    """
    match operation:
        case Dense(weight=weight):
            return weight.shape[0]
        case Convolution():
            return operation.weight.shape[0] // operation.groups * operation.overlap
        case AveragePool():
            return operation.overlap
        case Separable():
            return operation.rows.shape[0] + operation.columns.shape[0]
        case Selection():
            return len(operation.index)
        case _:
            return 0 if operation.moves else 1


def constants_error(constants: Tensor, size: int) -> Tensor:
    """By how much the constants of `size` lines are moved outward for their float32 sum: (n + 2) u / (1 - 2 (n + 2) u) |c|."""
    share = (size + 2) * UNIT
    return constants.abs() * (share / (1 - 2 * share) if share < 0.25 else torch.inf) + _UNDERFLOW


def start(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as float32 ones that start at a node, and their scales.

    Args:
        rows: Shape (..., K), float64.

    Returns:
        c' of shape (..., K), float32, and powers of two of shape (..., 1), float64: rows are about scales * c'.

    Example:
        >>> start(torch.tensor([[3.0, 1e-3], [0.0, 0.0]], dtype=torch.float64))[1]
        tensor([[2.],
                [1.]], dtype=torch.float64)
    """
    largest = rows.abs().amax(-1, keepdim=True)
    scales = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    scales = torch.where(largest > 0, scales, 1.0)
    return (rows / scales).float(), scales


def _share(count: int, roundings: int) -> float:
    """g(n) for a layer of n = `count`, with so many since the last nonlinear node."""
    return 1.03 * count * UNIT if roundings * UNIT <= _LARGEST_SHARE else torch.inf


class RowErrors:
    """What rows in float32 may be off on every node so far.

    Args:
        graph: The network.
        magnitude: m of the image, shape (B, *image).
    """

    def __init__(self, graph: Graph, magnitude: Tensor) -> None:
        self._graph = graph
        self._readers = Counter(origin for node in graph.nodes for origin in node.inputs)
        self._errors: list[Tensor | None] = [None]  # E, None for 0
        self._roundings = [0]  # since the last nonlinear node
        self._lost = [self._underflow(magnitude)]

    def error(self, number: int) -> Tensor:
        """How far the value of a row +-e_i on a node may be off, shape (B, *node), or one that broadcasts against it."""
        shape = [-1, *[1] * len(self._graph.nodes[number].shape)]
        lost, error = self._lost[number].reshape(shape), self._errors[number]
        return lost if error is None else lost + error

    def linear(self, magnitudes: Sequence[Tensor]) -> None:
        """Go on to the next node, a linear one; m of all nodes up to it."""
        number = len(self._errors)
        node = self._graph.nodes[number]
        operation, inputs = node.operation, node.inputs
        known = [self._errors[origin] for origin in inputs]
        carried = [error for error in known if error is not None]
        readers = max(self._readers[origin] for origin in inputs)
        if isinstance(operation, Addition):
            count, moved = (readers if readers > 1 else 0), magnitudes[number]
            before: Tensor | float = sum(carried)
        else:
            assert isinstance(operation, LinearMap)
            origin = inputs[0]
            count = row_terms(operation)
            count = 0 if operation.moves and count == 0 and readers == 1 else count + 2 + readers
            moved = magnitudes[number] if operation.size is None else magnitudes[number] - operation.size  # |W| m
            lost = _UNDERFLOW * _total(magnitudes[origin]).reshape(-1, *[1] * (moved.dim() - 1))
            before = (operation.absolute().linear(carried[0]) if carried else 0.0) + (lost if count else 0.0)
        roundings = max(self._roundings[origin] for origin in inputs) + count
        share = _share(count, roundings)
        self._errors.append(before + share * moved if count else (before if isinstance(before, Tensor) else None))
        self._roundings.append(roundings)
        self._lost.append(self._lost[-1] + self._underflow(magnitudes[number]))

    def nonlinear(self, lower: Tensor, upper: Tensor, magnitudes: Sequence[Tensor]) -> Tensor:
        """Go on to the next node, a nonlinear one, whose input lies in [lower, upper].

        Returns:
            By how much lines around it are moved outward, but for what their constants need, shape (B, *node).
        """
        number = len(self._errors)
        node = self._graph.nodes[number]
        operation, origin = node.operation, node.inputs[0]
        steps = 3 + self._readers[origin]
        error, before = self.error(origin), self._roundings[origin]
        if isinstance(operation, Activation):
            slopes = operation.slopes(lower, upper)
            moved = error + _share(steps, before + steps) * magnitudes[origin]
            charge = torch.maximum(slopes[0].abs(), slopes[1].abs()) * moved + _UNDERFLOW * magnitudes[origin]
        else:
            assert isinstance(operation, MaxPool)
            steps += operation.overlap
            charge = operation(error + _share(steps, before + steps) * magnitudes[origin])
        self._errors.append(None)
        self._roundings.append(0)
        self._lost.append(self._lost[-1] + self._underflow(magnitudes[number]))
        return charge

    @staticmethod
    def _underflow(magnitude: Tensor) -> Tensor:
        return _UNDERFLOW * (_total(magnitude) + magnitude.flatten(1).shape[1])


def _total(magnitude: Tensor) -> Tensor:
    """Shape (B,)."""
    return magnitude.flatten(1).sum(1)
