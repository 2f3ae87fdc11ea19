"""A gallery: the least and the most robust samples of each set, with their adversarial twins and the difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from grood_cert.errors import InputError
from grood_cert.results.adversarial import Twin, extreme_rows, read_twins
from grood_cert.results.figures import style
from grood_cert.results.figures.facts import state
from grood_cert.results.table import Table

SAMPLES = {"single": 2, "double": 4}


def _show(axes: Axes, image: NDArray[np.float64]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.4)
    if len(image) not in (1, 3):
        raise InputError(f"images of {len(image)} channels cannot be shown; 1 (grey) or 3 (colours) can")
    picture = np.clip(image, 0, 1).transpose(1, 2, 0)
    axes.imshow(picture if len(image) == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _block(part: SubFigure, title: str, twins: Sequence[Twin], columns: int, names: bool) -> None:
    part.suptitle(title, fontsize=1.15 * style.small_type())
    panels = part.subplots(3, columns, squeeze=False)
    small = style.small_type()
    for column, axes in enumerate(panels.T):
        if column >= len(twins):
            for empty in axes:
                empty.set_axis_off()
            continue
        twin = twins[column]
        difference = twin.twin - twin.image
        largest = float(np.abs(difference).max()) or 1.0
        for one, image in zip(axes, (twin.image, twin.twin, 0.5 + difference / (2 * largest)), strict=True):
            _show(one, image)
        axes[0].set_title(f"no. {twin.index}, S {twin.score:.3g}", fontsize=small, pad=2)
        words = f"$\\pm${largest:.2g}\ncertified {twin.radius_certified:.3g}\nattack {twin.radius_attack:.3g}"
        axes[2].set_xlabel(words, fontsize=small, labelpad=2)
    for axes, name in zip(panels[:, 0] if names else (), ("x", "x'", "x' - x"), strict=names):
        axes.set_ylabel(name)


def gallery(rows: Table, folder: Path, samples: int = 0, width: style.Width = "double") -> Figure:
    """The least and the most robust samples of each set with their nearest counterexamples, ID first.

    x, x' and their difference stand below one another; in the difference grey is 0, black and white are minus and plus
    its largest entry.

    Args:
        rows: A certification.
        folder: The folder `adversarial/` that the run kept.
        samples: How many of each; 0: as many as the width has room for.
        width: Of the figure: 8 or 17 cm.

    Raises:
        InputError: If the folder does not belong to the rows, no sample was attacked, or images are not of 1 or 3
            channels.
    """
    style.check_width(width)
    if samples < 0:
        raise InputError(f"samples must be 0 (as many as there is room for) or more, got {samples}")
    columns = samples or SAMPLES[width]
    sets = {(kind, name): mask for kind in ("id", "ood") for name, mask in rows.sets(kind).items()}
    picked = {key: extreme_rows(rows, mask, columns) for key, mask in sets.items()}
    picked = {key: found for key, found in picked.items() if found[0]}
    if not picked:
        raise InputError("no sample is both right at x and attacked, so there is nothing to show")
    twins = read_twins(folder, rows, [row for found in picked.values() for part in found for row in part])
    with style.styled(width):
        figure = style.canvas(width)
        state(figure, {str(rows.manifest["model"]["name"]): rows}, False, width)
        figure.suptitle(
            f"{figure.get_suptitle()}\nx' - x: 0 is grey, black and white are minus and plus the number below"
        )
        parts = figure.subfigures(len(picked), 2, squeeze=False)
        for line, ((kind, name), found) in zip(parts, picked.items(), strict=True):
            for side, part in enumerate(line):
                title = style.wrapped(
                    f"{name} ({kind.upper()}), {('least', 'most')[side]} robust", 2 * round(style.WIDTHS[width] * 1.5)
                )
                _block(part, title, [twins[row] for row in found[side]], columns, names=side == 0)
        cell = style.WIDTHS[width] / (2 * columns + 0.8)
        style.fit(figure, len(picked), 3 * cell + 2.2)
    return figure
