"""Commands in several processes: what is played here are small scripts without torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grood_cert.system import jobs

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from grood_cert.cli import run_script
from grood_cert.errors import InputError, RunError, SoundnessError, StoppedError
from grood_cert.system import jobs

jobs._GRACE = float(sys.argv[3])
if not jobs.started():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it

def failing(error, after=0):
    time.sleep(after)
    print("words before an error", file=sys.stderr)
    raise error


def sleep():
    time.sleep(600)


def main(folder: str, count: int, grace: float):
    if not jobs.started():
        sys.exit(jobs.share_out(count, [sys.executable, *sys.argv]))
    jobs.end_with_starter()
    rank = int(os.environ["RANK"])
    (Path(folder) / f"{rank}.pid").write_text(str(os.getpid()))
    WORK


run_script(main)
"""


def start(folder: Path, count: int, work: str, grace: float = 60, **more) -> subprocess.Popen:
    """A command that runs in so many processes; what each does is one line that knows its rank."""
    script = folder / "script.py"
    script.write_text(SCRIPT.replace("WORK", work))
    environment = {name: value for name, value in os.environ.items() if name not in (*NAMES, jobs._STARTED)}
    command = [sys.executable, str(script), str(folder), str(count), str(grace)]
    environment |= {"PYTHONPATH": os.getcwd(), **more}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **streams)


def ended(folder: Path, count: int, work: str, grace: float = 60, **more) -> tuple[int, str, str]:
    process = start(folder, count, work, grace, **more)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def numbers(folder: Path) -> list[int]:
    """Of its processes, as far as they have told them."""
    return [int(text) for file in folder.glob("*.pid") if (text := file.read_text())]


def alive(folder: Path) -> list[int]:
    """Those of its processes that still run."""
    found = []
    for number in numbers(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, 0)
            found.append(number)
    return found


def begun(folder: Path) -> subprocess.Popen:
    """A command whose two processes are at work."""
    process = start(folder, 2, "sleep()")
    while len(numbers(folder)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("threads", [None, "3"])
def test_each_process_has_its_number_and_a_share_of_the_cores_and_the_first_alone_prints(tmp_path, threads):
    work = (
        "import json; (Path(folder) / f'{rank}.json').write_text(json.dumps(dict(os.environ))); "
        "print('done by', rank, signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    )
    more = {"OMP_NUM_THREADS": threads} if threads else {}
    assert ended(tmp_path, 3, work, **more) == (0, "done by 0 True\n", "")  # Ctrl-C is for the one that waits
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for rank, environment in enumerate(found):
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "3"
        assert environment["OMP_NUM_THREADS"] == (threads or str(max(1, jobs._cores() // 3)))
    assert len({(environment["MASTER_ADDR"], environment["MASTER_PORT"]) for environment in found}) == 1


STOPPED = "failing(StoppedError('another has stopped'))"
SAID = "words before an error\nscript.py: error: "


@pytest.mark.parametrize(
    ("work", "code", "told"),
    [
        ("failing(InputError('no such thing'))", 2, f"{SAID}no such thing\n"),
        ("failing(RunError('out of luck')) if rank == 0 else sleep()", 1, f"{SAID}out of luck\n"),
        (
            "failing(RunError('no memory')) if rank == 1 else sleep()",
            1,
            "process 2 of 3: script.py: error: no memory\n",
        ),
        (
            f"failing(RunError('no memory'), 0.5) if rank == 2 else {STOPPED}",
            1,
            f"{SAID}another has stopped\nprocess 3 of 3: script.py: error: no memory\n",
        ),
        (
            f"failing(SoundnessError('a proof is wrong', {{}}), 0.5) if rank == 1 else {STOPPED}",
            3,
            f"{SAID}another has stopped\nprocess 2 of 3: script.py: error: SOUNDNESS VIOLATION: a proof is wrong\n",
        ),
        (
            f"failing(SoundnessError('a proof is wrong', {{}}), 0.5) if rank == 0 else {STOPPED}",
            3,
            f"{SAID}SOUNDNESS VIOLATION: a proof is wrong\n",
        ),
        ("failing(ValueError('a bug')) if rank == 1 else sleep()", 1, "process 2 .*Traceback.*ValueError: a bug\n"),
        (
            "failing(os.kill(os.getpid(), signal.SIGKILL)) if rank == 1 else sleep()",
            137,
            r"process 2 of 3: ended by signal 9 \(.*\)\n",
        ),
        (
            "os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else sleep()",
            137,
            r"process 1 of 3: ended by signal 9 \(.*\)\n",
        ),
    ],
)
def test_a_failure_ends_all_processes_and_the_gravest_is_told(tmp_path, work, code, told):
    """The one that went wrong may be the last to end: those that wait for it notice at once."""
    found, out, err = ended(tmp_path, 3, work, grace=0.2 if "sleep()" in work else 60)
    assert (found, out, alive(tmp_path)) == (code, "", [])
    assert re.fullmatch(told, err, re.DOTALL), err


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_who_interrupts_the_command_ends_all_its_processes(tmp_path, number, code, word):
    process = begun(tmp_path)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: all of them hear it
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, alive(tmp_path)) == (code, "", [])
    assert err == f"script.py: error: {word}; the same command goes on (train: with --resume)\n"


def test_processes_end_with_the_one_that_started_them(tmp_path):
    process = begun(tmp_path)
    process.kill()
    process.wait()
    process.communicate(timeout=300)  # ends once nobody holds the other side of its output
