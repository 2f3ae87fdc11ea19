"""One command in several processes of this machine, as `torchrun` would start them, but for its launcher's tracebacks.

Each runs the same command line and finds its number in the environment variables of torchrun; `grood_cert.runs.shards`
says what it does with that. The process that started them only waits, and never imports torch.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from socket import socket
from typing import IO

FOLLOWED = 4  # exit code of a process that ended only because another one did
_STARTED = "GROOD_CERT_JOBS"  # in the environment of processes that `share_out` started
_PAUSE = 0.1  # seconds between two looks at the processes
_GRACE = 3.0  # seconds that the others have, once one has failed, to end by themselves and say why
_ORDER = {3: 0, 2: 1, FOLLOWED: 3}  # of exit codes, the gravest first; all others: 2
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar that was ended has left it hidden


def started() -> bool:
    """Whether `share_out` started this process."""
    return {_STARTED, "RANK", "WORLD_SIZE"} <= os.environ.keys()


def end_with_starter() -> None:
    """From now on end this process, which `share_out` started, when the one that started it is gone, however it went."""

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written to its standard input
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def share_out(count: int, command: Sequence[str]) -> int:
    """Run a command in so many processes, and wait for all of them.

    The first prints where this process does; of the others only why one failed is printed. Once one fails all are ended, and
    so they are where the wait is interrupted. Each has an equal share of the cores, unless OMP_NUM_THREADS is set.

    Args:
        count: Number of processes.
        command: Program and arguments; its processes call `end_with_starter`.

    Returns:
        Exit code: 0, or that of the process whose failure ended the others.
    """
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, _cores() // count))),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "FATAL"),  # of a broken barrier all would tell
        _STARTED: str(count),
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        said: list[IO[bytes] | None] = [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, count))]
        stack.callback(_end, processes)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they inherit that: on Ctrl-C this process ends them
        for rank, err in enumerate(said):
            own = inherited | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            out = None if rank == 0 else subprocess.DEVNULL
            # Its standard input ends when this process is gone.
            processes.append(subprocess.Popen(command, env=own, stdin=subprocess.PIPE, stdout=out, stderr=err))
        signal.signal(signal.SIGINT, before)
        return _wait(processes, said)


def _wait(processes: Sequence[subprocess.Popen[bytes]], said: Sequence[IO[bytes] | None]) -> int:
    """Wait for all processes, or for a failure, which is told; the exit code."""
    until = math.inf
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < until:
        if any(codes):  # the first that ended need not be the one that went wrong
            until = min(until, time.monotonic() + _GRACE)
        time.sleep(_PAUSE)
    failed = {rank: code for rank, code in enumerate(codes) if code}
    if not failed:
        return 0
    rank, code = min(failed.items(), key=lambda item: _ORDER.get(item[1], 2))
    if line := _told(code, said[rank]):
        print(f"process {rank + 1} of {len(processes)}: {line}", file=sys.stderr)
    if code == FOLLOWED:
        return 1
    return code if code > 0 else 128 - code  # as a shell says which signal ended it


def _told(code: int, said: IO[bytes] | None) -> str:
    """Why a process ended; empty if it has said so itself."""
    if code < 0:
        return f"ended by signal {-code} ({signal.strsignal(-code)})"
    if said is None:
        return ""
    said.seek(0)
    text = said.read().decode(errors="replace").strip()
    errors = [line for line in text.splitlines() if line.partition(": ")[2].startswith("error: ")]
    return errors[-1] if errors else text or f"it ended with exit code {code}"


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    for process in processes:
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
    if running and sys.stderr.isatty():
        print(_SHOW_CURSOR, end="", file=sys.stderr, flush=True)
