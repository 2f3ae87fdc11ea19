"""What commands print: progress bars and tables."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from grood_cert.system.reporting import clock

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> Console:
    """A plain console: no highlighting, no wrapping of long lines."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


@dataclass
class Shown:
    """A stage of a run, as it is shown.

    Attributes:
        name: What is done.
        total: Steps in all.
        unit: What a step is.
        done: Steps done.
        counts: What has become of them.
        started: When it began, on the monotonic clock.
        first: Steps done and time at the first report, which may tell of the steps of an earlier process.
        latest: Time of the latest report.
    """

    name: str
    total: int
    unit: str
    done: int = 0
    counts: str = ""
    started: float = field(default_factory=time.monotonic)
    first: tuple[int, float] | None = None
    latest: float = 0.0

    def advance(self, steps: int, counts: Mapping[str, int]) -> None:
        """So many further steps are done."""
        self.done += steps
        self.counts = "  ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        self.latest = time.monotonic()
        self.first = self.first or (self.done, self.latest)

    @property
    def left(self) -> str:
        """Time left at the rate since the first report; "?" before the second."""
        if self.first is None or self.done == self.first[0]:
            return "?" if self.done < self.total else clock(0)
        pace = (self.latest - self.first[1]) / (self.done - self.first[0])
        return clock(max(0.0, pace * (self.total - self.done) - (time.monotonic() - self.latest)))

    @property
    def spent(self) -> str:
        """Time since it began."""
        return clock(time.monotonic() - self.started)

    @property
    def line(self) -> str:
        """All of it, in one line."""
        share = f"{100 * self.done // max(self.total, 1)} %"
        text = f"{self.name}: {self.done}/{self.total} {self.unit}, {share}, eta {self.left} after {self.spent}"
        return f"{text}, {self.counts}" if self.counts else text


class Bar:
    """The reporter of the commands, on stderr: a bar in a terminal, elsewhere a plain line now and then.

    Both appear when a stage begins, once the input is checked.

    Args:
        pause: Seconds between plain lines.
    """

    def __init__(self, pause: float = 30.0) -> None:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._console = console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("eta {task.fields[stage].left}"),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[stage].unit}"),
            TextColumn("{task.fields[stage].spent}"),
            TextColumn("{task.fields[stage].counts}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=self._console,
            expand=True,
        )
        self._stage: Shown | None = None
        self._pause, self._over = pause, threading.Event()
        self._teller = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._progress.tasks:  # stopping a bar that never showed would print an empty line
            self._progress.stop()

    def begin(self, stage: str, total: int, unit: str = "samples") -> None:
        """Show a new line for a stage of this many steps."""
        self._stage = Shown(stage, total, unit)
        if self._console.is_terminal:
            self._task = self._progress.add_task(stage, total=total, stage=self._stage)
            self._progress.start()
            return
        self.say(self._stage.line)
        if not self._teller.is_alive():
            self._teller.start()

    def advance(self, steps: int = 1, counts: Mapping[str, int] | None = None) -> None:
        """Move the newest line on, and show counts beside it."""
        assert self._stage is not None
        self._stage.advance(steps, counts or {})
        if self._console.is_terminal:
            self._progress.update(self._task, advance=steps)
        elif self._stage.done == self._stage.total:
            self.say(self._stage.line)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, markup=False)

    def _tell(self) -> None:
        while not self._over.wait(self._pause):
            if self._stage and self._stage.done < self._stage.total:
                self.say(self._stage.line)


def say(lines: Sequence[str]) -> None:
    """Print lines."""
    for line in lines:
        console().print(line, markup=False)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_across(records: Sequence[Mapping[str, Any]], name: str, quantities: Mapping[str, str], title: str) -> None:
    """One column a record, headed by its `name`, and one line a quantity (key: words) that any record has.

    Without records, the title alone.
    """
    if not records:
        console().print(title)
        return
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


def print_down(records: Sequence[Mapping[str, Any]], quantities: Mapping[str, str], title: str) -> None:
    """One line a record, and one column a quantity (key: words)."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for name, words in quantities.items():
        numbers = all(isinstance(record[name], float) for record in records)
        table.add_column(words, justify="right" if numbers else "left", overflow="fold")
    for record in records:
        table.add_row(*(_cell(record[name]) for name in quantities))
    console().print(table)
