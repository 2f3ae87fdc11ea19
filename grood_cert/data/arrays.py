"""Images of arrays, and of numpy files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grood_cert.data.images import Array, Contents, Request, StoredImages, chunk
from grood_cert.errors import InputError, said

_MAX_CLASSES = 100_000


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


def numpy_file(request: Request) -> Contents:
    """The images of a ``.npy`` or ``.npz`` file, mapped where that can be."""
    path = Path(request.source)
    if not path.is_file():
        raise InputError(f"file '{path}' does not exist; give the path of a .npy or .npz file")
    pixels, labels, keys = None, None, ""
    try:
        with path.open("rb") as file:
            if file.read(2) == b"PK":  # a zip file; its arrays cannot be mapped
                file.seek(0)
                with np.load(file, allow_pickle=False) as archive:
                    pixels = next((archive[key] for key in ("images", "x", "data") if key in archive.files), None)
                    labels = next((archive[key] for key in ("labels", "y") if key in archive.files), None)
                    keys = ", ".join(archive.files) or "nothing"
            else:
                pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds on a damaged file
        raise InputError(f"file '{path}' cannot be read as numpy images without pickles: {said(error)}") from error
    if pixels is None:
        raise InputError(
            f"file '{path}' holds {keys}; it must hold 'images' (or 'x', 'data') and may hold 'labels' (or 'y')"
        )
    pixels = to_nchw(pixels, str(path))
    _check_pixels(pixels, path)
    images = stored(pixels)
    if labels is None:
        return Contents(images, np.zeros(len(images), dtype=np.int64), (path.name,))
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise InputError(
            f"labels of '{path}' are {labels.dtype} of shape {labels.shape}; "
            f"they must be integers of shape ({len(images)},)"
        )
    if labels.min() < 0 or labels.max() >= _MAX_CLASSES:
        raise InputError(
            f"labels of '{path}' run from {labels.min()} to {labels.max()}; they must be class indices counted from 0"
        )
    labels = labels.astype(np.int64)
    return Contents(images, labels, tuple(str(index) for index in range(int(labels.max()) + 1)))


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
