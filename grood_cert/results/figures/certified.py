"""Certifications: FPR95 and surviving decisions against eps, ID robustness against FPR; each OOD set in a panel of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from grood_cert.results.seeds import Groups, Runs, curves_of, each_of, groups_of, spread, spread_records
from grood_cert.results.table import Table

PANELS = ("fpr95", "id-radius", "ood-radius", "sweep")
_MOVED = {"ood": "OOD", "id": "ID", "both": "ID and OOD"}
_MOST_COLUMNS = 3
_Curve = FprCurve | RadiusCurve | RobustnessCurve


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows.

    Attributes:
        name: One of `PANELS`.
        title: What it is of.
        note: Which gamma it uses.
        set: Name of the image set, or of a mean.
        curves: By the name of the model, one a seed.
        shown: "certified" or "attacked" alone, as mean and range over the seeds; None: both, of one run a model.
    """

    name: str
    title: str
    note: str
    set: str
    curves: Mapping[str, Sequence[_Curve]]
    shown: str | None = None


def panels(
    groups: Groups, perturbed: Perturbed, eps: float | None, panel: str | None, mean: bool
) -> dict[str, list[Panel]]:
    """The curves of each panel asked for, by its name; grids of eps that share no value have no sweep.

    Raises:
        InputError: If there is no such panel, or what it needs is missing.
    """
    if panel not in (None, *PANELS):
        raise InputError(f"certifications have no panel {panel!r}; use one of {', '.join(PANELS)}")
    names: tuple[str, ...] = PANELS if panel is None else (panel,)
    tables = list(each_of(groups).values())
    if eps is None:
        first, *others = tables
        shared = [value for value in first.eps if all(value in table.eps for table in others)]
        if not shared and panel == "sweep":
            raise InputError("the grids of eps have no value in common, so there is no eps to sweep gamma at")
        names = names if shared else tuple(name for name in names if name != "sweep")
        middle = middle_eps(first)
        eps = min(shared, key=lambda value: abs(value - middle), default=middle)
    whose = "these clean ID samples" if perturbed == "ood" else "these ID samples at their worst in the ball"
    sides: dict[str, tuple[Callable[[Table], Sets], Callable[[Table, Sets], _Curve], str, str]] = {
        "fpr95": (
            ood_sets,
            lambda table, sets: fpr_curve(table, perturbed, sets),
            f"FPR95, {_MOVED.get(perturbed, '')} moved",
            f"gamma accepts 95 % of {whose}",
        ),
        "id-radius": (id_sets, radius_curve, "accepted within eps", "gamma of the run"),
        "ood-radius": (ood_sets, radius_curve, "rejected within eps", "gamma of the run"),
        "sweep": (
            ood_sets,
            lambda table, sets: robustness_curve(table, eps, sets),
            f"ID robustness, eps {eps:g}",
            "gamma sweeps all scores",
        ),
    }
    several = len(tables) > len(groups)
    found: dict[str, list[Panel]] = {}
    for name in names:
        sets_of, curve_of, title, note = sides[name]
        found[name] = [
            Panel(name, f"{group}{f', {shown}' if shown else ''}: {title}", note, group, curves, shown)
            for shown in (("certified", "attacked") if several else (None,))
            for group, curves in curves_of(groups, sets_of, curve_of, mean).items()
        ]
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
    hollow: Any = {"marker": look.marker, "markersize": 3.2, "linestyle": "", "markerfacecolor": "white"}
    axes.plot(curve.eps, curve.attacked, color=look.colour, **hollow)
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
    axes.step(eps, certified, where="post", color=look.colour, **look.marks())
    axes.step(eps, attacked, where="post", color=look.colour, linestyle="--", **look.marks(hollow=True))


def _draw_sweep(axes: Axes, curve: RobustnessCurve, look: style.Look) -> None:
    style.band(axes, curve.fpr, curve.certified, curve.attacked, look)
    style.limits(axes, curve.fpr, curve.certified, curve.certified_limit, look)
    style.limits(axes, curve.fpr, curve.attacked, curve.attacked_limit, look)
    axes.plot(curve.fpr, curve.certified, color=look.colour, **look.marks())
    marks = look.marks(hollow=True)
    axes.plot(curve.fpr, curve.attacked, color=look.colour, linestyle="--", **marks)
    axes.plot(curve.fpr, curve.tpr, color=look.colour, linestyle=":", linewidth=1.0)


def _draw_seeds(axes: Axes, panel: Panel, curves: Sequence[_Curve], look: style.Look, **how: Any) -> None:
    """Mean and range over seeds of what is certified, or attacked."""
    found = spread(curves, str(panel.shown))
    x, values = found.x, [found.mean, found.least, found.most]
    hollow = panel.shown == "attacked"
    line, face = ("--", "white") if hollow else ("-", look.colour)
    if panel.name == "fpr95":
        eps, *stairs = style.stairs(x, *values, early=panel.shown == "certified")
        style.seeds(axes, eps, stairs, look, linestyle=line)
        marks: Any = {"marker": look.marker, "markersize": 3.2, "markerfacecolor": face}
        axes.plot(x, found.mean, color=look.colour, linestyle="", **marks)
        return
    if panel.name != "sweep":
        seen = x <= how["largest"]
        x = np.append(x[seen], how["largest"])
        values = [np.append(value[seen], value[seen][-1]) for value in values]
        values = [1 - value for value in values] if how["cumulative"] else values
    style.seeds(axes, x, values, look, "post", linestyle=line, **look.marks(hollow))
    if panel.name == "sweep":
        clean = spread(curves, "tpr")
        axes.step(clean.x, clean.mean, where="post", color=look.colour, linestyle=":", linewidth=1.0)


def _largest_radius(tables: Iterable[Table]) -> float:
    """How far the eps axes of radii go: to where nearly all attack radii lie."""
    found = []
    for table in tables:
        drawn = ~table.of_kind("noise")
        attack = table["radius_attack"][drawn]
        finite = np.append(attack[np.isfinite(attack)], table["radius_certified"][drawn].max())
        found.append(float(np.quantile(finite, 0.98)))
    return max(found) or 1.0


def _zoom(groups: Iterable[Sequence[RobustnessCurve]]) -> float:
    """The clean FPR up to which curves still rise, the median over their seeds, with some room."""
    ends = [
        np.median(
            [
                curve.fpr[np.argmax(curve.certified >= 0.98 * curve.certified[curve.fpr < 1].max(initial=0.0))]
                for curve in curves
            ]
        )
        for curves in groups
    ]
    return min(1.0, max(0.05, 1.25 * float(max(ends))))


def robustness(
    runs: Runs,
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

    Of several seeds, what is certified and what is attacked have panels of their own, with the mean and the range from the
    smallest to the largest seed; limits over the sampling of images are then not drawn.

    Args:
        runs: Certifications by the name to print, several of one name if they differ in the seed of training alone.
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
    groups = groups_of(runs)
    tables = each_of(groups)
    norm, differ, several = common_norm(tables), is_mixed(tables, mixed), len(tables) > len(groups)
    found = panels(groups, perturbed, eps, panel, mean)
    largest, look_of = _largest_radius(tables.values()), dict(zip(groups, style.looks(len(groups)), strict=True))
    most = max(map(len, found.values()))
    order = ("id-radius", "fpr95", "ood-radius", "sweep") if most > 1 else PANELS
    parts = [found[name] for name in order if name in found]
    if several:  # rows of what is certified above rows of what is attacked
        most = max(2, most // 2)
        parts = [half for part in parts for half in _halves(part)]
    columns = 1 if width == "single" else min(most, _MOST_COLUMNS) if panel or most > 1 else 2
    rows = style.in_rows(parts, columns)
    characters = int(style.WIDTHS[width] / columns / 0.16)

    def draw(axes: Axes, one: Panel) -> None:
        for model, (curve, *others) in one.curves.items():
            if one.shown:
                seeds = [curve, *others]
                _draw_seeds(axes, one, seeds, look_of[model], largest=largest, cumulative=cumulative)
            elif isinstance(curve, FprCurve):
                _draw_fpr(axes, curve, look_of[model])
            elif isinstance(curve, RadiusCurve):
                _draw_radius(axes, curve, look_of[model], cumulative, largest)
            else:
                _draw_sweep(axes, curve, look_of[model])
        if one.name == "sweep":
            _finish_sweep(axes, one, look_of)
        else:
            grids = [c.eps[-1] for curves in one.curves.values() for c in curves if isinstance(c, FprCurve)]
            style.radii(axes, norm, max(grids, default=largest))
            share = "share with radius at most eps" if cumulative else "share that survives eps"
            style.percent(axes, "FPR at 95 % TPR" if one.name == "fpr95" else share)
        style.titled(axes, one.title, one.note, characters)

    with style.styled(width):
        figure = style.canvas(width)
        state(figure, groups, differ, width)
        spare = style.grid(figure, rows, draw)
        style.legend(spare or figure, groups, _entries(found, several), width)
        style.fit(figure, len(rows), 5.2)
    return figure


def _halves(part: list[Panel]) -> list[list[Panel]]:
    """Panels that stand in rows of their own: certified and attacked; of one image set the two stand side by side."""
    middle = len(part) // 2
    return [part] if middle == 1 else [part[:middle], part[middle:]]


def _finish_sweep(axes: Axes, panel: Panel, look_of: Mapping[str, style.Look]) -> None:
    curves = {
        model: [curve for curve in group if isinstance(curve, RobustnessCurve)] for model, group in panel.curves.items()
    }
    axes.set_xlim(0, _zoom(curves.values()))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("clean FPR")
    style.percent(axes, "ID that stays accepted")
    handles = []
    for model, group in curves.items():
        areas, look = [curve.auroc for curve in group], look_of[model]
        label = f"{np.mean(areas):.3f}"
        handles.append(Line2D([], [], color=look.colour, marker=look.marker, markersize=3.2, label=label))
    columns = 1 + (len(handles) > 3 and panel.shown is None)
    axes.legend(handles=handles, title="clean AUROC", loc="lower right", ncols=columns)


def _entries(found: Mapping[str, Sequence[Panel]], several: bool) -> list[Any]:
    entries: list[Any] = [style.line("certified (proved)", marker="o", markersize=3.2)]
    entries.append(style.line("attacked (shown)", "--", marker="o", markersize=3.2, markerfacecolor="white"))
    entries += [style.SEEDS] if several else [style.UNDECIDED, style.LIMITS]
    if "fpr95" in found and not several:
        entries.append(style.line("clean FPR95", "", marker="*", markersize=8))
    if "sweep" in found:
        entries.append(style.line("clean ROC", ":", linewidth=1.0))
    return entries


def numbers(
    runs: Runs, perturbed: Perturbed, eps: float | None, panel: str | None, mean: bool
) -> Iterator[dict[str, Any]]:
    """What `robustness` draws: one record a panel, model and point; of seeds, with what is certified or attacked apart."""
    for found in panels(groups_of(runs), perturbed, eps, panel, mean).values():
        for one in found:
            for model, (curve, *others) in one.curves.items():
                place = {"model": model, "panel": one.name, "set": one.set}
                swept = isinstance(curve, RobustnessCurve)
                if one.shown:
                    place["shown"] = one.shown
                    for x, record in spread_records([curve, *others], one.shown):
                        at = {"eps": curve.eps, "clean_fpr": x} if swept else {"eps": x, "clean_fpr": None}
                        yield place | at | record
                    continue
                for index in range(len(curve.certified)):
                    yield place | {
                        "eps": curve.eps if isinstance(curve, RobustnessCurve) else float(curve.eps[index]),
                        "clean_fpr": float(curve.fpr[index]) if isinstance(curve, RobustnessCurve) else None,
                        "certified": float(curve.certified[index]),
                        "certified_limit": float(curve.certified_limit[index]),
                        "attacked": float(curve.attacked[index]),
                        "attacked_limit": float(curve.attacked_limit[index]),
                        "clean_tpr": float(curve.tpr[index]) if isinstance(curve, RobustnessCurve) else None,
                    }
