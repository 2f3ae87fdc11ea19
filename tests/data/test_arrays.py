from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from grood_cert.data import load_set
from tests.data.examples import COLOUR, GREY, RNG, refused, save


@pytest.mark.parametrize(
    ("pixels", "nchw"),
    [
        (GREY, GREY[:, None]),
        (GREY[..., None], GREY[:, None]),
        (GREY[:, None], GREY[:, None]),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2)),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("suffix", ["npy", "npz", "NPY"])
def test_array_layouts_and_types(tmp_path, pixels, nchw, dtype, suffix):
    stored = pixels if dtype == "uint8" else (pixels / 255).astype(dtype)
    path = tmp_path / f"x.{suffix}"
    with path.open("wb") as file:
        if suffix == "npz":
            np.savez(file, images=stored)
        else:
            np.save(file, stored)
    images = load_set(str(path))
    assert (images.name, images.kind, images.class_names) == (path.name, "ood", (path.name,))
    assert images.images.is_contiguous()
    np.testing.assert_allclose(images.images.numpy(), nchw / 255, rtol=1e-3 if dtype == "float16" else 1e-7)


def test_npz_labels_and_classes(tmp_path):
    labels = np.array([2, 0, 1, 2, 0, 4], dtype=np.uint16)
    for keys in (("images", "labels"), ("x", "y")):
        path = save(tmp_path / "some:thing.npz", **dict(zip(keys, (GREY, labels), strict=True)))
        assert load_set(path).labels.tolist() == labels.tolist()
        assert load_set(path).class_names == ("0", "1", "2", "3", "4")
        chosen = load_set(f"{path}:4,2")
        assert (chosen.labels.tolist(), chosen.class_names) == ([1, 1, 0], ("4", "2"))
        assert chosen.name == "some:thing.npz:4,2"
        with refused("3' is empty: it names a set without images"):
            load_set(f"{path}:3")
        with refused("class 5 in .* is out of range: .* has classes 0 to 4"):
            load_set(f"{path}:5")


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (GREY.astype(np.int64), "pixels of type int64; they must be uint8, or float in"),
        (GREY > 3, "pixels of type bool"),
        (GREY.astype(complex), "pixels of type complex128"),
        (GREY.astype(np.float32), "pixels from 0 to 248; float pixels must lie in .*; divide them by 255, or store"),
        (GREY / 255 - 0.5, "pixels from -0.5 to 0.472549; float pixels must lie in \\[0, 1\\]$"),
        (GREY // 128, "uint8 pixels of 0 and 1 only; white is 255, multiply them by 255"),
        (np.where(GREY == GREY[0, 0, 0], np.nan, 0.5), "pixels that are NaN or infinite"),
        (np.full((2, 4, 4), np.inf), "pixels that are NaN or infinite"),
        (GREY[0], "has shape \\(4, 5\\); images must be"),
        (np.zeros((2, 4, 4, 2), np.uint8), "with 1 or 3 channels"),
        (np.zeros((2, 3, 4, 3), np.uint8), "with 1 or 3 channels"),
        (np.zeros((2, 1, 3, 4, 4), np.uint8), "with 1 or 3 channels"),
        (np.uint8(3), "has shape \\(\\)"),
        (GREY[:0], "is empty: its array has shape \\(0, 4, 5\\)"),
        (GREY[:, :0], "is empty"),
        (COLOUR[:0], "is empty"),
        (np.zeros((2, 0, 4, 3)), "is empty"),
        (np.array([{}, None]), "cannot be read as numpy images without pickles"),
        (np.zeros((2, 4, 4), [("a", "u1")]), "pixels of type"),
    ],
)
def test_wrong_arrays(tmp_path, pixels, message):
    for suffix in ("npy", "npz"):
        path = save(tmp_path / f"x.{suffix}", pixels, images=pixels)
        with refused(message) as caught:
            load_set(path)
        assert "x." + suffix in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(5, int), "they must be integers of shape \\(6,\\)"),
        (np.zeros((6, 2), int), "they must be integers of shape \\(6,\\)"),
        (np.zeros(6), "labels of .* are float64"),
        (np.array([0, 1, 2, 3, 4, -1]), "labels of .* run from -1 to 4"),
        (np.full(6, 2**63, np.uint64), "they must be class indices counted from 0"),
        (np.array([None] * 6), "without pickles"),
    ],
)
def test_wrong_labels(tmp_path, labels, message):
    with refused(message):
        load_set(save(tmp_path / "x.npz", images=GREY, labels=labels))


def test_damaged_files(tmp_path):
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps([1, 2]))
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npz").write_bytes(b"hello")
    for name in ("cut.npy", "cut.npz"):
        path = Path(save(tmp_path / name, GREY, images=GREY))
        path.write_bytes(path.read_bytes()[:-50])
    flipped = Path(save(tmp_path / "flipped.npz", images=GREY))
    content = bytearray(flipped.read_bytes())
    content[200] ^= 255
    flipped.write_bytes(content)
    for name in ("pickle.npy", "empty.npy", "text.npz", "cut.npy", "cut.npz", "flipped.npz"):
        with refused(f"{name}' cannot be read as numpy images"):
            load_set(str(tmp_path / name))
    with refused("file 'nowhere.npy' does not exist"):
        load_set("nowhere.npy")
    with refused("holds a, b; it must hold 'images' \\(or 'x', 'data'\\)"):
        load_set(save(tmp_path / "keys.npz", a=GREY, b=GREY))


def test_arrays_convert_channels_but_are_not_resized(tmp_path):
    path = save(tmp_path / "x.npy", COLOUR)
    grey = load_set(path, shape=(1, 4, 5)).images
    np.testing.assert_allclose(grey[:, 0], COLOUR @ [0.299, 0.587, 0.114] / 255, rtol=1e-5)
    path = save(tmp_path / "g.npy", GREY)
    assert torch.equal(load_set(path, shape=(3, 4, 5)).images[:, 1:2], load_set(path).images)
    white = save(tmp_path / "white.npy", np.ones((2, 4, 5, 3)))
    assert load_set(white, shape=(1, 4, 5)).images.max() <= 1
    with refused("'g.npy' has images of 4x5, the model expects 8x8; resize them first"):
        load_set(path, shape=(1, 8, 8))


def test_a_large_file_is_mapped_and_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("grood_cert.data.images.IN_MEMORY", 2**20)
    pixels = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.uint8, shape=(16000, 32, 32, 3))
    pixels[:, 0, 0, 0] = np.arange(16000) % 251
    pixels.flush()
    tracemalloc.start()
    images = load_set(str(tmp_path / "x.npy"))
    assert images.images[[15000]][0, 0, 0, 0] == np.float32(15000 % 251) / np.float32(255)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(images) == 16000 and peak < 4e6, "49 MB of bytes, 197 MB of float32"


def test_rows_of_tiny_images(tmp_path):
    """CIFAR, TinyImages and down-sampled ImageNet store rows of 3x32x32."""
    pixels = RNG.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    path = save(tmp_path / "rows.npz", data=pixels.reshape(5, -1), labels=np.array([1, 2, 3, 1, 2]))
    images = load_set(path)
    assert torch.equal(images.images, torch.from_numpy(pixels.astype(np.float32) / 255))
    assert images.labels.tolist() == [1, 2, 3, 1, 2]


def test_an_archive_that_claims_more_than_it_holds_takes_no_memory(tmp_path):
    """A header of 64 TB in a file of some hundred bytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (2**26, 2**10, 2**10)}
    )
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(100))
    with refused("cannot be read .*: ValueError: 'images' claims 70368744177664 bytes|'images' claims 70368744177664"):
        load_set(str(tmp_path / "x.npz"))
