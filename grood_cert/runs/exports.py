"""A detector's network as a file for other programs: ONNX, or weights under published names.

ONNX holds the whole network, which takes pixels in [0, 1]. Files of weights hold what published code calls the network:
it takes images that were normalised before. Beside each stands FILE.json with everything else that a detector is:
normalisation, score, gamma, class names.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from grood_cert.detector import Detector, probes, versions
from grood_cert.errors import InputError, RunError
from grood_cert.networks.architectures import Normalize
from grood_cert.networks.weights import published_state
from grood_cert.runs.onnx_file import write_onnx
from grood_cert.system.files import check_apart, replacing, sha256, write_json
from grood_cert.system.torch_files import opened

Format = Literal["onnx", "safetensors", "state-dict", "openood", "pytorch-ood"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Published:
    """A network of another package that takes our weights.

    Attributes:
        call: How it is made; `K` stands for the number of classes, `C` for that of channels.
        features: Width of its last hidden layer, by which thinner ones of ours are told apart.
        any_channels: Whether it takes other images than RGB.
        any_size: Whether it takes other images than 32x32.
    """

    call: str
    features: int
    any_channels: bool = False
    any_size: bool = False


PUBLISHED: dict[str, dict[str, Published]] = {
    "openood": {
        "resnet18": Published("openood.networks.ResNet18_32x32(num_classes=K)", 512, any_size=True),
        "resnet18-imagenet": Published("openood.networks.ResNet18_224x224(num_classes=K)", 512, any_size=True),
        "wrn-40-2": Published("openood.networks.WideResNet(depth=40, widen_factor=2, num_classes=K)", 128),
        "densenet-bc-100": Published("openood.networks.DenseNet3(num_classes=K)", 342),
    },
    "pytorch-ood": {
        "resnet18-imagenet": Published("pytorch_ood.model.ResNet18(num_classes=K)", 512, any_size=True),
        "wrn-40-2": Published("pytorch_ood.model.WideResNet(num_classes=K, in_channels=C)", 128, any_channels=True),
    },
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        beside: Its description.
        said: What is in it, for the user.
    """

    path: Path
    beside: Path
    said: str


def export(detector: Detector, path: Path, form: Format, *, model: Path | None = None, force: bool = False) -> Exported:
    """Write a detector's network for other programs, and FILE.json beside it.

    Args:
        detector: The detector.
        path: Where to write.
        form: "onnx"; "safetensors" or "state-dict" (`torch.save`): weights under their published names; "openood" or
            "pytorch-ood": the same, for a network of that package, which loads them strictly.
        model: The checkpoint it came from, which is not overwritten.
        force: Overwrite files that are there.

    Raises:
        InputError: If the format is unknown, there is a file already, or that package has no such network.
        RunError: If a package that the format needs is missing, or the file does not agree with the network.
    """
    if form not in FORMATS:
        raise InputError(f"unknown format {form!r}; use one of {', '.join(FORMATS)}")
    if not path.name or path.is_dir():
        raise InputError(f"{path} is a folder; expected the name of a file")
    beside = path.with_name(f"{path.name}.json")
    check_apart((path, beside), [model] if model else [])
    for place in (path, beside):
        if place.exists() and not force:
            raise InputError(f"{place} exists already; choose another --out, or add --force to overwrite it")
    normalize = next((module for module in detector.network.modules() if isinstance(module, Normalize)), None)
    description: dict[str, Any] = {"format": form, "input": "pixels in [0, 1]"}
    if form == "onnx":
        difference = write_onnx(detector.network, probes(detector.shape), path, any_batch=True)
        said = (
            "the logits of pixels in [0, 1], normalisation inside, float32, any number of images; they differ from "
            f"float64 by {difference:.0e} of the largest"
        )
    else:
        exact = published_state(detector.network)
        state = {name: _single(tensor) for name, tensor in exact.items()}
        taker = _taker(detector, form, state)
        _write_state(state, path, "safetensors" if form == "safetensors" else "torch")
        rounded = any(not torch.equal(tensor.to(exact[name]), exact[name]) for name, tensor in state.items())
        said = f"{len(state)} tensors{', rounded to float32' if rounded else ''}"
        if taker:
            description["network"] = taker
            said += f" for {taker}, which loads them strictly"
        if normalize is not None:
            mean, std = (values.flatten().tolist() for values in (normalize.mean, normalize.std))
            description |= {"input": "(pixels - mean) / std", "mean": mean, "std": std}
            said += (
                "; normalisation is not among them: they want (x - mean) / std with mean "
                f"{_numbers(mean)} and std {_numbers(std)}"
            )
    architecture = detector.architecture
    description |= {
        "architecture": architecture and {"name": architecture.name, "options": architecture.options},
        "shape": detector.shape,
        "classes": detector.classes,
        "class_names": detector.class_names,
        "score": str(detector.score),
        "gamma": detector.gamma,
        "accepted": "score <= gamma",
        "sha256": sha256(path),
        "versions": versions(),
    }
    write_json(beside, description)
    return Exported(path, beside, said)


def _taker(detector: Detector, form: Format, state: dict[str, Tensor]) -> str | None:
    """The network of another package that takes these weights; None for a file that is for no one in particular."""
    if form not in PUBLISHED:
        return None
    name = detector.architecture.name if detector.architecture else f"of your own ({type(detector.network).__name__})"
    known = PUBLISHED[form]
    if name not in known:
        raise InputError(f"{form} has no network {name!r}; it has {', '.join(known)} of ours; use --format state-dict")
    taker, (channels, *size) = known[name], detector.shape
    width = int(state["fc.weight"].shape[1])
    wrong = {
        f"{taker.features} features, this one {width}": width != taker.features,
        f"RGB images, this one {channels} channels": channels != 3 and not taker.any_channels,
        f"images of 32x32, this one {size[0]}x{size[1]}": size != [32, 32] and not taker.any_size,
    }
    for reason, applies in wrong.items():
        if applies:
            raise InputError(f"{form}: {taker.call.partition('(')[0]} has {reason}; use --format state-dict")
    return taker.call.replace("=K", f"={detector.classes}").replace("=C", f"={channels}")


def _single(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().clone().contiguous()


def _write_state(state: dict[str, Tensor], path: Path, kind: Literal["safetensors", "torch"]) -> None:
    if kind == "torch":
        stream = io.BytesIO()
        torch.save(state, stream)
        content = stream.getvalue()
    else:
        try:
            pack: Callable[[dict[str, Tensor]], bytes] = importlib.import_module("safetensors.torch").save
        except ImportError:
            raise RunError("this format needs the package safetensors: pip install safetensors") from None
        content = pack(state)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        again = opened(temporary)
        if again.keys() != state.keys() or not all(torch.equal(again[name], state[name]) for name in state):
            raise RunError("the exported weights are not those of the model; nothing was written")


def _numbers(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
