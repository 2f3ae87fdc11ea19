"""Folders of pictures, and single picture files.

A folder holds pictures, or one folder a class, or splits: folders called train, val, test or the like, each with one of
the two in it. ``lsun-c`` is only cropped, all others are resized and cropped (`grood_cert.data.pictures`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grood_cert.data.images import Contents, Request
from grood_cert.data.pictures import SUFFIXES, Fit, Pictures, cover, stored_pictures, survey
from grood_cert.data.spec import FOLDERS, read_class_list, split_class_list
from grood_cert.data.splits import Part, is_split, parts_of
from grood_cert.errors import InputError

_IMAGENET = (3, 224, 224)
_OTHERS = 3  # folders beside the splits that are named


def is_picture(source: str) -> bool:
    """Whether a source is a picture file."""
    return source.lower().endswith(SUFFIXES) and not Path(source).is_dir()


def is_folder(source: str) -> bool:
    """Whether a source is a folder, perhaps with a class list."""
    place, _ = split_class_list(source)
    return bool(place) and Path(place).is_dir()


def picture(request: Request) -> Contents:
    """A picture file, as a set of one image."""
    return picture_files([request.source], request)


def picture_files(files: Sequence[str], request: Request) -> Contents:
    """Some picture files, under the names they are given by."""
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"picture '{file}' does not exist")
    return _pictures(files, files, "the pictures" if len(files) > 1 else f"picture '{files[0]}'", request, cover)


def imagenet_splits(request: Request) -> dict[Part, str]:
    """Train and val; val is the test."""
    del request
    return {"train": "train", "test": "val"}


def named_folder(request: Request) -> Contents:
    """The pictures of a folder of the OOD literature, below the data folder."""
    source, class_list = split_class_list(request.source)
    path = request.root / FOLDERS[source] / request.split
    if not path.is_dir():
        raise InputError(
            f"data set '{source}' is not in '{request.root}': there is no folder '{path}' of pictures; put or link it "
            "there, or point --data-dir at the folder that holds it (--download cannot fetch this one)"
        )
    return _classes(path, _folders(path), class_list, request, _crop if source == "lsun-c" else cover)


def folder_splits(request: Request) -> dict[Part, str]:
    """The splits of a folder: two or more of the names that splits have, or one that is alone in it."""
    path, _ = split_class_list(request.source)
    names = _folders(Path(path))
    found = [name for name in names if is_split(name)]
    return parts_of(found, path) if len(found) > 1 or found == names else {}


def folder(request: Request) -> Contents:
    """The pictures of any folder, or of one of its splits; classes are numbered as in the train split."""
    place, class_list = split_class_list(request.source)
    path = Path(place) / request.split
    names = _folders(path)
    if not request.split:
        return _classes(path, names, class_list, request, cover)
    first = _folders(Path(place) / folder_splits(request)["train"]) if "train" in folder_splits(request) else []
    names = [*first, *(name for name in names if name not in first)] if names else []
    found = _classes(path, names, class_list, request, cover)
    found = found._replace(files=tuple(f"{request.split}/{file}" for file in found.files))
    others = [name for name in _folders(Path(place)) if not is_split(name)]
    if not others:
        return found
    beside = ", ".join(others[:_OTHERS]) + (", ..." if len(others) > _OTHERS else "")
    return found._replace(note="; ".join(filter(None, (found.note, f"beside its splits, unused: {beside}"))))


def _folders(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"folder '{path}' cannot be read: {error.strerror}") from error


def _classes(path: Path, class_names: Sequence[str], class_list: str, request: Request, fit: Fit) -> Contents:
    """The pictures of a folder with these class folders; without any, those that lie in it."""
    loose = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
    pictures = [entry for entry in loose if entry.name.lower().endswith(SUFFIXES)]
    if class_list:
        class_names = _listed(path, class_names, class_list)
        request = request._replace(shape=request.shape or _IMAGENET)
    elif class_names and pictures:
        raise InputError(
            f"folder '{path}' holds both sub-folders and loose images such as '{pictures[0].name}'; "
            "give one folder per class, or images alone"
        )
    if not class_names:
        return _contents(loose, path, [0] * len(loose), (path.name,), request, fit)
    files, labels = [], []
    for label, name in enumerate(class_names):
        for file in _walk(path / name):
            files.append(file)
            labels.append(label)
    return _contents(files, path, labels, tuple(class_names), request, fit)


def _walk(path: Path) -> Iterator[Path]:
    """All files below a folder, hidden ones excepted, in order; links are followed, but not back to where they lie in."""
    found: list[tuple[str, list[str]]] = []
    above: dict[str, frozenset[tuple[int, int]]] = {}
    for place, folders, names in os.walk(path, followlinks=True):
        status = os.stat(place)
        own, outer = (status.st_dev, status.st_ino), above.get(os.path.dirname(place), frozenset())
        if own in outer:
            folders.clear()
            continue
        above[place] = outer | {own}
        found.append((place, names))
    for place, names in sorted(found):
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _listed(path: Path, present: Sequence[str], class_list: str) -> tuple[str, ...]:
    names = read_class_list(class_list.removeprefix("!"))
    absent = [name for name in names if name not in present]
    if absent:
        raise InputError(
            f"folder '{path}' has no class folder {absent[0]}, which the list '{class_list.removeprefix('!')}' names"
            + (f", nor {len(absent) - 1} others" if len(absent) > 1 else "")
        )
    if not class_list.startswith("!"):
        return tuple(names)
    others = tuple(name for name in present if name not in set(names))
    if not others:
        raise InputError(f"'{path}@{class_list}' is empty: the list names every class folder")
    return others


def _contents(
    files: Sequence[Path],
    path: Path,
    labels: Sequence[int],
    class_names: tuple[str, ...],
    request: Request,
    fit: Fit,
) -> Contents:
    """Those files that are pictures; the others are counted."""
    chosen = [file.name.lower().endswith(SUFFIXES) for file in files]
    left_out = Counter(file.suffix.lower() or file.name for file, kept in zip(files, chosen, strict=True) if not kept)
    kept = [str(file) for file, read in zip(files, chosen, strict=True) if read]
    note = "files left out: " + ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(4))
    if not kept:
        raise InputError(
            f"folder '{path}' is empty: it holds no readable image, nor class sub-folders with some"
            + (f" ({note})" if left_out else "")
        )
    names = [Path(file).relative_to(path).as_posix() for file in kept]
    return _pictures(kept, names, f"folder '{path}'", request, fit)._replace(
        labels=np.array(labels, dtype=np.int64)[np.array(chosen)],
        class_names=class_names,
        note=note if left_out else "",
    )


def _pictures(files: Sequence[str], names: Sequence[str], source: str, request: Request, fit: Fit) -> Contents:
    """Picture files of one class."""
    pictures = Pictures(files.__getitem__, files, source)
    shape, changes = survey(pictures, request.shape, request.resize)
    labels = np.zeros(len(files), dtype=np.int64)
    return Contents(stored_pictures(pictures, shape, fit), labels, ("pictures",), tuple(names), changes)


def _crop(image: Any, height: int, width: int) -> Any:
    """Crop the centre of a picture."""
    from torchvision.transforms import functional

    _, rows, columns = functional.get_dimensions(image)
    if rows < height or columns < width:
        raise ValueError(f"it is {rows}x{columns}, too small to crop {height}x{width} from it")
    return functional.center_crop(image, [height, width])
