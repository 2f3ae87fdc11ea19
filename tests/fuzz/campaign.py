"""Cases, one after another in forked children, and what came of them."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.faults.forks import Child, report
from tests.faults.tally import Tally
from tests.fuzz.cases import KINDS, Material, run

LIMIT = 60  # seconds for a case, on a machine that does other things too
CHUNK = 100
_MEMORY = 8 * 2**30


def _one(kind: str, number: int, seed: int, given: Material, place: Path) -> dict[str, str]:
    """How a case ended, and what was wrong with it."""
    case = KINDS[kind](given, random.Random(f"{seed} {kind} {number}"), place)

    def late(signal_number: int, frame: object) -> None:
        raise TimeoutError(f"not at its end after {LIMIT} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    code = None
    try:
        code, out, err = run(case)
        signal.alarm(0)
        wrong = case.judge(out) if code == 0 else ""
        lines = [line for line in err.splitlines() if line.startswith("grood-cert: error: ")]
        if code in (1, 2) and (len(lines) != 1 or "Traceback" in err):
            wrong = f"exit {code}, and no single line: {err[-500:]}"
        elif code not in (0, 1, 2):
            wrong = f"exit {code}: {err[-500:]}"
        wrong = wrong or case.always()
    except BaseException:  # noqa: BLE001  (that is what is looked for)
        wrong = traceback.format_exc()
    finally:
        signal.alarm(0)
    end = "broken" if wrong else "read" if code == 0 else "refused"
    return {"end": end, "wrong": f"{' '.join(case.arguments)}\n{wrong}" if wrong else ""}


def _chunk(kind: str, numbers: range, seed: int, given: Material) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, taken + _MEMORY))
    for number in numbers:
        place = Path(tempfile.mkdtemp(dir=given.folder))
        os.chdir(place)
        report(json.dumps({"number": number}))
        report(json.dumps({"number": number, **_one(kind, number, seed, given, place)}))
        os.chdir(given.folder)
        shutil.rmtree(place, ignore_errors=True)


def fuzz(given: Material, kinds: list[str], cases: int, seed: int) -> Iterator[Tally]:
    """So many cases of each kind."""
    for kind in kinds:
        tally, number = Tally((kind,)), 0
        while number < cases:
            numbers = range(number, min(number + CHUNK, cases))
            ended = Child(lambda numbers=numbers, kind=kind: _chunk(kind, numbers, seed, given)).wait(LIMIT * CHUNK)
            heard = [json.loads(line) for line in ended.heard]
            done = [entry for entry in heard if "end" in entry]
            for entry in done:
                tally.trials += 1
                tally.ends[entry["end"]] += 1
                if entry["wrong"]:
                    tally.violations.append(f"{kind} {entry['number']}, seed {seed}: {entry['wrong']}")
            number = numbers.stop
            if len(done) < len(numbers):  # a case has killed the child
                number = heard[-1]["number"] + 1 if heard else numbers.stop
                tally.trials += 1
                tally.ends["died"] += 1
                tally.violations.append(
                    f"{kind} {number - 1}, seed {seed}: died with {ended.code}\n{ended.said[-500:]}"
                )
        yield tally
