from __future__ import annotations

import dataclasses
import subprocess
import sys
import tomllib

import pytest

from grood_cert.errors import InputError
from grood_cert.recipe import Recipe, find, first_difference, from_dict, load


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
        ({"network": {"width": 100000000}}, "network.width: expected 0 to 65536, got 100000000"),
        ({"objective": {"lambda_grad": 10**400}}, "objective.lambda_grad: expected a finite number, got inf"),
        ({"lambda_grad": 0.1}, "lambda_grad: unknown key; did you mean objective.lambda_grad?"),
        ({"optimizer": {"m_in": -1.0}}, "optimizer.m_in: unknown key; did you mean objective.m_in?"),
        ({"data": {"seeds": 1}}, "data.seeds: unknown key; did you mean data.seed?"),
        ({"xyzzy": 1}, "xyzzy: unknown key; known are name, seed, data, network, objective, sampling, optimizer"),
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
            "network.name: expected one of conv-small, mlp, resnet18, resnet18-imagenet, resnet-small, ",
        ),
        ({"name": 3}, "name: expected a text, got 3"),
        ({"data": {"ood": "digits:8"}}, "data.ood: expected a list of texts such as [\"digits:8,9\"], got 'digits:8'"),
        ({"data": {"ood": [1]}}, "data.ood: expected a list of texts"),
        ({"objective": {"m_in": -2, "m_out": -2}}, "m_in must lie below m_out, got -2.0 and -2.0"),
        ("text", "recipe: expected a table, got 'text'"),
        ({"seed": 2**63}, f"seed: expected a value below 2**63, got {2**63}"),
        ({"data": {"seed": 2**64}}, f"data.seed: expected a value below 2**63, got {2**64}"),
        ({"objective": {"outlier_loss": "none"}}, 'outlier_loss = "none" leaves nothing for lambda_S to weigh; use'),
        ({"optimizer": {"lr": 1e-7}}, "optimizer: the cosine falls from lr to lr_min, got 1e-07 and 1e-06"),
        ({"objective": {"certified": "ood"}}, 'objective: certified = "ood" needs a certified_eps above 0'),
        (
            {"objective": {"penalty": "quick"}},
            "objective.penalty: expected one of exact, fast, stochastic, got 'quick'",
        ),
        ({"objective": {"penalty_share": 1.5}}, "objective.penalty_share: expected 1 or less, got 1.5"),
        (
            {"objective": {"reduction": "reference"}, "optimizer": {"accumulate": 2}},
            'reduction = "reference" divides by the size of the batch; use optimizer.accumulate = 1',
        ),
        ({"compute": {"precision": "bf16"}}, 'precision = "bf16" does not go with the second derivatives of penalty'),
        ({"compute": {"compile": True}}, 'compile does not go with the second derivatives of penalty = "exact"'),
        (
            {"objective": {"lambda_grad": 0, "certified": "ood", "certified_eps": 0.1}, "compute": {"compile": True}},
            'objective: certified = "ood": bounds are trained in float32 and without compute.compile',
        ),
        ({"compute": {"compile": 1}}, "compute.compile: expected true or false, got 1"),
        ({"optimizer": {"milestones": [50]}}, 'milestones are for schedule = "multistep", not for "cosine"'),
        ({"optimizer": {"schedule": "multistep"}}, "multistep needs milestones, ascending and from 1, got []"),
        ({"optimizer": {"schedule": "multistep", "milestones": [5, 5]}}, "ascending and from 1, got [5, 5]"),
        ({"optimizer": {"schedule": "multistep", "milestones": [60]}}, "milestone 60 is never reached in 60 epochs"),
        ({"optimizer": {"milestones": [1.5]}}, "expected a list of whole numbers such as [50, 75], got [1.5]"),
        ({"augmentation": {"noise_sigma": -0.1}}, "augmentation.noise_sigma: expected 0 or more, got -0.1"),
        ({"evaluation": {"temperature": 0}}, "evaluation.temperature: expected a value above 0, got 0.0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(values, message):
    assert message in refusal(values)


def test_all_problems_are_said_at_once():
    message = refusal({"sed": 1, "optimizer": {"epochs": "many"}, "objective": {"lambda_S": -1}})
    assert "did you mean seed?" in message
    assert "optimizer.epochs: expected a whole number, got 'many'" in message
    assert "objective.lambda_S: expected 0 or more, got -1.0" in message
    message = refusal({"objective": {"lambda_grad": -1, "m_in": -2, "m_out": -25}, "compute": {"precision": "bf16"}})
    assert "objective.lambda_grad: expected 0 or more, got -1.0" in message
    assert "m_in must lie below m_out, got -2.0 and -25.0" in message
    assert "bf16" not in message, "no contradiction is claimed of a setting that is itself in question"


def test_a_contradiction_is_not_claimed_of_a_default_in_the_place_of_a_bad_value():
    assert "m_in must lie" not in refusal({"objective": {"m_in": "low", "m_out": -25}})


def test_bf16_and_compile_go_with_what_has_no_second_derivatives():
    for objective in ({"penalty": "fast"}, {"lambda_grad": 0}):
        from_dict({"objective": objective, "compute": {"precision": "bf16", "compile": True}})


def test_lr_min_is_of_the_cosine_alone():
    from_dict({"optimizer": {"lr": 1e-7, "schedule": "constant"}})
    from_dict({"optimizer": {"lr": 1e-6}})


def test_a_recipe_as_toml_is_the_recipe():
    recipe = from_dict({"name": 'a "b"', "optimizer": {"schedule": "multistep", "milestones": [2, 4]}, "seed": 3})
    assert from_dict(tomllib.loads(recipe.to_toml())) == recipe


def test_an_older_recipe_still_loads():
    """As a checkpoint of version 0.1 holds it: without the sections and settings that came later."""
    old = {
        "name": "digits-greg",
        "seed": 0,
        "data": {"id": "digits:0-5", "auxiliary": "digits:6,7", "ood": ["digits:8,9"], "calibration_share": 0.2},
        "network": {"name": "conv-small", "width": 0, "hidden_layers": 2},
        "objective": {"lambda_S": 0.1, "lambda_grad": 0.1, "m_in": -6.0, "m_out": -2.0, "slope": "gradient-norm"},
        "optimizer": {"name": "adam", "lr": 0.002, "schedule": "cosine", "epochs": 60, "batch_size": 64},
    }
    recipe = from_dict(old)
    assert recipe.optimizer.lr_min == 1e-6 and recipe.sampling.method == "uniform"
    assert (recipe.objective.penalty, recipe.objective.coordinates) == ("exact", "pixels")


def test_first_difference():
    recipe = Recipe()
    other = from_dict({"optimizer": {"lr": 0.5, "epochs": 3}, "evaluation": {"keep": "best"}})
    assert first_difference(recipe, recipe) is None
    assert first_difference(recipe, other) == "optimizer.lr = 0.002, not 0.5"


def test_a_base_gives_what_is_not_stated(tmp_path):
    (tmp_path / "root.toml").write_text("seed = 3\n[optimizer]\nlr = 0.5\nepochs = 7\n[data]\nood = ['a', 'b']\n")
    (tmp_path / "leaf.toml").write_text(
        "base = 'root.toml'\nname = 'leaf'\n[optimizer]\nlr = 0.1\n[data]\nood = ['c']\n"
    )
    recipe = load(tmp_path / "leaf.toml", ["optimizer.epochs=2"])
    assert recipe.name == "leaf" and recipe.seed == 3 and recipe.data.ood == ("c",)
    assert (recipe.optimizer.lr, recipe.optimizer.epochs) == (0.1, 2)
    (tmp_path / "shipped.toml").write_text("base = 'digits-greg'\nseed = 5\n")
    assert load(tmp_path / "shipped.toml") == dataclasses.replace(Recipe(), seed=5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base = 3", "base: expected the name of a recipe, got 3"),
        ("base = 'nowhere'", "nowhere: no such recipe file, and no recipe of that name"),
        ("base = 'leaf.toml'", "base 'leaf.toml' has a base itself; name 'digits-greg' and state the rest"),
        ("base = 'bad.toml'", "bad.toml: not a readable TOML file"),
    ],
)
def test_bad_bases(tmp_path, content, message):
    (tmp_path / "leaf.toml").write_text("base = 'digits-greg'\n")
    (tmp_path / "bad.toml").write_text("name =")
    (tmp_path / "a.toml").write_text(content)
    with pytest.raises(InputError) as caught:
        load(tmp_path / "a.toml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_find_prefers_a_path_and_hints_at_a_name(tmp_path):
    assert find("digits-greg").read_text().startswith("# GReg")
    (tmp_path / "digits-greg").write_text("seed = 9\n")
    assert find("digits-greg", tmp_path) == tmp_path / "digits-greg"
    with pytest.raises(InputError, match=r"train/digits-gerg\.toml: no such recipe file.*did you mean digits-greg\?"):
        find("train/digits-gerg.toml")


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
