"""A detector of a network that was trained elsewhere: calibrated and evaluated here, not trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grood_cert import metrics
from grood_cert.data import load_evaluation, parse_spec
from grood_cert.detector import Architecture, Detector, Import, check_device, logits, versions
from grood_cert.errors import InputError
from grood_cert.networks import architectures, origins
from grood_cert.networks.capture import capture
from grood_cert.networks.rebuild import Rebuilt
from grood_cert.scores import ENERGY, Score
from grood_cert.sections import DataSection
from grood_cert.system.files import check_apart, check_writable
from grood_cert.system.reporting import SILENT, Reporter
from grood_cert.training.evaluation import evaluate


def run(
    origin: str | Path,
    out: Path,
    data: DataSection,
    *,
    weights: Path | None = None,
    options: Mapping[str, Any] | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    score: Score = ENERGY,
    tpr: int = metrics.TPR_PERCENT,
    class_names: Sequence[str] = (),
    name: str = "",
    data_dir: Path | None = None,
    download: bool = False,
    device: str = "cpu",
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Detector:
    """Make a detector of a network from elsewhere and write its checkpoint.

    gamma is the split-conformal quantile of S on the calibration images, computed in float64. The network is captured as
    a graph, and the checkpoint holds that: it is complete without the code that the network came from. Networks of the
    package's own architectures keep their names.

    Args:
        origin: A file, or a name; see `grood_cert.networks.origins`.
        out: The checkpoint.
        data: Images to calibrate and test on, see `grood_cert.data.load_evaluation`.
        weights: File of weights for a network that is named.
        options: Arguments for what makes a network that is named.
        mean: For each channel, what the network wants subtracted from pixels in [0, 1]; where nothing is given, what its
            library says, else 0.
        std: And what it wants them divided by.
        score: S.
        tpr: Percent of ID to accept.
        class_names: One name a logit; those of the ID set if it has as many classes, where none are given.
        name: What the detector is called; the network's own name by default.
        data_dir: As for `load_evaluation`.
        download: As for `load_evaluation`.
        device: Where to evaluate.
        force: Overwrite `out`.
        reporter: Hears what was loaded from where.

    Raises:
        InputError: If network, weights or images make no sense or do not fit, or the network cannot be captured.
        RunError: If a package that is needed is missing, or the graph does not compute what the network does.
    """
    inputs = [path for path in (weights, origin if isinstance(origin, Path) else None) if path]
    inputs += [Path(parse_spec(spec)[0]) for spec in (data.id, data.test, data.calibration, *data.ood) if spec]
    _check_output(out, force, inputs)
    check_device(device)
    if bool(mean) != bool(std):
        raise InputError("normalisation needs both --mean and --std")
    if isinstance(origin, Path) and (weights or options):
        raise InputError(f"{origin} holds its weights; --weights and --option are for networks that are named")
    sets = load_evaluation(data, data_dir, download)
    for note in sets.notes:
        reporter.say(note)
    shape, classes = sets.test.shape, len(sets.test.class_names)
    if isinstance(origin, Path):
        found = origins.from_file(origin, shape)
    else:
        found = origins.from_name(origin, shape, classes, weights, options or {})
    for note in found.notes:
        reporter.say(note)
    if not mean and found.mean:
        mean, std = found.mean, found.std
        reporter.say(f"normalisation of {found.source}: mean {_listed(mean)}, std {_listed(std)}")
    elif not mean:
        reporter.say("no --mean and --std: the network is taken to expect pixels in [0, 1]")
    if mean and (len(mean) != shape[0] or len(std) != shape[0]):
        raise InputError(f"normalisation has {len(mean)} and {len(std)} channels, the images have {shape[0]}")
    network, architecture = _normalised(found, shape, classes, mean, std, options or {})
    network.to(device)
    if architecture is None:
        reporter.say("capturing the network as a graph of operations")
        network = Rebuilt(capture(network, shape, sets.calibration.images[:64].double()))
    logit_count = Detector(network, 0.0, shape).classes
    names = tuple(class_names) or (sets.test.class_names if classes == logit_count else ())
    values = score.value(logits(network, sets.calibration.images)).numpy()
    measured = evaluate(network, sets, score)
    if classes != logit_count:
        measured["accuracy"] = None
        reporter.say(f"the ID set has {classes} classes, the network {logit_count} logits: no accuracy is said")
    detector = Detector(
        network=network,
        gamma=metrics.calibrated_threshold(values, tpr),
        shape=shape,
        class_names=names,
        architecture=architecture,
        provenance=Import(
            name=name or found.name,
            source=found.source,
            data=data,
            calibration={"samples": len(values), "percent": tpr},
            metrics=measured,
            versions=versions(),
        ),
        score=score,
    )
    detector.save(out)
    return detector


def _normalised(
    found: origins.Foreign,
    shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    options: Mapping[str, Any],
) -> tuple[nn.Module, Architecture | None]:
    """The network on pixels in [0, 1], float64; for one of our own with what builds it again."""
    network = found.network.double().eval().requires_grad_(False)
    if found.architecture:
        mean, std = tuple(mean) or (0.0,) * shape[0], tuple(std) or (1.0,) * shape[0]
        architecture = Architecture(found.architecture, shape, classes, mean, std, dict(options))
        own = next(module for module in network.modules() if isinstance(module, architectures.Normalize))
        for buffer, values in ((own.mean, mean), (own.std, std)):
            buffer.copy_(torch.tensor(values).reshape(buffer.shape))  # float32 numbers, as the architecture makes them
        return network, architecture
    if mean:
        network = nn.Sequential(architectures.Normalize(mean, std).double(), network).eval()
    return network, None


def _check_output(out: Path, force: bool, inputs: Sequence[Path]) -> None:
    if not out.name or out.is_dir():
        raise InputError(f"{out} is a folder; expected the name of a file such as {out / 'model.pt'}")
    check_apart([out], inputs)
    if out.exists() and not force:
        raise InputError(f"{out} exists already; choose another --out, or add --force to overwrite it")
    check_writable(out.parent)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
