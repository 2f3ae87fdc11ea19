"""`grood-cert status`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import output


def status(folder: Annotated[Path, typer.Argument(help="Folder of one or more runs.")]) -> None:
    """Say how far the runs in a folder have come, and what goes on with them."""
    from grood_cert.runs.progress import describe

    output.say(describe(folder))
