"""`grood-cert vnnlib` and `grood-cert verdicts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options


def vnnlib(
    model: options.Model,
    rows: Annotated[Path, typer.Option(help="rows.csv of its certification on l_inf balls.")],
    eps: Annotated[float, typer.Option(help="Radius in pixel units.")],
    out: Annotated[Path, typer.Option(help="Folder of model.onnx, the properties and instances.csv.")],
    method: Annotated[str, typer.Option(help="Bounds of the logits (OOD side): ibp, crown-ibp or crown.")] = "crown",
    ood: options.Ood = None,
    limit: Annotated[int, typer.Option(help="Most instances; 0: all.")] = 0,
    timeout: Annotated[int, typer.Option(help="Seconds for each instance, as written to instances.csv.")] = 300,
    partial: options.Partial = False,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    device: options.Device = "auto",
    force: options.Force = False,
) -> None:
    """Write what is undecided at one eps as ONNX and VNNLIB for a complete verifier."""
    from typing import cast

    from grood_cert import detector
    from grood_cert.bounds.engine import Method, way_of
    from grood_cert.bounds.engines import build
    from grood_cert.results.table import Table, manifest_path
    from grood_cert.runs import vnnlib as properties
    from grood_cert.system.files import check_apart

    way_of(method)
    check_apart((out / name for name in ("instances.csv", properties.INSTANCES)), [rows, manifest_path(rows)])
    read = Table.read(rows, "certification", partial)
    options.warn_unfinished(read, rows)
    properties.undecided(read, eps)
    loaded = detector.load(model, options.device_name(device))
    images = options.image_sets(loaded, ood, data_dir, download)
    sets = [images.test, *images.ood]
    bounded = build("auto", loaded.network, loaded.shape, cast(Method, method)).bounded
    instances = properties.export(
        loaded, model, read, sets, bounded, eps, out, limit=limit, timeout=timeout, force=force
    )
    typer.echo(f"wrote {len(instances)} instances to {out}: model.onnx, *.vnnlib, instances.csv")


def verdicts(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder that grood-cert vnnlib wrote.")],
    results: Annotated[Path, typer.Option(help="CSV of verdicts, or folder of NAME.txt files.")],
    verifier: Annotated[str, typer.Option(help="Name and version of the verifier.")],
    ood: options.Ood = None,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    device: options.Device = "auto",
) -> None:
    """Read a complete verifier's answers into verdicts.csv. Counterexamples are evaluated again."""
    from grood_cert import detector
    from grood_cert.runs.verdicts import write_verdicts

    loaded = detector.load(model, options.device_name(device))
    images = options.image_sets(loaded, ood, data_dir, download)
    sets = [images.test, *images.ood]
    records = write_verdicts(loaded, model, out, sets, results, verifier)
    certified = sum(record["certified_external"] for record in records)
    refuted = sum(record["refuted"] for record in records)
    typer.echo(
        f"{len(records)} instances: {certified} certified by {verifier}, {refuted} refuted by its counterexamples, "
        f"{len(records) - certified - refuted} undecided"
    )
    typer.echo(f"wrote {out / 'verdicts.csv'} and {out / 'verdicts.json'}")
