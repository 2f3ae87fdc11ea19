"""`python -m tests.marabou`: Marabou's verdicts on properties that we export, against ours, as a Markdown table."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.marabou.oracle import Case, campaign


def table(found: list[Case]) -> str:
    """How often each pair of verdicts came, and what of the counterexamples was true."""
    lines = ["| Marabou | ours | properties |", "|---|---|---|"]
    counts = Counter((case.verdict, ours(case)) for case in found)
    lines += [f"| {verdict} | {word} | {number} |" for (verdict, word), number in sorted(counts.items())]
    said = [case for case in found if case.verdict == "sat"]
    summary = (
        f"{len(found)} properties, of which {sum(case.exact for case in found)} are exact; "
        f"{sum(case.bounded for case in found)} proved by our bound of the row. "
        f"Of {len(said)} counterexamples {sum(case.violated for case in said)} violate the property in float64 (up to 1e-5) and "
        f"{sum(case.crossed for case in said)} cross gamma. "
        f"Disagreements: {sum(bool(case.disagreement) for case in found)}."
    )
    lines += ["", summary]
    return "\n".join(lines)


def ours(case: Case) -> str:
    """What we say of the ball."""
    return "certified" if case.certified else "refuted by an attack" if case.attacked else "undecided"


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seeds", type=int, default=1, help="seeds of each network")
arguments = parser.parse_args()
cases = []
with tempfile.TemporaryDirectory() as folder:
    for case in campaign(range(arguments.seeds), Path(folder)):
        cases.append(case)
        if case.disagreement:
            print(f"{case.name}: {case.disagreement}", flush=True)
print(table(cases))
sys.exit(any(case.disagreement for case in cases))
