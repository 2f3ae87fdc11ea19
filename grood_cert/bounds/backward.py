r"""CROWN: rows are pulled back to the image through lines around the nonlinear layers.

Linear layers: a -> W^T a, the bias joins the constant. An activation obeys lower and upper lines on its interval; for an
upper bound of a . sigma(z) the positive entries of a take the upper lines and the negative ones the lower. A maximum
pool takes as lower line its entry with the largest lower bound, as upper line that entry if no other can win, else the
constant max u. At the image the ball's support function closes the argument: max over x' in B of a . x' =
a . x + max a . (x' - x). Each step replaces a function by a pointwise larger one, so the result is an upper bound; a
lower bound is minus the upper bound of -a.

Work is done in blocks of samples and rows small enough for the processor's cache, which is worth a factor of three. Rows
may be float32 on request (`single_rows`).

References:
    Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions", NeurIPS 2018.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.bounds.linear_rows import FullRows, RowBatch, UnitRows, through_pool, unit_blocks
from grood_cert.bounds.single_rows import constants_error
from grood_cert.bounds.windows import Window, WindowRows, windows
from grood_cert.interval import Interval
from grood_cert.networks.activations import Activation, LeakyReLU
from grood_cert.networks.graph import Graph
from grood_cert.networks.operations import Addition, Convolution, Dense, LinearMap, MaxPool, Transposed

_COPIES = 4  # a row, its parts, and what it becomes


class Pullback:
    """Pulls rows at a node back to the image, through nonlinear layers whose inputs are already bounded.

    Args:
        graph: The network.
        ball: Batch of balls, float64.
        single: Whether rows are float32; then lines are moved outward for their constants (`single_rows`), the rest of
            what rounding can do is told as charges.
    """

    def __init__(self, graph: Graph, ball: Ball, single: bool = False) -> None:
        self._graph = graph
        layers = graph.single if single else graph
        self._layers, self._transposes = layers.nodes, layers.transposes
        self._ball = ball
        self._single = single
        self._dtype = torch.float32 if single else ball.center.dtype
        self._inputs: dict[int, Interval] = {}
        self._lines: dict[int, tuple[Tensor, Tensor | None, Tensor, Tensor]] = {}
        self._charges: dict[int, Tensor] = {}

    def add(self, number: int, lower: Tensor, upper: Tensor, charge: Tensor | None = None) -> None:
        """Tell the bounds of the input of a nonlinear node, and by how much to move its lines outward for rounding."""
        self._inputs[number] = lower, upper
        operation = self._graph.nodes[number].operation
        if isinstance(operation, Activation):
            slope_low, constant_low, slope_high, constant_high = operation.lines(lower, upper)
            if charge is not None:
                constant_low, constant_high = constant_low - charge, constant_high + charge
            flat = bool((constant_low == 0).all())
            if self._single and isinstance(operation, LeakyReLU):
                size = self._graph.nodes[number].size
                constant_low = (constant_low - constants_error(constant_low, size)).to(self._dtype)
                constant_high = (constant_high + constants_error(constant_high, size)).to(self._dtype)
            slope_low, slope_high = slope_low.to(self._dtype), slope_high.to(self._dtype)
            self._lines[number] = slope_low, None if flat else constant_low, slope_high, constant_high
        elif charge is not None:
            self._charges[number] = charge

    def part(self, samples: Tensor | slice) -> Pullback:
        """The same for some samples of the batch."""
        ball = Ball(self._ball.center[samples], self._ball.eps[samples], self._ball.norm)
        part = Pullback(self._graph, ball, self._single)
        part._inputs = {number: (lower[samples], upper[samples]) for number, (lower, upper) in self._inputs.items()}
        for number, (slope_low, constant_low, slope_high, constant_high) in self._lines.items():
            low = None if constant_low is None else constant_low[samples]
            part._lines[number] = slope_low[samples], low, slope_high[samples], constant_high[samples]
        part._charges = {number: charge[samples] for number, charge in self._charges.items()}
        return part

    def upper(self, node: int, rows: Tensor, units: UnitRows | None = None) -> Tensor:
        """UB of a . value(node); rows in shared form (n, *shape) when `units` deals them out, else (B, R, *shape).

        Returns:
            Shape (B, R), or (B, 2 U) with `units`.
        """
        rows = rows.to(self._dtype).flatten(2 if units is None else 1)
        return self._upper(node, FullRows(rows, self._graph.nodes[node].shape, units))

    def linear(self, node: int, rows: Tensor, memory: int, closed: Mapping[int, Interval] | None = None) -> Interval:
        """Bounds of a . value(node) for rows of shape (B, R, *shape).

        Args:
            node: The node.
            rows: The rows.
            memory: Bytes that blocks of rows may take.
            closed: Nodes at which rows are bounded by the intervals of their values and go no further.

        Returns:
            lower, upper: Shape (B, R) each.
        """
        rows, shape, count = rows.to(self._dtype), self._graph.nodes[node].shape, rows.shape[1]
        held = max(1, memory // self._bytes(node))  # rows at a time
        samples, size = max(1, held // (2 * count)), max(1, held // 2)
        found = []
        for start in range(0, len(rows), samples):
            block = slice(start, start + samples)
            part, inside = self.part(block), None
            if closed is not None:
                inside = {number: (lower[block], upper[block]) for number, (lower, upper) in closed.items()}
            pieces = [
                part._upper(node, FullRows(torch.cat([piece, -piece], 1), shape), inside).unflatten(1, (2, -1))
                for piece in rows[block].flatten(2).split(size, 1)
            ]
            found.append(torch.cat(pieces, 2))
        value = torch.cat(found)
        return -value[:, 1], value[:, 0]

    def bounds(self, node: int, needed: Tensor, memory: int) -> Interval:
        """Bounds of the needed entries of a node, maybe infinite elsewhere; `needed` and the result have shape (B, N)."""
        seen = windows(self._graph, node)
        if seen is not None:
            nodes = self._graph.nodes
            some = sum(math.prod((nodes[i].shape[0], *window.size)) for i, window in seen.items())
            whole = sum(nodes[i].size for i in seen)
            if some * needed.numel() < whole * int(needed.sum()):
                widest = max(math.prod((nodes[i].shape[0], *window.size)) for i, window in seen.items())
                return self._through_windows(node, widest, memory)
        return self._through_layers(node, needed, memory)

    def _bytes(self, node: int) -> int:
        """What one row takes at most on its way back over whole layers, columns of a convolution included."""
        nodes = self._graph.nodes[: node + 1]
        columns = [
            current.size // current.shape[0] * current.operation.weight[0].numel()
            for current in nodes
            if isinstance(current.operation, Convolution)
        ]
        columns += [
            math.prod(self._graph.nodes[current.inputs[0]].shape[1:]) * current.operation.operation.weight[0].numel()
            for current in nodes
            if isinstance(current.operation, Transposed)
        ]
        return self._dtype.itemsize * (_COPIES * max(current.size for current in nodes) + max(columns, default=0))

    def _through_layers(self, node: int, needed: Tensor, memory: int) -> Interval:
        """Rows over whole layers, for the needed entries only; samples that need similar numbers go together."""
        bytes_a_row = self._bytes(node)
        counts, order = needed.sum(1).sort(descending=True)
        found, start, numbers = [], 0, counts.tolist()
        while start < len(order):
            chosen = order[start : start + max(1, memory // max(1, 2 * numbers[start] * bytes_a_row))]
            start += len(chosen)
            part, want = self.part(chosen), needed[chosen]
            upper = torch.full_like(want, torch.inf, dtype=self._ball.center.dtype)
            both = torch.stack([upper, upper], 1)
            for index, units in unit_blocks(want, bytes_a_row, memory):
                value = part._of_units(node, units).unflatten(1, (2, -1))
                both = both.scatter(2, index.unsqueeze(1).expand_as(value), value)
            found.append(both)
        value = torch.cat(found)[order.argsort()]
        return -value[:, 1], value[:, 0]

    def _of_units(self, node: int, units: UnitRows) -> Tensor:
        current, exact = self._layers[node], self._graph.nodes[node].operation
        if not (isinstance(current.operation, Dense) and isinstance(exact, Dense)):
            return self.upper(node, units.start(current.size, current.shape), units)
        weight, bias = current.operation.weight[units.units], exact.bias  # no product with unit vectors
        value = self.upper(current.inputs[0], weight, units)
        return value if bias is None else value + units.own(bias[units.units])

    def _through_windows(self, node: int, widest: int, memory: int) -> Interval:
        """Rows over windows, for all entries, in strips of places."""
        channels, height, width = self._graph.nodes[node].shape
        identity = torch.eye(channels).to(self._ball.center.device, self._dtype)
        rows = torch.cat([identity, -identity])[None, None]
        bytes_a_line = self._dtype.itemsize * _COPIES * widest * 2 * channels * width
        lines = max(1, memory // bytes_a_line)  # of places, at a time
        samples, strip = max(1, lines // height), min(lines, height)
        found = []
        for start in range(0, len(self._ball.center), samples):
            part = self.part(slice(start, start + samples))
            pieces = [
                part._upper(
                    node,
                    WindowRows(
                        rows,
                        (channels, height, width),
                        Window((min(strip, height - top), width), before=(-top, 0)),
                    ),
                )
                for top in range(0, height, strip)
            ]
            found.append(torch.cat(pieces, 1))
        value = torch.cat(found).mT.unflatten(1, (2, -1)).flatten(2)  # (B, 2, N)
        return -value[:, 1], value[:, 0]

    def _upper(self, node: int, rows: RowBatch, closed: Mapping[int, Interval] | None = None) -> Tensor:
        nodes, layers, closed, exact = self._graph.nodes, self._layers, closed or {}, self._ball.center.dtype
        pending: dict[int, RowBatch] = {node: rows}
        total: Tensor | float = 0.0

        def send(target: int, batch: RowBatch) -> None:
            pending[target] = pending[target].plus(batch) if target in pending else batch

        for number in range(node, 0, -1):
            if number not in pending:
                continue
            row, current = pending.pop(number), nodes[number]
            operation = current.operation
            if number in closed:
                total = total + _over_box(row.own(), *closed[number])
            elif isinstance(operation, LinearMap):
                if operation.bias is not None:
                    total = total + row.to(exact).dot(row.view(operation.bias.expand(current.shape).unsqueeze(0)))
                origin, layer = current.inputs[0], layers[number].operation
                assert isinstance(layer, LinearMap)
                if isinstance(operation, Transposed):  # `single_rows` says why
                    row = row.to(exact).through(number, operation, nodes[origin].shape, self._transposes)
                    send(origin, row.to(self._dtype))
                else:
                    send(origin, row.through(number, layer, nodes[origin].shape, self._transposes))
            elif isinstance(operation, Addition):
                for target in current.inputs:
                    send(target, row)
            elif isinstance(operation, Activation):
                row = row.own()
                slope_low, constant_low, slope_high, constant_high = self._lines[number]
                positive, negative = row.values.clamp(min=0), row.values.clamp(max=0)
                for entries, constant in ((positive, constant_high), (negative, constant_low)):
                    if constant is not None:
                        part = row.with_values(entries).to(constant.dtype)
                        total = total + part.dot(row.view(constant)).to(exact)
                values = torch.addcmul(negative * row.view(slope_low), positive, row.view(slope_high))
                send(current.inputs[0], row.with_values(values, inside=True))
            else:
                assert isinstance(operation, MaxPool)
                row, (lower, upper) = row.own(), self._inputs[number]
                if number in self._charges:
                    total = total + row.with_values(row.values.abs()).to(exact).dot(row.view(self._charges[number]))
                entries = row.values.reshape(*row.values.shape[:2], row.shape[0], -1)
                spread, constant = through_pool(operation, entries, upper, *operation.leaders(lower, upper))
                total = total + constant
                send(current.inputs[0], FullRows(spread.flatten(2), tuple(lower.shape[1:])))
        if 0 in pending:
            total = total + self._over_ball(pending[0].own())
        assert isinstance(total, Tensor)
        return total

    def _over_ball(self, rows: RowBatch) -> Tensor:
        ball = self._ball
        if ball.norm == "linf":
            return _over_box(rows, ball.lower, ball.upper)
        rows = rows.to(ball.center.dtype)
        return rows.dot(rows.view(ball.center)) + rows.support(ball)


def _over_box(rows: RowBatch, lower: Tensor, upper: Tensor) -> Tensor:
    """Max of a . v over lower <= v <= upper."""
    middle, radius = (lower + upper) / 2, (upper - lower) / 2
    exact = rows.to(lower.dtype)
    found = exact.dot(rows.view(middle))
    sizes = rows.values.abs() if exact is rows else exact.values.abs_()  # a copy that nobody else reads
    return found + rows.with_values(sizes).dot(rows.view(radius))
