"""From what training penalises to what is proved: slope, margin, radius, FPR95 and accuracy against lambda_grad.

    python analysis/objective_to_radius.py runs/sweep/sweep.csv --out objective.png

draws the figure of a `grood-cert sweep` over objective.lambda_grad again, from its `sweep.csv` alone, which is small enough
to keep: `results/lambda-grad.csv` is that of the documentation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import run_script
from grood_cert.results import figures
from grood_cert.results.sweeps import read_records
from grood_cert.system.files import check_apart


def main(
    records: Annotated[Path, typer.Argument(help="sweep.csv of a sweep over objective.lambda_grad.")],
    out: Annotated[Path, typer.Option(help="Figure: .png, .pdf or .svg.")],
) -> None:
    """Draw slope, margin, radius, FPR95 and accuracy against lambda_grad."""
    check_apart([out], [records])
    figures.save(figures.objective(read_records(records)), out)
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
