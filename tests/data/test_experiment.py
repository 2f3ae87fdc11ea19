from __future__ import annotations

import re
import shutil
import warnings
from collections import Counter
from importlib import resources

import numpy as np
import pytest
import torch

from grood_cert.data import StoredImages, load_experiment, load_set
from tests.data.examples import (
    GREY,
    RNG,
    SHARED,
    classes_on_disk,
    hashes,
    needs_shared,
    refuse_network,
    refused,
    save,
    shared_set,
    write_idx,
)


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
