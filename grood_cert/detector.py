"""A detector: network, threshold gamma, and what is known about where they came from.

A checkpoint is one file, `model.pt`, that `torch.load(weights_only=True)` opens: plain containers and tensors, with a
SHA-256 of them all and the scores of a few probe images, both of which are checked when it is loaded.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import grood_cert
from grood_cert import recipe
from grood_cert.errors import InputError
from grood_cert.metrics import calibrated_threshold
from grood_cert.networks import architectures
from grood_cert.networks.capture import capture
from grood_cert.networks.checks import check_eval, check_pixels, count_classes
from grood_cert.networks.graph import Graph
from grood_cert.networks.rebuild import Rebuilt
from grood_cert.recipe import Recipe
from grood_cert.scores import ENERGY, Score, parse
from grood_cert.sections import DataSection
from grood_cert.system.files import replacing
from grood_cert.system.torch_files import Format

_FORMAT = Format(
    "grood-cert checkpoint",
    version=2,
    expected="a model.pt written by grood-cert train or import",
    absent="no such checkpoint; make one with grood-cert train RECIPE --out FOLDER, or grood-cert import",
)
_BATCH = 128
_PROBES = 4
_AGREEMENT = 1e-9  # processors sum in other orders; that moves a float64 score by some 1e-13, any fault by far more


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "grood_cert": grood_cert.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def check_device(device: str) -> None:
    """Make sure that a device is there and computes in float64.

    Raises:
        InputError: If not.

    Example:
        >>> check_device("cpu")
    """
    try:
        torch.ones(1, dtype=torch.float64, device=device).item()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"device {device!r} cannot be used here; use cpu ({reason[:120]})") from error


def check_network(network: nn.Module) -> None:
    """Refuse a network that is not the one that proofs are about: eval mode, float64.

    Raises:
        InputError: If a module is in train mode, there are no parameters, or one of them is not float64.
    """
    check_eval(network)
    kinds = {str(value.dtype) for value in network.parameters()}
    if kinds != {"torch.float64"}:
        found = ", ".join(sorted(kinds - {"torch.float64"})) or "one without parameters"
        raise InputError(f"proofs need a float64 network, got {found}; call network.double() first")


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """f(x) for many images, in batches, on the network's device and in its floating-point type.

    Args:
        network: f; used in the mode it is in.
        images: Shape (N, C, H, W).

    Returns:
        Shape (N, K), on the CPU.
    """
    weight = next(network.parameters())
    with torch.no_grad():
        return torch.cat([network(batch.to(weight)).cpu() for batch in images.split(_BATCH)])


@dataclass(frozen=True)
class Architecture:
    """What `grood_cert.networks.architectures.build` needs to make the network again."""

    name: str
    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    options: dict[str, int]

    def build(self) -> architectures.Classifier:
        """A fresh network of this architecture.

        Raises:
            InputError: If a name or an option is unknown.
        """
        try:
            return architectures.build(self.name, self.shape, self.classes, self.mean, self.std, **self.options)
        except TypeError as error:
            raise InputError(f"network {self.name!r} does not take these options: {error}") from None


@dataclass(frozen=True)
class Provenance:
    """Where a trained detector came from.

    Attributes:
        recipe: The run that trained it.
        calibration: Number of calibration samples and the level asked for.
        metrics: What the training run measured on its test sets.
        versions: Software the run used.
    """

    recipe: Recipe
    calibration: dict[str, int]
    metrics: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class Import:
    """Where a detector came from that was trained elsewhere.

    Attributes:
        name: What it is called.
        source: What the network was made of, as a line.
        data: Images that it is calibrated and tested on; `auxiliary` and what is about training play no part.
        calibration: Number of calibration samples and the level asked for.
        metrics: What was measured on its test sets.
        versions: Software used.
    """

    name: str
    source: str
    data: DataSection
    calibration: dict[str, int]
    metrics: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class Prediction:
    """What a detector says about images.

    Attributes:
        score: S(x), float64, shape (N,).
        accepted: S(x) <= gamma, shape (N,).
        label: The largest logit, shape (N,).
    """

    score: Tensor
    accepted: Tensor
    label: Tensor


@dataclass(frozen=True)
class Detector:
    """A network, a score and a threshold: accept x as ID iff S(x) <= gamma.

    Attributes:
        network: f, normalisation included, in eval mode and float64.
        gamma: Threshold, calibrated on held-out ID data.
        shape: Channels, height and width of an image.
        class_names: One name a logit, or none at all.
        architecture: How the network is built again; None: a checkpoint holds it as a graph of operations.
        provenance: The training run, or the import; None: made in Python.
        score: S.

    Raises:
        InputError: If the network is in train mode or not float64, does not turn images of this shape into logits, or
            its parts do not fit one another.
    """

    network: nn.Module
    gamma: float
    shape: tuple[int, int, int]
    class_names: tuple[str, ...] = ()
    architecture: Architecture | None = None
    provenance: Provenance | Import | None = None
    score: Score = ENERGY

    def __post_init__(self) -> None:
        check_network(self.network)
        object.__setattr__(self, "gamma", float(self.gamma))
        object.__setattr__(self, "shape", tuple(self.shape))
        if not isinstance(self.score, Score):
            raise InputError(f"expected a score such as Energy() or MSP(), got {self.score!r}")
        if not math.isfinite(self.gamma):
            raise InputError(f"gamma is {self.gamma}; expected a finite number")
        if self.architecture and self.architecture.shape != self.shape:
            raise InputError(f"the architecture takes images of shape {self.architecture.shape}, not {self.shape}")
        classes = self.classes
        if self.class_names and len(self.class_names) != classes:
            raise InputError(f"{len(self.class_names)} class names for {classes} logits")

    @staticmethod
    def calibrate(
        model: nn.Module,
        id_images: Tensor,
        *,
        score: Score = ENERGY,
        tpr: int = 95,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] = (),
    ) -> Detector:
        """Make a detector of any classifier: gamma is the split-conformal quantile of S on ID images.

        Args:
            model: f: (B, C, H, W) -> (B, K), in eval mode. Copied to float64; the copy is frozen.
            id_images: ID images that the model was not trained on, pixels in [0, 1], shape (N, C, H, W).
            score: S.
            tpr: Percent of ID to accept.
            mean: With `std`, for each channel: what the model wants subtracted from pixels, if it was trained so.
            std: And what it wants them divided by.
            class_names: One name a logit.

        Raises:
            InputError: If the model is in train mode, does not fit the images, or there are too few of them.

        Example:
            >>> model, images = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval(), torch.rand(99, 1, 2, 2)
            >>> int(Detector.calibrate(model, images).predict(images).accepted.sum())
            95
        """
        if not isinstance(model, nn.Module):
            raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
        if (mean is None) != (std is None):
            raise InputError("normalisation needs both mean and std")
        check_pixels(id_images)
        network = copy.deepcopy(model).double()
        check_network(network)
        if mean is not None and std is not None:
            if len(mean) != id_images.shape[1]:
                raise InputError(f"normalisation has {len(mean)} channels, the images have {id_images.shape[1]}")
            normalize = architectures.Normalize(mean, std).to(next(network.parameters()))
            network = nn.Sequential(normalize, network).eval()
        _, channels, height, width = id_images.shape
        shape = channels, height, width
        detector = Detector(network.requires_grad_(False), 0.0, shape, tuple(class_names), score=score)
        return replace(detector, gamma=calibrated_threshold(detector.scores(id_images).numpy(), tpr))

    @property
    def name(self) -> str:
        """The recipe's name, that given at its import, or that of the network's class."""
        if isinstance(self.provenance, Import):
            return self.provenance.name
        return self.provenance.recipe.name if self.provenance else type(self.network).__name__

    @property
    def origin(self) -> Provenance:
        """The training run, where one is needed.

        Raises:
            InputError: If there is none.
        """
        if not isinstance(self.provenance, Provenance):
            raise InputError("this detector came without a recipe: it was not trained by grood-cert")
        return self.provenance

    @property
    def classes(self) -> int:
        """Number of logits K."""
        return count_classes(self.network, self.shape)

    def scores(self, images: Tensor) -> Tensor:
        """S(x) in float64, shape (N,)."""
        check_eval(self.network)
        return self.score.value(logits(self.network, images))

    def predict(self, images: Tensor) -> Prediction:
        """Score, decision and label of images of shape (N, C, H, W), pixels in [0, 1].

        Raises:
            InputError: If the images have another shape, or pixels outside [0, 1].
        """
        check_eval(self.network)
        check_pixels(images, self.shape)
        values = logits(self.network, images)
        score = self.score.value(values)
        return Prediction(score, score <= self.gamma, values.argmax(1))

    def save(self, path: Path | str) -> None:
        """Write the checkpoint; weights as float32 where that loses nothing, as after training.

        Raises:
            InputError: If the network cannot be captured as a graph, which a network that is none of the package's must
                be, the detector could not be loaded again, or the file cannot be written.
        """
        content: dict[str, Any] = {
            "shape": list(self.shape),
            "class_names": list(self.class_names),
            "score": str(self.score),
            "gamma": self.gamma,
        }
        if self.architecture:
            content["architecture"] = {**vars(self.architecture), "shape": list(self.shape)}
            content["state_dict"] = {name: _single(value.cpu()) for name, value in self.network.state_dict().items()}
        else:
            content["graph"] = capture(self.network, self.shape).to_plain()
        content |= _plain(self.provenance)
        images = probes(self.shape)
        try:
            found = _detector_of(content, Path(path)).scores(images)
            stream = _FORMAT.packed({**content, "probe_scores": found})
            _FORMAT.unpacked(Path(path), stream)
        except InputError as error:
            raise InputError(f"this detector cannot be saved, because it could not be loaded again: {error}") from error
        if not _difference(self.scores(images), found) <= _AGREEMENT:
            raise InputError("this detector cannot be saved: what would be loaded again is not its network")
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(stream.getbuffer())


def probes(shape: tuple[int, int, int]) -> Tensor:
    """Images whose scores a checkpoint keeps, shape (4, C, H, W), float64.

    Multiples of the golden ratio modulo 1: two roundings a pixel, so that they are the same bits everywhere.

    Example:
        >>> probes((1, 1, 2)).flatten()[:3]
        tensor([0.6180, 0.2361, 0.8541], dtype=torch.float64)
    """
    numbers = torch.arange(1, _PROBES * math.prod(shape) + 1, dtype=torch.float64)
    return (numbers * ((math.sqrt(5) - 1) / 2) % 1).reshape(_PROBES, *shape)


def _difference(scores: Tensor, others: Tensor) -> float:
    """Largest difference of two lists of scores, relative to 1 + |S|."""
    return float(((scores - others).abs() / (1 + others.abs())).max())


def _single(tensor: Tensor) -> Tensor:
    single = tensor.float()
    return single if tensor.is_floating_point() and torch.equal(single.to(tensor), tensor) else tensor


def _plain(provenance: Provenance | Import | None) -> dict[str, Any]:
    if provenance is None:
        return {}
    parts = {item.name: getattr(provenance, item.name) for item in dataclasses.fields(provenance)}
    if isinstance(provenance, Provenance):
        return parts | {"recipe": provenance.recipe.to_dict()}
    data = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(provenance.data).items()}
    return {"imported": parts | {"data": data}}


class _OtherVersionError(InputError):
    """The content is what was written, and means nothing to this version."""


def _provenance(content: Mapping[str, Any], path: Path) -> Provenance | Import | None:
    if "imported" in content:
        given: dict[str, Any] = dict(content["imported"])
        data: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in given["data"].items()
        }
        return Import(**{**given, "data": DataSection(**data)})
    if not {item.name for item in dataclasses.fields(Provenance)} & set(content):
        return None
    try:
        made_by = recipe.from_dict(content["recipe"])
    except InputError as error:
        raise _OtherVersionError(
            f"{path}: written by another version of grood-cert, which reads it ({error})"
        ) from error
    return Provenance(
        recipe=made_by,
        calibration=dict(content["calibration"]),
        metrics=dict(content["metrics"]),
        versions=dict(content["versions"]),
    )


def _architecture(fields: Mapping[str, Any]) -> Architecture:
    return Architecture(
        name=fields["name"],
        shape=tuple(fields["shape"]),
        classes=int(fields["classes"]),
        mean=tuple(fields["mean"]),
        std=tuple(fields["std"]),
        options=dict(fields["options"]),
    )


def _detector_of(content: Mapping[str, Any], path: Path) -> Detector:
    """The detector that a checkpoint describes."""
    try:
        shape = tuple(int(size) for size in content["shape"])
        gamma, architecture = float(content["gamma"]), None
        if "graph" in content:
            network: nn.Module = Rebuilt(Graph.from_plain(content["graph"]))
        else:
            architecture = _architecture(content["architecture"])
            with torch.random.fork_rng(devices=[]):
                network = architecture.build().double()
            network.load_state_dict(content["state_dict"], strict=True)
        if not all(
            bool(torch.isfinite(value).all()) for value in (*network.state_dict().values(), torch.tensor(gamma))
        ):
            raise InputError("it holds weights or a gamma that are not finite")
        return Detector(
            network=network.eval().requires_grad_(False),
            gamma=gamma,
            shape=(shape[0], shape[1], shape[2]),
            class_names=tuple(content["class_names"]),
            architecture=architecture,
            provenance=_provenance(content, path),
            score=parse(content["score"]),
        )
    except _OtherVersionError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{path}: damaged checkpoint ({kind}{' '.join(str(error).split())[:160]})") from error


def load(path: Path | str, device: str = "cpu") -> Detector:
    """Read a checkpoint.

    Args:
        path: A `model.pt` written by a training run.
        device: Where the network shall live.

    Raises:
        InputError: If the file is missing, damaged or no checkpoint of ours, its weights do not fit, or its network
            computes other scores of the probe images than when it was saved.
    """
    check_device(device)
    content = _FORMAT.unpacked(Path(path))
    detector = _detector_of(content, Path(path))
    stored = content.get("probe_scores")
    if not isinstance(stored, Tensor) or stored.shape != (_PROBES,):
        raise InputError(f"{path}: damaged checkpoint (no scores of {_PROBES} probe images)")
    if not (difference := _difference(detector.scores(probes(detector.shape)), stored)) <= _AGREEMENT:
        raise InputError(
            f"{path}: its network computes other scores now than when it was saved (probe images differ by "
            f"{difference:.0e}, more than rounding explains); use the versions of grood-cert and torch that wrote it"
        )
    detector.network.to(device)
    return detector
