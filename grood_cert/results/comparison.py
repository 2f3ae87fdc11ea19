r"""Several results side by side as a table for a paper: Markdown, LaTeX (booktabs) or CSV; one line a model, OOD set and eps.

Markdown and LaTeX show percent, with 95 % intervals in brackets where they were asked for, and after the OOD sets of a
model their unweighted mean. CSV holds all metrics as fractions with all digits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grood_cert.errors import InputError
from grood_cert.results.brackets import brackets_of, smoothed_metrics
from grood_cert.results.columns import NORMS
from grood_cert.results.curves import Perturbed, middle_eps
from grood_cert.results.table import Table
from grood_cert.system.files import csv_text

SHOWN = {  # by kind of result: the metrics of its table, in words
    "certification": {
        "fpr95_id": "FPR95 clean",
        "fpr95_id_attacked": "FPR95 attacked",
        "fpr95_id_certified": "FPR95 certified",
        "auroc": "AUROC",
        "auroc_attacked": "AAUC",
        "auroc_certified": "GAUC",
    },
    "smoothing": {
        "fpr95_id_estimate": "FPR95 (estimate)",
        "fpr95_id_smoothed": "FPR95 (1 - alpha)",
        "auroc_estimate": "AUROC (estimate)",
        "auroc_smoothed": "GAUC (1 - alpha)",
    },
}
_SIDES = {"ood": "OOD moves within eps", "id": "ID moves within eps", "both": "ID and OOD move within eps"}
_FPR95 = "FPR95: share of OOD accepted at the threshold that accepts 95 % of the ID test samples, in percent."
_NAMES = ("model", "OOD set")
_HEAD = {"model": "model", "set": "OOD set", "eps": "eps", "samples_id": "n ID", "samples_ood": "n OOD"}


@dataclass(frozen=True)
class Comparison:
    """Metrics of several results of one kind.

    Attributes:
        kind: "certification" or "smoothing".
        records: One a model, OOD set and eps: `model`, then what `grood_cert.results.brackets` gives.
        notes: What the figures are, one sentence each.
    """

    kind: str
    records: Sequence[Mapping[str, Any]]
    notes: Sequence[str]


def compare(
    tables: Mapping[str, Table],
    perturbed: Perturbed | None = None,
    eps: Sequence[float] = (),
    with_intervals: bool = False,
) -> Comparison:
    """Put results side by side.

    Args:
        tables: Results of one kind, certification or smoothing, and of one norm, by the names of their models.
        perturbed: Which side moves, of certifications: "ood" (default), "id" or "both".
        eps: Values of every grid; by default, the middle of the first one.
        with_intervals: Whether to add 95 % intervals.

    Raises:
        InputError: If results do not go together, a setting is not for them, or an eps is not on every grid.
        SoundnessError: If proof, attack and score contradict one another.
    """
    kind, norm = _common(tables)
    if kind == "smoothing" and perturbed not in (None, "ood"):
        raise InputError("smoothing bounds the worst case of OOD; leave --perturb away")
    chosen = tuple(eps) or (_middle_of_all(tables),)
    records: list[dict[str, Any]] = []
    for name, table in tables.items():
        found = (
            brackets_of(table, perturbed or "ood", chosen, with_intervals)
            if kind == "certification"
            else smoothed_metrics(table, chosen, with_intervals)
        )
        records += [{"model": name, **record} for record in found]
    return Comparison(kind, records, _notes(tables, kind, norm, perturbed or "ood", with_intervals))


def _common(tables: Mapping[str, Table]) -> tuple[str, str]:
    """The kind and the norm of all results."""
    kinds, norms = {table.kind for table in tables.values()}, {table.norm for table in tables.values()}
    if len(kinds) > 1:
        raise InputError(
            f"{' and '.join(sorted(kinds))} make different tables, for what is proved and what holds with a probability "
            "share no column; give files of one kind"
        )
    if not kinds or not kinds <= SHOWN.keys():
        raise InputError(f"there is no table of {''.join(kinds) or 'nothing'}; give results of {' or '.join(SHOWN)}")
    if len(norms) > 1:
        raise InputError(f"results in {' and '.join(sorted(norms))} do not compare; give results of one norm")
    return kinds.pop(), norms.pop()


def _middle_of_all(tables: Mapping[str, Table]) -> float:
    first = next(iter(tables.values()))
    shared = [value for value in first.eps if all(value in table.eps for table in tables.values())]
    if middle_eps(first) in shared:
        return middle_eps(first)
    known = f"they share {', '.join(map(repr, shared))}" if shared else "they share none"
    raise InputError(f"the results have different grids of eps; name one that all have with --eps ({known})")


def _notes(tables: Mapping[str, Table], kind: str, norm: str, perturbed: Perturbed, with_intervals: bool) -> list[str]:
    notes = [f"{NORMS[norm]}, {_SIDES[perturbed]} (pixel units). {_FPR95}"]
    if kind == "certification":
        notes.append(
            "Attacked, AAUC: what an attack reached. Certified, GAUC: proved that no perturbation makes it worse; what is "
            "not proved counts against the detector."
        )
    else:
        for name, table in tables.items():
            notes.append(
                f"{name}: of the detector smoothed with sigma {table['sigma'][0]:g}, {table['n'][0]} draws. Estimate: of "
                f"medians of draws. (1 - alpha): from bounds that hold with probability {1 - table['alpha'].max():g} a "
                "sample over the draws, not proved."
            )
    if with_intervals:
        notes.append(
            "In brackets 95 % intervals over the sampling of images: exact binomial for an FPR at its threshold, bootstrap "
            "for areas."
        )
    return notes + [
        f"{name} is unfinished: {table.progress} samples." for name, table in tables.items() if not table.complete
    ]


def as_csv(comparison: Comparison) -> str:
    """All metrics of all records, as fractions."""
    return csv_text(list(comparison.records[0]), comparison.records, header=True)


def as_markdown(comparison: Comparison) -> str:
    """A table in Markdown, the notes below it."""
    header, groups = _cells(comparison)
    cells = [[_in_markdown(cell) for cell in line] for line in (header, *(line for group in groups for line in group))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [name in _NAMES for name in header]
    rule = ["-" * width if plain else "-" * (width - 1) + ":" for width, plain in zip(widths, left, strict=True)]
    padded = [
        [
            cell.ljust(width) if plain else cell.rjust(width)
            for cell, width, plain in zip(line, widths, left, strict=True)
        ]
        for line in cells
    ]
    lines = [f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:])]
    return "\n".join([*lines, *(f"\n{_in_markdown(note)}" for note in comparison.notes)]) + "\n"


def _in_markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def as_latex(comparison: Comparison) -> str:
    r"""A tabular for the package booktabs, the notes as comments above it."""
    header, groups = _cells(comparison)
    columns = "".join("l" if name in _NAMES else "r" for name in header)

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(_LATEX.get(letter, letter) for letter in cell) for cell in cells) + r" \\"

    lines = [*(f"% {note}" for note in comparison.notes), rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(header)]
    for group in groups:
        lines += [r"\midrule", *map(line, group)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


FORMATS: dict[str, tuple[str, Callable[[Comparison], str]]] = {  # the ending of a file, and what is written to it
    "markdown": (".md", as_markdown),
    "latex": (".tex", as_latex),
    "csv": (".csv", as_csv),
}
_LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"}
_LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}"}


def _cells(comparison: Comparison) -> tuple[list[str], list[list[list[str]]]]:
    """The header, and the lines of each model and eps: one an OOD set, and their mean if there are several."""
    shown = SHOWN[comparison.kind]
    groups: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for record in comparison.records:
        groups.setdefault((record["model"], record["eps"]), []).append(record)
    lines = []
    for (model, eps), records in groups.items():
        group = [
            [*(_word(record[key]) for key in _HEAD), *(_percent(record, metric) for metric in shown)]
            for record in records
        ]
        if len(records) > 1:
            means = [f"{100 * np.mean([record[metric] for record in records]):.2f}" for metric in shown]
            group.append([_word(model), f"mean of {len(records)}", _word(eps), "", "", *means])
        lines.append(group)
    return [*_HEAD.values(), *shown.values()], lines


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def _percent(record: Mapping[str, Any], metric: str) -> str:
    value = f"{100 * record[metric]:.2f}"
    if f"{metric}_low" not in record:
        return value
    return f"{value} [{100 * record[f'{metric}_low']:.1f}, {100 * record[f'{metric}_high']:.1f}]"
