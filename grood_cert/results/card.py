r"""What results say, as plain data: a *card*, for a program to read or a page to show (`grood_cert.results.report`).

For each detector what was tested and how, what was proved, shown by an attack, or only estimated, with the limits of
each claim and the command that made it. docs/report.md describes the keys. Nothing is computed here but counts and shares.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import grood_cert
from grood_cert.errors import InputError
from grood_cert.results.checksum import KEY
from grood_cert.results.columns import NORMS, SCHEMAS
from grood_cert.results.curves import fpr_curve
from grood_cert.results.seeds import by_settings, group_names, seed_of
from grood_cert.results.summary import balls_decided, detection
from grood_cert.results.sweeps import objective_records, over_seeds, spread_of
from grood_cert.results.table import Table, labelled, manifest_path
from grood_cert.system.files import as_json

SCHEMA = 1  # counts the changes of a card after which earlier readers no longer read it
TOLD = ("certification", "smoothing", "lipschitz")  # kinds of result that a report tells of, in this order
FORMS = {  # how a number came about: what it is called, and what it is worth
    "proved": "holds for the whole ball around each sample, without exception",
    "probabilistic": "holds for each sample with probability at least 1 - alpha over the draws of noise",
    "shown": "an attack found it: the truth is at least as bad",
    "estimate": "proves nothing, and can be wrong in either direction",
}


@dataclass(frozen=True)
class Result:
    """A result that a report tells of.

    Attributes:
        path: Its CSV.
        table: The same, as read.
    """

    path: Path
    table: Table


def found(runs: Sequence[Path], partial: bool = False) -> list[Result]:
    """The results that are named: a CSV, or a folder for those in it or else in the folders directly below.

    Args:
        runs: Files and folders.
        partial: Whether results of unfinished runs will do.

    Raises:
        InputError: If there is none, or one cannot be read.
    """
    paths = [path for run in runs for path in (_in(run) if run.is_dir() else [run])]
    results = [Result(path, Table.read(path, partial=partial)) for path in dict.fromkeys(paths)]
    told = [result for result in results if result.table.kind in TOLD]
    if not told:
        names = ", ".join(str(run) for run in runs) or "nothing"
        raise InputError(f"{names}: no result to report on; write some with: grood-cert certify MODEL --out FOLDER")
    return told


def _in(folder: Path) -> list[Path]:
    """The results in a folder, or if there is none, those in the folders directly below it."""
    here = [path for path in sorted(folder.glob("*.csv")) if _kind(path)]
    return here or [path for path in sorted(folder.glob("*/*.csv")) if _kind(path)]


def _kind(path: Path) -> bool:
    """Whether a manifest lies beside a CSV that makes it a result of its own, not a part of one."""
    try:
        manifest = json.loads(manifest_path(path).read_text(encoding="utf-8"))
        return manifest["kind"] in TOLD and not manifest.get("shard")
    except (OSError, ValueError, TypeError, KeyError):
        return False


def by_detector(results: Sequence[Result], labels: Sequence[str] = ()) -> dict[str, list[Result]]:
    """Results by the name of the detector they are of, in the order in which they were named.

    Args:
        results: As `found` gives them.
        labels: Names of the detectors; by default their own, or where two share it, the folders' of their results.

    Raises:
        InputError: If there are more or fewer labels than detectors, two have the same name, or a detector has two
            results of one kind.
    """
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(str(result.table.manifest["model"].get("sha256") or result.path), []).append(result)
    first = [group[0] for group in grouped.values()]
    names = labelled([one.table for one in first], [one.path for one in first], labels, "detectors")
    for name, group in zip(names, grouped.values(), strict=True):
        kinds = [result.table.kind for result in group]
        for kind in kinds:
            if kinds.count(kind) > 1:
                paths = " and ".join(str(result.path) for result in group if result.table.kind == kind)
                raise InputError(f"{name}: {paths} are both {SCHEMAS[kind].words} of one detector; give one of them")
        group.sort(key=lambda result: TOLD.index(result.table.kind))
    return dict(zip(names, grouped.values(), strict=True))


def groups(detectors: Mapping[str, Sequence[Result]]) -> dict[str, list[str]]:
    """Names of detectors that differ in the seed of their training alone, by what they share; others by themselves.

    Args:
        detectors: Results by the name of their detector, as from `by_detector`.
    """
    names, first = list(detectors), [group[0].table for group in detectors.values()]
    places = by_settings(first)
    titles = names if len(places) == len(names) else group_names(first, places, names)
    return {title: [names[place] for place in group] for title, group in zip(titles, places, strict=True)}


def of_seeds(names: Sequence[str], detectors: Mapping[str, Sequence[Result]], kind: str) -> list[Result]:
    """The results of one kind of a group, one a seed; none if a detector lacks it or it was made with other settings."""
    found = [result for name in names for result in detectors[name] if result.table.kind == kind]
    whole = len(found) == len(names) and len(by_settings([result.table for result in found])) == 1
    return found if whole else []


def objective_pages(names: Sequence[str], detectors: Mapping[str, Sequence[Result]]) -> list[dict[str, Any]]:
    """`objective_records` of each of some detectors, with its name as `detector`; a network without a recipe has none."""
    records = []
    for name in names:
        tables = {result.table.kind: result.table for result in detectors[name]}
        with contextlib.suppress(InputError):
            pages = objective_records(tables.get("certification"), tables.get("lipschitz"))
            records += [{"detector": name, **page} for page in pages]
    return records


def _group(name: str, names: Sequence[str], detectors: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    pages = objective_pages(names, detectors)
    certified = [result.table for result in of_seeds(names, detectors, "certification")]
    return {
        "name": name,
        "detectors": names,
        "seeds": [seed_of(detectors[one][0].table) for one in names],
        "norm": certified[0].norm if certified else None,
        "eps": certified[0].eps if certified else None,
        "records": pages,
        "over_seeds": {image_set: record for image_set, (record,) in over_seeds({name: pages}).items()},
        "fpr95_id": _rates_over_seeds(certified),
    }


def _rates_over_seeds(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """FPR95 of each OOD set and eps, certified and attacked: mean, smallest and largest over several seeds."""
    if len(tables) < 2:
        return []
    found: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for table in tables:
        for record in _rates(table):
            found.setdefault((record["set"], record["eps"]), []).append(record)
    return [
        {"set": name, "eps": eps, "samples": records[0]["samples"]}
        | {key: spread_of([record[key] for record in records]) for key in ("fpr95_id_certified", "fpr95_id_attacked")}
        for (name, eps), records in found.items()
    ]


def card(detectors: Mapping[str, Sequence[Result]], title: str, command: str | None = None) -> dict[str, Any]:
    """What there is to say, as plain data.

    Args:
        detectors: Results by the name of their detector, as from `by_detector`.
        title: Of the report.
        command: The command that makes the report again.

    Raises:
        InputError: If a result cannot be summarised.
    """
    pages = [
        {"name": name, "model": _model(group[0].table), "results": [_result(result) for result in group]}
        for name, group in detectors.items()
    ]
    tables = [result.table for group in detectors.values() for result in group]
    content: dict[str, Any] = as_json(
        {
            "schema": SCHEMA,
            "title": title,
            "made_by": f"grood-cert {grood_cert.__version__}",
            "command": command,
            "complete": all(table.complete for table in tables),
            "forms": FORMS,
            "detectors": pages,
            "groups": [_group(name, names, detectors) for name, names in groups(detectors).items()],
            "figures": [],
            "limits": limits({table.kind for table in tables}),
        }
    )
    return content


def _model(table: Table) -> dict[str, Any]:
    manifest = table.manifest
    recipe = manifest.get("recipe") or {}
    return {
        "path": manifest["model"].get("path"),
        "sha256": manifest["model"].get("sha256"),
        "score": manifest.get("score"),
        "network": (recipe.get("network") or {}).get("name"),
        "recipe": recipe or None,
        "imported": manifest.get("imported"),
        "metrics": manifest.get("metrics"),
    }


def _result(result: Result) -> dict[str, Any]:
    table = result.table
    manifest = table.manifest
    return {
        "kind": table.kind,
        "form": "probabilistic" if table.kind == "smoothing" else "proved",
        "file": str(result.path),
        "rows": len(table),
        KEY: manifest.get(KEY),
        "complete": table.complete,
        "progress": table.progress,
        "norm": table.norm,
        "eps": table.eps,
        "gamma": manifest.get("gamma"),
        "sets": _sets(table),
        "words": sentences(table),
        "command": manifest.get("command"),
        "seconds": manifest.get("seconds"),
        "versions": manifest.get("versions"),
        "failures": manifest.get("failures") or {},
        "summary": table.summary(),
        **_TOLD[table.kind](table),
    }


def _sets(table: Table) -> list[dict[str, Any]]:
    """The image sets, and how many samples of each were drawn."""
    sizes = {page["set"]: page for page in table.manifest.get("data", ())}
    return [
        {
            "set": name,
            "kind": str(table["kind"][mask][0]),
            "samples": len(np.unique(table["index"][mask])),
            "images": sizes.get(name, {}).get("images"),
            "sha256": sizes.get(name, {}).get("sha256"),
            "note": sizes.get(name, {}).get("note"),
        }
        for name, mask in table.sets("id", "ood", "noise").items()
    ]


def _rates(table: Table) -> list[dict[str, Any]]:
    try:
        return list(fpr_curve(table, "ood").sets)
    except InputError:  # no ID or no OOD rows
        return []


def _certification(table: Table) -> dict[str, Any]:
    return {
        "fpr95_id": _rates(table),
        "decided": balls_decided(table),
        "refuted": _refuted(table),
        "cross_check": table.manifest.get("cross_check"),
    }


def _refuted(table: Table) -> list[dict[str, Any]]:
    """For each set, the share of gradient-norm estimates that lie above the distance of an attack: they are wrong."""
    records = []
    for name, mask in table.sets("id", "ood", "noise").items():
        right = mask & (table["status"] != "misdecided") & np.isfinite(table["radius_gradient_norm_estimate"])
        wrong = table["radius_gradient_norm_estimate"][right] > table["radius_attack"][right]
        records.append({"set": name, "samples": int(right.sum()), "refuted": int(wrong.sum())})
    return records


def _smoothing(table: Table) -> dict[str, Any]:
    return {
        "alpha": float(table["alpha"].max()),
        "sigma": table.manifest.get("sigma"),
        "n": table.manifest.get("n"),
        "detection": detection(table) if table.of_kind("id").any() else [],
    }


_TOLD: dict[str, Callable[[Table], dict[str, Any]]] = {  # what is told of one kind alone
    "certification": _certification,
    "smoothing": _smoothing,
    "lipschitz": lambda table: {},
}


_KINDS = {"id": "ID", "ood": "OOD", "noise": "noise"}


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(f"{name:g}" if isinstance(name, float) else str(name) for name in names)


def sentences(table: Table) -> list[str]:
    """A manifest in words: what was tested, against what, and how."""
    manifest = table.manifest
    what = {"certification": "Certified", "smoothing": "Smoothed and certified", "lipschitz": "Analysed"}[table.kind]
    parts = [
        f"{page['samples']} of {page['images'] or '?'} images of {page['set']} ({_KINDS[page['kind']]})"
        for page in _sets(table)
    ]
    lines = [f"{what}: {'; '.join(parts)}."]
    if not table.complete:
        lines.append(f"Not finished: {table.progress} samples are done, and what follows is of these alone.")
    if table.kind == "smoothing":
        lines.append(
            f"The smoothed detector decides by the median of S under Gaussian noise of sigma {manifest['sigma']:g}, "
            f"from {manifest['n']} draws a sample; its threshold {table.gamma:.4f} was calibrated anew."
        )
    else:
        ball = f"{NORMS[table.norm]} balls of radius {_listed(table.eps)} around each image"
        lines.append(f"Perturbations: {ball}, in pixel units (pixels in [0, 1]), cut to the pixel box.")
    if table.kind == "certification":
        origin = manifest.get("calibration") or {}
        source = f", the {origin['percent']} % quantile of {origin['samples']} held-out ID scores" if origin else ""
        lines.append(f"An image is accepted as ID if S <= gamma = {table.gamma:.4f}{source}.")
        bound = manifest.get("bounded_by") or manifest.get("engine")
        lines.append(
            f"Effort {manifest.get('effort')}: stages {_listed(manifest.get('stages', ()))}; linear bounds by the engine "
            f"{bound}; bounds cover evaluation in {manifest.get('deployment')}."
        )
        lines.append(_checked_by(manifest.get("cross_check")))
    if table.kind == "lipschitz":
        lines.append(
            f"Bounds of the slope of S from pre-activation bounds by {manifest.get('method')} of the engine "
            f"{manifest.get('bounded_by')}; from below, {manifest.get('samples')} sampled points and ascents in each ball."
        )
    return [line for line in lines if line]


def _checked_by(check: Mapping[str, Any] | None) -> str:
    if not check:
        return ""
    if "left_out" in check:
        return f"The bounds were not cross-checked by a second engine: {check['left_out']}."
    return f"A second engine, {check['engine']} {check['version']}, contradicts none of them on {check['balls']} balls."


def limits(kinds: Iterable[str]) -> list[str]:
    """What the claims of a report do not say, by the kinds of result in it."""
    told = set(kinds)
    lines = [
        (
            "All of it is about the images that were tested. What it says of others from the same source is as sure as the "
            "95 % intervals; of other sources it says nothing."
        ),
        "Perturbations are changes of pixel values within the stated ball. Rotation, blur, another camera are none.",
    ]
    if "certification" in told:
        lines += [
            (
                "Proofs are of the network in evaluation mode, as float64 computes it (or the arithmetic named above). Half "
                "precision, TF32 and convolutions by transforms are not covered."
            ),
            (
                "A sample that is undecided is counted against the detector: between attacked and certified lies what is "
                "not known. A better verifier or attack can only move the two towards one another."
            ),
            (
                "fpr95_id is read at the threshold that accepts 95 % of the ID test samples that were certified; radii are at "
                "the detector's own gamma. The two differ."
            ),
            "The gradient-norm estimate |S - gamma| / |grad S| is no radius: the share that attacks refuted is given.",
        ]
    if "smoothing" in told:
        lines.append(
            "Smoothing certifies another detector, the median of S under noise, in l_2 alone. Each sample may be wrong "
            "with probability alpha: of N samples, up to about alpha N."
        )
    if "lipschitz" in told:
        lines.append(
            "A proved slope bounds how fast S can change; a radius needs the margin |S - gamma| too, so a smaller slope "
            "alone makes no detector more robust."
        )
    return lines
