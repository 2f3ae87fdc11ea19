"""Median smoothing: certified FPR95 and certified decisions against eps, and where the number of draws ends them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grood_cert.errors import InputError
from grood_cert.results.curves import (
    Sets,
    SmoothedCurve,
    id_sets,
    largest_smoothed_radius,
    ood_sets,
    smoothed_fpr_curve,
    smoothed_radius_curve,
)
from grood_cert.results.figures import style
from grood_cert.results.figures.facts import common_norm, is_mixed, state
from grood_cert.results.table import Table

PANELS = ("fpr95", "id-radius", "ood-radius")


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows: curves by the name of the model, and the eps at which its draws end."""

    name: str
    title: str
    note: str
    set: str
    curves: Mapping[str, SmoothedCurve]
    ends: Mapping[str, float]


def _ends(table: Table, bounds: bool) -> float:
    """The eps beyond which nothing can be certified with these draws, of bounds on the grid or of radii."""
    sigma, n, alpha = (float(table[name].max()) for name in ("sigma", "n", "alpha"))
    return largest_smoothed_radius(int(n), sigma, alpha / (2 * len(table.eps)) if bounds else alpha / 2)


def panels(tables: Mapping[str, Table], panel: str | None, mean: bool) -> dict[str, list[Panel]]:
    """The curves of each panel asked for, by its name.

    Raises:
        InputError: If there is no such panel, or what it needs is missing.
    """
    if panel not in (None, *PANELS):
        raise InputError(f"smoothing has no panel {panel!r}; use one of {', '.join(PANELS)}")
    found: dict[str, list[Panel]] = {}
    for name in PANELS if panel is None else (panel,):
        of_model = {model: (id_sets if name == "id-radius" else ood_sets)(table) for model, table in tables.items()}
        names = list(dict.fromkeys(one for sets in of_model.values() for one in sets))
        groups: dict[str, dict[str, Sets]] = {
            one: {model: {one: sets[one]} for model, sets in of_model.items() if one in sets} for one in names
        }
        if mean and len(names) > 1:
            groups = {f"mean of {len(names)} sets": dict(of_model)}
        found[name] = []
        for group, masks in groups.items():
            if name == "fpr95":
                title, note = f"{group}: FPR95, OOD moved", "gamma accepts 95 % of these ID medians"
                curves = {model: smoothed_fpr_curve(tables[model], sets) for model, sets in masks.items()}
            else:
                title = f"{group}: {'accepted' if name == 'id-radius' else 'rejected'} within eps"
                note = "gamma of the run"
                curves = {model: smoothed_radius_curve(tables[model], sets) for model, sets in masks.items()}
            ends = {model: _ends(tables[model], name == "fpr95") for model in masks}
            found[name].append(Panel(name, title, note, group, curves, ends))
    return found


def smoothing(
    tables: Mapping[str, Table],
    *,
    panel: str | None = None,
    width: style.Width = "double",
    mean: bool = False,
    cumulative: bool = False,
    mixed: bool = False,
) -> Figure:
    """Median smoothing: FPR95 as OOD moves, and decisions certified, against eps; several models.

    Args:
        tables: Results of smoothing by the name to print.
        panel: One of `PANELS` alone.
        width: Of the figure: 8 or 17 cm.
        mean: One panel with the mean over the OOD sets, in place of one panel for each of them.
        cumulative: Share that is not certified, in place of the share that is.
        mixed: Whether models with other grids or samples may be drawn together; the figure then says so.

    Raises:
        InputError: If they cannot share an axis, there is no such panel, no ID or no OOD set, or no result at all.
    """
    style.check_width(width)
    norm, differ = common_norm(tables), is_mixed(tables, mixed)
    found = panels(tables, panel, mean)
    most = max(map(len, found.values()))
    columns = 1 if width == "single" else min(3, len(found) if most == 1 else most)
    order = ("id-radius", "fpr95", "ood-radius") if most > 1 else PANELS
    listed = [one for name in order for one in found.get(name, ())]
    rows = style.in_rows([found[name] for name in order if name in found], columns)
    look_of = dict(zip(tables, style.looks(len(tables)), strict=True))
    farthest = 1.06 * max(end for one in listed for end in one.ends.values())

    def draw(axes: Axes, one: Panel) -> None:
        for model, curve in one.curves.items():
            look = look_of[model]
            if one.name == "fpr95":
                eps, certified, limit = style.stairs(curve.eps, curve.certified, curve.certified_limit, early=True)
                axes.plot(eps, certified, color=look.colour)
                axes.plot(
                    curve.eps, curve.certified, color=look.colour, marker=look.marker, markersize=3.2, linestyle=""
                )
                axes.plot(0, curve.certified[0], color=look.colour, **style.STAR)
            else:
                eps = np.append(curve.eps, max(farthest, curve.eps[-1]))
                certified, limit = (np.append(v, v[-1]) for v in (curve.certified, curve.certified_limit))
                certified, limit = (1 - certified, 1 - limit) if cumulative else (certified, limit)
                axes.step(eps, certified, where="post", color=look.colour, **look.marks(len(eps)))
            style.limits(axes, eps, certified, limit, look, None if one.name == "fpr95" else "post")
        for end in sorted(set(one.ends.values())):
            whose = [look_of[model].colour for model, value in one.ends.items() if value == end]
            axes.axvline(
                end, color=whose[0] if len(set(one.ends.values())) > 1 else style.GREY, linestyle="-.", linewidth=0.9
            )
        style.radii(axes, norm, max(farthest, max(float(curve.eps[-1]) for curve in one.curves.values())))
        label = "share not certified" if cumulative else "share certified"
        style.percent(axes, "certified FPR at 95 % TPR" if one.name == "fpr95" else label)
        style.titled(axes, one.title, one.note, int(style.WIDTHS[width] / columns / 0.185))

    with style.styled(width):
        figure = style.canvas(width)
        state(figure, tables, differ, width)
        spare = style.grid(figure, rows, draw)
        entries = [style.line("certified (1 - alpha)"), style.LIMITS]
        entries.append(style.line("end of these draws", "-.", linewidth=0.9))
        if "fpr95" in found:
            entries.append(style.line("clean (estimated medians)", "", marker="*", markersize=8))
        style.legend(spare or figure, tables, entries, width)
        style.fit(figure, len(rows), 5.2)
    return figure


def numbers(tables: Mapping[str, Table], panel: str | None, mean: bool) -> Iterator[dict[str, Any]]:
    """What `smoothing` draws: one record a panel, model and point."""
    for found in panels(tables, panel, mean).values():
        for one in found:
            for model, curve in one.curves.items():
                for index, eps in enumerate(curve.eps.tolist()):
                    yield {
                        "model": model,
                        "panel": one.name,
                        "set": one.set,
                        "eps": eps,
                        "alpha": float(tables[model]["alpha"].max()),
                        "certified": float(curve.certified[index]),
                        "certified_limit": float(curve.certified_limit[index]),
                        "largest_eps": one.ends[model],
                    }
