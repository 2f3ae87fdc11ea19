"""How tight and how quick each bound is: every method, per logit and joint, on the ID test set of one detector.

    python benchmarks/bounds.py runs/demo/greg/model.pt

Gap ratio: (bound - S) / (attack extreme - S), median over samples; 1 would be exact. Times are medians of
interleaved runs of one batch, so they share the machine's moods.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from grood_cert import attacks, detector
from grood_cert.ball import Ball, Norm
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.engine import METHODS, Method
from grood_cert.bounds.score import score_bounds
from grood_cert.cli import run_script
from grood_cert.data import experiment_of
from grood_cert.system.files import write_csv

COLUMNS = ("norm", "eps", "method", "upper_per_logit", "upper_joint", "lower_per_logit", "lower_joint", "ms_per_sample")
EPS: dict[Norm, tuple[float, ...]] = {"linf": (0.01, 0.03, 0.06), "l2": (0.1, 0.2)}


def measure(
    model: Path,
    samples: int = 64,
    repeats: int = 3,
    methods: Sequence[Method] = tuple(METHODS),
) -> list[dict[str, Any]]:
    """One record for each norm, eps and method, with the keys of `COLUMNS`."""
    loaded = detector.load(model)
    images = experiment_of(loaded.origin.recipe).test.images[:samples].double()
    score = loaded.scores(images)
    networks = {method: LirpaNetwork(loaded.network, loaded.shape, method) for method in methods}
    records = []
    for norm, values in EPS.items():
        for eps in values:
            ball = Ball(images, torch.full_like(score, eps), norm)
            (seen,) = attacks.extremes(loaded.network, [ball], torch.Generator().manual_seed(0))
            rise, fall = seen.maximum - score, score - seen.minimum
            seconds = defaultdict(list)
            for _ in range(repeats):
                for method, bounded in networks.items():
                    start = time.perf_counter()
                    bound = score_bounds(bounded, ball)
                    seconds[method].append(time.perf_counter() - start)
                    gaps = {
                        "upper_per_logit": (bound.upper_per_logit - score) / rise,
                        "upper_joint": (bound.upper - score) / rise,
                        "lower_per_logit": (score - bound.lower_per_logit) / fall,
                        "lower_joint": (score - bound.lower) / fall,
                    }
                    if len(seconds[method]) == repeats:
                        medians = {name: float(gap.median()) for name, gap in gaps.items()}
                        cost = 1000 * float(np.median(seconds[method])) / len(images)
                        records.append({"norm": norm, "eps": eps, "method": method, **medians, "ms_per_sample": cost})
    return records


def main(
    model: Annotated[Path, typer.Argument(help="Checkpoint written by grood-cert train or demo.")],
    out: Annotated[Path | None, typer.Option(help="Also write the table as CSV.")] = None,
    samples: Annotated[int, typer.Option(help="ID test samples.")] = 64,
) -> None:
    """Print the table."""
    records = measure(model, samples)
    typer.echo("  ".join(f"{column:>15}" for column in COLUMNS))
    for record in records:
        cells = (f"{value:.3f}" if isinstance(value, float) else value for value in record.values())
        typer.echo("  ".join(f"{cell:>15}" for cell in cells))
    if out:
        write_csv(out, COLUMNS, records)


if __name__ == "__main__":
    run_script(main)
