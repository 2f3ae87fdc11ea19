r"""What one run of a sweep over lambda_grad says about the link from the objective to the theory.

Training penalises ||grad S|| at the samples. A certificate needs the constant of S on a whole ball: for a margin
m = |S(x) - gamma| and a local Lipschitz constant L, the decision at x holds within m / L. A radius thus grows by a
smaller slope or by a larger margin, and regularisation changes both; ID and OOD samples differ in both, so they are kept
apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grood_cert.errors import InputError
from grood_cert.results.columns import NORMS
from grood_cert.results.curves import fpr_curve, middle_eps
from grood_cert.results.table import Table
from grood_cert.system.files import read_csv

OBJECTIVE: dict[str, str] = {  # what `objective_records` holds, in words
    "lambda_grad": "weight of the gradient penalty",
    "seed": "seed of the training",
    "kind": "id or ood",
    "set": "name of the image set",
    "samples": "samples certified",
    "norm": "norm of the balls",
    "effort": "effort of the certification",
    "engine": "engine of the certification",
    "complete": "whether all rows are there",
    "accuracy": "accuracy on the whole ID test set",
    "gradient_norm_estimate": "gradient norm at x (estimate), median over samples right at x",
    "eps_constant": "eps of the proved constant",
    "constant_bound": "best bound (proved) of the local Lipschitz constant, median over samples",
    "margin": "|S - gamma|, median over samples right at x",
    "margin_over_constant_estimate": "margin over constant, median over samples right at x: a radius if below eps_constant, "
    "else an estimate of one",
    "radius_certified": "certified radius, median over samples right at x",
    "radius_attack": "attack radius, median over samples right at x",
    "eps": "eps of the FPR95",
    "fpr95_id_clean": "FPR95, clean",
    "fpr95_id_attacked": "FPR95, attacked",
    "fpr95_id_certified": "FPR95, certified",
}

SHOWN = {  # what `over_seeds` tells of, in words
    "accuracy": "ID accuracy",
    "gradient_norm_estimate": "gradient norm at x (estimate), median",
    "constant_bound": "Lipschitz constant (proved), median",
    "margin": "margin |S - gamma|, median",
    "radius_certified": "certified radius, median",
    "radius_attack": "attack radius, median",
    "fpr95_id_clean": "fpr95_id, clean",
    "fpr95_id_attacked": "fpr95_id, attacked",
    "fpr95_id_certified": "fpr95_id, certified",
}


def objective_records(
    certification: Table | None, lipschitz: Table | None, eps: float | None = None
) -> list[dict[str, Any]]:
    """One record for the ID test set and for each OOD set of one trained detector, with the keys of `OBJECTIVE`.

    `figures.objective` draws the records of all runs of a sweep together. What is not known is None.

    Args:
        certification: Of the detector; None: there is none.
        lipschitz: Analysis of the same detector; None: there is none.
        eps: Where FPR95 and the constant are read, on both grids. By default FPR95 in the middle of its grid, the constant
            at the largest eps of its own.

    Raises:
        InputError: If neither is given, they hold no recipe, the norms differ, or eps is not on a grid.
    """
    tables = [table for table in (certification, lipschitz) if table is not None]
    if not tables:
        raise InputError("neither a certification nor a Lipschitz analysis given; one of them is needed")
    recipe = tables[0].manifest.get("recipe")
    if not recipe:
        raise InputError("a result of a network without a recipe: its lambda_grad is unknown")
    if len({table.norm for table in tables}) > 1:
        raise InputError(f"certified in {NORMS[tables[0].norm]} and analysed in {NORMS[tables[1].norm]}; use one norm")
    for table in tables:
        if eps is not None and eps not in table.eps:
            raise InputError(
                f"eps {eps:g} is not on the grid of the rows; use one of {', '.join(map(repr, table.eps))}"
            )
    records = []
    for kind in ("id", "ood"):
        for name, mask in tables[0].sets(kind).items():
            record: dict[str, Any] = dict.fromkeys(OBJECTIVE) | {
                "lambda_grad": float(recipe["objective"]["lambda_grad"]),
                "seed": int(recipe["seed"]),
                "kind": kind,
                "set": name,
                "samples": len(set(tables[0]["index"][mask].tolist())),
                "norm": tables[0].norm,
                "complete": all(table.complete for table in tables),
                "accuracy": (tables[0].manifest.get("metrics") or {}).get("accuracy"),
            }
            if lipschitz is not None:
                record |= _slope(lipschitz, kind, name, max(lipschitz.eps) if eps is None else eps)
            if certification is not None:
                record |= _certified(certification, kind, name, middle_eps(certification) if eps is None else eps)
            if lipschitz is not None and certification is not None:
                record["margin_over_constant_estimate"] = _margin_over_constant(
                    lipschitz, kind, name, record["eps_constant"], certification.gamma
                )
            records.append(record)
    return records


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in a `sweep.csv`, without what its sweep added to them: None where a cell is empty.

    Raises:
        InputError: If the file cannot be read, or is none.
    """
    numbers = {key for key in OBJECTIVE if key not in ("kind", "set", "norm", "effort", "engine", "complete")}

    def value(key: str, text: str) -> Any:
        if key == "complete":
            return text == "True"
        return text if key not in numbers else int(text) if key in ("seed", "samples") else float(text)

    try:
        return [{key: value(key, row[key]) if row[key] else None for key in OBJECTIVE} for row in read_csv(path)]
    except KeyError as error:
        raise InputError(f"{path} has no column {error}; it should be the sweep.csv of a `grood-cert sweep`") from None
    except ValueError as error:
        raise InputError(f"{path} is no sweep.csv of a `grood-cert sweep`: {error}") from None


def _margin_over_constant(rows: Table, kind: str, name: str, eps: float, gamma: float) -> float | None:
    chosen = rows.of_kind(kind) & (rows["set"] == name) & (rows["eps"] == eps)
    chosen = chosen & (rows["score"] <= gamma if kind == "id" else rows["score"] > gamma)
    return _median(np.abs(rows["score"][chosen] - gamma) / rows["bound"][chosen])


def _slope(rows: Table, kind: str, name: str, eps: float) -> dict[str, Any]:
    chosen = rows.of_kind(kind) & (rows["set"] == name) & (rows["eps"] == eps)
    return {
        "gradient_norm_estimate": _median(rows["gradient_norm_estimate"][chosen]),
        "eps_constant": eps,
        "constant_bound": _median(rows["bound"][chosen]),
    }


def _certified(rows: Table, kind: str, name: str, eps: float) -> dict[str, Any]:
    mask = rows.sets(kind)[name]
    right = mask & (rows["status"] != "misdecided")
    record = {
        "effort": rows.manifest.get("effort"),
        "engine": rows.manifest.get("bounded_by"),
        "gradient_norm_estimate": _median(rows["gradient_norm_estimate"][right]),
        "margin": _median(np.abs(rows["score"][right] - rows.gamma)),
        "radius_certified": _median(rows["radius_certified"][right]),
        "radius_attack": _median(rows["radius_attack"][right]),
    }
    if kind == "ood" and rows.of_kind("id").any():
        fpr = fpr_curve(rows, "ood", {name: mask})
        (place,) = np.flatnonzero(fpr.eps == eps)
        record |= {
            "eps": eps,
            "fpr95_id_clean": float(fpr.certified[0]),
            "fpr95_id_attacked": float(fpr.attacked[place]),
            "fpr95_id_certified": float(fpr.certified[place]),
        }
    return record


def _median(values: NDArray[np.float64]) -> float | None:
    return float(np.median(values)) if len(values) else None


def over_seeds(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """For each image set, what the seeds of a group have: one record a group, `group` and the keys of `SHOWN`.

    Accuracy is told of the ID set.

    Args:
        groups: Records as of `objective_records`, of all seeds together, by the name of their group.

    Returns:
        Records by the name of the image set. Values are mean, smallest and largest over the seeds that have one, as
        `mean`, `least`, `most` and the number of `seeds`; None if none has.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name, records in groups.items():
        for image_set in dict.fromkeys(record["set"] for record in records):
            seeds = [record for record in records if record["set"] == image_set]
            values = {key: spread_of([seed[key] for seed in seeds]) for key in SHOWN}
            if seeds[0]["kind"] != "id":
                values["accuracy"] = None
            found.setdefault(image_set, []).append({"group": name, **values})
    return found


def spread_of(values: Sequence[float | None]) -> dict[str, float] | None:
    """`mean`, `least`, `most` and number of `seeds` of the values that are known; None if none is.

    Example:
        >>> spread_of([0.5, None, 0.75])
        {'mean': 0.625, 'least': 0.5, 'most': 0.75, 'seeds': 2}
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": sum(known) / len(known), "least": min(known), "most": max(known), "seeds": len(known)}


def spread_text(value: Mapping[str, float] | None) -> str | None:
    """A mean over seeds as it is printed, plus or minus half the range.

    Example:
        >>> spread_text({"mean": 0.0625, "least": 0.06, "most": 0.066, "seeds": 3})
        '0.0625 ±0.003'
    """
    if value is None:
        return None
    half = (value["most"] - value["least"]) / 2
    return f"{value['mean']:.3g}" + (f" ±{half:.2g}" if value["seeds"] > 1 else "")
