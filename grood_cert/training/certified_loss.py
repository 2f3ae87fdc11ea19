r"""The worst value of the energy score in an l_inf ball, bounded from outside and sought from inside, to train on.

    L_certified = (1 - a) L_S(adversarial) + a L_S(bound)

    L_S(bound)        E_aux[relu(m_out - S_lb)^2] + E_id[relu(S_ub - m_in)^2],       S_lb <= S(x') <= S_ub in the ball
    L_S(adversarial)  the same with S(x') at the point x' of the ball where an attack has ended, between the bounds

The loss at the worst point lies between the two. An outlier that satisfies the first is proved to stay above m_out, but
what bounds can prove costs accuracy; the second costs less and proves nothing. a = 1 trains bounds alone, a = 0 is
adversarial training (as in ATD, with its score), and in between the mix is the expressive loss MTL-IBP, with
the score in place of the cross-entropy. The ID terms may be left out.

The attack is projected sign-gradient ascent on -S for outliers and on S for ID, from a random point of the ball. Bounds
go through the network layer by layer, as intervals:

* "ibp": S_lb = -LSE(u) and S_ub = -LSE(l) from the intervals l <= f <= u of the logits;
* "crown-ibp": besides, one linear row for each bound is pulled back to the image through lines around the
  activations, the chord row for S_lb and the Gibbs row at p = softmax f(x) for S_ub (`grood_cert.bounds.score`); the
  better bound counts.

Both are of a network whose samples do not reach each other. Where BatchNorm is in train mode that is the one with the
statistics of the loss's own batch, as constants of the images (`grood_cert.training.penalty` says why); without any, the
eval-mode network. Balls are around the pixels clipped to
[0, 1], which training noise leaves. Bounds are differentiable in the parameters almost everywhere. In float64 they hold
like the package's other bounds; in float32, as used in training, up to rounding, so what training prints is no
certificate.

References:
    Bitterwolf et al., "Certifiably Adversarially Robust Detection of Out-of-Distribution Data" (GOOD), NeurIPS 2020;
    Gowal et al., "Scalable Verified Training for Provably Robust Image Classification" (IBP), ICCV 2019;
    Zhang et al., "Towards Stable and Efficient Training of Verifiably Robust Neural Networks" (CROWN-IBP), ICLR 2020;
    De Palma et al., "Expressive Losses for Verified Robustness via Convex Combinations" (MTL-IBP), ICLR 2024;
    Azizmalayeri et al., "Your Out-of-Distribution Detection Method is Not Robust!" (ATD), NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from grood_cert.ball import Ball
from grood_cert.bounds.backward import Pullback
from grood_cert.bounds.folding import folded
from grood_cert.bounds.intervals import intervals
from grood_cert.bounds.score import chord_lower, chord_slopes, gibbs_upper
from grood_cert.networks.capture import live_graph
from grood_cert.networks.graph import Graph
from grood_cert.scores import energy
from grood_cert.sections import ObjectiveSection


def energy_interval(network: nn.Module, ball: Ball, method: str) -> tuple[Tensor, Tensor]:
    r"""Differentiable bounds of S over each ball; formulas above.

    Args:
        network: f in any mode, normalisation included.
        ball: Batch of balls in the network's floating-point type.
        method: "ibp" or "crown-ibp".

    Returns:
        lower, upper: Shape (B,) each, carry the graph to the network's parameters.

    Raises:
        InputError: If the network holds a layer that cannot be bounded.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
        >>> ball = Ball(torch.full((1, 1, 2, 2), 0.5), torch.tensor([0.1]), "linf")
        >>> lower, upper = energy_interval(network, ball, "ibp")  # S = -(w . x + b) moves by 0.1 ||w||_1
        >>> torch.allclose(upper - lower, 0.2 * network[1].weight.abs().sum())
        True
    """
    return _interval(folded(live_graph(network, tuple(ball.center.shape[1:]))), ball, method)


def _interval(graph: Graph, ball: Ball, method: str) -> tuple[Tensor, Tensor]:
    found = intervals(graph, ball)
    low, high = found[-1]
    lower, upper = energy(high), energy(low)
    if method == "ibp":
        return lower, upper
    relaxed = Pullback(graph, ball)
    for number in graph.nonlinear:
        relaxed.add(number, *found[graph.nodes[number].inputs[0]])
    weights, slopes = torch.softmax(graph(ball.center), 1), chord_slopes(low, high)
    rows = relaxed.upper(len(graph.nodes) - 1, torch.stack([-weights, slopes], 1))
    return (
        torch.maximum(lower, chord_lower(rows[:, 1], slopes, high)),
        torch.minimum(upper, gibbs_upper(-rows[:, 0], weights)),
    )


def adversarial_points(graph: Graph, ball: Ball, sign: Tensor, steps: int, generator: torch.Generator | None) -> Tensor:
    r"""Points of l_inf balls at which sign * S is large, by projected sign-gradient ascent.

    From a random point of the ball every step moves each pixel by 2 eps / steps, so that all of the ball is in reach.

    Args:
        graph: f.
        ball: Batch of l_inf balls.
        sign: 1 to climb S, -1 to climb down, shape (B,).
        steps: Number of gradients.
        generator: For the first points.

    Returns:
        Shape (B, C, H, W), without a graph.

    Example:
        >>> from grood_cert.networks.capture import capture
        >>> layer = nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[3.0, -4.0]]))
        >>> graph = capture(nn.Sequential(nn.Flatten(), layer).eval(), (1, 1, 2))  # S = -3 x_1 + 4 x_2 - b
        >>> ball = Ball(torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), 0.1, "linf")
        >>> adversarial_points(graph, ball, torch.tensor([1.0]), 3, None).flatten()
        tensor([0.4000, 0.6000], dtype=torch.float64)
    """
    device, lower, upper = "cpu" if generator is None else generator.device, ball.lower, ball.upper
    noise = torch.rand(ball.center.shape, generator=generator, device=device).to(ball.center)
    points = lower + noise * (upper - lower)
    step = ball.per_pixel(sign.to(ball.eps) * ball.eps * 2 / steps)
    for _ in range(steps):
        with torch.enable_grad():
            points.requires_grad_(True)
            (gradient,) = torch.autograd.grad(energy(graph(points)).sum(), points, retain_graph=True)
        points = (points.detach() + step * gradient.sign()).clamp(lower, upper)
    return points


def certified_loss(
    network: nn.Module,
    images_id: Tensor,
    images_aux: Tensor,
    eps: float,
    section: ObjectiveSection,
    generator: torch.Generator | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> Tensor:
    r"""L_certified; formula above.

    Args:
        network: f in any mode.
        images_id: ID images, shape (n_id, C, H, W); their terms count if the section certifies "both".
        images_aux: Auxiliary outliers, shape (n_aux, C, H, W); there may be none.
        eps: Radius of the l_inf balls, pixel units.
        section: Margins, method, mix and steps of the attack.
        generator: For the first points of the attack.
        buffers: As for `grood_cert.networks.capture.live_graph`.

    Returns:
        A scalar.

    Raises:
        InputError: If the network holds a layer that cannot be bounded.
    """
    count = len(images_aux)
    images = torch.cat([images_aux, images_id]) if section.certified == "both" else images_aux
    ball = Ball(images.clamp(0, 1), eps, "linf")
    graph = live_graph(network, tuple(images.shape[1:]), buffers)

    def loss(score_aux: Tensor, score_id: Tensor) -> Tensor:
        outside = functional.relu(section.m_out - score_aux).square().sum() / max(1, count)
        inside = functional.relu(score_id - section.m_in).square().sum() / max(1, len(score_id))
        return outside + inside

    total, share = images.new_zeros(()), section.certified_mix
    if share < 1:
        sign = torch.ones_like(ball.eps)
        sign[:count] = -1
        score = energy(graph(adversarial_points(graph, ball, sign, section.certified_attack_steps, generator)))
        total = total + (1 - share) * loss(score[:count], score[count:])
    if share > 0:
        lower, upper = _interval(folded(graph), ball, section.certified_method)
        total = total + share * loss(lower[:count], upper[count:])
    return total
