"""The training run: a loop that yields one record an epoch, and the run around it that writes files.

Every random number follows from the recipe's seed, the epoch, the step and the part of the batch it is for, never from
what was drawn before. Hence a run that was killed goes on exactly where it was saved, and a run in several processes,
or with `optimizer.accumulate`, sees the images, the augmentation and the samples that its parts would see in one.

A batch is computed in parts, `accumulate` of them in each process, one after another. A part has its own candidates and
its own picks; its gradient counts with its share of the ID images. So do the running statistics of BatchNorm: each part,
normalised by itself, moves those from before the step, and the step's are the mean of what the parts give. Gradients,
terms and statistics are summed over the processes once a step, so that all processes hold the same network at all
times. Each measures and evaluates it; the first alone writes.

Where no term of the objective looks at outliers, a batch has none: BatchNorm sees ID images alone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from grood_cert import detector as detectors
from grood_cert import metrics
from grood_cert.ball import Ball
from grood_cert.data import Experiment, ImageSet, experiment_of
from grood_cert.detector import Architecture, Detector, Provenance
from grood_cert.errors import InputError, RunError
from grood_cert.lipschitz.interval import interval_lipschitz
from grood_cert.networks.weights import load_pretrained
from grood_cert.recipe import OptimizerSection, Recipe
from grood_cert.scores import SCORES, energy, gradient_norm_estimate
from grood_cert.system import processes
from grood_cert.system.files import check_writable, locked, write_csv
from grood_cert.training import checkpoint, sampling
from grood_cert.training.augmentation import augment
from grood_cert.training.certified_loss import certified_loss
from grood_cert.training.checkpoint import Progress
from grood_cert.training.objective import Terms, Weights, objective

_GRADIENT_BATCH = 256
_WATCHED = 2000
_PROBE_STEPS = 50
_TERMS = [item.name for item in dataclasses.fields(Terms)]


@dataclass(frozen=True)
class Epoch:
    """What one epoch did; the columns of `log.csv`.

    Attributes:
        epoch: Number, from 1.
        loss: Mean objective over the epoch's steps.
        cross_entropy: Mean CE.
        energy_loss: Mean L_S.
        gradient_loss: Mean L_grad.
        certified_loss: Mean certified loss.
        active_energy_id: Mean share of ID samples with S >= m_in.
        active_energy_aux: Mean share of auxiliary samples with S <= m_out.
        active_gradient_id: Mean share of ID samples with S <= m_in.
        active_gradient_aux: Mean share of auxiliary samples with S >= m_out.
        gradient_norm_id: Mean ||grad S||_2 on the calibration split, eval mode, per pixel unit.
        gradient_norm_aux: The same on the held-out auxiliary outliers.
        accuracy: Accuracy on the calibration split.
        fpr95_id: FPR95 of the held-out auxiliary outliers against the calibration split.
        learning_rate: That of the epoch's last step.
        seconds: Wall time of the epoch.
        samples_per_second: ID images and outliers used, over the time that the steps took, all processes together.
        gradient_share: Share of a step that the gradient term takes, timed on the last batch of this epoch or, where
            epochs are short, of one a few epochs ago.

    The measurements look at up to 2000 evenly spaced images of each split, none of which is trained or tested on.
    """

    epoch: int
    loss: float
    cross_entropy: float
    energy_loss: float
    gradient_loss: float
    certified_loss: float
    active_energy_id: float
    active_energy_aux: float
    active_gradient_id: float
    active_gradient_aux: float
    gradient_norm_id: float
    gradient_norm_aux: float
    accuracy: float
    fpr95_id: float
    learning_rate: float
    seconds: float
    samples_per_second: float
    gradient_share: float


def architecture_of(recipe: Recipe, experiment: Experiment) -> Architecture:
    """The architecture a recipe asks for, normalised by the ID training images."""
    mean, spread = (values.tolist() for values in experiment.train.channel_statistics())
    options: dict[str, int] = {"width": recipe.network.width} if recipe.network.width else {}
    if recipe.network.name == "mlp":
        options["hidden_layers"] = recipe.network.hidden_layers
    return Architecture(
        name=recipe.network.name,
        shape=experiment.train.shape,
        classes=len(experiment.train.class_names),
        mean=tuple(mean),
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


def learning_rate(section: OptimizerSection, step: int, steps: int) -> float:
    r"""Learning rate of a step.

    After the linear rise over `warmup_steps`, "cosine" is lr_min + (lr - lr_min)(1 + cos(pi t)) / 2 with t from 0, at
    the first step after it, to 1, at the last.

    Args:
        section: Settings.
        step: From 0.
        steps: Number of steps of the whole run.

    Example:
        >>> section = OptimizerSection(lr=0.01, lr_min=1e-6, epochs=2)
        >>> [round(learning_rate(section, step, 3), 7) for step in range(3)]
        [0.01, 0.0050005, 1e-06]
    """
    if step < section.warmup_steps:
        return section.lr * (step + 1) / (section.warmup_steps + 1)
    if section.schedule == "constant":
        return section.lr
    if section.schedule == "multistep":
        epoch = step * section.epochs // steps
        return section.lr * section.factor ** sum(epoch >= milestone for milestone in section.milestones)
    done = (step - section.warmup_steps) / max(1, steps - 1 - section.warmup_steps)
    low = section.lr_min / section.lr
    return section.lr * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)


def _order(count: int, length: int, generator: torch.Generator) -> Tensor:
    """`length` indices below `count`: random orders of all of them, one after another."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-length // count))]
    return torch.cat([torch.empty(0, dtype=torch.int64), *rounds])[:length]


def steps_per_epoch(recipe: Recipe, experiment: Experiment) -> int:
    """Batches in one pass over the ID training images: as few as `batch_size` allows, of sizes that differ by 1."""
    return -(-len(experiment.train) // recipe.optimizer.batch_size)


def check_images(experiment: Experiment) -> None:
    """Make sure that images and labels can be trained on.

    Raises:
        InputError: If a set is empty, holds pixels that are no floats in [0, 1] (or are NaN), or labels out of range;
            or if the ID images are of one class.
    """
    if len(experiment.train.class_names) < 2:
        raise InputError(f"'{experiment.train.name}' has one class; give labels (.npz) or more classes")
    for images in (experiment.train, experiment.calibration, experiment.auxiliary, experiment.auxiliary_heldout):
        if len(images) == 0:
            raise InputError(f"'{images.name}' is empty; training needs ID images and auxiliary outliers")
        if not isinstance(images.images, Tensor):  # read as they are used; every one is made from bytes or was checked
            continue
        if not images.images.is_floating_point():
            raise InputError(f"'{images.name}' has pixels of type {images.images.dtype}; divide them by 255 as floats")
        low, high = (float(value) for value in images.images.aminmax())
        if not (low >= 0 and high <= 1):
            raise InputError(f"'{images.name}' has pixels from {low:g} to {high:g}; all must lie in [0, 1]")
    for images in (experiment.train, experiment.calibration):
        low, high, classes = int(images.labels.min()), int(images.labels.max()), len(images.class_names)
        if low < 0 or high >= classes:
            raise InputError(
                f"labels of '{images.name}' run from {low} to {high}; {classes} classes are 0..{classes - 1}"
            )


def _weights(recipe: Recipe) -> Weights:
    return Weights(**dataclasses.asdict(recipe.objective))


def _uses_outliers(recipe: Recipe) -> bool:
    """Whether a term of the objective looks at outliers."""
    section = recipe.objective
    return (
        section.certified != "none"
        or section.lambda_grad > 0
        or section.reduction == "reference"
        or (section.lambda_S > 0 and section.outlier_loss != "none")
    )


def _check_bounds(network: nn.Module, experiment: Experiment, weights: Weights) -> None:
    """Make sure that what the objective bounds can be bounded, on one image; leaves the network in eval mode.

    Raises:
        InputError: If the network holds a layer that cannot be bounded.
    """
    image, network = experiment.train.images[:1], network.eval()
    with torch.no_grad():
        if weights.certified != "none":
            certified_loss(
                network,
                image,
                image,
                weights.certified_eps,
                weights.m_in,
                weights.m_out,
                weights.certified_method,
            )
        if weights.lambda_grad > 0 and weights.slope == "interval":
            interval_lipschitz(network, Ball(image, image.new_full((1,), weights.slope_eps), "l2"))


def _check_layout(recipe: Recipe, device: torch.device) -> None:
    """Channels last pays on a GPU; on a CPU, torch 2.11 corrupts memory in the backward pass of a strided 1x1 convolution.

    Raises:
        InputError: If the device is a CPU and the recipe asks for channels last.
    """
    if recipe.compute.channels_last and device.type == "cpu":
        raise InputError(
            "compute.channels_last = true is for a GPU; use --device cuda, or --set compute.channels_last=false"
        )


def _check_batches(recipe: Recipe, experiment: Experiment) -> int:
    """Number of parts a batch is computed in.

    Raises:
        InputError: If a batch is too small to be cut into them, the candidates are too few to pick from, or the
            learning rate would rise to the end of the run.
    """
    section, count = recipe.optimizer, processes.count()
    parts, images, steps = count * section.accumulate, len(experiment.train), steps_per_epoch(recipe, experiment)
    if images // steps < parts:
        raise InputError(
            f"a batch of {images // steps} ID images cannot be cut into {parts} parts (processes: {count}, "
            f"optimizer.accumulate = {section.accumulate}); raise optimizer.batch_size"
        )
    if section.warmup_steps >= section.epochs * steps:
        raise InputError(
            f"optimizer.warmup_steps = {section.warmup_steps}, but the run has {section.epochs * steps} steps in all"
        )
    if parts > 1 and recipe.objective.reduction == "reference":
        raise InputError('objective.reduction = "reference" divides by the size of the batch; use one process')
    if recipe.sampling.method == "energy":
        pool, auxiliary = recipe.sampling.pool, len(experiment.auxiliary)
        if pool > auxiliary:
            raise InputError(f"sampling.pool = {pool}, but there are only {auxiliary} auxiliary outliers to train on")
        sampling.check(pool // parts, -(-min(section.batch_size, images) // parts))
    return parts


def _set(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Give tensors, in place, other values."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


class _Steps:
    """The steps of a run: what happens to a network for one batch."""

    def __init__(self, network: nn.Module, experiment: Experiment, recipe: Recipe, device: torch.device) -> None:
        _check_layout(recipe, device)
        self.cuts = _check_batches(recipe, experiment)
        self.network, self.experiment, self.recipe, self.device = network, experiment, recipe, device
        self.weights, self.uses_outliers = _weights(recipe), _uses_outliers(recipe)
        self.optimizer = _optimizer(network, recipe.optimizer)
        self.total = recipe.optimizer.epochs * steps_per_epoch(recipe, experiment)
        self.format = torch.channels_last if recipe.compute.channels_last else torch.contiguous_format
        network.to(memory_format=self.format)  # type: ignore[call-overload]
        self.model: Any = torch.compile(network) if recipe.compute.compile else network
        layers = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._NormBase)]
        self.buffers = [buffer for layer in layers for buffer in layer.buffers()]
        self.statistics = [buffer for buffer in self.buffers if buffer.is_floating_point()]

    def _generator(self, step: int, part: int) -> torch.Generator:
        (number,) = np.random.SeedSequence([self.recipe.seed, step, part]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(number >> np.uint64(1)))

    def _images(self, images: ImageSet, indices: Tensor, generator: torch.Generator) -> Tensor:
        changed = augment(images.images[indices], self.recipe.augmentation, generator)
        return changed.to(self.device, memory_format=self.format)

    def _terms(self, step: int, part: int, inside: Tensor, outside: Tensor, weights: Weights) -> Terms:
        """The objective of one part of a batch."""
        train, auxiliary, section = self.experiment.train, self.experiment.auxiliary, self.recipe.sampling
        generator = self._generator(step, part)
        images = self._images(train, inside, generator)
        outliers = self._images(auxiliary, outside, generator) if self.uses_outliers else images[:0]
        labels, roles, progress = train.labels[inside].to(self.device), None, step / self.total
        if self.uses_outliers and section.method == "energy":
            with self._arithmetic():
                logits, features = sampling.candidates(self.network, outliers)
            picks = sampling.pick(logits.float(), features.float(), len(images), section.routing, generator=generator)
            outliers, roles = outliers[picks.indices], picks.roles
        with self._arithmetic():
            return objective(
                self.model, images, labels, outliers, weights, roles=roles, progress=progress, generator=generator
            )

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        bf16 = torch.autocast(self.device.type, torch.bfloat16, self.recipe.compute.precision == "bf16")
        # The penalty and the loss go back through one graph, whose buffers a compiled network must not give away.
        with bf16, functorch.patch(donated_buffer=False):
            yield

    def _own_parts(self, inside: Tensor, outside: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """What of a batch this process computes: number, ID images and outliers of each part."""
        mine = self.recipe.optimizer.accumulate
        first = processes.rank() * mine
        cut = zip(range(self.cuts), inside.tensor_split(self.cuts), outside.tensor_split(self.cuts), strict=True)
        return list(cut)[first : first + mine]

    def take(self, step: int, inside: Tensor, outside: Tensor) -> Tensor | None:
        """Update the network for one batch, given as indices of ID images and outliers.

        Returns:
            The terms of the objective over the batch, or None if they are not finite; then nothing is updated.
        """
        self.optimizer.zero_grad(set_to_none=True)
        terms = torch.zeros(len(_TERMS), device=self.device)
        before = [buffer.clone() for buffer in self.buffers]
        after = [torch.zeros_like(buffer) for buffer in self.statistics]
        for part, part_inside, part_outside in self._own_parts(inside, outside):
            share = len(part_inside) / len(inside)
            _set(self.buffers, before)
            found = self._terms(step, part, part_inside, part_outside, self.weights)
            (share * found.total).backward()
            terms += share * torch.stack([getattr(found, name).detach().float() for name in _TERMS])
            for mean, buffer in zip(after, self.statistics, strict=True):
                mean += share * buffer
        gradients = [weight.grad for weight in self.network.parameters() if weight.grad is not None]
        processes.add_up([*gradients, *after, terms])
        if not bool(torch.isfinite(terms[0])):
            _set(self.buffers, before)
            return None
        _set(self.statistics, after)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.optimizer, step, self.total)
        self.optimizer.step()
        return terms

    def gradient_share(self, step: int, inside: Tensor, outside: Tensor) -> float:
        """Share of the time of a step that the gradient term takes; leaves network and random numbers as they are."""
        if self.weights.lambda_grad == 0:
            return 0.0
        part = self._own_parts(inside, outside)[0]
        kept = [buffer.clone() for buffer in self.network.buffers()]
        seconds = {}
        # Without the term a compiled network is another one, so it runs once before the clock does.
        for lambda_grad in (self.weights.lambda_grad, 0.0) * (2 if self.recipe.compute.compile else 1):
            start = time.perf_counter()
            self._terms(step, *part, dataclasses.replace(self.weights, lambda_grad=lambda_grad)).total.backward()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds[lambda_grad] = time.perf_counter() - start
        _set(self.network.buffers(), kept)
        self.optimizer.zero_grad(set_to_none=True)
        return max(0.0, 1 - seconds[0.0] / seconds[self.weights.lambda_grad])


def fit(
    network: nn.Module,
    experiment: Experiment,
    recipe: Recipe,
    device: str = "cpu",
    advance: Callable[[], None] = lambda: None,
    *,
    start: Progress | None = None,
    save: Callable[[Progress], None] = lambda progress: None,
    checkpoint_steps: int = 0,
) -> Iterator[Epoch]:
    """Train in place; one record an epoch.

    An epoch passes once over the ID images. With uniform sampling, every batch holds as many auxiliary outliers as ID
    images, none if no term of the objective looks at them. On the CPU, the result depends on nothing but the arguments (and the number of threads and processes).

    Args:
        network: The network; moved to the device. After an epoch it is in eval mode.
        experiment: Images.
        recipe: Settings.
        device: "cpu", "cuda", ...
        advance: Called after every step.
        start: Where an earlier run was saved; this one goes on from there.
        save: Called with the state at the start, after every epoch once its record has been taken, and in between
            after every `checkpoint_steps` steps.
        checkpoint_steps: 0 for epochs alone.

    Yields:
        One `Epoch` for each pass over the ID images.

    Raises:
        InputError: If images, labels, network and recipe do not fit one another.
        RunError: If the loss or a score becomes NaN or infinite; the network is then back in its state after the last
            epoch that went well.
    """
    section, train = recipe.optimizer, experiment.train
    check_images(experiment)
    network.to(device)
    steps = _Steps(network, experiment, recipe, torch.device(device))
    outputs, classes = detectors.logits(network.eval(), train.images[:1]).shape[1], len(train.class_names)
    if outputs != classes:
        raise InputError(f"the network has {outputs} logits, '{train.name}' has {classes} classes")
    empty = torch.empty(0, len(_TERMS))
    if start is None:
        start = Progress(1, 0, network.state_dict(), steps.optimizer.state_dict(), empty, 0.0)
    else:
        network.load_state_dict(start.network)
        steps.optimizer.load_state_dict(start.optimizer)
    processes.copy_from_first([*network.parameters(), *network.buffers()])

    def state(epoch: int, history: Sequence[Tensor], seconds: float) -> Progress:
        values = torch.stack([*history]).cpu() if history else empty
        return Progress(epoch, len(history), network.state_dict(), steps.optimizer.state_dict(), values, seconds)

    save(start)
    generator = torch.Generator().manual_seed(recipe.seed)
    count = steps_per_epoch(recipe, experiment)
    candidates = 0
    if steps.uses_outliers:
        candidates = len(train) if recipe.sampling.method == "uniform" else count * recipe.sampling.pool
    probe_every, gradient_share = -(-_PROBE_STEPS // count), 0.0
    for number in range(1, section.epochs + 1):
        order_id = _order(len(train), len(train), generator).tensor_split(count)
        order_aux = _order(len(experiment.auxiliary), candidates, generator).tensor_split(count)
        if number < start.epoch:
            continue
        good = copy.deepcopy(network.state_dict())
        history = [*start.history.to(device)] if number == start.epoch else []
        began = time.perf_counter() - (start.seconds if number == start.epoch else 0.0)
        network.train()
        for step in range(len(history), count):
            terms = steps.take((number - 1) * count + step, order_id[step], order_aux[step])
            if terms is None:
                break
            history.append(terms)
            advance()
            if checkpoint_steps and (step + 1) % checkpoint_steps == 0 and step + 1 < count:
                save(state(number, history, time.perf_counter() - began))
        seconds = time.perf_counter() - began
        if len(history) == count and (number - start.epoch) % probe_every == 0:
            gradient_share = steps.gradient_share(number * count - 1, order_id[-1], order_aux[-1])
        network.eval()
        watched = _watch(network, experiment, recipe) if len(history) == count else None
        if watched is None:
            network.load_state_dict(good)
            bounds = (
                "" if recipe.objective.certified == "none" else ", objective.lambda_certified, objective.certified_eps"
            )
            raise RunError(
                f"training diverged in epoch {number}: the loss or a score is no finite number any more; "
                f"lower optimizer.lr{bounds}, objective.lambda_grad or objective.lambda_S"
            )
        mean = dict(zip(_TERMS, torch.stack(history).double().mean(0).tolist(), strict=True))
        yield Epoch(
            epoch=number,
            loss=mean.pop("total"),
            energy_loss=mean.pop("energy"),
            gradient_loss=mean.pop("gradient"),
            certified_loss=mean.pop("certified"),
            **mean,
            **watched,
            learning_rate=learning_rate(section, number * count - 1, steps.total),
            seconds=time.perf_counter() - began,
            samples_per_second=(len(train) + candidates) / seconds,
            gradient_share=gradient_share,
        )
        save(state(number + 1, [], 0.0))


def mean_gradient_norm(network: nn.Module, images: Tensor) -> float:
    """Mean over images of ||grad S||_2, per pixel unit; it speaks of the slope at the images, not around them.

    Args:
        network: f in eval mode.
        images: Shape (N, C, H, W).
    """
    weight = next(network.parameters())
    norms = [gradient_norm_estimate(network, batch.to(weight), "l2") for batch in images.split(_GRADIENT_BATCH)]
    return float(torch.cat(norms).mean())


def _split_calibration(images: ImageSet, recipe: Recipe) -> tuple[ImageSet, ImageSet]:
    """The calibration images that a run watches, and those that gamma is calibrated on.

    The same ones, unless an epoch is chosen by what was watched: then gamma is calibrated on the others, which remain
    exchangeable with test images.
    """
    apart = recipe.evaluation.keep == "best"
    every = max(-(-len(images) // _WATCHED), 2 if apart else 1)
    watched = torch.zeros(len(images), dtype=torch.bool)
    watched[::every] = True
    return images.select(watched), images.select(~watched) if apart else images


def _watch(network: nn.Module, experiment: Experiment, recipe: Recipe) -> dict[str, float] | None:
    """What a run looks at after each epoch; None if a logit is not finite."""
    calibration, _ = _split_calibration(experiment.calibration, recipe)
    heldout = experiment.auxiliary_heldout
    heldout = heldout.select(range(0, len(heldout), -(-len(heldout) // _WATCHED)))
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


def _separation(
    score: Callable[[Tensor, float], Tensor], inside: Tensor, outside: Tensor, temperature: float
) -> dict[str, float]:
    """Detection metrics of one score, from the logits of the ID and the OOD test set."""
    scores = score(inside, temperature).numpy(), score(outside, temperature).numpy()
    return {"auroc": metrics.auroc(*scores), "fpr95_id": metrics.fpr95_id(*scores)}


def evaluate(network: nn.Module, experiment: Experiment, temperature: float = 1.0) -> dict[str, Any]:
    """Accuracy, detection metrics of every OOD set, and mean gradient norms, all on the test sets.

    Args:
        network: In eval mode; use float64 for exact metrics.
        experiment: Images.
        temperature: That of the `scores`; S itself, the score that is certified, has temperature 1.

    Returns:
        `accuracy`, `gradient_norm_id`, `gradient_norm_ood`, and under `ood` one record a set with `kind`, `samples`,
        and `auroc`, `fpr95_id`, `fpr95_ood` of S; under its `scores`, `auroc` and `fpr95_id` of each
        of `energy.SCORES` at the temperature.
    """
    values = detectors.logits(network, experiment.test.images)
    inside = energy(values).numpy()
    sets = {}
    for images in experiment.ood:
        others = detectors.logits(network, images.images)
        outside = energy(others).numpy()
        sets[images.name] = {
            "kind": images.kind,
            "samples": len(images),
            "auroc": metrics.auroc(inside, outside),
            "fpr95_id": metrics.fpr95_id(inside, outside),
            "fpr95_ood": metrics.fpr95_ood(inside, outside),
            "scores": {name: _separation(score, values, others, temperature) for name, score in SCORES.items()},
        }
    real = [mean_gradient_norm(network, images.images) for images in experiment.ood if images.kind == "ood"]
    return {
        "accuracy": _accuracy(values, experiment.test),
        "gradient_norm_id": mean_gradient_norm(network, experiment.test.images),
        "gradient_norm_ood": metrics.mean_over_sets(real) if real else None,
        "ood": sets,
    }


def accuracy_floor(recipe: Recipe, classes: int) -> float:
    """ID accuracy below which a classifier counts as collapsed: a share of the way from chance, 1/K, to 1.

    Example:
        >>> accuracy_floor(Recipe(), 10)
        0.19
    """
    return 1 / classes + recipe.evaluation.accuracy_floor * (1 - 1 / classes)


def best_epoch(rows: Sequence[dict[str, Any]], floor: float) -> int | None:
    """The epoch with the lowest FPR95 on the held-out outliers, of those whose accuracy is not below the floor.

    Args:
        rows: Records of the epochs; of equal FPR95 the more accurate one is better, then the later one.
        floor: See `accuracy_floor`.

    Returns:
        Its number; None if every epoch is below the floor.
    """
    sound = [row for row in rows if row["accuracy"] >= floor]
    best = min(sound, key=lambda row: (row["fpr95_id"], -row["accuracy"], -row["epoch"]), default=None)
    return None if best is None else int(best["epoch"])


def _prepare(out: Path, force: bool, resume: bool) -> None:
    """Make sure that a run may write to its folder, and clear away what it replaces."""
    target, state = out / "model.pt", out / "last.pt"
    if force and resume:
        raise InputError("--force begins a run again and --resume continues it; give one of the two")
    if target.exists() and resume:
        raise InputError(f"{target} exists: this run is finished, there is nothing to resume")
    if target.exists() and not force:
        raise InputError(f"{target} exists already; choose another --out, or add --force to overwrite it")
    if state.exists() and not (force or resume):
        raise InputError(f"{state} is of an unfinished run; add --resume to continue it, or --force to begin again")


def run(
    recipe: Recipe,
    out: Path,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
    checkpoint_steps: int = 0,
    begin: Callable[[int], None] = lambda steps: None,
    advance: Callable[[], None] = lambda: None,
    report: Callable[[Epoch], None] = lambda epoch: None,
    say: Callable[[str], None] = lambda message: None,
) -> Detector:
    """Train a detector and write `model.pt` and `log.csv` to a folder.

    gamma is the split-conformal 95 % quantile of S on the calibration split, computed in float64. On the CPU, the same
    recipe gives the same checkpoint, byte by byte, whether the run was interrupted and resumed or not.

    While it lasts, `last.pt` holds what it takes to go on. `best.pt` holds the weights of the epoch with the lowest
    FPR95 on the held-out outliers among those with a sound accuracy (`best_epoch`). `model.pt` is the last epoch, or
    that one with `evaluation.keep = "best"`; gamma then comes from the half of the calibration split that the choice
    did not see.

    Args:
        recipe: Settings.
        out: Folder of the run; made if absent.
        data_dir: Folder that holds downloaded data sets.
        download: Whether a missing torchvision set may be downloaded.
        device: "cpu", "cuda", ...
        force: Replace a run that is already there; it is gone as soon as training starts.
        resume: Go on with an unfinished run.
        checkpoint_steps: Steps after which an epoch is saved half-way; 0: epochs are saved when they end.
        begin: Called once with the number of steps to take.
        advance: Called after every step.
        report: Called with every epoch's record.
        say: Called with a sentence to show: what was loaded, and a warning when the ID accuracy has collapsed.

    Raises:
        InputError: If recipe, data, device or folder are unusable, before any work is spent.
        RunError: If training diverges, no epoch is worth keeping, or a file cannot be written any more; what was last
            saved is then still there.
    """
    target, last, best = out / "model.pt", out / "last.pt", out / "best.pt"
    first = processes.rank() == 0
    if first:
        _prepare(out, force, resume)
    detectors.check_device(device)
    _check_layout(recipe, torch.device(device))
    with processes.first_goes_ahead():
        experiment = experiment_of(recipe, data_dir, download and first)
    check_images(experiment)
    _, calibration = _split_calibration(experiment.calibration, recipe)
    metrics.calibrated_threshold(range(len(calibration)), metrics.TPR_PERCENT)  # refuses too small a split
    weights = _weights(recipe)  # refuses choices that do not go together
    _check_batches(recipe, experiment)
    architecture = architecture_of(recipe, experiment)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = architecture.build()
    if recipe.network.pretrained:
        section = recipe.network
        loaded = load_pretrained(network, Path(section.pretrained), section.pretrained_allow)
        if first:
            say(f"{section.pretrained}: {loaded}")
    _check_bounds(network, experiment, weights)
    start, rows = checkpoint.load(last, recipe, architecture) if resume and first else (None, [])
    start = processes.value_of_first(start)
    steps, floor = steps_per_epoch(recipe, experiment), accuracy_floor(recipe, architecture.classes)
    columns = [item.name for item in dataclasses.fields(Epoch)]

    def save(progress: Progress) -> None:
        if first:
            checkpoint.save(last, recipe, architecture, progress, rows)

    with contextlib.ExitStack() as stack:
        if first:
            check_writable(out)
            stack.enter_context(locked(target))
            for old in () if resume else (target, out / "log.csv", last, best):
                try:
                    old.unlink(missing_ok=True)
                except OSError as error:
                    raise InputError(f"cannot replace {old}: {error.strerror or error}") from error
            begin(recipe.optimizer.epochs * steps - ((start.epoch - 1) * steps + start.step if start else 0))
        epochs = fit(
            network,
            experiment,
            recipe,
            device,
            advance if first else lambda: None,
            start=start,
            save=save,
            checkpoint_steps=checkpoint_steps,
        )
        for epoch in epochs:
            rows.append(dataclasses.asdict(epoch))
            if not first:
                continue
            write_csv(out / "log.csv", columns, rows)
            if best_epoch(rows, floor) == epoch.epoch:
                checkpoint.save_weights(best, epoch.epoch, network.state_dict())
            report(epoch)
            if epoch.accuracy < floor:
                say(
                    f"warning: epoch {epoch.epoch}: ID accuracy {epoch.accuracy:.3f} is below {floor:.3f}, the "
                    "classifier has collapsed; lower objective.lambda_grad, objective.lambda_S or optimizer.lr"
                )
        if recipe.evaluation.keep == "best":
            if first and best_epoch(rows, floor) is None:
                raise RunError(f"no epoch reached an ID accuracy of {floor:.3f}, so there is none to keep")
            network.load_state_dict(processes.value_of_first(checkpoint.load_weights(best) if first else None))
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        network.double().eval().requires_grad_(False)
        scores = energy(detectors.logits(network, calibration.images)).numpy()
        result = Detector(
            network=network,
            gamma=metrics.calibrated_threshold(scores, metrics.TPR_PERCENT),
            shape=architecture.shape,
            class_names=experiment.train.class_names,
            architecture=architecture,
            provenance=Provenance(
                recipe=recipe,
                calibration={"samples": len(scores), "percent": metrics.TPR_PERCENT},
                metrics=evaluate(network, experiment, recipe.evaluation.temperature),
                versions=detectors.versions(),
            ),
        )
        if first:
            result.save(target)
            last.unlink(missing_ok=True)
    return result
