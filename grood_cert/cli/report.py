"""`grood-cert report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Results (rows.csv, smoothing.csv, lipschitz.csv), or folders that hold them.")
    ],
    out: Annotated[Path, typer.Option(help="Page, .html; its card goes beside it as .json.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Of the page.")] = "OOD detectors under perturbation: what is proved",
    label: Annotated[list[str] | None, typer.Option(help="Name of each detector, in order. [default: its own]")] = None,
    partial: options.Partial = False,
    force: options.Force = False,
) -> None:
    """Write one page to hand in, and a card for programs. What was tested, proved, shown, estimated, and what it does not say."""
    from grood_cert.errors import InputError
    from grood_cert.results import card
    from grood_cert.results import report as pages
    from grood_cert.runs.progress import command_line

    for path in (out, pages.card_path(out)):
        if path.exists() and not force:
            raise InputError(f"{path} exists already; choose another --out, or add --force to overwrite it")
    results = card.found(runs, partial)
    for result in results:
        options.warn_unfinished(result.table, result.path)
    pages.write(card.by_detector(results, label or []), out, title, command_line(joint=False))
    typer.echo(
        f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB, loads nothing from elsewhere) and {pages.card_path(out)}"
    )
