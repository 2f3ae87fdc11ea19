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


RULES = ("average", "trapezoid", "pessimistic")
COMMON = 27720  # the least common multiple of 1 ... 12: precisions of 12 samples are whole 27720ths


def precision(positive: list[int], negative: list[int], threshold: float) -> int:
    """Precision of S >= threshold in 27720ths; 1 if that is nothing."""
    true, false = sum(s >= threshold for s in positive), sum(s >= threshold for s in negative)
    return COMMON * true // (true + false) if true + false else COMMON


def area_of_precisions(positive: list[int], negative: list[int], rule: str) -> float:
    """Area under precision against recall, positive by positive; high scores are positive."""
    total = 0
    for rank, score in enumerate(sorted(positive, reverse=True), start=1):
        if rule == "pessimistic":
            total += 2 * COMMON * rank // (rank + sum(s >= score for s in negative))
        else:
            above = min((s for s in positive + negative if s > score), default=99)
            before = precision(positive, negative, above if rule == "trapezoid" else score)
            total += precision(positive, negative, score) + before
    return total / (2 * COMMON * len(positive))


def smallest_fpr(positive: list[int], negative: list[int], percent: float) -> float:
    """Over all thresholds (positive: S >= t) with that TPR: the smallest share of negatives."""
    needed = [t for t in positive if 1000 * sum(s >= t for s in positive) >= round(10 * percent) * len(positive)]
    return sum(s >= max(needed) for s in negative) / len(negative)


@pytest.mark.parametrize("ties", [True, False])
def test_all_metrics_agree_with_rational_arithmetic(ties):
    """5,000 cases each of 1 to 6 scores a side: whole numbers divided once; equal, or for sums equal to rounding."""
    rng = np.random.default_rng(int(ties))
    for trial in range(5000):
        count, other = rng.integers(1, 7, 2).tolist()
        drawn = rng.integers(0, 5, count + other) if ties else rng.permutation(count + other)
        inside, outside, right = drawn[:count].tolist(), drawn[count:].tolist(), rng.integers(0, 2, count).tolist()
        ranking = metrics.Ranking.of(inside, outside)
        pairs = [(a < b, a == b, r) for a, r in zip(inside, right, strict=True) for b in outside]
        assert ranking.auroc == sum(2 * less + tie for less, tie, _ in pairs) / (2 * len(pairs))
        assert ranking.auroc_strict == sum(less for less, _, _ in pairs) / len(pairs)
        percent, rule = (1, 50, 80, 95, 99.5, 100)[trial % 6], RULES[trial % 3]
        low_id, low_ood = [-s for s in inside], [-s for s in outside]
        assert ranking.fpr(percent, "id") == smallest_fpr(low_id, low_ood, percent)
        assert ranking.fpr(percent, "ood") == smallest_fpr(outside, inside, percent)
        assert abs(ranking.aupr("ood", rule) - area_of_precisions(outside, inside, rule)) < 1e-15
        assert abs(ranking.aupr("id", rule) - area_of_precisions(low_id, low_ood, rule)) < 1e-15
        errors = [sum(s > t for s in inside) * other + sum(s <= t for s in outside) * count for t in range(-1, 12)]
        assert ranking.detection_error == min(errors) / (2 * len(pairs))
        if trial % 5 == 0:
            expected = sum(right * (2 * less + tie) for less, tie, right in pairs) / (2 * len(pairs))
            assert abs(metrics.oscr(inside, outside, right, np.ones(count)) - expected) < 1e-15
            assert metrics.accuracy(right, np.ones(count)) == sum(right) / count


def test_only_the_pessimistic_rule_is_monotone():
    """A positive that loses score can raise scikit-learn's average precision out of a tie; the pessimistic rule falls."""
    negatives, lost, before = [10.0] * 100, [5.0] * 50, [10.0] + [5.0] * 49
    for rule, rises in (("average", True), ("pessimistic", False)):
        areas = [metrics.Ranking.of(negatives, positives).aupr("ood", rule) for positives in (before, lost)]
        assert (areas[1] > areas[0]) == rises
    rng = np.random.default_rng(5)
    for _ in range(300):
        inside, outside = rng.integers(0, 4, 8), rng.integers(0, 4, 8)
        worse_id, worse_ood = inside + rng.integers(0, 2, 8), outside - rng.integers(0, 2, 8)
        for positive in ("id", "ood"):
            found = metrics.Ranking.of(inside, outside).aupr(positive, "pessimistic")
            assert metrics.Ranking.of(worse_id, worse_ood).aupr(positive, "pessimistic") <= found


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
        (["x"], [1.0], "ID scores: expected a list of numbers"),
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


@pytest.mark.parametrize("percent", [0, -5, 101, 95.5, 0.95])
def test_levels_of_calibration_are_whole_percents(percent):
    with pytest.raises(InputError, match="percent: expected a whole number from 1 to"):
        metrics.calibrated_threshold(range(1000), percent)


@pytest.mark.parametrize("percent", [0, -5, 100.1, 0.95, float("nan"), float("inf"), "x", True])
def test_levels_that_cannot_be_are_refused(percent):
    with pytest.raises(InputError, match="percent: expected a number from 1 to 100"):
        metrics.threshold_at_tpr(range(1000), percent)
    with pytest.raises(InputError, match="percent: expected a number from 1 to 100"):
        metrics.Ranking.of([0.0], [1.0]).fpr(percent)


@pytest.mark.parametrize("percent", [99.9, np.float64(99.9), 99.5, np.int64(7), 100])
def test_levels_are_the_decimal_numbers_that_they_are_written_as(percent):
    """0.999 * 1000 is 999 and not the next float above it, which would ask for one sample more."""
    expected = -(-Fraction(str(percent)) * 1000 // 100)
    assert metrics.threshold_at_tpr(range(1, 1001), percent) == expected


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


def test_labels_and_predictions_must_pair_up():
    for labels, predictions in (([0], [0, 1]), ([], []), ([[0]], [[0]])):
        with pytest.raises(InputError, match="expected two lists of the same length"):
            metrics.accuracy(labels, predictions)
    with pytest.raises(InputError, match="1 labels for 2 ID scores"):
        metrics.oscr([0.0, 1.0], [2.0], [0], [0])
    with pytest.raises(InputError, match="OOD scores: 1 of 2 are NaN"):
        metrics.oscr([0.0], NAN, [0], [1])
    assert metrics.oscr([0.0], [1.0], [0], [1]) == 0.0


def test_unknown_classes_and_rules_are_refused():
    ranking = metrics.Ranking.of([0.0], [1.0])
    with pytest.raises(InputError, match="the positive one is id or ood"):
        ranking.fpr(95, "noise")
    with pytest.raises(InputError, match="unknown rule 'best'; use one of average, trapezoid, pessimistic"):
        ranking.aupr("id", "best")
