"""A training run as a value: every setting typed, with a default that works, read from a TOML file.

A recipe file states what differs from the defaults of the sections below, or from another recipe that it names as its
`base`. The files under `train/` travel with the package: `grood-cert train NAME` finds them anywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
import tomllib
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grood_cert.errors import InputError

_PACKAGE = Path(__file__).parent


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
    """Which network.

    `width = 0` is the network's own default, `hidden_layers` is for the mlp. `pretrained` is a file of weights to
    start from, and `pretrained_allow` names the tensors that may be absent from it or of another shape.
    """

    name: str = "conv-small"
    width: int = 0
    hidden_layers: int = 2
    pretrained: str = ""
    pretrained_allow: tuple[str, ...] = ()


@dataclass(frozen=True)
class ObjectiveSection:
    """Weights, margins and variants of `grood_cert.training.objective`; lambda_grad is in the units of the paper's formula."""

    lambda_S: float = 0.1  # noqa: N815
    lambda_grad: float = 0.1
    m_in: float = -6.0
    m_out: float = -2.0
    outlier_loss: str = "energy"
    slope: str = "gradient-norm"
    slope_eps: float = 0.0
    penalty: str = "exact"
    penalty_share: float = 0.25
    reduction: str = "paper"
    coordinates: str = "pixels"
    batch_norm: str = "eval"
    certified: str = "none"
    certified_method: str = "ibp"
    certified_eps: float = 0.0
    certified_ramp: float = 0.5
    lambda_certified: float = 1.0


@dataclass(frozen=True)
class SamplingSection:
    """Which auxiliary outliers a step sees: as many as ID images, drawn uniformly, or picked by energy (GReg+).

    For "energy", `pool` candidates a step are clustered by their features, one cluster for each ID image; `routing` is
    explained in `grood_cert.training.sampling`.
    """

    method: str = "uniform"
    pool: int = 384
    routing: str = "printed"


@dataclass(frozen=True)
class OptimizerSection:
    """How to minimise the objective.

    The learning rate rises linearly to `lr` over `warmup_steps` and then follows the schedule step by step: "cosine"
    from `lr` to `lr_min`, "multistep", times `factor` after each epoch listed in `milestones`, or "constant".
    `batch_size` counts the ID images of one step, over all processes; `accumulate` parts of it are computed one after
    another.
    """

    name: str = "adam"
    lr: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    lr_min: float = 1e-6
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    warmup_steps: int = 0
    epochs: int = 60
    batch_size: int = 64
    accumulate: int = 1


@dataclass(frozen=True)
class AugmentationSection:
    """Random changes of the training images, ID and auxiliary alike; see `grood_cert.training.augmentation`."""

    flip: bool = False
    crop_padding: int = 0
    resized_crop: float = 1.0
    noise_sigma: float = 0.0


@dataclass(frozen=True)
class ComputeSection:
    """How the arithmetic is done; certificates are always in float64."""

    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False


@dataclass(frozen=True)
class EvaluationSection:
    """What is measured and kept.

    `temperature` is that of the `scores` of the test sets; what is certified, S, has temperature 1. A run warns when
    the ID accuracy falls below the share `accuracy_floor` of the way from chance, 1/K, to 1. `keep` says which epoch
    becomes `model.pt`: "last", or "best", the lowest FPR95 on held-out outliers.
    """

    temperature: float = 1.0
    accuracy_floor: float = 0.1
    keep: str = "last"


@dataclass(frozen=True)
class Recipe:
    """One training run."""

    name: str = "digits-greg"
    seed: int = 0
    data: DataSection = field(default_factory=DataSection)
    network: NetworkSection = field(default_factory=NetworkSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    sampling: SamplingSection = field(default_factory=SamplingSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    augmentation: AugmentationSection = field(default_factory=AugmentationSection)
    compute: ComputeSection = field(default_factory=ComputeSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, as stored in a checkpoint."""
        return typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))

    def to_toml(self) -> str:
        """Every setting, as the text of a recipe file.

        Example:
            >>> from_dict(tomllib.loads(Recipe().to_toml())) == Recipe()
            True
        """
        values = self.to_dict()
        top = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
        tables = [
            "\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())])
            for name, table in values.items()
            if isinstance(table, dict)
        ]
        return "\n\n".join(["\n".join(top), *tables]) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


_CHOICES = {
    "network.name": (  # the keys of networks.NETWORKS, which would import torch
        "conv-small",
        "mlp",
        "resnet18",
        "resnet18-imagenet",
        "resnet-small",
        "wrn-40-2",
        "densenet-bc-100",
        "densenet121",
        "cnn-7",
        "good-s",
        "good-l",
        "good-xl",
    ),
    "objective.outlier_loss": ("energy", "oe", "none"),
    "objective.slope": ("gradient-norm", "interval"),
    "objective.penalty": ("exact", "fast", "stochastic"),
    "objective.reduction": ("paper", "reference"),
    "objective.coordinates": ("pixels", "normalised"),
    "objective.batch_norm": ("eval", "shared"),
    "objective.certified": ("none", "ood", "both"),
    "objective.certified_method": ("ibp", "crown-ibp"),
    "sampling.method": ("uniform", "energy"),
    "sampling.routing": ("printed", "both"),
    "optimizer.name": ("sgd", "adam"),
    "optimizer.schedule": ("cosine", "multistep", "constant"),
    "compute.precision": ("float32", "bf16"),
    "evaluation.keep": ("last", "best"),
}
_POSITIVE = (
    "network.hidden_layers",
    "objective.penalty_share",
    "sampling.pool",
    "optimizer.lr",
    "optimizer.factor",
    "optimizer.epochs",
    "optimizer.batch_size",
    "optimizer.accumulate",
    "augmentation.resized_crop",
    "evaluation.temperature",
)
_NOT_NEGATIVE = (
    "seed",
    "data.train_limit",
    "data.seed",
    "network.width",
    "objective.lambda_S",
    "objective.lambda_grad",
    "objective.slope_eps",
    "objective.certified_eps",
    "objective.certified_ramp",
    "objective.lambda_certified",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "optimizer.lr_min",
    "optimizer.warmup_steps",
    "augmentation.crop_padding",
    "augmentation.noise_sigma",
    "evaluation.accuracy_floor",
)
_SEEDS = ("seed", "data.seed")
_BELOW_ONE = ("optimizer.momentum", "evaluation.accuracy_floor")
_AT_MOST_ONE = ("objective.penalty_share", "objective.certified_ramp", "optimizer.factor", "augmentation.resized_crop")
_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_LISTS: dict[Any, tuple[type, str]] = {
    tuple[str, ...]: (str, 'a list of texts such as ["digits:8,9"]'),
    tuple[int, ...]: (int, "a list of whole numbers such as [50, 75]"),
}


def _problem(key: str, value: Any, kind: Any) -> str | None:
    """What is wrong with a value of a setting, if anything."""
    if kind in _LISTS:
        item_kind, words = _LISTS[kind]
        well = isinstance(value, list | tuple) and all(type(item) is item_kind for item in value)
        return None if well else f"expected {words}, got {value!r}"
    expected = None
    if type(value) is not kind:
        expected = _KINDS[kind]
    elif kind is float and not math.isfinite(value):
        expected = "a finite number"
    elif key in _CHOICES and value not in _CHOICES[key]:
        expected = f"one of {', '.join(_CHOICES[key])}"
    elif key in _POSITIVE and not value > 0:
        expected = "a value above 0"
    elif key in _NOT_NEGATIVE and not value >= 0:
        expected = "0 or more"
    elif key in _SEEDS and not value < 2**63:
        expected = "a value below 2**63"
    elif key in _BELOW_ONE and not value < 1:
        expected = "a value below 1"
    elif key in _AT_MOST_ONE and not value <= 1:
        expected = "1 or less"
    return f"expected {expected}, got {value!r}" if expected else None


def _contradictions(recipe: Recipe) -> Iterator[tuple[set[str], str]]:
    """Settings that are each well formed but do not go together: their names, and what is wrong."""
    objective, optimizer, compute = recipe.objective, recipe.optimizer, recipe.compute
    if not objective.m_in < objective.m_out:
        message = f"m_in must lie below m_out, got {objective.m_in} and {objective.m_out}"
        yield {"objective.m_in", "objective.m_out"}, f"objective: {message}"
    if objective.lambda_S > 0 and objective.outlier_loss == "none":
        message = 'outlier_loss = "none" leaves nothing for lambda_S to weigh; use lambda_S = 0'
        yield {"objective.lambda_S", "objective.outlier_loss"}, f"objective: {message}"
    if objective.certified != "none" and objective.certified_eps == 0:
        message = f'certified = "{objective.certified}" needs a certified_eps above 0'
        yield {"objective.certified", "objective.certified_eps"}, f"objective: {message}"
    if objective.reduction == "reference" and optimizer.accumulate > 1:
        message = 'reduction = "reference" divides by the size of the batch; use optimizer.accumulate = 1'
        yield {"objective.reduction", "optimizer.accumulate"}, f"objective: {message}"
    if objective.certified != "none" and (compute.compile or compute.precision == "bf16"):
        message = f'certified = "{objective.certified}": bounds are trained in float32 and without compute.compile'
        yield {"objective.certified", "compute.compile", "compute.precision"}, f"objective: {message}"
    if objective.lambda_grad > 0 and objective.penalty != "fast":
        names = {"objective.lambda_grad", "objective.penalty"}
        second = f'does not go with the second derivatives of penalty = "{objective.penalty}"; use penalty = "fast"'
        if compute.precision == "bf16":
            yield names | {"compute.precision"}, f'compute: precision = "bf16" {second}'
        if compute.compile:
            yield names | {"compute.compile"}, f"compute: compile {second}"
    if optimizer.schedule == "cosine" and optimizer.lr_min > optimizer.lr:
        message = f"the cosine falls from lr to lr_min, got {optimizer.lr} and {optimizer.lr_min}"
        yield {"optimizer.lr", "optimizer.lr_min", "optimizer.schedule"}, f"optimizer: {message}"
    names, milestones = {"optimizer.milestones", "optimizer.schedule", "optimizer.epochs"}, optimizer.milestones
    if optimizer.schedule != "multistep":
        if milestones:
            yield names, f'optimizer: milestones are for schedule = "multistep", not for "{optimizer.schedule}"'
    elif not milestones or list(milestones) != sorted({*milestones}) or milestones[0] < 1:
        yield names, f"optimizer: multistep needs milestones, ascending and from 1, got {list(milestones)}"
    elif milestones[-1] >= optimizer.epochs:
        yield names, f"optimizer: milestone {milestones[-1]} is never reached in {optimizer.epochs} epochs"


def _names(section: type, prefix: str = "") -> list[str]:
    """Full names of all settings of a section."""
    names: list[str] = []
    for key, kind in typing.get_type_hints(section).items():
        names += (
            _names(typing.cast(type, kind), f"{prefix}{key}.") if dataclasses.is_dataclass(kind) else [prefix + key]
        )
    return names


def _hint(key: str, kinds: Iterable[str], prefix: str) -> str:
    """What an unknown key may have meant: a setting of that name in another section, or one of a similar name."""
    last = {name.rpartition(".")[2]: name for name in reversed(_names(Recipe))}
    if key in last:
        return f"did you mean {last[key]}?"
    near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.6)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    near = difflib.get_close_matches(key, last, n=1, cutoff=0.6)
    return f"did you mean {last[near[0]]}?" if near else f"known are {', '.join(kinds)}"


def _read(section: type, values: Any, prefix: str, problems: dict[str, str]) -> Any:
    """Build a section; what is wrong goes to `problems`, by the name of the setting, which then has its default."""
    kinds = typing.get_type_hints(section)
    if not isinstance(values, dict):
        problems[prefix.rstrip(".") or "recipe"] = f"expected a table, got {values!r}"
        return section()
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name, kind = prefix + key, kinds.get(key)
        if kind is None:
            problems[name] = f"unknown key; {_hint(key, kinds, prefix)}"
        elif dataclasses.is_dataclass(kind):
            arguments[key] = _read(typing.cast(type, kind), value, name + ".", problems)
        else:
            if kind is float and type(value) is int:
                value = float(value)
            problem = _problem(name, value, kind)
            if problem:
                problems[name] = problem
            else:
                arguments[key] = tuple(value) if kind in _LISTS else value
    return section(**arguments)


def from_dict(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """Build a recipe from nested dictionaries; absent keys keep their defaults.

    Raises:
        InputError: Naming at once every unknown key (with the nearest valid name), every ill-typed or impossible
            value, and all settings that contradict one another.

    Example:
        >>> from_dict({"objective": {"lambda_grad": 0}}).objective.lambda_grad
        0.0
        >>> from_dict({"objective": {"lamda_grad": 0}})
        Traceback (most recent call last):
            ...
        grood_cert.errors.InputError: recipe: objective.lamda_grad: unknown key; did you mean objective.lambda_grad?
    """
    problems: dict[str, str] = {}
    recipe = typing.cast(Recipe, _read(Recipe, values, "", problems))
    found = [f"{name}: {problem}" for name, problem in problems.items()]
    found += [message for names, message in _contradictions(recipe) if not names & problems.keys()]
    if found:
        raise InputError(f"{source}: " + "; ".join(found))
    return recipe


def first_difference(one: Recipe, other: Recipe) -> str | None:
    """The first setting in which two recipes differ, in words; None if there is none.

    Example:
        >>> first_difference(Recipe(seed=1), Recipe(seed=2))
        'seed = 1, not 2'
    """
    for name in _names(Recipe):
        read = operator.attrgetter(name)
        if read(one) != read(other):
            return f"{name} = {_plain(read(one))!r}, not {_plain(read(other))!r}"
    return None


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


def shipped() -> dict[str, Path]:
    """The recipe files that come with the package, by name.

    An installed package holds them in its folder `recipes`, a source tree beside the package in `train`.

    Example:
        >>> shipped()["digits-greg"].name
        'digits-greg.toml'
    """
    installed = _PACKAGE / "recipes"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "train"
    return {path.stem: path for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem)}


def find(name: str, beside: Path = Path()) -> Path:
    """The file of a recipe: a path, or else the name of a recipe that comes with the package.

    Args:
        name: For example "my/run.toml" or "digits-greg".
        beside: Folder that paths are relative to.

    Raises:
        InputError: If there is neither.

    Example:
        >>> find("digits-gerg")
        Traceback (most recent call last):
            ...
        grood_cert.errors.InputError: digits-gerg: no such recipe file, and no recipe of that name; did you mean \
digits-greg?
    """
    path, known = beside / name, shipped()
    if path.is_file():
        return path
    if name in known:
        return known[name]
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "grood-cert recipe list names those that come with it"
    raise InputError(f"{name}: no such recipe file, and no recipe of that name; {hint}")


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not a readable TOML file: {error}") from None


def _merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The base, with the values in the place of its own."""
    merged = dict(base)
    for key, value in values.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def load(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `KEY=VALUE` settings on top.

    A file with `base = "NAME"` starts from that recipe, a file beside it or one that comes with the package, and
    states only what differs. A base has no base of its own.

    Args:
        path: A TOML file.
        settings: For example "objective.lambda_grad=0.1"; values are TOML, a bare word is taken as text.

    Raises:
        InputError: If the file is missing, is not TOML, or holds unknown keys or ill-typed values.
    """
    values = _table(path)
    base = values.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise InputError(f"{path}: base: expected the name of a recipe, got {base!r}")
        below = _table(find(base, path.parent))
        if "base" in below:
            raise InputError(f"{path}: base {base!r} has a base itself; name {below['base']!r} and state the rest")
        values = _merge(below, values)
    for setting in settings:
        _apply(values, setting)
    return from_dict(values, str(path))
