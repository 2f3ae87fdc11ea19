"""Image sets, named by short specs, and the split of an experiment into its parts.

A spec is ``SOURCE[:CLASSES]``: ``digits:0-5``, ``mnist``, ``photo-patches``, ``uniform-noise``, ``images.npz:0,2``,
or a folder of images. Every set comes out as float32 (N, C, H, W) with pixels in [0, 1].
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grood_cert.errors import InputError

PHOTO_PATCHES = 400
NOISE_IMAGES = 200
NOISE = ("uniform-noise", "gaussian-noise", "smooth-noise")
TORCHVISION = {  # source: (class in torchvision.datasets, what of it lies in the data folder)
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "svhn": ("SVHN", "{split}_32x32.mat"),
    "dtd": ("DTD", "dtd/dtd"),
}
SOURCES = ("digits", "photo-patches", *NOISE, *TORCHVISION)
_MAX_CLASSES = 100_000

_Array = NDArray[Any]
_Raw = tuple[Tensor, _Array, tuple[str, ...]]  # images, labels, class names


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one source.

    Attributes:
        name: Name as printed in tables, such as ``digits:8,9``.
        kind: ``id``, ``ood`` or ``noise``.
        images: float32 (N, C, H, W), pixels in [0, 1].
        labels: int64 (N,), index into ``class_names``; 0 where the source has no labels.
        class_names: One name per class.
    """

    name: str
    kind: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def select(self, indices: Sequence[int] | _Array | Tensor) -> ImageSet:
        """Return the images at ``indices`` (positions, or a boolean mask of length N), in that order."""
        chosen = torch.as_tensor(indices)
        if chosen.dtype != torch.bool:
            chosen = chosen.long()
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def content_hash(self) -> str:
        """Return the SHA-256, in hex, of shape, images (little-endian float32) and labels (little-endian int64)."""
        digest = hashlib.sha256(",".join(map(str, self.images.shape)).encode())
        digest.update(np.ascontiguousarray(self.images.detach().cpu().numpy(), dtype="<f4").data)
        digest.update(np.ascontiguousarray(self.labels.detach().cpu().numpy(), dtype="<i8").data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Experiment:
    """The sets of one experiment; all images have the shape of the ID images.

    Attributes:
        train: ID images to train on.
        calibration: ID images that set thresholds and temperatures.
        test: ID images for evaluation.
        auxiliary: Outliers seen in training.
        auxiliary_heldout: Outliers of the same source, kept for the training log.
        ood: OOD test sets, those of noise (kind ``noise``) included.
    """

    train: ImageSet
    calibration: ImageSet
    test: ImageSet
    auxiliary: ImageSet
    auxiliary_heldout: ImageSet
    ood: tuple[ImageSet, ...]


def parse_spec(spec: str) -> tuple[str, tuple[int, ...] | None]:
    """Split a set spec into its source and its classes (None: all).

    Raises:
        InputError: The class list is malformed or names a class twice.

    >>> parse_spec("digits:0-2,7")
    ('digits', (0, 1, 2, 7))
    >>> parse_spec("mnist")
    ('mnist', None)
    """
    match = re.fullmatch(r"(.+):([0-9][0-9,\-]*)", spec, re.DOTALL)
    if match is None:
        head, colon, tail = spec.rpartition(":")
        if colon and (head in SOURCES or _is_array(head)):
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


def load_set(
    spec: str,
    *,
    split: Literal["train", "test"] = "test",
    shape: tuple[int, int, int] | None = None,
    data_dir: Path | None = None,
    download: bool = False,
    seed: int = 0,
) -> ImageSet:
    """Load the images that ``spec`` names.

    Args:
        spec: ``SOURCE[:CLASSES]``; the chosen classes are numbered 0, 1, ... in the order listed.
        split: Official split, where the source has one (the torchvision sets).
        shape: Channels (1 or 3), height and width the images must have. Grey and RGB are converted into each other;
            torchvision sets and folders are also resized to cover height and width, then centre-cropped.
        data_dir: Root of the torchvision sets, ``data`` by default.
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
    _check_seed(seed)
    if shape is not None and (len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1):
        raise InputError(f"images of shape {tuple(shape)} cannot be made; it must be (1 or 3, height, width)")
    name = _name(spec)
    resizable = source in TORCHVISION
    if source == "digits":
        raw = _digits()
    elif source == "photo-patches":
        raw = _photo_patches(shape or (1, 8, 8), seed)
    elif source in NOISE:
        raw = _noise(source, shape or (1, 8, 8), seed)
    elif source in TORCHVISION:
        raw = _torchvision(source, split, shape, data_dir or Path("data"), download)
    elif _is_array(source):
        raw = _array_file(Path(source))
    elif source and Path(source).is_dir():
        raw, resizable = _folder(Path(source), shape), True
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
        images, labels = images[torch.from_numpy(labels >= 0)], labels[labels >= 0]
        class_names = tuple(class_names[index] for index in classes)
    if len(images) == 0:
        raise InputError(f"'{spec}' is empty: it names a set without images")
    if shape is not None:
        images = _to_shape(images, shape, name, resizable)
    return ImageSet(
        name=name,
        kind="noise" if source in NOISE else "ood",
        images=images.contiguous(),
        labels=torch.from_numpy(labels.astype(np.int64)),
        class_names=class_names,
    )


def load_experiment(
    *,
    id: str,
    auxiliary: str,
    ood: Sequence[str],
    data_dir: Path | None = None,
    download: bool = False,
    calibration_share: float = 0.2,
    test_share: float = 0.2,
    heldout_share: float = 0.2,
    train_limit: int = 0,
    seed: int = 0,
) -> Experiment:
    """Load the ID set, the auxiliary outliers and the OOD test sets, cut into disjoint parts.

    Cuts are seeded and stratified by class. A source with an official split (the torchvision ones) is cut within its
    train split, and its test split is the test part. An image that a source repeats is used once when the source
    is cut, and never for training when the official test split holds it too.

    Args:
        id: Spec of the ID set; its images set the shape of all others.
        auxiliary: Spec of the outliers to train with.
        ood: Specs of the OOD test sets.
        data_dir: Root of the torchvision sets, ``data`` by default.
        download: Let torchvision download what is missing.
        calibration_share: Share, in (0, 1), of the ID images (of the official train split) kept for calibration.
        test_share: Share of the ID images kept for the test where there is no official test split.
        heldout_share: Share of the auxiliary images kept out of training.
        train_limit: If positive, most images to train on, of the ID and the auxiliary set each.
        seed: Seed of the cuts, the noise sets and the photo patches.

    Raises:
        InputError: As for `load_set`; or two sets overlap, a share lies outside (0, 1), or a part would be empty.

    >>> sets = load_experiment(id="digits:0-5", auxiliary="digits:6,7", ood=["digits:8,9", "uniform-noise"])
    >>> len(sets.train), len(sets.calibration), len(sets.test), [o.kind for o in sets.ood]
    (649, 217, 217, ['ood', 'noise'])
    """
    _check_seed(seed)
    if train_limit < 0:
        raise InputError(f"the training limit must be 0 (no limit) or positive, not {train_limit}")
    for part, share in (("calibration", calibration_share), ("test", test_share), ("held-out", heldout_share)):
        if not 0 < share < 1:
            raise InputError(f"the {part} share must lie between 0 and 1, not {share}")
    names = [_name(spec) for spec in ood]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two OOD sets would be called '{name}'; give each OOD set once, under its own name")
    _check_sources("auxiliary set", auxiliary, "ID set", id)
    for spec in ood:
        _check_sources("OOD set", spec, "ID set", id)
        _check_sources("OOD set", spec, "auxiliary set", auxiliary)

    def load(spec: str, split: Literal["train", "test"], shape: tuple[int, int, int] | None) -> ImageSet:
        return load_set(spec, split=split, shape=shape, data_dir=data_dir, download=download, seed=seed)

    pool = replace(load(id, "train", None), kind="id")
    rng = np.random.default_rng([seed, 1])
    if parse_spec(id)[0] in TORCHVISION:
        test = replace(load(id, "test", pool.shape), kind="id")
        test_keys = _image_keys(test.images)
        pool = _without_repeats(pool, set(test_keys))
        train, calibration = _cut(pool, {"calibration": calibration_share}, train_limit, rng)
        id_keys = {*_image_keys(pool.images), *test_keys}
    else:
        pool = _without_repeats(pool, set())
        shares = {"calibration": calibration_share, "test": test_share}
        train, calibration, test = _cut(pool, shares, train_limit, rng)
        id_keys = set(_image_keys(pool.images))

    outliers = _without_repeats(load(auxiliary, "train", pool.shape), set())
    outlier_keys = _check_images("auxiliary set", outliers, "ID set", pool.name, id_keys)
    rng = np.random.default_rng([seed, 2])
    outliers_train, outliers_heldout = _cut(outliers, {"held-out": heldout_share}, train_limit, rng)

    ood_sets = []
    for spec in ood:
        ood_set = load(spec, "test", pool.shape)
        _check_images("OOD set", ood_set, "ID set", pool.name, id_keys)
        _check_images("OOD set", ood_set, "auxiliary set", outliers.name, outlier_keys)
        ood_sets.append(ood_set)
    return Experiment(train, calibration, test, outliers_train, outliers_heldout, tuple(ood_sets))


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise InputError(f"the seed must be 0 or positive, not {seed}")


def _is_array(source: str) -> bool:
    return source.lower().endswith((".npy", ".npz"))


def _name(spec: str) -> str:
    source, classes = parse_spec(spec)
    if source in SOURCES:
        return spec
    return os.path.basename(os.path.abspath(source)) + (spec[len(source) :] if classes is not None else "")


def _why(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# Sources


def _digits() -> _Raw:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images / 16).astype(np.float32))[:, None]
    return images, digits.target, tuple(str(digit) for digit in range(10))


def _photo_patches(shape: tuple[int, int, int], seed: int) -> _Raw:
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
    return torch.cat(patches), np.zeros(PHOTO_PATCHES, dtype=np.int64), ("photo-patches",)


def _noise(source: str, shape: tuple[int, int, int], seed: int) -> _Raw:
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
    return torch.from_numpy(images.astype(np.float32)), np.zeros(NOISE_IMAGES, dtype=np.int64), (source,)


def _torchvision(
    source: str, split: Literal["train", "test"], shape: tuple[int, int, int] | None, root: Path, download: bool
) -> _Raw:
    from torchvision import datasets

    class_name, marker = TORCHVISION[source]
    build = getattr(datasets, class_name)
    which = {"split": split} if source in ("svhn", "dtd") else {"train": split == "train"}

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
        height, width = shape[1:] if shape else (32, 32)
        labels = data._labels
        try:
            pixels = np.stack([_read_picture(path, "RGB", (height, width)) for path in data._image_files])
        except (OSError, ValueError) as error:
            raise InputError(f"data set 'dtd' in '{root}' cannot be read: {_why(error)}") from error
    else:
        labels = data.labels if source == "svhn" else data.targets
        pixels = np.asarray(data.data)
    names = tuple(getattr(data, "classes", None) or map(str, range(10)))
    return _to_unit(_to_nchw(pixels, source)), np.asarray(labels, dtype=np.int64), names


def _array_file(path: Path) -> _Raw:
    if not path.is_file():
        raise InputError(f"file '{path}' does not exist; give the path of a .npy or .npz file")
    labels: _Array | None = None
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.lib.npyio.NpzFile):
                pixels = next((loaded[key] for key in ("images", "x") if key in loaded.files), None)
                labels = next((loaded[key] for key in ("labels", "y") if key in loaded.files), None)
                keys = ", ".join(loaded.files) or "nothing"
            else:
                pixels = loaded
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds on a damaged file
        raise InputError(f"file '{path}' cannot be read as numpy images without pickles: {_why(error)}") from error
    if pixels is None:
        raise InputError(f"file '{path}' holds {keys}; it must hold 'images' (or 'x') and may hold 'labels' (or 'y')")
    pixels = _to_nchw(pixels, str(path))
    if pixels.dtype == np.uint8:
        images = _to_unit(pixels)
    elif pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise InputError(f"file '{path}' has pixels that are NaN or infinite; all must lie in [0, 1]")
        low, high = float(pixels.min()), float(pixels.max())
        if low < 0 or high > 1:
            raise InputError(f"file '{path}' has pixels from {low:g} to {high:g}; float pixels must lie in [0, 1]")
        images = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))
    else:
        raise InputError(f"file '{path}' has pixels of type {pixels.dtype}; they must be uint8, or float in [0, 1]")
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


def _folder(path: Path, shape: tuple[int, int, int] | None) -> _Raw:
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    class_names = tuple(entry.name for entry in entries if entry.is_dir())
    loose = [entry for entry in entries if entry.is_file() and has_file_allowed_extension(entry.name, IMG_EXTENSIONS)]
    if class_names and loose:
        raise InputError(
            f"folder '{path}' holds both sub-folders and loose images such as '{loose[0].name}'; "
            "give one folder per class, or images alone"
        )
    if class_names:
        numbers = {name: index for index, name in enumerate(class_names)}
        samples = ImageFolder.make_dataset(str(path), numbers, IMG_EXTENSIONS, allow_empty=True)
    else:
        samples, class_names = [(str(file), 0) for file in loose], (path.name,)

    mode = "L"
    readable, broken = [], []
    for file, label in samples:
        try:
            with Image.open(file) as opened:
                opened.load()
                if opened.mode not in ("1", "L", "LA") and not opened.mode.startswith("I"):
                    mode = "RGB"
            readable.append((file, label))
        except (OSError, SyntaxError, ValueError) as error:
            broken.append(f"'{file}': {_why(error)}")
    if not readable:
        raise InputError(f"folder '{path}' is empty: it holds no readable image, nor class sub-folders with some")
    if broken:
        raise InputError(f"folder '{path}' has {len(broken)} unreadable images, the first {broken[0]}; remove them")
    if shape is not None:
        mode = "L" if shape[0] == 1 else "RGB"
    pictures = [_read_picture(file, mode, None if shape is None else shape[1:]) for file, _ in readable]
    for (file, _), picture in zip(readable, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            sizes = [f"{height}x{width}" for height, width in (picture.shape[:2], pictures[0].shape[:2])]
            raise InputError(
                f"folder '{path}' holds images of different sizes: '{file}' is {sizes[0]}, "
                f"'{readable[0][0]}' {sizes[1]}; resize them first"
            )
    pixels = np.stack(pictures).reshape(len(pictures), *pictures[0].shape[:2], 1 if mode == "L" else 3)
    labels = np.array([label for _, label in readable], dtype=np.int64)
    return _to_unit(pixels.transpose(0, 3, 1, 2)), labels, class_names


def _read_picture(file: str | Path, mode: str, size: tuple[int, int] | None) -> _Array:
    """Return one picture as uint8 (H, W) or (H, W, 3); 16-bit grey is reduced to 8 bits, which PIL alone would clip."""
    from PIL import Image

    with Image.open(file) as opened:
        picture: Image.Image = opened
        if opened.mode.startswith("I"):
            grey = np.clip(np.asarray(opened, dtype=np.float64) / 257, 0, 255)
            picture = Image.fromarray(np.round(grey).astype(np.uint8))
        picture = picture.convert(mode)
    return np.asarray(picture if size is None else _cover(picture, *size))


# Conversions


def _to_nchw(pixels: _Array, name: str) -> _Array:
    if pixels.ndim == 3 and pixels.size > 0:
        return pixels[:, None]
    first, last = (pixels.ndim == 4 and pixels.shape[axis] in (1, 3) for axis in (1, 3))
    if pixels.size == 0:
        raise InputError(f"'{name}' is empty: its array has shape {pixels.shape}")
    if first == last:
        raise InputError(
            f"'{name}' has shape {pixels.shape}; images must be (N, H, W), (N, H, W, C) or (N, C, H, W) "
            "with 1 or 3 channels"
        )
    return pixels if first else pixels.transpose(0, 3, 1, 2)


def _to_unit(pixels: _Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32) / np.float32(255))


def _to_channels(images: Tensor, channels: int) -> Tensor:
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.repeat(1, 3, 1, 1)
    red, green, blue = images.unbind(1)  # ITU-R 601
    return (0.299 * red + 0.587 * green + 0.114 * blue).clamp(0, 1)[:, None]


def _to_shape(images: Tensor, shape: tuple[int, int, int], name: str, resizable: bool) -> Tensor:
    height, width = images.shape[2:]
    images = _to_channels(images, shape[0])
    if (height, width) == tuple(shape[1:]):
        return images
    if not resizable:
        raise InputError(
            f"'{name}' has images of {height}x{width}, the model expects {shape[1]}x{shape[2]}; resize them first"
        )
    resized: Tensor = _cover(images, shape[1], shape[2])
    return resized.clamp(0, 1)


def _cover(image: Any, height: int, width: int) -> Any:
    """Resize a tensor or PIL picture, keeping its aspect, until it covers height x width; then crop the centre."""
    from torchvision.transforms import functional

    _, rows, columns = functional.get_dimensions(image)
    scale = max(height / rows, width / columns)
    size = [max(height, round(rows * scale)), max(width, round(columns * scale))]
    return functional.center_crop(functional.resize(image, size, antialias=True), [height, width])


# Cuts and overlaps


def _cut(pool: ImageSet, shares: dict[str, float], limit: int, rng: np.random.Generator) -> list[ImageSet]:
    """Cut off a part for each share; the rest, of at most ``limit`` images if positive, comes first."""
    labels = pool.labels.numpy()
    position = np.empty(len(pool))
    for label in np.unique(labels):  # spread each class evenly, so that every stretch of the order is stratified
        members = rng.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + rng.random()) / len(members)
    order = np.argsort(position, kind="stable")
    parts = []
    for part, share in shares.items():
        count = round(share * len(pool))
        if count == 0:
            raise InputError(
                f"a {part} share of {share} leaves no {part} images: '{pool.name}' has only "
                f"{len(pool)}; raise the share or give more images"
            )
        parts.append(pool.select(np.sort(order[:count])))
        order = order[count:]
    if len(order) == 0:
        taken = " and ".join(f"{part} share {share}" for part, share in shares.items())
        raise InputError(f"{taken} leave none of the {len(pool)} images of '{pool.name}' to train on; lower them")
    return [pool.select(np.sort(order[:limit] if limit else order)), *parts]


def _image_keys(images: Tensor) -> list[bytes]:
    """Hash each image at 16 bits a pixel: equal 8-bit images agree, whichever float type they were stored in."""
    keys: list[bytes] = []
    for start in range(0, len(images), 4096):
        levels = (images[start : start + 4096] * 65535).round().numpy().astype("<u2")
        keys.extend(hashlib.sha256(image.tobytes()).digest() for image in levels)
    return keys


def _without_repeats(pool: ImageSet, seen: set[bytes]) -> ImageSet:
    """Drop images whose key is in ``seen``, and all copies but the first."""
    seen = set(seen)
    keep = []
    for index, key in enumerate(_image_keys(pool.images)):
        if key not in seen:
            seen.add(key)
            keep.append(index)
    return pool if len(keep) == len(pool) else pool.select(keep)


def _check_sources(role: str, spec: str, other_role: str, other: str) -> None:
    (source, classes), (other_source, other_classes) = parse_spec(spec), parse_spec(other)
    built_in = source in SOURCES or other_source in SOURCES
    if source != other_source and (built_in or os.path.realpath(source) != os.path.realpath(other_source)):
        return
    if classes is None or other_classes is None:
        raise InputError(
            f"{role} '{spec}' and {other_role} '{other}' are the same source; use another set, or give disjoint classes"
        )
    shared = sorted(set(classes) & set(other_classes))
    if shared:
        raise InputError(
            f"{role} '{spec}' and {other_role} '{other}' share {'class' if len(shared) == 1 else 'classes'} "
            f"{', '.join(map(str, shared))}; give disjoint classes"
        )


def _check_images(role: str, images: ImageSet, other_role: str, other_name: str, other_keys: set[bytes]) -> set[bytes]:
    """Refuse shared images, noise excepted; return the keys of ``images``."""
    keys = _image_keys(images.images)
    shared = sum(key in other_keys for key in keys)
    if shared and images.kind != "noise":
        raise InputError(
            f"{role} '{images.name}' shares {shared} image{'s' * (shared > 1)} with the {other_role} "
            f"'{other_name}'; the two must not overlap"
        )
    return set(keys)
