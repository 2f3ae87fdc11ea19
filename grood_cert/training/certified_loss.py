r"""Bounds of the energy score over l_inf balls that a network can be trained on.

    L_certified = E_aux[relu(m_out - S_lb)^2]  ( +  E_id[relu(S_ub - m_in)^2] )

S_lb <= S(x') <= S_ub for every x' in the ball around x. It is L_S with the score's worst value in the ball in place of
the score, so an outlier that satisfies it is proved to stay above m_out. Both methods bound every layer by intervals:

* "ibp": S_lb = -LSE(u) and S_ub = -LSE(l) from the intervals l <= f <= u of the logits;
* "crown-ibp": besides, one linear row for each bound is pulled back to the image through lines around the
  activations, the chord row for S_lb and the Gibbs row at p = softmax f(x) for S_ub (`grood_cert.bounds.score`); the
  better bound counts.

Bounds are of the eval-mode network: BatchNorm reads its running statistics, whatever the mode. The cross-entropy of a
layer in train mode does not mind smaller weights, the bounds ask for them, and running statistics lag behind: such
layers should be held in eval mode (fine-tuning) or left out of the network. Bounds are differentiable in the parameters
almost everywhere. In float64 they hold like the package's other bounds; in float32, as used in
training, up to rounding, so what training prints is no certificate.

References:
    Bitterwolf et al., "Certifiably Adversarially Robust Detection of Out-of-Distribution Data" (GOOD), NeurIPS 2020;
    Gowal et al., "Scalable Verified Training for Provably Robust Image Classification" (IBP), ICCV 2019;
    Zhang et al., "Towards Stable and Efficient Training of Verifiably Robust Neural Networks" (CROWN-IBP), ICLR 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from grood_cert.ball import Ball
from grood_cert.bounds.backward import Pullback
from grood_cert.bounds.folding import folded
from grood_cert.bounds.intervals import intervals
from grood_cert.bounds.score import chord_lower, chord_slopes, gibbs_upper
from grood_cert.networks.capture import live_graph
from grood_cert.scores import energy


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
    graph = folded(live_graph(network, tuple(ball.center.shape[1:])))
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


def certified_loss(
    network: nn.Module,
    images_id: Tensor | None,
    images_aux: Tensor,
    eps: float,
    m_in: float,
    m_out: float,
    method: str,
) -> Tensor:
    r"""L_certified; formula above.

    Args:
        network: f in any mode.
        images_id: ID images, shape (n_id, C, H, W), or None to leave their term out.
        images_aux: Auxiliary outliers, shape (n_aux, C, H, W); there may be none.
        eps: Radius of the l_inf balls, pixel units.
        m_in: Margin of ID.
        m_out: Margin of the outliers.
        method: "ibp" or "crown-ibp".

    Returns:
        A scalar.
    """
    count = len(images_aux)
    images = images_aux if images_id is None else torch.cat([images_aux, images_id])
    ball = Ball(images, images.new_full((len(images),), eps), "linf")
    lower, upper = energy_interval(network, ball, method)
    loss = functional.relu(m_out - lower[:count]).square().sum() / max(1, count)
    return loss if images_id is None else loss + functional.relu(upper[count:] - m_in).square().mean()
