r"""The l_1 ball, and the dual norm of a gradient for all three norms: linf <-> l1, l2 <-> l2, l1 <-> linf."""

from __future__ import annotations

import torch
from torch import Tensor

from grood_cert.ball import Ball

_DUAL_ORDER = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}


def gradient_norm(gradient: Tensor, norm: str) -> Tensor:
    r"""||g_i||_q in the dual of the ball's norm.

    Args:
        gradient: Shape (B, ...).
        norm: Norm of the ball, "linf", "l2" or "l1".

    Returns:
        Shape (B,); the derivative at g = 0 is 0, not NaN.

    Example:
        >>> gradient_norm(torch.tensor([[3.0, -4.0]]), "l1")
        tensor([4.])
    """
    length: Tensor = torch.linalg.vector_norm(gradient.flatten(1), ord=_DUAL_ORDER[norm], dim=1)
    return length


class L1Ball(Ball):
    r"""A batch of balls {x' : ||x' - x_i||_1 <= eps_i} intersected with the box [0, 1]^d.

    Args:
        center: Images x, shape (B, C, H, W), pixels in [0, 1].
        eps: Radius of each ball, shape (B,).

    Example:
        >>> ball = L1Ball(torch.tensor([[0.0, 0.5]]), torch.tensor([0.3]))
        >>> ball.support(torch.tensor([[[-3.0, 4.0]], [[5.0, 4.0]]])[:1])
        tensor([[1.2000]])
    """

    def __init__(self, center: Tensor, eps: Tensor) -> None:
        Ball(center, eps, "linf")  # checks both
        object.__setattr__(self, "center", center)
        object.__setattr__(self, "eps", eps)
        object.__setattr__(self, "norm", "l1")

    def distance(self, points: Tensor) -> Tensor:
        """||x' - x||_1, shape (B,)."""
        length: Tensor = torch.linalg.vector_norm((points - self.center).flatten(1), ord=1, dim=1)
        return length

    def project(self, points: Tensor) -> Tensor:
        """A point of the ball near each given point: clipped to the box, then pulled towards x along the segment."""
        offset = points.clamp(0, 1) - self.center
        length = torch.linalg.vector_norm(offset.flatten(1), ord=1, dim=1).clamp(min=torch.finfo(points.dtype).tiny)
        return self.center + offset * self.per_pixel((self.eps / length).clamp(max=1))

    def support(self, rows: Tensor) -> Tensor:
        r"""Max over x' in B of a . (x' - x), exactly: the budget eps is spent on the steepest pixels first.

        Moving pixel j towards the side where a_j gains costs 1 and gains |a_j| a unit, up to the wall of the box:
        a fractional knapsack.

        Args:
            rows: Coefficients a, shape (B, S, d).

        Returns:
            Shape (B, S).
        """
        room = torch.where(rows > 0, (self.upper - self.center).flatten(1).unsqueeze(1), 0.0)
        room = torch.where(rows < 0, (self.center - self.lower).flatten(1).unsqueeze(1), room)
        gain, order = rows.abs().sort(dim=-1, descending=True)
        room = room.gather(-1, order)
        before = room.cumsum(-1) - room
        spent = torch.minimum((self.eps.reshape(-1, 1, 1) - before).clamp(min=0), room)
        return (gain * spent).sum(-1)
