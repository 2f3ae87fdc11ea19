"""A run shared out: shard i of n does the batches b with b mod n = i and writes files of its own.

The processes of one `torchrun`, or of one command with `--jobs`, are shards that merge by themselves; others are put
together by `merge`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from grood_cert.errors import InputError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Shard:
    """Part of a run: every `count`-th batch, from batch `index` on.

    Attributes:
        index: From 0.
        count: Number of shards; 1: the whole run.
        joint: Whether all shards run at the same time, as the processes of one `torchrun` do, and merge by themselves.

    Example:
        >>> shard = Shard.parse("2/4")
        >>> shard.index, str(shard), str(shard.file(Path("rows.csv")))
        (1, '2/4', 'rows-2-of-4.csv')
    """

    index: int = 0
    count: int = 1
    joint: bool = False

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "i/n", with i from 1 to n.

        Raises:
            InputError: If it is something else.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise InputError(f"shard {text!r}: expected i/n with i from 1 to n, for example 1/4")
        return cls(int(found[1]) - 1, int(found[2]))

    @property
    def leads(self) -> bool:
        """Whether this process speaks for the run: alone, or the first of those that run together."""
        return self.index == 0 or not self.joint

    def of(self, items: Sequence[_T]) -> Sequence[_T]:
        """Its part of all batches."""
        return items[self.index :: self.count]

    def file(self, target: Path) -> Path:
        """Where the shard's rows go if those of the whole run go to `target`."""
        return target if self.count == 1 else target.with_stem(f"{target.stem}-{self.index + 1}-of-{self.count}")

    def foreign(self, target: Path) -> list[Path]:
        """Where parts lie of a run that was divided otherwise."""
        files = sorted(target.parent.glob(f"{glob.escape(target.stem)}-*-of-*{target.suffix}"))
        counts = [re.search(r"-\d+-of-(\d+)$", file.stem) for file in files]
        return [file for file, count in zip(files, counts, strict=True) if count and int(count[1]) != self.count]

    def result(self, target: Path) -> Path:
        """Where the rows lie in the end: shards that run jointly are merged into those of the whole run."""
        return target if self.joint else self.file(target)


WHOLE = Shard()


def shard_of_environment() -> Shard:
    """The shard of this process if `torchrun` started it with others, else the whole run.

    Raises:
        InputError: If RANK or WORLD_SIZE makes no sense.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return WHOLE
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise InputError(f"RANK={rank} and WORLD_SIZE={size}: expected numbers with RANK < WORLD_SIZE; use torchrun")
    return Shard(int(rank), int(size), joint=True) if int(size) > 1 else WHOLE
