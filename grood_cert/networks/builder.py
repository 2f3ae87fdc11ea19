r"""Makes graphs: what layers of other libraries mean in terms of our operations.

A `Builder` holds the nodes made so far; every method adds what it needs and answers a `Value`, where the result is and
of which shape (without the batch). Front ends (`capture`, `onnx`) only translate names and arguments.

Piecewise linear functions become ReLUs, exactly, so that every stage of proof takes them:

    min(max(z, a), b) = b - relu(b - a - relu(z - a)),      |z| = relu(z) + relu(-z),
    prelu(z; a) = a z + (1 - a) relu(z),                    max(y, z) = z + relu(y - z),

and a concatenation is the sum of its parts, each padded with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from grood_cert.errors import InputError
from grood_cert.networks.activations import Activation, LeakyReLU
from grood_cert.networks.graph import Graph, Node, Operation, shape_after
from grood_cert.networks.operations import (
    Addition,
    AveragePool,
    Convolution,
    Dense,
    MaxPool,
    Pad,
    Permute,
    Reshape,
    Scale,
    Selection,
    Separable,
    Transposed,
)

Pair = tuple[int, int]
Number = float | Tensor


@dataclass(frozen=True)
class Value:
    """A node that has been made.

    Attributes:
        number: Its number.
        shape: Shape without the batch.
    """

    number: int
    shape: tuple[int, ...]


class Builder:
    """Nodes of a graph in the making.

    Args:
        shape: Shape (C, H, W) of one image.
        like: A tensor of the type and device of constants; float64 on the CPU by default.

    Attributes:
        image: Where the image is.
        name: Name that nodes get, for messages.
        like: Type and device of constants.

    Example:
        >>> builder = Builder((1, 2, 2))
        >>> flat = builder.reshape(builder.image, (4,))
        >>> logits = builder.linear(builder.clamp(flat, 0.25, 0.75), torch.ones(1, 4), None)
        >>> builder.graph(logits)(torch.tensor([0.0, 0.5, 0.5, 1.0]).reshape(1, 1, 2, 2))
        tensor([[2.]])
    """

    def __init__(self, shape: Sequence[int], like: Tensor | None = None) -> None:
        self.like = torch.empty((), dtype=torch.float64) if like is None else like
        self._nodes = [Node(None, (), tuple(shape), "image")]
        self._joined: dict[tuple[int, ...], Value] = {}  # concatenations by axis and parts
        self.image = Value(0, tuple(shape))
        self.name = ""

    def add(self, operation: Operation, *inputs: Value) -> Value:
        """A node.

        Raises:
            InputError: If the operation does not take values of these shapes.
        """
        shape = shape_after(operation, [value.shape for value in inputs])
        self._nodes.append(Node(operation, tuple(value.number for value in inputs), shape, self.name))
        return Value(len(self._nodes) - 1, shape)

    def graph(self, logits: Value) -> Graph:
        """What has been made, without the nodes that the logits do not need.

        Raises:
            InputError: If the result has no shape (K,), or is the image itself, or is made of a value without elements.
        """
        if len(logits.shape) != 1 or not logits.shape[0]:
            raise InputError(
                f"the network must return logits of shape (B, K), got (B, {', '.join(map(str, logits.shape))})"
            )
        if not logits.number:
            raise InputError("the network returns its images")
        nodes = reached(self._nodes[: logits.number + 1])
        for node in nodes:
            if not node.size:
                raise InputError(f"{node.name or 'an operation'}: its value has no elements, shape {node.shape}")
        return Graph(nodes)

    # --- arithmetic

    def scale(self, value: Value, factor: Number = 1.0, shift: Number = 0.0) -> Value:
        """Factor x + shift; both are numbers, or tensors that broadcast against the sample, maybe beyond its shape."""
        parts = [self._fitted(value, part) for part in (factor, shift)]
        shape = tuple(torch.broadcast_shapes(value.shape, *(part.shape for part in parts)))
        value = self.expand(value, shape)
        zero = not isinstance(shift, Tensor) and shift == 0
        return self.add(Scale(parts[0], None if zero else parts[1]), value)

    def _fitted(self, value: Value, part: Number) -> Tensor:
        if not isinstance(part, Tensor):
            return torch.tensor(part, dtype=self.like.dtype, device=self.like.device)
        while part.dim() > len(value.shape) and part.shape[0] == 1:  # the axis of the batch
            part = part.squeeze(0)
        if part.dim() > len(value.shape):
            raise InputError(f"a constant of shape {tuple(part.shape)} for a value of shape {value.shape}")
        return part

    def sum(self, first: Value, second: Value, factor: float = 1.0) -> Value:
        """First + factor second, broadcast against each other."""
        shape = tuple(torch.broadcast_shapes(first.shape, second.shape))
        if factor != 1:
            second = self.scale(second, factor)
        return self.add(Addition(), self.expand(first, shape), self.expand(second, shape))

    # --- linear layers

    def linear(self, value: Value, weight: Tensor, bias: Tensor | None) -> Value:
        """Weight x + bias over the last axis; weight of shape (outputs, inputs)."""
        if value.shape[-1:] != weight.shape[1:]:
            raise InputError(f"a linear layer of {weight.shape[1]} inputs on a value of shape {value.shape}")
        if len(value.shape) == 1:
            return self.add(Dense(weight, bias), value)
        lead, rest = value.shape[:-1], math.prod(value.shape[:-1])
        channels = self.reshape(self.permute(self.reshape(value, (rest, weight.shape[1])), (1, 0)), (-1, rest, 1))
        found = self.convolution(channels, weight[:, :, None, None], bias)
        return self.reshape(self.permute(self.reshape(found, (len(weight), rest)), (1, 0)), (*lead, len(weight)))

    def convolution(
        self,
        value: Value,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        groups: int = 1,
    ) -> Value:
        """A convolution over one or two axes, zero-padded.

        Args:
            value: Shape (C, H, W), or (C, L).
            weight: Shape (outputs, C / groups, kernel...).
            bias: Shape (outputs,).
            stride: One number, or one an axis.
            padding: The same, or both ends of each axis: (top, left, bottom, right), or (before, after).
            dilation: As stride.
            groups: Groups of channels.
        """
        axes = weight.dim() - 2
        value, weight = self._images(value, axes), _images(weight, axes)
        steps, holes = _pair(stride, axes, 1), _pair(dilation, axes, 1)
        (top, bottom), (left, right) = ends = _ends(padding, axes)
        if top != bottom or left != right:
            value, ends = self.pad(value, ((0, 0), *ends)), ((0, 0), (0, 0))
        size = value.shape[1], value.shape[2]
        layer = Convolution(weight, _columns(bias), steps, (ends[0][0], ends[1][0]), holes, groups, size)
        return self._series(self.add(layer, value), axes)

    def transposed_convolution(
        self,
        value: Value,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        output_padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        groups: int = 1,
    ) -> Value:
        """A transposed convolution; weight of shape (C, outputs / groups, kernel...)."""
        axes = weight.dim() - 2
        value, weight = self._images(value, axes), _images(weight, axes)
        steps, edges, holes = _pair(stride, axes, 1), _pair(padding, axes, 0), _pair(dilation, axes, 1)
        extra = _pair(output_padding, axes, 0)
        if any(more >= step for more, step in zip(extra, steps, strict=True)):
            raise InputError("a transposed convolution whose output padding is not below its stride")
        size = tuple(
            (value.shape[1 + i] - 1) * steps[i] - 2 * edges[i] + holes[i] * (weight.shape[2 + i] - 1) + extra[i] + 1
            for i in (0, 1)
        )
        layer = Convolution(weight, None, steps, edges, holes, groups, (size[0], size[1]))
        return self._series(self.add(Transposed(layer, _columns(bias)), value), axes)

    def batch_norm(
        self,
        value: Value,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        epsilon: float,
    ) -> Value:
        """BatchNorm in eval mode, over the first axis."""
        factor = (variance + epsilon).rsqrt()
        if weight is not None:
            factor = factor * weight
        shift = -mean * factor
        summed = shift.abs()
        if bias is not None:
            shift, summed = shift + bias, summed + bias.abs()
        shape = -1, *[1] * (len(value.shape) - 1)
        return self.add(Scale(*(part.reshape(shape) for part in (factor, shift, summed))), value)

    # --- shapes

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """The same numbers in another shape, of which one entry may be -1."""
        known = math.prod(size for size in shape if size != -1)
        target = tuple(math.prod(value.shape) // max(1, known) if size == -1 else size for size in shape)
        if math.prod(target) != math.prod(value.shape):
            raise InputError(f"a value of shape {value.shape} does not fit the shape {tuple(shape)}")
        return value if target == value.shape else self.add(Reshape(value.shape, target), value)

    def permute(self, value: Value, order: Sequence[int]) -> Value:
        """The axes in another order."""
        order = tuple(order)
        return value if order == tuple(range(len(order))) else self.add(Permute(order), value)

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        """Repeated along axes of length 1, new ones in front included."""
        shape = tuple(shape)
        value = self.reshape(value, (*[1] * (len(shape) - len(value.shape)), *value.shape))
        for axis, (length, wanted) in enumerate(zip(value.shape, shape, strict=True)):
            if length != wanted:
                value = self.select(value, axis, [0] * wanted)
        return value

    def select(self, value: Value, axis: int, index: Sequence[int]) -> Value:
        """Entries along an axis."""
        index, length = list(index), value.shape[axis]
        if index == list(range(length)):
            return value
        if index and index == list(range(index[0], index[0] + len(index))):
            margins = [(0, 0)] * len(value.shape)
            margins[axis] = -index[0], index[0] + len(index) - length
            return self.pad(value, margins)
        chosen = torch.tensor(index, dtype=torch.int64, device=self.like.device)
        return self.add(Selection(axis, chosen, length), value)

    def pad(self, value: Value, margins: Sequence[Pair], fill: float = 0.0) -> Value:
        """A constant around the sample, one pair an axis; negative margins cut."""
        margins = tuple(margins)
        if not any(end for pair in margins for end in pair):
            return value
        bias = None
        if fill:
            ends = [end for pair in reversed(margins) for end in pair]
            bias = functional.pad(self.like.new_zeros(value.shape), ends, value=fill)
        return self.add(Pad(margins, bias), value)

    def mirrored(self, value: Value, margins: Sequence[Pair], mode: str) -> Value:
        """Padding by "reflect", "replicate" or "circular" along the last axes, one pair each."""
        ends = [*margins, (0, 0)]
        value = self._images(value, len(margins))
        return self._series(
            self.along_axes(value, lambda axis, images: _padded(images, ends[axis], axis, mode)), len(margins)
        )

    def concatenation(self, values: Sequence[Value], axis: int) -> Value:
        """Values one after another along an axis, empty ones left out; what has been put together before is used again."""
        values = [value for value in values if value.shape[axis]] or values[:1]
        if len(values) == 1:
            return values[0]
        key = (axis, *(value.number for value in values))
        if key not in self._joined:
            head, tail = self.concatenation(values[:-1], axis), values[-1]
            before, after = [(0, 0)] * len(tail.shape), [(0, 0)] * len(tail.shape)
            before[axis], after[axis] = (head.shape[axis], 0), (0, tail.shape[axis])
            self._joined[key] = self.add(Addition(), self.pad(head, after), self.pad(tail, before))
        return self._joined[key]

    # --- pools

    def along_axes(self, value: Value, function: Callable[[int, Tensor], Tensor]) -> Value:
        """A linear map that treats the two axes of images apart.

        Args:
            value: Shape (C, H, W).
            function: Called with an axis (0: height) and images of shape (H, 1, H, 1), or (W, 1, 1, W); answers the
                map's result along that axis.
        """
        matrices = []
        for axis in (0, 1):
            length = value.shape[1 + axis]
            units = torch.eye(length, dtype=torch.float64, device=self.like.device)
            found = function(axis, units.reshape(length, 1, length, 1) if axis == 0 else units[:, None, None])
            matrices.append(found.reshape(length, -1).T.contiguous().to(self.like))
        return self.add(Separable(*matrices), value)

    def average_pool(
        self,
        value: Value,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor: int | None = None,
        axes: int = 2,
    ) -> Value:
        """An average pool over one or two axes."""
        value = self._images(value, axes)
        size, steps = _pair(kernel, axes, 1), _pair(stride or kernel, axes, 1)
        edges = _pair(padding, axes, 0)
        if not ceil_mode and divisor is None and (count_include_pad or edges == (0, 0)):
            return self._series(self.add(AveragePool(size, steps, edges, value.shape[1:3]), value), axes)  # type: ignore[arg-type]

        def along(axis: int, images: Tensor) -> Tensor:
            def own(pair: Pair, other: int) -> list[int]:
                return [pair[0], other] if axis == 0 else [other, pair[1]]

            pooled: Tensor = functional.avg_pool2d(
                images, own(size, 1), own(steps, 1), own(edges, 0), ceil_mode, count_include_pad, divisor and 1
            )
            return pooled / divisor if divisor and axis == 0 else pooled

        return self._series(self.along_axes(value, along), axes)

    def adaptive_average_pool(self, value: Value, output: Sequence[int]) -> Value:
        """An average pool with a result of the given size, over one or two axes."""
        axes = len(output)
        value = self._images(value, axes)
        target = tuple(_pair(output, axes, 1))
        if all(size % wanted == 0 for size, wanted in zip(value.shape[1:], target, strict=True)):
            kernel = value.shape[1] // target[0], value.shape[2] // target[1]
            return self._series(self.average_pool(value, kernel), axes)

        def along(axis: int, images: Tensor) -> Tensor:
            return functional.adaptive_avg_pool2d(images, (target[0], 1) if axis == 0 else (1, target[1]))

        return self._series(self.along_axes(value, along), axes)

    def max_pool(
        self,
        value: Value,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
        axes: int = 2,
    ) -> Value:
        """A maximum pool over one or two axes; `padding` as for a convolution."""
        value = self._images(value, axes)
        size, steps, holes = _pair(kernel, axes, 1), _pair(stride or kernel, axes, 1), _pair(dilation, axes, 1)
        margins = list(_ends(padding, axes))
        if ceil_mode:
            for axis, (before, after) in enumerate(margins):
                length, reach = value.shape[1 + axis], holes[axis] * (size[axis] - 1) + 1
                count = -(-(length + before + after - reach) // steps[axis]) + 1
                if (count - 1) * steps[axis] >= length + before:  # the last window starts inside, or is none
                    count -= 1
                margins[axis] = before, max(0, (count - 1) * steps[axis] + reach - length - before)
        layer = MaxPool(size, steps, (margins[0], margins[1]), holes, (value.shape[1], value.shape[2]))
        return self._series(self.add(layer, value), axes)

    def reduce(self, value: Value, axes: Sequence[int], keep: bool, how: str) -> Value:
        """The "mean", "sum" or "max" over some axes of the sample."""
        axes = sorted(set(axes))
        kept = [axis for axis in range(len(value.shape)) if axis not in axes]
        count = math.prod(value.shape[axis] for axis in axes)
        rest = tuple(value.shape[axis] for axis in kept)
        if axes == [len(value.shape) - 2, len(value.shape) - 1] and len(value.shape) == 3:
            grouped = value
        else:
            grouped = self.reshape(self.permute(value, (*kept, *axes)), (math.prod(rest), count, 1))
        whole = grouped.shape[1], grouped.shape[2]
        found = self.max_pool(grouped, whole) if how == "max" else self.average_pool(grouped, whole)
        shape = [1 if axis in axes else length for axis, length in enumerate(value.shape)] if keep else rest
        found = self.reshape(found, shape)
        return self.scale(found, float(count)) if how == "sum" else found

    # --- activations

    def activation(self, value: Value, operation: Activation) -> Value:
        """An elementwise function."""
        return self.add(operation, value)

    def relu(self, value: Value) -> Value:
        """The function max(z, 0)."""
        return self.add(LeakyReLU(), value)

    def leaky_relu(self, value: Value, slope: Number) -> Value:
        """The function max(z, 0) + slope min(z, 0), for any slope or slopes."""
        if not isinstance(slope, Tensor) and 0 <= slope <= 1:
            return self.add(LeakyReLU(float(slope)), value)
        return self.sum(self.scale(value, slope), self.scale(self.relu(value), 1 - slope))

    def clamp(self, value: Value, low: Number | None, high: Number | None) -> Value:
        """The function min(max(z, low), high)."""
        if low is None and high is None:
            return value
        if low is None:
            assert high is not None
            return self.scale(self.relu(self.scale(value, -1.0, high)), -1.0, high)
        above = self._shifted(self.relu(self._shifted(value, -low)), 0.0 if high is not None else low)
        return above if high is None else self.scale(self.relu(self.scale(above, -1.0, high - low)), -1.0, high)

    def _shifted(self, value: Value, shift: Number) -> Value:
        return value if not isinstance(shift, Tensor) and shift == 0 else self.scale(value, 1.0, shift)

    def magnitude(self, value: Value) -> Value:
        """The function |z|."""
        return self.sum(self.relu(value), self.relu(self.scale(value, -1.0)))

    def maximum(self, first: Value, second: Value) -> Value:
        """The larger of two values, entry by entry."""
        return self.sum(second, self.relu(self.sum(first, second, -1.0)))

    def minimum(self, first: Value, second: Value) -> Value:
        """The smaller of two values, entry by entry."""
        return self.sum(first, self.relu(self.sum(first, second, -1.0)), -1.0)

    # --- one axis as two

    def _images(self, value: Value, axes: int) -> Value:
        """A series (C, L) as images (C, L, 1)."""
        if axes not in (1, 2) or len(value.shape) != axes + 1:
            raise InputError(f"a layer over {axes} axes on a value of shape {value.shape}")
        return self.reshape(value, (*value.shape, 1)) if axes == 1 else value

    def _series(self, value: Value, axes: int) -> Value:
        return self.reshape(value, value.shape[:2]) if axes == 1 and len(value.shape) == 3 else value


def reached(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes that the last one needs, and the image, renumbered."""
    needed = {0, len(nodes) - 1}
    for number in range(len(nodes) - 1, -1, -1):
        if number in needed:
            needed.update(nodes[number].inputs)
    place = {number: new for new, number in enumerate(sorted(needed))}
    return tuple(
        replace(node, inputs=tuple(place[i] for i in node.inputs))
        for number, node in enumerate(nodes)
        if number in needed
    )


def _images(weight: Tensor, axes: int) -> Tensor:
    return weight.unsqueeze(-1) if axes == 1 else weight


def _columns(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.reshape(-1, 1, 1)


def _pair(values: Sequence[int], axes: int, other: int) -> Pair:
    """One number an axis; a series has a second axis of which nothing is asked."""
    whole = tuple(int(value) for value in values)
    if len(whole) == 1 and axes == 2:
        whole *= 2
    if len(whole) != axes:
        raise InputError(f"expected {axes} numbers for {axes} axes, got {whole}")
    return (whole[0], other) if axes == 1 else (whole[0], whole[1])


def _ends(padding: Sequence[int], axes: int) -> tuple[Pair, Pair]:
    """(top, bottom) and (left, right) of a padding: one number, one an axis, or all begins and then all ends."""
    whole = tuple(int(value) for value in padding)
    if len(whole) == 2 * axes:
        begins, ends = _pair(whole[:axes], axes, 0), _pair(whole[axes:], axes, 0)
    else:
        begins = ends = _pair(whole, axes, 0)
    return (begins[0], ends[0]), (begins[1], ends[1])


def _padded(images: Tensor, ends: Pair, axis: int, mode: str) -> Tensor:
    return functional.pad(images, (0, 0, *ends) if axis == 0 else (*ends, 0, 0), mode=mode)
