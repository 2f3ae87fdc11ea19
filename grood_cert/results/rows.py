r"""The result of a certification: one row a sample, in one CSV with a JSON manifest beside it.

`COLUMNS` and `GRID_COLUMNS` are the one place where the columns are documented. A grid column occurs once for each
eps, as `NAME@EPS`. Radii and eps are in pixel units ([0, 1]) of the run's norm.

Rows can be read while the run is still writing them, and after it was killed: the manifest says how many bytes of the
rows count (`bytes`), how many rows those hold (`rows`) and whether they are all of the run (`complete`).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from grood_cert.errors import InputError
from grood_cert.system.files import write_csv, write_json

COLUMNS: dict[str, str] = {
    "set": "name of the image set",
    "kind": "id, ood or noise",
    "index": "position of the image in its test set",
    "label": "class index within the set",
    "prediction": "class of the largest logit",
    "score": "S(x), clean",
    "accepted": "1 if S(x) <= gamma, else 0",
    "status": "certified (a positive radius was proved), undecided (none was), misdecided (wrong already at x)",
    "stage": "what decided: the stage that proved radius_certified (`cascade.STAGES`), envelope (looked up at another gamma), "
    "misdecision, undecided",
    "radius_certified": "formal: largest eps found for which the decision was proved on the whole ball; 0 if none",
    "radius_certified_per_logit": "formal: the same from bounds of each logit alone (U0, L0); nan if not asked for",
    "radius_lipschitz_fixed_point": "formal: root of eps L(eps) = |S(x) - gamma|, L a Lipschitz bound; nan if not asked for",
    "radius_lipschitz_path": "formal: where the integral of L reaches |S(x) - gamma|; nan if not asked for",
    "radius_attack": "upper bracket: distance of the nearest point found with the other decision; inf if none",
    "radius_gradient_norm_estimate": "estimate, proves nothing: |S(x) - gamma| / ||grad S(x)||_q",
    "gradient_norm_estimate": "estimate of the local Lipschitz constant from below: ||grad S(x)||_q, q dual to the norm",
}
GRID_COLUMNS: dict[str, str] = {
    "s_lb": "formal: S_lb <= S on the ball of radius eps; nan if not proved",
    "s_ub": "formal: S <= S_ub on the ball of radius eps; nan if not proved",
    "s_attack_min": "smallest S an attack saw in the ball",
    "s_attack_max": "largest S an attack saw in the ball",
}
TEXT_GRID_COLUMNS: dict[str, str] = {
    "outcome": "what decided the ball of radius eps: a stage (or envelope) certified it, attack broke it, misdecision: wrong "
    "at x itself, timeout, undecided",
}
KINDS = ("id", "ood", "noise")
STATUSES = ("certified", "undecided", "misdecided")
_TEXT = ("set", "kind", "status", "stage")
_INTEGERS = ("index", "label", "prediction", "accepted")


def grid_column(name: str, eps: float) -> str:
    """Name of a grid column.

    Example:
        >>> grid_column("s_lb", 0.01)
        's_lb@0.01'
    """
    return f"{name}@{eps!r}"


def header(eps: Sequence[float]) -> list[str]:
    """All columns of a file with this eps grid, in order."""
    return [*COLUMNS, *(grid_column(name, value) for value in eps for name in (*GRID_COLUMNS, *TEXT_GRID_COLUMNS))]


def manifest_path(rows: Path) -> Path:
    """Where the manifest of a rows file lies."""
    return rows.with_suffix(".json")


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows in memory, column by column.

    Attributes:
        manifest: What the run was: model, norm, method, eps, gamma, data, versions, ...
        eps: The eps grid, ascending.
        columns: The single columns by name, each of shape (N,).
        grid: The grid columns by name, each of shape (N, len(eps)).
        outcomes: The grid column `outcome`, shape (N, len(eps)).
    """

    manifest: Mapping[str, Any]
    eps: tuple[float, ...]
    columns: Mapping[str, NDArray[Any]]
    grid: Mapping[str, NDArray[np.float64]]
    outcomes: NDArray[np.str_]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns["score"])

    @property
    def complete(self) -> bool:
        """Whether the run is done, so that the rows are all of its samples."""
        return bool(self.manifest.get("complete", True))

    @property
    def norm(self) -> str:
        """Norm of the balls."""
        return str(self.manifest["norm"])

    @property
    def gamma(self) -> float:
        """Threshold the radii refer to."""
        return float(self.manifest["gamma"])

    def of_kind(self, kind: str) -> NDArray[np.bool_]:
        """Mask of the rows of one kind."""
        return np.asarray(self.columns["kind"] == kind)

    def sets(self, kind: str) -> dict[str, NDArray[np.bool_]]:
        """Masks of the sets of one kind, by name, in the order of the file."""
        names = dict.fromkeys(self.columns["set"][self.of_kind(kind)].tolist())
        return {name: np.asarray((self.columns["set"] == name) & self.of_kind(kind)) for name in names}


def column_values(
    records: Sequence[Mapping[str, Any]], names: Iterable[str], kinds: Mapping[str, type]
) -> dict[str, NDArray[Any]]:
    """Columns by name, shape (N,) each; a name that `kinds` leaves out holds numbers."""
    return {name: np.array([kinds.get(name, float)(record[name]) for record in records]) for name in names}


def grid_values(
    records: Sequence[Mapping[str, Any]], name: str, eps: Sequence[float], kind: type = float
) -> NDArray[Any]:
    """A grid column, shape (N, len(eps))."""
    values = [[kind(record[grid_column(name, value)]) for value in eps] for record in records]
    return np.array(values).reshape(len(records), len(eps))


def from_records(records: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> Rows:
    """Arrange records (as written or as read, values may be text) by column.

    Raises:
        KeyError: If a column is missing.
        ValueError: If a value does not read as a number.
    """
    eps = tuple(float(value) for value in manifest["eps"])
    kinds: dict[str, type] = dict.fromkeys(_TEXT, str) | dict.fromkeys(_INTEGERS, int)
    grid = {name: grid_values(records, name, eps) for name in GRID_COLUMNS}
    columns = column_values(records, COLUMNS, kinds)
    return Rows(manifest, eps, columns, grid, grid_values(records, "outcome", eps, str))


def write(rows: Rows, path: Path) -> None:
    """Write rows and their manifest, to be read again by `read`.

    Raises:
        InputError: If a file cannot be written.
    """
    grid = {**rows.grid, "outcome": rows.outcomes}
    records = [
        {name: values[row].item() for name, values in rows.columns.items()}
        | {
            grid_column(name, eps): values[row, column].item()
            for column, eps in enumerate(rows.eps)
            for name, values in grid.items()
        }
        for row in range(len(rows))
    ]
    write_csv(path, header(rows.eps), records)
    write_json(manifest_path(path), {**rows.manifest, "bytes": path.stat().st_size})


def read_files(path: Path, command: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """A run's manifest and the cells of its rows, as text; of a run that is not complete, the rows it has saved.

    Args:
        path: The rows.
        command: The command that writes such files, named when one is missing.

    Raises:
        InputError: If a file is missing.
        ValueError: If the manifest is no JSON, or the rows are not those it speaks of.
        TypeError: If the manifest is no JSON object.
        csv.Error: If the rows are no CSV.
    """
    companion = manifest_path(path)
    for file in (path, companion):
        if not file.is_file():
            raise InputError(f"{file}: no such file; write it with: grood-cert {command} MODEL --out FOLDER")
    manifest = json.loads(companion.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise TypeError(f"{companion.name} is no JSON object")
    content = path.read_bytes()
    if not manifest.get("complete", True):
        content = content[: manifest["bytes"]]
    if content and not content.endswith(b"\n"):
        raise ValueError("ends within a line")
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    if len(rows) != manifest.get("rows", len(rows)):
        raise ValueError(f"holds {len(rows) or 'no'} rows, {companion.name} speaks of {manifest['rows']}")
    return manifest, rows


def read(path: Path) -> Rows:
    """Read a rows file and its manifest.

    Raises:
        InputError: If a file is missing, is empty, or is not what a certification writes.
    """
    try:
        manifest, records = read_files(path, "certify")
        if not records:
            raise InputError(f"{path}: holds no rows; certify at least one sample")
        rows = from_records(records, manifest)
        known = {"norm", "gamma", "model"} <= manifest.keys()
        if not known or not set(rows["kind"]) <= set(KINDS) or not set(rows["status"]) <= set(STATUSES):
            raise ValueError("values that no certification writes")
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not the rows of a certification ({reason})") from None
    for name in ("score", "radius_certified"):
        if not np.isfinite(rows[name]).all():
            raise InputError(f"{path}: holds values of {name} that are not finite")
    if np.isnan(rows["radius_attack"]).any():
        raise InputError(f"{path}: holds attack radii that are NaN")
    return rows


class _Result(Protocol):
    @property
    def manifest(self) -> Mapping[str, Any]: ...


_R = TypeVar("_R", bound=_Result)


def labelled(results: Sequence[_R], paths: Sequence[Path], labels: Sequence[str]) -> dict[str, _R]:
    """Results of runs by the name to print: the labels given, else the recipes' names, else the folders' names.

    Raises:
        InputError: If the number of labels is wrong, or two names are the same.
    """
    if labels and len(labels) != len(paths):
        raise InputError(f"{len(labels)} labels for {len(paths)} rows files; give one label for each, in order")
    names = list(labels) or [str(result.manifest["model"]["name"]) for result in results]
    if len(set(names)) < len(names) and not labels:
        names = [path.absolute().parent.name for path in paths]
    if len(set(names)) < len(names):
        raise InputError("two models would be drawn under the same name; give each its own --label")
    return dict(zip(names, results, strict=True))
