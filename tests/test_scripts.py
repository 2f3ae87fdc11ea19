"""The scripts of train/, analysis/ and benchmarks/ run on a small result."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import fine_tuning, mnist_good, objective_to_radius, pareto, radius_scatter
from benchmarks import bounds, clustering, step_time
from benchmarks import lipschitz as lipschitz_benchmark
from grood_cert import detector
from grood_cert.data.experiment import load_evaluation
from grood_cert.errors import InputError
from grood_cert.recipe import find, load
from grood_cert.results.table import Table, read_trained
from grood_cert.system.files import write_csv

BOUNDS = ("objective.certified=ood", "objective.certified_eps=0.3")
KEPT = Path(__file__).parents[1] / "results"


def test_radius_scatter(rows_file, tmp_path):
    radius_scatter.main(rows_file, tmp_path / "scatter.png")
    assert (tmp_path / "scatter.png").read_bytes()[:4] == b"\x89PNG"
    drawing = radius_scatter.figure(Table.read(rows_file))
    for axes in drawing.axes:
        (note,) = [text.get_text() for text in axes.texts if text.get_text().startswith("refuted of")]
        assert note.replace("\n", " ").endswith(" 0 certified radii")
        assert axes.get_xlim() == axes.get_ylim() and axes.get_aspect() == 1


def test_objective_to_radius_draws_what_is_kept(tmp_path):
    objective_to_radius.main(KEPT / "lambda-grad.csv", tmp_path / "objective.png")
    assert (tmp_path / "objective.png").read_bytes()[:4] == b"\x89PNG"


def test_pareto(rows_file, tmp_path):
    kept, out = tmp_path / "kept.csv", tmp_path / "pareto.png"
    pareto.main(KEPT / "digits-pareto.csv", out)
    with pytest.raises(InputError, match=r"cannot read .*kept\.csv.*--sweep FOLDER makes the rows"):
        pareto.main(kept, out)
    whole = (KEPT / "digits-pareto.csv").read_bytes()
    for content, message in (
        (whole[:9000], "not whole"),
        (whole.replace(b",ood,", b",ood,x,", 1), "not whole"),
        (b"\x89PNG\xff", "cannot be read"),
        (whole.replace(b"\n", b"x\n").replace(b"x\n", b"\n", 1), "could not convert"),
        (whole[: whole.rindex(b",") + 1] + b"nan\n", "not finite"),
    ):
        kept.write_bytes(content)
        with pytest.raises(InputError, match=message):
            pareto.main(kept, out)
    shutil.copytree(rows_file.parent, tmp_path / "sweep/cell")
    with pytest.raises(InputError, match=r"no rows of photo-patches for .*kept\.csv"):
        pareto.main(kept, out, [tmp_path / "sweep"])
    rows = Table.read(rows_file)
    found = list(pareto.records(rows))
    assert len(found) == len(rows.eps) * len(rows.sets("id", "ood"))
    for record in found:
        assert 0 <= record["rate_clean"] <= record["rate_attacked"] <= record["rate_certified"] <= 1
        if record["kind"] == "id":
            proved = rows.grid["s_ub"][rows.of_kind("id")][:, list(rows.eps).index(record["eps"])] < rows.gamma
            assert record["rate_certified"] == pytest.approx(1 - proved.mean())
    found += [record | {"set": "photo-patches"} for record in found if record["kind"] == "ood"]
    mixed = [record | {"certified": "both", "certified_mix": mix} for record in found for mix in (0.1, 0.2)]
    others = [record | {"seed": 1, "accuracy": record["accuracy"] / 2} for record in mixed]
    write_csv(kept, pareto.COLUMNS, found + mixed + others)
    pareto.main(kept, out)
    head, _, accuracy, *_ = pareto.table(pareto.read(kept)).splitlines()
    assert head.count("both, eps 0") == 2 and head.count(", a 0.1 ") == 1 and head.count("no certified term") == 1
    means = [share * found[0]["accuracy"] for share in (0.75, 0.75, 1)]  # smallest shares of the bound first
    assert [float(cell.split()[0]) for cell in accuracy.split("|")[2:-1]] == pytest.approx(means, abs=6e-4)
    assert out.read_bytes()[:4] == b"\x89PNG" and len(pareto.figure(pareto.read(kept)).axes) == 3


def test_mnist_good(rows_file, tmp_path):
    kept, out = tmp_path / "kept.csv", tmp_path / "good.png"
    with pytest.raises(InputError, match=r"cannot read .*kept\.csv.*--runs FOLDER makes the rows"):
        mnist_good.main(kept, out)
    shutil.copytree(rows_file.parent, tmp_path / "runs/one")
    with pytest.raises(InputError, match=r"no rows at eps 0\.3 for .*kept\.csv; certify with --eps 0\.3"):
        mnist_good.main(kept, out, [tmp_path / "runs"])
    rows = Table.read(rows_file)
    found = list(mnist_good.records(rows))
    assert len(found) == len(rows.eps) * len(rows.sets("ood"))
    for record in found:  # an area is the share of pairs in the right order
        inside, outside = rows["score"][rows.of_kind("id")], rows.sets("ood")[record["set"]]
        lowest = rows.grid["s_lb"][outside][:, list(rows.eps).index(record["eps"])]
        assert record["auroc_certified"] == pytest.approx((inside[:, None] < lowest).mean())
        assert 0 <= record["auroc_certified"] <= record["auroc_attacked"] <= record["auroc"] <= 1
    record = found[0] | {
        "training": "bounds",
        "set": "fashion-mnist",
        "eps": 0.3,
        "accuracy": 0.9,
        "auroc_certified": 0.5,
    }
    write_csv(kept, mnist_good.COLUMNS, [record, record | {"seed": 1.0, "accuracy": 0.8, "auroc_certified": 0.25}])
    mnist_good.main(kept, out)
    head, _, line, *published = mnist_good.table(mnist_good.read(kept)).splitlines()
    assert head == "| training | seeds | accuracy | eps | fashion-mnist |"
    assert line.startswith("| bounds | 2 | 85.00 ±5.00 | 0.3 | ") and line.endswith(" / 37.5 ±12.5 |")
    assert published[-1] == "| GOOD100, published | - | 98.7 | 0.3 | 100.0 / 96.5 / 78.0 |"
    assert out.read_bytes()[:4] == b"\x89PNG" and len(mnist_good.figure(mnist_good.read(kept)).axes) == 1
    shutil.copytree(rows_file.parent, tmp_path / "runs/two")
    with pytest.raises(InputError, match=r"two runs of .* with seed 0; keep one of them"):
        mnist_good.main(kept, out, [tmp_path / "runs"])


def _refused(*_):
    raise InputError("no")


@pytest.mark.parametrize(
    ("script", "name", "maker"),
    [
        (pareto, "digits-pareto.csv", "records"),
        (mnist_good, "mnist-good.csv", "records"),
        (fine_tuning, "resnet20.csv", "measure"),
    ],
)
def test_kept_rows_stay_unless_all_went_well(script, name, maker, tmp_path, monkeypatch):
    kept, out = tmp_path / name, tmp_path / "drawn.png"
    shutil.copy(KEPT / name, kept)
    before, rows = kept.read_bytes(), script.read(kept)
    made = [row | {"accuracy": row["accuracy"] / 2} for row in rows]
    monkeypatch.setattr(script, "read_trained", lambda *_: [None], raising=False)
    monkeypatch.setattr(script, maker, lambda *_: made)
    for broken, message in (
        ({"accuracy": float("nan")}, "a number is not finite"),
        ({"extra": 1}, "expected the columns"),
    ):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=message):
            patch.setattr(script, maker, lambda *_, broken=broken: [*made[:-1], made[-1] | broken])
            script.main(kept, out, [tmp_path])
        assert kept.read_bytes() == before and not out.exists()
    for place, method in ((script, "figure"), (script.figures, "save")):
        with monkeypatch.context() as patch, pytest.raises(InputError, match="no"):
            patch.setattr(place, method, _refused)
            script.main(kept, out, [tmp_path])
        assert kept.read_bytes() == before
    script.main(kept, out, [tmp_path])
    assert script.read(kept) == made and out.exists()


def test_trained_detectors_are_read_from_subfolders(rows_file, tmp_path):
    with pytest.raises(InputError, match=r"no rows\.csv below .*runs"):
        read_trained([tmp_path / "runs"], "--runs")
    for name in ("b", "a"):
        shutil.copytree(rows_file.parent, tmp_path / "runs" / name)
    rows = Table.read(rows_file)
    replace(rows, manifest={**rows.manifest, "seed": 7}).write(tmp_path / "runs/b" / rows_file.name)
    assert [table.manifest["seed"] for table in read_trained([tmp_path / "runs"], "--runs")] == [
        rows.manifest["seed"],
        7,
    ]
    replace(rows, manifest={**rows.manifest, "recipe": None}).write(tmp_path / "runs/b" / rows_file.name)
    with pytest.raises(InputError, match="was not trained from a recipe; leave it out of --runs"):
        read_trained([tmp_path / "runs"], "--runs")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["objective.lambda_grad=0"], "energy"),
        (["objective.lambda_grad=0.3"], "GReg 0.3"),
        (["sampling.method=energy"], "GReg+ 0.1"),
        (["objective.lambda_grad=0", *BOUNDS], "energy, bounds"),
        ([*BOUNDS, "objective.certified_mix=0.2"], "GReg 0.1, bounds 0.2, attack 0.8"),
        (["objective.lambda_grad=0", "network.width=32", *BOUNDS], "energy, bounds, width 32"),
    ],
)
def test_trainings_of_mnist_have_names(settings, words):
    assert mnist_good.training_of(load(find("digits-greg"), settings).to_dict()) == words


def test_fine_tuning_measures_a_detector(model):
    """Margins and slopes again, from the network alone; and each l_inf radius lies below that in l_2."""
    trained = detector.load(model)
    sets = load_evaluation(trained.origin.recipe.data)
    found = list(fine_tuning.measure(model, 6, ("linf", "l2")))
    assert all(tuple(row) == fine_tuning.COLUMNS for row in found)
    assert [row["norm"] for row in found] == ["linf", "l2"] * 3
    for number, images in enumerate([sets.test, *sets.ood]):
        rows = found[2 * number : 2 * number + 2]
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:6].sort().values
        pixels = images.images[drawn].double().requires_grad_(True)
        score = -trained.network(pixels).logsumexp(1)
        (slope,) = torch.autograd.grad(score.sum(), pixels)
        right = (score <= trained.gamma) == (number == 0)
        margin = np.median((score.detach() - trained.gamma).abs()[right].numpy())
        assert 0 < rows[0]["radius_attack"] < rows[1]["radius_attack"]
        for row, order in zip(rows, (1, 2), strict=True):
            assert (row["set"], row["kind"], row["samples"]) == (images.name, images.kind, len(images))
            assert (row["samples_attacked"], row["right"]) == (6, int(right.sum()))
            aurocs = [trained.origin.metrics["ood"][other.name]["auroc"] for other in sets.ood]
            assert row["accuracy"] == trained.origin.metrics["accuracy"]
            assert row["auroc"] == pytest.approx(aurocs[number - 1] if number else np.mean(aurocs))
            steep = np.median(slope.flatten(1).norm(order, dim=1)[right].numpy())
            assert (row["margin"], row["gradient_norm_estimate"]) == pytest.approx((margin, steep))


def test_fine_tuning_draws_what_is_kept(tmp_path, model, capsys):
    kept, out = tmp_path / "kept.csv", tmp_path / "drawn.png"
    fine_tuning.main(KEPT / "resnet20.csv", out)
    with pytest.raises(InputError, match=r"cannot read .*kept\.csv.*--model FILE makes them"):
        fine_tuning.main(kept, out)
    with pytest.raises(InputError, match=r"model\.pt"):
        fine_tuning.main(model, out, [model])
    for options in ({"norm": ["l2"]}, {"limit": 5}):
        with pytest.raises(InputError, match="--norm and --limit are of attacks on checkpoints; give --model"):
            fine_tuning.main(KEPT / "resnet20.csv", out, **options)
    with pytest.raises(InputError, match="unknown norm in l2, l7; use linf, l2, l1"):
        fine_tuning.main(kept, out, [model], ["l2", "l7"])
    common = {"samples": 300, "samples_attacked": 16, "right": 9, "norm": "linf", "kind": "ood", "set": "far"}
    common |= {"accuracy": 0.75, "fpr95_id": 0.5, "auroc": 0.9}
    rows = [
        common
        | {"method": method, "lambda_grad": weight, "seed": seed, "margin": 2 * scale}
        | {"gradient_norm_estimate": 50 * scale, "radius_attack": 0.01 + weight}
        for method, weight, scale in (("uniform", 0.0, 1.0), ("uniform", 0.1, 0.25), ("energy", 0.1, 0.5))
        for seed in (0, 1)
    ]
    write_csv(kept, fine_tuning.COLUMNS, rows)
    capsys.readouterr()
    fine_tuning.main(kept, out)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| far ")]
    assert [line.split(" | ")[2] for line in lines] == ["energy", "GReg 0.1", "GReg+ 0.1"]
    assert lines[1].endswith("| 0.11 ±0 | 0.25 ±0.00 | 0.25 ±0.00 | 11.00 ±0.00 |")
    assert out.read_bytes()[:4] == b"\x89PNG" and len(fine_tuning.figure(fine_tuning.read(kept)).axes) == 2
    whole = kept.read_text()
    for content, message in (
        (whole[:-40], "not whole"),
        (whole.replace("0.9", "nan"), "not finite"),
        (whole.replace("uniform,0.0,1", "uniform,0.0,"), "could not convert"),
        (whole.replace("uniform,0.0,1", "uniform,0.5,1"), "no row with lambda_grad 0 of seed 1, linf, far"),
        (whole.replace("uniform,0.0,1", "uniform,0.0,0"), "two rows of uniform, 0.0, 0.0, linf, far"),
        (whole.replace("linf", "l7"), "no method or norm of this study: uniform, l7"),
        (whole.replace("linf", "l2"), "no rows in linf"),
        (whole.replace("margin", "margins"), "expected the columns"),
    ):
        kept.write_text(content)
        with pytest.raises(InputError, match=message):
            fine_tuning.main(kept, out)


def test_bounds_benchmark(model):
    records = bounds.measure(model, samples=4, repeats=1, methods=("ibp", "crown"))
    assert len(records) == 2 * sum(map(len, bounds.EPS.values()))
    for record in records:
        assert tuple(record) == bounds.COLUMNS
        for side in ("upper", "lower"):  # no bound is tighter than what an attack reached
            assert 1 <= record[f"{side}_joint"] <= record[f"{side}_per_logit"] + 1e-9
    assert np.isfinite([record["ms_per_sample"] for record in records]).all()


def test_lipschitz_benchmark(small_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(lipschitz_benchmark, "EPS", {"linf": (0.03,), "l2": (0.2,)})
    tiny = replace(small_recipe, optimizer=replace(small_recipe.optimizer, epochs=2))
    records = lipschitz_benchmark.measure("MLP-3", "greg", tmp_path, tiny, samples=2, repeats=1, batch=2)
    assert len(records) == 2 * sum(map(len, lipschitz_benchmark.EPS.values()))
    for record in records:
        assert tuple(record) == lipschitz_benchmark.COLUMNS
        assert 1 - 1e-9 <= record["auto"] <= min(record[name] for name in lipschitz_benchmark.METHODS) + 1e-9


def test_step_time_benchmark():
    records = step_time.measure("resnet-small", 2, 1, 0.5)
    assert len(records) == 11 and all(tuple(record) == step_time.COLUMNS for record in records)
    assert all(record["peak_mib"] > 0 for record in records)
    kept = step_time.measure(
        "resnet-small", 2, 1, 0.5, precision="bf16"
    )  # second derivatives and bounds are refused there
    assert [record["step"] for record in kept] == ["energy", "fast", "sampling"]


def test_peak_bytes_counts_what_is_held_at_a_time():
    mib = 2**20
    first = torch.ones(mib // 4).exp() + 1  # two of the three tensors at a time
    peak = step_time.peak_bytes(lambda: torch.ones(mib // 4).exp() + 1, first.device)
    assert 2 * mib <= peak < 2 * mib + 1000
    assert step_time.peak_bytes(lambda: first.sum().item(), first.device) < 1000


def test_clustering_benchmark():
    assert all(tuple(record) == clustering.COLUMNS for record in clustering.measure((200,), 1))
