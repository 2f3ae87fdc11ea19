"""The ways in which grood-cert refuses to go on, and what other libraries say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def said(error: BaseException) -> str:
    r"""What an exception of another library says, on one line.

    >>> said(ValueError("not\n  this")), said(KeyError())
    ('not this', 'KeyError')
    """
    return " ".join(str(error).split()) or type(error).__name__


class InputError(Exception):
    """What the user gave is wrong; the message says what was wrong and what would be right (exit code 2)."""


class RunError(Exception):
    """The input is well formed, but the work could not be done: a missing engine, a diverged training (exit code 1)."""


class StoppedError(RunError):
    """Another process of the run has stopped, and says why."""


class SoundnessError(Exception):
    """A proof and a counterexample contradict each other: every certificate of the run is in doubt (exit code 3).

    Attributes:
        evidence: Arrays that show the contradiction.
        counterexample: File that holds them, once it has been written.
    """

    def __init__(self, message: str, evidence: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.evidence = evidence
        self.counterexample: Path | None = None
