"""Weights from a file into a network, and their published names on the way out.

Loading is strict: what does not fit is refused by name, never skipped.

The file is a state dict that ``torch.save`` or safetensors wrote; so are this package's own checkpoints. Nothing in it
is run. It may lie in dictionaries, under one of `WRAPPERS`, and in a list of one. All its names may begin with the same
modules (``module.`` of DataParallel, ``_orig_mod.`` of torch.compile, ``model.``, ``backbone.``), which are taken off if
they have to be. The names of our own architectures are translated where publications differ:

* the head may be called ``fc``, ``linear`` or ``classifier``;
* ``resnet18`` understands the names of torchvision and of the CIFAR literature (``layer1.0.bn1``, ``shortcut`` or
  ``downsample``);
* the first files of torchvision's DenseNet say ``norm.1`` where its code says ``norm1``.

Normalisation belongs to the recipe, not to the file: the mean and std of an architecture stay what they are. BatchNorm's
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
from torch import Tensor, nn

from grood_cert.errors import InputError
from grood_cert.networks.architectures import Classifier, Normalize
from grood_cert.system.torch_files import opened

WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "network",
    "params",
    "params_ema",
    "model",
    "net",
    "ema",
    "state_dict_ema",
)
_COUNTER = "num_batches_tracked"
_SHOWN = 8  # names listed in a message


@dataclass(frozen=True)
class State:
    """The tensors of a file by name.

    Attributes:
        tensors: The state dict.
        place: The keys and positions that lead to it; none if the file is the state dict itself.
        others: Further state dicts beside it, left alone.
    """

    tensors: dict[str, Tensor]
    place: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """What became of every tensor, by the network's names where it has one.

    Attributes:
        loaded: Taken from the file.
        kept: Of the network, allowed to be missing or of another shape: as they were, usually at random.
        ignored: Of the file and without use: allowed, or its normalisation.
        state: The file's state dict, and where in the file it lay.
        prefix: What was taken off before all its names.
    """

    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    ignored: tuple[str, ...]
    state: State
    prefix: str

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        parts += [f"found under {' / '.join(self.state.place)}"] if self.state.place else []
        parts += [f"not looked at: {_list(self.state.others)}"] if self.state.others else []
        parts += [f"{self.prefix} taken off all names"] if self.prefix else []
        parts += [f"kept as they were: {_list(self.kept)}"] if self.kept else []
        parts += [f"not used: {_list(self.ignored)}"] if self.ignored else []
        return "; ".join(parts)


def read_state(path: Path) -> State:
    """The state dict in a file, wherever in it.

    Args:
        path: A file of ``torch.save`` (.pt, .pth, .th, .ckpt, .bin, .tar) or of safetensors; its name does not matter.

    Raises:
        InputError: If it is missing, no such file, would run code, or holds no state dict or a list of several.
        RunError: If it is of safetensors, and that package is not installed.
    """
    try:
        content = opened(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of weights") from None
    except InputError as error:
        raise InputError(f"{path} is not a file of weights, but {error}") from error
    state = _state_in(content)
    if state is None:
        raise InputError(
            f"{path}: holds no state dict, but {_described(content)}; expected names with tensors, plain or under "
            f"{', '.join(WRAPPERS)}"
        )
    return state


def _state_in(value: Any) -> State | None:
    if isinstance(value, Mapping) and _is_state(value):
        return State(dict(value))
    found: dict[str, State] = {}
    if isinstance(value, list | tuple) and len(value) == 1:
        found = {"item 0": state} if (state := _state_in(value[0])) else {}
    elif isinstance(value, Mapping):
        found = {key: state for key in WRAPPERS if key in value and (state := _state_in(value[key]))}
    if not found:
        return None
    place, *others = found
    inner = found[place]
    return State(inner.tensors, (place, *inner.place), (*others, *inner.others))


def _is_state(value: Mapping[Any, Any]) -> bool:
    return len(value) > 0 and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _described(content: Any) -> str:
    if isinstance(content, Mapping) and content:
        return "entries " + _list(f"{name} ({type(value).__name__})" for name, value in content.items())
    if isinstance(content, list | tuple) and len(content) > 1:
        return f"a {type(content).__name__} of {len(content)}: {_list(type(value).__name__ for value in content)}"
    return f"nothing but a {type(content).__name__}"


def load_into(network: nn.Module, path: Path, allow: Sequence[str] = ()) -> Loaded:
    """Put the weights of a file into a network, all of them or none.

    Args:
        network: Changed in place; the file's numbers are converted to its types. The names of a `Classifier` are
            translated, and its normalisation is left alone.
        path: A file of weights, or a checkpoint of this package.
        allow: Tensors that may be missing, without use, or of another shape: names, or modules such as
            ``layer4``, of the network or the file; ``head`` is the last layer under any name. Those of the network
            keep the values they have.

    Returns:
        What was loaded, kept and ignored; its text is one line for a log.

    Raises:
        InputError: If the file is not one of weights, if a tensor that is not allowed to is missing, unexpected or
            of another shape, or if one is not what weights are: complex, of whole numbers, sparse, quantised, without
            values, not finite, a negative variance. The network is then as it was.
        RunError: If the file is of safetensors, and that package is not installed.
    """
    ours = isinstance(network, Classifier)
    modules = network.named_modules() if ours else ()
    normalisation = tuple(f"{name}." for name, module in modules if isinstance(module, Normalize))
    own = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if isinstance(tensor, Tensor) and not name.startswith(normalisation)
    }
    if lost := [name for name, tensor in own.items() if tensor.is_meta or nn.parameter.is_lazy(tensor)]:
        raise InputError(f"the network has parameters without values: {_list(lost)}; build it on the CPU, and call it")
    head = next(reversed(dict(network.named_children())), "")
    rules = _translations(own, head) if ours else []
    state = read_state(path)
    prefix, names = _matched(state.tensors, own, rules)
    file: dict[str, Tensor] = {}
    original: dict[str, str] = {}
    for (name, tensor), translated in zip(state.tensors.items(), names, strict=True):
        if translated in file:
            raise InputError(f"{path}: {original[translated]} and {name} are both {translated} of this network")
        file[translated], original[translated] = tensor, name

    allowed = [head if module == "head" else module.rstrip(".") for module in allow]

    def refused(names: Iterable[str]) -> list[str]:
        return [name for name in names if not (_within(name, allowed) or _within(original.get(name, name), allowed))]

    ignored = [name for name in file if name.startswith(normalisation)]
    missing = [name for name in own if name not in file and not name.endswith(f".{_COUNTER}")]
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
        of_head = ours and any(name.startswith(f"{head}.") for name in refused([*missing, *reshaped]))
        advice = f" (to start {head} afresh, allow 'head')" if of_head else ""
        raise InputError(f"{path}: these weights do not fit the network: {found}{advice}")
    taken = {name: tensor for name, tensor in file.items() if name in own and name not in reshaped}
    faults: dict[str, list[str]] = {}
    for name, tensor in taken.items():
        if fault := _fault(name, tensor, own[name]):
            faults.setdefault(fault, []).append(original[name])
    if faults:
        raise InputError(f"{path}: {'; '.join(f'{fault} in {_list(names)}' for fault, names in faults.items())}")
    network.load_state_dict({**network.state_dict(), **taken})
    return Loaded(
        tuple(taken), (*missing, *reshaped), tuple(original[name] for name in (*ignored, *foreign)), state, prefix
    )


def _matched(names: Iterable[str], own: Iterable[str], rules: Sequence[tuple[str, str]]) -> tuple[str, list[str]]:
    """The prefix of all names, perhaps none, without which most of them are those of the network; and these names."""
    names, own = list(names), set(own)
    prefix, (*modules, _) = "", names[0].split(".")
    best: tuple[str, list[str]] | None = None
    most = -1
    for module in ("", *modules):
        prefix += f"{module}." if module else ""
        if not all(name.startswith(prefix) for name in names):
            break
        stripped = [_translated(name.removeprefix(prefix), rules) for name in names]
        fitting = len(own.intersection(stripped))
        if fitting > most:
            best, most = (prefix, stripped), fitting
    assert best
    return best


def _translated(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _fault(name: str, tensor: Tensor, own: Tensor) -> str | None:
    """Why a tensor cannot be taken for one of the network, which has its name and shape."""
    if tensor.is_meta:
        return "no values, only shapes (device meta)"
    if tensor.layout != torch.strided:
        return "sparse tensors (call to_dense first)"
    if tensor.is_quantized:
        return "quantised tensors (call dequantize first)"
    if tensor.is_complex() and not own.is_complex():
        return "complex numbers"
    if tensor.is_floating_point() != own.is_floating_point():
        return f"{str(tensor.dtype).removeprefix('torch.')} for {str(own.dtype).removeprefix('torch.')}"
    if not bool(torch.isfinite(tensor.to(own.dtype)).all()):
        return "values that are NaN or infinite"
    if name.endswith("running_var") and bool((tensor < 0).any()):
        return "a negative variance"
    return None


def _translations(own: Iterable[str], head: str) -> list[tuple[str, str]]:
    """Patterns of published names and what the network calls them; other names match none."""
    rules = [
        (r"^(?:fc|linear|classifier)\.", f"{head}."),
        (r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),
    ]
    if blocks := _residual_blocks(own):  # four layers of two
        rules += [(rf"^layer{index // 2 + 1}\.{index % 2}\.", f"{block}.") for index, block in enumerate(blocks)]
        rules += [
            (r"^conv1\.", "1."),
            (r"^bn1\.", "2."),
            (r"\.bn([12])\.", r".norm\1."),
            (r"\.downsample\.", ".shortcut."),
        ]
    return rules


def published_state(network: nn.Module) -> dict[str, Tensor]:
    """The parameters under the names of the literature, without normalisation; `load_into` reads them back.

    Published code normalises before the network, so that what is below a `Normalize` is left out, and with it the
    position behind one that stands in front of a whole network. Where there is nothing published, names are our own.

    Args:
        network: One of our architectures, or any other, perhaps behind a `Normalize`.

    Example:
        >>> list(published_state(nn.Sequential(Normalize([0.5], [0.3]), nn.Linear(1, 2))))
        ['weight', 'bias']
    """
    if not isinstance(network, Classifier):
        parts = list(network.children()) if isinstance(network, nn.Sequential) else []
        inner = parts[1] if len(parts) == 2 and isinstance(parts[0], Normalize) else network
        return dict(inner.state_dict())
    normalisation = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, Normalize))
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(normalisation)}
    rules = []
    if blocks := _residual_blocks(state):
        rules = [(rf"^{block}\.", f"layer{index // 2 + 1}.{index % 2}.") for index, block in enumerate(blocks)]
        rules += [(r"^1\.", "conv1."), (r"^2\.", "bn1."), (r"\.norm([12])\.", r".bn\1."), (r"^\d+\.", "fc.")]
    elif {"block1", "linear"} <= dict(network.named_children()).keys():  # the DenseNet
        rules = [(r"^linear\.", "fc.")]
    return {_translated(name, rules): tensor for name, tensor in state.items()}


def _residual_blocks(own: Iterable[str]) -> list[str]:
    """The positions of the eight blocks of our ResNet-18; none in another network."""
    blocks = [found[1] for name in own if (found := re.fullmatch(r"(\d+)\.norm1\.weight", name))]
    return blocks if len(blocks) == 8 else []


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
