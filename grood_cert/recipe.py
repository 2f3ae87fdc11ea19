"""A training run as a value: every setting typed, with a default that works, read from a TOML file.

A recipe file states what differs from the defaults of its sections (`grood_cert.sections`), or from another
recipe that it names as its `base`. The files under `train/` travel with the package: `grood-cert train NAME` finds them
anywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
import sys
import tomllib
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grood_cert.errors import InputError
from grood_cert.sections import (
    NOT_NEGATIVE,
    SEED,
    AugmentationSection,
    ComputeSection,
    DataSection,
    EvaluationSection,
    NetworkSection,
    ObjectiveSection,
    OptimizerSection,
    SamplingSection,
    Section,
    setting,
)

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe(Section):
    """One training run."""

    name: str = "digits-greg"
    seed: int = setting(0, NOT_NEGATIVE, SEED)
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


def _networks() -> tuple[str, ...]:
    from grood_cert.networks.architectures import NETWORKS  # late: it imports torch, which `--help` does without

    return tuple(NETWORKS)


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
    if objective.certified != "none" and (compute.compile or compute.precision != "float32"):
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


def _read(section: type[Section], values: Any, prefix: str, problems: dict[str, str]) -> Any:
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
            arguments[key] = _read(typing.cast(type[Section], kind), value, name + ".", problems)
        else:
            if kind is float and type(value) is int:
                value = float(value) if abs(value) <= sys.float_info.max else math.inf
            problem = section.problem(key, value)
            if problem:
                problems[name] = problem
            else:
                arguments[key] = tuple(value) if isinstance(value, list) else value
    try:
        return section(**arguments)
    except InputError as error:  # each value is well formed, but two do not go together
        problems[prefix.rstrip(".")] = str(error)
        return section()


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
    if recipe.network.name not in (known := _networks()):
        problems["network.name"] = f"expected one of {', '.join(known)}, got {recipe.network.name!r}"
    found = [f"{name}: {problem}" for name, problem in problems.items()]
    doubtful = problems.keys() | {name for name in _names(Recipe) if name.partition(".")[0] in problems}
    found += [message for names, message in _contradictions(recipe) if not names & doubtful]
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


def _apply(values: dict[str, Any], change: str) -> None:
    key, separator, text = change.partition("=")
    if not separator or not key.strip():
        raise InputError(f"--set {change}: expected KEY=VALUE, for example objective.lambda_grad=0.1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *path, last = key.strip().split(".")
    table = values
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {change}: {part} is not a table")
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
    if not values:
        raise InputError(f"{path}: an empty recipe; grood-cert recipe copy NAME makes one to start from")
    base = values.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise InputError(f"{path}: base: expected the name of a recipe, got {base!r}")
        below = _table(find(base, path.parent))
        if "base" in below:
            raise InputError(f"{path}: base {base!r} has a base itself; name {below['base']!r} and state the rest")
        values = _merge(below, values)
    for change in settings:
        _apply(values, change)
    return from_dict(values, str(path))
