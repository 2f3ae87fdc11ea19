r"""GReg+: which auxiliary outliers a training step sees, picked by energy from clusters of their features.

From a pool of candidates x_i, drawn anew for every step (Algorithm 1):

1. z_i = h(x_i) / ||h(x_i)||_2, penultimate features of the network in eval mode, and S_i = S(x_i).
2. k-means of the z_i with k clusters, k the number of ID images of the step.
3. From each cluster the sample with the lowest energy, for L_S, and the one with the highest, for L_grad. A cluster
   of one gives its sample once, for both.

Fewer picks than 2 k are filled up by a uniform draw from the rest of the pool, which enters both losses. With
`routing = "printed"` picks go where the algorithm sends them; with "both" all of them enter both losses, as in the
authors' released code, and the margins alone decide.

*k-means.* Greedy k-means++ seeding (of 2 + log k draws proportional to the squared distance, the best one), then up to
ten of Lloyd's iterations, on the features' device. `benchmarks/clustering.py` compares it with scikit-learn's: the same
inertia within a few per cent, in half the time or less at the sizes of a training step.

References:
    Sharifi et al., "Gradient-Regularized Out-of-Distribution Detection", ECCV 2024 (arXiv 2404.12368), Algorithm 1;
    Arthur & Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from grood_cert.errors import InputError
from grood_cert.scores import energy
from grood_cert.sections import ROUTINGS
from grood_cert.training.objective import Roles

_BATCH = 512
_LLOYD_STEPS = 10


@dataclass(frozen=True)
class Picks:
    """Chosen candidates.

    Attributes:
        indices: Their positions in the pool, distinct, shape (2 k,).
        roles: Which of them enter which loss, in the same order.
    """

    indices: Tensor
    roles: Roles


def check(pool: int, batch: int) -> None:
    """Refuse a pool that cannot fill a step.

    Args:
        pool: Candidates a step.
        batch: ID images a step, k.

    Raises:
        InputError: If pool < 2 k.

    Example:
        >>> check(100, 64)
        Traceback (most recent call last):
            ...
        grood_cert.errors.InputError: a pool of 100 candidates is too small: a step of 64 ID images takes 128 outliers
    """
    if pool < 2 * batch:
        raise InputError(
            f"a pool of {pool} candidates is too small: a step of {batch} ID images takes {2 * batch} outliers"
        )


def candidates(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and penultimate features of a pool, without gradients, in eval mode; the mode of every layer is restored.

    Args:
        network: Answers `network(images, return_feature=True)` with logits and features.
        images: Shape (n, C, H, W).

    Returns:
        logits, features: Shapes (n, K) and (n, F).
    """
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad():
            parts = [network(part, return_feature=True) for part in images.split(_BATCH)]
    finally:
        for module in training:
            module.training = True
    return torch.cat([logits for logits, _ in parts]), torch.cat([features.flatten(1) for _, features in parts])


def _seeds(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++."""
    trials = 2 + int(math.log(clusters))
    draws = torch.rand(clusters, trials, generator=generator, dtype=torch.float64).to(points.device)
    squares = points.square().sum(1, keepdim=True)

    def distances(chosen: Tensor) -> Tensor:
        return (squares + torch.addmm(squares[chosen].T, points, points[chosen].T, alpha=-2)).clamp(min=0)

    first = (draws[0, :1] * len(points)).long()
    found, nearest = [first], distances(first).squeeze(1)
    for number in range(1, clusters):
        total = nearest.cumsum(0, dtype=torch.float64)
        tried = torch.searchsorted(total, draws[number] * total[-1]).clamp(max=len(points) - 1)
        left = torch.minimum(nearest.unsqueeze(1), distances(tried))
        best = left.sum(0).argmin(0, keepdim=True)
        found.append(tried[best])
        nearest = left[:, best].squeeze(1)
    return points[torch.cat(found)]


def _nearest(points: Tensor, centers: Tensor) -> Tensor:
    """Number of the nearest centre: argmin over c of ||c||^2 - 2 p . c."""
    return torch.addmm(centers.square().sum(1), points, centers.T, alpha=-2).argmin(1)


def kmeans(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    r"""Labels that make sum_i ||z_i - mean of its cluster||^2 small; see the module.

    Args:
        points: z, shape (n, F).
        clusters: k, at most n.
        generator: On the CPU; the labels depend on nothing but the arguments.

    Returns:
        Numbers below k, shape (n,); with repeated points some k may be missing.

    Example:
        >>> points = torch.tensor([[0.0], [10.0], [0.1], [9.9]])
        >>> labels = kmeans(points, 2, torch.Generator().manual_seed(0))
        >>> labels[0] == labels[2], labels[1] == labels[3], labels[0] == labels[1]
        (tensor(True), tensor(True), tensor(False))
    """
    centers = _seeds(points, clusters, generator)
    labels = _nearest(points, centers)
    for _ in range(_LLOYD_STEPS):
        sizes = torch.bincount(labels, minlength=clusters).unsqueeze(1)
        means = torch.zeros_like(centers).index_add_(0, labels, points) / sizes.clamp(min=1)
        centers = torch.where(sizes > 0, means, centers)
        before, labels = labels, _nearest(points, centers)
        if torch.equal(before, labels):
            break
    return labels


def pick(
    logits: Tensor, features: Tensor, clusters: int, routing: str = "printed", *, generator: torch.Generator
) -> Picks:
    r"""Choose 2 k candidates; the algorithm is above.

    Args:
        logits: f of the pool, shape (n, K).
        features: h of the pool, shape (n, F).
        clusters: k, the number of ID images of the step.
        routing: "printed" or "both".
        generator: On the CPU; seeds the clustering and the draw.

    Returns:
        The choice.

    Raises:
        InputError: If the pool is smaller than 2 k, or the routing is unknown.
    """
    check(len(logits), clusters)
    if routing not in ROUTINGS:
        raise InputError(f"routing: expected one of {', '.join(ROUTINGS)}, got {routing!r}")
    labels = kmeans(functional.normalize(features), clusters, generator)
    order = energy(logits).argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = rank.new_zeros(2, clusters)
    ends[0].scatter_reduce_(0, labels, rank, "amin", include_self=False)
    ends[1].scatter_reduce_(0, labels, rank, "amax", include_self=False)
    lowest, highest = order[ends[:, torch.bincount(labels, minlength=clusters) > 0]]

    low, high = torch.zeros(2, len(order), dtype=torch.bool, device=order.device)
    low[lowest], high[highest] = True, True
    picked, rest = (low | high).nonzero().squeeze(1), (~(low | high)).nonzero().squeeze(1)
    drawn = torch.randperm(len(rest), generator=generator)[: 2 * clusters - len(picked)].to(order.device)
    indices = torch.cat([picked, rest[drawn]])
    everything = torch.ones_like(indices, dtype=torch.bool)
    if routing == "both":
        return Picks(indices, Roles(everything, everything))
    filled = everything[len(picked) :]
    return Picks(indices, Roles(torch.cat([low[picked], filled]), torch.cat([high[picked], filled])))
