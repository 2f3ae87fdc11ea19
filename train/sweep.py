"""Train one recipe over several lambda_grad and analyse the local Lipschitz constant of each detector.

    python train/sweep.py train/digits-greg.toml --out runs/sweep

What is there already is not repeated; what is unfinished goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import torch
import typer

from grood_cert import detector, recipe
from grood_cert.ball import Norm
from grood_cert.cli import run_script
from grood_cert.data import experiment_of
from grood_cert.lipschitz import analyser as analysis
from grood_cert.runs import analyse
from grood_cert.training import run as training


def main(
    source: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file.")],
    out: Annotated[Path, typer.Option(help="Folder; one sub-folder for each value.")],
    values: Annotated[list[float] | None, typer.Option("--lambda-grad", help="Value (repeatable).")] = None,
    eps: Annotated[list[float] | None, typer.Option(help="Radius of the balls (repeatable).")] = None,
    norm: Annotated[str, typer.Option(help="Norm of the balls.")] = "linf",
    limit: Annotated[int, typer.Option(help="Test samples of each set.")] = 32,
) -> None:
    """Train and analyse each value."""
    torch.set_num_threads(1)
    settings = analysis.AnalysisSettings(tuple(eps or (0.01, 0.03)), cast(Norm, norm), clever_batches=0, samples=128)
    for value in values or (0.0, 0.01, 0.03, 0.1, 0.3, 1.0):
        chosen = recipe.load(source, [f"objective.lambda_grad={value!r}", f"name=lambda_grad={value:g}"])
        folder = out / f"{value:g}"
        model = folder / "model.pt"
        unfinished = (folder / "last.pt").exists()
        done = model.exists() and not unfinished
        trained = detector.load(model) if done else training.run(chosen, folder, resume=unfinished)
        experiment = experiment_of(chosen)
        sets = [experiment.test, *(images for images in experiment.ood if images.kind == "ood")]
        analyse.run(trained, model, sets, settings, folder, limit=limit)
        typer.echo(f"{folder}: accuracy {trained.origin.metrics['accuracy']:.4f}")


if __name__ == "__main__":
    run_script(main)
