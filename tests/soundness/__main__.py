"""`python -m tests.soundness`: try to contradict every bound; exit code 1 if that succeeds."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tests.soundness.campaign import Counts, tried
from tests.soundness.report import report
from tests.soundness.reproduction import Reproduction

_PORTION = 25


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.soundness", description=__doc__)
    parser.add_argument("--nets", type=int, default=200, help="networks to make")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soundness"), help="folder of report and reproductions")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--show", type=Path, help="a reproduction to be shown again")
    chosen = parser.parse_args(arguments)
    if chosen.show:
        return _shown(chosen.show)
    counts, started = Counts(), time.monotonic()
    portions = [
        range(begin, min(begin + _PORTION, chosen.first + chosen.nets))
        for begin in range(chosen.first, chosen.first + chosen.nets, _PORTION)
    ]
    for done, part in enumerate(_parts(chosen.seed, portions, chosen.workers), 1):
        counts.add(part)
        print(
            f"{min(done * _PORTION, chosen.nets)} of {chosen.nets} networks, {len(counts.violations)} violations, "
            f"{time.monotonic() - started:.0f} s",
            file=sys.stderr,
        )
    text = report(counts, chosen.seed)
    for place, violation in enumerate(itertools.islice(counts.violations, 20)):
        path = violation.save(chosen.out, place)
        text += f"\n* {violation}\n    python -m tests.soundness --show {path}\n"
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if counts.failed else 0


def _parts(seed: int, portions: list[range], workers: int) -> Iterator[Counts]:
    if workers < 2:
        yield from (tried(seed, portion) for portion in portions)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(tried, seed, portion) for portion in portions]):
            yield future.result()


def _shown(path: Path) -> int:
    reproduction = Reproduction.load(path)
    print(reproduction)
    found = reproduction.again()
    for wrong in found:
        print(f"again: claimed {wrong.limit!r}, found {wrong.value!r} (excess {wrong.excess:.3g})")
    if not found:
        print("again: the claim holds at this point")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
