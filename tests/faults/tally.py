"""Counts of what came of disturbed runs and senseless input."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What came of one kind of trial.

    Attributes:
        kind: Which: the first cells of its line.
        trials: How many.
        ends: How they ended, with their numbers.
        violations: What broke the law.
    """

    kind: tuple[str, ...]
    trials: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """A line of the table."""
        ends = ", ".join(f"{count} {end}" for end, count in self.ends.most_common())
        return f"| {' | '.join((*self.kind, str(self.trials), ends, str(len(self.violations))))} |"


def printed(module: str, *options: str) -> str:
    """What a campaign prints that is run as a command and finds no violation."""
    done = subprocess.run(
        [sys.executable, "-m", module, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout
