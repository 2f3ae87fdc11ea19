"""`grood-cert curve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options


def curve(
    rows: Annotated[list[Path], typer.Argument(help="rows.csv of certifications, lipschitz.csv or smoothing.csv.")],
    out: Annotated[Path, typer.Option(help="Figure: .png, .pdf or .svg. Its numbers go beside it, as NAME-curve.csv.")],
    label: Annotated[
        list[str] | None,
        typer.Option(help="Name of each model, or group of seeds, in order. [default: the recipe's]"),
    ] = None,
    each_seed: Annotated[
        bool,
        typer.Option(
            "--each-seed", help="Draw every run by itself, not mean and range over those of other seeds alone."
        ),
    ] = False,
    perturb: Annotated[
        str | None,
        typer.Option(help="Certifications: which side moves in the FPR95 curve: ood, id or both. [default: ood]"),
    ] = None,
    at: Annotated[
        float | None, typer.Option(help="Certifications: eps of the gamma sweep, on the grid. [default: its middle]")
    ] = None,
    panel: Annotated[
        str | None,
        typer.Option(
            help="One panel alone: fpr95, id-radius, ood-radius, sweep; of Lipschitz constants id, ood. [default: all]"
        ),
    ] = None,
    width: Annotated[str, typer.Option(help="single (8 cm) or double (17 cm).")] = "double",
    mean: Annotated[bool, typer.Option("--mean", help="The mean over OOD sets, not a panel for each of them.")] = False,
    cumulative: Annotated[
        bool, typer.Option("--cumulative", help="Share with radius at most eps, not the share that survives eps.")
    ] = False,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Draw models with other eps or samples together; the figure says so.")
    ] = False,
    partial: options.Partial = False,
) -> None:
    """Draw curves of one or more results. Robustness against eps and FPR, Lipschitz constants, smoothed FPR95.

    Runs that differ in the seed of their training alone are drawn together, as their mean and range.
    """
    from typing import cast

    from grood_cert.results import figures
    from grood_cert.results.curves import Perturbed
    from grood_cert.results.figures import Width
    from grood_cert.results.seeds import Runs, grouped
    from grood_cert.results.table import Table, check_target, labelled, manifest_path
    from grood_cert.system.files import check_apart

    figures.check_format(out)
    numbers = out.with_name(f"{out.stem}-curve.csv")
    check_apart([out], (file for path in rows for file in (path, manifest_path(path))))
    check_target(numbers, rows, force=not manifest_path(numbers).exists())  # beside a manifest lies a result
    found = [Table.read(path, partial=partial) for path in rows]
    for path, table in zip(rows, found, strict=True):
        options.warn_unfinished(table, path)
    runs: Runs = (labelled if each_seed else grouped)(found, rows, label or [])
    side = cast(Perturbed | None, perturb)
    figure = figures.draw(
        runs,
        side,
        at,
        panel=panel,
        width=cast(Width, width),
        mean=mean,
        cumulative=cumulative,
        mixed=mixed,
    )
    figures.save(figure, out)
    figures.write_numbers(figures.numbers(runs, side, at, panel=panel, mean=mean), numbers)
    typer.echo(f"wrote {out} and {numbers}")
