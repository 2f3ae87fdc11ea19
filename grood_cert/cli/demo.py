"""`grood-cert demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options, output


def demo(
    out: Annotated[Path, typer.Option(help="Folder of everything the demo writes.")] = Path("runs/demo"),
    limit: Annotated[int, typer.Option(help="Samples certified of each set; 0: all.")] = 100,
    device: options.Device = "auto",
    force: options.Force = False,
) -> None:
    """Train, certify and compare two detectors. Real digits, a few minutes on a CPU."""
    import torch

    from grood_cert import demo as demonstration
    from grood_cert.errors import InputError

    if limit < 0:
        raise InputError(f"limit must be 0 (all) or more, got {limit}")
    torch.set_num_threads(1)  # networks this small gain nothing from threads, and lose much where cores are shared
    with output.Bar() as bar:
        result = demonstration.run(out, limit=limit, device=options.device_name(device), force=force, reporter=bar)
    output.print_across(result.summary, "model", demonstration.QUANTITIES, demonstration.TITLE)
    typer.echo(demonstration.NOTE)
    for path, what in result.files.items():
        typer.echo(f"{path}  {what}")
