r"""Runs that can be interrupted, continued, shared out and put together again.

After every batch its rows are appended to the file of rows, and then the manifest beside it is replaced, which says
how many bytes of the rows count. Whatever ends the process, the two files describe the batches saved so far, and the
same command goes on after them; the finished file is the same, byte by byte, as that of a run in one go.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import io
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from grood_cert.errors import InputError, SoundnessError, said
from grood_cert.results.checksum import KEY, Checksum, check_sum
from grood_cert.results.table import manifest_path, read_cells
from grood_cert.runs.batches import Batch, extent
from grood_cert.runs.merge import merge
from grood_cert.runs.progress import FORCE, Progress, command_line, difference
from grood_cert.runs.shards import WHOLE, Shard
from grood_cert.system.files import appending, check_apart, check_writable, csv_text, locked, replacing, write_json
from grood_cert.system.memory import peak_memory
from grood_cert.system.processes import joined, wait
from grood_cert.system.reporting import SILENT, Reporter


def execute(
    target: Path,
    columns: Sequence[str],
    batches: Sequence[Batch],
    work: Callable[[Batch], list[dict[str, Any]]],
    description: Mapping[str, Any],
    failures: Callable[[], Mapping[str, int]],
    *,
    stage: str,
    proofs: Callable[[], int] = lambda: 0,
    shard: Shard = WHOLE,
    force: bool = False,
    eps: Sequence[float] = (),
    tally: Callable[[Mapping[str, Any]], Iterable[str]] = lambda record: (),
    reporter: Reporter = SILENT,
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
        stage: What is done, in a word.
        proofs: How many proofs were saved since this process began.
        shard: Which batches to do. The shards of a joint run wait for one another, and the first merges them.
        force: Start afresh, whatever is there.
        eps: Radii of the balls around each sample.
        tally: Names under which a record is counted; it may be one read back as text.
        reporter: Hears of the stage, unless everything is done already, of the samples of an earlier process, then of
            every batch, with the counts of the tally; and of what was found: a run to continue, or a complete one.

    Returns:
        The file of rows: of the shard, or of the whole run where shards ran jointly.

    Raises:
        InputError: If the files hold another run or other parts of it, are damaged, in use, or cannot be written.
        RunError: If another process of a joint run died.
        SoundnessError: From a batch.
    """
    if shard.count > len(batches):
        raise InputError(f"{shard.count} shards for {len(batches)} batches; use fewer, or a smaller --batch-size")
    if not shard.leads:
        reporter = SILENT
    if source := description["model"].get("path"):
        check_apart((shard.file(target), manifest_path(shard.file(target)), target), [Path(source)])
    if shard.joint and not force:
        found = _saved(target, columns, description)
        if found and found[0].complete:
            reporter.say(f"{target} is complete already")
            return target
        if found:
            raise InputError(
                f"{target} was begun by one process; let one go on with it, or add --force to overwrite it"
            )
    path, own = shard.file(target), shard.of(batches)
    check_writable(path.parent)
    with _merged(target, shard, force) if shard.joint else contextlib.nullcontext(), locked(path, manifest_path(path)):
        found = None if force else _saved(path, columns, description)
        earlier, records = found or (Progress(shard=None if shard == WHOLE else str(shard)), [])
        if earlier.complete:
            reporter.say(f"{path} is complete already")
        else:
            # Who shares out by hand knows what lies there.
            if not force and (shard.joint or shard.count == 1) and (others := shard.foreign(target)):
                count = others[0].stem.rpartition("-")[2]
                raise InputError(
                    f"{others[0]} is one of {count} parts of a run; go on in as many, remove it, or add --force to start afresh"
                )
            samples = sum(map(len, own))
            earlier = replace(earlier, of_batches=len(own), of_samples=samples, command=command_line(shard.joint))
            if shard.joint:
                shared = f"divided among {shard.count} processes; what follows is the part of the first"
                reporter.say(f"{extent(batches, eps)}, {shared}")
            else:
                reporter.say(extent(own, eps))
            reporter.begin(stage, samples)
            counts = Counter(name for record in records for name in tally(record))
            if earlier.batches:
                reporter.say(f"{path} holds {earlier.batches} of {len(own)} batches; the run continues after them")
                reporter.advance(sum(map(len, own[: earlier.batches])), counts)
            with _evidence(path), _saving(path, columns, description, failures, proofs, earlier, records) as save:
                for batch in own[earlier.batches :]:
                    added = work(batch)
                    save(batch, added)
                    counts.update(name for record in added for name in tally(record))
                    reporter.advance(len(batch), counts)
    return shard.result(target)


@contextlib.contextmanager
def _saving(
    path: Path,
    columns: Sequence[str],
    description: Mapping[str, Any],
    failures: Callable[[], Mapping[str, int]],
    proofs: Callable[[], int],
    earlier: Progress,
    records: Iterable[Mapping[str, str]],
) -> Iterator[Callable[[Batch, list[dict[str, Any]]], None]]:
    """Rows and manifest from some progress and its records on; the run is complete when the block ends well.

    Yields:
        A function that saves the records of the next batch.
    """
    started, progress, checksum = time.perf_counter(), earlier, Checksum(records)

    def note(**changes: Any) -> None:
        nonlocal progress
        progress = replace(
            progress,
            failures=dict(Counter(earlier.failures) + Counter(failures())),
            proofs=earlier.proofs + proofs(),
            seconds=round(earlier.seconds + time.perf_counter() - started, 3),
            peak_memory=max(earlier.peak_memory, peak_memory(description["device"])),
            **changes,
        )
        manifest = {**description, **dataclasses.asdict(progress)}
        write_json(manifest_path(path), {**manifest, KEY: checksum.of(manifest)})

    def save(batch: Batch, records: list[dict[str, Any]]) -> None:
        text = csv_text(columns, records)
        size = append(text)
        checksum.add(csv.DictReader(io.StringIO(text, newline=""), columns))
        rows, samples = progress.rows + len(records), progress.samples_done + len(batch)
        note(batches=progress.batches + 1, samples_done=samples, rows=rows, bytes=size)

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
        raise InputError(f"{path} exists already; {FORCE}")
    try:
        manifest, records = read_cells(path)
        progress = Progress.of(manifest)
        different = difference(manifest, description)
        if not different and records and list(records[0]) != list(columns):
            raise ValueError("other columns than this version writes")
        if not different:
            check_sum(manifest, records)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        reason = said(error)[:120]
        raise InputError(f"{path} exists already and cannot be continued ({reason}); {FORCE}") from None
    if different:
        name, there, here = different
        raise InputError(f"{path} exists already and holds another run ({name}: {there} there, {here} now); {FORCE}")
    return progress, records


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
    with joined("cpu"):
        wait()  # until every process has seen what is there
        if shard.leads and force:
            _remove(target)
        yield
        wait()  # the other shards may have far more to do
        if shard.leads:
            parts = [Shard(index, shard.count).file(target) for index in range(shard.count)]
            merge(parts, target, force=True)
            for part in parts:
                _remove(part)
        wait()
