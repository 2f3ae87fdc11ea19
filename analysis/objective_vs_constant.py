"""What training penalises against what is proved: gradient norm at x, found maximum and formal constant over lambda_grad.

    python analysis/objective_vs_constant.py runs/sweep/*/lipschitz.csv --out runs/sweep/constant.png

The objective only sees the gradient norm at the samples. The figure shows how far that carries over to the constant of
the whole ball, which is what a certified radius needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import typer
from matplotlib.figure import Figure

from grood_cert.cli import run_script
from grood_cert.errors import InputError
from grood_cert.results import figures
from grood_cert.results.table import Table
from grood_cert.system.files import write_csv

CURVES = {
    "gradient_norm_estimate": ("gradient norm at x (estimate, penalised)", "#D55E00", ":"),
    "sampled_estimate": ("sampled maximum (estimate)", "#E69F00", "-."),
    "ascended_estimate": ("ascended maximum (estimate)", "#009E73", "--"),
    "bound": ("proved bound", "#0072B2", "-"),
}
COLUMNS = ("lambda_grad", "kind", "eps", *CURVES)


def points(analyses: Sequence[Table], eps: float | None = None) -> list[dict[str, float | str]]:
    """Medians at one eps, for each lambda_grad and kind, with the keys of `COLUMNS`; the largest eps by default."""
    records: list[dict[str, float | str]] = []
    for analysis in analyses:
        weight = float(analysis.manifest["recipe"]["objective"]["lambda_grad"])
        for kind in ("id", "ood"):
            pages = {page["eps"]: page for page in analysis.summary() if page["kind"] == kind}
            chosen = max(pages, default=0.0) if eps is None else eps
            if chosen not in pages:
                raise InputError(f"an analysis has no {kind} rows at eps {chosen:g}; its eps are {sorted(pages)}")
            record = {"lambda_grad": weight, "kind": kind, "eps": chosen}
            records.append(record | {name: pages[chosen][name] for name in CURVES})
    return sorted(records, key=lambda record: float(record["lambda_grad"]))


def figure(records: Sequence[dict[str, float | str]], norm: str) -> Figure:
    """One panel for ID and one for OOD."""
    with mpl.rc_context(figures.STYLE):
        drawing = Figure(figsize=(7.2, 3.6), layout="constrained")
        for axes, kind in zip(drawing.subplots(1, 2, sharey=True), ("id", "ood"), strict=True):
            chosen = [record for record in records if record["kind"] == kind]
            weights = [float(record["lambda_grad"]) for record in chosen]
            for name, (label, colour, style) in CURVES.items():
                axes.plot(
                    weights,
                    [float(record[name]) for record in chosen],
                    label=label,
                    color=colour,
                    linestyle=style,
                    marker="o",
                    markersize=3,
                )
            smallest = min((weight for weight in weights if weight > 0), default=1.0)
            axes.set_xscale("symlog", linthresh=smallest)
            axes.set_yscale("log")
            heights = [float(record[name]) for record in records for name in CURVES]
            axes.set_ylim(0.8 * min(heights), 1.2 * max(heights))
            axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(mpl.ticker.FormatStrFormatter("%g"))
            axes.set_xlabel("lambda_grad")
            axes.set_title(
                f"{kind.upper()}, eps = {chosen[0]['eps']:g} ({figures.NORM_LABELS[norm]})" if chosen else kind.upper()
            )
        drawing.axes[0].set_ylabel("slope of S, median over samples")
        handles, labels = drawing.axes[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return drawing


def main(
    rows: Annotated[list[Path], typer.Argument(help="lipschitz.csv of runs that differ in lambda_grad.")],
    out: Annotated[Path, typer.Option(help="Figure: .png, .pdf or .svg; its numbers go beside it (.csv).")],
    eps: Annotated[float | None, typer.Option(help="Radius, on every grid. [default: the largest]")] = None,
) -> None:
    """Draw objective against formal constant."""
    analyses = [Table.read(path, "lipschitz") for path in rows]
    records = points(analyses, eps)
    norm = figures.common_norm({str(index): analysis for index, analysis in enumerate(analyses)})
    figures.save(figure(records, norm), out)
    write_csv(out.with_suffix(".csv"), COLUMNS, records)
    typer.echo(f"wrote {out} and {out.with_suffix('.csv')}")


if __name__ == "__main__":
    run_script(main)
