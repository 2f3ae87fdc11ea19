"""A trained detector: network, threshold gamma, and all that is needed to know where they came from.

A checkpoint is one file, `model.pt`, that `torch.load(weights_only=True)` opens: plain containers and tensors.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import grood_cert
from grood_cert import recipe
from grood_cert.errors import InputError
from grood_cert.networks import architectures
from grood_cert.recipe import Recipe
from grood_cert.scores import energy
from grood_cert.system.files import replacing

_FORMAT = "grood-cert checkpoint"
_FORMAT_VERSION = 1
_BATCH = 256


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
        InputError: If a module is in train mode or a parameter is not float64.
    """
    if any(module.training for module in network.modules()):
        raise InputError("the network is in train mode; call network.eval() first")
    wrong = {str(value.dtype) for value in network.parameters() if value.dtype != torch.float64}
    if wrong:
        raise InputError(f"proofs need a float64 network, got {', '.join(sorted(wrong))}; call network.double() first")


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
class Detector:
    """An energy detector: accept x as ID iff S(x) <= gamma.

    Attributes:
        network: f, normalisation included, in eval mode and float64.
        gamma: Threshold, calibrated on held-out ID data.
        architecture: How the network is built.
        class_names: One name a logit.
        recipe: The run that trained it.
        calibration: Number of calibration samples and the level asked for.
        metrics: What the training run measured on its test sets.
        versions: Software the run used.
    """

    network: nn.Module
    gamma: float
    architecture: Architecture
    class_names: tuple[str, ...]
    recipe: Recipe
    calibration: dict[str, int]
    metrics: dict[str, Any]
    versions: dict[str, str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.architecture.shape

    def score(self, images: Tensor) -> Tensor:
        """S(x) in float64, shape (N,)."""
        return energy(logits(self.network, images))

    def save(self, path: Path) -> None:
        """Write the checkpoint; weights as float32 where that loses nothing, as after training.

        Raises:
            InputError: If the file cannot be written.
        """
        state = {name: _single(tensor.cpu()) for name, tensor in self.network.state_dict().items()}
        content = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "architecture": {**vars(self.architecture), "shape": list(self.architecture.shape)},
            "class_names": list(self.class_names),
            "state_dict": state,
            "gamma": self.gamma,
            "calibration": self.calibration,
            "recipe": self.recipe.to_dict(),
            "metrics": self.metrics,
            "versions": self.versions,
        }
        with replacing(path) as temporary, temporary.open("wb") as stream:  # a path would leave its name in the bytes
            torch.save(content, stream)


def _single(tensor: Tensor) -> Tensor:
    single = tensor.float()
    return single if tensor.is_floating_point() and torch.equal(single.to(tensor), tensor) else tensor


def load(path: Path, device: str = "cpu") -> Detector:
    """Read a checkpoint.

    Args:
        path: A `model.pt` written by a training run.
        device: Where the network shall live.

    Raises:
        InputError: If the file is missing, is truncated, is no checkpoint of ours, or its weights do not fit.
    """
    check_device(device)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; train one with: grood-cert train RECIPE --out FOLDER") from None
    except Exception as error:  # torch.load raises a dozen kinds on foreign and damaged files
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: not a grood-cert checkpoint, or a truncated one ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InputError(f"{path}: not a grood-cert checkpoint; expected a model.pt written by grood-cert train")
    if content.get("format_version") != _FORMAT_VERSION:
        raise InputError(
            f"{path}: checkpoint format {content.get('format_version')}; this version reads {_FORMAT_VERSION}"
        )
    try:
        fields = content["architecture"]
        architecture = Architecture(
            name=fields["name"],
            shape=tuple(fields["shape"]),
            classes=int(fields["classes"]),
            mean=tuple(fields["mean"]),
            std=tuple(fields["std"]),
            options=dict(fields["options"]),
        )
        network = architecture.build().double()
        network.load_state_dict(content["state_dict"], strict=True)
        gamma = float(content["gamma"])
        detector = Detector(
            network=network.eval().requires_grad_(False),
            gamma=gamma,
            architecture=architecture,
            class_names=tuple(content["class_names"]),
            recipe=recipe.from_dict(content["recipe"], f"{path}: recipe"),
            calibration=dict(content["calibration"]),
            metrics=dict(content["metrics"]),
            versions=dict(content["versions"]),
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: damaged checkpoint ({type(error).__name__}: {reason})") from error
    tensors = [*network.state_dict().values(), torch.tensor(gamma)]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise InputError(f"{path}: the checkpoint holds weights or a gamma that are not finite")
    if len(detector.class_names) != architecture.classes:
        raise InputError(
            f"{path}: damaged checkpoint ({len(detector.class_names)} class names for {architecture.classes} logits)"
        )
    network.to(device)
    return detector
