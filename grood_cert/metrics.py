r"""Detection metrics, exact: integer counts, whole tie groups, float64.

Scores follow S: low = ID, high = OOD. Two conventions of "FPR at 95 % TPR" are in use and differ, often by a factor
of two on the same scores, so each has its own name here:

* `fpr95_id`: ID is the positive class. Share of OOD *accepted* at the first threshold that accepts at least 95 % of
  ID. The convention of the GROOD paper, and of every curve of this toolkit.
* `fpr95_ood`: OOD is the positive class. Share of ID *rejected* at the first threshold that rejects at least 95 % of
  OOD. The convention that OpenOOD and pytorch-ood print.

`Ranking` sorts two sets of scores once and gives all metrics of them. What other toolkits make of the same scores stands
in `grood_cert.conventions`, worst cases over whole balls in `grood_cert.guarantees`.

References:
    Hendrycks & Gimpel, ICLR 2017 (AUROC, FPR95, AUPR-in and -out); Liang et al. (ODIN), ICLR 2018 (detection error);
    Dhamija et al., NeurIPS 2018 (open-set classification rate); Vovk et al., 2005 (conformal quantile).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grood_cert.errors import InputError, said

TPR_PERCENT = 95  # the level of every threshold here and in the whole package
Class = Literal["id", "ood"]
Rule = Literal["average", "trapezoid", "pessimistic"]
_Counts = NDArray[np.int64]


def checked(scores: ArrayLike, name: str = "scores") -> NDArray[np.float64]:
    """One-dimensional float64 scores.

    Raises:
        InputError: If there are none, or one of them is NaN or no number.
    """
    try:
        values = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: expected a list of numbers ({said(error)})") from None
    if values.ndim != 1 or values.size == 0:
        raise InputError(f"{name}: expected a non-empty list of numbers, got shape {values.shape}")
    if bool(np.isnan(values).any()):
        raise InputError(
            f"{name}: {int(np.isnan(values).sum())} of {values.size} are NaN; a metric of NaN means nothing"
        )
    return values


def _samples_needed(percent: float, samples: int) -> int:
    """The smallest k with 100 k >= percent * samples, `percent` taken as the decimal number that it is written as."""
    try:
        share = Fraction(str(percent)) / 100
    except ValueError:
        share = Fraction(0)
    if not Fraction(1, 100) <= share <= 1:
        raise InputError(f"percent: expected a number from 1 to 100, got {percent!r}")
    return int(-(-share * samples // 1))


def _before(counts: _Counts) -> _Counts:
    """Cumulative counts one threshold earlier, 0 before the first."""
    return np.concatenate([[0], counts[:-1]])


@dataclass(frozen=True, eq=False)
class Ranking:
    """Two sets of scores, sorted once: how many of each lie at or below each score that occurs.

    Attributes:
        thresholds: The distinct scores, ascending, shape (K,).
        accepted_id: ID samples with S <= threshold, shape (K,).
        accepted_ood: OOD samples with S <= threshold, shape (K,).
    """

    thresholds: NDArray[np.float64]
    accepted_id: _Counts
    accepted_ood: _Counts

    @classmethod
    def of(cls, score_id: ArrayLike, score_ood: ArrayLike) -> Ranking:
        """Rank two sets of scores.

        Raises:
            InputError: On empty or NaN scores.

        Example:
            >>> Ranking.of([0.0, 1.0, 1.0], [1.0, 2.0]).accepted_id.tolist()
            [1, 3, 3]
        """
        inside, outside = np.sort(checked(score_id, "ID scores")), np.sort(checked(score_ood, "OOD scores"))
        merged = np.sort(np.concatenate([inside, outside]), kind="stable")  # a merge, for both are sorted
        thresholds = merged[np.concatenate([merged[1:] != merged[:-1], [True]])]
        return cls(
            thresholds,
            np.searchsorted(inside, thresholds, "right"),
            np.searchsorted(outside, thresholds, "right"),
        )

    @property
    def samples_id(self) -> int:
        """ID samples in all."""
        return int(self.accepted_id[-1])

    @property
    def samples_ood(self) -> int:
        """OOD samples in all."""
        return int(self.accepted_ood[-1])

    @property
    def auroc(self) -> float:
        """P(S_id < S_ood) + P(S_id = S_ood) / 2 over all pairs."""
        below, ties = self._pairs()
        return (2 * below + ties) / (2 * self.samples_id * self.samples_ood)

    @property
    def auroc_strict(self) -> float:
        """P(S_id < S_ood) over all pairs: a tie is an error."""
        return self._pairs()[0] / (self.samples_id * self.samples_ood)

    def _pairs(self) -> tuple[int, int]:
        """Pairs with S_id < S_ood, and pairs with S_id = S_ood."""
        below = _before(self.accepted_id)
        new_id, new_ood = self.accepted_id - below, self.accepted_ood - _before(self.accepted_ood)
        return int((new_ood * below).sum()), int((new_ood * new_id).sum())

    def detected(self, positive: Class) -> tuple[_Counts, _Counts]:
        """True and false positives at each threshold, from the most positive score on, each of shape (K,).

        Args:
            positive: "id": positives have S <= threshold; "ood": S >= threshold.
        """
        if positive == "id":
            return self.accepted_id, self.accepted_ood
        if positive != "ood":
            raise InputError(f"unknown class {positive!r}; the positive one is id or ood")
        rejected_id = self.samples_id - _before(self.accepted_id)
        rejected_ood = self.samples_ood - _before(self.accepted_ood)
        return rejected_ood[::-1], rejected_id[::-1]

    def fpr(self, percent: float = TPR_PERCENT, positive: Class = "id") -> float:
        """Share of the other class among the positives, at the first threshold that finds `percent` % of the class.

        Args:
            percent: TPR in percent, 1 to 100; counted in integers.
            positive: "id" gives `fpr95_id`, "ood" gives `fpr95_ood`.

        Raises:
            InputError: On another level or class.
        """
        true, false = self.detected(positive)
        return float(false[np.searchsorted(true, _samples_needed(percent, int(true[-1])))] / false[-1])

    def aupr(self, positive: Class, rule: Rule = "average") -> float:
        r"""Area under precision against recall.

        With T_k and F_k the true and false positives at threshold k, P_k = T_k / (T_k + F_k) and n = T_K:

            average       sum_k (T_k - T_{k-1}) / n * P_k                       (scikit-learn's average precision)
            trapezoid     sum_k (T_k - T_{k-1}) / n * (P_k + P_{k-1}) / 2       with P_0 = 1
            pessimistic   sum_{j = 1..n} 1 / n * j / (j + F(j))     F(j) the false positives found no later than the
                          j-th positive, ties before it: without ties the average, with ties at most that

        Only the last never rises when a positive loses score or a negative gains some; the first two can.

        Args:
            positive: "id" or "ood".
            rule: One of the three.

        Raises:
            InputError: On another class or rule.

        Example:
            >>> ranking = Ranking.of([0.0, 1.0], [1.0, 2.0])
            >>> [round(ranking.aupr("id", rule), 4) for rule in ("average", "trapezoid", "pessimistic")]
            [0.8333, 0.9167, 0.8333]
        """
        true, false = self.detected(positive)
        found = true - _before(true)
        if rule == "pessimistic":
            rank = np.arange(1, true[-1] + 1)
            return float(np.mean(rank / (rank + np.repeat(false, found))))
        precision = true / (true + false)
        if rule == "trapezoid":
            precision = (precision + np.concatenate([[1.0], precision[:-1]])) / 2
        elif rule != "average":
            raise InputError(f"unknown rule {rule!r}; use one of {', '.join(get_args(Rule))}")
        return float(np.sum(found * precision) / true[-1])

    @property
    def detection_error(self) -> float:
        """Smallest mean of the share of ID rejected and the share of OOD accepted, over all thresholds; at most 1/2."""
        both = self.samples_id * self.samples_ood
        wrong = (self.samples_id - self.accepted_id) * self.samples_ood + self.accepted_ood * self.samples_id
        return min(int(wrong.min()), both) / (2 * both)


def auroc(score_id: ArrayLike, score_ood: ArrayLike) -> float:
    r"""P(S_id < S_ood) + P(S_id = S_ood) / 2 over all pairs.

    Raises:
        InputError: On empty or NaN scores.

    Example:
        >>> auroc([0.0, 1.0], [1.0, 2.0])
        0.875
    """
    return Ranking.of(score_id, score_ood).auroc


def threshold_at_tpr(score_id: ArrayLike, percent: float = TPR_PERCENT) -> float:
    r"""Smallest score t such that at least `percent` % of the scores are <= t, counted in integers.

    Args:
        score_id: Scores of the positive class.
        percent: Level in percent, 1 to 100.

    Raises:
        InputError: On empty or NaN scores, or another level.

    Example:
        >>> threshold_at_tpr(range(1, 101)), threshold_at_tpr(range(1, 1001), 99.9)
        (95.0, 999.0)
    """
    ordered = np.sort(checked(score_id, "ID scores"))
    return float(ordered[_samples_needed(percent, len(ordered)) - 1])


def fpr95_id(score_id: ArrayLike, score_ood: ArrayLike) -> float:
    """Share of OOD accepted when at least 95 % of ID is accepted.

    Raises:
        InputError: On empty or NaN scores.

    Example:
        >>> fpr95_id([0.0] * 92 + [9.0] * 8, [0.0] * 50 + [9.0] * 50)  # 95 % are reached only with the ties at 9
        1.0
    """
    return Ranking.of(score_id, score_ood).fpr(TPR_PERCENT, "id")


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
    return Ranking.of(score_id, score_ood).fpr(TPR_PERCENT, "ood")


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Share of ID samples whose predicted class is their label.

    Raises:
        InputError: If there are none, or the two lists do not pair up.

    Example:
        >>> accuracy([0, 1, 2, 3], [0, 1, 2, 0])
        0.75
    """
    return float(_correct(labels, predictions).mean())


def oscr(score_id: ArrayLike, score_ood: ArrayLike, labels: ArrayLike, predictions: ArrayLike) -> float:
    """Area under the share of ID accepted *and* classified right, against the share of OOD accepted.

    That is P(right and S_id < S_ood) + P(right and S_id = S_ood) / 2 over all pairs, at most the accuracy.

    Raises:
        InputError: On empty or NaN scores, or if labels, predictions and ID scores do not pair up.

    Example:
        >>> oscr([0.0, 1.0], [2.0, 3.0], labels=[0, 1], predictions=[0, 0])
        0.5
    """
    inside, correct = checked(score_id, "ID scores"), _correct(labels, predictions)
    if len(inside) != len(correct):
        raise InputError(f"{len(correct)} labels for {len(inside)} ID scores; give one for each")
    if not correct.any():
        checked(score_ood, "OOD scores")
        return 0.0
    return Ranking.of(inside[correct], score_ood).auroc * int(correct.sum()) / len(correct)


def _correct(labels: ArrayLike, predictions: ArrayLike) -> NDArray[np.bool_]:
    given, predicted = np.asarray(labels), np.asarray(predictions)
    if given.ndim != 1 or given.shape != predicted.shape or not given.size:
        raise InputError(
            f"labels {given.shape} and predictions {predicted.shape}: expected two lists of the same length"
        )
    return np.asarray(given == predicted)


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
