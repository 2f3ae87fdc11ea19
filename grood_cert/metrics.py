r"""Detection metrics, exact: integer counts, whole tie groups, float64.

Scores follow S: low = ID, high = OOD. Two conventions of "FPR at 95 % TPR" are in use and differ, often by a factor
of two on the same scores, so each has its own name here:

* `fpr95_id`: ID is the positive class. Share of OOD *accepted* at the first threshold that accepts at least 95 % of
  ID. The convention of the GROOD paper, and of every curve of this toolkit.
* `fpr95_ood`: OOD is the positive class. Share of ID *rejected* at the first threshold that rejects at least 95 % of
  OOD. The convention that OpenOOD and pytorch-ood print.

References:
    Hendrycks & Gimpel, ICLR 2017 (AUROC, FPR95); Vovk et al., 2005 (conformal quantile).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grood_cert.errors import InputError

TPR_PERCENT = 95  # the level of every threshold here and in the whole package


def checked(scores: ArrayLike, name: str = "scores") -> NDArray[np.float64]:
    """One-dimensional float64 scores.

    Raises:
        InputError: If there are none, or one of them is NaN.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise InputError(f"{name}: expected a non-empty list of numbers, got shape {values.shape}")
    if bool(np.isnan(values).any()):
        raise InputError(
            f"{name}: {int(np.isnan(values).sum())} of {values.size} are NaN; a metric of NaN means nothing"
        )
    return values


def auroc(score_id: ArrayLike, score_ood: ArrayLike) -> float:
    r"""P(S_id < S_ood) + P(S_id = S_ood) / 2 over all pairs.

    Raises:
        InputError: On empty or NaN scores.

    Example:
        >>> auroc([0.0, 1.0], [1.0, 2.0])
        0.875
    """
    inside, outside = np.sort(checked(score_id, "ID scores")), checked(score_ood, "OOD scores")
    below, up_to = np.searchsorted(inside, outside, "left").sum(), np.searchsorted(inside, outside, "right").sum()
    return float((below + up_to) / (2 * len(inside) * len(outside)))


def threshold_at_tpr(score_id: ArrayLike, percent: int = TPR_PERCENT) -> float:
    r"""Smallest score t such that at least `percent` % of the scores are <= t, counted in integers.

    Args:
        score_id: Scores of the positive class.
        percent: Level in whole percent, 1 to 100.

    Raises:
        InputError: On empty or NaN scores, or another level.

    Example:
        >>> threshold_at_tpr(range(1, 101))
        95.0
    """
    ordered = np.sort(checked(score_id, "ID scores"))
    if percent not in range(1, 101):
        raise InputError(f"percent: expected a whole number from 1 to 100, got {percent!r}")
    return float(ordered[-(-percent * len(ordered) // 100) - 1])


def fpr95_id(score_id: ArrayLike, score_ood: ArrayLike) -> float:
    """Share of OOD accepted when at least 95 % of ID is accepted.

    Raises:
        InputError: On empty or NaN scores.

    Example:
        >>> fpr95_id([0.0] * 92 + [9.0] * 8, [0.0] * 50 + [9.0] * 50)  # 95 % are reached only with the ties at 9
        1.0
    """
    return float(np.mean(checked(score_ood, "OOD scores") <= threshold_at_tpr(score_id)))


def fpr95_ood(score_id: ArrayLike, score_ood: ArrayLike) -> float:
    """Share of ID rejected when at least 95 % of OOD is rejected (the number OpenOOD and pytorch-ood print).

    Raises:
        InputError: On empty or NaN scores.

    Example:
        >>> fpr95_ood([0.0] * 92 + [9.0] * 8, [0.0] * 50 + [9.0] * 50)
        1.0
        >>> fpr95_ood([0.0] * 92 + [9.0] * 8, [9.0] * 100), fpr95_id([0.0] * 92 + [9.0] * 8, [9.0] * 100)
        (0.08, 1.0)
    """
    return fpr95_id(-checked(score_ood, "OOD scores"), -checked(score_id, "ID scores"))


def calibrated_threshold(score_id: ArrayLike, percent: int = TPR_PERCENT) -> float:
    r"""Threshold gamma: the ceil(percent (n + 1) / 100)-th smallest calibration score (split-conformal quantile).

    A fresh ID sample from the same distribution is then accepted with probability at least percent/100, over the
    draw of the calibration set as well.

    Args:
        score_id: Scores of ID samples that were not trained on.
        percent: Level in whole percent, 1 to 99.

    Raises:
        InputError: On NaN, if there are too few scores for the level (19 for 95 %), or on another level.

    Example:
        >>> calibrated_threshold(range(1, 20)), calibrated_threshold(range(1, 101))
        (19.0, 96.0)
    """
    ordered = np.sort(checked(score_id, "calibration scores"))
    if percent not in range(1, 100):
        raise InputError(f"percent: expected a whole number from 1 to 99, got {percent!r}")
    rank = -(-percent * (len(ordered) + 1) // 100)
    if rank > len(ordered):
        need = -(-percent // (100 - percent))
        raise InputError(f"{len(ordered)} calibration scores cannot hold a {percent} % quantile; use at least {need}")
    return float(ordered[rank - 1])


def mean_over_sets(values: Sequence[float]) -> float:
    """Unweighted mean over OOD sets, the field's convention for one number per detector.

    Raises:
        InputError: If there are no values, or one is NaN.
    """
    return float(np.mean(checked(values)))
