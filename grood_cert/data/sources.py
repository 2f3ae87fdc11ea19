"""Reading image sets: built in, from torchvision, from numpy files and from folders of pictures.

Pictures are fitted to the shape asked for as the OOD literature does: resized, keeping their aspect, until they cover it
(for 224x224 and more until they cover 8/7 of it: "resize 256, crop 224"), then cropped in the centre. A picture of the
right size is left alone. ``lsun-c`` is only cropped.
"""

from __future__ import annotations

import difflib
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from grood_cert.data import images as storage
from grood_cert.data.images import Array, ImageSet, StoredImages, held
from grood_cert.data.spec import (
    FOLDERS,
    NOISE,
    SOURCES,
    TORCHVISION,
    is_array,
    name_of,
    parse_spec,
    read_class_list,
    split_class_list,
)
from grood_cert.errors import InputError

PHOTO_PATCHES = 400
NOISE_IMAGES = 200
_MAX_CLASSES = 100_000
_IMAGENET = (3, 224, 224)
_MARGIN = 256 / 224

_Shape = tuple[int, int, int]
_Raw = tuple[StoredImages, Array, tuple[str, ...]]  # images, labels, class names


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
    root = data_dir or Path("data")
    name = name_of(spec)
    folder, class_list = split_class_list(source)
    resizable = source in TORCHVISION
    if source == "digits":
        raw = _digits()
    elif source == "photo-patches":
        raw = _photo_patches(shape or (1, 8, 8), seed)
    elif source in NOISE:
        raw = _noise(source, shape or (1, 8, 8), seed)
    elif source in TORCHVISION:
        raw = _torchvision(source, split, shape, root, download)
    elif is_array(source):
        raw = _array_file(Path(source))
    elif folder in FOLDERS:
        raw = _folder(_named_folder(folder, split, root), shape, class_list, _crop if folder == "lsun-c" else _cover)
    elif folder and Path(folder).is_dir():
        raw = _folder(Path(folder), shape, class_list, _cover)
    else:
        near = difflib.get_close_matches(source.lower(), SOURCES, n=1, cutoff=0.4)
        hint = f", did you mean '{near[0]}'?" if near else ";"
        raise InputError(
            f"there is no image set '{source}'{hint} sets are {', '.join(SOURCES)}, a .npy or .npz file "
            "and a folder of images"
        )
    images, labels, class_names = raw
    if classes is not None:
        missing = next((index for index in classes if index >= len(class_names)), None)
        if missing is not None:
            known = f"classes 0 to {len(class_names) - 1}" if len(class_names) > 1 else "class 0 only"
            raise InputError(f"class {missing} in '{spec}' is out of range: '{source}' has {known}")
        new = np.full(len(class_names), -1)
        new[list(classes)] = np.arange(len(classes))
        labels = new[labels]
        images, labels = images.take(labels >= 0), labels[labels >= 0]
        class_names = tuple(class_names[index] for index in classes)
    if len(images) == 0:
        raise InputError(f"'{spec}' is empty: it names a set without images")
    if shape is not None:
        images = _to_shape(images, shape, name, resizable)
    return ImageSet(
        name=name,
        kind="noise" if source in NOISE else "ood",
        images=held(images),
        labels=torch.from_numpy(labels.astype(np.int64)),
        class_names=class_names,
    )


def check_seed(seed: int) -> None:
    """Refuse a negative seed."""
    if seed < 0:
        raise InputError(f"the seed must be 0 or positive, not {seed}")


def _why(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _stored(pixels: Array) -> StoredImages:
    """Images of an array (N, C, H, W), uint8 or float in [0, 1], read from it when indexed."""

    def read(positions: Array) -> Tensor:
        unit = np.ascontiguousarray(pixels[positions], dtype=np.float32)
        return torch.from_numpy(unit / np.float32(255) if pixels.dtype == np.uint8 else unit)

    _, channels, height, width = pixels.shape
    return StoredImages(read, (channels, height, width), np.arange(len(pixels)))


# Built in


def _digits() -> _Raw:
    from sklearn.datasets import load_digits

    digits = load_digits()
    names = tuple(str(digit) for digit in range(10))
    return _stored((digits.images / 16).astype(np.float32)[:, None]), digits.target, names


def _photo_patches(shape: _Shape, seed: int) -> _Raw:
    from sklearn.datasets import load_sample_images

    channels, height, width = shape
    photos = load_sample_images().images  # uint8, 427 x 640 x 3
    rows, columns, _ = photos[0].shape
    scales = [scale for scale in (1, 2, 4, 8) if height * scale <= rows and width * scale <= columns]
    if not scales:
        raise InputError(f"'photo-patches' are cut from photographs of {rows}x{columns}; {height}x{width} is too large")
    rng = np.random.default_rng([seed, zlib.crc32(b"photo-patches")])
    patches: list[Tensor] = []
    while len(patches) < PHOTO_PATCHES:
        scale = scales[rng.integers(len(scales))]
        photo = photos[rng.integers(len(photos))]
        top, left = rng.integers(rows - height * scale + 1), rng.integers(columns - width * scale + 1)
        cut = photo[top : top + height * scale, left : left + width * scale]
        total = cut.reshape(height, scale, width, scale, 3).sum(axis=(1, 3), dtype=np.int64)
        patch = torch.from_numpy((total / (scale * scale * 255)).astype(np.float32)).movedim(-1, 0)[None]
        flat = height * width > 1 and _to_channels(patch, 1).std(correction=0) < 0.02
        if not flat:
            patches.append(_to_channels(patch, channels))
    return _stored(torch.cat(patches).numpy()), np.zeros(PHOTO_PATCHES, dtype=np.int64), ("photo-patches",)


def _noise(source: str, shape: _Shape, seed: int) -> _Raw:
    rng = np.random.default_rng([seed, zlib.crc32(source.encode())])
    size = (NOISE_IMAGES, *shape)
    if source == "gaussian-noise":
        images = np.clip(0.5 + 0.25 * rng.standard_normal(size), 0, 1)
    else:
        images = rng.random(size)
    if source == "smooth-noise":
        from scipy.ndimage import gaussian_filter

        images = gaussian_filter(images, sigma=(0, 0, shape[1] / 8, shape[2] / 8), mode="wrap")
        images -= images.min(axis=(1, 2, 3), keepdims=True)
        images /= np.maximum(images.max(axis=(1, 2, 3), keepdims=True), 1e-12)
    return _stored(images.astype(np.float32)), np.zeros(NOISE_IMAGES, dtype=np.int64), (source,)


# torchvision


def _torchvision(
    source: str, split: Literal["train", "test"], shape: _Shape | None, root: Path, download: bool
) -> _Raw:
    from torchvision import datasets

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
            raise InputError(f"data set '{source}' in '{root}' cannot be read: {_why(error)}") from error
        if not download:
            advice = "add --download, or point --data-dir at the folder that holds it"
            state = "incomplete or damaged in" if (root / marker.format(split=split)).exists() else "not in"
            raise InputError(f"data set '{source}' is {state} '{root}'; {advice}") from error
        try:
            data = read(download=True)
        except Exception as cause:
            raise InputError(f"data set '{source}' could not be downloaded to '{root}': {_why(cause)}") from cause
    if source == "dtd":
        labels = data._labels
        images = _pictures(data._image_files, (3, *(shape[1:] if shape else (32, 32))), _cover)
    else:
        labels = data.labels if source == "svhn" else data.targets
        pixels = _to_nchw(np.asarray(data.data), source)
        images = _stored(pixels.swapaxes(2, 3) if source == "emnist-letters" else pixels)  # its files lie on their side
    labels = np.asarray(labels, dtype=np.int64)
    names = tuple(getattr(data, "classes", None) or map(str, range(10)))
    if source == "emnist-letters":  # counted from 1
        labels, names = labels - 1, names[1:]
    if labels.min() < 0 or labels.max() >= len(names):
        raise InputError(
            f"data set '{source}' in '{root}' has labels from {labels.min()} to {labels.max()} for {len(names)} classes"
        )
    return images, labels, names


# numpy files


def _array_file(path: Path) -> _Raw:
    if not path.is_file():
        raise InputError(f"file '{path}' does not exist; give the path of a .npy or .npz file")
    pixels, labels, keys = None, None, ""
    try:
        with path.open("rb") as file:
            if file.read(2) == b"PK":  # a zip file; its arrays cannot be mapped
                file.seek(0)
                with np.load(file, allow_pickle=False) as archive:
                    pixels = next((archive[key] for key in ("images", "x", "data") if key in archive.files), None)
                    labels = next((archive[key] for key in ("labels", "y") if key in archive.files), None)
                    keys = ", ".join(archive.files) or "nothing"
            else:
                pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds on a damaged file
        raise InputError(f"file '{path}' cannot be read as numpy images without pickles: {_why(error)}") from error
    if pixels is None:
        raise InputError(
            f"file '{path}' holds {keys}; it must hold 'images' (or 'x', 'data') and may hold 'labels' (or 'y')"
        )
    pixels = _to_nchw(pixels, str(path))
    _check_pixels(pixels, path)
    images = _stored(pixels)
    if labels is None:
        return images, np.zeros(len(images), dtype=np.int64), (path.name,)
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise InputError(
            f"labels of '{path}' are {labels.dtype} of shape {labels.shape}; "
            f"they must be integers of shape ({len(images)},)"
        )
    if labels.min() < 0 or labels.max() >= _MAX_CLASSES:
        raise InputError(
            f"labels of '{path}' run from {labels.min()} to {labels.max()}; they must be class indices counted from 0"
        )
    labels = labels.astype(np.int64)
    return images, labels, tuple(str(index) for index in range(int(labels.max()) + 1))


def _check_pixels(pixels: Array, path: Path) -> None:
    """Refuse pixels that are neither bytes nor numbers in [0, 1]; a mapped file is read a part at a time."""
    if pixels.dtype != np.uint8 and pixels.dtype.kind != "f":
        raise InputError(f"file '{path}' has pixels of type {pixels.dtype}; they must be uint8, or float in [0, 1]")
    size = storage.chunk(pixels.shape)
    parts = (pixels[start : start + size] for start in range(0, len(pixels), size))
    if pixels.dtype == np.uint8:
        if all(part.max() <= 1 for part in parts) and pixels.any():
            raise InputError(f"file '{path}' has uint8 pixels of 0 and 1 only; white is 255, multiply them by 255")
        return
    low, high = np.inf, -np.inf
    for part in parts:
        if not np.isfinite(part).all():
            raise InputError(f"file '{path}' has pixels that are NaN or infinite; all must lie in [0, 1]")
        low, high = min(low, float(part.min())), max(high, float(part.max()))
    if low < 0 or high > 1:
        advice = "; divide them by 255, or store them as uint8" if low >= 0 and high <= 255 else ""
        raise InputError(f"file '{path}' has pixels from {low:g} to {high:g}; float pixels must lie in [0, 1]{advice}")


# Folders of pictures


def _named_folder(source: str, split: Literal["train", "test"], root: Path) -> Path:
    folder = root / FOLDERS[source]
    if source == "imagenet":
        folder /= "train" if split == "train" else "val"
    if not folder.is_dir():
        raise InputError(
            f"data set '{source}' is not in '{root}': there is no folder '{folder}' of pictures; put or link it "
            "there, or point --data-dir at the folder that holds it (--download cannot fetch this one)"
        )
    return folder


def _folder(path: Path, shape: _Shape | None, class_list: str, fit: Callable[[Any, int, int], Any]) -> _Raw:
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
    return _pictures(files, shape, fit), np.array([label for _, label in samples], dtype=np.int64), class_names


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
            broken.append(f"'{file}': {_why(error)}")
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


def _pictures(files: Sequence[str | Path], shape: _Shape, fit: Callable[[Any, int, int], Any]) -> StoredImages:
    """Pictures decoded when they are indexed, some at a time."""
    channels, height, width = shape

    def read_one(position: int) -> Array:
        try:
            picture = _read_picture(files[position], "L" if channels == 1 else "RGB")
            return np.asarray(fit(picture, height, width)).reshape(height, width, channels)
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"picture '{files[position]}' cannot be used: {_why(error)}") from error

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


# Conversions


def _to_nchw(pixels: Array, name: str) -> Array:
    if pixels.size == 0:
        raise InputError(f"'{name}' is empty: its array has shape {pixels.shape}")
    if pixels.ndim == 2 and pixels.shape[1] == 3072:  # rows of CIFAR, TinyImages and down-sampled ImageNet
        return pixels.reshape(-1, 3, 32, 32)
    if pixels.ndim == 3:
        return pixels[:, None]
    first, last = (pixels.ndim == 4 and pixels.shape[axis] in (1, 3) for axis in (1, 3))
    if first == last:
        raise InputError(
            f"'{name}' has shape {pixels.shape}; images must be (N, H, W), (N, H, W, C) or (N, C, H, W) "
            "with 1 or 3 channels, or rows of 3x32x32"
        )
    return pixels if first else pixels.transpose(0, 3, 1, 2)


def _to_channels(images: Tensor, channels: int) -> Tensor:
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.repeat(1, 3, 1, 1)
    red, green, blue = images.unbind(1)  # ITU-R 601
    return (0.299 * red + 0.587 * green + 0.114 * blue).clamp(0, 1)[:, None]


def _to_shape(images: StoredImages, shape: _Shape, name: str, resizable: bool) -> StoredImages:
    _, channels, height, width = images.shape
    same_size = (height, width) == tuple(shape[1:])
    if same_size and channels == shape[0]:
        return images
    if same_size:
        return images.map(lambda batch: _to_channels(batch, shape[0]), shape)
    if not resizable:
        raise InputError(
            f"'{name}' has images of {height}x{width}, the model expects {shape[1]}x{shape[2]}; resize them first"
        )

    def fitted(batch: Tensor) -> Tensor:
        resized: Tensor = _cover(_to_channels(batch, shape[0]), shape[1], shape[2])
        return resized.clamp(0, 1)

    return images.map(fitted, shape)


def _cover(image: Any, height: int, width: int) -> Any:
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
