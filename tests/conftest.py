from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def one_thread():
    """Test processes share the cores; one thread each is faster than two that wait for one another."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_recipe():
    """The demo's recipe, cut to a few seconds."""
    from grood_cert.recipe import Recipe

    recipe = Recipe()
    return replace(recipe, name="small", optimizer=replace(recipe.optimizer, epochs=12, batch_size=128))


@pytest.fixture(scope="session")
def model(small_recipe, tmp_path_factory) -> Path:
    """A checkpoint of a small GReg detector on digits."""
    from grood_cert.training import run as training

    folder = tmp_path_factory.mktemp("model")
    training.run(small_recipe, folder)
    return folder / "model.pt"


@pytest.fixture(scope="session")
def rows_file(model, tmp_path_factory) -> Path:
    """Rows of that detector, a few samples of each set."""
    from grood_cert import detector
    from grood_cert.certification.settings import Settings
    from grood_cert.data import experiment_of
    from grood_cert.runs import certify as certification

    loaded = detector.load(model)
    experiment = experiment_of(loaded.origin.recipe)
    folder = tmp_path_factory.mktemp("rows")
    settings = Settings(eps=(0.01, 0.03, 0.1), effort="fast", per_logit=True)
    certification.run(loaded, model, [experiment.test, *experiment.ood], settings, folder, limit=12)
    return folder / "rows.csv"
