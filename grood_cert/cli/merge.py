"""`grood-cert merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options


def merge(
    shards: Annotated[list[Path], typer.Argument(help="Rows of all shards of one run, in any order.")],
    out: Annotated[Path, typer.Option(help="Where the rows of the whole run go, for example rows.csv.")],
    force: options.Force = False,
) -> None:
    """Put the shards of a run together, as if it had been run in one piece."""
    from grood_cert.results.table import manifest_path
    from grood_cert.runs import merge as merging

    manifest = merging.merge(shards, out, force)
    typer.echo(f"wrote {out} and {manifest_path(out)}: {manifest['rows']} rows of {manifest['shards']} shards")
