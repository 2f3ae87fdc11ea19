"""Products with matrices are those of the operations, and follow weights that change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from grood_cert.networks.operations import AveragePool, Convolution, Dense
from grood_cert.networks.transposes import Transposes


def convolution(stride: int, groups: int = 1) -> Convolution:
    weight = torch.randn(4, 4 // groups, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Convolution(weight, None, (stride, stride), (1, 1), (1, 1), groups, (6, 6))


LAYERS = {
    "convolution": convolution(1),
    "stride": convolution(2),
    "groups": convolution(2, 2),
    "window": replace(convolution(1), padding=(0, 0)),
    "average pool": AveragePool((2, 2), (2, 2), (0, 0), (6, 6)),
    "dense": Dense(torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), None),
}


@pytest.mark.parametrize("count", [1, 200])  # too few for a matrix, and enough
@pytest.mark.parametrize("name", LAYERS)
def test_a_product_is_the_adjoint_of_the_layer(name, count):
    layer, transposes, generator = LAYERS[name], Transposes(), torch.Generator().manual_seed(1)
    values = torch.randn(count, *((4,) if name == "dense" else (4, 6, 6)), dtype=torch.float64, generator=generator)
    found = layer.linear(values)
    rows = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    expected = (found * rows).flatten(1).sum(1)
    for _ in range(2):  # made, and kept
        back = transposes(1, layer, rows)
        torch.testing.assert_close((back * values).flatten(1).sum(1), expected, rtol=1e-10, atol=1e-10)


def test_nodes_and_windows_do_not_share_matrices():
    """Two layers of one shape, and one layer cut to two windows of one size."""
    transposes, generator = Transposes(), torch.Generator().manual_seed(2)
    first = convolution(1)
    second, window = replace(first, weight=2 * first.weight), replace(first, padding=(0, 0), input_size=(8, 8))
    rows = torch.randn(200, 4, 6, 6, dtype=torch.float64, generator=generator)
    for number, layer in ((1, first), (2, second), (1, window)):
        torch.testing.assert_close(transposes(number, layer, rows), layer.transpose(rows), rtol=1e-10, atol=1e-10)


def test_weights_in_training_are_read_anew():
    """A kept matrix would be that of the step before."""
    weight = convolution(1).weight.clone().requires_grad_(True)
    layer, transposes = replace(convolution(1), weight=weight), Transposes()
    rows = torch.randn(200, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before = transposes(1, layer, rows)
    (slope,) = torch.autograd.grad(before.sum(), weight)
    assert bool((slope != 0).all())
    with torch.no_grad():
        weight.mul_(2)
    torch.testing.assert_close(transposes(1, layer, rows), 2 * before.detach(), rtol=1e-10, atol=1e-10)
