from __future__ import annotations

import hashlib
import importlib.util
import pickle
import re
import shutil
import struct
import tracemalloc
import warnings
from collections import Counter
from importlib import resources
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from grood_cert.data import (
    FOLDERS,
    NOISE,
    SOURCES,
    TORCHVISION,
    ImageSet,
    StoredImages,
    load_experiment,
    load_set,
    parse_spec,
)
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


# Grammar


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("digits:0-5", ("digits", (0, 1, 2, 3, 4, 5))),
        ("digits:6,7", ("digits", (6, 7))),
        ("digits:7,0-2,5", ("digits", (7, 0, 1, 2, 5))),
        ("digits:3-3", ("digits", (3,))),
        ("mnist", ("mnist", None)),
        ("a:b/x.npz:0-1", ("a:b/x.npz", (0, 1))),
        ("a:1/x.npy", ("a:1/x.npy", None)),
        ("unheard-of:x", ("unheard-of:x", None)),
    ],
)
def test_grammar(spec, expected):
    assert parse_spec(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digits:", "'' in 'digits:' is not a class list; write it like digits:0-5"),
        ("digits:a", "'a' in 'digits:a' is not a class list"),
        ("digits:-1", "is not a class list"),
        ("digits:0, 1", "is not a class list"),
        ("digits:1,,2", "is not a class list"),
        ("digits:1,", "is not a class list"),
        ("digits:1-", "is not a class list"),
        ("digits:1-2-3", "is not a class list"),
        ("digits:0-99999999999", "is not a class list"),
        ("x.npz:cat", "is not a class list"),
        ("digits:5-2", "class range 5-2 in 'digits:5-2' runs backwards; write 2-5"),
        ("digits:0-3,2", "class 2 is listed twice"),
    ],
)
def test_malformed_class_list(spec, message):
    with refused(message):
        parse_spec(spec)


def test_unknown_source_names_the_nearest_and_all():
    with refused("there is no image set 'minst', did you mean 'mnist'") as caught:
        load_set("minst")
    assert all(source in str(caught.value) for source in SOURCES)
    with refused("did you mean 'cifar10'"):
        load_set("CIFAR10")
    for spec in ("", ":3", "@@@@"):
        with refused(f"there is no image set '{spec}'; sets are digits, "):
            load_set(spec)


# Built-in sources


def test_digits_are_renumbered_in_the_order_listed():
    everything = load_set("digits")
    assert (len(everything), everything.shape, everything.name, everything.kind) == (1797, (1, 8, 8), "digits", "ood")
    chosen = load_set("digits:9,3")
    assert chosen.class_names == ("9", "3")
    assert chosen.name == "digits:9,3"
    for new, old in enumerate((9, 3)):
        assert torch.equal(chosen.images[chosen.labels == new], everything.images[everything.labels == old])
    assert chosen.images.dtype == torch.float32 and chosen.labels.dtype == torch.int64
    assert (everything.images.min(), everything.images.max()) == (0, 1)


def test_class_out_of_range():
    with refused("class 10 in 'digits:8-10' is out of range: 'digits' has classes 0 to 9"):
        load_set("digits:8-10")
    with refused("class 1 in 'uniform-noise:1' is out of range: .* has class 0 only"):
        load_set("uniform-noise:1")


@pytest.mark.parametrize("source", [*NOISE, "photo-patches"])
@pytest.mark.parametrize("shape", [None, (3, 8, 8), (1, 28, 28), (3, 5, 9), (1, 1, 1)])
def test_seeded_sources(source, shape):
    images = load_set(source, shape=shape, seed=3)
    assert images.shape == (shape or (1, 8, 8))
    assert len(images) == (400 if source == "photo-patches" else 200)
    assert images.kind == ("ood" if source == "photo-patches" else "noise")
    assert images.images.dtype == torch.float32
    assert 0 <= images.images.min() <= images.images.max() <= 1
    assert not images.labels.any()
    assert load_set(source, shape=shape, seed=3).content_hash() == images.content_hash()
    if not (source == "smooth-noise" and shape == (1, 1, 1)):
        assert load_set(source, shape=shape, seed=4).content_hash() != images.content_hash()


def test_photo_patches_are_texture_and_all_different():
    colour = load_set("photo-patches", shape=(3, 8, 8)).images.movedim(1, -1) @ torch.tensor([0.299, 0.587, 0.114])
    assert colour.flatten(1).std(1, correction=0).min() > 0.0199
    patches = load_set("photo-patches")
    assert patches.images.flatten(1).std(1, correction=0).min() >= 0.02
    assert len(hashes(patches)) == len(patches)
    with refused("photographs of 427x640; 500x500 is too large"):
        load_set("photo-patches", shape=(3, 500, 500))


def test_noise_statistics():
    uniform, gaussian, smooth = (load_set(source, shape=(1, 16, 16)).images for source in NOISE)
    assert uniform.std() == pytest.approx(12**-0.5, abs=0.01)
    assert gaussian.mean() == pytest.approx(0.5, abs=0.01)
    assert 0.2 < gaussian.std() < 0.25
    assert torch.equal(smooth.amin((1, 2, 3)), torch.zeros(200))
    assert torch.equal(smooth.amax((1, 2, 3)), torch.ones(200))
    assert smooth.diff(dim=-1).abs().mean() < uniform.diff(dim=-1).abs().mean() / 2


def test_shape_and_seed_are_checked():
    for shape in ((2, 8, 8), (1, 0, 8), (1, 8)):
        with refused("it must be \\(1 or 3, height, width\\)"):
            load_set("digits", shape=shape)
    with refused("seed must be 0 or positive, not -1"):
        load_set("digits", seed=-1)


def test_digits_convert_to_rgb_but_are_not_resized():
    assert torch.equal(load_set("digits", shape=(3, 8, 8)).images[:, 2:], load_set("digits").images)
    with refused("'digits' has images of 8x8, the model expects 28x28; resize them first"):
        load_set("digits", shape=(1, 28, 28))


# ImageSet


def test_select_and_content_hash():
    digits = load_set("digits")
    for indices in ([2, 0], np.array([2, 0]), torch.tensor([2, 0])):
        assert torch.equal(digits.select(indices).images, digits.images[[2, 0]])
        assert torch.equal(digits.select(indices).labels, digits.labels[[2, 0]])
    assert len(digits.select(digits.labels == 1)) == 182
    assert len(digits.select([])) == 0
    small = digits.select([0, 1])
    assert small.content_hash() == ImageSet("other", "id", small.images.clone(), small.labels, ()).content_hash()
    transposed = ImageSet("t", "ood", small.images.transpose(2, 3).contiguous().transpose(2, 3), small.labels, ())
    assert transposed.content_hash() == small.content_hash()
    expected = hashlib.sha256(b"2,1,8,8" + small.images.numpy().tobytes() + small.labels.numpy().tobytes())
    assert small.content_hash() == expected.hexdigest()
    assert small.select([1, 0]).content_hash() != small.content_hash()
    relabelled = ImageSet("t", "ood", small.images, small.labels + 1, ())
    assert relabelled.content_hash() != small.content_hash()


def test_channel_statistics(monkeypatch):
    colour = load_set("photo-patches", shape=(3, 9, 7))
    monkeypatch.setattr("grood_cert.data.images._CHUNK", 5000)  # many parts
    mean, std = colour.channel_statistics()
    for channel in range(3):
        values = colour.images[:, channel].double().numpy()
        assert mean[channel].item() == pytest.approx(values.mean(), rel=1e-12)
        assert std[channel].item() == pytest.approx(values.std(), rel=1e-12)
    constant = ImageSet("c", "id", torch.full((4, 1, 3, 3), 0.1), torch.zeros(4, dtype=torch.int64), ("c",))
    assert constant.channel_statistics()[1].item() < 1e-15


# numpy files


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
        (np.zeros((6, 1), int), "they must be integers of shape \\(6,\\)"),
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


# Folders


def test_flat_folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, pixels in enumerate(GREY):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("not an image")
    images = load_set(f"{folder}/")
    assert (images.name, images.class_names, images.shape) == ("pictures", ("pictures",), (1, 4, 5))
    assert torch.equal(images.images, torch.from_numpy(GREY[:, None].astype(np.float32) / 255))
    assert load_set(str(folder), shape=(3, 4, 5)).shape == (3, 4, 5)
    assert load_set(str(folder), shape=(1, 7, 3)).shape == (1, 7, 3)
    Image.fromarray(COLOUR[0]).save(folder / "colour.png")
    assert load_set(str(folder)).shape == (3, 4, 5)
    assert len(load_set(str(folder), shape=(1, 4, 5))) == 7


def test_class_folders(tmp_path):
    for index, pixels in enumerate(COLOUR):
        folder = tmp_path / ["cat", "dog", "elk"][index % 3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (tmp_path / ".cache").mkdir()
    images = load_set(str(tmp_path))
    assert (images.class_names, images.labels.tolist()) == (("cat", "dog", "elk"), [0, 0, 1, 1, 2, 2])
    expected = COLOUR[[0, 3, 1, 4, 2, 5]].transpose(0, 3, 1, 2).astype(np.float32) / 255
    assert torch.equal(images.images, torch.from_numpy(expected))
    chosen = load_set(f"{tmp_path}:2,0")
    assert (chosen.class_names, chosen.labels.tolist()) == (("elk", "cat"), [1, 1, 0, 0])
    Image.fromarray(GREY[0]).save(tmp_path / "loose.png")
    with refused("both sub-folders and loose images such as 'loose.png'"):
        load_set(str(tmp_path))


def test_folder_is_resized_to_cover_and_cropped(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "b.jpg", quality=100)
    with refused("images of different sizes: .*b.jpg' is 60x20, .*a.png' 20x60; resize them"):
        load_set(str(tmp_path))
    assert load_set(str(tmp_path), shape=(3, 10, 10)).images[:, :, 2:8, 2:8].min() > 0.95


def test_16_bit_grey_keeps_its_range(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896], [40000, 65000, 65535]], np.uint16)).save(tmp_path / "deep.png")
    images = load_set(str(tmp_path)).images[0, 0] * 255
    assert images.round().tolist() == [[0, 1, 128], [156, 253, 255]]


def test_unreadable_folders(tmp_path):
    with refused("is empty: it holds no readable image"):
        load_set(str(tmp_path))
    (tmp_path / "sub").mkdir()
    with refused("is empty: it holds no readable image"):
        load_set(str(tmp_path))
    (tmp_path / "sub/bad.png").write_bytes(b"nonsense")
    with refused("is empty: it holds no readable image"):
        load_set(str(tmp_path))
    Image.fromarray(GREY[0]).save(tmp_path / "sub/good.png")
    with refused("has 1 unreadable images, the first .*bad.png"):
        load_set(str(tmp_path))
    (tmp_path / "sub/bad.png").write_bytes((tmp_path / "sub/good.png").read_bytes()[:-30])
    with refused("has 1 unreadable images, the first .*bad.png"):
        load_set(str(tmp_path))


# torchvision


@pytest.mark.parametrize("source", TORCHVISION)
@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_sets(tmp_path, source, split, monkeypatch):
    message = f"data set '{source}' is not in '.*none'; add --download, or point --data-dir at the folder that holds it"
    with refused(message):
        load_set(source, split=split, data_dir=tmp_path / "none")
    monkeypatch.setattr("urllib.request.urlopen", refuse_network)
    with refused(f"'{source}' could not be downloaded to '.*': .*no internet") as caught:
        load_set(source, split=split, data_dir=tmp_path, download=True)
    assert "\n" not in str(caught.value)


def test_default_data_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("data set 'mnist' is not in 'data'; add --download"):
        load_set("mnist")


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_fashion_mnist_files(tmp_path):
    raw = tmp_path / "FashionMNIST/raw"
    for split, start in (("train", 0), ("t10k", 10)):
        pixels = np.full((10, 28, 28), start, np.uint8)
        write_idx(raw / f"{split}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.arange(10, dtype=np.uint8))
    train = load_set("fashion-mnist:9,1", split="train", data_dir=tmp_path)
    assert (train.class_names, train.labels.tolist()) == (("Ankle boot", "Trouser"), [1, 0])
    assert not train.images.any()
    test = load_set("fashion-mnist", data_dir=tmp_path, shape=(3, 32, 32))
    assert test.shape == (3, 32, 32)
    torch.testing.assert_close(test.images, torch.full((10, 3, 32, 32), 10 / 255))
    (raw / "t10k-images-idx3-ubyte").write_bytes((raw / "t10k-images-idx3-ubyte").read_bytes()[:-9])
    with refused("data set 'fashion-mnist' in '.*' cannot be read: "):
        load_set("fashion-mnist", data_dir=tmp_path)
    (raw / "t10k-images-idx3-ubyte").unlink()
    with refused("'fashion-mnist' is incomplete or damaged in '.*'; add --download"):
        load_set("fashion-mnist", data_dir=tmp_path)


@pytest.mark.parametrize("source", ["cifar10", "cifar100"])
def test_cifar_files(tmp_path, source, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    folder = tmp_path / ("cifar-10-batches-py" if source == "cifar10" else "cifar-100-python")
    folder.mkdir()
    pixels = RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    labels, meta, files = (
        ("labels", "batches.meta", ["test_batch", *(f"data_batch_{i}" for i in range(1, 6))])
        if source == "cifar10"
        else ("fine_labels", "meta", ["train", "test"])
    )
    names = [f"class {index}" for index in range(4)]
    (folder / meta).write_bytes(pickle.dumps({"label_names": names, "fine_label_names": names}))
    batch = pickle.dumps({"data": pixels.reshape(4, -1), labels: [3, 1, 0, 2]}, protocol=2)
    old_flags = batch.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")  # dtype("u1", 0, 1), as the original files have it
    assert old_flags != batch
    for file in files:
        (folder / file).write_bytes(old_flags)
    images = load_set(source, data_dir=tmp_path)
    assert (images.labels.tolist(), images.class_names) == ([3, 1, 0, 2], tuple(names))
    assert torch.equal(images.images, torch.from_numpy(pixels.astype(np.float32) / 255))
    assert len(load_set(source, split="train", data_dir=tmp_path)) == (20 if source == "cifar10" else 4)
    assert load_set(source, data_dir=tmp_path, shape=(1, 28, 28)).shape == (1, 28, 28)


def test_svhn_files(tmp_path, monkeypatch):
    from scipy.io import savemat

    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda path, md5=None: True)
    pixels = RNG.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    labels = np.array([[10], [1], [2], [10], [9]], dtype=np.uint8)
    savemat(tmp_path / "test_32x32.mat", {"X": pixels.transpose(2, 3, 1, 0), "y": labels})
    images = load_set("svhn", data_dir=tmp_path)
    assert (images.labels.tolist(), images.class_names) == ([0, 1, 2, 0, 9], tuple("0123456789"))
    assert torch.equal(images.images, torch.from_numpy(pixels.astype(np.float32) / 255))
    monkeypatch.undo()
    with refused("'svhn' is incomplete or damaged in"):
        load_set("svhn", data_dir=tmp_path)


def test_dtd_files(tmp_path):
    for split in ("train", "test"):
        for name, value in (("banded", 0), ("dotted", 255)):
            path = tmp_path / f"dtd/dtd/images/{name}/{split}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((40, 60, 3), value, np.uint8)).save(path)
        (tmp_path / "dtd/dtd/labels").mkdir(exist_ok=True)
        lines = f"banded/{split}.jpg\ndotted/{split}.jpg\n"
        (tmp_path / f"dtd/dtd/labels/{split}1.txt").write_text(lines)
    images = load_set("dtd", data_dir=tmp_path)
    assert (images.shape, images.class_names) == ((3, 32, 32), ("banded", "dotted"))
    assert images.images.mean((1, 2, 3)).tolist() == [0, 1]
    assert load_set("dtd:1", data_dir=tmp_path, shape=(1, 28, 28)).images.min() > 0.999
    (tmp_path / "dtd/dtd/images/dotted/test.jpg").write_bytes(b"nonsense")
    with refused("picture '.*dotted/test.jpg' cannot be used: cannot identify image file"):
        load_set("dtd", data_dir=tmp_path)
    (tmp_path / "dtd/dtd/labels/test1.txt").unlink()
    with refused("'dtd' in '.*' cannot be read: .*No such file"):
        load_set("dtd", data_dir=tmp_path)


def test_emnist_letters_stand_upright_and_count_from_0(tmp_path):
    raw = tmp_path / "EMNIST/raw"
    upright = RNG.integers(0, 256, (26, 28, 28), dtype=np.uint8)
    for split in ("train", "test"):
        write_idx(raw / f"emnist-letters-{split}-images-idx3-ubyte", upright.transpose(0, 2, 1))
        write_idx(raw / f"emnist-letters-{split}-labels-idx1-ubyte", np.arange(1, 27, dtype=np.uint8))
    letters = load_set("emnist-letters", data_dir=tmp_path)
    assert (letters.labels.tolist(), letters.class_names) == (list(range(26)), tuple("abcdefghijklmnopqrstuvwxyz"))
    assert torch.equal(letters.images, torch.from_numpy(upright[:, None].astype(np.float32) / 255))
    assert load_set("emnist-letters:2", split="train", data_dir=tmp_path).class_names == ("c",)
    write_idx(raw / "emnist-letters-test-labels-idx1-ubyte", np.arange(26, dtype=np.uint8))
    with refused("data set 'emnist-letters' in '.*' has labels from -1 to 24 for 26 classes"):
        load_set("emnist-letters", data_dir=tmp_path)


# Named folders and class lists


@pytest.mark.parametrize("source", FOLDERS)
def test_missing_named_folders_say_what_is_expected(tmp_path, source):
    folder = tmp_path / FOLDERS[source] / ("val" if source == "imagenet" else "")
    with refused(
        f"data set '{source}' is not in '{tmp_path}': there is no folder '{folder}' of pictures; .*--data-dir"
    ):
        load_set(source, data_dir=tmp_path, shape=(3, 32, 32))
    folder.mkdir(parents=True)
    with refused(f"folder '{folder}' is empty"):
        load_set(source, data_dir=tmp_path, shape=(3, 32, 32))


def test_named_folders_are_fitted_as_in_the_paper(tmp_path):
    """LSUN-C: centre crop alone; LSUN-R, iSUN: as they are; Places365: resize and crop."""
    pixels = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for folder, picture in (
        ("LSUN/test", pixels[:36, :36]),
        ("LSUN_resize/LSUN_resize", pixels[:32, :32]),
        ("iSUN", pixels[:32, :32]),
        ("places365/test_256", np.repeat(np.repeat(pixels[:, 4:36], 4, 0), 4, 1)),
    ):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / folder / "0.png")

    def loaded(source):
        images = load_set(source, data_dir=tmp_path, shape=(3, 32, 32))
        assert (images.name, images.kind, images.shape) == (source, "ood", (3, 32, 32))
        return (images.images[0] * 255).round().byte().permute(1, 2, 0).numpy()

    assert np.array_equal(loaded("lsun-c"), pixels[2:34, 2:34])
    assert np.array_equal(loaded("lsun-r"), pixels[:32, :32])
    assert np.array_equal(loaded("isun"), pixels[:32, :32])
    shrunk = Image.fromarray(np.repeat(np.repeat(pixels[:, 4:36], 4, 0), 4, 1)).resize(
        (32, 40), Image.Resampling.BILINEAR
    )
    assert np.array_equal(loaded("places365"), np.asarray(shrunk)[4:36])
    with refused("picture '.*LSUN/test/0.png' cannot be used: it is 36x36, too small to crop 40x40 from it"):
        load_set("lsun-c", data_dir=tmp_path, shape=(3, 40, 40))


def test_imagenet_pictures_are_resized_to_256_and_cropped_to_224(tmp_path):
    gradient = np.broadcast_to(np.linspace(0, 255, 512).astype(np.uint8)[:, None, None], (512, 600, 3))
    Image.fromarray(np.ascontiguousarray(gradient)).save(tmp_path / "a.png")
    image = load_set(str(tmp_path), shape=(3, 224, 224)).images[0, 0]
    assert (image[0, 0].item(), image[-1, 0].item()) == pytest.approx((16.5 / 256, 1 - 16.5 / 256), abs=0.004)
    Image.fromarray(np.ascontiguousarray(gradient[:224, :224])).save(tmp_path / "a.png")
    image = load_set(str(tmp_path), shape=(3, 224, 224)).images[0, 0]
    assert (image[:, 0] * 255).round().tolist() == gradient[:224, 0, 0].tolist(), "a picture of the right size stays"


def classes_on_disk(folder: Path, names: str, count: int = 5) -> dict[str, np.ndarray]:
    pictures = {name: RNG.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8) for name in names}
    for name, pixels in pictures.items():
        (folder / name).mkdir(parents=True)
        for index, picture in enumerate(pixels):
            Image.fromarray(picture).save(folder / name / f"{index}.png")
    return pictures


def test_class_lists(tmp_path):
    pictures = classes_on_disk(tmp_path / "some@where/train", "abcd")
    names = tmp_path / "two.txt"
    names.write_text("# chosen by hand\n c\n\na\n")
    folder = str(tmp_path / "some@where/train")
    chosen = load_set(f"{folder}@{names}", shape=(3, 8, 8))
    assert (chosen.name, chosen.class_names) == ("train@two.txt", ("c", "a"))
    for index, name in enumerate("ca"):
        expected = torch.from_numpy(pictures[name].transpose(0, 3, 1, 2).astype(np.float32) / 255)
        assert torch.equal(chosen.images[chosen.labels == index], expected)
    others = load_set(f"{folder}@!{names}", shape=(3, 8, 8))
    assert (others.name, others.class_names) == ("train@!two.txt", ("b", "d"))
    assert not hashes(chosen) & hashes(others) and len(chosen) + len(others) == 20
    assert load_set(f"{folder}@{names}:1", shape=(3, 8, 8)).class_names == ("a",)
    assert load_set(f"{folder}@{names}").shape == (3, 224, 224), "the shape of ImageNet by default"
    assert load_set(folder, shape=(3, 8, 8)).class_names == tuple("abcd")
    for text, message in (
        ("a\nx\ny\n", "has no class folder x, which the list '.*' names, nor 1 others"),
        ("a\nb\na\n", "class list '.*' names a twice"),
        ("# nothing\n", "class list '.*' is empty"),
    ):
        names.write_text(text)
        with refused(message):
            load_set(f"{folder}@{names}")
    names.write_text("a\nb\nc\nd\n")
    with refused("is empty: the list names every class folder"):
        load_set(f"{folder}@!{names}")
    with refused("class list 'none' cannot be read \\(No such file or directory\\); .* or one of imagenet-10"):
        load_set(f"{folder}@none")


def test_imagenet_with_the_classes_of_the_paper(tmp_path):
    """Ten wnids are ID in their order, the rest is auxiliary; train and val are the official split."""
    ten = [
        line for line in resources.files("grood_cert.data").joinpath("class_lists/imagenet-10.txt").read_text().split()
    ]
    ten = [name for name in ten if name.startswith("n0")]
    assert len(set(ten)) == 10 and all(re.fullmatch(r"n\d{8}", name) for name in ten)
    for part in ("train", "val"):
        classes_on_disk(
            tmp_path / "imagenet" / part, [*ten, "n99999998", "n99999999"], count=4 if part == "train" else 1
        )
    experiment = load_experiment(
        id="imagenet@imagenet-10", auxiliary="imagenet@!imagenet-10", ood=["uniform-noise"], data_dir=tmp_path
    )
    own, outliers, _ = parts(experiment)
    assert experiment.train.class_names == tuple(ten)
    assert [len(part) for part in (*own, *outliers)] == [32, 8, 10, 6, 2]
    assert {part.shape for part in (*own, *outliers)} == {(3, 224, 224)}


# Sets too large for memory


def test_stored_images_stand_for_a_tensor(monkeypatch):
    tensor = load_set("digits").images
    monkeypatch.setattr("grood_cert.data.images.IN_MEMORY", 0)
    stored = load_set("digits").images
    assert isinstance(stored, StoredImages) and stored.shape == tensor.shape and len(stored) == len(tensor)
    for index in (3, -1, slice(5, 90, 7), [4, 2, 2], torch.tensor([[1, 2], [3, 4]])[0], tensor[:, 0, 3, 3] > 0.5, []):
        assert torch.equal(stored[index], tensor[index])
    assert torch.equal(torch.cat(list(stored.split(100))), tensor)
    assert torch.equal(torch.stack(list(stored)), tensor)
    assert stored[:].dtype == torch.float32
    with pytest.raises(IndexError):
        stored[1797]


def test_sets_are_the_same_stored_or_held(tmp_path, monkeypatch):
    classes_on_disk(tmp_path / "pictures", "ab", count=12)
    colour = save(tmp_path / "colour.npy", RNG.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8))
    floats = save(tmp_path / "floats.npz", images=RNG.random((20, 8, 8)).astype(np.float16))
    options = {"auxiliary": colour, "ood": [str(tmp_path / "pictures"), floats, "digits:8", "smooth-noise"]}
    held = digits_experiment(**options)
    monkeypatch.setattr("grood_cert.data.images.IN_MEMORY", 0)
    stored = digits_experiment(**options)
    for one, other in zip(
        [*parts(held)[0], *parts(held)[1], *held.ood], [*parts(stored)[0], *parts(stored)[1], *stored.ood], strict=True
    ):
        assert isinstance(one.images, torch.Tensor) and isinstance(other.images, StoredImages)
        assert (one.name, one.kind, one.shape, one.content_hash()) == (
            other.name,
            other.kind,
            other.shape,
            other.content_hash(),
        )
    monkeypatch.setattr("grood_cert.data.images.IN_MEMORY", 4 * 64 * 10)
    assert isinstance(stored.train.select(range(11)).images, StoredImages)
    assert torch.equal(stored.train.select(range(10)).images, held.train.images[:10]), "few images are held again"


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


def test_a_damaged_picture_of_a_stored_folder_is_named_when_it_is_read(tmp_path, monkeypatch):
    classes_on_disk(tmp_path, "a")
    monkeypatch.setattr("grood_cert.data.images.IN_MEMORY", 0)
    images = load_set(str(tmp_path), shape=(3, 8, 8))
    (tmp_path / "a/3.png").write_bytes(b"nonsense")
    assert len(images.images[:3]) == 3
    with refused("picture '.*a/3.png' cannot be used: cannot identify image file"):
        images.content_hash()


# Experiments


def digits_experiment(**options):
    chosen = {"id": "digits:0-5", "auxiliary": "digits:6,7", "ood": ["digits:8,9", "photo-patches", "uniform-noise"]}
    return load_experiment(**{**chosen, **options})


def parts(experiment):
    own = (experiment.train, experiment.calibration, experiment.test)
    return own, (experiment.auxiliary, experiment.auxiliary_heldout), experiment.ood


def test_experiment_parts_are_disjoint_and_complete():
    experiment = digits_experiment()
    own, outliers, ood = parts(experiment)
    assert [len(part) for part in own] == [649, 217, 217]
    assert [len(part) for part in outliers] == [288, 72]
    assert [part.kind for part in (*own, *outliers, *ood)] == ["id"] * 3 + ["ood"] * 4 + ["noise"]
    assert [part.name for part in (*own, *outliers)] == ["digits:0-5"] * 3 + ["digits:6,7"] * 2
    assert [part.name for part in ood] == ["digits:8,9", "photo-patches", "uniform-noise"]
    everything = (*own, *outliers, *ood)
    assert len(set.union(*map(hashes, everything))) == sum(map(len, everything))
    assert set.union(*map(hashes, own)) == hashes(load_set("digits:0-5"))
    assert set.union(*map(hashes, outliers)) == hashes(load_set("digits:6,7"))


@pytest.mark.parametrize("limit", [0, 60])
def test_cuts_are_stratified(limit):
    experiment = digits_experiment(train_limit=limit)
    whole = load_set("digits:0-5")
    for part in (experiment.train, experiment.calibration, experiment.test):
        for label in range(6):
            expected = len(part) * int((whole.labels == label).sum()) / len(whole)
            assert abs(int((part.labels == label).sum()) - expected) <= 2
    assert part.class_names == whole.class_names


def test_experiment_is_a_function_of_the_seed():
    def fingerprint(seed):
        own, outliers, ood = parts(digits_experiment(seed=seed))
        return [part.content_hash() for part in (*own, *outliers, *ood)]

    assert fingerprint(5) == fingerprint(5)
    changed = [a != b for a, b in zip(fingerprint(5), fingerprint(6), strict=True)]
    assert changed == [True] * 5 + [False, True, True]  # digits:8,9 is not drawn


def test_train_limit_takes_a_subset():
    full, limited = digits_experiment(), digits_experiment(train_limit=100)
    assert (len(limited.train), len(limited.auxiliary)) == (100, 100)
    assert hashes(limited.train) < hashes(full.train)
    assert limited.test.content_hash() == full.test.content_hash()
    assert len(limited.auxiliary_heldout) == len(full.auxiliary_heldout)
    assert len(digits_experiment(train_limit=10**9).train) == len(full.train)


def test_repeated_images_are_used_once(tmp_path):
    first = save(tmp_path / "id.npy", np.concatenate([GREY] * 10))
    experiment = load_experiment(id=first, auxiliary="uniform-noise", ood=[])
    own, _, _ = parts(experiment)
    assert [len(part) for part in own] == [4, 1, 1]
    assert len(set.union(*map(hashes, own))) == 6
    assert experiment.train.name == "id.npy"


def test_one_class_and_rgb(tmp_path):
    first = save(tmp_path / "id.npy", RNG.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    experiment = load_experiment(id=first, auxiliary="photo-patches", ood=["digits", "smooth-noise"])
    own, outliers, ood = parts(experiment)
    assert {part.shape for part in (*own, *outliers, *ood)} == {(3, 8, 8)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ood": ["digits:0-5"]}, "OOD set 'digits:0-5' and ID set 'digits:0-5' share classes 0, 1, 2, 3, 4, 5"),
        ({"ood": ["digits:5,9"]}, "OOD set 'digits:5,9' and ID set 'digits:0-5' share class 5; give disjoint classes"),
        ({"ood": ["digits"]}, "OOD set 'digits' and ID set 'digits:0-5' are the same source"),
        ({"id": "digits", "ood": []}, "auxiliary set 'digits:6,7' and ID set 'digits' are the same source"),
        ({"auxiliary": "digits:5,6"}, "auxiliary set 'digits:5,6' and ID set 'digits:0-5' share class 5"),
        ({"ood": ["digits:7,8"]}, "OOD set 'digits:7,8' and auxiliary set 'digits:6,7' share class 7"),
        ({"auxiliary": "uniform-noise"}, "OOD set 'uniform-noise' and auxiliary set 'uniform-noise' are the same"),
        ({"ood": ["digits:8", "digits:8"]}, "two OOD sets would be called 'digits:8'"),
        ({"calibration_share": 0.0}, "the calibration share must lie between 0 and 1, not 0.0"),
        ({"test_share": 1.0}, "the test share must lie between 0 and 1, not 1.0"),
        ({"heldout_share": float("nan")}, "the held-out share must lie between 0 and 1, not nan"),
        ({"calibration_share": 0.5, "test_share": 0.5}, "leave none of the 1083 images of 'digits:0-5' to train on"),
        ({"calibration_share": 0.9, "test_share": 0.9}, "leave none of the 1083 images"),
        ({"calibration_share": 1e-6}, "a calibration share of 1e-06 leaves no calibration images: 'digits:0-5' has"),
        ({"heldout_share": 1e-6}, "a held-out share of 1e-06 leaves no held-out images"),
        ({"heldout_share": 0.9999}, "held-out share 0.9999 leave"),
        ({"train_limit": -1}, "training limit must be 0 \\(no limit\\) or positive, not -1"),
        ({"seed": -1}, "seed must be 0 or positive"),
        ({"ood": ["nonsense.npy"]}, "'nonsense.npy' does not exist"),
    ],
)
def test_experiment_errors(options, message):
    with refused(message):
        digits_experiment(**options)


def test_sets_sharing_images_are_refused(tmp_path, monkeypatch):
    images = load_set("digits").images.numpy()
    labels = load_set("digits").labels.numpy()
    other = RNG.random((20, 1, 8, 8))
    from_id = save(tmp_path / "id3.npy", np.concatenate([other, images[labels == 0][:3]]))
    one = save(tmp_path / "one.npy", np.concatenate([other, images[labels == 0][:1].astype(np.float64)]))
    save(tmp_path / "aux2.npy", np.concatenate([other, images[labels == 6][:2]]))
    with refused("OOD set 'id3.npy' shares 3 images with the ID set 'digits:0-5'"):
        digits_experiment(ood=[from_id])
    with refused("auxiliary set 'one.npy' shares 1 image with the ID set 'digits:0-5'"):
        digits_experiment(auxiliary=one)
    with refused("OOD set 'id3.npy' shares 3 images"):
        digits_experiment(ood=[from_id], train_limit=1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.npy").symlink_to("aux2.npy")
    with refused("OOD set 'link.npy' and auxiliary set './aux2.npy' are the same source"):
        digits_experiment(auxiliary="./aux2.npy", ood=["link.npy"])
    (tmp_path / "d").mkdir()
    shutil.copy("aux2.npy", "d/aux2.npy")
    with refused("two OOD sets would be called 'aux2.npy'"):
        digits_experiment(auxiliary="smooth-noise", ood=["aux2.npy", "d/aux2.npy"])


def test_auxiliary_images_of_an_ood_test_set_are_removed_and_counted(tmp_path):
    digits = load_set("digits:6,7").images.numpy()
    other = RNG.random((20, 1, 8, 8))
    two = save(tmp_path / "two.npy", np.concatenate([other, digits[:2], digits[:1]]))
    three = save(tmp_path / "three.npy", digits[1:4].astype(np.float64))
    none = save(tmp_path / "none.npy", other)
    experiment = digits_experiment(ood=[two, none, three])
    assert experiment.auxiliary_removed == {"two.npy": 2, "three.npy": 3}
    _, outliers, ood = parts(experiment)
    assert set.union(*map(hashes, outliers)) == hashes(load_set("digits:6,7")) - hashes(load_set(two)) - hashes(
        load_set(three)
    )
    assert [len(part) for part in ood] == [23, 20, 3], "test sets stay whole"
    assert digits_experiment(ood=[none]).auxiliary_removed == {}
    everything = save(tmp_path / "all.npy", digits)
    with refused("auxiliary set 'digits:6,7' holds nothing but images of the OOD test sets"):
        digits_experiment(ood=[everything])


def test_ood_files_must_have_the_id_shape(tmp_path):
    path = save(tmp_path / "x.npy", np.zeros((3, 16, 16), np.uint8))
    with refused("'x.npy' has images of 16x16, the model expects 8x8; resize them first"):
        digits_experiment(ood=[path])


def test_official_split_is_kept_and_its_test_images_are_not_trained_on(tmp_path):
    raw = tmp_path / "FashionMNIST/raw"
    train, test = RNG.integers(0, 256, (2, 100, 28, 28), dtype=np.uint8)
    train[:7] = test[:7]
    for split, pixels in (("train", train), ("t10k", test)):
        write_idx(raw / f"{split}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.arange(100, dtype=np.uint8) % 10)
    experiment = load_experiment(id="fashion-mnist", auxiliary="photo-patches", ood=[], data_dir=tmp_path)
    own, _, _ = parts(experiment)
    assert [len(part) for part in own] == [74, 19, 100]
    assert experiment.test.content_hash() == load_set("fashion-mnist", data_dir=tmp_path).content_hash()
    assert {part.kind for part in own} == {"id"}
    assert len(set.union(*map(hashes, own))) == 193
    experiment = load_experiment(
        id="fashion-mnist:0-4", auxiliary="fashion-mnist:5-7", ood=["fashion-mnist:8,9"], data_dir=tmp_path
    )
    own, outliers, ood = parts(experiment)
    assert [len(part) for part in (*own, *outliers, *ood)] == [36, 9, 50, 24, 6, 20]
    np.save(tmp_path / "leak.npy", train[50:52])
    with refused("OOD set 'leak.npy' shares 2 images with the ID set 'fashion-mnist'"):
        load_experiment(
            id="fashion-mnist", auxiliary="photo-patches", ood=[str(tmp_path / "leak.npy")], data_dir=tmp_path
        )


# Real sets


@needs_shared
def test_real_mnist(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for file in sorted((SHARED / "mnist").glob("*.gz")):
        (raw / file.name).symlink_to(file)
    with refused("'mnist' is incomplete or damaged in '.*'; add --download"):
        load_set("mnist", data_dir=tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", refuse_network)  # download then only unpacks what is there
    test = load_set("mnist", data_dir=tmp_path, download=True)
    assert (len(test), test.shape, test.labels[:5].tolist()) == (10000, (1, 28, 28), [7, 2, 1, 0, 4])
    resized = load_set("mnist:3,7", data_dir=tmp_path, shape=(3, 32, 32))
    assert resized.shape == (3, 32, 32)
    assert Counter(resized.labels.tolist()) == {0: 1010, 1: 1028}
    letters, _ = shared_set("letters_test")
    np.save(tmp_path / "letters.npy", letters)
    specs = {"id": "mnist:0-5", "auxiliary": "mnist:6,7", "ood": ["mnist:8,9", str(tmp_path / "letters.npy")]}
    experiment = load_experiment(**specs, data_dir=tmp_path, train_limit=3000)
    own, outliers, ood = parts(experiment)
    assert [len(part) for part in (*own, *outliers, *ood)] == [3000, 7203, 6031, 3000, 2437, 1983, 2080]
    everything = (*own, *outliers, *ood)
    assert len(set.union(*map(hashes, everything))) == sum(map(len, everything))


@needs_shared
def test_real_cifar(tmp_path):
    for name in ("cifar10_train", "cifar100_test", "tin32_outliers"):
        pixels, meta = shared_set(name)
        np.savez(tmp_path / f"{name}.npz", images=pixels, labels=meta["y"].astype(np.int64))
    path = {name: str(tmp_path / f"{name}.npz") for name in ("cifar10_train", "cifar100_test", "tin32_outliers")}
    np.save(tmp_path / "plain.npy", pixels)
    assert torch.equal(load_set(str(tmp_path / "plain.npy")).images, load_set(path["tin32_outliers"]).images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experiment = load_experiment(
            id=path["cifar10_train"], auxiliary=path["tin32_outliers"], ood=[path["cifar100_test"], "gaussian-noise"]
        )
    own, outliers, ood = parts(experiment)
    assert [len(part) for part in (*own, *outliers, *ood)] == [4800, 1600, 1600, 1619, 405, 1000, 200]
    assert {part.shape for part in (*own, *outliers, *ood)} == {(3, 32, 32)}
    assert set(Counter(experiment.test.labels.tolist()).values()) <= {159, 160, 161}
    leak = save(tmp_path / "leak.npy", shared_set("cifar10_train")[0][:25])
    with refused("OOD set 'leak.npy' shares 25 images with the ID set 'cifar10_train.npz'"):
        load_experiment(id=path["cifar10_train"], auxiliary=path["tin32_outliers"], ood=[leak])
    seen = save(tmp_path / "seen.npy", shared_set("tin32_outliers")[0][:25])
    experiment = load_experiment(id=path["cifar10_train"], auxiliary=path["tin32_outliers"], ood=[seen])
    assert experiment.auxiliary_removed == {"seen.npy": 25}
    assert len(experiment.auxiliary) + len(experiment.auxiliary_heldout) == 2024 - 25
