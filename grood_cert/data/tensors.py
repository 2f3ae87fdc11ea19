"""Image sets of the user's own: tensors, datasets and loaders of torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from grood_cert.data.images import ImageSet
from grood_cert.errors import InputError
from grood_cert.networks.checks import check_pixels

_BATCH = 256


def image_set(data: Any, name: str, kind: str) -> ImageSet:
    """Images, with labels where there are any, as one image set in memory.

    Args:
        data: A tensor of images (N, C, H, W) with pixels in [0, 1]; a pair of it and labels (N,); a `Dataset` of images
            or of (image, label, ...); or a `DataLoader` of batches of those, in a fixed order.
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
    except (TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"'{name}': expected tensors of images of one shape ({reason})") from error
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
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=_BATCH)
    raise InputError(
        f"'{name}': expected a tensor, (images, labels), a Dataset or a DataLoader, got {type(data).__name__}"
    )


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch; label 0 where it has none."""
    images, *others = batch if isinstance(batch, tuple | list) else (batch,)
    if not others:
        return images, torch.zeros(len(images), dtype=torch.int64)
    if not isinstance(others[0], Tensor) or others[0].is_floating_point():
        raise TypeError("what follows the images must be labels, a tensor of integers")
    return images, others[0]
