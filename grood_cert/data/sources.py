"""Which source is read by what, and the set that a spec names."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from grood_cert.data.arrays import numpy_file
from grood_cert.data.built_in import digits, noise, photo_patches
from grood_cert.data.images import Contents, ImageSet, Request, StoredImages, held, taken, to_channels
from grood_cert.data.pictures import folder, named_folder
from grood_cert.data.spec import FOLDERS, NOISE, SOURCES, TORCHVISION, is_array, name_of, parse_spec, split_class_list
from grood_cert.data.torchvision_sets import torchvision_set
from grood_cert.errors import InputError

LOADERS: dict[str, Callable[[Request], Contents]] = {
    "digits": digits,
    "photo-patches": photo_patches,
    **dict.fromkeys(NOISE, noise),
    **dict.fromkeys(TORCHVISION, torchvision_set),
    **dict.fromkeys(FOLDERS, named_folder),
}

_Shape = tuple[int, int, int]


def _loader(source: str) -> Callable[[Request], Contents]:
    place, _ = split_class_list(source)
    if source in LOADERS or place in FOLDERS:
        return LOADERS[place]
    if is_array(source):
        return numpy_file
    if place and Path(place).is_dir():
        return folder
    near = difflib.get_close_matches(source.lower(), SOURCES, n=1, cutoff=0.4)
    hint = f", did you mean '{near[0]}'?" if near else ";"
    raise InputError(
        f"there is no image set '{source}'{hint} sets are {', '.join(SOURCES)}, a .npy or .npz file "
        "and a folder of images"
    )


def load_set(
    spec: str,
    *,
    split: Literal["train", "test"] = "test",
    shape: _Shape | None = None,
    data_dir: Path | None = None,
    download: bool = False,
    seed: int = 0,
) -> ImageSet:
    """Load the images that ``spec`` names.

    Args:
        spec: ``SOURCE[:CLASSES]``, see `grood_cert.data`; the chosen classes are numbered 0, 1, ... in the order listed.
        split: Official split, where the source has one (the torchvision sets and ``imagenet``).
        shape: Channels (1 or 3), height and width the images must have. Grey and RGB are converted into each other;
            torchvision sets and folders are also fitted to height and width. 3x224x224 by default for folders with
            a class list, that of the source otherwise.
        data_dir: Root of the torchvision sets and of the named folders, ``data`` by default.
        download: Let torchvision download what is missing.
        seed: Seed of the noise sets and the photo patches.

    Returns:
        The set, of kind ``noise`` for noise sources and ``ood`` otherwise.

    Raises:
        InputError: The set is unknown, missing, empty or unreadable, lacks a class, or has wrong pixels or sizes.

    >>> digits = load_set("digits:8,9")
    >>> len(digits), digits.shape, digits.class_names
    (354, (1, 8, 8), ('8', '9'))
    """
    source, classes = parse_spec(spec)
    check_seed(seed)
    if shape is not None and (len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1):
        raise InputError(f"images of shape {tuple(shape)} cannot be made; it must be (1 or 3, height, width)")
    request = Request(source, split, shape, data_dir or Path("data"), download, seed)
    images, labels, class_names, files = _loader(source)(request)
    if classes is not None:
        missing = next((index for index in classes if index >= len(class_names)), None)
        if missing is not None:
            known = f"classes 0 to {len(class_names) - 1}" if len(class_names) > 1 else "class 0 only"
            raise InputError(f"class {missing} in '{spec}' is out of range: '{source}' has {known}")
        new = np.full(len(class_names), -1)
        new[list(classes)] = np.arange(len(classes))
        labels = new[labels]
        chosen = labels >= 0
        images, labels, files = images.take(chosen), labels[chosen], taken(files, chosen)
        class_names = tuple(class_names[index] for index in classes)
    if len(images) == 0:
        raise InputError(f"'{spec}' is empty: it names a set without images")
    if shape is not None:
        images = _to_shape(images, shape, name_of(spec))
    return ImageSet(
        name=name_of(spec),
        kind="noise" if source in NOISE else "ood",
        images=held(images),
        labels=torch.from_numpy(labels.astype(np.int64)),
        class_names=class_names,
        files=files,
    )


def check_seed(seed: int) -> None:
    """Refuse a negative seed."""
    if seed < 0:
        raise InputError(f"the seed must be 0 or positive, not {seed}")


def _to_shape(images: StoredImages, shape: _Shape, name: str) -> StoredImages:
    _, channels, height, width = images.shape
    if (height, width) != tuple(shape[1:]):
        raise InputError(
            f"'{name}' has images of {height}x{width}, the model expects {shape[1]}x{shape[2]}; resize them first"
        )
    return images if channels == shape[0] else images.map(lambda batch: to_channels(batch, shape[0]), shape)
