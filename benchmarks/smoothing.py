"""How often the bounds of median smoothing miss, against what they claim, and what smoothing large networks costs.

    python benchmarks/smoothing.py --n 200

Coverage is measured on a score whose smoothed median is known: one linear logit, where S is Gaussian under noise and the
worst perturbation of length eps moves the median by exactly eps ||w||. Cost is that of untrained networks on 32x32
images; training changes nothing about it.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from scipy.stats import binom, norm
from torch import nn

from grood_cert.certification.smoothing import (
    DEFAULT_MEMORY,
    layer_bytes,
    order_statistics,
    smoothed_bounds,
    smoothed_scores,
)
from grood_cert.cli import run_script
from grood_cert.detector import check_device
from grood_cert.networks import architectures

COVERAGE_COLUMNS = ("eps/sigma", "rank", "level", "misses, exact", "misses above", "misses below")
COST_COLUMNS = ("network", "parameters", "device", "dtype", "batch", "images/s", "s/sample")
SHIFTS = (0.0, 0.25, 0.5, 1.0, 1.5)
LARGE = ("resnet18", "wrn-40-2", "densenet-bc-100")
SHAPE = (3, 32, 32)


def coverage(n: int, alpha: float, repetitions: int) -> list[dict[str, Any]]:
    """One record for each eps / sigma at which n draws bound anything, each bound at level alpha / 2."""
    sigma, width = 0.25, 4.0
    layer = nn.Linear(1, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.fill_(width)
        layer.bias.zero_()
    center = torch.zeros(1, dtype=torch.float64)  # S(x) = 0
    draws = smoothed_scores(layer, center, sigma, n * repetitions, torch.Generator().manual_seed(0), 2**16)
    records = []
    for shift in SHIFTS:
        _, rank = order_statistics(n, 0.5, shift, alpha / 2)
        if rank is None:
            continue
        lower, upper = smoothed_bounds(draws.reshape(repetitions, n), (shift * sigma,), sigma, alpha)
        moved = shift * sigma * width
        shares = (binom.sf(rank - 1, n, norm.cdf(shift)), (upper < moved).mean(), (lower > -moved).mean())
        values = (shift, rank, alpha / 2, *map(float, shares))
        records.append(dict(zip(COVERAGE_COLUMNS, values, strict=True)))
    return records


def cost(name: str, n: int, device: str, dtype: torch.dtype, memory: int, **options: int) -> dict[str, Any]:
    """Time of n draws for one image, after a first batch that is not counted."""
    network = architectures.build(name, SHAPE, 10, [0.5] * 3, [0.25] * 3, **options).to(device, dtype).eval()
    image = torch.full(SHAPE, 0.5, dtype=dtype, device=device)
    batch = min(n, max(1, memory // layer_bytes(network, image)))
    generator = torch.Generator(device).manual_seed(0)
    smoothed_scores(network, image, 0.25, batch, generator, batch)
    start = time.perf_counter()
    smoothed_scores(network, image, 0.25, n, generator, batch)  # ends with a copy to the CPU, so nothing is pending
    seconds = time.perf_counter() - start
    weights = sum(weight.numel() for weight in network.parameters())
    values = (name, weights, device, str(dtype).removeprefix("torch."), batch, n / seconds, seconds)
    return dict(zip(COST_COLUMNS, values, strict=True))


def _print(records: list[dict[str, Any]]) -> None:
    typer.echo("| " + " | ".join(records[0]) + " |\n|" + "---|" * len(records[0]))
    for record in records:
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in record.values())
        typer.echo("| " + " | ".join(cells) + " |")


def main(
    n: Annotated[int, typer.Option(help="Draws for each sample.")] = 100,
    alpha: Annotated[float, typer.Option(help="Largest probability of a false statement.")] = 0.05,
    repetitions: Annotated[int, typer.Option(help="Rows of n draws in the coverage table.")] = 10_000,
    device: Annotated[str, typer.Option(help="Where the networks run.")] = "cpu",
    memory: Annotated[int, typer.Option(help="Bytes of the layers in a batch of noisy images.")] = DEFAULT_MEMORY,
) -> None:
    """Measure coverage and cost, print both tables as Markdown."""
    check_device(device)
    _print(coverage(n, alpha, repetitions))
    typer.echo()
    large = [name for name in LARGE if name in architectures.NETWORKS]
    dtypes = (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16)
    _print([cost(name, n, device, dtype, memory) for name in large for dtype in dtypes])


if __name__ == "__main__":
    run_script(main)
