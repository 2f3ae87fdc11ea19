"""What a training step costs: energy fine-tuning, GReg with each penalty, the authors' reference, GReg+, certified terms.

    python benchmarks/step_time.py --batch 64

A step is the objective of `batch` ID images and as many outliers, and its backward pass, in float32 on random images.
Margins are set so that the share `active` of both sets is past them: penalties look at those samples alone, the
reference at all. Times are medians of interleaved runs in one process, so they share the machine's moods; the ratios
are medians of the ratios within one round.

Rows "sampling" are the choice of a GReg+ step's outliers from a pool of six times the batch (384 at batch 64), as a
part of the GReg+ step that takes them (`batch` ID images and twice as many outliers, "exact").

Rows "ibp", "adversarial" and "mix" are an energy step with the certified term on outliers: bounds alone, an attack of
`attack_steps` gradients alone, and the mix of them; "mix, both" has it on ID images too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from grood_cert.cli import run_script
from grood_cert.networks import architectures
from grood_cert.scores import energy
from grood_cert.sections import ObjectiveSection
from grood_cert.system.files import write_csv
from grood_cert.training import sampling
from grood_cert.training.objective import objective

COLUMNS = ("network", "batch_norm", "step", "ms", "of_energy", "of_reference")
NETWORKS = ("resnet18", "wrn-40-2", "densenet-bc-100")
PENALTIES = ("exact", "fast", "stochastic")
CERTIFIED = {  # on whom the certified term acts, and the share of the bound
    "ibp": ("ood", 1.0),
    "adversarial": ("ood", 0.0),
    "mix": ("ood", 0.5),
    "mix, both": ("both", 0.5),
}
POOL = 6  # candidates for each ID image: 300,000 for 50,000


def _margins(network: nn.Module, images: Tensor, batch: int, active: float) -> tuple[float, float]:
    """m_in and m_out with the share `active` of each set past them, by train-mode scores."""
    with torch.no_grad():
        score = energy(network(images))
    return float(score[:batch].quantile(active)), float(score[batch:].quantile(1 - active))


def _seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(name: str, batch: int, repeats: int, active: float, attack_steps: int = 3) -> list[dict[str, Any]]:
    """One record a step, with the keys of `COLUMNS`."""
    torch.manual_seed(0)
    network = architectures.build(name, (3, 32, 32), 10, [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]).train()
    images, labels = torch.rand((2 + POOL) * batch, 3, 32, 32), torch.randint(10, (batch,))
    inside, outside, pool = images[:batch], images[batch : 2 * batch], images[2 * batch :]
    m_in, m_out = _margins(network, images[: 2 * batch], batch, active)
    plain = ObjectiveSection(lambda_grad=0.0, m_in=m_in, m_out=m_out)
    greg = replace(plain, lambda_grad=0.1)
    generator = torch.Generator().manual_seed(0)

    def train(weights: ObjectiveSection, outliers: Tensor) -> Callable[[], None]:
        def step() -> None:
            network.zero_grad(set_to_none=True)
            objective(network, inside, labels, outliers, weights, generator=generator).total.backward()

        return step

    def sample() -> None:
        logits, features = sampling.candidates(network, pool)
        sampling.pick(logits, features, batch, generator=generator)

    modes = ("eval", "shared")
    steps = {("-", "energy"): train(plain, outside)}
    steps["-", "reference"] = train(replace(greg, reduction="reference"), outside)
    for mode in modes:
        for penalty in PENALTIES:
            steps[mode, penalty] = train(replace(greg, penalty=penalty, batch_norm=mode), outside)
        steps[mode, "greg+"] = train(replace(greg, batch_norm=mode), pool[: 2 * batch])
    steps["-", "sampling"] = sample
    worst = replace(plain, certified_eps=0.01, certified_ramp=0.0, certified_attack_steps=attack_steps)
    for row, (certified, mix) in CERTIFIED.items():
        steps["-", row] = train(replace(worst, certified=certified, certified_mix=mix), outside)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for turn in range(1 + repeats):  # the first turn warms up
        for key, step in steps.items():
            spent = _seconds(step)
            if turn:
                seconds[key].append(spent)

    times = {key: np.array(values) for key, values in seconds.items()}
    records = [
        {
            "network": name,
            "batch_norm": mode,
            "step": step,
            "ms": 1000 * float(np.median(values)),
            "of_energy": float(np.median(values / times["-", "energy"])),
            "of_reference": float(np.median(values / times["-", "reference"])),
        }
        for (mode, step), values in times.items()
    ]
    return records


def main(
    network: Annotated[list[str], typer.Option(help="Network; repeat for several.")] = list(NETWORKS),  # noqa: B006
    batch: Annotated[int, typer.Option(min=2, help="ID images a step; as many outliers.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    active: Annotated[float, typer.Option(min=0, max=1, help="Share of samples past their margin.")] = 0.5,
    attack_steps: Annotated[int, typer.Option(min=1, help="Gradients of the attack.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Also write the table as CSV.")] = None,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    typer.echo("  ".join(f"{column:>15}" for column in COLUMNS))
    records = []
    for name in network:
        for record in measure(name, batch, repeats, active, attack_steps):
            records.append(record)
            cells = (f"{value:.2f}" if isinstance(value, float) else value for value in record.values())
            typer.echo("  ".join(f"{cell:>15}" for cell in cells))
    if out:
        write_csv(out, COLUMNS, records)


if __name__ == "__main__":
    run_script(main)
