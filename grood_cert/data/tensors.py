"""Image sets of the user's own: tensors, datasets and loaders of torch, data sets of the package ``datasets``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from grood_cert.data.images import ImageSet
from grood_cert.errors import InputError, said
from grood_cert.networks.checks import check_pixels

_IMAGES = ("image", "img", "images", "pixel_values", "x")
_LABELS = ("label", "labels", "fine_label", "target", "y")
_BATCH = 256


def image_set(data: Any, name: str, kind: str) -> ImageSet:
    """Images, with labels where there are any, as one image set in memory.

    Args:
        data: A tensor of images (N, C, H, W), uint8 or with pixels in [0, 1]; a pair of it and labels (N,); a `Dataset`
            of images, of (image, label, ...) or of {"image": image, "label": label}, where an image is a tensor (C, H, W)
            or a PIL picture; a data set of Hugging Face's ``datasets``; or a `DataLoader` of batches of those, in a
            fixed order.
        name: Name of the set.
        kind: ``id``, ``ood`` or ``noise``.

    Raises:
        InputError: If it is something else, or is no set of such images.

    Example:
        >>> images = image_set((torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1])), "mine", "id")
        >>> len(images), images.shape, images.class_names
        (3, (1, 2, 2), ('0', '1'))
    """
    try:
        batches = [_pair(batch) for batch in _batches(data, name)]
        images = torch.cat([images for images, _ in batches])
        labels = torch.cat([labels for _, labels in batches])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = said(error)[:120]
        raise InputError(f"'{name}': expected tensors of images of one shape ({reason})") from error
    if images.dtype == torch.uint8:
        if len(images) and 0 < int(images.max()) <= 1:
            raise InputError(f"'{name}': uint8 pixels of 0 and 1 only; white is 255, multiply them by 255")
        images = images / 255
    check_pixels(images, name=f"'{name}'")
    if labels.shape != images.shape[:1] or int(labels.min()) < 0:
        raise InputError(f"'{name}': expected one label a sample, 0 or more, got shape {tuple(labels.shape)}")
    classes = tuple(str(number) for number in range(int(labels.max()) + 1))
    return ImageSet(name, kind, images.detach().cpu().float(), labels.cpu().long(), classes)


def _batches(data: Any, name: str) -> Iterable[Any]:
    if isinstance(data, Tensor) or _is_pair(data):
        return [data]
    if isinstance(data, DataLoader):
        if not isinstance(data.sampler, SequentialSampler) or type(data.batch_sampler) is not BatchSampler:
            raise InputError(f"'{name}': the loader shuffles; give shuffle=False, so that rows name the same images")
        if data.drop_last:
            raise InputError(f"'{name}': the loader drops images; give drop_last=False")
        return data
    if isinstance(data, Dataset) or _is_table(data):
        return DataLoader(data, batch_size=_BATCH, collate_fn=_collated)
    raise InputError(
        f"'{name}': expected a tensor, (images, labels), a Dataset or a DataLoader, got {type(data).__name__}"
        + (f"; give one of {', '.join(map(str, data))}" if isinstance(data, Mapping) and data else "")
    )


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)


def _is_table(data: Any) -> bool:
    """Whether it is a data set of Hugging Face's ``datasets``, which is no `Dataset` of torch."""
    return not isinstance(data, Mapping) and hasattr(data, "column_names") and hasattr(data, "features")


def _collated(items: Sequence[Any]) -> tuple[Tensor, ...]:
    """Images, and labels where there are any, of some items of a data set."""
    parts = [_parts(item) for item in items]
    images = torch.stack([_image(image) for image, _ in parts])
    labels = [label for _, label in parts]
    if all(label is None for label in labels):
        return (images,)
    if any(label is None or isinstance(label, float) for label in labels):
        raise TypeError("what follows the images must be labels, one whole number each")
    return images, torch.as_tensor(labels)


def _parts(item: Any) -> tuple[Any, Any]:
    """Image and label of an item, or of a batch; label None where there is none."""
    if isinstance(item, Mapping):
        image, label = (next((item[key] for key in keys if key in item), None) for keys in (_IMAGES, _LABELS))
        if image is None:
            raise TypeError(f"no {', '.join(_IMAGES)} among {', '.join(map(str, item))}")
        return image, label
    if isinstance(item, tuple | list):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _image(image: Any) -> Tensor:
    """An image as a tensor (C, H, W); uint8 for a PIL picture."""
    if isinstance(image, Tensor):
        return image
    if hasattr(image, "getbands"):
        from grood_cert.data.pictures import converted

        pixels = np.array(converted(image))
        return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())
    raise TypeError(f"an image must be a tensor or a PIL picture, got {type(image).__name__}")


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch; label 0 where it has none."""
    images, labels = _parts(batch)
    if labels is None:
        return images, torch.zeros(len(images), dtype=torch.int64)
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise TypeError("what follows the images must be labels, a tensor of integers")
    return images, labels
