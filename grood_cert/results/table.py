r"""One result in memory, column by column, and the two files it is kept in: a CSV, and a JSON manifest beside it.

The manifest says what the rows are: `kind` names a schema of `grood_cert.results.columns` and `schema` its version; a
file's name decides nothing. Rows can be read while the run is still writing them, and after it was killed: the manifest
says how many bytes of the rows count (`bytes`), how many rows those hold (`rows`), whether they are all of the run
(`complete`), and what the checksum of all of it is (`sha256`).

Missing numbers are written as `NaN`, which pandas and polars both take for a float; an empty cell, as pandas and polars
write it, is read as NaN in a column of numbers and as empty text in a column of texts.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grood_cert.errors import InputError, RunError, said
from grood_cert.results.checksum import KEY, Checksum, check_sum
from grood_cert.results.columns import SCHEMAS, Column, Schema, grid_column, header
from grood_cert.results.invariants import check_columns, check_invariants, line
from grood_cert.system.files import as_json, check_apart, csv_text, replacing, write_json

if TYPE_CHECKING:
    import pandas


def manifest_path(path: Path) -> Path:
    """Where the manifest of a CSV lies."""
    return path.with_suffix(".json")


@dataclass(frozen=True, eq=False)
class Table:
    """A result, column by column.

    Attributes:
        manifest: What the run was: kind, model, norm, eps, gamma, data, versions, ...
        columns: The single columns by name, each of shape (N,).
        grid: The grid columns by name, each of shape (N, len(eps)).
    """

    manifest: Mapping[str, Any]
    columns: Mapping[str, NDArray[Any]]
    grid: Mapping[str, NDArray[Any]]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> Table:
        """Arrange records by column; their values are as computed, or text as read.

        Raises:
            KeyError: If the kind or a column is missing.
            ValueError: If a value does not read as what its column holds.
        """
        schema = SCHEMAS[manifest["kind"]]
        eps = [float(value) for value in manifest["eps"]]
        grid = {
            name: [_column(records, grid_column(name, value), column) for value in eps]
            for name, column in schema.grid.items()
        }
        return cls(
            manifest,
            {name: _column(records, name, column) for name, column in schema.columns.items()},
            {name: np.stack(values, axis=1) for name, values in grid.items()},
        )

    @classmethod
    def read(cls, path: Path | str, kind: str | None = None, partial: bool = False) -> Table:
        """Read a result and its manifest, and check that they are what grood-cert can have written.

        Args:
            path: The CSV.
            kind: What it must be, a key of `SCHEMAS`; None: whatever the manifest says.
            partial: Whether the rows of a run that is not complete will do.

        Raises:
            InputError: If a file is missing, holds no rows, is not a result of this kind that this version reads, or
                of an unfinished run; or if an invariant is broken (`check_invariants`).
        """
        path = Path(path)
        words = SCHEMAS[kind].words if kind else "a result that this version reads"
        try:
            manifest, records = read_cells(path, SCHEMAS[kind].command if kind else "certify")
            schema = _schema(manifest, kind)
            words = schema.words
            if not records:
                raise InputError(f"{path}: holds no rows; run grood-cert {schema.command} on at least one sample")
            table = cls.of(records, manifest)
            unknown = records[0].keys() - set(header(table.kind, table.eps))
            if unknown:
                raise ValueError(f"unknown {_named(unknown)}; write with index=False what pandas has read")
            missing = [name for name in schema.manifest if manifest.get(name) is None]
            if missing:
                raise ValueError(f"{manifest_path(path).name} lacks {', '.join(missing)}")
            check_columns(table)
            check_sum(manifest, records)
            check_invariants(table)
        except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
            reason = f"missing {error}" if isinstance(error, KeyError) else said(error)[:160]
            raise InputError(f"{path}: not {words} ({reason})") from None
        if not table.complete and not partial:
            raise InputError(
                f"{path} is unfinished, {table.progress} samples: its command goes on with it; --partial (in Python "
                "partial=True) reads what is there"
            )
        return table

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns["index"])

    @property
    def kind(self) -> str:
        """Kind of result, a key of `SCHEMAS`."""
        return str(self.manifest["kind"])

    @property
    def eps(self) -> tuple[float, ...]:
        """The eps grid, ascending."""
        return tuple(float(value) for value in self.manifest["eps"])

    @property
    def norm(self) -> str:
        """Norm of the balls."""
        return str(self.manifest["norm"])

    @property
    def gamma(self) -> float:
        """Threshold that decisions and radii refer to."""
        return float(self.manifest["gamma"])

    @property
    def complete(self) -> bool:
        """Whether the run is done, so that the rows are all of its samples."""
        return bool(self.manifest.get("complete", True))

    @property
    def progress(self) -> str:
        """How many samples of the run are done, as "16 of 60"."""
        return f"{self.manifest.get('samples_done', len(self))} of {self.manifest.get('of_samples', len(self))}"

    def of_kind(self, kind: str) -> NDArray[np.bool_]:
        """Mask of the rows of one kind of image set: id, ood or noise."""
        return np.asarray(self["kind"] == kind)

    def sets(self, *kinds: str) -> dict[str, NDArray[np.bool_]]:
        """Masks of the image sets of some kinds, by name, in the order of the file."""
        chosen = np.isin(self["kind"], kinds)
        names = dict.fromkeys(self["set"][chosen].tolist())
        return {name: np.asarray((self["set"] == name) & chosen) for name in names}

    def summary(self) -> list[dict[str, Any]]:
        """What a command prints about such a result, see `grood_cert.results.summary`."""
        from grood_cert.results.summary import SUMMARIES

        return SUMMARIES[self.kind](self)

    def write(self, path: Path) -> None:
        """Write the result and its manifest, to be read again by `read`.

        Raises:
            InputError: If a file cannot be written.
        """
        wide = {name: values.tolist() for name, values in self._wide().items()}
        records = (dict(zip(wide, row, strict=True)) for row in zip(*wide.values(), strict=True))
        write_rows(path, csv_text(list(wide), records, header=True), {**self.manifest, "rows": len(self)})

    def to_pandas(self) -> pandas.DataFrame:
        """A `pandas.DataFrame` with the columns of the CSV.

        Raises:
            RunError: If pandas is not installed.
        """
        return _installed("pandas").DataFrame(self._wide())

    def to_long(self) -> pandas.DataFrame:
        """A `pandas.DataFrame` with one row a sample and eps: the single columns, `eps`, and the grid columns.

        A result without a grid keeps its rows; those of a Lipschitz analysis are of one sample and eps already.

        Raises:
            RunError: If pandas is not installed.
        """
        if not self.grid:
            return self.to_pandas()
        columns = {name: np.repeat(values, len(self.eps)) for name, values in self.columns.items()}
        columns["eps"] = np.tile(self.eps, len(self))
        columns |= {name: values.ravel() for name, values in self.grid.items()}
        return _installed("pandas").DataFrame(columns)

    def to_parquet(self, path: Path) -> None:
        """Write the columns of the CSV as Parquet; the manifest, as JSON, is the entry `grood-cert` of its metadata.

        Raises:
            RunError: If pyarrow is not installed.
            InputError: If the file cannot be written.
        """
        arrow, parquet = _installed("pyarrow"), _installed("pyarrow.parquet")
        table = arrow.table({name: values.tolist() for name, values in self._wide().items()})
        table = table.replace_schema_metadata({"grood-cert": json.dumps(as_json(self.manifest))})
        with replacing(path) as temporary:
            parquet.write_table(table, temporary)

    def _wide(self) -> dict[str, NDArray[Any]]:
        """The columns of the CSV, in order."""
        return dict(self.columns) | {
            grid_column(name, eps): values[:, position]
            for position, eps in enumerate(self.eps)
            for name, values in self.grid.items()
        }


def write_rows(path: Path, text: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write rows and the manifest that describes them.

    Where there were none, a process that is killed on the way leaves a manifest alone, which nothing takes for a result.
    Where others are replaced, it may leave rows beside a manifest whose checksum is not theirs.

    Args:
        path: The CSV.
        text: All of it.
        manifest: What to say of the rows; their length and the checksum are added.

    Returns:
        The manifest as written.

    Raises:
        InputError: If a file cannot be written.
    """
    whole = {**manifest, "bytes": len(text.encode())}
    whole[KEY] = Checksum(csv.DictReader(io.StringIO(text, newline=""))).of(whole)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
        write_json(manifest_path(path), whole)
    return whole


def check_target(target: Path, inputs: Sequence[Path], force: bool) -> None:
    """Make sure that a result may be written to a place: neither it nor its manifest is an input or would be lost.

    Args:
        target: The CSV to write.
        inputs: The CSVs that are read.
        force: Whether another result that is there may be overwritten.

    Raises:
        InputError: If it is no CSV, is what is read, or is there already.
    """
    if target.suffix != ".csv":
        raise InputError(f"{target}: results are written as .csv; choose this ending")
    check_apart((target, manifest_path(target)), (file for path in inputs for file in (path, manifest_path(path))))
    for path in (target, manifest_path(target)):
        if path.exists() and not force:
            raise InputError(f"{path} exists already; choose another --out, or add --force to overwrite it")


def read_cells(path: Path, command: str = "certify") -> tuple[dict[str, Any], list[dict[str, str]]]:
    """A manifest and the cells of its rows, as text; of a run that is not complete, the rows it has saved.

    Args:
        path: The CSV.
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
    reader = csv.DictReader(io.StringIO(content.decode(), newline=""))
    records = list(reader)
    if len(records) != manifest.get("rows", len(records)):
        raise ValueError(f"holds {len(records) or 'no'} rows, {companion.name} speaks of {manifest['rows']}")
    names = reader.fieldnames or []
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    if any(None in record or None in record.values() for record in records):  # what csv makes of too many, too few
        raise ValueError("a line has more or fewer cells than there are columns")
    return manifest, records


def read_trained(folders: Sequence[Path], option: str) -> list[Table]:
    """Certifications of detectors that were trained from recipes, one a sub-folder, as a sweep leaves them.

    Args:
        folders: Whose sub-folders hold a `rows.csv` each, or none.
        option: Of the command that names them.

    Raises:
        InputError: As for `Table.read`; or there are none, or a network was not trained from a recipe.
    """
    tables = [Table.read(path, "certification") for folder in folders for path in sorted(folder.glob("*/rows.csv"))]
    if not tables:
        raise InputError(f"no rows.csv below {', '.join(map(str, folders))}")
    for table in tables:
        if not table.manifest.get("recipe"):
            name = table.manifest["model"]["name"]
            raise InputError(f"{name} was not trained from a recipe; leave it out of {option}")
    return tables


def labelled(
    tables: Sequence[Table], paths: Sequence[Path], labels: Sequence[str], what: str = "rows files"
) -> dict[str, Table]:
    """Results by the name to print: the labels given, else the names of the models, else the folders' names.

    Args:
        tables: One result of each model.
        paths: Their files.
        labels: As many names, or none.
        what: What the labels are of, in the plural.

    Raises:
        InputError: If the number of labels is wrong, or two names are the same.
    """
    if labels and len(labels) != len(paths):
        raise InputError(f"{len(labels)} labels for {len(paths)} {what}; give one label for each, in order")
    if not all(label.strip() for label in labels):
        raise InputError("an empty label names no model; leave --label out for the models' own names")
    names = list(labels) or [str(table.manifest["model"]["name"]) for table in tables]
    if len(set(names)) < len(names) and not labels:
        names = [path.absolute().parent.name for path in paths]
    if len(set(names)) < len(names):
        raise InputError("two models would be drawn under the same name; give each its own --label")
    return dict(zip(names, tables, strict=True))


def _schema(manifest: Mapping[str, Any], kind: str | None) -> Schema:
    found, version = manifest.get("kind"), manifest.get("schema")
    if not isinstance(found, str) or found not in SCHEMAS:
        raise ValueError(f"its manifest names the kind {found!r}; known are {', '.join(SCHEMAS)}")
    if kind not in (None, found):
        raise ValueError(f"it holds {SCHEMAS[found].words}")
    schema = SCHEMAS[found]
    if version != schema.version:
        raise ValueError(f"its manifest names version {version!r} of the columns, this version reads {schema.version}")
    return schema


def _number(cell: Any) -> float:
    return math.nan if cell == "" else float(cell)


def _integer(cell: Any) -> int:
    value = float(cell)
    if not value.is_integer() or abs(value) > 2**53:
        raise ValueError(f"{cell!r} is no whole number")
    return int(value)


_READERS: dict[str, tuple[Callable[[Any], Any], type]] = {
    "text": (str, str),
    "integer": (_integer, int),
    "number": (_number, float),
}


def _column(records: Sequence[Mapping[str, Any]], name: str, column: Column) -> NDArray[Any]:
    read, dtype = _READERS[column.type]
    values = []
    for row, record in enumerate(records):
        try:
            values.append(read(record[name]))
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"{line(row)}, {name}: {record[name]!r} is no {column.type}") from None
    return np.array(values, dtype=dtype)


def _named(names: Iterable[str]) -> str:
    return "columns " + ", ".join(map(repr, sorted(names)))


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RunError(f"{name} is not installed; install it with: pip install {name.split('.')[0]}") from None
