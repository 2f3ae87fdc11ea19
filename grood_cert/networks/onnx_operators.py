r"""ONNX's operators in terms of our operations, by name.

`OPERATORS` maps an operator's name to what it means to a `Builder`; `WHY` says of others why they cannot be bounded.

Products of two values cannot be, except where an exporter has written out an activation: z sigmoid(z),
z (1 + erf(z / sqrt 2)) / 2 and its like are seen as what they are (`Part`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from grood_cert.errors import InputError
from grood_cert.networks.activations import ELU, GELU, Activation, Hardswish, Sigmoid, SiLU, Softplus, Tanh, TanhGELU
from grood_cert.networks.aten import REASONS, refusal
from grood_cert.networks.builder import Builder, Value

_NEAR = 1e-6  # of a constant in float32 with what it stands for
_FLOATS = 1, 11  # float and double, as ONNX numbers types
_BATCH = "it goes along the batch: images would influence each other"
_KEPT = "its result does not keep the images of a batch apart"
WHY = {
    **dict.fromkeys(("Mul", "MatMul", "Gemm", "Einsum", "Pow", "Attention"), REASONS["mul"]),
    **dict.fromkeys(
        ("LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization"), REASONS["layer_norm"]
    ),
    **dict.fromkeys(("LpNormalization", "LRN", "MeanVarianceNormalization"), REASONS["layer_norm"]),
    **dict.fromkeys(("Div", "Reciprocal", "Sqrt"), REASONS["div"]),
    **dict.fromkeys(("Softmax", "LogSoftmax", "ReduceLogSumExp", "Hardmax"), REASONS["softmax"]),
    **dict.fromkeys(("If", "Loop", "Scan", "NonZero"), REASONS["nonzero"]),
    **dict.fromkeys(("Where", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Sign", "Round"), REASONS["where"]),
    **dict.fromkeys(("Floor", "Ceil", "ThresholdedRelu", "QuantizeLinear", "DynamicQuantizeLinear"), REASONS["where"]),
    **dict.fromkeys(("Cast", "CastLike"), REASONS["to"]),
    **dict.fromkeys(("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"), REASONS["rand"]),
    **dict.fromkeys(("Bernoulli", "Multinomial"), REASONS["rand"]),
    "Erf": "it is read as a part of GELU alone",
}

Array = NDArray[Any]


def line(text: str | bytes) -> str:
    """Printable text, cut between words; onnx leaves what is no UTF-8 as bytes."""
    text = text.decode("ascii", "replace") if isinstance(text, bytes) else text
    text = re.sub(r"[^\x20-\x7e]", "?", text)
    return text if len(text) <= 160 else text[:160].rsplit(" ", 1)[0] + " ..."


@dataclass(frozen=True)
class Part:
    """What is read as a part of an activation that an exporter has written out.

    Attributes:
        kind: "polynomial": sum_i numbers_i z^i. "erf" or "tanh": numbers_0 + numbers_1 t(z), with t(z) =
            erf(z / sqrt 2), or tanh(sqrt(2 / pi) (z + 0.044715 z^3)). "greater" or "less": z > numbers_0, z < numbers_0,
            where both sides are the same to what follows if z = numbers_0.
        source: z.
        numbers: As above.
        what: The operator that made it.
        place: The node.
    """

    kind: str
    source: Value
    numbers: tuple[float, ...]
    what: str
    place: str

    def refused(self) -> InputError:
        """What to raise where something else reads it."""
        return refusal(self.place, self.what, WHY.get(self.what, ""))


@dataclass(frozen=True)
class Memory:
    """How values were made, by their numbers.

    Attributes:
        affine: (z, a, b) for a z + b.
        gates: (activation, z, a) for a sigma(z), with sigma the sigmoid or the hard sigmoid.
    """

    affine: dict[int, tuple[Value, float, float]]
    gates: dict[int, tuple[str, Value, float]]

    def line(self, value: Value) -> tuple[Value, float, float]:
        """The value as a z + b; z is itself where nothing is known."""
        return self.affine.get(value.number, (value, 1.0, 0.0))


@dataclass(frozen=True)
class Call:
    """A node of the file.

    Attributes:
        name: The operator's.
        inputs: Values, parts, constants (float64, or whole numbers), None where left out.
        attributes: By name.
        outputs: How many.
        batch: Number of images in shapes.
        builder: What makes the nodes.
        memory: How values were made.
    """

    name: str
    inputs: tuple[Any, ...]
    attributes: Mapping[str, Any]
    outputs: int
    batch: int
    builder: Builder
    memory: Memory

    @property
    def value(self) -> Value:
        """The first input."""
        return self.value_at(0)

    def value_at(self, place: int) -> Value:
        """An input that depends on the image."""
        found = self.inputs[place]
        if isinstance(found, Part):
            raise found.refused()
        if not isinstance(found, Value):
            raise self.refused("this input must depend on the image")
        return found

    def given(self, place: int) -> Any:
        """An input that must not depend on the image, or None."""
        found = self.inputs[place] if place < len(self.inputs) else None
        if isinstance(found, Value | Part):
            raise self.refused()
        return found

    def weight(self, place: int) -> Tensor:
        """A constant in floating point."""
        found = self.given(place)
        if found is None:
            raise self.refused("an input is missing")
        return self.floats(found)

    def floats(self, array: Array) -> Tensor:
        """A constant in floating point."""
        if array.dtype != np.float64:
            raise self.refused(f"numbers of type {array.dtype}; expected floats")
        return torch.from_numpy(np.array(array))

    def beside(self, value: Value, constant: Tensor) -> Tensor:
        """A constant that broadcasts against a value, the batch's axis left out."""
        if constant.dim() == len(value.shape) + 1 and len(constant) == 1:
            constant = constant.squeeze(0)
        if constant.dim() > len(value.shape):
            raise self.refused(_KEPT)
        return constant

    def numbers(self, name: str, place: int | None = None) -> list[int] | None:
        """Whole numbers, from an attribute or an input."""
        found = self.attributes.get(name) if place is None else self.given(place)
        return None if found is None else [int(number) for number in np.asarray(found).reshape(-1)]

    def get(self, name: str, default: Any) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)

    def axis(self, number: int, rank: int | None = None) -> int:
        """An axis of the sample, from one of the batch's tensor."""
        number += (len(self.value.shape) + 1 if rank is None else rank) if number < 0 else 0
        if number == 0:
            raise self.refused(_BATCH)
        return number - 1

    def sample(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A shape without the batch, which must lead."""
        if not len(shape) or shape[0] != self.batch:
            raise self.refused(_KEPT)
        return tuple(shape[1:])

    def refused(self, reason: str = "") -> InputError:
        """What to raise."""
        return refusal(self.builder.name, self.name, reason or WHY.get(self.name, ""))


Handler = Callable[[Call], Any]


# Arithmetic


def _scaled(call: Call, value: Any, factor: Any = 1.0, shift: Any = 0.0) -> Any:
    """Factor z + shift of a value or a part; constants as they broadcast in ONNX."""
    parts = [call.floats(np.asarray(part, np.float64) if isinstance(part, float) else part) for part in (factor, shift)]
    single = all(part.numel() == 1 for part in parts)
    if isinstance(value, Part):
        if not single or value.kind in ("greater", "less"):
            raise value.refused()
        a, b = (float(part) for part in parts)
        first, *rest = (a * number for number in value.numbers)
        return replace(value, numbers=(first + b, *rest))
    made = call.builder.scale(value, *(_number(call.beside(value, part)) for part in parts))
    if single and made.shape == value.shape:
        a, b = (float(part) for part in parts)
        origin, slope, constant = call.memory.line(value)
        call.memory.affine[made.number] = origin, a * slope, a * constant + b
        if value.number in call.memory.gates and b == 0:
            kind, source, scale = call.memory.gates[value.number]
            call.memory.gates[made.number] = kind, source, a * scale
    return made


def _number(part: Tensor) -> float | Tensor:
    return float(part) if part.dim() == 0 else part


def _part(call: Call, kind: str, source: Value, numbers: Sequence[float] | Array) -> Part:
    return Part(kind, source, tuple(float(number) for number in numbers), call.name, call.builder.name)


def _polynomial(call: Call, value: Any) -> Part:
    if isinstance(value, Part):
        return value
    origin, a, b = call.memory.line(value)
    return _part(call, "polynomial", origin, (b, a))


def _same(first: Value, second: Value) -> bool:
    return len(first.shape) == len(second.shape)


def _added(call: Call, first: Any, second: Any, sign: float = 1.0) -> Any:
    """First + sign second."""
    if not _depends(first):
        return _scaled(call, second, sign, first)
    if not _depends(second):
        return _scaled(call, first, 1.0, sign * call.floats(second).numpy())
    part = next((term for term in (first, second) if isinstance(term, Part)), None)
    if part is not None:
        one, two = _polynomial(call, first), _polynomial(call, second)
        if {one.kind, two.kind} != {"polynomial"} or one.source != two.source:
            raise part.refused()
        length = max(len(one.numbers), len(two.numbers))
        rows = [(*item.numbers, *[0.0] * (length - len(item.numbers))) for item in (one, two)]
        return replace(one, numbers=tuple(a + sign * b for a, b in zip(*rows, strict=True)), what=part.what)
    if not _same(first, second):
        raise call.refused(_KEPT)
    return call.builder.sum(first, second, sign)


def _sum(call: Call) -> Any:
    found, *others = call.inputs
    for other in others:
        found = _added(call, found, other) if _depends(found) or _depends(other) else found + other
    return found


def _depends(value: Any) -> bool:
    return isinstance(value, Value | Part)


def _mean(call: Call) -> Any:
    return _scaled(call, _sum(call), 1 / len(call.inputs))


def _difference(call: Call) -> Any:
    return _added(call, call.inputs[0], call.inputs[1], -1.0)


def _quotient(call: Call) -> Any:
    value, divisor = call.inputs
    if _depends(divisor):
        raise call.refused()
    return _scaled(call, value, 1 / call.floats(divisor).numpy())


def _product(call: Call) -> Any:
    first, second = call.inputs
    if not _depends(first) or not _depends(second):
        value, factor = (first, second) if _depends(first) else (second, first)
        return _scaled(call, value, factor)
    for gate, value in ((first, second), (second, first)):
        if (found := _gated(call, gate, value)) is not None:
            return found
    one, two = _polynomial(call, first), _polynomial(call, second)
    if {one.kind, two.kind} != {"polynomial"} or one.source != two.source or len(one.numbers) + len(two.numbers) > 5:
        raise call.refused()
    return _part(call, "polynomial", one.source, np.convolve(one.numbers, two.numbers))


def _power(call: Call) -> Any:
    exponent = call.weight(1) if call.given(1).dtype.kind == "f" else torch.from_numpy(call.given(1)).double()
    if exponent.numel() != 1 or float(exponent) not in (1.0, 2.0, 3.0):
        raise call.refused()
    part = _polynomial(call, call.value)
    numbers: Any = part.numbers
    for _ in range(int(exponent) - 1):
        numbers = np.convolve(numbers, part.numbers)
    return call.value if float(exponent) == 1 else _part(call, "polynomial", part.source, numbers)


def _gated(call: Call, gate: Any, value: Any) -> Value | None:
    """A value times a gate of itself; None if it is anything else."""
    if not isinstance(value, Value):
        return None
    activation: Activation
    if isinstance(gate, Part):
        if gate.kind not in ("erf", "tanh") or not _near(gate.numbers[0], gate.numbers[1]):
            return None
        activation, source, scale = GELU() if gate.kind == "erf" else TanhGELU(), gate.source, 2 * gate.numbers[1]
    elif gate.number in call.memory.gates:
        name, source, scale = call.memory.gates[gate.number]
        if name == "softplus":
            return None
        activation = SiLU() if name == "sigmoid" else Hardswish()
    else:
        return None
    (root, factor, shift), (origin, inner, offset) = call.memory.line(value), call.memory.line(source)
    if source != value and (origin != root or shift != 0 or offset != 0 or inner == 0):
        return None
    made = call.builder.activation(source, activation)
    factor = scale * (1.0 if source == value else factor / inner)
    return made if _near(factor, 1.0) else call.builder.scale(made, factor)


def _near(first: float, second: float) -> bool:
    return abs(first - second) <= _NEAR * abs(second)


def _stretched(call: Call, origin: Value, factor: float) -> Value:
    """Factor z, or z itself where the factor is 1 but for rounding."""
    found: Value = origin if _near(factor, 1.0) else _scaled(call, origin, factor)
    return found


def _erf(call: Call) -> Part:
    origin, factor, shift = call.memory.line(call.value)
    if shift != 0:
        raise call.refused()
    return _part(call, "erf", _stretched(call, origin, factor * math.sqrt(2)), (0.0, 1.0))


def _tanh(call: Call) -> Any:
    part, slope = call.inputs[0], math.sqrt(2 / math.pi)
    if not isinstance(part, Part):
        return call.builder.activation(call.value, Tanh())
    if part.kind != "polynomial" or len(part.numbers) != 4 or part.numbers[0] or part.numbers[2]:
        raise part.refused()
    factor = part.numbers[1] / slope
    if not _near(part.numbers[3], 0.044715 * slope * factor**3):
        raise part.refused()
    return _part(call, "tanh", _stretched(call, part.source, factor), (0.0, 1.0))


def _sigmoid(call: Call) -> Value:
    made = call.builder.activation(call.value, Sigmoid())
    call.memory.gates[made.number] = "sigmoid", call.value, 1.0
    return made


def _logarithm(call: Call) -> Value:
    if call.memory.gates.get(call.value.number, ("", None, 0.0))[::2] != ("sigmoid", 1.0):
        raise call.refused()
    source = call.memory.gates[call.value.number][1]
    return call.builder.scale(call.builder.activation(call.builder.scale(source, -1.0), Softplus()), -1.0)


def _comparison(kind: str) -> Handler:
    def handler(call: Call) -> Part:
        if not isinstance(call.inputs[0], Value) or call.given(1) is None or call.given(1).size != 1:
            raise call.refused()
        return _part(call, kind, call.value, (float(call.weight(1)),))

    return handler


def _where(call: Call) -> Value:
    """Softplus and ReLU with torch's switch, written out."""
    condition, first, second = call.inputs
    if not isinstance(condition, Part) or condition.kind not in ("greater", "less"):
        raise call.refused()
    high, low = (first, second) if condition.kind == "greater" else (second, first)
    level, build = condition.numbers[0], call.builder
    if high != condition.source:
        raise call.refused()
    if isinstance(low, Value):
        if level != 20 or call.memory.gates.get(low.number) != ("softplus", condition.source, 1.0):
            raise call.refused()
        return low
    if not isinstance(low, np.ndarray) or low.size != 1 or float(call.floats(low)) != level:
        raise call.refused()
    return build.clamp(condition.source, level, None)


# Linear layers


def _spread(call: Call, weight: Tensor) -> tuple[int, list[int], list[int], list[int]]:
    """Axes, strides, dilations and pads (begins, then ends) of a layer with a kernel."""
    axes = weight.dim() - 2
    stride = call.numbers("strides") or [1] * axes
    dilation = call.numbers("dilations") or [1] * axes
    return axes, stride, dilation, _pads(call, list(weight.shape[2:]), stride, dilation)


def _pads(call: Call, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[int]:
    mode, axes = call.get("auto_pad", "NOTSET"), len(kernel)
    if mode == "NOTSET":
        return call.numbers("pads") or [0] * (2 * axes)
    if mode == "VALID":
        return [0] * (2 * axes)
    sizes = call.value.shape[1:]
    totals = [
        max(0, (-(-size // step) - 1) * step + (length - 1) * hole + 1 - size)
        for size, length, step, hole in zip(sizes, kernel, stride, dilation, strict=True)
    ]
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return [*small, *large] if mode == "SAME_UPPER" else [*large, *small]


def _convolution(call: Call) -> Value:
    weight = call.weight(1)
    _, stride, dilation, pads = _spread(call, weight)
    bias = None if call.given(2) is None else call.weight(2)
    return call.builder.convolution(call.value, weight, bias, stride, pads, dilation, int(call.get("group", 1)))


def _transposed_convolution(call: Call) -> Value:
    weight = call.weight(1)
    if "output_shape" in call.attributes or call.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise call.refused("its padding follows from a shape; expected pads")
    axes, stride, dilation, pads = _spread(call, weight)
    bias = None if call.given(2) is None else call.weight(2)
    extra, groups = call.numbers("output_padding") or [0] * axes, int(call.get("group", 1))
    begins, ends = pads[:axes], pads[axes:]
    if begins == ends:
        return call.builder.transposed_convolution(call.value, weight, bias, stride, begins, extra, dilation, groups)
    found = call.builder.transposed_convolution(call.value, weight, bias, stride, [0] * axes, extra, dilation, groups)
    return call.builder.pad(found, [(0, 0), *((-before, -after) for before, after in zip(begins, ends, strict=True))])


def _gemm(call: Call) -> Value:
    if call.get("transA", 0):
        raise call.refused(_BATCH)
    weight = call.weight(1) * float(call.get("alpha", 1.0))
    weight = weight if call.get("transB", 0) else weight.T
    bias = None
    if call.given(2) is not None:
        shift = call.weight(2)
        if shift.dim() == 2 and len(shift) != 1:
            raise call.refused(_KEPT)
        bias = (shift * float(call.get("beta", 1.0))).reshape(-1).expand(len(weight))
    return call.builder.linear(call.value, weight, bias)


def _matrix_product(call: Call) -> Value:
    first, second = call.inputs
    if _depends(first) and _depends(second):
        raise call.refused()
    weight = call.weight(1 if _depends(first) else 0)
    if weight.dim() != 2:
        raise call.refused("a product with a constant that is no matrix")
    if _depends(first):
        return call.builder.linear(call.value, weight.T, None)
    value = call.value_at(1)
    axes = len(value.shape)
    if axes < 2:
        raise call.refused(_BATCH)
    order = [*range(axes - 2), axes - 1, axes - 2]
    return call.builder.permute(call.builder.linear(call.builder.permute(value, order), weight, None), order)


def _batch_norm(call: Call) -> list[Value]:
    if call.get("training_mode", 0):
        raise call.refused("in train mode it depends on the batch")
    weight, bias, mean, variance = (call.weight(place) for place in (1, 2, 3, 4))
    epsilon = float(call.get("epsilon", 1e-5))
    if not bool((variance + epsilon > 0).all()):
        raise call.refused("a negative variance")
    return [call.builder.batch_norm(call.value, mean, variance, weight, bias, epsilon)]


# Shapes


def _reshape(call: Call) -> Value:
    shape, whole = call.numbers("shape", 1) or [], [call.batch, *call.value.shape]
    if not call.get("allowzero", 0):
        shape = [whole[place] if size == 0 else size for place, size in enumerate(shape)]
    if shape.count(-1) > 1:
        raise call.refused("more than one open length")
    known, size = math.prod(length for length in shape if length != -1), math.prod(whole)
    if -1 in shape and (not known or size % known):
        raise call.refused(_KEPT)
    return call.builder.reshape(call.value, call.sample([size // known if s == -1 else s for s in shape]))


def _flatten(call: Call) -> Value:
    whole, axis = [call.batch, *call.value.shape], call.get("axis", 1)
    axis += len(whole) if axis < 0 else 0
    return call.builder.reshape(call.value, call.sample([math.prod(whole[:axis]), math.prod(whole[axis:])]))


def _squeeze(call: Call) -> Value:
    axes = call.numbers("axes", 1)
    if axes is None:
        raise call.refused("without axes it may take away the batch")
    gone = {call.axis(axis) for axis in axes}
    return call.builder.reshape(call.value, [size for axis, size in enumerate(call.value.shape) if axis not in gone])


def _unsqueeze(call: Call) -> Value:
    axes, shape = call.numbers("axes", 1) or [], list(call.value.shape)
    for axis in sorted(call.axis(axis, len(shape) + 1 + len(axes)) for axis in axes):
        shape.insert(axis, 1)
    return call.builder.reshape(call.value, shape)


def _transpose(call: Call) -> Value:
    order = call.numbers("perm") or list(range(len(call.value.shape), -1, -1))
    if order[0] != 0:
        raise call.refused("it moves the axis of the batch")
    return call.builder.permute(call.value, [axis - 1 for axis in order[1:]])


def _concatenation(call: Call) -> Value:
    if not all(_depends(value) for value in call.inputs):
        raise call.refused("some of its parts do not depend on the image")
    values = [call.value_at(place) for place in range(len(call.inputs))]
    return call.builder.concatenation(values, call.axis(call.attributes["axis"]))


def _slice(call: Call) -> Value:
    starts, ends = call.numbers("starts", 1) or [], call.numbers("ends", 2) or []
    axes = call.numbers("axes", 3) or list(range(len(starts)))
    steps = call.numbers("steps", 4) or [1] * len(starts)
    value, rank = call.value, len(call.value.shape) + 1
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if axis % rank == 0 and start == 0 and step == 1 and end >= 2**31 - 1:
            continue
        place = call.axis(axis)
        length = value.shape[place]
        value = call.builder.select(value, place, list(range(length))[start:end:step])
    return value


def _split(call: Call) -> list[Value]:
    axis = call.axis(call.get("axis", 0))
    length, sizes = call.value.shape[axis], call.numbers("split", 1)
    if sizes is None:
        size = -(-length // call.outputs)
        sizes = [min(size, length - start) for start in range(0, length, size)]
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [
        call.builder.select(call.value, axis, list(range(start, start + size)))
        for start, size in zip(starts, sizes, strict=True)
    ]


def _gather(call: Call) -> Value:
    axis, index = call.axis(call.get("axis", 0)), call.given(1)
    shape = call.value.shape
    chosen = [int(i) + (shape[axis] if i < 0 else 0) for i in index.reshape(-1)]
    found = call.builder.select(call.value, axis, chosen)
    return call.builder.reshape(found, (*shape[:axis], *index.shape, *shape[axis + 1 :]))


def _expand(call: Call) -> Value:
    whole = (call.batch, *call.value.shape)
    target = np.broadcast_shapes(whole, tuple(call.numbers("shape", 1) or []))
    if len(target) != len(whole):
        raise call.refused(_KEPT)
    return call.builder.expand(call.value, call.sample(target))


def _tile(call: Call) -> Value:
    value, (first, *times) = call.value, call.numbers("repeats", 1) or [1]
    if first != 1:
        raise call.refused("it repeats the batch")
    for axis, count in enumerate(times):
        value = call.builder.select(value, axis, list(range(value.shape[axis])) * count)
    return value


def _pad(call: Call) -> Value:
    pads, fill, mode = call.numbers("pads", 1) or [], call.given(2), call.get("mode", "constant")
    rank = len(call.value.shape) + 1
    axes = [axis % rank for axis in call.numbers("axes", 3) or range(rank)]
    whole = [(0, 0)] * rank
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        whole[axis] = before, after
    batch, *margins = whole
    if batch != (0, 0):
        raise call.refused("it pads the batch")
    if mode == "constant":
        return call.builder.pad(call.value, margins, 0.0 if fill is None else float(call.floats(fill)))
    if margins[0] != (0, 0) or any(end < 0 for pair in margins for end in pair):
        raise call.refused("it mirrors channels, or cuts and mirrors at once")
    names = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    return call.builder.mirrored(call.value, margins[1:], names[mode])


def _depth_to_space(call: Call) -> Value:
    (channels, high, wide), size, build = call.value.shape, int(call.attributes["blocksize"]), call.builder
    outputs = channels // size**2
    if call.get("mode", "DCR") == "DCR":
        parts = build.permute(build.reshape(call.value, (size, size, outputs, high, wide)), (2, 3, 0, 4, 1))
    else:
        parts = build.permute(build.reshape(call.value, (outputs, size, size, high, wide)), (0, 3, 1, 4, 2))
    return build.reshape(parts, (outputs, high * size, wide * size))


def _space_to_depth(call: Call) -> Value:
    (channels, high, wide), size, build = call.value.shape, int(call.attributes["blocksize"]), call.builder
    parts = build.reshape(call.value, (channels, high // size, size, wide // size, size))
    return build.reshape(build.permute(parts, (2, 4, 0, 1, 3)), (channels * size**2, high // size, wide // size))


# Pools and sizes


def _average_pool(call: Call) -> Value:
    kernel = call.numbers("kernel_shape") or []
    axes = len(kernel)
    stride = call.numbers("strides") or [1] * axes
    pads = _pads(call, kernel, stride, [1] * axes)
    ceil_mode, count_pads = bool(call.get("ceil_mode", 0)), bool(call.get("count_include_pad", 0))
    if any(hole != 1 for hole in call.numbers("dilations") or []):
        raise call.refused("its windows have holes")
    begins, ends, build = pads[:axes], pads[axes:], call.builder
    if begins == ends and all(2 * pad <= size for pad, size in zip(begins, kernel, strict=True)):
        return build.average_pool(call.value, kernel, stride, begins, ceil_mode, count_pads, axes=axes)
    if ceil_mode:
        raise call.refused("it rounds sizes up, and pads unevenly")
    if count_pads:
        margins = [(0, 0), *zip(begins, ends, strict=True)]
        return build.average_pool(build.pad(call.value, margins), kernel, stride, axes=axes)

    def along(axis: int, images: Tensor) -> Tensor:
        rows = images.reshape(len(images), 1, -1)
        if axis >= axes:
            return rows
        padded = [functional.pad(part, (begins[axis], ends[axis])) for part in (rows, torch.ones_like(rows))]
        sums, counts = (functional.avg_pool1d(part, kernel[axis], stride[axis]) for part in padded)
        return sums / counts

    series = build.reshape(call.value, (*call.value.shape, 1)) if axes == 1 else call.value
    found = build.along_axes(series, along)
    return build.reshape(found, found.shape[: axes + 1])


def _max_pool(call: Call) -> list[Value]:
    kernel = call.numbers("kernel_shape") or []
    axes = len(kernel)
    stride, dilation = call.numbers("strides") or [1] * axes, call.numbers("dilations") or [1] * axes
    pads = _pads(call, kernel, stride, dilation)
    ceil_mode = bool(call.get("ceil_mode", 0))
    return [call.builder.max_pool(call.value, kernel, stride, pads, dilation, ceil_mode, axes)]


def _global(how: str) -> Handler:
    return lambda call: call.builder.reduce(call.value, range(1, len(call.value.shape)), True, how)


def _reduction(how: str) -> Handler:
    def handler(call: Call) -> Value:
        axes = call.numbers("axes", 1) if len(call.inputs) > 1 else call.numbers("axes")
        if not axes:
            if call.get("noop_with_empty_axes", 0):
                return call.value
            raise call.refused("without axes it goes over the batch: images would influence each other")
        return call.builder.reduce(call.value, [call.axis(axis) for axis in axes], bool(call.get("keepdims", 1)), how)

    return handler


def _resize(call: Call) -> Value:
    scales, sizes = call.given(2), call.numbers("sizes", 3)
    if call.name == "Upsample":
        scales, sizes = call.given(1), None
    value, rank = call.value, len(call.value.shape) + 1
    axes = [axis % rank for axis in call.numbers("axes") or range(rank)]
    if call.get("antialias", 0) or call.get("exclude_outside", 0):
        raise call.refused("antialias, or exclude_outside")
    if call.get("keep_aspect_ratio_policy", "stretch") != "stretch" or len(value.shape) not in (2, 3):
        raise call.refused("it keeps the aspect ratio, or resizes no images")
    whole = (call.batch, *value.shape)
    lengths, factors = list(whole), [1.0] * rank
    for place, axis in enumerate(axes):
        if sizes:
            lengths[axis], factors[axis] = sizes[place], sizes[place] / whole[axis]
        else:
            factors[axis] = float(scales[place])
            lengths[axis] = math.floor(whole[axis] * factors[axis])
    if lengths[:2] != list(whole[:2]):
        raise call.refused("it resizes channels, or the batch")
    matrices = [_resampling(call, whole[i], lengths[i], factors[i]) for i in range(2, rank)]
    matrices += [torch.ones(1, 1, dtype=torch.float64)] * (2 - len(matrices))
    images = call.builder.reshape(value, (*value.shape, 1)) if rank == 3 else value
    found = call.builder.along_axes(images, lambda axis, units: matrices[axis].T)
    return call.builder.reshape(found, lengths[1:])


def _resampling(call: Call, length: int, wanted: int, scale: float) -> Tensor:
    """The matrix that resamples one axis, shape (wanted, length)."""
    places = torch.arange(wanted, dtype=torch.float64)
    mode, rule = call.get("mode", "nearest"), call.get("coordinate_transformation_mode", "half_pixel")
    rule = "asymmetric" if call.name == "Upsample" else rule
    if rule == "align_corners":
        places = places * ((length - 1) / (wanted - 1) if wanted > 1 else 0.0)
    elif rule == "asymmetric":
        places = places / scale
    elif rule == "half_pixel" or (rule == "pytorch_half_pixel" and wanted > 1):
        places = (places + 0.5) / scale - 0.5
    elif rule == "pytorch_half_pixel":
        places = torch.zeros_like(places)
    else:
        raise call.refused(f"the rule {line(rule)} for coordinates")
    if mode == "nearest":
        how = call.get("nearest_mode", "floor" if call.name == "Upsample" else "round_prefer_floor")
        rounds = {
            "floor": places.floor(),
            "ceil": places.ceil(),
            "round_prefer_floor": (places - 0.5).ceil(),
            "round_prefer_ceil": (places + 0.5).floor(),
        }
        taps = [(rounds[how], torch.ones_like(places))]
    else:
        first = places.floor()
        rest = places - first
        if mode == "linear":
            taps = [(first, 1 - rest), (first + 1, rest)]
        elif mode == "cubic":
            taps = [
                (first + i, _cubic((rest - i).abs(), float(call.get("cubic_coeff_a", -0.75)))) for i in range(-1, 3)
            ]
        else:
            raise call.refused(f"the mode {line(mode)}")
    matrix = torch.zeros(wanted, length, dtype=torch.float64)
    for place, share in taps:
        matrix[torch.arange(wanted), place.clamp(0, length - 1).long()] += share
    return matrix


def _cubic(distance: Tensor, a: float) -> Tensor:
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    return torch.where(distance <= 1, near, ((distance - 5) * distance + 8) * distance * a - 4 * a)


# Activations


def _elementwise(operation: Activation) -> Handler:
    return lambda call: call.builder.activation(call.value, operation)


def _elu(call: Call) -> Value:
    return call.builder.activation(call.value, ELU(float(call.get("alpha", 1.0))))


def _selu(call: Call) -> Value:
    value = call.builder.activation(call.value, ELU(float(call.get("alpha", 1.67326319217681884765625))))
    return call.builder.scale(value, float(call.get("gamma", 1.05070102214813232421875)))


def _celu(call: Call) -> Value:
    alpha = float(call.get("alpha", 1.0))
    return call.builder.scale(call.builder.activation(call.builder.scale(call.value, 1 / alpha), ELU(1.0)), alpha)


def _softplus(call: Call) -> Value:
    made = call.builder.activation(call.value, Softplus())
    call.memory.gates[made.number] = "softplus", call.value, 1.0
    return made


def _gelu(call: Call) -> Value:
    approximate = call.get("approximate", "none")
    return call.builder.activation(call.value, TanhGELU() if approximate == "tanh" else GELU())


def _swish(call: Call) -> Value:
    alpha = float(call.get("alpha", 1.0))
    return call.builder.scale(call.builder.activation(call.builder.scale(call.value, alpha), SiLU()), 1 / alpha)


def _leaky_relu(call: Call) -> Value:
    return call.builder.leaky_relu(call.value, float(call.get("alpha", 0.01)))


def _prelu(call: Call) -> Value:
    return call.builder.leaky_relu(call.value, call.beside(call.value, call.weight(1)))


def _clamped(call: Call, value: Value, low: float | None, high: float | None) -> Value:
    made = call.builder.clamp(value, low, high)
    origin, factor, shift = call.memory.line(value)
    if low == 0 and high is not None and high > 0 and _near(shift, high / 2):  # as relu6(z + 3) and its sixth
        call.memory.gates[made.number] = "hard sigmoid", _stretched(call, origin, 6 * factor / high), high
    return made


def _clip(call: Call) -> Value:
    ends = [call.given(place) for place in (1, 2)]
    if any(end is not None and end.size != 1 for end in ends):
        raise call.refused("its ends are no numbers")
    low, high = (None if end is None else float(call.floats(end)) for end in ends)
    return _clamped(call, call.value, low, high)


def _hard_sigmoid(call: Call) -> Value:
    value = _scaled(call, call.value, float(call.get("alpha", 0.2)), float(call.get("beta", 0.5)))
    return _clamped(call, value, 0.0, 1.0)


def _extreme(larger: bool) -> Handler:
    def handler(call: Call) -> Value:
        values = [call.value_at(place) for place, value in enumerate(call.inputs) if _depends(value)]
        if not all(_same(value, values[0]) for value in values):
            raise call.refused(_KEPT)
        found = values[0]
        for value in values[1:]:
            found = call.builder.maximum(found, value) if larger else call.builder.minimum(found, value)
        for bound in (call.floats(value) for value in call.inputs if not _depends(value)):
            end = float(bound) if bound.numel() == 1 else call.beside(found, bound)
            found = call.builder.clamp(found, *((end, None) if larger else (None, end)))
        return found

    return handler


def _identity(call: Call) -> Any:
    return call.inputs[0]


def _dropout(call: Call) -> list[Value]:
    training = call.given(2)
    if training is not None and bool(np.any(training)):
        raise call.refused("it is random")
    return [call.value]


def _cast(call: Call) -> Value:
    if call.name == "Cast" and call.attributes["to"] not in _FLOATS:
        raise call.refused()
    if call.name == "CastLike" and not isinstance(call.inputs[1], Value) and call.given(1).dtype != np.float64:
        raise call.refused()
    return call.value


OPERATORS: dict[str, Handler] = {
    "Identity": _identity,
    "Dropout": _dropout,
    **dict.fromkeys(("Cast", "CastLike"), _cast),
    **dict.fromkeys(("Add", "Sum"), _sum),
    "Mean": _mean,
    "Sub": _difference,
    "Mul": _product,
    "Div": _quotient,
    "Neg": lambda call: _scaled(call, call.inputs[0], -1.0),
    "Pow": _power,
    "Erf": _erf,
    "Log": _logarithm,
    **dict.fromkeys(("Greater", "GreaterOrEqual"), _comparison("greater")),
    **dict.fromkeys(("Less", "LessOrEqual"), _comparison("less")),
    "Where": _where,
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Gemm": _gemm,
    "MatMul": _matrix_product,
    "BatchNormalization": _batch_norm,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _concatenation,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "GlobalAveragePool": _global("mean"),
    "GlobalMaxPool": _global("max"),
    "ReduceMean": _reduction("mean"),
    "ReduceSum": _reduction("sum"),
    "ReduceMax": _reduction("max"),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Relu": lambda call: call.builder.relu(call.value),
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Clip": _clip,
    "HardSigmoid": _hard_sigmoid,
    "Abs": lambda call: call.builder.magnitude(call.value),
    "Max": _extreme(True),
    "Min": _extreme(False),
    "Elu": _elu,
    "Selu": _selu,
    "Celu": _celu,
    "Sigmoid": _sigmoid,
    "Tanh": _tanh,
    "Softplus": _softplus,
    "HardSwish": _elementwise(Hardswish()),
    "Gelu": _gelu,
    "Swish": _swish,
}
