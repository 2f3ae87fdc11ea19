"""What work that takes time says of itself while it goes on; the command line shows it, a library call is silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Reporter(Protocol):
    """Hears of the stages of a run. Counts are of the whole stage so far; steps are of the unit the stage began with."""

    def begin(self, stage: str, total: int, unit: str = "samples") -> None:
        """A stage of so many steps begins."""
        ...

    def advance(self, steps: int = 1, counts: Mapping[str, int] | None = None) -> None:
        """So many further steps of the stage are done; what has become of them so far, by name."""
        ...

    def say(self, line: str) -> None:
        """A line for whoever waits."""
        ...


class Silent:
    """A reporter that keeps everything to itself.

    Example:
        >>> reporter: Reporter = Silent()
        >>> reporter.begin("certifying", 10)
    """

    def begin(self, stage: str, total: int, unit: str = "samples") -> None:
        """Nothing."""

    def advance(self, steps: int = 1, counts: Mapping[str, int] | None = None) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""


SILENT = Silent()


def clock(seconds: float) -> str:
    """A duration as hours, minutes and seconds.

    Example:
        >>> clock(7384.6)
        '2:03:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
