"""Images of arrays, and of numpy files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from grood_cert.data.images import Array, Contents, Request, StoredImages, chunk
from grood_cert.data.splits import Part, is_split, parts_of
from grood_cert.errors import InputError, said

_MAX_CLASSES = 100_000
_IMAGES = ("images", "x", "data")
_LABELS = ("labels", "y")
_DEFLATE = 1032  # bytes that a byte can stand for at most


def stored(pixels: Array) -> StoredImages:
    """Images of an array (N, C, H, W), uint8 or float in [0, 1], read from it when indexed."""

    def read(positions: Array) -> Tensor:
        unit = np.ascontiguousarray(pixels[positions], dtype=np.float32)
        return torch.from_numpy(unit / np.float32(255) if pixels.dtype == np.uint8 else unit)

    _, channels, height, width = pixels.shape
    return StoredImages(read, (channels, height, width), np.arange(len(pixels)))


def to_nchw(pixels: Array, name: str) -> Array:
    """A view of an array as (N, C, H, W).

    Raises:
        InputError: It holds nothing, or has another shape than images have.
    """
    if pixels.size == 0:
        raise InputError(f"'{name}' is empty: its array has shape {pixels.shape}")
    if pixels.ndim == 2 and pixels.shape[1] == 3072:  # rows of CIFAR, TinyImages and down-sampled ImageNet
        return pixels.reshape(-1, 3, 32, 32)
    if pixels.ndim == 3:
        return pixels[:, None]
    first, last = (pixels.ndim == 4 and pixels.shape[axis] in (1, 3) for axis in (1, 3))
    if first == last:
        raise InputError(
            f"'{name}' has shape {pixels.shape}; images must be (N, H, W), (N, H, W, C) or (N, C, H, W) "
            "with 1 or 3 channels, or rows of 3x32x32"
        )
    return pixels if first else pixels.transpose(0, 3, 1, 2)


def array_splits(request: Request) -> dict[Part, str]:
    """The splits in the names of an ``.npz`` file's arrays, as in MedMNIST's and Keras's files."""
    path = Path(request.source)
    with _opened(path) as archive:
        if archive is None or any(key in archive.files for key in _IMAGES):
            return {}
        return parts_of(
            dict.fromkeys(split for split, kind in map(_parsed, archive.files) if kind == "images"), str(path)
        )


def numpy_file(request: Request) -> Contents:
    """The images of a ``.npy`` or ``.npz`` file, mapped where that can be."""
    path, labels = Path(request.source), None
    with _opened(path) as archive:
        if archive is None:
            pixels = _read(path, lambda: np.load(path, mmap_mode="r", allow_pickle=False))
        else:
            keys = {_parsed(key): key for key in reversed(archive.files)}
            of_images, of_labels = (keys.get((request.split, kind)) for kind in ("images", "labels"))
            if of_images is None:
                raise InputError(
                    f"file '{path}' holds {', '.join(archive.files) or 'nothing'}; it must hold 'images' (or 'x', "
                    "'data') and may hold 'labels' (or 'y'), or 'train_images' or 'x_train' and so on"
                )
            pixels = _read(path, lambda: _member(archive, of_images))
            labels = _read(path, lambda: _member(archive, of_labels)) if of_labels else None
    pixels = to_nchw(pixels, str(path))
    _check_pixels(pixels, path)
    images = stored(pixels)
    if labels is None:
        return Contents(images, np.zeros(len(images), dtype=np.int64), (path.name,))
    labels = checked_labels(labels, len(images), str(path))
    return Contents(images, labels, tuple(str(index) for index in range(int(labels.max()) + 1)))


def checked_labels(labels: Array, count: int, name: str) -> Array:
    """Labels as int64 of shape (N,).

    Raises:
        InputError: They are no class indices, one an image.
    """
    if labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        raise InputError(
            f"labels of '{name}' are {labels.dtype} of shape {labels.shape}; they must be integers of shape ({count},)"
        )
    if labels.min() < 0 or labels.max() >= _MAX_CLASSES:
        raise InputError(
            f"labels of '{name}' run from {labels.min()} to {labels.max()}; they must be class indices counted from 0"
        )
    return labels.reshape(count).astype(np.int64)


def _parsed(key: str) -> tuple[str, str]:
    """The split ("": none) and the kind of an array's name: ("train", "images") for "train_images" and "x_train"."""
    head, _, tail = key.partition("_")
    for split, name in (("", key), (head, tail), (tail, head)):
        if not split or is_split(split):
            for kind, names in (("images", _IMAGES), ("labels", _LABELS)):
                if name in names:
                    return split, kind
    return "", ""


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The archive that a file is, or None for a plain array."""
    if not path.is_file():
        raise InputError(f"file '{path}' does not exist; give the path of a .npy or .npz file")
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            yield None
            return
        file.seek(0)
        with _read(path, lambda: np.load(file, allow_pickle=False)) as archive:  # its arrays cannot be mapped
            yield archive


def _read(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds on a damaged file
        raise InputError(f"file '{path}' cannot be read as numpy images without pickles: {said(error)}") from error


def _member(archive: Any, key: str) -> Array:
    """An array of an archive, whose size is checked before memory is taken for it."""
    info = archive.zip.getinfo(f"{key}.npy")
    with archive.zip.open(info) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
    size = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and (size > info.file_size or info.file_size > _DEFLATE * info.compress_size + 1024):
        raise ValueError(f"'{key}' claims {size} bytes, which the file does not hold")
    return cast(Array, archive[key])


def _check_pixels(pixels: Array, path: Path) -> None:
    """Refuse pixels that are neither bytes nor numbers in [0, 1]; a mapped file is read a part at a time."""
    if pixels.dtype != np.uint8 and pixels.dtype.kind != "f":
        raise InputError(f"file '{path}' has pixels of type {pixels.dtype}; they must be uint8, or float in [0, 1]")
    size = chunk(pixels.shape)
    parts = (pixels[start : start + size] for start in range(0, len(pixels), size))
    if pixels.dtype == np.uint8:
        if all(part.max() <= 1 for part in parts) and pixels.any():
            raise InputError(f"file '{path}' has uint8 pixels of 0 and 1 only; white is 255, multiply them by 255")
        return
    low, high = np.inf, -np.inf
    for part in parts:
        if not np.isfinite(part).all():
            raise InputError(f"file '{path}' has pixels that are NaN or infinite; all must lie in [0, 1]")
        low, high = min(low, float(part.min())), max(high, float(part.max()))
    if low < 0 or high > 1:
        advice = "; divide them by 255, or store them as uint8" if low >= 0 and high <= 255 else ""
        raise InputError(f"file '{path}' has pixels from {low:g} to {high:g}; float pixels must lie in [0, 1]{advice}")
