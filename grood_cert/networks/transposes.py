"""W^T y of the linear maps of a network, for many y, as a product with a dense matrix where that is the quicker way."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from grood_cert.networks.operations import AveragePool, Convolution, LinearMap

_RATIO = 8
_FREE = 2**14
_LARGEST = 2**22
_ROWS = 8  # a matrix is made of as many rows as the layer has outputs


class Transposes:
    """Products with transposes of the nodes of one graph.

    A matrix product runs about ten times as many multiplications a second as a transposed convolution, which has a
    cost for each row besides. Matrices are kept for the next call; weights in training, which change, have none.

    Example:
        >>> layer = Convolution(torch.ones(1, 1, 2, 2), None, (1, 1), (0, 0), (1, 1), 1, (2, 2))
        >>> Transposes()(1, layer, torch.full((1, 1, 1, 1), 3.0))
        tensor([[[[3., 3.],
                  [3., 3.]]]])
    """

    def __init__(self) -> None:
        self._matrices: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, number: int, operation: LinearMap, rows: Tensor) -> Tensor:
        """The product for node `number`, whose operation may be cut to a window; rows of shape (N, *output_shape)."""
        if not isinstance(operation, Convolution | AveragePool):
            return operation.transpose(rows)
        shape = tuple(rows.shape[1:])
        outputs = math.prod(shape)
        if isinstance(operation, Convolution):
            if operation.weight.requires_grad:
                return _direct(operation, rows)
            channels, reads = operation.weight.shape[1] * operation.groups, operation.weight[0].numel()
        else:
            channels, reads = shape[0], math.prod(operation.kernel)
        inputs = channels * math.prod(operation.input_size)
        dear = outputs * inputs > min(_RATIO * outputs * reads + _FREE, _LARGEST)
        if dear or _ROWS * len(rows) < outputs:
            return _direct(operation, rows)
        key = (number, *shape, *operation.input_size, *operation.padding)
        if key not in self._matrices:
            units = torch.eye(outputs, dtype=rows.dtype, device=rows.device)
            self._matrices[key] = _direct(operation, units.reshape(outputs, *shape)).reshape(outputs, inputs)
        return (rows.reshape(-1, outputs) @ self._matrices[key]).reshape(-1, channels, *operation.input_size)


def _direct(operation: Convolution | AveragePool, rows: Tensor) -> Tensor:
    """W^T y; in float64 by torch's derivative, which is up to four times as quick as its transposed convolution."""
    if not isinstance(operation, Convolution) or rows.dtype != torch.float64:
        return operation.transpose(rows)
    shape = len(rows), operation.weight.shape[1] * operation.groups, *operation.input_size
    kind = operation.stride, operation.padding, operation.dilation, operation.groups
    found: Tensor = conv2d_input(shape, operation.weight, rows, *kind)
    return found
