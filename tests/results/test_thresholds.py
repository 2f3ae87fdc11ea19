from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from grood_cert import detector
from grood_cert.ball import Ball
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.score import score_bounds
from grood_cert.certification.settings import Settings
from grood_cert.data import experiment_of
from grood_cert.errors import InputError
from grood_cert.results.columns import SCHEMAS
from grood_cert.results.table import Table
from grood_cert.results.thresholds import at_gamma
from grood_cert.runs import certify as certification


@pytest.fixture(scope="module")
def found(rows_file):
    return Table.read(rows_file)


@pytest.mark.parametrize("shift", [-2.0, -0.4, 0.4, 2.0])
def test_every_radius_at_another_gamma_is_proved_by_a_fresh_engine(found, model, shift):
    loaded = detector.load(model)
    gamma = found.gamma + shift
    moved = at_gamma(found, gamma)
    experiment = experiment_of(loaded.origin.recipe)
    sets = {images.name: images for images in (experiment.test, *experiment.ood)}
    for kind in ("id", "ood"):
        mask = moved.of_kind(kind) & (moved["status"] == "certified")
        if not mask.any():
            continue
        names = zip(moved["set"][mask].tolist(), moved["index"][mask].tolist(), strict=True)
        images = torch.stack([sets[name].images[index] for name, index in names]).double()
        ball = Ball(images, torch.tensor(moved["radius_certified"][mask]), "linf")
        bounds = score_bounds(NativeNetwork(loaded.network, (1, 8, 8), "crown"), ball)
        # Engines differ in the last digits; a radius searched to the edge at the old gamma may go on.
        assert bool((bounds.upper < gamma + 1e-9).all() if kind == "id" else (bounds.lower > gamma - 1e-9).all())
    right = (moved["score"] <= gamma) == moved.of_kind("id")
    assert ((moved["status"] == "misdecided") == ~right).all()
    assert (moved["radius_certified"] <= moved["radius_attack"]).all()


def test_an_attack_at_another_gamma_is_one(found):
    for gamma in (found.gamma - 1, found.gamma + 1):
        moved = at_gamma(found, gamma)
        inside = moved.of_kind("id")
        for column, eps in enumerate(found.eps):
            broken = np.where(
                inside, found.grid["s_attack_max"][:, column] > gamma, found.grid["s_attack_min"][:, column] <= gamma
            )
            assert (moved["radius_attack"][broken] <= eps).all()
            attacked = moved.grid["outcome"][:, column] == "attack"
            assert (moved["radius_attack"][attacked] <= eps).all()
        assert ((moved.grid["outcome"] == "misdecision").all(1) == (moved["status"] == "misdecided")).all()


def test_the_look_up_never_beats_a_run_at_that_gamma(found, model, tmp_path, quick_attacks):
    """A certification made at the other gamma knows at least as much: its search goes between the values of the grid."""
    loaded = detector.load(model)
    gamma = found.gamma + 0.5
    experiment = experiment_of(loaded.origin.recipe)
    settings = Settings(eps=found.eps, stages=("ibp", "crown"), engine="native")
    sets = [experiment.test, *experiment.ood[:1]]
    certification.run(replace(loaded, gamma=gamma), model, sets, settings, tmp_path, limit=12)
    fresh, moved = Table.read(tmp_path / "rows.csv"), at_gamma(found, gamma)
    names = set(fresh["set"].tolist())
    mask = np.isin(moved["set"], list(names))
    assert (moved["index"][mask] == fresh["index"]).all()
    assert (moved["radius_certified"][mask] <= fresh["radius_certified"] * 1.02).all()
    larger_grid = fresh["radius_certified"] >= found.eps[0]
    assert (moved["radius_certified"][mask][larger_grid] > 0).all()
    assert (moved["accepted"][mask] == fresh["accepted"]).all()


def test_the_same_gamma_changes_nothing_and_files_read_back(found, tmp_path):
    assert at_gamma(found, found.gamma) is found
    moved = at_gamma(found, found.gamma + 0.25)
    moved.write(tmp_path / "moved.csv")
    back = Table.read(tmp_path / "moved.csv")
    assert back.gamma == moved.gamma and back.manifest["gamma_certified_at"] == found.gamma
    for name in SCHEMAS["certification"].columns:
        np.testing.assert_array_equal(back[name], moved[name])
    np.testing.assert_array_equal(back.grid["outcome"], moved.grid["outcome"])
    with pytest.raises(InputError, match="gamma must be a finite number"):
        at_gamma(found, float("nan"))
