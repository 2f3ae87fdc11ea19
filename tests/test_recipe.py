from __future__ import annotations

import subprocess
import sys

import pytest

from grood_cert.errors import InputError
from grood_cert.recipe import Recipe, from_dict, load


def refusal(values) -> str:
    with pytest.raises(InputError) as caught:
        from_dict(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_empty_recipe_is_the_default():
    assert from_dict({}) == Recipe()


def test_round_trip():
    recipe = from_dict({"name": "x", "data": {"ood": ["a", "b"]}, "optimizer": {"lr": 1, "epochs": 3}, "seed": 7})
    assert recipe.data.ood == ("a", "b")
    assert recipe.optimizer.lr == 1.0 and type(recipe.optimizer.lr) is float
    assert from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": {"lamda_grad": 0.1}}, "objective.lamda_grad: unknown key; did you mean objective.lambda_grad?"),
        ({"objectiv": {}}, "objectiv: unknown key; did you mean objective?"),
        ({"lambda_grad": 0.1}, "lambda_grad: unknown key; did you mean objective.lambda_grad?"),
        ({"optimizer": {"m_in": -1.0}}, "optimizer.m_in: unknown key; did you mean objective.m_in?"),
        ({"data": {"seeds": 1}}, "data.seeds: unknown key; did you mean data.seed?"),
        ({"xyzzy": 1}, "xyzzy: unknown key; known are name, seed, data, network, objective, optimizer"),
        ({"objective": 3}, "objective: expected a table, got 3"),
        ({"optimizer": {"epochs": 2.0}}, "optimizer.epochs: expected a whole number, got 2.0"),
        ({"optimizer": {"epochs": True}}, "optimizer.epochs: expected a whole number, got True"),
        ({"optimizer": {"epochs": 0}}, "optimizer.epochs: expected a value above 0, got 0"),
        ({"optimizer": {"batch_size": -1}}, "optimizer.batch_size: expected a value above 0, got -1"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr: expected a number, got 'fast'"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: expected a finite number, got nan"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr: expected a finite number, got inf"),
        ({"optimizer": {"momentum": 1.0}}, "optimizer.momentum: expected a value below 1, got 1.0"),
        ({"optimizer": {"name": "adamw"}}, "optimizer.name: expected one of sgd, adam, got 'adamw'"),
        ({"objective": {"lambda_grad": -0.1}}, "objective.lambda_grad: expected 0 or more, got -0.1"),
        (
            {"network": {"name": "conv"}},
            "network.name: expected one of conv-small, mlp, resnet18, resnet-small, got 'conv'",
        ),
        ({"name": 3}, "name: expected a text, got 3"),
        ({"data": {"ood": "digits:8"}}, "data.ood: expected a list of texts such as [\"digits:8,9\"], got 'digits:8'"),
        ({"data": {"ood": [1]}}, "data.ood: expected a list of texts"),
        ({"objective": {"m_in": -2, "m_out": -2}}, "m_in must lie below m_out, got -2.0 and -2.0"),
        ("text", "recipe: expected a table, got 'text'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(values, message):
    assert message in refusal(values)


def test_all_problems_are_said_at_once():
    message = refusal({"sed": 1, "optimizer": {"epochs": "many"}, "objective": {"lambda_S": -1}})
    assert "did you mean seed?" in message
    assert "optimizer.epochs: expected a whole number, got 'many'" in message
    assert "objective.lambda_S: expected 0 or more, got -1.0" in message


def test_settings_override_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('name = "a"\n[objective]\nlambda_grad = 0.5\nm_in = -9\n')
    recipe = load(
        path,
        [
            "objective.lambda_grad=0",
            "data.id=digits:0-3",
            'data.ood=["digits:8", "photo-patches"]',
            "optimizer.lr = 1e-3",
        ],
    )
    assert recipe.name == "a"
    assert (recipe.objective.lambda_grad, recipe.objective.m_in) == (0.0, -9.0)
    assert recipe.data.id == "digits:0-3" and recipe.data.ood == ("digits:8", "photo-patches")
    assert recipe.optimizer.lr == 1e-3
    assert load(path, ["seed=1", "seed=2"]).seed == 2, "the last setting wins"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "objective.lambda_grad",
            "--set objective.lambda_grad: expected KEY=VALUE, for example objective.lambda_grad=0.1",
        ),
        ("=3", "--set =3: expected KEY=VALUE"),
        ("name.x=3", "--set name.x=3: name is not a table"),
        ("objective.lambda_gard=1", "did you mean objective.lambda_grad?"),
        ("optimizer.epochs=ten", "optimizer.epochs: expected a whole number, got 'ten'"),
        ("optimizer=3", "optimizer: expected a table, got 3"),
    ],
)
def test_bad_settings(tmp_path, setting, message):
    path = tmp_path / "a.toml"
    path.write_text('name = "a"\n')
    with pytest.raises(InputError) as caught:
        load(path, [setting])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.toml: no such recipe file"),
        (b"name = ", "a.toml: not a readable TOML file: "),
        (b"name = 'a'\nname = 'b'\n", "a.toml: not a readable TOML file: "),
        (b"\xff\xfe\x00", "a.toml: not a readable TOML file: "),
        (b"[optimizer]\nlr = true\n", "a.toml: optimizer.lr: expected a number, got True"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "a.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(InputError, match="not a readable TOML file"):
        load(tmp_path)


def test_recipes_do_without_torch():
    """The command line answers --help in a fraction of a second only as long as this holds."""
    code = "import sys, grood_cert.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
