"""Images of one source: a tensor while they are small, read as they are indexed where they are not."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_T = TypeVar("_T")
Array = NDArray[Any]
Indices = Sequence[int] | Array | Tensor
IN_MEMORY = 2**30  # bytes of float32 up to which a set is held as a tensor
_CHUNK = 2**24  # numbers looked at together


class StoredImages:
    """Images that are read when they are indexed, from bytes, a mapped file or pictures.

    Stands for a float32 tensor of shape (N, C, H, W) wherever images are counted, indexed along the first axis, split or
    iterated over: ``images[3]``, ``images[10:20]`` and ``images[[4, 2]]`` are tensors. For anything else that tensors
    do, read first: ``images[:]``.

    Args:
        read: Images at positions of the source, float32 (M, C, H, W) with pixels in [0, 1].
        shape: Channels, height and width.
        positions: Which images of the source these are, in order.

    Example:
        >>> images = StoredImages(lambda at: torch.from_numpy(at / 10).reshape(-1, 1, 1, 1), (1, 1, 1), np.arange(10))
        >>> images.shape, images[[7, 2]].flatten().tolist(), len(images.take(slice(3)))
        (torch.Size([10, 1, 1, 1]), [0.7, 0.2], 3)
    """

    def __init__(self, read: Callable[[Array], Tensor], shape: tuple[int, int, int], positions: Array) -> None:
        self._read = read
        self._positions = positions
        self.shape = torch.Size((len(positions), *shape))

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int | slice | Indices) -> Tensor:
        chosen = self._positions[index if isinstance(index, int | slice) else as_index(index).numpy()]
        return self._read(chosen) if chosen.ndim else self._read(chosen[None])[0]

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.split(chunk(self.shape)):
            yield from batch

    def split(self, size: int) -> Iterator[Tensor]:
        """The images in batches of `size`."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def take(self, index: slice | Indices) -> StoredImages:
        """Those images, unread."""
        chosen = self._positions[index if isinstance(index, slice) else as_index(index).numpy()]
        return StoredImages(self._read, self._image_shape, chosen)

    def map(self, function: Callable[[Tensor], Tensor], shape: tuple[int, int, int]) -> StoredImages:
        """The images a function makes of these, a batch at a time, of the given shape."""
        return StoredImages(lambda positions: function(self._read(positions)), shape, self._positions)

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.shape
        return channels, height, width


def as_index(indices: Indices) -> Tensor:
    """Positions or a boolean mask as a tensor on the CPU."""
    chosen = torch.as_tensor(indices).cpu()
    return chosen if chosen.dtype == torch.bool else chosen.long()


def taken(values: tuple[_T, ...], indices: Indices) -> tuple[_T, ...]:
    """Those of the values; none of none.

    >>> taken(("a", "b", "c"), [2, 0]), taken((), [2, 0])
    (('c', 'a'), ())
    """
    if not values:
        return ()
    return tuple(values[index] for index in np.arange(len(values))[as_index(indices).numpy()])


def chunk(shape: Sequence[int]) -> int:
    """How many images of a set of shape (N, C, H, W) to look at together, for about 64 MB."""
    return max(1, _CHUNK // math.prod(shape[1:]))


def held(images: StoredImages) -> Tensor:
    """The images as a tensor if that takes a gigabyte or less; stored as they are, and used like a tensor, if more."""
    return images[:] if 4 * math.prod(images.shape) <= IN_MEMORY else cast(Tensor, images)


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Grey as RGB, or RGB as grey (ITU-R 601); images (N, C, H, W) that have the channels are left alone."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.repeat(1, 3, 1, 1)
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).clamp(0, 1)[:, None]


class Request(NamedTuple):
    """What a loader is asked for; see `grood_cert.data.load_set`. `split` is a name of the source's own, or ""."""

    source: str
    split: str
    shape: tuple[int, int, int] | None
    root: Path
    download: bool
    seed: int
    resize: bool | None


class Contents(NamedTuple):
    """All images of a source.

    Attributes:
        images: The images.
        labels: As in `ImageSet`.
        class_names: As in `ImageSet`.
        files: As in `ImageSet`.
        changes: What is done to each image as it is read, such as ("made grey from RGB",); empty: nothing to any.
        note: What else there is to say, such as what was left out.
    """

    images: StoredImages
    labels: Array
    class_names: tuple[str, ...]
    files: tuple[str, ...] = ()
    changes: tuple[tuple[str, ...], ...] = ()
    note: str = ""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one source.

    Attributes:
        name: Name as printed in tables, such as ``digits:8,9``.
        kind: ``id``, ``ood`` or ``noise``.
        images: float32 (N, C, H, W), pixels in [0, 1]; `StoredImages` in place of a tensor above a gigabyte.
        labels: int64 (N,), index into ``class_names``; 0 where the source has no labels.
        class_names: One name per class.
        files: Where the set is a folder of pictures, the path of each within it, such as ``cat/7.png``; empty otherwise.
        note: What was left out, converted or resized, in words; empty: nothing.
    """

    name: str
    kind: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    files: tuple[str, ...] = ()
    note: str = ""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def select(self, indices: Indices) -> ImageSet:
        """Return the images at ``indices`` (positions, or a boolean mask of length N), in that order."""
        chosen = as_index(indices)
        images: Tensor | StoredImages = self.images
        images = held(images.take(chosen)) if isinstance(images, StoredImages) else images[chosen]
        return replace(self, images=images, labels=self.labels[chosen], files=taken(self.files, chosen))

    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over all pixels, float64 (C,), in units of [0, 1]."""
        size = chunk(self.images.shape)
        pixels = self.images.shape.numel() // self.shape[0]
        mean, variance = torch.zeros(2, self.shape[0], dtype=torch.float64)
        for batch in self.images.split(size):
            mean += batch.double().sum((0, 2, 3)) / pixels
        for batch in self.images.split(size):
            variance += (batch.double() - mean.reshape(-1, 1, 1)).square().sum((0, 2, 3)) / pixels
        return mean, variance.sqrt()

    def content_hash(self) -> str:
        """Return the SHA-256, in hex, of shape, images (little-endian float32) and labels (little-endian int64)."""
        digest = hashlib.sha256(",".join(map(str, self.images.shape)).encode())
        for batch in self.images.split(chunk(self.images.shape)):
            digest.update(np.ascontiguousarray(batch.detach().cpu().numpy(), dtype="<f4").data)
        digest.update(np.ascontiguousarray(self.labels.detach().cpu().numpy(), dtype="<i8").data)
        return digest.hexdigest()

    def image_keys(self) -> list[bytes]:
        """Hash each image at 16 bits a pixel: equal 8-bit images agree, whichever float type they were stored in."""
        keys: list[bytes] = []
        for batch in self.images.split(chunk(self.images.shape)):
            levels = (batch * 65535).round().numpy().astype("<u2")
            keys.extend(hashlib.sha256(image.tobytes()).digest() for image in levels)
        return keys
