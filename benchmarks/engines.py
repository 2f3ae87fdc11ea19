"""The native bound engine against auto_LiRPA: time for a batch, and how far their bounds lie apart.

    python benchmarks/engines.py
    python benchmarks/engines.py runs/demo/greg/model.pt

One call bounds the logits and their mean by CROWN, hidden layers included. Times are medians of interleaved runs, so
both engines share the machine's moods; set OMP_NUM_THREADS=1 for one thread. Without checkpoints the networks have
random weights and the images are noise: most units are unstable there, which is the hardest case for the native engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from grood_cert import detector
from grood_cert.ball import Ball, Norm
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.cli import run_script
from grood_cert.data import experiment_of
from grood_cert.networks import architectures
from grood_cert.system.files import write_csv

COLUMNS = ("network", "norm", "eps", "batch", "auto_lirpa_ms", "native_ms", "ratio", "difference")
EPS: dict[Norm, float] = {"linf": 0.01, "l2": 0.1, "l1": 0.3}
NETWORKS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "mlp 8x8": ("mlp", (1, 8, 8)),
    "conv-small 8x8": ("conv-small", (1, 8, 8)),
    "resnet-small 8x8": ("resnet-small", (1, 8, 8)),
    "conv-small 32x32": ("conv-small", (3, 32, 32)),
}


def measure(network: nn.Module, images: Tensor, norm: Norm, eps: float, repeats: int = 5) -> dict[str, Any]:
    """Time both engines on one batch of balls.

    Args:
        network: The model.
        images: Centres, shape (B, C, H, W), float64.
        norm: Norm of the balls.
        eps: Their radius.
        repeats: Runs of each engine.

    Returns:
        The keys of `COLUMNS` but for the network's name. Times are milliseconds a sample; `difference` is the largest
        distance of two bounds relative to the width of the interval.
    """
    ball = Ball(images, torch.full((len(images),), eps, dtype=torch.float64), norm)
    shape = tuple(images.shape[1:])
    native = NativeNetwork(network, shape, "crown")
    engines: tuple[LirpaNetwork | NativeNetwork, ...] = (LirpaNetwork(network, shape, "crown"), native)
    classes = native.graph.classes
    rows = torch.cat([torch.eye(classes), torch.full((1, classes), 1 / classes)]).expand(len(images), -1, -1)
    seconds: list[list[float]] = [[], []]
    bounds: list[tuple[Tensor, Tensor]] = []
    for _ in range(repeats):
        bounds = []
        for engine, spent in zip(engines, seconds, strict=True):
            start = time.perf_counter()
            bounds.append(engine.relax(ball).rows(rows))
            spent.append(time.perf_counter() - start)
    (lower, upper), (other_lower, other_upper) = bounds
    apart = torch.maximum((lower - other_lower).abs(), (upper - other_upper).abs()) / (upper - lower)
    milliseconds = [1000 * float(np.median(spent)) / len(images) for spent in seconds]
    return {
        "norm": norm,
        "eps": eps,
        "batch": len(images),
        "auto_lirpa_ms": milliseconds[0],
        "native_ms": milliseconds[1],
        "ratio": milliseconds[0] / milliseconds[1],
        "difference": float(apart.max()),
    }


def cases(models: Sequence[Path], batch: int) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, network and images of each checkpoint, or of `NETWORKS` if there is none."""
    for path in models:
        loaded = detector.load(path)
        yield str(path), loaded.network, experiment_of(loaded.origin.recipe).test.images[:batch].double()
    for name, (kind, shape) in {} if models else NETWORKS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = architectures.build(kind, shape, 10, [0.5] * shape[0], [0.25] * shape[0]).eval()
            yield name, network, torch.rand(batch, *shape, dtype=torch.float64)


def main(
    models: Annotated[
        list[Path] | None, typer.Argument(help="Checkpoints written by grood-cert train or demo.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the table as CSV.")] = None,
    batch: Annotated[list[int], typer.Option(help="Samples in a batch; may be given more than once.")] = [16],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="Runs of each engine.")] = 5,
) -> None:
    """Print the table."""
    typer.echo("  ".join(f"{column:>16}" for column in COLUMNS))
    records = []
    for size in batch:
        for name, network, images in cases(models or [], size):
            for norm, eps in EPS.items():
                record = {"network": name, **measure(network, images, norm, eps, repeats)}
                cells = (f"{value:.3g}" if isinstance(value, float) else value for value in record.values())
                typer.echo("  ".join(f"{cell:>16}" for cell in cells))
                records.append(record)
    if out:
        write_csv(out, COLUMNS, records)


if __name__ == "__main__":
    run_script(main)
