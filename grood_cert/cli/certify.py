"""`grood-cert certify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from grood_cert.cli import options, output

if TYPE_CHECKING:
    from grood_cert.data import Experiment
    from grood_cert.detector import Detector
    from grood_cert.runs import saving as runs

_COUNTS = {
    "kind": "kind",
    "samples": "samples",
    "certified": "certified",
    "undecided": "undecided",
    "misdecided": "misdecided at x",
}
_NOT_DECIDED = ("kind", "undecided", "timeout")
_SMOOTHED = {
    "kind": "kind",
    "samples": "samples",
    "certified": "certified",
    "abstained": "abstained",
    "misdecided": "misdecided",
    "radius_smoothed": "radius, median",
}


def certify(
    model: Annotated[Path, typer.Argument(help="Checkpoint written by grood-cert train.")],
    eps: Annotated[
        list[float] | None,
        typer.Option(help="Radius in pixel units, ascending (repeatable). [default: 8 around the attack radius]"),
    ] = None,
    norm: Annotated[str | None, typer.Option(help="Norm of the ball: linf, l2 or l1. [default: linf]")] = None,
    effort: Annotated[str, typer.Option(help="fast, default or max: which stages run, and how long.")] = "default",
    stages: Annotated[
        str,
        typer.Option(
            help="Stages in place of the effort's, comma-separated: ibp, crown-ibp, crown, lipschitz, alpha-crown, "
            "branch-and-bound."
        ),
    ] = "",
    engine: Annotated[str, typer.Option(help="Linear bounds by auto_lirpa or native (own, faster).")] = "auto_lirpa",
    gamma: Annotated[
        float | None, typer.Option(help="Another threshold; rows that are there already are looked up, not redone.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of rows.csv and rows.json. [default: the model's]")] = None,
    ood: options.Ood = None,
    limit: options.Limit = 0,
    precision: Annotated[float, typer.Option(help="Relative precision of the certified radius.")] = 1e-2,
    per_logit: Annotated[bool, typer.Option("--per-logit", help="Radii from bounds of each logit too.")] = False,
    batch_size: options.BatchSize = 64,
    memory: Annotated[str, typer.Option(help="Peak memory to stay within: 500M, 8G. [default: no bound]")] = "",
    time_limit: Annotated[float, typer.Option(help="Seconds a sample may take; 0: no limit.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the attacks, of noise and of --limit.")] = 0,
    shard: options.Shard = "",
    save_adversarial: Annotated[
        bool, typer.Option("--save-adversarial", help="Keep the points that attacks found.")
    ] = False,
    method: Annotated[str, typer.Option(help="bounds (proofs) or smoothing (l2, with probability).")] = "bounds",
    sigma: Annotated[float, typer.Option(help="Smoothing: standard deviation of the noise, pixel units.")] = 0.25,
    n: Annotated[int, typer.Option(help="Smoothing: draws of noise for each sample.")] = 1000,
    alpha: Annotated[float, typer.Option(help="Smoothing: probability that a row claims too much.")] = 1e-3,
    dtype: Annotated[str, typer.Option(help="Smoothing: float32, bfloat16 or float64 network.")] = "float32",
    calibration_limit: Annotated[int, typer.Option(help="Smoothing: most calibration images; 0: all.")] = 0,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    device: options.Device = "auto",
    force: options.Force = False,
) -> None:
    """Prove bounds of S and certified radii. Attacks bracket them from the other side."""
    import math
    from dataclasses import replace

    from grood_cert import detector
    from grood_cert.ball import DEFAULT_EPS, NORMS, Norm
    from grood_cert.certification import smoothing
    from grood_cert.certification.cascade import Engine, Settings, Stage
    from grood_cert.errors import InputError
    from grood_cert.runs import certify as certification

    if method not in ("bounds", "smoothing"):
        raise InputError(f"unknown method {method!r}; use bounds or smoothing (--stages chooses among bounds)")
    if norm is not None and norm not in NORMS:
        raise InputError(f"unknown norm {norm!r}; use one of {', '.join(NORMS)}")
    if method == "smoothing" and norm not in (None, "l2"):
        raise InputError(f"smoothing certifies l2 balls, not {norm}; leave --norm out")
    if gamma is not None and not math.isfinite(gamma):
        raise InputError(f"gamma must be a finite number, got {gamma!r}")
    loaded = detector.load(model, options.device_name(device))
    folder = out or model.parent
    part = options.shard_of(shard)
    most = options.byte_count(memory) if memory else 0
    if method == "smoothing":
        if gamma is not None:
            raise InputError("smoothing calibrates gamma on the smoothed score; leave --gamma out")
        smoothed = smoothing.SmoothingSettings(
            sigma=sigma,
            eps=tuple(eps or smoothing.default_eps(sigma)),
            n=n,
            alpha=alpha,
            dtype=cast(smoothing.Dtype, dtype),
            memory=most or smoothing.DEFAULT_MEMORY,
            calibration_limit=calibration_limit,
            seed=seed,
        )
        smoothed.check(loaded.architecture.shape)
        experiment = options.experiment(loaded, ood, data_dir, download)
        _smooth(loaded, model, experiment, smoothed, folder, limit, part, force)
        return
    if gamma is not None and (folder / "rows.csv").exists() and not force:
        _look_up(folder / "rows.csv", model, gamma)
        return
    ball: Norm = cast(Norm, norm or "linf")
    chosen = cast(tuple[Stage, ...], tuple(name.strip() for name in stages.split(",") if name.strip()))
    settings = Settings(
        eps=tuple(eps or DEFAULT_EPS[ball]),
        norm=ball,
        effort=effort,
        stages=chosen,
        engine=cast(Engine, engine),
        precision=precision,
        batch_size=batch_size,
        seed=seed,
        time_limit=time_limit,
        per_logit=per_logit,
    )
    settings.check(loaded.architecture.shape)
    if gamma is not None:
        loaded = replace(loaded, gamma=gamma)
    experiment = options.experiment(loaded, ood, data_dir, download)
    sets = [experiment.test, *experiment.ood]
    if not eps:
        settings = replace(settings, eps=certification.automatic_eps(loaded, sets, ball, seed))
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
            force=force,
            begin=lambda samples: bar.begin("certifying", samples),
            advance=bar.advance,
            report=bar.print,
        )
    if not part.leads:
        return
    _print(rows)
    for message, count in rows.manifest["failures"].items():
        typer.echo(f"not proved because a bound engine failed, {count} balls: {message}", err=True)
    typer.echo(f"wrote {part.result(folder / 'rows.csv')} and its manifest")


def _print(rows: Any) -> None:
    from grood_cert.results import curves
    from grood_cert.runs import certify as certification

    title = f"medians over the samples that are right at x: radius in {rows.norm}, gamma {rows.gamma:.4f}"
    output.print_across(curves.radius_summary(rows), "set", _COUNTS | curves.RADII, title)
    decided = certification.balls_decided(rows)
    words = {name: name if name in _NOT_DECIDED else f"decided by {name}" for name in decided[0]}
    balls = f"balls: samples x {len(rows.eps)} eps from {rows.eps[0]:g} to {rows.eps[-1]:g}"
    output.print_across(decided, "set", {name: words[name] for name in words if name != "set"}, balls)


def _look_up(path: Path, model: Path, gamma: float) -> None:
    """The rows that are there, read at another threshold."""
    from grood_cert.errors import InputError
    from grood_cert.results import rows, thresholds
    from grood_cert.system.files import sha256

    found = rows.read(path)
    if found.manifest["model"]["sha256"] != sha256(model):
        raise InputError(f"{path} is of another model; choose another --out, or add --force to certify anew")
    target = path.with_name(f"rows-gamma{gamma:g}.csv")
    looked_up = thresholds.at_gamma(found, gamma)
    rows.write(looked_up, target)
    _print(looked_up)
    typer.echo(f"wrote {target}, looked up in {path}: nothing was verified again")


def _smooth(
    loaded: Detector,
    model: Path,
    experiment: Experiment,
    settings: Any,
    folder: Path,
    limit: int,
    part: runs.Shard,
    force: bool,
) -> None:
    from grood_cert.results import smoothed_rows
    from grood_cert.runs import smooth

    with output.Bar() as bar:
        rows = smooth.run(
            loaded,
            model,
            experiment.calibration,
            [experiment.test, *experiment.ood],
            settings,
            folder,
            limit=limit,
            shard=part,
            force=force,
            begin=bar.begin,
            advance=bar.advance,
            report=bar.print,
        )
    if not part.leads:
        return
    title = f"smoothed detector, sigma {settings.sigma:g}: each row holds with probability {1 - settings.alpha:g}"
    output.print_across(smoothed_rows.summary(rows), "set", _SMOOTHED, title)
    output.print_across(smoothed_rows.detection(rows), "set", smoothed_rows.DETECTION, "clean, base and smoothed")
    typer.echo(f"wrote {part.result(folder / 'smoothing.csv')}")
