"""`grood-cert export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options

_FORMATS = ("onnx", "safetensors", "state-dict", "openood", "pytorch-ood")  # exports.FORMATS, which would import torch


def export(
    model: options.Model,
    form: Annotated[
        str,
        typer.Option(
            "--format", metavar="FORMAT", help=f"One of {', '.join(_FORMATS)}.", autocompletion=lambda: list(_FORMATS)
        ),
    ],
    out: Annotated[Path, typer.Option(help="File to write; FILE.json beside it says what it is.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
) -> None:
    """Write a detector's network for other programs: ONNX, or weights under published names."""
    from typing import cast

    from grood_cert import detector
    from grood_cert.runs import exports

    loaded = detector.load(model)
    written = exports.export(loaded, out, cast(exports.Format, form), model=model, force=force)
    typer.echo(f"wrote {written.path}: {written.said}")
    typer.echo(f"wrote {written.beside}: normalisation, score, gamma and class names")
