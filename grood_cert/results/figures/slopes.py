"""Lipschitz analyses: medians of what was found and proved of the local constant of S, one panel an image set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grood_cert.errors import InputError
from grood_cert.results.curves import SlopeCurve, slope_curve
from grood_cert.results.figures import style
from grood_cert.results.figures.facts import common_norm, is_mixed, state
from grood_cert.results.table import Table

PANELS = ("id", "ood")
_DRAWN = ("bound", "ascended", "gradient_norm", "bound_limit", "ascended_limit")


def panels(tables: Mapping[str, Table], panel: str | None) -> dict[str, dict[str, SlopeCurve]]:
    """The curves of each image set, by the name of the model.

    Raises:
        InputError: If there is no such panel, or nothing in it.
    """
    if panel not in (None, *PANELS):
        raise InputError(f"Lipschitz analyses have no panel {panel!r}; use one of {', '.join(PANELS)}")
    found: dict[str, dict[str, SlopeCurve]] = {}
    for kind in PANELS if panel is None else (panel,):
        for model, table in tables.items():
            for name, mask in table.sets(kind).items():
                found.setdefault(f"{name} ({kind.upper()})", {})[model] = slope_curve(table, mask)
    if not found:
        raise InputError("the analysis holds no ID and no OOD samples of what is to be drawn")
    return found


def lipschitz(
    tables: Mapping[str, Table], *, panel: str | None = None, width: style.Width = "double", mixed: bool = False
) -> Figure:
    """Local Lipschitz constant of S against eps, medians over samples: what was found, what was proved.

    Args:
        tables: Lipschitz analyses by the name to print.
        panel: The image sets of one kind alone, `id` or `ood`.
        width: Of the figure: 8 or 17 cm.
        mixed: Whether models with other grids or samples may be drawn together; the figure then says so.

    Raises:
        InputError: If they cannot share an axis, or there is no such panel.
    """
    style.check_width(width)
    norm, differ = common_norm(tables), is_mixed(tables, mixed)
    found = panels(tables, panel)
    look_of = dict(zip(tables, style.looks(len(tables)), strict=True))
    every = np.concatenate(
        [getattr(curve, name) for part in found.values() for curve in part.values() for name in _DRAWN]
    )
    columns = 1 if width == "single" else min(len(found), 3)
    titles = list(found)
    rows = [titles[start : start + columns] for start in range(0, len(titles), columns)]

    def draw(axes: Axes, title: str) -> None:
        for model, curve in found[title].items():
            look = look_of[model]
            style.band(axes, curve.eps, curve.ascended, curve.bound, look)
            style.limits(axes, curve.eps, curve.bound, curve.bound_limit, look)
            style.limits(axes, curve.eps, curve.ascended, curve.ascended_limit, look)
            axes.plot(curve.eps, curve.bound, color=look.colour, marker=look.marker, markersize=3.2)
            axes.plot(curve.eps, curve.ascended, color=look.colour, linestyle="--")
            axes.plot(curve.eps, curve.gradient_norm, color=look.colour, linestyle=":", linewidth=1.0)
        style.logarithmic(axes, every)
        style.radii(axes, norm, max(float(curve.eps[-1]) for curve in found[title].values()))
        axes.set_ylabel("local Lipschitz constant of S, median")
        style.titled(axes, title, "", int(style.WIDTHS[width] / columns / 0.185))

    with style.styled(width):
        figure = style.canvas(width)
        state(figure, tables, differ, width)
        style.grid(figure, rows, draw)
        entries = [
            style.line("best bound (proved)"),
            style.UNDECIDED,
            style.line("ascended maximum (estimate)", "--"),
            style.line("gradient norm at x (estimate)", ":", linewidth=1.0),
            style.LIMITS,
        ]
        style.legend(figure, tables, entries, width, 1 if width == "single" else 3)
        style.fit(figure, len(rows), 5.6)
    return figure


def numbers(tables: Mapping[str, Table], panel: str | None) -> Iterator[dict[str, Any]]:
    """What `lipschitz` draws: one record an image set, model and eps, medians and their 95 % limits."""
    for title, curves in panels(tables, panel).items():
        for model, curve in curves.items():
            for index, eps in enumerate(curve.eps.tolist()):
                yield {
                    "model": model,
                    "set": title,
                    "eps": eps,
                    "bound": float(curve.bound[index]),
                    "bound_limit": float(curve.bound_limit[index]),
                    "ascended_estimate": float(curve.ascended[index]),
                    "ascended_limit": float(curve.ascended_limit[index]),
                    "gradient_norm_estimate": float(curve.gradient_norm[index]),
                }
