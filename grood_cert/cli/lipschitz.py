"""`grood-cert lipschitz`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options, output


def lipschitz(
    model: options.Model,
    eps: options.Eps = None,
    norm: options.Norm = "linf",
    method: Annotated[str, typer.Option(help="Pre-activation bounds: ibp, crown-ibp or crown.")] = "crown",
    engine: Annotated[
        str, typer.Option(help="Who gives those bounds: native, auto_lirpa, or auto: native where it can.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder of lipschitz.csv and .json. [default: the model's]")] = None,
    ood: options.Ood = None,
    limit: options.Limit = 50,
    samples: Annotated[int, typer.Option(help="Points sampled in each ball.")] = 256,
    clever_batches: Annotated[int, typer.Option(help="Batch maxima of CLEVER; 0: leave it out.")] = 50,
    memory: Annotated[str, typer.Option(help="Memory that blocks of rows may take, for example 64M or 1G.")] = "16M",
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    shard: options.Shard = "",
    jobs: options.Jobs = 1,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    device: options.Device = "auto",
    force: options.Force = False,
    dry_run: options.DryRun = False,
) -> None:
    """Bound the local Lipschitz constant of S. Estimates from below stand beside the proofs."""
    options.share_out(jobs, shard, dry_run, download)
    from typing import cast

    from grood_cert import detector
    from grood_cert.ball import DEFAULT_EPS
    from grood_cert.bounds.engine import Method
    from grood_cert.bounds.engines import Engine
    from grood_cert.lipschitz import analyser as analysis
    from grood_cert.results.columns import NORMS
    from grood_cert.results.summary import SLOPES
    from grood_cert.runs import analyse

    loaded = detector.load(model, options.device_name(device))
    ball = options.norm_named(norm)
    settings = analysis.AnalysisSettings(
        eps=options.eps_grid(eps) or DEFAULT_EPS[ball],
        norm=ball,
        method=cast(Method, method),
        engine=cast(Engine, engine),
        samples=samples,
        clever_batches=clever_batches,
        memory=options.byte_count(memory),
        batch_size=batch_size,
        seed=seed,
    )
    settings.check(loaded.shape)
    images = options.image_sets(loaded, ood, data_dir, download)
    folder = out or model.parent
    part = options.shard_of(shard)
    sets = [images.test, *images.ood]
    if dry_run:
        output.say(analyse.plan(loaded, sets, settings, limit=limit, shard=part))
        output.say(options.plan_of_jobs(jobs))
        return
    with output.Bar() as bar:
        result = analyse.run(
            loaded,
            model,
            sets,
            settings,
            folder,
            limit=limit,
            shard=part,
            force=force,
            reporter=bar,
        )
    if not part.leads:
        return
    records = result.summary()
    for kind in dict.fromkeys(record["kind"] for record in records):
        title = f"{kind}: local Lipschitz constant of S at each eps, medians, {NORMS[ball]} ball, per pixel unit"
        output.print_across([record for record in records if record["kind"] == kind], "eps", SLOPES, title)
    typer.echo(f"wrote {part.result(folder / 'lipschitz.csv')} and its manifest")
