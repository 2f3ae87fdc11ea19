"""How far optimised bounds and branch and bound reach: certified radius over attack radius of one detector, l_inf.

    python benchmarks/tightness.py runs/demo/greg/model.pt

For each method the largest share of the attack radius whose ball was proved, by bisection to 2 %; medians over the
samples that are decided rightly, ID and OOD apart. Seconds are CPU time a sample for the whole search; each method
starts from the share that the one before it proved, whose time is not counted again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from grood_cert import attacks, detector
from grood_cert.ball import Ball
from grood_cert.bounds.alpha_crown import optimised_bounds
from grood_cert.bounds.branching import branch_and_bound
from grood_cert.bounds.engine import Side
from grood_cert.bounds.hidden import preactivations
from grood_cert.cli import run_script
from grood_cert.data import experiment_of
from grood_cert.networks.capture import capture
from grood_cert.networks.graph import Graph
from grood_cert.system.files import write_csv

COLUMNS = ("kind", "method", "samples", "median", "smallest", "largest", "seconds_per_sample")
NODES = (32, 1000)
_PRECISION = 0.02

Proves = Callable[[Ball], Tensor]


def methods(graph: Graph, gamma: float, side: Side, nodes: tuple[int, ...] = NODES) -> dict[str, Proves]:
    """What each method proves about a batch of balls, from quick to slow."""

    def bounded(steps: int) -> Proves:
        def proves(ball: Ball) -> Tensor:
            bound = optimised_bounds(graph, ball, side, preactivations(graph, ball), steps)
            return bound < gamma if side == "upper" else bound > gamma

        return proves

    def branched(budget: int) -> Proves:
        return lambda ball: branch_and_bound(graph, ball, gamma, side, budget).decided

    found = {"crown joint": bounded(0), "optimised": bounded(20)}
    return found | {f"branch and bound {budget}": branched(budget) for budget in nodes}


def proved_share(proves: Proves, images: Tensor, radius: Tensor, low: Tensor) -> Tensor:
    """Largest share of each radius found proved, bisected between one that is (or 0) and 1."""
    low, high = low.clone(), torch.ones_like(low)
    while bool((active := high - low > _PRECISION).any()):
        index = active.nonzero().squeeze(1)
        middle = (low[index] + high[index]) / 2
        proved = proves(Ball(images[index], middle * radius[index], "linf"))
        low[index[proved]], high[index[~proved]] = middle[proved], middle[~proved]
    return low


def measure(model: Path, samples: int = 20, nodes: tuple[int, ...] = NODES) -> list[dict[str, Any]]:
    """One record for each kind and method, with the keys of `COLUMNS`."""
    loaded = detector.load(model)
    experiment = experiment_of(loaded.origin.recipe)
    graph = capture(loaded.network, loaded.shape)
    share = -(-samples // len(experiment.ood))
    kinds: dict[str, tuple[Side, Tensor]] = {
        "id": ("upper", experiment.test.images[:samples]),
        "ood": ("lower", torch.cat([images.images[:share] for images in experiment.ood])[:samples]),
    }
    records = []
    for kind, (side, images) in kinds.items():
        images = images.double()
        score = loaded.scores(images)
        images = images[score <= loaded.gamma if side == "upper" else score > loaded.gamma]
        generator = torch.Generator().manual_seed(0)
        radius = attacks.minimum_norm(loaded.network, images, loaded.gamma, "linf", generator).radius
        images, radius = images[torch.isfinite(radius)], radius[torch.isfinite(radius)]
        low = torch.zeros_like(radius)
        for name, proves in methods(graph, loaded.gamma, side, nodes).items():
            start = time.process_time()
            low = proved_share(proves, images, radius, low)
            cost = (time.process_time() - start) / len(images)
            spread = float(low.median()), float(low.min()), float(low.max())
            records.append(dict(zip(COLUMNS, (kind, name, len(images), *spread, cost), strict=True)))
    return records


def main(
    model: Annotated[Path, typer.Argument(help="Checkpoint written by grood-cert train or demo.")],
    out: Annotated[Path | None, typer.Option(help="Also write the table as CSV.")] = None,
    samples: Annotated[int, typer.Option(help="Samples of each kind.")] = 20,
    nodes: Annotated[list[int] | None, typer.Option(help="Domains a ball may be cut into; repeat for more.")] = None,
) -> None:
    """Print the table."""
    records = measure(model, samples, tuple(nodes or NODES))
    typer.echo("  ".join(f"{column:>21}" for column in COLUMNS))
    for record in records:
        cells = (f"{value:.3f}" if isinstance(value, float) else value for value in record.values())
        typer.echo("  ".join(f"{cell:>21}" for cell in cells))
    if out:
        write_csv(out, COLUMNS, records)


if __name__ == "__main__":
    run_script(main)
