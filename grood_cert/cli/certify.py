"""`grood-cert certify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from grood_cert.cli import options, output

_COUNTS = {
    "kind": "kind",
    "samples": "samples",
    "certified": "certified",
    "undecided": "undecided",
    "misdecided": "misdecided at x",
}
_NOT_DECIDED = ("kind", "undecided", "timeout")


def certify(
    model: options.Model,
    eps: Annotated[list[str] | None, options.eps_option("8 around the attack radius")] = None,
    norm: options.Norm = "linf",
    effort: Annotated[str, typer.Option(help="fast, default or max: which stages run, and how long.")] = "default",
    stages: options.Stages = "",
    engine: Annotated[
        str, typer.Option(help="Linear bounds by native, auto_lirpa, or auto: native, cross-checked by auto_lirpa.")
    ] = "auto",
    deployment: Annotated[
        str, typer.Option(help="float64 or float32: where the network will be evaluated; rounding is covered.")
    ] = "float64",
    gamma: Annotated[float | None, typer.Option(help="Certify at this threshold in place of the detector's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of rows.csv and rows.json. [default: the model's]")] = None,
    ood: options.Ood = None,
    limit: options.Limit = 0,
    precision: Annotated[float, typer.Option(help="Relative precision of the certified radius.")] = 1e-2,
    per_logit: Annotated[bool, typer.Option("--per-logit", help="Radii from bounds of each logit too.")] = False,
    batch_size: options.BatchSize = 64,
    memory: Annotated[str, typer.Option(help="Peak memory to stay within: 500M, 8G. [default: no bound]")] = "",
    time_limit: Annotated[float, typer.Option(help="Seconds a sample may take; 0: no limit.")] = 0.0,
    seed: options.Seed = 0,
    shard: options.Shard = "",
    jobs: options.Jobs = 1,
    save_adversarial: Annotated[
        bool, typer.Option("--save-adversarial", help="Keep the points that attacks found.")
    ] = False,
    save_proofs: Annotated[
        int,
        typer.Option(
            "--save-proofs", metavar="N", help="Keep proofs of the first N samples of each set, for another to check."
        ),
    ] = 0,
    figure: Annotated[bool, typer.Option("--figure/--no-figure", help="Draw curves.png beside the rows.")] = True,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    device: options.Device = "auto",
    force: options.Force = False,
    dry_run: options.DryRun = False,
) -> None:
    """Prove bounds of S and certified radii. Attacks bracket them from the other side."""
    options.share_out(jobs, shard, dry_run, download)
    from dataclasses import replace
    from typing import cast

    from grood_cert import detector
    from grood_cert.ball import DEFAULT_EPS
    from grood_cert.bounds.engines import Engine
    from grood_cert.certification.settings import Settings
    from grood_cert.data.spec import parse_spec
    from grood_cert.networks.graph import Deployment
    from grood_cert.runs import certify as certification
    from grood_cert.runs.proofs import check_samples
    from grood_cert.system.files import check_apart

    loaded = options.at_gamma(detector.load(model, options.device_name(device)), gamma)
    folder = out or model.parent
    part, most = options.shard_of(shard), options.byte_count(memory) if memory else 0
    ball = options.norm_named(norm)
    grid = options.eps_grid(eps)
    settings = Settings(
        eps=grid or DEFAULT_EPS[ball],
        norm=ball,
        effort=effort,
        stages=options.stages_named(stages),
        engine=cast(Engine, engine),
        precision=precision,
        batch_size=batch_size,
        seed=seed,
        time_limit=time_limit,
        deployment=cast(Deployment, deployment),
        per_logit=per_logit,
    )
    settings.check(loaded.shape)
    check_samples(save_proofs)
    check_apart([folder / "curves.png"] if figure else (), [model])
    adversarial = folder.glob("adversarial/*.npz") if save_adversarial else ()
    check_apart(adversarial, (Path(parse_spec(text)[0]) for text in ood or ()))
    experiment = options.image_sets(loaded, ood, data_dir, download)
    sets = [experiment.test, *experiment.ood]
    if not grid:
        settings = replace(settings, eps=certification.automatic_eps(loaded, sets, ball, seed))
    if dry_run:
        output.say(certification.plan(loaded, sets, settings, limit=limit, shard=part, memory=most))
        output.say(options.plan_of_jobs(jobs))
        return
    with output.Bar() as bar:
        rows = certification.run(
            loaded,
            model,
            sets,
            settings,
            folder,
            limit=limit,
            shard=part,
            memory=most,
            save_adversarial=save_adversarial,
            save_proofs=save_proofs,
            force=force,
            reporter=bar,
        )
    if not part.leads:
        return
    print_summary(rows)
    if rows.manifest["cross_check"]:
        typer.echo(certification.agreement(rows.manifest["cross_check"]))
    for message, count in rows.manifest["failures"].items():
        typer.echo(f"not proved because a bound engine failed, {count} balls: {message}", err=True)
    target = part.result(folder / "rows.csv")
    typer.echo(f"wrote {target} and its manifest")
    if rows.manifest.get("save_proofs"):
        typer.echo(certification.proved(rows.manifest))
    if figure and target.name == "rows.csv":
        _draw(rows, target.with_name("curves.png"))


def print_summary(rows: Any) -> None:
    """Print what was decided of each set, and by which stages."""
    from grood_cert.results.columns import NORMS
    from grood_cert.results.summary import RADII, balls_decided

    title = f"medians over the samples that are right at x: radius in {NORMS[rows.norm]}, gamma {rows.gamma:.4f}"
    output.print_across(rows.summary(), "set", _COUNTS | RADII, title)
    decided = balls_decided(rows)
    words = {name: name if name in _NOT_DECIDED else f"decided by {name}" for name in decided[0]}
    balls = f"balls: samples x {len(rows.eps)} eps from {rows.eps[0]:g} to {rows.eps[-1]:g}"
    output.print_across(decided, "set", {name: words[name] for name in words if name != "set"}, balls)


def _draw(rows: Any, path: Path) -> None:
    from grood_cert.errors import InputError
    from grood_cert.results import figures

    try:
        figures.save(figures.robustness({str(rows.manifest["model"]["name"]): rows}), path)
    except InputError as error:  # of what the curves need, something was not certified
        typer.echo(f"no figure: {error}", err=True)
    else:
        typer.echo(f"drew {path}; several models on one axis: grood-cert curve ROWS... --out FIGURE")
