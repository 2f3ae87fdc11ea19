from __future__ import annotations

import math

import numpy as np
import pytest

from grood_cert.errors import InputError
from grood_cert.metrics import auroc, fpr95_id
from grood_cert.results import curves
from tests.results.examples import EPS, certification, random_certification, sample, slopes, smoothing


def smallest_threshold(scores):
    """Brute force: the smallest score that at least 95 % of the scores do not exceed."""
    return min(t for t in scores if np.mean([s <= t for s in scores]) >= 0.95 - 1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share_nan", [0.0, 0.3])
@pytest.mark.parametrize("perturbed", curves.PERTURBED)
def test_fpr_curve_by_brute_force(seed, share_nan, perturbed):
    result = random_certification(seed, share_nan)
    curve = curves.fpr_curve(result, perturbed)
    assert curve.eps.tolist() == [0, *EPS]
    inside = result.of_kind("id")
    for column, _ in enumerate(curve.eps):

        def at(name, mask, moved, column=column):
            if column == 0 or not moved:
                return result["score"][mask].tolist()
            return result.grid[name][mask, column - 1].tolist()

        upper = [math.inf if math.isnan(v) else v for v in at("s_ub", inside, perturbed != "ood")]
        gamma_certified = smallest_threshold(upper)
        gamma_attacked = smallest_threshold(at("s_attack_max", inside, perturbed != "ood"))
        certified, attacked = [], []
        for name in ("a", "b"):
            mask = result["set"] == name
            lower = at("s_lb", mask, perturbed != "id")
            certified.append(1 - sum(1 for value in lower if value > gamma_certified) / len(lower))
            witness = at("s_attack_min", mask, perturbed != "id")
            attacked.append(sum(1 for value in witness if value <= gamma_attacked) / len(witness))
        assert curve.certified[column] == pytest.approx(np.mean(certified), abs=1e-12)
        assert curve.attacked[column] == pytest.approx(np.mean(attacked), abs=1e-12)
    assert (curve.attacked <= curve.certified).all()


@pytest.mark.parametrize("perturbed", curves.PERTURBED)
def test_at_eps_zero_both_curves_are_the_clean_fpr95(perturbed):
    result = random_certification(7)
    clean = np.mean(
        [fpr95_id(result["score"][result.of_kind("id")], result["score"][result["set"] == n]) for n in "ab"]
    )
    curve = curves.fpr_curve(result, perturbed)
    assert curve.certified[0] == curve.attacked[0] == pytest.approx(clean, abs=1e-12)
    assert (np.diff(curve.certified) >= 0).all() and (np.diff(curve.attacked) >= 0).all()


def test_what_was_not_proved_counts_against_the_detector():
    bounds = [(math.nan, math.nan, 5.0, 5.0)] * 2
    inside = [sample("id", "in", -1.0, [(-1.0, -1.0, -1.0, -1.0)] * 2) for _ in range(20)]
    result = certification([*inside, *(sample("ood", "a", 5.0, bounds) for _ in range(4))])
    curve = curves.fpr_curve(result)
    assert curve.certified.tolist() == [0, 1, 1] and curve.attacked.tolist() == [0, 0, 0]
    lost = [sample("id", "in", -1.0, bounds) for _ in range(20)]
    result = certification([*lost, *(sample("ood", "a", 5.0, [(5.0, 5.0, 5.0, 5.0)] * 2) for _ in range(4))])
    assert curves.fpr_curve(result, "id").certified.tolist() == [0, 1, 1]


def test_a_bound_equal_to_gamma_proves_nothing():
    inside = [sample("id", "in", -1.0, [(-1.0, -1.0, -1.0, -1.0)] * 2) for _ in range(20)]
    result = certification([*inside, sample("ood", "a", 0.0, [(-1.0, 1.0, 0.0, 0.0)] * 2)])
    assert curves.fpr_curve(result).certified.tolist() == [0, 1, 1]


@pytest.mark.parametrize("perturbed", curves.PERTURBED)
def test_limits_of_fpr_curves(perturbed):
    """Of one set those of its records; of a mean, means of limits at a level that all hold together with 95 %."""
    result = random_certification(3)
    for name in "ab":
        curve = curves.fpr_curve(result, perturbed, {name: result["set"] == name})
        for values, key in (
            (curve.certified, "fpr95_id_certified"),
            (curve.certified_limit, "fpr95_id_certified_high"),
            (curve.attacked, "fpr95_id_attacked"),
            (curve.attacked_limit, "fpr95_id_attacked_low"),
        ):
            assert [record[key] for record in curve.sets] == values.tolist()
    mean = curves.fpr_curve(result, perturbed)
    each = [curves.fpr_curve(result, perturbed, {name: result["set"] == name}) for name in "ab"]
    assert (mean.certified_limit >= np.mean([one.certified_limit for one in each], axis=0)).all()
    assert (mean.attacked_limit <= np.mean([one.attacked_limit for one in each], axis=0)).all()
    for place, share in enumerate(mean.certified):
        if share == 0:
            assert mean.certified_limit[place] == pytest.approx(1 - 0.0125 ** (1 / 40))


def test_intervals_of_the_table_are_clopper_pearson():
    """Exact values for 0 of n: the upper end is 1 - (alpha / 2)^(1 / n)."""
    result = random_certification(3, samples=30)
    for record in curves.fpr_curve(result).sets:
        for label in ("certified", "attacked"):
            value, low, high = (record[f"fpr95_id_{label}{end}"] for end in ("", "_low", "_high"))
            assert low <= value <= high and record["samples"] == 30
            if value == 0:
                assert high == pytest.approx(1 - 0.025 ** (1 / 30)) and low == 0


@pytest.mark.parametrize("kind", ["id", "ood"])
def test_radius_curve_by_brute_force(kind):
    result = random_certification(1)
    names = ["in"] if kind == "id" else ["a", "b"]
    curve = curves.radius_curve(result, {name: result["set"] == name for name in names})
    assert curve.eps[0] == 0 and (np.diff(curve.eps) > 0).all()
    between = (curve.eps[:-1] + curve.eps[1:]) / 2
    for place, eps in [*enumerate(curve.eps), *enumerate(between)]:  # each value holds up to the next eps
        for column, values in (("radius_certified", curve.certified), ("radius_attack", curve.attacked)):
            expected = np.mean(
                [np.mean([radius > eps for radius in result[column][result["set"] == n]]) for n in names]
            )
            assert values[place] == pytest.approx(expected, abs=1e-12)
    assert (curve.certified <= curve.attacked).all() and (np.diff(curve.certified) <= 0).all()


def test_limits_of_radius_curves_are_those_of_dkw():
    result = random_certification(1)
    for names, level in ((["a"], 0.95), (["a", "b"], 0.975)):
        curve = curves.radius_curve(result, {name: result["set"] == name for name in names})
        width = math.sqrt(math.log(2 / (1 - level)) / (2 * 40))
        np.testing.assert_allclose(curve.certified_limit, np.maximum(curve.certified - width, 0), atol=1e-12)
        np.testing.assert_allclose(curve.attacked_limit, np.minimum(curve.attacked + width, 1), atol=1e-12)


def test_limits_hold_what_the_samples_were_drawn_from():
    """Radii are uniform on [0, 1] and attacks at most 0.2 beyond: in 95 % of draws the whole curve lies between limits."""
    generator, missed = np.random.default_rng(0), 0
    for _ in range(200):
        radii = generator.random(25)
        bounds = [(0.0,) * 4] * 2
        records = [sample("id", "in", -1.0, bounds, radius, radius + 0.2) for radius in radii]
        curve = curves.radius_curve(result := certification(records), curves.id_sets(result))
        ends = np.append(curve.eps[1:], np.inf)  # the limits hold up to there, and the true curves fall meanwhile
        highest, lowest = np.clip(1 - curve.eps, 0, 1), np.clip(1.2 - ends, 0, 1)
        missed += bool((highest < curve.certified_limit).any() or (np.minimum(lowest, 1) > curve.attacked_limit).any())
    assert missed <= 10


def test_robustness_curve_by_brute_force():
    result = random_certification(2, share_nan=0.2)
    curve = curves.robustness_curve(result, 0.2)
    inside = result.of_kind("id")
    for index in range(0, len(curve.gamma), 7):
        gamma = curve.gamma[index]
        assert curve.fpr[index] == pytest.approx(
            np.mean([np.mean(result["score"][result["set"] == n] <= gamma) for n in "ab"])
        )
        assert curve.tpr[index] == pytest.approx(np.mean(result["score"][inside] <= gamma))
        upper = result.grid["s_ub"][inside, 1]
        assert curve.certified[index] == pytest.approx(np.mean([bool(value < gamma) for value in upper]))
        assert curve.attacked[index] == pytest.approx(np.mean(result.grid["s_attack_max"][inside, 1] <= gamma))
    assert (curve.certified <= curve.attacked).all() and (curve.attacked <= curve.tpr).all()
    clean = [auroc(result["score"][inside], result["score"][result["set"] == name]) for name in "ab"]
    assert curve.auroc == pytest.approx(np.mean(clean))
    assert (curve.certified - curve.certified_limit <= 0.2148).all()  # sqrt(log(40) / 80)
    assert (curve.certified_limit <= curve.certified).all() and (curve.attacked_limit >= curve.attacked).all()
    assert (curve.fpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 1, 1) or curve.fpr[-1] == 1


def test_what_curves_refuse():
    result = random_certification(0)
    with pytest.raises(InputError, match=r"eps 0\.5 is not on the grid of the rows; use one of 0\.1, 0\.2"):
        curves.robustness_curve(result, 0.5)
    with pytest.raises(InputError, match="unknown side 'all'; perturb one of ood, id, both"):
        curves.fpr_curve(result, "all")
    with pytest.raises(InputError, match="no OOD set"):
        curves.fpr_curve(random_certification(0, kinds=(("id", "in"), ("noise", "n"))))
    for function in (curves.fpr_curve, curves.robustness_curve):
        with pytest.raises(InputError, match="no ID samples"):
            function(random_certification(0, kinds=(("ood", "a"),)))


def smoothed(seed, share_abstained=0.2):
    generator = np.random.default_rng(seed)
    records = []
    for kind, name in [("id", "in")] * 40 + [("ood", "a")] * 30 + [("ood", "b")] * 20 + [("noise", "n")] * 10:
        median = float(generator.normal(-2 if kind == "id" else 1, 1.5))
        decision, wrong = ("accepted", kind != "id") if median <= 0 else ("rejected", kind == "id")
        lower = median - np.cumsum(generator.random(2))
        if generator.random() < share_abstained:
            records.append((kind, name, median, median, "abstained", "abstained", 0.0, (lower[0], -math.inf)))
        else:
            radius = 0.0 if wrong else float(generator.random())
            records.append(
                (kind, name, median, median, decision, "misdecided" if wrong else "certified", radius, lower)
            )
    return smoothing(records)


@pytest.mark.parametrize("seed", range(3))
def test_curves_of_smoothing_by_brute_force(seed):
    result = smoothed(seed)
    curve = curves.smoothed_fpr_curve(result)
    gamma = smallest_threshold(result["median_estimate"][result["kind"] == "id"].tolist())
    assert curve.eps.tolist() == [0, *EPS]
    bounds = [result["median_estimate"], *result.grid["s_lb_smoothed"].T]
    for rate, lower in zip(curve.certified, bounds, strict=True):
        shares = [1 - np.mean([bool(bound > gamma) for bound in lower[result["set"] == name]]) for name in "ab"]
        assert rate == pytest.approx(np.mean(shares), abs=1e-12)
    assert (curve.certified_limit >= curve.certified).all()
    curve = curves.smoothed_radius_curve(result, {"a": result["set"] == "a"})
    for value, share in zip(curve.eps, curve.certified, strict=True):
        expected = np.mean([radius > value for radius in result["radius_smoothed"][result["set"] == "a"]])
        assert share == pytest.approx(expected, abs=1e-12)
    assert curve.certified[-1] == 0 and (curve.certified_limit <= curve.certified).all()
    with pytest.raises(InputError, match="no ID samples"):
        curves.smoothed_fpr_curve(smoothing([("ood", "a", 1.0, 1.0, "rejected", "certified", 0.1, (0.0, 0.0))]))


@pytest.mark.parametrize(("n", "sigma", "alpha"), [(20, 0.5, 0.05), (1000, 1.0, 0.001), (10**5, 0.25, 0.001)])
def test_where_draws_end_is_what_smoothing_can_certify(n, sigma, alpha):
    from grood_cert.certification.smoothing import order_statistics, smoothed_radius

    largest = float(smoothed_radius(n, n, sigma, alpha))
    assert curves.largest_smoothed_radius(n, sigma, alpha / 2) == pytest.approx(largest, rel=1e-9)
    end = curves.largest_smoothed_radius(n, sigma, alpha / 6)
    assert order_statistics(n, 0.5, end * (1 - 1e-6) / sigma, alpha / 6)[0] == 1
    assert order_statistics(n, 0.5, end * (1 + 1e-6) / sigma, alpha / 6)[0] is None


def test_slopes_are_medians_with_order_statistics_for_limits():
    generator = np.random.default_rng(0)
    found = generator.random((3, 40)).cumsum(0)
    analysis = slopes(
        [("id", eps, *found[:, i]) for eps in EPS for i in range(40)] + [("ood", 0.1, 9.0, 9.0, math.inf)]
    )
    curve = curves.slope_curve(analysis, analysis.of_kind("id"))
    assert curve.eps.tolist() == list(EPS)
    for values, drawn in zip((curve.gradient_norm, curve.ascended, curve.bound), found, strict=True):
        assert values.tolist() == [np.median(drawn)] * 2
    below = sum(math.comb(40, k) for k in range(14)) / 2**40  # 14 and 27: the exact ranks of a median of 40
    assert below <= 0.025 < below + math.comb(40, 14) / 2**40
    assert curve.ascended_limit[0] == np.sort(found[1])[13] and curve.bound_limit[0] == np.sort(found[2])[26]
    assert curves.slope_curve(analysis, analysis.of_kind("ood")).bound.tolist() == [math.inf]
