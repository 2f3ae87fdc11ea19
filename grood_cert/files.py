"""Files that are either whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grood_cert.errors import InputError


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
        temporary = target.parent / f".{secrets.token_hex(8)}{path.suffix}"
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Make the folder and make sure that files can be written to it, before any work is spent.

    Raises:
        InputError: If not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows under the given columns; floats keep all their digits, None is an empty cell.

    Raises:
        InputError: If the file cannot be written.
    """
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; NaN and infinities, which JSON lacks, become null.

    Raises:
        InputError: If the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
