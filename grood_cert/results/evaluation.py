r"""Detection metrics of scores in files, from this package or from elsewhere: read, told apart by image set, measured.

A file is a CSV with a column of scores, or a `.npy` array of them. What its samples are is said by the columns `kind` (id,
ood or noise) and `set` (a name; without `kind`, the set "id" is ID and all others are OOD), or from outside. Columns
`label` and `prediction`, where an ID set has both, give accuracy and open-set classification rate. Results of this package
(`rows.csv`, `smoothing.csv`) and what `grood-cert predict --out` writes are such files; results are checked as ever.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from grood_cert.conventions import CONVENTIONS, Convention, evaluate
from grood_cert.errors import InputError, said
from grood_cert.metrics import TPR_PERCENT, Class
from grood_cert.results.columns import KINDS, SCHEMAS
from grood_cert.results.table import Table, manifest_path


@dataclass(frozen=True, eq=False)
class ScoredSet:
    """Scores of one image set.

    Attributes:
        name: Its name.
        kind: "id", "ood" or "noise"; empty where the file does not say.
        scores: Shape (N,).
        labels: Classes, one a sample; empty where the file has none.
        predictions: Predicted classes.
    """

    name: str
    kind: str
    scores: NDArray[np.floating]
    labels: Sequence[Any] = ()
    predictions: Sequence[Any] = ()


def read_scores(path: Path, column: str = "score") -> list[ScoredSet]:
    """The image sets of a file of scores that is no result of this package.

    Args:
        path: `.csv` or `.npy`.
        column: Name of the column of scores.

    Raises:
        InputError: If the file cannot be read, lacks the column, or a cell is not what its column holds.
    """
    try:
        if path.suffix == ".npy":
            return [ScoredSet(path.stem, "", _array(np.load(path, allow_pickle=False)))]
        if path.suffix != ".csv":
            raise ValueError("scores are read from .csv and .npy")
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return _sets(csv.reader(stream), path.stem, column)
    except (OSError, ValueError, EOFError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else said(error)
        raise InputError(f"{path}: {reason}") from None


def sets_of_table(rows: Table, column: str = "score") -> list[ScoredSet]:
    """The image sets of a result of this package.

    Raises:
        InputError: If it has no such column of numbers, or the kind of result has several rows a sample.
    """
    names = [name for name, kept in SCHEMAS[rows.kind].columns.items() if kept.type == "number"]
    if rows.kind == "lipschitz" or column not in names:
        known = "no scores to evaluate" if rows.kind == "lipschitz" else f"no column {column!r} of scores"
        raise InputError(f"{SCHEMAS[rows.kind].words} hold {known}")
    classes = {"label", "prediction"} <= rows.columns.keys()
    return [
        ScoredSet(
            name,
            str(rows["kind"][mask][0]),
            rows[column][mask],
            rows["label"][mask].tolist() if classes else (),
            rows["prediction"][mask].tolist() if classes else (),
        )
        for name, mask in rows.sets(*KINDS).items()
    ]


def is_result(path: Path) -> bool:
    """Whether a manifest of this package lies beside a CSV.

    Raises:
        InputError: If the file beside it cannot be read.
    """
    companion = manifest_path(path)
    if path.suffix != ".csv" or not companion.is_file():
        return False
    try:
        manifest = json.loads(companion.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{companion}, beside {path.name}, cannot be read ({said(error)})") from None
    return isinstance(manifest, dict) and manifest.get("kind") in SCHEMAS


def in_kind(sets: Iterable[ScoredSet], kind: Class) -> list[ScoredSet]:
    """Sets that are said to be of a kind from outside.

    Raises:
        InputError: If one says otherwise itself.
    """
    found = list(sets)
    for each in found:
        if each.kind == "noise" and kind == "ood":
            continue
        if each.kind not in ("", kind):
            raise InputError(f"set {each.name!r} is of kind {each.kind} by its file, but is given as {kind}")
    return [each if each.kind else replace(each, kind=kind) for each in found]


def figures(
    sets: Sequence[ScoredSet],
    conventions: Sequence[str] = ("grood",),
    *,
    tpr: float = TPR_PERCENT,
    high: Class = "ood",
    intervals: bool = False,
) -> list[dict[str, Any]]:
    """Metrics of every OOD and noise set against all ID sets together.

    Args:
        sets: Image sets of known kind.
        conventions: See `grood_cert.conventions.evaluate`.
        tpr: TPR in percent.
        high: The class with high scores.
        intervals: Whether to add 95 % intervals.

    Returns:
        Records with `set`, `kind`, `samples_id`, `samples_ood`, `convention`, `figure`, `value` and perhaps `low` and
        `high`.

    Raises:
        InputError: If there is no ID or no OOD, two sets have one name, or as `evaluate` says.
    """
    unknown = [each.name for each in sets if not each.kind]
    if unknown:
        raise InputError(
            f"{unknown[0]}: what its samples are is not said; it needs a column kind (id, ood, noise) or set (id, others), "
            "or give it as ID with the OOD files by --ood"
        )
    inside = [each for each in sets if each.kind == "id"]
    outside = [each for each in sets if each.kind != "id"]
    if not inside or not outside:
        raise InputError(f"no {'OOD' if inside else 'ID'} scores given; metrics compare the two")
    names = [each.name for each in outside]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two OOD sets are called {twice!r}; rename one")
    score_id = np.concatenate([each.scores for each in inside])
    classes: dict[str, Any] = {}
    if all(len(each.labels) for each in inside):
        classes = {
            "labels": [label for each in inside for label in each.labels],
            "predictions": [label for each in inside for label in each.predictions],
        }
    records = []
    for convention in dict.fromkeys(conventions):
        for each in outside:
            found = evaluate(
                score_id,
                each.scores,
                cast(Convention, convention),
                **classes,
                tpr=tpr,
                high=high,
                intervals=intervals,
            )
            head = {"set": each.name, "kind": each.kind, "samples_id": len(score_id), "samples_ood": len(each.scores)}
            for name, value in found.items():
                if not name.endswith(("_low", "_high")):
                    record = {**head, "convention": convention, "figure": name, "value": value}
                    if intervals:
                        record |= {end: found[f"{name}_{end}"] for end in ("low", "high")}
                    records.append(record)
    return records


def _array(values: Any) -> NDArray[np.floating]:
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "fiu":
        raise ValueError("expected one list of numbers")
    return values if values.dtype.kind == "f" else values.astype(np.float64)


def _sets(rows: Any, name: str, column: str) -> list[ScoredSet]:
    """The image sets of the lines of a CSV."""
    header = [cell.strip() for cell in next(rows, [])]
    if len(set(header)) < len(header):
        raise ValueError("two columns have the same name")
    if column not in header:
        raise ValueError(f"no column {column!r} (--column names another); it has {', '.join(map(repr, header))}")
    at = {key: header.index(key) for key in ("kind", "set", "label", "prediction") if key in header}
    place, classes = header.index(column), "label" in at and "prediction" in at
    scores: dict[tuple[str, str], list[float]] = {}
    pairs: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
    for row in rows:
        if not row:
            continue
        where = f"line {rows.line_num}"
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} cells under {len(header)} names")
        own = row[at["set"]].strip() if "set" in at else name
        kind = row[at["kind"]].strip().lower() if "kind" in at else ""
        if "kind" in at and kind not in KINDS:
            raise ValueError(f"{where}, kind: {row[at['kind']]!r} is none of {', '.join(KINDS)}")
        if "set" in at and "kind" not in at:
            kind = "id" if own.casefold() == "id" else "ood"
        if "kind" in at and "set" not in at:
            own = kind
        try:
            score = float(row[place])
        except ValueError:
            raise ValueError(f"{where}, {column}: {row[place]!r} is no number") from None
        if math.isnan(score):
            raise ValueError(f"{where}, {column}: a score is not a number (nan); metrics of it mean nothing")
        scores.setdefault((own, kind), []).append(score)
        if classes:
            pairs.setdefault((own, kind), []).append((_class(row[at["label"]]), _class(row[at["prediction"]])))
    if not scores:
        raise ValueError("holds no scores")
    found = []
    for key, values in scores.items():
        labels, predictions = zip(*pairs[key], strict=True) if classes else ((), ())
        if "" in labels or "" in predictions:
            labels, predictions = (), ()
        found.append(ScoredSet(*key, np.array(values), labels, predictions))
    return found


def _class(cell: str) -> str:
    """A class as text, 3 and 3.0 alike."""
    try:
        return f"{float(cell):g}"
    except ValueError:
        return cell.strip()


def all_conventions(names: Sequence[str]) -> list[str]:
    """The conventions that are named, with "all" for every one of them; "grood" if none is.

    Raises:
        InputError: If one is unknown.
    """
    for name in names:
        if name not in (*CONVENTIONS, "all"):
            raise InputError(f"unknown convention {name!r}; use one of {', '.join(CONVENTIONS)}, or all")
    return list(CONVENTIONS) if "all" in names else list(names) or ["grood"]
