"""The faults, one after another, and what each must leave.

The law. Whatever happens to a run: no report of something done is wrong (the job's `lost`), no file is half written,
the run ends with exit code 0, with one line that says what is wrong (1, 2, 130, 143), or by the signal that it was sent;
and the same command, given again (`train` with --resume where a state was saved), ends with the files of an undisturbed
run, byte by byte, times aside, and with no temporary file left.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tests.faults.forks import Action, Child, Ended, Events, command
from tests.faults.jobs import JOBS, Job, content, half_written
from tests.faults.tally import Tally

TIMED_OUT = -signal.SIGALRM


def end_of(ended: Ended) -> str:
    """A word for how a run ended; "broken" where the law knows no such end."""
    if ended.code == TIMED_OUT:
        return "broken: hung"
    if ended.code < 0:
        return f"died of {signal.Signals(-ended.code).name}"
    if ended.code == 0:
        return "finished"
    if ended.refusal and ended.code in (1, 2, 130, 143):
        return f"one line, exit {ended.code}"
    return f"broken: exit {ended.code}"


FAULTS = ("killed", "terminated", "disk", "memory", "two", "clock", "damaged", "worker")


class Campaign:
    """Jobs, disturbed at random moments.

    Args:
        root: Folder with what the jobs read, from `prepared`.
        seed: Draws all moments.
        moments: How many of each kind of fault.
    """

    def __init__(self, root: Path, seed: int, moments: int) -> None:
        self.root, self.seed, self.moments = root, seed, moments
        self.tallies: list[Tally] = []
        self.whole: dict[str, dict[str, object]] = {}
        self.events: dict[str, list[tuple[int, str, bool]]] = {}
        self.seconds: dict[str, float] = {}

    def measure(self, job: Job) -> None:
        """Run a job undisturbed, once."""
        if job.name in self.whole:
            return
        folder = self._folder(job)
        events = Events(folder, 0, lambda what: None)

        def act() -> None:
            events()
            job.action(folder)

        ended = Child(act).wait()
        assert ended.code == 0, ended.said
        self.seconds[job.name] = ended.seconds
        seen = [line.split() for line in ended.heard if line.startswith("event ")]
        self.events[job.name] = [(int(number), what, real == "1") for _, number, what, real in seen]
        self.whole[job.name] = content(folder)
        assert not job.lost(folder, ended.heard) and not half_written(folder)
        shutil.rmtree(folder)

    def _folder(self, job: Job) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.root, prefix=f"{job.name}-")) / "run"
        for name in ("recipe.toml", "model.pt"):
            (folder.parent / name).symlink_to(self.root / name)
        if (self.root / "shards").exists():
            (folder.parent / "shards").symlink_to(self.root / "shards")
        job.prepare(folder)
        return folder

    def _random(self, *names: object) -> random.Random:
        return random.Random(f"{self.seed} {names}")

    def _tally(self, fault: str, job: Job) -> Tally:
        self.measure(job)
        tally = Tally((fault, job.name))
        self.tallies.append(tally)
        return tally

    def judge(self, tally: Tally, job: Job, folder: Path, ended: Ended, moment: str, whole: bool = True) -> None:
        """Hold one disturbed run against the law, and go on with it."""

        def broken(what: str, said: str = "") -> None:
            tally.violations.append(f"{tally.kind[0]}, {job.name}, {moment}: {what}" + (f"\n{said}" if said else ""))

        end = end_of(ended)
        tally.trials += 1
        tally.ends[end] += 1
        if end.startswith("broken"):
            broken(end, ended.said)
        try:
            if lost := job.lost(folder, ended.heard):
                broken(f"lost: {lost}")
        except Exception as error:  # noqa: BLE001  (a file is missing or damaged)
            broken(f"lost: {error!r}")
        if half := half_written(folder):
            broken(f"half written: {half}")
        self._go_on(job, folder, broken if whole else lambda what, said="": None)
        if not [line for line in tally.violations if moment in line]:
            shutil.rmtree(folder.parent)

    def _go_on(self, job: Job, folder: Path, broken: Callable[..., None]) -> None:
        if job.done(folder):
            for lock in folder.glob(".*.lock"):  # killed just before it was removed; it locks nothing
                lock.unlink()
        else:
            again = Child(lambda: job.action(folder)).wait()
            if again.code:
                broken(f"the next run ends with {again.code}", again.said)
                return
        found, expected = content(folder), self.whole[job.name]
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                there = "is missing" if name not in found else "is left" if name not in expected else "differs"
                broken(f"{name} {there} at the end")

    def _disturbed(self, job: Job, folder: Path, *before: Action) -> Child:
        def act() -> None:
            for prepare in before:
                prepare()
            job.action(folder)

        return Child(act)

    # The faults

    def terminated(self, job: Job) -> None:
        """SIGTERM, as who runs the jobs of a machine sends it."""
        self.killed(job, signal.SIGTERM)

    def killed(self, job: Job, number: int = signal.SIGKILL) -> None:
        """A signal: half of the moments at random times, half at random touches of a file."""
        tally = self._tally(signal.Signals(number).name, job)
        draw = self._random("killed", job.name, number)
        events = [event for event, _, _ in self.events[job.name]]
        for moment in range(self.moments):
            folder = self._folder(job)
            if moment % 2:
                after = draw.uniform(0.0, self.seconds[job.name])
                child = self._disturbed(job, folder)
                child.ended(after)
                child.kill(number)
                name = f"after {after:.3f} s"
            else:
                event = draw.choice(events)
                name = f"event {event}"
                child = self._disturbed(job, folder, Events(folder, event, lambda what: os.kill(os.getpid(), number)))
            self.judge(tally, job, folder, child.wait(), name)

    def disk(self, job: Job) -> None:
        """No space for the n-th touch of a file, for every n; and no file may grow beyond so many bytes."""
        tally = self._tally("no space at one touch", job)

        def refuse(what: str) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        possible = [event for event, what, real in self.events[job.name] if real]
        for event in self._some(possible, "touch", job.name):
            folder = self._folder(job)
            self.judge(
                tally, job, folder, self._disturbed(job, folder, Events(folder, event, refuse)).wait(), f"event {event}"
            )
        tally = self._tally("no file beyond n bytes", job)
        largest = max(len(found) if isinstance(found, bytes) else 2000 for found in self.whole[job.name].values())
        for size in self._some(range(0, 2 * largest, max(1, largest // 100)), "size", job.name):
            folder = self._folder(job)

            def limited(size: int = size) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

            ended = self._disturbed(job, folder, limited).wait()
            self.judge(tally, job, folder, ended, f"{size} bytes")

    def _some(self, moments: Iterator[int] | range | list[int], *names: object) -> list[int]:
        found = list(moments)
        return sorted(self._random(*names).sample(found, min(len(found), 2 * self.moments)))

    def memory(self, job: Job) -> None:
        """Address space for some bytes more than torch and the package take."""
        tally = self._tally("out of memory", job)
        draw = self._random("memory", job.name)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for _ in range(self.moments):
            folder, extra = self._folder(job), int(2 ** draw.uniform(17, 27))

            def limited(extra: int = extra) -> None:
                resource.setrlimit(resource.RLIMIT_AS, (taken + extra, taken + extra))

            ended = self._disturbed(job, folder, limited).wait(20.0)
            if ended.code == TIMED_OUT:  # the library of linear algebra asks for memory for ever
                ended = replace(ended, code=-signal.SIGKILL)
            poorer = ended.code == 0 and self._poorer(folder)
            self.judge(tally, job, folder, ended, f"{extra} bytes", whole=not poorer)
            if poorer:
                tally.ends["of these with failures noted in the manifest"] += 1

    @staticmethod
    def _poorer(folder: Path) -> bool:
        """Whether a certification notes that bounds failed; such rows prove less, and say so."""
        manifest = folder / "rows.json"
        return manifest.exists() and bool(json.loads(manifest.read_text()).get("failures"))

    def two(self, job: Job) -> None:
        """Two runs in one folder; one works, the other is refused or finds everything done."""
        tally = self._tally("two runs in one folder", job)
        draw = self._random("two", job.name)
        for moment in range(self.moments):
            folder = self._folder(job)
            first = self._disturbed(job, folder)
            first.ended(draw.uniform(0, 1.2 * self.seconds[job.name]))
            second = self._disturbed(job, folder).wait()
            ended = first.wait()
            if second.code and ended.code:
                tally.violations.append(f"{job.name}: two runs refused each other\n{ended.said}{second.said}")
            if second.code not in (0, 2) or (second.code and not second.refusal):
                tally.violations.append(f"{job.name}: the second of two ends with {second.code}\n{second.said}")
            tally.ends[f"(the other: {end_of(second)})"] += 1
            self.judge(tally, job, folder, ended, f"moment {moment}")

    def clock(self, job: Job) -> None:
        """A day at every look at the clock; what a killed run has left is of tomorrow."""
        tally = self._tally("clock set back", job)
        draw = self._random("clock", job.name)
        for _ in range(max(1, self.moments // 5)):
            folder = self._folder(job)
            event = draw.choice([event for event, _, _ in self.events[job.name]])
            self._disturbed(
                job, folder, Events(folder, event, lambda what: os.kill(os.getpid(), signal.SIGKILL))
            ).wait()
            for file in folder.rglob("*"):
                os.utime(file, (time.time() + 86400,) * 2)

            def backwards() -> None:
                looks = [time.time()]

                def look() -> float:
                    looks[0] -= 86400.0
                    return looks[0]

                time.time = look

            if job.done(folder):
                shutil.rmtree(folder.parent)
                continue
            self.judge(tally, job, folder, self._disturbed(job, folder, backwards).wait(), f"event {event}")

    def damaged(self, job: Job) -> None:
        """One file of an unfinished or finished run is cut, emptied, or has one bit inverted, and the run goes on.

        It ends with the files of an undisturbed run, or with one line; then with no file changed.
        """
        tally = self._tally("damaged file", job)
        draw = self._random("damaged", job.name)
        events = [event for event, _, _ in self.events[job.name]]
        for moment in range(2 * self.moments):
            folder = self._folder(job)
            event = draw.choice([*events[len(events) // 3 :], 0])
            self._disturbed(
                job, folder, Events(folder, event, lambda what: os.kill(os.getpid(), signal.SIGKILL))
            ).wait()
            files = [file for file in sorted(folder.rglob("*")) if file.is_file() and _is_read(file)]
            if not files:
                shutil.rmtree(folder.parent)
                continue
            file = draw.choice(files)
            how = draw.choice(["cut", "emptied", "a bit inverted"])
            before = file.read_bytes()
            file.write_bytes(damage(before, how, draw))
            name = f"moment {moment}, {file.relative_to(folder)} {how} after event {event}"
            left = content_bytes(folder)
            finished = job.done(folder)
            ended = self._reading(job, folder) if finished else self._disturbed(job, folder).wait()
            end, broken = end_of(ended), []
            tally.trials += 1
            tally.ends[end] += 1
            if end.startswith("broken"):
                broken.append(f"{end}\n{ended.said}")
            elif ended.code == 0 and not finished:
                found, expected = content(folder), self.whole[job.name]
                broken += [f"{n} differs" for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)]
            elif ended.code and content_bytes(folder) != left and job.name != "sweep":
                broken.append(f"refused, and a file is another one: {ended.said}")
            tally.violations += [f"damaged, {job.name}, {name}: {what}" for what in broken]
            if not broken:
                shutil.rmtree(folder.parent)

    @staticmethod
    def _reading(job: Job, folder: Path) -> Ended:
        """A command that reads what is finished."""
        model, rows = folder / "model.pt", folder / "rows.csv"
        reading = ["export", model, "--out", folder.parent / "x.pt", "--format", "state-dict"]
        if job.name == "merge":
            reading = ["threshold", rows, "--gamma", "-1", "--out", folder.parent / "other.csv"]
        return Child(command(reading)).wait()

    def worker(self, job: Job) -> None:
        """One of two processes is killed at a random moment; the other is ended as torchrun ends it."""
        tally = self._tally("one of two processes dies", job)
        draw = self._random("worker", job.name)
        for moment in range(max(1, self.moments // 3)):
            folder = self._folder(job)
            children = self._pair(job, folder)
            victim = draw.randrange(2)
            children[victim].ended(draw.uniform(0.0, 2.5 * self.seconds[job.name]))
            children[victim].kill()
            other = children[1 - victim]
            if not other.ended(3.0):
                other.kill(signal.SIGTERM)
            ends = [child.wait(60.0) for child in children]
            survivor = ends[1 - victim]
            tally.trials += 1
            tally.ends[end_of(survivor)] += 1
            if end_of(survivor).startswith("broken"):
                tally.violations.append(f"worker, {job.name}, moment {moment}: {end_of(survivor)}\n{survivor.said}")
            if half := half_written(folder):
                tally.violations.append(f"worker, {job.name}, moment {moment}: half written: {half}")
            ends = [] if job.done(folder) else [child.wait() for child in self._pair(job, folder)]
            if any(ended.code for ended in ends):
                said = "\n".join(ended.said for ended in ends)
                tally.violations.append(f"worker, {job.name}, moment {moment}: the next run ends with an error\n{said}")
            elif job.name != "train":  # two processes add up in another order than one
                found, expected = (
                    {name: value for name, value in files.items() if name.endswith(".csv")}
                    for files in (content(folder), self.whole[job.name])
                )
                if found != expected:
                    tally.violations.append(
                        f"worker, {job.name}, moment {moment}: other rows at the end: {sorted(found)}"
                    )

    def _pair(self, job: Job, folder: Path) -> list[Child]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])

        def member(rank: int) -> Action:
            def join() -> None:
                os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)

            return join

        return [self._disturbed(job, folder, member(rank)) for rank in range(2)]

    def run(self, jobs: Sequence[str], faults: Sequence[str]) -> Iterator[Tally]:
        """Some faults in some jobs."""
        for job in JOBS:
            for name in faults:
                if job.name in jobs and (name != "worker" or job.name in ("train", "certify")):
                    before = len(self.tallies)
                    getattr(self, name)(job)
                    yield from self.tallies[before:]


def _is_read(file: Path) -> bool:
    """Whether a later run reads it; nothing reads the log of a training that is done."""
    done = (file.parent / "model.pt").exists() and not (file.parent / "last.pt").exists()
    return not file.name.startswith(".") and not (file.name == "log.csv" and done)


def damage(content: bytes, how: str, draw: random.Random) -> bytes:
    """Bytes with one accident."""
    if how == "emptied" or not content:
        return b""
    if how == "cut":
        return content[: draw.randrange(len(content))]
    position = draw.randrange(len(content))
    return content[:position] + bytes([content[position] ^ (1 << draw.randrange(8))]) + content[position + 1 :]


def content_bytes(folder: Path) -> dict[str, bytes]:
    """The files of a folder, temporary ones and locks aside."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
