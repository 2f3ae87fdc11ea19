"""`grood-cert certify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options, output

_COUNTS = {
    "kind": "kind",
    "samples": "samples",
    "certified": "certified",
    "undecided": "undecided",
    "misdecided": "misdecided at x",
}


def certify(
    model: Annotated[Path, typer.Argument(help="Checkpoint written by grood-cert train.")],
    eps: options.Eps = None,
    norm: options.Norm = "linf",
    method: Annotated[str, typer.Option(help="ibp, crown-ibp, crown or alpha-crown.")] = "crown",
    out: Annotated[Path | None, typer.Option(help="Folder of rows.csv and rows.json. [default: the model's]")] = None,
    ood: options.Ood = None,
    limit: options.Limit = 0,
    precision: Annotated[float, typer.Option(help="Relative precision of the certified radius.")] = 1e-3,
    batch_size: options.BatchSize = 64,
    seed: Annotated[int, typer.Option(help="Seed of the attacks and of --limit.")] = 0,
    lipschitz: Annotated[bool, typer.Option("--lipschitz", help="Prove radii from Lipschitz bounds too.")] = False,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    device: options.Device = "auto",
    force: options.Force = False,
) -> None:
    """Prove bounds of S and certified radii. Attacks bracket them from the other side."""
    from typing import cast

    from grood_cert import certification, curves, detector, runs
    from grood_cert.ball import Norm
    from grood_cert.lirpa import Method

    loaded = detector.load(model, options.device_name(device))
    settings = certification.Settings(
        eps=tuple(eps or runs.DEFAULT_EPS.get(norm, ())),
        norm=cast(Norm, norm),
        method=cast(Method, method),
        precision=precision,
        batch_size=batch_size,
        seed=seed,
        lipschitz=lipschitz,
    )
    settings.check(loaded.architecture.shape)
    sets = options.test_sets(loaded, ood, data_dir, download)
    folder = out or model.parent
    with output.Bar() as bar:
        rows = certification.run(
            loaded,
            model,
            sets,
            settings,
            folder,
            limit=limit,
            force=force,
            begin=lambda samples: bar.begin("certifying", samples),
            advance=bar.advance,
        )
    used = rows.manifest["method"]
    title = f"medians over the samples that are right at x: radius in {norm}, {used}"
    output.print_across(curves.radius_summary(rows), "set", _COUNTS | curves.RADII, title)
    for message, count in rows.manifest["failures"].items():
        typer.echo(f"not proved because the bound engine failed, {count} bounds: {message}", err=True)
    typer.echo(f"wrote {folder / 'rows.csv'} and {folder / 'rows.json'}")
