r"""Batches of rows: linear functions a . v of a layer's value v, on their way back to the image.

A row is pulled back through a linear layer by a . (W x + b) = (W^T a) . x + a . b. `RowBatch` says what the walk
backwards needs of rows; `FullRows` hold an entry for each entry of the layer, `windows.WindowRows` only those that a
row can see. `UnitRows` are one row for each unit of interest, for each sample, in both signs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.networks.operations import LinearMap, MaxPool
from grood_cert.networks.transposes import Transposes


def over_rows(function: Callable[[Tensor], Tensor], rows: Tensor, dimensions: int) -> Tensor:
    """Apply a batched function to the last `dimensions` axes, whatever the leading ones."""
    lead = rows.shape[: rows.dim() - dimensions]
    result = function(rows.reshape(-1, *rows.shape[rows.dim() - dimensions :]))
    return result.reshape(*lead, *result.shape[1:])


def through_pool(pool: MaxPool, rows: Tensor, upper: Tensor, best: Tensor, decided: Tensor) -> tuple[Tensor, Tensor]:
    r"""Rows on what a maximum pool reads, and constants, whose sum lies above the rows on its value.

    Lower line: one entry of the window. Upper line: that entry if it is known to be the maximum, else the constant max u.

    Args:
        pool: The pool.
        rows: Rows on its value, shape (B, R, C, windows).
        upper: Upper bounds of what it reads, shape (B, C, H, W).
        best: 1 at the entry of each window, else 0, shape (B, C, entries, windows).
        decided: Whether it is known to be the maximum, shape (B, C, windows).

    Returns:
        Shape (B, R, C, H, W), and (B, R).
    """
    positive, negative = rows.clamp(min=0), rows.clamp(max=0)
    undecided = positive * (~decided).unsqueeze(1)
    constant = (undecided * pool(upper).flatten(2).unsqueeze(1)).sum((2, 3))  # float64 if one of both is
    entries = (negative + positive - undecided).unsqueeze(3) * best.to(rows).unsqueeze(1)
    return over_rows(pool.spread, entries, 3), constant


@dataclass(frozen=True)
class UnitRows:
    r"""Rows +e_i and -e_i for some units i of a layer.

    The rows do not depend on the sample until the first nonlinear layer is crossed, so linear layers act on them once
    for the whole batch (shared form, shape (n, ...)); `own` then deals them out (shape (B, 2 U, ...)): first the rows
    with sign +, then those with sign -.

    Attributes:
        units: Distinct units, shape (n,).
        positions: For each sample the places of its units in `units`, shape (B, U).
    """

    units: Tensor
    positions: Tensor

    def start(self, size: int, shape: tuple[int, ...]) -> Tensor:
        """The rows e_i in shared form, shape (n, *shape)."""
        rows = torch.zeros(len(self.units), size, dtype=torch.float64, device=self.units.device)
        rows[torch.arange(len(self.units), device=self.units.device), self.units] = 1.0
        return rows.reshape(-1, *shape)

    def own(self, shared: Tensor) -> Tensor:
        """Shared rows of shape (n, ...) dealt out to the samples, shape (B, 2 U, ...)."""
        places = torch.cat([self.positions, self.positions + len(shared)], 1)
        return torch.cat([shared, -shared])[places]


def unit_blocks(needed: Tensor, bytes_a_row: int, memory: int) -> Iterator[tuple[Tensor, UnitRows]]:
    """Split the needed units of a batch into blocks whose rows fit into memory.

    Samples that need fewer units than others get further ones as padding; whatever is computed for them holds too.

    Args:
        needed: Which units each sample needs, shape (B, N), bool.
        bytes_a_row: What one row of one sample takes.
        memory: Bytes to stay below, as far as one row a sample allows.

    Yields:
        Indices of the units, shape (B, U), and their rows.
    """
    count = int(needed.sum(1).max())
    if count == 0:
        return
    order = needed.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    size = max(1, memory // max(1, 2 * len(needed) * bytes_a_row))
    for index in order.split(size, dim=1):
        units, positions = torch.unique(index, return_inverse=True)
        yield index, UnitRows(units, positions)


class RowBatch(ABC):
    """Rows a on the value of one node, entries on the last axis of `values`, rows on the axis before.

    Attributes:
        values: The entries.
        shape: Shape of the node's value, without the batch.
    """

    values: Tensor
    shape: tuple[int, ...]

    @abstractmethod
    def view(self, maps: Tensor) -> Tensor:
        """Values of the node, shape (N, *shape), as the rows see them; broadcasts against `own` rows."""

    @abstractmethod
    def own(self) -> Self:
        """Rows that may differ between samples."""

    @abstractmethod
    def dot(self, view: Tensor) -> Tensor:
        """The products a . v for a view of v."""

    @abstractmethod
    def plus(self, other: Self) -> Self:
        """The sum of two batches on the same node."""

    @abstractmethod
    def through(self, number: int, operation: LinearMap, shape: tuple[int, ...], transposes: Transposes) -> Self:
        """The rows W^T a on what the operation of node `number` reads, a value of the given shape."""

    @abstractmethod
    def support(self, ball: Ball) -> Tensor:
        """Upper bound of a . (x' - x) over an l_2 or l_1 ball, for rows on the image; see `ball.support`."""

    @abstractmethod
    def with_values(self, values: Tensor, inside: bool = False) -> Self:
        """Other rows on the same node; `inside` says that they were multiplied by a view, so hold nothing beyond it."""

    def to(self, dtype: torch.dtype) -> Self:
        """The same rows as numbers of another kind."""
        return self if self.values.dtype == dtype else self.with_values(self.values.to(dtype))


@dataclass(frozen=True)
class FullRows(RowBatch):
    """Rows with an entry for each of the layer's: (n, size) in shared form, or (B, R, size).

    Attributes:
        units: How rows in shared form are dealt out.
    """

    values: Tensor
    shape: tuple[int, ...]
    units: UnitRows | None = None

    def view(self, maps: Tensor) -> Tensor:
        """Shape (N, 1, size)."""
        return maps.flatten(1).unsqueeze(1)

    def own(self) -> FullRows:
        """Dealt out, shape (B, R, size)."""
        if self.values.dim() == 3:
            return self
        assert self.units is not None
        return replace(self, values=self.units.own(self.values))

    def dot(self, view: Tensor) -> Tensor:
        """Shape (B, R); rows in shared form need a view that is the same for all samples."""
        if self.values.dim() == 2:
            assert self.units is not None
            return self.units.own(self.values @ view.reshape(-1))
        if len(view) == 1:
            return self.values @ view.reshape(-1)
        return (self.values @ view.mT).squeeze(-1)

    def plus(self, other: FullRows) -> FullRows:
        """In shared form if both are."""
        if self.values.dim() != other.values.dim():
            return self.own().plus(other.own())
        return replace(self, values=self.values + other.values)

    def through(self, number: int, operation: LinearMap, shape: tuple[int, ...], transposes: Transposes) -> FullRows:
        """Shared rows stay shared."""
        lead = self.values.shape[:-1]
        values = transposes(number, operation, self.values.reshape(-1, *self.shape)).reshape(*lead, -1)
        return replace(self, values=values, shape=shape)

    def support(self, ball: Ball) -> Tensor:
        """Shape (B, R)."""
        return ball.support(self.values)

    def with_values(self, values: Tensor, inside: bool = False) -> FullRows:
        """Shape (B, R, size)."""
        del inside
        return replace(self, values=values)
