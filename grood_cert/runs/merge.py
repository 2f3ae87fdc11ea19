"""The rows of all shards of a run in the order of the undivided run."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grood_cert.errors import InputError, said
from grood_cert.results.checksum import check_sum
from grood_cert.results.invariants import check_invariants
from grood_cert.results.table import Table, check_target, manifest_path, read_cells, write_rows
from grood_cert.runs.progress import Progress, difference
from grood_cert.runs.shards import Shard
from grood_cert.system.files import check_writable, csv_text, locked


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
            check_sum(manifest, records)
            if records:
                check_invariants(Table.of(records, manifest))
        except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
            raise InputError(f"{path}: damaged ({said(error)[:160]})") from None
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
        if found := difference(description, manifest):
            name, one, other = found
            raise InputError(f"{first} and {path} are of different runs ({name}: {one}, {other})")
    placed = [pair for name in wanted for pair in parts[name][2]]
    rows = [record for _, record in sorted(placed, key=lambda pair: pair[0])]
    progresses = [Progress.of(parts[name][1]) for name in wanted]
    merged = Progress(
        batches=sum(progress.batches for progress in progresses),
        of_batches=sum(progress.of_batches for progress in progresses),
        samples_done=sum(progress.samples_done for progress in progresses),
        of_samples=sum(progress.of_samples for progress in progresses),
        rows=len(rows),
        seconds=round(sum(progress.seconds for progress in progresses), 3),
        peak_memory=max(progress.peak_memory for progress in progresses),
        failures=dict(sum((Counter(progress.failures) for progress in progresses), Counter())),
        proofs=sum(progress.proofs for progress in progresses),
        finished=max(str(progress.finished) for progress in progresses),
        shards=count,
        command=progresses[0].command,
    )
    whole = {**description, **dataclasses.asdict(replace(merged, complete=True))}
    try:
        check_invariants(Table.of(rows, whole))
    except ValueError as error:
        raise InputError(f"{' and '.join(map(str, paths))} do not go together ({said(error)[:160]})") from None
    check_target(out, paths, force or _left_by_a_killed_merge(out, description))
    check_writable(out.parent)
    with locked(out, manifest_path(out)):
        text = csv_text(list(rows[0]), rows, header=True)
        return write_rows(out, text, whole)


def _left_by_a_killed_merge(out: Path, description: Mapping[str, Any]) -> bool:
    """Whether there is a manifest of the same run, and no rows."""
    try:
        found = json.loads(manifest_path(out).read_text(encoding="utf-8"))
        return not out.exists() and found["complete"] and found["shards"] > 1 and difference(description, found) is None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
