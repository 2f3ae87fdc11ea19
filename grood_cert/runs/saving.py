r"""Runs over a detector's test sets, in batches that can be interrupted, continued, shared out and put together again.

The *batches* of a run are a fixed list, given by the sets, the limit, the batch size and the seed. All randomness of a
batch comes from the seed and the batch's number, so its rows do not depend on which process computes it, or when.

*Saving.* After every batch its rows are appended to the file of rows, and then the manifest beside it is replaced,
which says how many bytes of the rows count. Whatever ends the process, the two files describe the batches saved so
far, and the same command goes on after them; the finished file is the same, byte by byte, as that of a run in one go.

*Sharing out.* Shard i of n does the batches b with b mod n = i and writes files of its own; `merge` puts the rows of
all shards in the order of the undivided run. The processes of one `torchrun` are shards that merge by themselves.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from grood_cert.bounds.engines import lirpa_version
from grood_cert.data import ImageSet
from grood_cert.data.images import taken
from grood_cert.detector import Detector, versions
from grood_cert.errors import InputError, RunError, SoundnessError
from grood_cert.results.columns import SCHEMAS
from grood_cert.results.table import manifest_path, read_cells
from grood_cert.system.files import (
    appending,
    as_json,
    check_writable,
    csv_text,
    locked,
    replacing,
    sha256,
    write_csv,
    write_json,
)
from grood_cert.system.memory import peak_memory
from grood_cert.system.processes import leave


def generator(seed: int, batch: int) -> torch.Generator:
    """The source of randomness of one batch: streams of different batches are independent.

    Args:
        seed: Seed of the run.
        batch: Number of the batch.
    """
    (state,) = np.random.SeedSequence((seed % 2**64, batch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def subset(images: ImageSet, limit: int, seed: int) -> tuple[ImageSet, Tensor]:
    """At most `limit` images (0: all), drawn without replacement by the seed, in their order in the set.

    Returns:
        The images and their positions in the set.
    """
    if not 0 < limit < len(images):
        return images, torch.arange(len(images))
    index = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
    return images.select(index), index


@dataclass(frozen=True, eq=False)
class Batch:
    """A unit of work.

    Attributes:
        number: Position in the list of all batches.
        source: The images it is taken from.
        positions: Which of them.
        index: Their positions in the whole image set.
    """

    number: int
    source: ImageSet
    positions: Tensor
    index: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def images(self) -> ImageSet:
        """The images."""
        return self.source.select(self.positions)

    @property
    def names(self) -> list[dict[str, Any]]:
        """The columns that name each sample: `set`, `kind`, `index`, `file`."""
        files = taken(self.source.files, self.positions) or ("",) * len(self)
        return [
            {"set": self.source.name, "kind": self.source.kind, "index": index, "file": file}
            for index, file in zip(self.index, files, strict=True)
        ]


def batches(sets: Sequence[ImageSet], limit: int, batch_size: int, seed: int) -> list[Batch]:
    """All batches of a run, set by set and never across sets.

    Args:
        sets: Image sets.
        limit: Most images of each set, 0 for all; `subset` says which.
        batch_size: Samples in a batch; the last of a set may hold fewer.
        seed: Draws the images where there is a limit.

    Raises:
        InputError: If the limit is negative.
    """
    if limit < 0:
        raise InputError(f"limit must be 0 (all) or more, got {limit}")
    found: list[Batch] = []
    for whole in sets:
        source, index = subset(whole, limit, seed)
        for positions in torch.arange(len(source)).split(batch_size):
            found.append(Batch(len(found), source, positions, tuple(index[positions].tolist())))
    return found


@dataclass(frozen=True)
class Shard:
    """Part of a run: every `count`-th batch, from batch `index` on.

    Attributes:
        index: From 0.
        count: Number of shards; 1: the whole run.
        joint: Whether all shards run at the same time, as the processes of one `torchrun`, and merge by themselves.

    Example:
        >>> shard = Shard.parse("2/4")
        >>> shard.index, str(shard), str(shard.file(Path("rows.csv")))
        (1, '2/4', 'rows-2-of-4.csv')
    """

    index: int = 0
    count: int = 1
    joint: bool = False

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "i/n", with i from 1 to n.

        Raises:
            InputError: If it is something else.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise InputError(f"shard {text!r}: expected i/n with i from 1 to n, for example 1/4")
        return cls(int(found[1]) - 1, int(found[2]))

    @property
    def leads(self) -> bool:
        """Whether this process speaks for the run: alone, or the first of those that run together."""
        return self.index == 0 or not self.joint

    def file(self, target: Path) -> Path:
        """Where the shard's rows go if those of the whole run go to `target`."""
        return target if self.count == 1 else target.with_stem(f"{target.stem}-{self.index + 1}-of-{self.count}")

    def result(self, target: Path) -> Path:
        """Where the rows lie in the end: shards that run jointly are merged into those of the whole run."""
        return target if self.joint else self.file(target)


WHOLE = Shard()


def shard_of_environment() -> Shard:
    """The shard of this process if `torchrun` started it with others, else the whole run.

    Raises:
        InputError: If RANK or WORLD_SIZE makes no sense.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return WHOLE
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise InputError(f"RANK={rank} and WORLD_SIZE={size}: expected numbers with RANK < WORLD_SIZE; use torchrun")
    return Shard(int(rank), int(size), joint=True) if int(size) > 1 else WHOLE


@dataclass(frozen=True)
class Progress:
    """How a run has gone so far. These keys of a manifest say that; all other keys say what the run is.

    Attributes:
        complete: Whether all batches are done.
        batches: Batches done.
        rows: Rows saved.
        bytes: Length of the file of rows; what follows was not finished.
        seconds: Time spent, over all interruptions and shards.
        peak_memory: Most bytes a process held, on the device that computed.
        failures: Messages of exceptions that cost bounds, with the number of bounds lost to each.
        finished: When the run was complete.
        shard: Which part of a run this is, such as "1/4"; None: all of it.
        shards: From how many parts it was merged.
    """

    complete: bool = False
    batches: int = 0
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    finished: str | None = None
    shard: str | None = None
    shards: int = 1

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Progress:
        """The progress a manifest tells of; manifests of earlier versions were written at the end only."""
        known = {item.name: manifest[item.name] for item in dataclasses.fields(cls) if item.name in manifest}
        return cls(**({"complete": True} | known))


_PROGRESS = {item.name for item in dataclasses.fields(Progress)}
_ELSEWHERE = {  # may change as a run goes on
    *("model.path", "device", "machine", "versions.python", "versions.numpy"),
    "cross_check.largest_disagreement",
}
_FORCE = "choose another --out, or add --force to overwrite it"
_WAIT = datetime.timedelta(days=365)  # the other shards may have far more to do; one that dies ends the wait at once

Advance = Callable[[int, Mapping[str, int]], None]


def execute(
    target: Path,
    columns: Sequence[str],
    batches: Sequence[Batch],
    work: Callable[[Batch], list[dict[str, Any]]],
    description: Mapping[str, Any],
    failures: Callable[[], Mapping[str, int]],
    *,
    shard: Shard = WHOLE,
    force: bool = False,
    tally: Callable[[Mapping[str, Any]], Iterable[str]] = lambda record: (),
    begin: Callable[[int], None] = lambda samples: None,
    advance: Advance = lambda samples, counts: None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Do the batches of a run that are still to be done, saving after each.

    An interruption leaves rows that can be read, and that the same call continues. A `SoundnessError` leaves its
    evidence as `counterexample.npz` beside the rows, and takes the rows away: none of them can be trusted.

    Args:
        target: Where the rows of the whole run go; the manifest goes beside them (`.json`).
        columns: Columns of the rows.
        batches: All batches of the run, also those of other shards.
        work: Computes the records of a batch. Its randomness comes from `generator(seed, batch.number)`.
        description: What the run is, as from `manifest`: an existing file is continued if it says the same.
        failures: What cost bounds since this process began: messages, with the number of bounds lost to each.
        shard: Which batches to do. The shards of a joint run wait for one another, and the first merges them.
        force: Start afresh, whatever is there.
        tally: Names under which a record is counted; it may be one read back as text.
        begin: Called once with the number of samples, unless everything is done already.
        advance: Called with the number of samples done since the last call and the counts of the tally so far: once
            for those of an earlier process, then after every batch.
        report: Called with a line about what was found: a run to continue, or a complete one.

    Returns:
        The file of rows: of the shard, or of the whole run where shards ran jointly.

    Raises:
        InputError: If the files hold another run or are damaged, are in use, or cannot be written.
        RunError: If another process of a joint run died.
        SoundnessError: From a batch.
    """
    if shard.count > len(batches):
        raise InputError(f"{shard.count} shards for {len(batches)} batches; use fewer, or a smaller --batch-size")
    if not shard.leads:
        begin, advance, report = lambda samples: None, lambda samples, counts: None, lambda line: None
    if shard.joint and not force:
        found = _saved(target, columns, description)
        if found and found[0].complete:
            report(f"{target} is complete already")
            return target
    path, own = shard.file(target), batches[shard.index :: shard.count]
    check_writable(path.parent)
    with _merged(target, shard, force) if shard.joint else contextlib.nullcontext(), locked(path):
        found = None if force else _saved(path, columns, description)
        earlier, records = found or (Progress(shard=None if shard == WHOLE else str(shard)), [])
        if earlier.complete:
            report(f"{path} is complete already")
        else:
            begin(sum(map(len, own)))
            counts = Counter(name for record in records for name in tally(record))
            if earlier.batches:
                report(f"{path} holds {earlier.batches} of {len(own)} batches; the run continues after them")
                advance(sum(map(len, own[: earlier.batches])), counts)
            with _evidence(path), _saving(path, columns, description, failures, earlier) as save:
                for batch in own[earlier.batches :]:
                    added = work(batch)
                    save(added)
                    counts.update(name for record in added for name in tally(record))
                    advance(len(batch), counts)
    return shard.result(target)


@contextlib.contextmanager
def _saving(
    path: Path,
    columns: Sequence[str],
    description: Mapping[str, Any],
    failures: Callable[[], Mapping[str, int]],
    earlier: Progress,
) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Rows and manifest from some progress on; the run is complete when the block ends well.

    Yields:
        A function that saves the records of the next batch.
    """
    started, progress = time.perf_counter(), earlier

    def note(**changes: Any) -> None:
        nonlocal progress
        progress = replace(
            progress,
            failures=dict(Counter(earlier.failures) + Counter(failures())),
            seconds=round(earlier.seconds + time.perf_counter() - started, 3),
            peak_memory=max(earlier.peak_memory, peak_memory(description["device"])),
            **changes,
        )
        write_json(manifest_path(path), {**description, **dataclasses.asdict(progress)})

    def save(records: list[dict[str, Any]]) -> None:
        size = append(csv_text(columns, records))
        note(batches=progress.batches + 1, rows=progress.rows + len(records), bytes=size)

    if not progress.bytes:
        note()  # before the rows are touched: what stood there counts no more
    with appending(path, progress.bytes) as append:
        if not progress.bytes:
            note(bytes=append(csv_text(columns, [], header=True)))
        yield save
        note(complete=True, finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))


def _saved(
    path: Path, columns: Sequence[str], description: Mapping[str, Any]
) -> tuple[Progress, list[dict[str, str]]] | None:
    """Progress and records of the same run that are there already; None if nothing is.

    Raises:
        InputError: If there is another run, or something damaged.
    """
    if not path.exists():
        return None
    if not manifest_path(path).exists():
        raise InputError(f"{path} exists already; {_FORCE}")
    try:
        manifest, records = read_cells(path)
        progress = Progress.of(manifest)
        difference = _difference(manifest, description)
        if not difference and records and list(records[0]) != list(columns):
            raise ValueError("other columns than this version writes")
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} exists already and cannot be continued ({reason}); {_FORCE}") from None
    if difference:
        name, there, here = difference
        raise InputError(f"{path} exists already and holds another run ({name}: {there} there, {here} now); {_FORCE}")
    return progress, records


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str, str] | None:
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


def _remove(path: Path) -> None:
    """Remove rows and manifest, in an order that never leaves rows alone."""
    for file in (path, manifest_path(path)):
        file.unlink(missing_ok=True)


def save_evidence(error: SoundnessError, folder: Path) -> None:
    """Save what shows a contradiction as `counterexample.npz`."""
    error.counterexample = folder / "counterexample.npz"
    with replacing(error.counterexample) as temporary:
        np.savez(temporary, **error.evidence)


@contextlib.contextmanager
def _evidence(path: Path) -> Iterator[None]:
    """Save the evidence of a `SoundnessError` beside the rows, remove the rows, and let the error go on."""
    try:
        yield
    except SoundnessError as error:
        _remove(path)
        save_evidence(error, path.parent)
        raise


@contextlib.contextmanager
def _merged(target: Path, shard: Shard, force: bool) -> Iterator[None]:
    """Around the work of one shard of a joint run: the processes begin together and end once all shards are merged.

    Raises:
        RunError: If another process has died.
    """

    def wait() -> None:
        try:
            distributed.monitored_barrier(timeout=_WAIT)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RunError(f"another process of this run has stopped ({reason}); the same command goes on") from error

    distributed.init_process_group("gloo")
    try:
        wait()  # until every process has seen what is there
        if shard.leads and force:
            _remove(target)
        yield
        wait()
        if shard.leads:
            parts = [Shard(index, shard.count).file(target) for index in range(shard.count)]
            merge(parts, target, force=True)
            for part in parts:
                _remove(part)
        wait()
    finally:
        leave()


def merge(paths: Sequence[Path], out: Path, force: bool = False) -> dict[str, Any]:
    """Put the rows of all shards of a run together: the same bytes as if it had been run in one piece.

    Args:
        paths: The rows of the shards, in any order.
        out: Where the rows of the whole run go; the manifest goes beside them.
        force: Overwrite rows that are already there.

    Returns:
        The manifest, as written; time and failures are those of all shards together.

    Raises:
        InputError: If a shard is missing, twice there, not complete or damaged, if they belong to different runs, or if
            the output exists or cannot be written.
    """
    parts: dict[str, tuple[Path, dict[str, Any], list[tuple[tuple[int, int], dict[str, str]]]]] = {}
    for path in paths:
        try:
            manifest, records = read_cells(path)
            progress = Progress.of(manifest)
            order = {(entry["set"], entry["kind"]): number for number, entry in enumerate(manifest["data"])}
            placed = [((order[record["set"], record["kind"]], int(record["index"])), record) for record in records]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise InputError(f"{path}: damaged ({' '.join(str(error).split())[:120]})") from None
        if not progress.shard:
            raise InputError(f"{path}: not a shard; a shard is what --shard i/n writes")
        if not progress.complete:
            raise InputError(f"{path}: not complete yet; its command continues it")
        if progress.shard in parts:
            raise InputError(f"{parts[progress.shard][0]} and {path} are the same shard, {progress.shard}")
        parts[progress.shard] = path, manifest, placed
    if not parts:
        raise InputError("no shards given")
    count = Shard.parse(next(iter(parts))).count
    wanted = [str(Shard(index, count)) for index in range(count)]
    missing = [name for name in wanted if name not in parts]
    if missing or len(parts) > count:
        given = f"{', '.join(sorted(parts))}: "
        raise InputError(given + (f"shard {missing[0]} is missing" if missing else "shards of different divisions"))
    first, description, _ = parts[wanted[0]]
    for path, manifest, _ in parts.values():
        difference = _difference(description, manifest)
        if difference:
            name, one, other = difference
            raise InputError(f"{first} and {path} are of different runs ({name}: {one}, {other})")
    placed = [pair for name in wanted for pair in parts[name][2]]
    rows = [record for _, record in sorted(placed, key=lambda pair: pair[0])]
    progresses = [Progress.of(parts[name][1]) for name in wanted]
    merged = Progress(
        batches=sum(progress.batches for progress in progresses),
        rows=len(rows),
        seconds=round(sum(progress.seconds for progress in progresses), 3),
        peak_memory=max(progress.peak_memory for progress in progresses),
        failures=dict(sum((Counter(progress.failures) for progress in progresses), Counter())),
        finished=max(str(progress.finished) for progress in progresses),
        shards=count,
    )
    check_writable(out.parent)
    with locked(out):
        if out.exists() and not force:
            raise InputError(f"{out} exists already; {_FORCE}")
        write_json(manifest_path(out), {**description, **dataclasses.asdict(replace(merged, batches=0, rows=0))})
        write_csv(out, list(rows[0]), rows)
        whole = {**description, **dataclasses.asdict(replace(merged, complete=True, bytes=out.stat().st_size))}
        write_json(manifest_path(out), whole)
    return whole


def manifest(
    kind: str, detector: Detector, model: Path | None, sets: Sequence[ImageSet], limit: int, settings: Any
) -> dict[str, Any]:
    """What a run is: kind, model, data, settings, software, machine. `Progress` holds the other keys of a manifest."""
    weight, origin = next(detector.network.parameters()), detector.provenance
    file = {"path": str(model), "sha256": sha256(model)} if model else {"path": None, "sha256": None}
    return {
        "kind": kind,
        "schema": SCHEMAS[kind].version,
        "model": {**file, "name": detector.name},
        "recipe": origin.recipe.to_dict() if origin else None,
        "gamma": detector.gamma,
        "calibration": origin.calibration if origin else None,
        "data": [
            {"set": images.name, "kind": images.kind, "images": len(images), "sha256": images.content_hash()}
            for images in sets
        ],
        "limit": limit,
        **dataclasses.asdict(settings),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "versions": {**versions(), "auto_LiRPA": lirpa_version()},
        "machine": platform.machine(),
    }
