"""Counts of what came of disturbed runs and senseless input."""

from __future__ import annotations

import json
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


_COMMANDS = """
import importlib, json, sys
for module, *options in json.loads(sys.argv.pop()):
    sys.argv[1:] = options
    if importlib.import_module(f"{module}.__main__").main():
        sys.exit(1)
"""


def printed(*commands: tuple[str, ...]) -> str:
    """What campaigns print that are run as commands and find no violation; each is a module and its options.

    One process runs them one after another: it imports once what it forks children from.
    """
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, json.dumps(commands)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout
