"""The search of the largest ball that a bound certifies, by secant steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EVALUATIONS = 12  # most of a sample
_GROWTH = 1.3  # log-log slope of the bound's deviation in eps, until two points tell

Evaluate = Callable[[Tensor, Tensor], Tensor]


def search_radius(
    evaluate: Evaluate,
    margin: Tensor,
    low: Tensor,
    low_deviation: Tensor,
    high: Tensor,
    high_deviation: Tensor,
    first: Tensor,
    limit: float,
    precision: float,
    evaluations: int = EVALUATIONS,
    least: Tensor | float = 0.0,
) -> Tensor:
    r"""Largest eps found with deviation(eps) < margin, for each sample; every value returned was itself proved.

    The deviation D(eps) = S_ub - S (ID) or S - S_lb (OOD) grows at least linearly, about like a power of eps, so the
    next eps comes from the line through the bracket's ends in log-log coordinates, aimed just below the margin, and
    from bisection where that line is unknown or has missed twice. The search of a sample ends when
    margin / D(low) - 1 <= precision, when the bracket is that narrow, once so small a ball has failed that no smaller one
    is of interest, or after a fixed number of evaluations.

    Args:
        evaluate: (indices, eps) -> D, shape (len(indices),); NaN where nothing was proved.
        margin: |gamma - S(x)|, shape (B,); samples with margin <= 0 get radius 0.
        low: Largest eps proved so far, 0 if none, shape (B,).
        low_deviation: D(low).
        high: Smallest eps known to fail, infinity if none, shape (B,).
        high_deviation: D(high), NaN if unknown.
        first: First eps to try where nothing is known, shape (B,).
        limit: Largest eps that makes sense.
        precision: Relative precision.
        evaluations: Most evaluations of a sample.
        least: Below a ball of this radius that fails none is tried, shape (B,) or one for all.

    Returns:
        Shape (B,).

    Example:
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> square = lambda index, eps: eps**2
        >>> search_radius(square, one / 4, zero, zero, one / 0, one * torch.nan, one, 9.0, 1e-4)
        tensor([0.5000])
    """
    low, low_deviation, high, high_deviation = (t.clone() for t in (low, low_deviation, high, high_deviation))
    growth = torch.full_like(margin, _GROWTH)
    misses = torch.zeros_like(margin)  # in a row
    target = margin * (1 - precision / 2)
    for _ in range(evaluations):
        active = (margin > low_deviation * (1 + precision)) & (low < limit) & (high > low * (1 + precision))
        active = active & (high > least)
        if not bool(active.any()):
            break
        bounded = torch.isfinite(high)
        bracket = bounded & (low_deviation > 0) & (high_deviation > low_deviation)
        slope = torch.where(bracket, (high_deviation / low_deviation).log() / (high / low).log(), growth)
        secant = low * (target / low_deviation) ** (1 / slope.clamp(min=0.5))
        below = high * (target / high_deviation).clamp(max=0.9)  # right or too low wherever D is convex
        start = torch.where(torch.isfinite(below), below, torch.minimum(first, high / 2))
        guess = torch.where(low > 0, secant, start)
        middle = torch.where(bounded, (low + high) / 2, torch.maximum(4 * low, torch.full_like(low, limit / 4096)))
        blind = ~torch.isfinite(guess) | (bounded & (low > 0) & ~bracket & (guess > middle)) | (misses >= 2)
        guess = torch.where(blind, middle, guess)
        narrow, wide = low + 0.01 * (high - low), low + 0.99 * (high - low)
        guess = torch.where(bounded, torch.maximum(torch.minimum(guess, wide), narrow), guess)
        eps = guess.clamp(max=limit)
        index = active.nonzero().squeeze(1)
        got = torch.full_like(margin, torch.nan)
        got[index] = evaluate(index, eps[index])
        proved = active & (got < margin)
        failed = active & ~proved
        rise = (got / low_deviation).log() / (eps / low).log()
        growth = torch.where(proved & torch.isfinite(rise) & (rise > 0.5), rise, growth)
        low, low_deviation = torch.where(proved, eps, low), torch.where(proved, got, low_deviation)
        high, high_deviation = torch.where(failed, eps, high), torch.where(failed, got, high_deviation)
        misses = torch.where(failed, misses + 1, 0)
    return low
