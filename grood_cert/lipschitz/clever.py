r"""CLEVER: an extreme-value *estimate* of the local Lipschitz constant of S, and of the robust radius.

Maxima over batches of ||grad S||_q at uniform points of the ball follow, if the norm is bounded, a reverse Weibull
law in the limit; its right end point estimates L. An estimate of a bound is not a bound (Goodfellow, 2018).

References:
    Weng et al., "Evaluating the Robustness of Neural Networks: An Extreme Value Theory Approach", ICLR 2018.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.errors import InputError
from grood_cert.lipschitz.estimates import _norms, uniform_in_ball
from grood_cert.networks.graph import Graph
from grood_cert.scores import ENERGY, Score

_IMPLAUSIBLE = 10.0
_SHAPES = (1.0, 3.0, 10.0)  # where the likelihood fits start


@dataclass(frozen=True)
class Clever:
    """Estimates for a batch of balls.

    Attributes:
        lipschitz_estimate: Right end point of the fitted law, or the sample maximum where the fit failed; shape (B,).
        sample_maximum_estimate: Largest norm sampled.
        p_value: Kolmogorov-Smirnov p-value of the fit, NaN where there is none. The law was fitted to the same
            maxima, so the test is lenient: a small value condemns, a large one does not acquit.
        fitted: False where the fit failed and the sample maximum stands in.
    """

    lipschitz_estimate: Tensor
    sample_maximum_estimate: Tensor
    p_value: Tensor
    fitted: Tensor


def reverse_weibull_end_point(maxima: np.ndarray) -> tuple[float, float, bool]:
    r"""Maximum-likelihood right end point of a reverse Weibull law, best of three starts.

    Args:
        maxima: Batch maxima, shape (n,).

    Returns:
        End point, KS p-value, and whether the fit is usable: finite, not below the largest sample, and at most 10
        times it. Otherwise the largest sample, NaN, False.

    Example:
        >>> sample = stats.weibull_max.rvs(3.0, loc=2.0, scale=0.5, size=400, random_state=0)
        >>> end, p, fitted = reverse_weibull_end_point(sample)
        >>> bool(abs(end - 2.0) < 0.1), fitted
        (True, True)
    """
    largest = float(maxima.max())
    spread = largest - float(maxima.min())
    if not math.isfinite(largest) or spread <= 1e-12 * abs(largest):
        return largest, math.nan, False
    scaled = (maxima - maxima.mean()) / maxima.std()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        fits = []
        for guess in _SHAPES:  # the likelihood has several maxima; restart, and keep the highest
            with contextlib.suppress(stats.FitError, ValueError, FloatingPointError):
                fit = stats.weibull_max.fit(scaled, guess, loc=float(scaled.max()) + 0.1)
                cost = float(stats.weibull_max.nnlf(fit, scaled))
                if math.isfinite(cost):
                    fits.append((cost, fit))
        if not fits:
            return largest, math.nan, False
        shape, location, scale = min(fits)[1]
        p_value = float(stats.kstest(scaled, "weibull_max", args=(shape, location, scale)).pvalue)
    end = float(location * maxima.std() + maxima.mean())
    if not math.isfinite(end) or not largest <= end * (1 + 1e-12) or end > _IMPLAUSIBLE * largest:
        return largest, math.nan, False
    return max(end, largest), p_value, True


def clever_estimate(
    graph: Graph,
    ball: Ball,
    generator: torch.Generator,
    batches: int = 50,
    batch_size: int = 128,
    score: Score = ENERGY,
) -> Clever:
    r"""CLEVER estimate of L over each ball.

    Args:
        graph: The network.
        ball: Batch of balls.
        generator: Seeded random numbers; the same seed gives the same estimate.
        batches: Number of batch maxima (the paper: 500).
        batch_size: Points a batch (the paper: 1024).
        score: S.

    Returns:
        Estimates.

    Raises:
        InputError: If a count is not positive.
    """
    if batches < 1 or batch_size < 1:
        raise InputError(f"CLEVER needs at least one batch of one point, got {batches} batches of {batch_size}")
    maxima = torch.stack(
        [
            _norms(graph, uniform_in_ball(ball, batch_size, generator).flatten(0, 1), ball.norm, score)
            .reshape(batch_size, -1)
            .amax(0)
            for _ in range(batches)
        ]
    )
    fits = [reverse_weibull_end_point(column) for column in maxima.T.cpu().numpy()]
    end, p_value, fitted = (torch.tensor(column, device=maxima.device) for column in zip(*fits, strict=True))
    return Clever(end.to(maxima), maxima.amax(0), p_value.to(maxima), fitted)


def clever_radius_estimate(
    graph: Graph,
    ball: Ball,
    margin: Tensor,
    generator: torch.Generator,
    doublings: int = 4,
    batches: int = 50,
    batch_size: int = 128,
    score: Score = ENERGY,
) -> Tensor:
    r"""min(R, m / L) with R doubled until it no longer limits the answer, or `doublings` are used up.

    Args:
        graph: The network.
        ball: Batch of balls; their radii are the first R.
        margin: m = |gamma - S(x)|, shape (B,).
        generator: Seeded random numbers.
        doublings: Largest number of doublings.
        batches: Number of batch maxima.
        batch_size: Points a batch.
        score: S.

    Returns:
        An estimate of the robust radius, shape (B,); no certificate.
    """
    radius = torch.zeros_like(margin)
    for turn in range(doublings + 1):
        eps = ball.eps * 2.0**turn
        grown = Ball(ball.center, eps, ball.norm)
        constant = clever_estimate(graph, grown, generator, batches, batch_size, score).lipschitz_estimate
        found = torch.minimum(eps, margin / constant)
        radius = torch.where(radius < eps / 2, torch.where(radius > 0, radius, found), found) if turn else found
        if bool((radius < eps).all()):
            break
    return radius
