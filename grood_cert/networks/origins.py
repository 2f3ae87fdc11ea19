"""Networks that were made elsewhere: from a file, or by a name and a file of weights.

| origin | network |
|---|---|
| ``FILE.onnx`` | the file's graph (`grood_cert.networks.onnx`) |
| ``FILE.pt2`` | a program saved by ``torch.export.save``, or its like from `torch.export` |
| ``package.module:factory`` | what the user's own function or class answers when it is called; it is imported and run |
| ``torchvision:NAME``, ``timm:NAME`` | that library's model |
| a name of `grood_cert.networks.architectures` | ours, for images of the ID set's shape and as many classes |
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grood_cert.errors import InputError, said
from grood_cert.networks import architectures
from grood_cert.networks.capture import capture
from grood_cert.networks.onnx import read_onnx
from grood_cert.networks.programs import read_program
from grood_cert.networks.rebuild import Rebuilt
from grood_cert.networks.weights import load_into

FILES = ".onnx", ".pt2"


@dataclass(frozen=True)
class Foreign:
    """A network from elsewhere, in eval mode.

    Attributes:
        network: f, without normalisation unless it has its own; float64 where it was read from a file.
        name: What to call it.
        source: Where it came from, as a line.
        notes: Lines on what was loaded, and what was not.
        mean: What its library says the model wants subtracted from pixels; () if nothing is known.
        std: And what it wants them divided by.
        architecture: Its name among our architectures, "" if it is none.
    """

    network: nn.Module
    name: str
    source: str
    notes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    architecture: str = ""


def from_file(path: Path, shape: tuple[int, int, int]) -> Foreign:
    """The network in a file.

    Args:
        path: An ONNX file, or a program that ``torch.export.save`` wrote.
        shape: Shape (C, H, W) of an image.

    Raises:
        InputError: If it is missing or no such file, or holds what cannot be bounded.
        RunError: If a package that reads it is missing, or what was read does not compute what the file does.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".onnx":
        graph = read_onnx(path)
        if graph.shape != shape:
            raise InputError(f"{path}: it takes images of shape {graph.shape}, the ID set has images of shape {shape}")
    elif path.suffix == ".pt2":
        graph = capture(read_program(path), shape)
    else:
        raise InputError(f"{path}: expected a file of the kind {' or '.join(FILES)}; weights go with --network")
    return Foreign(Rebuilt(graph), path.stem, f"file {path.name}")


def from_name(
    name: str, shape: tuple[int, int, int], classes: int, weights: Path | None, options: Mapping[str, Any]
) -> Foreign:
    """The network of a name.

    Args:
        name: As in the table above.
        shape: Shape (C, H, W) of an image.
        classes: Number of classes of the ID set; our own architectures take it as their number of logits.
        weights: File of its weights; a factory of the user's may have none.
        options: Arguments for what makes the network.

    Raises:
        InputError: If there is no such network, it cannot be made so, or the weights do not fit or are missing.
    """
    library, colon, rest = name.partition(":")
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    if not colon:
        plain = [0.0] * shape[0], [1.0] * shape[0]
        made = _called(name, lambda **given: architectures.build(name, shape, classes, *plain, **given), options)
    elif library == "torchvision":
        from torchvision import models

        if rest not in models.list_models():
            raise InputError(f"torchvision has no model {rest!r}")
        made = _called(name, lambda **given: models.get_model(rest, weights=None, **given), options)
    elif library == "timm":
        try:
            timm = importlib.import_module("timm")
        except ModuleNotFoundError:
            raise InputError(f"{name}: timm is not installed; run: pip install timm") from None
        made = _called(name, lambda **given: timm.create_model(rest, pretrained=False, **given), options)
        settings: Any = getattr(made, "pretrained_cfg", None) or {}
        mean, std = tuple(settings.get("mean", ())), tuple(settings.get("std", ()))
    else:
        made = _called(name, _factory(library, rest), options)
    if weights is None and (not colon or library in ("torchvision", "timm")):
        raise InputError(f"{name}: its weights are missing; give them with --weights FILE")
    notes = [f"{name}: no weights were loaded: it is as the factory made it"]
    if weights is not None:
        notes = [f"{weights}: {load_into(made, weights)}"]
    source = f"{name}" + (f" with weights {weights.name}" if weights else "")
    own = "" if colon else name
    return Foreign(
        made.eval(),
        rest if library in ("torchvision", "timm") else name,
        source,
        tuple(notes),
        tuple(mean),
        tuple(std),
        own,
    )


def _factory(module: str, path: str) -> Callable[..., Any]:
    """What ``module:path`` names, found from the current folder too."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{module}:{path}: no module {error.name!r}; it is looked for in the current folder and among the installed ones"
        ) from error
    except AttributeError as error:
        raise InputError(f"{module}:{path}: {error}") from error
    except Exception as error:
        raise InputError(f"{module}:{path}: importing it fails ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise InputError(f"{module}:{path}: a {type(found).__name__}, not a function or class that makes a network")
    return found  # type: ignore[no-any-return]


def _called(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            made = factory(**options)
    except InputError:
        raise
    except Exception as error:
        reason = said(error)[:160]
        raise InputError(f"{name}: cannot be made with these options ({type(error).__name__}: {reason})") from error
    if not isinstance(made, nn.Module):
        kind = made.__name__ if inspect.isclass(made) else type(made).__name__
        raise InputError(f"{name}: makes a {kind}, not a torch.nn.Module")
    return made
