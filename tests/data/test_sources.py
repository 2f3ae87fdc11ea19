from __future__ import annotations

import importlib
import sys
import warnings

import torch

from grood_cert.data import SOURCES, load_set
from grood_cert.data.sources import LOADERS
from tests.data.examples import refused
from tests.faults.forks import Child, forget, report


def test_unknown_source_names_the_nearest_and_all():
    with refused("there is no image set 'minst', did you mean 'mnist'") as caught:
        load_set("minst")
    assert all(source in str(caught.value) for source in SOURCES)
    with refused("did you mean 'cifar10'"):
        load_set("CIFAR10")
    for spec in ("", ":3", "@@@@"):
        with refused(f"there is no image set '{spec}'; sets are digits, "):
            load_set(spec)


def test_class_out_of_range():
    with refused("class 10 in 'digits:8-10' is out of range: 'digits' has classes 0 to 9"):
        load_set("digits:8-10")
    with refused("class 1 in 'uniform-noise:1' is out of range: .* has class 0 only"):
        load_set("uniform-noise:1")


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


def test_loading_images_needs_no_trainer_and_no_engine():
    ours = "grood_cert", "auto_LiRPA", "torchvision"

    def act():
        warnings.simplefilter("ignore")
        forget(*ours)
        importlib.import_module("grood_cert.data").load_set("digits")
        for name in sys.modules:
            if name.startswith(ours):
                report(name)

    ended = Child(act).wait()
    assert ended.code == 0, ended.said
    loaded = [name for name in ended.heard if name != "grood_cert"]
    needed = ("grood_cert.data", "grood_cert.errors", "grood_cert.recipe", "grood_cert.sections")
    assert all(name.startswith(needed) for name in loaded), loaded


def test_every_source_has_a_loader():
    for source in (*SOURCES, "imagenet@imagenet-10", "x.npz", "hf:x", "x.tar", "x-images-idx3-ubyte.gz", "x.png", "."):
        assert any(loader.reads(source) for loader in LOADERS), source
