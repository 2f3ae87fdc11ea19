"""Files that survive any death of the process: replaced as a whole, or appended to and truncated to what is known good.

A file is *replaced* by writing beside its place, then renaming into it. A file too long for that is *appended* to, and
another file, replaced after every append, says how many of its bytes count. A *lock* keeps a second process away.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from grood_cert.errors import InputError

_TRIES, _PAUSE = 10, 0.02  # to get a lock; seconds between them
_LINE = 2000  # letters
_TOKEN = 8  # bytes that tell the temporary files of one target apart


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends well, and vanishes when it does not.

    Raises:
        InputError: If the folder cannot be made or written to, or `path` is a folder or a device.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "notes.txt") as temporary:
        ...         _ = temporary.write_text("all of it")
        ...     [entry.name for entry in Path(folder).iterdir()]
        ['notes.txt']
    """
    temporary = None
    try:
        target = path.resolve()  # a link keeps pointing where it points
        if target.exists() and not target.is_file():
            raise InputError(f"cannot write {path}: there is something there that is not a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.stem}-{secrets.token_hex(_TOKEN)}{target.suffix}"
        yield temporary
        with temporary.open("r+b") as stream:
            os.fsync(stream.fileno())  # the name must never outlive the content
        temporary.replace(target)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def appending(path: Path, size: int) -> Iterator[Callable[[str], int]]:
    """Cut a file to its first `size` bytes, and add to them.

    Yields:
        A function that appends text and returns the new size; what it has written is on the disk when it returns.

    Raises:
        InputError: If the file cannot be written; it may then end in a part of the text.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "log"
        ...     _ = path.write_text("good" + "torn")
        ...     with appending(path, 4) as append:
        ...         _ = append(" as new"), append("!")
        ...     path.read_text()
        'good as new!'
    """
    with _os_errors_refused(path):
        stream = path.open("ab", buffering=0)
    with stream:

        def append(text: str) -> int:
            rest = text.encode()
            with _os_errors_refused(path):
                while rest:
                    rest = rest[stream.write(rest) :]  # a full disk may take a part, and refuses the next
                os.fsync(stream.fileno())
                return os.fstat(stream.fileno()).st_size

        with _os_errors_refused(path):
            stream.truncate(size)
        yield append


@contextlib.contextmanager
def locked(path: Path, *others: Path) -> Iterator[None]:
    """Keep every other process that locks `path` away while the block runs.

    The lock is held on a file beside it, `.NAME.lock`. The system releases it with the process, however that ends, so
    no lock is ever stale; a file left behind by a killed process locks nothing.

    Args:
        path: What is locked.
        others: What else is replaced under this lock. Temporary files that killed processes left of any of them are
            removed.

    Raises:
        InputError: If another process holds the lock, or the folder cannot be written to.
    """
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        with _os_errors_refused(lock):
            tries = 0
            while True:
                stream = stack.enter_context(lock.open("ab"))
                if not lock_descriptor(stream.fileno(), blocking=False):
                    tries += 1
                    if tries < _TRIES:  # `is_locked` holds it for an instant
                        time.sleep(_PAUSE)
                        continue
                    raise InputError(f"another process is writing {path}; wait until it ends, or choose another --out")
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(stream.fileno()), lock.stat()):
                        break  # otherwise its last holder has removed the file in the meantime
            for file in (path, *others):
                _remove_temporaries(file)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows keeps a file that is open
                lock.unlink(missing_ok=True)


def _remove_temporaries(path: Path) -> None:
    """Remove what killed processes left of `replacing(path)`."""
    target = path.resolve()
    pattern = re.compile(rf"\.{re.escape(target.stem)}-[0-9a-f]{{{2 * _TOKEN}}}{re.escape(target.suffix)}")
    for entry in target.parent.iterdir():
        if pattern.fullmatch(entry.name):
            entry.unlink(missing_ok=True)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on `path` at this moment."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        with lock.open("r+b" if os.access(lock, os.W_OK) else "rb") as stream:
            return not lock_descriptor(stream.fileno(), blocking=False)
    except OSError:
        return False


@contextlib.contextmanager
def _os_errors_refused(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(folder: Path) -> None:
    """Make the folder and make sure that files can be written to it, before any work is spent.

    Raises:
        InputError: If not.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"cannot write to {folder}: it is no folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error


def check_apart(written: Iterable[Path], read: Iterable[Path]) -> None:
    """Make sure that nothing is written over what is read, whatever it is called: by another spelling, through a link.

    Raises:
        InputError: Naming both.

    Example:
        >>> check_apart([Path("a/../rows.csv")], [Path("other.csv"), Path("rows.csv")])
        Traceback (most recent call last):
        ...
        grood_cert.errors.InputError: a/../rows.csv would overwrite rows.csv, which is read; choose another --out
    """
    inputs = {path.resolve(): path for path in read}
    for path in written:
        if path.resolve() in inputs:
            raise InputError(f"{path} would overwrite {inputs[path.resolve()]}, which is read; choose another --out")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows under the given columns, as `csv_text` does.

    Raises:
        InputError: If the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(csv_text(columns, rows, header=True), encoding="utf-8", newline="")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows as `write_csv` writes them, every cell as text.

    Raises:
        InputError: If the file cannot be read, holds no rows, or one that is not whole.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except csv.Error as error:
        raise InputError(f"{path} is no table: {error}") from None
    if not rows or any(None in (*row, *row.values()) for row in rows):
        raise InputError(f"{path} is no table: a row is not whole, or there is none")
    return rows


def numbers(
    path: Path, columns: Sequence[str], words: Collection[str], made: Sequence[Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Rows of numbers, and of text in the columns of words: those of a file, or those `made` that shall take their place.

    Raises:
        InputError: As for `read_csv`; or the columns are others, or a number is none or not finite.
    """
    found = read_csv(path) if made is None else made
    if any(list(row) != list(columns) for row in found):
        raise InputError(f"{path}: expected the columns {', '.join(columns)}")
    try:
        rows = [{key: value if key in words else float(value) for key, value in row.items()} for row in found]
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if not all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float)):
        raise InputError(f"{path}: a number is not finite")
    return rows


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], header: bool = False) -> str:
    r"""Rows under the given columns as CSV, with or without the line of column names.

    Floats keep all their digits, and whatever they are, pandas and polars read a column of them as floats; None is an
    empty cell.

    Example:
        >>> csv_text(["a", "b"], [{"a": 1.0, "b": None}, {"a": 1 / 3, "b": "x,y"}, {"a": math.nan, "b": -math.inf}])
        '1.0,\n0.3333333333333333,"x,y"\nNaN,-inf\n'
    """
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(
        {name: "NaN" if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        for row in rows
    )
    return stream.getvalue()


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; NaN and infinities, which JSON lacks, become null.

    Raises:
        InputError: If the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(as_json(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def as_json(value: Any) -> Any:
    """A value as it comes back from JSON: tuples as lists, NaN and infinities as None.

    Example:
        >>> as_json({"eps": (0.1, float("nan"))})
        {'eps': [0.1, None]}
    """
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def first_line(path: Path) -> str | None:
    """The first line of a text file, without what cannot be printed; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return "".join(letter for letter in stream.readline(_LINE) if letter.isprintable())
    except OSError:
        return None


def sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal.

    Raises:
        InputError: If the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
