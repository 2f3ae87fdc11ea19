"""What a verification has found so far: checks, counted, and contradictions, with their evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from grood_cert.errors import SoundnessError
from grood_cert.results.invariants import line
from grood_cert.results.table import Table

Places = NDArray[np.int64]


@dataclass
class Check:
    """One kind of check.

    Attributes:
        claim: What of the record was checked, and how.
        checked: How many.
        contradicted: How many the check contradicts.
        repeated: How many it says again; None: it can only contradict.
        note: Why nothing was checked, or what is to be said of it.
    """

    claim: str
    checked: int = 0
    contradicted: int = 0
    repeated: int | None = None
    note: str = ""


@dataclass
class Findings:
    """What was checked, and what came of it.

    Attributes:
        checks: In the order in which they were made, by their claim.
        contradictions: One error for each check that contradicts the record, with its evidence.

    Example:
        >>> found = Findings()
        >>> found.add("score", [False, True], "line 3 is false", {"row": 1}, [True, False])
        >>> found.checks["score"].contradicted, str(found.contradictions[0])
        (1, 'score: line 3 is false')
    """

    checks: dict[str, Check] = field(default_factory=dict)
    contradictions: list[SoundnessError] = field(default_factory=list)

    def note(self, claim: str, words: str) -> None:
        """Say something about a check, for example why it was left out."""
        self.checks.setdefault(claim, Check(claim)).note = words

    def add(
        self, claim: str, wrong: ArrayLike, message: str, evidence: Mapping[str, Any], repeated: ArrayLike | None = None
    ) -> None:
        """Count one more round of a check.

        Args:
            claim: What was checked.
            wrong: Which of the things checked are contradicted, any shape.
            message: What to say of them.
            evidence: What shows it.
            repeated: Which of them were found again.
        """
        check, mask = self.checks.setdefault(claim, Check(claim)), np.asarray(wrong, dtype=bool)
        check.checked += mask.size
        if repeated is not None:
            check.repeated = (check.repeated or 0) + int(np.asarray(repeated, dtype=bool).sum())
        if mask.any():
            if not check.contradicted:
                arrays = {name: np.asarray(value) for name, value in evidence.items()}
                self.contradictions.append(SoundnessError(f"{claim}: {message}", arrays))
            check.contradicted += int(mask.sum())

    def attempt(self, claim: str, checked: int, check: Callable[[], None]) -> None:
        """Count a check that raises a `SoundnessError` with one `image` of evidence for each contradiction."""
        entry = self.checks.setdefault(claim, Check(claim))
        entry.checked += checked
        try:
            check()
        except SoundnessError as error:
            if not entry.contradicted:
                self.contradictions.append(SoundnessError(f"{claim}: {error}", error.evidence))
            entry.contradicted += len(error.evidence["image"])

    def compare(self, table: Table, column: str, rows: Places, wrong: ArrayLike, again: ArrayLike) -> None:
        """Count a column that is computed again in some rows, and name the line of the first that differs."""
        mask, values = np.asarray(wrong, dtype=bool), np.asarray(again)
        first = int(np.argmax(mask))
        self.add(
            f"{column}, computed again",
            mask,
            f"{line(int(rows[first]))} says {table[column][rows[first]]}, computed again it is {values[first]}",
            {"rows": rows[mask], "recorded": table[column][rows][mask], "computed": values[mask]},
            ~mask,
        )


@dataclass(frozen=True, eq=False)
class Part:
    """Some samples of one image set that are tried together.

    Attributes:
        rows: Their rows in the table, shape (B,); of a Lipschitz analysis, those of the smallest eps.
        images: Shape (B, C, H, W).
        kind: id, ood or noise.
        name: Of the set.
        index: Positions in the set, shape (B,).
        generator: Random numbers for them that the run did not have.
    """

    rows: Places
    images: Tensor
    kind: str
    name: str
    index: Places
    generator: torch.Generator
