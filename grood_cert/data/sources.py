"""Which source is read by what, and the set that a spec names."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from grood_cert.data.arrays import array_splits, numpy_file
from grood_cert.data.built_in import digits, noise, photo_patches
from grood_cert.data.folders import (
    folder,
    folder_splits,
    imagenet_splits,
    is_folder,
    is_picture,
    named_folder,
    picture,
    picture_files,
)
from grood_cert.data.hugging_face import hugging_face, hugging_face_splits, is_hugging_face
from grood_cert.data.idx import idx_file, idx_splits, is_idx
from grood_cert.data.images import Contents, ImageSet, Request, StoredImages, held, taken, to_channels
from grood_cert.data.pictures import ASK, SUFFIXES, fitted
from grood_cert.data.spec import FOLDERS, NOISE, SOURCES, TORCHVISION, is_array, name_of, parse_spec, split_class_list
from grood_cert.data.splits import Part, chosen
from grood_cert.data.torchvision_sets import torchvision_set, torchvision_splits
from grood_cert.data.webdataset import is_tar, webdataset
from grood_cert.errors import InputError


class Loader(NamedTuple):
    """A kind of source.

    Attributes:
        reads: Whether a source is of this kind.
        load: Reads it.
        splits: The splits it comes with, by the part each plays.
    """

    reads: Callable[[str], bool]
    load: Callable[[Request], Contents]
    splits: Callable[[Request], Mapping[Part, str]] = lambda request: {}


def _named(*names: str) -> Callable[[str], bool]:
    return lambda source: source in names


LOADERS = (
    Loader(_named("digits"), digits),
    Loader(_named("photo-patches"), photo_patches),
    Loader(_named(*NOISE), noise),
    Loader(_named(*TORCHVISION), torchvision_set, torchvision_splits),
    Loader(lambda source: split_class_list(source)[0] == "imagenet", named_folder, imagenet_splits),
    Loader(lambda source: split_class_list(source)[0] in FOLDERS, named_folder),
    Loader(is_hugging_face, hugging_face, hugging_face_splits),
    Loader(is_array, numpy_file, array_splits),
    Loader(is_tar, webdataset),
    Loader(is_idx, idx_file, idx_splits),
    Loader(is_picture, picture),
    Loader(is_folder, folder, folder_splits),
)

_Shape = tuple[int, int, int]


def _loader(source: str) -> Loader:
    found = next((loader for loader in LOADERS if loader.reads(source)), None)
    if found:
        return found
    if Path(source).is_file():
        raise InputError(
            f"file '{source}' is of a kind that is not read; pictures end in {', '.join(SUFFIXES)}, arrays in .npy and "
            ".npz, webdataset in .tar"
        )
    near = difflib.get_close_matches(source.lower(), SOURCES, n=1, cutoff=0.4)
    hint = f", did you mean '{near[0]}'?" if near else ";"
    raise InputError(
        f"there is no image set '{source}'{hint} sets are {', '.join(SOURCES)}, a .npy or .npz file, a .tar of "
        "webdataset, MNIST's idx files, hf:FOLDER and a folder of images"
    )


def splits_of(spec: str, data_dir: Path | None = None) -> Mapping[Part, str]:
    """The splits that a source comes with, by the part that each plays; empty where it has none.

    >>> splits_of("mnist"), splits_of("digits")
    ({'train': 'train', 'test': 'test'}, {})
    """
    source, _ = parse_spec(spec)
    return _loader(source).splits(Request(source, "", None, data_dir or Path("data"), False, 0, None))


def load_set(
    spec: str,
    *,
    split: Part = "test",
    shape: _Shape | None = None,
    data_dir: Path | None = None,
    download: bool = False,
    seed: int = 0,
    resize: bool | None = None,
) -> ImageSet:
    """Load the images that ``spec`` names.

    Args:
        spec: ``SOURCE[:CLASSES]``, see `grood_cert.data`; the chosen classes are numbered 0, 1, ... in the order listed.
        split: The part that the images play, where the source comes with splits: "train", "calibration" or "test".
        shape: Channels (1 or 3), height and width the images must have. Grey and RGB are converted into each other.
            3x224x224 by default for folders with a class list, that of the source otherwise.
        data_dir: Root of the torchvision sets and of the named folders, ``data`` by default.
        download: Let torchvision download what is missing.
        seed: Seed of the noise sets and the photo patches.
        resize: Whether images are fitted to the height and width of the shape; None: torchvision sets and encoded
            pictures are, arrays of another size are refused.

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
    loader = _loader(source)
    request = Request(source, "", shape, data_dir or Path("data"), download, seed, resize)
    request = request._replace(split=chosen(loader.splits(request), split))
    images, labels, class_names, files, changes, said_of = loader.load(request)
    if classes is not None:
        missing = next((index for index in classes if index >= len(class_names)), None)
        if missing is not None:
            known = f"classes 0 to {len(class_names) - 1}" if len(class_names) > 1 else "class 0 only"
            raise InputError(f"class {missing} in '{spec}' is out of range: '{source}' has {known}")
        new = np.full(len(class_names), -1)
        new[list(classes)] = np.arange(len(classes))
        labels = new[labels]
        kept = labels >= 0
        images, labels, files, changes = images.take(kept), labels[kept], taken(files, kept), taken(changes, kept)
        class_names = tuple(class_names[index] for index in classes)
    if len(images) == 0:
        raise InputError(f"'{spec}' is empty: it names a set without images")
    contents = Contents(images, labels, class_names, files, changes, said_of)
    return _image_set(contents, name_of(spec), "noise" if source in NOISE else "ood", shape, resize)


def load_pictures(files: Sequence[str], *, shape: _Shape | None = None, resize: bool | None = None) -> ImageSet:
    """Load some picture files as one set, called "pictures"; see `load_set`.

    Raises:
        InputError: A file is missing or unreadable, or has another size than it must.
    """
    contents = picture_files(files, Request("", "", shape, Path(), False, 0, resize))
    return _image_set(contents, "pictures", "ood", shape, resize)


def _image_set(contents: Contents, name: str, kind: str, shape: _Shape | None, resize: bool | None) -> ImageSet:
    """The contents in a shape, with a note on what is done to them."""
    images = contents.images
    counts = Counter(word for words in contents.changes for word in words)
    if shape is not None:
        images, words = _to_shape(images, shape, name, resize)
        counts.update(dict.fromkeys(words, len(images)))
    noted = [f"{count} of {len(images)} images {word}" for word, count in counts.items()]
    return ImageSet(
        name=name,
        kind=kind,
        images=held(images),
        labels=torch.from_numpy(contents.labels.astype(np.int64)),
        class_names=contents.class_names,
        files=contents.files,
        note="; ".join([*noted, contents.note] if contents.note else noted),
    )


def check_seed(seed: int) -> None:
    """Refuse a negative seed."""
    if seed < 0:
        raise InputError(f"the seed must be 0 or positive, not {seed}")


def _to_shape(images: StoredImages, shape: _Shape, name: str, resize: bool | None) -> tuple[StoredImages, list[str]]:
    """The images in a shape, and what is done to each."""
    _, channels, height, width = images.shape
    words = []
    if channels != shape[0]:
        images = images.map(lambda batch: to_channels(batch, shape[0]), (shape[0], height, width))
        words.append("made RGB from grey" if shape[0] == 3 else "made grey from RGB")
    if (height, width) != tuple(shape[1:]):
        if not resize:
            raise InputError(
                f"'{name}' has images of {height}x{width}, the model expects {shape[1]}x{shape[2]}; resize them first"
                + (ASK if resize is False else "")
            )
        images = images.map(lambda batch: fitted(batch, shape), shape)
        words.append(f"fitted to {shape[1]}x{shape[2]}")
    return images, words
