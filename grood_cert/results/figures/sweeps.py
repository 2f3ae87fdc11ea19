"""A sweep: lambda_grad on one page, slope, margin, radius, accuracy and FPR95."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from grood_cert.errors import InputError
from grood_cert.results.columns import NORMS
from grood_cert.results.figures import style
from grood_cert.results.figures.facts import spread_words

_PROVED, _SHOWN, _ESTIMATED = ("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#555555", ":", "^")
_ROWS: tuple[tuple[str, Mapping[str, tuple[str, str, str]]], ...] = (
    ("slope of S, median", {"gradient_norm_estimate": _ESTIMATED, "constant_bound": _PROVED}),
    ("margin, median", {"margin": _ESTIMATED}),
    (
        "radius, median",
        {"radius_attack": _SHOWN, "radius_certified": _PROVED, "margin_over_constant_estimate": _ESTIMATED},
    ),
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
    facts = {"n": ", ".join(counts), "norm": NORMS[str(records[0]["norm"])], "effort": each("effort")}
    facts |= {"engine": each("engine"), "FPR95 at eps": each("eps"), "constant at eps": each("eps_constant")}
    seeds = sorted({record["seed"] for record in records})
    whole = "complete" if all(record["complete"] for record in records) else "NOT FINISHED"
    spread = spread_words([len(seeds)]) if len(seeds) > 1 else "one seed"
    return "; ".join([*(f"{word} {value}" for word, value in facts.items() if value), spread, whole])


def objective(records: Sequence[Mapping[str, Any]], width: style.Width = "double") -> Figure:
    """From the objective to the theory: slope, margin and radius against lambda_grad, with FPR95 and accuracy.

    A radius is a margin over a slope, so the three stand below one another, ID and each OOD set in a column; beside the
    radii, the margin over the proved constant, which is what they would be if the constant held that far. Points are
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
        if label == _ACCURACY[0] and not len(row):  # of runs that did not record it
            axes.set_axis_off()
            return
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
            style.line("norm, margin / constant (estimates); margin, clean", ":", marker="^", markersize=3.2),
        ]
        for entry, (colour, _, _) in zip(entries, (_PROVED, _SHOWN, _ESTIMATED), strict=True):
            entry.set_color(colour)
        style.legend(figure, (), entries, width, 1 if width == "single" else 3)
        style.fit(figure, len(rows), 4.2 if width == "double" else 3.4)
    return figure
