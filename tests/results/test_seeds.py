"""Which runs are seeds of one training, and what becomes of their curves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from grood_cert.errors import InputError
from grood_cert.results import curves
from grood_cert.results.seeds import by_settings, grouped, over_seeds, spread
from tests.results.examples import random_certification


def run(weight, seed, name="net", **manifest):
    recipe = {"name": name, "seed": seed, "objective": {"lambda_grad": weight, "m_in": -6.0}}
    table = random_certification(seed, samples=6)
    return dataclasses.replace(
        table, manifest={**table.manifest, "model": {"name": name}, "recipe": recipe, **manifest}
    )


def test_runs_of_other_seeds_alone_are_grouped():
    tables = [run(0.0, 0), run(0.1, 0), run(0.0, 1), run(0.1, 3), run(0.1, 3, effort="fast"), random_certification(0)]
    assert by_settings(tables) == [[0, 2], [1, 3], [4], [5]]
    assert by_settings([run(0, 1), run(0, 1), run(0, 2)]) == [[0], [1], [2]]  # a seed twice: which of them would count?
    assert by_settings([run(0, 1, limit=5), run(0, 2, limit=6)]) == [[0], [1]]
    assert by_settings([run(0, 1, gamma=1.0), run(0, 2, gamma=2.0, seconds=3)]) == [[0, 1]]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["lambda_grad=0-seed=0", "lambda_grad=0-seed=1", "lambda_grad=1-seed=0"], ["lambda_grad=0", "lambda_grad=1"]),
        (["net", "net", "net"], ["lambda_grad=0.0", "lambda_grad=1.0"]),
        (["net seed 0", "other", "third"], ["lambda_grad=0.0", "lambda_grad=1.0"]),
    ],
)
def test_groups_have_names(names, found):
    tables = [run(*settings, name) for settings, name in zip(((0.0, 0), (0.0, 1), (1.0, 0)), names, strict=True)]
    paths = [Path(f"{number}/rows.csv") for number in range(3)]
    groups = grouped(tables, paths, [])
    assert list(groups) == found and [len(group) for group in groups.values()] == [2, 1]
    assert list(grouped(tables, paths, ["x", "y"])) == ["x", "y"]
    with pytest.raises(InputError, match="3 labels for 2 groups of 3 results"):
        grouped(tables, paths, ["x", "y", "z"])
    assert list(grouped(tables[:2], paths[:2], [])) == [
        names[0].removesuffix("-seed=0") if "=" in names[0] else "net" if names[0] == "net" else "2 seeds"
    ]
    assert list(grouped(tables[1:], paths[1:], ["x", "y"])) == ["x", "y"]  # nothing to group


def test_a_column_of_several_seeds():
    assert over_seeds([{"a": 0.25, "b": 9.0}, {"a": 1.0, "b": 9.0}, {"a": 0.25, "b": 9.0}], "a") == (0.5, 0.25, 1.0)


def test_means_are_taken_wherever_a_curve_changes():
    """Against clean FPR: the largest share at any gamma whose clean FPR is at most x."""
    tables = [random_certification(seed, samples=9) for seed in range(3)]
    found = [curves.robustness_curve(table, 0.1, {"a": table.sets("ood")["a"]}) for table in tables]
    told = spread(found, "certified")
    for x, mean, least, most in zip(told.x, told.mean, told.least, told.most, strict=True):
        each = [max([0.0, *curve.certified[curve.fpr <= x]]) for curve in found]
        assert (mean, least, most) == pytest.approx((np.mean(each), min(each), max(each)))
    assert set(told.x) == {value for curve in found for value in curve.fpr}
