r"""What GReg buys on a pre-trained network: detection, margin, slope and attack radius, each over that of energy fine-tuning.

    python analysis/fine_tuning.py results/resnet20.csv --out docs/resnet20.png

prints and draws the rows that are kept. They come from checkpoints (`--model`, repeatable), which are then attacked first:

    grood-cert train cifar10-resnet20-energy --set seed=1 --out runs/energy-1
    grood-cert train cifar10-resnet20-greg --set objective.lambda_grad=0.03 --set seed=1 --out runs/greg-1
    python analysis/fine_tuning.py results/resnet20.csv --out docs/resnet20.png --model runs/energy-1/model.pt \
        --model runs/greg-1/model.pt

A row is one detector, norm and image set. AUROC and FPR95 are of the whole OOD test set, in the row of the ID set the means
over these; margin |S - gamma|, slope (the dual norm of grad S at x, an estimate) and attack radius are medians over those of
`samples_attacked` samples that are `right` at x. Nothing here is proved. Ratios are of one seed each, over the row of the same
seed, norm and set with lambda_grad 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from grood_cert.attacks import AttackEffort, minimum_norm
from grood_cert.ball import Norm
from grood_cert.cli import run_script
from grood_cert.data.experiment import load_evaluation
from grood_cert.detector import Detector, Provenance, load, logits
from grood_cert.errors import InputError, RunError
from grood_cert.metrics import mean_over_sets
from grood_cert.results import figures
from grood_cert.results.columns import NORMS
from grood_cert.results.figures import style
from grood_cert.runs.batches import generator, subset
from grood_cert.scores import gradient_norm_estimate
from grood_cert.system.files import check_apart, numbers, write_csv

WORDS = ("method", "norm", "kind", "set")
DETECTION = ("accuracy", "auroc", "fpr95_id")
MEDIANS = ("margin", "gradient_norm_estimate", "radius_attack")
OBJECTIVE = ("method", "lambda_grad", "seed", "norm")
COLUMNS = (*OBJECTIVE, "kind", "set", "samples", *DETECTION, "samples_attacked", "right", *MEDIANS)
RATIOS = {"margin": "margin", "gradient_norm_estimate": "slope at x (estimate)", "radius_attack": "attack radius"}
METHODS = {"uniform": "GReg", "energy": "GReg+"}  # by how outliers are sampled
Record = dict[str, Any]


def measure(model: Path, limit: int, norms: Sequence[Norm]) -> Iterator[Record]:
    """Attack one detector in some norms: its rows, with the keys of `COLUMNS`.

    Raises:
        InputError: If the checkpoint cannot be used, was not trained by a recipe, or is right of no sample of a set.
        RunError: If no counterexample is found for half of the samples of a set.
    """
    detector = load(model)
    if not isinstance(detector.provenance, Provenance):
        raise InputError(f"{model} was not trained by a recipe: its lambda_grad is unknown")
    recipe, metrics = detector.provenance.recipe, detector.provenance.metrics
    experiment = load_evaluation(recipe.data)
    for number, images in enumerate([experiment.test, *experiment.ood]):
        pixels = subset(images, limit, 0)[0].images.double()
        score = detector.score.value(logits(detector.network, pixels))
        chosen = (score <= detector.gamma) == (images.kind == "id")
        if not bool(chosen.any()):
            raise InputError(f"{model} is right of none of {len(pixels)} samples of {images.name}; raise --limit")
        detected = [metrics["ood"][other.name] for other in experiment.ood if images.kind == "id" or other is images]
        for norm in norms:
            yield {
                "method": recipe.sampling.method,
                "lambda_grad": recipe.objective.lambda_grad,
                "seed": recipe.seed,
                "norm": norm,
                "kind": images.kind,
                "set": images.name.removesuffix(".npz"),
                "samples": len(images),
                "accuracy": metrics["accuracy"],
                **{name: mean_over_sets([one[name] for one in detected]) for name in DETECTION[1:]},
                "samples_attacked": len(pixels),
                "right": int(chosen.sum()),
                **_medians(detector, pixels[chosen], score[chosen], norm, generator(0, number)),
            }


def _medians(detector: Detector, pixels: Tensor, score: Tensor, norm: Norm, random: torch.Generator) -> Record:
    slope = gradient_norm_estimate(detector.network, pixels, norm, detector.score)
    effort = AttackEffort.preset("fast")
    found = minimum_norm(detector.network, pixels, detector.gamma, norm, random, effort, detector.score)
    values = ((score - detector.gamma).abs(), slope, found.radius)
    medians = {name: float(np.median(value.numpy())) for name, value in zip(MEDIANS, values, strict=True)}
    if not math.isfinite(medians["radius_attack"]):
        raise RunError(f"no counterexample in {norm} was found for half of {len(pixels)} samples")
    return medians


def read(path: Path, made: Sequence[Record] | None = None) -> list[Record]:
    """Rows that were written before, or those `made` that shall take their place.

    Raises:
        InputError: If there are none, or they are not of this study.
    """
    if made is None and not path.exists():
        raise InputError(f"cannot read {path}: there is none; --model FILE makes them")
    rows = numbers(path, COLUMNS, WORDS, made)
    for row in rows:
        if row["method"] not in METHODS or row["norm"] not in NORMS:
            raise InputError(f"{path}: no method or norm of this study: {row['method']}, {row['norm']}")
    named = [tuple(row[key] for key in (*OBJECTIVE, "set")) for row in rows]
    for name in named:
        if named.count(name) > 1:
            raise InputError(f"{path}: two rows of {', '.join(map(str, name))}")
    if "linf" not in {row["norm"] for row in rows}:
        raise InputError(f"{path}: no rows in linf to draw")
    return rows


def _energy(rows: Sequence[Record], row: Record) -> Record:
    """The row of energy fine-tuning that this one compares with."""
    same = ("seed", "norm", "set")
    for other in rows:
        if other["method"] == "uniform" and other["lambda_grad"] == 0 and all(other[key] == row[key] for key in same):
            return other
    raise InputError(f"no row with lambda_grad 0 of seed {row['seed']:g}, {row['norm']}, {row['set']} to compare with")


def _objectives(rows: Sequence[Record]) -> dict[str, tuple[str, float]]:
    """Method and lambda_grad of each objective, by its name; energy first, GReg+ last."""
    found = sorted({(row["method"], row["lambda_grad"]) for row in rows}, key=lambda one: (one[0] != "uniform", one[1]))
    return {f"{METHODS[method]} {weight:.2g}" if weight else "energy": (method, weight) for method, weight in found}


def _chosen(rows: Sequence[Record], objective: tuple[str, float], norm: str, name: str) -> list[Record]:
    wanted = (*objective, norm, name)
    return [row for row in rows if (row["method"], row["lambda_grad"], row["norm"], row["set"]) == wanted]


def _ratios(rows: Sequence[Record], runs: Sequence[Record], key: str) -> list[float]:
    """A median of each run over that of energy fine-tuning."""
    return [run[key] / _energy(rows, run)[key] for run in runs]


def _cell(values: Sequence[float], form: str) -> str:
    """Mean over the seeds and half the range."""
    spread = f" ±{(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def table(rows: Sequence[Record]) -> str:
    """In Markdown, one line an image set, norm and objective; means over the seeds and half the range of each."""
    heads = ["set", "norm", "objective", "seeds", "accuracy", "AUROC", "FPR95", "margin", "slope at x (estimate)"]
    lines = [[*heads, "attack radius", "times energy: margin", "slope", "attack radius"]]
    lines += [["---"] * len(lines[0])]
    for name in dict.fromkeys(row["set"] for row in rows):
        for norm in dict.fromkeys(row["norm"] for row in rows):
            for title, objective in _objectives(rows).items():
                if runs := _chosen(rows, objective, norm, name):
                    cells = [_cell([run[key] for run in runs], ".3f") for key in DETECTION]
                    cells += [_cell([run[key] for run in runs], ".3g") for key in MEDIANS]
                    cells += [_cell(_ratios(rows, runs, key), ".2f") for key in RATIOS]
                    lines += [[name, norm, title, str(len(runs)), *cells]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(rows: Sequence[Record]) -> Figure:
    """Times energy fine-tuning: margin, slope and attack radius in l_inf, a panel a set; AUROC in the last panel."""
    rows = [row for row in rows if row["norm"] == "linf"]
    objectives, sets = _objectives(rows), list(dict.fromkeys(row["set"] for row in rows))
    detected = list(dict.fromkeys(row["set"] for row in rows if row["kind"] != "id"))

    def points(axes: Axes, labels: Sequence[str], values: Sequence[Sequence[list[float]]]) -> None:
        for number, (look, label, line) in enumerate(zip(style.looks(len(labels)), labels, values, strict=True)):
            known = [(place + 0.15 * (number - 1), one) for place, one in enumerate(line) if one]
            mean = np.array([np.mean(one) for _, one in known])
            bars = [mean - [min(one) for _, one in known], [max(one) for _, one in known] - mean]
            dots: Any = {"marker": look.marker, "color": look.colour, "markersize": 4, "elinewidth": 0.6}
            axes.errorbar([x for x, _ in known], mean, yerr=bars, linestyle="", label=label, **dots)

    def draw(axes: Axes, name: str) -> None:
        runs = {other: [_chosen(rows, one, "linf", other) for one in objectives.values()] for other in sets}
        if name:
            times = [[_ratios(rows, one, key) for one in runs[name]] for key in RATIOS]
            points(axes, list(RATIOS.values()), times)
            axes.axhline(1, color="0.6", linewidth=0.6, zorder=0)
        else:
            points(axes, detected, [[[run["auroc"] for run in one] for one in runs[other]] for other in detected])
        axes.set_ylabel("times energy" if name else "AUROC")
        axes.set_title(name or "detection, clean")
        axes.set_xticks(range(len(objectives)), list(objectives), rotation=30, ha="right", rotation_mode="anchor")
        if not name:
            axes.legend(frameon=False, fontsize=style.small_type())

    with style.styled("double"):
        drawing = style.canvas("double")
        panels = [*sets, ""]
        style.grid(drawing, [panels[start : start + 3] for start in range(0, len(panels), 3)], draw)
        marks, labels = drawing.axes[0].get_legend_handles_labels()  # of all panels but the last, which has its own
        drawing.legend(marks, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        drawing.suptitle(
            "fine-tuned from the same weights; medians over samples right at x, l_inf\n"
            "means over seeds, bars from the smallest to the largest"
        )
        style.fit(drawing, -(-len(panels) // 3), 4.6)
    return drawing


def main(
    kept: Annotated[Path, typer.Argument(help="The rows that are kept (.csv).")],
    out: Annotated[Path, typer.Option(help="Figure: .png, .pdf or .svg.")],
    model: Annotated[list[Path] | None, typer.Option(help="Checkpoint to write rows of.")] = None,
    norm: Annotated[list[str] | None, typer.Option(help="Norm of the attacks on it: linf (default), l2, l1.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most samples attacked of each set.  [default: 32]")] = None,
) -> None:
    """Print and draw the rows that are kept, or first write them by attacks on checkpoints."""
    figures.check_format(out)
    check_apart([out, kept], model or [])
    check_apart([out], [kept])
    if not model and (norm or limit):
        raise InputError("--norm and --limit are of attacks on checkpoints; give --model, or leave them out")
    norms = norm or ["linf"]
    if not set(norms) <= set(NORMS):
        raise InputError(f"unknown norm in {', '.join(norms)}; use {', '.join(NORMS)}")
    made = [row for path in model for row in measure(path, limit or 32, cast(list[Norm], norms))] if model else None
    found = read(kept, made)
    typer.echo(table(found))
    figures.save(figure(found), out)
    if made:
        write_csv(kept, COLUMNS, made)  # last: what is kept stays unless all of this went well
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
