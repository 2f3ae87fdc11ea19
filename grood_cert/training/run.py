"""A training run: what surrounds the loop, from the recipe to the files of a detector.

All processes of a run hold the same network at all times. Each measures and evaluates it; the first alone writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grood_cert import metrics
from grood_cert.ball import Ball
from grood_cert.data import Experiment, experiment_of
from grood_cert.detector import Architecture, Detector, Provenance, check_device, logits, versions
from grood_cert.errors import InputError, RunError
from grood_cert.lipschitz.interval import interval_lipschitz
from grood_cert.networks.weights import load_into
from grood_cert.recipe import Recipe
from grood_cert.scores import ENERGY, named
from grood_cert.sections import ObjectiveSection
from grood_cert.system import processes
from grood_cert.system.files import check_apart, check_writable, first_line, locked, replacing, write_csv
from grood_cert.system.reporting import SILENT, Reporter
from grood_cert.training import checkpoint
from grood_cert.training.certified_loss import certified_loss
from grood_cert.training.checkpoint import TrainingState
from grood_cert.training.evaluation import accuracy_floor, best_epoch, evaluate, split_calibration
from grood_cert.training.loop import Epoch, TrainingError, check_images, fit
from grood_cert.training.step import check_batches, check_compute, steps_per_epoch

FILES = (  # that a run writes to its folder
    "model.pt",
    "log.csv",
    "last.pt",
    "best.pt",
    "failed.txt",
)


def architecture_of(recipe: Recipe, experiment: Experiment) -> Architecture:
    """The architecture a recipe asks for, normalised as it says, or by the ID training images.

    Raises:
        InputError: If the recipe's normalisation has not one value a channel.
    """
    mean, std = recipe.network.mean, recipe.network.std
    if not mean:
        mean, std = (tuple(values.tolist()) for values in experiment.train.channel_statistics())
        std = tuple(value if value > 1e-6 else 1.0 for value in std)  # a constant channel is only centred
    elif len(mean) != experiment.train.shape[0]:
        raise InputError(
            f"network.mean and network.std have {len(mean)} values, the images {experiment.train.shape[0]} channels"
        )
    options: dict[str, int] = {"width": recipe.network.width} if recipe.network.width else {}
    if recipe.network.name == "mlp":
        options["hidden_layers"] = recipe.network.hidden_layers
    return Architecture(
        name=recipe.network.name,
        shape=experiment.train.shape,
        classes=len(experiment.train.class_names),
        mean=tuple(mean),
        std=tuple(std),
        options=options,
    )


def _check_bounds(network: nn.Module, experiment: Experiment, section: ObjectiveSection) -> None:
    """Make sure that what the objective bounds can be bounded, on one image; leaves the network in eval mode.

    Raises:
        InputError: If the network holds a layer that cannot be bounded.
    """
    image, network = experiment.train.images[:1], network.eval()
    with torch.no_grad():
        if section.certified != "none":
            certified_loss(network, image, image, section.certified_eps, section)
        if section.lambda_grad > 0 and section.slope == "interval":
            interval_lipschitz(network, Ball(image, image.new_full((1,), section.slope_eps), "l2"))


def _images(
    recipe: Recipe, experiment: Experiment | None, data_dir: Path | None, download: bool, reporter: Reporter
) -> Experiment:
    """The images of a run, which can be trained on, cut into batches and calibrated on."""
    if experiment is None:
        with processes.first_goes_ahead():
            experiment = experiment_of(recipe, data_dir, download)
    for note in experiment.notes:
        reporter.say(note)
    check_images(experiment)
    _, calibration = split_calibration(experiment.calibration, recipe)
    metrics.calibrated_threshold(range(len(calibration)), metrics.TPR_PERCENT)  # refuses too small a split
    check_batches(recipe, experiment)
    return experiment


def _network(recipe: Recipe, architecture: Architecture, reporter: Reporter) -> nn.Module:
    """The network a run starts from: random weights of the recipe's seed, or those of its file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = architecture.build()
    section = recipe.network
    if section.pretrained:
        loaded = load_into(network, Path(section.pretrained), section.pretrained_allow)
        reporter.say(f"{section.pretrained}: {loaded}")
    return network


def _check_folder(out: Path, force: bool, resume: bool) -> None:
    """Make sure that a run may write to its folder."""
    target, state = out / "model.pt", out / "last.pt"
    if force and resume:
        raise InputError("--force begins a run again and --resume continues it; give one of the two")
    if target.exists() and resume and not state.exists():
        raise InputError(f"{target} exists: this run is finished, there is nothing to resume")
    if target.exists() and not (force or resume):
        raise InputError(f"{target} exists already; choose another --out, or add --force to overwrite it")
    if (words := first_line(out / "failed.txt")) is not None and not force:
        words = f"{out}: {words or 'training failed; begin again with --force'}"
        raise RunError(f"{words}; --resume would take the same steps and end the same" if resume else words)
    if state.exists() and not (force or resume):
        raise InputError(f"{state} is of an unfinished run; add --resume to continue it, or --force to begin again")


class _Files:
    """What a run writes, by its first process: `log.csv`, `last.pt`, `best.pt`; in the end `model.pt` or `failed.txt`."""

    def __init__(self, out: Path, recipe: Recipe, architecture: Architecture) -> None:
        self.out, self.recipe, self.architecture = out, recipe, architecture
        self.model, self.log, self.last, self.best, self.failed = self.all = [out / name for name in FILES]
        self.floor = accuracy_floor(recipe, architecture.classes)
        self.rows: list[dict[str, Any]] = []

    def resumed(self) -> TrainingState:
        """Where the unfinished run in the folder was saved; its rows are those of this one."""
        start, self.rows = checkpoint.load(self.last, self.recipe, self.architecture)
        return start

    @contextlib.contextmanager
    def held(self, resume: bool) -> Iterator[None]:
        """Keep other runs out of the folder, and clear away what this one replaces; say there if it can only fail."""
        check_writable(self.out)
        with locked(*self.all):
            for old in () if resume else self.all:
                try:
                    old.unlink(missing_ok=True)
                except OSError as error:
                    raise InputError(f"cannot replace {old}: {error.strerror or error}") from error
            try:
                yield
            except TrainingError as error:
                raise self._failed(error) from error

    def save(self, state: TrainingState) -> None:
        """Write what it takes to go on from here."""
        checkpoint.save(self.last, self.recipe, self.architecture, state, self.rows)

    def add(self, epoch: Epoch, network: nn.Module) -> None:
        """Write the record of an epoch, and its weights if they are the best so far."""
        self.rows.append(dataclasses.asdict(epoch))
        self._write_log()
        if best_epoch(self.rows, self.floor) == epoch.epoch:
            checkpoint.save_weights(self.best, epoch.epoch, network.state_dict())

    def _write_log(self) -> None:
        with checkpoint.writing(self.out):
            write_csv(self.log, [item.name for item in dataclasses.fields(Epoch)], self.rows)

    def best_weights(self) -> dict[str, Tensor]:
        """The weights of the best epoch."""
        if best_epoch(self.rows, self.floor) is None:
            raise TrainingError(
                f"no epoch reached an ID accuracy of {self.floor:.3f}, so there is none to keep; lower "
                "objective.lambda_grad, objective.lambda_S, optimizer.lr or evaluation.accuracy_floor"
            )
        return checkpoint.load_weights(self.best)

    def _failed(self, error: TrainingError) -> RunError:
        """Leave word why the run cannot go on where `train` and `status` find it, if there is room for it."""
        words = f"{error} and begin again, with --force or another --out"
        if self.best.exists():
            setting = shlex.quote(f"network.pretrained={self.best}")
            words += f"; its best epoch is a start too: --set {setting} with another --out"
        with contextlib.suppress(InputError), replacing(self.failed) as temporary:
            temporary.write_text(f"{words}\n", encoding="utf-8")
        return RunError(words)

    def finish(self, detector: Detector) -> None:
        """Write the detector; there is nothing to go on with any more.

        The log as well: a run that went on after its last epoch has not written it, and it may be damaged.
        """
        self._write_log()
        with checkpoint.writing(self.out):
            detector.save(self.model)
        for file in (self.last, self.failed):
            file.unlink(missing_ok=True)


def _warn(epoch: Epoch, floor: float, reporter: Reporter) -> None:
    if epoch.accuracy < floor:
        reporter.say(
            f"warning: epoch {epoch.epoch}: ID accuracy {epoch.accuracy:.3f} is below {floor:.3f}, the classifier has "
            "collapsed; lower objective.lambda_grad, objective.lambda_S or optimizer.lr"
        )


def _warn_margins(epoch: Epoch, network: nn.Module, recipe: Recipe, experiment: Experiment, reporter: Reporter) -> None:
    """Say so where the penalty had no sample to act on in the last epoch: none scored beyond the margins."""
    section = recipe.objective
    active = epoch.active_gradient_id > 0 or epoch.active_gradient_aux > 0
    if active or not section.lambda_grad > 0 or epoch.epoch < recipe.optimizer.epochs:
        return
    ranges = []
    for images in (experiment.calibration, experiment.auxiliary_heldout):
        scores = ENERGY.value(logits(network, images.images))
        ranges.append(f"from {float(scores.min()):.4g} to {float(scores.max()):.4g}")
    reporter.say(
        f"warning: in the last epoch no ID image scored below m_in = {section.m_in:g} and no outlier above "
        f"m_out = {section.m_out:g}, so objective.lambda_grad had nothing to act on: scores of ID run {ranges[0]}, of "
        f"outliers {ranges[1]}; choose objective.m_in and objective.m_out among them"
    )


def _detector(network: nn.Module, recipe: Recipe, architecture: Architecture, experiment: Experiment) -> Detector:
    """The trained network, in float64, with its threshold and what it is worth."""
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    network.double().eval().requires_grad_(False)
    _, calibration = split_calibration(experiment.calibration, recipe)
    score = named(recipe.evaluation.score, recipe.evaluation.temperature)
    values = score.value(logits(network, calibration.images)).numpy()
    return Detector(
        network=network,
        gamma=metrics.calibrated_threshold(values, metrics.TPR_PERCENT),
        shape=architecture.shape,
        class_names=experiment.train.class_names,
        architecture=architecture,
        provenance=Provenance(
            recipe=recipe,
            calibration={"samples": len(values), "percent": metrics.TPR_PERCENT},
            metrics=evaluate(network, experiment, score, recipe.evaluation.temperature),
            versions=versions(),
        ),
        score=score,
    )


def run(
    recipe: Recipe,
    out: Path,
    *,
    experiment: Experiment | None = None,
    data_dir: Path | None = None,
    download: bool = False,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
    checkpoint_steps: int = 0,
    reporter: Reporter = SILENT,
    report: Callable[[Epoch], None] = lambda epoch: None,
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
        experiment: What `experiment_of` makes of the recipe, where it is at hand; None: it is loaded.
        data_dir: Folder that holds downloaded data sets.
        download: Whether a missing torchvision set may be downloaded.
        device: "cpu", "cuda", ...
        force: Replace a run that is already there; it is gone as soon as training starts.
        resume: Go on with an unfinished run.
        checkpoint_steps: Steps after which an epoch is saved half-way; 0: epochs are saved when they end.
        reporter: Hears of every step, of what was loaded, and of an ID accuracy that has collapsed.
        report: Called with every epoch's record.

    Raises:
        InputError: If recipe, data, device or folder are unusable, before any work is spent.
        RunError: If training diverges, no epoch is worth keeping, or a file cannot be written any more; what was last
            saved is then still there. After the first two `failed.txt` says so, and the run can only be begun again.
    """
    first = processes.rank() == 0
    reporter = reporter if first else SILENT
    if first:
        _check_folder(out, force, resume)
    check_device(device)
    check_compute(recipe, torch.device(device))
    experiment = _images(recipe, experiment, data_dir, download and first, reporter)
    architecture = architecture_of(recipe, experiment)
    if pretrained := recipe.network.pretrained:
        check_apart((out / name for name in FILES), [Path(pretrained)])
    network = _network(recipe, architecture, reporter)
    _check_bounds(network, experiment, recipe.objective)
    files = _Files(out, recipe, architecture)
    start = processes.value_of_first(files.resumed() if resume and first else None)
    with files.held(resume) if first else contextlib.nullcontext():
        count = steps_per_epoch(recipe, experiment)
        done = (start.epoch - 1) * count + start.step if start else 0
        reporter.begin(f"train {recipe.name}", recipe.optimizer.epochs * count - done, "steps")
        save = files.save if first else lambda state: None
        for epoch in fit(
            network,
            experiment,
            recipe,
            device,
            reporter=reporter,
            start=start,
            save=save,
            checkpoint_steps=checkpoint_steps,
        ):
            if first:
                files.add(epoch, network)
                report(epoch)
                _warn(epoch, files.floor, reporter)
                _warn_margins(epoch, network, recipe, experiment, reporter)
        if recipe.evaluation.keep == "best":
            network.load_state_dict(processes.value_of_first(files.best_weights() if first else None))
        detector = _detector(network, recipe, architecture, experiment)
        if first:
            files.finish(detector)
    return detector
