"""Pairs of bounds, and THE margin for rounding.

Bounds are computed in float64. Each is moved outward by `ROUNDING` of the size of what was summed to get it, and what is
NaN, infinite or crosses its partner is not proved. What the network's evaluation rounds is the business of
`grood_cert.bounds.rounding`.
"""

from __future__ import annotations

import torch
from torch import Tensor

Interval = tuple[Tensor, Tensor]
ROUNDING = 1e-12
STEPS = 16  # roundings of an elementary function and what is around it
_CROSSING = 1e-9


def outward(lower: Tensor, upper: Tensor, magnitude: Tensor) -> Interval:
    """Both ends moved outward by the rounding of sums of this magnitude."""
    return lower - ROUNDING * magnitude, upper + ROUNDING * magnitude


def intersect(first: Interval, second: Interval) -> Interval:
    """What both intervals allow; ends may cross."""
    return torch.maximum(first[0], second[0]), torch.minimum(first[1], second[1])


def ordered(lower: Tensor, upper: Tensor) -> Tensor:
    """Whether all bounds of a sample are finite and in order, shape (B,)."""
    return (torch.isfinite(lower) & torch.isfinite(upper) & (lower <= upper)).flatten(1).all(1)


def crossed(lower: Tensor, upper: Tensor) -> Tensor:
    """Where finite bounds cross by more than rounding explains: what they enclose does not exist."""
    scale = 1 + torch.maximum(lower.abs(), upper.abs())
    return torch.isfinite(lower) & torch.isfinite(upper) & (lower - upper > _CROSSING * scale)
