r"""The layers of a network as mathematics: linear maps that know their transpose and their absolute value, and pools.

A linear map W acts on tensors of shape (N, ...). Three views of it are all that bound propagation needs:

    linear(x) = W x,        transpose(y) = W^T y,        absolute() = the map with entries |W_ij|,

and an interval |x - c| <= r is mapped to |W x - W c| <= |W| r, exactly coordinate by coordinate. Zero padding and
stride are part of W: the transpose of a convolution is taken with the output padding that restores the input size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional


class LinearMap(ABC):
    """x -> W x + bias.

    Attributes:
        bias: Of the shape of the result, or broadcast to it.
        summed: What was summed to get the bias, in absolute values and of its shape, where that is more than |bias|.
        moves: Whether every entry of W x is one of x or 0, without any arithmetic.
    """

    bias: Tensor | None
    summed: Tensor | None = None
    moves = False

    @abstractmethod
    def linear(self, values: Tensor) -> Tensor:
        """W x, without the bias; values of shape (N, *input_shape)."""

    @abstractmethod
    def transpose(self, values: Tensor) -> Tensor:
        """W^T y; values of shape (N, *output_shape)."""

    @abstractmethod
    def absolute(self) -> LinearMap:
        """The map |W|, entry by entry, with what was summed to get the bias as its bias: |bias| at least."""

    @property
    def size(self) -> Tensor | None:
        """What was summed to get the bias, in absolute values."""
        return self.summed if self.summed is not None else _abs(self.bias)

    def __call__(self, values: Tensor) -> Tensor:
        """W x + bias."""
        values = self.linear(values)
        return values if self.bias is None else values + self.bias


def _overlap(kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> int:
    return math.prod(
        -(-size // (step // math.gcd(step, apart))) for size, step, apart in zip(kernel, stride, dilation, strict=True)
    )


def _abs(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.abs()


@dataclass(frozen=True)
class Dense(LinearMap):
    """A fully connected layer: weight of shape (outputs, inputs)."""

    weight: Tensor
    bias: Tensor | None
    summed: Tensor | None = None

    def linear(self, values: Tensor) -> Tensor:
        """W x."""
        return values @ self.weight.T

    def transpose(self, values: Tensor) -> Tensor:
        """W^T y."""
        return values @ self.weight

    def absolute(self) -> Dense:
        """|W|."""
        return Dense(self.weight.abs(), self.size)


@dataclass(frozen=True)
class Convolution(LinearMap):
    """A zero-padded convolution over images of the size `input_size` = (H, W); the bias has shape (channels, 1, 1).

    Where a shift in front of the padding has been folded in, the bias has the shape of the output.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    input_size: tuple[int, int]
    summed: Tensor | None = None

    @property
    def kernel(self) -> tuple[int, int]:
        """Size of the kernel."""
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def overlap(self) -> int:
        """The largest number of windows that one entry can belong to."""
        return _overlap(self.kernel, self.stride, self.dilation)

    def linear(self, values: Tensor) -> Tensor:
        """W x."""
        return functional.conv2d(values, self.weight, None, self.stride, self.padding, self.dilation, self.groups)

    def transpose(self, values: Tensor) -> Tensor:
        """W^T y."""
        extra = tuple(
            size + 2 * pad - dilate * (kernel - 1) - 1 - (out - 1) * step
            for size, pad, dilate, kernel, out, step in zip(
                self.input_size,
                self.padding,
                self.dilation,
                self.weight.shape[2:],
                values.shape[2:],
                self.stride,
                strict=True,
            )
        )
        return functional.conv_transpose2d(
            values, self.weight, None, self.stride, self.padding, extra, self.groups, self.dilation
        )

    def absolute(self) -> Convolution:
        """|W|."""
        return replace(self, weight=self.weight.abs(), bias=self.size, summed=None)


@dataclass(frozen=True)
class Scale(LinearMap):
    """A diagonal map: factor and bias broadcast against the layer's shape (normalisation, BatchNorm in eval mode)."""

    factor: Tensor
    bias: Tensor | None
    summed: Tensor | None = None

    def linear(self, values: Tensor) -> Tensor:
        """W x."""
        return values * self.factor

    def transpose(self, values: Tensor) -> Tensor:
        """W^T y."""
        return values * self.factor

    def absolute(self) -> Scale:
        """|W|."""
        return Scale(self.factor.abs(), self.size)


@dataclass(frozen=True)
class AveragePool(LinearMap):
    """Mean over windows; padding counts as zeros."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    input_size: tuple[int, int]
    bias: Tensor | None = None

    @property
    def dilation(self) -> tuple[int, int]:
        """Windows have no holes."""
        return 1, 1

    @property
    def overlap(self) -> int:
        """The largest number of windows that one entry can belong to."""
        return _overlap(self.kernel, self.stride, self.dilation)

    def linear(self, values: Tensor) -> Tensor:
        """W x."""
        return functional.avg_pool2d(values, self.kernel, self.stride, self.padding)

    def transpose(self, values: Tensor) -> Tensor:
        """W^T y: every value is spread over its window, divided by the area."""
        weight = torch.full((1, 1, *self.kernel), 1 / math.prod(self.kernel), dtype=values.dtype, device=values.device)
        single = Convolution(weight, None, self.stride, self.padding, (1, 1), 1, self.input_size)
        flat = single.transpose(values.flatten(0, 1).unsqueeze(1))
        return flat.reshape(*values.shape[:2], *self.input_size)

    def absolute(self) -> AveragePool:
        """|W| = W."""
        return replace(self, bias=_abs(self.bias))


@dataclass(frozen=True)
class Reshape(LinearMap):
    """The same numbers in another shape."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    bias: Tensor | None = None
    moves = True

    def linear(self, values: Tensor) -> Tensor:
        """W x."""
        return values.reshape(-1, *self.output_shape)

    def transpose(self, values: Tensor) -> Tensor:
        """W^T y."""
        return values.reshape(-1, *self.input_shape)

    def absolute(self) -> Reshape:
        """|W| = W."""
        return replace(self, bias=_abs(self.bias))


@dataclass(frozen=True)
class Pad(LinearMap):
    r"""Zeros around a sample, or parts of it cut off.

    A contiguous slice is a Pad that cuts; a concatenation is the sum of Pads.

    Attributes:
        margins: Entries added before and after, one pair for each axis of the sample, channels first; cut off where
            negative.

    Example:
        >>> pad = Pad(((0, 0), (-1, 2)))
        >>> pad(torch.tensor([[[1.0, 2.0]]])), pad.transpose(torch.tensor([[[5.0, 6.0, 7.0]]]))
        (tensor([[[2., 0., 0.]]]), tensor([[[0., 5.]]]))
    """

    margins: tuple[tuple[int, int], ...]
    bias: Tensor | None = None
    moves = True

    def linear(self, values: Tensor) -> Tensor:
        """W x."""
        return functional.pad(values, [end for pair in reversed(self.margins) for end in pair])

    def transpose(self, values: Tensor) -> Tensor:
        """W^T y: what was added is cut off, what was cut off is 0."""
        return functional.pad(values, [-end for pair in reversed(self.margins) for end in pair])

    def absolute(self) -> Pad:
        """|W| = W."""
        return replace(self, bias=_abs(self.bias))


@dataclass(frozen=True)
class Permute(LinearMap):
    """The axes of a sample in another order; axis 0 is the first one behind the batch."""

    order: tuple[int, ...]
    bias: Tensor | None = None
    moves = True

    def linear(self, values: Tensor) -> Tensor:
        """W x."""
        return values.permute(0, *(axis + 1 for axis in self.order))

    def transpose(self, values: Tensor) -> Tensor:
        """W^T y: the inverse order."""
        return values.permute(0, *(self.order.index(axis) + 1 for axis in range(len(self.order))))

    def absolute(self) -> Permute:
        """|W| = W."""
        return replace(self, bias=_abs(self.bias))


@dataclass(frozen=True)
class Selection(LinearMap):
    """Entries along an axis, in any order and any number of times: strided slices, flips, repetitions, shuffles.

    Attributes:
        axis: Axis of the sample; 0 is the first one behind the batch.
        index: Which entries, shape (outputs,), int64.
        length: How many there are.
    """

    axis: int
    index: Tensor
    length: int
    bias: Tensor | None = None
    moves = True

    def linear(self, values: Tensor) -> Tensor:
        """W x."""
        return values.index_select(self.axis + 1, self.index)

    def transpose(self, values: Tensor) -> Tensor:
        """W^T y: entries that were taken more than once add up."""
        shape = [*values.shape]
        shape[self.axis + 1] = self.length
        return values.new_zeros(shape).index_add(self.axis + 1, self.index, values)

    def absolute(self) -> Selection:
        """|W| = W."""
        return replace(self, bias=_abs(self.bias))


@dataclass(frozen=True)
class Separable(LinearMap):
    r"""y = A x B^T on the last two axes of each channel: resampling and pooling of any kind that treats axes apart.

    Attributes:
        rows: A, shape (H', H).
        columns: B, shape (W', W).
    """

    rows: Tensor
    columns: Tensor
    bias: Tensor | None = None

    def linear(self, values: Tensor) -> Tensor:
        """W x."""
        return self.rows.to(values) @ values @ self.columns.to(values).T

    def transpose(self, values: Tensor) -> Tensor:
        """W^T y = A^T y B."""
        return self.rows.to(values).T @ values @ self.columns.to(values)

    def absolute(self) -> Separable:
        """|A| x |B|^T: the entries of W are products of one of A and one of B."""
        return Separable(self.rows.abs(), self.columns.abs(), _abs(self.bias))


@dataclass(frozen=True)
class Transposed(LinearMap):
    """A transposed convolution, x -> W^T x of a convolution W; the bias has shape (channels, 1, 1).

    Attributes:
        operation: W without bias; its `input_size` is the size of the result. The size of x must be that of its
            result, so the output padding of the layer is below its stride.
    """

    operation: Convolution
    bias: Tensor | None = None

    def linear(self, values: Tensor) -> Tensor:
        """W^T x."""
        return self.operation.transpose(values)

    def transpose(self, values: Tensor) -> Tensor:
        """W y."""
        return self.operation.linear(values)

    def absolute(self) -> Transposed:
        """|W^T|."""
        return Transposed(self.operation.absolute(), _abs(self.bias))


@dataclass(frozen=True)
class Addition:
    """The sum of two nodes."""


@dataclass(frozen=True)
class MaxPool:
    """Maximum over windows; padding never wins.

    Attributes:
        kernel: Entries of a window on each axis.
        stride: Distance of windows.
        padding: (top, bottom) and (left, right); windows beyond the end that `ceil_mode` adds are bottom and right
            padding.
        dilation: Distance of the entries of a window.
        input_size: Height and width of what it reads.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    input_size: tuple[int, int]

    def __call__(self, values: Tensor) -> Tensor:
        """The pooled values, shape (N, C, H', W')."""
        (top, bottom), (left, right) = self.padding
        if top == bottom <= self.kernel[0] // 2 and left == right <= self.kernel[1] // 2:  # what torch takes itself
            return functional.max_pool2d(values, self.kernel, self.stride, (top, left), self.dilation)
        if self.dilation == (1, 1) and max(top, bottom) < self.kernel[0] and max(left, right) < self.kernel[1]:
            # windows that reach over an edge hold its entries already: to repeat them changes no maximum
            padded = functional.pad(values, (left, right, top, bottom), mode="replicate")
            return functional.max_pool2d(padded, self.kernel, self.stride)
        return functional.max_pool2d(self._padded(values, -math.inf), self.kernel, self.stride, 0, self.dilation)

    def _padded(self, values: Tensor, fill: float) -> Tensor:
        return functional.pad(values, (*self.padding[1], *self.padding[0]), value=fill)

    def windows(self, values: Tensor, fill: float) -> Tensor:
        """The entries of every window, shape (N, C, entries, windows); padding reads `fill`."""
        entries = functional.unfold(self._padded(values, fill), self.kernel, self.dilation, stride=self.stride)
        return entries.reshape(len(values), values.shape[1], math.prod(self.kernel), -1)

    def spread(self, entries: Tensor) -> Tensor:
        """Transpose of `windows`: entries of shape (N, C, entries, windows) summed into (N, C, H, W)."""
        (height, width), ((top, bottom), (left, right)) = self.input_size, self.padding
        size = height + top + bottom, width + left + right
        padded = functional.fold(entries.flatten(1, 2), size, self.kernel, self.dilation, stride=self.stride)
        return padded[..., top : top + height, left : left + width]

    def routing(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        r"""Mask intervals of every (window, entry): [0, 0] if it cannot win, [1, 1] if no other can, else [0, 1].

        The derivative of a maximum is a point of the simplex over the maximisers. Entry j can be one only if
        u_j >= max_i l_i; the comparison is not strict, so ties keep all their candidates.

        Args:
            lower: Lower bounds of the pool's input, shape (N, C, H, W).
            upper: Upper bounds.

        Returns:
            Lower and upper ends, shape (N, C, entries, windows), 0 or 1.
        """
        low, high = self.windows(lower, -math.inf), self.windows(upper, -math.inf)
        possible = high >= low.amax(2, keepdim=True)
        alone = possible & (possible.sum(2, keepdim=True) == 1)
        return alone.to(lower), possible.to(lower)

    def leaders(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The entry of each window with the largest lower bound (the first of equals), and whether it is the maximum.

        It is if no other entry can be larger, l_best >= max u_i over the others; then both lines of a bound are this entry.

        Args:
            lower: Lower bounds of the pool's input, shape (N, C, H, W).
            upper: Upper bounds.

        Returns:
            A mask of shape (N, C, entries, windows), 1 at the entry, and bool of shape (N, C, windows).
        """
        low, high = self.windows(lower, -math.inf), self.windows(upper, -math.inf)
        best = torch.zeros_like(low).scatter(2, low.argmax(2, keepdim=True), 1.0)
        return best, low.amax(2) >= high.masked_fill(best > 0, -math.inf).amax(2)

    @property
    def overlap(self) -> int:
        """The largest number of windows that one entry can belong to."""
        return _overlap(self.kernel, self.stride, self.dilation)


def channelwise(part: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """One number a channel, shape (C,), of what broadcasts against a value of this shape; None if there are more, or none.

    Example:
        >>> channelwise(torch.tensor(2.0), (3, 4, 4)), channelwise(torch.ones(4), (3, 4, 4))
        (tensor([2., 2., 2.]), None)
    """
    aligned = part.reshape([1] * (len(shape) - part.dim()) + list(part.shape))
    if not shape or any(size != 1 for size in aligned.shape[1:]):
        return None
    return aligned.reshape(-1).expand(shape[0])
