from __future__ import annotations

import dataclasses
import gc
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from typer.models import OptionInfo

from grood_cert import demo
from grood_cert.bounds import auto_lirpa
from grood_cert.certification import stages
from grood_cert.cli import app, options
from grood_cert.errors import InputError
from grood_cert.results.table import Table
from grood_cert.runs import certify as certification
from grood_cert.system.files import replacing
from tests.recorder import Recorder

# Help


HELP = """
import sys
import typer
from grood_cert import cli

def paths(command, path=()):
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from paths(below, (*path, name))

for path in paths(typer.main.get_command(cli.app)):
    sys.argv = ["grood-cert", *path, "--help"]
    try:
        cli.main()
    except SystemExit as ended:
        found = {"torch", "torchvision", "auto_LiRPA", "scipy", "numpy", "matplotlib", "sklearn"} & sys.modules.keys()
        print("#", *path, ended.code, *found)
"""


def test_help_imports_nothing_heavy():
    """Of every command; this is what makes help quick. benchmarks/startup.py measures how quick."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    pages = done.stdout.split("Usage: ")[1:]
    assert len(pages) > 10
    for page in pages:
        command = page.split(" [", 1)[0].removeprefix("grood-cert")
        assert page.splitlines()[-1] == f"#{command} 0"


def test_options_that_call_their_value_something_have_names_of_their_own():
    """typer 0.27 takes the name from what the value is called."""
    commands = [
        *app.registered_commands,
        *(command for group in app.registered_groups for command in group.typer_instance.registered_commands),
    ]
    parameters = [
        hint for command in commands for hint in get_type_hints(command.callback, include_extras=True).values()
    ]
    named = [
        item
        for hint in parameters
        for item in getattr(hint, "__metadata__", ())
        if isinstance(item, OptionInfo) and item.metavar
    ]
    assert len(named) > 10
    names = [
        (item.default, *(item.param_decls or ())) for item in named
    ]  # in an annotation, the first name is `default`
    assert all(any(str(name).startswith("--") for name in those) for those in names), names


def test_version(call):
    assert call("--version")[:2] == (0, "0.1.0\n")


# The whole way


def test_from_recipe_to_figure(call, tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text('name = "tiny"\n[optimizer]\nepochs = 2\n[data]\nood = ["digits:8,9", "uniform-noise"]\n')
    code, out, err = call("train", recipe, "--out", tmp_path / "run", "--set", "objective.lambda_grad=0.2")
    assert code == 0 and "fpr95_id" in out and "epoch   2" in err
    content = torch.load(tmp_path / "run/model.pt", weights_only=True)
    assert content["recipe"]["objective"]["lambda_grad"] == 0.2 and content["recipe"]["name"] == "tiny"
    code, out, err = call(
        "certify", tmp_path / "run/model.pt", "--eps", "0.01,0.05", "--limit", "2", "--effort", "fast"
    )
    assert code == 0 and "certified" in out and "attack" in out
    result = Table.read(tmp_path / "run/rows.csv")
    assert (len(result), result.eps, result.norm) == (6, (0.01, 0.05), "linf")
    code, out, _ = call("curve", tmp_path / "run/rows.csv", "--out", tmp_path / "figure.svg", "--perturb", "both")
    assert code == 0 and (tmp_path / "figure.svg").exists() and (tmp_path / "figure-curve.csv").exists()
    assert "tiny" in (tmp_path / "figure-curve.csv").read_text()


def test_lipschitz_and_its_curve(call, refused, mlp_model, rows_file, tmp_path):
    options = ("--eps", "0.01", "--limit", "1", "--samples", "16", "--clever-batches", "0", "--ood", "digits:8,9")
    code, out, _ = call("lipschitz", mlp_model, *options, "--memory", "1M", "--out", tmp_path / "a")
    assert code == 0 and "best bound (proved)" in out and "ascended maximum (estimate)" in out
    code, out, _ = call("curve", tmp_path / "a/lipschitz.csv", "--out", tmp_path / "l.pdf")
    assert code == 0 and (tmp_path / "l.pdf").read_bytes()[:4] == b"%PDF" and (tmp_path / "l-curve.csv").exists()
    assert "give files of one kind" in refused(
        "curve", tmp_path / "a/lipschitz.csv", rows_file, "--out", tmp_path / "mixed.png"
    )
    for option in (("--perturb", "id"), ("--at", "0.01")):
        message = refused("curve", tmp_path / "a/lipschitz.csv", "--out", tmp_path / "figure.png", *option)
        assert "are for certifications" in message
    assert not (tmp_path / "mixed.png").exists() and not (tmp_path / "figure.png").exists()
    assert "expected a size such as 64M" in refused("lipschitz", mlp_model, "--memory", "lots", "--out", tmp_path / "b")
    assert "memory must be 65536 or more" in refused("lipschitz", mlp_model, "--memory", "1", "--out", tmp_path / "b")
    assert "eps -1.0" in refused("lipschitz", mlp_model, "--eps", "-1", "--out", tmp_path / "b")
    assert "exists already" in refused("lipschitz", mlp_model, "--out", tmp_path / "a")
    assert not (tmp_path / "b").exists()


def test_demo(tmp_path, small_recipe, quick_attacks, monkeypatch):
    monkeypatch.setattr(demo, "EPS", demo.SHOWN_EPS)
    recorder = Recorder()
    tiny = replace(small_recipe, optimizer=replace(small_recipe.optimizer, epochs=2))
    result = demo.run(tmp_path, limit=2, recipe=tiny, reporter=recorder)
    assert [stage for stage, _, _ in recorder.stages] == [
        "train energy",
        "certify energy",
        "train greg",
        "certify greg",
    ]
    assert all(path.exists() for path in result.files)
    energy, greg = result.summary
    assert set(energy) == {"model", *demo.QUANTITIES}
    for key in ("margin", "gradient_norm_estimate"):
        assert greg[f"{key}_id"] != energy[f"{key}_id"] > 0
    for record in result.summary:
        for eps in demo.SHOWN_EPS:
            assert record[f"fpr95_id_attacked@{eps}"] <= record[f"fpr95_id_certified@{eps}"]
        assert record["radius_certified_per_logit_id"] <= record["radius_certified_id"] <= record["radius_attack_id"]


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (["certify", "--stages", "ibp", "--engine", "native", "--effort", "fast", "--no-figure"], "rows.csv"),
        (["smooth", "--n", "200"], "smoothing.csv"),
    ],
)
def test_several_processes_write_what_one_writes(model, tmp_path, command, file):
    name, *more = command
    command = [sys.executable, "-m", "grood_cert", name, str(model), *more, "--limit", "3", "--batch-size", "2"]
    command += ["--ood", "digits:8,9", "--eps", "0.05"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for jobs in ("1", "2"):
        shared = [*command, "--jobs", jobs, "--out", str(tmp_path / jobs)]
        done = subprocess.run(shared, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"wrote {tmp_path / jobs / file} and its manifest") == 1
        assert "6 samples of 2 sets x 1 eps = 6 balls" in done.stderr
        assert ("divided among 2 processes" in done.stderr) is (jobs == "2")
    one, two = ((tmp_path / jobs / file).read_bytes() for jobs in ("1", "2"))
    assert one == two
    manifest = json.loads((tmp_path / "2" / file).with_suffix(".json").read_text())
    assert manifest["shards"] == 2 and manifest["command"].startswith(f"grood-cert {name} ")
    assert "--jobs 2" in manifest["command"]
    assert not list((tmp_path / "2").glob("*-of-*"))


@pytest.mark.parametrize("command", ["certify", "smooth", "lipschitz"])
def test_a_run_is_divided_in_one_way(refused, model, command):
    assert "--jobs 2 and --shard 1/2 each divide the run" in refused(command, model, "--jobs", 2, "--shard", "1/2")


def test_jobs_start_no_program_but_grood_cert(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study.py", "certify", "model.pt"])
    with pytest.raises(InputError, match=r"--jobs 2 starts grood-cert again, and this is 'study.py'"):
        options.share_out(2, "", False, False)


def test_a_dry_run_says_whose_time_it_tells(call, model, tmp_path):
    code, out, _ = call(
        *("certify", model, "--limit", 2, "--effort", "fast", "--eps", "0.01", "--jobs", 3, "--dry-run"),
        *("--out", tmp_path / "none"),
    )
    assert code == 0 and "that is for one process; 3 would share it" in out
    assert not (tmp_path / "none").exists()


# Wrong input


def test_checkpoints_that_are_none(refused, model, tmp_path):
    assert "no such checkpoint" in refused("certify", tmp_path / "none.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    assert "not a grood-cert checkpoint" in refused("certify", tmp_path / "pickle.pt")
    (tmp_path / "short.pt").write_bytes(model.read_bytes()[:-300])
    assert "not a grood-cert checkpoint" in refused("certify", tmp_path / "short.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    assert "not a grood-cert checkpoint" in refused("certify", tmp_path / "other.pt")
    assert not list(tmp_path.glob("rows*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eps", "-0.1"], "eps -0.1: expected a number from 0 to 1"),
        (["--eps", "nan"], "eps nan: expected a number"),
        (["--eps", "0.2", "--eps", "0.1"], "ascending and without repetition"),
        (["--eps", "0.1", "--eps", "0.1"], "ascending and without repetition"),
        (["--eps", "lots"], "--eps 'lots': expected a number such as 0.03 or 8/255"),
        (["--norm", "l7"], "unknown norm 'l7'; use one of linf, l2, l1"),
        (["--eps", "1/0"], "--eps '1/0': expected a number such as 0.03 or 8/255"),
        (["--eps", "0.01,,0.02"], "--eps '': expected a number"),
        (["--norm", "l"], "unknown norm 'l'"),
        (["--stages", "crown,magic"], "unknown stage 'magic'; use some of ibp, crown-ibp, crown, lipschitz"),
        (["--effort", "heroic"], "unknown effort 'heroic'; use one of fast, default, max"),
        (["--engine", "steam"], "unknown engine 'steam'; use one of auto, native, auto_lirpa"),
        (["--shard", "5/4"], "shard '5/4': expected i/n with i from 1 to n"),
        (["--shard", "1/2", "--jobs", "2", "--dry-run"], "--jobs 2 and --shard 1/2 each divide the run"),
        (["--jobs", "0"], "'--jobs'"),
        (["--jobs", "2", "--download"], "--download and --jobs 2: each process would download"),
        (["--memory", "lots"], "memory 'lots': expected a size such as 64M or 1G"),
        (["--memory", "0"], "memory '0': expected a size such as 64M or 1G"),
        (["--stages", ","], "--stages ',' names none; use some of ibp"),
        (["--gamma", "nan"], "gamma must be a finite number"),
        (["--time-limit", "-1"], "time limit must be 0"),
        (["--seed", "-1"], "'--seed'"),
        (["--seed", "99999999999999999999999"], "'--seed'"),
        (["--time-limit", "5", "--effort", "fast"], "a time limit stops refining stages, and there are none among ibp"),
        (["--ood", "digits:0-5"], "OOD set 'digits:0-5' and ID set 'digits:0-5' share classes"),
        (["--ood", "digits:5-9"], "share class 5"),
        (["--ood", "cifar10"], "data set 'cifar10' is not in"),
        (["--ood", "wrong-size.npy"], "images of 16x16, the model expects 8x8"),
        (["--ood", "empty.npy"], "is empty"),
        (["--ood", "minst"], "did you mean 'mnist'"),
        (["--limit", "-1", "--eps", "0.1"], "limit must be 0 (all) or more"),
        (["--device", "quantum"], "device 'quantum' cannot be used"),
        (["--bogus", "1"], "--bogus"),
    ],
)
def test_wrong_options_of_certify(refused, model, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    np.save("wrong-size.npy", np.zeros((3, 16, 16), np.uint8))
    np.save("empty.npy", np.zeros((0, 8, 8), np.uint8))
    assert message in refused("certify", model, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


SMOOTHING_ONLY = {"--sigma": "0.3", "--n": "100", "--alpha": "0.1", "--dtype": "float32", "--calibration-limit": "9"}
BOUNDS_ONLY = {
    "--norm": "l2",
    "--stages": "ibp",
    "--effort": "fast",
    "--engine": "native",
    "--gamma": "0",
    "--precision": "0.1",
    "--time-limit": "1",
}


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *(("certify", *pair) for pair in SMOOTHING_ONLY.items()),
        *(("smooth", *pair) for pair in BOUNDS_ONLY.items()),
        ("certify", "--method", "smoothing"),
        ("lipschitz", "--effort", "fast"),
        ("threshold", "--eps", "0.1"),
    ],
)
def test_no_command_takes_an_option_that_it_does_not_use(refused, model, tmp_path, command, option, value):
    assert option in refused(command, model, option, value)


def test_smoothing_refuses_nonsense(refused, model, tmp_path):
    assert "sigma must be a positive number" in refused("smooth", model, "--sigma", "0", "--out", tmp_path / "out")
    assert "certify nothing at alpha" in refused("smooth", model, "--n", "3", "--out", tmp_path / "out")
    assert "expected a size such as 64M" in refused("smooth", model, "--memory", "lots", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_smooth_and_its_curve(call, model, tmp_path):
    options = ("--n", "60", "--alpha", "0.1", "--limit", "3", "--ood", "digits:8,9", "--calibration-limit", "40")
    code, out, _ = call("smooth", model, *options, "--eps", "0.05,1/10", "--out", tmp_path)
    assert code == 0 and "each row holds with probability 0.9" in out
    assert "s_lb_smoothed@0.1" in (tmp_path / "smoothing.csv").read_text().splitlines()[0]
    assert call("curve", tmp_path / "smoothing.csv", "--out", tmp_path / "figure.png")[0] == 0
    code, _, err = call("smooth", model, *options, "--sigma", "64", "--out", tmp_path / "wide", "--dry-run")
    assert code == 0 and "warning: sigma 64 is more than the whole range of pixels" in err and "eps" not in err


def test_one_eps_and_norm_said_in_many_ways(call, model, tmp_path):
    written = []
    for eps, norm in (("0.03125,1/16", "L2"), ("1/32,0.0625", "2"), ("0.03125, 0.0625", "l_2")):
        code, _, _ = call(
            "certify", model, "--eps", eps, "--norm", norm, "--limit", "1", "--effort", "fast", "--out", tmp_path,
            "--force", "--ood", "digits:8,9", "--no-figure", "--engine", "native"
        )  # fmt: skip
        assert code == 0
        written.append((tmp_path / "rows.csv").read_bytes())
    assert written[0] == written[1] == written[2] and not (tmp_path / "curves.png").exists()


def test_certify_draws_what_it_is_for(call, model, tmp_path):
    options = ("--eps", "0.02", "--limit", "4", "--effort", "fast", "--engine", "native", "--ood")
    code, out, _ = call("certify", model, *options, "digits:8,9", "--out", tmp_path / "a")
    assert code == 0 and f"drew {tmp_path}/a/curves.png" in out and (tmp_path / "a/curves.png").exists()
    code, out, err = call("certify", model, *options, "uniform-noise", "--out", tmp_path / "b")
    assert code == 0 and "no figure: the rows hold no OOD set" in err and not (tmp_path / "b/curves.png").exists()


def test_another_threshold_is_looked_up(call, refused, rows_file, tmp_path):
    mine = tmp_path / "rows.csv"
    shutil.copy(rows_file, mine)
    shutil.copy(rows_file.with_suffix(".json"), mine.with_suffix(".json"))
    before = mine.read_bytes()
    code, out, _ = call("threshold", mine, "--gamma", "-4.5")
    assert code == 0 and "nothing was verified again" in out
    looked_up = Table.read(tmp_path / "rows-gamma-4.5.csv")
    assert looked_up.gamma == -4.5 and len(looked_up) == len(Table.read(mine))
    assert "exists already" in refused("threshold", mine, "--gamma", "-4.5")
    manifest = mine.with_suffix(".json").read_bytes()
    for out in (mine, tmp_path / "rows.json", tmp_path / "rows.txt", tmp_path / "deeper/../rows.csv"):
        message = refused("threshold", mine, "--gamma", "-4.5", "--out", out, "--force")
        assert "would overwrite" in message or "results are written as .csv" in message
    assert mine.with_suffix(".json").read_bytes() == manifest
    code, _, _ = call("threshold", tmp_path / "rows-gamma-4.5.csv", "--gamma", "-4", "--out", tmp_path / "again.csv")
    assert code == 0 and Table.read(tmp_path / "again.csv").manifest["gamma_certified_at"] == Table.read(mine).gamma
    assert "gamma must be a finite number" in refused("threshold", mine, "--gamma", "nan")
    assert mine.read_bytes() == before


def test_a_figure_never_replaces_the_rows_it_is_drawn_from(call, refused, rows_file, tmp_path):
    named = "rows.csv", "rows-curve.csv"  # the second as the numbers of a figure would be
    for name in named:
        for file in (rows_file, rows_file.with_suffix(".json")):
            shutil.copy(file, (tmp_path / name).with_suffix(file.suffix))
    before = [(tmp_path / name).read_bytes() for name in named]
    figure = tmp_path / "rows.pdf"
    assert "would overwrite" in refused("curve", tmp_path / "rows-curve.csv", "--out", figure)
    assert "exists already" in refused("curve", tmp_path / "rows.csv", "--out", figure) and not figure.exists()
    assert call("curve", tmp_path / "rows-curve.csv", "--out", tmp_path / "rows-curve.pdf")[0] == 0
    assert [(tmp_path / name).read_bytes() for name in named] == before


def test_an_unfinished_run_is_read_when_that_is_asked_for(call, refused, rows_file, tmp_path):
    lines = rows_file.read_text().splitlines(keepends=True)
    (tmp_path / "rows.csv").write_text("".join(lines))
    manifest = json.loads(rows_file.with_suffix(".json").read_text())
    partial = {"complete": False, "rows": 30, "samples_done": 30, "bytes": len("".join(lines[:31]).encode())}
    partial["sha256"] = None  # that of the whole run
    (tmp_path / "rows.json").write_text(json.dumps(manifest | partial))
    for arguments in (("threshold", "--gamma", "-4", "--out", "t.csv"), ("curve", "--out", "f.svg")):
        command, *rest = arguments
        rest[-1] = tmp_path / rest[-1]
        done = f"is unfinished, 30 of {manifest['of_samples']} samples"
        assert done in refused(command, tmp_path / "rows.csv", *rest) and not rest[-1].exists()
        code, _, err = call(command, tmp_path / "rows.csv", *rest, "--partial")
        assert code == 0 and done in err
    assert f"not finished: small: 30 of {manifest['of_samples']} samples" in (tmp_path / "f.svg").read_text()


def test_a_demo_of_less_than_nothing_trains_nothing(refused, tmp_path):
    assert "limit must be 0 (all) or more" in refused("demo", "--limit", "-1", "--out", tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(("command", "names"), [((), ("certify", "smooth")), (("recipe",), ("list", "copy"))])
def test_without_a_command_there_is_help(call, command, names):
    code, out, err = call(*command)
    assert (code, err) == (0, "") and out.count("\n") > 8 and all(f"\n  {name}" in out for name in names)


def test_shell_completion_works(tmp_path):
    def complete(*words):
        environment = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
        done = subprocess.run(
            [str(Path(sys.executable).with_name("grood-cert"))],
            env=os.environ | environment | {"_GROOD_CERT_COMPLETE": "complete_bash"},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.split()

    assert complete("grood-cert", "thr") == ["threshold"]
    assert complete("grood-cert", "lipschitz", "model.pt", "--norm", "l") == ["linf", "l2", "l1"]
    assert "--no-figure" in complete("grood-cert", "certify", "model.pt", "--no")


def test_a_folder_that_cannot_be_written(refused, model, rows_file, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert "cannot write to" in refused("certify", model, "--out", tmp_path / "file/deep", "--limit", "1")
    assert "cannot write" in refused("curve", rows_file, "--out", tmp_path / "file/figure.png")
    recipe = tmp_path / "r.toml"
    recipe.write_text('name = "r"\n')
    assert "cannot write to" in refused("train", recipe, "--out", tmp_path / "file/deep")


def test_nothing_is_overwritten_unasked(refused, model, rows_file, tmp_path):
    shutil.copy(rows_file, tmp_path / "rows.csv")
    before = (tmp_path / "rows.csv").read_bytes()
    assert "exists already" in refused("certify", model, "--eps", "0.01", "--engine", "native", "--out", tmp_path)
    assert (tmp_path / "rows.csv").read_bytes() == before


def test_rows_of_another_norm_are_not_answered_from(refused, rows_file):
    """Rows in l_inf lie beside the model; asked for l_2 at another eps and gamma, nothing of them is handed out."""
    before = rows_file.read_bytes()
    manifest = json.loads(rows_file.with_suffix(".json").read_text())
    options = ("--gamma", "-5", "--norm", "l2", "--eps", "0.5", "--engine", "native", "--out", rows_file.parent)
    assert "exists already and holds another run" in refused("certify", manifest["model"]["path"], *options)
    assert rows_file.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{rows}", "--out", "figure.gif"], "figures are written as .png, .pdf, .svg"),
        (["{rows}", "--out", "figure"], "figures are written as"),
        (["{rows}", "--out", "figure.png", "--at", "0.5"], "eps 0.5 is not on the grid of the rows; use one of 0.01"),
        (["{rows}", "--out", "figure.png", "--perturb", "none"], "unknown side 'none'; perturb one of ood, id, both"),
        (["{rows}", "{rows}", "--out", "figure.png", "--label", "a"], "1 labels for 2 rows files"),
        (["none.csv", "--out", "figure.png"], "none.csv: no such file"),
        (["--out", "figure.png"], "Missing argument"),
    ],
)
def test_wrong_options_of_curve(refused, rows_file, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("curve", *(argument.format(rows=rows_file) for argument in arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("[objective]\nlamda_grad = 1\n", [], "did you mean objective.lambda_grad"),
        ('[objective]\nlambda_grad = "much"\n', [], "objective.lambda_grad: expected a number"),
        ("[objective]\nlambda_grad = -1\n", [], "objective.lambda_grad: expected"),
        ("name = ", [], "not a readable TOML file"),
        ("seed = 0", ["--set", "objective"], "expected KEY=VALUE"),
        ("seed = 0", ["--set", "optimizer.epoch=3"], "did you mean optimizer.epochs"),
    ],
)
def test_wrong_recipes(refused, tmp_path, content, options, message):
    recipe = tmp_path / "r.toml"
    recipe.write_text(content)
    assert message in refused("train", recipe, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_soundness_violation_has_an_exit_code_of_its_own(call, model, tmp_path, monkeypatch):
    from grood_cert.ball import Ball
    from grood_cert.bounds.score import score_bounds

    monkeypatch.setattr(
        stages,
        "score_bounds",
        lambda bounded, ball, method, *rest: score_bounds(bounded, Ball(ball.center, ball.eps / 10, ball.norm), method),
    )
    options = "--eps", "0.1", "--limit", "2", "--stages", "crown", "--effort", "fast", "--engine", "native"
    code, out, err = call("certify", model, *options, "--out", tmp_path)
    assert code == 3 and out == "" and "SOUNDNESS VIOLATION" in err and "counterexample.npz" in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["counterexample.npz"]


def test_a_missing_engine_says_how_to_get_it(call, model, tmp_path, monkeypatch):
    import importlib.metadata

    real = importlib.metadata.version

    def version(name):
        if name.lower() == "auto-lirpa":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for function in vars(auto_lirpa).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    code, out, err = call("certify", model, "--engine", "auto_lirpa", "--out", tmp_path / "named")
    assert (code, out) == (1, "") and "pip install --no-deps auto-LiRPA==0.3" in err and err.count("\n") == 1
    options = ["--eps", "0.01", "--stages", "ibp", "--effort", "fast", "--limit", "2", "--out", tmp_path]
    code, out, err = call("certify", model, *options)
    assert code == 0 and "no cross-check of the bounds: auto_LiRPA is not installed\n" in out
    manifest = json.loads((tmp_path / "rows.json").read_text())
    assert manifest["versions"]["auto_LiRPA"] is None and manifest["bounded_by"] == "native"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("can't start new thread"),
        ImportError("_core.so: failed to map segment from shared object"),
    ],
)
def test_running_out_of_memory_is_one_line(call, model, tmp_path, monkeypatch, error):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(certification, "run", full)
    code, out, err = call("certify", model, "--eps", "0.01", "--out", tmp_path)
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith("grood-cert: error: out of memory; smaller batches need less, and the same command goes on")


def test_termination_is_one_line_and_undone_work_is_cleared_away(call, model, tmp_path, monkeypatch):
    def terminated(*arguments, **options):
        with replacing(tmp_path / "rows.csv") as temporary:
            temporary.write_text("half of")
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(certification, "run", terminated)
    code, out, err = call("certify", model, "--eps", "0.01", "--out", tmp_path)
    assert (code, out, err) == (
        143,
        "",
        "grood-cert: error: terminated; the same command goes on (train: with --resume)\n",
    )
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) == before


def test_commands_look_for_old_garbage_less_often_and_for_new_as_ever(call, model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(certification, "run", lambda *arguments, **options: seen.append(gc.get_threshold()) or 1 / 0)
    before = gc.get_threshold()
    with pytest.raises(ZeroDivisionError):
        call("certify", model, "--eps", "0.01", "--out", tmp_path)
    assert seen == [(*before[:2], 100)] and gc.get_threshold() == before and gc.isenabled()


def test_interruption_is_one_line(call, model, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(certification, "run", interrupted)
    code, out, err = call("certify", model, "--eps", "0.01", "--out", tmp_path)
    assert (code, out, err) == (
        130,
        "",
        "grood-cert: error: interrupted; the same command goes on (train: with --resume)\n",
    )


def test_export(call, model, tmp_path):
    code, out, _ = call("export", model, "--format", "state-dict", "--out", tmp_path / "w.pt")
    assert code == 0 and f"wrote {tmp_path / 'w.pt'}: " in out and "they want (x - mean) / std" in out
    assert f"wrote {tmp_path / 'w.pt.json'}: normalisation, score, gamma and class names" in out
    code, _, err = call("export", model, "--format", "state-dict", "--out", tmp_path / "w.pt")
    assert code == 2 and "w.pt exists already; choose another --out, or add --force" in err
    assert call("export", model, "--format", "safetensors", "--out", tmp_path / "w.pt", "--force")[0] == 0
    code, _, err = call("export", model, "--format", "keras", "--out", tmp_path / "v")
    assert code == 2 and "unknown format 'keras'; use one of onnx, safetensors" in err
    before = model.read_bytes()
    code, _, err = call("export", model, "--format", "onnx", "--out", model, "--force")
    assert code == 2 and "would overwrite" in err and model.read_bytes() == before


def test_recipes_of_networks_that_bounds_say_nothing_of_say_so(call):
    code, out, _ = call("recipe", "show", "cifar10-densenet-bc-100-greg")
    assert code == 0 and out.startswith("# densenet-bc-100: bounds through so many layers prove nothing; certify this")
    assert "grood-cert smooth" not in call("recipe", "show", "digits-greg")[1]


def test_nothing_is_written_over_what_is_read(refused, model, rows_file, tmp_path, monkeypatch):
    """However it is called: by its path, another spelling, or a link."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.csv", "rows.json"):
        shutil.copy(rows_file.with_name(name), name)
    shutil.copy(model, "net.json")
    Path("shown.png").symlink_to("rows.csv")
    Path("page.html").symlink_to("rows.csv")
    Path("out.csv").symlink_to("net.json")
    Path("run").mkdir()
    shutil.copy(model, "run/best.pt")
    recipe = Path("own.toml")
    recipe.write_text('name = "own"\n[network]\npretrained = "run/best.pt"\n[optimizer]\nepochs = 1\n')
    for name in ("log.csv", "sweep.csv"):
        Path(name).write_text('name = "own"\n')
    for name in ("csv", "json"):
        shutil.copy(rows_file.with_suffix(f".{name}"), f"instances.{name}")
    shutil.copy(model, "curves.png")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for command in (
        ("curve", "rows.csv", "--out", "shown.png"),
        ("report", "rows.csv", "--out", "page.html", "--force"),
        ("gallery", "rows.csv", "--out", "shown.png"),
        ("export", "net.json", "--format", "state-dict", "--out", "net", "--force"),
        ("predict", "net.json", "digits:8", "--out", "out.csv", "--force"),
        (
            "certify",
            "net.json",
            "--out",
            ".",
            "--eps",
            "0.1",
            "--force",
            "--limit",
            "1",
            "--no-figure",
            "--out",
            "link",
        ),
        ("recipe", "copy", "own.toml", "run/../own.toml", "--force"),
        ("import", "net.onnx", "--id", "out.csv", "--out", "out.csv", "--force"),
        ("train", "own.toml", "--out", "run", "--force"),
        ("train", "log.csv", "--out", ".", "--force"),
        ("sweep", "sweep.csv", "--out", ".", "--grid", "objective.lambda_grad=0"),
        ("vnnlib", "net.json", "--rows", "instances.csv", "--eps", "0.1", "--out", ".", "--force"),
        ("certify", "curves.png", "--eps", "0.1", "--effort", "fast", "--out", "."),
        ("threshold", "rows.csv", "--gamma", "1", "--out", "./run/../rows.csv", "--force"),
    ):
        if "link" in command:
            Path("link").mkdir()
            Path("link/rows.json").symlink_to(Path("net.json").resolve())
        assert "would overwrite" in refused(*command), command
    assert before == {path: path.read_bytes() for path in before}


def test_an_empty_recipe_is_no_run(refused, tmp_path):
    (tmp_path / "empty.toml").write_text("# nothing\n")
    assert "an empty recipe; grood-cert recipe copy" in refused(
        "train", tmp_path / "empty.toml", "--out", tmp_path / "a"
    )


def test_verify(call, refused, rows_file, model, tmp_path):
    code, out, err = call("verify", rows_file, model, "--limit", "1")
    assert code == 0 and "radius_certified, proved again" in out and "nothing contradicts these rows" in out
    assert "--every and --limit must be 0 or more" in refused("verify", rows_file, model, "--every", "-1")
    path, table = tmp_path / "rows.csv", Table.read(rows_file)
    labels = table["label"].copy()
    labels[0] += 1
    dataclasses.replace(table, columns={**table.columns, "label": labels}).write(path)
    code, out, err = call("verify", path, model, "--limit", "1", "--out", tmp_path / "found")
    assert code == 3 and err.splitlines()[-1].startswith(
        "grood-cert: error: SOUNDNESS VIOLATION: label, computed again: line 2 says"
    )
    assert np.load(tmp_path / "found" / "counterexample.npz")["rows"].tolist() == [0]
    manifest = {**table.manifest, "model": {**table.manifest["model"], "sha256": "0"}}
    dataclasses.replace(table, manifest=manifest).write(path)
    assert "is not the model of these rows" in refused("verify", path, model)
    data = [{**entry, "sha256": "0"} for entry in table.manifest["data"]]
    dataclasses.replace(table, manifest={**table.manifest, "data": data}).write(path)
    assert "holds other images or labels than that of the rows" in refused("verify", path, model)
