"""`grood-cert sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options, output


def sweep(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or a name that `grood-cert recipe list` shows.")],
    out: Annotated[Path, typer.Option(help="Folder of the sweep; one sub-folder for each detector.")],
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid", metavar="KEY=V,V,...", help="Values of a setting: objective.lambda_grad=0,0.1,1 (repeatable)."
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each combination, seeds from the recipe's on.")] = 1,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change one setting for all: optimizer.epochs=20 (repeatable).")
    ] = None,
    certify: Annotated[bool, typer.Option("--certify/--no-certify", help="Certify every detector.")] = True,
    lipschitz: Annotated[
        bool, typer.Option("--lipschitz/--no-lipschitz", help="Bound the local Lipschitz constants of every detector.")
    ] = True,
    eps: options.Eps = None,
    norm: options.Norm = "linf",
    effort: Annotated[str | None, typer.Option(help="Of certify: fast, default or max. [default: default]")] = None,
    stages: options.Stages = "",
    engine: Annotated[
        str | None,
        typer.Option(help="Of certify: linear bounds by native, auto_lirpa, or auto, as there. [default: auto]"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Most samples certified of each set, drawn by --seed; 0: all. [default: 100]"),
    ] = None,
    lipschitz_eps: Annotated[
        str,
        typer.Option(
            "--lipschitz-eps", metavar="EPS", help="Radii of the Lipschitz analyses. [default: the middle of the grid]"
        ),
    ] = "",
    lipschitz_limit: Annotated[
        int | None, typer.Option(min=0, help="As --limit, for the Lipschitz analyses. [default: 30]")
    ] = None,
    seed: options.Seed = 0,
    shard: options.Shard = "",
    data_dir: options.DataDir = None,
    download: options.Download = False,
    device: options.Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is there and what is to do; write nothing.")
    ] = False,
) -> None:
    """Train a recipe over a grid of settings and seeds, certify and analyse each detector, and draw what comes of it.

    The same command goes on after an interruption. Whoever ends the last detector draws the figures.
    """
    from typing import cast

    import torch

    from grood_cert import recipe as recipes
    from grood_cert.ball import DEFAULT_EPS
    from grood_cert.bounds.engines import Engine
    from grood_cert.certification.settings import Settings
    from grood_cert.errors import InputError
    from grood_cert.lipschitz.analyser import AnalysisSettings
    from grood_cert.results.sweeps import SHOWN
    from grood_cert.runs import sweep as sweeping
    from grood_cert.system.files import check_apart, is_locked

    torch.set_num_threads(1)  # shards share the cores; their threads would wait for one another
    axes = [sweeping.axis(text) for text in grid]
    if len({key for key, _ in axes}) < len(axes):
        raise InputError("--grid names a setting twice; give all its values at once")
    given = {"--effort": effort, "--stages": stages or None, "--engine": engine, "--limit": limit}
    unused = [name for name, value in given.items() if value is not None]
    if unused and not certify:
        raise InputError(f"{' and '.join(unused)}: for certifying, which --no-certify leaves out; leave it out")
    if (lipschitz_eps or lipschitz_limit is not None) and not lipschitz:
        raise InputError(
            "--lipschitz-eps and --lipschitz-limit are for analyses, which --no-lipschitz leaves out; leave it out"
        )
    if eps and not (certify or lipschitz):
        raise InputError("--eps is for certify and lipschitz, and there is neither; leave it out")
    ball = options.norm_named(norm)
    radii = options.eps_grid(eps) or DEFAULT_EPS[ball]
    chosen = options.stages_named(stages)
    certifying = (
        Settings(
            radii,
            ball,
            effort=effort or "default",
            stages=chosen,
            engine=cast(Engine, engine or "auto"),
            seed=seed,
        )
        if certify
        else None
    )
    slopes = options.eps_grid([lipschitz_eps]) if lipschitz_eps else (radii[(len(radii) - 1) // 2],)
    analysing = AnalysisSettings(slopes, ball, samples=128, clever_batches=0, seed=seed) if lipschitz else None
    if certifying:
        certifying.check(None)  # the shape of the images is known once they are loaded
    if analysing:
        analysing.check(None)
    limits = sweeping.Limits(100 if limit is None else limit, 30 if lipschitz_limit is None else lipschitz_limit)
    source = recipes.find(recipe)
    check_apart([out / "sweep.csv", *out.glob("*.png")], [source])
    cells = sweeping.cells(source, dict(axes), seeds, out, settings or ())
    part = options.shard_of(shard)
    if dry_run:
        for cell in part.of(cells):
            typer.echo(f"{cell.name}: {', '.join(sweeping.lacking(cell, certify, lipschitz)) or 'complete'}")
        return
    with output.Bar() as bar:
        sweeping.run(
            cells,
            certifying,
            analysing,
            limits=limits,
            shard=part,
            data_dir=data_dir,
            download=download,
            device=options.device_name(device),
            reporter=bar,
        )
    waiting = [cell.name for cell in cells if sweeping.lacking(cell, certify, lipschitz)]
    if waiting:
        done = f"{len(cells) - len(waiting)} of {len(cells)} detectors are done"
        typer.echo(f"{done}; whoever ends the last one draws the figures")
        return
    if not (certify or lipschitz):
        typer.echo(f"trained {len(cells)} detectors, see {out}")
        return
    found = sweeping.collected(cells, certify, lipschitz)
    for name, records in sweeping.over_seeds(found).items():
        output.print_across(records, "group", SHOWN, f"{name}: mean over {seeds} seeds ± half the range")
    if is_locked(out / "sweep.csv"):  # the shards that end together all come here
        typer.echo("another process draws the figures")
        return
    for path, what in sweeping.draw(found, out).items():
        typer.echo(f"wrote {path}: {what}")
