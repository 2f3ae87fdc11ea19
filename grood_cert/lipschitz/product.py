r"""Product of operator norms: L <= max_k ||w_k||_q  prod_i ||W_i||_{p->p} sup |sigma_i'|.

The Jacobian of the logits at x' is a product of matrices W and diagonal matrices D of derivatives, and p^T W_last,
with p in the simplex, is longest at a vertex: the last factor is the largest row norm, not the norm of the matrix.
Where branches are added, ||A + B|| <= ||A|| + ||B||; where they are concatenated, the p-norm of (||A||, ||B||).

Norms come from above only: ||W||_inf (largest absolute row sum) and ||W||_1 (column sum) are exact for any linear map
by pushing ones through |W|; ||W||_2 is an SVD of the unrolled map where that is small, else the smaller of
sqrt(||W||_1 ||W||_inf) and, for a convolution, the norm over the torus: zero padding embeds the image in a larger torus
of size H + 2 pad, on which the stride-1 convolution is circulant, and stride and cropping drop rows of it; dropping
rows and embedding do not lengthen vectors, so ||W||_2 <= max over frequencies of the largest singular value of the
transformed kernel; a transposed convolution has the same norm, and ||A x B^T||_2 <= ||A||_2 ||B||_2 ||x||_2. Power iteration is a lower bound and is not used.

*Active sub-network.* On the ball a derivative lies in [s_l, s_u]; D = E diag(d) with d = max(|s_l|, |s_u|), |E| <= 1.
Units with d = 0 are deleted from both matrices around them, and a layer whose derivatives are all known exactly is not
a factor at all: W_2 D W_1 is one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grood_cert.ball import DUAL_ORDER, ORDER, Norm
from grood_cert.bounds.hidden import Preactivations
from grood_cert.interval import ROUNDING, Interval
from grood_cert.networks.activations import Activation
from grood_cert.networks.graph import Graph
from grood_cert.networks.operations import Addition, Convolution, LinearMap, MaxPool, Pad, Separable, Transposed

_UNROLLED_ENTRIES = 2**22


def matrix_norm(matrix: Tensor, norm: Norm) -> float:
    """||M||_{p->p}, exactly up to rounding, moved up by 1e-12: row sums, singular values or column sums."""
    if not matrix.numel():
        return 0.0
    return float(torch.linalg.matrix_norm(matrix, ord=ORDER[norm])) * (1 + ROUNDING)


def torus_norm(convolution: Convolution) -> float:
    """Upper bound of ||W||_2 of a zero-padded convolution: its circulant extension; proof at the top."""
    size = [
        max(length + 2 * pad, dilate * (kernel - 1) + 1)
        for length, pad, dilate, kernel in zip(
            convolution.input_size,
            convolution.padding,
            convolution.dilation,
            convolution.weight.shape[2:],
            strict=True,
        )
    ]
    outputs, inputs, high, wide = convolution.weight.shape
    kernel = convolution.weight.new_zeros(outputs, inputs, *size)
    rows, columns = convolution.dilation
    kernel[:, :, : high * rows : rows, : wide * columns : columns] = convolution.weight
    transformed = torch.fft.fft2(kernel).reshape(convolution.groups, -1, inputs, *size).permute(0, 3, 4, 1, 2)
    return float(torch.linalg.matrix_norm(transformed, ord=2).max()) * (1 + ROUNDING)


def operator_norm(
    operation: LinearMap, shape: tuple[int, ...], norm: Norm, device: str | torch.device = "cpu"
) -> float:
    r"""Upper bound of ||W||_{p->p}; exact for l_inf and l_1, and for l_2 where the unrolled map is small.

    Args:
        operation: The map.
        shape: Shape of its input.
        norm: "linf", "l2" or "l1".
        device: Where the map's tensors are.

    Returns:
        The bound, moved up by 1e-12.

    Example:
        >>> from grood_cert.networks.operations import Dense
        >>> round(operator_norm(Dense(torch.tensor([[3.0, 4.0]]).double(), None), (2,), "l2"), 6)
        5.0
    """
    ones = torch.ones(1, *shape, dtype=torch.float64, device=device)
    absolute = operation.absolute()
    rows = absolute.linear(ones)
    largest_row = float(rows.max()) * (1 + ROUNDING)
    largest_column = float(absolute.transpose(torch.ones_like(rows)).max()) * (1 + ROUNDING)
    if norm == "linf":
        return largest_row
    if norm == "l1":
        return largest_column
    if ones.numel() * rows.numel() <= _UNROLLED_ENTRIES:
        return matrix_norm(unrolled(operation, shape, device), norm)
    bound = math.sqrt(largest_row * largest_column)
    if isinstance(operation, Transposed):
        return min(bound, torus_norm(operation.operation))
    if isinstance(operation, Separable):
        return min(bound, matrix_norm(operation.rows, norm) * matrix_norm(operation.columns, norm))
    return min(bound, torus_norm(operation)) if isinstance(operation, Convolution) else bound


def unrolled(operation: LinearMap, shape: tuple[int, ...], device: str | torch.device = "cpu") -> Tensor:
    """The matrix of a linear map, shape (outputs, inputs)."""
    size = math.prod(shape)
    return operation.linear(torch.eye(size, dtype=torch.float64, device=device).reshape(size, *shape)).flatten(1).T


@dataclass(frozen=True)
class _Matrix:
    """A matrix, and what was summed to get its entries, in absolute values, of which rounding is a share."""

    entries: Tensor
    summed: Tensor

    def mapped(self, change: Callable[[Tensor], Tensor], size: Callable[[Tensor], Tensor]) -> _Matrix:
        """Both parts changed."""
        return _Matrix(change(self.entries), size(self.summed))

    def norm(self, norm: Norm) -> float:
        """Upper bound of the exact matrix's norm."""
        if not self.summed.numel():
            return 0.0
        size = torch.linalg.matrix_norm(self.summed, ord="fro" if norm == "l2" else ORDER[norm])
        return matrix_norm(self.entries, norm) + ROUNDING * float(size)

    def longest_row(self, order: float) -> float:
        """Upper bound of the longest of the exact matrix's rows."""
        entries, summed = (torch.linalg.vector_norm(part, ord=order, dim=1) for part in (self.entries, self.summed))
        return float((entries + ROUNDING * summed).max()) * (1 + ROUNDING)


@dataclass(frozen=True)
class _State:
    """The Jacobian up to a node is `matrix` times something of norm at most `factor`.

    Two states with the same `base` share that something. `matrix` is None for the identity.
    """

    factor: float
    base: int
    matrix: _Matrix | None = None

    def norm(self, norm: Norm) -> float:
        return self.factor * (1.0 if self.matrix is None else self.matrix.norm(norm))


def _pool_norm(pool: MaxPool, norm: Norm) -> float:
    """A window's derivative is a convex combination, and an entry belongs to at most `overlap` windows."""
    return {"linf": 1.0, "l2": math.sqrt(pool.overlap), "l1": float(pool.overlap)}[norm]


class _Product:
    """One walk through the graph for one sample (or for the whole space)."""

    def __init__(self, graph: Graph, slopes: dict[int, tuple[Tensor, Tensor]], norm: Norm) -> None:
        self._graph = graph
        self._slopes = slopes
        self._norm = norm

    def _linear(self, number: int, state: _State) -> _State:
        node = self._graph.nodes[number]
        operation, shape = node.operation, self._graph.nodes[node.inputs[0]].shape
        assert isinstance(operation, LinearMap)
        inputs = math.prod(shape) if state.matrix is None else state.matrix.entries.shape[1]
        if inputs * max(math.prod(shape), node.size) > _UNROLLED_ENTRIES:
            return _State(
                state.norm(self._norm) * operator_norm(operation, shape, self._norm, self._graph.device), number
            )
        if state.matrix is None:
            matrix = unrolled(operation, shape, self._graph.device)
            return replace(state, matrix=_Matrix(matrix, matrix.abs()))

        def behind(linear: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda part: linear(part.T.reshape(-1, *shape)).reshape(part.shape[1], -1).T

        return replace(state, matrix=state.matrix.mapped(behind(operation.linear), behind(operation.absolute().linear)))

    def _activation(self, number: int, state: _State) -> _State:
        low, high = (end.flatten() for end in self._slopes[number])
        if state.matrix is not None and bool((low == high).all()):
            slope = low.unsqueeze(1)
            return replace(state, matrix=state.matrix.mapped(slope.mul, slope.abs().mul))
        size = torch.maximum(low.abs(), high.abs())
        kept = size > 0
        if state.matrix is None:
            return _State(state.factor * (float(size.max()) if len(size) else 0.0), number)
        rows = state.matrix.mapped(lambda part: part[kept], lambda part: part[kept])
        factor = state.factor * rows.norm(self._norm)
        if len(size) ** 2 > _UNROLLED_ENTRIES:
            return _State(factor * float(size.max()), number)
        matrix = torch.diag(size)[:, kept]
        return _State(factor, number, _Matrix(matrix, matrix))

    def _support(self, number: int) -> list[tuple[int, int]]:
        """Where the value of a node can differ from a constant: a range of each axis."""
        node = self._graph.nodes[number]
        if isinstance(node.operation, Pad):
            margins = zip(node.operation.margins, node.shape, strict=True)
            return [(max(before, 0), size - max(after, 0)) for (before, after), size in margins]
        if isinstance(node.operation, Addition):
            both = zip(*(self._support(origin) for origin in node.inputs), strict=True)
            return [(min(one[0], two[0]), max(one[1], two[1])) for one, two in both]
        return [(0, size) for size in node.shape]

    def _apart(self, first: int, second: int) -> bool:
        """Whether two nodes are padded to parts of one value that do not meet, as in a concatenation."""
        both = zip(self._support(first), self._support(second), strict=True)
        return any(one[1] <= two[0] or two[1] <= one[0] for one, two in both)

    def bound(self) -> float:
        """The product."""
        nodes, norm = self._graph.nodes, self._norm
        states = [_State(1.0, 0)]
        for number, node in enumerate(nodes[1:], 1):
            state = states[node.inputs[0]]
            if isinstance(node.operation, LinearMap):
                states.append(self._linear(number, state))
            elif isinstance(node.operation, Activation):
                states.append(self._activation(number, state))
            elif isinstance(node.operation, Addition):
                other = states[node.inputs[1]]
                if state.base == other.base and state.matrix is not None and other.matrix is not None:
                    both = state.matrix.mapped(other.matrix.entries.add, other.matrix.summed.add)
                    states.append(replace(state, matrix=both))
                else:
                    norms = torch.tensor([state.norm(norm), other.norm(norm)], dtype=torch.float64)
                    order = ORDER[norm] if self._apart(*node.inputs) else 1.0
                    factor = float(torch.linalg.vector_norm(norms, ord=order)) * (1 + ROUNDING)
                    states.append(_State(factor, number))
            else:
                assert isinstance(node.operation, MaxPool)
                states.append(_State(state.norm(norm) * _pool_norm(node.operation, norm), number))
        last = states[-1]
        if last.matrix is None:
            return last.factor  # ||p^T J||_q <= ||J||_{p->p}, as the largest entry is below the p-norm
        return last.factor * last.matrix.longest_row(DUAL_ORDER[norm])


def product_bound(graph: Graph, norm: Norm) -> float:
    r"""Product of operator norms over the whole space: one number for the network; formula and proof above.

    Args:
        graph: The network.
        norm: Norm of the ball.

    Returns:
        Upper bound of the (global) Lipschitz constant of S, per pixel unit.
    """
    slopes = {}
    for number in graph.nonlinear:
        node = graph.nodes[number]
        if isinstance(node.operation, Activation):
            low, high = node.operation.lowest_slope, node.operation.steepest
            ones = torch.ones(node.shape, dtype=torch.float64, device=graph.device)
            slopes[number] = low * ones, high * ones
    return _Product(graph, slopes, norm).bound()


def active_product_bound(graph: Graph, known: Preactivations, norm: Norm) -> Tensor:
    r"""The same on the sub-network that is active on each ball; formula and proof above.

    Args:
        graph: The network.
        known: Bounds over the balls.
        norm: Norm of the balls.

    Returns:
        Shape (B,).
    """
    found = []
    for sample in range(len(known.proved)):
        pairs: dict[int, Interval] = {
            number: (low[sample], high[sample])
            for number, (low, high) in zip(graph.nonlinear, known.slopes, strict=True)
            if isinstance(graph.nodes[number].operation, Activation)
        }
        bounded = bool(known.proved[sample])
        found.append(_Product(graph, pairs, norm).bound() if bounded else math.nan)
    return torch.tensor(found, dtype=torch.float64, device=known.proved.device)
