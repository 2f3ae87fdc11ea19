r"""Rows that start at a unit of a convolutional layer see a window of each layer before it, and are kept to it.

A unit at place i of an axis reads, through any number of convolutions and poolings, the entries

    step i - before,  ...,  step i - before + size - 1

of an earlier layer. Behind a layer with kernel k, stride s, padding p and dilation d the numbers become
size' = (size - 1) s + (k - 1) d + 1, step' = step s, before' = before s + p. Zeros put in front of the layer, or rows cut
off there, only shift the window: before' = before + zeros. Within the window the pull-back is the
same at every place: a transposed convolution without padding, or one matrix for all places. Entries outside the layer
(in its padding) are 0 wherever they could matter. Where two paths meet the smaller window is embedded in the larger.

References:
    Xu et al., "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond", NeurIPS 2020 (its
    implementation has the same idea, "patches").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional

from grood_cert.ball import Ball, support
from grood_cert.bounds.linear_rows import RowBatch
from grood_cert.networks.activations import Activation
from grood_cert.networks.graph import Graph
from grood_cert.networks.operations import Addition, AveragePool, Convolution, LinearMap, Pad, Scale
from grood_cert.networks.transposes import Transposes

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """What the units of a layer see of another one.

    Attributes:
        places: Number of units on each axis.
        size: Entries that each sees.
        step: Entries between the windows of neighbouring units.
        before: Entries by which the first window starts before the layer does.
    """

    places: Pair
    size: Pair = (1, 1)
    step: Pair = (1, 1)
    before: Pair = (0, 0)

    def through(self, operation: Convolution | AveragePool | Pad) -> Window:
        """What the units see of the layer that the operation reads.

        Example:
            >>> import torch
            >>> convolution = Convolution(torch.zeros(1, 1, 3, 3), None, (2, 2), (1, 1), (1, 1), 1, (8, 8))
            >>> Window((4, 4), (3, 3), before=(1, 1)).through(convolution)
            Window(places=(4, 4), size=(7, 7), step=(2, 2), before=(3, 3))
        """
        if isinstance(operation, Pad):
            (_, (top, _), (left, _)) = operation.margins
            return replace(self, before=(self.before[0] + top, self.before[1] + left))
        axes = [
            ((size - 1) * stride + (kernel - 1) * dilation + 1, step * stride, before * stride + padding)
            for size, step, before, kernel, stride, padding, dilation in zip(
                self.size,
                self.step,
                self.before,
                operation.kernel,
                operation.stride,
                operation.padding,
                operation.dilation,
                strict=True,
            )
        ]
        return Window(self.places, *((first, second) for first, second in zip(*axes, strict=True)))

    def union(self, other: Window) -> Window:
        """The smallest window around two."""
        both = [*zip(self.before, other.before, strict=True)]
        ends = [*zip(self.size, other.size, strict=True)]
        before = max(both[0]), max(both[1])
        after = [max(end - start for end, start in zip(ends[axis], both[axis], strict=True)) for axis in (0, 1)]
        return replace(self, size=(before[0] + after[0], before[1] + after[1]), before=before)

    def gather(self, maps: Tensor) -> Tensor:
        """The entries of every window, zeros outside: (N, C, H, W) to (N, places, C * size)."""
        extent = [(self.places[axis] - 1) * self.step[axis] + self.size[axis] for axis in (0, 1)]
        margins = []
        for axis in (1, 0):
            after = extent[axis] - self.before[axis] - maps.shape[2 + axis]
            margins += [max(self.before[axis], 0), max(after, 0)]
        top, left = (max(-before, 0) for before in self.before)  # windows may lie outside the layer altogether
        padded = functional.pad(maps, margins)[:, :, top : top + extent[0], left : left + extent[1]]
        seen = padded.unfold(2, self.size[0], self.step[0]).unfold(3, self.size[1], self.step[1])
        return seen.permute(0, 2, 3, 1, 4, 5).reshape(len(maps), math.prod(self.places), -1)


@dataclass(frozen=True)
class WindowRows(RowBatch):
    """Rows on windows: shape (B, places, R, C * size), first axes of length 1 where rows do not differ.

    Attributes:
        window: Which entries the rows hold.
        inside: Whether the entries outside the layer are known to be 0.
    """

    values: Tensor
    shape: tuple[int, ...]
    window: Window
    inside: bool = True

    def view(self, maps: Tensor) -> Tensor:
        """Shape (N, places, 1, C * size)."""
        return self.window.gather(maps.expand(-1, *self.shape)).unsqueeze(2)

    def own(self) -> WindowRows:
        """They broadcast."""
        return self

    def dot(self, view: Tensor) -> Tensor:
        """Shape (N, places, R)."""
        if self.values.shape[:2] == (1, 1):
            return functional.linear(view.squeeze(2), self.values[0, 0])
        return (self.values @ view.mT).squeeze(-1)

    def plus(self, other: WindowRows) -> WindowRows:
        """On the smallest window around both."""
        window = self.window.union(other.window)
        values = self._embedded(window) + other._embedded(window)
        return replace(self, values=values, window=window, inside=self.inside and other.inside)

    def _entries(self) -> Tensor:
        """Shape (B, places, R, C, *size)."""
        return self.values.reshape(*self.values.shape[:-1], self.shape[0], *self.window.size)

    def _embedded(self, window: Window) -> Tensor:
        margins = []
        for axis in (1, 0):
            start = window.before[axis] - self.window.before[axis]
            margins += [start, window.size[axis] - self.window.size[axis] - start]
        return functional.pad(self._entries(), margins).flatten(-3)

    def _cleared(self) -> WindowRows:
        """With zeros outside the layer."""
        if self.inside:
            return self
        return self.with_values(self.values * self.view(self.values.new_ones(1, *self.shape)), inside=True)

    def through(self, number: int, operation: LinearMap, shape: tuple[int, ...], transposes: Transposes) -> WindowRows:
        """Through a convolution, an average pool, zeros around a layer or a diagonal map."""
        if isinstance(operation, Scale):
            return self.with_values(
                self.values * self.view(operation.factor.expand(self.shape).unsqueeze(0)), inside=True
            )
        assert isinstance(operation, Convolution | AveragePool | Pad)
        window = self.window.through(operation)
        if isinstance(operation, Pad):
            before, after = operation.margins[0]
            entries = functional.pad(self._cleared()._entries(), (0, 0, 0, 0, -before, -after))
            return WindowRows(entries.flatten(-3), shape, window, inside=False)
        local = replace(operation, padding=(0, 0), input_size=window.size)
        rows = self._cleared()._entries()
        values = transposes(number, local, rows.flatten(0, 2)).reshape(*rows.shape[:3], -1)
        return WindowRows(values, shape, window, inside=False)

    def support(self, ball: Ball) -> Tensor:
        """Shape (B, places, R)."""
        rows = self._cleared().values
        low, high = self.view(ball.lower - ball.center), self.view(ball.upper - ball.center)
        batch, places = low.shape[:2]
        rows = rows.expand(batch, places, -1, -1).flatten(0, 1)
        eps = ball.eps.repeat_interleave(places)
        bound = support(rows, low.flatten(0, 1), high.flatten(0, 1), eps, ball.norm)
        return bound.reshape(batch, places, -1)

    def with_values(self, values: Tensor, inside: bool = False) -> WindowRows:
        """On the same window."""
        return replace(self, values=values, inside=inside or self.inside)


def windows(graph: Graph, node: int) -> dict[int, Window] | None:
    """What the units of a node see of each node before it; None where a layer on the way has no windows."""
    if len(graph.nodes[node].shape) != 3:
        return None
    found = {node: Window(graph.nodes[node].shape[1:])}  # type: ignore[arg-type]
    for number in range(node, 0, -1):
        if number not in found:
            continue
        operation, window = graph.nodes[number].operation, found[number]
        if isinstance(operation, Convolution | AveragePool | Pad):
            window = window.through(operation)
        elif not isinstance(operation, Scale | Activation | Addition):
            return None
        for origin in graph.nodes[number].inputs:
            found[origin] = found[origin].union(window) if origin in found else window
    return found
