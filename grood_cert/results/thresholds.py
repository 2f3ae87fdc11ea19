r"""Another threshold for rows that are already certified: a look-up in their envelopes, nothing is verified again.

With S_lb, S_ub the envelopes and s_min, s_max the extremes that attacks reached on the eps grid, at a new gamma

    ID:  certified radius = largest eps_j with S_ub(eps_j) < gamma       attack radius <= smallest eps_j with s_max > gamma
    OOD: certified radius = largest eps_j with S_lb(eps_j) > gamma       attack radius <= smallest eps_j with s_min <= gamma

Radii found by search at the old threshold gamma_0 go on where they imply the new statement: a certified one where the
new threshold asks for less (ID: gamma >= gamma_0, OOD: gamma <= gamma_0), an attack where it asks for more. Otherwise
a radius is a value of the grid, so a finer grid gives finer radii.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from grood_cert import metrics
from grood_cert.errors import InputError
from grood_cert.results.columns import LOOKED_UP
from grood_cert.results.table import Table

_Floats = NDArray[np.float64]


def at_gamma(rows: Table, gamma: float) -> Table:
    """The same certification read at another threshold.

    Args:
        rows: A certification.
        gamma: Threshold; accept x as ID iff S(x) <= gamma.

    Returns:
        Rows with `accepted`, `status`, `stage` and radii at gamma. Radii that were searched at the old threshold alone
        (per logit, Lipschitz) are NaN. The manifest names both thresholds.

    Raises:
        InputError: If gamma is not finite.
    """
    if not math.isfinite(gamma):
        raise InputError(f"gamma must be a finite number, got {gamma!r}")
    if gamma == rows.gamma:
        return rows
    inside = rows.of_kind("id")
    score = rows["score"]
    accepted = score <= gamma
    right = accepted == inside
    proved = np.where(inside[:, None], rows.grid["s_ub"] < gamma, rows.grid["s_lb"] > gamma) & right[:, None]
    broken = np.where(inside[:, None], rows.grid["s_attack_max"] > gamma, rows.grid["s_attack_min"] <= gamma)
    eps = np.broadcast_to(np.array(rows.eps), proved.shape)
    easier = (gamma > rows.gamma) == inside
    kept = np.where(right & easier, rows["radius_certified"], 0.0)
    certified = np.maximum(np.where(proved, eps, 0.0).max(1), kept)
    attack = np.minimum(np.where(broken, eps, np.inf).min(1), np.where(easier, np.inf, rows["radius_attack"]))
    attack = np.where(right, attack, 0.0)
    stage = np.where(kept >= certified, rows["stage"], LOOKED_UP)
    unknown = np.full(len(rows), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = np.abs(score - gamma) / rows["gradient_norm_estimate"]
    columns = dict(rows.columns) | {
        "accepted": accepted.astype(int),
        "status": np.where(~right, "misdecided", np.where(certified > 0, "certified", "undecided")),
        "stage": np.where(~right, "misdecision", np.where(certified > 0, stage, "undecided")),
        "radius_certified": certified,
        "radius_certified_per_logit": unknown,
        "radius_lipschitz_fixed_point": unknown,
        "radius_lipschitz_path": unknown,
        "radius_attack": attack,
        "radius_gradient_norm_estimate": np.where(right, estimate, 0.0),
    }
    decided = np.where(
        (0 < certified[:, None]) & (eps <= certified[:, None]),
        LOOKED_UP,
        np.where(eps >= attack[:, None], "attack", "undecided"),
    )
    outcomes = np.where(right[:, None], decided, "misdecision")
    manifest = {
        **rows.manifest,
        "gamma": gamma,
        "gamma_certified_at": rows.manifest.get("gamma_certified_at", rows.gamma),
    }
    return Table(manifest, columns, {**rows.grid, "outcome": outcomes})


def calibrated_gamma(medians: Table) -> float:
    """Threshold of the smoothed score: the conformal quantile of the medians of a smoothing-calibration.

    Raises:
        InputError: If a median is NaN, or there are too few.
    """
    return metrics.calibrated_threshold(medians["median_estimate"], metrics.TPR_PERCENT)
