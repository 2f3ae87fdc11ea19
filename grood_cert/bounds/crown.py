r"""Our own bound engine: sound bounds of linear functions c . f(x') of the logits over a ball.

A second engine beside auto_LiRPA (`grood_cert.bounds.auto_lirpa`), with the same interface and the same bounds, for networks of
linear, convolution, BatchNorm, pooling and addition layers with ReLU or leaky ReLU (and others, see `graph`):

* "ibp": intervals; rows are pulled through the linear layers at the end, then closed by the interval of what these read.
* "crown-ibp": linear bounds of the rows asked for, over intervals of the hidden layers.
* "crown": linear bounds of the rows and of the hidden layers, hidden ones intersected with their intervals.

For l_2 and l_1 balls whatever depends on the image linearly is bounded over the ball itself, not over its box, by every
method. Bounds are never looser than auto_LiRPA's by more than rounding, but for smooth activations, whose lines here lie
within a few per cent of the best ones and are tighter as a rule. They are computed in float64, or rows of them in
float32, and moved outward by what rounding can do to them and to the network's evaluation (`rounding`, `single_rows`).

Speed comes from four things: hidden units of convolutional layers are bounded on the window of each layer that they can
see (`windows`), other layers only where a bound can matter, diagonal layers are folded away (`folding`), and rows are
pulled back in blocks that stay in the processor's cache (`backward`).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from grood_cert.ball import Ball
from grood_cert.bounds.engine import Method, Source, way_of
from grood_cert.bounds.folding import folded
from grood_cert.bounds.hidden import DEFAULT_MEMORY, Hidden
from grood_cert.bounds.single_rows import sums_in_float32
from grood_cert.errors import InputError
from grood_cert.interval import Interval
from grood_cert.networks.capture import capture
from grood_cert.networks.graph import Graph

_DEVICE_MEMORY = 2**30


class NativeNetwork:
    """A network whose logits can be bounded over balls of inputs, a `BoundedNetwork`.

    Args:
        network: The model f: (B, C, H, W) -> (B, K) in eval mode, normalisation included. Copied, in float64.
        shape: Shape (C, H, W) of one image.
        method: "ibp", "crown-ibp" or "crown".
        memory: Bytes that blocks of rows may take; by default 16 MiB on a CPU (its cache), 1 GiB on another device.
        graph: The network as a graph, if it has been captured already.
        single: Whether linear bounds may be computed in float32, moved outward by what that can do (`single_rows`): twice as
            fast where there are convolutions, and hardly looser. Where its sums are not known, it is float64 all the same.

    Attributes:
        network: The copy.
        shape: As given.
        method: As given.
        device: Where the parameters are.
        graph: The network as a graph.
        folded: The same with diagonal layers folded into others.

    Raises:
        InputError: If the method is not one of these, the memory is not positive, a module is in train mode, or a
            layer cannot be bounded; the message names it.
        RunError: If the graph does not reproduce the network.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(2, 1)).eval()
        >>> with torch.no_grad():
        ...     _ = network[1].weight.copy_(torch.tensor([[3.0, 4.0]])), network[1].bias.fill_(1.0)
        >>> ball = Ball(torch.full((1, 1, 1, 2), 0.5), torch.tensor([0.125]), "l2")
        >>> lower, upper = NativeNetwork(network, (1, 1, 2), "crown").relax(ball).rows(torch.ones(1, 1, 1))
        >>> round(float(lower), 9), round(float(upper), 9)
        (3.875, 5.125)
    """

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        method: Method,
        memory: int | None = None,
        graph: Graph | None = None,
        single: bool = False,
    ) -> None:
        way_of(method)
        if memory is not None and memory <= 0:
            raise InputError(f"expected a positive number of bytes of memory, got {memory}")
        self.method: Method = method
        self.shape = tuple(shape)
        self.graph = graph or capture(network, self.shape)
        self.network = copy.deepcopy(network).double().requires_grad_(False)
        self.device = self.graph.device
        self.folded = folded(self.graph)
        self.memory = memory or (DEFAULT_MEMORY if self.device.type == "cpu" else _DEVICE_MEMORY)
        self._single = single

    @property
    def single(self) -> bool:
        """Whether linear bounds are computed in float32, as things stand."""
        return self._single and sums_in_float32(self.device)

    def relax(self, ball: Ball) -> NativeRelaxation:
        """Prepare the bounds over a ball; hidden bounds are computed once, at the first rows asked for.

        Raises:
            InputError: If the images have another shape.
        """
        return NativeRelaxation(self, ball)


class NativeRelaxation:
    """Bounds over one batch of balls, a `Relaxation`.

    Attributes:
        ball: The balls.
    """

    def __init__(self, bounded: NativeNetwork, ball: Ball) -> None:
        if tuple(ball.center.shape[1:]) != bounded.shape:
            raise InputError(f"expected images of shape {bounded.shape}, got {tuple(ball.center.shape[1:])}")
        self.ball = ball
        self._bounded = bounded
        center, eps = (value.detach().to(bounded.device, torch.float64) for value in (ball.center, ball.eps))
        self._ball = Ball(center, eps, ball.norm)
        self._hidden: dict[tuple[Source, bool], Hidden] = {}

    def hidden(self, method: Method | None = None) -> Hidden:
        """Bounds of the hidden layers that a method stands on; "ibp" and "crown-ibp" share theirs."""
        bounded = self._bounded
        source, single = way_of(method or bounded.method).hidden, bounded.single
        kind = source, single
        if kind not in self._hidden:
            with torch.no_grad():
                self._hidden[kind] = Hidden(bounded.folded, self._ball, source, None, bounded.memory, single)
        return self._hidden[kind]

    def rows(self, coefficients: Tensor, method: Method | None = None) -> Interval:
        r"""Bounds of c . f(x') over the ball, for every row c.

        Args:
            coefficients: Rows c, shape (B, S, K).
            method: Method for these rows if it differs from the network's own.

        Returns:
            lower, upper: Shape (B, S) each, float64, `lower <= c . f(x') <= upper` for all x' in the ball. NaN where a
            hidden bound of the sample, or the bound itself, is not finite or crosses its partner.

        Raises:
            InputError: If the rows have another shape.
        """
        method = method or self._bounded.method
        hidden, graph = self.hidden(method), self._bounded.folded
        batch, classes = len(self._ball.center), graph.classes
        if coefficients.dim() != 3 or coefficients.shape[0] != batch or coefficients.shape[2] != classes:
            raise InputError(f"expected rows of shape ({batch}, S, {classes}), got {tuple(coefficients.shape)}")
        coefficients = coefficients.detach().to(self._ball.center)
        closed = (
            {number: hidden.intervals[number] for number in graph.nonlinear} if way_of(method).rows == "ibp" else None
        )
        with torch.no_grad():
            lower, upper = hidden.linear(coefficients, closed)
            proved = hidden.proved.unsqueeze(1) & torch.isfinite(lower) & torch.isfinite(upper) & (lower <= upper)
            return torch.where(proved, lower, torch.nan), torch.where(proved, upper, torch.nan)

    def preactivations(self) -> list[Interval]:
        """Bounds of the input of every nonlinear layer.

        Returns:
            One pair (lower, upper) a nonlinear layer, in the order of execution, each with the shape (B, ...) of that
            layer's input. Where nothing is proved they are not finite, or cross.
        """
        return list(self.hidden().inputs.values())
