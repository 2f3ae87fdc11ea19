"""Pictures, files and folders that the tests of this folder share."""

from __future__ import annotations

import hashlib
import importlib.util
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from grood_cert.data import ImageSet
from grood_cert.errors import InputError

SHARED = Path(__file__).parents[3] / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared/data next to the repository")
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 4, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)


def hashes(images: ImageSet) -> set[bytes]:
    return {hashlib.sha256(image.numpy().tobytes()).digest() for image in images.images}


def save(path: Path, *args, **arrays) -> str:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        np.save(path, *args)
    return str(path)


def shared_set(name: str):
    spec = importlib.util.spec_from_file_location("shared_load", SHARED / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(name)


def refused(pattern: str):
    return pytest.raises(InputError, match=pattern)


def refuse_network(*args, **kwargs):
    raise URLError("no internet in tests")


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def classes_on_disk(folder: Path, names: str, count: int = 5) -> dict[str, np.ndarray]:
    pictures = {name: RNG.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8) for name in names}
    for name, pixels in pictures.items():
        (folder / name).mkdir(parents=True)
        for index, picture in enumerate(pixels):
            Image.fromarray(picture).save(folder / name / f"{index}.png")
    return pictures
