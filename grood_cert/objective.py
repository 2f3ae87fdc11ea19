r"""The GReg training objective.

    L       = CE + lambda_S L_S + lambda_grad L_grad
    L_S     = E_id [1{S >= m_in}  (S - m_in)^2 ]  +  E_aux[1{S <= m_out} (m_out - S)^2]
    L_grad  = E_id [1{S <= m_in}  ||grad_x S||_2] +  E_aux[1{S >= m_out} ||grad_x S||_2]

The indicators are complementary: L_S pushes samples that are not past their margin yet, L_grad flattens the score
around those that are. No gradient flows through an indicator. Both expectations are means of per-sample values, each
over its own set, so the objective does not depend on the batch size (the authors' released code divides by the batch
size a second time: its "lambda = 1" is lambda_grad = 1/128 here for batches of 64 + 64).

The gradient is taken with respect to pixels in [0, 1]. With BatchNorm the gradient term runs the network a second
time with the layers in eval mode: the slope that is regularised is then the slope of the network that is certified,
samples do not leak into each other's gradients, and running statistics are updated once a step.

The point gradient says nothing about the ball around a sample. With `slope = "interval"` the same loss averages a
formal bound of the local Lipschitz constant instead (`grood_cert.lipschitz.regulariser`); at radius 0 it is GReg.

References:
    Sharifi et al., "Gradient-Regularized Out-of-Distribution Detection", ECCV 2024 (arXiv 2404.12368);
    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020 (L_S).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from grood_cert.ball import Ball
from grood_cert.energy import energy
from grood_cert.lipschitz.regulariser import interval_lipschitz

_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Weights:
    """Weights and margins of the objective.

    Attributes:
        lambda_S: Weight of the energy loss.
        lambda_grad: Weight of the gradient loss; 0 is energy fine-tuning, and costs no second-order pass.
        m_in: Energy that ID samples should lie below.
        m_out: Energy that auxiliary outliers should lie above, m_in < m_out.
        slope: What the gradient loss averages: "gradient-norm", ||grad S(x)||_2 at the sample (GReg), or "interval", a
            formal upper bound of ||grad S||_2 over the l_2 ball of radius `slope_eps` around it.
        slope_eps: Radius of that ball, pixel units.
    """

    lambda_S: float  # noqa: N815
    lambda_grad: float
    m_in: float
    m_out: float
    slope: str = "gradient-norm"
    slope_eps: float = 0.0


@dataclass(frozen=True)
class Terms:
    """The objective of one batch, term by term.

    Attributes:
        total: The loss to minimise, a scalar.
        cross_entropy: CE over the ID batch.
        energy: L_S.
        gradient: L_grad, 0 where it was not computed.
        active_energy_id: Share of ID samples with S >= m_in, by the scores that L_S saw.
        active_energy_aux: Share of auxiliary samples with S <= m_out, likewise.
        active_gradient_id: Share of ID samples with S <= m_in, by the scores that L_grad saw (or would have seen).
        active_gradient_aux: Share of auxiliary samples with S >= m_out, likewise.
    """

    total: Tensor
    cross_entropy: Tensor
    energy: Tensor
    gradient: Tensor
    active_energy_id: Tensor
    active_energy_aux: Tensor
    active_gradient_id: Tensor
    active_gradient_aux: Tensor


def energy_loss(score_id: Tensor, score_aux: Tensor, m_in: float, m_out: float) -> Tensor:
    r"""L_S: squared hinges that pull ID below m_in and auxiliary outliers above m_out.

    Args:
        score_id: S of the ID batch, shape (n_id,).
        score_aux: S of the auxiliary batch, shape (n_aux,).
        m_in: Margin of ID.
        m_out: Margin of the outliers.

    Returns:
        A scalar.

    Example:
        >>> energy_loss(torch.tensor([-9.0, -6.0]), torch.tensor([-4.0, 0.0]), -8.0, -2.0)
        tensor(4.)
    """
    return functional.relu(score_id - m_in).square().mean() + functional.relu(m_out - score_aux).square().mean()


def gradient_loss(
    norm_id: Tensor, norm_aux: Tensor, score_id: Tensor, score_aux: Tensor, m_in: float, m_out: float
) -> Tensor:
    r"""L_grad: mean gradient norm of the samples that are past their margin (the others count with 0).

    Args:
        norm_id: ||grad S||_2 of the ID batch, shape (n_id,).
        norm_aux: The same for the auxiliary batch, shape (n_aux,).
        score_id: S of the ID batch; decides the indicator, receives no gradient.
        score_aux: S of the auxiliary batch; likewise.
        m_in: Margin of ID.
        m_out: Margin of the outliers.

    Returns:
        A scalar.

    Example:
        >>> one = torch.ones(2)
        >>> gradient_loss(one, one, torch.tensor([-9.0, -6.0]), torch.tensor([-4.0, 0.0]), -8.0, -2.0)
        tensor(1.)
    """
    inside = torch.where(score_id.detach() <= m_in, norm_id, torch.zeros_like(norm_id))
    outside = torch.where(score_aux.detach() >= m_out, norm_aux, torch.zeros_like(norm_aux))
    return inside.mean() + outside.mean()


@contextlib.contextmanager
def _running_statistics(layers: Sequence[nn.Module]) -> Iterator[None]:
    """BatchNorm layers in eval mode while the block runs."""
    training = [layer for layer in layers if layer.training]
    for layer in training:
        layer.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.train()


def objective(network: nn.Module, images_id: Tensor, labels: Tensor, images_aux: Tensor, weights: Weights) -> Terms:
    r"""The GReg objective of one batch; ID and auxiliary images share one forward pass.

    Args:
        network: f, normalisation included, in train mode.
        images_id: Shape (n_id, C, H, W), pixels in [0, 1].
        labels: Classes of the ID images, shape (n_id,).
        images_aux: Shape (n_aux, C, H, W).
        weights: Weights and margins.

    Returns:
        The terms; `total` carries the graph.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> images, outliers = torch.rand(2, 1, 2, 2), torch.rand(5, 1, 2, 2)
        >>> terms = objective(network, images, torch.tensor([0, 2]), outliers, Weights(0.1, 0.1, -8.0, -2.0))
        >>> terms.total.shape, bool(terms.total.isfinite())
        (torch.Size([]), True)
    """
    count = len(images_id)
    regularised = weights.lambda_grad > 0
    images = torch.cat([images_id, images_aux]).requires_grad_(regularised)
    logits = network(images)
    score = energy(logits)
    cross_entropy = functional.cross_entropy(logits[:count], labels)
    hinge = energy_loss(score[:count], score[count:], weights.m_in, weights.m_out)
    total = cross_entropy + weights.lambda_S * hinge
    flat_score, slope = score, torch.zeros_like(total)
    if regularised:
        layers = [layer for layer in network.modules() if isinstance(layer, _BATCH_NORM)]
        if layers:
            with _running_statistics(layers):
                flat_score = energy(network(images))
        if weights.slope == "interval":
            eps = torch.full_like(flat_score, weights.slope_eps)
            norm = interval_lipschitz(network, Ball(images.detach(), eps.detach(), "l2"))
        else:
            (gradient,) = torch.autograd.grad(flat_score.sum(), images, create_graph=True)
            norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        slope = gradient_loss(
            norm[:count], norm[count:], flat_score[:count], flat_score[count:], weights.m_in, weights.m_out
        )
        total = total + weights.lambda_grad * slope
    return Terms(
        total=total,
        cross_entropy=cross_entropy.detach(),
        energy=hinge.detach(),
        gradient=slope.detach(),
        active_energy_id=(score[:count] >= weights.m_in).float().mean(),
        active_energy_aux=(score[count:] <= weights.m_out).float().mean(),
        active_gradient_id=(flat_score[:count] <= weights.m_in).float().mean(),
        active_gradient_aux=(flat_score[count:] >= weights.m_out).float().mean(),
    )
