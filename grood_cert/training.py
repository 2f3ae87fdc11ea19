"""The training run: a loop that yields one record an epoch, and the run around it that writes files."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grood_cert import detector as detectors
from grood_cert import metrics
from grood_cert.data import Experiment, ImageSet, load_experiment
from grood_cert.detector import Architecture, Detector
from grood_cert.energy import energy, gradient_norm_estimate
from grood_cert.errors import InputError, RunError
from grood_cert.files import check_writable, write_csv
from grood_cert.objective import Terms, Weights, objective
from grood_cert.recipe import OptimizerSection, Recipe

_GRADIENT_BATCH = 256
_WATCHED = 2000
_LAST_LR = 1e-6
TPR_PERCENT = 95


@dataclass(frozen=True)
class Epoch:
    """What one epoch did; the columns of `log.csv`.

    Attributes:
        epoch: Number, from 1.
        loss: Mean objective over the epoch's steps.
        cross_entropy: Mean CE.
        energy_loss: Mean L_S.
        gradient_loss: Mean L_grad.
        active_energy_id: Mean share of ID samples with S >= m_in.
        active_energy_aux: Mean share of auxiliary samples with S <= m_out.
        active_gradient_id: Mean share of ID samples with S <= m_in.
        active_gradient_aux: Mean share of auxiliary samples with S >= m_out.
        gradient_norm_id: Mean ||grad S||_2 on the calibration split, eval mode, per pixel unit.
        gradient_norm_aux: The same on the held-out auxiliary outliers.
        accuracy: Accuracy on the calibration split.
        fpr95_id: FPR95 of the held-out auxiliary outliers against the calibration split.
        seconds: Wall time of the epoch.

    The last four measurements look at up to 2000 evenly spaced images of each split, none of which is trained or
    tested on.
    """

    epoch: int
    loss: float
    cross_entropy: float
    energy_loss: float
    gradient_loss: float
    active_energy_id: float
    active_energy_aux: float
    active_gradient_id: float
    active_gradient_aux: float
    gradient_norm_id: float
    gradient_norm_aux: float
    accuracy: float
    fpr95_id: float
    seconds: float


def architecture_of(recipe: Recipe, experiment: Experiment) -> Architecture:
    """The architecture a recipe asks for, normalised by the ID training images."""
    channels = [channel.double() for channel in experiment.train.images.unbind(1)]
    spread = [float(channel.std(correction=0)) for channel in channels]
    options: dict[str, int] = {"width": recipe.network.width} if recipe.network.width else {}
    if recipe.network.name == "mlp":
        options["hidden_layers"] = recipe.network.hidden_layers
    return Architecture(
        name=recipe.network.name,
        shape=experiment.train.shape,
        classes=len(experiment.train.class_names),
        mean=tuple(float(channel.mean()) for channel in channels),
        std=tuple(value if value > 1e-6 else 1.0 for value in spread),  # a constant channel is only centred
        options=options,
    )


def _optimizer(network: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    if section.name == "adam":
        return torch.optim.Adam(network.parameters(), lr=section.lr, weight_decay=section.weight_decay)
    return torch.optim.SGD(
        network.parameters(),
        lr=section.lr,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        nesterov=section.momentum > 0,
    )


def _schedule(optimizer: torch.optim.Optimizer, section: OptimizerSection, steps: int) -> Any:
    """Learning rate step by step: constant, or a cosine from `lr` to 1e-6."""

    def factor(step: int) -> float:
        if section.schedule == "constant":
            return 1.0
        low = min(1.0, _LAST_LR / section.lr)
        return low + (1 - low) * (1 + math.cos(math.pi * step / max(1, steps - 1))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _order(count: int, length: int, generator: torch.Generator) -> Tensor:
    """`length` indices below `count`: random orders of all of them, one after another."""
    rounds = -(-length // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:length]


def steps_per_epoch(recipe: Recipe, experiment: Experiment) -> int:
    """Batches in one pass over the ID training images: as few as `batch_size` allows, of sizes that differ by 1."""
    return -(-len(experiment.train) // recipe.optimizer.batch_size)


def fit(
    network: nn.Module,
    experiment: Experiment,
    recipe: Recipe,
    device: str = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> Iterator[Epoch]:
    """Train in place; one record an epoch.

    An epoch passes once over the ID images; every batch holds as many auxiliary outliers as ID images. On the CPU,
    the result depends on nothing but the arguments (and the number of threads).

    Args:
        network: The network; moved to the device. After an epoch it is in eval mode.
        experiment: Images.
        recipe: Settings.
        device: "cpu", "cuda", ...
        advance: Called after every step.

    Yields:
        One `Epoch` for each pass over the ID images.

    Raises:
        RunError: If the loss or a score becomes NaN or infinite; the network is then back in its state after the last
            epoch that went well.
    """
    section = recipe.optimizer
    network.to(device)
    optimizer = _optimizer(network, section)
    steps = steps_per_epoch(recipe, experiment)
    schedule = _schedule(optimizer, section, section.epochs * steps)
    weights = Weights(**dataclasses.asdict(recipe.objective))
    generator = torch.Generator().manual_seed(recipe.seed)
    train, auxiliary = experiment.train, experiment.auxiliary
    names = [item.name for item in dataclasses.fields(Terms)]
    for number in range(1, section.epochs + 1):
        start = time.perf_counter()
        good = copy.deepcopy(network.state_dict())
        network.train()
        order_id = _order(len(train), len(train), generator).tensor_split(steps)
        order_aux = _order(len(auxiliary), len(train), generator).tensor_split(steps)
        history: list[Tensor] = []
        for inside, outside in zip(order_id, order_aux, strict=True):
            images, outliers = train.images[inside].to(device), auxiliary.images[outside].to(device)
            terms = objective(network, images, train.labels[inside].to(device), outliers, weights)
            if not bool(torch.isfinite(terms.total)):
                break
            optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            optimizer.step()
            schedule.step()
            history.append(torch.stack([getattr(terms, name).detach() for name in names]))
            advance()
        network.eval()
        watched = _watch(network, experiment) if len(history) == steps else None
        if watched is None:
            network.load_state_dict(good)
            raise RunError(
                f"training diverged in epoch {number}: the loss or a score is no finite number any more; "
                "lower optimizer.lr, objective.lambda_grad or objective.lambda_S"
            )
        mean = dict(zip(names, torch.stack(history).double().mean(0).tolist(), strict=True))
        yield Epoch(
            epoch=number,
            loss=mean.pop("total"),
            energy_loss=mean.pop("energy"),
            gradient_loss=mean.pop("gradient"),
            **mean,
            **watched,
            seconds=time.perf_counter() - start,
        )


def mean_gradient_norm(network: nn.Module, images: Tensor) -> float:
    """Mean over images of ||grad S||_2, per pixel unit; it speaks of the slope at the images, not around them.

    Args:
        network: f in eval mode.
        images: Shape (N, C, H, W).
    """
    weight = next(network.parameters())
    norms = [gradient_norm_estimate(network, batch.to(weight), "l2") for batch in images.split(_GRADIENT_BATCH)]
    return float(torch.cat(norms).mean())


def _watch(network: nn.Module, experiment: Experiment) -> dict[str, float] | None:
    """What a run looks at after each epoch; None if a logit is not finite."""
    calibration, heldout = (
        images.select(range(0, len(images), -(-len(images) // _WATCHED)))
        for images in (experiment.calibration, experiment.auxiliary_heldout)
    )
    inside, outside = detectors.logits(network, calibration.images), detectors.logits(network, heldout.images)
    if not bool(torch.isfinite(inside).all() and torch.isfinite(outside).all()):
        return None
    return {
        "gradient_norm_id": mean_gradient_norm(network, calibration.images),
        "gradient_norm_aux": mean_gradient_norm(network, heldout.images),
        "accuracy": _accuracy(inside, calibration),
        "fpr95_id": metrics.fpr95_id(energy(inside).numpy(), energy(outside).numpy()),
    }


def _accuracy(values: Tensor, images: ImageSet) -> float:
    return float((values.argmax(1) == images.labels).double().mean())


def evaluate(network: nn.Module, experiment: Experiment) -> dict[str, Any]:
    """Accuracy, detection metrics of every OOD set, and mean gradient norms, all on the test sets.

    Args:
        network: In eval mode; use float64 for exact metrics.
        experiment: Images.

    Returns:
        `accuracy`, `gradient_norm_id`, `gradient_norm_ood`, and under `ood` one record a set with `kind`, `auroc`,
        `fpr95_id`, `fpr95_ood`.
    """
    values = detectors.logits(network, experiment.test.images)
    inside = energy(values).numpy()
    sets = {}
    for images in experiment.ood:
        outside = energy(detectors.logits(network, images.images)).numpy()
        sets[images.name] = {
            "kind": images.kind,
            "samples": len(images),
            "auroc": metrics.auroc(inside, outside),
            "fpr95_id": metrics.fpr95_id(inside, outside),
            "fpr95_ood": metrics.fpr95_ood(inside, outside),
        }
    real = [mean_gradient_norm(network, images.images) for images in experiment.ood if images.kind == "ood"]
    return {
        "accuracy": _accuracy(values, experiment.test),
        "gradient_norm_id": mean_gradient_norm(network, experiment.test.images),
        "gradient_norm_ood": metrics.mean_over_sets(real) if real else None,
        "ood": sets,
    }


def experiment_of(recipe: Recipe, data_dir: Path | None = None, download: bool = False) -> Experiment:
    """Load the images a recipe asks for.

    Raises:
        InputError: If a set is missing, empty, of the wrong size, or overlaps another.
    """
    return load_experiment(**dataclasses.asdict(recipe.data), data_dir=data_dir, download=download)


def run(
    recipe: Recipe,
    out: Path,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    device: str = "cpu",
    force: bool = False,
    begin: Callable[[int], None] = lambda steps: None,
    advance: Callable[[], None] = lambda: None,
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> Detector:
    """Train a detector and write `model.pt` and `log.csv` to a folder.

    gamma is the split-conformal 95 % quantile of S on the calibration split, computed in float64. On the CPU, the same
    recipe gives the same checkpoint, byte by byte.

    Args:
        recipe: Settings.
        out: Folder of the run; made if absent.
        data_dir: Folder that holds downloaded data sets.
        download: Whether a missing torchvision set may be downloaded.
        device: "cpu", "cuda", ...
        force: Replace a run that is already there; it is gone as soon as training starts.
        begin: Called once with the number of steps.
        advance: Called after every step.
        report: Called with every epoch's record.

    Raises:
        InputError: If data, device or folder are unusable, before any work is spent.
        RunError: If training diverges; `log.csv` then ends at the last epoch that went well.
    """
    target = out / "model.pt"
    if target.exists() and not force:
        raise InputError(f"{target} exists already; choose another --out, or add --force to overwrite it")
    detectors.check_device(device)
    experiment = experiment_of(recipe, data_dir, download)
    metrics.calibrated_threshold(range(len(experiment.calibration)), TPR_PERCENT)  # refuses too small a split
    check_writable(out)
    for old in (target, out / "log.csv"):
        try:
            old.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"cannot replace {old}: {error.strerror or error}") from error
    architecture = architecture_of(recipe, experiment)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = architecture.build()
    begin(recipe.optimizer.epochs * steps_per_epoch(recipe, experiment))
    rows: list[dict[str, Any]] = []
    for epoch in fit(network, experiment, recipe, device, advance):
        rows.append(dataclasses.asdict(epoch))
        write_csv(out / "log.csv", [item.name for item in dataclasses.fields(Epoch)], rows)
        report(epoch)
    network = network.double().eval().requires_grad_(False)
    scores = energy(detectors.logits(network, experiment.calibration.images)).numpy()
    result = Detector(
        network=network,
        gamma=metrics.calibrated_threshold(scores, TPR_PERCENT),
        architecture=architecture,
        class_names=experiment.train.class_names,
        recipe=recipe,
        calibration={"samples": len(scores), "percent": TPR_PERCENT},
        metrics=evaluate(network, experiment),
        versions=detectors.versions(),
    )
    result.save(target)
    return result
