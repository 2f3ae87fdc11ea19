from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from grood_cert.data import load_experiment, load_set, splits_of
from grood_cert.data.splits import parts_of
from tests.data.examples import RNG, SHARED, classes_on_disk, hashes, needs_shared, refused, save, write_idx


def sets(id, **options):
    return load_experiment(**{"id": str(id), "auxiliary": "photo-patches", "ood": ["smooth-noise"], **options})


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["train", "VALIDATION", "Test"], {"train": "train", "calibration": "VALIDATION", "test": "Test"}),
        (["train", "eval"], {"train": "train", "test": "eval"}),
        (["valid", "test"], {"calibration": "valid", "test": "test"}),
        (["val"], {"train": "val"}),
        (["cat", "dog"], {}),
    ],
)
def test_which_split_plays_which_part(names, parts):
    assert parts_of(names, "x") == parts
    assert parts_of(reversed(names), "x") == parts


def test_two_splits_of_one_meaning_are_refused(tmp_path):
    for name in ("train", "val", "validation"):
        classes_on_disk(tmp_path / name, "ab")
    with refused("has splits 'val' and 'validation', which mean the same; keep one of them"):
        load_set(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (("train", "val", "test"), (24, 24, 24)),
        (("Train", "validation"), (19, 5, 24)),
        (("training", "test"), (19, 5, 24)),
        (("train",), (14, 5, 5)),
    ],
)
def test_a_folder_of_splits_is_a_set_with_splits(tmp_path, names, sizes):
    """Never the classes "train" and "val"; each part consists of pictures of its folder alone."""
    for name in names:
        classes_on_disk(tmp_path / name, ("cat", "dog"), count=12)
    found = sets(tmp_path)
    parts = (found.train, found.calibration, found.test)
    assert tuple(map(len, parts)) == sizes
    assert all(part.class_names == ("cat", "dog") for part in parts)
    assert len(set.union(*map(hashes, parts))) == sum(sizes)
    assert hashes(found.train) <= hashes(load_set(str(tmp_path / names[0])))
    if len(names) > 1:
        assert hashes(found.test) == hashes(load_set(str(tmp_path / names[-1])))
        assert found.notes[0].startswith(
            f"ID images: {sizes[0]} to train on from '{tmp_path.name}', split '{names[0]}'"
        )
        assert f"{sizes[2]} for test from its split '{names[-1]}'" in found.notes[0]


def test_folders_beside_splits_are_named_and_one_split_among_classes_is_a_class(tmp_path):
    for name in ("train", "test"):
        classes_on_disk(tmp_path / "a" / name, "pq")
    (tmp_path / "a/annotations").mkdir()
    assert load_set(str(tmp_path / "a")).note == "beside its splits, unused: annotations"
    for name in ("train", "car"):  # what stands on rails
        classes_on_disk(tmp_path / "b", [name])
    assert load_set(str(tmp_path / "b")).class_names == ("car", "train")
    assert splits_of(str(tmp_path / "b")) == {}


def test_classes_are_those_of_the_train_split(tmp_path):
    classes_on_disk(tmp_path / "train", "abc", count=9)
    classes_on_disk(tmp_path / "val", "cb")
    found = sets(tmp_path)
    assert found.test.labels.tolist() == [1] * 5 + [2] * 5 and found.test.class_names == ("a", "b", "c")
    assert load_set(f"{tmp_path}:2").images.equal(load_set(str(tmp_path / "val/c")).images)
    classes_on_disk(tmp_path / "val", "d")
    with refused("test set '.*' has images of class 'd', which the ID set '.*' has not; its classes are a, b, c"):
        sets(tmp_path)
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").mkdir()
    for index in range(3):  # as of contests: without labels
        Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"val/{index}.png")
    with refused("the test set '.*' has images of class 'val'"):
        sets(tmp_path)
    assert len(load_set(str(tmp_path))) == 3, "as an OOD set it needs no labels"


def test_splits_without_one_to_train_on(tmp_path):
    for name in ("val", "test"):
        classes_on_disk(tmp_path / name, "ab")
    with refused("ID set '.*' has splits val and test, and none to train on"):
        sets(tmp_path)
    assert hashes(load_set(str(tmp_path), split="calibration")) == hashes(load_set(str(tmp_path / "val")))


def test_parts_may_be_sets_of_their_own(tmp_path):
    digits = load_set("digits:0-3")
    pixels, labels = digits.images.numpy(), digits.labels.numpy()
    cut = {"id": slice(0, 400), "calibration": slice(390, 550), "test": slice(540, 700)}  # ten are shared each
    paths = {name: save(tmp_path / f"{name}.npz", x=pixels[where], y=labels[where]) for name, where in cut.items()}
    found = sets(**paths)
    assert [len(part) for part in (found.train, found.calibration, found.test)] == [390, 150, 160]
    assert torch.equal(found.test.images, digits.images[540:700]) and torch.equal(
        found.test.labels, digits.labels[540:700]
    )
    assert found.notes[0] == (
        "ID images: 390 to train on from 'id.npz'; 150 for calibration from 'calibration.npz'; 160 for test from 'test.npz'"
    )
    assert any(note.startswith("10 images of 'calibration.npz' are not calibrated on") for note in found.notes)
    assert any(note.startswith("10 images of 'id.npz' are not trained on") for note in found.notes)
    alone = sets(paths["id"], test=paths["test"])
    assert [len(part) for part in (alone.train, alone.calibration, alone.test)] == [320, 80, 160]
    for options, message in (
        ({"test": paths["id"]}, "test set '.*id.npz' and ID set '.*id.npz' are the same source"),
        (
            {"test": paths["test"], "calibration": paths["test"]},
            "calibration set .* and test set .* are the same source",
        ),
        ({"test": paths["test"], "ood": [paths["test"]]}, "OOD set '.*' and test set '.*' are the same source"),
        ({"test": save(tmp_path / "copy.npz", x=pixels[:400])}, "holds nothing but images of its test set"),
    ):
        with refused(message):
            sets(paths["id"], **options)


def test_labels_of_other_files_meet_by_name_or_by_number(tmp_path):
    pictures = classes_on_disk(tmp_path / "train", ("cat", "dog", "elk"), count=9)
    numbered = save(tmp_path / "x.npz", x=RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), y=[0, 1, 2, 0, 1, 2])
    found = sets(tmp_path / "train", test=numbered)
    assert found.test.class_names == tuple(pictures) and found.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    classes_on_disk(tmp_path / "other", ("elk", "cat"), count=2)
    assert sets(tmp_path / "train", test=str(tmp_path / "other")).test.labels.tolist() == [0, 0, 2, 2]


def test_the_same_ood_set_twice_is_refused(tmp_path):
    first = save(tmp_path / "a.npy", RNG.random((5, 1, 8, 8)))
    shutil.copy(first, tmp_path / "b.npy")
    with refused("OOD sets 'a.npy' and 'b.npy' hold the same images; give each set once"):
        load_experiment(id="digits:0-5", auxiliary="digits:6,7", ood=[first, str(tmp_path / "b.npy")])


@pytest.mark.parametrize("style", ["medmnist", "keras"])
def test_splits_in_a_numpy_file(tmp_path, style):
    pixels = {name: RNG.integers(0, 256, (20, 8, 8), dtype=np.uint8) for name in ("train", "val", "test")}
    labels = {name: np.arange(20, dtype=np.uint8) % 3 for name in pixels}
    if style == "medmnist":
        arrays = {f"{name}_images": pixels[name] for name in pixels} | {
            f"{name}_labels": labels[name][:, None] for name in pixels
        }
    else:
        del pixels["val"]
        arrays = {f"x_{name}": pixels[name] for name in pixels} | {f"y_{name}": labels[name] for name in pixels}
    path = save(tmp_path / "x.npz", **arrays)
    found = sets(path)
    sizes = (20, 20, 20) if style == "medmnist" else (16, 4, 20)
    assert (len(found.train), len(found.calibration), len(found.test)) == sizes
    assert torch.equal(found.test.images, torch.from_numpy(pixels["test"][:, None].astype(np.float32) / 255))
    assert found.test.labels.tolist() == labels["test"].tolist()
    assert load_set(f"{path}:2", split="train").labels.tolist() == [0] * 6


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_as_they_come(tmp_path, packed):
    arrays = {}
    for split in ("train", "t10k"):
        arrays[split] = RNG.integers(0, 256, (20, 8, 8), dtype=np.uint8), np.arange(20, dtype=np.uint8) % 4
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays[split], strict=True):
            path = tmp_path / f"{split}-{kind}-ubyte"
            write_idx(path, array)
            if packed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
    found = sets(tmp_path)
    assert (len(found.train), len(found.calibration), len(found.test)) == (16, 4, 20)
    assert torch.equal(found.test.images, torch.from_numpy(arrays["t10k"][0][:, None].astype(np.float32) / 255))
    assert found.test.labels.tolist() == arrays["t10k"][1].tolist()
    file = str(tmp_path / "train-images-idx3-ubyte") + ".gz" * packed
    assert load_set(file).labels.tolist() == arrays["train"][1].tolist()
    Path(file.replace("images-idx3", "labels-idx1")).unlink()
    alone = load_set(file)
    assert (alone.labels.any(), alone.note) == (False, "no file of labels beside it")


def test_damaged_idx_files(tmp_path):
    pixels = RNG.integers(0, 256, (4, 8, 8), dtype=np.uint8)
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(path, pixels)
    whole = path.read_bytes()
    claims = whole[:4] + b"\xff" * 12
    for content, message in (
        (b"", "cannot be read as images or labels of MNIST's format"),
        (b"<html>", "its header is not that of bytes along 3 axes"),
        (whole[:-3], "its header claims 256 bytes, which the file does not hold|holds more or fewer bytes"),
        (whole + b"x", "holds more or fewer bytes than the 256"),
        (claims + whole[16:], "its header claims .* bytes, which the file does not hold"),
        (gzip.compress(claims + whole[16:]), "its header claims .* bytes, which the file does not hold"),
        (gzip.compress(whole)[:-20], "cannot be read as images"),
    ):
        path.write_bytes(content)
        with refused(message):
            load_set(str(path))
    path.write_bytes(whole)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(3, dtype=np.uint8))
    with refused("labels of .* of shape \\(3,\\); they must be integers of shape \\(4,\\)"):
        load_set(str(path))


@needs_shared
def test_real_mnist_as_it_comes():
    images = load_set(str(SHARED / "mnist"), split="test")
    assert (len(images), images.shape, images.labels[:5].tolist()) == (10000, (1, 28, 28), [7, 2, 1, 0, 4])
