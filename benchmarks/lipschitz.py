"""How tight the Lipschitz bounds are and what they cost, on digit nets trained in four ways.

    python benchmarks/lipschitz.py --out runs/lipschitz-benchmark

Ratios are bound / ascended maximum, medians over samples: 1 is exact, and since the ascended maximum is itself a lower
estimate, they overstate the slack. `cost` is the time of Jacobian-CROWN over that of the CROWN bounds it stands on,
medians of interleaved runs of one batch.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from grood_cert import detector
from grood_cert.ball import Ball, Norm
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.hidden import engine_preactivations, logit_rows
from grood_cert.cli import run_script
from grood_cert.data import experiment_of
from grood_cert.detector import Detector
from grood_cert.errors import RunError
from grood_cert.lipschitz import analyser as analysis
from grood_cert.lipschitz.jacobian_crown import jacobian_crown
from grood_cert.networks.capture import capture
from grood_cert.recipe import Recipe
from grood_cert.runs import analyse
from grood_cert.sections import NetworkSection
from grood_cert.system.files import write_csv
from grood_cert.training import run as training

NETWORKS = {
    "MLP-3": NetworkSection("mlp", width=128, hidden_layers=2),
    "MLP-4": NetworkSection("mlp", width=128, hidden_layers=3),
    "conv-small": NetworkSection("conv-small"),
    "resnet-small": NetworkSection("resnet-small"),
}
TRAINING: dict[str, dict[str, Any]] = {
    "plain": {"lambda_S": 0.0, "lambda_grad": 0.0},
    "energy": {"lambda_grad": 0.0},
    "greg": {},
    "interval": {"slope": "interval", "slope_eps": 0.05, "lambda_grad": 0.02},
}
EPS: dict[Norm, tuple[float, ...]] = {"linf": (0.01, 0.03), "l2": (0.05, 0.2)}
METHODS = ("jacobian_crown", "jacobian_crown_corners", "interval", "hull", "product_active", "product")
COLUMNS = ("network", "training", "accuracy", "kind", "norm", "eps", "ascended_estimate", "auto", *METHODS, "cost")


def trained(recipe: Recipe, folder: Path) -> Detector:
    """The detector of a recipe, from the folder if it is there already."""
    if (folder / "model.pt").exists():
        return detector.load(folder / "model.pt")
    return training.run(recipe, folder)


def cost(loaded: Detector, images: torch.Tensor, norm: Norm, eps: float, repeats: int) -> float:
    """Time of Jacobian-CROWN (pre-activation intersection included) over that of auto_LiRPA's CROWN bounds."""
    shape = loaded.shape
    bounded, graph = LirpaNetwork(loaded.network, shape, "crown"), capture(loaded.network, shape)
    ball = Ball(images, torch.full((len(images),), eps, dtype=torch.float64), norm)
    rows = logit_rows(graph.classes).expand(len(images), -1, -1)
    base, whole = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        relaxation = bounded.relax(ball)
        relaxation.preactivations(), relaxation.rows(rows)
        base.append(time.perf_counter() - start)
        start = time.perf_counter()
        jacobian_crown(graph, engine_preactivations(bounded, graph, ball), norm)
        whole.append(time.perf_counter() - start)
    return float((np.median(whole) - np.median(base)) / np.median(base))


def measure(
    name: str, how: str, folder: Path, recipe: Recipe, samples: int, repeats: int = 3, batch: int = 64
) -> list[dict[str, Any]]:
    """One record for each kind, norm and eps, with the keys of `COLUMNS`."""
    chosen = replace(
        recipe,
        name=f"{name}-{how}",
        network=NETWORKS[name],
        objective=replace(recipe.objective, **TRAINING[how]),
        data=replace(recipe.data, ood=("digits:8,9",)),
    )
    loaded = trained(chosen, folder)
    experiment = experiment_of(chosen)
    sets = [experiment.test, *experiment.ood]
    records = []
    for norm, values in EPS.items():
        settings = analysis.AnalysisSettings(values, norm, clever_batches=0, samples=64, ascents=3)
        result = analyse.run(loaded, folder / "model.pt", sets, settings, folder / norm, limit=samples, force=True)
        for kind in ("id", "ood"):
            for eps in values:
                chosen = result.of_kind(kind) & (result["eps"] == eps)
                reference = result["ascended_estimate"][chosen]
                record = {"network": name, "training": how, "accuracy": loaded.origin.metrics["accuracy"], "kind": kind}
                record |= {"norm": norm, "eps": eps, "ascended_estimate": float(np.median(reference))}
                for method in ("auto", *METHODS):
                    column = "bound" if method == "auto" else f"bound_{method}"
                    record[method] = float(np.median(result[column][chosen] / reference))
                images = sets[0].images[:batch].double()
                record["cost"] = cost(loaded, images, norm, eps, repeats) if kind == "id" else None
                records.append(record)
    return records


def main(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints, rows and lipschitz-benchmark.csv.")],
    samples: Annotated[int, typer.Option(help="Test samples of each kind.")] = 32,
) -> None:
    """Train what is missing, measure, print the table as Markdown."""
    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    typer.echo("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for name in NETWORKS:
        for how in TRAINING:
            try:
                measured = measure(name, how, out / name / how, Recipe(), samples)
            except RunError as error:
                typer.echo(f"{name}, {how}: {error}", err=True)
                continue
            for record in measured:
                records.append(record)
                cells = (
                    "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
                    for value in record.values()
                )
                typer.echo("| " + " | ".join(cells) + " |")
    write_csv(out / "lipschitz-benchmark.csv", COLUMNS, records)


if __name__ == "__main__":
    run_script(main)
