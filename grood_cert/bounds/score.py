r"""Sound bounds of a score over a ball, from linear bounds of the logits.

Let l_k <= f_k <= u_k on the ball B, and let LB[c] <= c . f <= UB[c] on B for a row c. With H the Shannon entropy, the
energy with T = 1 obeys

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

*Other scores.*

* Energy(T) is T S_1 of f / T: the same rows, intervals divided by T, results times T.
* MaxLogit, the limit T = 0: S <= -LB[p], so S <= -max_k l_k, and S >= -max_k u_k; p lies near the largest of f(x) and of
  (l + u) / 2, spread over logits within the width of the intervals.
* MSP: softmax(f / T)_k = 1 / (1 + e^Q_k), Q_k = LSE of (f_j - f_k) / T over j != k. S <= -softmax(f / T)_k with k the
  largest logit at x and Q_k bounded from above by L1 (rows e_j - e_k for the intervals, then a chord row), and by each
  logit alone: Q_k <= LSE(u_j) - l_k, whatever k. S >= -max over k of 1 / (1 + e^LB) with Q_k bounded from below by U1,
  one row (p - e_k) / T a class, or LSE(l_j) - u_k; only classes with u_k >= max_j l_j can be the largest.

The best of the joint and per-logit bounds is returned, so a joint bound is never looser than a per-logit one.

Bounds are computed in float64 and moved outward by 1e-12 of the logits' scale for their own rounding, and by what an
evaluation of S may be off (`rounding`). Whatever is NaN, infinite or crossed comes out as NaN: not proved.

References:
    Wei et al., "Convex Bounds on the Softmax Function", AISTATS 2023 (the chord); Zhang et al., NeurIPS 2018 (CROWN).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.bounds.engine import BoundedNetwork, Method, Relaxation
from grood_cert.bounds.reduction import Head, possible_winners, reduction
from grood_cert.bounds.rounding import largest_of, of_score
from grood_cert.errors import InputError
from grood_cert.interval import ROUNDING, Interval, crossed, intersect
from grood_cert.scores import ENERGY, MSP, Energy, MaxLogit, Score, energy


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


def gibbs_upper(row_lower: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    r"""U1: -(LB[p] + T H(p)).

    Args:
        row_lower: LB[p], shape (...).
        weights: p, a point of the simplex, shape (..., K).
        temperature: T; 0 leaves the entropy out.

    Returns:
        Shape (...).

    Example:
        >>> z = torch.tensor([1.0, 2.0])  # exact where p = softmax(z)
        >>> p = torch.softmax(z, -1)
        >>> torch.isclose(gibbs_upper(p @ z, p), energy(z))
        tensor(True)
    """
    return -(row_lower - temperature * torch.xlogy(weights, weights).sum(-1))


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


@dataclass(frozen=True)
class _Found:
    """Bounds of a score before they are put in order, shape (B,) each: of each logit alone, and joint ones."""

    lower_per_logit: Tensor
    upper_per_logit: Tensor
    lower_joint: list[Tensor]
    upper_joint: list[Tensor]


class _Logits:
    """The logits at x and their intervals over a batch of balls, and rows of them.

    Args:
        relaxation: Bounds of rows over the balls.
        method: Method if it differs from the engine's own.
        center: f(x), shape (B, K).
        weights: p, shape (B, K): a row to be bounded beside the intervals, if any.
    """

    def __init__(
        self, relaxation: Relaxation, method: Method | None, center: Tensor, weights: Tensor | None = None
    ) -> None:
        self._relaxation, self._method, self.center = relaxation, method, center
        classes = center.shape[1]
        identity = torch.eye(classes, dtype=center.dtype, device=center.device).expand(len(center), -1, -1)
        rows = identity if weights is None else torch.cat([identity, weights.unsqueeze(1)], 1)
        lower, upper = relaxation.rows(rows, method)
        self.row_lower = lower[:, classes:]
        self.lower, self.upper = _repaired(lower[:, :classes], upper[:, :classes])
        self.known = torch.isfinite(self.lower).all(-1)

    def rows(self, *rows: Tensor) -> Interval:
        """LB and UB of rows, shape (B, S, K) or (B, K) each; of 0 where the intervals are not known."""
        stacked = torch.cat([row.unsqueeze(1) if row.dim() == 2 else row for row in rows], 1)
        return self._relaxation.rows(torch.where(self.known[:, None, None], stacked, 0.0), self._method)


def _energy_bounds(
    relaxation: Relaxation, method: Method | None, center: Tensor, temperature: float
) -> tuple[_Logits, _Found]:
    p_center = torch.softmax(center / temperature, -1)
    logits = _Logits(relaxation, method, center, p_center)
    lower, upper = logits.lower / temperature, logits.upper / temperature
    slopes = chord_slopes(lower, upper)
    weights = [torch.softmax((lower + upper) / 2, -1), torch.softmax(lower, -1)]
    row_lower, row_upper = logits.rows(*weights, slopes)
    uppers = [gibbs_upper(row_lower[:, place], row, temperature) for place, row in enumerate(weights)]
    uppers.append(gibbs_upper(logits.row_lower[:, 0], p_center, temperature))
    joint = temperature * chord_lower(row_upper[:, -1] / temperature, slopes, upper)
    return logits, _Found(energy(logits.upper, temperature), energy(logits.lower, temperature), [joint], uppers)


def _max_logit_bounds(relaxation: Relaxation, method: Method | None, center: Tensor) -> tuple[_Logits, _Found]:
    logits = _Logits(relaxation, method, center)
    width = ((logits.upper - logits.lower).mean(1, keepdim=True) / 2).clamp(min=torch.finfo(center.dtype).tiny)
    weights = [torch.softmax(value / width, -1) for value in (center, (logits.lower + logits.upper) / 2)]
    row_lower, _ = logits.rows(*weights)
    return logits, _Found(-logits.upper.amax(1), -logits.lower.amax(1), [], [-row_lower[:, 0], -row_lower[:, 1]])


def _log_sum_of_others(values: Tensor) -> Tensor:
    """LSE of all entries but one, for each of them; shape (B, K), -inf where there is no other."""
    nothing = torch.full_like(values[:, :1], -torch.inf)
    before = torch.cat([nothing, values.logcumsumexp(1)[:, :-1]], 1)
    after = torch.cat([values.flip(1).logcumsumexp(1).flip(1)[:, 1:], nothing], 1)
    return torch.logaddexp(before, after)


def _msp_bounds(
    relaxation: Relaxation, method: Method | None, center: Tensor, temperature: float
) -> tuple[_Logits, _Found]:
    logits, classes = _Logits(relaxation, method, center), center.shape[1]
    if classes == 1:
        always = torch.where(logits.known, -1.0, torch.full_like(center[:, 0], torch.nan))
        return logits, _Found(always, always, [], [])
    upper, lower = (reduction(MSP(temperature), side).outer for side in ("upper", "lower"))
    low, high = logits.lower / temperature, logits.upper / temperature
    winners = possible_winners(logits.lower, logits.upper)
    alone = high - _log_sum_of_others(low)  # -Q_k from above, each logit alone
    # the classes that need a case, as many for each sample; the others only fill up
    index = torch.where(winners, high, -torch.inf).topk(int(winners.sum(1).max()), 1).indices
    wanted, own = winners.gather(1, index), index.unsqueeze(2)
    weights = [
        value.unsqueeze(1).expand(-1, index.shape[1], -1).scatter(2, own, -torch.inf).softmax(2)
        for value in (center / temperature, (low + high) / 2)
    ]
    head = Head("others", temperature, center.argmax(1))
    units = torch.eye(classes - 1, dtype=center.dtype, device=center.device).expand(len(center), -1, -1)
    cases = [row.scatter_add(2, own, -torch.ones_like(own, dtype=row.dtype)) for row in weights]
    row_lower, row_upper = logits.rows(head.rows(units, classes), *cases)
    apart = head.interval(logits.lower, logits.upper)
    apart = intersect(apart, _repaired(row_lower[:, : classes - 1], row_upper[:, : classes - 1]))
    slopes = chord_slopes(*apart)
    chord = -chord_lower(
        logits.rows(head.rows(torch.nan_to_num(slopes).unsqueeze(1), classes))[1][:, 0], slopes, apart[1]
    )
    bounds = [
        gibbs_upper(part / temperature, row)
        for part, row in zip(row_lower[:, classes - 1 :].chunk(2, 1), weights, strict=True)
    ]
    bounds = [torch.where(torch.isfinite(bound), bound, torch.inf) for bound in bounds]
    joint = torch.minimum(torch.minimum(*bounds), alone.gather(1, index))
    return logits, _Found(
        -lower(torch.where(winners, alone, -torch.inf).amax(1)),
        upper((_log_sum_of_others(high) - low).amin(1)),
        [-lower(torch.where(wanted, joint, -torch.inf).amax(1))],
        [upper(chord), upper(-energy(apart[1]))],
    )


def score_bounds(
    bounded: BoundedNetwork,
    ball: Ball,
    method: Method | None = None,
    score: Score = ENERGY,
    relaxation: Relaxation | None = None,
) -> ScoreBounds:
    r"""Bound S over each ball of a batch.

    Per-logit intervals come from one call of the engine, rows that need them from another; all calls share the bounds
    of the hidden layers.

    Args:
        bounded: The network inside its bound engine.
        ball: Batch of balls.
        method: Method for these bounds if it differs from the engine's own.
        score: S.
        relaxation: The engine's of these balls, if there is one already.

    Returns:
        Bounds, NaN where the engine's answer is NaN, infinite or crossed.

    Raises:
        InputError: If there are no bounds of such a score.
    """
    relaxation = bounded.relax(ball) if relaxation is None else relaxation
    with torch.no_grad():
        center = bounded.network(ball.center)
    match score:
        case Energy(temperature):
            logits, found = _energy_bounds(relaxation, method, center, temperature)
        case MaxLogit():
            logits, found = _max_logit_bounds(relaxation, method, center)
        case MSP(temperature):
            logits, found = _msp_bounds(relaxation, method, center, temperature)
        case _:
            raise InputError(f"there are no bounds of the score {score}")
    # NaN in one bound leaves the others: each is a proof of its own.
    best_upper, best_lower = found.upper_per_logit, found.lower_per_logit
    for joint in found.upper_joint:
        joint = torch.where(torch.isfinite(joint), joint, torch.inf)
        best_upper = torch.minimum(joint + ROUNDING * (1 + joint.abs()), best_upper)
    for joint in found.lower_joint:
        joint = torch.where(torch.isfinite(joint), joint, -torch.inf)
        best_lower = torch.maximum(joint - ROUNDING * (1 + joint.abs()), best_lower)
    largest = largest_of(logits.lower, logits.upper)
    best_upper, upper_per_logit = (
        bound + of_score(score, bounded.graph, bound, largest) for bound in (best_upper, found.upper_per_logit)
    )
    best_lower, lower_per_logit = (
        bound - of_score(score, bounded.graph, bound, largest) for bound in (best_lower, found.lower_per_logit)
    )
    known = logits.known & torch.isfinite(best_lower) & torch.isfinite(best_upper) & (best_lower <= best_upper)
    nan = torch.full_like(best_lower, torch.nan)
    return ScoreBounds(
        lower=torch.where(known, best_lower, nan),
        upper=torch.where(known, best_upper, nan),
        lower_per_logit=torch.where(known, lower_per_logit, nan),
        upper_per_logit=torch.where(known, upper_per_logit, nan),
    )
