from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from grood_cert.data import TORCHVISION, load_set
from tests.data.examples import RNG, refuse_network, refused, write_idx


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
    with refused("data set 'dtd' in .* has 1 unreadable images, the first '.*dotted/test.jpg': cannot identify"):
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
