r"""Formal upper bounds of the local Lipschitz constant of S over balls: every method, and the best of them.

    L(B) = ess sup over B of ||J(x')^T softmax f(x')||_q,        |S(x') - S(x)| <= L(B) ||x' - x||_p  for x' in B.

Each method proves its own number for the whole ball, so the smallest is proved too; NaN or infinity is "not proved"
and never wins. |S(x') - S(x)| is the integral of the derivative along the segment, which lies in the convex ball; the
bounds cover every Clarke derivative, so kinks on the segment do no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grood_cert.ball import Ball, Norm
from grood_cert.bounds.hidden import DEFAULT_MEMORY, Preactivations, preactivations
from grood_cert.bounds.simplex import SoftmaxWeights
from grood_cert.errors import InputError
from grood_cert.lipschitz.interval import interval_bounds
from grood_cert.lipschitz.jacobian_crown import jacobian_crown, jacobian_crown_corners
from grood_cert.lipschitz.product import active_product_bound, product_bound
from grood_cert.networks.graph import Graph

METHODS = "product", "product-active", "hull", "interval", "jacobian-crown", "jacobian-crown-corners"


@dataclass(frozen=True)
class LipschitzBounds:
    """Proved bounds for a batch of balls, per pixel unit.

    Attributes:
        methods: Each method's bound, shape (B,); NaN where it proved nothing.
        auto: The smallest, shape (B,); infinite where nothing was proved.
        provenance: The method that gave it, "none" where nothing was proved.
        fixed_head: Jacobian-CROWN for p0 = softmax f(x), or None if not asked for: S(x') <= S(x) + L ||x' - x||,
            upwards only.
    """

    methods: dict[str, Tensor]
    auto: Tensor
    provenance: tuple[str, ...]
    fixed_head: Tensor | None


def best_of(methods: dict[str, Tensor]) -> tuple[Tensor, tuple[str, ...]]:
    r"""The smallest finite, non-negative bound of each sample, and which method it is from.

    Example:
        >>> best_of({"a": torch.tensor([1.0, torch.nan]), "b": torch.tensor([torch.nan, torch.nan])})
        (tensor([1., inf]), ('a', 'none'))
    """
    names = list(methods)
    stacked = torch.stack([methods[name] for name in names])
    proved = torch.isfinite(stacked) & (stacked >= 0)
    best, which = torch.where(proved, stacked, torch.inf).min(0)
    provenance = tuple(names[int(i)] if bool(torch.isfinite(b)) else "none" for i, b in zip(which, best, strict=True))
    return best, provenance


def local_lipschitz(
    graph: Graph,
    ball: Ball,
    known: Preactivations | None = None,
    methods: Sequence[str] = METHODS,
    fixed_head: bool = False,
    memory: int = DEFAULT_MEMORY,
) -> LipschitzBounds:
    r"""Prove upper bounds of the local Lipschitz constant of S over each ball.

    Args:
        graph: The network.
        ball: Batch of balls, float64.
        known: Bounds over the balls; by default CROWN.
        methods: Which to run, of `METHODS`.
        fixed_head: Whether to bound the constant of p0 . f too, for ID radii.
        memory: Bytes that blocks of rows may take.

    Returns:
        Bounds.

    Raises:
        InputError: If a method is unknown, none is named, or the balls do not fit the network.

    Example:
        >>> from grood_cert.networks.graph import trace
        >>> from torch import nn
        >>> graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), (1, 1, 1))
        >>> ball = Ball(torch.full((1, 1, 1, 1), 0.5).double(), torch.tensor([0.1]).double(), "linf")
        >>> bounds = local_lipschitz(graph, ball)
        >>> bool(bounds.auto <= bounds.methods["product"])
        True
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise InputError(f"unknown Lipschitz method {unknown[0] if unknown else 'none'!r}; use {', '.join(METHODS)}")
    if tuple(ball.center.shape[1:]) != graph.nodes[0].shape:
        raise InputError(f"expected images of shape {graph.nodes[0].shape}, got {tuple(ball.center.shape[1:])}")
    if ball.center.dtype != torch.float64:
        raise InputError(f"proofs need float64 images, got {ball.center.dtype}")
    with torch.no_grad():
        if known is None:
            known = preactivations(graph, ball, memory=memory)
        norm: Norm = ball.norm
        found: dict[str, Tensor] = {}
        if "product" in methods:
            found["product"] = torch.full_like(ball.eps, product_bound(graph, norm), dtype=torch.float64)
        if "product-active" in methods:
            found["product-active"] = active_product_bound(graph, known, norm)
        if "hull" in methods or "interval" in methods:
            both = dict(zip(("hull", "interval"), interval_bounds(graph, known, norm), strict=True))
            found |= {name: bound for name, bound in both.items() if name in methods}
        if "jacobian-crown" in methods:
            found["jacobian-crown"] = jacobian_crown(graph, known, norm, memory=memory)
        if "jacobian-crown-corners" in methods:
            found["jacobian-crown-corners"] = jacobian_crown_corners(graph, known, norm, memory)
        head = None
        if fixed_head:
            weights = SoftmaxWeights.fixed(torch.softmax(graph(ball.center), 1))
            head = torch.where(known.proved, jacobian_crown(graph, known, norm, weights, memory), torch.nan)
        for name in found:
            if name != "product":
                found[name] = torch.where(known.proved, found[name], torch.nan)
    auto, provenance = best_of(found)
    return LipschitzBounds(found, auto, provenance, head)


def running_minimum(bounds: Tensor) -> Tensor:
    r"""Make L(eps) non-decreasing: L(eps_i) <= min over j >= i of L(eps_j).

    A ball contains the smaller ones around the same point, so what is proved for eps_j holds for eps_i <= eps_j. NaN
    counts as infinite.

    Args:
        bounds: Bounds over increasing eps, shape (..., E).

    Returns:
        Shape (..., E), non-decreasing along the last axis.

    Example:
        >>> running_minimum(torch.tensor([2.0, torch.nan, 1.0, 3.0]))
        tensor([1., 1., 1., 3.])
    """
    known = torch.where(torch.isnan(bounds), torch.inf, bounds)
    return known.flip(-1).cummin(-1).values.flip(-1)
