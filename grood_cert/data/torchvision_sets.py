"""Image sets that torchvision reads."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from grood_cert.data.arrays import stored, to_nchw
from grood_cert.data.images import Contents, Request
from grood_cert.data.pictures import Pictures, cover, fitted, stored_pictures, survey
from grood_cert.data.spec import TORCHVISION
from grood_cert.data.splits import Part
from grood_cert.errors import InputError, said


def torchvision_splits(request: Request) -> dict[Part, str]:
    """Train and test."""
    del request
    return {"train": "train", "test": "test"}


def torchvision_set(request: Request) -> Contents:
    """The images of a split, fitted to height and width."""
    from torchvision import datasets

    source, split, shape, root, download = request[:5]
    class_name, marker = TORCHVISION[source]
    build = getattr(datasets, class_name)
    which: dict[str, Any] = {"split": split} if source in ("svhn", "dtd") else {"train": split == "train"}
    if source == "emnist-letters":
        which["split"] = "letters"

    def read(download: bool) -> Any:
        with warnings.catch_warnings():  # numpy >= 2.4 on the way the CIFAR files were pickled
            warnings.filterwarnings("ignore", r"dtype\(\): align should be", np.exceptions.VisibleDeprecationWarning)
            return build(root, download=download, **which)

    try:
        data = read(download=False)
    except Exception as error:  # whatever torchvision raises here is about the files below root
        if not (isinstance(error, RuntimeError) and "not found" in str(error)):
            raise InputError(f"data set '{source}' in '{root}' cannot be read: {said(error)}") from error
        if not download:
            advice = "add --download, or point --data-dir at the folder that holds it"
            state = "incomplete or damaged in" if (root / marker.format(split=split)).exists() else "not in"
            raise InputError(f"data set '{source}' is {state} '{root}'; {advice}") from error
        try:
            data = read(download=True)
        except Exception as cause:
            raise InputError(f"data set '{source}' could not be downloaded to '{root}': {said(cause)}") from cause
    changes: tuple[tuple[str, ...], ...] = ()
    if source == "dtd":
        labels, files = data._labels, data._image_files
        textures = Pictures(files.__getitem__, list(map(str, files)), f"data set '{source}' in '{root}'")
        shape, changes = survey(textures, shape or (3, 32, 32), request.resize)
        images = stored_pictures(textures, shape, cover)
    else:
        labels = data.labels if source == "svhn" else data.targets
        pixels = to_nchw(np.asarray(data.data), source)
        images = stored(pixels.swapaxes(2, 3) if source == "emnist-letters" else pixels)  # its files lie on their side
    labels = np.asarray(labels, dtype=np.int64)
    names = tuple(getattr(data, "classes", None) or map(str, range(10)))
    if source == "emnist-letters":  # counted from 1
        labels, names = labels - 1, names[1:]
    if labels.min() < 0 or labels.max() >= len(names):
        raise InputError(
            f"data set '{source}' in '{root}' has labels from {labels.min()} to {labels.max()} for {len(names)} classes"
        )
    if shape is not None and request.resize is not False and images.shape[2:] != tuple(shape[1:]):
        made = (f"made {'grey from RGB' if shape[0] == 1 else 'RGB from grey'}",) * (images.shape[1] != shape[0])
        changes = ((*made, f"fitted to {shape[1]}x{shape[2]}"),) * len(labels)
        images = images.map(lambda batch: fitted(batch, shape), shape)
    return Contents(images, labels, names, changes=changes)
