"""Small networks built by hand from nodes: one for each operation, with nonlinear layers on both sides of it."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from grood_cert.networks.activations import ELU, GELU, Hardswish, LeakyReLU, Sigmoid, SiLU, Softplus, Tanh, TanhGELU
from grood_cert.networks.graph import Graph, Node
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

SHAPE = (2, 5, 4)
CLASSES = 3


class Builder:
    """Nodes in execution order, with random weights."""

    def __init__(self, seed=0):
        self.nodes = [Node(None, (), SHAPE, "image")]
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape):
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def add(self, operation, *inputs):
        """A node that reads the given ones, or the last one; its number."""
        inputs = inputs or (len(self.nodes) - 1,)
        shape = self.nodes[inputs[0]].shape
        if not isinstance(operation, Addition):
            shape = tuple(operation(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
        self.nodes.append(Node(operation, inputs, shape, f"{len(self.nodes)}"))
        return len(self.nodes) - 1

    @property
    def shape(self):
        return self.nodes[-1].shape

    def convolution(self, channels, kernel=3, padding=1, origin=None):
        read = len(self.nodes) - 1 if origin is None else origin
        inputs, *size = self.nodes[read].shape
        weight = self.random(channels, inputs, kernel, kernel) * (1.5 / (inputs * kernel**2)) ** 0.5
        bias = 0.2 * self.random(channels, 1, 1)
        return self.add(Convolution(weight, bias, (1, 1), (padding,) * 2, (1, 1), 1, tuple(size)), read)

    def graph(self):
        """With a head."""
        size = math.prod(self.shape)
        if len(self.shape) > 1:
            self.add(Reshape(self.shape, (size,)))
        self.add(Dense(self.random(6, size) / size**0.5, 0.1 * self.random(6)))
        self.add(LeakyReLU())
        self.add(Dense(self.random(CLASSES, 6) / 2, 0.1 * self.random(CLASSES)))
        return Graph(tuple(self.nodes))


def _resampling(height, width, function):
    rows = function(torch.eye(height, dtype=torch.float64).reshape(height, 1, height, 1).expand(-1, -1, -1, width))
    columns = function(torch.eye(width, dtype=torch.float64).reshape(width, 1, 1, width).expand(-1, -1, height, -1))
    return rows[:, 0, :, 0].T, columns[:, 0, 0].T


def _upsampled(images):
    return functional.interpolate(images, scale_factor=2, mode="bilinear")


OPERATIONS = {  # of values of shape (4, 5, 4)
    "pad": lambda b: Pad(((0, 0), (1, 0), (2, 1)), 0.1 * b.random(4, 1, 1)),
    "pad and cut": lambda b: Pad(((1, -1), (-1, 2), (0, -1))),
    "permute": lambda b: Permute((1, 2, 0), 0.1 * b.random(5, 1, 1)),
    "selection": lambda b: Selection(0, torch.tensor([3, 3, 0, 1, 2]), 4, 0.1 * b.random(5, 1, 1)),
    "flip": lambda b: Selection(2, torch.tensor([3, 2, 1, 0]), 4),
    "upsampling": lambda b: Separable(*_resampling(5, 4, _upsampled), 0.1 * b.random(4, 1, 1)),
    "adaptive pool": lambda b: Separable(*_resampling(5, 4, nn.AdaptiveAvgPool2d((3, 3)))),
    "transposed": lambda b: Transposed(
        Convolution(b.random(4, 2, 3, 2) / 3, None, (2, 1), (1, 0), (1, 2), 2, (10, 6)), 0.1 * b.random(4, 1, 1)
    ),
    "average pool": lambda b: AveragePool((2, 2), (1, 2), (1, 1), (5, 4)),
    "scale": lambda b: Scale(b.random(4, 1, 1), b.random(1, 5, 4)),
    "scale of pixels": lambda b: Scale(b.random(1, 5, 4), None),
    "scale of columns": lambda b: Scale(b.random(4), None),  # as many columns as channels
    "dilated max pool": lambda b: MaxPool((2, 2), (1, 1), ((0, 0), (0, 0)), (2, 1), (5, 4)),
    "max pool in ceil mode": lambda b: MaxPool((2, 3), (2, 2), ((0, 1), (1, 2)), (1, 1), (5, 4)),
}
ACTIVATIONS = {
    "sigmoid": Sigmoid(),
    "tanh": Tanh(),
    "softplus": Softplus(),
    "gelu": GELU(),
    "tanh gelu": TanhGELU(),
    "silu": SiLU(),
    "hardswish": Hardswish(),
    "elu": ELU(),
    "steep elu": ELU(1.7),
    "leaky": LeakyReLU(0.2),
}
NAMES = (*OPERATIONS, *ACTIVATIONS, "dense block", "inception", "one number an image")


def _concatenated(builder, first, second):
    """The channels of two nodes one after another."""
    one, two = builder.nodes[first].shape[0], builder.nodes[second].shape[0]
    left = builder.add(Pad(((0, two), (0, 0), (0, 0))), first)
    right = builder.add(Pad(((one, 0), (0, 0), (0, 0))), second)
    return builder.add(Addition(), left, right)


def build(name: str, seed: int = 0) -> Graph:
    """A network with the operation (or activation) of that name, behind a ReLU and before a convolution."""
    builder = Builder(seed)
    builder.convolution(4)
    if name in ACTIVATIONS:
        builder.add(ACTIVATIONS[name])
        builder.convolution(4)
        builder.add(ACTIVATIONS[name])
        return builder.graph()
    start = builder.add(LeakyReLU())
    if name == "dense block":
        for _ in range(2):
            builder.add(Scale(builder.random(builder.shape[0], 1, 1), builder.random(builder.shape[0], 1, 1)), start)
            builder.add(LeakyReLU())
            start = _concatenated(builder, start, builder.convolution(2))
    elif name == "one number an image":
        shape, size = builder.shape, math.prod(builder.shape)
        builder.add(Reshape(shape, (size,)))
        builder.add(Dense(builder.random(1, size) / size**0.5, None))
        builder.add(Reshape((1,), ()))
        builder.add(Scale(torch.tensor(2.0).double(), torch.tensor(0.3).double()))
        builder.add(Reshape((), (1, 1, 1)))
    elif name == "inception":
        wide, narrow = builder.convolution(3, origin=start), builder.convolution(2, 1, 0, origin=start)
        _concatenated(builder, wide, narrow)
    else:
        builder.add(OPERATIONS[name](builder))
    builder.convolution(3, 2, 1)
    builder.add(LeakyReLU())
    return builder.graph()
