r"""Small properties as `grood-cert vnnlib` writes them, Marabou's verdicts on them, and ours.

A property says: c . f is on the wrong side of t somewhere in the box. Ours may be wrong in three ways, each of which
would show:

    we bound c . f on the right side of t everywhere, and Marabou has a point of the box where it is not;
    we certify S on the ball, and Marabou has a point where S crosses gamma;
    Marabou finds no point, and our attack has one where S crosses gamma.

Marabou is known for counterexamples that are none, so each is evaluated anew in float64 and believed only then.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from grood_cert.ball import Ball
from grood_cert.bounds.engine import BoundedNetwork
from grood_cert.certification.cascade import Cascade, Certificates
from grood_cert.certification.settings import Settings
from grood_cert.data.tensors import image_set
from grood_cert.detector import Detector
from grood_cert.errors import InputError
from grood_cert.runs import certify as certification
from grood_cert.runs import vnnlib
from grood_cert.runs.batches import generator
from grood_cert.runs.vnnlib import Instance, Specification
from grood_cert.scores import Energy

SIDE = 3
_EPS = (0.04, 0.1, 0.2)
_CLOSE = 1e-5  # Marabou's numbers are float32 and its own tolerance is 1e-6
_STAGES = ("crown", "alpha-crown", "branch-and-bound")


def _dense(classes: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(SIDE**2, 8), nn.ReLU(), nn.Linear(8, classes)]


NETWORKS = {
    "dense": _dense,
    "deep": lambda classes: [*_dense(6)[:-1], nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, classes)],
    "leaky": lambda classes: [*_dense(6)[:-2], nn.LeakyReLU(0.2), nn.Linear(8, classes)],
    "conv": lambda classes: [nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, classes)],
    "maximum": lambda classes: [nn.Conv2d(1, 2, 2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, classes)],
    "strided": lambda classes: [
        nn.Conv2d(1, 3, 2, stride=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, classes),
    ],
}


@dataclass(frozen=True)
class Case:
    """One property and what each side says of it.

    Attributes:
        name: Of the property.
        exact: Whether the property is violated exactly where S is on the wrong side: ID, one logit.
        bounded: Whether our bound of c . f proves that it is never violated.
        certified: Whether our stages certify the ball.
        attacked: Whether our attack has a point where S crosses gamma.
        verdict: Marabou's: "unsat", "sat" or what else it says.
        violated: Whether its counterexample violates the property in float64, up to 1e-5: it likes to stop on the border.
        outside: Whether c . f or S there, in float64, lies outside of our bounds on the ball.
        crossed: Whether S crosses gamma there, beyond 1e-5.
    """

    name: str
    exact: bool
    bounded: bool
    certified: bool
    attacked: bool
    verdict: str
    violated: bool
    outside: bool
    crossed: bool

    @property
    def disagreement(self) -> str:
        """What contradicts what; empty if nothing does."""
        if self.outside:
            return "Marabou's point is outside of our bounds"
        if self.crossed and self.certified:
            return "Marabou's point crosses gamma in a ball that we certify"
        if self.violated and self.bounded:
            return "Marabou violates what our bound of c . f proves"
        if self.exact and self.certified and self.violated:
            return "Marabou violates a property that is exact, in a ball that we certify"
        if self.verdict == "unsat" and self.attacked:
            return "Marabou finds no point and our attack has one"
        return ""


def detector_of(seed: int, name: str, classes: int, temperature: float = 1.0) -> tuple[Detector, Tensor]:
    """A random network whose numbers are float32, with gamma amid the scores of its images, and these."""
    torch.manual_seed(seed)
    network = nn.Sequential(*NETWORKS[name](classes)).eval()
    with torch.no_grad():
        list(network.parameters())[-2].mul_(3)
    network = network.double().requires_grad_(False)
    images = torch.rand(6, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    detector = Detector(network, 0.0, (1, SIDE, SIDE), score=Energy(temperature))
    scores = detector.scores(images).sort()[0]
    return Detector(network, float(scores[2:4].mean()), (1, SIDE, SIDE), score=Energy(temperature)), images


def cases(seed: int, name: str, classes: int, folder: Path, temperature: float = 1.0) -> list[Case]:
    """Export what intervals leave open of one detector, and ask both sides."""
    detector, images = detector_of(seed, name, classes, temperature)
    folder.mkdir(parents=True)
    model = folder / "model.pt"
    detector.save(model)
    accepted = detector.predict(images).accepted
    sets = [image_set(images[accepted], "id", "id"), image_set(images[~accepted], "other", "ood")]
    weak = Settings(_EPS, stages=("ibp",), effort="fast", engine="native")
    table = certification.run(detector, model, sets, weak, folder)
    table.columns["radius_attack"] = np.full(len(table), np.inf)  # so that balls with a flip are exported as well
    cascade = Cascade(detector, Settings(_EPS, stages=_STAGES, engine="native"))
    ours = [cascade.certify(part.images.double(), part.kind, generator(seed, 0)) for part in sets]
    bounded = cascade.choice.bounded
    found = []
    for place, eps in enumerate(_EPS):
        try:
            instances = vnnlib.export(detector, model, table, sets, bounded, eps, folder / f"{eps}", limit=6)
        except InputError as error:
            assert "no sample is undecided" in str(error)
            continue
        for instance in instances:
            number = int(instance.kind != "id")
            ball = Ball(sets[number].images[instance.index][None].double(), eps, "linf")
            verdict, point = solve(folder / f"{eps}" / "model.onnx", folder / f"{eps}" / f"{instance.name}.vnnlib")
            answer = _Ours(detector, instance, ours[number], place, _row_bounds(bounded, instance.specification, ball))
            found.append(
                answer.case(
                    f"{folder.name}/{instance.name}", classes == 1 and instance.kind == "id", ball, verdict, point
                )
            )
    return found


def _row_bounds(network: BoundedNetwork, specification: Specification, ball: Ball) -> tuple[float, float]:
    """Our bounds of c . f on the ball."""
    row = torch.tensor(specification.row, dtype=torch.float64)
    lower, upper = network.relax(ball).rows(row[None, None])
    return float(lower), float(upper)


@dataclass(frozen=True)
class _Ours:
    """What we say of one ball: certificates of all balls, the place of its eps, and bounds of c . f."""

    detector: Detector
    instance: Instance
    found: Certificates
    place: int
    row: tuple[float, float]

    def case(self, name: str, exact: bool, ball: Ball, verdict: str, point: list[float] | None) -> Case:
        """Together with Marabou's verdict, and what its counterexample is worth in float64."""
        spec, index = self.instance.specification, self.instance.index
        below = spec.relation == "<="
        violated = outside = crossed = False
        if point is not None:
            inside = ball.project(torch.tensor(point, dtype=torch.float64).reshape(ball.center.shape))
            value = float(self.detector.network(inside)[0] @ torch.tensor(spec.row, dtype=torch.float64))
            score = float(self.detector.scores(inside))
            s_lb, s_ub = (float(bound[index, self.place]) for bound in (self.found.s_lb, self.found.s_ub))
            outside = not (self.row[0] <= value <= self.row[1]) or score < s_lb or score > s_ub
            violated = (spec.threshold - value if below else value - spec.threshold) > -_CLOSE
            beyond = score - self.detector.gamma
            crossed = beyond > _CLOSE if self.instance.kind == "id" else beyond < -_CLOSE
        return Case(
            name=name,
            exact=exact,
            bounded=self.row[0] > spec.threshold if below else self.row[1] < spec.threshold,
            certified=self.found.outcomes[index][self.place].certifies,
            attacked=bool(self.found.radius_attack[index] <= ball.eps[0]),
            verdict=verdict,
            violated=violated,
            outside=outside,
            crossed=crossed,
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Without what a library prints from C++; its own redirection never gives the output back."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def solve(network: Path, text: Path) -> tuple[str, list[float] | None]:
    """Marabou's verdict on a property, which it reads itself, and the inputs of its counterexample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # readers that it lacks packages for
        from maraboupy import Marabou, MarabouCore, MarabouNetworkONNX

        read = MarabouNetworkONNX.MarabouNetworkONNX(str(network))
        query = read.getInputQuery()
        options = Marabou.createOptions(verbosity=0, timeoutInSeconds=20)
        with _silent():
            MarabouCore.loadProperty(query, str(text))
            word, values, _ = MarabouCore.solve(query, options)
        return word, [values[int(variable)] for variable in read.inputVars[0].flatten()] if word == "sat" else None


def campaign(seeds: Iterable[int], folder: Path) -> Iterator[Case]:
    """The properties of each network with one logit and with three, for each seed; every third has another temperature."""
    for seed in seeds:
        for name in NETWORKS:
            for classes in (1, 3):
                own = folder / f"{name}-{classes}-{seed}"
                yield from cases(seed, name, classes, own, 0.5 if seed % 3 == 2 else 1.0)
