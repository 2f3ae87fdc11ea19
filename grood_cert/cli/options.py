"""Options that commands share, and what their values mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from grood_cert.certification.outcomes import STAGES

if TYPE_CHECKING:
    from grood_cert.ball import Norm as Norm_
    from grood_cert.data import Evaluation
    from grood_cert.detector import Detector
    from grood_cert.results.table import Table
    from grood_cert.runs import shards

Model = Annotated[Path, typer.Argument(help="Checkpoint written by grood-cert train.")]
_NORMS = ("linf", "l2", "l1")  # ball.NORMS, which would import torch


def eps_option(default: str = "", what: str = "Radius in pixel units") -> Any:
    """The option --eps of commands that take a grid of radii; they differ in what they do with it where it is not given."""
    text = f"{what}: 0.01, 8/255 or 0.01,0.02, ascending (repeatable)."
    return typer.Option("--eps", metavar="EPS", help=f"{text} [default: {default}]" if default else text)


Eps = Annotated[list[str] | None, eps_option("a grid of 8")]
Norm = Annotated[
    str,
    typer.Option(
        "--norm", metavar="NORM", help="Norm of the ball: linf, l2 or l1.", autocompletion=lambda: list(_NORMS)
    ),
]
Ood = Annotated[list[str] | None, typer.Option(help="OOD test set in place of the recipe's (repeatable).")]
Limit = Annotated[int, typer.Option(help="Most samples of each set, drawn by the seed; 0: all.")]
BatchSize = Annotated[int, typer.Option(help="Samples bounded together.")]
Stages = Annotated[
    str, typer.Option(help=f"Stages of certify in place of the effort's, comma-separated: {', '.join(STAGES)}.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all random numbers and of --limit.")]
Shard = Annotated[str, typer.Option(help="Do part i of n, as i/n; grood-cert merge puts the parts together.")]
Jobs = Annotated[int, typer.Option(min=1, help="Processes of this machine that share the run, batch by batch.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder that holds the torchvision data sets. [default: data]")]
Download = Annotated[bool, typer.Option("--download", help="Let torchvision download what is missing.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: a GPU if there is one.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say how much work it is and about how long; write nothing.")]
Partial = Annotated[bool, typer.Option("--partial", help="Take what there is of a run that is not finished.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is already in the folder.")]
ForceOut = Annotated[bool, typer.Option("--force", help="Overwrite the file that --out names.")]


def help_without_command(context: typer.Context) -> None:
    """Print the help of a group of commands that is called without one."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def eps_grid(texts: list[str] | None) -> tuple[float, ...]:
    """The radii that --eps names: numbers or fractions, one or several with commas between; empty if it was not given.

    Raises:
        InputError: If one is neither.

    Example:
        >>> eps_grid(["0.25,1/2", "1"])
        (0.25, 0.5, 1.0)
    """
    from grood_cert.errors import InputError

    def number(text: str) -> float:
        above, slash, below = text.partition("/")
        try:
            return float(above) / float(below) if slash else float(above)
        except (ValueError, ZeroDivisionError):
            raise InputError(f"--eps {text.strip()!r}: expected a number such as 0.03 or 8/255") from None

    return tuple(number(part) for text in texts or () for part in text.split(","))


def stages_named(text: str) -> tuple[str, ...]:
    """The stages that --stages names, in any order; empty if it was not given. `Settings.check` refuses unknown ones.

    Raises:
        InputError: If it was given and names none.

    Example:
        >>> stages_named("crown, ibp,"), stages_named("")
        (('crown', 'ibp'), ())
    """
    from grood_cert.errors import InputError

    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if text and not found:
        raise InputError(f"--stages {text!r} names none; use some of {', '.join(STAGES)}")
    return found


def norm_named(text: str) -> Norm_:
    """The norm that --norm means: linf, L2, inf, l_1, 2, ...

    Raises:
        InputError: If it is none of the three.

    Example:
        >>> [norm_named(text) for text in ("Linf", "inf", "2", "l_1")]
        ['linf', 'linf', 'l2', 'l1']
    """
    from grood_cert.errors import InputError

    name = "l" + text.strip().lower().removeprefix("l").removeprefix("_").replace("infinity", "inf")
    if name not in _NORMS:
        raise InputError(f"unknown norm {text!r}; use one of {', '.join(_NORMS)}")
    return cast("Norm_", name)


def output_format(form: str, out: Path | None, endings: Mapping[str, str], inputs: Sequence[Path], force: bool) -> str:
    """The format that --format names, or that --out ends in; empty where neither is given.

    Raises:
        InputError: If it is unknown, or the file cannot be of it, is there already or is read.
    """
    from grood_cert.errors import InputError
    from grood_cert.system.files import check_apart

    if form and form not in endings:
        raise InputError(f"unknown format {form!r}; use one of {', '.join(endings)}")
    if out is None:
        if force:
            raise InputError("--force is for the file that --out names; give --out too")
        return form
    ending = next((name for name, suffix in endings.items() if out.suffix == suffix), "")
    if not ending or form not in ("", ending):
        wanted = endings[form] if form else " or ".join(endings.values())
        raise InputError(f"{out}: expected the name of a file that ends in {wanted}")
    check_apart([out], inputs)
    if out.exists() and not force:
        raise InputError(f"{out} exists already; choose another --out, or add --force to overwrite it")
    return ending


def write_text(text: str, out: Path | None, what: str = "") -> None:
    """Write a text to the file that --out names, else to the screen.

    Args:
        text: All of it.
        out: The file.
        what: What it is, to be said of the file.

    Raises:
        InputError: If the file cannot be written.
    """
    from grood_cert.system.files import replacing

    if out is None:
        typer.echo(text, nl=False)
        return
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
    typer.echo(f"wrote {what} to {out}" if what else f"wrote {out}")


def warn_unfinished(table: Table, path: Path) -> None:
    """Say so where --partial has let an unfinished run through."""
    if not table.complete:
        typer.echo(f"warning: {path} is unfinished, {table.progress} samples: what follows is of these alone", err=True)


def at_gamma(loaded: Detector, gamma: float | None) -> Detector:
    """The detector with the threshold that --gamma gives, or with its own.

    Raises:
        InputError: If it is not a finite number.
    """
    import dataclasses
    import math

    from grood_cert.errors import InputError

    if gamma is not None and not math.isfinite(gamma):
        raise InputError(f"gamma must be a finite number, got {gamma!r}")
    return loaded if gamma is None else dataclasses.replace(loaded, gamma=gamma)


def device_name(name: str) -> str:
    """The device's name, with auto resolved to this process's GPU; whether it works is checked where it is used."""
    import os

    import torch

    if name != "auto":
        return name
    count, rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    return f"cuda:{rank % count}" if count else "cpu"


def shard_of(text: str) -> shards.Shard:
    """The part of a run that --shard names; without it, the one that torchrun gives this process."""
    from grood_cert.runs import shards

    return shards.Shard.parse(text) if text else shards.shard_of_environment()


def share_out(jobs: int, shard: str, dry_run: bool, download: bool) -> None:
    """Where --jobs asks for several processes, run the command in them and end this one; they come here too, and go on.

    Called before a command imports what it works with, which the process that only waits does not need.
    """
    import os
    import sys

    from grood_cert.errors import InputError
    from grood_cert.runs.progress import command_line
    from grood_cert.system import jobs as processes

    if processes.started():
        processes.end_with_starter()
        return
    if jobs == 1:
        return
    if shard:
        raise InputError(f"--jobs {jobs} and --shard {shard} each divide the run; use one of them")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"--jobs {jobs} and torchrun each divide the run; use one of them")
    if dry_run:
        return
    if download:
        raise InputError(
            f"--download and --jobs {jobs}: each process would download; fetch the sets by a --dry-run first"
        )
    if command_line(joint=False) is None:
        raise InputError(f"--jobs {jobs} starts grood-cert again, and this is {sys.argv[0]!r}; call grood-cert itself")
    raise typer.Exit(processes.share_out(jobs, [sys.executable, *sys.orig_argv[1:]]))


def plan_of_jobs(jobs: int) -> list[str]:
    """What a --dry-run adds where several processes would share the run."""
    return [f"  that is for one process; {jobs} would share it"] if jobs > 1 else []


def byte_count(text: str) -> int:
    """A memory size such as 64M or 1G."""
    from grood_cert.errors import InputError

    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in units else (text, "")
    try:
        size = int(float(number) * units.get(unit, 1))
        if size > 0:
            return size
        raise ValueError
    except (ValueError, OverflowError):
        raise InputError(f"memory {text!r}: expected a size such as 64M or 1G") from None


def bounds_note(network: str) -> str:
    """What is to be said of an architecture whose bounds prove nothing; empty for the others."""
    from grood_cert.networks.architectures import DEEP

    if network not in DEEP:
        return ""
    return f"{network}: bounds through so many layers prove nothing; certify this detector with grood-cert smooth"


def image_sets(loaded: Detector, ood: list[str] | None, data_dir: Path | None, download: bool) -> Evaluation:
    """The images that the detector was calibrated and tested on, perhaps with other OOD sets in place of its own."""
    import dataclasses

    from grood_cert.data import experiment_of, load_evaluation
    from grood_cert.detector import Import
    from grood_cert.errors import InputError

    origin = loaded.provenance
    if origin is None:
        raise InputError(
            "this detector came without a recipe, so its image sets are unknown; use grood_cert.certify_sets"
        )
    data = origin.data if isinstance(origin, Import) else origin.recipe.data
    if ood:
        data = dataclasses.replace(data, ood=tuple(ood))
    if isinstance(origin, Import):
        found = load_evaluation(data, data_dir, download)
    else:
        found = experiment_of(dataclasses.replace(origin.recipe, data=data), data_dir, download)
    for note in found.notes if shard_of("").leads else ():
        typer.echo(note, err=True)
    return found
