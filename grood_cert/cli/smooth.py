"""`grood-cert smooth`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options, output

_SUMMARY = {
    "kind": "kind",
    "samples": "samples",
    "certified": "certified",
    "abstained": "abstained",
    "misdecided": "misdecided",
    "radius_smoothed": "radius, median",
}


def smooth(
    model: options.Model,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the noise, pixel units.")] = 0.25,
    eps: Annotated[list[str] | None, options.eps_option("1/4 to 2 sigma", "l_2 radius in pixel units")] = None,
    n: Annotated[int, typer.Option(help="Draws of noise for each sample.")] = 1000,
    alpha: Annotated[float, typer.Option(help="Probability that a row claims too much.")] = 1e-3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float64 network.")] = "float32",
    calibration_limit: Annotated[int, typer.Option(help="Most calibration images; 0: all.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of smoothing.csv and smoothing.json. [default: the model's]")
    ] = None,
    ood: options.Ood = None,
    limit: options.Limit = 0,
    batch_size: Annotated[int, typer.Option(help="Samples saved together.")] = 8,
    memory: Annotated[str, typer.Option(help="Memory that the layers of noisy images may take: 64M, 1G.")] = "256M",
    seed: options.Seed = 0,
    shard: options.Shard = "",
    jobs: options.Jobs = 1,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    device: options.Device = "auto",
    force: options.Force = False,
    dry_run: options.DryRun = False,
) -> None:
    """Certify the smoothed detector in l_2. For networks of any size, each sample with probability 1 - alpha."""
    options.share_out(jobs, shard, dry_run, download)
    from typing import cast

    from grood_cert import detector
    from grood_cert.certification import smoothing
    from grood_cert.results.summary import DETECTION, detection
    from grood_cert.runs import smooth as run_smoothing

    loaded = detector.load(model, options.device_name(device))
    folder = out or model.parent
    part = options.shard_of(shard)
    settings = smoothing.SmoothingSettings(
        sigma=sigma,
        eps=options.eps_grid(eps) or smoothing.default_eps(sigma, loaded.shape),
        n=n,
        alpha=alpha,
        dtype=cast(smoothing.Dtype, dtype),
        memory=options.byte_count(memory),
        batch_size=batch_size,
        calibration_limit=calibration_limit,
        seed=seed,
    )
    settings.check(loaded.shape)
    if sigma > 1:
        typer.echo(f"warning: sigma {sigma:g} is more than the whole range of pixels, [0, 1]", err=True)
    experiment = options.image_sets(loaded, ood, data_dir, download)
    sets = [experiment.test, *experiment.ood]
    if dry_run:
        output.say(run_smoothing.plan(loaded, experiment.calibration, sets, settings, limit=limit, shard=part))
        output.say(options.plan_of_jobs(jobs))
        return
    with output.Bar() as bar:
        rows = run_smoothing.run(
            loaded,
            model,
            experiment.calibration,
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
    title = f"smoothed detector, sigma {settings.sigma:g}: each row holds with probability {1 - settings.alpha:g}"
    output.print_across(rows.summary(), "set", _SUMMARY, title)
    output.print_across(detection(rows), "set", DETECTION, "clean, base and smoothed")
    typer.echo(f"wrote {part.result(folder / 'smoothing.csv')} and its manifest")
