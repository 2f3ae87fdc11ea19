"""What commands print: progress bars and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> Console:
    """A plain console: no highlighting, no wrapping of long lines."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


class Bar:
    """A bar with counts, elapsed time and ETA on stderr; it appears when a stage begins, once the input is checked."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[counts]}"),
        )
        self._progress = Progress(TextColumn("{task.description}"), *columns, console=console(stderr=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress.tasks:  # stopping a bar that never showed would print an empty line
            self._progress.stop()

    def begin(self, stage: str, total: int, unit: str = "samples") -> None:
        """Show a new line for a stage of this many steps."""
        self._task = self._progress.add_task(stage, total=total, counts="")
        self._progress.start()

    def advance(self, steps: int = 1, counts: Mapping[str, int] | None = None) -> None:
        """Move the newest line on, and show counts beside it."""
        words = "  ".join(f"{count} {name}" for name, count in sorted((counts or {}).items()))
        self._progress.update(self._task, advance=steps, counts=words)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(line)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_across(records: Sequence[Mapping[str, Any]], name: str, quantities: Mapping[str, str], title: str) -> None:
    """One column a record, headed by its `name`, and one line a quantity (key: words) that any record has."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for record in records:
        table.add_column(str(record[name]), justify="right", overflow="fold")
    for key, words in quantities.items():
        if any(record[key] is not None for record in records):
            table.add_row(words, *(_cell(record[key]) for record in records))
    console().print(table)
