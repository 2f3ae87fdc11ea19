"""A reporter that remembers what it heard."""

from __future__ import annotations


class Recorder:
    """What a run reported: stages with their totals and units, steps with their counts, lines."""

    def __init__(self):
        self.stages, self.steps, self.counts, self.lines = [], [], [], []

    def begin(self, stage, total, unit="samples"):
        self.stages.append((stage, total, unit))

    def advance(self, steps=1, counts=None):
        self.steps.append(steps)
        self.counts.append(dict(counts or {}))

    def say(self, line):
        self.lines.append(line)
