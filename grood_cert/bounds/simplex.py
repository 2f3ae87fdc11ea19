r"""Where the softmax weights p can be while the logits move, and linear functions over that set.

    P = { p : pl <= p <= pu,  sum p = 1 },        pl_k = 1 / (1 + sum_{j != k} exp(UB[z_j - z_k])),

pu_k the same with lower bounds of the differences. p_k = 1 / sum_j exp(z_j - z_k) falls in every difference, so
both hold for all x' in the ball. No sum-minus-term is formed: nothing cancels, and large logits saturate instead of
overflowing to NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grood_cert.interval import ROUNDING, Interval


@dataclass(frozen=True)
class SoftmaxWeights:
    """A set P of softmax weights for each sample: a box intersected with the simplex.

    Attributes:
        lower: pl, shape (B, K), sum <= 1 up to rounding.
        upper: pu, shape (B, K), sum >= 1 up to rounding.
    """

    lower: Tensor
    upper: Tensor

    @classmethod
    def fixed(cls, weights: Tensor) -> SoftmaxWeights:
        """The single point p."""
        return cls(weights, weights)

    def maximum(self, rows: Tensor) -> Tensor:
        r"""Max over p in P of a . p, exactly, by the fractional knapsack.

        Start at pl; the budget 1 - sum pl goes to the entries with the largest a_k first, each up to pu_k. An
        exchange argument shows that no other distribution is better. A remainder left by rounding goes to the
        largest a_k.

        Args:
            rows: a, shape (B, R, K).

        Returns:
            Shape (B, R).

        Example:
            >>> box = SoftmaxWeights(torch.tensor([[0.1, 0.2, 0.0]]), torch.tensor([[0.9, 0.5, 0.1]]))
            >>> box.maximum(torch.tensor([[[1.0, 3.0, 2.0]]]))  # p = (.4, .5, .1)
            tensor([[2.1000]])
        """
        lower, gap = self.lower.unsqueeze(1), (self.upper - self.lower).unsqueeze(1)
        base = rows @ self.lower.unsqueeze(-1)
        if bool((gap == 0).all()):
            return base.squeeze(-1)
        sorted_rows, order = rows.sort(dim=-1, descending=True)
        gap = gap.expand_as(rows).gather(-1, order)
        budget = (1 - lower.sum(-1, keepdim=True)).clamp(min=0)
        spent = torch.minimum((budget - (gap.cumsum(-1) - gap)).clamp(min=0), gap)
        remainder = budget.squeeze(-1) - spent.sum(-1)
        return base.squeeze(-1) + (sorted_rows * spent).sum(-1) + sorted_rows[..., 0] * remainder


def difference_rows(classes: int) -> Tensor:
    r"""Rows e_j - e_k for all j < k, shape (K (K - 1) / 2, K), float64.

    Example:
        >>> difference_rows(3).tolist()
        [[1.0, -1.0, 0.0], [1.0, 0.0, -1.0], [0.0, 1.0, -1.0]]
    """
    first, second = torch.triu_indices(classes, classes, 1)
    identity = torch.eye(classes, dtype=torch.float64)
    return identity[first] - identity[second]


def gaps(lower: Tensor, upper: Tensor, differences: Interval | None = None) -> Interval:
    """Bounds of z_j - z_k, shape (B, K, K), from what `softmax_weights` takes."""
    classes = lower.shape[1]
    low = lower.unsqueeze(2) - upper.unsqueeze(1)
    high = upper.unsqueeze(2) - lower.unsqueeze(1)
    if differences is not None:
        first, second = torch.triu_indices(classes, classes, 1, device=lower.device)
        low[:, first, second] = torch.maximum(low[:, first, second], differences[0])
        low[:, second, first] = torch.maximum(low[:, second, first], -differences[1])
        high[:, first, second] = torch.minimum(high[:, first, second], differences[1])
        high[:, second, first] = torch.minimum(high[:, second, first], -differences[0])
    itself = torch.eye(classes, dtype=torch.bool, device=lower.device)
    return low.masked_fill(itself, 0.0), high.masked_fill(itself, 0.0)


def softmax_weights(lower: Tensor, upper: Tensor, differences: Interval | None = None) -> SoftmaxWeights:
    r"""P from bounds of the logits and, where known, of their differences.

    Args:
        lower: Lower bounds of the logits, shape (B, K).
        upper: Upper bounds.
        differences: Bounds of z_j - z_k for the rows of `difference_rows(K)`, shape (B, K (K - 1) / 2) each.

    Returns:
        The set, widened by 1e-12 relative.

    Example:
        >>> box = softmax_weights(torch.zeros(1, 2).double(), torch.zeros(1, 2).double())
        >>> bool(((box.lower < 0.5) & (box.upper > 0.5)).all())
        True
    """
    return weights_of_gaps(*gaps(lower, upper, differences))


def weights_of_gaps(low: Tensor, high: Tensor) -> SoftmaxWeights:
    """P from bounds of z_j - z_k, shape (B, K, K) each, widened by 1e-12 relative."""
    weights_lower, weights_upper = 1 / high.exp().sum(1), 1 / low.exp().sum(1)
    tiny = torch.finfo(low.dtype).tiny  # below it, a relative margin is none
    low_end = (weights_lower * (1 - ROUNDING) - tiny).clamp(min=0)
    return SoftmaxWeights(low_end, (weights_upper * (1 + ROUNDING) + tiny).clamp(max=1 + ROUNDING))
