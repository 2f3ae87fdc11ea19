"""Batches of unit rows: one linear function for each unit of interest, for each sample, in both signs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_SIZE = 8  # bytes of a float64


def over_rows(function: Callable[[Tensor], Tensor], rows: Tensor, dimensions: int) -> Tensor:
    """Apply a batched function to the last `dimensions` axes, whatever the leading ones."""
    lead = rows.shape[: rows.dim() - dimensions]
    result = function(rows.reshape(-1, *rows.shape[rows.dim() - dimensions :]))
    return result.reshape(*lead, *result.shape[1:])


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
        chosen = shared[self.positions]
        return torch.cat([chosen, -chosen], 1)


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
