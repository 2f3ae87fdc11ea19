r"""Jacobian-CROWN: a linear relaxation of the backward pass.

The gradient of p . f at x' is computed by a network whose input is p and whose layers are the transposes of those of
f, with the derivatives m of the activations as factors:

    G_last = p,     G_in = W^T G_out  (linear),     T = m G_out,  m in [s_l, s_u]  (activation),     sums where paths meet.

It is bounded as CROWN bounds a network, with P (softmax box and simplex) as the input set.

*Lines.* For g in [a, b] and m in [s_l, s_u], m g lies between psi(g) = min(s_l g, s_u g), concave, and
phi(g) = max(s_l g, s_u g), convex. A line that is above phi at a and b is above it between them; the same for psi
from below. The chords are the best such lines.

*Rows.* An upper bound of a row A . G_n: A is pushed towards the logits, i.e. *forward* through f without biases
(A . W^T G = (W A) . G; where a node feeds two branches A goes to both, where branches are added the rows add up). At
an activation, positive entries of A take the upper line of T, negative ones the lower, constants add up. At a
maximum pool a window contributes G_w sum_j A_j m_j with m in the simplex over its possible winners, i.e. G_w c with c
between the smallest and the largest A_j: the same chord argument with [s_l, s_u] = [min A_j, max A_j]. At the logits
max over p in P of A . p is a fractional knapsack. Each step replaces a function by a pointwise larger one.

*Sweep.* From the last nonlinear layer to the first, unit rows +-e_i bound those G that decide about a line (s_l < s_u
and an interval that contains 0: for a >= 0 or b <= 0 the chords do not depend on a and b). Interval arithmetic runs
along and is intersected. Every bound holds for all x' in the ball, so they may be used together.

*Final norm* with a_j <= g_j <= b_j for g = grad(p . f)(x'), valid for all x' and all p in P:

    l_inf ball  sum_j |g_j| <= UB[s] + sum_j c_j,      |g| <= s g + c the chord on [a, b]
    l_2 ball    sum_j g_j^2 <= UB[a + b] - sum_j a_j b_j,        since (g - a)(g - b) <= 0
    l1 ball     max_j |g_j| <= max_j max(|a_j|, |b_j|)

each also bounded by the norm of max(|a|, |b|). The Lipschitz constant of S is ess sup ||J^T p||_q with p = softmax f
in P. With P = {p_0}, p_0 = softmax f(x), the result bounds the constant of p_0 . f, which is enough for the ID side:
LSE is convex, LSE(f(x')) >= LSE(f(x)) + p_0 . (f(x') - f(x)), hence S(x') <= S(x) + L_p0 ||x' - x||.

*Rounding.* With m the gradient's magnitude, m <- |W|^T m between two nonlinear layers (`gradient_intervals`), lines are
moved outward by 2e-12 max(|s_l|, |s_u|) m and rows A of G_n by 1e-12 |A| . m: what cancels is charged where it cancels
(`grood_cert.bounds.rounding`).

References:
    Zhang et al., NeurIPS 2018 (CROWN); Shi et al., "Efficiently Computing Local Lipschitz Constants of Neural
    Networks via Bound Propagation", NeurIPS 2022 (the backward pass as a network).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grood_cert.ball import Norm
from grood_cert.bounds.hidden import DEFAULT_MEMORY, Preactivations
from grood_cert.bounds.linear_rows import UnitRows, over_rows, unit_blocks
from grood_cert.bounds.simplex import SoftmaxWeights
from grood_cert.interval import ROUNDING, Interval
from grood_cert.lipschitz.interval import gradient_intervals, norm_of_box
from grood_cert.networks.activations import Activation
from grood_cert.networks.graph import Graph
from grood_cert.networks.operations import Addition, LinearMap, MaxPool


def chords(slopes: Interval, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Lines around T = m g for m in [s_l, s_u], g in [a, b].

    Any slope is sound once the constant puts the line on the right side of phi (psi) at both ends, so the division
    needs no protection but from 0/0.

    Args:
        slopes: s_l and s_u.
        lower: a.
        upper: b.

    Returns:
        Slope and constant below, slope and constant above.

    Example:
        >>> one = torch.ones(1)
        >>> chords((0 * one, one), -one, 3 * one)  # an unstable ReLU: -1/4 (3 - g) <= T <= 3/4 (g + 1)
        (tensor([0.2500]), tensor([-0.7500]), tensor([0.7500]), tensor([0.7500]))
    """
    width = upper - lower

    def line(left: Tensor, right: Tensor, top: bool) -> tuple[Tensor, Tensor]:
        slope = torch.where(width > 0, (right - left) / width, slopes[1])
        slope = torch.where(slopes[0] == slopes[1], slopes[0], slope)
        slope = torch.minimum(torch.maximum(slope, slopes[0]), slopes[1])
        ends = left - slope * lower, right - slope * upper
        constant = torch.maximum(*ends) if top else torch.minimum(*ends)
        return slope, torch.where(slopes[0] == slopes[1], 0.0, constant)

    at_lower, at_upper = (slopes[0] * lower, slopes[1] * lower), (slopes[0] * upper, slopes[1] * upper)
    low = line(torch.minimum(*at_lower), torch.minimum(*at_upper), False)
    high = line(torch.maximum(*at_lower), torch.maximum(*at_upper), True)
    return (*low, *high)


class _Backward:
    """Upper bounds of rows of gradients, through the nonlinear layers whose gradients are already bounded."""

    def __init__(self, graph: Graph, slopes: tuple[Interval, ...], weights: SoftmaxWeights, memory: int) -> None:
        self._graph = graph
        self._slopes = dict(zip(graph.nonlinear, slopes, strict=True))
        self._weights = weights
        self._memory = memory
        # (mean slope, half difference of slopes, the same of the constants): upper line of A T = A mean + |A| half
        self._lines: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._gradients: dict[int, Interval] = {}
        self._magnitudes: dict[int, Tensor] = {}
        self._last_reader = {i: number for number, node in enumerate(graph.nodes) for i in node.inputs}

    def refine(self, number: int, lower: Tensor, upper: Tensor, magnitude: Tensor) -> Interval:
        """Sharpen the interval of the gradient with respect to the output of a nonlinear node, and set its lines."""
        low_slope, high_slope = self._slopes[number]
        undecided = low_slope < high_slope
        if undecided.shape != lower.shape:
            undecided = undecided.any(2).reshape(lower.shape)
        needed = (undecided & (lower < 0) & (upper > 0)).flatten(1)
        found = self.bounds(number, needed, magnitude)
        lower = torch.maximum(lower, found[0].reshape(lower.shape))
        upper = torch.minimum(upper, found[1].reshape(upper.shape))
        self._gradients[number], self._magnitudes[number] = (lower, upper), magnitude
        if isinstance(self._graph.nodes[number].operation, Activation):
            slope_low, constant_low, slope_high, constant_high = chords(self._slopes[number], lower, upper)
            charge = 2 * ROUNDING * torch.maximum(low_slope.abs(), high_slope.abs()) * magnitude
            self._lines[number] = (
                (slope_high + slope_low) / 2,
                (slope_high - slope_low) / 2,
                (constant_high + constant_low) / 2,
                (constant_high - constant_low) / 2 + charge,
            )
        return lower, upper

    def bounds(self, node: int, needed: Tensor, magnitude: Tensor) -> Interval:
        """Bounds of the needed entries of G at a node, of some magnitude, infinite elsewhere; shape (B, N)."""
        size, shape = self._graph.nodes[node].size, self._graph.nodes[node].shape
        lower = torch.full_like(needed, -torch.inf, dtype=torch.float64)
        upper = torch.full_like(needed, torch.inf, dtype=torch.float64)
        widest = max(item.size for item in self._graph.nodes[node:])
        for index, units in unit_blocks(needed, 8 * 4 * widest, self._memory):
            value = self.upper(node, units.start(size, shape), units)
            high, low = value[:, : index.shape[1]], -value[:, index.shape[1] :]
            margin = ROUNDING * magnitude.flatten(1).gather(1, index)
            upper.scatter_(1, index, high + margin)
            lower.scatter_(1, index, low - margin)
        return lower, upper

    def upper(self, start: int, rows: Tensor, units: UnitRows | None = None) -> Tensor:
        """UB of A . G_start; rows in shared form (n, *shape) when `units` deals them out, else (B, R, *shape)."""
        nodes = self._graph.nodes
        tangents: dict[int, Tensor] = {start: rows}
        constants: Tensor | float = 0.0

        def own(number: int) -> Tensor:
            tensor = tangents[number]
            return units.own(tensor) if units is not None and tensor.dim() == len(nodes[number].shape) + 1 else tensor

        for number in range(start + 1, len(nodes)):
            node = nodes[number]
            reached = [i for i in node.inputs if i in tangents]
            if not reached:
                continue
            operation, origin = node.operation, reached[0]
            if isinstance(operation, LinearMap):
                result = over_rows(operation.linear, tangents[origin], len(nodes[origin].shape))
            elif isinstance(operation, Addition):
                if len(reached) == 1:
                    result = tangents[origin]
                elif tangents[reached[0]].dim() == tangents[reached[1]].dim():
                    result = tangents[reached[0]] + tangents[reached[1]]
                else:
                    result = own(reached[0]) + own(reached[1])
            elif isinstance(operation, Activation):
                row = own(origin)
                size = row.abs()
                mean, half, constant_mean, constant_half = self._lines[number]
                term = row.flatten(2) @ constant_mean.flatten(1).unsqueeze(-1)
                term = term + size.flatten(2) @ constant_half.flatten(1).unsqueeze(-1)
                constants = constants + term.squeeze(-1)
                result = row * mean.unsqueeze(1) + size * half.unsqueeze(1)
            else:
                assert isinstance(operation, MaxPool)
                result, term = self._through_pool(number, operation, own(origin))
                constants = constants + term
            tangents[number] = result
            for i in reached:
                if self._last_reader[i] == number:
                    tangents.pop(i, None)
        return self._weights.maximum(own(len(nodes) - 1)) + constants

    def _through_pool(self, number: int, pool: MaxPool, row: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = (end.flatten(2).unsqueeze(1) for end in self._gradients[number])  # (B, 1, C, windows)
        possible = (self._slopes[number][1] > 0).unsqueeze(1)
        entries = over_rows(lambda values: pool.windows(values, 0.0), row, 3)
        largest = entries.masked_fill(~possible, -torch.inf).amax(3)
        smallest = entries.masked_fill(~possible, torch.inf).amin(3)
        _, _, slope, constant = chords((smallest, largest), lower, upper)
        magnitude = self._magnitudes[number].flatten(2).unsqueeze(1)
        constant = constant + 2 * ROUNDING * torch.maximum(smallest.abs(), largest.abs()) * magnitude
        shape = self._graph.nodes[number].shape
        return slope.reshape(*slope.shape[:2], *shape), constant.sum((2, 3))


def _norm(backward: _Backward, lower: Tensor, upper: Tensor, magnitude: Tensor, norm: Norm) -> Tensor:
    """The final norm; lower, upper, magnitude: (B, *image)."""

    def joint(rows: Tensor, constants: Tensor) -> Tensor:
        size = (rows.abs() * magnitude + constants.abs()).flatten(1).sum(1)
        return backward.upper(0, rows.unsqueeze(1)).squeeze(1) + constants.flatten(1).sum(1) + ROUNDING * size

    box = norm_of_box(lower.flatten(1), upper.flatten(1), norm)
    if norm == "l1":
        return box
    if norm == "linf":
        one = torch.ones_like(lower)
        _, _, rows, constant = chords((-one, one), lower, upper)
        return torch.minimum(box, joint(rows, constant).clamp(min=0))
    return torch.minimum(box, joint(lower + upper, -lower * upper).clamp(min=0).sqrt())


def jacobian_crown(
    graph: Graph, known: Preactivations, norm: Norm, weights: SoftmaxWeights | None = None, memory: int = DEFAULT_MEMORY
) -> Tensor:
    r"""Upper bound of sup ||J(x')^T p||_q over the ball and P; formulas and proof at the top of this module.

    Args:
        graph: The network.
        known: Bounds over the balls.
        norm: Norm of the balls; "linf" gives the l1 norm of the gradient, "l2" the l2 norm, "l1" the linf norm.
        weights: P; by default the softmax weights that the logits' bounds allow, which bounds the Lipschitz constant
            of S. `SoftmaxWeights.fixed(p0)` bounds that of p0 . f.
        memory: Bytes that blocks of rows may take.

    Returns:
        Shape (B,), per pixel unit; moved up for rounding.
    """
    backward = _Backward(graph, known.slopes, known.weights if weights is None else weights, memory)
    chosen = known.weights if weights is None else weights
    found = gradient_intervals(graph, known.slopes, chosen, backward.refine)
    everything = torch.ones_like(found.lower, dtype=torch.bool).flatten(1)
    linear = backward.bounds(0, everything, found.magnitude)
    lower = torch.maximum(found.lower, linear[0].reshape(found.lower.shape))
    upper = torch.minimum(found.upper, linear[1].reshape(found.upper.shape))
    return _norm(backward, lower, upper, found.magnitude, norm) * (1 + ROUNDING)


def jacobian_crown_corners(graph: Graph, known: Preactivations, norm: Norm, memory: int = DEFAULT_MEMORY) -> Tensor:
    r"""Jacobian-CROWN at the K corners of a simplex around P: tighter where P is wide, at K times the cost.

    With rho = 1 - sum pl the points v_k = pl + rho e_k span a simplex that contains P: p = sum_k lambda_k v_k with
    lambda_k = (p_k - pl_k) / rho, in the simplex and at most (pu_k - pl_k) / rho. The norm is convex in p, so

        ||J^T p||_q <= sum_k lambda_k ||J^T v_k||_q <= max over lambda of sum_k lambda_k L(v_k),

    L(v_k) the bound for the fixed head v_k, whose relaxation is not loosened by a moving p; the maximum is a knapsack.

    Args:
        graph: The network.
        known: Bounds over the balls.
        norm: Norm of the balls.
        memory: Bytes that blocks of rows may take.

    Returns:
        Upper bound of the Lipschitz constant of S, shape (B,).
    """
    lower, upper = known.weights.lower, known.weights.upper
    budget = (1 - lower.sum(1, keepdim=True)).clamp(min=0)
    corners = lower.unsqueeze(1) + budget.unsqueeze(1) * torch.eye(graph.classes).to(lower)
    found = [jacobian_crown(graph, known, norm, SoftmaxWeights.fixed(corner), memory) for corner in corners.unbind(1)]
    share = torch.where(budget > 0, (upper - lower) / budget, torch.ones_like(lower)) * (1 + ROUNDING)
    shares = SoftmaxWeights(torch.zeros_like(lower), share.clamp(max=1))
    return shares.maximum(torch.stack(found, 1).unsqueeze(1)).squeeze(1) * (1 + ROUNDING)
