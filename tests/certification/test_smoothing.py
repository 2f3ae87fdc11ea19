from __future__ import annotations

import functools
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest, foldnorm, kstest, norm
from torch import nn

from benchmarks import smoothing as benchmark
from grood_cert import detector
from grood_cert.certification import smoothing
from grood_cert.certification.smoothing import (
    Smoother,
    SmoothingSettings,
    default_eps,
    draws_beyond,
    median_estimate,
    order_statistics,
    smoothed_bounds,
    smoothed_radius,
    smoothed_scores,
)
from grood_cert.data import experiment_of
from grood_cert.detector import Detector
from grood_cert.errors import InputError
from grood_cert.networks import architectures
from grood_cert.runs import smooth
from grood_cert.runs.batches import batches
from grood_cert.scores import energy

SIGMA = 0.5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(weight, bias):
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return nn.Sequential(nn.Flatten(), layer).double().eval().requires_grad_(False)


def detector_of(network, shape=(1, 1, 2), gamma=0.0):
    return Detector(network.double().eval().requires_grad_(False), gamma, shape)


# Order statistics

ORACLES = {  # q = 1/2, alpha = 0.001
    1000: {0.0: (451, 550), 0.25: (354, 647), 0.5: (264, 737), 1.0: (124, 877), 2.0: (10, 991)},
    10_000: {0.0: (4845, 5156), 0.25: (3862, 6139), 0.5: (2943, 7058), 1.0: (1475, 8526), 2.0: (183, 9818)},
}


@pytest.mark.parametrize(("n", "shift"), [(n, shift) for n, table in ORACLES.items() for shift in table])
def test_order_statistics_of_the_literature(n, shift):
    assert order_statistics(n, 0.5, shift, 0.001) == ORACLES[n][shift]


def exact_ranks(n, below, above, alpha):
    """The definition in rational numbers, every k tried."""

    def cdf(k, p):
        return sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)), Fraction(0))

    upper = [k for k in range(1, n + 1) if cdf(k - 1, above) >= 1 - alpha]
    lower = [k for k in range(1, n + 1) if 1 - cdf(k - 1, below) >= 1 - alpha]
    return max(lower, default=None), min(upper, default=None)


@pytest.mark.parametrize("n", [1, 2, 7, 20])
@pytest.mark.parametrize("q", [0.5, 0.3, 0.95])
@pytest.mark.parametrize("shift", [0.0, 0.4, 1.3])
def test_order_statistics_against_rational_arithmetic(n, q, shift):
    below, above = (Fraction(float(norm.cdf(norm.ppf(q) + sign * shift))) for sign in (-1, 1))
    for alpha in (0.3, 0.1, 0.011):
        assert order_statistics(n, q, shift, alpha) == exact_ranks(n, below, above, Fraction(alpha))


def test_no_order_statistic_proves_nothing():
    assert order_statistics(9, 0.5, 0.0, 0.001) == (None, None)  # 2**-9 > 0.001 > 2**-10
    assert order_statistics(10, 0.5, 0.0, 0.001) == (1, 10)
    assert order_statistics(10, 0.7, 0.0, 0.001) == (2, None)
    lower, upper = smoothed_bounds(np.zeros((3, 9)), (0.0,), 1.0, 0.002)
    assert (lower == -np.inf).all() and (upper == np.inf).all()


# Coverage: scores whose smoothed quantiles are known in closed form


def _one_logit():
    """S = -(w.x + b) is Gaussian: h_q(x) = S(x) + sigma ||w|| Phi^{-1}(q), and a step of eps moves h by eps ||w||."""
    network, weight = linear([[0.6, -0.8]], [0.2]), 1.0
    image = torch.tensor([0.3, 0.9]).double().reshape(1, 1, 2)
    center = float(energy(network(image[None])))
    return SimpleNamespace(
        network=network,
        image=image,
        quantile=lambda q: center + SIGMA * weight * norm.ppf(q),
        lowest=lambda eps: center - eps * weight,
        highest=lambda eps: center + eps * weight,
    )


def _two_logits():
    """f = (t, -t) / 2, t = c + v.x Gaussian, so S = -log(2 cosh(t / 2)) falls in |t|, which is folded normal."""
    network, slope = linear([[1.5, 2.0], [-1.5, -2.0]], [-0.7, 0.7]), 5.0
    image = torch.tensor([0.2, 0.4]).double().reshape(1, 1, 2)
    mean = float(network(image[None])[0].diff().abs())

    def quantile(q, mean=mean):
        size = foldnorm.ppf(1 - q, mean / (SIGMA * slope), scale=SIGMA * slope)
        return -np.log(2 * np.cosh(size / 2))

    return SimpleNamespace(
        network=network,
        image=image,
        quantile=quantile,
        lowest=lambda eps: quantile(0.5, mean + eps * slope),
        highest=lambda eps: quantile(0.5, max(mean - eps * slope, 0.0)),
    )


@functools.cache
def drawn(make):
    """A case with 200,000 draws."""
    case = make()
    case.draws = smoothed_scores(case.network, case.image, SIGMA, 200_000, generator(3), 2**16).numpy()
    return case


@pytest.fixture(params=[_one_logit, _two_logits])
def known(request):
    return drawn(request.param)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0])
def test_bounds_miss_as_seldom_as_claimed_and_no_seldomer_than_needed(known, shift):
    """One bound at level 0.05: its k misses less often than that, the next k inwards more often, seen in the draws."""
    draws = known.draws.reshape(-1, 20)
    level, ordered = 0.05, np.sort(draws, 1)
    noise = 4 * math.sqrt(level / len(draws))  # an error of one in k shifts the share by five times as much
    lower, upper = smoothed_bounds(draws, (shift * SIGMA,), SIGMA, 2 * level)
    low, high = (known.quantile(norm.cdf(sign * shift)) for sign in (-1, 1))
    assert np.mean(upper[:, 0] < high) <= level + noise
    assert np.mean(lower[:, 0] > low) <= level + noise
    rank = int((ordered[0] == lower[0]).argmax()), int((ordered[0] == upper[0]).argmax())
    assert (ordered[:, rank[0]] == lower[:, 0]).all() and (ordered[:, rank[1]] == upper[:, 0]).all()
    assert np.mean(ordered[:, rank[1] - 1] < high) > level - noise
    assert np.mean(ordered[:, rank[0] + 1] > low) > level - noise


def test_a_linear_score_loses_nothing_to_the_theorem():
    case = _one_logit()
    for shift in (0.0, 0.3, 1.1):
        assert case.quantile(norm.cdf(shift)) == pytest.approx(case.highest(shift * SIGMA), abs=1e-12)
        assert case.quantile(norm.cdf(-shift)) == pytest.approx(case.lowest(shift * SIGMA), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.05, 0.5])
def test_all_bounds_of_a_row_hold_together(known, alpha):
    """2,000 rows of 100 draws: both sides at every eps hold at once, for the worst perturbation, in 1 - alpha of rows."""
    eps = (0.0, 0.1, 0.25, 0.4)
    lower, upper = smoothed_bounds(known.draws.reshape(-1, 100), eps, SIGMA, alpha)
    held = (lower <= [known.lowest(e) for e in eps]) & (upper >= [known.highest(e) for e in eps])
    share = held.all(1).mean()
    assert share >= 1 - alpha - 4 * math.sqrt(alpha / len(held))
    assert (np.diff(lower, axis=1) <= 0).all() and (np.diff(upper, axis=1) >= 0).all()


def test_rounded_scores_are_covered():
    """Steps of 1/2: a non-decreasing map carries quantiles over, and ties only make the bounds safer."""
    case = drawn(_one_logit)
    draws = case.draws.reshape(-1, 20)

    def step(values):
        return np.floor(2 * values) / 2

    lower, upper = smoothed_bounds(step(draws), (0.2,), SIGMA, 0.1)
    assert np.mean(lower[:, 0] > step(case.lowest(0.2))) <= 0.05
    assert np.mean(upper[:, 0] < step(case.highest(0.2))) <= 0.05
    assert len(np.unique(upper)) < 12


# Radius and decision


def radii(draws, gamma, alpha):
    n = draws.shape[-1]
    return (smoothed_radius(hits, n, SIGMA, alpha) for hits in draws_beyond(draws, gamma))


@pytest.mark.parametrize("side", ["accepted", "rejected"])
@pytest.mark.parametrize("exact", [0.1, 0.4])
def test_radius_exceeds_the_exact_one_as_seldom_as_claimed(side, exact):
    """Linear score: the smoothed radius is |S - gamma| / ||w||; alpha is large so that its size shows."""
    case, alpha = drawn(_one_logit), 0.1
    draws = case.draws.reshape(-1, 100)
    gamma = case.highest(exact) if side == "accepted" else case.lowest(exact)
    accepted, rejected = radii(draws, gamma, alpha)
    right, wrong = (accepted, rejected) if side == "accepted" else (rejected, accepted)
    share = np.mean((right > exact) | (wrong > 0))
    noise = 4 * math.sqrt(alpha / len(draws))
    assert alpha / 8 < share <= alpha / 2 + noise  # all of it on one side: half of alpha, less what the steps of n cost
    assert 0.5 * exact < np.median(right + 1e-12) or exact == 0.1  # 100 draws leave the nearer one undecided
    assert (np.minimum(accepted, rejected) == 0).all()


def test_where_the_median_is_gamma_nearly_all_rows_abstain():
    """The worst case of the decision: both sides can err, and only alpha / 2 for each keeps their sum below alpha."""
    case, alpha = drawn(_one_logit), 0.05
    draws = case.draws.reshape(-1, 100)
    accepted, rejected = radii(draws, case.quantile(0.5), alpha)
    share = np.mean((accepted > 0) | (rejected > 0))
    assert share <= alpha + 4 * math.sqrt(alpha / len(draws))
    assert share == pytest.approx(2 * binom.sf(60, 100, 0.5), abs=0.01)  # 61 of 100 on one side are needed


@pytest.mark.parametrize("n", [30, 1000])
@pytest.mark.parametrize("alpha", [0.2, 0.002])
def test_radius_is_where_the_order_statistic_crosses_gamma(n, alpha):
    """For every count: gamma between the draws k and k + 1 is beyond X_(upper) for eps below the radius, not above."""
    hits = np.arange(n + 1)
    radius = smoothed_radius(hits, n, SIGMA, alpha)
    assert (np.diff(radius) >= 0).all() and radius[n // 2] == 0
    for count in range(n % 7, n + 1, 7):
        reference = binomtest(count, n, alternative="greater").proportion_ci(1 - alpha / 2, method="exact").low
        assert radius[count] == pytest.approx(SIGMA * norm.ppf(max(reference, 0.5)), abs=1e-9)
    draws = np.arange(1.0, n + 1)
    for count in {n // 2 + n // 4, n - 3, n}:
        value = float(radius[count])
        if value == 0:
            continue
        lower, upper = smoothed_bounds(draws, (value * (1 - 1e-9),), SIGMA, alpha)
        assert upper < count + 0.5 and lower > n - count + 0.5
        lower, upper = smoothed_bounds(draws, (value * (1 + 1e-9),), SIGMA, alpha)
        assert not (upper < count + 0.5 or lower > n - count + 0.5)


TABLE = {0.6: 0.13, 0.8: 0.70, 0.9: 1.11, 0.95: 1.44, 0.99: 1.98, 1.0: 2.46}  # n = 1000, one side at 0.001


@pytest.mark.parametrize("share", TABLE)
def test_radii_of_the_literature(share):
    assert smoothed_radius(round(1000 * share), 1000, 1.0, 0.002) == pytest.approx(TABLE[share], abs=0.005)
    assert smoothed_radius(60, 100, 1.0, 0.002) == 0
    assert smoothed_radius(1000, 1000, 1.0, 0.002) == pytest.approx(norm.ppf(0.001**0.001), abs=1e-12)


def test_constant_score():
    """Ties: a draw at gamma speaks for neither side."""
    draws = np.full(50, 0.7)
    lower, upper = smoothed_bounds(draws, (0.0, 0.3), SIGMA, 0.01)
    assert (lower == 0.7).all() and (upper == 0.7).all()
    assert median_estimate(draws) == 0.7
    furthest = SIGMA * norm.ppf(0.005 ** (1 / 50))
    for gamma, expected in (
        (0.7, (0, 0)),
        (np.nextafter(0.7, 1), (furthest, 0)),
        (np.nextafter(0.7, 0), (0, furthest)),
    ):
        assert tuple(radii(draws, gamma, 0.01)) == pytest.approx(expected, abs=1e-12)


def test_the_median_is_the_smallest_value_with_half_of_the_draws_up_to_it():
    for draws in ([3.0], [2.0, 1.0], [5.0, 1.0, 3.0], [4.0, 1.0, 3.0, 2.0], [-np.inf, np.inf, 0.0]):
        expected = min(value for value in draws if 2 * sum(d <= value for d in draws) >= len(draws))
        assert median_estimate(draws) == expected


def test_nan_abstains():
    draws = np.zeros((3, 100))
    draws[1, 40] = np.nan
    draws[2] = np.nan
    lower, upper = smoothed_bounds(draws, (0.0, 0.1), SIGMA, 0.05)
    assert (lower[0] == 0).all() and (upper[0] == 0).all()
    assert (lower[1:] == -np.inf).all() and (upper[1:] == np.inf).all()
    assert np.isnan(median_estimate(draws)).tolist() == [False, True, True]
    for gamma in (1.0, -1.0):
        accepted, rejected = radii(draws, gamma, 0.05)
        assert (accepted[1:] == 0).all() and (rejected[1:] == 0).all()
        assert accepted[0] + rejected[0] > 0
    assert [value.tolist() for value in radii(draws, math.nan, 0.05)] == [[0, 0, 0], [0, 0, 0]]


# Noise


def test_noise_is_added_to_pixels_and_not_clipped():
    """Through the normalisation, S has standard deviation sigma ||w|| / std, also where x lies on the pixel box."""
    network = nn.Sequential(architectures.Normalize([0.3], [0.25]), *linear([[3.0, 4.0]], [0.0])).double()
    image = torch.tensor([0.0, 1.0]).double().reshape(1, 1, 2)
    draws = smoothed_scores(network, image, 0.5, 20_000, generator(), 1000).numpy()
    assert kstest(draws, norm(float(energy(network(image[None]))), 0.5 * 5 / 0.25).cdf).pvalue > 1e-3


def test_draws_depend_on_neither_batches_nor_company(model):
    loaded = detector.load(model)
    images = experiment_of(loaded.origin.recipe).test
    settings = SmoothingSettings(sigma=0.2, eps=(0.1,), n=150, dtype="float64")
    whole, narrow = (
        Smoother(loaded, settings),
        Smoother(loaded, SmoothingSettings(0.2, (0.1,), 150, dtype="float64", memory=2**17)),
    )
    assert narrow.batch < whole.batch == 150
    records, apart = (
        {
            record["index"]: record
            for batch in batches(sets, limit, size, 0)
            for record in smooth.certify(whole, -5.0, batch)
        }
        for sets, limit, size in (([images], 4, 3), ([images.select(range(150))], 0, 8))
    )
    shared = records.keys() & apart.keys()
    assert len(shared) >= 1 and all(records[index] == apart[index] for index in shared)
    one = images.images[3]
    draws = whole.draws(one, "test", images.name, 3)
    np.testing.assert_array_equal(draws, whole.draws(one, "test", images.name, 3))
    np.testing.assert_allclose(draws, narrow.draws(one, "test", images.name, 3), rtol=1e-12)
    others = (
        whole.draws(one, "test", images.name, 4),
        whole.draws(one, "test", "other", 3),
        whole.draws(one, "calibration", images.name, 3),
        Smoother(loaded, SmoothingSettings(0.2, (0.1,), 150, dtype="float64", seed=1)).draws(
            one, "test", images.name, 3
        ),
    )
    assert all(abs(np.corrcoef(draws, other)[0, 1]) < 0.4 for other in others)  # 150 pairs: 5 standard deviations


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.5)])
def test_the_network_that_is_smoothed_computes_in_the_type_asked_for(model, dtype, tolerance):
    loaded = detector.load(model)
    image = experiment_of(loaded.origin.recipe).test.images[0]
    exact, other = (
        Smoother(loaded, SmoothingSettings(0.1, (0.05,), 50, dtype=name)).draws(image, "test", "digits", 0)
        for name in ("float64", dtype)
    )
    assert 0 < np.abs(exact - other).max() < tolerance * (1 + np.abs(exact).max())
    assert next(loaded.network.parameters()).dtype == torch.float64  # the detector's own network is left alone


def test_memory_counts_all_layers():
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Sequential(nn.ReLU(), nn.Flatten()), nn.Linear(12, 5))
    assert smoothing.layer_bytes(network, torch.zeros(1, 2, 2)) == 4 * (12 + 12 + 12 + 5)
    assert not any(module._forward_hooks for module in network.modules())


def test_a_deep_residual_network():
    network = architectures.build("resnet18", (3, 32, 32), 10, [0.5] * 3, [0.25] * 3, width=4)
    smoother = Smoother(
        detector_of(network, (3, 32, 32)), SmoothingSettings(0.25, default_eps(0.25, (3, 32, 32)), n=20, alpha=0.01)
    )
    record = smoother.certify(smoother.draws(torch.full((3, 32, 32), 0.5), "test", "grey", 0), 100.0, "id")
    assert record["status"] == "certified"
    assert record["radius_smoothed"] == pytest.approx(0.25 * norm.ppf(0.005**0.05), rel=1e-9)


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma must be a positive number"),
        ({"sigma": math.nan}, "sigma must be a positive number"),
        ({"sigma": -1.0}, "sigma must be a positive number"),
        ({"alpha": 0.0}, "alpha must lie between 0 and 1"),
        ({"alpha": 1.0}, "alpha must lie between 0 and 1"),
        ({"n": 10}, "10 draws certify nothing at alpha 0.001; use n of at least 11"),
        ({"n": 0}, "0 draws"),
        ({"eps": ()}, "no eps"),
        ({"eps": (0.2, 0.1)}, "ascending"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"memory": 5}, "memory must be"),
        ({"batch_size": 0}, "batch size must be"),
        ({"calibration_limit": -1}, "calibration limit must be"),
    ],
)
def test_settings_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        SmoothingSettings(**{"sigma": 0.25, "eps": (0.1,), **change}).check((1, 8, 8))


def test_the_fewest_draws_certify_something():
    SmoothingSettings(0.25, (0.1,), n=11, alpha=0.001).check((1, 8, 8))
    assert smoothed_radius(11, 11, 1.0, 0.001) > 0 == smoothed_radius(10, 10, 1.0, 0.001)


def test_functions_refuse_too():
    for call in (
        lambda: order_statistics(0, 0.5, 0.0, 0.1),
        lambda: order_statistics(9, 1.0, 0.0, 0.1),
        lambda: order_statistics(9, 0.5, -0.1, 0.1),
        lambda: order_statistics(9, 0.5, math.inf, 0.1),
        lambda: order_statistics(9, 0.5, 0.0, 0.0),
        lambda: smoothed_bounds(np.zeros(9), (0.1,), 0.0, 0.1),
        lambda: smoothed_bounds(np.zeros(9), (-0.1,), 1.0, 0.1),
        lambda: smoothed_radius(9, 9, 1.0, math.nan),
    ):
        with pytest.raises(InputError):
            call()


def test_benchmark():
    table = benchmark.coverage(20, 0.1, 4000)
    assert [record["eps/sigma"] for record in table] == [0.0, 0.25, 0.5, 1.0]  # beyond that, 20 draws bound nothing
    for record in table:
        assert tuple(record) == benchmark.COVERAGE_COLUMNS and record["misses, exact"] <= record["level"] == 0.05
        for side in ("above", "below"):
            assert record[f"misses {side}"] == pytest.approx(record["misses, exact"], abs=0.015)
    measured = benchmark.cost("resnet18", 4, "cpu", torch.float32, 2**20, width=4)
    assert tuple(measured) == benchmark.COST_COLUMNS and measured["batch"] >= 1
    assert measured["images/s"] * measured["s/sample"] == pytest.approx(4)
