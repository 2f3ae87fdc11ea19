from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing

import numpy as np
import pytest

from grood_cert.errors import InputError
from grood_cert.recipe import Recipe, from_dict
from grood_cert.sections import (
    NOT_NEGATIVE,
    DataSection,
    ObjectiveSection,
    OptimizerSection,
    Section,
    one_of,
    setting,
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": "quick"}, "penalty: expected one of exact, fast, stochastic, got 'quick'"),
        ({"penalty_share": 0.0}, "penalty_share: expected a value above 0, got 0.0"),
        ({"certified_ramp": 2.0}, "certified_ramp: expected 1 or less, got 2.0"),
        ({"certified_ramp": -0.5}, "certified_ramp: expected 0 or more, got -0.5"),
        ({"certified_mix": 1.5}, "certified_mix: expected 1 or less, got 1.5"),
        ({"certified_mix": -0.1}, "certified_mix: expected 0 or more, got -0.1"),
        ({"certified_attack_steps": 0}, "certified_attack_steps: expected a value above 0, got 0"),
        ({"lambda_grad": float("nan")}, "lambda_grad: expected a finite number, got nan"),
        ({"lambda_grad": "much"}, "lambda_grad: expected a number, got 'much'"),
        ({"lambda_grad": True}, "lambda_grad: expected a number, got True"),
        ({"slope": "interval", "penalty": "fast"}, "differentiated exactly and in pixels"),
        ({"slope": "first-order", "slope_eps": 0.1, "coordinates": "normalised"}, 'first-order" is in pixels'),
        ({"slope": "first-order"}, 'slope = "first-order" needs a slope_eps above 0'),
        ({"slope": "first-order", "slope_eps": 0.1, "reduction": "reference"}, 'needs slope = "gradient-norm"'),
        ({"reduction": "reference", "penalty": "fast"}, 'needs slope = "gradient-norm" and penalty = "exact"'),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        ObjectiveSection(**settings)
    with pytest.raises(InputError, match=message):
        dataclasses.replace(ObjectiveSection(), **settings)
    with pytest.raises(InputError, match=f"recipe: objective.*{message}"):
        from_dict({"objective": settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": [0.5]}, "mean and std need one value a channel each, got 1 and 0"),
        ({"mean": [0.5], "std": [0.0]}, r"std: expected values above 0, got \[0\.0\]"),
        ({"mean": ["a"], "std": [1.0]}, "mean: expected a list of finite numbers"),
        ({"mean": [float("nan")], "std": [1.0]}, "mean: expected a list of finite numbers"),
        ({"mean": [True], "std": [1.0]}, "mean: expected a list of finite numbers"),
    ],
)
def test_half_a_normalisation_is_refused(settings, message):
    with pytest.raises(InputError, match=f"recipe: network.*{message}"):
        from_dict({"network": settings})


def test_all_bad_values_are_said_at_once():
    with pytest.raises(InputError) as caught:
        OptimizerSection(lr=0.0, momentum=1.0, epochs=2.5)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "lr: expected a value above 0, got 0.0; momentum: expected a value below 1, got 1.0; "
        "epochs: expected a whole number, got 2.5"
    )
    with pytest.raises(InputError, match="seed: expected a value below"):
        Recipe(seed=2**63)


def test_numbers_of_python_and_numpy_are_numbers():
    assert ObjectiveSection(lambda_grad=0, m_in=np.float64(-5.0)).m_in == -5
    assert DataSection(ood=["digits:8"]).ood == ["digits:8"]


def test_variants_without_a_formula_are_one_problem_among_others():
    with pytest.raises(InputError) as caught:
        from_dict({"objective": {"slope": "interval", "penalty": "fast"}, "compute": {"precision": "bf16"}, "seed": -1})
    message = str(caught.value)
    assert "seed: expected 0 or more, got -1" in message and 'objective: slope = "interval" is' in message
    assert "precision" not in message, "nothing is claimed of an objective that is itself in question"


@pytest.mark.parametrize("section", [kind for kind in typing.get_type_hints(Recipe).values() if kind not in (str, int)])
def test_defaults_keep_their_rules(section):
    section()


def test_a_setting_is_one_line():
    @dataclasses.dataclass(frozen=True)
    class Example(Section):
        weight: float = setting(0.5, NOT_NEGATIVE)
        kind: str = setting("a", one_of("a", "b"))

    assert Example(0.0, "b") == Example(weight=0.0, kind="b")
    with pytest.raises(InputError, match=r"weight: expected 0 or more, got -1\.0; kind: expected one of a, b, got 'c'"):
        Example(-1.0, "c")


def test_sections_know_neither_torch_nor_files():
    code = "import sys, grood_cert.sections; sys.exit(any(name in sys.modules for name in ('torch', 'tomllib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
