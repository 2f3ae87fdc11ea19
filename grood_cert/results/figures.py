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
from grood_cert.lipschitz.analyser import QUANTITIES, Analysis
from grood_cert.results.curves import (
    FprCurve,
    Perturbed,
    RadiusCurve,
    RobustnessCurve,
    fpr_curve,
    radius_curve,
    robustness_curve,
)
from grood_cert.results.rows import Rows
from grood_cert.results.smoothed_rows import SmoothedRows, fpr95_curve, not_certified
from grood_cert.system.files import replacing, write_csv

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
TABLE_COLUMNS = (
    "model",
    "set",
    "eps",
    "samples",
    "fpr95_id_certified",
    "fpr95_id_certified_low",
    "fpr95_id_certified_high",
    "fpr95_id_attacked",
    "fpr95_id_attacked_low",
    "fpr95_id_attacked_high",
)


def _percent(axes: Axes, label: str) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    axes.set_ylabel(label)


def _draw_fpr(axes: Axes, curve: FprCurve, colour: str, marker: str) -> None:
    axes.fill_between(curve.eps, curve.attacked, curve.certified, color=colour, alpha=0.15, linewidth=0)
    axes.plot(curve.eps, curve.certified, color=colour, marker=marker, markersize=3.5)
    axes.plot(curve.eps, curve.attacked, color=colour, linestyle="--")
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


def common_norm(results: Mapping[str, Rows] | Mapping[str, Analysis] | Mapping[str, SmoothedRows]) -> str:
    """The norm that all results share.

    Raises:
        InputError: If they differ, or there is none.
    """
    norms = {result.norm for result in results.values()}
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


def robustness_figure(
    certifications: Mapping[str, Rows], perturbed: Perturbed = "ood", eps: float | None = None
) -> Figure:
    """FPR95 against eps, radius distributions of ID and OOD, and ID robustness against FPR, several models on one axis.

    Args:
        certifications: Rows by the name to print.
        perturbed: Which side moves in the first panel.
        eps: The eps of the last panel; must be on every grid. By default the middle of the first model's grid.

    Raises:
        InputError: If the certifications cannot share an axis.
    """
    norm = NORM_LABELS[common_norm(certifications)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 6.0), layout="constrained")
        panels: Sequence[Axes] = figure.subplots(2, 2).ravel().tolist()
        for index, rows in enumerate(certifications.values()):
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
        handles = _model_handles(certifications)
        handles += [
            Line2D([], [], color=_GREY, label="certified (proved)"),
            Patch(color=_GREY, alpha=0.2, label="undecided"),
            Line2D([], [], color=_GREY, linestyle="--", label="attacked (shown)"),
            Line2D([], [], color=_GREY, linestyle="", marker="*", markersize=10, label="clean FPR95"),
            Line2D([], [], color=_GREY, linestyle=":", linewidth=1.2, label="clean ROC"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def lipschitz_figure(analyses: Mapping[str, Analysis]) -> Figure:
    """Local Lipschitz constant against eps, medians, ID and OOD apart: what was found, what was proved, what is open.

    Args:
        analyses: Analyses by the name to print.

    Raises:
        InputError: If the analyses cannot share an axis.
    """
    norm = NORM_LABELS[common_norm(analyses)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("id", "ood"), strict=True):
            for index, analysis in enumerate(analyses.values()):
                if kind not in analysis.kinds():
                    continue
                colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
                pages = analysis.summary(kind)
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
        handles = _model_handles(analyses)
        handles += [
            Line2D([], [], color=_GREY, label="proved bound"),
            Patch(color=_GREY, alpha=0.2, label="open"),
            Line2D([], [], color=_GREY, linestyle="--", label="ascended maximum (estimate)"),
            Line2D([], [], color=_GREY, linestyle=":", linewidth=1.2, label="gradient norm at x (estimate)"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


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


def write_table(certifications: Mapping[str, Rows], perturbed: Perturbed, path: Path) -> None:
    """Write the FPR95 curves of every OOD set as CSV, with exact 95 % binomial intervals.

    Raises:
        InputError: If the file cannot be written.
    """
    records = [
        {"model": name, **record} for name, rows in certifications.items() for record in fpr_curve(rows, perturbed).sets
    ]
    write_csv(path, TABLE_COLUMNS, records)


def write_lipschitz_table(analyses: Mapping[str, Analysis], path: Path) -> None:
    """Write the medians behind a Lipschitz figure as CSV: one row for each model, kind and eps.

    Raises:
        InputError: If the file cannot be written.
    """
    records = [
        {"model": name, "kind": kind} | page
        for name, analysis in analyses.items()
        for kind in analysis.kinds()
        for page in analysis.summary(kind)
    ]
    write_csv(path, ("model", "kind", "eps", *QUANTITIES), records)


def smoothing_figure(results: Mapping[str, SmoothedRows]) -> Figure:
    """Median smoothing: FPR95 as OOD moves, and the share of decisions not certified, against eps; several models.

    Args:
        results: Rows by the name to print.

    Raises:
        InputError: If there is no ID or no OOD set, or no result at all.
    """
    norm = NORM_LABELS[common_norm(results)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for index, rows in enumerate(results.values()):
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
        handles = _model_handles(results)
        handles += [
            Line2D([], [], color=_GREY, linestyle="", marker="*", markersize=10, label="clean (estimated medians)"),
            Line2D([], [], color=_GREY, label="ID"),
            Line2D([], [], color=_GREY, linestyle="--", label="OOD, mean over sets"),
        ]
        alphas = ", ".join(f"{alpha:g}" for alpha in sorted({float(rows["alpha"].max()) for rows in results.values()}))
        title = f"smoothed detectors; each sample with probability 1 - {alphas}"
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, title=title)
    return figure


def write_smoothing_table(results: Mapping[str, SmoothedRows], path: Path) -> None:
    """The certified FPR95 against eps of the smoothing figure, one record a model and eps."""
    records = [
        {"model": name, "eps": float(eps), "alpha": float(rows["alpha"].max()), "fpr95_id_smoothed": float(rate)}
        for name, rows in results.items()
        for eps, rate in zip(*fpr95_curve(rows), strict=True)
    ]
    write_csv(path, ["model", "eps", "alpha", "fpr95_id_smoothed"], records)
