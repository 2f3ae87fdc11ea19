"""A sweep: lambda_grad on one page (slope, margin, radius, accuracy, FPR95), and worst-case curves over the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from grood_cert.errors import InputError
from grood_cert.results.curves import fpr_curve, ood_sets
from grood_cert.results.figures import style
from grood_cert.results.figures.facts import common_norm, is_mixed
from grood_cert.results.table import Table

_PROVED, _SHOWN, _ESTIMATED = ("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#555555", ":", "^")
_ROWS: tuple[tuple[str, Mapping[str, tuple[str, str, str]]], ...] = (
    ("slope of S, median", {"gradient_norm_estimate": _ESTIMATED, "constant_bound": _PROVED}),
    ("margin, median", {"margin": _ESTIMATED}),
    ("radius, median", {"radius_attack": _SHOWN, "radius_certified": _PROVED}),
)
_ACCURACY = ("ID accuracy", {"accuracy": _ESTIMATED})
_FPR = (
    "FPR at 95 % TPR",
    {"fpr95_id_clean": _ESTIMATED, "fpr95_id_attacked": _SHOWN, "fpr95_id_certified": _PROVED},
)
_Page = tuple[str, Mapping[str, tuple[str, str, str]], str, str]  # label, curves, kind, set


def _places(weights: Sequence[float]) -> dict[float, float]:
    """Where each lambda_grad stands: by its logarithm, 0 one step before the smallest."""
    positive = [weight for weight in weights if weight > 0]
    places = {weight: float(np.log10(weight)) for weight in positive}
    step = min(np.diff(sorted(places.values())), default=1.0)
    return ({0.0: min(places.values(), default=0.0) - max(float(step), 0.5)} if 0.0 in weights else {}) | places


def _values(records: Sequence[Mapping[str, Any]], weights: Sequence[float], key: str) -> NDArray[np.float64]:
    """Mean, smallest and largest over the seeds, at each weight; NaN where a seed has none. Shape (3, weights)."""
    found = []
    for weight in weights:
        seeds = [record[key] for record in records if record["lambda_grad"] == weight]
        numbers = np.array([np.nan if value is None else value for value in seeds], dtype=np.float64)
        found.append((numbers.mean(), numbers.min(), numbers.max()) if len(numbers) else (np.nan,) * 3)
    return np.array(found).T


def _said(records: Sequence[Mapping[str, Any]]) -> str:
    def each(key: str) -> str:
        values = [value for value in dict.fromkeys(record[key] for record in records) if value is not None]
        return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)

    sizes = {(record["kind"], record["set"]): record["samples"] for record in records}
    counts = [f"{size} {name} ({kind.upper()})" for (kind, name), size in sizes.items()]
    facts = {"n": ", ".join(counts), "norm": each("norm").replace("l", "l_", 1), "effort": each("effort")}
    facts |= {"engine": each("engine"), "FPR95 at eps": each("eps"), "constant at eps": each("eps_constant")}
    seeds = sorted({record["seed"] for record in records})
    whole = "complete" if all(record["complete"] for record in records) else "NOT FINISHED"
    spread = f"mean of {len(seeds)} seeds, bands from the smallest to the largest" if len(seeds) > 1 else "one seed"
    return "; ".join([*(f"{word} {value}" for word, value in facts.items() if value), spread, whole])


def objective(records: Sequence[Mapping[str, Any]], width: style.Width = "double") -> Figure:
    """From the objective to the theory: slope, margin and radius against lambda_grad, with FPR95 and accuracy.

    A radius is a margin over a slope, so the three stand below one another, ID and each OOD set in a column. Points are
    means over seeds, bands reach from the smallest to the largest.

    Args:
        records: Of `grood_cert.results.sweeps.objective_records`, of all runs together.
        width: Of the figure: 8 or 17 cm.

    Raises:
        InputError: If there are no records, or they were made in different norms or at different eps.
    """
    style.check_width(width)
    if not records:
        raise InputError("no records of a sweep given")
    for key in ("norm", "eps", "eps_constant"):
        values = {record[key] for record in records if record[key] is not None}
        if len(values) > 1:
            raise InputError(f"the records differ in {key} ({', '.join(map(str, sorted(values)))}); draw one at a time")
    weights = sorted({float(record["lambda_grad"]) for record in records})
    places = _places(weights)
    columns = list(dict.fromkeys((record["kind"], record["set"]) for record in records))
    rows: list[list[_Page]] = [[(label, curves, *column) for column in columns] for label, curves in _ROWS]
    rows.append([(*(_ACCURACY if kind == "id" else _FPR), kind, name) for kind, name in columns])
    x = [places[weight] for weight in weights]

    def of(kind: str, name: str) -> list[Mapping[str, Any]]:
        return [record for record in records if (record["kind"], record["set"]) == (kind, name)]

    def draw(axes: Axes, page: _Page) -> None:
        label, curves, kind, name = page
        for key, (colour, line, marker) in curves.items():
            mean, least, most = _values(of(kind, name), weights, key)
            axes.fill_between(x, least, most, color=colour, alpha=0.2, linewidth=0)
            axes.plot(x, mean, color=colour, linestyle=line, marker=marker, markersize=3.2)
        row = np.concatenate([_values(of(*column), weights, key).ravel() for column in columns for key in curves])
        row = row[np.isfinite(row)]
        if label.startswith("slope"):
            style.logarithmic(axes, row)
            axes.set_ylabel(label)
        elif label == _FPR[0]:
            style.percent(axes, label)
        elif label == _ACCURACY[0]:
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
            axes.set_ylabel(label)
        else:
            axes.set_ylim(0, 1.08 * float(row.max(initial=0.0)) or 1.0)
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.set_ylabel(label)
        axes.xaxis.set_major_locator(FixedLocator(x))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda _, position: f"{weights[position or 0]:g}"))
        axes.margins(x=0.08)
        if len(weights) > 5 or width == "single":
            axes.tick_params(axis="x", rotation=90)
        if label == _ROWS[0][0]:
            style.titled(axes, f"{name} ({kind.upper()})", "", int(style.WIDTHS[width] / len(columns) / 0.24))
        last = label in (_ACCURACY[0], _FPR[0])
        axes.set_xlabel("lambda_grad" if last else "")
        axes.tick_params(
            labelbottom=last, labelleft=(kind, name) == columns[0] or (last and columns[1] == (kind, name))
        )

    with style.styled(width):
        figure = style.canvas(width)
        size = style.small_type()
        figure.suptitle(style.wrapped(_said(records), int(style.WIDTHS[width] / 2.54 * 72 / (0.57 * size))))
        style.grid(figure, rows, draw)
        entries = [
            style.line("proved: constant, radius, FPR95", "-", marker="o", markersize=3.2),
            style.line("shown by attacks: radius, FPR95", "--", marker="s", markersize=3.2),
            style.line("at x: gradient norm (estimate), margin, clean rates", ":", marker="^", markersize=3.2),
        ]
        for entry, (colour, _, _) in zip(entries, (_PROVED, _SHOWN, _ESTIMATED), strict=True):
            entry.set_color(colour)
        style.legend(figure, (), entries, width, 1 if width == "single" else 3)
        style.fit(figure, len(rows), 4.2 if width == "double" else 3.4)
    return figure


def worst_case(groups: Mapping[str, Sequence[Table]], width: style.Width = "double") -> Figure:
    """FPR95 of each OOD set as it is moved, certified and attacked: means over seeds, and bands over them.

    Args:
        groups: Certifications of the seeds by what they share, the name to print.
        width: Of the figure: 8 or 17 cm.

    Raises:
        InputError: If there are none, or they have different norms, grids or samples.
    """
    every = {f"{name} {number}": table for name, group in groups.items() for number, table in enumerate(group)}
    norm = common_norm(every)
    is_mixed(every, mixed=False)
    first = next(iter(every.values()))
    looks = dict(zip(groups, style.looks(len(groups)), strict=True))
    sets = list(ood_sets(first))
    columns = 1 if width == "single" else min(len(sets), 3)
    parts = [[(name, shown) for name in sets] for shown in ("certified", "attacked")]
    rows = [part[start : start + columns] for part in parts for start in range(0, len(part), columns)]
    characters = int(style.WIDTHS[width] / columns / 0.185)
    entries = [style.line("certified (proved)"), style.line("attacked (shown)", "--")]
    told = [
        {"kind": kind, "set": name, "samples": int(mask.sum()), "norm": norm, "eps": None, "eps_constant": None}
        | {"effort": first.manifest.get("effort"), "engine": first.manifest.get("bounded_by")}
        | {"seed": number, "complete": all(table.complete for table in every.values())}
        for number in range(max(map(len, groups.values())))
        for kind in ("id", "ood")
        for name, mask in first.sets(kind).items()
    ]

    def draw(axes: Axes, panel: tuple[str, str]) -> None:
        name, shown = panel
        proved = shown == "certified"
        for group, tables in groups.items():
            curves = [fpr_curve(table, "ood", {name: table.sets("ood")[name]}) for table in tables]
            rates = np.array([getattr(curve, shown) for curve in curves])
            eps, mean, least, most = style.stairs(
                curves[0].eps, rates.mean(0), rates.min(0), rates.max(0), early=proved
            )
            marks: Any = {"marker": looks[group].marker, "markersize": 3.2, "linestyle": ""}
            axes.fill_between(eps, least, most, color=looks[group].colour, alpha=0.16, linewidth=0)
            axes.plot(eps, mean, color=looks[group].colour, linestyle="-" if proved else "--")
            axes.plot(curves[0].eps, rates.mean(0), color=looks[group].colour, **marks)
        style.radii(axes, norm, max(first.eps))
        style.percent(axes, "FPR at 95 % TPR")
        style.titled(axes, f"{name}: {shown} FPR95", "gamma accepts 95 % of the clean ID samples", characters)

    with style.styled(width):
        figure = style.canvas(width)
        size = style.small_type()
        figure.suptitle(style.wrapped(_said(told), int(style.WIDTHS[width] / 2.54 * 72 / (0.57 * size))))
        style.grid(figure, rows, draw)
        style.legend(figure, groups, entries, width)
        style.fit(figure, len(rows), 5.2)
    return figure
