from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from grood_cert import metrics
from grood_cert.errors import InputError

# few distinct values, so that ties within and between the two sets are the rule
SCORES = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 7.0]), min_size=1, max_size=60)
NAN = [0.0, float("nan")]


def share(flags: list[bool]) -> Fraction:
    return Fraction(sum(flags), len(flags))


def brute_force_fpr95_id(inside: list[float], outside: list[float]) -> float:
    """Over all thresholds t (accept S <= t): the smallest FPR with a TPR of at least 95 %."""
    thresholds = sorted({*inside, *outside})
    allowed = [t for t in thresholds if share([s <= t for s in inside]) >= Fraction(95, 100)]
    return float(min(share([s <= t for s in outside]) for t in allowed))


def brute_force_fpr95_ood(inside: list[float], outside: list[float]) -> float:
    """Over all thresholds t (flag S >= t as OOD): the smallest share of ID flagged, with 95 % of OOD flagged."""
    thresholds = sorted({*inside, *outside})
    allowed = [t for t in thresholds if share([s >= t for s in outside]) >= Fraction(95, 100)]
    return float(min(share([s >= t for s in inside]) for t in allowed))


def pytorch_ood_fpr95(inside: list[float], outside: list[float]) -> float:
    """The rule of OpenOOD and pytorch-ood: OOD = 1, first point of the ROC with TPR >= 0.95 (every point kept)."""
    labels = [0] * len(inside) + [1] * len(outside)
    fpr, tpr, _ = roc_curve(labels, inside + outside, drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= 0.95)])


@settings(max_examples=200, deadline=None)
@given(SCORES, SCORES)
def test_metrics_against_brute_force_and_scikit_learn(inside, outside):
    labels = [0] * len(inside) + [1] * len(outside)
    pairs = [Fraction(1 if a < b else 0) + Fraction(a == b, 2) for a, b in itertools.product(inside, outside)]
    assert metrics.auroc(inside, outside) == pytest.approx(float(sum(pairs) / len(pairs)), abs=1e-15)
    assert metrics.auroc(inside, outside) == pytest.approx(roc_auc_score(labels, inside + outside), abs=1e-12)
    assert metrics.fpr95_id(inside, outside) == brute_force_fpr95_id(inside, outside)
    assert metrics.fpr95_ood(inside, outside) == brute_force_fpr95_ood(inside, outside)
    assert metrics.fpr95_ood(inside, outside) == pytorch_ood_fpr95(inside, outside)


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 39, 40, 41, 100, 217, 10_000])
def test_thresholds_count_in_integers(count):
    """Distinct scores 1 ... n: the first t that accepts 95 % of them is the smallest integer t with 100 t >= 95 n."""
    scores = np.random.default_rng(count).permutation(np.arange(1, count + 1))
    expected = next(t for t in range(1, count + 1) if 100 * t >= 95 * count)
    assert metrics.threshold_at_tpr(scores) == expected
    outside = np.arange(0.5, count + 1)
    assert metrics.fpr95_id(scores, outside) == expected / len(outside)


def test_a_tie_group_moves_as_a_whole():
    """The case where the authors' script stops at TPR 0.92 and reports 0.5: 95 % are reached only with the ties."""
    inside, outside = [0.0] * 92 + [9.0] * 8, [0.0] * 50 + [9.0] * 50
    assert metrics.fpr95_id(inside, outside) == 1.0
    assert metrics.fpr95_id([0.0] * 95 + [9.0] * 5, outside) == 0.5


def test_the_two_conventions_differ():
    """A tenth of ID scores high, the rest of ID and all OOD well apart: one convention sees it, the other does not."""
    inside, outside = [0.0] * 90 + [9.0] * 10, [5.0] * 100
    assert metrics.fpr95_id(inside, outside) == 1.0
    assert metrics.fpr95_ood(inside, outside) == 0.1


def test_extremes():
    assert metrics.auroc([0.0], [1.0]) == 1.0
    assert metrics.auroc([1.0], [0.0]) == 0.0
    assert metrics.auroc([3.0] * 5, [3.0] * 7) == 0.5
    assert metrics.fpr95_id([-np.inf, 0.0], [np.inf]) == 0.0
    assert metrics.auroc([-np.inf], [np.inf]) == 1.0


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.fpr95_id, metrics.fpr95_ood])
@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        (NAN, [1.0], "ID scores: 1 of 2 are NaN"),
        ([1.0], NAN, "OOD scores: 1 of 2 are NaN"),
        ([float("nan")] * 3, [1.0], "3 of 3 are NaN"),
        ([], [1.0], "ID scores: expected a non-empty list"),
        ([1.0], [], "OOD scores: expected a non-empty list"),
        ([[1.0]], [1.0], "expected a non-empty list of numbers, got shape"),
    ],
)
def test_nan_and_nothing_are_refused(metric, inside, outside, message):
    with pytest.raises(InputError) as caught:
        metric(inside, outside)
    assert message in str(caught.value)


def test_scores_keep_their_float64_digits():
    """Two scores that are equal in float32 are different scores."""
    assert metrics.auroc([1.0], [1.0 + 1e-12]) == 1.0


@pytest.mark.parametrize("function", [metrics.threshold_at_tpr, metrics.calibrated_threshold])
@pytest.mark.parametrize("percent", [0, -5, 101, 95.5, 0.95])
def test_levels_are_whole_percents(function, percent):
    with pytest.raises(InputError, match="percent: expected a whole number from 1 to"):
        function(range(1000), percent)


@pytest.mark.parametrize("count", [19, 20, 39, 99, 100, 217])
def test_calibrated_threshold_is_the_conformal_rank(count):
    """Rank ceil(0.95 (n + 1)), in exact arithmetic."""
    scores = np.random.default_rng(count).permutation(np.arange(1, count + 1))
    rank = -((-Fraction(95, 100) * (count + 1)) // 1)
    assert metrics.calibrated_threshold(scores) == rank


@pytest.mark.parametrize(("count", "percent", "need"), [(18, 95, 19), (1, 95, 19), (98, 99, 99), (1, 67, 3)])
def test_too_few_scores_to_calibrate(count, percent, need):
    with pytest.raises(InputError, match=f"{count} calibration scores cannot .* at least {need}$"):
        metrics.calibrated_threshold(range(count), percent)
    metrics.calibrated_threshold(range(need), percent)


@pytest.mark.parametrize("count", [19, 50, 217])
def test_calibrated_threshold_covers_a_fresh_sample(count):
    """P(S_new <= gamma) = ceil(0.95 (n + 1)) / (n + 1) for continuous scores, by simulation (6 standard errors)."""
    rng = np.random.default_rng(0)
    trials = 20_000
    draws = rng.standard_normal((trials, count))
    gammas = np.array([metrics.calibrated_threshold(row) for row in draws])
    covered = float(np.mean(rng.standard_normal(trials) <= gammas))
    expected = -(-95 * (count + 1) // 100) / (count + 1)
    assert expected >= 0.95
    assert abs(covered - expected) < 6 * np.sqrt(0.05 * 0.95 / trials)


def test_mean_over_sets():
    assert metrics.mean_over_sets([0.2, 0.4]) == pytest.approx(0.3)
    with pytest.raises(InputError):
        metrics.mean_over_sets([])
