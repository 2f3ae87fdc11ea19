"""Hand damaged and senseless things to the command line and print what came of it, as a Markdown table."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import jobs
from tests.faults.forks import Child, command
from tests.fuzz.campaign import fuzz
from tests.fuzz.cases import KINDS, Material


def material(folder: Path) -> Material:
    """A small detector, its certification whole and in two shards, and its network in ONNX."""
    (folder / "recipe.toml").write_text(jobs.RECIPE)
    options = "--stages ibp --eps 0.01,0.05 --limit 6 --batch-size 3 --precision 0.1 --effort fast --engine native"
    train = ["train", folder / "recipe.toml", "--out", folder / "trained"]
    certify = ["certify", folder / "model.pt", "--out", folder, "--no-figure", *options.split()]
    export = ["export", folder / "model.pt", "--out", folder / "net.onnx", "--format", "onnx"]

    def act() -> None:
        import contextlib

        for arguments in (train, certify, [*certify, "--shard", "1/2"], [*certify, "--shard", "2/2"], export):
            with contextlib.suppress(SystemExit):
                command(arguments)()
            if arguments is train:
                shutil.copy(folder / "trained" / "model.pt", folder)

    ended = Child(act).wait()
    shards = tuple(folder / f"rows-{number}-of-2.csv" for number in (1, 2))
    given = Material(folder, folder / "model.pt", folder / "rows.csv", shards, folder / "net.onnx", jobs.RECIPE)
    assert all(path.exists() for path in (given.model, given.rows, *shards, given.onnx)), ended.said
    return given


def main() -> int:
    """1 if a case broke the law."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    given = parser.parse_args()
    began, total, violations = time.monotonic(), 0, 0
    jobs.load_everything()
    with tempfile.TemporaryDirectory() as folder:
        print("| what | cases | how they ended | violations |\n|---|---|---|---|")
        for tally in fuzz(material(Path(folder)), given.kinds, -(-given.cases // len(given.kinds)), given.seed):
            print(tally.line, flush=True)
            print("".join(f"{line}\n\n" for line in tally.violations), end="", file=sys.stderr, flush=True)
            total, violations = total + tally.trials, violations + len(tally.violations)
    print(f"\n{total} cases, {violations} violations, {time.monotonic() - began:.0f} s, seed {given.seed}")
    return int(bool(violations))


if __name__ == "__main__":
    sys.exit(main())
