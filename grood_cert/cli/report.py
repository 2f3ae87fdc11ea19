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
    title: Annotated[str, typer.Option(help="Of the page.")] = "How robust these OOD detectors are, and what proves it",
    label: Annotated[list[str] | None, typer.Option(help="Name of each detector, in order. [default: its own]")] = None,
    partial: options.Partial = False,
    force: options.Force = False,
) -> None:
    """Write one page to hand in, and a card for programs. What was tested, proved, shown, estimated, and what it does not say."""
    import dataclasses

    from grood_cert.errors import InputError
    from grood_cert.results import card as cards
    from grood_cert.results import report as pages
    from grood_cert.system.files import replacing, write_json

    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out}: a report is written as .html; choose this ending")
    target = out.with_suffix(".json")
    for path in (out, target):
        if path.exists() and not force:
            raise InputError(f"{path} exists already; choose another --out, or add --force to overwrite it")
    results = cards.found(runs, partial)
    if target.resolve() in {
        path.resolve() for result in results for path in (result.path, result.path.with_suffix(".json"))
    }:
        raise InputError(f"{target} would overwrite a manifest that is read; choose another --out")
    for result in results:
        options.warn_unfinished(result.table, result.path)
    detectors = cards.by_detector(results, label or [])
    content = cards.card(detectors, title)
    drawn = pages.pictures(detectors)
    content["figures"] = [
        {name: value for name, value in dataclasses.asdict(picture).items() if name != "source"} for picture in drawn
    ]
    text = pages.page(content, drawn)
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
        write_json(target, content)
    typer.echo(f"wrote {out} ({len(text.encode()) / 1e6:.1f} MB, nothing in it loads from elsewhere) and {target}")
