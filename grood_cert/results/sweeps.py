r"""What one run of a sweep over lambda_grad says about the link from the objective to the theory.

Training penalises ||grad S|| at the samples. A certificate needs the constant of S on a whole ball: for a margin
m = |S(x) - gamma| and a local Lipschitz constant L, the decision at x holds within m / L. A radius thus grows by a
smaller slope or by a larger margin, and regularisation changes both; ID and OOD samples differ in both, so they are kept
apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grood_cert.errors import InputError
from grood_cert.results.curves import fpr_curve, id_sets, middle_eps, ood_sets
from grood_cert.results.table import Table

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
    "radius_certified": "certified radius, median over samples right at x",
    "radius_attack": "attack radius, median over samples right at x",
    "eps": "eps of the FPR95",
    "fpr95_id_clean": "FPR95, clean",
    "fpr95_id_attacked": "FPR95, attacked",
    "fpr95_id_certified": "FPR95, certified",
}


def objective_records(
    certification: Table, lipschitz: Table | None, metrics: Mapping[str, Any], eps: float | None = None
) -> list[dict[str, Any]]:
    """One record for the ID test set and for each OOD set of one trained detector, with the keys of `OBJECTIVE`.

    `figures.objective` draws the records of all runs of a sweep together.

    Args:
        certification: Of the detector; its manifest holds the recipe.
        lipschitz: Analysis of the same detector; None: there is none, and the constant is None.
        metrics: What training measured (`detector.origin.metrics`): `accuracy` is taken.
        eps: Where FPR95 and the constant are read, on both grids. By default FPR95 in the middle of its grid, the constant
            at the largest eps of its own.

    Raises:
        InputError: If the manifest holds no recipe, the norms differ, or eps is on no grid.
    """
    recipe = certification.manifest.get("recipe")
    if not recipe:
        raise InputError("the certification is of a network without a recipe, so its lambda_grad is unknown")
    if lipschitz is not None and lipschitz.norm != certification.norm:
        raise InputError(f"certified in {certification.norm} and analysed in {lipschitz.norm}; use one norm")
    at = middle_eps(certification) if eps is None else eps
    if at not in certification.eps:
        raise InputError(f"eps {at:g} is not among those certified, {', '.join(map(repr, certification.eps))}")
    constant_at = max(lipschitz.eps) if lipschitz is not None and eps is None else eps
    if lipschitz is not None and constant_at not in lipschitz.eps:
        raise InputError(f"eps {constant_at:g} is not among those analysed, {', '.join(map(repr, lipschitz.eps))}")
    about = certification.manifest
    records = []
    for kind, sets in (("id", id_sets(certification)), ("ood", ood_sets(certification))):
        for name, mask in sets.items():
            right = mask & (certification["status"] != "misdecided")
            record = dict.fromkeys(OBJECTIVE) | {
                "lambda_grad": float(recipe["objective"]["lambda_grad"]),
                "seed": int(recipe["seed"]),
                "kind": kind,
                "set": name,
                "samples": int(mask.sum()),
                "norm": certification.norm,
                "effort": about.get("effort"),
                "engine": about.get("bounded_by"),
                "complete": certification.complete and (lipschitz is None or lipschitz.complete),
                "accuracy": float(metrics["accuracy"]),
                "gradient_norm_estimate": _median(certification["gradient_norm_estimate"][right]),
                "margin": _median(np.abs(certification["score"][right] - certification.gamma)),
                "radius_certified": _median(certification["radius_certified"][right]),
                "radius_attack": _median(certification["radius_attack"][right]),
            }
            if lipschitz is not None:
                chosen = (lipschitz["set"] == name) & lipschitz.of_kind(kind) & (lipschitz["eps"] == constant_at)
                record |= {"eps_constant": constant_at, "constant_bound": _median(lipschitz["bound"][chosen])}
            if kind == "ood":
                fpr = fpr_curve(certification, "ood", {name: mask})
                (place,) = np.flatnonzero(fpr.eps == at)
                record |= {
                    "eps": at,
                    "fpr95_id_clean": float(fpr.certified[0]),
                    "fpr95_id_attacked": float(fpr.attacked[place]),
                    "fpr95_id_certified": float(fpr.certified[place]),
                }
            records.append(record)
    return records


def _median(values: NDArray[np.float64]) -> float | None:
    return float(np.median(values)) if len(values) else None
