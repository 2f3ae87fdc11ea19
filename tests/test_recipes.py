"""Every recipe under train/ loads and takes a step; those that need no data of yours train; the commands hand them out."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from grood_cert import cli, detector
from grood_cert.data import Experiment, ImageSet
from grood_cert.networks.architectures import NETWORKS
from grood_cert.recipe import Recipe, find, from_dict, load, shipped
from grood_cert.training import run as training
from grood_cert.training.loop import Epoch
from grood_cert.training.run import architecture_of
from grood_cert.training.step import Steps, learning_rate

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "train").rglob("*.toml"))
DIGITS = [path for path in RECIPES if path.stem.startswith("digits")]
OTHERS = [path for path in RECIPES if path not in DIGITS]
SETS = {  # what a recipe's name begins with: the shape of its images, and its classes
    "mnist": ((1, 28, 28), 6),
    "cifar10": ((3, 16, 16), 10),  # 32, and 224 below, take times as long and no other path through the network
    "cifar100": ((3, 16, 16), 100),
    "cifar": ((3, 16, 16), 10),
    "imagenet10": ((3, 64, 64), 10),
}


def random_experiment(shape: tuple[int, int, int], classes: int) -> Experiment:
    def images(count: int, names: int) -> ImageSet:
        generator = torch.Generator().manual_seed(count)
        return ImageSet(
            name=f"{count} random images",
            kind="id",
            images=torch.rand(count, *shape, generator=generator),
            labels=torch.arange(count) % names,
            class_names=tuple(map(str, range(names))),
        )

    return Experiment(
        train=images(2, classes),
        calibration=images(1, classes),
        test=images(1, classes),
        auxiliary=images(4, 1),
        auxiliary_heldout=images(1, 1),
        ood=(),
    )


def test_the_recipes_are_here():
    """Every experiment of the paper, the baselines they start from, and one small run of each method."""
    names = {path.stem for path in RECIPES}
    networks, methods = ("resnet18", "wrn-40-2", "densenet-bc-100"), ("ce", "greg", "greg-plus")
    assert names >= {
        f"{data}-{name}-{method}" for data in ("cifar10", "cifar100") for name in networks for method in methods
    }
    assert names >= {"imagenet10-densenet121-greg", "imagenet10-densenet121-greg-plus"}
    assert names >= {
        f"digits-{method}" for method in ("ce", "oe", "energy", "greg", "greg-plus", "certified", "smoothing")
    }
    assert names >= {f"cifar-arrays-{method}" for method in ("energy", "greg", "greg-plus")}
    assert names >= {f"cifar10-resnet20-{method}" for method in ("energy", "greg", "greg-plus", "smoothing")}
    assert len(DIGITS) + len(OTHERS) >= 32


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_bears_the_name_of_its_file_and_its_parts_agree(path):
    recipe = load(path)
    assert recipe.name == path.stem
    named = [item for item in NETWORKS if f"-{item}-" in path.stem]
    assert named in ([], [recipe.network.name])
    lambda_grad, picked = recipe.objective.lambda_grad, recipe.sampling.method == "energy"
    assert picked == ("greg-plus" in path.stem)
    assert (lambda_grad > 0) == ("greg" in path.stem or "certified" in path.stem)
    if "imagenet10" in path.stem or path.stem.startswith(("cifar10-", "cifar100-")):
        assert path.stem.partition("-")[0] in recipe.data.id.replace("-10", "10")
        if lambda_grad and recipe.network.name != "resnet20":  # of the paper
            assert (recipe.objective.m_in, recipe.objective.m_out, recipe.objective.lambda_S) == (-25, -7, 0.1)
            images = recipe.optimizer.batch_size * (3 if picked else 2)
            assert lambda_grad == pytest.approx(1 / images), "the authors' 1, which their code divides by the batch"


def test_the_learning_rates_of_the_paper():
    """GReg: "maximum 1, minimum 0.0001" is base 0.01 times a cosine from 1 to 1e-6 / base. GReg+: 50 epochs, then 10."""
    greg, plus = (load(find(f"cifar10-resnet18-{method}")).optimizer for method in ("greg", "greg-plus"))
    rates = [learning_rate(greg, step, 20 * 781) for step in (0, 20 * 781 - 1)]
    assert rates == pytest.approx([0.01, 1e-6]) and rates[1] / rates[0] == pytest.approx(1e-4)
    rates = [learning_rate(plus, epoch * 781, 60 * 781) for epoch in range(60)]
    assert rates == pytest.approx([0.1] * 50 + [0.01] * 10)


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_recipe_takes_a_step(path):
    """The network as it is, on two random ID images and their outliers, half-way through the training."""
    small = ["optimizer.batch_size=2", "sampling.pool=4", "network.pretrained=''"]
    recipe = load(path, small)
    shape, classes = SETS[path.stem.partition("-")[0]]
    data = random_experiment(shape, classes)
    network = architecture_of(recipe, data).build().train()
    before = [weight.detach().clone() for weight in network.parameters()]
    steps = Steps(network, data, recipe, torch.device("cpu"))
    terms = steps.take(
        steps.total // 2,
        steps.read(torch.arange(2), torch.arange(4 if recipe.sampling.method == "energy" else 2)),
    )
    assert terms is not None and bool(terms.isfinite().all())
    assert any(not torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))
    assert all(bool(weight.isfinite().all()) for weight in network.parameters())


@pytest.mark.parametrize("path", DIGITS, ids=lambda path: path.stem)
def test_recipe_leaves_a_detector(path, tmp_path):
    pool = ["sampling.pool=64"] if load(path).sampling.method == "energy" else []
    recipe = load(path, ["optimizer.epochs=1", "data.train_limit=64", "optimizer.batch_size=32", *pool])
    epochs: list[Epoch] = []
    training.run(recipe, tmp_path / "run", report=epochs.append)
    assert len(epochs) == 1 and math.isfinite(epochs[0].loss)
    loaded = detector.load(tmp_path / "run" / "model.pt")
    assert loaded.origin.recipe == recipe and loaded.shape == (1, 8, 8)


def test_the_digits_recipe_states_every_default():
    path = ROOT / "train" / "digits-greg.toml"
    assert load(path) == Recipe()
    assert tomllib.loads(path.read_text()) == tomllib.loads(Recipe().to_toml())


def test_energy_and_greg_differ_in_the_gradient_weight_alone():
    energy, greg = load(find("digits-energy")), load(find("digits-greg"))
    assert greg.objective.lambda_grad > 0
    objective = dataclasses.replace(greg.objective, lambda_grad=0.0)
    assert energy == dataclasses.replace(greg, name="digits-energy", objective=objective)


# The commands


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["grood-cert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


def test_list_names_every_recipe_with_what_it_is_for(call):
    code, out, _ = call("recipe", "list")
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == sorted(path.stem for path in RECIPES)
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("name", ["digits-greg", "cifar100-wrn-40-2-greg-plus"])
def test_show_prints_every_setting(call, name):
    code, out, _ = call("recipe", "show", name)
    assert code == 0 and from_dict(tomllib.loads(out)) == load(find(name))
    assert tomllib.loads(out).keys() == Recipe().to_dict().keys()


def test_copy_gives_a_recipe_to_edit(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "digits-energy"
    assert call("recipe", "copy", name)[:2] == (
        0,
        "wrote digits-energy.toml; use it with: grood-cert train digits-energy.toml --out FOLDER\n",
    )
    assert (tmp_path / f"{name}.toml").read_bytes() == find(name, ROOT / "train").read_bytes()
    assert load(Path(f"{name}.toml")) == load(find(name))
    code, _, err = call("recipe", "copy", name, tmp_path)
    assert code == 2 and "digits-energy.toml exists already; choose another file, or add --force" in err
    assert call("recipe", "copy", name, tmp_path, "--force")[0] == 0
    assert call("recipe", "copy", name, tmp_path / "sub" / "mine.toml")[0] == 0
    assert load(tmp_path / "sub/mine.toml") == load(find(name)), "its base is found wherever it lies"


@pytest.mark.parametrize("content", ["PNG", "[optimizer]\nlr = 'high'\n"])
def test_copy_refuses_what_is_no_recipe(call, tmp_path, content):
    (tmp_path / "mine.toml").write_text(content)
    code, out, err = call("recipe", "copy", tmp_path / "mine.toml", tmp_path / "copy.toml")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "mine.toml: " in err
    assert not (tmp_path / "copy.toml").exists()


def test_an_unknown_name_is_answered_with_the_nearest(call, tmp_path):
    for arguments in (("recipe", "show", "digits-gerg"), ("train", "digits-gerg", "--out", tmp_path / "x")):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert "no such recipe file, and no recipe of that name; did you mean digits-greg?" in err


def test_train_takes_a_name_resumes_and_writes_events(call, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    quick = ["--set", "optimizer.epochs=2", "--set", "data.train_limit=64", "--set", "data.ood=['digits:8']"]
    arguments = ("train", "digits-mlp-greg", *quick, "--out", tmp_path / "run", "--device", "cpu")
    code, out, err = call(*arguments, "--tensorboard")
    assert code == 0 and "digits-mlp-greg: ID accuracy" in out and "samples/s" in err
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {field.name for field in dataclasses.fields(Epoch)}
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    (tmp_path / "run/tensorboard").rename(tmp_path / "run/aside")
    (tmp_path / "run/tensorboard").touch()
    code, _, err = call(*arguments, "--tensorboard", "--force")
    assert code == 1 and "tensorboard/events.out" in err and err.endswith("make room, then add --resume\n")
    (tmp_path / "run/tensorboard").unlink()
    code, _, err = call(*arguments, "--tensorboard", "--resume")
    assert code == 0
    code, _, err = call(*arguments, "--resume")
    assert code == 2 and "this run is finished, there is nothing to resume" in err


def test_tensorboard_that_is_not_installed_is_said_before_training(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    code, out, err = call("train", "digits-ce", "--out", tmp_path / "run", "--tensorboard")
    assert (code, out) == (2, "") and err.endswith(
        "needs the package tensorboard; pip install 'grood-cert[tensorboard]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_built_package_holds_the_recipes(tmp_path):
    """The wheel and the editable install, as hatchling builds them; the package is read from the wheel's content."""
    pytest.importorskip("hatchling")
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, cwd=ROOT)
    wheel = tmp_path / done.stdout.split()[-1]
    code = "from grood_cert import recipe; print(recipe.__file__, *recipe.shipped(), recipe.load(recipe.find('digits-oe')).name)"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    file, *names, name = done.stdout.split()
    assert file.startswith(str(tmp_path / "site")) and names == list(shipped()) and name == "digits-oe"
