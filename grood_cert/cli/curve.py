"""`grood-cert curve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def curve(
    rows: Annotated[list[Path], typer.Argument(help="rows.csv of certifications, lipschitz.csv or smoothing.csv.")],
    out: Annotated[
        Path, typer.Option(help="Figure: .png, .pdf or .svg. A table of its numbers goes beside it (.csv).")
    ],
    label: Annotated[
        list[str] | None, typer.Option(help="Name of each model, in order. [default: the recipe's]")
    ] = None,
    perturb: Annotated[
        str | None,
        typer.Option(help="Certifications: which side moves in the FPR95 curve: ood, id or both. [default: ood]"),
    ] = None,
    at: Annotated[
        float | None, typer.Option(help="Certifications: eps of the gamma sweep, on the grid. [default: its middle]")
    ] = None,
) -> None:
    """Draw curves of one or more results. Robustness against FPR, Lipschitz constants or smoothed FPR95 against eps."""
    from typing import cast

    from grood_cert.errors import InputError
    from grood_cert.lipschitz import analyser as analysis
    from grood_cert.results import figures, smoothed_rows
    from grood_cert.results import rows as results
    from grood_cert.results.curves import Perturbed

    figures.check_format(out)
    table = out.with_suffix(".csv")
    kinds = {next((kind for kind in ("lipschitz", "smoothing") if path.name.startswith(kind)), "rows") for path in rows}
    if len(kinds) > 1:
        raise InputError(f"{' and '.join(sorted(kinds))} make different figures; give files of one kind")
    (kind,) = kinds
    if kind != "rows" and not (perturb is None and at is None):
        raise InputError(f"--perturb and --at are for certifications, not for {kind}; leave them out")
    if kind == "lipschitz":
        analyses = results.labelled([analysis.read(path) for path in rows], rows, label or [])
        figures.save(figures.lipschitz_figure(analyses), out)
        figures.write_lipschitz_table(analyses, table)
    elif kind == "smoothing":
        smoothed = results.labelled([smoothed_rows.read(path) for path in rows], rows, label or [])
        figures.save(figures.smoothing_figure(smoothed), out)
        figures.write_smoothing_table(smoothed, table)
    else:
        certifications = results.labelled([results.read(path) for path in rows], rows, label or [])
        side = cast(Perturbed, perturb or "ood")
        figures.save(figures.robustness_figure(certifications, side, at), out)
        figures.write_table(certifications, side, table)
    typer.echo(f"wrote {out} and {table}")
