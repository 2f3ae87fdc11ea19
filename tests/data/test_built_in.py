from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from grood_cert.data import NOISE, built_in, load_set
from grood_cert.errors import RunError
from tests.data.examples import hashes, refused


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


def test_scikit_learn_would_read_the_same():
    data, read = load_digits(), load_set("digits")
    assert np.array_equal(read.images[:, 0] * 16, data.images) and np.array_equal(read.labels, data.target)
    for name, photo in zip(("china.jpg", "flower.jpg"), load_sample_images().images, strict=True):
        with Image.open(built_in._of_scikit_learn(f"images/{name}")) as picture:
            assert np.array_equal(np.asarray(picture), photo)


def test_a_scikit_learn_without_its_files_is_named():
    with pytest.raises(RunError, match=r"no datasets/data/letters\.csv\.gz; install"):
        built_in._of_scikit_learn("data/letters.csv.gz")
