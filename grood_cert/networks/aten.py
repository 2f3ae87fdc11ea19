r"""PyTorch's operators in terms of our operations, by name.

`ATEN` maps the name of an operator, as `torch.export` writes it, to what it means to a `Builder`. What a network does
to its images with other operators cannot be bounded; `REASONS` says why for those that users meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grood_cert.errors import InputError
from grood_cert.networks.activations import ELU, GELU, Hardswish, Sigmoid, SiLU, Softplus, Tanh, TanhGELU
from grood_cert.networks.builder import Builder, Value

_GATE = "a product of two values that depend on the image, as in attention and gates"
REASONS = {
    **dict.fromkeys(("mul", "matmul", "bmm", "mm", "baddbmm", "einsum", "pow", "square"), _GATE),
    **dict.fromkeys(("scaled_dot_product_attention", "_native_multi_head_attention"), "attention multiplies values"),
    **dict.fromkeys(
        ("layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "instance_norm", "rms_norm"),
        "it divides by a spread of the image's own values",
    ),
    **dict.fromkeys(("div", "reciprocal", "rsqrt", "sqrt"), "a division by a value that depends on the image"),
    **dict.fromkeys(
        ("softmax", "log_softmax", "_softmax", "_log_softmax", "logsumexp"),
        "scores are made of logits; let the network return those",
    ),
    **dict.fromkeys(("item", "_local_scalar_dense", "nonzero"), "what is computed hangs on values of the image"),
    **dict.fromkeys(("gt", "lt", "ge", "le", "where", "sign", "round", "floor"), "it may jump"),
    **dict.fromkeys(("to", "_to_copy", "type_as"), "it rounds to another type in between; proofs are about float64"),
    **dict.fromkeys(
        (
            "dropout",
            "alpha_dropout",
            "feature_dropout",
            "rrelu",
            "rand",
            "randn",
            "rand_like",
            "randn_like",
            "bernoulli",
        ),
        "it is random",
    ),
}


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        name: The operator's, without namespace and overload.
        arguments: By the names of its schema; values that depend on the image are `Value`s.
        shape: Shape of the result without the batch; None if it has several, or the batch does not lead.
        builder: What makes the nodes.
    """

    name: str
    arguments: Mapping[str, Any]
    shape: tuple[int, ...] | None
    builder: Builder

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument that not every overload has."""
        found = self.arguments.get(name)
        return default if found is None else found

    @property
    def value(self) -> Value:
        """The first argument."""
        found = next(iter(self.arguments.values()))
        if not isinstance(found, Value):
            raise self.refused("its first argument does not depend on the image, another one does")
        return found

    @property
    def target(self) -> tuple[int, ...]:
        """Shape of the result."""
        if self.shape is None:
            raise self.refused("its result does not keep the images of a batch apart")
        return self.shape

    def axis(self, number: int) -> int:
        """An axis of the sample, from one of the batch's tensor."""
        number += (len(self.value.shape) + 1) if number < 0 else 0
        if number == 0:
            raise self.refused("it goes along the batch: images would influence each other")
        return number - 1

    def constant(self, name: str) -> Any:
        """An argument that must not depend on the image."""
        found = self.arguments.get(name)
        if isinstance(found, Value):
            raise self.refused()
        return found

    def refused(self, reason: str = "") -> InputError:
        """What to raise."""
        return refusal(self.builder.name, self.name, reason)


def refusal(layer: str, what: str, reason: str = "") -> InputError:
    """The error for an operator that cannot be bounded."""
    reason = reason or REASONS.get(what, "")
    return InputError(
        f"layer {layer}: {what} cannot be bounded{f': {reason}' if reason else ''}; "
        "docs/models.md lists what can, and smoothing takes any network"
    )


Handler = Callable[[Call], Value | list[Value]]


def _constant(call: Call, value: Any) -> Any:
    """A number, or a tensor in the type that values have: as torch promotes it, before arithmetic among constants."""
    return value.to(call.builder.like.dtype) if isinstance(value, Tensor) else value


def _sum(call: Call, sign: float = 1.0, swapped: bool = False) -> Value:
    first, second = call["self"], call["other"]
    factor = sign * float(call.get("alpha", 1))
    if swapped:
        first, second, factor = second, first, sign
        if call.get("alpha", 1) != 1:
            raise call.refused("alpha other than 1")
    build = call.builder
    if isinstance(first, Value) and isinstance(second, Value):
        return build.sum(first, second, factor)
    if isinstance(first, Value):
        return build.scale(first, 1.0, _constant(call, second) * factor)
    return build.scale(second, factor, _constant(call, first))


def _product(call: Call) -> Value:
    first, second = call["self"], call["other"]
    if isinstance(first, Value) and isinstance(second, Value):
        raise call.refused(_GATE)
    value, factor = (first, second) if isinstance(first, Value) else (second, first)
    return call.builder.scale(value, _constant(call, factor))


def _quotient(call: Call) -> Value:
    if isinstance(call["other"], Value) or call.get("rounding_mode"):
        raise call.refused()
    return call.builder.scale(call.value, 1 / _constant(call, call["other"]))


def _linear(call: Call) -> Value:
    return call.builder.linear(call.value, call.constant("weight"), call.constant("bias"))


def _matrix_product(call: Call) -> Value:
    first, second = list(call.arguments)[:2]
    if isinstance(call[second], Value) and not isinstance(call[first], Value):
        return _product_from_the_left(call, call[first], call[second])
    weight = call.constant(second)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise call.refused("a product with a constant that is no matrix")
    return call.builder.linear(call.value, weight.T, None)


def _product_from_the_left(call: Call, matrix: Any, value: Value) -> Value:
    """A x = (x^T A^T)^T on the last two axes."""
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or len(value.shape) < 2:
        raise call.refused("a product with a constant that is no matrix, or along the batch")
    order = [*range(len(value.shape) - 2), len(value.shape) - 1, len(value.shape) - 2]
    return call.builder.permute(call.builder.linear(call.builder.permute(value, order), matrix, None), order)


def _add_matrix_product(call: Call) -> Value:
    bias, weight = call.constant("self"), call.constant("mat2")
    if call.get("alpha", 1) != 1 or call.get("beta", 1) != 1:
        raise call.refused("alpha or beta other than 1")
    return call.builder.linear(call["mat1"], weight.T, bias.reshape(-1).expand(weight.shape[1]))


def _convolution(call: Call) -> Value:
    build, weight, bias = call.builder, call.constant("weight"), call.constant("bias")
    stride, dilation, groups = call["stride"], call["dilation"], call["groups"]
    if call.get("transposed", False):
        extra = call["output_padding"]
        return build.transposed_convolution(call.value, weight, bias, stride, call["padding"], extra, dilation, groups)
    padding = call["padding"]
    if isinstance(padding, str):
        reach = [hole * (size - 1) for hole, size in zip(_all(dilation, weight), weight.shape[2:], strict=True)]
        begins = [0 if padding == "valid" else length // 2 for length in reach]
        ends = [0 if padding == "valid" else length - length // 2 for length in reach]
        padding = [*begins, *ends]
    return build.convolution(call.value, weight, bias, stride, padding, dilation, groups)


def _all(values: Sequence[int], weight: Tensor) -> list[int]:
    return list(values) * (weight.dim() - 2) if len(values) == 1 else list(values)


def _transposed_convolution(call: Call) -> Value:
    names = "stride", "padding", "output_padding", "dilation", "groups"
    return call.builder.transposed_convolution(
        call.value, call.constant("weight"), call.constant("bias"), *(call[name] for name in names)
    )


def _batch_norm(call: Call) -> Value:
    if call.get("training", False) or call.get("train", False):
        raise call.refused("in train mode, or without running statistics, it depends on the batch")
    mean, variance, weight, bias = (call.constant(name) for name in ("running_mean", "running_var", "weight", "bias"))
    if mean is None or variance is None:
        raise call.refused("without running statistics it depends on the batch")
    return call.builder.batch_norm(call.value, mean, variance, weight, bias, float(call["eps"]))


def _several(handler: Callable[[Call], Value]) -> Handler:
    """For operators that answer more than the value."""
    return lambda call: [handler(call)]


def _reshape(call: Call) -> Value:
    return call.builder.reshape(call.value, call.target)


def _permute(call: Call) -> Value:
    dims = [number % (len(call.value.shape) + 1) for number in call["dims"]]
    if dims[0] != 0:
        raise call.refused("it moves the axis of the batch")
    return call.builder.permute(call.value, [number - 1 for number in dims[1:]])


def _swap(call: Call) -> Value:
    first, second = (call.axis(number) for name, number in call.arguments.items() if name != "self")
    order = list(range(len(call.value.shape)))
    order[first], order[second] = order[second], order[first]
    return call.builder.permute(call.value, order)


def _slice(call: Call) -> Value:
    start, end = call.get("start", 0), call.get("end", 2**63 - 1)
    if call["dim"] in (0, -len(call.value.shape) - 1):
        if start == 0 and end == 2**63 - 1 and call["step"] == 1:
            return call.value
        raise call.refused("it cuts the batch")
    axis = call.axis(call["dim"])
    index = list(range(call.value.shape[axis]))[start : end : call["step"]]
    return call.builder.select(call.value, axis, index)


def _narrow(call: Call) -> Value:
    axis = call.axis(call["dim"])
    return call.builder.select(call.value, axis, list(range(call.value.shape[axis]))[call["start"] :][: call["length"]])


def _select(call: Call) -> Value:
    axis = call.axis(call["dim"])
    index = call["index"] % call.value.shape[axis]
    return call.builder.reshape(call.builder.select(call.value, axis, [index]), call.target)


def _parts(call: Call, axis: int, lengths: Sequence[int]) -> list[Value]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        call.builder.select(call.value, axis, list(range(start, start + length)))
        for start, length in zip(starts, lengths, strict=True)
    ]


def _split(call: Call) -> list[Value]:
    axis, sizes = call.axis(call["dim"]), call.get("split_size", call.get("split_sizes"))
    length = call.value.shape[axis]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    return _parts(call, axis, sizes)


def _chunk(call: Call) -> list[Value]:
    axis = call.axis(call["dim"])
    length = call.value.shape[axis]
    size = -(-length // call["chunks"])
    return _parts(call, axis, [min(size, length - start) for start in range(0, length, size)])


def _unbind(call: Call) -> list[Value]:
    axis = call.axis(call["dim"])
    shape = [length for i, length in enumerate(call.value.shape) if i != axis]
    return [call.builder.reshape(part, shape) for part in _parts(call, axis, [1] * call.value.shape[axis])]


def _of_all(call: Call, name: str = "tensors") -> list[Value]:
    values = call[name]
    if not all(isinstance(value, Value) for value in values):
        raise call.refused("some of its parts do not depend on the image")
    return list(values)


def _concatenation(call: Call) -> Value:
    values = _of_all(call)
    dim = call["dim"] + (len(values[0].shape) + 1 if call["dim"] < 0 else 0)
    if dim == 0:
        raise call.refused("it goes along the batch: images would influence each other")
    return call.builder.concatenation(values, dim - 1)


def _stack(call: Call) -> Value:
    values = _of_all(call)
    dim = call["dim"] + (len(values[0].shape) + 2 if call["dim"] < 0 else 0)
    if dim == 0:
        raise call.refused("it goes along the batch: images would influence each other")
    shape = [*values[0].shape[: dim - 1], 1, *values[0].shape[dim - 1 :]]
    return call.builder.concatenation([call.builder.reshape(value, shape) for value in values], dim - 1)


def _expand(call: Call) -> Value:
    return call.builder.expand(call.value, call.target)


def _repeat(call: Call) -> Value:
    times = call.get("repeats", call.get("dims"))
    value, shape = call.value, call.target
    value = call.builder.reshape(value, (*[1] * (len(shape) - len(value.shape)), *value.shape))
    for axis, (length, wanted) in enumerate(zip(value.shape, shape, strict=True)):
        value = call.builder.select(value, axis, list(range(length)) * (wanted // length))
    if len(times) == len(shape) + 1 and times[0] != 1:
        raise call.refused("it repeats the batch")
    return value


def _flip(call: Call) -> Value:
    value = call.value
    for dim in call["dims"]:
        axis = call.axis(dim)
        value = call.builder.select(value, axis, list(range(value.shape[axis]))[::-1])
    return value


def _index_select(call: Call) -> Value:
    return call.builder.select(call.value, call.axis(call["dim"]), call.constant("index").tolist())


def _roll(call: Call) -> Value:
    value = call.value
    if not call["dims"]:
        raise call.refused("without dims it goes along the batch")
    for dim, shift in zip(call["dims"], call["shifts"], strict=True):
        axis = call.axis(dim)
        length = value.shape[axis]
        value = call.builder.select(value, axis, [(i - shift) % length for i in range(length)])
    return value


def _pixel_shuffle(call: Call) -> Value:
    (channels, high, wide), factor, build = call.value.shape, call["upscale_factor"], call.builder
    parts = build.reshape(call.value, (channels // factor**2, factor, factor, high, wide))
    return build.reshape(build.permute(parts, (0, 3, 1, 4, 2)), call.target)


def _pixel_unshuffle(call: Call) -> Value:
    (channels, high, wide), factor, build = call.value.shape, call["downscale_factor"], call.builder
    parts = build.reshape(call.value, (channels, high // factor, factor, wide // factor, factor))
    return build.reshape(build.permute(parts, (0, 2, 4, 1, 3)), call.target)


def _channel_shuffle(call: Call) -> Value:
    (channels, *rest), groups, build = call.value.shape, call["groups"], call.builder
    parts = build.reshape(call.value, (groups, channels // groups, *rest))
    return build.reshape(build.permute(parts, (1, 0, *range(2, len(rest) + 2))), call.target)


def _pad(call: Call) -> Value:
    ends, mode = call.get("pad", call.get("padding")), call.get("mode", "")
    mode = mode or {"reflection": "reflect", "replication": "replicate"}.get(call.name.split("_")[0], "constant")
    axes = len(ends) // 2
    margins = [(ends[2 * i], ends[2 * i + 1]) for i in range(axes)][::-1]
    if axes > len(call.value.shape):
        raise call.refused("it pads the batch")
    if mode == "constant":
        before = [(0, 0)] * (len(call.value.shape) - axes)
        return call.builder.pad(call.value, [*before, *margins], float(call.get("value", 0.0)))
    if any(end < 0 for end in ends):
        raise call.refused("it cuts and mirrors at once")
    return call.builder.mirrored(call.value, margins, mode)


def _average_pool(call: Call) -> Value:
    axes = 1 if "1d" in call.name else 2
    names = "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"
    kernel, stride, padding, ceil_mode, count_include_pad = (call[name] for name in names)
    divisor = call.get("divisor_override")
    return call.builder.average_pool(call.value, kernel, stride, padding, ceil_mode, count_include_pad, divisor, axes)


def _adaptive_average_pool(call: Call) -> Value:
    axes = 1 if "1d" in call.name else 2
    return call.builder.adaptive_average_pool(call.value, call.target[-axes:])


def _max_pool(call: Call) -> Value:
    axes = 1 if "1d" in call.name else 2
    names = "kernel_size", "stride", "padding", "dilation", "ceil_mode"
    kernel, stride, padding, dilation, ceil_mode = (call[name] for name in names)
    return call.builder.max_pool(call.value, kernel, stride, padding, dilation, ceil_mode, axes)


def _adaptive_max_pool(call: Call) -> Value:
    axes = 1 if "1d" in call.name else 2
    output = [int(size) for size in call["output_size"]]
    if any(length % size for length, size in zip(call.value.shape[-axes:], output, strict=True)):
        raise call.refused("its windows differ in size")
    kernel = [length // size for length, size in zip(call.value.shape[-axes:], output, strict=True)]
    return call.builder.max_pool(call.value, kernel, axes=axes)


def _reduction(how: str) -> Handler:
    def handler(call: Call) -> Value:
        dims = call.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        if not dims:
            raise call.refused("without dims it goes over the batch: images would influence each other")
        return call.builder.reduce(call.value, [call.axis(dim) for dim in dims], bool(call["keepdim"]), how)

    return handler


def _upsample(call: Call) -> Value:
    name, size = call.name, call.target[-2:]
    operator = getattr(torch.ops.aten, name)
    if "vec" not in operator.overloads():
        raise call.refused()
    scales = call.get("scale_factors")
    if scales is None and call.get("scales_h") is not None:
        scales = [call["scales_h"], call["scales_w"]]
    corners = [call["align_corners"]] if "align_corners" in call.arguments else []

    def along(axis: int, images: Tensor) -> Tensor:
        own = [size[0], 1] if axis == 0 else [1, size[1]]
        factors = None if scales is None else [scales[0], 1.0] if axis == 0 else [1.0, scales[1]]
        found: Tensor = operator.vec(images, own if factors is None else None, *corners, factors)
        return found

    return call.builder.along_axes(call.value, along)


def _elementwise(operation: Any) -> Handler:
    return lambda call: call.builder.activation(call.value, operation)


def _elu(call: Call) -> Value:
    if call.get("input_scale", 1) != 1 or not call["alpha"] > 0:
        raise call.refused("an input scale other than 1, or an alpha that is not positive")
    value = call.builder.activation(call.value, ELU(float(call["alpha"])))
    return call.builder.scale(value, float(call["scale"])) if call.get("scale", 1) != 1 else value


def _selu(call: Call) -> Value:
    value = call.builder.activation(call.value, ELU(1.6732632423543772848170429916717))
    return call.builder.scale(value, 1.0507009873554804934193349852946)


def _celu(call: Call) -> Value:
    alpha = float(call["alpha"])
    if not alpha > 0:
        raise call.refused("an alpha that is not positive")
    return call.builder.scale(call.builder.activation(call.builder.scale(call.value, 1 / alpha), ELU(1.0)), alpha)


def _gelu(call: Call) -> Value:
    return call.builder.activation(call.value, GELU() if call["approximate"] == "none" else TanhGELU())


def _softplus(call: Call) -> Value:
    if call["threshold"] != 20 or not call["beta"] > 0:
        raise call.refused("a threshold other than 20, or a beta that is not positive")
    return call.builder.activation(call.value, Softplus(float(call["beta"])))


def _log_sigmoid(call: Call) -> Value:
    negative = call.builder.scale(call.value, -1.0)
    return call.builder.scale(call.builder.activation(negative, Softplus()), -1.0)


def _clamp(call: Call) -> Value:
    names = {"hardtanh": ("min_val", "max_val"), "clamp_min": ("min", ""), "clamp_max": ("", "max")}
    low, high = (call.constant(name) if name else None for name in names.get(call.name, ("min", "max")))
    return call.builder.clamp(call.value, _limit(call, low, -math.inf), _limit(call, high, math.inf))


def _limit(call: Call, value: Any, none: float) -> Any:
    """A bound of a clamp; None if it is none."""
    if isinstance(value, Tensor):
        return _constant(call, value)
    return None if value is None or float(value) == none else float(value)


def _hardsigmoid(call: Call) -> Value:
    return call.builder.clamp(call.builder.scale(call.value, 1 / 6, 0.5), 0.0, 1.0)


def _threshold(call: Call) -> Value:
    if call["threshold"] != call["value"]:
        raise call.refused("it may jump")
    return call.builder.clamp(call.value, float(call["value"]), None)


def _leaky_relu(call: Call) -> Value:
    return call.builder.leaky_relu(call.value, float(call["negative_slope"]))


def _random_leaky_relu(call: Call) -> Value:
    if call["training"]:
        raise call.refused("it is random")
    return call.builder.leaky_relu(call.value, (call["lower"] + call["upper"]) / 2)


def _prelu(call: Call) -> Value:
    slope = call.constant("weight")
    return call.builder.leaky_relu(call.value, slope.reshape(-1, *[1] * (len(call.value.shape) - 1)))


def _extreme(call: Call) -> Value:
    first, second, larger = call["self"], call["other"], call.name in ("maximum", "max", "fmax")
    if isinstance(first, Value) and isinstance(second, Value):
        return call.builder.maximum(first, second) if larger else call.builder.minimum(first, second)
    value, bound = (first, second) if isinstance(first, Value) else (second, first)
    if larger:
        return call.builder.clamp(value, _limit(call, bound, -math.inf), None)
    return call.builder.clamp(value, None, _limit(call, bound, math.inf))


def _maximum(call: Call) -> Value | list[Value]:
    if "other" in call.arguments:
        return _extreme(call)
    return [_reduction("max")(call)]  # type: ignore[list-item]


def _identity(call: Call) -> Value:
    return call.value


def _still(call: Call) -> Value:
    if call.get("train", call.get("training", False)):
        raise call.refused("it is random")
    return call.value


def _cast(call: Call) -> Value:
    kind = call.get("dtype", call["other"].dtype if isinstance(call.get("other"), Tensor) else None)
    if kind not in (None, call.builder.like.dtype):
        raise call.refused()
    return call.value


ATEN: dict[str, Handler] = {
    **dict.fromkeys(
        ("detach", "alias", "clone", "contiguous", "lift_fresh", "lift_fresh_copy", "positive"),
        _identity,
    ),
    **dict.fromkeys(("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"), _still),
    "native_dropout": _several(_still),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    "add": _sum,
    "sub": lambda call: _sum(call, -1.0),
    "rsub": lambda call: _sum(call, -1.0, swapped=True),
    "neg": lambda call: call.builder.scale(call.value, -1.0),
    "mul": _product,
    **dict.fromkeys(("div", "true_divide"), _quotient),
    "linear": _linear,
    **dict.fromkeys(("mm", "matmul"), _matrix_product),
    "addmm": _add_matrix_product,
    **dict.fromkeys(("conv1d", "conv2d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d"), _transposed_convolution),
    "batch_norm": _batch_norm,
    **dict.fromkeys(
        ("_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm"), _several(_batch_norm)
    ),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_copy"), _reshape
    ),
    "permute": _permute,
    **dict.fromkeys(("transpose", "swapaxes"), _swap),
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "chunk": _chunk,
    "unbind": _unbind,
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenation),
    "stack": _stack,
    **dict.fromkeys(("expand", "expand_as"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "flip": _flip,
    "index_select": _index_select,
    "roll": _roll,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "channel_shuffle": _channel_shuffle,
    **dict.fromkeys(
        (
            *("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d"),
            *("replication_pad1d", "replication_pad2d"),
        ),
        _pad,
    ),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d"), _average_pool),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d"), _adaptive_average_pool),
    **dict.fromkeys(("max_pool1d", "max_pool2d"), _max_pool),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool1d_with_indices"), _several(_max_pool)),
    **dict.fromkeys(("adaptive_max_pool1d", "adaptive_max_pool2d"), _several(_adaptive_max_pool)),
    "mean": _reduction("mean"),
    "sum": _reduction("sum"),
    "amax": _reduction("max"),
    "max": _maximum,
    **dict.fromkeys(
        ("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d"), _upsample
    ),
    "relu": lambda call: call.builder.relu(call.value),
    "leaky_relu": _leaky_relu,
    "rrelu": _random_leaky_relu,
    **dict.fromkeys(("prelu", "_prelu_kernel"), _prelu),
    **dict.fromkeys(("hardtanh", "clamp", "clamp_min", "clamp_max", "clip"), _clamp),
    "relu6": lambda call: call.builder.clamp(call.value, 0.0, 6.0),
    "hardsigmoid": _hardsigmoid,
    "threshold": _threshold,
    "abs": lambda call: call.builder.magnitude(call.value),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin", "min"), _extreme),
    "elu": _elu,
    "selu": _selu,
    "celu": _celu,
    "silu": _elementwise(SiLU()),
    "hardswish": _elementwise(Hardswish()),
    "gelu": _gelu,
    "sigmoid": _elementwise(Sigmoid()),
    "tanh": _elementwise(Tanh()),
    "softplus": _softplus,
    "log_sigmoid": _log_sigmoid,
}
# What may share memory with what it reads: a change in place then reaches both.
VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "swapaxes", "slice"),
    *("narrow", "select", "split", "split_with_sizes", "chunk", "unbind", "expand", "expand_as", "detach", "alias"),
    *(
        "contiguous",
        "to",
        "dropout",
        "alpha_dropout",
        "feature_dropout",
        "feature_alpha_dropout",
        "lift_fresh",
        "positive",
    ),
    *("type_as", "channel_shuffle", "index", "_unsafe_view", "view_copy"),
}
