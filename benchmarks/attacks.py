"""How near the minimum-norm attack comes and what it costs: every preset, and a bisection of textbook PGD.

    python benchmarks/attacks.py runs/demo/greg/model.pt

`ratio` is radius / radius of the reference, median over samples: below 1 the preset is stronger. The reference bisects
eps, 14 rounds, and runs PGD from x, from the best point so far and from a random point in each ball, 30 steps each,
with l_1 steps that move a few pixels; what it finds is shortened along the segment to x. Times are processor seconds
where the detector is on the CPU, so a busy machine does not distort them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from grood_cert import attacks, detector
from grood_cert.ball import NORMS, Ball, Norm, dual_norm, largest_eps
from grood_cert.cli import run_script
from grood_cert.data import experiment_of
from grood_cert.scores import energy, score_gradient
from grood_cert.system.files import write_csv

COLUMNS = ("set", "norm", "effort", "median_radius", "ratio", "ms_per_sample")
ROUNDS, STEPS, SEGMENT = 14, 30, 30


def _steepest(gradient: Tensor, norm: Norm, points: Tensor) -> Tensor:
    """A step of p-norm 1: signs, a unit vector, or equal shares for the steepest sixteenth of the free pixels."""
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        return gradient / dual_norm(gradient, norm).clamp(min=1e-300).reshape(-1, 1, 1, 1)
    flat = torch.where(torch.where(gradient > 0, points < 1, points > 0), gradient, 0).flatten(1)
    few = flat.abs().topk(max(1, flat.shape[1] // 16), dim=1).indices
    return torch.zeros_like(flat).scatter(1, few, flat.gather(1, few).sign() / few.shape[1]).reshape(gradient.shape)


def pgd_bisection(network: nn.Module, images: Tensor, gamma: float, norm: Norm, generator: torch.Generator) -> Tensor:
    """The reference: distance of the nearest flipped point of a bisection of PGD, shape (B,)."""
    accepted = energy(network(images)) <= gamma
    sign = torch.where(accepted, 1, -1).to(images)
    best, failed = torch.full_like(sign, torch.inf), torch.zeros_like(sign)
    points, limit = images, largest_eps(images.shape[1:], norm)

    def flipped(candidates: Tensor) -> Tensor:
        return (energy(network(candidates)) <= gamma) != accepted

    for _ in range(ROUNDS):
        eps = torch.where(torch.isfinite(best), (failed + best) / 2, limit)
        ball = Ball(images, eps, norm)
        noise = torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images) * 2 - 1
        hit = torch.zeros_like(accepted)
        for start in (images, points, images + noise * ball.per_pixel(eps / dual_norm(noise, _dual(norm)))):
            current = ball.project(start)
            for step in range(STEPS):
                gradient = ball.per_pixel(sign) * score_gradient(network, current)[1]
                size = eps * 0.02 ** (step / (STEPS - 1))
                current = ball.project(current + ball.per_pixel(size) * _steepest(gradient, norm, current))
            found, low, high = flipped(current), torch.zeros_like(best), torch.ones_like(best)
            for _ in range(SEGMENT):
                middle = (low + high) / 2
                over = flipped(images + (current - images) * ball.per_pixel(middle))
                high, low = torch.where(over, middle, high), torch.where(over, low, middle)
            nearest = images + (current - images) * ball.per_pixel(high)
            nearer = found & (ball.distance(nearest) < best)
            best = torch.where(nearer, ball.distance(nearest), best)
            points = torch.where(ball.per_pixel(nearer), nearest, points)
            hit |= found
        failed = torch.where(hit, failed, torch.maximum(failed, eps))
    return best


def _dual(norm: Norm) -> Norm:
    """The norm whose dual this is."""
    pairs: dict[Norm, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}
    return pairs[norm]


def measure(
    model: Path,
    samples: int = 64,
    norms: tuple[Norm, ...] = NORMS,  # type: ignore[assignment]
    efforts: tuple[str, ...] = attacks.PRESETS,
) -> list[dict[str, Any]]:
    """One record for each set, norm and effort, with the keys of `COLUMNS`."""
    loaded = detector.load(model)
    experiment = experiment_of(loaded.origin.recipe)
    records = []
    for images in (experiment.test, *experiment.ood):
        accepted = loaded.scores(images.images) <= loaded.gamma
        right = images.images[accepted if images.kind == "id" else ~accepted][:samples].double()
        for norm in norms:
            reference, rows = torch.ones(0), []
            for name in ("pgd-bisection", *efforts):
                generator, start = torch.Generator().manual_seed(0), time.process_time()
                if name == "pgd-bisection":
                    reference = radius = pgd_bisection(loaded.network, right, loaded.gamma, norm, generator)
                else:
                    effort = attacks.AttackEffort.preset(name)
                    radius = attacks.minimum_norm(loaded.network, right, loaded.gamma, norm, generator, effort).radius
                seconds = time.process_time() - start
                rows.append({"set": images.name, "norm": norm, "effort": name, "median_radius": float(radius.median())})
                rows[-1] |= {"ratio": float((radius / reference).median())}
                rows[-1] |= {"ms_per_sample": 1000 * seconds / len(right)}
            records += rows
    return records


def main(
    model: Annotated[Path, typer.Argument(help="Checkpoint written by grood-cert train or demo.")],
    out: Annotated[Path | None, typer.Option(help="Also write the table as CSV.")] = None,
    samples: Annotated[int, typer.Option(help="Test samples of each set.")] = 64,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    records = measure(model, samples)
    typer.echo("  ".join(f"{column:>15}" for column in COLUMNS))
    for record in records:
        cells = (f"{value:.4f}" if isinstance(value, float) else value for value in record.values())
        typer.echo("  ".join(f"{cell:>15}" for cell in cells))
    if out:
        write_csv(out, COLUMNS, records)


if __name__ == "__main__":
    run_script(main)
