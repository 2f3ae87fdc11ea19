r"""MNIST by GOOD's protocol: AUC clean, attacked and guaranteed of detectors trained in different ways, beside the published.

    python analysis/mnist_good.py results/mnist-good.csv --out docs/mnist-good.png

prints and draws the rows that are kept. They come from folders of runs (`--runs`, repeatable), one detector a sub-folder, which
then write them first:

    grood-cert train mnist-good-energy --set seed=1 --out runs/good/energy-1
    grood-cert train mnist-good-bounds --set seed=1 --set network.pretrained=runs/good/energy-1/model.pt --out runs/good/bounds-1
    grood-cert certify runs/good/bounds-1/model.pt --eps 0.1,0.3 --effort fast --stages ibp --limit 200
    python analysis/mnist_good.py results/mnist-good.csv --out docs/mnist-good.png --runs runs/good

A row is one detector, OOD set and eps, with the area under the ROC curve of clean ID images against OOD images that move
within eps (l_inf): clean, AUC; as an attack showed, AAUC; as was proved, GAUC.

Published: Bitterwolf et al., "Certifiably Adversarially Robust Detection of Out-of-Distribution Data" (GOOD), NeurIPS 2020,
table 1; its score is the confidence, its network has 13 million weights, its outliers are 80 Million Tiny Images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator, PercentFormatter

from grood_cert.cli import run_script
from grood_cert.errors import InputError
from grood_cert.results import figures
from grood_cert.results.brackets import brackets_of
from grood_cert.results.figures import style
from grood_cert.results.seeds import over_seeds
from grood_cert.results.table import Table, read_trained
from grood_cert.system.files import check_apart, numbers, write_csv

AREAS = ("auroc", "auroc_attacked", "auroc_certified")
COUNTS = ("samples_id", "samples_ood")
COLUMNS = ("training", "seed", "accuracy", "set", "eps", *COUNTS, *AREAS)
PUBLISHED_EPS = 0.3
PUBLISHED = {  # in percent: accuracy, then AUC, AAUC and GAUC of each set
    "GOOD80": (
        99.1,
        {"fashion-mnist": (99.8, 90.3, 55.5), "emnist-letters": (97.9, 63.1, 3.4), "cifar10": (100, 98.4, 94.7)},
    ),
    "GOOD100": (
        98.7,
        {"fashion-mnist": (100, 96.5, 78.0), "emnist-letters": (99.0, 53.8, 3.3), "cifar10": (100, 99.9, 99.4)},
    ),
}
Record = dict[str, Any]


def training_of(recipe: Mapping[str, Any]) -> str:
    """What sets a detector apart from the others, in words."""
    objective = recipe["objective"]
    words = "energy"
    if objective["lambda_grad"] > 0:
        plus = "+" if recipe["sampling"]["method"] == "energy" else ""
        words = f"GReg{plus} {objective['lambda_grad']:g}"
    if objective["certified"] != "none":
        share = objective["certified_mix"]
        term = "bounds" if share == 1 else f"bounds {share:g}, attack {1 - share:g}"
        words = f"{words}, {term}"
    width = recipe["network"]["width"]
    return f"{words}, width {width}" if width else words


def records(rows: Table) -> Iterator[Record]:
    """The rows of one certified detector that was trained from a recipe, with the keys of `COLUMNS`."""
    recipe = rows.manifest["recipe"]
    common = {"training": training_of(recipe), "seed": recipe["seed"], "accuracy": rows.manifest["metrics"]["accuracy"]}
    for found in brackets_of(rows, "ood", rows.eps):
        chosen = {name: found[name] for name in ("eps", *COUNTS, *AREAS)}
        yield common | {"set": found["set"].removesuffix(".npz")} | chosen


def read(path: Path, made: Sequence[Record] | None = None) -> list[Record]:
    """Rows that were written before, or those `made` that shall take their place.

    Raises:
        InputError: If there are none, a number is none or not finite, two detectors would count as one, or none was
            certified at the eps of the published rows.
    """
    if made is None and not path.exists():
        raise InputError(f"cannot read {path}: there is none; --runs FOLDER makes the rows")
    rows, seen = numbers(path, COLUMNS, ("training", "set"), made), set[tuple[Any, ...]]()
    for row in rows:
        if (key := (row["training"], row["seed"], row["set"], row["eps"])) in seen:
            raise InputError(f"{path}: two runs of {row['training']} with seed {row['seed']:g}; keep one of them")
        seen.add(key)
    if not any(row["eps"] == PUBLISHED_EPS for row in rows):
        raise InputError(f"no rows at eps {PUBLISHED_EPS:g} for {path}; certify with --eps {PUBLISHED_EPS:g}")
    return rows


def _cell(rows: Sequence[Record]) -> str:
    """AUC / AAUC / GAUC in percent, means over the seeds, and half the range of the last."""
    if not rows:
        return "-"
    means, (_, least, most) = [over_seeds(rows, name)[0] for name in AREAS], over_seeds(rows, AREAS[-1])
    return " / ".join(f"{100 * mean:.1f}" for mean in means) + f" ±{50 * (most - least):.1f}"


def _trainings(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """The rows of each training, the most accurate first."""
    found: dict[str, list[Record]] = {}
    for row in rows:
        found.setdefault(row["training"], []).append(row)
    return dict(sorted(found.items(), key=lambda item: -over_seeds(item[1], "accuracy")[0]))


def table(rows: Sequence[Record]) -> str:
    """One line a training and eps, in Markdown; the published ones last."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    lines = [["training", "seeds", "accuracy", "eps", *sets], ["---"] * (4 + len(sets))]
    for name, runs in _trainings(rows).items():
        mean, least, most = over_seeds(runs, "accuracy")
        seeds = str(len({row["seed"] for row in runs}))
        for eps in sorted({row["eps"] for row in runs}):
            cells = [_cell([row for row in runs if (row["set"], row["eps"]) == (one, eps)]) for one in sets]
            lines.append([name, seeds, f"{100 * mean:.2f} ±{50 * (most - least):.2f}", f"{eps:g}", *cells])
    for name, (accuracy, areas) in PUBLISHED.items():
        cells = [" / ".join(f"{area:.1f}" for area in areas[one]) if one in areas else "-" for one in sets]
        lines.append([f"{name}, published", "-", f"{accuracy:.1f}", f"{PUBLISHED_EPS:g}", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(rows: Sequence[Record]) -> Figure:
    """AUC, AAUC and GAUC against accuracy: a row of panels for each eps, a column for each set."""
    groups = _trainings(rows)
    looks = dict(zip([*groups, *PUBLISHED], style.looks(len(groups) + len(PUBLISHED)), strict=True))
    looks |= {name: replace(looks[name], colour=style.GREY) for name in PUBLISHED}
    sets, grid = list(dict.fromkeys(row["set"] for row in rows)), sorted({row["eps"] for row in rows})

    def draw(axes: Axes, panel: tuple[float, str]) -> None:
        eps, one = panel
        for name, runs in groups.items():
            found = [row for row in runs if (row["set"], row["eps"]) == (one, eps)]
            if found:
                _chain(axes, over_seeds(found, "accuracy")[0], [over_seeds(found, area) for area in AREAS], looks[name])
        for name, (accuracy, areas) in PUBLISHED.items() if eps == PUBLISHED_EPS else ():
            if one in areas:
                spans = [(area / 100, area / 100, area / 100) for area in areas[one]]
                _chain(axes, accuracy / 100, spans, looks[name])
        style.percent(axes, f"area, eps {eps:g}")
        axes.xaxis.set_major_locator(MultipleLocator(0.01))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.margins(x=0.2)
        axes.set_title(one)
        if eps == grid[-1]:
            axes.set_xlabel("ID accuracy")

    with style.styled("double"):
        drawing = style.canvas("double")
        style.grid(drawing, [[(eps, one) for one in sets] for eps in grid], draw)
        words = {name: f"{name}, published" if name in PUBLISHED else name for name in looks}
        handles = [
            Line2D([], [], color=look.colour, marker=look.marker, markersize=4, linestyle="", label=words[name])
            for name, look in looks.items()
        ]
        drawing.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        drawing.suptitle(
            "areas under the ROC curve, means over seeds, on a line for each training: clean (bar), attacked (hollow), guaranteed "
            "(filled, with\nits range over the seeds); OOD moves within eps, ID does not"
        )
        style.fit(drawing, len(grid), 4.6)
    return drawing


def _chain(axes: Axes, accuracy: float, spans: Sequence[tuple[float, float, float]], look: style.Look) -> None:
    """One training: mean, smallest and largest AUC, AAUC and GAUC, on a vertical line."""
    (clean, *_), (attacked, *_), (proved, least, most) = spans
    axes.plot([accuracy] * 2, [clean, proved], color=look.colour, linewidth=0.6)
    axes.plot(accuracy, clean, marker="_", color=look.colour, markersize=6)
    axes.plot(accuracy, attacked, marker=look.marker, color=look.colour, markerfacecolor="white", markersize=4)
    bars: Any = {"yerr": [[proved - least], [most - proved]], "elinewidth": 1.6}
    axes.errorbar(accuracy, proved, marker=look.marker, color=look.colour, markersize=4, **bars)


def main(
    rows: Annotated[Path, typer.Argument(help="The rows that are kept (.csv).")],
    out: Annotated[Path, typer.Option(help="Figure: .png, .pdf or .svg.")],
    runs: Annotated[list[Path] | None, typer.Option(help="Folder of runs to write the rows from.")] = None,
) -> None:
    """Print and draw the rows that are kept, or first write them from certified runs."""
    figures.check_format(out)
    check_apart([out], [rows])
    made = [record for found in read_trained(runs, "--runs") for record in records(found)] if runs else None
    shown = read(rows, made)
    typer.echo(table(shown))
    figures.save(figure(shown), out)
    if made:
        write_csv(rows, COLUMNS, made)  # last: what is kept stays unless all of this went well
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
