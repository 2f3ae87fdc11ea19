"""Figures of results, and the numbers behind them. Every figure says what it was made from, and what is unfinished.

The kind of result chooses the figure: `robustness` of certifications, `lipschitz`, `smoothing`. Where several models are
drawn together they share norm, eps and samples, unless `mixed` allows other grids and samples. Results of one name are
seeds of one training (`grood_cert.results.seeds`), drawn as their mean and range. `objective` draws what training
penalised against what was proved, over the runs of a sweep; `gallery` shows samples and their counterexamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from grood_cert.errors import InputError
from grood_cert.results.curves import Perturbed
from grood_cert.results.figures import certified, slopes, smoothed
from grood_cert.results.figures.certified import robustness
from grood_cert.results.figures.facts import common_norm, facts
from grood_cert.results.figures.slopes import lipschitz
from grood_cert.results.figures.smoothed import smoothing
from grood_cert.results.figures.style import STYLE, Width, check_format, check_width, save
from grood_cert.results.figures.sweeps import objective
from grood_cert.results.figures.twins import gallery
from grood_cert.results.seeds import Groups, Runs, groups_of
from grood_cert.system.files import write_csv

__all__ = [
    "STYLE",
    "Width",
    "check_format",
    "check_width",
    "common_norm",
    "draw",
    "facts",
    "gallery",
    "lipschitz",
    "numbers",
    "objective",
    "robustness",
    "save",
    "smoothing",
    "write_numbers",
]
_DRAWN = ("certification", "lipschitz", "smoothing")


def draw(
    runs: Runs,
    perturbed: Perturbed | None = None,
    eps: float | None = None,
    *,
    panel: str | None = None,
    width: Width = "double",
    mean: bool = False,
    cumulative: bool = False,
    mixed: bool = False,
) -> Figure:
    """The figure that goes with the kind of result: `robustness`, `lipschitz` or `smoothing`.

    Args:
        runs: Results of one kind by the name to print, several of one name if they differ in the seed of training alone.
        perturbed: Which side moves in the FPR95 panels; of certifications only. None: OOD.
        eps: The eps of the panels over gamma; of certifications only. None: the middle of the grid.
        panel: One panel alone, `PANELS` of the figure's module.
        width: Of the figure: 8 or 17 cm.
        mean: The mean over the OOD sets in one panel; not of Lipschitz analyses.
        cumulative: Share with radius at most eps in place of the share that survives; not of Lipschitz analyses.
        mixed: Whether models with other grids or samples may be drawn together; the figure then says so.

    Raises:
        InputError: If the results are of several kinds, of a kind that is not drawn, or not to be drawn with these
            options, or cannot share an axis.
    """
    kind = _kind(groups_of(runs), perturbed, eps, mean, cumulative)
    if kind == "certification":
        return robustness(
            runs, perturbed or "ood", eps, panel=panel, width=width, mean=mean, cumulative=cumulative, mixed=mixed
        )
    if kind == "lipschitz":
        return lipschitz(runs, panel=panel, width=width, mixed=mixed)
    return smoothing(runs, panel=panel, width=width, mean=mean, cumulative=cumulative, mixed=mixed)


def numbers(
    runs: Runs,
    perturbed: Perturbed | None = None,
    eps: float | None = None,
    *,
    panel: str | None = None,
    mean: bool = False,
) -> list[dict[str, Any]]:
    """The numbers behind the figure of `draw`: one record for each point of each curve, with its 95 % limits.

    Radii are given in the falling form, as the share that survives eps. Of several seeds there is one record a point and
    thing `shown`: `mean`, `least` and `most` over `seeds`, without limits.

    Raises:
        InputError: As `draw` does.
    """
    kind = _kind(groups_of(runs), perturbed, eps, mean)
    if kind == "certification":
        return list(certified.numbers(runs, perturbed or "ood", eps, panel, mean))
    return list(slopes.numbers(runs, panel) if kind == "lipschitz" else smoothed.numbers(runs, panel, mean))


def _kind(
    groups: Groups,
    perturbed: Perturbed | None,
    eps: float | None,
    mean: bool,
    cumulative: bool = False,
) -> str:
    """The kind that all results share, and that these options are for."""
    kinds = {table.kind for group in groups.values() for table in group}
    if not kinds:
        raise InputError("no results given; write some with: grood-cert certify MODEL --out FOLDER")
    if len(kinds) > 1:
        raise InputError(f"{' and '.join(sorted(kinds))} make different figures; give files of one kind")
    kind = kinds.pop()
    if kind not in _DRAWN:
        raise InputError(f"there is no figure of {kind}; give {', '.join(_DRAWN)}")
    if kind != "certification" and (perturbed is not None or eps is not None):
        raise InputError(
            f"the side that moves and the eps of the sweep are for certifications, not for {kind}; leave them out"
        )
    if kind == "lipschitz" and (mean or cumulative):
        raise InputError("means over sets and cumulative shares are not for lipschitz; leave them out")
    return kind


def write_numbers(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the `numbers` behind a figure as CSV.

    Raises:
        InputError: If the file cannot be written.
    """
    write_csv(path, list(records[0]), records)
