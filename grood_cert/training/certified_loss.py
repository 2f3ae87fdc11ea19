r"""The worst value of the energy score in an l_inf ball, bounded from outside and sought from inside, to train on.

    L_certified = (1 - a) L_S(adversarial) + a L_S(bound)

    L_S(bound)        E_aux[relu(m_out - S_lb)^2] + E_id[relu(S_ub - m_in)^2],       S_lb <= S(x') <= S_ub in the ball
    L_S(adversarial)  the same with S(x') at the point x' of the ball where an attack has ended, between the bounds

The loss at the worst point lies between the two. An outlier that satisfies the first is proved to stay above m_out, but
what bounds can prove costs accuracy; the second costs less and proves nothing. a = 1 trains bounds alone, a = 0 is
adversarial training (ATD and HALO do so with their scores), and in between the mix is the expressive loss MTL-IBP, with
the score in place of the cross-entropy. The ID terms may be left out.

*Small boxes.* With `certified_box` = b < 1 the bounds are those over a box of radius b eps alone, around the point nearest
to the end of the attack such that the box stays within the ball (SABR): that end is in it, the rest of the ball is not.
Then L_S(bound) is still at least L_S(adversarial), but no bound of the loss at the worst point. It is for training only.

*Intervals.* Bounds of a wide network are loose from the start, and training may please them by neurons that never act. While
the radius grows, L_intervals, a mean over the ReLU layers, asks for layers that widen no interval more than twice (t = 1/2), and
for neurons that are sure to act and such that are sure not to in balance:

    relu(t - D_0 / D) / t  +  relu(t - m / M) / t  +  relu(t - v / V) / t

    D, D_0    mean radius of the intervals of the layer's inputs [l, u], and of the image as normalised
    m <= M    mean of |c| 1{l > 0} and mean of |c| 1{u < 0}, the smaller one first; c = (l + u) / 2
    v <= V    mean of (c - c_mean)^2 1{l > 0} and mean of (c - c_mean)^2 1{u < 0}, likewise

Means are over neurons and samples of the batch; a quotient with denominator 0 counts as 0.

The attack is projected sign-gradient ascent on -S for outliers and on S for ID, from a random point of the ball. Bounds
go through the network layer by layer, as intervals:

* "ibp": S_lb = -LSE(u) and S_ub = -LSE(l) from the intervals l <= f <= u of the logits;
* "crown-ibp": besides, one linear row for each bound is pulled back to the image through lines around the
  activations, the chord row for S_lb and the Gibbs row at p = softmax f(x) for S_ub (`grood_cert.bounds.score`); the
  better bound counts.

Both are of the eval-mode network: BatchNorm reads its running statistics, whatever the mode. The cross-entropy of a
layer in train mode does not mind smaller weights, the bounds ask for them, and running statistics lag behind: such
layers should be held in eval mode (fine-tuning) or left out of the network. Balls are around the pixels clipped to
[0, 1], which training noise leaves. Bounds are differentiable in the parameters almost everywhere. In float64 they hold
like the package's other bounds; in float32, as used in training, up to rounding, so what training prints is no
certificate.

References:
    Bitterwolf et al., "Certifiably Adversarially Robust Detection of Out-of-Distribution Data" (GOOD), NeurIPS 2020;
    Gowal et al., "Scalable Verified Training for Provably Robust Image Classification" (IBP), ICCV 2019;
    Zhang et al., "Towards Stable and Efficient Training of Verifiably Robust Neural Networks" (CROWN-IBP), ICLR 2020;
    Shi et al., "Fast Certified Robust Training with Short Warmup", NeurIPS 2021 (L_intervals);
    Müller et al., "Certified Training: Small Boxes are All You Need" (SABR), ICLR 2023;
    De Palma et al., "Expressive Losses for Verified Robustness via Convex Combinations" (MTL-IBP), ICLR 2024;
    Azizmalayeri et al., "Your Out-of-Distribution Detection Method is Not Robust!" (ATD), NeurIPS 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from grood_cert.ball import Ball
from grood_cert.bounds.backward import Pullback
from grood_cert.bounds.folding import folded
from grood_cert.bounds.intervals import intervals, through
from grood_cert.bounds.score import chord_lower, chord_slopes, gibbs_upper
from grood_cert.interval import Interval
from grood_cert.networks.activations import LeakyReLU
from grood_cert.networks.capture import live_graph
from grood_cert.networks.graph import Graph
from grood_cert.networks.operations import Scale
from grood_cert.scores import energy
from grood_cert.sections import ObjectiveSection

_TOLERANCE = 0.5  # t


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
    return _score_interval(graph, ball, intervals(graph, ball), method)


def _score_interval(graph: Graph, ball: Ball, found: list[Interval], method: str) -> tuple[Tensor, Tensor]:
    """Bounds of S from the intervals of all nodes."""
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
    device = "cpu" if generator is None else generator.device
    noise = torch.rand(ball.center.shape, generator=generator, device=device).to(ball.center)
    points = ball.lower + noise * (ball.upper - ball.lower)
    step = ball.per_pixel(sign.to(ball.eps) * ball.eps * 2 / steps)
    for _ in range(steps):
        with torch.enable_grad():
            points.requires_grad_(True)
            (gradient,) = torch.autograd.grad(energy(graph(points)).sum(), points, retain_graph=True)
        points = ball.project(points.detach() + step * gradient.sign())
    return points


def small_boxes(ball: Ball, points: Tensor, share: float) -> Ball:
    """Boxes of a share of the radius within l_inf balls, each around the point nearest to a given one that allows it.

    Args:
        ball: Batch of l_inf balls.
        points: A point of each.
        share: In (0, 1].

    Example:
        >>> ball = Ball(torch.full((1, 3), 0.5), 0.2, "linf")
        >>> small_boxes(ball, torch.tensor([[0.3, 0.45, 0.7]]), 0.5).center
        tensor([[0.4000, 0.4500, 0.6000]])
    """
    center = Ball(ball.center, (1 - share) * ball.eps, "linf").project(points)
    return Ball(center, share * ball.eps, "linf")


def _quotient(one: Tensor, other: Tensor) -> Tensor:
    """The smaller over the larger of two numbers that are not negative; 0 where both are 0."""
    return torch.minimum(one, other) / torch.maximum(one, other).clamp(min=torch.finfo(one.dtype).tiny)


def _radius(interval: Interval) -> Tensor:
    lower, upper = interval
    return (upper - lower).mean() / 2


def _normalised(graph: Graph, ball: Ball) -> Interval:
    """The pixels' intervals behind the diagonal maps that the network begins with."""
    found = (ball.lower, ball.upper)
    for number, node in enumerate(graph.nodes[1:]):
        if not isinstance(node.operation, Scale) or node.inputs != (number,):
            break
        found = through(node.operation, [found])
    return found


def interval_loss(graph: Graph, found: list[Interval], image: Interval) -> Tensor:
    """L_intervals; formula above.

    Args:
        graph: The network.
        found: Intervals of its nodes over a batch.
        image: Those of the image as normalised.

    Returns:
        A scalar, 0 if there is no ReLU.
    """

    def short(quotient: Tensor) -> Tensor:
        return functional.relu(_TOLERANCE - quotient) / _TOLERANCE

    layers = [found[node.inputs[0]] for node in graph.nodes if isinstance(node.operation, LeakyReLU)]
    total = image[0].new_zeros(())
    for lower, upper in layers:
        center, active, inactive = (lower + upper) / 2, lower > 0, upper < 0
        spread = (center - center.mean()).square()
        total = total + short(_radius(image) / _radius((lower, upper)))
        total = total + short(_quotient((center * active).mean(), (-center * inactive).mean()))
        total = total + short(_quotient((spread * active).mean(), (spread * inactive).mean()))
    return total / max(1, len(layers))


def certified_loss(
    network: nn.Module,
    images_id: Tensor,
    images_aux: Tensor,
    eps: float,
    section: ObjectiveSection,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""L_certified and L_intervals; formulas above.

    Args:
        network: f in any mode.
        images_id: ID images, shape (n_id, C, H, W); their terms count if the section certifies "both".
        images_aux: Auxiliary outliers, shape (n_aux, C, H, W); there may be none.
        eps: Radius of the l_inf balls, pixel units.
        section: Margins, method, mix, share of the box and steps of the attack.
        generator: For the first points of the attack.

    Returns:
        Two scalars; the second is 0 where it has no weight: without `lambda_intervals`, or at the final radius.

    Raises:
        InputError: If the network holds a layer that cannot be bounded.
    """
    count = len(images_aux)
    images = torch.cat([images_aux, images_id]) if section.certified == "both" else images_aux
    ball = Ball(images.clamp(0, 1), eps, "linf")
    graph = live_graph(network, tuple(images.shape[1:]))

    def loss(score_aux: Tensor, score_id: Tensor) -> Tensor:
        outside = functional.relu(section.m_out - score_aux).square().sum() / max(1, count)
        inside = functional.relu(score_id - section.m_in).square().sum() / max(1, len(score_id))
        return outside + inside

    share = section.certified_mix
    total = regularity = images.new_zeros(())
    if share < 1 or section.certified_box < 1:
        sign = torch.ones_like(ball.eps)
        sign[:count] = -1
        points = adversarial_points(graph, ball, sign, section.certified_attack_steps, generator)
    if share < 1:
        score = energy(graph(points))
        total = total + (1 - share) * loss(score[:count], score[count:])
    if share > 0:
        box = ball if section.certified_box == 1 else small_boxes(ball, points, section.certified_box)
        flat = folded(graph)
        found = intervals(flat, box)
        lower, upper = _score_interval(flat, box, found, section.certified_method)
        total = total + share * loss(lower[:count], upper[count:])
        if section.lambda_intervals > 0 and eps < section.certified_eps:
            regularity = interval_loss(flat, found, _normalised(graph, box))
    return total, regularity
