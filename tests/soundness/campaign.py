"""One network after another: which stages it meets, which points and oracles are held against them, and the counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, export

from grood_cert.ball import Ball, largest_eps
from grood_cert.bounds.engine import METHODS, lirpa_version
from grood_cert.errors import InputError, RunError, SoundnessError
from grood_cert.lipschitz.bound import METHODS as LIPSCHITZ
from grood_cert.networks.activations import LeakyReLU
from grood_cert.networks.capture import capture, live_graph
from grood_cert.scores import MSP, Energy, MaxLogit, Score
from tests.soundness.balls import extreme_points, pulled_in, random_balls, random_points
from tests.soundness.claims import Claim, Options, Subject, claims_of, onnx_copy
from tests.soundness.comparison import Evidence, Tally, Violation, compare
from tests.soundness.exact import truths
from tests.soundness.networks import FAMILY, Dice, Made, dressed, random_network
from tests.soundness.reproduction import Reproduction

SCORES: tuple[Score, ...] = (
    Energy(),
    Energy(0.1),
    Energy(2.0),
    Energy(100.0),
    MaxLogit(),
    MSP(),
    MSP(5.0),
)
_BALLS = 4
SHARES = {
    "alpha": 0.1,
    "branched": 0.12,
    "lipschitz": 0.2,
    "corners": 0.3,
    "cascade": 0.03,
    "auto_lirpa": 0.05,
    "onnx": 0.05,
    "capture": 0.05,
    "program": 0.02,
    "MILP": 0.3,
}


@dataclass
class Counts:
    """What a campaign did.

    Attributes:
        networks: Captured networks by profile.
        refused: Networks and stages that the package refused, by message.
        errors: Exceptions that are no refusal, by message.
        balls: Balls by norm.
        points: Points.
        oracles: Comparisons with exact extremes, by oracle.
        reached: Of these, how many bounds lie within 1e-6 of the truth.
        tally: Claims by stage and score.
        violations: What contradicted them.
        seconds: CPU seconds by stage.
    """

    networks: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    balls: Counter[str] = field(default_factory=Counter)
    points: int = 0
    oracles: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    tally: Tally = field(default_factory=Tally)
    violations: list[Reproduction] = field(default_factory=list)
    seconds: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        """Sum up."""
        for name in ("networks", "refused", "errors", "balls", "oracles", "reached", "seconds"):
            getattr(self, name).update(getattr(other, name))
        self.points += other.points
        self.tally.add(other.tally)
        self.violations += other.violations

    @property
    def failed(self) -> bool:
        """Whether anything was wrong."""
        return bool(self.violations or self.errors)


class _Trial:
    """One network of the campaign."""

    def __init__(self, seed: int, number: int, made: Made, counts: Counts, shares: Mapping[str, float]) -> None:
        self.dice = Dice("trial", seed, number)
        self.seed, self.number, self.counts, self.shares = seed, number, counts, shares
        self.made = made

    def chosen(self, what: str) -> bool:
        """Whether a share of the networks meets this, and this one belongs to it."""
        return self.dice.chance(self.shares[what])

    def run(self) -> None:
        """Capture the network and hold every claim about it against points."""
        subject = self._captured()
        if subject is None:
            return
        self.counts.networks[self.made.profile] += 1
        ball = random_balls(self.dice, self.made.shape, _BALLS)
        self.counts.balls[ball.norm] += len(ball.center)
        scores = [self.dice.pick(*SCORES)]
        evidence, exact = self._evidence(subject, ball, scores)
        self._same_function(subject, evidence, scores[0])
        for score in scores:
            for stage, options in self._stages(subject, evidence, score):
                self._claims(stage, subject, ball, score, options, evidence, exact.get(str(score), []))
        if self.chosen("onnx"):
            self._copy(subject, ball, scores[0], evidence)

    def _same_function(self, subject: Subject, evidence: Evidence, score: Score) -> None:
        """The graph, which all claims are about, is the network, on every point of the evidence."""
        same = subject.graph.agrees(evidence.points.flatten(0, 1), evidence.logits.flatten(0, 1))
        for place in (~same).nonzero().flatten().tolist()[:1]:
            point = evidence.points.flatten(0, 1)[place]
            wrong = Violation("capture", "graph", place % len(evidence.ball.center), point, 0.0, 0.0, 0.0)
            self._keep(wrong, "linear", subject, evidence.ball, score, {})

    def _captured(self) -> Subject | None:
        network: Any = self.made.network
        try:
            if self.chosen("program"):
                program = export(
                    network,
                    (torch.full((3, *self.made.shape), 0.5, dtype=torch.float64),),
                    dynamic_shapes=({0: Dim("batch")},),
                    strict=False,
                )
                network = program.run_decompositions() if self.dice.chance(0.5) else program
                graph = capture(network, self.made.shape)
            elif self.chosen("capture"):
                graph = capture(network, self.made.shape)
            else:  # the same way in, exported once for all networks of a family
                graph = live_graph(network, self.made.shape)
        except (InputError, RunError) as error:
            self.counts.refused[_short(error)] += 1
            return None
        return Subject(self.made.network, graph)

    def _evidence(self, subject: Subject, ball: Ball, scores: list[Score]) -> tuple[Evidence, dict[str, list[Any]]]:
        """Points of all kinds, those of oracles last; and what is known exactly, by score."""
        started = time.process_time()
        points = random_points(self.dice, ball, 10)
        found = [points]
        for score in scores:
            found.append(extreme_points(self.dice, ball, subject.graph, score, points))
        exact: dict[str, list[Any]] = {}
        milps = self.chosen("MILP")
        for score in scores:
            exact[str(score)] = truths(subject.graph, ball, score, milps)
            found += [pulled_in(ball, truth.points) for truth in exact[str(score)]]
        evidence = Evidence(subject, ball, torch.cat(found))
        self.counts.points += evidence.points.shape[0] * evidence.points.shape[1]
        self.counts.seconds["points"] += time.process_time() - started
        return evidence, exact

    def _stages(self, subject: Subject, evidence: Evidence, score: Score) -> list[tuple[str, Options]]:
        """The stages that this network meets, with their options."""
        graph, dice = subject.graph, self.dice
        rows = torch.cat([torch.eye(graph.classes, dtype=torch.float64)[:3], dice.normal(1, graph.classes)])
        found: list[tuple[str, Options]] = [
            ("linear", {"engine": "native", "method": method, "rows": rows}) for method in METHODS
        ]
        found += [("linear", {"engine": "native float32", "method": method, "rows": rows}) for method in METHODS]
        if self.chosen("auto_lirpa") and lirpa_version() is not None:
            found += [("linear", {"engine": "auto_lirpa", "method": method, "rows": rows}) for method in METHODS]
        if self.chosen("alpha"):
            found.append(("alpha", {"steps": dice.integer(0, 6), "hidden steps": dice.pick(0, 0, 2)}))
        if self.chosen("lipschitz"):
            found.append(("lipschitz", {"methods": LIPSCHITZ if self.chosen("corners") else LIPSCHITZ[:-1]}))
        leaky = all(isinstance(graph.nodes[i].operation, LeakyReLU) for i in graph.nonlinear)
        values = evidence.score(score)
        if graph.nonlinear and leaky and self.chosen("branched"):
            for side in ("upper", "lower"):
                extreme = values.amax(0) if side == "upper" else -values.amin(0)
                width = float((values.amax(0) - values.amin(0)).amax())
                reach = float(extreme[dice.integer(0, len(extreme) - 1)])
                gamma = reach + dice.pick(-0.1, 1e-9, 0.01, 0.1, 0.5) * width
                options = {
                    "side": side,
                    "gamma": gamma if side == "upper" else -gamma,
                    "nodes": dice.pick(1, 3, 8, 24),
                    "steps": dice.integer(0, 4),
                }
                found.append(("branched", options))
        if self.chosen("cascade"):
            found.append(("cascade", self._cascade(subject, evidence, values)))
        return found

    def _cascade(self, subject: Subject, evidence: Evidence, values: Tensor) -> Options:
        ball, dice = evidence.ball, self.dice
        kind, limit = dice.pick("id", "ood"), largest_eps(subject.graph.shape, ball.norm)
        share = dice.number(0, 1)
        reach = values.amax(0) if kind == "id" else values.amin(0)
        gamma = float((values[0] + share * 1.2 * (reach - values[0])).median())
        eps = sorted({min(float(eps), limit) for eps in ball.eps if eps > 0}) or [limit]
        refining = ["lipschitz", "alpha-crown"]
        if subject.graph.nonlinear and all(
            isinstance(subject.graph.nodes[i].operation, LeakyReLU) for i in subject.graph.nonlinear
        ):
            refining.append("branch-and-bound")
        stages = ["ibp", "crown", *[stage for stage in refining if dice.chance(0.6)]]
        return {
            "gamma": gamma,
            "kind": kind,
            "eps": eps,
            "stages": stages,
            "effort": "fast",
            "seed": dice.seed(),
        }

    def _claims(
        self,
        stage: str,
        subject: Subject,
        ball: Ball,
        score: Score,
        options: Options,
        evidence: Evidence,
        exact: list[Any],
    ) -> None:
        """Run a stage and compare."""
        started = time.process_time()
        try:
            claims = claims_of(stage, subject, ball, score, options)
        except (InputError, RunError) as error:
            self.counts.refused[f"{stage}: {_short(error)}"] += 1
            return
        except SoundnessError as error:
            point = torch.from_numpy(next(iter(error.evidence.values()))[0])
            wrong = Violation(stage, "its own attack", 0, point, 0.0, 0.0, 0.0)
            self._keep(wrong, stage, subject, ball, score, options)
            return
        except Exception as error:  # noqa: BLE001 (whatever it is, it is counted and makes the campaign fail)
            self.counts.errors[f"{stage}: {type(error).__name__}: {_short(error)} (network {self.number})"] += 1
            return
        self.counts.seconds[stage] += time.process_time() - started
        started = time.process_time()
        for claim in claims:
            held = self._within_radius(claim, subject, ball, score) if claim.kind.startswith("radius") else evidence
            if held is None:
                continue
            for wrong in compare(claim, held, score, self.counts.tally):
                self._keep(wrong, stage, subject, ball, score, options)
            self._count_exact(claim, exact)
        self.counts.seconds["comparison"] += time.process_time() - started

    def _within_radius(self, claim: Claim, subject: Subject, ball: Ball, score: Score) -> Evidence | None:
        """Points inside the certified radii, where the decision must be that at x."""
        if not bool((claim.limit > 0).any()):
            return None
        limit = largest_eps(subject.graph.shape, ball.norm)
        inner = Ball(ball.center, torch.nan_to_num(claim.limit).clamp(0, limit), ball.norm)
        points = random_points(self.dice, inner, 8)
        found = [points, extreme_points(self.dice, inner, subject.graph, score, points)]
        evidence = Evidence(subject, inner, torch.cat(found))
        # the centre itself: a misdecided image has radius 0 and claims nothing
        claim.limit[~(claim.limit > 0)] = torch.nan
        self.counts.points += evidence.points.shape[0] * evidence.points.shape[1]
        return evidence

    def _count_exact(self, claim: Claim, exact: list[Any]) -> None:
        if claim.kind not in ("upper", "lower"):
            return
        for truth in exact:
            value = truth.largest if claim.kind == "upper" else -truth.smallest
            known = torch.isfinite(value) & torch.isfinite(claim.limit)
            self.counts.oracles[truth.oracle] += int(known.sum())
            near = (claim.limit - value)[known] <= 1e-6 * (1 + value[known].abs())
            self.counts.reached[truth.oracle] += int(near.sum())

    def _copy(self, subject: Subject, ball: Ball, score: Score, evidence: Evidence) -> None:
        """The same through ONNX: claims about the copy, against the copy."""
        started = time.process_time()
        try:
            copy = onnx_copy(subject.network, ball.center)
        except (InputError, RunError) as error:
            self.counts.refused[f"onnx: {_short(error)}"] += 1
            return
        self.counts.seconds["onnx"] += time.process_time() - started
        points = Evidence(copy, ball, evidence.points)
        rows = torch.eye(copy.graph.classes, dtype=torch.float64)[:2]
        options = {"engine": "native", "method": "crown", "rows": rows}
        for claim in claims_of("linear", copy, ball, score, options):
            claim = replace(claim, stage=f"ONNX copy, {claim.stage}")
            for wrong in compare(claim, points, score, self.counts.tally):
                self._keep(wrong, "linear", copy, ball, score, options)

    def _keep(self, wrong: Violation, stage: str, subject: Subject, ball: Ball, score: Score, options: Options) -> None:
        self.counts.violations.append(
            Reproduction.of(wrong, self.made.name, self.seed, self.number, stage, subject, ball, score, options)
        )


def _short(error: Exception) -> str:
    text = str(error).split("; ")[0].split(" (")[0]
    return text.split(": ", 1)[-1][:100] if text.startswith("layer") else text[:100]


def tried(seed: int, numbers: range, shares: Mapping[str, float] | None = None) -> Counts:
    """Try these networks of a seed."""
    torch.set_num_threads(1)
    counts = Counts()
    made: Made | None = None
    for number in numbers:
        another = made is None or number % FAMILY == 0
        made = random_network(seed, number) if another or made is None else dressed(made, seed, number)
        try:
            _Trial(seed, number, made, counts, shares or SHARES).run()
        except Exception as error:  # noqa: BLE001 (whatever it is, it is counted and makes the campaign fail)
            counts.errors[f"{type(error).__name__}: {_short(error)} (network {number})"] += 1
    return counts
