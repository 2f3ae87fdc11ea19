"""Plant bugs and see whether the suite notices: python -m tests.mutants."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.mutants.catalogue import MUTANTS
from tests.mutants.runner import hunt, table

ROOT = Path(__file__).parents[2]


def main() -> int:
    """The command; 1 if a mutant lives."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="mutants whose name or file holds one of these")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="the I-th of N parts of the list")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--seconds", type=float, default=900.0, help="most that the tests of a mutant may take")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    part, parts = map(int, options.shard.split("/"))
    chosen = [m for m in MUTANTS if not options.only or any(text in f"{m.name} {m.file}" for text in options.only)]
    chosen = chosen[part - 1 :: parts]
    if not chosen:
        parser.error("no mutant is called so")
    if options.list:
        for mutant in chosen:
            print(f"{mutant.file}:{mutant.line(ROOT)}: {mutant.name}\n  - {mutant.old}\n  + {mutant.new}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        results = hunt(
            ROOT,
            chosen,
            Path(folder),
            options.jobs,
            options.seconds,
            lambda text: print(text, file=sys.stderr, flush=True),
        )
    print(table(results))
    return int(any(result.fate == "survived" for result in results))


if __name__ == "__main__":
    sys.exit(main())
