"""Operations against torch's own, their transposes against inner products, their absolute values against matrices."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from grood_cert.networks.graph import Graph, Node
from grood_cert.networks.operations import (
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

DOUBLE = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def matrix_of(function, size):
    """The matrix of a linear function of vectors, by unit vectors."""
    return function(torch.eye(size, dtype=DOUBLE)).T


def separable(function, height, width, bias=None):
    """A map that treats rows and columns apart, from what it does to images that are constant in the other."""
    rows = function(torch.eye(height, dtype=DOUBLE).reshape(height, 1, height, 1).expand(-1, -1, -1, width))
    columns = function(torch.eye(width, dtype=DOUBLE).reshape(width, 1, 1, width).expand(-1, -1, height, -1))
    return Separable(rows[:, 0, :, 0].T, columns[:, 0, 0].T, bias)


def resized(mode, **options):
    return lambda images: functional.interpolate(images, mode=mode, **options)


def average_pool(*options, **named):
    return lambda images: functional.avg_pool2d(images, *options, **named)


PLAIN_POOL = separable(average_pool((3, 2)), 6, 5)

# name: (operation, the same by torch, shape of what it reads)
LINEAR = {
    "dense": (Dense(random(3, 5), random(3)), lambda x: functional.linear(x, random(3, 5), random(3)), (5,)),
    "convolution": (
        Convolution(random(4, 1, 3, 2), random(4, 1, 1), (2, 1), (1, 2), (1, 2), 2, (6, 5)),
        lambda x: functional.conv2d(x, random(4, 1, 3, 2), random(4), (2, 1), (1, 2), (1, 2), 2),
        (2, 6, 5),
    ),
    "scale": (Scale(random(2, 1, 1), random(1, 3, 4)), lambda x: x * random(2, 1, 1) + random(1, 3, 4), (2, 3, 4)),
    "average pool": (
        AveragePool((3, 2), (2, 1), (1, 0), (6, 5), random(2, 1, 1)),
        lambda x: functional.avg_pool2d(x, (3, 2), (2, 1), (1, 0)) + random(2, 1, 1),
        (2, 6, 5),
    ),
    "reshape": (Reshape((2, 3, 4), (6, 4)), lambda x: x.reshape(-1, 6, 4), (2, 3, 4)),
    "pad": (
        Pad(((1, 2), (0, 1), (3, 0)), random(5, 1, 1)),
        lambda x: functional.pad(x, (3, 0, 0, 1, 1, 2)) + random(5, 1, 1),
        (2, 3, 4),
    ),
    "slice": (
        Pad(((1, 0), (0, -1), (-1, -2))),
        lambda x: functional.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :2, 1:3],
        (2, 3, 5),
    ),
    "slice and pad": (Pad(((-1, 4),)), lambda x: torch.cat([x[:, 1:], torch.zeros(len(x), 4)], 1), (5,)),
    "permute": (Permute((2, 0, 1), random(4, 1, 1)), lambda x: x.permute(0, 3, 1, 2) + random(4, 1, 1), (2, 3, 4)),
    "flip": (Selection(2, torch.tensor([3, 2, 1, 0]), 4), lambda x: x.flip(3), (2, 3, 4)),
    "strided slice": (
        Selection(1, torch.tensor([1, 3, 5]), 6, random(2, 1, 1)),
        lambda x: x[:, :, 1::2] + random(2, 1, 1),
        (2, 6, 3),
    ),
    "repeat": (Selection(0, torch.tensor([0, 1, 0, 1, 0, 1]), 2), lambda x: x.repeat(1, 3, 1, 1), (2, 3, 4)),
    "channel shuffle": (Selection(0, torch.tensor([0, 3, 1, 4, 2, 5]), 6), nn.ChannelShuffle(2), (6, 2, 2)),
    "adaptive average pool": (separable(nn.AdaptiveAvgPool2d((3, 4)), 7, 5), nn.AdaptiveAvgPool2d((3, 4)), (2, 7, 5)),
    "average pool, ceil mode": (
        separable(average_pool(3, 2, 1, True, False), 6, 5, random(2, 1, 1)),
        lambda x: functional.avg_pool2d(x, 3, 2, 1, True, False) + random(2, 1, 1),
        (2, 6, 5),
    ),
    "average pool, divisor": (
        replace(PLAIN_POOL, rows=PLAIN_POOL.rows * 6 / 7),
        average_pool((3, 2), divisor_override=7),
        (2, 6, 5),
    ),
    "nearest": (separable(resized("nearest", size=(7, 3)), 4, 5), resized("nearest", size=(7, 3)), (2, 4, 5)),
    "bilinear": (
        separable(resized("bilinear", scale_factor=2), 4, 3),
        resized("bilinear", scale_factor=2),
        (2, 4, 3),
    ),
    "bilinear, corners": (
        separable(resized("bilinear", size=(7, 5), align_corners=True), 4, 3),
        resized("bilinear", size=(7, 5), align_corners=True),
        (2, 4, 3),
    ),
    **{
        mode: (
            separable(lambda x, mode=mode: functional.pad(x, (1, 2, 2, 0), mode), 4, 3),
            lambda x, mode=mode: functional.pad(x, (1, 2, 2, 0), mode),
            (2, 4, 3),
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "transposed convolution": (
        Transposed(Convolution(random(4, 2, 3, 2), None, (2, 3), (1, 0), (1, 2), 2, (8, 14)), random(4, 1, 1)),
        lambda x: functional.conv_transpose2d(x, random(4, 2, 3, 2), random(4), (2, 3), (1, 0), (1, 2), 2, (1, 2)),
        (4, 4, 4),
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_maps_are_torch_s_and_know_their_transpose_and_absolute_value(name):
    operation, function, shape = LINEAR[name]
    values = random(3, *shape, seed=1)
    found = operation(values)
    torch.testing.assert_close(found, function(values), rtol=1e-12, atol=1e-12)
    size, output = math.prod(shape), tuple(found.shape[1:])
    matrix = matrix_of(lambda x: operation.linear(x.reshape(-1, *shape)).flatten(1), size)
    transposed = matrix_of(lambda y: operation.transpose(y.reshape(-1, *output)).flatten(1), math.prod(output))
    torch.testing.assert_close(transposed, matrix.T, rtol=1e-12, atol=1e-12)
    single = Graph((Node(None, (), shape, "image"), Node(operation, (0,), output, name))).single.nodes[1].operation
    units = torch.eye(math.prod(output)).reshape(-1, *output)
    torch.testing.assert_close(single.transpose(units).flatten(1), matrix.float(), rtol=1e-5, atol=1e-5)
    other = random(3, *output, seed=2)
    torch.testing.assert_close(
        (other * operation.linear(values)).sum(), (operation.transpose(other) * values).sum(), rtol=1e-10, atol=1e-10
    )
    absolute = operation.absolute()
    again = matrix_of(lambda x: absolute.linear(x.reshape(-1, *shape)).flatten(1), size)
    torch.testing.assert_close(again, matrix.abs(), rtol=1e-12, atol=1e-12)
    zero = torch.zeros_like(values)
    torch.testing.assert_close(absolute(zero), (function(zero)).abs(), rtol=1e-12, atol=1e-12)


POOLS = {  # torch's own, and the padding that says the same
    "plain": (nn.MaxPool2d(2), ((0, 0), (0, 0))),
    "overlapping": (nn.MaxPool2d(3, 2, 1), ((1, 1), (1, 1))),
    "dilated": (nn.MaxPool2d((3, 2), (2, 1), dilation=(2, 3)), ((0, 0), (0, 0))),
    "ceil mode": (nn.MaxPool2d(3, 2, ceil_mode=True), ((0, 1), (0, 0))),
    "ceil mode, padded": (nn.MaxPool2d((2, 3), (3, 2), (1, 1), ceil_mode=True), ((1, 1), (1, 1))),
}


def pool_of(name):
    layer, padding = POOLS[name]

    def pair(value):
        return (value, value) if isinstance(value, int) else tuple(value)

    return layer, MaxPool(pair(layer.kernel_size), pair(layer.stride), padding, pair(layer.dilation), (8, 7))


@pytest.mark.parametrize("name", POOLS)
def test_maximum_pools_are_torch_s(name):
    layer, pool = pool_of(name)
    values = -random(3, 2, 8, 7).abs()  # below the zeros that padding must not become
    torch.testing.assert_close(pool(values), layer(values), rtol=0.0, atol=0.0)
    windows = pool.windows(values, -math.inf)
    torch.testing.assert_close(windows.amax(2).reshape(pool(values).shape), layer(values), rtol=0.0, atol=0.0)
    entries = random(*windows.shape, seed=1)
    torch.testing.assert_close((entries * pool.windows(values, 0.0)).sum(), (pool.spread(entries) * values).sum())
    counts = pool.spread(torch.ones_like(entries))
    assert float(counts.max()) <= pool.overlap <= float(counts.max()) + 2


def test_asymmetric_padding_never_wins():
    pool = MaxPool((2, 2), (2, 2), ((3, 0), (0, 3)), (1, 1), (3, 3))
    values = -1 - random(1, 1, 3, 3).abs()
    padded = functional.pad(values, (0, 3, 3, 0), value=-1e300)
    expected = functional.max_pool2d(padded, 2, 2)
    real = expected > -1e299
    torch.testing.assert_close(pool(values)[real], expected[real], rtol=0.0, atol=0.0)
    assert bool(torch.isneginf(pool(values)[~real]).all()) and bool((~real).any())


@pytest.mark.parametrize("name", POOLS)
def test_every_sampled_winner_is_a_candidate(name):
    _, pool = pool_of(name)
    lower = random(20, 2, 8, 7)
    upper = lower + random(20, 2, 8, 7, seed=1).square()
    alone, possible = pool.routing(lower, upper)
    best, decided = pool.leaders(lower, upper)
    for turn in range(100):
        share = torch.rand(lower.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(turn))
        entries = pool.windows(lower + share.round() * (upper - lower), -math.inf)
        won = torch.zeros_like(possible).scatter(2, entries.argmax(2, keepdim=True), 1.0)
        assert bool((won <= possible).all()) and bool((won >= alone).all())
        assert bool((won * best).sum(2)[decided].all())
