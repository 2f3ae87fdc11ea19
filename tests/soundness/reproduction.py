"""A violation as a small file of plain data: the graph, the ball, the point and how the claim was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.networks.graph import Graph
from grood_cert.networks.rebuild import Rebuilt
from grood_cert.scores import Score, parse
from tests.soundness.claims import Subject, claims_of
from tests.soundness.comparison import Evidence, Tally, Violation, compare


@dataclass(frozen=True)
class Reproduction:
    """A violation that can be shown again.

    Attributes:
        content: Plain containers, numbers and tensors.
    """

    content: Mapping[str, Any]

    @staticmethod
    def of(
        wrong: Violation,
        name: str,
        seed: int,
        number: int,
        stage: str,
        subject: Subject,
        ball: Ball,
        score: Score,
        options: Mapping[str, Any],
    ) -> Reproduction:
        """Of one ball of a batch."""
        return Reproduction(
            {
                "seed": seed,
                "number": number,
                "network": name,
                "graph": subject.graph.to_plain(),
                "run": stage,
                "options": dict(options),
                "score": str(score),
                "stage": wrong.stage.removeprefix("ONNX copy, "),
                "kind": wrong.kind,
                "norm": ball.norm,
                "center": ball.center.clone(),
                "eps": ball.eps.clone(),
                "ball": wrong.ball,
                "point": wrong.point.clone(),
                "limit": wrong.limit,
                "value": wrong.value,
                "excess": wrong.excess,
            }
        )

    @staticmethod
    def load(path: Path) -> Reproduction:
        """Read what `save` wrote."""
        return Reproduction(torch.load(path, weights_only=True))

    def save(self, folder: Path, place: int) -> Path:
        """Write it into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"violation-{place}.pt"
        torch.save(dict(self.content), path)
        return path

    def __str__(self) -> str:
        c = self.content
        return (
            f"{c['stage']}, {c['kind']}, score {c['score']}: claimed {c['limit']!r}, found {c['value']!r} "
            f"(excess {c['excess']:.3g})\n    {c['norm']} ball of radius {float(c['eps'][c['ball']])!r}, "
            f"network {c['number']} of seed {c['seed']}: {c['network']}"
        )

    def again(self) -> list[Violation]:
        """Make the claim again with the package as it is, and hold it against the point."""
        c = self.content
        graph = Graph.from_plain(c["graph"])
        subject = Subject(Rebuilt(graph), graph)
        ball = Ball(c["center"], c["eps"], c["norm"])
        score = parse(c["score"])
        point: Tensor = c["point"]
        points = torch.stack([ball.center, ball.center.clone()])
        points[1, c["ball"]] = point
        evidence = Evidence(subject, ball, points)
        found: list[Violation] = []
        for claim in claims_of(c["run"], subject, ball, score, c["options"]):
            if claim.kind == c["kind"] and claim.stage == c["stage"]:
                found += [wrong for wrong in compare(claim, evidence, score, Tally()) if wrong.ball == c["ball"]]
        return found
