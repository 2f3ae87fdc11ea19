"""Image sets that need no download: digits, patches of photographs, noise."""

from __future__ import annotations

import functools
import importlib.util
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grood_cert.data.arrays import stored
from grood_cert.data.images import Array, Contents, Request, to_channels
from grood_cert.errors import InputError, RunError

PHOTO_PATCHES = 400
NOISE_IMAGES = 200
_SHAPE = (1, 8, 8)  # where none is asked for


def _of_scikit_learn(name: str) -> Path:
    """A file of its data sets. It is found without an import, which takes longer than to bound an image.

    Raises:
        RunError: If the installed version does not hold it there.
    """
    found = importlib.util.find_spec("sklearn")
    folders = (found.submodule_search_locations if found else None) or []
    for folder in folders:
        path = Path(folder, "datasets", name)
        if path.exists():
            return path
    raise RunError(f"scikit-learn as it is installed has no datasets/{name}; install the version of constraints.txt")


def digits(request: Request) -> Contents:
    """The 1797 digits of 8x8 pixels that scikit-learn holds."""
    del request
    rows = _digits()
    images = (rows[:, :-1].reshape(-1, *_SHAPE) / 16).astype(np.float32)
    return Contents(stored(images), rows[:, -1].astype(np.int64), tuple(str(digit) for digit in range(10)))


@functools.cache
def _digits() -> Array:
    """64 pixels from 0 to 16 and the class, one row a digit; read once, it is stored as text."""
    return np.loadtxt(_of_scikit_learn("data/digits.csv.gz"), delimiter=",")


def photo_patches(request: Request) -> Contents:
    """Patches that are cut at random, at 1 to 8 times the size, from two photographs; flat ones are left out."""
    from PIL import Image

    channels, height, width = request.shape or _SHAPE
    photos = []  # uint8, 427 x 640 x 3
    for name in ("china.jpg", "flower.jpg"):
        with Image.open(_of_scikit_learn(f"images/{name}")) as picture:
            photos.append(np.asarray(picture))
    rows, columns, _ = photos[0].shape
    scales = [scale for scale in (1, 2, 4, 8) if height * scale <= rows and width * scale <= columns]
    if not scales:
        raise InputError(f"'photo-patches' are cut from photographs of {rows}x{columns}; {height}x{width} is too large")
    rng = np.random.default_rng([request.seed, zlib.crc32(b"photo-patches")])
    patches: list[Tensor] = []
    while len(patches) < PHOTO_PATCHES:
        scale = scales[rng.integers(len(scales))]
        photo = photos[rng.integers(len(photos))]
        top, left = rng.integers(rows - height * scale + 1), rng.integers(columns - width * scale + 1)
        cut = photo[top : top + height * scale, left : left + width * scale]
        total = cut.reshape(height, scale, width, scale, 3).sum(axis=(1, 3), dtype=np.int64)
        patch = torch.from_numpy((total / (scale * scale * 255)).astype(np.float32)).movedim(-1, 0)[None]
        flat = height * width > 1 and to_channels(patch, 1).std(correction=0) < 0.02
        if not flat:
            patches.append(to_channels(patch, channels))
    labels = np.zeros(PHOTO_PATCHES, dtype=np.int64)
    return Contents(stored(torch.cat(patches).numpy()), labels, ("photo-patches",))


def noise(request: Request) -> Contents:
    """Uniform noise, Gaussian noise about grey, or uniform noise smoothed over an eighth of the image."""
    source, shape = request.source, request.shape or _SHAPE
    rng = np.random.default_rng([request.seed, zlib.crc32(source.encode())])
    size = (NOISE_IMAGES, *shape)
    if source == "gaussian-noise":
        images = np.clip(0.5 + 0.25 * rng.standard_normal(size), 0, 1)
    else:
        images = rng.random(size)
    if source == "smooth-noise":
        from scipy.ndimage import gaussian_filter

        images = gaussian_filter(images, sigma=(0, 0, shape[1] / 8, shape[2] / 8), mode="wrap")
        images -= images.min(axis=(1, 2, 3), keepdims=True)
        images /= np.maximum(images.max(axis=(1, 2, 3), keepdims=True), 1e-12)
    return Contents(stored(images.astype(np.float32)), np.zeros(NOISE_IMAGES, dtype=np.int64), (source,))
