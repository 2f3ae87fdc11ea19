r"""Confidence intervals: what a finite sample says of the share, or of the whole curve, that it was drawn from.

They speak of the sampling of *images*. A proof for each image of a test set needs none; the step from those images to
the distribution they were drawn from does. Samples must be independent.

References:
    Clopper & Pearson, Biometrika 1934 (a share); Massart, Annals of Probability 1990 (a distribution function, with the
    sharp constant 2 of the Dvoretzky-Kiefer-Wolfowitz inequality); Efron, Annals of Statistics 1979 (the bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grood_cert.errors import InputError

LEVEL = 0.95  # of every interval that is printed or drawn
RESAMPLES = 1000  # of every bootstrap


def clopper_pearson(count: ArrayLike, samples: int, level: float = LEVEL) -> NDArray[np.float64]:
    r"""Exact binomial interval of a share: `count` of `samples` were so.

    With a = (1 - level) / 2, k = count and n = samples: the quantile a of Beta(k, n - k + 1), 0 where k = 0, and the
    quantile 1 - a of Beta(k + 1, n - k), 1 where k = n.

    Args:
        count: Whole numbers from 0 to `samples`, any shape.
        samples: How many were counted.
        level: Probability that the interval holds the true share, at least.

    Returns:
        Low and high, shape (2, *count.shape).

    Raises:
        InputError: On a count or a level outside its range.

    Example:
        >>> clopper_pearson(5, 100).round(4).tolist()
        [0.0164, 0.1128]
        >>> clopper_pearson([0, 10], 10).round(4).tolist()
        [[0.0, 0.6915], [0.3085, 1.0]]
    """
    from scipy.special import betaincinv

    found = np.asarray(count)
    if not bool(((found >= 0) & (found <= samples) & (found == np.floor(found))).all()) or samples < 1:
        raise InputError(f"a count of {count!r} of {samples}: expected whole numbers from 0 to the samples")
    tail = (1 - _checked(level)) / 2
    low = np.where(found == 0, 0.0, betaincinv(np.maximum(found, 1), samples - found + 1, tail))
    high = np.where(found == samples, 1.0, betaincinv(found + 1, np.maximum(samples - found, 1), 1 - tail))
    return np.stack([low, high])


def dkw(samples: int, level: float = LEVEL) -> float:
    r"""Half-width of a band around the share of samples up to t, for *all* t together: sqrt(log(2 / (1 - level)) / (2 n)).

    Args:
        samples: How many samples the curve has.
        level: Probability that the whole band holds the true distribution function, at least.

    Raises:
        InputError: If there are no samples, or the level is outside (0, 1).

    Example:
        >>> round(dkw(100), 4)
        0.1358
    """
    if samples < 1:
        raise InputError(f"{samples} samples have no curve; at least 1 is needed")
    return math.sqrt(math.log(2 / (1 - _checked(level))) / (2 * samples))


def bootstrap(
    figures: Callable[..., Mapping[str, float]],
    *samples: NDArray[Any],
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, NDArray[np.float64]]:
    r"""Percentile bootstrap of figures that are no plain shares: areas under curves, smallest errors.

    Every sample is drawn anew with replacement, as large as it was; the interval is between the quantiles
    (1 - level) / 2 and (1 + level) / 2 of what comes of it. It is approximate: right for many samples, too narrow for few,
    and of no width where the figure is at the end of its range (an AUROC of 1).

    Args:
        figures: From the samples to figures by name.
        samples: Arrays, one entry of the first axis a sample.
        level: Probability that the interval holds the true figure, about.
        resamples: How often to draw.
        seed: Seed of the draws.

    Returns:
        Low and high of each figure.

    Raises:
        InputError: If a sample is empty, or the level is outside (0, 1).

    Example:
        >>> bootstrap(lambda x: {"mean": x.mean()}, np.arange(100.0))["mean"].round(0).tolist()
        [44.0, 55.0]
    """
    tail = (1 - _checked(level)) / 2
    if resamples < 1 or not all(len(sample) for sample in samples):
        raise InputError("a bootstrap draws at least once, from samples that are not empty")
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        again = (sample[generator.integers(len(sample), size=len(sample))] for sample in samples)
        for name, value in figures(*again).items():
            drawn.setdefault(name, []).append(value)
    return {name: np.quantile(values, [tail, 1 - tail]) for name, values in drawn.items()}


def median_interval(values: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    r"""Exact interval of a median, between two order statistics: X_(k) and X_(n + 1 - k).

    k is the largest rank with P(Bin(n, 1/2) < k) <= (1 - level) / 2. Ties make it wider than need be, never too narrow.

    Args:
        values: Sample, shape (n,); it may hold infinities.
        level: Probability that the interval holds the true median, at least.

    Returns:
        Low and high; infinite where the sample is too small for the level (below 6 for 95 %).

    Raises:
        InputError: If there are no values, one is NaN, or the level is outside (0, 1).

    Example:
        >>> median_interval(range(1, 11)), median_interval(range(5))
        ((2.0, 9.0), (-inf, inf))
    """
    from scipy.special import bdtr

    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if ordered.ndim != 1 or not len(ordered) or bool(np.isnan(ordered).any()):
        raise InputError("the interval of a median needs a list of numbers, at least one and none of them NaN")
    size = len(ordered)
    rank = int((bdtr(np.arange((size + 1) // 2), size, 0.5) <= (1 - _checked(level)) / 2).sum())
    return (float(ordered[rank - 1]), float(ordered[size - rank])) if rank else (-math.inf, math.inf)


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise InputError(f"level: expected a probability between 0 and 1, got {level!r}")
    return level
