"""What happens to a network for one batch.

Every random number follows from the recipe's seed, the step and the part of the batch it is for, never from what was
drawn before. Hence a run in several processes, or with `optimizer.accumulate`, sees the augmentation and the samples
that its parts would see in one.

A batch is computed in parts, `accumulate` of them in each process, one after another. A part has its own candidates and
its own picks; its gradient counts with its share of the ID images. So do the running statistics of BatchNorm: each part,
normalised by itself, moves those from before the step, and the step's are the mean of what the parts give. Gradients,
terms and statistics are summed over the processes once a step, so that all processes hold the same network at all
times.

Where no term of the objective looks at outliers, a batch has none: BatchNorm sees ID images alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from grood_cert.data import Experiment
from grood_cert.errors import InputError
from grood_cert.recipe import Recipe
from grood_cert.sections import ObjectiveSection, OptimizerSection
from grood_cert.system import processes
from grood_cert.training import sampling
from grood_cert.training.augmentation import augment
from grood_cert.training.objective import Terms, objective

TERMS = [item.name for item in dataclasses.fields(Terms)]


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


def steps_per_epoch(recipe: Recipe, experiment: Experiment) -> int:
    """Batches in one pass over the ID training images: as few as `batch_size` allows, of sizes that differ by 1."""
    return -(-len(experiment.train) // recipe.optimizer.batch_size)


def check_compute(recipe: Recipe, device: torch.device) -> None:
    """Refuse on a CPU what is for a GPU alone.

    A CPU has no TF32, and gains nothing by channels last: torch 2.11 corrupts memory there in the backward pass of a
    strided 1x1 convolution.

    Raises:
        InputError: If the device is a CPU and the recipe asks for TF32 or channels last.
    """
    if recipe.compute.precision == "tf32" and device.type == "cpu":
        raise InputError(
            'compute.precision = "tf32" is for a GPU; use --device cuda, or --set compute.precision=float32'
        )
    if recipe.compute.channels_last and device.type == "cpu":
        raise InputError(
            "compute.channels_last = true is for a GPU; use --device cuda, or --set compute.channels_last=false"
        )


def check_batches(recipe: Recipe, experiment: Experiment) -> int:
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


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products of float32 on a GPU round their factors to TF32 (10 bits of mantissa) while the block runs, or do not.

    PyTorch allows it in convolutions and not in other products.
    """
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a batch.

    Attributes:
        number: Which part of the batch.
        share: Of the batch's ID images.
        images: ID images, shape (n_id, C, H, W).
        labels: Their classes.
        outliers: Outliers, shape (n_aux, C, H, W); none where no term looks at them.
    """

    number: int
    share: float
    images: Tensor
    labels: Tensor
    outliers: Tensor


class Steps:
    """The steps of a run: what happens to a network for one batch."""

    def __init__(self, network: nn.Module, experiment: Experiment, recipe: Recipe, device: torch.device) -> None:
        check_compute(recipe, device)
        self.cuts = check_batches(recipe, experiment)
        self.network, self.experiment, self.recipe, self.device = network, experiment, recipe, device
        self.optimizer = _optimizer(network, recipe.optimizer)
        self.total = recipe.optimizer.epochs * steps_per_epoch(recipe, experiment)
        self.format = torch.channels_last if recipe.compute.channels_last else torch.contiguous_format
        network.to(memory_format=self.format)  # type: ignore[call-overload]
        self.model: Any = torch.compile(network) if recipe.compute.compile else network
        self.layers = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._NormBase)]
        for layer in self.layers:
            layer.momentum = recipe.optimizer.batch_norm_momentum
        self.buffers = [buffer for layer in self.layers for buffer in layer.buffers()]
        self.statistics = [buffer for buffer in self.buffers if buffer.is_floating_point()]

    def begin(self) -> None:
        """Put the network into train mode; BatchNorm that is frozen stays in eval mode."""
        self.network.train()
        if self.recipe.optimizer.batch_norm_momentum == 0:
            for layer in self.layers:
                layer.eval()

    def _generator(self, step: int, part: int) -> torch.Generator:
        (number,) = np.random.SeedSequence([self.recipe.seed, step, part]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(number >> np.uint64(1)))

    def read(self, inside: Tensor, outside: Tensor) -> list[Part]:
        """What this process computes of a batch, given as indices of ID images and outliers: pixels and labels.

        It depends on nothing that a step changes, so that another thread can do it ahead.
        """
        mine = self.recipe.optimizer.accumulate
        first = processes.rank() * mine
        train, auxiliary = self.experiment.train, self.experiment.auxiliary
        cut = zip(range(self.cuts), inside.tensor_split(self.cuts), outside.tensor_split(self.cuts), strict=True)
        parts = []
        for number, own_inside, own_outside in list(cut)[first : first + mine]:
            images, labels = train.images[own_inside], train.labels[own_inside]
            outliers = auxiliary.images[own_outside] if self.recipe.objective.uses_outliers else images[:0]
            if self.device.type == "cuda":  # copied from there while the step before still computes
                images, labels, outliers = images.pin_memory(), labels.pin_memory(), outliers.pin_memory()
            parts.append(Part(number, len(own_inside) / len(inside), images, labels, outliers))
        return parts

    def _images(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        changed = augment(pixels.to(self.device, non_blocking=True), self.recipe.augmentation, generator)
        return changed.to(memory_format=self.format)

    def _terms(self, step: int, part: Part, section: ObjectiveSection) -> Terms:
        """The objective of one part of a batch."""
        picking, generator = self.recipe.sampling, self._generator(step, part.number)
        images = self._images(part.images, generator)
        outliers = self._images(part.outliers, generator) if len(part.outliers) else images[:0]
        labels, roles, progress = part.labels.to(self.device, non_blocking=True), None, step / self.total
        if self.recipe.objective.uses_outliers and picking.method == "energy":
            with self._arithmetic():
                logits, features = sampling.candidates(self.network, outliers)
            picks = sampling.pick(logits.float(), features.float(), len(images), picking.routing, generator=generator)
            outliers, roles = outliers[picks.indices], picks.roles
        with self._arithmetic():
            return objective(
                self.model, images, labels, outliers, section, roles=roles, progress=progress, generator=generator
            )

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        bf16 = torch.autocast(self.device.type, torch.bfloat16, self.recipe.compute.precision == "bf16")
        # The penalty and the loss go back through one graph, whose buffers a compiled network must not give away.
        with bf16, functorch.patch(donated_buffer=False):
            yield

    def _backward(self, share: float, step: int, part: Part, section: ObjectiveSection) -> Terms:
        """The objective of one part of a batch; its gradient, times a share, is added to that of the parameters."""
        with tf32(self.recipe.compute.precision == "tf32"):
            found = self._terms(step, part, section)
            (share * found.total).backward()
        return found

    def take(self, step: int, parts: Sequence[Part]) -> Tensor | None:
        """Update the network for one batch, as `read`.

        Returns:
            The terms of the objective over the batch, or None if they are not finite; then nothing is updated.
        """
        self.optimizer.zero_grad(set_to_none=True)
        terms = torch.zeros(len(TERMS), device=self.device)
        before = [buffer.clone() for buffer in self.buffers]
        means: list[Tensor] = []  # of what the parts leave the statistics at
        for number, part in enumerate(parts):
            if number > 0:
                _set(self.buffers, before)
            found = self._backward(part.share, step, part, self.recipe.objective)
            terms += part.share * torch.stack([getattr(found, name).detach().float() for name in TERMS])
            if self.cuts > 1:
                shares = [part.share * buffer for buffer in self.statistics]
                means = [mean + share for mean, share in zip(means, shares, strict=True)] if means else shares
        gradients = [weight.grad for weight in self.network.parameters() if weight.grad is not None]
        processes.add_up([*gradients, *means, terms])
        if not bool(torch.isfinite(terms[0])):
            _set(self.buffers, before)
            return None
        if means:
            _set(self.statistics, means)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.optimizer, step, self.total)
        if self.recipe.optimizer.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.optimizer.clip_norm)
        self.optimizer.step()
        return terms

    def gradient_share(self, step: int, inside: Tensor, outside: Tensor) -> float:
        """Share of the time of a step that the gradient term takes; leaves network and random numbers as they are."""
        section = self.recipe.objective
        if section.lambda_grad == 0:
            return 0.0
        part = self.read(inside, outside)[0]
        kept = [buffer.clone() for buffer in self.network.buffers()]
        seconds = {}
        # Without the term a compiled network is another one, so it runs once before the clock does.
        for lambda_grad in (section.lambda_grad, 0.0) * (2 if self.recipe.compute.compile else 1):
            start = time.perf_counter()
            self._backward(1.0, step, part, dataclasses.replace(section, lambda_grad=lambda_grad))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds[lambda_grad] = time.perf_counter() - start
        _set(self.network.buffers(), kept)
        self.optimizer.zero_grad(set_to_none=True)
        return max(0.0, 1 - seconds[0.0] / seconds[section.lambda_grad])
