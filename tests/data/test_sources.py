from __future__ import annotations

import ast
import subprocess
import sys

import torch

from grood_cert.data import SOURCES, load_set
from grood_cert.data.sources import LOADERS
from tests.data.examples import refused


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
    code = """
import sys
from grood_cert.data import load_set
load_set("digits")
print(sorted(name for name in sys.modules if name.startswith(("grood_cert.", "auto_LiRPA", "torchvision"))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(done.stdout)
    needed = ("grood_cert.data", "grood_cert.errors", "grood_cert.recipe", "grood_cert.sections")
    assert all(name.startswith(needed) for name in loaded), loaded


def test_every_source_has_a_loader():
    for source in (*SOURCES, "imagenet@imagenet-10", "x.npz", "hf:x", "x.tar", "x-images-idx3-ubyte.gz", "x.png", "."):
        assert any(loader.reads(source) for loader in LOADERS), source
