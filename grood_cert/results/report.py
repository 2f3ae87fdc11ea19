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
from grood_cert.results.card import TOLD, Result, card, groups, objective_pages, of_seeds
from grood_cert.results.columns import NORMS
from grood_cert.results.seeds import alike
from grood_cert.results.sweeps import SHOWN, spread_text
from grood_cert.results.table import manifest_path
from grood_cert.system.files import check_apart, replacing, write_json

_SHOWN_EPS = 3


def form_of(key: str) -> str:
    """The form of one of the keys of `SHOWN`; empty for what is counted or measured at the samples.

    Example:
        >>> [form_of(key) for key in ("constant_bound", "radius_attack", "gradient_norm_estimate", "margin")]
        ['proved', 'shown', 'estimate', '']
    """
    words = {"certified": "proved", "bound": "proved", "attack": "shown", "attacked": "shown", "estimate": "estimate"}
    return words.get(key.rpartition("_")[2], "")


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


_SEEDS = {
    "certification": (
        "Certified is what is proved, attacked what an attack reached; the truth of each seed lies between its two. Lines "
        "are means over the seeds of training, bands reach from the smallest to the largest seed. They say nothing about "
        "the sampling of images."
    ),
    "lipschitz": (
        "Filled marks or solid lines are proved upper bounds, the others estimates from below; medians over samples. Means "
        "over the seeds of training, and the range from the smallest to the largest seed."
    ),
    "smoothing": (
        "True for each sample with the probability that the figure states. Lines are means over the seeds of training, "
        "bands reach from the smallest to the largest seed."
    ),
}
_PANELS = {
    "fpr95": "False positives as OOD is moved by up to eps",
    "id-radius": "ID that stays accepted within eps",
    "ood-radius": "OOD that stays rejected within eps",
    "sweep": "ID that stays accepted against false positives, as the threshold gamma moves",
}
_OBJECTIVE = (
    "Training penalises the gradient norm of S at samples, weighted by lambda_grad. A radius is at least a margin over a "
    "slope bound, as far as the ball of that bound reaches, so slope, margin and radius stand below one another. Medians "
    "over samples; where there are several seeds of training, means and the range from the smallest to the largest."
)


def pictures(detectors: Mapping[str, Sequence[Result]]) -> list[Picture]:
    """The figures of the results: curves of a few detectors together that may share them, lambda_grad, and galleries.

    Detectors that differ in their seeds alone are drawn as mean and range. What cannot be drawn, because something it
    needs was not tested or saved, is left out.
    """
    drawn: list[Picture] = []
    for kind in TOLD:
        norms: dict[str, dict[str, Sequence[Result]]] = {}
        for name, group in groups(detectors).items():
            seeds = of_seeds(group, detectors, kind)
            parts = {name: seeds} if seeds else {one: of_seeds([one], detectors, kind) for one in group}
            for part, results in parts.items():
                if results:
                    norms.setdefault(results[0].table.norm, {})[part] = results
        for runs in norms.values():
            names = list(runs)
            for start in range(0, len(names), _TOGETHER):
                drawn += _curves(kind, {name: runs[name] for name in names[start : start + _TOGETHER]})
    drawn += _objectives(detectors)
    return drawn + [picture for group in detectors.items() for picture in _galleries(*group)]


def _curves(kind: str, runs: Mapping[str, Sequence[Result]]) -> list[Picture]:
    """One figure of runs that can share it, else one of each; of several seeds one a panel, for they take more room."""
    every = [result for results in runs.values() for result in results]
    tables = {name: [result.table for result in results] for name, results in runs.items()}
    several = len(every) > len(runs)
    title, caption = _CAPTIONS[kind]
    norm = every[0].table.norm
    files = [str(result.path) for result in every]
    command = ["grood-cert", "curve", *files, *(part for name in runs for part in ("--label", name))]
    drawn = []
    for panel, words in _PANELS.items() if several and kind == "certification" else [(None, title)]:
        try:
            figure = figures.draw(tables, panel=panel)
        except InputError:
            continue
        stem = "-".join(filter(None, [kind, panel, norm]))
        drawn.append(
            _picture(
                f"{words} ({NORMS[norm]}): {', '.join(runs)}",
                _SEEDS[kind] if several else caption,
                "probabilistic" if kind == "smoothing" else "proved",
                [*command, *(["--panel", panel] if panel else []), "--out", f"{stem}.pdf"],
                figure,
            )
        )
    if drawn or len(runs) == 1:
        return drawn
    return [picture for name, results in runs.items() for picture in _curves(kind, {name: results})]


def _objectives(detectors: Mapping[str, Sequence[Result]]) -> list[Picture]:
    """Slope, margin, radius, FPR95 and accuracy over lambda_grad, where detectors differ in it and in their seeds alone."""
    names, first = list(detectors), [group[0] for group in detectors.values()]
    found = []
    for places in alike([result.table for result in first], but="objective.lambda_grad"):
        records = objective_pages([names[place] for place in places], detectors)
        weights = sorted({record["lambda_grad"] for record in records})
        if len(weights) < 2:
            continue
        try:
            figure = figures.objective(records)
        except InputError:  # certified or analysed at different eps
            continue
        command = shlex.split(first[places[0]].table.manifest.get("command") or "")
        swept = command[1:2] == ["sweep"]
        title = f"From the objective to the proof: lambda_grad {', '.join(f'{weight:g}' for weight in weights)}"
        found.append(_picture(title, _OBJECTIVE, "proved", command if swept else None, figure))
    return found


def _galleries(name: str, results: Sequence[Result]) -> list[Picture]:
    found = []
    for result in results:
        if result.table.kind != "certification":
            continue
        try:
            figure = figures.gallery(result.table, result.path.parent / "adversarial")
        except InputError:  # no counterexamples were kept
            continue
        command = ["grood-cert", "gallery", str(result.path), "--out", "gallery.pdf"]
        found.append(_picture(f"Least and most robust samples: {name}", _GALLERY, "shown", command, figure))
    return found


def _picture(title: str, caption: str, form: str, command: Sequence[str] | None, figure: Figure) -> Picture:
    alt = f"{title}. {caption} The numbers are in the tables of this page and in its card."
    return Picture(title, caption, alt, form, shlex.join(command) if command else None, data_uri(figure))


def page(content: Mapping[str, Any], drawn: Sequence[Picture]) -> str:
    """The page of a card and its figures, as HTML; whatever comes from data is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": number, "clock": duration}
    environment.filters |= {"percent": lambda value: _unbroken(percent(value))}
    environment.filters |= {"seeds": lambda value: _unbroken(percent_over_seeds(value))}
    text = resources.files("grood_cert.results").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        card=content,
        pictures=drawn,
        norms=NORMS,
        shown=SHOWN,
        shown_eps=shown_eps,
        spread_text=spread_text,
        form_of=form_of,
    )


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


def percent_over_seeds(value: Mapping[str, float]) -> str:
    """A mean of shares over seeds as it is printed, with the smallest and the largest.

    Example:
        >>> percent_over_seeds({"mean": 0.6, "least": 0.47, "most": 0.68})
        '60 % [47, 68]'
    """
    mean, least, most = (percent(value[key]) for key in ("mean", "least", "most"))
    return f"{mean} [{least.removesuffix(' %')}, {most.removesuffix(' %')}]"


def _unbroken(text: str) -> str:
    """Text that stays on one line."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def duration(seconds: float) -> str:
    """A time as it is printed."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
