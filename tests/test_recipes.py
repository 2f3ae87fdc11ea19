"""Every recipe under train/ loads and takes a step: on its own data where these are embedded, else on stand-ins."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from grood_cert import detector, training
from grood_cert.data import TORCHVISION, parse_spec
from grood_cert.recipe import Recipe, load

FOLDER = Path(__file__).parents[1] / "train"
RECIPES = sorted(FOLDER.rglob("*.toml"))
SHAPES = {"digits": (8, 8), "mnist": (28, 28), "cifar10": (32, 32, 3)}


def stand_ins(recipe: Recipe, folder: Path) -> list[str]:
    """Settings that put small random arrays, of the right shape and number of classes, in the place of big sets."""
    source, classes = parse_spec(recipe.data.id)
    if source not in TORCHVISION:
        return []
    rng = np.random.default_rng(0)
    count = len(classes or range(10))

    def save(name: str, size: int) -> str:
        labels = np.arange(size) % count
        np.savez(folder / name, images=rng.integers(0, 256, (size, *SHAPES[source]), np.uint8), labels=labels)
        return str(folder / name)

    inside, auxiliary, outside = save("id.npz", 220), save("auxiliary.npz", 20), save("ood.npz", 20)
    return [f"data.id='{inside}'", f"data.auxiliary='{auxiliary}'", f"data.ood=['{outside}']"]


def test_the_recipes_are_here():
    assert {path.stem for path in RECIPES} >= {
        "digits-energy",
        "digits-greg",
        "digits-mlp-greg",
        "mnist-conv-small-greg",
        "cifar10-resnet18-greg",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_a_step_and_leaves_a_detector(path, tmp_path):
    as_written = load(path)
    assert as_written.name == path.stem
    quick = ["optimizer.epochs=1", "data.train_limit=8", "optimizer.batch_size=8"]
    if as_written.network.name == "resnet18":
        quick.append("network.width=2")
    recipe = load(path, [*stand_ins(as_written, tmp_path), *quick])
    epochs: list[training.Epoch] = []
    training.run(recipe, tmp_path / "run", report=epochs.append)
    assert len(epochs) == 1 and math.isfinite(epochs[0].loss)
    loaded = detector.load(tmp_path / "run" / "model.pt")
    assert loaded.recipe == recipe
    height, width, *channels = SHAPES[parse_spec(as_written.data.id)[0]]
    assert loaded.architecture.shape == (*(channels or [1]), height, width)


def test_the_digits_recipe_states_the_defaults():
    assert load(FOLDER / "digits-greg.toml") == Recipe()


def test_energy_and_greg_differ_in_the_gradient_weight_alone():
    energy, greg = load(FOLDER / "digits-energy.toml"), load(FOLDER / "digits-greg.toml")
    assert greg.objective.lambda_grad > 0
    objective = dataclasses.replace(greg.objective, lambda_grad=0.0)
    assert energy == dataclasses.replace(greg, name="digits-energy", objective=objective)
