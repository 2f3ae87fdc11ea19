r"""Random networks over every operation that the front end takes, in many ways to write them; every choice from a seed.

A network is a list of steps between an image and a head. `STEPS` names what makes a step for a value of a given shape:
layers, functions, methods, bare operators, skips, shared layers. Weights are float32 numbers, so that a copy in float32
is the same function; some are zero, tiny, huge, equal, some units are dead, some inputs of kinks are 0 everywhere.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from grood_cert.networks.architectures import Normalize

aten = torch.ops.aten
PROFILES = "any", "one hidden layer", "line", "linear", "few units"
_LARGEST = 80  # entries of a value
_HEADS = 1, 2, 10, 100
FAMILY = 5


class Dice:
    """Random choices from a seed."""

    def __init__(self, *seed: object) -> None:
        self._random = random.Random("/".join(map(str, seed)))
        self.generator = torch.Generator().manual_seed(self._random.getrandbits(63))

    def pick(self, *options: Any) -> Any:
        """One of them."""
        return self._random.choice(options)

    def chance(self, share: float) -> bool:
        """True in this share of cases."""
        return self._random.random() < share

    def number(self, low: float, high: float) -> float:
        """Uniform, with few digits so that it is a float32 too."""
        return round(self._random.uniform(low, high) * 1024) / 1024

    def integer(self, low: int, high: int) -> int:
        """Uniform, both ends included."""
        return self._random.randint(low, high)

    def normal(self, *shape: int) -> Tensor:
        """Float32 numbers in float64."""
        return torch.randn(*shape, generator=self.generator).double()

    def uniform(self, *shape: int) -> Tensor:
        """The same in [0, 1)."""
        return torch.rand(*shape, generator=self.generator).double()

    def seed(self) -> int:
        """For a generator of somebody else."""
        return self._random.getrandbits(31)


@dataclass(frozen=True)
class Made:
    """A network of the generator.

    Attributes:
        network: f in eval mode and float64.
        shape: Of an image, (C, H, W).
        name: Its steps.
        profile: What it was made for.
    """

    network: nn.Module
    shape: tuple[int, int, int]
    name: str
    profile: str


class Step(nn.Module):
    """A function of a value and of parts of its own."""

    def __init__(self, function: Callable[[Tensor, Any], Tensor], **parts: Any) -> None:
        super().__init__()
        self._function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, values: Tensor) -> Tensor:
        """What the function says."""
        return self._function(values, self)


class Chain(nn.Module):
    """Steps one after another, without nn.Sequential."""

    def __init__(self, steps: list[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        for step in self.steps:
            x = step(x)
        return x


Maker = Callable[[Dice, tuple[int, ...]], nn.Module | None]
STEPS: dict[str, Maker] = {}
LINEAR: set[str] = set()  # steps without a kink or curve
SMOOTH: set[str] = set()  # steps that are not piecewise linear


def _step(*names: str, linear: bool = False, smooth: bool = False) -> Callable[[Maker], Maker]:
    def note(maker: Maker) -> Maker:
        for name in names:
            STEPS[name] = maker
            if linear:
                LINEAR.add(name)
            if smooth:
                SMOOTH.add(name)
        return maker

    return note


def _simple(name: str, function: Callable[[Tensor, Any], Tensor], dims: int = 0, **kinds: bool) -> None:
    """A step without choices, for values with that many axes (0: any)."""

    def maker(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
        del dice
        return Step(function) if dims in (0, len(shape)) else None

    _step(name, **kinds)(maker)


# Linear layers


@_step("convolution", linear=True)
def _convolution(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    if len(shape) != 3:
        return None
    channels, height, width = shape
    kernel = dice.integer(1, min(3, height)), dice.integer(1, min(3, width))
    stride, dilation = (dice.pick(1, 1, 2), dice.pick(1, 1, 2)), (dice.pick(1, 1, 2), dice.pick(1, 1, 2))
    padding: Any = dice.integer(0, 1), dice.integer(0, 2)
    groups = dice.pick(1, 1, channels)
    out = groups * dice.integer(1, max(1, 6 // groups))
    if dice.chance(0.2) and all(size % 2 for size in kernel):
        stride, padding = (1, 1), "same"
    mode = dice.pick("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
    if not isinstance(padding, str):
        reach = [hole * (size - 1) + 1 for hole, size in zip(dilation, kernel, strict=True)]
        if any(size + 2 * pad < need for size, pad, need in zip((height, width), padding, reach, strict=True)):
            return None
    if mode != "zeros":
        padding = tuple(min(1, size - 1) for size in (height, width))
    layer = nn.Conv2d(
        channels,
        out,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=dice.chance(0.8),
        padding_mode=mode,
    )
    if mode != "zeros" or isinstance(padding, str) or dice.chance(0.5):
        return parametrizations.weight_norm(layer) if dice.chance(0.1) else layer
    way = dice.pick("function", "operator")
    if way == "function":
        return Step(
            lambda x, m: functional.conv2d(x, m.layer.weight, m.layer.bias, stride, padding, dilation, groups),
            layer=layer,
        )
    return Step(
        lambda x, m: aten.convolution(
            x, m.layer.weight, m.layer.bias, stride, padding, dilation, False, [0, 0], groups
        ),
        layer=layer,
    )


@_step("transposed convolution", linear=True)
def _transposed(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    if len(shape) != 3:
        return None
    channels = shape[0]
    groups = dice.pick(1, 1, channels)
    kernel, stride, dilation = ([dice.pick(1, 2, 2, 3), dice.pick(1, 2, 3)] for _ in range(3))
    dilation = [dice.pick(1, 1, 2), dice.pick(1, 1, 2)]
    padding = [dice.integer(0, (size - 1) // 2) for size in kernel]
    extra = [dice.integer(0, step - 1) for step in stride]
    layer = nn.ConvTranspose2d(
        channels,
        groups * dice.integer(1, 2),
        kernel,
        stride,
        padding,
        extra,
        groups,
        dice.chance(0.8),
        dilation,
    )
    if dice.chance(0.5):
        return layer
    return Step(
        lambda x, m: aten.convolution(x, m.layer.weight, m.layer.bias, stride, padding, dilation, True, extra, groups),
        layer=layer,
    )


@_step("dense", linear=True)
def _dense(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    size, outputs = shape[-1], dice.integer(1, 16 if len(shape) == 1 else 4)
    layer = nn.Linear(size, outputs, bias=dice.chance(0.8))
    if len(shape) > 1:
        ways = {
            "layer": layer,
            "function": Step(lambda x, m: functional.linear(x, m.layer.weight), layer=layer),
            "matmul": Step(lambda x, m: torch.matmul(x, m.layer.weight.t()), layer=layer),
            "@": Step(lambda x, m: x @ m.matrix, matrix=dice.normal(size, outputs)),
        }
        ways["from the left"] = Step(lambda x, m: m.matrix @ x, matrix=dice.normal(dice.integer(1, 3), shape[-2]))
        return ways[dice.pick(*ways)]
    weight, bias = nn.Parameter(dice.normal(size, outputs)), nn.Parameter(dice.normal(outputs))
    ways = {
        "layer": layer,
        "weight norm": parametrizations.weight_norm(nn.Linear(size, outputs)),
        "spectral norm": parametrizations.spectral_norm(nn.Linear(size, outputs)),
        "function": Step(lambda x, m: functional.linear(x, m.layer.weight, m.layer.bias), layer=layer),
        "mm": Step(lambda x, m: torch.mm(x, m.weight) + m.bias, weight=weight, bias=bias),
        "addmm": Step(lambda x, m: torch.addmm(m.bias, x, m.weight), weight=weight, bias=bias),
        "tied": Step(lambda x, m: x @ m.weight @ m.weight.t() + m.bias.sum(), weight=weight, bias=bias),
    }
    return ways[dice.pick(*ways)]


@_step("series", linear=True)
def _series(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    """The convolutions of one axis, on images read as series, or on series."""
    if len(shape) == 1:
        return None
    flat = len(shape) == 3
    channels, length = shape[0], math.prod(shape[1:])
    kernel, padding = dice.integer(1, min(3, length)), dice.integer(0, 1)
    layer: nn.Module = nn.Conv1d(channels, dice.integer(1, 3), kernel, dice.pick(1, 2), padding, bias=dice.chance(0.8))
    if dice.chance(0.3):
        layer = nn.ConvTranspose1d(channels, dice.integer(1, 3), kernel, dice.pick(1, 2), padding * (kernel > 2))
    return nn.Sequential(nn.Flatten(2), layer) if flat else layer


@_step("batch norm", linear=True)
def _batch_norm(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(shape)]
    layer = kind(shape[0], affine=dice.chance(0.8))

    def numbers(m: Any) -> tuple[Any, ...]:
        return m.layer.running_mean, m.layer.running_var, m.layer.weight, m.layer.bias

    def function(x: Tensor, m: Any) -> Tensor:
        return functional.batch_norm(x, *numbers(m), training=False, eps=1e-5)

    def frozen(x: Tensor, m: Any) -> Tensor:
        mean, variance, weight, bias = numbers(m)
        return aten._native_batch_norm_legit_no_training(x, weight, bias, mean, variance, 0.1, 1e-5)[0]

    def native(x: Tensor, m: Any) -> Tensor:
        mean, variance, weight, bias = numbers(m)
        return aten.native_batch_norm(x, weight, bias, mean, variance, False, 0.1, 1e-5)[0]

    way = dice.pick(None, None, None, function, frozen, native)
    return layer if way is None else Step(way, layer=layer)


@_step("normalisation", linear=True)
def _normalisation(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    view = (shape[0], *[1] * (len(shape) - 1))
    mean, std = dice.uniform(*view), 0.1 + dice.uniform(*view)
    low = dice.number(0.1, 0.9)
    ways: list[Any] = [
        Step(lambda x, m: (x - m.mean) / m.std, mean=mean, std=std),
        Step(lambda x, m: torch.true_divide(x.sub(m.mean), m.std), mean=mean, std=std),
        Step(lambda x, m: 2 * x - 1),
        Step(lambda x, m: (low - x) * 4),
        Step(lambda x, m: torch.add(x, m.mean, alpha=-2).div(low), mean=mean),
        Step(lambda x, m: torch.rsub(x, 1) * m.std + -x, std=std),
        Step(lambda x, m: torch.neg(x.clone().mul_(m.std).add_(low)), std=std),
        Step(lambda x, m: aten.rsub.Tensor(x, m.mean), mean=mean),
    ]
    if len(shape) == 3:
        ways.append(Normalize(mean.flatten().tolist(), std.flatten().tolist()))
        ways.append(Step(lambda x, m: x * m.all, all=dice.normal(*shape)))
    return dice.pick(*ways)


# The same numbers elsewhere

_simple("flatten", lambda x, m: x.flatten(1), linear=True)
_simple("flatten by view", lambda x, m: x.view(x.size(0), -1), linear=True)
_simple("flatten by reshape", lambda x, m: torch.reshape(x, (x.shape[0], math.prod(x.shape[1:]))), linear=True)
_simple("unsafe view", lambda x, m: aten._unsafe_view(x.clone(), [x.shape[0], math.prod(x.shape[1:])]), linear=True)
_simple("view copy", lambda x, m: aten.view_copy(x.contiguous(), [x.shape[0], 1, math.prod(x.shape[1:])]), linear=True)
_simple("squeeze", lambda x, m: x.unsqueeze(1).squeeze(1).unsqueeze(-1).squeeze(-1), linear=True)
_simple("transpose", lambda x, m: x.transpose(-1, -2), dims=3, linear=True)
_simple("swapaxes", lambda x, m: aten.swapaxes(x, 1, 2), dims=3, linear=True)
_simple("permute", lambda x, m: x.permute(0, 3, 1, 2).contiguous(), dims=3, linear=True)
_simple("flip", lambda x, m: x.flip(-1), linear=True)
_simple("roll", lambda x, m: torch.roll(x, (1, -1), (1, 1)).roll(2, -1), linear=True)
_simple("repeat", lambda x, m: x.repeat(1, 2, *[1] * (x.dim() - 2)), linear=True)
_simple("tile", lambda x, m: x.tile((1,) * (x.dim() - 1) + (2,)), linear=True)
_simple("expand", lambda x, m: x[:, :1].expand(-1, 2, *x.shape[2:]), linear=True)
_simple("expand as", lambda x, m: x[:, -1:].expand_as(x) - x, linear=True)
_simple("stack", lambda x, m: torch.stack([x, 2 * x], 1).flatten(1, 2), linear=True)
_simple("stack and sum", lambda x, m: torch.stack([x, x.relu()], -1).sum(-1))
_simple("unbind", lambda x, m: sum(torch.unbind(x, 1)).unsqueeze(1), linear=True)  # type: ignore[attr-defined]
_simple("concatenation", lambda x, m: torch.cat([x, -x], 1), linear=True)
_simple("concat", lambda x, m: torch.concat([x, x.relu()], dim=-1))
_simple("concatenate", lambda x, m: aten.concatenate([x, 0.5 * x], 1), linear=True)
_simple("select", lambda x, m: x[:, 0].unsqueeze(1) + x.select(1, -1).unsqueeze(1), linear=True)
_simple("last row", lambda x, m: x[..., -1, :], dims=3, linear=True)
_simple("pieces", lambda x, m: torch.cat(torch.chunk(x, 2, dim=-1)[::-1], -1), linear=True)
_simple("nothing", lambda x, m: aten.alias(x.clone().contiguous()).detach(), linear=True)
_simple("casts", lambda x, m: x.to(torch.float64).type_as(x).double(), linear=True)
_simple("cast operators", lambda x, m: aten._to_copy(x.double(), dtype=torch.float64), linear=True)
_simple("lifts", lambda x, m: aten.lift_fresh_copy(aten.lift_fresh(aten.positive(x))), linear=True)
_simple("to as", lambda x, m: aten.to.dtype(aten.contiguous(x), torch.float64), linear=True)


@_step("dropout", linear=True)
def _dropout(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    image = len(shape) == 3
    return dice.pick(
        nn.Dropout(),
        nn.AlphaDropout(),
        nn.Dropout2d() if image else nn.Dropout(),
        nn.FeatureAlphaDropout() if image else nn.AlphaDropout(),
        Step(lambda x, m: functional.dropout(x, training=m.training)),
        Step(lambda x, m: functional.feature_alpha_dropout(x, training=m.training)),
        Step(lambda x, m: aten.feature_dropout(x, 0.5, False)),
        Step(lambda x, m: aten.native_dropout(x, 0.5, False)[0]),
    )


@_step("slice", linear=True)
def _slice(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    length = shape[-1]
    if length < 2:
        return None
    order = torch.randint(length, (dice.integer(1, length + 1),), generator=dice.generator)
    half = dice.integer(1, length - 1)
    return dice.pick(
        Step(lambda x, m: x[..., ::2]),
        Step(lambda x, m: x[..., 1:]),
        Step(lambda x, m: x.narrow(-1, 1, half)),
        Step(lambda x, m: aten.narrow(x, -1, 0, half)),
        Step(lambda x, m: torch.index_select(x, x.dim() - 1, m.order), order=order),
        Step(lambda x, m: torch.split(x, half, -1)[-1]),
        Step(lambda x, m: torch.cat(torch.split(x, [half, length - half], -1)[::-1], -1)),
        Step(lambda x, m: aten.split_with_sizes(x, [half, length - half], -1)[0]),
    )


@_step("reshaped", linear=True)
def _reshaped(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    size = math.prod(shape)
    rows = dice.pick(*[rows for rows in range(1, size + 1) if size % rows == 0])
    columns = size // rows
    channels = dice.pick(*[part for part in range(1, columns + 1) if columns % part == 0])
    target = dice.pick((size,), (rows, columns), (rows, channels, columns // channels))
    if dice.chance(0.3):
        return Step(lambda x, m: x.flatten(1).unflatten(1, target))
    return (
        Step(lambda x, m: x.reshape(-1, *target))
        if dice.chance(0.5)
        else nn.Unflatten(1, target)
        if (len(shape) == 1)
        else Step(lambda x, m: x.contiguous().view(x.shape[0], *target))
    )


@_step("shuffle", linear=True)
def _shuffle(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    if len(shape) != 3:
        return None
    channels, height, width = shape
    ways: list[nn.Module] = [nn.ChannelShuffle(channels), Step(lambda x, m: aten.channel_shuffle(x, channels))]
    if channels % 4 == 0:
        ways.append(nn.PixelShuffle(2))
    if height % 2 == width % 2 == 0:
        ways += [nn.PixelUnshuffle(2)] * 2
    return dice.pick(*ways)


@_step("pad", linear=True)
def _pad(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    ends = [dice.integer(0, 1) for _ in range(2 * min(2, len(shape)))]
    value = dice.number(-1, 1)
    ways: list[Any] = [
        Step(lambda x, m: functional.pad(x, ends[:2], value=value)),
        Step(lambda x, m: aten.constant_pad_nd(x, ends[:2], value)),
    ]
    if shape[-1] > 2:
        ways.append(Step(lambda x, m: functional.pad(x, (-1, 1), value=value)))
    if len(shape) == 3 and min(shape[1:]) > 1:
        for mode in ("reflect", "replicate", "circular"):
            ways.append(Step(lambda x, m, mode=mode: functional.pad(x, ends, mode=mode)))
        ways += [
            nn.ZeroPad2d((1, 0, 0, 1)),
            Step(lambda x, m: aten.reflection_pad2d(x, ends)),
            Step(lambda x, m: aten.replication_pad2d(x, ends)),
        ]
    if len(shape) == 2 and shape[-1] > 1:
        ways = [
            Step(lambda x, m: functional.pad(x, ends[:2], mode="reflect")),
            Step(lambda x, m: aten.reflection_pad1d(x, ends[:2])),
            Step(lambda x, m: aten.replication_pad1d(x, ends[:2])),
        ]
    return dice.pick(*ways)


# Pools and resampling


@_step("average pool", linear=True)
def _average_pool(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    if len(shape) == 2:
        kernel = dice.integer(1, min(3, shape[-1]))
        way = dice.pick(
            nn.AvgPool1d(kernel, dice.pick(1, 2), dice.integer(0, kernel // 2), dice.chance(0.3), dice.chance(0.5)),
            nn.AdaptiveAvgPool1d(dice.integer(1, 3)),
        )
        return way
    if len(shape) != 3:
        return None
    kernel = dice.integer(1, min(3, shape[1])), dice.integer(1, min(3, shape[2]))
    padding = dice.integer(0, kernel[0] // 2), dice.integer(0, kernel[1] // 2)
    size = dice.integer(1, 3), dice.integer(1, 3)
    stride = dice.pick(1, 2), dice.pick(1, 2, 3)
    divisor = dice.pick(None, None, 3)
    ceil, count = dice.chance(0.3), dice.chance(0.5)
    return dice.pick(
        nn.AvgPool2d(kernel, stride, padding, ceil, count, divisor),
        Step(lambda x, m: functional.avg_pool2d(x, kernel, stride, padding, ceil, count, divisor)),
        nn.AdaptiveAvgPool2d(size),
        Step(lambda x, m: aten._adaptive_avg_pool2d(x, size)),
    )


@_step("max pool")
def _max_pool(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    if len(shape) == 2:
        kernel = dice.integer(1, min(3, shape[-1]))
        stride, padding, ceil = dice.pick(1, 2), dice.integer(0, kernel // 2), dice.chance(0.3)
        return dice.pick(
            nn.MaxPool1d(kernel, stride, padding, ceil_mode=ceil),
            Step(lambda x, m: aten.max_pool1d_with_indices(x, [kernel], [stride], [padding], [1], ceil)[0]),
            nn.AdaptiveMaxPool1d(dice.pick(1, shape[-1])),
        )
    if len(shape) != 3:
        return None
    kernel = dice.integer(1, min(3, shape[1])), dice.integer(1, min(3, shape[2]))
    padding = dice.integer(0, kernel[0] // 2), dice.integer(0, kernel[1] // 2)
    stride, ceil = (dice.pick(1, 2), dice.pick(1, 2, 3)), dice.chance(0.3)
    holes = tuple(dice.pick(1, 2) if 2 * (k - 1) < size else 1 for k, size in zip(kernel, shape[1:], strict=True))
    sizes = tuple(dice.pick(*[n for n in range(1, size + 1) if size % n == 0]) for size in shape[1:])
    return dice.pick(
        nn.MaxPool2d(kernel, stride, padding, holes, ceil_mode=ceil),
        Step(lambda x, m: functional.max_pool2d(x, kernel, stride, padding, holes, ceil)),
        Step(lambda x, m: aten.max_pool2d_with_indices(x, kernel, stride, padding, holes, ceil)[0]),
        nn.AdaptiveMaxPool2d(sizes),
    )


@_step("reduction", linear=True)
def _mean(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    axis, keep = dice.integer(1, len(shape)), dice.chance(0.5)
    keep = keep or len(shape) == 1
    ways = [
        Step(lambda x, m: x.mean(axis, keepdim=keep)),
        Step(lambda x, m: x.sum(dim=axis, keepdim=keep)),
        Step(lambda x, m: x - x.mean(axis, keepdim=True)),
    ]
    if len(shape) == 3:
        ways.append(Step(lambda x, m: x.mean((2, 3))))
    return dice.pick(*ways)


@_step("largest")
def _largest(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    axis, keep = dice.integer(1, len(shape)), dice.chance(0.5) or len(shape) == 1
    ways = [
        Step(lambda x, m: x.amax(axis, keepdim=keep)),
        Step(lambda x, m: x.max(dim=axis, keepdim=keep)[0]),
        Step(lambda x, m: x - x.amax(axis, keepdim=True)),
    ]
    return dice.pick(*ways)


@_step("upsampling", linear=True)
def _upsampling(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    if len(shape) != 3:
        return None
    mode = dice.pick("nearest", "nearest-exact", "bilinear", "bicubic")
    corners = dice.pick(True, False) if mode.startswith("bi") else None
    if dice.chance(0.5):
        return nn.Upsample(scale_factor=dice.pick(2.0, 1.5), mode=mode, align_corners=corners)
    size = dice.integer(1, 5), dice.integer(1, 5)
    return Step(lambda x, m: functional.interpolate(x, size, mode=mode, align_corners=corners))


# Kinks and curves

_KINKS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "relu": lambda x, m: functional.relu(x),
    "relu as a method": lambda x, m: x.relu(),
    "relu by clamp": lambda x, m: x.clamp(min=0),
    "relu in place": lambda x, m: torch.relu_(x * 1.0),
    "threshold": lambda x, m: functional.threshold(x, 0.25, 0.25),
    "abs": lambda x, m: torch.abs(x),
    "leak": lambda x, m: functional.leaky_relu(x, 0.125),
    "steep leak": lambda x, m: functional.leaky_relu(x, 1.5),
    "falling leak": lambda x, m: functional.leaky_relu(x, -0.5),
    "random leak": lambda x, m: functional.rrelu(x, training=m.training),
    "maximum": lambda x, m: torch.maximum(x, -x),
    "minimum": lambda x, m: torch.minimum(x, 0.5 * x.flip(-1)),
    "max of two": lambda x, m: torch.max(x, x.flip(1)),
    "min of two": lambda x, m: torch.min(x, 2 * x),
    "fmax": lambda x, m: torch.fmax(x, x.flip(-1)),
    "fmin": lambda x, m: torch.fmin(x, x.roll(1, -1)),
    "maximum with a number": lambda x, m: torch.maximum(x, torch.tensor(0.125, dtype=torch.float64)),
    "double relu": lambda x, m: functional.relu(x) - 0.5 * functional.relu(-x),
    "clamp": lambda x, m: x.clamp(-0.5, 0.5),
    "clip": lambda x, m: torch.clip(x, 0.0, 0.75),
    "clamp below": lambda x, m: torch.clamp_min(x, -0.25),
    "clamp above": lambda x, m: torch.clamp_max(x, 0.25),
    "clamp nowhere": lambda x, m: x.clamp(-math.inf, 0.5),
    "hardtanh": lambda x, m: functional.hardtanh(x),
    "relu6": lambda x, m: functional.relu6(8 * x),
    "hardsigmoid": lambda x, m: functional.hardsigmoid(8 * x),
}
_CURVES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "sigmoid": lambda x, m: torch.sigmoid(x),
    "tanh": lambda x, m: x.tanh(),
    "softplus": lambda x, m: functional.softplus(x),
    "sharp softplus": lambda x, m: functional.softplus(x, beta=8.0),
    "log sigmoid": lambda x, m: functional.logsigmoid(x),
    "elu": lambda x, m: functional.elu(x),
    "steep elu": lambda x, m: functional.elu(x, 1.75),
    "selu": lambda x, m: functional.selu(x),
    "celu": lambda x, m: functional.celu(x, 0.5),
    "silu": lambda x, m: functional.silu(x),
    "hardswish": lambda x, m: functional.hardswish(4 * x),
    "gelu": lambda x, m: functional.gelu(x),
    "tanh gelu": lambda x, m: functional.gelu(x, approximate="tanh"),
}
for _name, _function in _KINKS.items():
    _simple(_name, _function)
for _name, _function in _CURVES.items():
    _simple(_name, _function, smooth=True)


@_step("prelu")
def _prelu(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    layer = nn.PReLU(dice.pick(1, shape[0]))
    if dice.chance(0.5):
        return layer
    view = dice.chance(0.5)
    if not view:
        return Step(lambda x, m: functional.prelu(x, m.layer.weight), layer=layer)
    ones = (1, -1, *[1] * (len(shape) - 1))
    return Step(lambda x, m: aten._prelu_kernel(x, m.layer.weight.reshape(ones)), layer=layer)


@_step("clamp by tensors")
def _clamp(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    low = -dice.uniform(*shape)
    return Step(lambda x, m: torch.clamp(x, m.low, m.low + 1), low=low)


# Skips and shared layers


def _inner(dice: Dice, shape: tuple[int, ...]) -> nn.Module:
    """A layer that keeps the shape."""
    if len(shape) == 3:
        return nn.Conv2d(shape[0], shape[0], (3, 1), padding=(1, 0))
    if len(shape) == 2:
        return nn.Conv1d(shape[0], shape[0], 3, padding=1)
    return nn.Linear(shape[0], shape[0])


@_step("residual")
def _residual(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    layer = _inner(dice, shape)
    return dice.pick(
        Step(lambda x, m: x + m.layer(x).relu(), layer=layer),
        Step(lambda x, m: functional.relu(x - m.layer(functional.relu(x))), layer=layer),
        Step(lambda x, m: functional.relu(m.layer(x).add_(x)), layer=layer),
        Step(lambda x, m: torch.sub(m.layer(x), x.abs(), alpha=2), layer=layer),
    )


@_step("shared")
def _shared(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    layer = _inner(dice, shape)
    return dice.pick(
        Step(lambda x, m: m.layer(functional.relu(m.layer(x))), layer=layer),
        Step(lambda x, m: m.layer(x) + m.layer(-x).relu(), layer=layer),
        Step(lambda x, m: m.layer(x).relu() - m.layer(x), layer=layer),
    )


@_step("dense block")
def _dense_block(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    if len(shape) != 3:
        return None
    layer = nn.Conv2d(shape[0], dice.integer(1, 3), 1)
    return Step(lambda x, m: torch.cat([x, m.layer(x).relu()], 1), layer=layer)


@_step("maxout")
def _maxout(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    if shape[0] % 2:
        return None
    return Step(lambda x, m: torch.maximum(*torch.chunk(x, 2, dim=1)))


@_step("hook")
def _hook(dice: Dice, shape: tuple[int, ...]) -> nn.Module | None:
    layer = _inner(dice, shape)
    limit = dice.number(0, 1)
    layer.register_forward_hook(lambda module, inputs, output: output.clamp(max=limit))
    return layer


# Networks


_SHAPES = {
    "any": ((1, 1, 2), (1, 2, 2), (2, 2, 3), (1, 3, 4), (3, 2, 2), (1, 4, 4), (2, 4, 3), (1, 1, 1), (1, 1, 8)),
    "one hidden layer": ((1, 1, 2), (1, 1, 3), (1, 1, 2), (1, 2, 2)),
    "line": ((1, 1, 1),),
    "linear": ((1, 1, 1), (1, 2, 2), (2, 2, 3), (1, 3, 4), (3, 2, 2)),
    "few units": ((1, 1, 2), (1, 2, 2), (1, 2, 3), (2, 2, 2)),
}


def _fits(network: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of what a step makes, or None if it is too large or empty."""
    with torch.no_grad():
        found = network.eval()(torch.zeros(2, *shape, dtype=torch.float64))
    size = found[0].numel()
    return tuple(found.shape[1:]) if 1 <= size <= _LARGEST and found.dim() in (2, 3, 4) else None


def _names(dice: Dice, profile: str) -> list[str]:
    """The steps to try, in order."""
    depth = dice.integer(1, 5)
    kinks = [name for name in STEPS if name not in LINEAR | SMOOTH]
    everything = list(STEPS)
    layers = ["convolution", "dense", "convolution", "dense", "batch norm", "residual"]
    shapes = [
        "series",
        "average pool",
        "max pool",
        "pad",
        "upsampling",
        "transposed convolution",
        "reshaped",
        "shuffle",
    ]
    linear = sorted(LINEAR)
    if profile == "linear":
        return [dice.pick(*linear) for _ in range(depth)]
    if profile == "one hidden layer":
        kinds = "relu", "relu", "relu as a method", "leak", "relu by clamp", "threshold"
        return ["flatten", "narrow dense", dice.pick(*kinds)]
    if profile == "line":
        steps = []
        for _ in range(dice.integer(1, 3)):
            steps += ["narrow dense", dice.pick(*kinks)]
        return ["flatten", *steps]
    if profile == "few units":
        start = dice.pick(["flatten", "narrow dense"], ["convolution"], ["flatten", "normalisation", "narrow dense"])
        return [
            *start,
            dice.pick(*kinks),
            "flatten",
            "narrow dense",
            dice.pick("relu", "leak", "max of two", "largest"),
        ]
    steps = []
    for _ in range(depth):
        first = dice.pick(*dice.pick(layers, shapes, everything))
        steps += [first, dice.pick(*kinks, *_CURVES, *everything)]
    return steps


def _narrow(dice: Dice, shape: tuple[int, ...]) -> nn.Module:
    return nn.Linear(shape[-1], dice.integer(1, 10 if len(shape) == 1 else 4))


def random_network(seed: int, number: int, profile: str | None = None) -> Made:
    """The network of this number; profiles take turns unless one is asked for.

    `FAMILY` numbers in a row are one network with other weights.
    """
    dice = Dice("network", seed, number // FAMILY)
    if profile is None:
        profile = dice.pick("any", "any", "any", "any", "any", "any", *PROFILES[1:])
    shape: tuple[int, int, int] = dice.pick(*_SHAPES[profile])
    steps: list[nn.Module] = []
    used: list[str] = []
    current: tuple[int, ...] = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(dice.seed())
        for name in _names(dice, profile):
            maker = _narrow if name == "narrow dense" else STEPS[name]
            step = maker(dice, current)
            if step is None:
                continue
            step = step.double()
            found = _fits(step, current)
            if found is not None:
                steps.append(step)
                used.append(name)
                current = found
        head, classes = _head(dice, current, profile)
        steps += head
    network = nn.Sequential(*steps) if dice.chance(0.5) else Chain(steps)
    network = network.double().eval().requires_grad_(False)
    made = Made(network, shape, f"{'x'.join(map(str, shape))}: {' > '.join(used)} > {classes}", profile)
    return dressed(made, seed, number)


def dressed(made: Made, seed: int, number: int) -> Made:
    """The same network with the weights of this number, in place."""
    done = _dressed(made.network, Dice("weights", seed, number))
    return replace(made, name=f"{made.name.split('; ')[0]}; {done}")


def _head(dice: Dice, shape: tuple[int, ...], profile: str) -> tuple[list[nn.Module], int]:
    """From the last value to logits."""
    size = math.prod(shape)
    if len(shape) == 1 and size > 1 and dice.chance(0.1):
        return [Step(lambda x, m: x * m.factor + 0.0, factor=nn.Parameter(dice.normal(size)))], size
    choices = _HEADS if profile in ("any", "linear") else (1, 2, 3, 10)
    classes = dice.pick(*choices)
    layer = nn.Linear(size, classes, bias=dice.chance(0.9))
    flatten = [] if len(shape) == 1 else [nn.Flatten()]
    return [*flatten, layer], classes


# Weights

_GAINS = 1.0, 1.0, 1.0, 1.0, 0.1, 3.0, 30.0, 1e-8, 1e3, 0.0


def _dressed(network: nn.Module, dice: Dice) -> str:
    """Set weights; what was done to them."""
    gain = dice.pick(1.0, 1.0, 1.0, 1.0, 0.1, 3.0, 30.0, 1e-6, 1e3)
    odd = dice.chance(0.5)
    layers = [module for module in network.modules() if isinstance(getattr(module, "weight", None), Tensor)]
    for module in layers:
        own = gain * dice.pick(*_GAINS) if odd and dice.chance(0.3) else gain
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            _dress_norm(module, dice)
        elif isinstance(module, nn.PReLU):
            module.weight.copy_(dice.pick(0.25, 0.0, 1.5, -0.5) + 0.25 * dice.normal(*module.weight.shape))
        elif not nn.utils.parametrize.is_parametrized(module):
            _dress_layer(module, own, odd, dice)
    if odd and layers and isinstance(layers[-1], nn.Linear) and dice.chance(0.3):
        layers[-1].weight *= dice.pick(30.0, 1e3, 1e-3)
        if layers[-1].bias is not None:
            layers[-1].bias *= dice.pick(1e3, 1.0, 0.0)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(tensor.float().double())
    return f"gain {gain:g}{', odd' if odd else ''}"


def _dress_layer(module: Any, gain: float, odd: bool, dice: Dice) -> None:
    weight, bias = module.weight, module.bias
    fan = max(1, weight[0].numel())
    weight.copy_(dice.normal(*weight.shape) * gain * math.sqrt(2 / fan))
    if bias is not None:
        bias.copy_(0.5 * gain * dice.normal(*bias.shape))
    if not odd:
        return
    outputs = len(weight)
    if dice.chance(0.2):
        weight[dice.integer(0, outputs - 1)] = 0.0  # a unit that knows only its bias ...
        if bias is not None and len(bias) == outputs and dice.chance(0.5):
            bias.zero_()  # ... which may be 0: on the kink everywhere
    if dice.chance(0.2) and outputs > 1:
        weight[1] = weight[0] * dice.pick(1.0, 1.0, -1.0)
        if bias is not None and len(bias) == outputs:
            bias[1] = bias[0]
    if bias is not None and dice.chance(0.2):
        bias[dice.integer(0, len(bias) - 1)] = dice.pick(-20.0, 20.0) * max(gain, 1e-3)  # dead, or never off
    if dice.chance(0.1):
        weight *= torch.where(dice.uniform(*weight.shape) < 0.5, 0.0, 1.0).double()
    if dice.chance(0.1):
        weight.copy_(weight.sign() * gain)  # ties


def _dress_norm(module: Any, dice: Dice) -> None:
    shape = module.running_mean.shape
    module.running_var.copy_(dice.pick(1.0, 1.0, 1.0, 1e-12, 1e-4, 1e6) * (0.5 + dice.uniform(*shape)))
    module.running_mean.copy_(dice.pick(1.0, 1.0, 0.0, 100.0) * dice.normal(*shape))
    if module.weight is not None:
        module.weight.copy_(dice.normal(*shape))
        module.bias.copy_(0.5 * dice.normal(*shape))
