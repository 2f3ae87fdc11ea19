"""Encoded pictures (PNG, JPEG, ...): looked over when a set is loaded, decoded when they are indexed.

Pictures are fitted to the shape asked for as the OOD literature does: resized, keeping their aspect, until they cover it
(for 224x224 and more until they cover 8/7 of it: "resize 256, crop 224"), then cropped in the centre. A picture of the
right size is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grood_cert.data import images as storage
from grood_cert.data.images import Array, StoredImages, to_channels
from grood_cert.errors import InputError, said

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
ASK = ", or ask for it (--resize, or resize=True)"
_LARGE = 224
_MARGIN = 256 / 224
_GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")
_MODES = {
    "1": "black and white",
    "LA": "grey with transparency",
    "P": "a palette",
    "PA": "a palette",
    "I": "32-bit grey",
    "I;16": "16-bit grey",
    "I;16B": "16-bit grey",
    "I;16L": "16-bit grey",
    "F": "float grey",
    "L": "grey",
}

_Shape = tuple[int, int, int]
Fit = Callable[[Any, int, int], Any]


class Pictures(NamedTuple):
    """Pictures of one source.

    Attributes:
        open: The file of a picture, by its number: a path, or a binary file.
        names: What messages call each.
        source: What messages call them together.
    """

    open: Callable[[int], Any]
    names: Sequence[str]
    source: str


def survey(pictures: Pictures, shape: _Shape | None, resize: bool | None) -> tuple[_Shape, tuple[tuple[str, ...], ...]]:
    """Look every picture over.

    Args:
        pictures: One or more.
        shape: The shape they shall have; None: that which all have, grey if all are.
        resize: False: pictures of another size are refused.

    Returns:
        The shape, and what is done to each picture.

    Raises:
        InputError: If pictures are unreadable, or their sizes differ where none is asked for or kept.
    """
    small = shape is None or 4 * len(pictures.names) * math.prod(shape) <= storage.IN_MEMORY
    found: list[tuple[str, int, int]] = []
    broken = []
    for number in range(len(pictures.names)):
        try:
            found.append(_looked_at(pictures, number, small))
        except InputError as error:
            broken.append(str(error))
    if not found:
        first = f" ({broken[0]})" if broken else ""
        raise InputError(f"{pictures.source} is empty: it holds no readable image{first}")
    if broken:
        raise InputError(f"{pictures.source} has {len(broken)} unreadable images, the first {broken[0]}; remove them")
    if shape is None:
        grey = all(mode in _GREY for mode, _, _ in found)
        _, height, width = found[0]
        other = next((number for number, seen in enumerate(found) if seen[1:] != (height, width)), None)
        if other is not None:
            raise InputError(
                f"{pictures.source} holds images of different sizes: '{pictures.names[other]}' is "
                f"{found[other][1]}x{found[other][2]}, '{pictures.names[0]}' {height}x{width}; resize them first"
            )
        shape = (1 if grey else 3, height, width)
    channels, height, width = shape
    target = "grey" if channels == 1 else "RGB"
    changes = []
    for (mode, *size), name in zip(found, pictures.names, strict=True):
        words: tuple[str, ...] = (
            () if mode == ("L" if channels == 1 else "RGB") else (f"made {target} from {_MODES.get(mode, mode)}",)
        )
        if size != [height, width]:
            if resize is False:
                raise InputError(
                    f"image '{name}' is {size[0]}x{size[1]}, the model expects {height}x{width}; resize it first{ASK}"
                )
            words += (f"fitted to {height}x{width}",)
        changes.append(words)
    return shape, tuple(changes)


def _looked_at(pictures: Pictures, number: int, decode: bool) -> tuple[str, int, int]:
    """Mode, height and width of a picture."""
    from PIL import Image

    try:
        with Image.open(pictures.open(number)) as opened:
            if decode:
                opened.load()
            return opened.mode, opened.height, opened.width
    except Exception as error:  # PIL raises a dozen kinds on damaged and on huge pictures
        raise InputError(f"'{pictures.names[number]}': {said(error)}") from error


def stored_pictures(pictures: Pictures, shape: _Shape, fit: Fit) -> StoredImages:
    """Pictures decoded when they are indexed, some at a time."""
    channels, height, width = shape

    def read_one(number: int) -> Array:
        from PIL import Image

        try:
            with Image.open(pictures.open(number)) as opened:
                picture = fit(converted(opened, "L" if channels == 1 else "RGB"), height, width)
            return np.asarray(picture).reshape(height, width, channels)
        except Exception as error:  # PIL raises a dozen kinds on damaged and on huge pictures
            raise InputError(f"picture '{pictures.names[number]}' cannot be used: {said(error)}") from error

    def read(positions: Array) -> Tensor:
        pixels = np.empty((len(positions), height, width, channels), dtype=np.uint8)
        with ThreadPoolExecutor() as threads:
            for index, picture in enumerate(threads.map(read_one, positions.tolist())):
                pixels[index] = picture
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255))

    return StoredImages(read, shape, np.arange(len(pictures.names)))


def converted(picture: Any, mode: str | None = None) -> Any:
    """A PIL picture in a mode, "L" or "RGB" (None: which of them it is); 16-bit grey is reduced to 8 bits.

    PIL alone would clip 16 bits.
    """
    from PIL import Image

    mode = mode or ("L" if picture.mode in _GREY else "RGB")
    if picture.mode.startswith("I"):
        grey = np.clip(np.asarray(picture, dtype=np.float64) / 257, 0, 255)
        return Image.fromarray(np.round(grey).astype(np.uint8)).convert(mode)
    return picture.convert(mode)


def cover(image: Any, height: int, width: int) -> Any:
    """Resize a tensor or PIL picture, keeping its aspect, until it covers height x width; then crop the centre."""
    from torchvision.transforms import functional

    _, rows, columns = functional.get_dimensions(image)
    if (rows, columns) == (height, width):
        return image
    margin = _MARGIN if min(height, width) >= _LARGE else 1.0
    scale = max(height / rows, width / columns) * margin
    size = [max(height, round(rows * scale)), max(width, round(columns * scale))]
    return functional.center_crop(functional.resize(image, size, antialias=True), [height, width])


def fitted(images: Tensor, shape: _Shape) -> Tensor:
    """Images (N, C, H, W) with pixels in [0, 1] that cover a shape, cropped in the centre."""
    channels, height, width = shape
    resized: Tensor = cover(to_channels(images, channels), height, width)
    return resized.clamp(0, 1)
