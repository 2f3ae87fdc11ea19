r"""The page of a card: one HTML file that loads nothing from elsewhere and runs no script.

Proved, probabilistic, shown and estimated numbers are told apart by words and by form. Whatever comes from data is
escaped.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from grood_cert.errors import InputError
from grood_cert.results import figures
from grood_cert.results.card import NORMS, TOLD, Result, card
from grood_cert.results.table import manifest_path
from grood_cert.system.files import check_apart, replacing, write_json

_SHOWN_EPS = 3


def shown_eps(eps: Sequence[float]) -> list[float]:
    """A few of the positive radii of a grid, spread over it: what a narrow table has room for."""
    positive = [value for value in eps if value > 0]
    if len(positive) <= _SHOWN_EPS:
        return positive
    return [positive[round(at)] for at in np.linspace(0, len(positive) - 1, _SHOWN_EPS + 2)[1:-1]]


@dataclass(frozen=True)
class Picture:
    """A figure of a page.

    Attributes:
        title: What it shows.
        caption: How to read it.
        alt: The same for who cannot see it.
        form: A key of `FORMS`, for the strongest claim in it.
        command: The command that draws it; None if none does.
        source: Its data URI.
    """

    title: str
    caption: str
    alt: str
    form: str
    command: str | None
    source: str


def data_uri(figure: Figure) -> str:
    """A figure as the source of an `img`: SVG whose letters are outlines, so that it looks alike everywhere."""
    stream = io.BytesIO()
    with mpl.rc_context({**figures.STYLE, "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


_TOGETHER = 6  # detectors in one figure
_GALLERY = (
    "Below each sample the nearest image that an attack found to be decided otherwise, and the difference, enlarged. "
    "Radii are those of the decision at gamma."
)
_CAPTIONS = {
    "certification": (
        "Robustness against false positives",
        "Solid lines are proved, dashed lines were reached by an attack; the truth lies in the shaded band between them.",
    ),
    "lipschitz": (
        "Local Lipschitz constant of S",
        "Solid lines are proved upper bounds, dashed and dotted ones estimates from below; medians over samples.",
    ),
    "smoothing": (
        "The smoothed detectors",
        "True for each sample with the probability that the figure states; not of the detectors without noise.",
    ),
}


def pictures(detectors: Mapping[str, Sequence[Result]]) -> list[Picture]:
    """The figures of the results: curves of a few detectors together that may share them, and galleries.

    What cannot be drawn, because something it needs was not tested or saved, is left out.
    """
    drawn: list[Picture] = []
    for kind in TOLD:
        norms: dict[str, dict[str, Result]] = {}
        for name, group in detectors.items():
            for result in group:
                if result.table.kind == kind:
                    norms.setdefault(result.table.norm, {})[name] = result
        for results in norms.values():
            names = list(results)
            for start in range(0, len(names), _TOGETHER):
                drawn += _curves(kind, {name: results[name] for name in names[start : start + _TOGETHER]})
        if kind == "certification":
            drawn += [picture for results in norms.values() for picture in _galleries(results)]
    return drawn


def _curves(kind: str, results: Mapping[str, Result]) -> list[Picture]:
    try:
        figure = figures.draw({name: result.table for name, result in results.items()})
    except InputError:
        if len(results) == 1:
            return []
        return [picture for name, result in results.items() for picture in _curves(kind, {name: result})]
    title, caption = _CAPTIONS[kind]
    norm = next(iter(results.values())).table.norm
    labels = [part for name in results for part in ("--label", name)]
    files = [str(result.path) for result in results.values()]
    command = ["grood-cert", "curve", *files, *labels, "--out", f"{kind}-{norm}.pdf"]
    form = "probabilistic" if kind == "smoothing" else "proved"
    return [_picture(f"{title} ({NORMS[norm]}): {', '.join(results)}", caption, form, command, figure)]


def _galleries(results: Mapping[str, Result]) -> list[Picture]:
    found = []
    for name, result in results.items():
        try:
            figure = figures.gallery(result.table, result.path.parent / "adversarial")
        except InputError:  # no counterexamples were kept
            continue
        command = ["grood-cert", "gallery", str(result.path), "--out", "gallery.pdf"]
        found.append(_picture(f"Least and most robust samples: {name}", _GALLERY, "shown", command, figure))
    return found


def _picture(title: str, caption: str, form: str, command: Sequence[str], figure: Figure) -> Picture:
    alt = f"{title}. {caption} The numbers are in the tables of this page and in its card."
    return Picture(title, caption, alt, form, shlex.join(command), data_uri(figure))


def page(content: Mapping[str, Any], drawn: Sequence[Picture]) -> str:
    """The page of a card and its figures, as HTML; whatever comes from data is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": number, "percent": percent, "clock": duration}
    text = resources.files("grood_cert.results").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(card=content, pictures=drawn, norms=NORMS, shown_eps=shown_eps)


def write(detectors: Mapping[str, Sequence[Result]], out: Path, title: str, command: str | None = None) -> None:
    """Write the page, and its card beside it.

    Args:
        detectors: Results by the name of their detector, as from `by_detector`.
        out: The page, .html; the card is called the same, .json.
        title: Of the page.
        command: The command that makes it again.

    Raises:
        InputError: If a file cannot be written, or would be one of the results.
    """
    target = card_path(out)
    results = [result for group in detectors.values() for result in group]
    check_apart((out, target), (path for result in results for path in (result.path, manifest_path(result.path))))
    drawn = pictures(detectors)
    content = card(detectors, title, command)
    content["figures"] = [
        {name: value for name, value in dataclasses.asdict(picture).items() if name != "source"} for picture in drawn
    ]
    with replacing(out) as temporary:
        temporary.write_text(page(content, drawn), encoding="utf-8")
        write_json(target, content)


def card_path(out: Path) -> Path:
    """Where the card of a page lies.

    Raises:
        InputError: If the page's name does not end in .html.
    """
    if out.suffix.lower() != ".html":
        raise InputError(f"{out}: a report is written as .html; choose this ending")
    return out.with_suffix(".json")


def number(value: Any, digits: int = 3) -> str:
    """A number as it is printed; None: nothing is known."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def percent(value: float) -> str:
    """A share as it is printed: near 0 and 1 with a digit more, so that few are not taken for none.

    Example:
        >>> percent(0.004), percent(0.0)
        ('0.4 %', '0 %')
    """
    return f"{100 * value:.0f} %" if value in (0, 1) or 0.1 <= value <= 0.9 else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """A time as it is printed."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
