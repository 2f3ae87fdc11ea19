"""How far a run has come, as its manifest tells it, and whether two manifests speak of the same run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grood_cert.errors import InputError, said
from grood_cert.system.files import as_json, first_line, is_locked
from grood_cert.system.jobs import started
from grood_cert.system.reporting import clock


@dataclass(frozen=True)
class Progress:
    """How a run has gone so far. These keys of a manifest say that; all other keys say what the run is.

    Attributes:
        complete: Whether all batches are done.
        batches: Batches done.
        of_batches: Batches in all.
        samples_done: Samples done.
        of_samples: Samples in all.
        rows: Rows saved.
        bytes: Length of the file of rows; what follows was not finished.
        seconds: Time spent, over all interruptions and shards.
        peak_memory: Most bytes a process held, on the device that computed.
        failures: Messages of exceptions that cost bounds, with the number of bounds lost to each.
        proofs: Proofs saved, each in a file of its own.
        finished: When the run was complete.
        shard: Which part of a run this is, such as "1/4"; None: all of it.
        shards: From how many parts it was merged.
        command: The command line that went on with it last.
        sha256: Checksum of manifest and rows.
    """

    complete: bool = False
    batches: int = 0
    of_batches: int = 0
    samples_done: int = 0
    of_samples: int = 0
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    proofs: int = 0
    finished: str | None = None
    shard: str | None = None
    shards: int = 1
    command: str | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Progress:
        """The progress a manifest tells of; manifests of earlier versions were written at the end only.

        Raises:
            ValueError: If an entry is not what such an entry may be.
        """
        known = {item.name: manifest[item.name] for item in dataclasses.fields(cls) if item.name in manifest}
        for name, value in known.items():
            if not _fits(name, value):
                raise ValueError(f"its manifest's {name} is {value!r}")
        return cls(**({"complete": True} | known))


def _fits(name: str, value: Any) -> bool:
    """Whether an entry of a manifest can be one of `Progress`."""
    default = getattr(Progress, name, {})
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int | float):
        kinds = int if isinstance(default, int) else int | float
        return isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value < 2**63
    if name == "failures":
        return isinstance(value, dict) and all(isinstance(count, int) for count in value.values())
    if name == "shard" and isinstance(value, str):
        return re.fullmatch(r"[1-9]\d{0,8}/[1-9]\d{0,8}", value) is not None
    return value is None or isinstance(value, str)


FORCE = "choose another --out, or add --force to overwrite it"
_PROGRESS = {item.name for item in dataclasses.fields(Progress)}
_ELSEWHERE = {  # may change as a run goes on
    *("model.path", "device", "machine", "versions.python", "versions.numpy"),
    "cross_check.largest_disagreement",
}


def command_line(joint: bool) -> str | None:
    """The command that runs in this process, to be given again; None where it is a script or program of the user's.

    Args:
        joint: Whether it is one of several: of the command itself (`--jobs`), or of `torchrun`.
    """
    program = Path(sys.argv[0]).name
    if program not in ("__main__.py", "grood-cert"):
        return None
    start = ["grood-cert"]
    if joint and not started():
        start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m", "grood_cert"]
    return shlex.join([*start, *sys.argv[1:]])


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The first thing in which two manifests describe different runs, and what each says; None if there is none."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if pairs is None:
            return {name: value}
        return {key: item for part, inner in pairs for key, item in flat(inner, f"{name}.{part}").items()}

    one, other = (
        {key: item for name, value in page.items() if name not in _PROGRESS for key, item in flat(value, name).items()}
        for page in (as_json(one), as_json(other))
    )
    for name in dict.fromkeys([*other, *one]):
        if one.get(name) != other.get(name) and name not in _ELSEWHERE:
            return name, str(one.get(name))[:60], str(other.get(name))[:60]
    return None


@dataclass(frozen=True)
class Status:
    """How a run stands, as the files in its folder tell.

    Attributes:
        path: Its rows.
        kind: What kind of run it is.
        progress: How far it has come.
        busy: Whether a process is at work on it.
        idle: Seconds since something was saved.
    """

    path: Path
    kind: str
    progress: Progress
    busy: bool
    idle: float

    @property
    def left(self) -> float | None:
        """Seconds that are left at the rate so far; None while nothing is known."""
        done, total = self.progress.samples_done, self.progress.of_samples
        return self.progress.seconds * (total - done) / done if done else None

    def __str__(self) -> str:
        progress = self.progress
        name = f"{self.path.name}: {self.kind}"
        if progress.complete:
            return f"{name}, complete: {progress.rows} rows in {clock(progress.seconds)}"
        share = progress.samples_done / progress.of_samples if progress.of_samples else 0.0
        done = (
            f"{name}, {share:.0%}: {progress.samples_done}/{progress.of_samples} samples, "
            f"{progress.batches}/{progress.of_batches} batches in {clock(progress.seconds)}"
        )
        if self.left is not None and progress.seconds > 0:
            done += f" ({progress.samples_done / progress.seconds:.3g} samples/s, {clock(self.left)} left)"
        if self.busy:
            return f"{done}; a process is at work on it, saved {clock(self.idle)} ago"
        return f"{done}; no process is at work on it; go on with: {progress.command or 'its command'}"


def status(folder: Path) -> list[Status]:
    """The runs whose manifests lie in a folder, by name.

    Raises:
        InputError: If it is no folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = []
    for page in sorted(folder.glob("*.json")):
        rows = page.with_suffix(".csv")
        try:
            manifest, saved = json.loads(page.read_text(encoding="utf-8")), page.stat().st_mtime
            if {"batches", "complete"} <= manifest.keys():
                progress = Progress.of(manifest)
                if progress.complete and not rows.is_file():
                    continue  # left by a merge that was killed
                idle = max(0.0, time.time() - saved)
                found.append(Status(rows, str(manifest.get("kind", "?")), progress, is_locked(rows), idle))
        except (OSError, ValueError, AttributeError, TypeError):
            continue  # not a manifest, or gone by now
    return found


def _damaged(folder: Path) -> Iterator[str]:
    """A line on every manifest beside rows that cannot be read."""
    for page in sorted(folder.glob("*.json")):
        if page.with_suffix(".csv").is_file():
            try:
                manifest = json.loads(page.read_text(encoding="utf-8"))
                if isinstance(manifest, dict):
                    Progress.of(manifest)
            except (OSError, ValueError) as error:
                yield f"{page.name}: damaged ({said(error)[:120]}), so its run cannot go on; begin again with --force"


def _lines(folder: Path) -> list[str]:
    """What there is to say of one folder."""
    runs = status(folder)
    lines = [*map(str, runs), *_damaged(folder)]
    divided: dict[tuple[str, int], dict[int, Status]] = {}
    for run in runs:
        if run.progress.shard:
            number, count = map(int, run.progress.shard.split("/"))
            stem = run.path.stem.removesuffix(f"-{number}-of-{count}")
            divided.setdefault((stem, count), {})[number] = run
    for (stem, count), parts in divided.items():
        missing = [f"{number}/{count}" for number in range(1, count + 1) if number not in parts]
        if missing:
            lines.append(f"{stem}.csv: of {count} shards, {', '.join(missing)} not here")
        elif all(run.progress.complete for run in parts.values()):
            names = [str(parts[number].path) for number in sorted(parts)]
            command = shlex.join(["grood-cert", "merge", *names, "--out", str(folder / f"{stem}.csv")])
            lines.append(f"{stem}.csv: all {count} shards are complete; {command}")
    model = folder / "model.pt"
    if is_locked(model):
        lines.append("model.pt: a process is training it")
    elif model.exists():
        lines.append("model.pt: trained")
    elif (words := first_line(folder / "failed.txt")) is not None:
        lines.append(f"model.pt: {words or 'training failed; begin again with --force'}")
    elif (folder / "last.pt").exists():
        lines.append("model.pt: training is unfinished; its command with --resume goes on")
    return lines


def describe(folder: Path) -> list[str]:
    """Lines about the runs in a folder and in those directly below it: how far each has come, and what goes on with it.

    Raises:
        InputError: If it is no folder, or nothing runs or ran there.
    """
    lines = _lines(folder)
    for below in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        lines += [f"{below.name}/{line}" for line in _lines(below)]
    if not lines:
        raise InputError(f"{folder}: no run is here, finished or not")
    return lines
