"""What float32 does to the scores of a detector, and what bounds that cover it cost.

    python -m benchmarks.deployment runs/demo/greg/model.pt --limit 200

*Scores.* The float32 network scores images in batches of several sizes, on one thread and on two, with and without
oneDNN. Printed are the largest distance of any score from the float64 one, how many images get different scores from
different runs, and how many of all scores lie outside of the bounds on balls of radius 0 for each deployment (in whose
arithmetic none may: with `float64` bounds the float32 scores show why the deployment has to be named).

*Radii.* Certified l_inf radii by CROWN for each deployment, medians over the images decided rightly.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import typer
from torch import Tensor

from grood_cert import api, data, detector
from grood_cert.ball import Ball
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.score import score_bounds
from grood_cert.detector import Detector, Provenance
from grood_cert.errors import InputError
from grood_cert.networks.capture import capture
from grood_cert.networks.graph import Deployment

_SIZES = (1, 2, 7, 64, 10**6)


def scores(found: Detector, images: Tensor) -> Tensor:
    """Scores of the float32 network, one row a way of running it."""
    network, threads = found.network.float(), torch.get_num_threads()
    rows = []
    try:
        for size, count, fast in itertools.product(_SIZES, (1, 2), (True, False)):
            torch.set_num_threads(count)
            with torch.no_grad(), torch.backends.mkldnn.flags(enabled=fast):
                parts = [found.score.value(network(part)) for part in images.float().split(size)]
            rows.append(torch.cat(parts).double())
    finally:
        torch.set_num_threads(threads)
        found.network.double()
    return torch.stack(rows)


def main(
    model: Annotated[Path, typer.Argument(help="Checkpoint with a recipe.")],
    limit: Annotated[int, typer.Option(help="Images of each set.")] = 200,
) -> None:
    """Print both tables."""
    found = detector.load(model, "cpu")
    if not isinstance(found.provenance, Provenance):
        raise InputError(f"{model} holds no recipe, so its images are unknown")
    sets = data.experiment_of(found.provenance.recipe)
    graph = capture(found.network, found.shape)
    kinds: tuple[Deployment, ...] = get_args(Deployment)
    print("| set | images | largest error | differ between runs | outside float64 bounds | outside float32 bounds |")
    print("|---|---|---|---|---|---|")
    for images in (sets.test, *sets.ood):
        pixels = images.images[:limit].double()
        exact, runs = found.scores(pixels), scores(found, pixels)
        ball = Ball(pixels, torch.zeros(len(pixels), dtype=torch.float64), "linf")
        outside = []
        for kind in kinds:
            bounded = NativeNetwork(found.network, found.shape, "crown", graph=graph.deployed(kind))
            bounds = score_bounds(bounded, ball, score=found.score)
            outside.append(int((~((bounds.lower <= runs) & (runs <= bounds.upper))).sum()))
        error, differ = float((runs - exact).abs().max()), int((runs != runs[0]).any(0).sum())
        cells = [images.name, len(pixels), f"{error:.1e}", f"{differ / len(pixels):.0%}"]
        print(f"| {' | '.join(map(str, cells))} | {' | '.join(f'{part} of {runs.numel()}' for part in outside)} |")
    print("\n| set | images | " + " | ".join(f"median radius, {kind}" for kind in kinds) + " |\n|---|---|---|---|")
    for images in (sets.test, *sets.ood):
        pixels = images.images[:limit].double()
        truth: Literal["id", "ood"] = "id" if images.kind == "id" else "ood"
        radii = [api.certify(found, pixels, 0.01, effort="fast", truth=truth, deployment=kind).radius for kind in kinds]
        right = torch.stack(radii).amax(0) > 0
        cells = [images.name, int(right.sum()), *(f"{float(part[right].median()):.6f}" for part in radii)]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    typer.run(main)
