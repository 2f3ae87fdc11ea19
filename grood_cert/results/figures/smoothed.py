"""Median smoothing: certified FPR95 and certified decisions against eps, and where the number of draws ends them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grood_cert.errors import InputError
from grood_cert.results.curves import (
    SmoothedCurve,
    id_sets,
    largest_smoothed_radius,
    ood_sets,
    smoothed_fpr_curve,
    smoothed_radius_curve,
)
from grood_cert.results.figures import style
from grood_cert.results.figures.facts import common_norm, is_mixed, state
from grood_cert.results.seeds import Groups, Runs, curves_of, each_of, groups_of, spread, spread_records
from grood_cert.results.table import Table

PANELS = ("fpr95", "id-radius", "ood-radius")


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows: curves by the name of the model, one a seed, and the eps at which its draws end."""

    name: str
    title: str
    note: str
    set: str
    curves: Mapping[str, Sequence[SmoothedCurve]]
    ends: Mapping[str, float]


def _ends(table: Table, bounds: bool) -> float:
    """The eps beyond which nothing can be certified with these draws, of bounds on the grid or of radii."""
    sigma, n, alpha = (float(table[name].max()) for name in ("sigma", "n", "alpha"))
    return largest_smoothed_radius(int(n), sigma, alpha / (2 * len(table.eps)) if bounds else alpha / 2)


def panels(groups: Groups, panel: str | None, mean: bool) -> dict[str, list[Panel]]:
    """The curves of each panel asked for, by its name.

    Raises:
        InputError: If there is no such panel, or what it needs is missing.
    """
    if panel not in (None, *PANELS):
        raise InputError(f"smoothing has no panel {panel!r}; use one of {', '.join(PANELS)}")
    sides = {
        "fpr95": (ood_sets, smoothed_fpr_curve, "FPR95, OOD moved", "gamma accepts 95 % of these ID medians"),
        "id-radius": (id_sets, smoothed_radius_curve, "accepted within eps", "gamma of the run"),
        "ood-radius": (ood_sets, smoothed_radius_curve, "rejected within eps", "gamma of the run"),
    }
    found: dict[str, list[Panel]] = {}
    for name in PANELS if panel is None else (panel,):
        sets_of, curve_of, title, note = sides[name]
        found[name] = []
        for group, curves in curves_of(groups, sets_of, curve_of, mean).items():
            ends = {model: _ends(groups[model][0], name == "fpr95") for model in curves}
            found[name].append(Panel(name, f"{group}: {title}", note, group, curves, ends))
    return found


def smoothing(
    runs: Runs,
    *,
    panel: str | None = None,
    width: style.Width = "double",
    mean: bool = False,
    cumulative: bool = False,
    mixed: bool = False,
) -> Figure:
    """Median smoothing: FPR95 as OOD moves, and decisions certified, against eps; several models.

    Of several seeds, the mean and the range from the smallest to the largest seed; limits over the sampling of images are
    then not drawn.

    Args:
        runs: Results of smoothing by the name to print, several of one name if they differ in the seed of training alone.
        panel: One of `PANELS` alone.
        width: Of the figure: 8 or 17 cm.
        mean: One panel with the mean over the OOD sets, in place of one panel for each of them.
        cumulative: Share that is not certified, in place of the share that is.
        mixed: Whether models with other grids or samples may be drawn together; the figure then says so.

    Raises:
        InputError: If they cannot share an axis, there is no such panel, no ID or no OOD set, or no result at all.
    """
    style.check_width(width)
    groups = groups_of(runs)
    tables = each_of(groups)
    norm, differ, several = common_norm(tables), is_mixed(tables, mixed), len(tables) > len(groups)
    found = panels(groups, panel, mean)
    most = max(map(len, found.values()))
    columns = 1 if width == "single" else min(3, len(found) if most == 1 else most)
    order = ("id-radius", "fpr95", "ood-radius") if most > 1 else PANELS
    listed = [one for name in order for one in found.get(name, ())]
    rows = style.in_rows([found[name] for name in order if name in found], columns)
    look_of = dict(zip(groups, style.looks(len(groups)), strict=True))
    farthest = 1.06 * max(end for one in listed for end in one.ends.values())

    def draw(axes: Axes, one: Panel) -> None:
        for model, (curve, *others) in one.curves.items():
            look = look_of[model]
            if several:
                _draw_seeds(axes, one.name, [curve, *others], look, farthest, cumulative)
                continue
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
                axes.step(eps, certified, where="post", color=look.colour, **look.marks())
            style.limits(axes, eps, certified, limit, look, None if one.name == "fpr95" else "post")
        for end in sorted(set(one.ends.values())):
            whose = [look_of[model].colour for model, value in one.ends.items() if value == end]
            axes.axvline(
                end, color=whose[0] if len(set(one.ends.values())) > 1 else style.GREY, linestyle="-.", linewidth=0.9
            )
        ends = [float(curve.eps[-1]) for group in one.curves.values() for curve in group]
        style.radii(axes, norm, max(farthest, *ends))
        label = "share not certified" if cumulative else "share certified"
        style.percent(axes, "certified FPR at 95 % TPR" if one.name == "fpr95" else label)
        style.titled(axes, one.title, one.note, int(style.WIDTHS[width] / columns / 0.16))

    with style.styled(width):
        figure = style.canvas(width)
        state(figure, groups, differ, width)
        spare = style.grid(figure, rows, draw)
        entries = [style.line("certified (1 - alpha)"), style.SEEDS if several else style.LIMITS]
        entries.append(style.line("end of these draws", "-.", linewidth=0.9))
        if "fpr95" in found:
            entries.append(style.line("clean (estimated medians)", "", marker="*", markersize=8))
        style.legend(spare or figure, groups, entries, width)
        style.fit(figure, len(rows), 5.2)
    return figure


def _draw_seeds(
    axes: Axes, name: str, curves: Sequence[SmoothedCurve], look: style.Look, farthest: float, cumulative: bool
) -> None:
    """Mean and range over seeds."""
    found = spread(curves, "certified")
    values = [found.mean, found.least, found.most]
    if name == "fpr95":
        eps, *stairs = style.stairs(found.x, *values, early=True)
        style.seeds(axes, eps, stairs, look)
        axes.plot(found.x, found.mean, color=look.colour, marker=look.marker, markersize=3.2, linestyle="")
        axes.plot(0, found.mean[0], color=look.colour, **style.STAR)
        return
    x = np.append(found.x, max(farthest, found.x[-1]))
    values = [np.append(value, value[-1]) for value in values]
    values = [1 - value for value in values] if cumulative else values
    style.seeds(axes, x, values, look, "post", **look.marks())


def numbers(runs: Runs, panel: str | None, mean: bool) -> Iterator[dict[str, Any]]:
    """What `smoothing` draws: one record a panel, model and point; or over seeds."""
    groups = groups_of(runs)
    several = any(len(group) > 1 for group in groups.values())
    for found in panels(groups, panel, mean).values():
        for one in found:
            for model, curves in one.curves.items():
                place = {"model": model, "panel": one.name, "set": one.set}
                about = {"alpha": float(groups[model][0]["alpha"].max()), "largest_eps": one.ends[model]}
                if several:
                    for eps, record in spread_records(curves, "certified"):
                        yield place | {"shown": "certified", "eps": eps} | record | about
                    continue
                (curve,) = curves
                for index, eps in enumerate(curve.eps.tolist()):
                    rates = {
                        "certified": float(curve.certified[index]),
                        "certified_limit": float(curve.certified_limit[index]),
                    }
                    yield place | {"eps": eps} | rates | about
