r"""Where the extremes of a score over a ball are known: points that attain them, and what they are.

* *closed form*: one linear logit over any ball: -(w . x + b), by the support function of the ball and the box.
* *line*: piecewise linear networks of one pixel. All kinks of the network along the interval are found one layer after
  the other, and all places where logits cross; between them logits are linear.
* *arrangement*: one hidden layer of at most 10 (leaky) ReLUs and at most 4 pixels. The kinks are hyperplanes; with the
  walls of the ball they cut it into cells on which f is linear. The largest value of a convex function of f is at a
  vertex; the smallest is found cell by cell as a convex problem, cells that linear bounds rule out left aside.
* *MILP*: piecewise linear networks of at most 30 units, l_inf or l_1: one logit or a row, and max-logit, by HiGHS.

Each answers points; a point is proof of nothing but its own score, so nothing here can blame a bound wrongly. The value
beside it is only for counting how near bounds come.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp, minimize
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.networks.activations import Activation, LeakyReLU
from grood_cert.networks.graph import Graph
from grood_cert.networks.operations import Addition, LinearMap, MaxPool
from grood_cert.scores import MSP, Energy, MaxLogit, Score
from tests.soundness.precision import Referee, score_of

Array = Any
_HIDDEN = 10
_PIXELS = {"linf": 4, "l1": 3, "l2": 2}
_UNITS = 30
_STEPS = 60
_LEAST = 1e-4  # radius below which a solver's tolerances drown the ball


@dataclass(frozen=True)
class Truth:
    """Extremes of a score over the balls of a batch.

    Attributes:
        oracle: What found them.
        points: Where, shape (P, B, C, H, W); not yet pulled into the balls.
        smallest: Smallest score, shape (B,); NaN where it is not known.
        largest: Largest.
    """

    oracle: str
    points: Tensor
    smallest: Tensor
    largest: Tensor


def is_linear(graph: Graph) -> bool:
    """Whether the logits are linear in the image."""
    return not graph.nonlinear


def is_piecewise_linear(graph: Graph) -> bool:
    """Whether all kinks are ReLUs, leaks and maxima."""
    return all(isinstance(graph.nodes[i].operation, LeakyReLU | MaxPool) for i in graph.nonlinear)


def truths(graph: Graph, ball: Ball, score: Score, milps: bool) -> list[Truth]:
    """What is known exactly of a score of this network over these balls."""
    found = []
    if is_linear(graph) and graph.classes == 1 and not isinstance(score, MSP):
        found.append(_closed_form(graph, ball))
    if math.prod(graph.shape) == 1 and is_piecewise_linear(graph):
        found.append(_each(graph, ball, lambda g, b: _line(g, b, score), "line"))
    if _one_layer(graph) and math.prod(graph.shape) <= _PIXELS[ball.norm]:
        found.append(_each(graph, ball, lambda g, b: _arrangement(g, b, score), "arrangement"))
    if milps and isinstance(score, MaxLogit) and ball.norm != "l2" and is_piecewise_linear(graph) and _few(graph):
        found.append(_each(graph, ball, _milp, "MILP"))
    return [truth for truth in found if truth is not None]


Single = Callable[[Graph, Ball], tuple[list[Array], float, float] | None]


def _each(graph: Graph, ball: Ball, solve: Single, oracle: str) -> Truth | None:
    """Ball by ball; as many points for each, repeated where there are fewer."""
    points, smallest, largest = [], [], []
    for i in range(len(ball.center)):
        one = Ball(ball.center[i : i + 1], ball.eps[i : i + 1], ball.norm)
        found = solve(graph, one)
        some, low, high = ([ball.center[i].flatten().numpy()], math.nan, math.nan) if found is None else found
        points.append(np.stack(some))
        smallest.append(low)
        largest.append(high)
    if all(math.isnan(value) for value in (*smallest, *largest)):
        return None
    most = max(map(len, points))
    padded = np.stack([np.resize(part, (most, part.shape[1])) for part in points], 1)
    shaped = torch.from_numpy(padded).double().reshape(most, *ball.center.shape)
    ends = (torch.tensor(values, dtype=torch.float64) for values in (smallest, largest))
    return Truth(oracle, shaped, *ends)


# Linear


def _closed_form(graph: Graph, ball: Ball) -> Truth:
    with torch.no_grad():
        zero = graph(torch.zeros(1, *graph.shape, dtype=torch.float64))
        size = math.prod(graph.shape)
        unit = torch.eye(size, dtype=torch.float64).reshape(size, *graph.shape)
        row = (graph(unit) - zero).squeeze(1)
    points = torch.stack([_support_point(ball, sign * row) for sign in (-1.0, 1.0)])
    with torch.no_grad():
        values = -graph(points.flatten(0, 1)).reshape(2, -1)
    return Truth("closed form", points, values[1], values[0])


def _support_point(ball: Ball, row: Tensor) -> Tensor:
    """Where row . x is largest, shape (B, C, H, W)."""
    center = ball.center.flatten(1)
    low, high = -torch.minimum(center, ball.eps[:, None]), torch.minimum(1 - center, ball.eps[:, None])
    wall = torch.where(row > 0, high, low)
    if ball.norm == "linf":
        step = wall
    elif ball.norm == "l1":
        step = torch.zeros_like(center)
        left = ball.eps.clone()
        for pixel in row.abs().argsort(descending=True):
            move = torch.minimum(wall[:, pixel].abs(), left)
            step[:, pixel] = move * wall[:, pixel].sign()
            left = left - move
    else:
        step = torch.zeros_like(center)
        for i in range(len(center)):  # d = clip(t row) for the t with ||d|| = eps: bisection in log t
            small, large = -80.0, 80.0
            for _ in range(200):
                middle = (small + large) / 2
                trial = torch.maximum(torch.minimum(math.exp(middle) * row, high[i]), low[i])
                small, large = (middle, large) if trial.norm() <= ball.eps[i] else (small, middle)
            step[i] = torch.maximum(torch.minimum(math.exp(small) * row, high[i]), low[i])
    return ball.center + step.reshape(ball.center.shape)


# One pixel


def _line(graph: Graph, ball: Ball, score: Score) -> tuple[list[Array], float, float] | None:
    low, high = float(ball.lower), float(ball.upper)
    if not low < high:
        return None
    referee = Referee(graph)

    def values(places: Array) -> list[Array]:
        points = torch.from_numpy(np.asarray(places, dtype=np.float64)).reshape(-1, *graph.shape)
        return [value for value, _ in referee.values(points)]

    places = np.array([low, high])
    for number in graph.nonlinear:
        node = graph.nodes[number]
        value = values(places)[node.inputs[0]]
        if isinstance(node.operation, MaxPool):
            windows = referee.windows(number)
            pairs = {
                tuple(sorted(pair))
                for window in windows
                for pair in itertools.combinations(sorted({int(i) for i in window if i >= 0}), 2)
            }
            if len(pairs) > 2000:
                return None
            value = np.stack([value[:, i] - value[:, j] for i, j in sorted(pairs)], 1) if pairs else value[:, :0]
        places = _with_roots(places, value)
        if len(places) > 3000:
            return None
    logits = values(places)[-1]
    if logits.shape[1] <= 12:
        pairs_of = itertools.combinations(range(logits.shape[1]), 2)
        crossing = [logits[:, i] - logits[:, j] for i, j in pairs_of]
        places = _with_roots(places, np.stack(crossing, 1)) if crossing else places
    logits = values(places)[-1].astype(np.float64)
    inner = places
    if not isinstance(score, MaxLogit) and logits.shape[1] > 1:
        # convex along each piece: LSE(f), or for MSP every Q_k: golden sections, all pieces and classes at once
        shares = _golden(logits[:-1], logits[1:], score)
        inner = np.concatenate([places, (places[:-1, None] + shares * np.diff(places)[:, None]).ravel()])
    found = score_of(values(inner)[-1], score)
    best = [found.argmin(), found.argmax()]
    near = [inner[i] + shift for i in best for shift in (0.0, 1e-15, -1e-15)]
    points = [np.array([place]) for place in np.clip(near, low, high)]
    return points, float(found.min()), float(found.max())


def _with_roots(places: Array, value: Array) -> Array:
    """Places with those between neighbours at which some column of values is 0."""
    first, last = value[:-1], value[1:]
    change = (first * last) < 0
    share = np.where(change, first / np.where(change, first - last, 1), 0)
    row, column = change.nonzero()
    roots = places[row] + share[row, column].astype(np.float64) * np.diff(places)[row]
    return np.unique(np.concatenate([places, roots]))


def _golden(first: Array, last: Array, score: Score) -> Array:
    """Where on each piece from `first` to `last` the convex functions are smallest, as shares, shape (pieces, R)."""
    classes = first.shape[1]

    def heights(share: Array) -> Array:
        logits = first[:, None] + share[..., None] * (last - first)[:, None]
        if isinstance(score, MSP):
            scaled = logits / score.temperature
            own = np.einsum("prr->pr", scaled)
            return np.logaddexp.reduce(scaled, axis=2) - own
        assert isinstance(score, Energy)
        return np.logaddexp.reduce(logits / score.temperature, axis=2)

    shape = len(first), classes if isinstance(score, MSP) else 1
    low, high, ratio = np.zeros(shape), np.ones(shape), (math.sqrt(5) - 1) / 2
    for _ in range(_STEPS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        lower = heights(left) < heights(right)
        low, high = np.where(lower, low, left), np.where(lower, right, high)
    return (low + high) / 2


# One hidden layer


def _one_layer(graph: Graph) -> bool:
    """One layer of few (leaky) ReLUs over what is linear in the image."""
    if not graph.nonlinear or not all(isinstance(graph.nodes[i].operation, LeakyReLU) for i in graph.nonlinear):
        return False
    bent: set[int] = set()
    for number, node in enumerate(graph.nodes):
        if number in graph.nonlinear:
            if node.inputs[0] in bent:
                return False
            bent.add(number)
        elif bent.intersection(node.inputs):
            bent.add(number)
    return sum(graph.nodes[i].size for i in graph.nonlinear) <= _HIDDEN


def _arrangement(graph: Graph, ball: Ball, score: Score) -> tuple[list[Array], float, float] | None:
    if float(ball.eps) == 0:
        return None
    size, center, eps = math.prod(graph.shape), ball.center.flatten().numpy(), float(ball.eps)
    if size == 1:
        ball = Ball(ball.center, ball.eps, "linf")
    rows, offsets = _hyperplanes(graph, size)
    walls, limits = _walls(ball)
    planes, levels = np.concatenate([rows, walls]), np.concatenate([-offsets, limits])

    def network(points: Array) -> Array:
        with torch.no_grad():
            return graph(torch.from_numpy(points).reshape(-1, *graph.shape)).numpy()

    vertices = [center[None]]
    choices = np.array(list(itertools.combinations(range(len(planes)), size)))
    if len(choices) > 60000:
        return None
    matrices, right = planes[choices], levels[choices]
    scale = np.prod(np.linalg.norm(matrices, axis=2), axis=1)
    solid = np.abs(np.linalg.det(matrices)) > 1e-9 * scale
    if solid.any():
        vertices.append(np.linalg.solve(matrices[solid], right[solid][..., None])[..., 0])
    corners = np.concatenate(vertices)
    slack = 1e-9 * eps
    corners = corners[(walls @ corners.T <= limits[:, None] + slack).all(0)]
    if ball.norm == "l2":
        angle = np.linspace(0, 2 * np.pi, 4001)
        circle = center + eps * np.stack([np.cos(angle), np.sin(angle)], 1)
        corners = np.concatenate([corners[np.linalg.norm(corners - center, axis=1) <= eps + slack], circle])
        corners = corners[((corners >= 0) & (corners <= 1)).all(1)]
    corners = np.concatenate([corners, center[None]])
    values = score_of(network(corners).astype(np.longdouble), score)
    signs = np.sign(np.round((rows @ corners.T + offsets[:, None]) / (1e-9 * (1 + np.abs(offsets[:, None])))))
    lowest, highest = corners[values.argmin()], corners[values.argmax()]
    points = [lowest, highest]
    if isinstance(score, MSP) or ball.norm == "l2":  # neither is convex on a cell: climb from the best corners
        some = np.argsort(values)
        points += [corners[i] for i in (*some[:8], *some[-8:])]
        return points, math.nan, math.nan
    inner = _convex_minimum(network, corners, signs, values, score)
    if inner is not None:
        points.append(inner)
    value = score_of(network(np.stack(points)).astype(np.longdouble), score)
    return points, float(value.min()), float(value.max())


def _convex_minimum(
    network: Callable[[Array], Array], corners: Array, signs: Array, values: Array, score: Score
) -> Any:
    """Where LSE(f), or the largest logit, is smallest: the cells in the order of what they can reach."""
    best, where = float(values.max()), None
    cells = _cells(corners, signs)
    reach = []
    for index in cells:
        middle = corners[index].mean(0)
        logits = network(np.concatenate([middle[None], corners[index]]))
        scale = score.temperature if isinstance(score, Energy) else 1.0
        shares = np.exp((logits[0] - logits[0].max()) / scale)
        shares = shares / shares.sum() if isinstance(score, Energy) else np.eye(len(shares))[logits[0].argmax()]
        top = -float(score_of(logits[:1].astype(np.longdouble), score)[0])
        reach.append(-(top + ((logits[1:] - logits[0]) @ shares).min()))
    for index in np.argsort(reach)[::-1]:
        if reach[index] <= best:
            break
        found = _on_simplex(network(corners[cells[index]]), score) @ corners[cells[index]]
        value = float(score_of(network(found[None]).astype(np.longdouble), score)[0])
        if value > best:
            best, where = value, found
    return where


def _cells(corners: Array, signs: Array) -> list[Array]:
    """Indices of the corners of each cell: a corner belongs to all sign patterns that its zeros leave open."""
    patterns: set[tuple[int, ...]] = set()
    for column in np.unique(signs, axis=1).T:
        free = (column == 0).nonzero()[0]
        if len(free) > 5:
            free = free[:5]
        for choice in itertools.product((-1, 1), repeat=len(free)):
            pattern = np.where(column == 0, 1, np.sign(column))
            pattern[free] = choice
            patterns.add(tuple(int(s) for s in pattern))
    found = []
    for pattern in patterns:
        mine = ((signs == 0) | (np.sign(signs) == np.array(pattern)[:, None])).all(0).nonzero()[0]
        if len(mine):
            found.append(mine)
    return found


def _on_simplex(logits: Array, score: Score) -> Array:
    """Weights of corners for which LSE (or the maximum) of the mixed logits is smallest."""
    count = len(logits)
    scale = score.temperature if isinstance(score, Energy) else None
    if scale is None:
        size, classes = count + 1, logits.shape[1]
        result = milp(
            np.eye(size)[-1],
            constraints=[
                LinearConstraint(np.concatenate([logits.T, -np.ones((classes, 1))], 1), -np.inf, 0),
                LinearConstraint(np.array([[1.0] * count + [0.0]]), 1, 1),
            ],
            bounds=Bounds([0.0] * count + [-np.inf], [1.0] * count + [np.inf]),
        )
        return np.ones(count) / count if result.x is None else np.clip(result.x[:-1], 0, 1)

    def value(weights: Array) -> tuple[float, Array]:
        mixed = weights @ logits / scale
        top = np.logaddexp.reduce(mixed)
        return float(top * scale), logits @ np.exp(mixed - top)

    start = np.ones(count) / count
    total = {"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": lambda weights: np.ones(count)}
    bounds = [(0.0, 1.0)] * count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps that leave the bounds by a rounding
        found = minimize(value, start, jac=True, method="SLSQP", bounds=bounds, constraints=[total], tol=1e-14)
    weights = np.clip(np.nan_to_num(found.x), 0, 1)
    return weights / weights.sum() if weights.sum() > 0 else start


def _hyperplanes(graph: Graph, size: int) -> tuple[Array, Array]:
    """The inputs of all ReLUs as functions of the image: rows, shape (H, d), and offsets."""
    with torch.no_grad():
        unit = torch.eye(size, dtype=torch.float64).reshape(size, *graph.shape)
        images = torch.cat([torch.zeros(1, *graph.shape, dtype=torch.float64), unit])
        values = graph.values(images)
    read = [values[graph.nodes[i].inputs[0]].flatten(1) for i in graph.nonlinear]
    inputs = torch.cat(read, 1)
    rows = (inputs[1:] - inputs[0]).T.numpy()
    kept = np.abs(rows).max(1) > 0
    return rows[kept], inputs[0].numpy()[kept]


def _walls(ball: Ball) -> tuple[Array, Array]:
    """Rows and limits of the walls, a . x <= b."""
    center, eps = ball.center.flatten().numpy(), float(ball.eps)
    size = len(center)
    unit = np.eye(size)
    if ball.norm == "linf":
        low, high = ball.lower.flatten().numpy(), ball.upper.flatten().numpy()
        return np.concatenate([unit, -unit]), np.concatenate([high, -low])
    rows, limits = [unit, -unit], [np.ones(size), np.zeros(size)]
    if ball.norm == "l1":
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=size)))
        rows.append(signs)
        limits.append(signs @ center + eps)
    return np.concatenate(rows), np.concatenate(limits)


# MILP


def _few(graph: Graph) -> bool:
    """Few enough units, and numbers that a solver with tolerances can hold."""
    units = 0
    for i in graph.nonlinear:
        operation = graph.nodes[i].operation
        factor = math.prod(operation.kernel) if isinstance(operation, MaxPool) else 1
        units += graph.nodes[i].size * factor
    return units <= _UNITS and math.prod(graph.shape) <= _UNITS and graph.classes <= 10


class _Program:
    """Constraints of a network over a ball; every value is a row of linear functions of the variables."""

    def __init__(self, graph: Graph, ball: Ball) -> None:
        self.center, self.eps = ball.center.flatten().numpy(), float(ball.eps)
        self.low = list(np.clip(-self.center / self.eps, -1, 1))  # pixels in units of eps, from the centre
        self.high = list(np.clip((1 - self.center) / self.eps, -1, 1))
        self.whole = [0] * len(self.low)
        self.rows: list[tuple[dict[int, float], float, float]] = []
        self.pixels = len(self.low)
        if ball.norm == "l1":
            self._l1()
        referee = Referee(graph)
        size = self.pixels
        found: list[tuple[Array, Array]] = [(self.eps * np.eye(size, len(self.low)), self.center)]
        for number, node in enumerate(graph.nodes[1:], 1):
            matrix, offset = self._widened(found[node.inputs[0]])
            if isinstance(node.operation, LinearMap):
                weight, bias = (part.astype(np.float64) for part in referee.map(number))
                found.append((weight @ matrix, weight @ offset + bias))
            elif isinstance(node.operation, Addition):
                other, more = self._widened(found[node.inputs[1]])
                found.append((matrix + other, offset + more))
            elif isinstance(node.operation, MaxPool):
                windows = referee.windows(number)
                outputs = [self._maximum(matrix, offset, [i for i in window if i >= 0]) for window in windows]
                found.append((np.array(self._units(outputs)), np.zeros(len(outputs))))
            else:
                assert isinstance(node.operation, LeakyReLU)
                leak = node.operation.slope
                outputs = [self._relu(matrix[i], offset[i]) for i in range(len(offset))]
                positive = np.array(self._units(outputs))
                wide, offset = self._widened((matrix, offset))
                found.append(((1 - leak) * positive + leak * wide, leak * offset))
        self.logits = self._widened(found[-1])

    def _l1(self) -> None:
        moves = []
        for i in range(self.pixels):
            move = self._variable(0.0, 1.0)
            self.rows.append(({i: 1.0, move: -1.0}, -np.inf, 0.0))
            self.rows.append(({i: -1.0, move: -1.0}, -np.inf, 0.0))
            moves.append(move)
        self.rows.append((dict.fromkeys(moves, 1.0), -np.inf, 1.0))

    def _variable(self, low: float, high: float, whole: int = 0) -> int:
        self.low.append(low)
        self.high.append(high)
        self.whole.append(whole)
        return len(self.low) - 1

    def _widened(self, value: tuple[Array, Array]) -> tuple[Array, Array]:
        matrix, offset = value
        return np.pad(matrix, ((0, 0), (0, len(self.low) - matrix.shape[1]))), offset

    def _units(self, outputs: list[int]) -> list[Array]:
        return [np.eye(1, len(self.low), output)[0] for output in outputs]

    def _range(self, row: Array, offset: float) -> tuple[float, float]:
        low, high = np.array(self.low[: len(row)]), np.array(self.high[: len(row)])
        center = row @ (low + high) / 2 + offset
        radius = np.abs(row) @ (high - low) / 2
        slack = 1e-9 * (1 + abs(center) + radius)
        return float(center - radius - slack), float(center + radius + slack)

    def _row(self, row: Array, extra: dict[int, float]) -> dict[int, float]:
        found = {int(i): float(row[i]) for i in row.nonzero()[0]}
        for i, value in extra.items():
            found[i] = found.get(i, 0.0) + value
        return found

    def _relu(self, row: Array, offset: float) -> int:
        low, high = self._range(row, offset)
        output = self._variable(max(low, 0.0), max(high, 0.0))
        if low >= 0:
            self.rows.append((self._row(row, {output: -1.0}), -offset, -offset))
        elif high > 0:
            on = self._variable(0.0, 1.0, 1)
            self.rows.append((self._row(row, {output: -1.0}), -np.inf, -offset))  # y >= z
            self.rows.append((self._row(-row, {output: 1.0, on: -low}), -np.inf, offset - low))  # y <= z - l (1 - a)
            self.rows.append(({output: 1.0, on: -high}, -np.inf, 0.0))  # y <= u a
        return output

    def _maximum(self, matrix: Array, offset: Array, window: list[int]) -> int:
        ranges = [self._range(matrix[i], offset[i]) for i in window]
        top, floor = max(high for _, high in ranges), max(low for low, _ in ranges)
        output = self._variable(floor, top)
        chosen = []
        for i, (low, _) in zip(window, ranges, strict=True):
            on = self._variable(0.0, 1.0, 1)
            chosen.append(on)
            self.rows.append((self._row(matrix[i], {output: -1.0}), -np.inf, -offset[i]))
            big = top - low
            self.rows.append((self._row(-matrix[i], {output: 1.0, on: big}), -np.inf, offset[i] + big))
        self.rows.append((dict.fromkeys(chosen, 1.0), 1.0, 1.0))
        return output

    def solved(self, goal: dict[int, float], more: list[tuple[dict[int, float], float, float]]) -> Array | None:
        """The pixels where the goal is smallest; None if the solver was not sure."""
        rows, size = self.rows + more, len(self.low)
        matrix = np.zeros((len(rows), size))
        for place, (row, _, _) in enumerate(rows):
            for i, value in row.items():
                matrix[place, i] = value
        objective = np.zeros(size)
        for i, value in goal.items():
            objective[i] = value
        constraint = LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows])
        result = milp(
            objective,
            integrality=np.array(self.whole),
            bounds=Bounds(np.array(self.low), np.array(self.high)),
            constraints=constraint if rows else None,
            options={"time_limit": 5.0},
        )
        return self.center + self.eps * result.x[: self.pixels] if result.status == 0 else None


def _milp(graph: Graph, ball: Ball) -> tuple[list[Array], float, float] | None:
    """Extremes of the largest logit."""
    if float(ball.eps) < _LEAST:
        return None
    program = _Program(graph, ball)
    matrix, offset = program.logits
    if max(map(abs, (*program.low, *program.high)), default=0) > 1e4 or np.abs(matrix).max(initial=0) > 1e4:
        return None
    points = []
    tops = [program.solved(program._row(-row, {}), []) for row in matrix]
    points += [point for point in tops if point is not None]
    whole = len(points) == len(tops)
    low = [program._range(row, shift)[0] for row, shift in zip(matrix, offset, strict=True)]
    high = [program._range(row, shift)[1] for row, shift in zip(matrix, offset, strict=True)]
    top = program._variable(min(low), max(high))
    above = [(program._row(row, {top: -1.0}), -np.inf, -shift) for row, shift in zip(matrix, offset, strict=True)]
    bottom = program.solved({top: 1.0}, above)
    if bottom is not None:
        points.append(bottom)
    if not points:
        return None
    with torch.no_grad():
        values = -graph(torch.from_numpy(np.stack(points)).reshape(-1, *graph.shape)).amax(1).numpy()
    return points, float(values.min()) if whole else math.nan, float(values.max()) if bottom is not None else math.nan


def units_of(graph: Graph) -> int:
    """Number of kinks or curves."""
    return sum(graph.nodes[i].size for i in graph.nonlinear if isinstance(graph.nodes[i].operation, Activation))
