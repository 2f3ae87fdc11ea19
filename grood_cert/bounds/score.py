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
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from grood_cert.ball import Ball
from grood_cert.bounds.auto_lirpa import Method
from grood_cert.scores import energy

Side = Literal["upper", "lower", "both"]
_ROUNDING = 1e-12
_CROSSING = 1e-9


class Relaxation(Protocol):
    """Bounds of rows of the logits over one batch of balls."""

    def rows(self, coefficients: Tensor, method: Method | None = None) -> tuple[Tensor, Tensor]:
        """LB[c] and UB[c], shape (B, S) each, of every row c of `coefficients`, shape (B, S, K); NaN: not proved."""
        ...

    def preactivations(self) -> list[tuple[Tensor, Tensor]]:
        """Bounds of the input of every nonlinear layer, in execution order."""
        ...


class Bounded(Protocol):
    """A network inside a bound engine: `lirpa.BoundedNetwork` or `native.engine.NativeNetwork`."""

    @property
    def method(self) -> Method:
        """How it relaxes the network."""
        ...

    @property
    def network(self) -> nn.Module:
        """The network f, in eval mode and float64."""
        ...

    def relax(self, ball: Ball) -> Relaxation:
        """Prepare bounds over a batch of balls."""
        ...


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


def _ordered(lower: Tensor, upper: Tensor) -> Tensor:
    """Where both bounds are finite and cross by no more than rounding explains."""
    scale = 1 + torch.maximum(lower.abs(), upper.abs())
    return torch.isfinite(lower) & torch.isfinite(upper) & (lower - upper <= _CROSSING * scale)


def _outward(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Widen by the rounding margin; NaN where the pair is no interval."""
    low, high = torch.minimum(lower, upper), torch.maximum(lower, upper)
    margin = _ROUNDING * (1 + torch.maximum(low.abs(), high.abs()))
    ordered, nan = _ordered(lower, upper), torch.full_like(lower, torch.nan)
    return torch.where(ordered, low - margin, nan), torch.where(ordered, high + margin, nan)


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
    return torch.exp(upper - upper.amax(-1, keepdim=True)) * share * (1 - _ROUNDING)


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
    value = value + _ROUNDING * (1 + products.abs().sum(-1) + row_upper.abs())
    return -(largest + torch.where(value > 0, value, torch.full_like(value, torch.inf)).log())


def score_bounds(bounded: Bounded, ball: Ball, method: Method | None = None, side: Side = "both") -> ScoreBounds:
    r"""Bound S over each ball of a batch.

    Per-logit intervals and the first Gibbs row come from one call of the engine, the second Gibbs row and the chord
    row from another; both share the intermediate bounds. With alpha-CROWN the decisive rows are optimised on top.

    Args:
        bounded: The network inside its bound engine.
        ball: Batch of balls.
        method: Method for these bounds if it differs from the engine's own.
        side: Which bound is wanted. The other one is then the bound of each logit alone, which costs nothing more.

    Returns:
        Bounds, NaN where the engine's answer is NaN, infinite or crossed.
    """
    relaxation = bounded.relax(ball)
    method = method or bounded.method
    plain: Method = "crown" if method == "alpha-crown" else method
    with torch.no_grad():
        logits = bounded.network(ball.center)
    p_center = torch.softmax(logits, -1)
    identity = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device).expand(len(logits), -1, -1)
    first = identity if side == "lower" else torch.cat([identity, p_center.unsqueeze(1)], 1)
    row_lower, row_upper = relaxation.rows(first, plain)
    row_center = row_lower[:, -1]
    lower, upper = _outward(row_lower[:, : logits.shape[1]], row_upper[:, : logits.shape[1]])
    lower_per_logit, upper_per_logit = energy(upper), energy(lower)
    known = torch.isfinite(lower).all(-1)
    slopes = chord_slopes(lower, upper)

    def bounds_of(weights: list[Tensor], method: Method) -> tuple[list[Tensor], list[Tensor]]:
        """U1 with each of these weights and L1, as far as they are wanted, from one call."""
        gibbs = [] if side == "lower" else weights
        chords = [] if side == "upper" else [slopes]
        rows = torch.where(known[:, None, None], torch.stack([*gibbs, *chords], 1), 0.0)
        row_lower, row_upper = relaxation.rows(rows, method)
        return (
            [gibbs_upper(row_lower[:, place], row) for place, row in enumerate(gibbs)],
            [chord_lower(row_upper[:, -1], slopes, upper) for slopes in chords],
        )

    uppers, lowers = bounds_of([torch.softmax((lower + upper) / 2, -1), torch.softmax(lower, -1)], plain)
    if side != "lower":
        uppers.append(gibbs_upper(row_center, p_center))
    if method == "alpha-crown":
        optimised = bounds_of([p_center], method)
        uppers, lowers = uppers + optimised[0], lowers + optimised[1]
    # NaN in one bound leaves the others: each is a proof of its own.
    best_upper, best_lower = upper_per_logit, lower_per_logit
    if uppers:
        joint = torch.stack([torch.where(torch.isfinite(bound), bound, torch.inf) for bound in uppers]).amin(0)
        best_upper = torch.minimum(joint + _ROUNDING * (1 + joint.abs()), upper_per_logit)
    if lowers:
        joint = torch.stack([torch.where(torch.isfinite(bound), bound, -torch.inf) for bound in lowers]).amax(0)
        best_lower = torch.maximum(joint - _ROUNDING * (1 + joint.abs()), lower_per_logit)
    known = known & torch.isfinite(best_lower) & torch.isfinite(best_upper) & (best_lower <= best_upper)
    nan = torch.full_like(best_lower, torch.nan)
    return ScoreBounds(
        lower=torch.where(known, best_lower, nan),
        upper=torch.where(known, best_upper, nan),
        lower_per_logit=torch.where(known, lower_per_logit, nan),
        upper_per_logit=torch.where(known, upper_per_logit, nan),
    )
