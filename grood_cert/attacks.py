r"""The adversary: looks inside the same ball for points that contradict a proof, and brackets the certified radius.

An attack never proves anything. What it returns are *witnesses*: points whose score was evaluated in float64, so that
the distance of a flipped decision is a true upper bound of the exact robust radius. The search itself runs in float32,
on a copy of the network; only its last steps, and every number that is reported, are float64.

Both searches use the exact answer to a linear problem over the pixel box. With a the gradient of the score at y:

    towards(a, eps)   argmax  a . d   over ||d||_p <= eps, 0 <= x + d <= 1      conditional gradient, in a given ball
    onto(a, c)        argmin ||d||_p  over a . d  = c,     0 <= y + d <= 1      hyperplane projection, nearest flip

* `extremes` climbs S and -S inside nested balls: y <- y + h (x + towards(v, eps) - y) with v a running mean of
  normalised gradients. The share h starts at 1 and shrinks with every step that reaches no new best value. Up through
  the balls each search starts where the one in the smaller ball ended, moved outwards in proportion, and takes the more
  steps the larger its ball is; down again, where the one in the larger ball ended.
* `minimum_norm` walks along the level set S = gamma, towards x, as FAB does: both y and x are projected onto the
  hyperplane on which the linearised score is gamma, and the next point lies between the two. Flipped points are
  recorded and pulled towards x. The best one is shortened along the segment to x by bisection, in float64.

Where GReg has flattened S, the softmax-weighted gradient sum_k p_k grad f_k vanishes although no logit is flat; since
LSE >= max_k f_k, both searches also start from points that climb a single logit; in nested balls these climbs go on
from ball to ball too. What is climbed is the score's *order* (`grood_cert.scores`), which does not saturate as MSP does;
what is reported is the score.

References:
    Croce & Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML 2020 (FAB);
    Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
    ICML 2020 (APGD: momentum, and steps that shrink when the search stalls); Jaggi, "Revisiting Frank-Wolfe", ICML 2013.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from grood_cert.ball import Ball, Norm, dual_norm, largest_eps
from grood_cert.errors import InputError
from grood_cert.networks.checks import check_eval
from grood_cert.scores import ENERGY, Score

_BISECTED = 2.0**-23  # share of the distance that bisections leave
_CLIMB = 5  # steps of a climb of one logit
_CLOSING = 2  # closing steps of a walk, in float64
_DOWN = 0.2  # steps in each ball on the way down, as a share of those in the largest ball
_EXPLORE = 2  # steps of a climb, or from a random point, in each of nested balls
_FILLINGS = 10  # of a water filling; each is exact until another pixel hits its wall
_GAIN = 1e-4  # relative; what counts as one on a walk
_MOMENTUM = 0.75
_OVERSHOOT = 1.05  # beyond the hyperplane, so that curvature does not keep the decision as it was
_PATIENCE = 8  # steps without gain after which a walk along the level set ends
_POLISH = 2  # steps before them, in float64
_PULL = 0.9  # a flipped point keeps this share of its distance to x
_REACH = 1.5  # radius of the balls of climbs over the best distance
_SHRINK = 0.85  # of the step of a search that gains nothing
_SQUEEZE = 0.99  # radius of the last ball over the best distance
_TOUCH = 1 + 1e-7  # just beyond the hyperplane
_TOWARDS_X = 0.5  # largest weight of the projection of x

Side = Literal["maximum", "minimum"]
Preset = Literal["fast", "default", "max"]
SIDES: tuple[Side, ...] = get_args(Side)  # low scores last, where climbs of single logits join
_SIGN: dict[Side, int] = {"maximum": 1, "minimum": -1}
PRESETS: tuple[str, ...] = get_args(Preset)


@dataclass(frozen=True)
class AttackEffort:
    """How hard the attacks search; cost grows with each of the numbers.

    Attributes:
        steps: Gradient steps of each search of `minimum_norm`.
        restarts: Random starts of each ball, and of each round.
        rounds: Rounds of `minimum_norm`: the first starts from x, each other one from the climb of another logit.
        ascent: Gradient steps that `extremes` takes in the largest ball.
        logits: Logits that `extremes` climbs alone.

    Raises:
        InputError: If a number is too small.
    """

    steps: int = 30
    restarts: int = 1
    rounds: int = 5
    ascent: int = 24
    logits: int = 5

    def __post_init__(self) -> None:
        if min(self.steps, self.rounds, self.ascent) < 1 or min(self.restarts, self.logits) < 0:
            raise InputError(f"an attack needs steps, rounds and ascent >= 1, restarts and logits >= 0, got {self}")

    @staticmethod
    def preset(name: str) -> AttackEffort:
        """The effort of a name of `PRESETS`.

        Raises:
            InputError: If there is none.

        Example:
            >>> AttackEffort.preset("default") == AttackEffort()
            True
        """
        efforts = {
            "fast": AttackEffort(20, 0, 2, 12, 3),
            "default": AttackEffort(),
            "max": AttackEffort(100, 3, 12, 60, 12),
        }
        if name not in efforts:
            raise InputError(f"unknown attack effort {name!r}; use one of {', '.join(efforts)}")
        return efforts[name]


DEFAULT = AttackEffort()


@dataclass(frozen=True)
class Extremes:
    """Smallest and largest score among the points of each ball that were evaluated in float64.

    Attributes:
        minimum: Shape (B,); NaN if every score was.
        maximum: Shape (B,).
        argmin: Where the minimum was seen, shape (B, C, H, W).
        argmax: Where the maximum was seen.
    """

    minimum: Tensor
    maximum: Tensor
    argmin: Tensor
    argmax: Tensor


@dataclass(frozen=True)
class MinimumNorm:
    """Nearest points found on the wrong side of gamma.

    Attributes:
        radius: ||x' - x||_p, shape (B,); infinity where no such point was found.
        points: The points x', shape (B, C, H, W); x itself where none was found.
    """

    radius: Tensor
    points: Tensor


def _per_pixel(value: Tensor, images: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (images.dim() - 1))


def _where(mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.where(_per_pixel(mask, first), first, second)


def _repeat(images: Tensor, count: int) -> Tensor:
    """The batch, `count` times in a row."""
    return images.repeat(count, *[1] * (images.dim() - 1))


def _single(network: nn.Module) -> nn.Module:
    """A float32 copy, to search with."""
    return copy.deepcopy(network).float()


def _gradient(network: nn.Module, points: Tensor, score: Score, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The order of S, or that of one class k a sample, and its gradient."""
    with torch.enable_grad():
        points = points.detach().requires_grad_(True)
        logits = network(points)
        value = score.order(logits) if classes is None else score.of_class(logits, classes)
        (gradient,) = torch.autograd.grad(value.sum(), points)
    return value.detach(), gradient


def _score(network: nn.Module, points: Tensor, score: Score) -> Tensor:
    with torch.no_grad():
        return score.value(network(points))


def _fill(slopes: Tensor, room: Tensor, budget: Tensor, norm: Norm, buys: Literal["length", "gain"]) -> Tensor:
    """How far to move each pixel so that |slopes| . d is largest for its p-norm, spending a budget of either.

    Args:
        slopes: |a|, shape (B, d).
        room: Distance to the wall, shape (B, d).
        budget: The p-norm, or |a| . d, to be reached, shape (B,); every pixel goes to its wall where it cannot be.
        norm: p.
        buys: What the budget is of.

    Returns:
        d >= 0, shape (B, d).
    """
    budget = budget.unsqueeze(1)
    if norm == "l1":  # the steepest pixels first
        steepest, order = slopes.sort(1, descending=True)
        room = room.gather(1, order)
        price = steepest if buys == "gain" else torch.ones_like(steepest)
        before = (price * room).cumsum(1) - price * room
        moved = torch.minimum((budget - before).clamp(min=0) / price.clamp(min=torch.finfo(price.dtype).tiny), room)
        return torch.zeros_like(slopes).scatter(1, order, moved)
    units = torch.ones_like(slopes) if norm == "linf" else slopes
    if norm == "linf" and buys == "length":
        return torch.minimum(room, budget)
    linear = buys == "gain"  # d = min(t * units, room), and t solves sum |a| d = budget, or sum d^2 = budget^2
    full, rate = (slopes * room, slopes * units) if linear else (room.square(), units.square())
    total = budget if linear else budget.square()
    moved = torch.zeros_like(slopes)
    for _ in range(_FILLINGS):
        stuck = moved >= room
        left = (total - full.masked_fill(~stuck, 0).sum(1, keepdim=True)).clamp(min=0)
        level = left / rate.masked_fill(stuck, 0).sum(1, keepdim=True).clamp(min=torch.finfo(rate.dtype).tiny)
        moved = torch.minimum((level if linear else level.sqrt()).clamp(max=torch.finfo(rate.dtype).max) * units, room)
        if torch.equal(moved >= room, stuck):
            break
    return moved


def towards(gradient: Tensor, ball: Ball) -> Tensor:
    r"""The point of each ball at which a linear function with this gradient is largest.

    Args:
        gradient: a, shape (B, C, H, W).
        ball: Batch of balls.

    Returns:
        x + argmax a . d over the ball, shape (B, C, H, W); pixels with a = 0 stay.

    Example:
        >>> ball = Ball(torch.tensor([[0.9, 0.5]]), torch.tensor([0.3]), "l1")
        >>> towards(torch.tensor([[2.0, -1.0]]), ball).round(decimals=4)
        tensor([[1.0000, 0.3000]])
    """
    flat, points = gradient.flatten(1), ball.center.flatten(1)
    room = torch.where(flat > 0, 1 - points, points)
    moved = _fill(flat.abs(), room, ball.eps, ball.norm, "length")
    return ball.project(ball.center + (moved * flat.sign()).reshape(gradient.shape))


def onto(gradient: Tensor, points: Tensor, gain: Tensor, norm: Norm) -> Tensor:
    r"""Shortest moves inside the pixel box that change a linear function by a given amount.

    Args:
        gradient: a, shape (B, C, H, W).
        points: y, shape (B, C, H, W), pixels in [0, 1].
        gain: c, of either sign, shape (B,).
        norm: Norm of the length.

    Returns:
        argmin ||d||_p over a . d = c, shape (B, C, H, W); the nearest to it where the box does not reach so far.

    Example:
        >>> onto(torch.tensor([[2.0, -1.0]]), torch.tensor([[0.9, 0.5]]), torch.tensor([0.6]), "linf").round(decimals=4)
        tensor([[ 0.1000, -0.4000]])
    """
    flat, start = (gradient * _per_pixel(gain.sign(), gradient)).flatten(1), points.flatten(1)
    room = torch.where(flat > 0, 1 - start, start)
    return (_fill(flat.abs(), room, gain.abs(), norm, "gain") * flat.sign()).reshape(gradient.shape)


def _better(value: Tensor, best: Tensor) -> Tensor:
    """Whether a value is larger than the best so far; NaN gives way to any number."""
    return (value > best) | (best.isnan() & ~value.isnan())


def _ascend(
    network: nn.Module, ball: Ball, sign: Tensor, points: Tensor, steps: int, rule: Score
) -> tuple[Tensor, Tensor]:
    """The best point of a climb of sign * S, one sign a sample, and the gradient there."""
    share, velocity = torch.ones_like(ball.eps), torch.zeros_like(points)
    value, gradient = _gradient(network, points, rule)
    value, gradient = sign * value, ball.per_pixel(sign) * gradient
    best, best_points, best_gradient = value, points, gradient
    for _ in range(steps):
        length = dual_norm(gradient, ball.norm).clamp(min=torch.finfo(gradient.dtype).tiny)
        velocity = _MOMENTUM * velocity + gradient / ball.per_pixel(length)
        points = points + ball.per_pixel(share) * (towards(velocity, ball) - points)
        value, gradient = _gradient(network, points, rule)
        value, gradient = sign * value, ball.per_pixel(sign) * gradient
        better = _better(value, best)
        share = torch.where(better, share, _SHRINK * share)
        best, best_points = torch.where(better, value, best), _where(better, points, best_points)
        best_gradient = _where(better, gradient, best_gradient)
    return best_points, best_gradient


def _climb(network: nn.Module, ball: Ball, classes: Tensor, rule: Score, points: Tensor, steps: range) -> Tensor:
    """These steps of a conditional-gradient descent of the order of one class a sample."""
    for step in steps:
        gradient = -_gradient(network, points, rule, classes)[1]
        points = points + 2 / (step + 2) * (towards(gradient, ball) - points)
    return points


def _random_points(ball: Ball, generator: torch.Generator) -> Tensor:
    noise = torch.rand(ball.center.shape, generator=generator).to(ball.center) * 2 - 1
    if ball.norm != "linf":
        length = torch.linalg.vector_norm(noise.flatten(1), ord={"l2": 2, "l1": 1}[ball.norm], dim=1)
        noise = noise / ball.per_pixel(length)
    return ball.project(ball.center + ball.per_pixel(ball.eps) * noise)


def _rescaled(ball: Ball, points: Tensor, eps: Tensor) -> Tensor:
    """Points of concentric balls of these radii, moved along their segments from x in proportion to the radius."""
    factor = torch.where(eps > 0, ball.eps / eps.clamp(min=torch.finfo(eps.dtype).tiny), 1).clamp(
        max=torch.finfo(eps.dtype).max
    )
    return ball.project(ball.center + (points - ball.center) * ball.per_pixel(factor))


_Found = tuple[Tensor, Tensor]


def _best(first: _Found, second: _Found) -> _Found:
    """The better one of two findings (value, points); NaN gives way to any number."""
    better = _better(second[0], first[0])
    return torch.where(better, second[0], first[0]), _where(better, second[1], first[1])


def _joined(parts: Sequence[_Found]) -> _Found:
    return torch.cat([value for value, _ in parts]), torch.cat([points for _, points in parts])


class _Search:
    """Searches of nested balls for high and for low scores, all sides at once: batches of B images a side.

    What was found is kept as (sign * S, points), in the floating-point type of the images.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        norm: Norm,
        generator: torch.Generator,
        effort: AttackEffort,
        rule: Score,
        sides: Sequence[Side],
    ) -> None:
        self._network, self._coarse, self._rule, self._effort = network, _single(network), rule, effort
        self._norm, self._generator = norm, generator
        self.count, self.images = len(images), _repeat(images, len(sides))
        self.sign = torch.tensor([_SIGN[side] for side in sides]).to(images).repeat_interleave(len(images))
        with torch.no_grad():
            logits = network(images)
        climbs = effort.logits if sides[-1] == "minimum" else 0  # of single logits, which lead to low scores alone
        self._classes = logits.argsort(1, descending=True)[:, :climbs].T.flatten()
        self._climbed: tuple[Tensor, Tensor] | None = None  # radii and where they are

    def climb(self, ball: Ball, points: Tensor, steps: int) -> _Found:
        """Where a climb ends, or where its gradient leads from there."""
        coarse = Ball(self.images.float(), ball.eps.float(), self._norm)
        ended, gradient = _ascend(self._coarse, coarse, self.sign.float(), points.float(), steps, self._rule)
        ends = ball.project(ended.to(ball.center)), towards(gradient.to(ball.center), ball)
        first, second = ((self.sign * _score(self._network, end, self._rule), end) for end in ends)
        return _best(first, second)

    def start(self, ball: Ball, points: Tensor) -> Tensor:
        """Where to start: from these points, near a random one, or where the climb of one logit is."""
        coarse = Ball(self.images.float(), ball.eps.float(), self._norm)
        starts = [points.float()]
        for _ in range(self._effort.restarts):
            random = _random_points(coarse, self._generator)
            starts.append(_ascend(self._coarse, coarse, self.sign.float(), random, _EXPLORE, self._rule)[0])
        with torch.no_grad():
            values = [self.sign * self._rule.order(self._coarse(start)) for start in starts]
        if len(self._classes):
            climbs = len(self._classes) // self.count
            own = slice(self.count)  # any side: all search the same balls
            around = Ball(_repeat(coarse.center[own], climbs), coarse.eps[own].repeat(climbs), self._norm)
            begin = _rescaled(around, self._climbed[1], self._climbed[0]) if self._climbed else around.center
            steps = range(1, 1 + _EXPLORE) if self._climbed else range(_EXPLORE)
            climbed = _climb(self._coarse, around, self._classes, self._rule, begin, steps)
            self._climbed = around.eps, climbed
            with torch.no_grad():
                low = -self._rule.order(self._coarse(climbed))
            others = starts[0][: -self.count]
            none = torch.full_like(values[0][: -self.count], -torch.inf)
            starts += [torch.cat([others, climb]) for climb in climbed.chunk(climbs)]
            values += [torch.cat([none, value]) for value in low.chunk(climbs)]
        best = torch.stack(values).nan_to_num(nan=-torch.inf).argmax(0)
        return torch.stack(starts)[best, torch.arange(len(best), device=best.device)]

    def nested(self, balls: Sequence[Ball], known: Sequence[_Found], points: Tensor, distance: Tensor) -> list[_Found]:
        """The best of each ball, up through the balls from points at a distance and down again, and what is known."""
        sides = len(self.images) // self.count
        balls = [Ball(self.images, ball.eps.repeat(sides), self._norm) for ball in balls]
        best, where, eps, ascent = known[0], _repeat(points, sides), distance.repeat(sides), self._effort.ascent
        found = []
        for number, (ball, seen) in enumerate(zip(balls, known, strict=True), 1):
            start = self.start(ball, _rescaled(ball, where, eps))
            best = _best(_best(best, seen), self.climb(ball, start, math.ceil(ascent * number / len(balls))))
            where, eps = best[1], ball.eps
            found.append(best)
        for index in reversed(range(len(balls) - 1)):
            start = _rescaled(balls[index], found[index + 1][1], balls[index + 1].eps)
            found[index] = _best(found[index], self.climb(balls[index], start, math.ceil(_DOWN * ascent)))
        return list(itertools.accumulate(found, _best))


def extremes(
    network: nn.Module,
    balls: Sequence[Ball],
    generator: torch.Generator,
    effort: AttackEffort = DEFAULT,
    score: Score = ENERGY,
    points: Tensor | None = None,
    side: Side | None = None,
) -> list[Extremes]:
    """Search nested balls for high and for low scores, up through them and down again.

    Args:
        network: f in eval mode, in the balls' floating-point type.
        balls: Batches of balls around the same images, from small to large.
        generator: Random numbers of the starts.
        effort: How hard to search.
        score: S.
        points: Where to start both searches, moved into the first ball in proportion; they also count as seen in all
            balls that hold them. None: the centre.
        side: Which extremes to search for; the other one is that of centre and given points. None: both.

    Returns:
        For each ball the extremes over the centre, the given points in it, the best points of the searches of this and
        of all smaller balls, and the points towards which their gradients there lead, all evaluated in the balls'
        floating-point type.

    Example:
        >>> layer = nn.Linear(2, 1, dtype=torch.float64)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[3.0, 4.0]])), layer.bias.zero_()
        >>> image = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)  # S = -3.5
        >>> balls = [Ball(image, eps, "linf") for eps in (0.1, 0.2)]
        >>> found = extremes(nn.Sequential(nn.Flatten(), layer).eval(), balls, torch.Generator())
        >>> [round(float(seen.maximum), 6) for seen in found]
        [-2.8, -2.1]
    """
    check_eval(network)
    images, sides = balls[0].center, SIDES if side is None else (side,)
    centre = _score(network, images, score)
    points, given = (images, centre) if points is None else (points, _score(network, points, score))
    distance = balls[0].distance(points)
    search = _Search(network, images, balls[0].norm, generator, effort, score, sides)
    found = {
        side: [
            _best((sign * centre, images), (torch.where(distance <= ball.eps, sign * given, torch.nan), points))
            for ball in balls
        ]
        for side, sign in _SIGN.items()
    }
    known = [_joined([found[side][index] for side in sides]) for index in range(len(balls))]
    searched = search.nested(balls, known, points, distance)
    for place, own in enumerate(sides):
        found[own] = [(value.chunk(len(sides))[place], where.chunk(len(sides))[place]) for value, where in searched]
    return [
        Extremes(-negated, maximum, argmin, argmax)
        for (maximum, argmax), (negated, argmin) in zip(found["maximum"], found["minimum"], strict=True)
    ]


def _flipped(score: Tensor, accepted: Tensor, gamma: float) -> Tensor:
    """Whether a point is decided otherwise than its x; never where its score is not finite."""
    return torch.isfinite(score) & torch.where(accepted, score > gamma, score <= gamma)


def _distance(images: Tensor, points: Tensor, norm: Norm) -> Tensor:
    return Ball(images, torch.zeros_like(images.flatten(1)[:, 0]), norm).distance(points)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).flatten(1).sum(1)


def _walk(
    network: nn.Module,
    images: Tensor,
    accepted: Tensor,
    gamma: float,
    norm: Norm,
    points: Tensor,
    steps: int,
    rule: Score,
    closing: bool = False,
) -> MinimumNorm:
    """Walk along the level set towards x; a sample that gains nothing for a while is left alone and costs nothing.

    Closing steps go all the way: to the projection of x onto the hyperplane, where a piecewise linear score has its
    nearest flip.
    """
    best = torch.full_like(images.flatten(1)[:, 0], torch.inf)
    best_points, current, idle = images.clone(), points.clone(), torch.zeros_like(accepted, dtype=torch.long)
    sign, level = torch.where(accepted, 1, -1).to(images), rule.order_at(gamma)
    for _ in range(steps + 1):
        index = (idle < _PATIENCE).nonzero().squeeze(1)
        if not len(index):
            break
        x, y = images[index], current[index]
        score, gradient = _gradient(network, y, rule)
        flipped = _flipped(score, accepted[index], level)
        distance = _distance(x, y, norm)
        better = flipped & (distance < best[index])
        gained = (flipped & (distance < (1 - _GAIN) * best[index])) | torch.isinf(best[index])
        idle[index] = torch.where(gained, 0, idle[index] + 1)
        best[index[better]], best_points[index[better]] = distance[better], y[better]
        slope = gradient * _per_pixel(sign[index], x)
        wanted = sign[index] * (level - score) + _dot(slope, y)  # of slope . y' on the hyperplane
        y = _where(flipped, x + _PULL * (y - x), y)
        from_y, from_x = (onto(slope, start, wanted - _dot(slope, start), norm) for start in (y, x))
        near, far = (_distance(x, x + move, norm) for move in (from_y, from_x))
        weight = _per_pixel((near / (near + far).clamp(min=torch.finfo(near.dtype).tiny)).clamp(max=_TOWARDS_X), x)
        y = (1 - weight) * (y + _OVERSHOOT * from_y) + weight * (x + _OVERSHOOT * from_x)
        current[index] = (x + _TOUCH * from_x if closing else y).clamp(0, 1)
    return MinimumNorm(best, best_points)


def _shorten(
    network: nn.Module, images: Tensor, accepted: Tensor, gamma: float, norm: Norm, points: Tensor, rule: Score
) -> MinimumNorm:
    """Bisect the segments from x to the points for the nearest flipped decision; infinite radius where none is.

    A point that keeps its decision when it is moved by the last bisection's length is not bisected.
    """
    found = _flipped(_score(network, points, rule), accepted, gamma)
    best = _where(found, points, images)
    low, high = torch.zeros_like(found, dtype=images.dtype), torch.ones_like(found, dtype=images.dtype)
    index, middle = found.nonzero().squeeze(1), high - _BISECTED
    while len(index):
        x = images[index]
        candidates = x + (points[index] - x) * _per_pixel(middle[index], x)
        flipped = _flipped(_score(network, candidates, rule), accepted[index], gamma)
        best[index[flipped]] = candidates[flipped]
        high[index[flipped]], low[index[~flipped]] = middle[index[flipped]], middle[index[~flipped]]
        middle = (low + high) / 2
        index = index[(high - low)[index] > _BISECTED]
    distance = _distance(images, best, norm)
    return MinimumNorm(torch.where(found, distance, torch.inf), best)


def minimum_norm(
    network: nn.Module,
    images: Tensor,
    gamma: float,
    norm: Norm,
    generator: torch.Generator,
    effort: AttackEffort = DEFAULT,
    score: Score = ENERGY,
) -> MinimumNorm:
    r"""Upper bracket of the robust radius: the nearest point found whose decision S <= gamma differs from x's.

    Walks along the level set start from x, from climbs of one logit a round, and from random points at the best
    distance found so far; the last one starts from the worst point in a ball a little smaller than that distance. The
    best point of all is refined in float64. Every returned point was evaluated in float64
    and lies in the pixel box.

    Args:
        network: f in eval mode and float64.
        images: x, shape (B, C, H, W).
        gamma: Threshold.
        norm: Norm of the distance.
        generator: Random numbers of the starts.
        effort: How hard to search.
        score: S.

    Returns:
        Radii and points.

    Example:
        >>> layer = nn.Linear(2, 1, dtype=torch.float64)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[3.0, 4.0]])), layer.bias.zero_()
        >>> image = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)  # S = -3.5
        >>> found = minimum_norm(nn.Sequential(nn.Flatten(), layer).eval(), image, -3.0, "l2", torch.Generator())
        >>> found.radius.round(decimals=6)
        tensor([0.1000], dtype=torch.float64)
    """
    check_eval(network)
    with torch.no_grad():
        logits = network(images)
    accepted, ranking = score.value(logits) <= gamma, logits.argsort(1, descending=True)
    search, coarse, limit = _single(network), images.float(), largest_eps(images.shape[1:], norm)
    best, points = torch.full_like(coarse.flatten(1)[:, 0], torch.inf), coarse

    def walk(starts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        count, begin = len(starts), torch.cat(list(starts))
        found = _walk(search, _repeat(coarse, count), accepted.repeat(count), gamma, norm, begin, effort.steps, score)
        nearest, nearest_points = best, points
        for radius, candidates in zip(found.radius.chunk(count), found.points.chunk(count), strict=True):
            nearer = radius < nearest
            nearest, nearest_points = torch.where(nearer, radius, nearest), _where(nearer, candidates, nearest_points)
        return nearest, nearest_points

    for turn in range(effort.rounds):
        climbs = Ball(coarse, (_REACH * best).clamp(max=limit), norm)
        starts = [
            _climb(search, climbs, ranking[:, (turn - 1) % ranking.shape[1]], score, coarse, range(_CLIMB))
            if turn
            else coarse
        ]
        around = Ball(coarse, best.clamp(max=limit), norm)
        starts += [_random_points(around, generator) for _ in range(effort.restarts)]
        best, points = walk(starts)
    smaller = Ball(coarse, (_SQUEEZE * best).clamp(max=limit), norm)
    sign = torch.where(accepted, 1, -1).to(coarse)
    best, points = walk([_ascend(search, smaller, sign, smaller.project(points), effort.steps, score)[0]])
    refined = _walk(network, images, accepted, gamma, norm, points.to(images), _POLISH, score)
    closed = _walk(network, images, accepted, gamma, norm, refined.points, _CLOSING, score, closing=True)
    return _shorten(network, images, accepted, gamma, norm, closed.points, score)
