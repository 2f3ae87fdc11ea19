"""Which networks can be bounded: a table of models of all kinds, by which engine, how tightly, and why not.

    python -m benchmarks.models --out runs/models.md
    python -m benchmarks.models resnet
    python -m benchmarks.models --large

Each network of `benchmarks/zoo.py` is captured, bounded by each engine and method, and searched: random points of the
ball, its corners, attacks on S and on single logits, all evaluated by the network itself. A point outside the bounds ends the
run with exit code 3. Weights are random; BatchNorm has the statistics of random images.

A cell of an engine gives for each method how many times wider the proved interval of S is than the one that attacks found,
the median over the images; 1 would be exact. "-" was not asked for: too dear for the network's size.
"""

from __future__ import annotations

import copy
import math
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import grood_cert as gc
from benchmarks.zoo import Model, models
from grood_cert import attacks
from grood_cert.ball import Ball
from grood_cert.bounds.engine import METHODS, BoundedNetwork, Method, Relaxation, lirpa_version
from grood_cert.bounds.engines import ENGINES, Engine, build
from grood_cert.bounds.score import score_bounds
from grood_cert.cli import run_script
from grood_cert.errors import InputError, RunError, SoundnessError, said
from grood_cert.interval import ROUNDING
from grood_cert.networks.capture import capture
from grood_cert.scores import energy
from grood_cert.system.files import replacing

COLUMNS = ("model", "input", "parameters", "nodes", "native", "auto_LiRPA", "points inside")
LARGE = ("resnet18", "vgg11_bn", "densenet121", "mobilenet_v2")
_EFFORT = attacks.AttackEffort(steps=8, restarts=1, rounds=2, ascent=8, logits=1)
_LOGITS = 3


class TooLong(BaseException):
    """A bound took longer than it may; no engine catches this."""


@dataclass(frozen=True)
class Row:
    """What was found of one model.

    Attributes:
        model: Which one.
        parameters: How many numbers it has.
        nodes: Nodes of its graph; 0 if it was refused.
        cells: For each engine what became of each method: a width, or words.
        points: Points that were evaluated and lie inside all bounds.
        refused: Why it was not captured; empty if it was.
        seconds: For capture and each "engine method".
    """

    model: Model
    parameters: int
    nodes: int = 0
    cells: dict[str, dict[str, float | str]] = field(default_factory=dict)
    points: int = 0
    refused: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def markdown(self) -> str:
        """The row of the table."""
        shape = "x".join(map(str, self.model.shape))
        if self.refused:
            return f"| {self.model.name} | {shape} | {self.parameters:,} | - | refused: {self.refused} | | |"
        cells = [
            ", ".join(f"{method} {_shown(value)}" for method, value in self.cells.get(engine, {}).items()) or "-"
            for engine in ENGINES[1:]
        ]
        return f"| {self.model.name} | {shape} | {self.parameters:,} | {self.nodes} | {' | '.join(cells)} | {self.points} |"


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}" if value < 1e4 else f"1e{math.floor(math.log10(value))}"


@dataclass(frozen=True)
class _Once:
    """An engine with its relaxation of one batch of balls, which is made once."""

    bounded: BoundedNetwork
    relaxation: Relaxation

    method = property(lambda self: self.bounded.method)
    network = property(lambda self: self.bounded.network)
    graph = property(lambda self: self.bounded.graph)

    def relax(self, ball: Ball) -> Relaxation:
        """The one relaxation."""
        del ball
        return self.relaxation


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """At most so long; infinity for no limit."""

    def stop(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0 if math.isinf(seconds) else seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def points_of(network: nn.Module, ball: Ball, generator: torch.Generator) -> Iterator[Tensor]:
    """Points of each ball, shape (B, C, H, W) each: the centre, random ones, corners, and what attacks end at."""
    yield ball.center
    for turn in range(8):
        share = torch.rand(ball.center.shape, generator=generator, dtype=torch.float64)
        yield torch.lerp(ball.lower, ball.upper, share.round() if turn % 2 else share)
    (found,) = attacks.extremes(network, [ball], generator, _EFFORT)
    yield from (found.argmin, found.argmax)
    with torch.no_grad():
        classes = network(ball.center).shape[1]
    for number in range(min(_LOGITS, classes)):
        for sign in (1.0, -1.0):
            points = ball.center
            for _ in range(3):
                points = points.detach().requires_grad_(True)
                slope = torch.autograd.grad(sign * network(points)[:, number].sum(), points)[0]
                points = ball.project(points.detach() + ball.per_pixel(ball.eps) * slope.sign())
                yield points


def bounded_width(
    bounded: BoundedNetwork, method: Method, ball: Ball, points: Sequence[Tensor], scores: Tensor, logits: Tensor
) -> float | str:
    """How many times wider the proved interval of S is than the one seen; "not finite" where nothing was proved.

    Args:
        bounded: The engine.
        method: The method.
        ball: The balls.
        points: The points looked at, n of shape (B, C, H, W).
        scores: S there, shape (n, B).
        logits: f there, shape (n, B, K).

    Raises:
        SoundnessError: If a score or a logit lies outside its bounds.
    """
    once = _Once(bounded, bounded.relax(ball))
    found = score_bounds(once, ball, method)
    classes = logits.shape[2]
    lower, upper = once.relaxation.rows(torch.eye(classes, dtype=torch.float64).expand(len(ball.center), -1, -1))
    margin = ROUNDING * (1 + logits.abs())  # auto_LiRPA's rows are widened later, where S is made of them
    outside = ((logits < lower - margin) | (logits > upper + margin)).any(2)
    outside |= (scores < found.lower) | (scores > found.upper)
    if bool(outside.any()):
        number, sample = (int(i) for i in outside.nonzero()[0])
        raise SoundnessError(
            f"{int(outside.sum())} of {outside.numel()} points lie outside their proved bounds by {method}",
            {"image": ball.center[sample].numpy(), "point": points[number][sample].detach().numpy()},
        )
    width, seen = found.upper - found.lower, scores.amax(0) - scores.amin(0)
    if not bool(torch.isfinite(width).all()):
        return "not finite"
    return float((width / seen).median())


def _result(task: Callable[[], float | str], seconds: float) -> float | str:
    """What became of a bound, as a width or words; only unsoundness goes through."""
    try:
        with _within(seconds):
            return task()
    except TooLong:
        return f"over {seconds:.0f} s"
    except (InputError, RunError) as error:
        return f"refused ({said(error).split('; the native')[0].split(', but for')[0].removeprefix('auto_LiRPA has ')})"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return "too little memory"
        raise


def row_of(model: Model, seconds: float = math.inf, engines: Sequence[Engine] = ("native",)) -> Row:
    """Capture, bound and search one model.

    Args:
        model: The model.
        seconds: What one bound may take.
        engines: Which engines to ask.

    Raises:
        SoundnessError: If a point lies outside its bounds.
    """
    network = model.build()
    parameters = sum(weight.numel() for weight in network.parameters())
    start = time.perf_counter()
    try:
        graph = capture(network, model.shape)
    except (InputError, RunError) as error:
        return Row(model, parameters, refused=said(error).split("; docs/models.md")[0])
    row = Row(model, parameters, len(graph.nodes), seconds={"capture": time.perf_counter() - start})
    generator = torch.Generator().manual_seed(0)
    center = torch.rand(model.images, *model.shape, generator=generator, dtype=torch.float64)
    ball = Ball(center, model.eps, "linf")
    exact = copy.deepcopy(network).double().requires_grad_(False)
    points = list(points_of(exact, ball, generator))
    with torch.no_grad():
        logits = torch.stack([exact(each) for each in points])
    scores = energy(logits)
    for engine in engines:
        cells: dict[str, float | str] = {}
        for method in model.native if engine == "native" else model.lirpa:

            def task(engine: Engine = engine, method: Method = method) -> float | str:
                bounded = build(engine, network, model.shape, method, graph).bounded
                return bounded_width(bounded, method, ball, points, scores, logits)

            start = time.perf_counter()
            cells[method] = _result(task, seconds)
            row.seconds[f"{engine} {method}"] = time.perf_counter() - start
        words = set(cells.values())
        if len(words) == 1 and isinstance(next(iter(words)), str):
            cells = {"all:": next(iter(words))}
        else:
            cells |= {method: "-" for method in METHODS if method not in cells}
        row.cells[engine] = cells
    inside = any(isinstance(value, float) for cells in row.cells.values() for value in cells.values())
    return Row(**{**vars(row), "points": scores.numel() if inside else 0})


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown, a table for each group, and how many of each kind there are."""
    lines = []
    for group in dict.fromkeys(row.model.group for row in rows):
        lines += ["", f"**{group}**", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += [row.markdown() for row in rows if row.model.group == group]
    captured = [row for row in rows if not row.refused]
    counts = [f"{len(rows)} models", f"{len(captured)} captured"]
    for engine in ENGINES[1:]:
        if any(engine in row.cells for row in captured):
            proved = [row for row in captured if any(isinstance(v, float) for v in row.cells[engine].values())]
            counts.append(f"{len(proved)} bounded by {engine}")
    points = sum(row.points for row in rows)
    return "\n".join([", ".join(counts) + f"; {points} points, none outside.", *lines])


def large(names: Sequence[str], side: int, seconds: float) -> Iterator[str]:
    """Lines of a table: capture, one image by IBP and CROWN-IBP, smoothing of torchvision's classifiers at a size."""
    for name in names:
        model = next(each for each in models() if each.name == f"torchvision {name}")
        model = Model(name, model.group, model.make, (3, side, side), ("ibp", "crown-ibp"), (), model.eps, 1)
        row = row_of(model, seconds)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        cells = [
            f"{_shown(row.cells['native'][method])} ({row.seconds[f'native {method}']:.0f} s)"
            for method in model.native
        ]
        start = time.perf_counter()
        smoothed = _smoothed(model)
        cells += [f"{memory:.1f} GiB", f"{smoothed} ({time.perf_counter() - start:.0f} s)"]
        yield f"| {name} | {side} | {row.nodes} ({row.seconds['capture']:.0f} s) | {' | '.join(cells)} |"


def _smoothed(model: Model, images: int = 19, n: int = 16) -> str:
    """How many noisy images smoothing took: calibration, then one image certified."""
    center = torch.rand(images + 1, *model.shape, generator=torch.Generator().manual_seed(0))
    detector = gc.Detector(model.build().double(), 0.0, model.shape)
    smoothed = gc.smooth(detector, 0.1, calibration=center[1:], n=n, alpha=0.1)
    smoothed.certify(center[:1], eps=0.05)
    return f"{n * (images + 1)} passes"


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Parts of names of models or groups; all by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the table as Markdown.")] = None,
    seconds: Annotated[float, typer.Option(help="What one bound may take.")] = 120.0,
    memory: Annotated[float, typer.Option(help="GiB that the process may take.")] = 16.0,
    sizes: Annotated[bool, typer.Option("--large", help="Torchvision at 32 and 224 pixels instead.")] = False,
) -> None:
    """Print the table."""
    resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30), resource.getrlimit(resource.RLIMIT_AS)[1]))
    if sizes:
        if out:
            raise InputError("--large prints its table alone; leave out --out")
        large_names = [name for name in LARGE if not names or any(part in name for part in names)]
        if not large_names:
            raise InputError(f"no large model has {' or '.join(names or [])} in its name; there are {', '.join(LARGE)}")
        columns = ("network", "pixels", "nodes (capture)", "ibp", "crown-ibp", "memory so far", "smoothing")
        typer.echo("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for side in (32, 224):
            for line in large(large_names, side, seconds):
                typer.echo(line)
        return
    chosen = [model for model in models() if not names or any(name in f"{model.group} {model.name}" for name in names)]
    if not chosen:
        raise InputError(f"no model has {' or '.join(names or [])} in its name or group")
    engines: tuple[Engine, ...] = ("native", "auto_lirpa") if lirpa_version() else ("native",)
    rows = []
    for model in chosen:
        row = row_of(model, seconds=seconds, engines=engines)
        spent = ", ".join(f"{what} {duration:.1f} s" for what, duration in row.seconds.items())
        typer.echo(f"{model.name}: {row.refused or spent}", err=True)
        rows.append(row)
    text = table(rows)
    typer.echo(text)
    if out:
        with replacing(out) as partial:
            partial.write_text(text + "\n")


if __name__ == "__main__":
    run_script(main)
