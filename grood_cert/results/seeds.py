"""Runs that differ in the seed of their training alone: which they are, what they are called, mean and range over them.

The range over seeds is no interval over the sampling of images: all of the seeds are tested on the same ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from grood_cert.errors import InputError
from grood_cert.results.curves import Curve, RobustnessCurve, Sets
from grood_cert.results.table import Table, labelled

Runs = Mapping[str, Table | Sequence[Table]]  # results by the name to print, several of one name if they are seeds
Groups = Mapping[str, tuple[Table, ...]]
_Curve = TypeVar("_Curve", bound=Curve)
_SETTINGS = (  # of a manifest: what seeds of one training share, beside their recipes
    *("kind", "score", "data", "norm", "eps", "limit", "seed", "effort", "stages", "deployment", "per_logit"),
    *("time_limit", "method", "sigma", "n", "alpha", "samples"),
)
_SEED = re.compile(r"[-_ ,.]*\bseed[-_ =]?\d+$")


def groups_of(runs: Runs) -> dict[str, tuple[Table, ...]]:
    """The results of each name, one or several.

    Raises:
        InputError: If a name has none.
    """
    groups = {name: (run,) if isinstance(run, Table) else tuple(run) for name, run in runs.items()}
    if empty := [name for name, group in groups.items() if not group]:
        raise InputError(f"{empty[0]}: no results given")
    return groups


def each_of(groups: Groups) -> dict[str, Table]:
    """All results by names of their own."""
    return {
        name if len(group) == 1 else f"{name}, {number} of {len(group)}": table
        for name, group in groups.items()
        for number, table in enumerate(group, 1)
    }


def over_seeds(records: Iterable[Mapping[str, Any]], column: str) -> tuple[float, float, float]:
    """Mean, smallest and largest of what records of several seeds hold in a column."""
    values = [record[column] for record in records]
    return float(np.mean(values)), min(values), max(values)


def seed_of(table: Table) -> int | None:
    """The seed of the training; None of a network that was not trained from a recipe."""
    recipe = table.manifest.get("recipe") or {}
    return int(recipe["seed"]) if "seed" in recipe else None


def by_settings(tables: Sequence[Table]) -> list[list[int]]:
    """Places of the results in groups, each of other seeds and of else the same settings, in the order of their first.

    Where a seed occurs twice, or a network has no recipe, every result is a group of its own.
    """
    groups = []
    for group in alike(tables):
        seeds = {seed_of(tables[place]) for place in group}
        groups += [group] if len(seeds) == len(group) else [[place] for place in group]
    return sorted(groups)


def alike(tables: Sequence[Table], but: str = "") -> list[list[int]]:
    """Places of the results in groups of the same settings, but for seed and name, and one of the recipe (`but`)."""
    found: dict[str, list[int]] = {}
    for place, table in enumerate(tables):
        key = str(place)
        if seed_of(table) is not None:
            recipe = {name: value for name, value in _settings(table).items() if name != but}
            key = json.dumps([recipe, *(table.manifest.get(name) for name in _SETTINGS)], sort_keys=True)
        found.setdefault(key, []).append(place)
    return list(found.values())


def _settings(table: Table) -> dict[str, Any]:
    """The settings of a recipe by their full names, without seed and name."""
    recipe = table.manifest.get("recipe") or {}
    return {key: value for key, value in _flat(recipe) if key not in ("seed", "name")}


def grouped(tables: Sequence[Table], paths: Sequence[Path], labels: Sequence[str]) -> dict[str, tuple[Table, ...]]:
    """Results by the name to print, those that differ in the seed of their training alone together.

    Args:
        tables: One result of each model.
        paths: Their files.
        labels: One name a group, or none: the models' names without the seed, else the settings in which groups differ.

    Raises:
        InputError: If the number of labels is wrong, or two names are the same.
    """
    places = by_settings(tables)
    if len(places) == len(tables):
        return {name: (table,) for name, table in labelled(tables, paths, labels).items()}
    if labels and len(labels) != len(places):
        raise InputError(
            f"{len(labels)} labels for {len(places)} groups of {len(tables)} results that differ in their seeds alone; "
            "give one label for each group, in order"
        )
    names = labels or group_names(tables, places, [str(table.manifest["model"]["name"]) for table in tables])
    first = [group[0] for group in places]
    named = labelled([tables[place] for place in first], [paths[place] for place in first], names, "groups of seeds")
    return {name: tuple(tables[place] for place in group) for name, group in zip(named, places, strict=True)}


def group_names(tables: Sequence[Table], places: Sequence[Sequence[int]], names: Sequence[str]) -> list[str]:
    """What groups of `by_settings` are called: as their results without the seed, or by the settings that differ.

    Args:
        tables: The results.
        places: Their groups.
        names: Of the results.
    """
    stems = [{_SEED.sub("", names[place]) for place in group} for group in places]
    common = [next(iter(stem)) for stem in stems if len(stem) == 1]
    if len(set(common)) == len(places) and all(common):
        return common
    flat = [_settings(tables[group[0]]) for group in places]
    different = [key for key in flat[0] if len({str(page.get(key)) for page in flat}) > 1]
    return [
        ", ".join(f"{key.rpartition('.')[2]}={page.get(key)}" for key in different) or f"{len(group)} seeds"
        for page, group in zip(flat, places, strict=True)
    ]


def _flat(value: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        yield from _flat(item, f"{start}{key}.") if isinstance(item, dict) else [(f"{start}{key}", item)]


def curves_of(
    groups: Groups, sets_of: Callable[[Table], Sets], curve_of: Callable[[Table, Sets], _Curve], mean: bool
) -> dict[str, dict[str, list[_Curve]]]:
    """For each image set, or for their mean, the curves of the seeds of each model; a model that lacks a set is left out.

    Args:
        groups: Results by the name of their model.
        sets_of: The image sets of a result.
        curve_of: The curve of a result over some of its sets.
        mean: Whether several sets give their mean.
    """
    found = {name: [sets_of(table) for table in group] for name, group in groups.items()}
    names = list(dict.fromkeys(one for group in found.values() for sets in group for one in sets))
    if mean and len(names) > 1:
        chosen = {f"mean of {len(names)} sets": found}
    else:
        chosen = {
            one: {name: [{one: sets[one]} for sets in group] for name, group in found.items() if one in group[0]}
            for one in names
        }
    return {
        title: {
            name: [curve_of(table, sets) for table, sets in zip(groups[name], group, strict=True)]
            for name, group in models.items()
        }
        for title, models in chosen.items()
    }


@dataclass(frozen=True, eq=False)
class Spread:
    """A curve of several seeds.

    Attributes:
        x: Where it was read, ascending; each value holds up to the next.
        mean: Mean over the seeds.
        least: Smallest of them.
        most: Largest of them.
    """

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    least: NDArray[np.float64]
    most: NDArray[np.float64]


def spread(curves: Sequence[Curve], name: str) -> Spread:
    """One attribute of the curves of several seeds, read wherever one of them changes: against eps, or against clean FPR.

    Against clean FPR a curve has, at x, its value at the largest gamma whose clean FPR is at most x; 0 where there is none.
    """
    places = [curve.fpr if isinstance(curve, RobustnessCurve) else curve.eps for curve in curves]
    x = np.unique(np.concatenate(places))
    rows = []
    for place, curve in zip(places, curves, strict=True):
        at = np.searchsorted(place, x, side="right")
        rows.append(np.append(0.0, getattr(curve, name))[at])
    values = np.array(rows)
    return Spread(x, values.mean(0), values.min(0), values.max(0))


def spread_records(curves: Sequence[Curve], name: str) -> Iterator[tuple[float, dict[str, Any]]]:
    """What `spread` finds, point by point: x, and `mean`, `least`, `most` and the number of `seeds`."""
    found = spread(curves, name)
    for x, *values in zip(
        found.x.tolist(), found.mean.tolist(), found.least.tolist(), found.most.tolist(), strict=True
    ):
        yield x, {"seeds": len(curves), **dict(zip(("mean", "least", "most"), values, strict=True))}
