"""Estimate and certificate against the attack radius, sample by sample: which of the two can be trusted?

    python analysis/radius_scatter.py runs/demo/greg/rows.csv --out runs/demo/radius_scatter.png

On the diagonal a radius equals the distance of the nearest counterexample an attack found. Above it lies what is
refuted. Certified radii cannot lie there; gradient-norm estimates can, and for OOD of gradient-regularised nets do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import numpy as np
import typer
from matplotlib.figure import Figure

from grood_cert.cli import run_script
from grood_cert.results import figures
from grood_cert.results.table import Table


def figure(rows: Table) -> Figure:
    """One panel for the right decisions of each kind, axes in units of the run's norm."""
    with mpl.rc_context(figures.STYLE):
        drawing = Figure(figsize=(7.2, 3.4), layout="constrained")
        for axes, kind in zip(drawing.subplots(1, 2, sharex=True, sharey=True), ("id", "ood"), strict=True):
            mask = rows.of_kind(kind) & (rows["status"] != "misdecided") & np.isfinite(rows["radius_attack"])
            attack = rows["radius_attack"][mask]
            for column, label, colour, marker in (
                ("radius_gradient_norm_estimate", "gradient-norm estimate", "#D55E00", "x"),
                ("radius_certified", "certified", "#0072B2", "o"),
            ):
                radius = rows[column][mask]
                refuted = f"{np.mean(radius > attack):.0%} refuted" if mask.any() else "no samples"
                axes.scatter(attack, radius, s=12, c=colour, marker=marker, alpha=0.7, label=f"{label}: {refuted}")
            axes.axline((0, 0), slope=1, color="#555555", linewidth=1, linestyle="--")
            axes.set_xlabel(f"attack radius ({figures.NORM_LABELS[rows.norm]})")
            axes.set_title({"id": "ID accepted", "ood": "OOD rejected"}[kind])
            axes.legend(loc="upper left", frameon=False)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        drawing.axes[0].set_ylabel(f"radius ({figures.NORM_LABELS[rows.norm]})")
    return drawing


def main(
    rows: Annotated[Path, typer.Argument(help="rows.csv of a certification.")],
    out: Annotated[Path, typer.Option(help="Figure: .png, .pdf or .svg.")],
) -> None:
    """Draw estimate and certificate against the attack radius."""
    figures.save(figure(Table.read(rows, "certification")), out)
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
