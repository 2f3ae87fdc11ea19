"""Options that commands share, and what their values mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from grood_cert.data import Experiment
    from grood_cert.detector import Detector
    from grood_cert.runs import saving as runs

Eps = Annotated[
    list[float] | None, typer.Option(help="Radius in pixel units, ascending (repeatable). [default: a grid of 8]")
]
Norm = Annotated[str, typer.Option(help="Norm of the ball: linf, l2 or l1.")]
Ood = Annotated[list[str] | None, typer.Option(help="OOD test set in place of the recipe's (repeatable).")]
Limit = Annotated[int, typer.Option(help="Most samples of each set, drawn by the seed; 0: all.")]
BatchSize = Annotated[int, typer.Option(help="Samples bounded together.")]
Shard = Annotated[str, typer.Option(help="Do part i of n, as i/n; grood-cert merge puts the parts together.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder that holds the torchvision data sets. [default: data]")]
Download = Annotated[bool, typer.Option("--download", help="Let torchvision download what is missing.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: a GPU if there is one.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is already in the folder.")]


def device_name(name: str) -> str:
    """The device's name, with auto resolved to this process's GPU; whether it works is checked where it is used."""
    import os

    import torch

    if name != "auto":
        return name
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def shard_of(text: str) -> runs.Shard:
    """The part of a run that --shard names; without it, the one that torchrun gives this process."""
    from grood_cert.runs import saving as runs

    return runs.Shard.parse(text) if text else runs.shard_of_environment()


def byte_count(text: str) -> int:
    """A memory size such as 64M or 1G."""
    from grood_cert.errors import InputError

    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in units else (text, "")
    try:
        size = float(number) * units.get(unit, 1)
        return int(size)
    except (ValueError, OverflowError):
        raise InputError(f"memory {text!r}: expected a size such as 64M or 1G") from None


def experiment(loaded: Detector, ood: list[str] | None, data_dir: Path | None, download: bool) -> Experiment:
    """The images of the detector's recipe, perhaps with other OOD sets in place of the recipe's."""
    import dataclasses

    from grood_cert.data import experiment_of

    recipe = loaded.recipe
    if ood:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, ood=tuple(ood)))
    return experiment_of(recipe, data_dir, download)
