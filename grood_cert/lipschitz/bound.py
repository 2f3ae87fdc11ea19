r"""Formal upper bounds of the local Lipschitz constant of S over balls: every method, and the best of them.

    L(B) = ess sup over B of ||J(x')^T softmax f(x')||_q,        |S(x') - S(x)| <= L(B) ||x' - x||_p  for x' in B.

Each method proves its own number for the whole ball, so the smallest is proved too; NaN or infinity is "not proved"
and never wins. |S(x') - S(x)| is the integral of the derivative along the segment, which lies in the convex ball; the
bounds cover every Clarke derivative, so kinks on the segment do no harm.

That is the energy with T = 1. Other scores differ in what stands in the place of softmax f:

* Energy(T): softmax(f / T).
* MaxLogit: the simplex over the classes that can be the largest logit on the ball.
* MSP: S = -softmax(f / T)_k with k the largest logit, one of those. softmax(f / T)_k = 1 / (1 + e^Q_k) with Q_k the LSE
  of z_j = (f_j - f_k) / T over j != k, so its gradient is at most sup p (1 - p) times the Lipschitz constant of Q_k:
  minus an energy, of a network whose last layer is followed by the differences. The largest of these bounds over k holds
  for S. S(x') <= -softmax(f(x') / T)_k for the k of x, so that bound alone limits how far S rises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grood_cert.ball import Ball, Norm
from grood_cert.bounds.hidden import DEFAULT_MEMORY, Preactivations, preactivations
from grood_cert.bounds.simplex import SoftmaxWeights, weights_of_gaps
from grood_cert.errors import InputError
from grood_cert.interval import ROUNDING, Interval, outward
from grood_cert.lipschitz.interval import interval_bounds
from grood_cert.lipschitz.jacobian_crown import jacobian_crown, jacobian_crown_corners
from grood_cert.lipschitz.product import active_product_bound, product_bound
from grood_cert.networks.graph import Graph, Node
from grood_cert.networks.operations import Dense
from grood_cert.scores import ENERGY, MSP, Energy, MaxLogit, Score

METHODS = "product", "product-active", "hull", "interval", "jacobian-crown", "jacobian-crown-corners"


@dataclass(frozen=True)
class LipschitzBounds:
    """Proved bounds for a batch of balls, per pixel unit.

    Attributes:
        methods: Each method's bound, shape (B,); NaN where it proved nothing.
        auto: The smallest, shape (B,); infinite where nothing was proved.
        provenance: The method that gave it, "none" where nothing was proved.
        fixed_head: Jacobian-CROWN for what is fixed at x (the softmax weights; for max-logit and MSP the largest logit),
            or None if not asked for: S(x') <= S(x) + L ||x' - x||, upwards only.
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
    score: Score = ENERGY,
) -> LipschitzBounds:
    r"""Prove upper bounds of the local Lipschitz constant of S over each ball.

    Args:
        graph: The network.
        ball: Batch of balls, float64.
        known: Bounds over the balls; by default CROWN.
        methods: Which to run, of `METHODS`.
        fixed_head: Whether to bound how fast S rises too, for ID radii.
        memory: Bytes that blocks of rows may take.
        score: S.

    Returns:
        Bounds.

    Raises:
        InputError: If a method is unknown, none is named, or the balls do not fit the network.

    Example:
        >>> from grood_cert.networks.capture import capture
        >>> from torch import nn
        >>> graph = capture(nn.Sequential(nn.Flatten(), nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), (1, 1, 1))
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
        found, head = (_of_msp if isinstance(score, MSP) else _of_weights)(
            graph, ball, known, methods, fixed_head, memory, score
        )
        for name in found:
            if name != "product" or isinstance(score, MSP):
                found[name] = torch.where(known.proved, found[name], torch.nan)
    auto, provenance = best_of(found)
    return LipschitzBounds(
        found, auto, provenance, None if head is None else torch.where(known.proved, head, torch.nan)
    )


def _by_method(
    graph: Graph, known: Preactivations, norm: Norm, methods: Sequence[str], memory: int
) -> dict[str, Tensor]:
    """Each method's bound of sup ||J^T p||_q over the balls and the set of p that `known` holds."""
    found: dict[str, Tensor] = {}
    if "product" in methods:
        found["product"] = torch.full_like(known.logits[0][:, 0], product_bound(graph, norm))
    if "product-active" in methods:
        found["product-active"] = active_product_bound(graph, known, norm)
    if "hull" in methods or "interval" in methods:
        both = dict(zip(("hull", "interval"), interval_bounds(graph, known, norm), strict=True))
        found |= {name: bound for name, bound in both.items() if name in methods}
    if "jacobian-crown" in methods:
        found["jacobian-crown"] = jacobian_crown(graph, known, norm, memory=memory)
    if "jacobian-crown-corners" in methods:
        found["jacobian-crown-corners"] = jacobian_crown_corners(graph, known, norm, memory)
    return found


def _of_weights(
    graph: Graph,
    ball: Ball,
    known: Preactivations,
    methods: Sequence[str],
    fixed_head: bool,
    memory: int,
    score: Score,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Scores with the gradient -J^T p, p in the simplex."""
    match score:
        case Energy(1.0):
            weights = known.weights
        case Energy(temperature):
            weights = weights_of_gaps(*_divided(known.gaps, temperature))
        case MaxLogit():
            winners = _winners(known)
            alone = winners & (winners.sum(1, keepdim=True) == 1)
            weights = SoftmaxWeights(alone.to(known.gaps[0]), winners.to(known.gaps[0]))
        case _:
            raise InputError(f"there are no Lipschitz bounds of the score {score}")
    found = _by_method(graph, replace(known, weights=weights), ball.norm, methods, memory)
    if not fixed_head:
        return found, None
    logits = graph(ball.center)
    if isinstance(score, Energy):
        weight = torch.softmax(logits / score.temperature, 1)
    else:
        weight = torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)
    return found, jacobian_crown(graph, known, ball.norm, SoftmaxWeights.fixed(weight), memory)


def _of_msp(
    graph: Graph,
    ball: Ball,
    known: Preactivations,
    methods: Sequence[str],
    fixed_head: bool,
    memory: int,
    score: Score,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """MSP, class by class."""
    assert isinstance(score, MSP)
    zero = torch.zeros_like(known.logits[0][:, 0])
    if graph.classes == 1:
        return {name: zero for name in methods}, zero if fixed_head else None
    wanted = (*methods, "jacobian-crown") if fixed_head else methods
    gaps = _divided(known.gaps, score.temperature)
    share, winners, own = weights_of_gaps(*gaps), _winners(known), graph(ball.center).argmax(1)
    winners[torch.arange(len(own), device=own.device), own] = True
    worst = {name: torch.full_like(zero, -torch.inf) for name in wanted}
    head = torch.full_like(zero, torch.nan)
    for k in range(graph.classes):
        index = winners[:, k].nonzero().squeeze(1)
        if not len(index):
            continue
        low, high = share.lower[index, k], share.upper[index, k].clamp(max=1)
        around = torch.where((low <= 0.5) & (high >= 0.5), 0.5, torch.where(low > 0.5, low, high))
        others = torch.arange(graph.classes, device=index.device) != k
        apart = gaps[0][index][:, others], gaps[1][index][:, others]
        between = apart[0][:, :, others], apart[1][:, :, others]
        part = replace(
            known.at(index),
            logits=(apart[0][:, :, k], apart[1][:, :, k]),
            gaps=between,
            weights=weights_of_gaps(*between),
        )
        bounds = _by_method(_apart(graph, k, score.temperature), part, ball.norm, wanted, memory)
        for name, bound in bounds.items():
            bound = bound * around * (1 - around) * (1 + ROUNDING)
            worst[name][index] = torch.maximum(worst[name][index], bound)
            if name == "jacobian-crown":
                head[index] = torch.where(own[index] == k, bound, head[index])
    found = {name: torch.where(worst[name] >= 0, worst[name], torch.nan) for name in methods}
    return found, head if fixed_head else None


def _divided(gaps: Interval, temperature: float) -> Interval:
    low, high = gaps[0] / temperature, gaps[1] / temperature
    return outward(low, high, torch.maximum(low.abs(), high.abs()))


def _winners(known: Preactivations) -> Tensor:
    """Which logits may be the largest somewhere on the ball, shape (B, K)."""
    return ~(known.gaps[1].amin(2) < 0)


def _apart(graph: Graph, k: int, temperature: float) -> Graph:
    """The network followed by (f_j - f_k) / T for all j != k."""
    last, classes = graph.nodes[-1], graph.classes
    rows = torch.eye(classes, dtype=torch.float64, device=graph.device)
    rows = (rows - rows[k])[torch.arange(classes, device=rows.device) != k]
    if isinstance(last.operation, Dense):  # differences first, so that each weight is rounded alone
        bias = None if last.operation.bias is None else rows @ last.operation.bias / temperature
        node = replace(last, operation=Dense(rows @ last.operation.weight / temperature, bias), shape=(classes - 1,))
        return replace(graph, nodes=(*graph.nodes[:-1], node))
    node = Node(Dense(rows / temperature, None), (len(graph.nodes) - 1,), (classes - 1,), f"distance to logit {k}")
    return replace(graph, nodes=(*graph.nodes, node))


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
