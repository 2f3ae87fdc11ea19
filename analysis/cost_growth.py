"""How the cost of a bound and of a certified radius grows: with samples, width, depth, eps and logits, for both engines.

    python analysis/cost_growth.py --out docs/cost-growth.png

Solid: CROWN bounds of S on one ball of radius eps. Dashed: the radius search of `grood_cert.certification.search` where the margin is
the deviation of that bound, so that eps is what it has to find, starting from 1.4 eps. The base case is conv-small of
its default width with 10 logits on 8x8 images, eps = 0.02, 16 samples in a batch; each panel changes one thing, the one
of depth takes MLPs 128 wide. Weights and images are random: the share of unstable ReLUs, and with it the cost of the
native engine, is then larger than on trained networks.

Seconds are CPU seconds of one thread, medians of interleaved runs; a busy machine changes them little.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.engine import BoundedNetwork
from grood_cert.bounds.score import score_bounds
from grood_cert.certification.search import search_radius
from grood_cert.cli import run_script
from grood_cert.networks import architectures
from grood_cert.results import figures
from grood_cert.results.figures import style
from grood_cert.scores import energy
from grood_cert.system.files import write_csv

COLUMNS = ("panel", "value", "engine", "samples", "ball_seconds", "radius_seconds", "radius_to_eps", "evaluations")
ENGINES = {"auto_lirpa": ("auto_LiRPA", "#D55E00", "o"), "native": ("native", "#0072B2", "s")}
_TIMES = {"ball_seconds": ("ball", "-"), "radius_seconds": ("radius", "--")}
SHAPE = (1, 8, 8)
PRECISION = 1e-2


@dataclass(frozen=True)
class Case:
    """One point of one panel.

    Attributes:
        samples: Samples in a batch.
        network: Name in `grood_cert.networks.architectures`.
        width: Its width.
        depth: Hidden layers; only an MLP has them.
        eps: Radius of the l_inf balls.
        classes: Logits.
    """

    samples: int = 16
    network: str = "conv-small"
    width: int = 8
    depth: int = 2
    eps: float = 0.02
    classes: int = 10


_BASE, _MLP = Case(), Case(network="mlp", width=128)
PANELS: dict[str, dict[float, Case]] = {
    "samples": {value: replace(_BASE, samples=value) for value in (1, 4, 16, 64)},
    "width": {value: replace(_BASE, width=value) for value in (2, 4, 8, 16)},
    "hidden layers (MLP)": {value: replace(_MLP, depth=value) for value in (1, 2, 3, 4, 6)},
    "eps": {value: replace(_BASE, eps=value) for value in (0.002, 0.01, 0.05, 0.2)},
    "logits": {value: replace(_BASE, classes=value) for value in (2, 10, 50, 200)},
}


def searched(bounded: BoundedNetwork, images: Tensor, margin: Tensor, eps: float) -> tuple[Tensor, int]:
    """Radii at which S_ub reaches S + margin, and how many bounds of a ball that took, all samples together."""
    score, zero, balls = energy(bounded.network(images)), torch.zeros_like(margin), 0

    def evaluate(index: Tensor, radii: Tensor) -> Tensor:
        nonlocal balls
        balls += len(index)
        return score_bounds(bounded, Ball(images[index], radii, "linf")).upper - score[index]

    nothing, first = torch.full_like(margin, torch.nan), torch.full_like(margin, 1.4 * eps)
    found = search_radius(evaluate, margin, zero, zero, zero + torch.inf, nothing, first, 1.0, PRECISION)
    return found, balls


def measure(case: Case, repeats: int = 3) -> list[dict[str, Any]]:
    """Time both engines on one case.

    Returns:
        One record for each engine, with the keys of `COLUMNS` from `engine` on; seconds are those of the whole batch,
        `radius_to_eps` is the median radius found over eps, `evaluations` the balls bounded for one radius.
    """
    options = {"width": case.width} | ({"hidden_layers": case.depth} if case.network == "mlp" else {})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = architectures.build(case.network, SHAPE, case.classes, [0.5], [0.25], **options).double().eval()
        images = torch.rand(case.samples, *SHAPE, dtype=torch.float64)
    engines: dict[str, BoundedNetwork] = {
        "auto_lirpa": LirpaNetwork(network, SHAPE, "crown"),
        "native": NativeNetwork(network, SHAPE, "crown"),
    }
    ball = Ball(images, torch.full((case.samples,), case.eps, dtype=torch.float64), "linf")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    found: dict[str, tuple[Tensor, int]] = {}
    with torch.no_grad():
        for _ in range(repeats):
            for name, bounded in engines.items():
                start = time.process_time()
                margin = score_bounds(bounded, ball).upper - energy(bounded.network(images))
                middle = time.process_time()
                found[name] = searched(bounded, images, margin, case.eps)
                seconds[name].append((middle - start, time.process_time() - middle))
    return [
        dict(
            zip(
                COLUMNS[2:],
                (
                    name,
                    case.samples,
                    *map(float, np.median(np.array(seconds[name]), 0)),
                    float(radii.median()) / case.eps,
                    balls / case.samples,
                ),
                strict=True,
            )
        )
        for name, (radii, balls) in found.items()
    ]


def points(repeats: int) -> Iterator[dict[str, Any]]:
    """All points of all panels, with the keys of `COLUMNS`."""
    for panel, cases in PANELS.items():
        for value, case in cases.items():
            for record in measure(case, repeats):
                yield {"panel": panel, "value": value, **record}


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """One panel for each thing that grows, on one scale: CPU time of a sample."""
    names = list(dict.fromkeys(record["panel"] for record in records))
    times = [1000 * record[column] / record["samples"] for record in records for column in _TIMES]
    with style.styled("double"):
        drawing = style.canvas("double")

        def draw(axes: Axes, panel: str) -> None:
            for engine, (label, colour, marker) in ENGINES.items():
                chosen = [record for record in records if (record["panel"], record["engine"]) == (panel, engine)]
                for column, (what, line) in _TIMES.items():
                    axes.plot(
                        [record["value"] for record in chosen],
                        [1000 * record[column] / record["samples"] for record in chosen],
                        label=f"{label}, {what}",
                        color=colour,
                        linestyle=line,
                        marker=marker,
                        markersize=3,
                    )
            values = list(dict.fromkeys(record["value"] for record in records if record["panel"] == panel))
            axes.set_xscale("log")
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
            style.logarithmic(axes, times)
            axes.tick_params(labelleft=panel == names[0])
            axes.set_xlabel(panel)
            axes.set_ylabel("CPU time of one sample (ms)")

        style.grid(drawing, [names], draw)
        handles, labels = drawing.axes[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, handlelength=3.5)
        drawing.suptitle("random weights and images; medians; one thread; samples: size of the batch")
        style.fit(drawing, 1, 4.6)
    return drawing


def main(
    out: Annotated[Path, typer.Option(help="Figure: .png, .pdf or .svg; its numbers go beside it (.csv).")],
    repeats: Annotated[int, typer.Option(help="Runs of each engine.")] = 3,
) -> None:
    """Measure, draw, print the table as Markdown."""
    torch.set_num_threads(1)
    figures.check_format(out)
    records = []
    typer.echo("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for record in points(repeats):
        records.append(record)
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in record.values())
        typer.echo("| " + " | ".join(cells) + " |")
    figures.save(figure(records), out)
    write_csv(out.with_suffix(".csv"), COLUMNS, records)
    typer.echo(f"wrote {out} and {out.with_suffix('.csv')}")


if __name__ == "__main__":
    run_script(main)
