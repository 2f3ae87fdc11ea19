r"""Both engines bound the same balls: they share no code, so an error in one of them shows.

Compared are, by the same method, S_lb, S_ub and the bounds l_k, u_k of every logit.

* *The same lines.* Where rows are pulled back to the image through (leaky) ReLUs whose inputs are bounded alike, both
  engines compute the same numbers and differ by what they are moved outward for rounding, in both directions: directly and
  through the lines around each of n layers, at most by the errors E carried forwards (`rounding`), so

      |a - b| <= 1e-8 (1 + |b|) + 2 n max E.

  Typical are 1e-13 to 1e-10. Not so for a sample with a neuron whose two lower lines are equally good, where rounding chooses, or whose interval ends so
  near 0 that the library's clamps of 1e-8 matter; nor, for l_2 and l_1 balls, in a network that adds paths, whose
  intervals the native engine takes over the ball in place of its box.
* *Other lines* (intervals, sigmoid, tanh, maximum pools). One engine may be looser than the other, which contradicts
  nothing; but both enclose S and the logits, so the intervals must meet.
* *Points.* Whatever the lines, S and the logits at the centre and at both ends of the steepest line through it lie
  inside the bounds of both engines.

Where the native engine takes rows in float32, the lines are compared in float64, and what it uses must meet both and hold at
the points too.

A bound that is NaN, or an engine that raises, proves nothing and contradicts nothing: such balls are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from grood_cert import attacks
from grood_cert.ball import Ball
from grood_cert.bounds.crown import NativeNetwork, NativeRelaxation
from grood_cert.bounds.engine import BoundedNetwork, Method, Relaxation, way_of
from grood_cert.bounds.rounding import follow
from grood_cert.bounds.score import score_bounds
from grood_cert.errors import SoundnessError
from grood_cert.interval import Interval
from grood_cert.networks.activations import LeakyReLU
from grood_cert.networks.operations import Addition
from grood_cert.scores import ENERGY, Score, score_gradient

TOLERANCE = 1e-8
_CLAMPED = 1e-7  # distance to 0 below which the library's clamps may matter
_TIED = 1e-9  # distance of a chord's slope to 1/2 below which rounding may choose the lower line


@dataclass(frozen=True)
class Agreement:
    """What a cross-check found.

    Attributes:
        balls: Balls bounded by both engines.
        same_lines: How many of them had to agree to rounding; of the others the intervals meet.
        largest_disagreement: Over these, |a - b| / (1 + |b|) of any bound; None if there are none.
    """

    balls: int
    same_lines: int
    largest_disagreement: float | None


def cross_check(
    native: NativeNetwork,
    other: BoundedNetwork,
    balls: Iterable[Ball],
    method: Method | None = None,
    score: Score = ENERGY,
) -> Agreement:
    """Compare both engines on some balls.

    Args:
        native: The network inside the native engine.
        other: The same network inside the other one.
        balls: Batches of balls.
        method: Method to compare if it differs from the native engine's own.
        score: S.

    Raises:
        SoundnessError: If they disagree beyond rounding, or a bound does not hold at a point of its ball.
    """
    method = method or native.method
    exact = native
    if native.single:
        exact = NativeNetwork(native.network, native.shape, native.method, native.memory, native.graph)
    count = 0
    found: list[float] = []
    for ball in balls:
        relaxed = exact.relax(ball)
        ours, theirs = _bounds(exact, ball, method, score, relaxed), _bounds(other, ball, method, score)
        used = ours if exact is native else _bounds(native, ball, method, score)
        known = torch.isfinite(torch.cat([*used, *ours, *theirs], 1)).all(1)
        if not bool(known.any()):
            continue
        gap = torch.stack([(one - two).abs() / (1 + two.abs()) for one, two in zip(ours, theirs, strict=True)])
        apart = gap.amax((0, 2))
        same, rounding = _same_lines(exact, relaxed, ball, method)
        same = same & known
        fits = torch.where(same, apart <= TOLERANCE + rounding, _meet(ours, theirs))
        fits = fits & _meet(used, ours) & _meet(used, theirs)
        for bounds in (used, ours, theirs):
            fits = fits & _hold(native, ball, bounds, score)
        wrong = known & ~fits
        if bool(wrong.any()):
            raise SoundnessError(
                f"the bound engines contradict each other on {int(wrong.sum())} balls of eps "
                f"{float(ball.eps[wrong][0]):g}: no bound of this run can be trusted",
                {
                    "image": ball.center[wrong].cpu().numpy(),
                    "eps": ball.eps[wrong].cpu().numpy(),
                    **{
                        f"{engine}_{side}": bound[wrong].cpu().numpy()
                        for engine, bounds in (("native", used), ("native_float64", ours), ("other", theirs))
                        for side, bound in zip(("lower", "upper"), bounds, strict=True)
                    },
                },
            )
        count += int(known.sum())
        found += apart[same].tolist()
    return Agreement(count, len(found), max(found, default=None))


def _bounds(
    bounded: BoundedNetwork, ball: Ball, method: Method, score: Score, relaxation: Relaxation | None = None
) -> Interval:
    """Bounds of S and of the logits, shape (B, 1 + K) each; NaN where the engine raises."""
    classes = bounded.graph.classes
    try:
        relaxation = bounded.relax(ball) if relaxation is None else relaxation
        found = score_bounds(bounded, ball, method, score, relaxation)
        rows = torch.eye(classes).to(ball.center).expand(len(ball.center), -1, -1)
        lower, upper = relaxation.rows(rows, method)
    except Exception:  # noqa: BLE001  (whatever it is, nothing was proved)
        nothing = ball.center.new_full((len(ball.center), 1 + classes), torch.nan)
        return nothing, nothing
    return torch.cat([found.lower[:, None], lower], 1), torch.cat([found.upper[:, None], upper], 1)


def _same_lines(
    native: NativeNetwork, relaxation: NativeRelaxation, ball: Ball, method: Method
) -> tuple[Tensor, Tensor]:
    """Whether both engines take the same lines for a sample, and what the native margins may add, shape (B,) each."""
    nodes, nonlinear = native.folded.nodes, native.folded.nonlinear
    hidden = relaxation.hidden(method)
    errors = follow(native.folded, hidden.ball, tuple(hidden.inputs.values()), forwards=True)
    rounding = 2 * len(nodes) * errors.error(len(nodes) - 1).amax(1)
    alike = torch.ones_like(ball.eps, dtype=torch.bool)
    if way_of(method).rows == "ibp" or not all(isinstance(nodes[i].operation, LeakyReLU) for i in nonlinear):
        return ~alike, rounding
    if ball.norm != "linf" and any(isinstance(node.operation, Addition) for node in nodes):
        return ~alike, rounding
    for number, (lower, upper) in hidden.inputs.items():
        operation = nodes[number].operation
        assert isinstance(operation, LeakyReLU)
        unstable = (lower < 0) & (upper > 0)
        clamped = (lower < 0) & (lower > -_CLAMPED) | (unstable & (upper < _CLAMPED))
        tied = unstable & (((upper - operation.slope * lower) / (upper - lower) - 0.5).abs() < _TIED)
        alike = alike & ~(clamped | tied).flatten(1).any(1)
    return alike, rounding


def _slack(bound: Tensor) -> Tensor:
    return TOLERANCE * (1 + bound.abs())


def _meet(first: Interval, second: Interval) -> Tensor:
    lower, upper = torch.maximum(first[0], second[0]), torch.minimum(first[1], second[1])
    return (lower <= upper + _slack(upper)).all(1)


def _hold(native: NativeNetwork, ball: Ball, bounds: Interval, score: Score) -> Tensor:
    """Whether bounds enclose S and the logits at some points of the ball, shape (B,)."""
    _, gradient = score_gradient(native.network, ball.center, score)
    inside = torch.ones_like(ball.eps, dtype=torch.bool)
    for points in (ball.center, attacks.towards(gradient, ball), attacks.towards(-gradient, ball)):
        with torch.no_grad():
            logits = native.network(points)
        found = torch.cat([score.value(logits)[:, None], logits], 1)
        above, below = found <= bounds[1] + _slack(found), found >= bounds[0] - _slack(found)
        inside = inside & (above & below).all(1)
    return inside
