"""Runs pytest again and again in children of one process that has the heavy packages imported already.

Started as a script in a tree, with the packages' names: each line of its input is a JSON list of seconds, a file for the output, and the
arguments of pytest; it answers the exit code, 124 where time was up. Nothing of the tree is imported before the fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import time

TIMEOUT = 124


def child(log: str, arguments: list[str]) -> None:
    """Run pytest and end the process with its exit code."""
    import pytest

    with open(log, "w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        code = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def waited(process: int, seconds: float) -> int:
    """Exit code of a child, which is killed with its own children when time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return TIMEOUT


def main() -> None:
    """Import what the command line names, then serve until the input ends."""
    sys.path[0] = os.getcwd()
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # children need not look through what was imported here
    for line in sys.stdin:
        seconds, log, arguments = json.loads(line)
        process = os.fork()
        os.setpgid(process, process)  # a group of its own; done on both sides, whoever comes first
        if not process:
            child(log, arguments)
        print(waited(process, seconds), flush=True)


if __name__ == "__main__":
    main()
