"""The loop over epochs: each passes once over the ID images and leaves one record.

The order of the images follows from the recipe's seed and the number of the epoch, so a run that was killed goes on
exactly where it was saved.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from grood_cert.data import Experiment
from grood_cert.detector import logits
from grood_cert.errors import InputError, RunError
from grood_cert.recipe import Recipe
from grood_cert.system import processes
from grood_cert.system.reporting import SILENT, Reporter
from grood_cert.training.checkpoint import TrainingState
from grood_cert.training.evaluation import watch
from grood_cert.training.step import TERMS, Steps, learning_rate, steps_per_epoch

_PROBE_STEPS = 50
_Read = TypeVar("_Read")


class TrainingError(RunError):
    """The numbers of a run end it: the same steps, taken again, would end the same."""


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


def _order(count: int, length: int, generator: torch.Generator) -> Tensor:
    """`length` indices below `count`: random orders of all of them, one after another."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-length // count))]
    return torch.cat([torch.empty(0, dtype=torch.int64), *rounds])[:length]


Batches = list[tuple[Tensor, Tensor]]  # indices of ID images and of outliers


def _epochs(recipe: Recipe, experiment: Experiment) -> Iterator[tuple[int, Batches]]:
    """Every epoch: its number, and its batches. With uniform sampling a batch has as many outliers as ID images."""
    generator = torch.Generator().manual_seed(recipe.seed)
    images, count = len(experiment.train), steps_per_epoch(recipe, experiment)
    for number in range(1, recipe.optimizer.epochs + 1):
        inside = _order(images, images, generator)
        outside = _order(len(experiment.auxiliary), _candidates(recipe, experiment), generator)
        yield number, list(zip(inside.tensor_split(count), outside.tensor_split(count), strict=True))


def _candidates(recipe: Recipe, experiment: Experiment) -> int:
    """Outliers that an epoch looks at."""
    if not recipe.objective.uses_outliers:
        return 0
    if recipe.sampling.method == "uniform":
        return len(experiment.train)
    return steps_per_epoch(recipe, experiment) * recipe.sampling.pool


def one_ahead(read: Callable[[Tensor, Tensor], _Read], batches: Batches) -> Iterator[_Read]:
    """What is read of each batch, in order; a thread reads the next one while this one is used."""
    with ThreadPoolExecutor(1) as thread:
        pending: deque[Future[_Read]] = deque()
        for batch in batches:
            pending.append(thread.submit(read, *batch))
            if len(pending) > 1:
                yield pending.popleft().result()
        if pending:
            yield pending.popleft().result()


class _Loop:
    """What the epochs of a run have in common."""

    def __init__(
        self,
        network: nn.Module,
        experiment: Experiment,
        recipe: Recipe,
        device: str,
        reporter: Reporter,
        save: Callable[[TrainingState], None],
        checkpoint_steps: int,
    ) -> None:
        check_images(experiment)
        self.network, self.experiment, self.recipe = network.to(device), experiment, recipe
        self.steps = Steps(network, experiment, recipe, torch.device(device))
        train = experiment.train
        outputs, classes = logits(network.eval(), train.images[:1]).shape[1], len(train.class_names)
        if outputs != classes:
            raise InputError(f"the network has {outputs} logits, '{train.name}' has {classes} classes")
        self.reporter, self.save, self.checkpoint_steps = reporter, save, checkpoint_steps

    def state(self, epoch: int, history: Sequence[Tensor], seconds: float) -> TrainingState:
        """What it takes to go on in an epoch, whose steps so far had these terms and took this time."""
        values = torch.stack([*history]).cpu() if history else torch.empty(0, len(TERMS))
        network, optimizer = self.network.state_dict(), self.steps.optimizer.state_dict()
        return TrainingState(epoch, len(history), network, optimizer, values, seconds)

    def begin(self, start: TrainingState | None) -> TrainingState:
        """Take up an earlier run, or begin; all processes then hold the same network."""
        if start is None:
            start = self.state(1, [], 0.0)
        else:
            self.network.load_state_dict(start.network)
            self.steps.optimizer.load_state_dict(start.optimizer)
        processes.copy_from_first([*self.network.parameters(), *self.network.buffers()])
        self.save(start)
        return start

    def take(self, number: int, batches: Batches, history: list[Tensor], began: float) -> bool:
        """Take those steps of an epoch that are not in its history yet; whether all went well."""
        self.steps.begin()
        count = len(batches)
        first = len(history)
        read = one_ahead(self.steps.read, batches[first:])
        for step, parts in enumerate(read, first):
            terms = self.steps.take((number - 1) * count + step, parts)
            if terms is None:
                return False
            history.append(terms)
            self.reporter.advance()
            if self.checkpoint_steps and (step + 1) % self.checkpoint_steps == 0 and step + 1 < count:
                self.save(self.state(number, history, time.perf_counter() - began))
        return True

    def diverged(self, number: int) -> TrainingError:
        """What is said when a number is none any more."""
        bounds = (
            "" if self.recipe.objective.certified == "none" else ", objective.lambda_certified, objective.certified_eps"
        )
        return TrainingError(
            f"training diverged in epoch {number}: the loss or a score is no finite number any more; "
            f"lower optimizer.lr{bounds}, objective.lambda_grad or objective.lambda_S"
        )


def fit(
    network: nn.Module,
    experiment: Experiment,
    recipe: Recipe,
    device: str = "cpu",
    *,
    reporter: Reporter = SILENT,
    start: TrainingState | None = None,
    save: Callable[[TrainingState], None] = lambda state: None,
    checkpoint_steps: int = 0,
) -> Iterator[Epoch]:
    """Train in place; one record an epoch.

    On the CPU, the result depends on nothing but the arguments (and the number of threads and processes).

    Args:
        network: The network; moved to the device. After an epoch it is in eval mode.
        experiment: Images.
        recipe: Settings.
        device: "cpu", "cuda", ...
        reporter: Hears of every step.
        start: Where an earlier run was saved; this one goes on from there.
        save: Called with the state at the start, after every epoch once its record has been taken, and in between
            after every `checkpoint_steps` steps.
        checkpoint_steps: 0 for epochs alone.

    Yields:
        One `Epoch` for each pass over the ID images.

    Raises:
        InputError: If images, labels, network and recipe do not fit one another.
        TrainingError: If the loss or a score becomes NaN or infinite; the network is then back in its state after the
            last epoch that went well.
    """
    loop = _Loop(network, experiment, recipe, device, reporter, save, checkpoint_steps)
    start, gradient_share = loop.begin(start), 0.0
    for number, batches in _epochs(recipe, experiment):
        if number < start.epoch:
            continue
        good, resumed, count = copy.deepcopy(network.state_dict()), number == start.epoch, len(batches)
        history = [*start.history.to(device)] if resumed else []
        began = time.perf_counter() - (start.seconds if resumed else 0.0)
        well = loop.take(number, batches, history, began)
        seconds = time.perf_counter() - began
        if well and (number - start.epoch) % -(-_PROBE_STEPS // count) == 0:
            gradient_share = loop.steps.gradient_share(number * count - 1, *batches[-1])
        network.eval()
        watched = watch(network, experiment, recipe) if well else None
        if watched is None:
            network.load_state_dict(good)
            raise loop.diverged(number)
        mean = dict(zip(TERMS, torch.stack(history).double().mean(0).tolist(), strict=True))
        yield Epoch(
            epoch=number,
            loss=mean.pop("total"),
            energy_loss=mean.pop("energy"),
            gradient_loss=mean.pop("gradient"),
            certified_loss=mean.pop("certified"),
            **mean,
            **watched,
            learning_rate=learning_rate(recipe.optimizer, number * count - 1, loop.steps.total),
            seconds=time.perf_counter() - began,
            samples_per_second=sum(len(inside) + len(outside) for inside, outside in batches) / seconds,
            gradient_share=gradient_share,
        )
        loop.save(loop.state(number + 1, [], 0.0))
