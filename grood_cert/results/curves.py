r"""Curves read off tables; pure functions, nothing is verified again.

*Certifications.* With gamma the threshold, S_lb and S_ub the formal envelopes and "attack" the witnesses found, for one OOD set:

    FPR_cert(eps)   = 1 - mean[S_lb(x; eps) > gamma]          proved: at most this share can be made to pass as ID
    FPR_attack(eps) = mean[S_attack_min(x; eps) <= gamma]     shown: at least this share can

The true worst-case FPR of the samples lies between the two; what lies between is undecided. Rates count what was
*proved*, so NaN, a timeout or an unknown operation count against the detector. Noise sets are never part of a mean.

*Limits.* Samples are drawn. Beyond each curve lies a limit such that the share of the *distribution* that a set is drawn
from lies between the two limits with probability at least 95 %: exact binomial (Clopper-Pearson) for rates at one eps,
a band that holds for the whole curve together (DKW) for distributions of radii and for sweeps of gamma. Thresholds are
taken as given. Means over m sets are unweighted; their limits are the means of limits at level 1 - 0.05 / m each.

*Smoothing.* The same of the smoothed detector, true with the probability that its rows state: each errs with probability
at most alpha, so rates are certified up to alpha on average.

References:
    Bitterwolf et al., "Certifiably Adversarially Robust Detection of OOD Data" (GOOD), NeurIPS 2020.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grood_cert.confidence import LEVEL, clopper_pearson, dkw, median_interval
from grood_cert.errors import InputError
from grood_cert.metrics import TPR_PERCENT, auroc, mean_over_sets, threshold_at_tpr
from grood_cert.results.table import Table

Perturbed = Literal["ood", "id", "both"]
PERTURBED: tuple[str, ...] = get_args(Perturbed)
_Floats = NDArray[np.float64]
Sets = Mapping[str, NDArray[np.bool_]]  # masks of rows by the name of the image set


@dataclass(frozen=True, eq=False)
class FprCurve:
    """FPR at 95 % TPR against eps; `eps[0]` is 0, where both curves are the clean FPR (`fpr95_id`).

    Attributes:
        eps: Radii, shape (J,).
        certified: Proved upper bound of the worst-case FPR, mean over sets, shape (J,).
        attacked: FPR that an attack reached, mean over sets.
        certified_limit: Upper 95 % limit of `certified`.
        attacked_limit: Lower 95 % limit of `attacked`.
        sets: One record for each OOD set and eps, with exact 95 % binomial intervals.
    """

    eps: _Floats
    certified: _Floats
    attacked: _Floats
    certified_limit: _Floats
    attacked_limit: _Floats
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


def id_sets(rows: Table) -> dict[str, NDArray[np.bool_]]:
    """Masks of the ID test sets.

    Raises:
        InputError: If there is none.
    """
    sets = rows.sets("id")
    if not sets:
        raise InputError("the rows hold no ID samples; certify the ID test set too")
    return sets


def _with_clean(rows: Table, name: str, mask: NDArray[np.bool_], clean: str = "score") -> _Floats:
    """A grid column preceded by the clean score, shape (n, 1 + len(eps)); eps = 0 is left out of the grid."""
    grid = rows.grid[name][mask][:, np.array(rows.eps) > 0]
    return np.concatenate([rows[clean][mask][:, None], grid], axis=1)


def grid_with_zero(rows: Table) -> _Floats:
    """0 and the positive eps of the grid."""
    return np.array([0.0, *(value for value in rows.eps if value > 0)])


def _level(sets: Sets) -> float:
    """Level of each set's limits such that the limits of the mean hold at `LEVEL`."""
    return 1 - (1 - LEVEL) / len(sets)


def _mean(curves: list[_Floats]) -> _Floats:
    return np.asarray(np.mean(curves, axis=0))


def fpr_curve(rows: Table, perturbed: Perturbed = "ood", sets: Sets | None = None) -> FprCurve:
    r"""FPR at 95 % TPR as eps grows.

    Args:
        rows: A certification.
        perturbed: Which side moves. "ood": gamma is the smallest threshold that accepts at least 95 % of the clean ID
            test scores. "id" and "both": it must accept 95 % of ID at its worst in the ball, that is of S_ub (certified)
            or of the highest score an attack reached (attacked).
        sets: OOD sets to take the mean of; by default all.

    Raises:
        InputError: If `perturbed` is unknown, or ID or OOD rows are missing.
    """
    if perturbed not in PERTURBED:
        raise InputError(f"unknown side {perturbed!r}; perturb one of {', '.join(PERTURBED)}")
    sets = ood_sets(rows) if sets is None else sets
    inside = rows.of_kind("id")
    eps = grid_with_zero(rows)
    formal_id = np.nan_to_num(_with_clean(rows, "s_ub", inside), nan=np.inf, posinf=np.inf, neginf=np.inf)
    attack_id = _with_clean(rows, "s_attack_max", inside)
    if perturbed == "ood":
        formal_id, attack_id = (np.repeat(values[:, :1], len(eps), axis=1) for values in (formal_id, attack_id))
    gamma_certified = np.array([threshold_at_tpr(column, TPR_PERCENT) for column in formal_id.T])
    gamma_attacked = np.array([threshold_at_tpr(column, TPR_PERCENT) for column in attack_id.T])
    records: list[dict[str, Any]] = []
    certified, attacked, highest, lowest = [], [], [], []
    for name, mask in sets.items():
        formal, witness = _with_clean(rows, "s_lb", mask), _with_clean(rows, "s_attack_min", mask)
        if perturbed == "id":
            formal, witness = (np.repeat(values[:, :1], len(eps), axis=1) for values in (formal, witness))
        proved = formal > gamma_certified
        fooled = witness <= gamma_attacked
        counts, samples = {"certified": (~proved).sum(0), "attacked": fooled.sum(0)}, int(mask.sum())
        certified.append(counts["certified"] / samples)
        attacked.append(counts["attacked"] / samples)
        highest.append(clopper_pearson(counts["certified"], samples, _level(sets))[1])
        lowest.append(clopper_pearson(counts["attacked"], samples, _level(sets))[0])
        intervals = {label: clopper_pearson(count, samples) for label, count in counts.items()}
        for index, value in enumerate(eps):
            record = {"set": name, "eps": float(value), "samples": samples}
            for label, (low, high) in intervals.items():
                column = f"fpr95_id_{label}"
                record |= {column: float(counts[label][index] / samples)}
                record |= {f"{column}_low": float(low[index]), f"{column}_high": float(high[index])}
            records.append(record)
    return FprCurve(eps, _mean(certified), _mean(attacked), _mean(highest), _mean(lowest), tuple(records))


@dataclass(frozen=True, eq=False)
class RadiusCurve:
    """Share of samples whose right decision at the detector's gamma survives, as eps grows: it falls at each radius.

    Attributes:
        eps: Where a curve falls, ascending from 0, shape (J,); each value holds up to the next eps.
        certified: Share with certified radius > eps; a wrong decision at x has radius 0.
        attacked: Share with attack radius > eps: no more than these can survive.
        certified_limit: Lower 95 % limit of `certified`, for all eps together.
        attacked_limit: Upper 95 % limit of `attacked`, for all eps together.
    """

    eps: _Floats
    certified: _Floats
    attacked: _Floats
    certified_limit: _Floats
    attacked_limit: _Floats


def _share_up_to(radii: ArrayLike, eps: _Floats) -> _Floats:
    ordered = np.sort(np.asarray(radii, dtype=np.float64))
    return np.asarray(np.searchsorted(ordered, eps, side="right") / len(ordered))


def _half_width(sets: Sets) -> float:
    """Half-width of the DKW band of a mean over sets."""
    return mean_over_sets([dkw(int(mask.sum()), _level(sets)) for mask in sets.values()])


def radius_curve(rows: Table, sets: Sets) -> RadiusCurve:
    """Share that survives eps, of one image set or as the mean over several.

    Args:
        rows: A certification.
        sets: The sets, as of `id_sets` or `ood_sets`.
    """
    certified, attack = rows["radius_certified"], rows["radius_attack"]
    seen = np.concatenate([np.concatenate([certified[mask], attack[mask]]) for mask in sets.values()])
    eps = np.unique(np.append(seen[np.isfinite(seen)], 0.0))
    proved = _mean([1 - _share_up_to(certified[mask], eps) for mask in sets.values()])
    unbroken = _mean([1 - _share_up_to(attack[mask], eps) for mask in sets.values()])
    band = _half_width(sets)
    return RadiusCurve(eps, proved, unbroken, np.maximum(proved - band, 0.0), np.minimum(unbroken + band, 1.0))


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
        certified_limit: Lower 95 % limit of `certified`, for all gamma together.
        attacked_limit: Upper 95 % limit of `attacked`, for all gamma together.
        auroc: Clean AUROC, mean over sets.
    """

    eps: float
    gamma: _Floats
    fpr: _Floats
    tpr: _Floats
    certified: _Floats
    attacked: _Floats
    certified_limit: _Floats
    attacked_limit: _Floats
    auroc: float


def middle_eps(rows: Table) -> float:
    """The middle of the grid, 0 left out."""
    positive = [value for value in rows.eps if value > 0] or list(rows.eps)
    return positive[(len(positive) - 1) // 2]


def robustness_curve(rows: Table, eps: float | None = None, sets: Sets | None = None) -> RobustnessCurve:
    """Sweep gamma at one eps of the grid.

    Args:
        rows: A certification.
        eps: A value of the grid; its middle by default.
        sets: OOD sets to take the mean of; by default all.

    Raises:
        InputError: If eps is not on the grid, or ID or OOD rows are missing.
    """
    sets = ood_sets(rows) if sets is None else sets
    eps = middle_eps(rows) if eps is None else eps
    if eps not in rows.eps:
        raise InputError(f"eps {eps:g} is not on the grid of the rows; use one of {', '.join(map(repr, rows.eps))}")
    column = rows.eps.index(eps)
    inside = rows.of_kind("id")
    score = rows["score"][inside]
    upper = rows.grid["s_ub"][inside, column]
    witness = rows.grid["s_attack_max"][inside, column]
    clean = [rows["score"][mask] for mask in sets.values()]
    values = np.concatenate([score, *clean, upper[np.isfinite(upper)], witness])
    gamma = np.unique(np.concatenate([values, np.nextafter(values, np.inf)]))
    certified = np.searchsorted(np.sort(upper[np.isfinite(upper)]), gamma, side="left") / len(score)
    attacked = _share_up_to(witness, gamma)
    band = dkw(len(score))
    return RobustnessCurve(
        eps=eps,
        gamma=gamma,
        fpr=_mean([_share_up_to(scores, gamma) for scores in clean]),
        tpr=_share_up_to(score, gamma),
        certified=certified,
        attacked=attacked,
        certified_limit=np.maximum(certified - band, 0.0),
        attacked_limit=np.minimum(attacked + band, 1.0),
        auroc=mean_over_sets([auroc(score, scores) for scores in clean]),
    )


@dataclass(frozen=True, eq=False)
class SmoothedCurve:
    """What is certified of the smoothed detector as eps grows; `certified_limit` is its 95 % limit over samples."""

    eps: _Floats
    certified: _Floats
    certified_limit: _Floats


def smoothed_radius_curve(rows: Table, sets: Sets) -> SmoothedCurve:
    """Share of samples whose right decision is certified against every perturbation shorter than eps.

    At the smoothed gamma. Abstentions and wrong decisions are certified at no eps. Each row errs with probability at
    most alpha. The curve falls at each radius, and each value holds up to the next eps.
    """
    radii = {name: rows["radius_smoothed"][mask] for name, mask in sets.items()}
    eps = np.unique(np.append(np.concatenate(list(radii.values())), 0.0))
    certified = _mean([1 - _share_up_to(values, eps) for values in radii.values()])
    return SmoothedCurve(eps, certified, np.maximum(certified - _half_width(sets), 0.0))


def smoothed_fpr_curve(rows: Table, sets: Sets | None = None) -> SmoothedCurve:
    """FPR at 95 % TPR of the smoothed detector as OOD moves: 1 - mean[s_lb_smoothed > gamma'], mean over OOD sets.

    gamma' accepts 95 % of the clean ID medians (estimates). The bounds of a row hold all together, whatever gamma', so
    it may be chosen after the draws.

    Args:
        rows: A result of smoothing.
        sets: OOD sets to take the mean of; by default all.

    Returns:
        eps, from 0, and the certified FPR; at 0 it is the clean FPR of the estimated medians.

    Raises:
        InputError: If there are no ID or no OOD rows, or an ID median is NaN.
    """
    sets = ood_sets(rows) if sets is None else sets
    gamma = threshold_at_tpr(rows["median_estimate"][rows.of_kind("id")], TPR_PERCENT)
    rates, limits = [], []
    for mask in sets.values():
        proved = _with_clean(rows, "s_lb_smoothed", mask, "median_estimate") > gamma
        rates.append((~proved).mean(0))
        limits.append(clopper_pearson((~proved).sum(0), len(proved), _level(sets))[1])
    return SmoothedCurve(grid_with_zero(rows), _mean(rates), _mean(limits))


def largest_smoothed_radius(n: int, sigma: float, level: float) -> float:
    r"""The radius at which n draws end, whatever the network: sigma Phi^{-1}(level^(1/n)), all draws on one side.

    Args:
        n: Draws of each sample.
        sigma: Standard deviation of the noise, the unit of the radius.
        level: Of one side: alpha / 2 for a radius, alpha / (2 J) for bounds on a grid of J eps.

    Example:
        >>> round(largest_smoothed_radius(1000, 1.0, 0.001), 2)
        2.46
    """
    return max(0.0, sigma * statistics.NormalDist().inv_cdf(level ** (1 / n)))


@dataclass(frozen=True, eq=False)
class SlopeCurve:
    """Medians over samples of the local Lipschitz constant of S against eps, with exact 95 % limits of the outer two.

    Attributes:
        eps: Radii, shape (J,).
        bound: Proved from above; infinite where nothing was.
        ascended: Found by search, an estimate from below.
        gradient_norm: At x, an estimate from below.
        bound_limit: Upper 95 % limit of the median of `bound`.
        ascended_limit: Lower 95 % limit of the median of `ascended`.
    """

    eps: _Floats
    bound: _Floats
    ascended: _Floats
    gradient_norm: _Floats
    bound_limit: _Floats
    ascended_limit: _Floats


def slope_curve(rows: Table, mask: NDArray[np.bool_]) -> SlopeCurve:
    """Medians at each eps over some samples of a Lipschitz analysis."""
    eps = np.unique(rows["eps"][mask])
    chosen = [mask & (rows["eps"] == value) for value in eps]

    def medians(name: str) -> _Floats:
        return np.array([np.median(rows[name][one]) for one in chosen])

    ends = [
        (median_interval(rows["ascended_estimate"][one])[0], median_interval(rows["bound"][one])[1]) for one in chosen
    ]
    lowest, highest = np.array(ends).T
    bound, ascended, gradient = map(medians, ("bound", "ascended_estimate", "gradient_norm_estimate"))
    return SlopeCurve(eps, bound, ascended, gradient, highest, lowest)


Curve = FprCurve | RadiusCurve | RobustnessCurve | SmoothedCurve | SlopeCurve
