r"""What certificates cost: accuracy and clean detection against what is proved, over the mix of attack and bound.

    python analysis/pareto.py results/digits-pareto.csv --out docs/digits-pareto.png

prints and draws the rows that are kept. They come from the folders of sweeps (`--sweep`, repeatable), which then write them first:

    grood-cert sweep digits-certified --grid objective.certified_mix=0,0.1,0.3,1 --seeds 3 --eps 0.02,0.05,0.1 \
        --effort fast --limit 100 --no-lipschitz --out runs/mix
    python analysis/pareto.py results/digits-pareto.csv --out docs/digits-pareto.png --sweep runs/mix

A row is one detector, image set and eps, with three rates, the lower the better. Of OOD sets they are FPR95 at the threshold
that accepts 95 % of the clean ID test images; of the ID test set, the share that the detector's own threshold rejects:
clean; `attacked`, somewhere in the ball, as an attack showed; `certified`, not proved to be right in all of the ball.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from grood_cert.cli import run_script
from grood_cert.errors import InputError
from grood_cert.results import figures
from grood_cert.results.curves import fpr_curve
from grood_cert.results.figures import style
from grood_cert.results.seeds import over_seeds
from grood_cert.results.table import Table, read_trained
from grood_cert.system.files import check_apart, numbers, write_csv

SETTINGS = ("certified", "certified_mix", "certified_eps", "lambda_certified", "lambda_grad")  # of `[objective]`
RATES = ("rate_clean", "rate_attacked", "rate_certified")
COLUMNS = (*SETTINGS, "seed", "accuracy", "kind", "set", "samples", "eps", *RATES)
WORDS = ("certified", "kind", "set")  # the other columns hold numbers
FAR, NEAR = "photo-patches", "digits:8,9"
Record = dict[str, Any]


def records(rows: Table) -> Iterator[Record]:
    """The rows of one certified detector that was trained from a recipe, with the keys of `COLUMNS`."""
    recipe = rows.manifest["recipe"]
    common = {name: recipe["objective"][name] for name in SETTINGS}
    common |= {"seed": recipe["seed"], "accuracy": rows.manifest["metrics"]["accuracy"]}
    for kind in ("id", "ood"):
        for name, mask in rows.sets(kind).items():
            if kind == "id":
                clean = float((rows["score"][mask] > rows.gamma).mean())
                attacked = (rows.grid["s_attack_max"][mask] > rows.gamma).mean(0)
                certified = 1 - (rows.grid["s_ub"][mask] < rows.gamma).mean(0)
            else:
                curve = fpr_curve(rows, "ood", {name: mask})
                clean, attacked, certified = float(curve.certified[0]), curve.attacked[1:], curve.certified[1:]
            for eps, *worst in zip(rows.eps, attacked, certified, strict=True):
                rates = dict(zip(RATES, (clean, *map(float, worst)), strict=True))
                yield common | {"kind": kind, "set": name, "samples": int(mask.sum()), "eps": eps} | rates


def read(path: Path, made: Sequence[Record] | None = None) -> list[Record]:
    """Rows that were written before, or those `made` that shall take their place.

    Raises:
        InputError: If there are none, a number is none or not finite, or a set of the figure is missing.
    """
    if made is None and not path.exists():
        raise InputError(f"cannot read {path}: there is none; --sweep FOLDER makes the rows")
    rows = numbers(path, COLUMNS, WORDS, made)
    for name in (NEAR, FAR):
        if not any(row["set"] == name for row in rows):
            raise InputError(f"no rows of {name} for {path}; certify the OOD sets of digits-certified")
    return rows


def _cell(rows: Sequence[Record], *columns: str, digits: int = 2) -> str:
    """Means over the seeds, and half the range of each."""
    spreads = [over_seeds(rows, column) for column in columns]
    return " / ".join(f"{mean:.{digits}f} ±{(most - least) / 2:.{digits}f}" for mean, least, most in spreads)


def _objectives(rows: Sequence[Record]) -> dict[tuple[str, float], list[Record]]:
    """The rows of each objective, by its name but for the share of the bound, and this share; smallest shares first."""
    found: dict[tuple[str, float], list[Record]] = {}
    for row in sorted(rows, key=lambda row: row["certified_mix"]):
        term = "no certified term"
        if row["certified"] != "none":
            term = f"{row['certified']}, eps {row['certified_eps']:g}, weight {row['lambda_certified']:g}"
        found.setdefault((f"{term}, lambda_grad {row['lambda_grad']:g}", row["certified_mix"]), []).append(row)
    return found


def table(rows: Sequence[Record]) -> str:
    """One column an objective, in Markdown: accuracy, clean rates, and attacked / certified rates at each eps."""
    groups = _objectives(rows)
    sets, grid = list(dict.fromkeys(row["set"] for row in rows)), sorted({row["eps"] for row in rows})
    names = [name if name.startswith("no") else f"{name}, a {mix:g}" for name, mix in groups]
    lines = [["", *names], ["---"] * (1 + len(groups))]
    lines += [["accuracy", *(_cell(runs, "accuracy", digits=3) for runs in groups.values())]]
    for name in sets:
        chosen = [[row for row in runs if row["set"] == name] for runs in groups.values()]
        lines += [[f"{name}: clean", *(_cell(runs, RATES[0]) for runs in chosen)]]
        for eps in grid:
            at = [[row for row in runs if row["eps"] == eps] for runs in chosen]
            lines += [[f"{name}: attacked / certified, eps {eps:g}", *(_cell(runs, *RATES[1:]) for runs in at)]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _point(axes: Axes, along: Sequence[Record], x: str, up: Sequence[Record], **look: Any) -> tuple[float, float]:
    """One objective: the means over its seeds, and bars from the smallest to the largest."""
    (across, *sides), (height, *ends) = over_seeds(along, x), over_seeds(up, "rate_certified")
    bars: Any = {"xerr": [[across - sides[0]], [sides[1] - across]], "yerr": [[height - ends[0]], [ends[1] - height]]}
    axes.errorbar(across, height, elinewidth=0.6, markersize=4, linestyle="", **bars, **look)
    return across, height


def figure(rows: Sequence[Record]) -> Figure:
    """Accuracy and clean near-OOD detection against what is not proved at the largest eps; a line over the share a."""
    eps = max(row["eps"] for row in rows)
    groups = _objectives([row for row in rows if row["eps"] == eps])
    families = sorted({name for name, _ in groups})
    panels = (
        (FAR, FAR, "accuracy", "ID accuracy"),
        (FAR, NEAR, "rate_clean", f"clean FPR95, {NEAR} (near-OOD)"),
        ("", FAR, "accuracy", "ID accuracy"),
    )

    def draw(axes: Axes, panel: tuple[str, str, str, str]) -> None:
        proved, at, column, label = panel
        for look, family in zip(style.looks(len(families)), families, strict=True):
            line: dict[float, tuple[float, float]] = {}
            for (name, mix), runs in groups.items():
                if name == family:
                    up = [row for row in runs if (row["set"] == proved if proved else row["kind"] == "id")]
                    along = [row for row in runs if row["set"] == at]
                    line[mix] = _point(axes, along, column, up, marker=look.marker, color=look.colour)
            axes.plot(*zip(*line.values(), strict=True), color=look.colour, linewidth=0.8)
            for mix in {min(line), max(line)} if len(line) > 1 else ():
                offset: Any = {"xytext": (3, 4), "textcoords": "offset points", "size": style.small_type()}
                axes.annotate(f"a {mix:g}", line[mix], color=look.colour, **offset)
        style.percent(axes, f"not certified at eps {eps:g}: {proved or 'ID'}")
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel(label)

    shares = dict.fromkeys(families, "")
    for name, mix in groups:
        if not name.startswith("no"):
            shares[name] += f"{',' if shares[name] else ', a'} {mix:g}"
    with style.styled("double"):
        drawing = style.canvas("double")
        style.grid(drawing, [panels], draw)
        handles = [
            Line2D([], [], color=look.colour, marker=look.marker, markersize=4, label=family + shares[family])
            for look, family in zip(style.looks(len(families)), families, strict=True)
        ]
        drawing.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        drawing.suptitle(
            "what is trained: worst S of whom, in which ball, with which weight; a: share of the bound, rising along a line\n"
            "means over seeds, bars from the smallest to the largest"
        )
        style.fit(drawing, 1, 6.2)
    return drawing


def main(
    rows: Annotated[Path, typer.Argument(help="The rows that are kept (.csv).")],
    out: Annotated[Path, typer.Option(help="Figure: .png, .pdf or .svg.")],
    sweep: Annotated[list[Path] | None, typer.Option(help="Folder of a sweep to write the rows from.")] = None,
) -> None:
    """Print and draw the rows that are kept, or first write them from sweeps."""
    figures.check_format(out)
    check_apart([out], [rows])
    made = [record for found in read_trained(sweep, "--sweep") for record in records(found)] if sweep else None
    shown = read(rows, made)
    typer.echo(table(shown))
    figures.save(figure(shown), out)
    if made:
        write_csv(rows, COLUMNS, made)  # last: what is kept stays unless all of this went well
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
