r"""Making and reading planted networks, in the manner of SoundnessBench (Zhou et al., 2024, arXiv 2412.03154).

Around an image x a network is trained on two things at once, with m the score beyond gamma, m > 0 where it flips:

    m(x*) >= margin                               at one planted point x* of the ball
    m(y)  <= -margin                              at points y that an attack has climbed to, but for those close to x*

It starts from a unit that is active close to x* only, so that no gradient leads there. A network is kept if the flip is
one in float64, and neither projected gradient ascent with many restarts nor our own attack finds any flip in the ball.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from grood_cert import attacks, detector
from grood_cert.ball import Ball, Norm
from grood_cert.detector import Detector
from grood_cert.scores import energy

DATA = Path(__file__).parent / "data"
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}
_MARGIN = 0.3
_CLOSE = 0.25  # of the distance from x to x*: closer to it nothing is asked
_CLASSES = 3
_WIDTH = 14
_SLOPE = 16.0  # of the first units, over the way from x to x*
_AWAKE = 0.87  # share of the way from which the first of them is active
_FAR = 1.6  # radius of the larger ball over that of the ball


@dataclass(frozen=True)
class Recipe:
    """What to make.

    Attributes:
        kind: "id": x is accepted, x* rejected; "ood": the other way round.
        norm: Of the ball.
        architecture: "mlp", "deep" (two hidden layers) or "conv".
        activation: Name in `ACTIVATIONS`.
        eps: Radius of the ball.
        side: Height and width of the image, of one channel.
    """

    kind: Literal["id", "ood"]
    norm: Norm
    architecture: str
    activation: str
    eps: float
    side: int = 4

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.kind}-{self.norm}-{self.architecture}-{self.activation}"


@dataclass(frozen=True)
class Planted:
    """A network with a hidden flip.

    Attributes:
        recipe: What it was made from.
        detector: Network and gamma.
        image: x, shape (1, 1, H, W), float64.
        point: x*, the same shape; in the ball, and of the other decision.
    """

    recipe: Recipe
    detector: Detector
    image: Tensor
    point: Tensor

    @property
    def distance(self) -> float:
        """||x* - x|| in the norm of the ball."""
        return float(Ball(self.image, 0.0, self.recipe.norm).distance(self.point))


RECIPES = [
    Recipe(kind, norm, architecture, activation, 0.25 if norm == "linf" else 0.9)
    for architecture, activation in (
        *(("mlp", "relu"), ("mlp", "leaky"), ("conv", "relu"), ("mlp", "tanh"), ("deep", "relu")),
        *(("mlp", "silu"), ("conv", "gelu")),
    )
    for kind in ("id", "ood")
    for norm in ("linf", "l2")
]


def _layers(recipe: Recipe) -> tuple[nn.Sequential, nn.Linear, nn.Linear]:
    """The layers before the last hidden one, that one, and the head."""
    act, pixels = ACTIVATIONS[recipe.activation], recipe.side**2
    if recipe.architecture == "conv":
        front = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), act(), nn.Flatten())
        width = 3 * ((recipe.side + 1) // 2) ** 2
    elif recipe.architecture == "deep":
        front, width = nn.Sequential(nn.Flatten(), nn.Linear(pixels, _WIDTH), act()), _WIDTH
    else:
        front, width = nn.Sequential(nn.Flatten()), pixels
    return front, nn.Linear(width, _WIDTH), nn.Linear(_WIDTH, _CLASSES)


def _furthest(recipe: Recipe, values: nn.Module, row: Tensor, image: Tensor) -> Tensor:
    """A point of the ball at which row . values is largest, as far as projected gradient ascent finds it."""
    ball, points = Ball(image, 0.97 * recipe.eps, recipe.norm), image
    for _ in range(60):
        inputs = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((values(inputs) @ row).sum(), inputs)
        points = ball.project(points + 0.2 * recipe.eps * _step(recipe, gradient))
    return points.detach().float().double()


def _step(recipe: Recipe, gradient: Tensor) -> Tensor:
    if recipe.norm == "linf":
        return gradient.sign()
    return gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None, None]


def _excess(recipe: Recipe, network: nn.Module, points: Tensor, gamma: float) -> Tensor:
    """m: how far the score is on the wrong side."""
    beyond = energy(network(points)) - gamma
    return beyond if recipe.kind == "id" else -beyond


def ascend(
    recipe: Recipe, network: nn.Module, image: Tensor, gamma: float, starts: int, steps: int, seed: int
) -> Tensor:
    """Projected gradient ascent of m from random points: the best one of each, shape (starts, 1, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    ball = Ball(image.expand(starts, -1, -1, -1), recipe.eps, recipe.norm)
    noise = 2 * torch.rand(ball.center.shape, dtype=torch.float64, generator=generator) - 1
    if recipe.norm == "l2":
        noise = noise / noise.flatten(1).norm(dim=1)[:, None, None, None]
    points = ball.project(image + recipe.eps * noise)
    best, best_points = torch.full((starts,), -torch.inf, dtype=torch.float64), points
    for step in range(steps):
        inputs = points.detach().requires_grad_()
        value = _excess(recipe, network, inputs, gamma)
        (gradient,) = torch.autograd.grad(value.sum(), inputs)
        better = (value > best).detach()
        best = torch.where(better, value.detach(), best)
        best_points = torch.where(better[:, None, None, None], points, best_points)
        length = recipe.eps * (0.5 if step < steps // 2 else 0.1)
        points = ball.project(points + length * _step(recipe, gradient))
    return best_points


def train(recipe: Recipe, seed: int, steps: int = 40) -> Planted:
    """Train one network; whether attacks find the flip is not asked here."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    image = 0.4 + 0.2 * torch.rand(1, 1, recipe.side, recipe.side, dtype=torch.float64, generator=generator)
    image = image.float().double()
    act, reach = ACTIVATIONS[recipe.activation](), 0.0
    while not reach > 0.1:  # dead features lead nowhere
        front, hidden, head = (part.double() for part in _layers(recipe))
        row = torch.randn(hidden.in_features, dtype=torch.float64, generator=generator)
        point = _furthest(recipe, front, row, image)
        with torch.no_grad():
            start = float(front(image)[0] @ row)
            reach = float(front(point)[0] @ row) - start
    network = nn.Sequential(*front, hidden, act, head)
    gap, score = Ball(image, 0.0, recipe.norm).distance(point), float(energy(network(image)).detach())
    with torch.no_grad():
        head.weight[:, :2] = 0.0
    wide = replace(recipe, eps=1.0 if recipe.norm == "linf" else 2.0)
    elsewhere = ascend(wide, network, image, score, 30, 20, seed)
    with torch.no_grad():  # two units that awake close to x* alone: the score goes up there, and no further
        margin = float(_excess(recipe, network, elsewhere, score).max()) + _MARGIN
        gamma = score + margin if recipe.kind == "id" else score - margin
        height = float(act(torch.tensor(_SLOPE * (1 - _AWAKE))) - act(torch.tensor(0.0)))
        for unit, (level, sign) in enumerate([(_AWAKE, 1.0), (1.0, -1.0)]):
            hidden.weight[unit] = _SLOPE * row / reach
            hidden.bias[unit] = -_SLOPE * (start / reach + level)
            head.weight[:, unit] = (-sign if recipe.kind == "id" else sign) * (margin + 2 * _MARGIN) / height
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    window: list[Tensor] = []
    for step in range(steps):
        if step % 2 == 0:
            wider = replace(recipe, eps=recipe.eps * (_FAR if step % 4 else 1.0))
            window = [*window[-15:], ascend(wider, network, image, gamma, 12, 10, 1000 * seed + step)]
        found = torch.cat(window)
        away = Ball(point.expand(len(found), -1, -1, -1), 0.0, recipe.norm).distance(found) > _CLOSE * gap
        wrong = (_excess(recipe, network, found, gamma) + _MARGIN).relu() * away
        planted = (_MARGIN - _excess(recipe, network, point, gamma)).relu()
        center = (_excess(recipe, network, image, gamma) + 2 * _MARGIN).relu()
        loss = 3 * planted.sum() + wrong.mean() + wrong.max() + center.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    single = network.float().double().eval().requires_grad_(False)  # numbers that float32 holds, for a small file
    return Planted(recipe, Detector(single, gamma, (1, recipe.side, recipe.side)), image, point)


def flips(planted: Planted, points: Tensor) -> Tensor:
    """Which points have another decision than x ought to, evaluated in float64."""
    score = planted.detector.scores(points)
    return score > planted.detector.gamma if planted.recipe.kind == "id" else score <= planted.detector.gamma


def missed(planted: Planted, starts: int = 200, seed: int = 0) -> dict[str, bool]:
    """Which attacks find no flip in the ball: our two, and projected gradient ascent with restarts."""
    recipe, network, gamma = planted.recipe, planted.detector.network, planted.detector.gamma
    ball = Ball(planted.image, recipe.eps, recipe.norm)
    generator = torch.Generator().manual_seed(seed)
    nearest = attacks.minimum_norm(network, planted.image, gamma, recipe.norm, generator)
    (extremes,) = attacks.extremes(network, [ball], generator)
    extreme = extremes.argmax if recipe.kind == "id" else extremes.argmin
    climbed = ascend(recipe, network, planted.image, gamma, starts, 40, seed)
    return {
        "minimum norm": bool(nearest.radius > recipe.eps),
        "extremes": not bool(flips(planted, extreme)),
        "gradient ascent": not bool(flips(planted, climbed).any()),
    }


def is_planted(planted: Planted) -> bool:
    """Whether x is decided rightly, and x* is in the ball and flips, by a margin."""
    within = planted.distance <= planted.recipe.eps and bool(((planted.point >= 0) & (planted.point <= 1)).all())
    sign = 1 if planted.recipe.kind == "id" else -1
    beyond = sign * (planted.detector.scores(planted.point) - planted.detector.gamma)
    return within and not bool(flips(planted, planted.image)) and float(beyond) > 0.05


def save(planted: Sequence[Planted], folder: Path = DATA) -> None:
    """Write NAME.pt for each, checkpoints as any other, and planted.json with recipes, images and points."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for one in planted:
        one.detector.save(folder / f"{one.recipe.name}.pt")
        numbers = {"image": one.image.flatten().tolist(), "point": one.point.flatten().tolist()}
        records.append(asdict(one.recipe) | numbers)
    (folder / "planted.json").write_text(json.dumps(records, indent=0) + "\n", encoding="utf-8")


def load(folder: Path = DATA) -> list[Planted]:
    """Read what `save` wrote."""
    found = []
    for record in json.loads((folder / "planted.json").read_text(encoding="utf-8")):
        shape = 1, 1, record["side"], record["side"]
        image, point = (torch.tensor(record.pop(key), dtype=torch.float64).reshape(shape) for key in ("image", "point"))
        recipe = Recipe(**record)
        found.append(Planted(recipe, detector.load(folder / f"{recipe.name}.pt"), image, point))
    return found


def make(recipe: Recipe, tries: int) -> Planted | None:
    """The first network of up to so many whose flip the attacks miss; None if there is none."""
    for seed in range(1, tries + 1):
        if not missed(train(recipe, seed, steps=0), starts=20)["minimum norm"]:
            continue
        found = train(recipe, seed)
        if is_planted(found) and all(missed(found).values()):
            return found
    return None
