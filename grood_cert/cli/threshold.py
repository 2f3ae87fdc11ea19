"""`grood-cert threshold`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options


def threshold(
    rows: Annotated[Path, typer.Argument(help="rows.csv of a certification.")],
    gamma: Annotated[float, typer.Option(help="The other threshold.")],
    out: Annotated[Path | None, typer.Option(help="Rows to write. [default: rows-gammaG.csv beside them]")] = None,
    force: options.Force = False,
) -> None:
    """Read a certification at another threshold. A look-up: nothing is verified again."""
    from grood_cert.cli.certify import print_summary
    from grood_cert.errors import InputError
    from grood_cert.results import thresholds
    from grood_cert.results.table import Table

    target = out or rows.with_name(f"{rows.stem}-gamma{gamma:g}{rows.suffix}")
    if target.resolve() == rows.resolve():
        raise InputError(f"{target} is what is read; choose another --out")
    if target.exists() and not force:
        raise InputError(f"{target} exists already; choose another --out, or add --force to overwrite it")
    found = thresholds.at_gamma(Table.read(rows, "certification"), gamma)
    found.write(target)
    print_summary(found)
    typer.echo(f"wrote {target}, looked up in {rows}: nothing was verified again")
