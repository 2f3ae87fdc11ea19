r"""Sound bounds of the energy score over a ball, from linear bounds of the logits.

Let l_k <= f_k <= u_k on the ball B, and let LB[c] <= c . f <= UB[c] on B for a row c. With H the Shannon entropy:

    U0   S <= -LSE(l)
    U1   S <= -(LB[p] + H(p))                       for any p in the simplex
    L0   S >= -LSE(u)
    L1   S >= -(M + log(sum_k e^(u_k - M) - kappa . u + UB[kappa])),      M = max_k u_k

U0 and L0 bound each logit alone. U1 and L1 are *joint*: one row carries the correlation between the logits through
the network.

* U1: LSE(z) = max over p of p . z + H(p) (Gibbs), so LSE(f) >= p . f + H(p) >= LB[p] + H(p) for whichever p.
  Used: p = softmax f(x), where it is the tangent plane of LSE, and p = softmax((l + u) / 2) and softmax(l) for wide
  intervals.
* L1: e^(z - M) is convex, so on [l_k, u_k] it lies below any line through (u_k, e^(u_k - M)) whose slope kappa_k lies
  in [0, chord slope]; the chord slope is e^(u_k - M) (1 - e^-(u_k - l_k)) / (u_k - l_k). Summing over k and taking
  the increasing logarithm gives L1. All exponentials are <= 1, so logits above 88 do no harm, and a degenerate
  interval l_k = u_k gives the limit slope e^(u_k - M): its term is never dropped.

The best of the joint and per-logit bounds is returned, so a joint bound is never looser than a per-logit one.

Bounds are in exact-arithmetic semantics, computed in float64 and moved outward by 1e-12 of the logits' scale to cover
rounding. Whatever is NaN, infinite or crossed comes out as NaN: not proved.

References:
    Wei et al., "Convex Bounds on the Softmax Function", AISTATS 2023 (the chord); Zhang et al., NeurIPS 2018 (CROWN).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.bounds.engine import BoundedNetwork, Method
from grood_cert.interval import ROUNDING, Interval, crossed
from grood_cert.scores import energy


@dataclass(frozen=True)
class ScoreBounds:
    """S_lb <= S(x') <= S_ub for every x' in the ball; NaN where nothing was proved.

    Attributes:
        lower: Best of L1 and L0, shape (B,).
        upper: Best of U1 and U0, shape (B,).
        lower_per_logit: L0 alone.
        upper_per_logit: U0 alone.
    """

    lower: Tensor
    upper: Tensor
    lower_per_logit: Tensor
    upper_per_logit: Tensor


def _repaired(lower: Tensor, upper: Tensor) -> Interval:
    """In order and widened by the rounding margin; NaN where the pair is not finite or crosses beyond rounding."""
    low, high = torch.minimum(lower, upper), torch.maximum(lower, upper)
    margin = ROUNDING * (1 + torch.maximum(low.abs(), high.abs()))
    known = torch.isfinite(lower) & torch.isfinite(upper) & ~crossed(lower, upper)
    nan = torch.full_like(lower, torch.nan)
    return torch.where(known, low - margin, nan), torch.where(known, high + margin, nan)


def gibbs_upper(row_lower: Tensor, weights: Tensor) -> Tensor:
    r"""U1: -(LB[p] + H(p)).

    Args:
        row_lower: LB[p], shape (...).
        weights: p, a point of the simplex, shape (..., K).

    Returns:
        Shape (...).

    Example:
        >>> z = torch.tensor([1.0, 2.0])  # exact where p = softmax(z)
        >>> p = torch.softmax(z, -1)
        >>> torch.isclose(gibbs_upper(p @ z, p), energy(z))
        tensor(True)
    """
    return -(row_lower - torch.xlogy(weights, weights).sum(-1))


def chord_slopes(lower: Tensor, upper: Tensor) -> Tensor:
    r"""kappa_k: slope of the chord of e^(z - M) over [l_k, u_k], rounded down; M = max_k u_k.

    Args:
        lower: l, shape (..., K).
        upper: u >= l, shape (..., K).

    Returns:
        Shape (..., K), in [0, 1].

    Example:
        >>> chord_slopes(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 5.0])).round(decimals=4)
        tensor([0.0116, 1.0000])
    """
    width = (upper - lower).clamp(min=0)
    share = torch.where(width > 0, -torch.expm1(-width) / width, torch.ones_like(width))
    return torch.exp(upper - upper.amax(-1, keepdim=True)) * share * (1 - ROUNDING)


def chord_lower(row_upper: Tensor, slopes: Tensor, upper: Tensor) -> Tensor:
    r"""L1: -(M + log(sum_k e^(u_k - M) - kappa . u + UB[kappa])); -inf where the argument is not positive.

    Args:
        row_upper: UB[kappa], shape (...).
        slopes: kappa, shape (..., K).
        upper: u, shape (..., K).

    Returns:
        Shape (...).

    Example:
        >>> low, high = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
        >>> kappa = chord_slopes(low, high)
        >>> z = torch.tensor([0.0, 1.0])  # the chord is exact at the ends
        >>> torch.isclose(chord_lower(kappa @ z, kappa, high), energy(z))
        tensor(True)
    """
    largest = upper.amax(-1)
    products = slopes * upper
    value = torch.exp(upper - largest.unsqueeze(-1)).sum(-1) - products.sum(-1) + row_upper
    value = value + ROUNDING * (1 + products.abs().sum(-1) + row_upper.abs())
    return -(largest + torch.where(value > 0, value, torch.full_like(value, torch.inf)).log())


def score_bounds(bounded: BoundedNetwork, ball: Ball, method: Method | None = None) -> ScoreBounds:
    r"""Bound S over each ball of a batch.

    Per-logit intervals and the first Gibbs row come from one call of the engine, the other Gibbs rows and the chord
    row from another; both share the bounds of the hidden layers.

    Args:
        bounded: The network inside its bound engine.
        ball: Batch of balls.
        method: Method for these bounds if it differs from the engine's own.

    Returns:
        Bounds, NaN where the engine's answer is NaN, infinite or crossed.
    """
    relaxation = bounded.relax(ball)
    with torch.no_grad():
        logits = bounded.network(ball.center)
    p_center = torch.softmax(logits, -1)
    identity = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device).expand(len(logits), -1, -1)
    row_lower, row_upper = relaxation.rows(torch.cat([identity, p_center.unsqueeze(1)], 1), method)
    row_center = row_lower[:, -1]
    lower, upper = _repaired(row_lower[:, : logits.shape[1]], row_upper[:, : logits.shape[1]])
    lower_per_logit, upper_per_logit = energy(upper), energy(lower)
    known = torch.isfinite(lower).all(-1)
    slopes = chord_slopes(lower, upper)
    weights = [torch.softmax((lower + upper) / 2, -1), torch.softmax(lower, -1)]
    rows = torch.where(known[:, None, None], torch.stack([*weights, slopes], 1), 0.0)
    row_lower, row_upper = relaxation.rows(rows, method)
    uppers = [gibbs_upper(row_lower[:, place], row) for place, row in enumerate(weights)]
    uppers.append(gibbs_upper(row_center, p_center))
    # NaN in one bound leaves the others: each is a proof of its own.
    joint = torch.stack([torch.where(torch.isfinite(bound), bound, torch.inf) for bound in uppers]).amin(0)
    best_upper = torch.minimum(joint + ROUNDING * (1 + joint.abs()), upper_per_logit)
    joint = chord_lower(row_upper[:, -1], slopes, upper)
    joint = torch.where(torch.isfinite(joint), joint, -torch.inf)
    best_lower = torch.maximum(joint - ROUNDING * (1 + joint.abs()), lower_per_logit)
    known = known & torch.isfinite(best_lower) & torch.isfinite(best_upper) & (best_lower <= best_upper)
    nan = torch.full_like(best_lower, torch.nan)
    return ScoreBounds(
        lower=torch.where(known, best_lower, nan),
        upper=torch.where(known, best_upper, nan),
        lower_per_logit=torch.where(known, lower_per_logit, nan),
        upper_per_logit=torch.where(known, upper_per_logit, nan),
    )
