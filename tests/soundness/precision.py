r"""A graph evaluated in extended precision, with a bound of what rounding did: the referee of every comparison.

Nothing here is computed by the package but the entries of its linear maps, each of which is one of the network's
numbers: a map applied to unit vectors, without a sum. What is summed is summed here, in numpy's long double (64 bits of
mantissa on x86), with a running error: of y = W x + b it is |W| e + n u (|W| |x| + |b|), of an activation its
steepest slope times e and a few ulps.
"""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor

from grood_cert.ball import Norm
from grood_cert.networks.activations import ELU, GELU, Hardswish, LeakyReLU, Sigmoid, SiLU, Softplus, Tanh, TanhGELU
from grood_cert.networks.graph import Graph
from grood_cert.networks.operations import Addition, AveragePool, LinearMap, MaxPool, Separable
from grood_cert.scores import MSP, Energy, MaxLogit, Score

Array = Any
LONG = np.longdouble
UNIT = np.finfo(LONG).eps
_ULPS = 8
_BOTTOMLESS = -1e4000 if np.finfo(LONG).max > 1e4000 else -1e300


def long(values: Tensor | Array) -> Array:
    """As long doubles, without rounding."""
    return np.asarray(values.detach().cpu().numpy() if isinstance(values, Tensor) else values).astype(LONG)


def _sigmoid(z: Array) -> Array:
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1 / (1 + small), small / (1 + small))


def _gelu(z: Array) -> Array:
    with mpmath.workdps(30):
        found = [_mpf(value) for value in z.ravel()]
        return np.array([_back(value * mpmath.ncdf(value)) for value in found], dtype=LONG).reshape(z.shape)


def _gelu_slope(z: Array) -> Array:
    with mpmath.workdps(30):
        found = [_mpf(value) for value in z.ravel()]
        return np.array([_back(mpmath.ncdf(v) + v * mpmath.npdf(v)) for v in found], dtype=LONG).reshape(z.shape)


def _mpf(value: Any) -> Any:
    high = float(value)
    return mpmath.mpf(high) + mpmath.mpf(float(value - LONG(high)))


def _back(value: Any) -> Any:
    high = float(value)
    return LONG(high) + LONG(float(value - mpmath.mpf(high)))


def _bend(z: Array) -> tuple[Array, Array]:
    """v and v' of the tanh GELU, z (1 + tanh v) / 2."""
    factor = np.sqrt(LONG(2) / _PI)
    cubic = LONG(44715) / LONG(10) ** 6
    return factor * (z + cubic * z**3), factor * (1 + 3 * cubic * z**2)


_PI = LONG("3.14159265358979323846264338327950288")


def activated(operation: Any, z: Array) -> Array:
    """sigma(z), of the function that proofs are about."""
    match operation:
        case LeakyReLU():
            return np.where(z > 0, z, LONG(operation.slope) * z)
        case ELU():
            return np.where(z > 0, z, LONG(operation.alpha) * np.expm1(np.minimum(z, 0)))
        case Hardswish():
            return z * np.clip(z + 3, 0, 6) / 6
        case Sigmoid():
            return _sigmoid(z)
        case Tanh():
            return np.tanh(z)
        case Softplus():
            scaled = LONG(operation.beta) * z
            return (np.maximum(scaled, 0) + np.log1p(np.exp(-np.abs(scaled)))) / LONG(operation.beta)
        case GELU():
            return _gelu(z)
        case TanhGELU():
            return z * _sigmoid(2 * _bend(z)[0])
        case SiLU():
            return z * _sigmoid(z)
    raise TypeError(f"no extended precision for {operation}")


def slope(operation: Any, z: Array) -> Array:
    """sigma'(z); one of the two sides at a kink."""
    match operation:
        case LeakyReLU():
            return np.where(z > 0, LONG(1), LONG(operation.slope))
        case ELU():
            return np.where(z > 0, LONG(1), LONG(operation.alpha) * np.exp(np.minimum(z, 0)))
        case Hardswish():
            return np.where(z <= -3, LONG(0), np.where(z >= 3, LONG(1), (2 * z + 3) / 6))
        case Sigmoid():
            return _sigmoid(z) * _sigmoid(-z)
        case Tanh():
            return 4 * _sigmoid(2 * z) * _sigmoid(-2 * z)
        case Softplus():
            return _sigmoid(LONG(operation.beta) * z)
        case GELU():
            return _gelu_slope(z)
        case TanhGELU():
            bend, rise = _bend(z)
            share = _sigmoid(2 * bend)
            return share * (1 + 2 * z * rise * _sigmoid(-2 * bend))
        case SiLU():
            share = _sigmoid(z)
            return share * (1 + z * _sigmoid(-z))
    raise TypeError(f"no extended precision for {operation}")


class Referee:
    """A graph in extended precision.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._maps: dict[int, tuple[Array, Array]] = {}

    def map(self, number: int) -> tuple[Array, Array]:
        """W, shape (outputs, inputs), and b, shape (outputs,), of a linear node."""
        if number not in self._maps:
            node = self.graph.nodes[number]
            operation, source = node.operation, self.graph.nodes[node.inputs[0]]
            assert isinstance(operation, LinearMap)
            units = torch.eye(source.size, dtype=torch.float64).reshape(source.size, *source.shape)
            if isinstance(operation, Separable):
                channels = source.shape[0]
                both = np.kron(long(operation.rows), long(operation.columns))
                matrix = np.kron(np.eye(channels, dtype=LONG), both)
            else:
                matrix = long(operation.linear(units).reshape(len(units), -1)).T
                if isinstance(operation, AveragePool):
                    matrix = (matrix != 0).astype(LONG) / math.prod(operation.kernel)
            bias = np.zeros(node.size, dtype=LONG)
            if operation.bias is not None:
                bias = long(operation.bias.expand(node.shape).flatten())
            self._maps[number] = matrix, bias
        return self._maps[number]

    def windows(self, number: int) -> Array:
        """Of each window of a pool the entries that it reads, -1 for padding; shape (windows, entries)."""
        node = self.graph.nodes[number]
        pool, shape = node.operation, self.graph.nodes[node.inputs[0]].shape
        assert isinstance(pool, MaxPool)
        places = torch.arange(math.prod(shape), dtype=torch.float64).reshape(1, *shape)
        found = pool.windows(places, -1.0)[0]  # (C, entries, windows)
        return found.permute(0, 2, 1).flatten(0, 1).long().numpy()

    def values(self, points: Tensor) -> list[tuple[Array, Array]]:
        """Every node's value and the bound of its error, shape (N, size) each, at points of shape (N, C, H, W)."""
        start = long(points.flatten(1))
        found = [(start, np.zeros_like(start))]
        for number, node in enumerate(self.graph.nodes[1:], 1):
            operation, (value, error) = node.operation, found[node.inputs[0]]
            if isinstance(operation, LinearMap):
                matrix, bias = self.map(number)
                summed = np.abs(value) @ np.abs(matrix).T + np.abs(bias)
                count = matrix.shape[1] + 2
                found.append(
                    (value @ matrix.T + bias, (error @ np.abs(matrix).T + count * UNIT * summed) * (1 + count * UNIT))
                )
            elif isinstance(operation, Addition):
                other, more = found[node.inputs[1]]
                found.append((value + other, error + more + UNIT * np.abs(value + other)))
            elif isinstance(operation, MaxPool):
                entries = self.windows(number)
                wide = np.concatenate([value, np.full_like(value[:, :1], _BOTTOMLESS)], 1)[:, entries]
                wrong = np.concatenate([error, np.zeros_like(error[:, :1])], 1)[:, entries]
                found.append((wide.max(2), wrong.max(2)))
            else:
                assert operation is not None
                result = activated(operation, value)
                steep = LONG(operation.steepest)
                found.append((result, steep * error + _ULPS * UNIT * (np.abs(result) + np.abs(value) * steep)))
        return found

    def score(self, points: Tensor, score: Score) -> tuple[Array, Array]:
        """S and the bound of its error, shape (N,) each."""
        logits, error = self.values(points)[-1]
        heat = getattr(score, "temperature", 1.0) * (1 + math.log(logits.shape[1]))
        return score_of(logits, score), error.max(1) + _ULPS * UNIT * (np.abs(logits).max(1) + heat)

    def gradient_norm(self, points: Tensor, score: Score, norm: Norm) -> tuple[Array, Array]:
        """Dual norm of the gradient of S, shape (N,), and about the size of its error."""
        nodes = self.graph.nodes
        found = self.values(points)
        weights = weights_of(found[-1][0], score)
        gradients: dict[int, tuple[Array, Array]] = {len(nodes) - 1: (weights, np.abs(weights))}

        def add(number: int, part: Array, size: Array) -> None:
            old = gradients.get(number, (0, 0))
            gradients[number] = old[0] + part, old[1] + size

        for number in range(len(nodes) - 1, 0, -1):
            if number not in gradients:
                continue
            part, size = gradients.pop(number)
            node = nodes[number]
            operation, origin = node.operation, node.inputs[0]
            if isinstance(operation, LinearMap):
                matrix, _ = self.map(number)
                add(origin, part @ matrix, size @ np.abs(matrix))
            elif isinstance(operation, Addition):
                for origin in node.inputs:
                    add(origin, part, size)
            elif isinstance(operation, MaxPool):
                entries, value = self.windows(number), found[origin][0]
                wide = np.concatenate([value, np.full_like(value[:, :1], _BOTTOMLESS)], 1)
                best = np.take_along_axis(entries[None], wide[:, entries].argmax(2)[..., None], 2)[..., 0]
                back, large = np.zeros_like(value), np.zeros_like(value)
                for row in range(len(value)):
                    np.add.at(back[row], best[row], part[row])
                    np.add.at(large[row], best[row], size[row])
                add(origin, back, large)
            else:
                rate = slope(operation, found[origin][0])
                add(origin, part * rate, size * np.maximum(np.abs(rate), 1e-18))
        part, size = gradients.get(0, (np.zeros_like(found[0][0]), np.zeros_like(found[0][0])))
        order = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
        return np.linalg.norm(part, ord=order, axis=1), 64 * len(nodes) * UNIT * np.linalg.norm(size, ord=order, axis=1)


def score_of(logits: Array, score: Score) -> Array:
    """S of logits, shape (N, K) to (N,), in their own precision."""
    largest = logits.max(-1)
    match score:
        case Energy():
            scaled = (logits - largest[..., None]) / logits.dtype.type(score.temperature)
            return -(largest + logits.dtype.type(score.temperature) * np.log(np.exp(scaled).sum(-1)))
        case MaxLogit():
            return -largest
        case MSP():
            scaled = (logits - largest[..., None]) / logits.dtype.type(score.temperature)
            return -1 / np.exp(scaled).sum(-1)
    raise TypeError(f"no formula for {score}")


def weights_of(logits: Array, score: Score) -> Array:
    """The gradient of S in the logits, shape (N, K)."""
    rows = np.arange(len(logits))
    top = np.zeros_like(logits)
    top[rows, logits.argmax(1)] = 1
    if isinstance(score, MaxLogit):
        return -top
    assert isinstance(score, Energy | MSP)
    scaled = np.exp((logits - logits.max(1, keepdims=True)) / LONG(score.temperature))
    share = scaled / scaled.sum(1, keepdims=True)
    if isinstance(score, Energy):
        return -share
    largest = share[rows, logits.argmax(1)][:, None]
    others = np.where(top > 0, 0, share).sum(1, keepdims=True)  # 1 - largest, without cancellation
    return -largest * np.where(top > 0, others, -share) / LONG(score.temperature)


def distance(points: Tensor, center: Tensor, norm: Norm) -> Array:
    """||x' - x||_p of points of shape (..., C, H, W), shape (...)."""
    apart = np.abs(long(points) - long(center))
    apart = apart.reshape(*apart.shape[:-3], -1)
    if norm == "linf":
        return apart.max(-1)
    return apart.sum(-1) if norm == "l1" else np.sqrt((apart**2).sum(-1))
