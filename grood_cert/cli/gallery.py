"""`grood-cert gallery`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options


def gallery(
    rows: Annotated[Path, typer.Argument(help="rows.csv of a certification made with --save-adversarial.")],
    out: Annotated[Path, typer.Option(help="Figure: .png, .pdf or .svg.")],
    samples: Annotated[int, typer.Option(help="Least and most robust samples of each set; 0: what has room.")] = 0,
    width: Annotated[str, typer.Option(help="single (8 cm) or double (17 cm).")] = "double",
    partial: options.Partial = False,
) -> None:
    """Show the least and most robust samples. Beside each the nearest counterexample, and the difference."""
    from typing import cast

    from grood_cert.results import figures
    from grood_cert.results.table import Table, manifest_path
    from grood_cert.system.files import check_apart

    figures.check_format(out)
    check_apart([out], [rows, manifest_path(rows)])
    table = Table.read(rows, "certification", partial)
    options.warn_unfinished(table, rows)
    drawn = figures.gallery(table, rows.parent / "adversarial", samples, cast(figures.Width, width))
    figures.save(drawn, out)
    typer.echo(f"wrote {out}")
