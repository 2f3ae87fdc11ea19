r"""Detection metrics as seven toolkits compute them: on the same scores, each gives what the toolkit itself prints.

They differ in the positive class, in what a tie is, in the threshold that "95 % TPR" means and in how areas are
interpolated; `docs/metrics.md` has the table. Figures are fractions under the names that each toolkit prints (most print
percent). They agree with it to the rounding of float64 sums; those of counts are equal.

Sources, read at these commits; none of their code is used:
    OpenOOD 3c35632, `openood/evaluators/metrics.py`; pytorch-ood 0.4, `pytorch_ood/metrics/functional.py`;
    energy_ood (Liu et al., NeurIPS 2020) c7b9ee9, `utils/display_results.py`; GReg (o4lc/Greg-OOD) 0c35ddb, `detect.py`;
    DOS (ICLR 2024) 47ba80f, `utils/metrics.py`; ProoD (Meinke et al., NeurIPS 2022) 3e21a75,
    `utils/traintest/evaluation.py`; scikit-learn 1.9, on which all but pytorch-ood rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grood_cert import metrics
from grood_cert.confidence import bootstrap, clopper_pearson
from grood_cert.errors import InputError
from grood_cert.metrics import TPR_PERCENT, Class, Ranking

Convention = Literal["grood", "openood", "pytorch-ood", "energy_ood", "greg", "dos", "prood"]
CONVENTIONS: tuple[str, ...] = get_args(Convention)
_TPR = 0.95  # of all toolkits, as a binary fraction: some compare with its rounded value
_Floats = NDArray[np.floating]


def evaluate(
    score_id: ArrayLike,
    score_ood: ArrayLike,
    convention: Convention = "grood",
    *,
    labels: ArrayLike | None = None,
    predictions: ArrayLike | None = None,
    tpr: float = TPR_PERCENT,
    high: Class = "ood",
    intervals: bool = False,
) -> dict[str, float]:
    r"""Detection metrics of ID scores against OOD scores.

    Args:
        score_id: Scores of ID samples.
        score_ood: Scores of OOD samples.
        convention: Whose figures: "grood" is this package (`auroc`, `aupr_in` and `aupr_out`, the average precision
            with ID or OOD positive, `aupr_in_trapezoid` and `aupr_out_trapezoid`, `fpr95_id`, `fpr95_ood`,
            `detection_error`), the others are toolkits, under the names that they print.
        labels: Classes of the ID samples; with `predictions`, the accuracy is added where the toolkit prints it, and
            the open-set classification rate (`oscr`) for "grood".
        predictions: Classes that were predicted for the ID samples.
        tpr: TPR in percent of `fpr95_id` and `fpr95_ood`, for "grood" alone; they are then named after it.
        high: Which class has high scores: "ood", as S of this package, or "id" for a confidence.
        intervals: Whether to add 95 % intervals, for "grood" alone: `NAME_low` and `NAME_high`, of shares exact
            (Clopper-Pearson; of an FPR at the threshold as it is), of the others a bootstrap with 1000 resamples.

    Raises:
        InputError: On empty or NaN scores, infinite ones where the toolkit refuses them, labels that do not fit, or an
            unknown or superfluous setting.

    Example:
        >>> evaluate([0.0, 1.0], [1.0, 2.0])["auroc"]
        0.875
        >>> evaluate([0.0] * 92 + [9.0] * 8, [0.0] * 50 + [9.0] * 50, "greg")["FPR"]  # 92 % are near enough to 95 %
        0.5
    """
    if convention not in CONVENTIONS:
        raise InputError(f"unknown convention {convention!r}; use one of {', '.join(CONVENTIONS)}")
    if high not in get_args(Class):
        raise InputError(f"high: the class with high scores is id or ood, not {high!r}")
    if (labels is None) != (predictions is None):
        raise InputError("labels and predictions go together; give both or neither")
    if convention != "grood" and (tpr != TPR_PERCENT or intervals):
        raise InputError(
            f"another TPR and intervals are for the convention grood; {convention} prints FPR at 95 % alone"
        )
    inside, outside = _oriented(score_id, high, "ID scores"), _oriented(score_ood, high, "OOD scores")
    if convention == "grood":
        return _grood(inside, outside, labels, predictions, tpr, intervals)
    if convention != "pytorch-ood" and not (np.isfinite(inside).all() and np.isfinite(outside).all()):
        raise InputError(f"infinite scores: {convention} refuses them (scikit-learn does), so it prints no figure")
    figures = _TOOLKITS[convention](Ranking.of(inside, outside), inside, outside)
    name = _ACCURACY.get(convention)
    if name and labels is not None and predictions is not None:
        figures[name] = _accuracy(inside, labels, predictions)
    return figures


def _oriented(scores: ArrayLike, high: Class, name: str) -> _Floats:
    """Scores, low = ID, in the floating-point type that they came in."""
    given = np.asarray(scores)
    values = metrics.checked(given, name)
    kept: _Floats = given if np.issubdtype(given.dtype, np.floating) else values
    return kept if high == "ood" else -kept


def _accuracy(inside: _Floats, labels: ArrayLike, predictions: ArrayLike) -> float:
    if np.shape(labels) != inside.shape:
        raise InputError(f"{np.size(labels)} labels for {len(inside)} ID scores; give one for each")
    return metrics.accuracy(labels, predictions)


def _grood(
    inside: _Floats,
    outside: _Floats,
    labels: ArrayLike | None,
    predictions: ArrayLike | None,
    tpr: float,
    intervals: bool,
) -> dict[str, float]:
    ranking = Ranking.of(inside, outside)
    found = _areas(ranking)
    shares = {
        f"fpr{tpr:g}_id": (ranking.fpr(tpr, "id"), len(outside)),
        f"fpr{tpr:g}_ood": (ranking.fpr(tpr, "ood"), len(inside)),
    }
    if labels is not None and predictions is not None:
        shares["accuracy"] = _accuracy(inside, labels, predictions), len(inside)
        found["oscr"] = metrics.oscr(inside, outside, labels, predictions)
    figures = found | {name: share for name, (share, _) in shares.items()}
    if not intervals:
        return figures
    correct = np.zeros(len(inside)) if labels is None else np.asarray(labels) == np.asarray(predictions)

    def areas(drawn_id: NDArray[np.float64], drawn_ood: NDArray[np.float64]) -> Mapping[str, float]:
        scores, right = drawn_id.T
        drawn = _areas(Ranking.of(scores, drawn_ood))
        return (
            drawn if labels is None else drawn | {"oscr": metrics.oscr(scores, drawn_ood, right, np.ones(len(right)))}
        )

    spread = bootstrap(areas, np.stack([inside, correct], axis=1), np.asarray(outside, np.float64))
    spread |= {name: clopper_pearson(round(share * n), n) for name, (share, n) in shares.items()}
    ends = {
        f"{name}_{end}": float(value)
        for name in figures
        for end, value in zip(("low", "high"), spread[name], strict=True)
    }
    return figures | ends


def _areas(ranking: Ranking) -> dict[str, float]:
    return {
        "auroc": ranking.auroc,
        "aupr_in": ranking.aupr("id"),
        "aupr_out": ranking.aupr("ood"),
        "aupr_in_trapezoid": ranking.aupr("id", "trapezoid"),
        "aupr_out_trapezoid": ranking.aupr("ood", "trapezoid"),
        "detection_error": ranking.detection_error,
    }


def _openood(ranking: Ranking, inside: _Floats, outside: _Floats) -> dict[str, float]:
    """OOD positive; the first point of scikit-learn's ROC with TPR >= 0.95, of the points that `roc_curve` keeps.

    `roc_curve` leaves out a point where the steps to it and from it are the same. Without ties that changes nothing;
    with ties of both classes the first point that is left can lie beyond.
    """
    true, false = ranking.detected("ood")
    kept = np.ones(len(true), bool)
    kept[1:-1] = (np.diff(true, 2) != 0) | (np.diff(false, 2) != 0)
    true, false = true[kept], false[kept]
    return {
        "FPR@95": float(false[np.argmax(true / true[-1] >= _TPR)] / false[-1]),
        "AUROC": ranking.auroc,
        "AUPR_IN": ranking.aupr("id", "trapezoid"),
        "AUPR_OUT": ranking.aupr("ood", "trapezoid"),
    }


def _pytorch_ood(ranking: Ranking, inside: _Floats, outside: _Floats) -> dict[str, float]:
    """OOD positive, whole tie groups; AUTC is the mean area under FPR and FNR on scores scaled to [0, 1]."""
    low, high = ranking.thresholds[[0, -1]]
    autc = np.nan
    if np.isfinite([low, high]).all() and low < high:
        scaled_id, scaled_ood = ((np.asarray(scores, np.float64) - low) / (high - low) for scores in (inside, outside))
        autc = float((scaled_id.mean() + (1 - scaled_ood).mean()) / 2)
    return {
        "AUROC": ranking.auroc,
        "AUTC": autc,
        "AUPR-IN": ranking.aupr("id", "trapezoid"),
        "AUPR-OUT": ranking.aupr("ood", "trapezoid"),
        "FPR95TPR": ranking.fpr(95, "ood"),
    }


def _energy_ood(ranking: Ranking, inside: _Floats, outside: _Floats) -> dict[str, float]:
    """ID positive; the threshold whose recall is nearest to 0.95, above or below, looked for from full recall down."""
    true, false = ranking.detected("id")
    recall = true / true[-1]
    full = int(np.searchsorted(true, true[-1]))
    nearest = full - int(np.argmin(np.abs(recall[full::-1] - _TPR)))
    return {"FPR": float(false[nearest] / false[-1]), "AUROC": ranking.auroc, "AUPR": ranking.aupr("id")}


def _dos(ranking: Ranking, inside: _Floats, outside: _Floats) -> dict[str, float]:
    """ID positive; OOD strictly beyond the floor(0.95 n)-th ID score counts, so ties are not false positives."""
    rank = int(np.floor(_TPR * len(inside)))
    threshold = np.sort(inside)[rank - 1]  # of one sample, rank 0, the last
    return {
        "FPR": float(np.mean(outside < threshold)),
        "AUROC": ranking.auroc,
        "AUPR": ranking.aupr("id", "trapezoid"),
    }


def _prood(ranking: Ranking, inside: _Floats, outside: _Floats) -> dict[str, float]:
    """ID positive; ties are errors in AUC; the threshold lies between ID scores (numpy's linear quantile)."""
    threshold = np.quantile(-inside, 1 - _TPR)
    return {
        "AUC": ranking.auroc_strict,
        "AUPR": ranking.aupr("id"),
        "FPR@95": float(np.mean(-outside >= threshold)),
    }


_TOOLKITS: dict[str, Callable[[Ranking, _Floats, _Floats], dict[str, float]]] = {
    "openood": _openood,
    "pytorch-ood": _pytorch_ood,
    "energy_ood": _energy_ood,
    "greg": _energy_ood,  # the same function in both repositories, on -S = logsumexp f
    "dos": _dos,
    "prood": _prood,
}
_ACCURACY = {"openood": "ACC", "pytorch-ood": "ACC", "prood": "acc"}  # the name under which a toolkit prints it
