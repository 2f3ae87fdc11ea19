"""Disturb small runs of every command and print what came of it, as a Markdown table."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.campaign import FAULTS, Campaign
from tests.faults.jobs import JOBS, load_everything, prepared


def main() -> int:
    """1 if the law was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="of each kind of fault in each job")
    parser.add_argument("--seed", type=int, default=0)
    names = [job.name for job in JOBS]
    parser.add_argument("--jobs", nargs="+", choices=names, default=names, metavar="JOB", help=", ".join(names))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS, metavar="FAULT", help=", ".join(FAULTS))
    given = parser.parse_args()
    began = time.monotonic()
    load_everything()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepared(root)
        campaign = Campaign(root, given.seed, given.moments)
        print("| fault | job | moments | how the disturbed runs ended | violations |\n|---|---|---|---|---|")
        for tally in campaign.run(given.jobs, given.faults):
            print(tally.line, flush=True)
            print("".join(f"{line}\n" for line in tally.violations), end="", file=sys.stderr, flush=True)
    violations = [line for tally in campaign.tallies for line in tally.violations]
    moments = sum(tally.trials for tally in campaign.tallies)
    print(f"\n{moments} faults, {len(violations)} violations, {time.monotonic() - began:.0f} s, seed {given.seed}")
    return int(bool(violations))


if __name__ == "__main__":
    sys.exit(main())
