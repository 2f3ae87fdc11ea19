"""Weights from a file into a network, strictly: what does not fit is refused by name, never skipped.

The file is a state dict that ``torch.load(weights_only=True)`` opens, plain or under ``state_dict``, ``model`` or
``net``; so are this package's own checkpoints. Parameter names are translated where publications differ:

* ``module.``, which DataParallel puts before every name, is taken off;
* the head may be called ``fc``, ``linear`` or ``classifier``;
* ``resnet18`` understands the names of torchvision and of the CIFAR literature (``layer1.0.bn1``, ``shortcut`` or
  ``downsample``);
* the first files of torchvision's DenseNet say ``norm.1`` where its code says ``norm1``.

Normalisation belongs to the recipe, not to the file: the mean and std of a network stay what they are. BatchNorm's
counter of batches may be missing, as in files of torch < 0.4.1; nothing is computed from it.

Why so strict: a fine-tuning run that loads nothing, or all but the head, without a word, trains and ends well, and its
numbers are those of another experiment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grood_cert.errors import InputError
from grood_cert.networks.architectures import Classifier, Normalize

_WRAPPERS = ("state_dict", "model", "net")
_DATA_PARALLEL = "module."
_SHOWN = 8  # names listed in a message


@dataclass(frozen=True)
class Loaded:
    """What became of every tensor, by the network's names where it has one.

    Attributes:
        loaded: Taken from the file.
        kept: Of the network, allowed to be missing or of another shape: as they were, usually at random.
        ignored: Of the file and without use: allowed, or its normalisation.
    """

    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        parts += [f"kept as they were: {_list(self.kept)}"] if self.kept else []
        parts += [f"not used: {_list(self.ignored)}"] if self.ignored else []
        return "; ".join(parts)


def load_pretrained(network: Classifier, path: Path, allow: Sequence[str] = ()) -> Loaded:
    """Put the weights of a file into a network, all of them or none.

    Args:
        network: Changed in place; its normalisation is left alone. The file's numbers are converted to its type.
        path: A state dict, or a checkpoint of this package.
        allow: Tensors that may be missing, without use, or of another shape: names, or modules such as
            ``layer4``, of the network or the file; ``head`` is the last layer under any name. Those of the network
            keep the values they have.

    Returns:
        What was loaded, kept and ignored; its text is one line for a log.

    Raises:
        InputError: If the file is missing or no state dict, if a tensor that is not allowed to is missing,
            unexpected or of another shape, or if a value is not finite. The network is then as it was.
    """
    head = next(reversed(dict(network.named_children())))
    normalisation = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, Normalize))
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(normalisation)}
    file: dict[str, Tensor] = {}
    original: dict[str, str] = {}
    rules = _translations(own, head)
    for name, tensor in _without_prefix(_read(path)).items():
        translated = name
        for pattern, replacement in rules:
            translated = re.sub(pattern, replacement, translated)
        if translated in file:
            raise InputError(f"{path}: {original[translated]} and {name} are both {translated} of this network")
        file[translated], original[translated] = tensor, name

    modules = [head if module == "head" else module.rstrip(".") for module in allow]

    def refused(names: Iterable[str]) -> list[str]:
        return [name for name in names if not (_within(name, modules) or _within(original.get(name, name), modules))]

    ignored = [name for name in file if name.startswith(normalisation)]
    missing = [name for name in own if name not in file and not name.endswith(".num_batches_tracked")]
    foreign = [name for name in file if name not in own and name not in ignored]
    reshaped = [name for name in own if name in file and own[name].shape != file[name].shape]
    misfits = {
        "missing from the file": refused(missing),
        "unknown to the network": [original[name] for name in refused(foreign)],
        "of another shape": [
            f"{name} {tuple(file[name].shape)} for {tuple(own[name].shape)}" for name in refused(reshaped)
        ],
    }
    if any(misfits.values()):
        found = "; ".join(f"{len(names)} {what}: {_list(names)}" for what, names in misfits.items() if names)
        of_head = any(name.startswith(f"{head}.") for name in refused([*missing, *reshaped]))
        advice = f" (to start {head} afresh, allow 'head')" if of_head else ""
        raise InputError(f"{path}: these weights do not fit the network: {found}{advice}")
    taken = {name: tensor for name, tensor in file.items() if name in own and name not in reshaped}
    infinite = [original[name] for name, tensor in taken.items() if not bool(torch.isfinite(tensor).all())]
    if infinite:
        raise InputError(f"{path}: values that are NaN or infinite in {_list(infinite)}")
    network.load_state_dict({**network.state_dict(), **taken})
    return Loaded(tuple(taken), (*missing, *reshaped), tuple(original[name] for name in (*ignored, *foreign)))


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of weights") from None
    except Exception as error:  # torch.load raises a dozen kinds on foreign and damaged files
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: not a file of weights that opens without running code ({reason})") from error
    inner = [content[key] for key in _WRAPPERS if isinstance(content, Mapping) and key in content]
    state: Mapping[str, Tensor] | None = next((one for one in (content, *inner) if _is_state(one)), None)
    if state is None:
        raise InputError(
            f"{path}: holds no state dict; expected names with tensors, plain or under {', '.join(_WRAPPERS)}"
        )
    return state


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _without_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if all(name.startswith(_DATA_PARALLEL) for name in state):
        return {name.removeprefix(_DATA_PARALLEL): tensor for name, tensor in state.items()}
    return state


def _translations(own: Iterable[str], head: str) -> list[tuple[str, str]]:
    """Patterns of published names and what the network calls them; other names match none."""
    rules = [
        (r"^(?:fc|linear|classifier)\.", f"{head}."),
        (r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),
    ]
    blocks = [found[1] for name in own if (found := re.fullmatch(r"(\d+)\.norm1\.weight", name))]
    if len(blocks) == 8:  # ResNet-18: four layers of two
        rules += [(rf"^layer{index // 2 + 1}\.{index % 2}\.", f"{block}.") for index, block in enumerate(blocks)]
        rules += [
            (r"^conv1\.", "1."),
            (r"^bn1\.", "2."),
            (r"\.bn([12])\.", r".norm\1."),
            (r"\.downsample\.", ".shortcut."),
        ]
    return rules


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
