"""Folders of pictures.

Pictures are fitted to the shape asked for as the OOD literature does: resized, keeping their aspect, until they cover it
(for 224x224 and more until they cover 8/7 of it: "resize 256, crop 224"), then cropped in the centre. A picture of the
right size is left alone. ``lsun-c`` is only cropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grood_cert.data import images as storage
from grood_cert.data.images import Array, Contents, Request, StoredImages
from grood_cert.data.spec import FOLDERS, read_class_list, split_class_list
from grood_cert.errors import InputError, said

_IMAGENET = (3, 224, 224)
_MARGIN = 256 / 224

_Shape = tuple[int, int, int]
_Fit = Callable[[Any, int, int], Any]


def named_folder(request: Request) -> Contents:
    """The pictures of a folder of the OOD literature, below the data folder."""
    source, class_list = split_class_list(request.source)
    folder = request.root / FOLDERS[source]
    if source == "imagenet":
        folder /= "train" if request.split == "train" else "val"
    if not folder.is_dir():
        raise InputError(
            f"data set '{source}' is not in '{request.root}': there is no folder '{folder}' of pictures; put or link it "
            "there, or point --data-dir at the folder that holds it (--download cannot fetch this one)"
        )
    return _folder(folder, request.shape, class_list, _crop if source == "lsun-c" else cover)


def folder(request: Request) -> Contents:
    """The pictures of any folder."""
    path, class_list = split_class_list(request.source)
    return _folder(Path(path), request.shape, class_list, cover)


def _folder(path: Path, shape: _Shape | None, class_list: str, fit: _Fit) -> Contents:
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    class_names = tuple(entry.name for entry in entries if entry.is_dir())
    loose = [entry for entry in entries if entry.is_file() and has_file_allowed_extension(entry.name, IMG_EXTENSIONS)]
    if class_list:
        class_names = _listed(path, class_names, class_list)
        shape = shape or _IMAGENET
    elif class_names and loose:
        raise InputError(
            f"folder '{path}' holds both sub-folders and loose images such as '{loose[0].name}'; "
            "give one folder per class, or images alone"
        )
    if class_names:
        numbers = {name: index for index, name in enumerate(class_names)}
        samples = ImageFolder.make_dataset(str(path), numbers, IMG_EXTENSIONS, allow_empty=True)
    else:
        samples, class_names = [(str(file), 0) for file in loose], (path.name,)
    if not samples:
        raise InputError(_empty(path))
    files = [file for file, _ in samples]
    if shape is None or 4 * len(files) * np.prod(shape) <= storage.IN_MEMORY:
        shape = _check_pictures(path, files, shape)
    labels = np.array([label for _, label in samples], dtype=np.int64)
    names = tuple(Path(file).relative_to(path).as_posix() for file in files)
    return Contents(pictures(files, shape, fit), labels, class_names, names)


def _empty(path: Path) -> str:
    return f"folder '{path}' is empty: it holds no readable image, nor class sub-folders with some"


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


def _check_pictures(path: Path, files: Sequence[str], shape: _Shape | None) -> _Shape:
    """Open every picture; return their shape, which is `shape` if given."""
    from PIL import Image

    mode = "L"
    sizes: dict[str, tuple[int, int]] = {}
    broken = []
    for file in files:
        try:
            with Image.open(file) as opened:
                opened.load()
                if opened.mode not in ("1", "L", "LA") and not opened.mode.startswith("I"):
                    mode = "RGB"
                sizes[file] = (opened.height, opened.width)
        except (OSError, SyntaxError, ValueError) as error:
            broken.append(f"'{file}': {said(error)}")
    if not sizes:
        raise InputError(_empty(path))
    if broken:
        raise InputError(f"folder '{path}' has {len(broken)} unreadable images, the first {broken[0]}; remove them")
    if shape is not None:
        return shape
    first = sizes[files[0]]
    other = next((file for file in files if sizes[file] != first), None)
    if other is not None:
        height, width = sizes[other]
        raise InputError(
            f"folder '{path}' holds images of different sizes: '{other}' is {height}x{width}, "
            f"'{files[0]}' {first[0]}x{first[1]}; resize them first"
        )
    return (1 if mode == "L" else 3, *first)


def pictures(files: Sequence[str | Path], shape: _Shape, fit: _Fit) -> StoredImages:
    """Pictures decoded when they are indexed, some at a time."""
    channels, height, width = shape

    def read_one(position: int) -> Array:
        try:
            picture = _read_picture(files[position], "L" if channels == 1 else "RGB")
            return np.asarray(fit(picture, height, width)).reshape(height, width, channels)
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"picture '{files[position]}' cannot be used: {said(error)}") from error

    def read(positions: Array) -> Tensor:
        pixels = np.empty((len(positions), height, width, channels), dtype=np.uint8)
        with ThreadPoolExecutor() as threads:
            for index, picture in enumerate(threads.map(read_one, positions)):
                pixels[index] = picture
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255))

    return StoredImages(read, shape, np.arange(len(files)))


def _read_picture(file: str | Path, mode: str) -> Any:
    """Return one PIL picture in the mode; 16-bit grey is reduced to 8 bits, which PIL alone would clip."""
    from PIL import Image

    with Image.open(file) as opened:
        if opened.mode.startswith("I"):
            grey = np.clip(np.asarray(opened, dtype=np.float64) / 257, 0, 255)
            return Image.fromarray(np.round(grey).astype(np.uint8)).convert(mode)
        return opened.convert(mode)


def cover(image: Any, height: int, width: int) -> Any:
    """Resize a tensor or PIL picture, keeping its aspect, until it covers height x width; then crop the centre."""
    from torchvision.transforms import functional

    _, rows, columns = functional.get_dimensions(image)
    if (rows, columns) == (height, width):
        return image
    margin = _MARGIN if min(height, width) >= _IMAGENET[1] else 1.0
    scale = max(height / rows, width / columns) * margin
    size = [max(height, round(rows * scale)), max(width, round(columns * scale))]
    return functional.center_crop(functional.resize(image, size, antialias=True), [height, width])


def _crop(image: Any, height: int, width: int) -> Any:
    """Crop the centre of a picture."""
    from torchvision.transforms import functional

    _, rows, columns = functional.get_dimensions(image)
    if rows < height or columns < width:
        raise ValueError(f"it is {rows}x{columns}, too small to crop {height}x{width} from it")
    return functional.center_crop(image, [height, width])
