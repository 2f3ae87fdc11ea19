"""Training objectives side by side: accuracy, detection and gradient norms, mean and spread over seeds.

    python benchmarks/objectives.py --out runs/objectives-benchmark

All runs on a data set share one recipe and the seed's initial weights and order of images; only the objective differs
(GReg+ also takes twice as many outliers a step, its sampling is part of it). Three tables, in Markdown:

* objectives: cross-entropy, Outlier Exposure, energy, GReg, GReg+, and GReg with a certified term (interval bounds of S
  around each outlier);
* trade-off: GReg over lambda_grad, 0 being energy. Is there a value at which the mean gradient norm falls at least
  3-fold at an accuracy loss of at most 1 point?
* penalties: the three ways of differentiating the gradient norm, on digits.

`digits` is the recipe digits-greg as it is. `cifar-arrays` is cifar-arrays-greg on subsets of real images, cut down to
what a CPU core trains in seconds: conv-small without BatchNorm, 3000 images of CIFAR-10, 1619 Tiny-ImageNet outliers,
10 epochs. They lie in `--arrays`, a folder with a `load.py`, and are left out where it is absent. Numbers are of these
small experiments and not comparable with published ones.

"+-" is the sample standard deviation over seeds; the cut of the images is the same for all of them, so it does not show
how much the test images matter. Sets of noise count in no mean over sets. Runs that are in the folder already are not
repeated, and one that was interrupted goes on.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from grood_cert import detector, recipe
from grood_cert.cli import run_script
from grood_cert.detector import Detector
from grood_cert.errors import InputError
from grood_cert.metrics import mean_over_sets
from grood_cert.system.files import replacing, write_csv
from grood_cert.training import run as training

COLUMNS = ("data", "settings", "metric", "set", "mean", "sd")
SEEDS = (0, 1, 2)
LAMBDAS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)
CUT, LOSS = 3.0, 1.0  # the claim: gradient norm divided by at least, accuracy lost at most, in points
SUMMARY = ("accuracy", "AUROC / fpr95_id, mean of sets", "gradient norm, ID", "gradient norm, OOD")
ARRAYS = Path(__file__).parents[2] / "shared/data"
ARRAY_SETS = ("cifar10_train", "tin32_outliers", "tin32_ood", "cifar100_test", "dtd32_a")

Changes = tuple[str, ...]
Key = tuple[str, str]  # metric, set
Measured = Mapping[Key, tuple[float, float]]  # mean, sample standard deviation


@dataclass(frozen=True)
class Setup:
    """What the runs on a data set have in common.

    Attributes:
        name: Of the data set, in tables.
        recipe: A recipe file, or the name of one that comes with the package.
        settings: `KEY=VALUE` settings on top of it.
        lambda_grad: That of GReg in the table of objectives.
    """

    name: str
    recipe: str
    settings: Changes
    lambda_grad: float


DIGITS = Setup("digits", "digits-greg", ("objective.certified_eps=0.03",), 0.1)


def arrays(source: Path, folder: Path) -> Setup:
    """The set-up `cifar-arrays`; images are written to the folder as .npz files unless they are there.

    Args:
        source: Folder with a `load.py` whose `load(NAME)` gives uint8 images and a dictionary with labels "y".
        folder: Where the .npz files go.
    """
    files = {name: folder / f"{name}.npz" for name in ARRAY_SETS}
    if not all(file.exists() for file in files.values()):
        spec = importlib.util.spec_from_file_location("arrays_load", source / "load.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, file in files.items():
            images, meta = module.load(name)
            labels = np.asarray(meta.get("y", np.zeros(len(images))), dtype=np.int64)
            with replacing(file) as temporary:
                np.savez(temporary, images=images, labels=labels)
    inside, auxiliary, *others = (str(file) for file in files.values())
    settings = (
        f"data.id={inside}",
        f"data.auxiliary={auxiliary}",
        f"data.ood={json.dumps(others)}",
        "data.train_limit=3000",
        "data.calibration_share=0.05",
        "data.test_share=0.1",
        "network.name=conv-small",
        "objective.m_in=-5",
        "objective.m_out=-3",
        "objective.certified_eps=0.01",
        "optimizer.lr=0.004",
        "optimizer.epochs=10",
        "augmentation.crop_padding=0",
    )
    return Setup("cifar-arrays", "cifar-arrays-greg", settings, 1.0)


def greg(lambda_grad: float) -> Changes:
    """GReg with a weight; 0 is energy."""
    return (f"objective.lambda_grad={lambda_grad:g}",)


def objectives(lambda_grad: float) -> dict[str, Changes]:
    """The rows of the first table."""
    return {
        "CE": (*greg(0), "objective.outlier_loss=none", "objective.lambda_S=0"),
        "OE": (*greg(0), "objective.outlier_loss=oe", "objective.lambda_S=0.5"),
        "Energy": greg(0),
        "GReg": greg(lambda_grad),
        "GReg+": (*greg(lambda_grad), "sampling.method=energy", "sampling.pool=256"),
        "GReg, certified": (*greg(lambda_grad), "objective.certified=ood", "objective.lambda_certified=0.1"),
    }


def penalties(lambda_grad: float) -> dict[str, Changes]:
    """The rows of the third table."""
    return {
        "exact": greg(lambda_grad),
        "fast": (*greg(lambda_grad), "objective.penalty=fast"),
        "stochastic": (*greg(lambda_grad), "objective.penalty=stochastic"),
    }


def trained(setup: Setup, changes: Changes, seed: int, folder: Path) -> Detector:
    """The detector of one run, from its folder below `folder` if it is there already.

    Raises:
        InputError: If what is there was trained with other settings.
    """
    chosen = recipe.load(recipe.find(setup.recipe), [*setup.settings, *changes, f"seed={seed}"])
    place = folder / setup.name / ",".join(changes) / str(seed)
    if not (place / "model.pt").exists():
        return training.run(chosen, place, resume=(place / "last.pt").exists())
    found = detector.load(place / "model.pt")
    difference = recipe.first_difference(found.origin.recipe, chosen)
    if difference:
        raise InputError(f"{place}: trained with {difference}; choose another --out")
    return found


def _numbers(metrics: Mapping[str, Any]) -> dict[Key, float]:
    """What one run measured on its test sets."""
    numbers = {
        ("accuracy", "id"): metrics["accuracy"],
        ("gradient_norm", "id"): metrics["gradient_norm_id"],
        ("gradient_norm", "ood"): metrics["gradient_norm_ood"],
    }
    for metric in ("auroc", "fpr95_id"):
        numbers |= {(metric, name): values[metric] for name, values in metrics["ood"].items()}
        real = [values[metric] for values in metrics["ood"].values() if values["kind"] == "ood"]
        numbers[metric, "mean"] = mean_over_sets(real)
    return numbers


def measure(setup: Setup, changes: Changes, folder: Path, seeds: Sequence[int] = SEEDS) -> Measured:
    """Train one objective with each seed; mean and sample standard deviation of what was measured.

    Args:
        setup: What all runs on the data set have in common.
        changes: `KEY=VALUE` settings of the objective.
        folder: Folder of the benchmark.
        seeds: At least two.

    Returns:
        By metric ("accuracy", "gradient_norm", "auroc", "fpr95_id") and set ("id", "ood", the name of an OOD set, or
        "mean" of those that are not noise).
    """
    runs = [_numbers(trained(setup, changes, seed, folder).origin.metrics) for seed in seeds]
    values = {key: np.array([run[key] for run in runs]) for key in runs[0]}
    return {key: (float(column.mean()), float(column.std(ddof=1))) for key, column in values.items()}


def tradeoff(energy: Measured, other: Measured) -> dict[str, float]:
    """What GReg gains and costs against energy: factors of the mean gradient norms, points of accuracy."""
    return {
        "cut_id": energy["gradient_norm", "id"][0] / other["gradient_norm", "id"][0],
        "cut_ood": energy["gradient_norm", "ood"][0] / other["gradient_norm", "ood"][0],
        "loss": 100 * (energy["accuracy", "id"][0] - other["accuracy", "id"][0]),
    }


def _cell(measured: Measured, *keys: Key) -> str:
    return " / ".join("{:.3f} ± {:.3f}".format(*measured[key]) for key in keys)


def _print(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [title, "", *("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)), ""]
    typer.echo("\n".join(lines))


def _summary(measured: Measured) -> list[str]:
    detection = _cell(measured, ("auroc", "mean"), ("fpr95_id", "mean"))
    return [_cell(measured, ("accuracy", "id")), detection, *_norms(measured)]


def _norms(measured: Measured) -> list[str]:
    return [_cell(measured, ("gradient_norm", name)) for name in ("id", "ood")]


def print_objectives(name: str, rows: Mapping[str, Measured]) -> None:
    """First table: one column for each OOD set."""
    sets = [key[1] for key in next(iter(rows.values())) if key[0] == "auroc" and key[1] != "mean"]
    head = ["objective", "accuracy", *(f"{title}: AUROC / fpr95_id" for title in sets), *SUMMARY[2:]]
    cells = [
        [
            objective,
            _cell(measured, ("accuracy", "id")),
            *(_cell(measured, ("auroc", title), ("fpr95_id", title)) for title in sets),
            *_norms(measured),
        ]
        for objective, measured in rows.items()
    ]
    _print(f"{name}: objectives", head, cells)


def print_tradeoff(name: str, rows: Mapping[str, Measured]) -> None:
    """Second table; the first row is energy."""
    energy = next(iter(rows.values()))
    cells, held = [], []
    for weight, measured in rows.items():
        gain = tradeoff(energy, measured)
        cells.append([weight, *_summary(measured), *(f"{gain[key]:.2f}" for key in ("cut_id", "cut_ood", "loss"))])
        if min(gain["cut_id"], gain["cut_ood"]) >= CUT and gain["loss"] <= LOSS:
            held.append(weight)
    _print(f"{name}: trade-off", ["lambda_grad", *SUMMARY, "cut, ID", "cut, OOD", "accuracy loss, points"], cells)
    verdict = f"at lambda_grad = {', '.join(held)}" if held else "at no lambda_grad tried"
    typer.echo(
        f"{name}: gradient norms (no radii: these are margins over slopes) on ID and OOD cut {CUT:g}-fold "
        f"at {LOSS:g} point of accuracy or less {verdict}\n"
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")],
    csv: Annotated[Path | None, typer.Option(help="Also write every number as CSV.")] = None,
    source: Annotated[Path, typer.Option("--arrays", help="Folder of the image sets of cifar-arrays.")] = ARRAYS,
) -> None:
    """Train what is missing, print the tables."""
    torch.set_num_threads(1)
    setups = [DIGITS]
    if (source / "load.py").is_file():
        setups.append(arrays(source, out / "arrays"))
    else:
        typer.echo(f"cifar-arrays is left out: there is no {source / 'load.py'}", err=True)
    records: list[dict[str, Any]] = []
    for setup in setups:
        compared, swept = objectives(setup.lambda_grad), {f"{weight:g}": greg(weight) for weight in LAMBDAS}
        differentiated = penalties(setup.lambda_grad) if setup is DIGITS else {}
        every = dict.fromkeys([*compared.values(), *swept.values(), *differentiated.values()])
        results = {changes: measure(setup, changes, out) for changes in every}
        for changes, measured in results.items():
            common = {"data": setup.name, "settings": " ".join(changes)}
            for (metric, name), (mean, sd) in measured.items():
                records.append({**common, "metric": metric, "set": name, "mean": mean, "sd": sd})
        print_objectives(setup.name, {name: results[changes] for name, changes in compared.items()})
        print_tradeoff(setup.name, {name: results[changes] for name, changes in swept.items()})
        if differentiated:
            rows = [[name, *_summary(results[changes])] for name, changes in differentiated.items()]
            _print(f"{setup.name}: penalties", ["penalty", *SUMMARY], rows)
    if csv:
        write_csv(csv, COLUMNS, records)


if __name__ == "__main__":
    run_script(main)
