"""`grood-cert table`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options


def table(
    rows: Annotated[list[Path], typer.Argument(help="rows.csv of certifications, or smoothing.csv.")],
    eps: Annotated[
        list[str] | None,
        typer.Option(
            "--eps", metavar="EPS", help="Radius on the grid of all (repeatable). [default: the middle of the grid]"
        ),
    ] = None,
    perturb: Annotated[
        str | None, typer.Option(help="Certifications: which side moves: ood, id or both. [default: ood]")
    ] = None,
    intervals: Annotated[bool, typer.Option("--intervals", help="Add 95 % intervals.")] = False,
    label: Annotated[
        list[str] | None, typer.Option(help="Name of each model, in order. [default: the recipe's]")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="markdown, latex or csv. [default: as --out ends, else markdown]")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="File to write: .md, .tex or .csv. [default: the screen]")] = None,
    partial: options.Partial = False,
    force: options.ForceOut = False,
) -> None:
    """Certified, attacked and clean FPR95 and AUROC of each OOD set, as a table for a paper."""
    from typing import cast

    from grood_cert.results.comparison import FORMATS, compare
    from grood_cert.results.curves import Perturbed
    from grood_cert.results.table import Table, labelled, manifest_path

    endings = {name: ending for name, (ending, _) in FORMATS.items()}
    inputs = [file for path in rows for file in (path, manifest_path(path))]
    form = options.output_format(form, out, endings, inputs, force) or "markdown"
    found = [Table.read(path, partial=partial) for path in rows]
    for path, result in zip(rows, found, strict=True):
        options.warn_unfinished(result, path)
    tables = labelled(found, rows, label or [])
    comparison = compare(tables, cast(Perturbed | None, perturb), options.eps_grid(eps), intervals)
    options.write_text(FORMATS[form][1](comparison), out)
