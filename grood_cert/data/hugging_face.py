"""Data sets of the package ``datasets`` on disk, as its ``save_to_disk`` writes them: ``hf:FOLDER``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from grood_cert.data.arrays import checked_labels
from grood_cert.data.images import Contents, Request
from grood_cert.data.pictures import Pictures, cover, stored_pictures, survey
from grood_cert.data.splits import Part, parts_of
from grood_cert.errors import InputError, said

PREFIX = "hf:"
_IMAGES = ("image", "img")
_LABELS = ("label", "labels", "fine_label")


def is_hugging_face(source: str) -> bool:
    """Whether a source is such a data set, by its prefix."""
    return source.startswith(PREFIX)


def hugging_face_splits(request: Request) -> dict[Part, str]:
    """The splits of a `DatasetDict`; a `Dataset` has none."""
    path = _folder(request)
    listing = path / "dataset_dict.json"
    if not listing.is_file():
        return {}
    try:
        names = [str(name) for name in json.loads(listing.read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{listing}' does not list the splits of a data set: {said(error)}") from error
    parts = parts_of(names, request.source)
    if not parts:
        first = f"{request.source}/{names[0]}" if names else request.source
        raise InputError(f"'{request.source}' has no train, validation or test split; name one of its own: {first}")
    return parts


def hugging_face(request: Request) -> Contents:
    """The images and labels of a data set, found by the types of its columns."""
    path = _folder(request) / request.split
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"'{request.source}' needs the package datasets; pip install 'grood-cert[huggingface]'"
        ) from None
    try:
        table = datasets.load_from_disk(str(path))
        table.data.validate(full=True)  # damaged offsets would end the process
    except Exception as error:  # datasets and pyarrow raise a dozen kinds on a damaged folder
        raise InputError(f"'{path}' cannot be read as a data set that save_to_disk wrote: {said(error)}") from error
    kinds = table.features
    column = _column(request, [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)], _IMAGES)
    if column is None:
        raise InputError(f"'{request.source}' has no column of images; it has {', '.join(kinds) or 'none'}")
    if len(table) == 0:
        raise InputError(f"'{request.source}' is empty: it names a set without images")
    encoded = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def opened(number: int) -> Any:
        value = encoded[number][column] or {}
        return io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value.get("path") or io.BytesIO()

    pictures = Pictures(opened, [f"{column} {number}" for number in range(len(table))], f"'{request.source}'")
    shape, changes = survey(pictures, request.shape, request.resize)
    images = stored_pictures(pictures, shape, cover)
    classes = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    numbers = [name for name in _LABELS if getattr(kinds.get(name), "dtype", "").startswith(("int", "uint"))]
    label = _column(request, classes or numbers, _LABELS)
    if label is None:
        return Contents(images, np.zeros(len(table), dtype=np.int64), (Path(path).name,), (), changes, "no labels")
    values = [-1 if value is None else value for value in table[label]]
    labels = checked_labels(np.array(values), len(table), f"{request.source}, column {label}")
    names = kinds[label].names if label in classes else map(str, range(int(labels.max()) + 1))
    return Contents(images, labels, tuple(names), (), changes)


def _folder(request: Request) -> Path:
    path = Path(request.source.removeprefix(PREFIX))
    if not path.is_dir():
        raise InputError(f"'{request.source}' does not exist: there is no folder '{path}' that save_to_disk wrote")
    return path


def _column(request: Request, names: list[str], usual: tuple[str, ...]) -> str | None:
    """The only column of some, or that with the usual name."""
    found = names if len(names) < 2 else [name for name in usual if name in names][:1]
    if names and not found:
        raise InputError(f"'{request.source}' has columns {', '.join(names)}; rename the one to use to '{usual[0]}'")
    return found[0] if found else None
