"""Children that run a command line, and what can be done to one while it runs."""

from __future__ import annotations

import os
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT = 300.0  # seconds that no run takes

Action = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: Exit code; negative: the signal that ended it.
        said: What it wrote to stdout and stderr.
        heard: What it reported as done: lines of its own choice.
        seconds: How long it took.
    """

    code: int
    said: str
    heard: tuple[str, ...]
    seconds: float

    @property
    def refusal(self) -> str | None:
        """The one line of an error; None if there is none, or more than that."""
        lines = [line for line in self.said.splitlines() if ": error: " in line]
        return lines[0] if len(lines) == 1 and "Traceback" not in self.said else None


def report(line: str) -> None:
    """In a child: say that something is done, in a way that survives it."""
    os.write(_heard, f"{line}\n".encode())


_heard = -1


class Child:
    """A forked process that does something and ends."""

    def __init__(self, action: Action) -> None:
        self._said, self._done = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (closed by wait)
        self._began = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of who forks hold nothing that a child needs
            self.pid = os.fork()
        if not self.pid:
            self._run(action)
        self._watched = os.pidfd_open(self.pid)

    def _run(self, action: Action) -> None:
        global _heard
        code = 70
        try:
            _heard = self._done.fileno()
            os.dup2(self._said.fileno(), 1)
            os.dup2(self._said.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
            if "torch" in sys.modules:  # two threads that first touch its pool after a fork can find none
                sys.modules["torch"].set_num_threads(1)
            action()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        except BaseException:  # noqa: BLE001  (it ends here)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless it has ended."""
        signal.pidfd_send_signal(self._watched, number) if not self.ended(0) else None

    def ended(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        return bool(select.select([self._watched], [], [], seconds)[0])

    def wait(self, seconds: float = LIMIT) -> Ended:
        """Its end; a child that takes longer is killed, and the code is that of SIGALRM."""
        late = not self.ended(seconds)
        if late:
            self.kill()
        _, status = os.waitpid(self.pid, 0)
        os.close(self._watched)
        texts = []
        for stream in (self._said, self._done):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
            stream.close()
        code = -signal.SIGALRM if late else os.waitstatus_to_exitcode(status)
        return Ended(code, texts[0], tuple(texts[1].splitlines()), time.monotonic() - self._began)


def forget(*packages: str) -> None:
    """In a child: packages are as if they had not been imported yet."""
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


def command(arguments: Sequence[str | Path], *before: Action) -> Action:
    """What runs a command line in a child, after some preparations."""

    def run() -> None:
        from grood_cert import cli

        sys.argv = ["grood-cert", *map(str, arguments)]
        for prepare in before:
            prepare()
        cli.main()

    return run


class Events:
    """The moments of a child at which it touches files in a folder: opened to be written, renamed, synchronised.

    Args:
        folder: The folder.
        chosen: Number of the event at which something happens, from 1; 0: never.
        happens: What happens; it may raise an `OSError` in place of the operation.
    """

    def __init__(self, folder: Path, chosen: int, happens: Callable[[str], None]) -> None:
        self.folder, self.chosen, self.happens, self.count = str(folder.resolve()), chosen, happens, 0

    def __call__(self) -> None:
        """In a child: begin to watch."""
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            self._pass("sync")
            sync(descriptor)
            self._pass("synced", real=False)

        os.fsync = fsync
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR) and self._ours(arguments[0]):
                self._pass("open")
        elif event in ("os.rename", "os.mkdir") and self._ours(os.fspath(arguments[0])):  # type: ignore[arg-type]
            self._pass(event)
        elif event == "os.remove" and self._ours(os.fspath(arguments[0])):  # type: ignore[arg-type]
            self._pass(event, real=False)

    def _ours(self, path: object) -> bool:
        return os.path.abspath(str(path)).startswith(self.folder)

    def _pass(self, what: str, real: bool = True) -> None:
        self.count += 1
        report(f"event {self.count} {what} {int(real)}")
        if self.count == self.chosen:
            self.happens(what)
