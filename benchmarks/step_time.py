"""What a training step costs: energy fine-tuning, GReg with each penalty, the authors' reference, GReg+, certified terms.

    python benchmarks/step_time.py --batch 64
    python benchmarks/step_time.py --batch 64 --device cuda --precision bf16

A step is the objective of `batch` ID images and as many outliers, and its backward pass, on random images; `--precision`
is that of products, as `compute.precision` of a recipe, and steps that a recipe refuses at bf16 are left out.
Margins are set so that the share `active` of both sets is past them: penalties look at those samples alone, the
reference at all. Times are medians of interleaved runs in one process, so they share the machine's moods; the ratios
are medians of the ratios within one round. On a GPU the clock stops when its work is done.

`peak_mib` is the most that a step holds at a time beyond network and images, in MiB of 2^20 bytes: what is kept for
backward passes, gradients, and what layers work with. On a CPU it is the sum of what torch's profiler sees allocated and
freed, on a GPU torch's own count, which the workspace of convolutions belongs to.

Rows "sampling" are the choice of a GReg+ step's outliers from a pool of six times the batch (384 at batch 64), as a
part of the GReg+ step that takes them (`batch` ID images and twice as many outliers, "exact").

Rows "ibp", "adversarial" and "mix" are an energy step with the certified term on outliers: bounds alone, an attack of
`attack_steps` gradients alone, and the mix of them; "mix, both" has it on ID images too.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from grood_cert.cli import run_script
from grood_cert.detector import check_device
from grood_cert.networks import architectures
from grood_cert.recipe import Recipe
from grood_cert.scores import energy
from grood_cert.sections import ComputeSection, ObjectiveSection
from grood_cert.system.files import write_csv
from grood_cert.training import sampling
from grood_cert.training.objective import objective
from grood_cert.training.step import check_compute, tf32

COLUMNS = ("network", "step", "ms", "peak_mib", "of_energy", "of_reference")
NETWORKS = ("resnet18", "wrn-40-2", "densenet-bc-100")
PENALTIES = ("exact", "fast", "stochastic")
CERTIFIED = {  # on whom the certified term acts, and the share of the bound
    "ibp": ("ood", 1.0),
    "adversarial": ("ood", 0.0),
    "mix": ("ood", 0.5),
    "mix, both": ("both", 0.5),
}
AT_BF16 = ("energy", "fast", "sampling")
POOL = 6  # candidates for each ID image: 300,000 for 50,000


def _margins(network: nn.Module, images: Tensor, batch: int, active: float) -> tuple[float, float]:
    """m_in and m_out with the share `active` of each set past them, by train-mode scores."""
    with torch.no_grad():
        score = energy(network(images))
    return float(score[:batch].quantile(active)), float(score[batch:].quantile(1 - active))


def _seconds(step: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of tensors that a step holds at a time beyond those that are there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max(initial=0))


def measure(
    name: str,
    batch: int,
    repeats: int,
    active: float,
    attack_steps: int = 3,
    device: str = "cpu",
    precision: str = "float32",
) -> list[dict[str, Any]]:
    """One record a step, with the keys of `COLUMNS`."""
    place = torch.device(device)
    torch.manual_seed(0)
    network = architectures.build(name, (3, 32, 32), 10, [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]).train().to(place)
    images, labels = torch.rand((2 + POOL) * batch, 3, 32, 32).to(place), torch.randint(10, (batch,)).to(place)
    inside, outside, pool = images[:batch], images[batch : 2 * batch], images[2 * batch :]
    m_in, m_out = _margins(network, images[: 2 * batch], batch, active)
    plain = ObjectiveSection(lambda_grad=0.0, m_in=m_in, m_out=m_out)
    greg = replace(plain, lambda_grad=0.1)
    generator = torch.Generator().manual_seed(0)

    def arithmetic() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(place.type, torch.bfloat16, precision == "bf16")

    def train(weights: ObjectiveSection, outliers: Tensor) -> Callable[[], None]:
        def step() -> None:
            network.zero_grad(set_to_none=True)
            with arithmetic():
                terms = objective(network, inside, labels, outliers, weights, generator=generator)
            terms.total.backward()

        return step

    def sample() -> None:
        with arithmetic():
            logits, features = sampling.candidates(network, pool)
        sampling.pick(logits.float(), features.float(), batch, generator=generator)

    steps = {"energy": train(plain, outside), "reference": train(replace(greg, reduction="reference"), outside)}
    for penalty in PENALTIES:
        steps[penalty] = train(replace(greg, penalty=penalty), outside)
    steps["greg+"] = train(greg, pool[: 2 * batch])
    steps["sampling"] = sample
    worst = replace(plain, certified_eps=0.01, certified_ramp=0.0, certified_attack_steps=attack_steps)
    for row, (certified, mix) in CERTIFIED.items():
        steps[row] = train(replace(worst, certified=certified, certified_mix=mix), outside)
    if precision == "bf16":
        steps = {key: step for key, step in steps.items() if key in AT_BF16}
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    peak = {}
    with tf32(precision == "tf32"):
        for step in steps.values():  # warms up
            _seconds(step, place)
        for key, step in steps.items():
            network.zero_grad(set_to_none=True)
            peak[key] = peak_bytes(step, place)
        for _ in range(repeats):
            for key, step in steps.items():
                seconds[key].append(_seconds(step, place))

    times = {key: np.array(values) for key, values in seconds.items()}
    reference = times.get("reference", math.nan)
    records = [
        {
            "network": name,
            "step": step,
            "ms": 1000 * float(np.median(values)),
            "peak_mib": peak[step] / 2**20,
            "of_energy": float(np.median(values / times["energy"])),
            "of_reference": float(np.median(values / reference)),
        }
        for step, values in times.items()
    ]
    return records


def main(
    network: Annotated[list[str], typer.Option(help="Network; repeat for several.")] = list(NETWORKS),  # noqa: B006
    batch: Annotated[int, typer.Option(min=2, help="ID images a step; as many outliers.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    active: Annotated[float, typer.Option(min=0, max=1, help="Share of samples past their margin.")] = 0.5,
    attack_steps: Annotated[int, typer.Option(min=1, help="Gradients of the attack.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="float32, tf32 (on a GPU) or bf16.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Also write the table as CSV.")] = None,
) -> None:
    """Print the table."""
    check_device(device)
    check_compute(Recipe(compute=ComputeSection(precision=precision)), torch.device(device))
    torch.set_num_threads(threads)
    typer.echo("  ".join(f"{column:>15}" for column in COLUMNS))
    records = []
    for name in network:
        for record in measure(name, batch, repeats, active, attack_steps, device, precision):
            records.append(record)
            cells = (f"{value:.2f}" if isinstance(value, float) else value for value in record.values())
            typer.echo("  ".join(f"{cell:>15}" for cell in cells))
    if out:
        write_csv(out, COLUMNS, records)


if __name__ == "__main__":
    run_script(main)
