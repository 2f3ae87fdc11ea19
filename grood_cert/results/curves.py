r"""Curves read off tables; pure functions, nothing is verified again.

*Certifications.* With gamma the threshold, S_lb and S_ub the formal envelopes and "attack" the witnesses found, for one OOD set:

    FPR_cert(eps)   = 1 - mean[S_lb(x; eps) > gamma]          proved: at most this share can be made to pass as ID
    FPR_attack(eps) = mean[S_attack_min(x; eps) <= gamma]     shown: at least this share can

The true worst-case FPR lies between the two; what lies between is undecided. Rates count what was *proved*, so NaN,
a timeout or an unknown operation count against the detector. Several OOD sets are averaged without weights; noise sets
are never part of a mean.

*Smoothing.* The same of the smoothed detector, true with the probability that its rows state: each errs with probability
at most alpha, so rates are certified up to alpha on average.

References:
    Bitterwolf et al., "Certifiably Adversarially Robust Detection of OOD Data" (GOOD), NeurIPS 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grood_cert.errors import InputError
from grood_cert.metrics import TPR_PERCENT, threshold_at_tpr
from grood_cert.results.table import Table

Perturbed = Literal["ood", "id", "both"]
PERTURBED: tuple[str, ...] = get_args(Perturbed)
_Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FprCurve:
    """FPR at 95 % TPR against eps; `eps[0]` is 0, where both curves are the clean FPR (`fpr95_id`).

    Attributes:
        eps: Radii, shape (J,).
        certified: Proved upper bound of the worst-case FPR, mean over sets, shape (J,).
        attacked: FPR that an attack reached, mean over sets.
        sets: One record for each OOD set and eps, with exact 95 % binomial intervals.
    """

    eps: _Floats
    certified: _Floats
    attacked: _Floats
    sets: tuple[dict[str, Any], ...]


def ood_sets(rows: Table) -> dict[str, NDArray[np.bool_]]:
    """Masks of the OOD sets that count in means.

    Raises:
        InputError: If there is none, or no ID rows to compare them with.
    """
    sets = rows.sets("ood")
    if not sets:
        raise InputError("the rows hold no OOD set (noise is reported apart); certify at least one")
    if not rows.of_kind("id").any():
        raise InputError("the rows hold no ID samples; certify the ID test set too")
    return sets


def _with_clean(rows: Table, name: str, mask: NDArray[np.bool_], clean: str = "score") -> _Floats:
    """A grid column preceded by the clean score, shape (n, 1 + len(eps)); eps = 0 is left out of the grid."""
    grid = rows.grid[name][mask][:, np.array(rows.eps) > 0]
    return np.concatenate([rows[clean][mask][:, None], grid], axis=1)


def grid_with_zero(rows: Table) -> _Floats:
    """0 and the positive eps of the grid."""
    return np.array([0.0, *(value for value in rows.eps if value > 0)])


def middle_eps(rows: Table) -> float:
    """The middle of the positive eps of the grid."""
    positive = [value for value in rows.eps if value > 0] or list(rows.eps)
    return positive[(len(positive) - 1) // 2]


def fpr_curve(rows: Table, perturbed: Perturbed = "ood") -> FprCurve:
    r"""FPR at 95 % TPR as eps grows.

    Args:
        rows: A certification.
        perturbed: Which side moves. "ood": gamma is the smallest threshold that accepts at least 95 % of the clean ID
            test scores. "id" and "both": it must accept 95 % of ID at its worst in the ball, that is of S_ub (certified)
            or of the highest score an attack reached (attacked).

    Raises:
        InputError: If `perturbed` is unknown, or ID or OOD rows are missing.
    """
    from scipy.stats import binomtest

    if perturbed not in PERTURBED:
        raise InputError(f"unknown side {perturbed!r}; perturb one of {', '.join(PERTURBED)}")
    sets = ood_sets(rows)
    inside = rows.of_kind("id")
    eps = grid_with_zero(rows)
    formal_id = np.nan_to_num(_with_clean(rows, "s_ub", inside), nan=np.inf, posinf=np.inf, neginf=np.inf)
    attack_id = _with_clean(rows, "s_attack_max", inside)
    if perturbed == "ood":
        formal_id, attack_id = (np.repeat(values[:, :1], len(eps), axis=1) for values in (formal_id, attack_id))
    gamma_certified = np.array([threshold_at_tpr(column, TPR_PERCENT) for column in formal_id.T])
    gamma_attacked = np.array([threshold_at_tpr(column, TPR_PERCENT) for column in attack_id.T])
    records: list[dict[str, Any]] = []
    certified, attacked = [], []
    for name, mask in sets.items():
        formal, witness = _with_clean(rows, "s_lb", mask), _with_clean(rows, "s_attack_min", mask)
        if perturbed == "id":
            formal, witness = (np.repeat(values[:, :1], len(eps), axis=1) for values in (formal, witness))
        proved = formal > gamma_certified
        fooled = witness <= gamma_attacked
        certified.append((~proved).mean(0))
        attacked.append(fooled.mean(0))
        for index, value in enumerate(eps):
            record = {"set": name, "eps": float(value), "samples": int(mask.sum())}
            for label, count in (
                ("fpr95_id_certified", len(proved) - int(proved[:, index].sum())),
                ("fpr95_id_attacked", int(fooled[:, index].sum())),
            ):
                interval = binomtest(count, len(proved)).proportion_ci(0.95, method="exact")
                record |= {label: count / len(proved), f"{label}_low": interval.low, f"{label}_high": interval.high}
            records.append(record)
    return FprCurve(eps, np.mean(certified, axis=0), np.mean(attacked, axis=0), tuple(records))


@dataclass(frozen=True, eq=False)
class RadiusCurve:
    """Share of samples whose decision at the detector's gamma is not known to survive eps.

    Attributes:
        eps: Radii, shape (J,), from 0.
        certified: Share with certified radius <= eps, wrong decisions at x included.
        attacked: Share with attack radius <= eps: these are broken for certain.
    """

    eps: _Floats
    certified: _Floats
    attacked: _Floats


def _share_up_to(radii: ArrayLike, eps: _Floats) -> _Floats:
    ordered = np.sort(np.asarray(radii, dtype=np.float64))
    return np.searchsorted(ordered, eps, side="right") / len(ordered)


def radius_curve(rows: Table, kind: Literal["id", "ood"], points: int = 400) -> RadiusCurve:
    """Distribution of radii over ID samples, or its mean over the OOD sets.

    Raises:
        InputError: If there are no such rows.
    """
    sets = ood_sets(rows) if kind == "ood" else rows.sets("id")
    if not sets:
        raise InputError("the rows hold no ID samples; certify the ID test set too")
    attack = rows["radius_attack"]
    finite = attack[np.isfinite(attack) & ~rows.of_kind("noise")]
    largest = np.quantile(np.append(finite, rows["radius_certified"].max()), 0.98)
    eps = np.linspace(0, float(largest) or 1.0, points)
    return RadiusCurve(
        eps,
        np.mean([_share_up_to(rows["radius_certified"][mask], eps) for mask in sets.values()], axis=0),
        np.mean([_share_up_to(attack[mask], eps) for mask in sets.values()], axis=0),
    )


@dataclass(frozen=True, eq=False)
class RobustnessCurve:
    """Robustness of ID acceptance against clean FPR as gamma sweeps all scores.

    Attributes:
        eps: Radius of the balls.
        gamma: Thresholds, ascending.
        fpr: Share of clean OOD accepted at gamma, mean over sets.
        tpr: Share of clean ID accepted at gamma: with `fpr`, the ROC curve.
        certified: Share of ID proved to stay accepted on its whole ball.
        attacked: Share of ID that no attack got rejected.
    """

    eps: float
    gamma: _Floats
    fpr: _Floats
    tpr: _Floats
    certified: _Floats
    attacked: _Floats


def robustness_curve(rows: Table, eps: float | None = None) -> RobustnessCurve:
    """Sweep gamma at one eps of the grid.

    Args:
        rows: A certification.
        eps: A value of the grid; its middle by default.

    Raises:
        InputError: If eps is not on the grid, or ID or OOD rows are missing.
    """
    sets = ood_sets(rows)
    eps = middle_eps(rows) if eps is None else eps
    if eps not in rows.eps:
        raise InputError(f"eps {eps:g} is not on the grid of the rows; use one of {', '.join(map(repr, rows.eps))}")
    column = rows.eps.index(eps)
    inside = rows.of_kind("id")
    score = rows["score"][inside]
    upper = rows.grid["s_ub"][inside, column]
    witness = rows.grid["s_attack_max"][inside, column]
    values = np.concatenate([rows["score"], upper[np.isfinite(upper)], witness])
    gamma = np.unique(np.concatenate([values, np.nextafter(values, np.inf)]))
    return RobustnessCurve(
        eps=eps,
        gamma=gamma,
        fpr=np.mean([_share_up_to(rows["score"][mask], gamma) for mask in sets.values()], axis=0),
        tpr=_share_up_to(score, gamma),
        certified=np.searchsorted(np.sort(upper[np.isfinite(upper)]), gamma, side="left") / len(score),
        attacked=_share_up_to(witness, gamma),
    )


def not_certified(rows: Table, mask: NDArray[np.bool_], eps: _Floats) -> _Floats:
    """Share of the samples whose right decision is not certified against perturbations of length eps.

    At the smoothed gamma: for OOD it bounds the worst-case FPR from above, for ID 1 - TPR. Abstentions and wrong
    decisions count as not certified at every eps. Shape (len(eps),); each row errs with probability at most alpha.
    """
    return np.asarray((rows["radius_smoothed"][mask][:, None] <= eps).mean(0))


def fpr95_curve(rows: Table) -> tuple[_Floats, _Floats]:
    """FPR at 95 % TPR of the smoothed detector as OOD moves: 1 - mean[s_lb_smoothed > gamma'], mean over OOD sets.

    gamma' accepts 95 % of the clean ID medians (estimates). The bounds of a row hold all together, whatever gamma', so
    it may be chosen after the draws.

    Returns:
        eps, from 0, and the certified FPR, both of shape (J,); at 0 it is the clean FPR of the estimated medians.

    Raises:
        InputError: If there are no ID or no OOD rows, or an ID median is NaN.
    """
    sets = ood_sets(rows)
    gamma = threshold_at_tpr(rows["median_estimate"][rows.of_kind("id")], TPR_PERCENT)
    lower = [_with_clean(rows, "s_lb_smoothed", mask, "median_estimate") for mask in sets.values()]
    return grid_with_zero(rows), np.asarray(np.mean([1 - (bounds > gamma).mean(0) for bounds in lower], axis=0))
