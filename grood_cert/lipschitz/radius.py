r"""Certified radii from local Lipschitz bounds, m = |gamma - S(x)|.

ID:  S(x) <= gamma, and S(x') <= S(x) + L(eps) ||x' - x|| <= gamma for all ||x' - x|| <= r if L(eps) r <= m, r <= eps.
OOD: S(x) > gamma, and S(x') > gamma for all ||x' - x|| <= r if L(eps) r < m, r <= eps: strict, as equality means ID.

Here every decision is strict on both sides and uses L moved up by 1e-12, so a returned radius is proved under either
tie rule. L may be the bound of S itself, or for ID the bound of p0 . f (see `jacobian_crown`). A sample on the wrong
side has radius 0, and so has one with m, L NaN or infinite: a radius was proved or is 0.

*Path integral.* Along the segment to x' the point at distance t sees slopes at most L(t) <= L(t_i) for t <= t_i, so

    |S(x') - S(x)| <= integral_0^r L(t) dt <= sum_i L(t_i) (t_i - t_{i-1}),

and r is where the sum reaches m. It uses every bound of the grid, so it is never below the fixed point on that grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grood_cert.errors import InputError
from grood_cert.interval import ROUNDING
from grood_cert.lipschitz.bound import running_minimum

_DOWN = 1 - ROUNDING


def margins(score: Tensor, gamma: float, accepted: bool) -> Tensor:
    r"""Distance to the threshold: gamma - S(x) for ID (`accepted`), S(x) - gamma for OOD; 0 on the wrong side.

    Example:
        >>> margins(torch.tensor([-3.0, 1.0]), 0.0, accepted=True)
        tensor([3., 0.])
    """
    return (gamma - score if accepted else score - gamma).clamp(min=0)


def proved_radius(eps: Tensor, bound: Tensor, margin: Tensor) -> Tensor:
    r"""min(eps, m / L(eps)), rounded down; 0 where L or m is not finite or m = 0.

    Args:
        eps: Radius of the ball the bound was proved for.
        bound: L(eps).
        margin: m.

    Returns:
        The radius, same shape.

    Example:
        >>> proved_radius(torch.tensor([0.1, 0.1]), torch.tensor([5.0, torch.nan]), torch.tensor([0.2, 1.0]))
        tensor([0.0400, 0.0000])
    """
    ratio = torch.where(bound > 0, margin / bound, torch.full_like(bound, torch.inf)) * _DOWN
    usable = torch.isfinite(bound) & (bound >= 0) & torch.isfinite(margin) & (margin > 0)
    return torch.where(usable, torch.minimum(eps, ratio), torch.zeros_like(ratio))


def fixed_point_radius(
    bound: Callable[[Tensor], Tensor], margin: Tensor, largest: float, rounds: int = 12, smallest: float = 1e-4
) -> Tensor:
    r"""Largest proved radius found by bisection towards the root of eps L(eps) = m.

    Every tested eps gives min(eps, m / L(eps)), a radius proved on its own; the largest is kept. Monotonicity of the
    bound is not needed for that, it only steers the search.

    Args:
        bound: Answers L for a vector of radii, shape (B,) to (B,).
        margin: m, shape (B,).
        largest: Largest radius of interest.
        rounds: Bounds to compute.
        smallest: Where the geometric bisection starts from below, as a share of `largest`.

    Returns:
        Shape (B,).

    Raises:
        InputError: If there is no round, or `largest` is not positive.

    Example:
        >>> radius = fixed_point_radius(lambda eps: 1 + eps, torch.tensor([0.75]).double(), 10.0, 40)  # e (1 + e) = 3/4
        >>> torch.round(radius, decimals=3)
        tensor([0.5000], dtype=torch.float64)
    """
    if rounds < 1 or not largest > 0:
        raise InputError(f"expected at least one round and a positive largest radius, got {rounds} and {largest}")
    low = torch.full_like(margin, largest * smallest)
    high = torch.full_like(margin, largest)
    best = torch.zeros_like(margin)
    eps = high
    for _ in range(rounds):
        value = bound(eps)
        best = torch.maximum(best, proved_radius(eps, value, margin))
        small = eps * value < margin
        low, high = torch.where(small, eps, low), torch.where(small, high, eps)
        low = torch.minimum(torch.maximum(low, best), high)
        if bool((low >= 0.999 * high).all()):
            break
        eps = (low * high).sqrt()
    return best


def path_radius(eps: Tensor, bounds: Tensor, margin: Tensor) -> Tensor:
    r"""Radius where the path integral of the bounds reaches m; formula and proof above.

    Args:
        eps: Increasing radii t_1 < t_2 < ..., positive, shape (E,) or (B, E).
        bounds: L(t_i), shape (B, E); NaN counts as infinite.
        margin: m, shape (B,).

    Returns:
        Shape (B,), at most the last t.

    Raises:
        InputError: If the radii do not increase from above 0.

    Example:
        >>> grid = torch.tensor([1.0, 2.0, 3.0])
        >>> path_radius(grid, torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([5.0]))  # 1 + 2 + 4 * 0.5
        tensor([2.5000])
    """
    eps = eps.expand_as(bounds)
    steps = torch.diff(eps, dim=-1, prepend=torch.zeros_like(eps[..., :1]))
    if not bool((steps > 0).all()):
        raise InputError("the radii of a path integral must increase from above 0")
    slopes = running_minimum(bounds)
    spent = torch.zeros_like(margin)
    radius = torch.zeros_like(margin)
    going = torch.isfinite(margin) & (margin > 0)
    for i in range(bounds.shape[-1]):
        step = proved_radius(steps[..., i], slopes[..., i], margin * _DOWN - spent)
        radius = torch.where(going, radius + step, radius)
        spent = spent + slopes[..., i] * steps[..., i]
        going = going & (step >= steps[..., i])
    return radius * _DOWN
