"""Estimate and certificate against the attack radius, sample by sample: which of the two can be trusted?

    python analysis/radius_scatter.py runs/demo/greg/rows.csv --out runs/demo/radius_scatter.png

On the diagonal a radius equals the distance of the nearest counterexample an attack found. Above it lies what is
refuted: the counterexample is nearer than the radius says. Certified radii cannot lie there; gradient-norm estimates
can, and for OOD of gradient-regularised nets do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from grood_cert.cli import run_script
from grood_cert.results import figures
from grood_cert.results.columns import NORMS
from grood_cert.results.figures import style
from grood_cert.results.figures.facts import state
from grood_cert.results.table import Table

_RADII = (
    ("radius_gradient_norm_estimate", "gradient-norm estimates", "#D55E00", "x"),
    ("radius_certified", "certified radii", "#0072B2", "o"),
)


def figure(rows: Table, width: style.Width = "double") -> Figure:
    """One panel an image set, of its samples that are right at x and were attacked; both axes in units of the norm."""
    label = NORMS[rows.norm]
    sets = {(kind, name): mask for kind in ("id", "ood") for name, mask in rows.sets(kind).items()}
    shown = {
        key: mask & (rows["status"] != "misdecided") & np.isfinite(rows["radius_attack"]) for key, mask in sets.items()
    }
    every = [rows[column][mask] for mask in shown.values() for column in ("radius_attack", *(one[0] for one in _RADII))]
    most = 1.05 * max((float(values.max()) for values in every if len(values)), default=1.0)
    columns = 1 if width == "single" else min(2, len(sets))

    def draw(axes: Axes, key: tuple[str, str]) -> None:
        attack = rows["radius_attack"][shown[key]]
        refuted = []
        for column, short, colour, marker in _RADII:
            radius = rows[column][shown[key]]
            axes.scatter(attack, radius, s=10, c=colour, marker=marker, linewidths=0.8, alpha=0.7)
            refuted.append(f"{int((radius > attack).sum())} {short}")
        axes.plot([0, most], [0, most], color=style.GREY, linewidth=1, linestyle="--", scalex=False, scaley=False)
        place: Any = {"xytext": (3, -3), "textcoords": "offset points", "rotation": 45, "ha": "center", "va": "top"}
        axes.annotate("radius = attack radius", (0.75 * most, 0.75 * most), size=6, color=style.GREY, **place)
        axes.set_aspect("equal")
        for set_limits in (axes.set_xlim, axes.set_ylim):
            set_limits(0, most)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(f"attack radius ({label}, pixels in [0, 1])")
        axes.set_ylabel(f"radius ({label}, pixels in [0, 1])")
        kind, name = key
        right = "accepted" if kind == "id" else "rejected"
        note = f"refuted of {len(attack)}: {', '.join(refuted)}"
        style.titled(axes, f"{name} ({kind.upper()}), {right}", note, int(style.WIDTHS[width] / columns / 0.2))

    with style.styled(width):
        drawing = style.canvas(width)
        state(drawing, {str(rows.manifest["model"]["name"]): rows}, False, width)
        rows_of = style.in_rows([list(sets)], columns)
        style.grid(drawing, rows_of, draw)
        entries = [
            Line2D([], [], color=colour, marker=marker, linestyle="", markersize=4, label=word)
            for _, word, colour, marker in _RADII
        ]
        entries.append(style.line("above: refuted, a counterexample is nearer", "--", linewidth=1))
        style.legend(drawing, (), entries, width, 1 if width == "single" else 3)
        style.fit(drawing, len(rows_of), style.WIDTHS[width] / columns - 0.8)
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
