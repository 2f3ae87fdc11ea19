r"""The training objective: GReg as printed, the authors' own computation of it, baselines, and certified terms.

    L       = CE + lambda_S L_out + lambda_grad L_grad + lambda_certified L_certified
    L_S     = E_id [1{S >= m_in}  (S - m_in)^2 ]  +  E_aux[1{S <= m_out} (m_out - S)^2]
    L_grad  = E_id [1{S <= m_in}  ||grad_x S||_2] +  E_aux[1{S >= m_out} ||grad_x S||_2]

L_out is L_S ("energy"), or outlier exposure, the cross-entropy from auxiliary outliers to the uniform distribution
("oe"), or nothing ("none"). L_grad goes with each of them. The indicators are complementary: L_S pushes samples that
are not past their margin yet, L_grad flattens the score around those that are. Both read the scores of one forward
pass, that of the loss, so no sample is in both terms (but for ties) or in neither. No gradient flows through an
indicator. Expectations are means of per-sample values, each over its own set, so the objective does not depend on the
batch size.

`reduction = "reference"` computes L_grad as the authors' released code does instead: a second forward pass in train
mode (BatchNorm's running statistics move twice a step, even at weight 0), the gradient of one scalar of the whole
batch, and a division of the sum of both means by N = n_id + n_aux: its "lambda = 1" is lambda_grad = 1/128 of the
formula for batches of 64 + 64, and there are cross terms through the batch statistics. The authors also differentiate
with respect to the normalised images (`coordinates = "normalised"`), where a slope is smaller by the factor std of its
channel.

Whose slope it is, and how its norm is differentiated, is in `grood_cert.training.penalty`. With `penalty = "stochastic"`
a random share of the active samples stands for all of them, n_active / n_drawn times: an unbiased estimate of L_grad
and of its derivative. The point gradient says nothing about the ball around a sample; with `slope = "interval"` the
same loss averages a formal bound of the local Lipschitz constant (`grood_cert.lipschitz.interval`), at radius 0 it
is GReg.

*First-order worst case.* A small slope alone proves nothing: with S - gamma divided by 2, slopes are halved, margins are
too, and every radius is what it was. What a certificate needs is a margin d that is large *for* the slope, d >= eps L with L
the Lipschitz constant on the ball. `slope = "first-order"` asks for that, with the dual norm at the sample for L:

    L_grad = E_id[relu(S + eps ||grad_x S||_1 - m_in)^2] + E_aux[relu(m_out - S + eps ||grad_x S||_1)^2]

It is L_S with the worst value of S in the l_inf ball of radius eps, to first order, and at eps = 0 it is L_S. Where it
is 0, the distance from the margin is at least eps ||grad S||_1. Nothing is gained by rescaling, which moves S back over
its margin, and nothing by staying short of a margin, as there is no indicator. An estimate all the same: it
knows S at the sample alone. L_certified, which is about the worst value of S itself in a ball, is in
`grood_cert.training.certified_loss`.

References:
    Sharifi et al., "Gradient-Regularized Out-of-Distribution Detection", ECCV 2024 (arXiv 2404.12368);
    Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020 (L_S);
    Hendrycks et al., "Deep Anomaly Detection with Outlier Exposure", ICLR 2019.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from grood_cert.ball import Ball
from grood_cert.lipschitz.interval import interval_lipschitz
from grood_cert.sections import ObjectiveSection
from grood_cert.training.certified_loss import certified_loss
from grood_cert.training.penalty import SampleWise, batch_statistics, pixels_per_unit, scores


@dataclass(frozen=True)
class Roles:
    """Which auxiliary outliers of the batch enter which loss.

    Attributes:
        energy: Those of the outlier loss, shape (n_aux,), bool.
        gradient: Those of the gradient loss, likewise.
    """

    energy: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Terms:
    """The objective of one batch, term by term.

    Attributes:
        total: The loss to minimise, a scalar.
        cross_entropy: CE over the ID batch.
        energy: The outlier loss: L_S, or that of outlier exposure.
        gradient: L_grad, 0 where it was not computed; an unbiased estimate of it with the stochastic penalty.
        certified: The certified loss at the radius reached, 0 where it was not computed.
        active_energy_id: Share of ID samples with S >= m_in.
        active_energy_aux: Share of auxiliary samples in the outlier loss with S <= m_out.
        active_gradient_id: Share of ID samples with S <= m_in.
        active_gradient_aux: Share of auxiliary samples in the gradient loss with S >= m_out.
    """

    total: Tensor
    cross_entropy: Tensor
    energy: Tensor
    gradient: Tensor
    certified: Tensor
    active_energy_id: Tensor
    active_energy_aux: Tensor
    active_gradient_id: Tensor
    active_gradient_aux: Tensor


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen values, 0 if there are none."""
    return torch.where(chosen, values, torch.zeros_like(values)).sum() / chosen.sum().clamp(min=1)


def energy_loss(score_id: Tensor, score_aux: Tensor, m_in: float, m_out: float, chosen: Tensor | None = None) -> Tensor:
    r"""L_S: squared hinges that pull ID below m_in and auxiliary outliers above m_out.

    Args:
        score_id: S of the ID batch, shape (n_id,).
        score_aux: S of the auxiliary batch, shape (n_aux,).
        m_in: Margin of ID.
        m_out: Margin of the outliers.
        chosen: Auxiliary samples that the mean is over, shape (n_aux,); all of them by default.

    Returns:
        A scalar.

    Example:
        >>> energy_loss(torch.tensor([-9.0, -6.0]), torch.tensor([-4.0, 0.0]), -8.0, -2.0)
        tensor(4.)
    """
    outside = functional.relu(m_out - score_aux).square()
    chosen = torch.ones_like(score_aux, dtype=torch.bool) if chosen is None else chosen
    return functional.relu(score_id - m_in).square().mean() + mean_over(outside, chosen)


def outlier_exposure_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    r"""Cross-entropy from the uniform distribution: mean of LSE(f) - (1/K) sum_k f_k, at least log K.

    Args:
        logits: f of the auxiliary batch, shape (n_aux, K).
        chosen: Samples that the mean is over, shape (n_aux,).

    Returns:
        A scalar.

    Example:
        >>> outlier_exposure_loss(torch.zeros(3, 4), torch.tensor([True, False, True]))
        tensor(1.3863)
    """
    return mean_over(logits.logsumexp(1) - logits.mean(1), chosen)


def gradient_shares(
    score_id: Tensor, score_aux: Tensor, m_in: float, m_out: float, chosen: Tensor | None = None
) -> Tensor:
    r"""What each sample's norm counts in L_grad: 1/n of its set if it is past its margin, else 0.

    Args:
        score_id: S of the ID batch, shape (n_id,).
        score_aux: S of the auxiliary batch, shape (n_aux,).
        m_in: Margin of ID.
        m_out: Margin of the outliers.
        chosen: Auxiliary samples that the mean is over, shape (n_aux,); all of them by default.

    Returns:
        Shape (n_id + n_aux,), without a graph.

    Example:
        >>> gradient_shares(torch.tensor([-9.0, -6.0]), torch.tensor([-4.0, 0.0]), -8.0, -2.0)
        tensor([0.5000, 0.0000, 0.0000, 0.5000])
    """
    chosen = torch.ones_like(score_aux, dtype=torch.bool) if chosen is None else chosen
    inside = (score_id <= m_in).to(score_id) / len(score_id)
    outside = ((score_aux >= m_out) & chosen).to(score_aux) / chosen.sum().clamp(min=1)
    return torch.cat([inside, outside])


class _Batch:
    """ID images and outliers, and their one forward pass, whose scores all terms read."""

    def __init__(
        self, network: nn.Module, images_id: Tensor, images_aux: Tensor, section: ObjectiveSection, roles: Roles
    ) -> None:
        self.network, self.section, self.roles = network, section, roles
        self.images_id, self.images_aux, self.count = images_id, images_aux, len(images_id)
        self.images = torch.cat([images_id, images_aux])
        self.scale = pixels_per_unit(network) if section.coordinates == "normalised" else None
        self.part = section.penalty_share if section.penalty == "stochastic" else 1.0
        self.samples: SampleWise | None = None
        if section.lambda_grad > 0 and section.slope != "interval" and section.reduction == "paper":
            self.samples = SampleWise(
                network,
                self.images,
                "fast" if section.penalty == "fast" else "exact",
                self.scale,
                self.part,
            )
            self.logits, score, statistics = self.samples.logits, self.samples.score, self.samples.statistics
        else:
            statistics = batch_statistics(network) if section.uses_balls else None
            with statistics or nullcontext():
                self.logits = network(self.images)
            score = scores(self.logits)
        self.buffers = statistics.buffers(network) if statistics and section.uses_balls else {}
        self.score_id, self.score_aux = score[: self.count], score[self.count :]
        self.zero = torch.zeros_like(score[0].detach())

    def outlier_loss(self) -> Tensor:
        """L_out."""
        section, chosen = self.section, self.roles.energy
        if section.outlier_loss == "energy":
            return energy_loss(self.score_id, self.score_aux, section.m_in, section.m_out, chosen)
        if section.outlier_loss == "oe":
            return outlier_exposure_loss(self.logits[self.count :], chosen)
        return self.zero

    def gradient_loss(self, generator: torch.Generator | None) -> Tensor:
        """L_grad, 0 where it has no weight; but the authors' pass is made all the same, for what it does to BatchNorm."""
        section = self.section
        if section.reduction == "reference":
            return self._reference_loss()
        if section.lambda_grad == 0:
            return self.zero
        inside, outside = self.score_id.detach(), self.score_aux.detach()
        m_in, m_out = (math.inf, -math.inf) if section.slope == "first-order" else (section.m_in, section.m_out)
        shares = gradient_shares(inside, outside, m_in, m_out, self.roles.gradient)
        used, shares = _drawn(shares, self.part, generator)
        return (shares * self._slopes(used)).sum() if len(used) else self.zero

    def _slopes(self, used: Tensor) -> Tensor:
        """What L_grad averages, of the samples of these numbers."""
        if self.section.slope == "first-order":
            return self._first_order(used)
        if self.samples is not None:
            return self.samples.norms(used)
        chosen = self.images.detach()[used].clamp(0, 1)  # training noise leaves the box
        ball = Ball(chosen, chosen.new_full((len(used),), self.section.slope_eps), "l2")
        return interval_lipschitz(self.network, ball, self.buffers)

    def _first_order(self, used: Tensor) -> Tensor:
        """relu(S + eps ||grad S||_1 - m_in)^2 of ID images, relu(m_out - S + eps ||grad S||_1)^2 of outliers."""
        assert self.samples is not None
        short = torch.cat([self.score_id - self.section.m_in, self.section.m_out - self.score_aux])
        return functional.relu(short[used] + self.section.slope_eps * self.samples.norms(used, "linf")).square()

    def _reference_loss(self) -> Tensor:
        """(1/N) sum_i ||dF/dx_i||, F = E_aux relu(S - m_out) - E_id relu(m_in - S), in one more pass in train mode."""
        section, images = self.section, self.images.detach().requires_grad_(True)
        score = scores(self.network(images))
        inside = functional.relu(section.m_in - score[: self.count]).mean()
        outside = mean_over(functional.relu(score[self.count :] - section.m_out), self.roles.gradient)
        (gradient,) = torch.autograd.grad(outside - inside, images, create_graph=section.lambda_grad > 0)
        gradient = gradient if self.scale is None else gradient * self.scale
        norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        return norms.mean()

    def certified_loss(self, grown: float, generator: torch.Generator | None) -> Tensor:
        """L_certified at this share of the final radius."""
        section, outliers = self.section, self.images_aux[self.roles.energy]
        eps = grown * section.certified_eps
        return certified_loss(self.network, self.images_id, outliers, eps, section, generator, self.buffers)


def _drawn(shares: Tensor, part: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A uniform draw of the active samples, ceil(part n) of n, and their shares times n / drawn."""
    active = shares.nonzero().squeeze(1)
    count = math.ceil(part * len(active))
    if count < len(active):
        device = "cpu" if generator is None else generator.device
        order = torch.randperm(len(active), generator=generator, device=device)[:count]
        shares, active = shares * (len(active) / count), active[order.to(active.device)]
    return active, shares[active]


def objective(
    network: nn.Module,
    images_id: Tensor,
    labels: Tensor,
    images_aux: Tensor,
    section: ObjectiveSection,
    *,
    roles: Roles | None = None,
    progress: float = 1.0,
    generator: torch.Generator | None = None,
) -> Terms:
    r"""The objective of one batch; ID and auxiliary images share one forward pass.

    Args:
        network: f, normalisation included, in train mode.
        images_id: Shape (n_id, C, H, W), pixels in [0, 1].
        labels: Classes of the ID images, shape (n_id,).
        images_aux: Shape (n_aux, C, H, W).
        section: Weights, margins and variants.
        roles: Which auxiliary samples enter which loss; by default all enter both.
        progress: How far the whole training is, from 0 to 1; the certified term grows with it.
        generator: For the draws of the stochastic penalty and the first points of the attack.

    Returns:
        The terms; `total` carries the graph. With the "fast" penalty its value is that of the formula, its derivative a
        finite difference; with "stochastic" both are unbiased estimates.

    Raises:
        InputError: If the coordinates are "normalised" and the network has no `Normalize` layer.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> images, outliers = torch.rand(2, 1, 2, 2), torch.rand(5, 1, 2, 2)
        >>> terms = objective(network, images, torch.tensor([0, 2]), outliers, ObjectiveSection(0.1, 0.1, -8.0, -2.0))
        >>> terms.total.shape, bool(terms.total.isfinite())
        (torch.Size([]), True)
    """
    if roles is None:
        everyone = torch.ones(len(images_aux), dtype=torch.bool, device=images_aux.device)
        roles = Roles(everyone, everyone)
    batch = _Batch(network, images_id, images_aux, section, roles)

    cross_entropy = functional.cross_entropy(batch.logits[: len(images_id)], labels)
    outlier = batch.outlier_loss()
    total = cross_entropy + section.lambda_S * outlier
    gradient = batch.gradient_loss(generator)
    if section.lambda_grad > 0:
        total = total + section.lambda_grad * gradient
    certified = batch.zero
    grown = 1.0 if section.certified_ramp == 0 else min(1.0, progress / section.certified_ramp)
    if section.certified != "none" and grown > 0:
        certified = batch.certified_loss(grown, generator)
        total = total + grown * section.lambda_certified * certified

    score_id, score_aux, m_in, m_out = batch.score_id, batch.score_aux, section.m_in, section.m_out
    return Terms(
        total=total,
        cross_entropy=cross_entropy.detach(),
        energy=outlier.detach(),
        gradient=gradient.detach(),
        certified=certified.detach(),
        active_energy_id=(score_id >= m_in).float().mean(),
        active_energy_aux=mean_over((score_aux <= m_out).float(), roles.energy),
        active_gradient_id=(score_id <= m_in).float().mean(),
        active_gradient_aux=mean_over((score_aux >= m_out).float(), roles.gradient),
    )
