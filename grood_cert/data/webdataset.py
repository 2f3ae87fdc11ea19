"""Webdataset shards: ``.tar`` files with an image ``KEY.png`` and its label ``KEY.cls`` or ``KEY.json`` a sample.

Nothing is unpacked: images are read from where they lie in the file.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grood_cert.data.arrays import checked_labels
from grood_cert.data.images import Contents, Request
from grood_cert.data.pictures import SUFFIXES, Pictures, cover, stored_pictures, survey
from grood_cert.errors import InputError, said

_LABELS = (".cls", ".json")
_KEYS = ("label", "cls", "class")  # of a .json
_LABEL_BYTES = 2**20


@dataclass
class _Sample:
    """Where the members of a sample lie: (file, start, bytes), by suffix."""

    name: str = ""
    image: tuple[Path, int, int] | None = None
    labels: dict[str, tuple[Path, int, int]] = field(default_factory=dict)


def is_tar(source: str) -> bool:
    """Whether a source is a ``.tar`` file, or several: ``train-{000..012}.tar``."""
    return source.lower().endswith(".tar")


def webdataset(request: Request) -> Contents:
    """The images of one shard or more."""
    samples: dict[str, _Sample] = {}
    left_out = 0
    for path in _shards(request.source):
        left_out += _collect(path, samples)
    images = [sample for sample in samples.values() if sample.image]
    if not images:
        raise InputError(f"'{request.source}' is empty: it holds no image such as KEY.png or KEY.jpg")
    pictures = Pictures(
        lambda number: io.BytesIO(_bytes(images[number].image)), [s.name for s in images], f"'{request.source}'"
    )
    shape, changes = survey(pictures, request.shape, request.resize)
    labels, class_names = _labels(images, request.source)
    note = f"files left out: {left_out}, neither images nor labels" if left_out else ""
    files = tuple(pictures.names)
    return Contents(stored_pictures(pictures, shape, cover), labels, class_names, files, changes, note)


def _shards(source: str) -> list[Path]:
    """The files that a name with or without a range in braces means."""
    found = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", source)
    if not found:
        return [Path(source)]
    head, first, last, tail = found.groups()
    if int(last) < int(first):
        raise InputError(f"the range {{{first}..{last}}} in '{source}' runs backwards")
    return [Path(f"{head}{number:0{len(first)}d}{tail}") for number in range(int(first), int(last) + 1)]


def _collect(path: Path, samples: dict[str, _Sample]) -> int:
    """Note where the members of a shard lie; return how many are neither images nor labels."""
    others = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, slash, base = member.name.rpartition("/")
                key, _, suffixes = base.partition(".")
                suffix = "." + suffixes.rpartition(".")[2].lower()
                if not member.isfile() or not key:
                    continue
                if member.offset_data + member.size > path.stat().st_size:
                    raise tarfile.ReadError("unexpected end of data")
                place = (path, member.offset_data, member.size)
                sample = samples.setdefault(f"{path}/{folder}{slash}{key}", _Sample())
                if suffix in SUFFIXES:
                    if sample.image:
                        raise InputError(f"'{path}' holds two images of one key: '{sample.name}' and '{member.name}'")
                    sample.name, sample.image = member.name, place
                elif suffix in _LABELS:
                    sample.labels[suffix] = place
                else:
                    others += 1
    except FileNotFoundError:
        raise InputError(f"file '{path}' does not exist") from None
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"file '{path}' cannot be read as an unpacked tar file: {said(error)}") from error
    return others


def _bytes(place: tuple[Path, int, int] | None) -> bytes:
    assert place
    path, start, size = place
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _labels(samples: list[_Sample], source: str) -> tuple[Any, tuple[str, ...]]:
    """Labels and class names; one class where no sample has a label."""
    found = [_label(sample) for sample in samples]
    without = found.count(None)
    if without == len(found):
        return np.zeros(len(found), dtype=np.int64), (Path(source).name,)
    if without:
        name = samples[found.index(None)].name
        raise InputError(f"'{source}': {without} of {len(found)} images have no label, the first '{name}'")
    labels = checked_labels(np.array(found), len(found), source)
    return labels, tuple(str(index) for index in range(int(labels.max()) + 1))


def _label(sample: _Sample) -> int | None:
    place = next((sample.labels[suffix] for suffix in _LABELS if suffix in sample.labels), None)
    if place is None:
        return None
    try:
        if place[2] > _LABEL_BYTES:
            raise ValueError(f"it takes {place[2]} bytes")
        value = json.loads(_bytes(place))
        if isinstance(value, dict):
            value = next((value[key] for key in _KEYS if key in value), None)
        if type(value) is not int:
            raise ValueError(f"it is no class index, nor an object with one as {', '.join(map(repr, _KEYS))}")
        return value
    except (ValueError, RecursionError) as error:
        raise InputError(f"label of '{sample.name}' in '{place[0]}' cannot be read: {said(error)}") from error
