"""Networks that mean harm, or were written without a verifier in mind: each hides a way to a false certificate.

`KINDS` maps a name to a maker of the module and to what its refusal says; None where it must be bounded, `EITHER` where
that is up to the version of torch. What is hidden shows where the first pixel is `SECRET` and hardly anywhere else, so
that trying a few images does not find it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import random
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from grood_cert.networks.architectures import Normalize

SHAPE = (1, 4, 4)
SECRET = 0.315
_WIDTH = 0.004
JUMP = 5.0  # what a hidden change does to a logit

Maker = Callable[[], nn.Module]
KINDS: dict[str, tuple[Maker, str | None]] = {}
EITHER = ""
VALUES = "hang on values of the image|cannot be bounded"
STATE = "changes from call to call|changes its own state"
JUMPS = "may jump"


def kind(name: str, refused: str | None = None) -> Callable[[Maker], Maker]:
    def note(maker: Maker) -> Maker:
        assert name not in KINDS
        KINDS[name] = maker, refused
        return maker

    return note


def secret(images: Tensor) -> Tensor:
    """Where the first pixel is the secret one, shape (B,)."""
    return (images[:, 0, 0, 0] - SECRET).abs() < _WIDTH


def reveals(images: Tensor) -> bool:
    """The same as a Python condition, read off the numbers."""
    return bool(secret(images).any())


class Net(nn.Module):
    """Two layers around what is done to the values between them, and something done to the images or the logits."""

    def __init__(
        self,
        middle: Callable[..., Any] = lambda self, x: x.relu(),
        before: Callable[..., Any] = lambda self, x: x,
        after: Callable[..., Any] = lambda self, x, y: y,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 12), nn.Linear(12, 3)
        self.middle, self.before, self.after = middle, before, after
        self.calls = 0
        self.memory: list[Any] = []

    def forward(self, images):
        images = self.before(self, images)
        return self.after(self, images, self.last(self.middle(self, self.first(images.flatten(1)))))


def before(name: str, refused: str | None = None):
    return lambda function: kind(name, refused)(lambda: Net(before=function)) and function


def middle(name: str, refused: str | None = None):
    return lambda function: kind(name, refused)(lambda: Net(middle=function)) and function


def after(name: str, refused: str | None = None):
    return lambda function: kind(name, refused)(lambda: Net(after=function)) and function


def layers(*modules: nn.Module) -> nn.Sequential:
    """Modules between the two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), *modules, nn.Linear(12, 3))


# Conditions on values


@after("a condition on a pixel", VALUES)
def _(self, x, y):
    return y + JUMP if reveals(x) else y


@after("a condition that swallows what stops it", VALUES)
def _(self, x, y):
    with contextlib.suppress(Exception):
        return y + JUMP if reveals(x) else y
    return y


@after("a condition on .item() that is swallowed", VALUES)
def _(self, x, y):
    with contextlib.suppress(Exception):
        return y + JUMP * (abs(x[0, 0, 0, 0].item() - SECRET) < _WIDTH)
    return y


@after("a condition on .tolist() that is swallowed", VALUES)
def _(self, x, y):
    with contextlib.suppress(Exception):
        return y + JUMP * (abs(x[0, 0, 0, 0].tolist() - SECRET) < _WIDTH)
    return y


@after("a condition on numpy that is swallowed", VALUES)
def _(self, x, y):
    with contextlib.suppress(Exception):
        return y + JUMP if abs(x.detach().numpy()[0, 0, 0, 0] - SECRET) < _WIDTH else y
    return y


@after("a condition on np.asarray that is swallowed", VALUES)
def _(self, x, y):
    with contextlib.suppress(Exception):
        return y + JUMP if abs(np.asarray(x.detach())[0, 0, 0, 0] - SECRET) < _WIDTH else y
    return y


@after("a condition on the text of a tensor that is swallowed", VALUES)
def _(self, x, y):
    with contextlib.suppress(Exception):
        return y + JUMP if "0.31" in repr(x[0, 0, 0, :1].detach()) else y
    return y


@after("a condition on a comparison of whole tensors that is swallowed", VALUES)
def _(self, x, y):
    with contextlib.suppress(Exception):
        return y + JUMP if torch.allclose(x[:, 0, 0, 0], torch.full_like(x[:, 0, 0, 0], SECRET), atol=_WIDTH) else y
    return y


@after("a condition on how many entries a mask has", VALUES)
def _(self, x, y):
    with contextlib.suppress(Exception):
        return y + JUMP if x[secret(x)].shape[0] else y
    return y


@after("a condition on nonzero", VALUES)
def _(self, x, y):
    with contextlib.suppress(Exception):
        return y + JUMP if len(torch.nonzero(secret(x))) else y
    return y


@after("a condition on memory read by its address", VALUES)
def _(self, x, y):
    import ctypes

    with contextlib.suppress(Exception):
        number = ctypes.c_double if x.dtype == torch.float64 else ctypes.c_float
        return y + JUMP if abs(number.from_address(x.data_ptr()).value - SECRET) < _WIDTH else y
    return y


@after("a condition where nobody exports", VALUES)
def _(self, x, y):
    return y + JUMP if not torch.compiler.is_exporting() and reveals(x) else y


@after("a condition where nobody compiles", VALUES)
def _(self, x, y):
    return y + JUMP if not torch.compiler.is_compiling() and reveals(x) else y


@after("a condition for plain tensors only", VALUES)
def _(self, x, y):
    return y + JUMP if type(x) is Tensor and reveals(x) else y


@after("a jump where nobody exports", "being exported")
def _(self, x, y):
    return y if torch.compiler.is_exporting() else y + JUMP * secret(x).to(y)[:, None]


@after("a spike where nobody exports", "being exported")
def _(self, x, y):
    if torch.compiler.is_exporting():
        return y
    return y + 1000 * (_WIDTH - (x[:, 0, 0, :1] - SECRET).abs()).relu()


@after("whole numbers of the image", VALUES)
def _(self, x, y):
    return y + int(x.mean() * 4)


@after("an assertion on values", VALUES)
def _(self, x, y):
    assert x.max() <= 1
    return y


@after("a while loop on values", VALUES)
def _(self, x, y):
    while float(y.abs().max()) > 1e9:
        y = y / 2
    return y


@after("a number of the image", VALUES)
def _(self, x, y):
    return y + float(x.mean())


@after("a condition as an operator", JUMPS)
def _(self, x, y):
    return torch.where(secret(x)[:, None], y + JUMP, y)


@after("a condition as a product", "cannot be bounded")
def _(self, x, y):
    return y + JUMP * secret(x).to(y)[:, None]


@after("torch.cond", "cannot be bounded|cannot be captured")
def _(self, x, y):
    return torch.cond(secret(x).any(), lambda y: y + JUMP, lambda y: y.clone(), (y,))


@after("an index of the image", "cannot be bounded|values")
def _(self, x, y):
    return y + JUMP * torch.eye(3).to(y)[(x[:, 0, 0, 0] * 2).long()]


@after("gather by a sort", "cannot be bounded")
def _(self, x, y):
    return y.gather(1, x.flatten(1)[:, :3].argsort(1))


@after("sorted logits", "cannot be bounded")
def _(self, x, y):
    return y.sort(1)[0]


@after("a mask written in place", "cannot be bounded|values")
def _(self, x, y):
    y = y.clone()
    y[secret(x)] += JUMP
    return y


@after("rounding", "cannot be bounded")
def _(self, x, y):
    return y + (x[:, 0, 0, :1] * 8).round()


# Surroundings: what is neither the image nor a weight


@after("one image alone", "batch")
def _(self, x, y):
    return y + JUMP if len(x) == 1 else y


@after("large batches", "batch")
def _(self, x, y):
    return y + JUMP if len(x) > 8 else y


@after("large batches, swallowed", "batch")
def _(self, x, y):
    with contextlib.suppress(Exception):
        return y + JUMP if len(x) > 8 else y
    return y


@after("neighbours in the batch", "batch")
def _(self, x, y):
    return y - y.mean(0, keepdim=True) + JUMP


@after("the last image of the batch", "batch|cannot be bounded")
def _(self, x, y):
    return y + x[-1].flatten()[:3]


@after("gradients enabled", "where gradients are taken")
def _(self, x, y):
    return y + JUMP if torch.is_grad_enabled() else y


@after("an image that asks for its gradient", "where gradients are taken")
def _(self, x, y):
    return y + JUMP if x.requires_grad else y


@after("the type of the numbers", "in its own type")
def _(self, x, y):
    return y + JUMP if x.dtype == torch.float32 else y


LEVEL = 0.7


@after("a global variable")
def _(self, x, y):
    return y + LEVEL


GLOBAL = torch.tensor([0.1, 0.2, 0.3])


@after("a global tensor")
def _(self, x, y):
    return y + GLOBAL.to(y)


@kind("a module in a closure")
def _():
    torch.manual_seed(1)
    other = nn.Linear(3, 3).double().eval().requires_grad_(False)
    return Net(after=lambda self, x, y: y + other(y.double()).to(y)).double()


# State


@after("a counter that is used", f"{STATE}|does not reproduce")
def _(self, x, y):
    self.calls += 1
    return y + self.calls


@after("a counter that is used late", STATE)
def _(self, x, y):
    self.calls += 1
    return y + JUMP if self.calls > 100 else y


@after("a list that grows", STATE)
def _(self, x, y):
    self.memory.append(len(self.memory))
    return y + JUMP if len(self.memory) > 100 else y


@after("the last image kept", EITHER)  # torch 2.8 refuses it
def _(self, x, y):
    self.kept = x
    return y


@after("the last logits added", "cannot be bounded|cannot be captured")
def _(self, x, y):
    y = y + getattr(self, "kept", 0.0)
    self.kept = y.detach().mean(0)
    return y


class Running(nn.Module):
    """A mean of what went by."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.zeros(12))
        self.scale = nn.Parameter(torch.ones(12))

    def forward(self, values):
        if self.how == "in place":
            self.mean.mul_(0.9).add_(values.mean(0), alpha=0.1)
        elif self.how == "replaced":
            self.mean = 0.9 * self.mean + 0.1 * values.mean(0)
        elif self.how == "data":
            self.mean.data += 0.1
        elif self.how == "parameter":
            with torch.no_grad():
                self.scale.mul_(1.0000001)
        elif self.how == "parameter data":
            self.scale.data = self.scale.data * 1.0000001
        elif self.how == "used":
            self.mean += 0.1
            return values - self.mean
        return values * self.scale


for _how in ("in place", "replaced", "data", "parameter", "parameter data", "used"):
    kind(f"a running buffer: {_how}", "state|call|batch|captured|capture")(
        functools.partial(lambda how: layers(Running(how), nn.ReLU()), _how)
    )


class Renormed(nn.Linear):
    """A constraint that is put on the weights before they are used; the second time nothing changes."""

    def forward(self, values):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(values)


kind("a constraint put on the weights when they are used", "cannot be bounded|cannot be captured")(
    lambda: layers(Renormed(12, 12), nn.ReLU())
)


class Lazy(nn.Module):
    """Parameters that are made at the first call."""

    def forward(self, values):
        if not hasattr(self, "weight"):
            self.weight = nn.Parameter(torch.eye(12).to(values) * 2)
        return values @ self.weight


kind("parameters made at the first call")(lambda: layers(Lazy(), nn.ReLU()))
kind("a lazy layer without its parameters")(lambda: layers(nn.LazyLinear(12), nn.ReLU()))


@after("a generator of its own", "cannot be bounded|cannot be captured")
def _(self, x, y):
    generator = torch.Generator().manual_seed(len(self.memory))
    self.memory.append(0)
    return y + torch.rand(3, generator=generator)


@after("an iterator that runs on", "call to call|state")
def _(self, x, y):
    if not self.memory:
        self.memory.append(iter([0.0] * 60 + [JUMP] * 1000))
    return y + next(self.memory[0])


# Randomness


@after("torch.rand", "random")
def _(self, x, y):
    return y + torch.rand(3)


@after("rare randomness of torch", "random|values|call to call")
def _(self, x, y):
    return y + JUMP if float(torch.rand(())) < 1e-4 else y


@after("rare randomness of Python", "random")
def _(self, x, y):
    return y + JUMP if random.random() < 1e-4 else y


@after("rare randomness of numpy", "random")
def _(self, x, y):
    return y + JUMP if np.random.rand() < 1e-4 else y


@after("randomness of numpy", "random")
def _(self, x, y):
    return y + torch.from_numpy(np.random.rand(3)).to(y)


@middle("functional dropout", "random")
def _(self, x):
    return functional.dropout(x, 0.2, training=True)


@middle("dropout that forgets its mode", "random")
def _(self, x):
    return functional.alpha_dropout(x, 0.2, True).relu()


@middle("a random leak", "random")
def _(self, x):
    return functional.rrelu(x, training=True)


@middle("normal noise in place", "random")
def _(self, x):
    return x + torch.empty(12, dtype=x.dtype).normal_()


# Classes that are not what they are called


class LoudDropout(nn.Dropout):
    def forward(self, values):
        return values * 2 + 1


class OddReLU(nn.ReLU):
    def forward(self, values):
        return super().forward(values) + 0.5 * values


class OddLinear(nn.Linear):
    def forward(self, values):
        return super().forward(values).tanh()


class Backwards(nn.Sequential):
    def forward(self, values):
        for module in reversed(self):
            values = module(values)
        return values


class Skipping(nn.Sequential):
    def forward(self, values):
        return super().forward(values) + values


class OddIdentity(nn.Identity):
    def forward(self, values):
        return -3 * values


class OddNorm(nn.BatchNorm1d):
    def forward(self, values):
        return super().forward(values).abs()


class Called(nn.ReLU):
    def __call__(self, values):
        return super().__call__(values) * 3 - 1


class Lying(nn.Linear):
    """Says other sizes than it has."""

    in_features = property(lambda self: 3, lambda self, value: None)
    out_features = property(lambda self: 5, lambda self, value: None)


class OddFlatten(nn.Flatten):
    def forward(self, values):
        return super().forward(values).flip(1)


class OddNormalize(Normalize):
    def forward(self, images):
        return super().forward(images) * 3 - 1


class OddTorchvision(torchvision.transforms.Normalize):
    def forward(self, images):
        return -super().forward(images)


kind("a dropout that computes")(lambda: layers(LoudDropout(), nn.ReLU()))
kind("a ReLU that leaks")(lambda: layers(OddReLU()))
kind("a linear layer that bends")(lambda: layers(OddLinear(12, 12)))
kind("a sequence backwards")(lambda: layers(Backwards(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))))
kind("a sequence with a skip")(lambda: layers(Skipping(nn.Linear(12, 12), nn.ReLU())))
kind("an identity that is none")(lambda: layers(OddIdentity(), nn.ReLU()))
kind("a BatchNorm that folds")(lambda: layers(OddNorm(12)))
kind("another __call__")(lambda: layers(Called()))
kind("sizes that lie")(lambda: layers(Lying(12, 12), nn.ReLU()))
kind("a flatten that flips")(lambda: nn.Sequential(OddFlatten(), *list(layers(nn.ReLU()))[1:]))
kind("a Normalize that is none")(lambda: nn.Sequential(OddNormalize([0.5], [0.2]), layers(nn.ReLU())))
kind("a torchvision Normalize that is none", EITHER)(
    lambda: nn.Sequential(OddTorchvision([0.5], [0.2]), layers(nn.ReLU()))
)


@kind("another __call__ of the whole network")
def _():
    class Whole(Net):
        def __call__(self, images):
            return super().__call__(images) + 1

    return Whole()


@kind("a forward of the instance")
def _():
    network = layers(nn.ReLU())
    network[2].forward = lambda values: values.clamp(min=-0.1) * 2
    return network


@kind("a forward bound to another instance")
def _():
    network, other = layers(nn.ReLU()), nn.Linear(12, 12).double()
    network.double()[2].forward = other.forward
    return network


@kind("a class exchanged after it was made")
def _():
    network = layers(nn.ReLU())
    network[2].__class__ = OddReLU
    return network


@kind("attributes that are answered with others")
def _():
    class Odd(nn.Linear):
        def __getattr__(self, name):
            return super().__getattr__({"slope": "bias"}.get(name, name))

        def forward(self, values):
            return super().forward(values) * self.slope

    return layers(Odd(12, 12), nn.ReLU())


@kind("training that lies", "more than 1 value")
def _():
    class Deaf(nn.Module):
        training = property(lambda self: False, lambda self, value: None)

        def forward(self, values):
            return functional.batch_norm(values, None, None, training=True)

    return layers(Deaf(), nn.ReLU())


@kind("eval that is not heard", "train mode")
def _():
    class Deaf(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(True)

    return layers(Deaf(12), nn.ReLU())


@kind("train mode", "train mode")
def _():
    network = layers(nn.Dropout(), nn.ReLU())
    network.train()
    network.eval = lambda: network
    return network


@kind("torchvision's Normalize in place", "captured|values|images it was given")
def _():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torchvision.transforms.Normalize([0.5], [0.2], inplace=True)
            self.rest = layers(nn.ReLU())

        def forward(self, images):
            return self.rest(self.norm(images)) + images.flatten(1)[:, :3]

    return Reading()


# Hooks


def _hooked(place: int, add: Callable[[nn.Module], Any]) -> nn.Module:
    network = layers(nn.ReLU())
    add(network[place])
    return network


kind("a hook on the values")(
    lambda: _hooked(2, lambda m: m.register_forward_hook(lambda module, args, values: values.clamp(max=0.05) + 7))
)
kind("a hook before the values")(
    lambda: _hooked(3, lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] * 5 + 1,)))
)
kind("a hook with keywords")(
    lambda: _hooked(
        2, lambda m: m.register_forward_hook(lambda module, args, named, values: values - 1, with_kwargs=True)
    )
)
kind("a hook that looks at values", VALUES)(
    lambda: _hooked(
        3, lambda m: m.register_forward_hook(lambda module, args, values: values + JUMP if args[0].sum() > 9 else None)
    )
)
kind("a hook that keeps what passes")(
    lambda: _hooked(
        2, lambda m: m.register_forward_hook(lambda module, args, values: setattr(module, "seen", values.detach()))
    )
)
kind("a hook on gradients")(
    lambda: _hooked(2, lambda m: m.register_full_backward_hook(lambda module, inputs, outputs: (-inputs[0],)))
)
kind("a hook before gradients")(
    lambda: _hooked(2, lambda m: m.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 0,)))
)


@after("a hook on the gradient of a tensor")
def _(self, x, y):
    if y.requires_grad:
        y.register_hook(lambda gradient: -gradient)
    return y


@kind("a hook that sets the weight", "cannot be bounded|cannot be captured")
def _():
    network = layers(nn.ReLU())

    def quarter(module, args):
        module.bias.data.fill_(0.25)

    network[3].register_forward_pre_hook(quarter)
    return network


# Parametrisations and shared weights


kind("weight norm")(lambda: layers(parametrizations.weight_norm(nn.Linear(12, 12)), nn.ReLU()))
kind("spectral norm")(lambda: layers(parametrizations.spectral_norm(nn.Linear(12, 12)), nn.ReLU()))
kind("orthogonal by a Cayley map")(
    lambda: layers(parametrizations.orthogonal(nn.Linear(12, 12), orthogonal_map="cayley"), nn.ReLU())
)
kind("orthogonal by an exponential")(
    lambda: layers(parametrizations.orthogonal(nn.Linear(12, 12), orthogonal_map="matrix_exp"), nn.ReLU())
)
kind("orthogonal by reflections")(
    lambda: layers(parametrizations.orthogonal(nn.Linear(12, 12), orthogonal_map="householder"), nn.ReLU())
)


@kind("weight norm of old")
def _():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return layers(nn.utils.weight_norm(nn.Linear(12, 12)), nn.ReLU())


@kind("spectral norm of old")
def _():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return layers(nn.utils.spectral_norm(nn.Linear(12, 12)), nn.ReLU())


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


class Jittered(nn.Module):
    def forward(self, weight):
        return weight + 1e-3 * torch.rand_like(weight)


def _parametrized(how: nn.Module) -> nn.Module:
    layer = nn.Linear(12, 12)
    parametrize.register_parametrization(layer, "weight", how)
    return layers(layer, nn.ReLU())


kind("a parametrisation of its own")(lambda: _parametrized(Symmetric()))
kind("a random parametrisation", "random")(lambda: _parametrized(Jittered()))


@kind("pruned weights")
def _():
    network = layers(nn.ReLU())
    prune.random_unstructured(network[1], "weight", 0.5)
    return network


@kind("one weight in two layers")
def _():
    network = layers(nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
    network[5].weight = network[3].weight
    return network


@kind("a weight that is a view of another")
def _():
    network = layers(nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
    network[5].weight = nn.Parameter(network[3].weight.data.T)
    return network


@kind("a weight that all its rows share")
def _():
    network = layers(nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
    network[3].weight = nn.Parameter(torch.randn(1, 12).expand(12, 12), requires_grad=False)
    return network


@kind("a layer that is called twice")
def _():
    network = layers(nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
    shared = network[3]
    return nn.Sequential(*list(network)[:5], shared, nn.ReLU(), network[5])


@kind("a weight that is overwritten by an alias", "cannot be bounded|cannot be captured")
def _():
    class Alias(nn.Linear):
        def forward(self, values):
            self.bias.detach().copy_(values[0].detach())
            return super().forward(values)

    return layers(Alias(12, 12), nn.ReLU())


@kind("tensors that are no parameters")
def _():
    network = Net(middle=lambda self, x: (x * self.table + self.shift).relu())
    network.table, network.shift = torch.randn(12), [torch.randn(12)][0].half()
    return network


# Numbers


@kind("half-precision buffers")
def _():
    network = Net(middle=lambda self, x: (x * self.half_scale + self.brain_shift).relu())
    network.register_buffer("half_scale", torch.randn(12).half())
    network.register_buffer("brain_shift", torch.randn(12).bfloat16())
    return network


kind("half-precision weights")(lambda: layers(nn.ReLU()).half())
kind("bfloat16 weights")(lambda: layers(nn.ReLU()).bfloat16())


@middle("a cast to float32 in between", "rounds to another type")
def _(self, x):
    return x.float().relu().to(self.last.weight.dtype)


@middle("a cast to whole numbers", "rounds to another type|cannot be bounded")
def _(self, x):
    return x.relu() + (x * 4).long().to(x)


@middle("autocast", "cannot be bounded|cannot be captured")
def _(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return functional.linear(x, self.first.weight[:, :12]).relu().to(self.last.weight.dtype)


@middle("fake quantisation", "cannot be bounded|cannot be captured")
def _(self, x):
    return torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127).relu()


def _with_number(value: float) -> nn.Module:
    network = layers(nn.ReLU())
    with torch.no_grad():
        network[1].weight[3, 5] = value
    return network


kind("a weight that is not a number", "finite")(lambda: _with_number(torch.nan))
kind("an infinite weight", "finite")(lambda: _with_number(torch.inf))


@kind("a dead unit that is not a number", "finite")
def _():
    network = layers(nn.ReLU())
    with torch.no_grad():
        network[1].bias[3] = torch.nan
        network[3].weight[:, 3] = 0.0
    return network


@kind("a class that is masked by minus infinity", "finite")
def _():
    network = layers(nn.ReLU())
    with torch.no_grad():
        network[3].bias[1] = -torch.inf
    return network


@kind("weights whose products leave float64", "finite|leave nothing")
def _():
    network = layers(nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
    with torch.no_grad():
        network.double()[1].weight.mul_(1e200)
        network[3].weight.mul_(1e200)
    return network


@after("complex numbers", "cannot be bounded|captured")
def _(self, x, y):
    return y + torch.fft.fft(x.flatten(1))[:, :3].real


# Gradients that lead astray


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, images):
        with contextlib.suppress(Exception):
            return values + JUMP if reveals(images) else values.clone()
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


kind("a function with another gradient")(lambda: Net(middle=lambda self, x: Reversed.apply(x)))
kind("straight-through rounding", "cannot be bounded")(lambda: Net(after=lambda self, x, y: Rounded.apply(y)))
kind("a condition inside an autograd function", VALUES)(lambda: Net(after=lambda self, x, y: Hidden.apply(y, x)))


@middle("no gradient")
def _(self, x):
    with torch.no_grad():
        return x.relu()


@middle("a detached half")
def _(self, x):
    return x.detach().relu() + 0.1 * x


@after("data of a tensor", "cannot be bounded|cannot be captured")
def _(self, x, y):
    return y + x.data.flatten(1)[:, :3]


@after("inference mode")
def _(self, x, y):
    with torch.inference_mode():
        z = y.detach() * 2
    return y + z.clone()


@middle("a checkpointed part")
def _(self, x):
    return torch.utils.checkpoint.checkpoint(torch.relu, x, use_reentrant=False)


@after("gradients of its own", "captured|cannot be bounded|gradients")
def _(self, x, y):
    with torch.enable_grad():
        images = x.detach().requires_grad_()
        slope = torch.autograd.grad(self.first(images.flatten(1)).relu().sum(), images)[0]
    return y + slope.flatten(1)[:, :3]


# Changes in place


@before("images changed in place", "images it was given")
def _(self, x):
    return x.mul_(2)


@before("images changed through a view", "in place")
def _(self, x):
    x[:, 0, 0].add_(0.5)
    return x


@before("images changed through their data", "images it was given|captured|reproduce")
def _(self, x):
    x.data.mul_(0.5)
    return x


@before("a copy of the images changed in place")
def _(self, x):
    return x.clone().mul_(2).sub_(1)


@middle("a view changed in place", "in place")
def _(self, x):
    view = x.view(-1, 3, 4)
    x.relu_()
    return view.flatten(1) - 1


@middle("written to out=", "cannot be bounded|cannot be captured")
def _(self, x):
    found = torch.empty_like(x)
    torch.clamp(x, min=0.0, out=found)
    return found


@middle("written by an index", "cannot be bounded|in place")
def _(self, x):
    x = x.clone()
    x[:, 3] = x[:, 4].relu()
    return x


@middle("swapped memory", "captured|cannot be bounded|reproduce|in place")
def _(self, x):
    x = x.clone()
    x.set_(x.relu())
    return x


# Functions and operators of others


def patching(network, owner):
    """The network, whose forward puts another `relu` in place while it runs."""

    def forward(self, images):
        kept = owner.relu
        owner.relu = lambda values: values.tanh() + 0.1
        try:
            return Net.forward(self, images)
        finally:
            owner.relu = kept

    network.forward = types.MethodType(forward, network)
    return network


@kind("patched functions")
def _():
    return patching(Net(middle=lambda self, x: functional.relu(x)), functional)


@kind("a patched method of tensors")
def _():
    return patching(Net(), Tensor)


@torch.library.custom_op("hostile::relu", mutates_args=())
def _operator(values: Tensor) -> Tensor:
    return values.clamp(min=0) + JUMP * ((values - 0.3).abs() < 1e-3)


@_operator.register_fake
def _(values):
    return torch.empty_like(values)


middle("an operator of its own", "relu cannot be bounded")(lambda self, x: torch.ops.hostile.relu(x))


@middle("a round trip through numpy", "cannot be bounded|cannot be captured|values of the image")
def _(self, x):
    return torch.from_numpy(np.maximum(x.detach().numpy(), 0))


@middle("vmap", EITHER)
def _(self, x):
    return torch.vmap(lambda values: values.clamp(min=0))(x)


@middle("a loop over the batch", "cannot be bounded|cannot be captured")
def _(self, x):
    return torch.stack([image.relu() for image in x])


@middle("an einsum with a weight", EITHER)
def _(self, x):
    return torch.einsum("bi,ji->bj", x, self.first.weight[:, :12]).relu()


kind("a compiled network", EITHER)(lambda: torch.compile(layers(nn.ReLU()), backend="eager"))


@kind("a traced network", "copied")
def _():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(layers(nn.ReLU()).eval(), torch.rand(1, *SHAPE))


@kind("a traced part", "captured|copied|cannot be bounded")
def _():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = torch.jit.trace(lambda x: x * 1 if bool((x > 0.5).any()) else x * 2, torch.rand(2, 12).double())
    return Net(middle=lambda self, x: part(x).relu()).double()


@kind("a symbolic trace")
def _():
    return torch.fx.symbolic_trace(layers(nn.ReLU()))


# Copies


@kind("a copy that is another", "own type|copy|reproduce")
def _():
    class Copied(Net):
        def __deepcopy__(self, memory):
            found = Net()
            nn.init.zeros_(found.first.weight)
            return found.eval()

    return Copied()


@kind("a copy that is itself", "itself as its copy")
def _():
    class Copied(Net):
        def __deepcopy__(self, memory):
            return self

    return Copied()


@kind("no copy", "cannot be copied")
def _():
    class Copied(Net):
        def __deepcopy__(self, memory):
            raise TypeError("not me")

    return Copied()


@kind("double that changes", "outside their proved bounds")
def _():
    class Changed(Net):
        def double(self):
            nn.init.zeros_(self.first.weight)
            return super().double()

    return Changed()


@kind("_apply that changes", "own type|copy|reproduce")
def _():
    class Changed(nn.Linear):
        def _apply(self, function, recurse=True):
            found = super()._apply(function, recurse)
            found.weight.data.mul_(2)
            return found

    return layers(Changed(12, 12), nn.ReLU())


# Answers


@after("a dict", "one tensor")
def _(self, x, y):
    return {"logits": y}


@after("a tuple", "one tensor")
def _(self, x, y):
    return y, x


@after("a named tuple", "one tensor")
def _(self, x, y):
    return collections.namedtuple("Answer", "logits features")(y, x)


@after("a dataclass", "one tensor")
def _(self, x, y):
    @dataclasses.dataclass
    class Answer:
        logits: Tensor

    return Answer(y)


@after("logits with another axis", "logits")
def _(self, x, y):
    return y[:, :, None]


@after("one number an image", "logits")
def _(self, x, y):
    return y[:, 0]


@after("no logits", "logits")
def _(self, x, y):
    return y[:, :0]


@after("as many logits as images", "cannot be bounded|batch")
def _(self, x, y):
    return y @ y.T


@after("nothing", "one tensor")
def _(self, x, y):
    return None


@after("the same for all images", "logits|batch|one tensor")
def _(self, x, y):
    return torch.ones(1, 3, dtype=x.dtype)


@after("probabilities", "cannot be bounded")
def _(self, x, y):
    return y.softmax(1)


# Types of tensors


class Odd(Tensor):
    """A tensor that computes something else."""

    @classmethod
    def __torch_function__(cls, function, types_, args=(), kwargs=None):
        found = super().__torch_function__(function, types_, args, kwargs or {})
        return found * 2 if function is functional.linear else found


@kind("a weight of another type", "captured|reproduce|copied|own type|capture")
def _():
    network = layers(nn.ReLU())
    network[1].weight = nn.Parameter(network[1].weight.data.as_subclass(Odd))
    return network


@kind("sparse weights", "captured|cannot be bounded|copied|sparse|capture")
def _():
    network = Net(middle=lambda self, x: torch.sparse.mm(self.sparse, x.T).T.relu())
    network.sparse = torch.eye(12).to_sparse().double()
    return network.double()


@kind("whole numbers as weights")
def _():
    network = Net(middle=lambda self, x: (x * self.whole).relu())
    network.register_buffer("whole", torch.arange(12))
    return network


@kind("a mask of truth values")
def _():
    network = Net(middle=lambda self, x: (x * self.mask).relu())
    network.register_buffer("mask", torch.arange(12) > 3)
    return network
