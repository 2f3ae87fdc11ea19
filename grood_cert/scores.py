r"""The energy score and its gradient, and the two classical scores to compare it with.

    energy         S(x) = -T log sum_k exp(f_k(x) / T)
    max-logit      -max_k f_k(x)
    max-softmax    -max_k softmax(f(x) / T)_k

All of them are low in-distribution (ID) and high out-of-distribution (OOD): an input is accepted as ID iff its score is
at most gamma. As T falls to 0, the energy score becomes the max-logit score.

References:
    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020;
    Hendrycks & Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks",
    ICLR 2017 (max-softmax);
    Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022 (max-logit).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grood_cert.ball import Norm, dual_norm


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Energy score S = -T logsumexp(f / T).

    Args:
        logits: f, shape (..., K).
        temperature: T > 0.

    Returns:
        Shape (...).

    Example:
        >>> energy(torch.tensor([[0.0, 0.0]]))
        tensor([-0.6931])
    """
    return -temperature * torch.logsumexp(logits / temperature, dim=-1)


def max_logit(logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Minus the largest logit; the same at every temperature.

    Args:
        logits: f, shape (..., K).
        temperature: Not used; the scores have one signature.

    Returns:
        Shape (...).

    Example:
        >>> max_logit(torch.tensor([[1.0, 3.0]]))
        tensor([-3.])
    """
    del temperature
    return -logits.amax(-1)


def max_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Minus the largest softmax probability (MSP), in [-1, -1/K].

    Where logits lie far apart it rounds to -1 and scores tie; use float64.

    Args:
        logits: f, shape (..., K).
        temperature: T > 0.

    Returns:
        Shape (...).

    Example:
        >>> max_softmax(torch.tensor([[0.0, 0.0]]))
        tensor([-0.5000])
    """
    return -torch.softmax(logits / temperature, -1).amax(-1)


SCORES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "energy": energy,
    "max-logit": max_logit,
    "max-softmax": max_softmax,
}


def energy_gradient(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    r"""Score and its gradient with respect to the pixels, sample by sample.

    Differentiates sum_i S(x_i): equal to the per-sample gradients as long as samples do not influence one another,
    so the network must be in eval mode if it holds BatchNorm.

    Args:
        network: f, normalisation included.
        images: Pixels in [0, 1], shape (B, C, H, W).

    Returns:
        S(x_i), shape (B,), and grad S(x_i), shape (B, C, H, W); both detached.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(2, 1))  # one logit w.x + b: grad S = -w
        >>> _, gradient = energy_gradient(network, torch.zeros(3, 1, 1, 2))
        >>> torch.equal(gradient[2].flatten(), -network[1].weight.detach().flatten())
        True
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        score = energy(network(images))
        (gradient,) = torch.autograd.grad(score.sum(), images)
    return score.detach(), gradient.detach()


def gradient_norm_estimate(network: nn.Module, images: Tensor, norm: Norm) -> Tensor:
    r"""||grad S(x)||_q in the dual of the ball's norm: a lower *estimate* of the local Lipschitz constant.

    Args:
        network: f in eval mode, normalisation included.
        images: Pixels in [0, 1], shape (B, C, H, W).
        norm: Norm of the ball, "linf" (q = 1), "l2" (q = 2) or "l1" (q = inf).

    Returns:
        Shape (B,), per pixel unit.
    """
    return dual_norm(energy_gradient(network, images)[1], norm)
