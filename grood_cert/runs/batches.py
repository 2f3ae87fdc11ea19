"""The batches of a run: a fixed list, given by the sets, the limit, the batch size and the seed.

All randomness of a batch comes from the seed and the batch's number, so its rows do not depend on which process
computes it, or when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grood_cert.data import ImageSet
from grood_cert.data.images import taken
from grood_cert.errors import InputError

_FIRST = 4  # samples in the first batch


def generator(seed: int, batch: int) -> torch.Generator:
    """The source of randomness of one batch: streams of different batches are independent.

    Args:
        seed: Seed of the run.
        batch: Number of the batch.
    """
    (state,) = np.random.SeedSequence((seed % 2**64, batch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def subset(images: ImageSet, limit: int, seed: int) -> tuple[ImageSet, Tensor]:
    """At most `limit` images (0: all), drawn without replacement by the seed, in their order in the set.

    Returns:
        The images and their positions in the set.
    """
    if not 0 < limit < len(images):
        return images, torch.arange(len(images))
    index = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
    return images.select(index), index


@dataclass(frozen=True, eq=False)
class Batch:
    """A unit of work.

    Attributes:
        number: Position in the list of all batches.
        source: The images it is taken from.
        positions: Which of them.
        index: Their positions in the whole image set.
    """

    number: int
    source: ImageSet
    positions: Tensor
    index: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def images(self) -> ImageSet:
        """The images."""
        return self.source.select(self.positions)

    @property
    def names(self) -> list[dict[str, Any]]:
        """The columns that name each sample: `set`, `kind`, `index`, `file`."""
        files = taken(self.source.files, self.positions) or ("",) * len(self)
        return [
            {"set": self.source.name, "kind": self.source.kind, "index": index, "file": file}
            for index, file in zip(self.index, files, strict=True)
        ]


def batches(sets: Sequence[ImageSet], limit: int, batch_size: int, seed: int) -> list[Batch]:
    """All batches of a run, set by set and never across sets; those of the first set start small and double.

    Whoever waits therefore sees rows within seconds.

    Args:
        sets: Image sets.
        limit: Most images of each set, 0 for all; `subset` says which.
        batch_size: Most samples in a batch.
        seed: Draws the images where there is a limit.

    Raises:
        InputError: If the limit is negative.
    """
    if limit < 0:
        raise InputError(f"limit must be 0 (all) or more, got {limit}")
    found: list[Batch] = []
    for whole in sets:
        source, index = subset(whole, limit, seed)
        size, rest = batch_size if found else min(_FIRST, batch_size), torch.arange(len(source))
        while len(rest):
            positions, rest = rest[:size], rest[size:]
            found.append(Batch(len(found), source, positions, tuple(index[positions].tolist())))
            size = min(2 * size, batch_size)
    return found


def extent(batches: Sequence[Batch], eps: Sequence[float] = ()) -> str:
    """How much work batches are, in words.

    Example:
        >>> images = ImageSet("a", "id", torch.rand(12, 1, 2, 2), torch.zeros(12).long(), ("0",))
        >>> extent(batches([images], 0, 8, 0), (0.1, 0.2))
        '12 samples of 1 set x 2 eps = 24 balls'
    """
    samples, sets = sum(map(len, batches)), len({(batch.source.kind, batch.source.name) for batch in batches})
    words = f"{samples} samples of {sets} set{'s' * (sets != 1)}"
    return f"{words} x {len(eps)} eps = {samples * len(eps)} balls" if eps else words
