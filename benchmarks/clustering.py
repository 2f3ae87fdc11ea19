"""k-means for GReg+ sampling: ours against scikit-learn's, time and inertia, at the sizes of a training step.

    python benchmarks/clustering.py

Points are unit vectors: rectified Gaussian clusters of 512 features ("apart": spread 0.1, "overlapping": spread 1).
Times are medians of interleaved runs, inertia is the median relative to three runs of scikit-learn's KMeans.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from sklearn.cluster import KMeans, MiniBatchKMeans
from torch import Tensor
from torch.nn import functional

from grood_cert.cli import run_script
from grood_cert.system.files import write_csv
from grood_cert.training.sampling import kmeans

COLUMNS = ("points", "data", "method", "ms", "inertia")
SIZES = (384, 1476, 10_000)
SPREADS = {"apart": 0.1, "overlapping": 1.0}
FEATURES, CLUSTERS, GROUPS = 512, 64, 40


def _sklearn(estimator: type, **options: Any) -> Callable[[Tensor, int], Tensor]:
    def labels(points: Tensor, seed: int) -> Tensor:
        found = estimator(n_clusters=CLUSTERS, random_state=seed, **options).fit_predict(points.numpy())
        return torch.from_numpy(found).long()

    return labels


METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "KMeans x 3": _sklearn(KMeans, n_init=3),
    "KMeans": _sklearn(KMeans, n_init=1),
    "KMeans elkan": _sklearn(KMeans, n_init=1, algorithm="elkan"),
    "MiniBatchKMeans": _sklearn(MiniBatchKMeans, n_init=1),
    "ours": lambda points, seed: kmeans(points, CLUSTERS, torch.Generator().manual_seed(seed)),
}


def points_of(count: int, spread: float) -> Tensor:
    """Unit vectors around `GROUPS` directions."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(GROUPS, FEATURES, generator=generator)
    points = centers[torch.randint(GROUPS, (count,), generator=generator)]
    return functional.normalize(functional.relu(points + spread * torch.randn(count, FEATURES, generator=generator)))


def inertia(points: Tensor, labels: Tensor) -> float:
    """Sum of squared distances to the means of the clusters."""
    sums = torch.zeros(CLUSTERS, points.shape[1]).index_add_(0, labels, points)
    means = sums / torch.bincount(labels, minlength=CLUSTERS).clamp(min=1).unsqueeze(1)
    return float((points - means[labels]).square().sum())


def measure(sizes: tuple[int, ...] = SIZES, repeats: int = 3) -> list[dict[str, Any]]:
    """One record for each size, data and method, with the keys of `COLUMNS`."""
    records = []
    for count in sizes:
        for data, spread in SPREADS.items():
            points = points_of(count, spread)
            seconds, values = defaultdict(list), defaultdict(list)
            for seed in range(repeats):
                for method, labels in METHODS.items():
                    start = time.perf_counter()
                    found = labels(points, seed)
                    seconds[method].append(time.perf_counter() - start)
                    values[method].append(inertia(points, found))
            best = float(np.median(values["KMeans x 3"]))
            records += [
                {
                    "points": count,
                    "data": data,
                    "method": method,
                    "ms": 1000 * float(np.median(seconds[method])),
                    "inertia": float(np.median(values[method])) / best,
                }
                for method in METHODS
            ]
    return records


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Also write the table as CSV.")] = None,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    records = measure(repeats=repeats)
    typer.echo("  ".join(f"{column:>15}" for column in COLUMNS))
    for record in records:
        cells = (f"{value:.3f}" if isinstance(value, float) else value for value in record.values())
        typer.echo("  ".join(f"{cell:>15}" for cell in cells))
    if out:
        write_csv(out, COLUMNS, records)


if __name__ == "__main__":
    run_script(main)
