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
    partial: options.Partial = False,
    force: options.Force = False,
) -> None:
    """Read a certification at another threshold. A look-up: nothing is verified again."""
    from grood_cert.cli.certify import print_summary
    from grood_cert.results import thresholds
    from grood_cert.results.table import Table, check_target

    target = out or rows.with_name(f"{rows.stem}-gamma{gamma:g}{rows.suffix}")
    check_target(target, [rows], force)
    read = Table.read(rows, "certification", partial)
    options.warn_unfinished(read, rows)
    found = thresholds.at_gamma(read, gamma)
    found.write(target)
    print_summary(found)
    typer.echo(f"wrote {target}, looked up in {rows}: nothing was verified again")
