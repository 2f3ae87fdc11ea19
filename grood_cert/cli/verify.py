"""`grood-cert verify`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options, output

_COLUMNS = {
    "claim": "checked",
    "checked": "times",
    "contradicted": "contradicted",
    "repeated": "found again",
    "note": "",
}


def verify(
    rows: Annotated[Path, typer.Argument(help="Rows of a certification, of smoothing or of a Lipschitz analysis.")],
    model: options.Model,
    every: Annotated[
        int, typer.Option(help="Try every k-th sample of a set. [default: so that about 20 are tried]")
    ] = 0,
    limit: Annotated[int, typer.Option(help="Most samples of each set to try; 0: no limit.")] = 0,
    ood: options.Ood = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of what is tried, and of all attempts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the counterexample, if there is one.")] = None,
    partial: options.Partial = False,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    device: options.Device = "auto",
) -> None:
    """Check a finished run again: hashes, scores, the other bound engine, fresh attacks, fresh noise.

    Exits 3 if anything contradicts the rows.
    """
    from grood_cert import detector
    from grood_cert.results.table import Table
    from grood_cert.runs.saving import save_evidence
    from grood_cert.runs.verification import run as verification
    from grood_cert.system.files import check_writable

    if out:
        check_writable(out)
    table = Table.read(rows, partial=partial)
    options.warn_unfinished(table, rows)
    loaded = detector.load(model, options.device_name(device))
    verification.check_model(table, loaded, model)
    images = options.image_sets(loaded, ood or verification.specs(table, loaded), data_dir, download)
    sets = [images.calibration] if table.kind == "smoothing-calibration" else [images.test, *images.ood]
    beside = rows.with_name("smoothing-calibration.csv")
    calibration = Table.read(beside, "smoothing-calibration") if table.kind == "smoothing" and beside.exists() else None
    with output.Bar() as bar:
        found = verification.verify(
            table,
            loaded,
            model,
            sets,
            calibration=calibration,
            every=every,
            limit=limit,
            seed=seed,
            reporter=bar,
        )
    checks = [dataclasses.asdict(check) for check in found.checks.values()]
    output.print_down(checks, _COLUMNS, f"{rows}: {table.kind}, {table.progress} samples")
    if found.contradictions:
        if out:
            save_evidence(found.contradictions[0], out)
        raise found.contradictions[0]
    typer.echo("nothing contradicts these rows; what was not found again has no further support")
