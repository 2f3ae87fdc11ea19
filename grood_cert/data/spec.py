"""The names of image sets: what a spec may say, and what it means."""

from __future__ import annotations

import os
import re
from pathlib import Path

from grood_cert.errors import InputError

NOISE = ("uniform-noise", "gaussian-noise", "smooth-noise")
TORCHVISION = {  # source: (class in torchvision.datasets, what of it lies in the data folder)
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw"),
    "emnist-letters": ("EMNIST", "EMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "svhn": ("SVHN", "{split}_32x32.mat"),
    "dtd": ("DTD", "dtd/dtd"),
}
FOLDERS = {  # source: folder of pictures in the data folder
    "lsun-c": "LSUN",
    "lsun-r": "LSUN_resize",
    "isun": "iSUN",
    "places365": "places365",
    "inaturalist": "iNaturalist",
    "sun": "SUN",
    "imagenet": "imagenet",
}
SOURCES = ("digits", "photo-patches", *NOISE, *TORCHVISION, *FOLDERS)
_LISTS = Path(__file__).parent / "class_lists"


def parse_spec(spec: str) -> tuple[str, tuple[int, ...] | None]:
    """Split a set spec into its source and its classes (None: all).

    Raises:
        InputError: The class list is malformed or names a class twice.

    >>> parse_spec("digits:0-2,7")
    ('digits', (0, 1, 2, 7))
    >>> parse_spec("mnist"), parse_spec("hf:10"), parse_spec("hf:10:0,1")
    (('mnist', None), ('hf:10', None), ('hf:10', (0, 1)))
    """
    match = re.fullmatch(r"(?!hf:[^:]*$)(.+):([0-9][0-9,\-]*)", spec, re.DOTALL)
    if match is None:
        head, colon, tail = spec.rpartition(":")
        if colon and (head in SOURCES or is_array(head)):
            raise InputError(f"'{tail}' in '{spec}' is not a class list; write it like {head}:0-5 or {head}:6,7")
        return spec, None
    source, tail = match.groups()
    classes: list[int] = []
    for item in tail.split(","):
        bounds = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", item)
        if bounds is None:
            raise InputError(f"'{tail}' in '{spec}' is not a class list; write it like {source}:0-5 or {source}:6,7")
        first, last = int(bounds[1]), int(bounds[2] or bounds[1])
        if last < first:
            raise InputError(f"the class range {item} in '{spec}' runs backwards; write {last}-{first}")
        classes.extend(range(first, last + 1))
    if len(set(classes)) < len(classes):
        twice = next(index for index in classes if classes.count(index) > 1)
        raise InputError(f"class {twice} is listed twice in '{spec}'; list each class once")
    return source, tuple(classes)


def split_class_list(source: str) -> tuple[str, str]:
    """Split ``FOLDER@LIST`` into folder and list; the list is empty where a source has none.

    >>> split_class_list("imagenet@!imagenet-10")
    ('imagenet', '!imagenet-10')
    >>> split_class_list("mnist")
    ('mnist', '')
    """
    folder, at, names = source.rpartition("@")
    return (folder, names) if at and folder and names and not Path(source).exists() else (source, "")


def read_class_list(name: str) -> list[str]:
    """The class folders that a list names, in its order.

    Args:
        name: A list of this package, such as ``imagenet-10``, or the path of a text file: one folder a line, empty lines
            and lines that begin with # are passed over.

    Raises:
        InputError: The list is missing, unreadable, empty, or names a class twice.

    >>> read_class_list("imagenet-10")[0]
    'n02396427'
    """
    own = _LISTS / f"{name}.txt"
    path = own if own.is_file() and own.parent == _LISTS else Path(name)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(entry.stem for entry in _LISTS.glob("*.txt")))
        raise InputError(
            f"class list '{name}' cannot be read ({getattr(error, 'strerror', None) or error}); "
            f"give a text file with one class folder a line, or one of {known}"
        ) from error
    names = [line for line in lines if line and not line.startswith("#")]
    twice = next((entry for entry in names if names.count(entry) > 1), None)
    if twice is not None:
        raise InputError(f"class list '{name}' names {twice} twice; list each class once")
    if not names:
        raise InputError(f"class list '{name}' is empty; give one class folder a line")
    return names


def is_array(source: str) -> bool:
    """Whether a source is a numpy file, by its name."""
    return source.lower().endswith((".npy", ".npz"))


def name_of(spec: str) -> str:
    """The name of a set in tables: the spec, without the folders of a path.

    >>> name_of("some/folder/images.npz:0,1"), name_of("some/train@!lists/ten.txt"), name_of("mnist:3")
    ('images.npz:0,1', 'train@!ten.txt', 'mnist:3')
    """
    source, classes = parse_spec(spec)
    folder, names = split_class_list(source)
    tail = spec[len(source) :] if classes is not None else ""
    kept = folder if folder in SOURCES else os.path.basename(os.path.abspath(folder))
    if not names:
        return kept + tail
    others = "!" * names.startswith("!")
    return f"{kept}@{others}{os.path.basename(names.removeprefix('!'))}{tail}"
