"""A training run as a value: every setting typed, with a default that works, read from a TOML file."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grood_cert.errors import InputError


@dataclass(frozen=True)
class DataSection:
    """Which images; set specifications are explained in `grood_cert.data`."""

    id: str = "digits:0-5"
    auxiliary: str = "digits:6,7"
    ood: tuple[str, ...] = ("digits:8,9", "photo-patches", "uniform-noise", "smooth-noise")
    calibration_share: float = 0.2
    test_share: float = 0.2
    heldout_share: float = 0.2
    train_limit: int = 0
    seed: int = 0


@dataclass(frozen=True)
class NetworkSection:
    """Which network; `width = 0` is the network's own default, `hidden_layers` is for the mlp."""

    name: str = "conv-small"
    width: int = 0
    hidden_layers: int = 2


@dataclass(frozen=True)
class ObjectiveSection:
    """Weights and margins of `grood_cert.objective`; lambda_grad is in the units of the paper's formula.

    `slope = "interval"` trains on a formal bound over the l_2 ball of radius `slope_eps` in place of the point gradient.
    """

    lambda_S: float = 0.1  # noqa: N815
    lambda_grad: float = 0.1
    m_in: float = -6.0
    m_out: float = -2.0
    slope: str = "gradient-norm"
    slope_eps: float = 0.0


@dataclass(frozen=True)
class OptimizerSection:
    """How to minimise it; `cosine` decays the learning rate to 1e-6 step by step."""

    name: str = "adam"
    lr: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    epochs: int = 60
    batch_size: int = 64


@dataclass(frozen=True)
class Recipe:
    """One training run."""

    name: str = "digits-greg"
    seed: int = 0
    data: DataSection = field(default_factory=DataSection)
    network: NetworkSection = field(default_factory=NetworkSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, as stored in a checkpoint."""
        return typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


_CHOICES = {
    "optimizer.name": ("sgd", "adam"),
    "optimizer.schedule": ("cosine", "constant"),
    "objective.slope": ("gradient-norm", "interval"),
    "network.name": (
        "conv-small",
        "mlp",
        "resnet18",
        "resnet-small",
    ),  # the keys of networks.NETWORKS, which would import torch
}
_POSITIVE = ("optimizer.lr", "optimizer.epochs", "optimizer.batch_size", "network.hidden_layers")
_NOT_NEGATIVE = (
    "objective.lambda_S",
    "objective.lambda_grad",
    "objective.slope_eps",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "network.width",
    "data.train_limit",
    "data.seed",
    "seed",
)
_BELOW_ONE = ("optimizer.momentum",)
_KINDS = {int: "a whole number", float: "a number", str: "a text"}


def _convert(key: str, value: Any, kind: Any, problems: list[str]) -> Any:
    if kind == tuple[str, ...]:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        problems.append(f'{key}: expected a list of texts such as ["digits:8,9"], got {value!r}')
        return ()
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        problems.append(f"{key}: expected {_KINDS[kind]}, got {value!r}")
    elif kind is float and not math.isfinite(value):
        problems.append(f"{key}: expected a finite number, got {value!r}")
    elif key in _CHOICES and value not in _CHOICES[key]:
        problems.append(f"{key}: expected one of {', '.join(_CHOICES[key])}, got {value!r}")
    elif key in _POSITIVE and not value > 0:
        problems.append(f"{key}: expected a value above 0, got {value!r}")
    elif key in _NOT_NEGATIVE and not value >= 0:
        problems.append(f"{key}: expected 0 or more, got {value!r}")
    elif key in _BELOW_ONE and not value < 1:
        problems.append(f"{key}: expected a value below 1, got {value!r}")
    return value


def _names(section: type, prefix: str = "") -> list[str]:
    """Full names of all settings of a section."""
    names: list[str] = []
    for key, kind in typing.get_type_hints(section).items():
        names += (
            _names(typing.cast(type, kind), f"{prefix}{key}.") if dataclasses.is_dataclass(kind) else [prefix + key]
        )
    return names


def _hint(key: str, kinds: Iterable[str], prefix: str) -> str:
    """What an unknown key may have meant: a setting of this section, or else one of another."""
    near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.6)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    last = {name.rpartition(".")[2]: name for name in reversed(_names(Recipe))}
    near = difflib.get_close_matches(key, last, n=1, cutoff=0.6)
    return f"did you mean {last[near[0]]}?" if near else f"known are {', '.join(kinds)}"


def _read(section: type, values: Any, prefix: str, problems: list[str]) -> Any:
    kinds = typing.get_type_hints(section)
    if not isinstance(values, dict):
        problems.append(f"{prefix.rstrip('.') or 'recipe'}: expected a table, got {values!r}")
        return section()
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        if key not in kinds:
            problems.append(f"{name}: unknown key; {_hint(key, kinds, prefix)}")
        elif dataclasses.is_dataclass(kinds[key]):
            arguments[key] = _read(typing.cast(type, kinds[key]), value, name + ".", problems)
        else:
            arguments[key] = _convert(name, value, kinds[key], problems)
    return section(**arguments)


def from_dict(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """Build a recipe from nested dictionaries; absent keys keep their defaults.

    Raises:
        InputError: Naming every unknown key (with the nearest valid name) and every ill-typed value at once.

    Example:
        >>> from_dict({"objective": {"lambda_grad": 0}}).objective.lambda_grad
        0.0
        >>> from_dict({"objective": {"lamda_grad": 0}})
        Traceback (most recent call last):
            ...
        grood_cert.errors.InputError: recipe: objective.lamda_grad: unknown key; did you mean objective.lambda_grad?
    """
    problems: list[str] = []
    recipe = typing.cast(Recipe, _read(Recipe, values, "", problems))
    if not problems and not recipe.objective.m_in < recipe.objective.m_out:
        problems.append(
            f"objective: m_in must lie below m_out, got {recipe.objective.m_in} and {recipe.objective.m_out}"
        )
    if problems:
        raise InputError(f"{source}: " + "; ".join(problems))
    return recipe


def _apply(values: dict[str, Any], setting: str) -> None:
    key, separator, text = setting.partition("=")
    if not separator or not key.strip():
        raise InputError(f"--set {setting}: expected KEY=VALUE, for example objective.lambda_grad=0.1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *path, last = key.strip().split(".")
    table = values
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {setting}: {part} is not a table")
    table[last] = value


def load(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `KEY=VALUE` settings on top.

    Args:
        path: A TOML file.
        settings: For example "objective.lambda_grad=0.1"; values are TOML, a bare word is taken as text.

    Raises:
        InputError: If the file is missing, is not TOML, or holds unknown keys or ill-typed values.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not a readable TOML file: {error}") from None
    for setting in settings:
        _apply(values, setting)
    return from_dict(values, str(path))
