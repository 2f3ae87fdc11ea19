"""Figures of the curves: colour-blind safe, legible when printed small, and the numbers behind them as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from grood_cert.errors import InputError
from grood_cert.results.curves import (
    FprCurve,
    Perturbed,
    RadiusCurve,
    RobustnessCurve,
    fpr95_curve,
    fpr_curve,
    not_certified,
    radius_curve,
    robustness_curve,
)
from grood_cert.results.table import Table
from grood_cert.system.files import replacing, write_csv

_DRAWN = ("certification", "lipschitz", "smoothing")
FORMATS = (".png", ".pdf", ".svg")
# Okabe and Ito, "Color Universal Design", 2008; ordered so that neighbours also differ in lightness.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_GREY = "#555555"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: Any = {  # Any: matplotlib types rc keys one by one
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.hashsalt": "grood-cert",
}
NORM_LABELS = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$", "l1": r"$\ell_1$"}


def _percent(axes: Axes, label: str) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    axes.set_ylabel(label)


def _draw_fpr(axes: Axes, curve: FprCurve, colour: str, marker: str) -> None:
    """Steps: between two eps of the grid the proof of the larger ball holds, and the attack in the smaller one."""
    eps = np.repeat(curve.eps, 2)
    certified = np.append(np.repeat(curve.certified, 2)[1:], curve.certified[-1])
    attacked = np.append(curve.attacked[0], np.repeat(curve.attacked, 2)[:-1])
    axes.fill_between(eps, attacked, certified, color=colour, alpha=0.15, linewidth=0)
    axes.plot(eps, certified, color=colour)
    axes.plot(curve.eps, curve.certified, color=colour, marker=marker, markersize=3.5, linestyle="")
    axes.plot(eps, attacked, color=colour, linestyle="--")
    axes.plot(0, curve.certified[0], color=colour, marker="*", markersize=11, markeredgecolor="white", clip_on=False)


def _draw_radius(axes: Axes, curve: RadiusCurve, colour: str) -> None:
    axes.fill_between(curve.eps, curve.attacked, curve.certified, color=colour, alpha=0.15, linewidth=0)
    axes.plot(curve.eps, curve.certified, color=colour)
    axes.plot(curve.eps, curve.attacked, color=colour, linestyle="--")


def _draw_robustness(axes: Axes, curve: RobustnessCurve, colour: str) -> None:
    axes.fill_between(curve.fpr, curve.certified, curve.attacked, color=colour, alpha=0.15, linewidth=0)
    axes.plot(curve.fpr, curve.certified, color=colour)
    axes.plot(curve.fpr, curve.attacked, color=colour, linestyle="--")
    axes.plot(curve.fpr, curve.tpr, color=colour, linestyle=":", linewidth=1.2)


def common_norm(tables: Mapping[str, Table]) -> str:
    """The norm that all tables share.

    Raises:
        InputError: If they differ, or there is none.
    """
    norms = {table.norm for table in tables.values()}
    if not norms:
        raise InputError("no rows given; write some with: grood-cert certify MODEL --out FOLDER")
    if len(norms) > 1:
        raise InputError(f"the rows were made in different norms ({', '.join(sorted(norms))}); draw one norm at a time")
    return norms.pop()


def _model_handles(names: Iterable[str]) -> list[Any]:
    return [
        Line2D([], [], color=_COLOURS[i % len(_COLOURS)], marker=_MARKERS[i % len(_MARKERS)], markersize=4, label=name)
        for i, name in enumerate(names)
    ]


def robustness(tables: Mapping[str, Table], perturbed: Perturbed = "ood", eps: float | None = None) -> Figure:
    """FPR95 against eps, radius distributions of ID and OOD, and ID robustness against FPR, several models on one axis.

    Args:
        tables: Certifications by the name to print.
        perturbed: Which side moves in the first panel.
        eps: The eps of the last panel; must be on every grid. By default the middle of the first model's grid.

    Raises:
        InputError: If they cannot share an axis.
    """
    norm = NORM_LABELS[common_norm(tables)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 6.0), layout="constrained")
        panels: Sequence[Axes] = figure.subplots(2, 2).ravel().tolist()
        for index, rows in enumerate(tables.values()):
            colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
            _draw_fpr(panels[0], fpr_curve(rows, perturbed), colour, marker)
            _draw_radius(panels[1], radius_curve(rows, "id"), colour)
            _draw_radius(panels[2], radius_curve(rows, "ood"), colour)
            sweep = robustness_curve(rows, eps)
            eps = sweep.eps
            _draw_robustness(panels[3], sweep, colour)
        moved = {"ood": "OOD", "id": "ID", "both": "ID and OOD"}[perturbed]
        _percent(panels[0], "FPR at 95 % TPR (OOD accepted)")
        panels[0].set_title(f"Worst-case FPR95, {moved} moved")
        _percent(panels[1], "share with radius at most eps")
        panels[1].set_title("ID: radius of acceptance")
        _percent(panels[2], "share with radius at most eps")
        panels[2].set_title("OOD: radius of rejection")
        for axes in panels[:3]:
            axes.set_xlabel(f"eps ({norm}, pixels in [0, 1])")
            axes.set_xlim(left=0)
        _percent(panels[3], "ID that stays accepted")
        panels[3].set_title(f"ID robustness at eps = {eps:g}")
        panels[3].set_xlabel("clean FPR as gamma sweeps")
        panels[3].set_xlim(0, 1)
        panels[3].xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
        handles = _model_handles(tables)
        handles += [
            Line2D([], [], color=_GREY, label="certified (proved)"),
            Patch(color=_GREY, alpha=0.2, label="undecided"),
            Line2D([], [], color=_GREY, linestyle="--", label="attacked (shown)"),
            Line2D([], [], color=_GREY, linestyle="", marker="*", markersize=10, label="clean FPR95"),
            Line2D([], [], color=_GREY, linestyle=":", linewidth=1.2, label="clean ROC"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def lipschitz(tables: Mapping[str, Table]) -> Figure:
    """Local Lipschitz constant against eps, medians, ID and OOD apart: what was found, what was proved, what is open.

    Args:
        tables: Lipschitz analyses by the name to print.

    Raises:
        InputError: If they cannot share an axis.
    """
    norm = NORM_LABELS[common_norm(tables)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("id", "ood"), strict=True):
            for index, table in enumerate(tables.values()):
                colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
                pages = [page for page in table.summary() if page["kind"] == kind]
                eps, bound, found, center = (
                    [page[key] for page in pages]
                    for key in ("eps", "bound", "ascended_estimate", "gradient_norm_estimate")
                )
                axes.fill_between(eps, found, bound, color=colour, alpha=0.15, linewidth=0)
                axes.plot(eps, bound, color=colour, marker=marker, markersize=3.5)
                axes.plot(eps, found, color=colour, linestyle="--")
                axes.plot(eps, center, color=colour, linestyle=":", linewidth=1.2)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(mpl.ticker.FormatStrFormatter("%g"))
            axes.set_title({"id": "ID", "ood": "OOD"}[kind])
            axes.set_xlabel(f"eps ({norm}, pixels in [0, 1])")
        figure.axes[0].set_ylabel("local Lipschitz constant of S")
        handles = _model_handles(tables)
        handles += [
            Line2D([], [], color=_GREY, label="proved bound"),
            Patch(color=_GREY, alpha=0.2, label="open"),
            Line2D([], [], color=_GREY, linestyle="--", label="ascended maximum (estimate)"),
            Line2D([], [], color=_GREY, linestyle=":", linewidth=1.2, label="gradient norm at x (estimate)"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def smoothing(tables: Mapping[str, Table]) -> Figure:
    """Median smoothing: FPR95 as OOD moves, and the share of decisions not certified, against eps; several models.

    Args:
        tables: Results of smoothing by the name to print.

    Raises:
        InputError: If there is no ID or no OOD set, or no result at all.
    """
    norm = NORM_LABELS[common_norm(tables)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for index, rows in enumerate(tables.values()):
            colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
            eps, rate = fpr95_curve(rows)
            left.plot(eps, rate, color=colour, marker=marker, markersize=3.5)
            left.plot(0, rate[0], color=colour, marker="*", markersize=11, markeredgecolor="white", clip_on=False)
            grid = np.linspace(0, float(rows["radius_smoothed"].max()) * 1.02, 400)
            for kind, line in (("id", "-"), ("ood", "--")):
                shares = [not_certified(rows, mask, grid) for mask in rows.sets(kind).values()]
                right.plot(grid, np.mean(shares, axis=0), color=colour, linestyle=line)
        _percent(left, "FPR at 95 % TPR (OOD accepted)")
        left.set_title("Certified FPR95, OOD moved")
        _percent(right, "share not certified")
        right.set_title("Decisions at gamma")
        for axes in (left, right):
            axes.set_xlabel(f"eps ({norm}, pixels in [0, 1])")
            axes.set_xlim(left=0)
        handles = _model_handles(tables)
        handles += [
            Line2D([], [], color=_GREY, linestyle="", marker="*", markersize=10, label="clean (estimated medians)"),
            Line2D([], [], color=_GREY, label="ID"),
            Line2D([], [], color=_GREY, linestyle="--", label="OOD, mean over sets"),
        ]
        alphas = ", ".join(f"{alpha:g}" for alpha in sorted({float(rows["alpha"].max()) for rows in tables.values()}))
        title = f"smoothed detectors; each sample with probability 1 - {alphas}"
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, title=title)
    return figure


def draw(tables: Mapping[str, Table], perturbed: Perturbed | None = None, eps: float | None = None) -> Figure:
    """The figure that goes with the kind of result: `robustness`, `lipschitz` or `smoothing`; it says what is unfinished.

    Args:
        tables: Results of one kind by the name to print.
        perturbed: Which side moves in the FPR95 curve; of certifications only. None: OOD.
        eps: The eps of the gamma sweep; of certifications only. None: the middle of the grid.

    Raises:
        InputError: If the results are of several kinds, of a kind that is not drawn, or not to be drawn with these
            options, or cannot share an axis.
    """
    kind = _common_kind(tables)
    if kind != "certification" and (perturbed is not None or eps is not None):
        raise InputError(
            f"the side that moves and the eps of the sweep are for certifications, not for {kind}; leave them out"
        )
    figure = (
        robustness(tables, perturbed or "ood", eps)
        if kind == "certification"
        else lipschitz(tables)
        if kind == "lipschitz"
        else smoothing(tables)
    )
    unfinished = [f"{name}: {table.progress} samples" for name, table in tables.items() if not table.complete]
    if unfinished:
        figure.suptitle(f"not finished: {'; '.join(unfinished)}", fontsize=9, fontweight="bold")
    return figure


def numbers(tables: Mapping[str, Table], perturbed: Perturbed | None = None) -> list[dict[str, Any]]:
    """The numbers behind the figure of `draw`.

    Returns:
        Of certifications one record a model, OOD set and eps: the FPR95 curves with exact 95 % binomial intervals. Of
        Lipschitz analyses one a model, kind and eps: medians. Of smoothing one a model and eps: the certified FPR95.

    Raises:
        InputError: If the results are of several kinds, or of a kind that is not drawn.
    """
    kind = _common_kind(tables)
    if kind == "smoothing":
        return [
            {"model": name, "eps": float(eps), "alpha": float(table["alpha"].max()), "fpr95_id_smoothed": float(rate)}
            for name, table in tables.items()
            for eps, rate in zip(*fpr95_curve(table), strict=True)
        ]
    return [
        {"model": name, **record}
        for name, table in tables.items()
        for record in (fpr_curve(table, perturbed or "ood").sets if kind == "certification" else table.summary())
    ]


def _common_kind(tables: Mapping[str, Table]) -> str:
    kinds = {table.kind for table in tables.values()}
    if not kinds:
        raise InputError("no results given; write some with: grood-cert certify MODEL --out FOLDER")
    if len(kinds) > 1:
        raise InputError(f"{' and '.join(sorted(kinds))} make different figures; give files of one kind")
    kind = kinds.pop()
    if kind not in _DRAWN:
        raise InputError(f"there is no figure of {kind}; give {', '.join(_DRAWN)}")
    return kind


def check_format(path: Path) -> None:
    """Refuse a figure file whose name ends in no known format.

    Raises:
        InputError: If so.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: figures are written as {', '.join(FORMATS)}; choose one of these endings")


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the format follows the file name.

    Raises:
        InputError: If the ending is unknown or the file cannot be written.
    """
    check_format(path)
    with replacing(path) as temporary, mpl.rc_context(STYLE):
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
        figure.savefig(temporary, format=path.suffix.lower()[1:], metadata=metadata)


def write_numbers(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the `numbers` behind a figure as CSV.

    Raises:
        InputError: If the file cannot be written.
    """
    write_csv(path, list(records[0]), records)
