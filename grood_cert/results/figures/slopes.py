"""Lipschitz analyses: medians of what was found and proved of the local constant of S, one panel an image set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grood_cert.errors import InputError
from grood_cert.results.columns import NORMS
from grood_cert.results.curves import Sets, SlopeCurve, slope_curve
from grood_cert.results.figures import style
from grood_cert.results.figures.facts import common_norm, is_mixed, state
from grood_cert.results.seeds import Groups, Runs, curves_of, each_of, groups_of, spread, spread_records
from grood_cert.results.table import Table

PANELS = ("id", "ood")
_DRAWN = ("bound", "ascended", "gradient_norm", "bound_limit", "ascended_limit")


def panels(groups: Groups, panel: str | None) -> dict[str, dict[str, list[SlopeCurve]]]:
    """The curves of each image set, by the name of the model, one a seed.

    Raises:
        InputError: If there is no such panel, or nothing in it.
    """
    if panel not in (None, *PANELS):
        raise InputError(f"Lipschitz analyses have no panel {panel!r}; use one of {', '.join(PANELS)}")
    found: dict[str, dict[str, list[SlopeCurve]]] = {}
    for kind in PANELS if panel is None else (panel,):

        def sets_of(table: Table, kind: str = kind) -> Sets:
            return table.sets(kind)

        for name, curves in curves_of(groups, sets_of, _curve, mean=False).items():
            found[f"{name} ({kind.upper()})"] = curves
    if not found:
        raise InputError("the analysis holds no ID and no OOD samples of what is to be drawn")
    return found


def _curve(table: Table, sets: Sets) -> SlopeCurve:
    (mask,) = sets.values()
    return slope_curve(table, mask)


_LINES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (  # attribute of a curve, style of its line, words, marks
    ("bound", "-", "best bound (proved)", {"markersize": 3.4}),
    ("ascended", "--", "ascended maximum (estimate)", {"markersize": 3.4, "markerfacecolor": "white"}),
    ("gradient_norm", ":", "gradient norm at x (estimate)", {"markersize": 0, "linewidth": 1.0}),
)


def _draw_one(axes: Axes, curve: SlopeCurve, look: style.Look) -> None:
    style.band(axes, curve.eps, curve.ascended, curve.bound, look)
    style.limits(axes, curve.eps, curve.bound, curve.bound_limit, look)
    style.limits(axes, curve.eps, curve.ascended, curve.ascended_limit, look)
    for name, line, _, marks in _LINES:
        axes.plot(curve.eps, getattr(curve, name), color=look.colour, linestyle=line, marker=look.marker, **marks)


def _draw_seeds(axes: Axes, curves: Sequence[SlopeCurve], look: style.Look) -> None:
    for name, line, _, marks in _LINES:
        found = spread(curves, name)
        values = (found.mean, found.least, found.most)
        style.seeds(axes, found.x, values, look, linestyle=line, marker=look.marker, **marks)


def _draw_point(axes: Axes, place: int, curves: Sequence[SlopeCurve], look: style.Look) -> None:
    """At a single eps, the models side by side; bars are ranges over seeds, or of one run the 95 % limits."""
    for shift, (name, _, _, marks) in zip((-0.2, 0, 0.2), _LINES, strict=True):
        found = spread(curves, name)
        (mean,), low, high = found.mean, found.least, found.most
        if len(curves) == 1 and name != "gradient_norm":
            limit = getattr(curves[0], f"{name}_limit")
            low, high = np.minimum(found.mean, limit), np.maximum(found.mean, limit)
        shape: Any = marks | {"marker": look.marker} if name != "gradient_norm" else {"marker": "_", "markersize": 7}
        axes.vlines(place + shift, low, high, color=look.colour, linewidth=1.0)
        axes.plot(place + shift, mean, color=look.colour, linestyle="", **shape)


def lipschitz(runs: Runs, *, panel: str | None = None, width: style.Width = "double", mixed: bool = False) -> Figure:
    """Local Lipschitz constant of S against eps, medians over samples: what was found, what was proved.

    Of several seeds, the mean of these medians and the range from the smallest to the largest seed; limits over the
    sampling of images are then not drawn.

    Args:
        runs: Lipschitz analyses by the name to print, several of one name if they differ in the seed of training alone.
        panel: The image sets of one kind alone, `id` or `ood`.
        width: Of the figure: 8 or 17 cm.
        mixed: Whether models with other grids or samples may be drawn together; the figure then says so.

    Raises:
        InputError: If they cannot share an axis, or there is no such panel.
    """
    style.check_width(width)
    groups = groups_of(runs)
    tables = each_of(groups)
    norm, differ, several = common_norm(tables), is_mixed(tables, mixed), len(tables) > len(groups)
    found = panels(groups, panel)
    look_of = dict(zip(groups, style.looks(len(groups)), strict=True))
    drawn = _DRAWN[:3] if several else _DRAWN
    curves = [curve for part in found.values() for group in part.values() for curve in group]
    every = np.concatenate([getattr(curve, name) for curve in curves for name in drawn])
    columns = 1 if width == "single" else min(len(found), 3)
    single = {eps for curve in curves for eps in curve.eps.tolist()}
    titles = list(found)
    rows = [titles[start : start + columns] for start in range(0, len(titles), columns)]

    def draw(axes: Axes, title: str) -> None:
        for model, group in found[title].items():
            if len(single) == 1:
                _draw_point(axes, list(groups).index(model), group, look_of[model])
            elif several:
                _draw_seeds(axes, group, look_of[model])
            else:
                _draw_one(axes, group[0], look_of[model])
        style.logarithmic(axes, every)
        if len(single) == 1:
            axes.set_xlim(-0.6, len(groups) - 0.4)
            axes.set_xticks([])
            axes.set_xlabel(f"within eps {min(single):g}\n({NORMS[norm]}, pixels in [0, 1])")
        else:
            style.radii(axes, norm, max(float(curve.eps[-1]) for group in found[title].values() for curve in group))
        axes.set_ylabel("local Lipschitz constant of S, median")
        style.titled(axes, title, "", int(style.WIDTHS[width] / columns / 0.16))

    with style.styled(width):
        figure = style.canvas(width)
        state(figure, groups, differ, width)
        style.grid(figure, rows, draw)
        entries = _entries(len(single) == 1, several)
        style.legend(figure, groups, entries, width, 1 if width == "single" else 3)
        style.fit(figure, len(rows), 5.6)
    return figure


def _entries(point: bool, several: bool) -> list[Any]:
    if not point:
        lines = [style.line(words, line, marker="o", **marks) for _, line, words, marks in _LINES]
        return [*lines, *([style.SEEDS] if several else [style.UNDECIDED, style.LIMITS])]
    entries = [style.line(words, "", marker="o", **marks) for _, _, words, marks in _LINES[:2]]
    entries.append(style.line(_LINES[2][2], "", marker="_", markersize=7))
    words = "smallest to largest seed" if several else style.LIMITS.get_label()
    return [*entries, style.line(str(words), "", marker="|", markersize=8)]


def numbers(runs: Runs, panel: str | None) -> Iterator[dict[str, Any]]:
    """What `lipschitz` draws: one record an image set, model and eps, medians and their 95 % limits; or over seeds."""
    names = {"bound": "bound", "ascended": "ascended_estimate", "gradient_norm": "gradient_norm_estimate"}
    groups = groups_of(runs)
    several = any(len(group) > 1 for group in groups.values())
    for title, models in panels(groups, panel).items():
        for model, curves in models.items():
            place = {"model": model, "set": title}
            if several:
                for name, shown in names.items():
                    for eps, record in spread_records(curves, name):
                        yield place | {"shown": shown, "eps": eps} | record
                continue
            (curve,) = curves
            for index, eps in enumerate(curve.eps.tolist()):
                yield place | {
                    "eps": eps,
                    "bound": float(curve.bound[index]),
                    "bound_limit": float(curve.bound_limit[index]),
                    "ascended_estimate": float(curve.ascended[index]),
                    "ascended_limit": float(curve.ascended_limit[index]),
                    "gradient_norm_estimate": float(curve.gradient_norm[index]),
                }
