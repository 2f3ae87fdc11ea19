"""Networks in which hidden units cancel, their values in rational arithmetic, and a search for a bound that misses one.

    python -m tests.bounds.cancellation --seconds 300

climbs, from many starts, towards networks, balls and points at which an exact or a float64 value of a row of the logits
lies as far outside of its bounds as possible, in units of what the bounds leave for rounding; 0 and more is a violation.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from grood_cert.ball import Ball
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.errors import RunError
from grood_cert.networks.capture import capture

SHAPE = 1, 1, 3
_METHODS = "ibp", "crown-ibp", "crown"
_ROWS = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]], dtype=torch.float64)


def cancelling(seed: int, scale: float, classes: int = 2) -> nn.Sequential:
    """Pairs of units of the given size, of which the next layer reads the differences."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first, second, last = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(4, classes)
    network = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last).double().eval()
    weight, bias, spread = normal(4, 3) * scale, normal(4) * scale + 5 * scale, normal(4, 4)
    with torch.no_grad():
        first.weight.copy_(torch.cat([weight, weight + normal(4, 3)]))
        first.bias.copy_(torch.cat([bias, bias + normal(4)]))
        second.weight.copy_(torch.cat([-spread, spread], 1))
        second.bias.copy_(normal(4))
        last.weight.copy_(normal(classes, 4))
        last.bias.copy_(normal(classes))
    return network


def exactly(network: nn.Sequential, image: Tensor) -> tuple[list[Fraction], list[Fraction]]:
    """The logits in rational arithmetic, and the gradient of the first one."""
    values = [Fraction(value) for value in image.flatten().tolist()]
    count = len(values)
    gradient = [[Fraction(int(i == j)) for j in range(count)] for i in range(count)]
    for layer in network:
        if isinstance(layer, nn.Linear):
            weight = [[Fraction(entry) for entry in row] for row in layer.weight.tolist()]
            gradient = [
                [sum((w * part[j] for w, part in zip(row, gradient, strict=True)), Fraction(0)) for j in range(count)]
                for row in weight
            ]
            bias = [Fraction(entry) for entry in layer.bias.tolist()]
            values = [
                sum((w * v for w, v in zip(row, values, strict=True)), b) for row, b in zip(weight, bias, strict=True)
            ]
        elif isinstance(layer, nn.ReLU):
            nothing = [Fraction(0)] * count
            gradient = [part if value > 0 else nothing for part, value in zip(gradient, values, strict=True)]
            values = [max(value, Fraction(0)) for value in values]
    return values, gradient[0]


def points(ball: Ball) -> list[Tensor]:
    """The centre and the corners of a ball of one image."""
    signs = [(0.0, 0.0, 0.0), *itertools.product((-1.0, 1.0), repeat=3)]
    steps = [torch.tensor(step, dtype=torch.float64).reshape(1, *SHAPE) for step in signs]
    return [torch.minimum(torch.maximum(ball.center + ball.eps * step, ball.lower), ball.upper) for step in steps]


def excess(value: Fraction, lower: float, upper: float) -> Fraction:
    """How far an exact number lies outside of bounds; exact itself, negative inside."""
    return max(Fraction(lower) - value, value - Fraction(upper))


def worst(network: nn.Sequential, ball: Ball, methods: Sequence[str] = _METHODS) -> float:
    """The largest excess of any row at any point, in units of the margin for rounding of its bound at the centre."""
    graph, found = capture(network, SHAPE), -1.0
    values = []
    for point in points(ball):
        with torch.no_grad():
            rounded = [Fraction(value) for value in network(point)[0].tolist()]
        (one, two), _ = exactly(network, point)
        values.append((one, two, one - two, *rounded))
    for method in methods:
        bounded = NativeNetwork(network, SHAPE, method, graph=graph)  # type: ignore[arg-type]
        narrow = bounded.relax(Ball(ball.center, 0 * ball.eps, ball.norm)).rows(_ROWS)
        ends = [
            list(zip(*(end[0].tolist() for end in pair), strict=True))
            for pair in (bounded.relax(ball).rows(_ROWS), narrow)
        ]
        for group in values:
            for value, pair, (low, high) in zip(group, (*ends[0], *ends[0]), (*ends[1], *ends[1]), strict=False):
                if pair[0] == pair[0]:
                    found = max(found, float(excess(value, *pair)) / max((high - low) / 2, 1e-300))
    return found


def _moved(network: nn.Sequential, generator: torch.Generator, step: float) -> nn.Sequential:
    """The network with some numbers changed by a factor."""
    changed = nn.Sequential(
        *(nn.Linear(m.in_features, m.out_features).double() if isinstance(m, nn.Linear) else m for m in network)
    )
    changed.load_state_dict(network.state_dict())
    with torch.no_grad():
        for parameter in changed.parameters():
            chosen = torch.rand(parameter.shape, generator=generator) < 0.2
            factor = 1 + step * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(torch.where(chosen, factor, torch.ones_like(factor)))
    return changed.eval()


def search(seconds: float, seed: int = 0) -> tuple[float, int]:
    """The largest excess that was climbed to, and how many networks and balls were looked at."""
    generator, deadline, best, count = torch.Generator().manual_seed(seed), time.monotonic() + seconds, -1.0, 0
    while time.monotonic() < deadline:
        scale = 10 ** float(torch.rand(1, generator=generator) * 8)
        network = cancelling(int(torch.randint(10**6, (1,), generator=generator)), scale)
        image = torch.rand(1, *SHAPE, generator=generator, dtype=torch.float64)
        eps = torch.tensor(
            [(0.0, 1e-12, 1e-6, 1e-2)[int(torch.randint(4, (1,), generator=generator))]], dtype=torch.float64
        )
        found, step = -1.0, 0.3
        for _ in range(15):
            candidate = _moved(network, generator, step)
            moved = (image + step * torch.randn(image.shape, generator=generator, dtype=torch.float64) * 0.1).clamp(
                0, 1
            )
            try:
                value = worst(candidate, Ball(moved, eps, "linf"))
            except RunError:  # nothing is left of the logits: refused
                continue
            count += 1
            if value > found:
                found, network, image = value, candidate, moved
            else:
                step *= 0.8
        best = max(best, found)
    return best, count


def main() -> int:
    """Search, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    best, count = search(arguments.seconds, arguments.seed)
    print(f"{count} networks and balls; largest excess {best:.3g} margins ({'a violation' if best > 0 else 'inside'})")
    return int(best > 0)


if __name__ == "__main__":
    sys.exit(main())
