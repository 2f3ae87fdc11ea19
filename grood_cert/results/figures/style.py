"""How all figures look: colour-blind safe, legible in grey and at the width of one column, text kept as text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from grood_cert.confidence import LEVEL
from grood_cert.errors import InputError
from grood_cert.results.columns import NORMS
from grood_cert.system.files import replacing

FORMATS = (".png", ".pdf", ".svg")
Width = Literal["single", "double"]
WIDTHS: dict[str, float] = {"single": 8.0, "double": 17.0}  # of a column and of a page, in cm
GREY = "#555555"
STYLE: Any = {  # Any: matplotlib types rc keys one by one
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "figure.titlesize": 6.5,
    "lines.linewidth": 1.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.4,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "grood-cert",
}
_SMALL: Any = {
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 7.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.title_fontsize": 6.5,
    "figure.titlesize": 6,
    "lines.linewidth": 1.2,
}
# Okabe and Ito, "Color Universal Design", 2008; ordered so that neighbours also differ in lightness.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "<", ">")
_HATCHES = ("////", "\\\\\\\\", "....", "xxxx", "----", "||||", "++++")
_LEVEL = f"{LEVEL * 100:g} %"


@dataclass(frozen=True)
class Look:
    """How one model is drawn in every panel."""

    colour: str
    marker: str
    hatch: str
    turn: int
    of: int

    def marks(self, hollow: bool = False) -> dict[str, Any]:
        """Markers along a line, at other places than those of other models; hollow for what is not proved."""
        shape: dict[str, Any] = {"markerfacecolor": "white"} if hollow else {}
        return shape | {"marker": self.marker, "markersize": 3.2, "markevery": (0.14 * self.turn / self.of, 0.14)}


def looks(count: int) -> list[Look]:
    """One look a model, in order."""
    return [
        Look(
            _COLOURS[index % len(_COLOURS)],
            _MARKERS[index % len(_MARKERS)],
            _HATCHES[index % len(_HATCHES)],
            index,
            count,
        )
        for index in range(count)
    ]


def check_width(width: str) -> None:
    """Refuse a width that is none.

    Raises:
        InputError: If so.
    """
    if width not in WIDTHS:
        raise InputError(f"unknown width {width!r}; use one of {', '.join(get_args(Width))} (8 cm, 17 cm)")


@contextmanager
def styled(width: Width) -> Iterator[None]:
    """The settings of matplotlib under which a figure of this width is made."""
    with mpl.rc_context(STYLE | (_SMALL if width == "single" else {})):
        yield


def small_type() -> float:
    """The size of notes and of the facts, under the settings in force."""
    return float(mpl.rcParams["figure.titlesize"])


def canvas(width: Width) -> Figure:
    """An empty figure; `fit` gives it its height."""
    return Figure(figsize=(WIDTHS[width] / 2.54, 1), layout="constrained")


def fit(figure: Figure, rows: int, height: float) -> None:
    """Make a figure so high that `rows` of panels, `height` cm each, have room beside what is written around them."""
    around = figure.get_suptitle().count("\n") + 2
    for one in figure.legends:
        lines = [text.get_text().count("\n") + 1 for text in one.get_texts()]
        columns = getattr(one, "_ncols", 1)
        around += max(sum(lines[start::columns]) for start in range(columns)) + 2
    figure.set_figheight((rows * height + 0.33 * around) / 2.54)


def wrapped(text: str, characters: int) -> str:
    r"""Text in lines of at most so many characters; dollar signs, which would begin a formula, are taken literally.

    Example:
        >>> wrapped("a long name at $5", 11)
        'a long name\nat \\$5'
    """
    lines = textwrap.wrap(text, characters) or [""]
    return "\n".join(line.replace("$", r"\$") for line in lines)


def _number(value: float, position: int | None = None) -> str:
    del position
    return f"{value:g}"


def percent(axes: Axes, label: str) -> None:
    """A y axis of shares."""
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel(label)


def radii(axes: Axes, norm: str, largest: float) -> None:
    """An x axis of eps, with few ticks."""
    axes.set_xlim(0, 1.02 * largest)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    axes.set_xlabel(f"eps ({NORMS[norm]}, pixels in [0, 1])")


def logarithmic(axes: Axes, values: ArrayLike) -> None:
    """A y axis in powers of ten, with about three to seven labelled ticks whatever the range."""
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers) & (numbers > 0)]
    axes.set_yscale("log")
    if not len(numbers):
        return
    low, high = numbers.min() / 1.15, numbers.max() * 1.15
    axes.set_ylim(low, high)
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in range(int(np.log10(low)) - 1, int(np.log10(high)) + 2) for m in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 7:
            break
    if len(ticks) > 7:
        ticks = ticks[:: int(np.ceil(len(ticks) / 7))]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(_number))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def titled(axes: Axes, title: str, note: str, characters: int) -> None:
    """A title and, in small type, a note below it."""
    below = wrapped(note, round(characters * 1.25))
    size = small_type()
    axes.set_title(wrapped(title, characters), pad=4 + 1.25 * size * (below.count("\n") + 1) * bool(note))
    axes.annotate(
        below, (0.5, 1.0), (0, 3), "axes fraction", "offset points", size=size, color=GREY, ha="center", va="bottom"
    )


def band(
    axes: Axes, x: ArrayLike, low: ArrayLike, high: ArrayLike, look: Look, step: Literal["post"] | None = None
) -> None:
    """What lies between a proof and an attack, or a search: undecided."""
    axes.fill_between(x, low, high, color=look.colour, alpha=0.22, linewidth=0, step=step)


def limits(
    axes: Axes, x: ArrayLike, curve: ArrayLike, limit: ArrayLike, look: Look, step: Literal["post"] | None = None
) -> None:
    """What lies between a curve and its limit over the sampling of images; hatched while models are few."""
    options: Any = {"facecolor": "none", "edgecolor": look.colour, "linewidth": 0.4, "step": step}
    axes.fill_between(x, curve, limit, hatch=look.hatch if look.of <= 3 else None, alpha=0.45, **options)


def seeds(
    axes: Axes,
    x: ArrayLike,
    values: Sequence[ArrayLike],
    look: Look,
    step: Literal["post"] | None = None,
    **line: Any,
) -> None:
    """A mean over seeds, and the band from the smallest to the largest of them: `values` are these three."""
    mean, least, most = values
    inside, edge = mpl.colors.to_rgba(look.colour, 0.16), mpl.colors.to_rgba(look.colour, 0.5)
    axes.fill_between(x, least, most, facecolor=inside, edgecolor=edge, linewidth=0.4, step=step)
    axes.plot(x, mean, color=look.colour, drawstyle="default" if step is None else f"steps-{step}", **line)


def stairs(eps: NDArray[np.float64], *values: NDArray[np.float64], early: bool) -> list[NDArray[np.float64]]:
    """Steps between points of a grid: from each point on (`early` False), or from the point before on (`early`)."""
    steps = [np.repeat(eps, 2)]
    for value in values:
        twice = np.repeat(value, 2)
        steps.append(np.append(twice[1:], value[-1]) if early else np.append(value[0], twice[:-1]))
    return steps


STAR: Any = {"marker": "*", "markersize": 9, "markeredgecolor": "white", "markeredgewidth": 0.6, "clip_on": False}
UNDECIDED = Patch(facecolor=GREY, alpha=0.3, label="undecided")
SEEDS = Patch(facecolor=GREY, alpha=0.25, label="smallest to largest seed")
LIMITS = Patch(facecolor="none", edgecolor=GREY, hatch="////", linewidth=0.4, label=f"{_LEVEL} limits (sampling)")


def line(label: str, style: Any = "-", **options: Any) -> Line2D:
    """An entry of a legend for a kind of line, whichever the model."""
    return Line2D([], [], color=GREY, linestyle=style, label=label, **options)


def legend(owner: Figure | Axes, names: Iterable[str], entries: Sequence[Any], width: Width, columns: int = 0) -> None:
    """A legend: the models, then what lines and bands mean; below the figure, or in the middle of an empty cell."""
    models = list(names)
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, markersize=4, label=wrapped(name, 22))
        for name, look in zip(models, looks(len(models)), strict=True)
    ]
    inside = isinstance(owner, Axes)
    place: Any = {"loc": "center"} if inside else {"loc": "outside lower center"}
    columns = columns or (2 if inside or width == "single" else 4)
    made = owner.legend(handles=[*handles, *entries], ncols=columns, frameon=False, columnspacing=1.2, **place)
    made.set_in_layout(not inside)


def in_rows(parts: Sequence[Sequence[Any]], columns: int) -> list[list[Any]]:
    """Panels in rows; parts of one panel each stand side by side, another part begins a row of its own."""
    if max(map(len, parts)) == 1:
        parts = [[panel for part in parts for panel in part]]
    return [list(part[start : start + columns]) for part in parts for start in range(0, len(part), columns)]


def grid(figure: Figure, rows: Sequence[Sequence[Any]], draw: Callable[[Axes, Any], None]) -> Axes | None:
    """Draw rows of panels; the axes, without a frame, over what a first row of several leaves empty, if it does."""
    columns = max(map(len, rows))
    spec = figure.add_gridspec(len(rows), columns)
    for row, cells in enumerate(rows):
        left = ""
        for column, cell in enumerate(cells):
            draw(axes := figure.add_subplot(spec[row, column]), cell)
            if column and axes.get_ylabel() == left:
                axes.set_ylabel("")
            left = axes.get_ylabel() or left
    if len(rows[0]) == columns:
        return None
    empty = figure.add_subplot(spec[0, len(rows[0]) :])
    empty.set_axis_off()
    return empty


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
