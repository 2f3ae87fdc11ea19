from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest
from filelock import FileLock


@pytest.fixture(autouse=True)
def one_thread():
    """Test processes share the cores; one thread each is faster than two that wait for one another."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def quick_attacks(monkeypatch):
    """All efforts with a weak attack, for tests of what is proved."""
    from grood_cert.attacks import AttackEffort
    from grood_cert.certification.settings import EFFORTS

    for name, effort in EFFORTS.items():
        monkeypatch.setitem(EFFORTS, name, replace(effort, attack=AttackEffort(8, 0, 2, 8, 1)))


_GRAPHS: WeakKeyDictionary = WeakKeyDictionary()


@pytest.fixture
def captured_once(monkeypatch):
    """Cascades of one detector share its graph, for tests of what comes after."""
    from grood_cert.certification import cascade

    capture = cascade.capture

    def captured(network, shape):
        if network not in _GRAPHS:
            _GRAPHS[network] = capture(network, shape)
        return _GRAPHS[network]

    monkeypatch.setattr(cascade, "capture", captured)


@pytest.fixture(scope="session")
def small_recipe():
    """The demo's recipe, cut to a few seconds; the OOD sets are those that are loaded at once."""
    from grood_cert.recipe import Recipe

    recipe = Recipe()
    data = replace(recipe.data, ood=("digits:8,9", "uniform-noise"))
    return replace(recipe, name="small", data=data, optimizer=replace(recipe.optimizer, epochs=12, batch_size=128))


def made_once(name, tmp_path_factory, make) -> Path:
    """A folder that one of the test processes fills for all of them; nobody changes it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with FileLock(root / f"{name}.lock"):
        if not (made := root / f"{name}.made").exists():
            (root / name).mkdir()
            make(root / name)
            made.touch()
    return root / name


@pytest.fixture(scope="session")
def model(small_recipe, tmp_path_factory) -> Path:
    """A checkpoint of a small GReg detector on digits."""
    from grood_cert.training import run as training

    return made_once("model", tmp_path_factory, lambda folder: training.run(small_recipe, folder)) / "model.pt"


@pytest.fixture(scope="session")
def mlp_model(small_recipe, tmp_path_factory) -> Path:
    """A checkpoint of one hidden layer of 16 neurons, for tests of what takes its time: it takes less here."""
    from grood_cert.training import run as training

    network = replace(small_recipe.network, name="mlp", width=16, hidden_layers=1)
    recipe = replace(small_recipe, network=network)
    return made_once("mlp", tmp_path_factory, lambda folder: training.run(recipe, folder)) / "model.pt"


@pytest.fixture(scope="session")
def rows_file(model, tmp_path_factory) -> Path:
    """Rows of that detector, a few samples of each set."""
    from grood_cert import detector
    from grood_cert.certification.settings import Settings
    from grood_cert.data import experiment_of
    from grood_cert.runs import certify as certification

    def make(folder):
        loaded = detector.load(model)
        experiment = experiment_of(loaded.origin.recipe)
        settings = Settings(eps=(0.01, 0.03, 0.1), effort="fast", per_logit=True)
        certification.run(loaded, model, [experiment.test, *experiment.ood], settings, folder, limit=12)

    return made_once("rows", tmp_path_factory, make) / "rows.csv"
