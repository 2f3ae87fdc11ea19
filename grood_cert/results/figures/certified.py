"""Certifications: FPR95 and surviving decisions against eps, ID robustness against FPR; each OOD set in a panel of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from grood_cert.errors import InputError
from grood_cert.results.curves import (
    FprCurve,
    Perturbed,
    RadiusCurve,
    RobustnessCurve,
    Sets,
    fpr_curve,
    id_sets,
    middle_eps,
    ood_sets,
    radius_curve,
    robustness_curve,
)
from grood_cert.results.figures import style
from grood_cert.results.figures.facts import common_norm, is_mixed, state
from grood_cert.results.table import Table

PANELS = ("fpr95", "id-radius", "ood-radius", "sweep")
_MOVED = {"ood": "OOD", "id": "ID", "both": "ID and OOD"}
_MOST_COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows.

    Attributes:
        name: One of `PANELS`.
        title: What it is of.
        note: Which gamma it uses.
        set: Name of the image set, or of a mean.
        curves: By the name of the model.
    """

    name: str
    title: str
    note: str
    set: str
    curves: Mapping[str, FprCurve | RadiusCurve | RobustnessCurve]


def _groups(tables: Mapping[str, Table], kind: str, mean: bool) -> dict[str, dict[str, Sets]]:
    """For each panel of a kind of sets, the sets of each model; a set that a model lacks is left out of its curves."""
    found = {name: (id_sets if kind == "id" else ood_sets)(table) for name, table in tables.items()}
    names = list(dict.fromkeys(one for sets in found.values() for one in sets))
    if mean and len(names) > 1:
        return {f"mean of {len(names)} sets": dict(found)}
    return {one: {name: {one: sets[one]} for name, sets in found.items() if one in sets} for one in names}


def panels(
    tables: Mapping[str, Table], perturbed: Perturbed, eps: float | None, panel: str | None, mean: bool
) -> dict[str, list[Panel]]:
    """The curves of each panel asked for, by its name; grids of eps that share no value have no sweep.

    Raises:
        InputError: If there is no such panel, or what it needs is missing.
    """
    if panel not in (None, *PANELS):
        raise InputError(f"certifications have no panel {panel!r}; use one of {', '.join(PANELS)}")
    names: tuple[str, ...] = PANELS if panel is None else (panel,)
    if eps is None:
        first, *others = tables.values()
        shared = [value for value in first.eps if all(value in table.eps for table in others)]
        if not shared and panel == "sweep":
            raise InputError("the grids of eps have no value in common, so there is no eps to sweep gamma at")
        names = names if shared else tuple(name for name in names if name != "sweep")
        middle = middle_eps(first)
        eps = min(shared, key=lambda value: abs(value - middle), default=middle)
    found: dict[str, list[Panel]] = {}
    for name in names:
        groups = _groups(tables, "id" if name == "id-radius" else "ood", mean)
        found[name] = []
        for group, sets in groups.items():
            curves: dict[str, FprCurve | RadiusCurve | RobustnessCurve]
            if name == "fpr95":
                title = f"{group}: FPR95, {_MOVED.get(perturbed, '')} moved"
                whose = (
                    "these clean ID samples" if perturbed == "ood" else "these ID samples at their worst in the ball"
                )
                note = f"gamma accepts 95 % of {whose}"
                curves = {model: fpr_curve(tables[model], perturbed, masks) for model, masks in sets.items()}
            elif name == "sweep":
                title, note = f"{group}: ID robustness at eps {eps:g}", "gamma sweeps all scores"
                curves = {model: robustness_curve(tables[model], eps, masks) for model, masks in sets.items()}
            else:
                title = f"{group}: {'accepted' if name == 'id-radius' else 'rejected'} within eps"
                note = "gamma of the run"
                curves = {model: radius_curve(tables[model], masks) for model, masks in sets.items()}
            found[name].append(Panel(name, title, note, group, curves))
    return found


def _draw_fpr(axes: Axes, curve: FprCurve, look: style.Look) -> None:
    """Steps: between two eps of the grid the proof of the larger ball holds, and the attack in the smaller one."""
    eps, certified, above = style.stairs(curve.eps, curve.certified, curve.certified_limit, early=True)
    _, attacked, below = style.stairs(curve.eps, curve.attacked, curve.attacked_limit, early=False)
    style.band(axes, eps, attacked, certified, look)
    style.limits(axes, eps, certified, above, look)
    style.limits(axes, eps, attacked, below, look)
    axes.plot(eps, certified, color=look.colour)
    axes.plot(curve.eps, curve.certified, color=look.colour, marker=look.marker, markersize=3.2, linestyle="")
    axes.plot(eps, attacked, color=look.colour, linestyle="--")
    axes.plot(0, curve.certified[0], color=look.colour, zorder=3, **style.STAR)


def _draw_radius(axes: Axes, curve: RadiusCurve, look: style.Look, cumulative: bool, largest: float) -> None:
    seen = curve.eps <= largest
    eps = np.append(curve.eps[seen], largest)

    def shown(values: Any) -> Any:
        ends = np.append(values[seen], values[seen][-1])
        return 1 - ends if cumulative else ends

    certified, attacked = shown(curve.certified), shown(curve.attacked)
    style.band(axes, eps, certified, attacked, look, "post")
    style.limits(axes, eps, certified, shown(curve.certified_limit), look, "post")
    style.limits(axes, eps, attacked, shown(curve.attacked_limit), look, "post")
    axes.step(eps, certified, where="post", color=look.colour, **look.marks(len(eps)))
    axes.step(eps, attacked, where="post", color=look.colour, linestyle="--")


def _draw_sweep(axes: Axes, curve: RobustnessCurve, look: style.Look) -> None:
    style.band(axes, curve.fpr, curve.certified, curve.attacked, look)
    style.limits(axes, curve.fpr, curve.certified, curve.certified_limit, look)
    style.limits(axes, curve.fpr, curve.attacked, curve.attacked_limit, look)
    axes.plot(curve.fpr, curve.certified, color=look.colour, **look.marks(len(curve.fpr)))
    axes.plot(curve.fpr, curve.attacked, color=look.colour, linestyle="--")
    axes.plot(curve.fpr, curve.tpr, color=look.colour, linestyle=":", linewidth=1.0)


def _largest_radius(tables: Mapping[str, Table]) -> float:
    """How far the eps axes of radii go: to where nearly all attack radii lie."""
    found = []
    for table in tables.values():
        drawn = ~table.of_kind("noise")
        attack = table["radius_attack"][drawn]
        finite = np.append(attack[np.isfinite(attack)], table["radius_certified"][drawn].max())
        found.append(float(np.quantile(finite, 0.98)))
    return max(found) or 1.0


def _zoom(curves: Sequence[RobustnessCurve]) -> float:
    """The clean FPR up to which curves still rise, with some room."""
    ends = [float(curve.fpr[np.argmax(curve.certified >= 0.98 * curve.certified.max())]) for curve in curves]
    return min(1.0, max(0.05, 1.25 * max(ends)))


def robustness(
    tables: Mapping[str, Table],
    perturbed: Perturbed = "ood",
    eps: float | None = None,
    *,
    panel: str | None = None,
    width: style.Width = "double",
    mean: bool = False,
    cumulative: bool = False,
    mixed: bool = False,
) -> Figure:
    """FPR95 against eps, decisions that survive eps, and ID robustness against FPR, several models on the same axes.

    Args:
        tables: Certifications by the name to print.
        perturbed: Which side moves in the FPR95 panels.
        eps: The eps of the panels over gamma; must be on every grid. By default the middle of the first model's grid, or
            what all share nearest to it.
        panel: One of `PANELS` alone.
        width: Of the figure: 8 or 17 cm.
        mean: One panel with the mean over the OOD sets, in place of one panel for each of them.
        cumulative: Share of samples with radius at most eps, in place of the share that survives eps.
        mixed: Whether models with other grids or samples may be drawn together; the figure then says so.

    Raises:
        InputError: If they cannot share an axis, or there is no such panel.
    """
    style.check_width(width)
    norm, differ = common_norm(tables), is_mixed(tables, mixed)
    found = panels(tables, perturbed, eps, panel, mean)
    largest, look_of = _largest_radius(tables), dict(zip(tables, style.looks(len(tables)), strict=True))
    most = max(map(len, found.values()))
    order = ("id-radius", "fpr95", "ood-radius", "sweep") if most > 1 else PANELS
    columns = 1 if width == "single" else min(most, _MOST_COLUMNS) if panel or most > 1 else 2
    rows = style.in_rows([found[name] for name in order if name in found], columns)
    characters = int(style.WIDTHS[width] / columns / 0.185)

    def draw(axes: Axes, one: Panel) -> None:
        for model, curve in one.curves.items():
            if isinstance(curve, FprCurve):
                _draw_fpr(axes, curve, look_of[model])
            elif isinstance(curve, RadiusCurve):
                _draw_radius(axes, curve, look_of[model], cumulative, largest)
            else:
                _draw_sweep(axes, curve, look_of[model])
        if one.name == "sweep":
            _finish_sweep(axes, one, look_of)
        else:
            grids = [curve.eps[-1] for curve in one.curves.values() if isinstance(curve, FprCurve)]
            style.radii(axes, norm, max(grids, default=largest))
            share = "share with radius at most eps" if cumulative else "share that survives eps"
            style.percent(axes, "FPR at 95 % TPR" if one.name == "fpr95" else share)
        style.titled(axes, one.title, one.note, characters)

    with style.styled(width):
        figure = style.canvas(width)
        state(figure, tables, differ, width)
        spare = style.grid(figure, rows, draw)
        style.legend(spare or figure, tables, _entries(found), width)
        style.fit(figure, len(rows), 5.2)
    return figure


def _finish_sweep(axes: Axes, panel: Panel, look_of: Mapping[str, style.Look]) -> None:
    curves = {model: curve for model, curve in panel.curves.items() if isinstance(curve, RobustnessCurve)}
    axes.set_xlim(0, _zoom(list(curves.values())))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("clean FPR")
    style.percent(axes, "ID that stays accepted")
    handles = [
        Line2D(
            [], [], color=look_of[model].colour, marker=look_of[model].marker, markersize=3.2, label=f"{c.auroc:.3f}"
        )
        for model, c in curves.items()
    ]
    axes.legend(handles=handles, title="clean AUROC", loc="lower right", ncols=1 + (len(handles) > 3))


def _entries(found: Mapping[str, Sequence[Panel]]) -> list[Any]:
    entries = [style.line("certified (proved)"), style.line("attacked (shown)", "--"), style.UNDECIDED, style.LIMITS]
    if "fpr95" in found:
        entries.append(style.line("clean FPR95", "", marker="*", markersize=8))
    if "sweep" in found:
        entries.append(style.line("clean ROC", ":", linewidth=1.0))
    return entries


def numbers(
    tables: Mapping[str, Table], perturbed: Perturbed, eps: float | None, panel: str | None, mean: bool
) -> Iterator[dict[str, Any]]:
    """What `robustness` draws: one record a panel, model and point, with the columns `COLUMNS`."""
    for found in panels(tables, perturbed, eps, panel, mean).values():
        for one in found:
            for model, curve in one.curves.items():
                many = curve.fpr if isinstance(curve, RobustnessCurve) else curve.eps
                for index in range(len(many)):
                    yield {
                        "model": model,
                        "panel": one.name,
                        "set": one.set,
                        "eps": curve.eps if isinstance(curve, RobustnessCurve) else float(curve.eps[index]),
                        "clean_fpr": float(curve.fpr[index]) if isinstance(curve, RobustnessCurve) else None,
                        "certified": float(curve.certified[index]),
                        "certified_limit": float(curve.certified_limit[index]),
                        "attacked": float(curve.attacked[index]),
                        "attacked_limit": float(curve.attacked_limit[index]),
                        "clean_tpr": float(curve.tpr[index]) if isinstance(curve, RobustnessCurve) else None,
                    }
