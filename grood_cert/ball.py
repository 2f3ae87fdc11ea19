r"""The perturbation set: an l_p ball around an image, intersected with the pixel box.

    B = { x' : ||x' - x||_p <= eps,  0 <= x' <= 1 },        p = inf, 2 or 1, eps in pixel units.

Everything that needs the set (the bound engine, the attacks, the Lipschitz estimates) takes it from here, so the
proof and its adversary always speak of the same points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from grood_cert.errors import InputError

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[str, ...] = get_args(Norm)

DEFAULT_EPS: dict[str, tuple[float, ...]] = {
    "linf": (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15),
    "l2": (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5),
    "l1": (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0),
}
ORDER = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}
DUAL_ORDER = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}
_WATER_FILLING_STEPS = 20
_BLOCK = 2**20


def dual_norm(gradient: Tensor, norm: Norm) -> Tensor:
    r"""Per-sample dual norm of a gradient: l_1 for an l_inf ball, l_2 for an l_2 ball, l_inf for an l_1 ball.

    Args:
        gradient: Gradients g, shape (B, ...).
        norm: Norm of the ball, "linf", "l2" or "l1".

    Returns:
        ||g_i||_q with 1/p + 1/q = 1, shape (B,). The derivative at g = 0 is 0, not NaN.

    Example:
        >>> [float(dual_norm(torch.tensor([[3.0, -4.0]]), norm)) for norm in NORMS]
        [7.0, 5.0, 4.0]
    """
    length: Tensor = torch.linalg.vector_norm(gradient.flatten(1), ord=DUAL_ORDER[norm], dim=1)
    return length


def largest_eps(shape: Sequence[int], norm: Norm) -> float:
    """Radius at which the ball around any image contains the whole pixel box: 1, sqrt(d) or d for l_inf, l_2 or l_1.

    Example:
        >>> [largest_eps((1, 2, 2), norm) for norm in NORMS]
        [1.0, 2.0, 4.0]
    """
    return math.pow(math.prod(shape), 1 / ORDER[norm])


def check_eps(eps: Sequence[float], norm: Norm, shape: Sequence[int] | None) -> None:
    """Refuse an eps grid or norm that makes no sense for images of this shape; None: of any shape.

    Raises:
        InputError: Naming what is wrong.

    Example:
        >>> check_eps([2.0], "l2", None)
        >>> check_eps([2.0], "l2", (1, 1, 3))
        Traceback (most recent call last):
            ...
        grood_cert.errors.InputError: eps 2.0: expected a number from 0 to 1.73205 (pixels lie in [0, 1])
    """
    if norm not in NORMS:
        raise InputError(f"unknown norm {norm!r}; use one of {', '.join(NORMS)}")
    limit = largest_eps(shape, norm) if shape is not None else 1.0 if norm == "linf" else math.inf
    for value in eps:
        if not (math.isfinite(value) and 0 <= value <= limit):
            raise InputError(f"eps {value!r}: expected a number from 0 to {limit:g} (pixels lie in [0, 1])")
    if not eps:
        raise InputError("no eps given; add for example --eps 0.01 --eps 0.02")
    for before, after in itertools.pairwise(eps):
        if not before < after:
            raise InputError(f"eps must be ascending and without repetition, got {before!r} before {after!r}")


@dataclass(frozen=True, init=False)
class Ball:
    r"""A batch of balls B_i = {x' : ||x' - x_i||_p <= eps_i} intersected with the box [0, 1]^d.

    Args:
        center: Images x, shape (B, C, H, W), pixels in [0, 1].
        eps: Radius of each ball in pixel units, shape (B,), finite and >= 0; a number is the radius of all.
        norm: "linf", "l2" or "l1".

    Raises:
        InputError: If a radius is negative or not finite, or an image leaves the pixel box.

    Example:
        >>> ball = Ball(torch.tensor([[0.0, 0.5]]), 0.1, "linf")
        >>> ball.lower, ball.upper
        (tensor([[0.0000, 0.4000]]), tensor([[0.1000, 0.6000]]))
    """

    center: Tensor
    eps: Tensor
    norm: Norm

    def __init__(self, center: Tensor, eps: Tensor | float, norm: Norm) -> None:
        if not isinstance(eps, Tensor):
            eps = center.new_full(center.shape[:1], eps)
        for name, value in (("center", center), ("eps", eps), ("norm", norm)):
            object.__setattr__(self, name, value)
        if self.norm not in NORMS:
            raise InputError(f"unknown norm {self.norm!r}; use one of {', '.join(NORMS)}")
        if self.eps.shape != self.center.shape[:1]:
            raise InputError(
                f"expected one eps a sample, shape {tuple(self.center.shape[:1])}, got {tuple(self.eps.shape)}"
            )
        if not bool((torch.isfinite(self.eps) & (self.eps >= 0)).all()):
            raise InputError("eps must be finite and not negative")
        ends = self.center.detach().aminmax() if self.center.numel() else None
        if ends and not bool((ends.min >= 0) & (ends.max <= 1)):  # NaN is neither
            raise InputError("images must have pixels in [0, 1]; normalisation is a layer of the model")

    def per_pixel(self, value: Tensor) -> Tensor:
        """One value a sample, shape (B,), shaped to multiply images, (B, 1, 1, 1)."""
        return value.reshape(-1, *[1] * (self.center.dim() - 1))

    @property
    def lower(self) -> Tensor:
        """Smallest value of every pixel over the ball: max(x - eps, 0)."""
        return (self.center - self.per_pixel(self.eps)).clamp(min=0)

    @property
    def upper(self) -> Tensor:
        """Largest value of every pixel over the ball: min(x + eps, 1)."""
        return (self.center + self.per_pixel(self.eps)).clamp(max=1)

    def project(self, points: Tensor) -> Tensor:
        r"""A point of the ball near each given point (for l_inf the nearest).

        For l_2 and l_1 the point is clipped to the box and then pulled towards x along the segment, which stays in the
        box, until it is in the ball.
        """
        if self.norm == "linf":
            return torch.maximum(torch.minimum(points, self.upper), self.lower)
        points = points.clamp(0, 1)
        length = self.distance(points).clamp(min=torch.finfo(points.dtype).tiny)
        return (self.center + (points - self.center) * self.per_pixel((self.eps / length).clamp(max=1))).clamp(0, 1)

    def distance(self, points: Tensor) -> Tensor:
        """||x' - x||_p of each point, shape (B,)."""
        length: Tensor = torch.linalg.vector_norm((points - self.center).flatten(1), ord=ORDER[self.norm], dim=1)
        return length

    def support(self, rows: Tensor) -> Tensor:
        r"""Upper bound of max over x' in B of a . (x' - x); exact for l_inf and l_1, up to rounding for l_2 as a rule.

        Args:
            rows: Coefficients a, shape (B, S, d) with d the number of pixels.

        Returns:
            Shape (B, S). See `support`.

        Example:
            >>> ball = Ball(torch.tensor([[0.0, 0.5]]), torch.tensor([0.1]), "l2")
            >>> ball.support(torch.tensor([[[-3.0, 4.0]]]))
            tensor([[0.4000]])
        """
        low = (self.lower - self.center).flatten(1).unsqueeze(1)
        high = (self.upper - self.center).flatten(1).unsqueeze(1)
        return support(rows, low, high, self.eps, self.norm)

    def maximiser(self, rows: Tensor) -> Tensor:
        r"""Where a . x' is largest, up to rounding: x plus the derivative of `support`.

        Args:
            rows: Coefficients a, shape (B, S, d).

        Returns:
            Shape (B, S, d); pixels with a = 0 stay, but for l_1.

        Example:
            >>> ball = Ball(torch.tensor([[0.0, 0.5]]), torch.tensor([0.1]), "linf")
            >>> ball.maximiser(torch.tensor([[[-3.0, 4.0]]]))
            tensor([[[0.0000, 0.6000]]])
        """
        center = self.center.flatten(1).unsqueeze(1)
        if self.norm == "linf":
            lower, upper = self.lower.flatten(1).unsqueeze(1), self.upper.flatten(1).unsqueeze(1)
            return torch.where(rows > 0, upper, torch.where(rows < 0, lower, center))
        rows = rows.detach().requires_grad_(True)
        with torch.enable_grad():
            (step,) = torch.autograd.grad(self.support(rows).sum(), rows)
        return center + step


def support(rows: Tensor, low: Tensor, high: Tensor, eps: Tensor, norm: Norm) -> Tensor:
    r"""Upper bound of max a . d over ||d||_p <= eps, low <= d <= high.

    * l_inf: low and high say it all; each coordinate takes the better end.
    * l_1: moving pixel j towards the side where a_j gains costs 1 and gains |a_j| a unit, up to the wall: a fractional
      knapsack, solved exactly by spending eps on the steepest pixels first.
    * l_2: weak duality with multiplier mu > 0 gives

          max a.d <= sum_i max_{low_i <= d_i <= high_i} (a_i d_i - mu d_i^2 / 2) + mu eps^2 / 2,

      whatever mu is. mu = ||a|| / eps (with no box active, the dual-norm value eps ||a||_2) is refined by water
      filling: clipped coordinates are taken out of the budget and mu is recomputed for the rest, until nothing changes.
      The smallest value found is returned, so the bound is never looser than eps ||a||_2 or than the box alone.

    Rows are taken in blocks, so memory stays a small multiple of the rows.

    Args:
        rows: Coefficients a, shape (B, S, d).
        low: Lower ends of the box, at most 0, shape (B, 1, d); for l_inf the ball's own.
        high: Upper ends, at least 0, shape (B, 1, d).
        eps: Radii, shape (B,).
        norm: Norm of the ball.

    Returns:
        Shape (B, S).
    """
    if norm == "linf":
        return _box_support(rows, low, high)
    size = max(1, _BLOCK // max(1, rows[:, :1].numel()))
    block = _l2_block if norm == "l2" else _l1_block
    return torch.cat([block(part, low, high, eps.unsqueeze(1)) for part in torch.split(rows, size, 1)], 1)


def _box_support(rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (rows.clamp(min=0) @ high.mT + rows.clamp(max=0) @ low.mT).squeeze(-1)


def _l1_block(rows: Tensor, low: Tensor, high: Tensor, eps: Tensor) -> Tensor:
    gain, order = rows.abs().sort(dim=-1, descending=True)
    room = torch.where(rows > 0, high, -low).gather(-1, order)
    before = room.cumsum(-1) - room
    spent = torch.minimum((eps.unsqueeze(-1) - before).clamp(min=0), room)
    return (gain * spent).sum(-1)


def _l2_block(rows: Tensor, low: Tensor, high: Tensor, eps: Tensor) -> Tensor:
    largest = rows.detach().abs().amax(-1)  # taken out, so that no square under- or overflows
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    rows = rows / scale.unsqueeze(-1)
    length = torch.linalg.vector_norm(rows, dim=-1)
    best = torch.minimum(_box_support(rows, low, high), eps * length)
    with torch.no_grad():
        tolerance = 1 + 8 * torch.finfo(rows.dtype).eps
        step = eps / length  # 1 / mu, shape (B, S)
        for _ in range(_WATER_FILLING_STEPS):
            wanted = rows * step.unsqueeze(-1)
            clipped = (wanted < low) | (wanted > high)
            offset = torch.minimum(torch.maximum(wanted, low), high).masked_fill_(~clipped, 0)
            budget = (eps.square() - offset.square().sum(-1)).clamp_(min=0)
            energy = rows.masked_fill(clipped, 0).square().sum(-1)
            wider = (budget / energy).sqrt_()
            wider = torch.where(torch.isfinite(wider) & (wider > step * tolerance), wider, step)
            if torch.equal(wider, step):
                break
            step = wider
        offset = torch.minimum(torch.maximum(rows * step.unsqueeze(-1), low), high)
    # At fixed mu the derivative of the bound is its maximiser, so the offset counts as constant.
    value = (rows * offset).sum(-1) + (eps.square() - offset.square().sum(-1)) / (2 * step)
    return torch.minimum(best, torch.where(torch.isfinite(value), value, best)) * scale
