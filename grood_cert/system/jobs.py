"""One command in several processes of this machine, as `torchrun` would start them, but for its launcher's tracebacks.

Each runs the same command line and finds its number in the environment variables of torchrun; `grood_cert.runs.shards`
says what it does with that. The process that started them only waits, and never imports torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

_STARTED = "GROOD_CERT_JOBS"  # in the environment of processes that `share_out` started
_PAUSE = 0.1  # seconds between two looks at the processes
_GRACE = 3.0  # seconds in which the first process may say by itself what ended another one
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar that was ended has left it hidden


def started() -> bool:
    """Whether `share_out` started this process."""
    return _STARTED in os.environ


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_out(count: int) -> int:
    """Run the command line of this process in so many processes, and wait for all of them.

    The first prints where this process does; of the others only the error of one that failed is printed. Once one fails
    all are ended, and so they are where the wait is interrupted. Each has an equal share of the cores, unless
    OMP_NUM_THREADS is set.

    Args:
        count: Number of processes.

    Returns:
        Exit code: 0, or that of a process that failed first.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, _cores() // count))),
        _STARTED: str(count),
    }
    command = [sys.executable, *sys.orig_argv[1:]]
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as said:
        try:
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they inherit that: on Ctrl-C this process ends them
            for rank in range(count):
                own = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                out, err = (None, None) if rank == 0 else (subprocess.DEVNULL, said)
                processes.append(subprocess.Popen(command, env=own, stdout=out, stderr=err))
            signal.signal(signal.SIGINT, before)
            return _wait(processes, said)
        finally:
            _end(processes)


def _wait(processes: Sequence[subprocess.Popen[bytes]], said: IO[bytes]) -> int:
    """Wait for all processes, or for the first that fails; the exit code."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed or None not in codes:
            break
        time.sleep(_PAUSE)
    if not failed:
        return 0
    first = failed[0]
    code = codes[first] or 1
    if first > 0:
        try:
            same = processes[0].wait(_GRACE) == code and code != 1  # else it says only that another one has stopped
        except subprocess.TimeoutExpired:
            same = False
        if not same:
            lines = os.pread(said.fileno(), 1 << 20, 0).decode(errors="replace").splitlines()
            told = [line for line in lines if "error:" in line] or lines or [f"it ended with exit code {code}"]
            print(f"process {first + 1} of {len(processes)}: {told[0]}", file=sys.stderr)
    return code if code > 0 else 128 - code  # as a shell says which signal ended it


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    for process in running:
        process.wait()
    if running and sys.stderr.isatty():
        print(_SHOW_CURSOR, end="", file=sys.stderr, flush=True)
