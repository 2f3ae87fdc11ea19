from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from grood_cert.data import load_experiment, load_set, splits_of
from tests.data.examples import COLOUR, RNG, refused

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    datasets = pytest.importorskip("datasets")
FEATURES = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})


def table(pixels, features=FEATURES, **columns):
    columns = columns or {"kind": [index % 2 for index in range(len(pixels))]}
    pictures = [Image.fromarray(image) for image in pixels]
    return datasets.Dataset.from_dict({"photo": pictures, **columns}, features=features)


def test_images_and_labels_are_found_by_the_types_of_their_columns(tmp_path):
    table(COLOUR).save_to_disk(tmp_path / "x")
    images = load_set(f"hf:{tmp_path / 'x'}")
    assert torch.equal(images.images, torch.from_numpy(COLOUR.transpose(0, 3, 1, 2).astype(np.float32) / 255))
    assert (images.name, images.labels.tolist(), images.class_names) == ("x", [0, 1, 0, 1, 0, 1], ("cat", "dog"))
    chosen = load_set(f"hf:{tmp_path / 'x'}:1", shape=(1, 4, 5))
    assert (len(chosen), chosen.class_names, chosen.note) == (3, ("dog",), "3 of 3 images made grey from RGB")


def test_splits(tmp_path):
    sizes = {"train": 20, "validation": 12, "test": 10}
    parts = {name: table(RNG.integers(0, 256, (size, 8, 8), dtype=np.uint8)) for name, size in sizes.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "x")
    spec = f"hf:{tmp_path / 'x'}"
    assert splits_of(spec) == {"train": "train", "calibration": "validation", "test": "test"}
    found = load_experiment(id=spec, auxiliary="digits", ood=[])
    assert [len(part) for part in (found.train, found.calibration, found.test)] == [20, 12, 10]
    assert len(load_set(f"{spec}/validation")) == 12
    datasets.DatasetDict({"clean": parts["train"], "noisy": parts["test"]}).save_to_disk(tmp_path / "y")
    with refused("'hf:.*y' has no train, validation or test split; name one of its own: hf:.*y/clean"):
        load_set(f"hf:{tmp_path / 'y'}")
    assert len(load_set(f"hf:{tmp_path / 'y'}/noisy")) == 10


def test_what_cannot_be_used(tmp_path, monkeypatch):
    features = datasets.Features({"photo": datasets.Image(), "other": datasets.Image()})
    pictures = [Image.fromarray(image) for image in COLOUR]
    datasets.Dataset.from_dict({"photo": pictures, "other": pictures}, features=features).save_to_disk(tmp_path / "two")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    table(COLOUR, kind=[0, 1, None, 0, 0, 0]).save_to_disk(tmp_path / "unlabelled")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("none", "'hf:.*none' does not exist: there is no folder"),
        ("empty", "'.*empty' cannot be read as a data set that save_to_disk wrote"),
        ("two", "has columns photo, other; rename the one to use to 'image'"),
        ("text", "has no column of images; it has text"),
        ("unlabelled", "column kind' run from -1 to 1"),
    ):
        with refused(message):
            load_set(f"hf:{tmp_path / name}")
    table(COLOUR).save_to_disk(tmp_path / "cut")
    (file,) = (tmp_path / "cut").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-200])
    with refused("cut' cannot be read as a data set that save_to_disk wrote"):
        load_set(f"hf:{tmp_path / 'cut'}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused("needs the package datasets; pip install 'grood-cert\\[huggingface\\]'"):
        load_set(f"hf:{tmp_path / 'two'}")
