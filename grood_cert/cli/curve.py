"""`grood-cert curve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options


def curve(
    rows: Annotated[list[Path], typer.Argument(help="rows.csv of certifications, lipschitz.csv or smoothing.csv.")],
    out: Annotated[Path, typer.Option(help="Figure: .png, .pdf or .svg. Its numbers go beside it, as NAME-curve.csv.")],
    label: Annotated[
        list[str] | None, typer.Option(help="Name of each model, in order. [default: the recipe's]")
    ] = None,
    perturb: Annotated[
        str | None,
        typer.Option(help="Certifications: which side moves in the FPR95 curve: ood, id or both. [default: ood]"),
    ] = None,
    at: Annotated[
        float | None, typer.Option(help="Certifications: eps of the gamma sweep, on the grid. [default: its middle]")
    ] = None,
    partial: options.Partial = False,
) -> None:
    """Draw curves of one or more results. Robustness against FPR, Lipschitz constants or smoothed FPR95 against eps."""
    from typing import cast

    from grood_cert.results import figures
    from grood_cert.results.curves import Perturbed
    from grood_cert.results.table import Table, check_target, labelled, manifest_path

    figures.check_format(out)
    numbers = out.with_name(f"{out.stem}-curve.csv")
    check_target(numbers, rows, force=not manifest_path(numbers).exists())  # beside a manifest lies a result
    found = [Table.read(path, partial=partial) for path in rows]
    for path, table in zip(rows, found, strict=True):
        options.warn_unfinished(table, path)
    tables = labelled(found, rows, label or [])
    side = cast(Perturbed | None, perturb)
    figures.save(figures.draw(tables, side, at), out)
    figures.write_numbers(figures.numbers(tables, side), numbers)
    typer.echo(f"wrote {out} and {numbers}")
