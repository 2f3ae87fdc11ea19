"""Intervals against scipy's own, against their coverage, and against exact distribution functions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from grood_cert.confidence import bootstrap, clopper_pearson, dkw
from grood_cert.errors import InputError


@pytest.mark.parametrize("samples", [1, 2, 19, 100, 10_000])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_the_interval_of_a_share_is_that_of_scipy(samples: int, level: float) -> None:
    counts = sorted({0, 1, samples // 3, samples - 1, samples})
    for count, low, high in zip(counts, *clopper_pearson(counts, samples, level), strict=True):
        expected = binomtest(count, samples).proportion_ci(level, method="exact")
        assert low == pytest.approx(expected.low, abs=1e-12)
        assert high == pytest.approx(expected.high, abs=1e-12)


@pytest.mark.parametrize("share", [0.001, 0.03, 0.5, 0.9])
def test_the_interval_of_a_share_covers_it_as_often_as_it_says(share: float) -> None:
    counts = np.arange(61)
    low, high = clopper_pearson(counts, 60)
    assert binom.pmf(counts, 60, share)[(low <= share) & (share <= high)].sum() >= 0.95


def test_the_band_of_a_curve_covers_the_whole_of_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    drawn = np.sort(rng.random((4000, 50)), axis=1)  # uniform: the distribution function is t itself
    steps = np.arange(51) / 50
    distance = np.maximum(np.abs(steps[1:] - drawn), np.abs(steps[:-1] - drawn)).max(1)
    covered = float((distance <= dkw(50)).mean())
    assert 0.95 - 0.01 <= covered <= 0.99  # at least the level (sampling error of 4,000 draws), and not idle


@pytest.mark.parametrize(("count", "samples"), [(-1, 10), (11, 10), (0, 0), (2.5, 10), (float("nan"), 10)])
def test_counts_that_cannot_be_are_refused(count: float, samples: int) -> None:
    with pytest.raises(InputError, match="expected whole numbers"):
        clopper_pearson(count, samples)


@pytest.mark.parametrize("level", [0.0, 1.0, float("nan")])
def test_levels_that_cannot_be_are_refused(level: float) -> None:
    with pytest.raises(InputError, match="level"):
        clopper_pearson(1, 2, level)
    with pytest.raises(InputError, match="level"):
        dkw(2, level)
    with pytest.raises(InputError, match="at least 1"):
        dkw(0)


def test_the_bootstrap_of_a_mean_is_its_normal_interval_and_follows_its_seed() -> None:
    sample = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = bootstrap(lambda x: {"mean": x.mean(), "size": len(x)}, sample)
    half = 1.96 * sample.std() / 20
    assert found["mean"] == pytest.approx([sample.mean() - half, sample.mean() + half], abs=half / 5)
    assert found["size"].tolist() == [400, 400]
    again, other = (bootstrap(lambda x: {"mean": x.mean()}, sample, seed=seed)["mean"] for seed in (0, 1))
    assert again.tolist() == found["mean"].tolist() != other.tolist()


def test_a_bootstrap_draws_every_sample_by_itself() -> None:
    first, second = np.arange(30.0), np.arange(30.0)
    found = bootstrap(lambda a, b: {"difference": a.mean() - b.mean()}, first, second, resamples=200)
    low, high = found["difference"]
    assert low < -1 and high > 1  # 0 if both had been drawn alike
    with pytest.raises(InputError, match="not empty"):
        bootstrap(lambda x: {}, np.zeros(0))
    with pytest.raises(InputError, match="level"):
        bootstrap(lambda x: {}, first, level=1.0)
