"""Images and labels in the format of MNIST, ``train-images-idx3-ubyte``, packed with gzip or not."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from grood_cert.data.arrays import checked_labels, stored, to_nchw
from grood_cert.data.images import Array, Contents, Request
from grood_cert.data.splits import Part, is_split, parts_of
from grood_cert.errors import InputError, said

_NAME = re.compile(r"(?P<head>.*?)images(?P<dot>[-.])idx3-ubyte(\.gz)?", re.IGNORECASE)
_DEFLATE = 1032  # bytes that a byte can stand for at most
_BYTES = 8  # the type of the format's numbers; the others are not used for images


def is_idx(source: str) -> bool:
    """Whether a source is a file of images in this format, or a folder that holds such files."""
    path = Path(source)
    return bool(_NAME.fullmatch(path.name)) or (bool(source) and path.is_dir() and bool(_images_in(path)))


def idx_splits(request: Request) -> dict[Part, str]:
    """Train and test (``t10k``) files of a folder; a file is all there is."""
    path = Path(request.source)
    return parts_of(_images_in(path), str(path)) if path.is_dir() else {}


def idx_file(request: Request) -> Contents:
    """The images of a file, or of a split of a folder, with the labels in the file beside it."""
    path = Path(request.source)
    if path.is_dir():
        path = _images_in(path)[request.split]
    found = _NAME.fullmatch(path.name)
    assert found
    pixels = _array(path, 3)
    labels = _beside(path, f"{found['head']}labels{found['dot']}idx1-ubyte")
    if path.name.startswith("emnist"):  # its files lie on their side
        pixels = pixels.swapaxes(1, 2)
    images = stored(to_nchw(pixels, str(path)))
    if labels is None:
        return Contents(images, np.zeros(len(images), dtype=np.int64), (path.name,), note="no file of labels beside it")
    numbers = checked_labels(_array(labels, 1), len(images), str(labels))
    return Contents(images, numbers, tuple(str(index) for index in range(int(numbers.max()) + 1)))


def _images_in(folder: Path) -> dict[str, Path]:
    """The files of images of a folder, by their split."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):  # unpacked files come first
        match = _NAME.fullmatch(path.name)
        split = match["head"].strip("-_.").rpartition("-")[2] if match else ""
        if match and is_split(split):
            other = found.setdefault(split, path)
            if other.name.removesuffix(".gz") != path.name.removesuffix(".gz"):
                raise InputError(f"folder '{folder}' holds '{other.name}' and '{path.name}'; give one of the files")
    return found


def _beside(path: Path, name: str) -> Path | None:
    """The file of that name beside another, packed or not."""
    return next((file for file in (path.with_name(name), path.with_name(f"{name}.gz")) if file.is_file()), None)


def _array(path: Path, axes: int) -> Array:
    """The bytes of a file, whose size is checked before they are read."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            zeros, kind, found = struct.unpack(">HBB", file.read(4))
            if (zeros, kind, found) != (0, _BYTES, axes):
                raise ValueError(f"its header is not that of bytes along {axes} axes")
            shape = struct.unpack(f">{axes}I", file.read(4 * axes))
            size = math.prod(shape)
            if size > path.stat().st_size * (_DEFLATE if packed else 1):
                raise ValueError(f"its header claims {size} bytes, which the file does not hold")
            content = file.read(size + 1)
    except FileNotFoundError:
        raise InputError(f"file '{path}' does not exist") from None
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise InputError(
            f"file '{path}' cannot be read as images or labels of MNIST's format: {said(error)}"
        ) from error
    if len(content) != size:
        raise InputError(f"file '{path}' holds more or fewer bytes than the {size} its header claims")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
