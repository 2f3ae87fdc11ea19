r"""What the package claims about a network over balls, stage by stage, in a form that points can contradict.

A claim is a list of limits, one a ball; a point contradicts it where what is measured there exceeds the limit:

    upper        S(x')                             row upper     c . f(x')
    lower       -S(x')                             row lower    -c . f(x')
    layer        largest excess of the input of a nonlinear layer over its interval; the limit is 0
    slope        ||grad S(x')||_q
    secant       |S(x') - S(x)|, limit L ||x' - x||
    rise         S(x') - S(x), limit L ||x' - x||
    radius       +-(S(x') - gamma) where ||x' - x|| is at most the radius; the limit is 0
    found        -+(S(x') - gamma) at a point that is said to have the other decision; the limit is 0

Every stage can be run again from plain data, so that a contradiction can be kept and shown.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from grood_cert.ball import Ball
from grood_cert.bounds.alpha_crown import optimised_bounds
from grood_cert.bounds.branching import branch_and_bound
from grood_cert.bounds.engine import BoundedNetwork
from grood_cert.bounds.engines import build
from grood_cert.bounds.hidden import engine_preactivations
from grood_cert.bounds.score import score_bounds
from grood_cert.certification.cascade import Cascade
from grood_cert.certification.settings import Settings
from grood_cert.detector import Detector
from grood_cert.lipschitz.bound import local_lipschitz
from grood_cert.networks.graph import Graph
from grood_cert.networks.onnx import read_onnx
from grood_cert.networks.rebuild import Rebuilt
from grood_cert.runs.onnx_file import write_onnx
from grood_cert.scores import Score

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """A claim about each ball of a batch.

    Attributes:
        stage: Who makes it.
        kind: Of the list above.
        limit: Shape (B,); NaN where nothing is claimed. For "layer" the lower ends of the intervals, shape (B, ...).
        upper: For "layer" the upper ends.
        row: For rows: c, shape (K,).
        layer: For "layer": which nonlinear layer.
        gamma: For radii.
        points: For "found": where.
    """

    stage: str
    kind: str
    limit: Tensor
    upper: Tensor | None = None
    row: Tensor | None = None
    layer: int = 0
    gamma: float = 0.0
    points: Tensor | None = None

    @property
    def proved(self) -> Tensor:
        """About which balls something is claimed, shape (B,)."""
        return torch.isfinite(self.limit.flatten(1)).all(1) if self.limit.dim() > 1 else torch.isfinite(self.limit)


@dataclass
class Subject:
    """A network under test.

    Attributes:
        network: f.
        graph: The same as a graph.
    """

    network: nn.Module
    graph: Graph
    _engines: dict[str, BoundedNetwork] = field(default_factory=dict)

    def bounded(self, engine: str) -> BoundedNetwork:
        """Inside an engine; "native float32" is the native one with rows in float32."""
        if engine not in self._engines:
            name, single = engine.removesuffix(" float32"), engine.endswith(" float32")
            self._engines[engine] = build(name, self.network, self.graph.shape, "crown", self.graph, single).bounded
        return self._engines[engine]


def _pair(stage: str, lower: Tensor, upper: Tensor, prefix: str = "", **more: Any) -> list[Claim]:
    return [Claim(stage, f"{prefix}upper", upper, **more), Claim(stage, f"{prefix}lower", -lower, **more)]


def _linear(subject: Subject, ball: Ball, score: Score, options: Options) -> list[Claim]:
    """Bounds of S, of rows and of hidden layers by one method of an engine."""
    engine, method = options["engine"], options["method"]
    stage = f"{engine} {method}"
    bounded = subject.bounded(engine)
    found = score_bounds(bounded, ball, method, score)
    claims = _pair(stage, found.lower, found.upper)
    claims += _pair(f"{stage}, per logit", found.lower_per_logit, found.upper_per_logit)
    if engine == "auto_lirpa":
        return claims  # what the library itself gives is moved outward where bounds of S are made of it
    relaxation = bounded.relax(ball)
    rows = options["rows"]
    lower, upper = relaxation.rows(rows.expand(len(ball.center), -1, -1), method)
    for i, row in enumerate(rows):
        claims += _pair(f"{stage}, rows", lower[:, i], upper[:, i], "row ", row=row)
    if method == "crown":
        for layer, (low, high) in enumerate(relaxation.preactivations()):
            claims.append(Claim(f"{stage}, layers", "layer", low, high, layer=layer))
    return claims


def _alpha(subject: Subject, ball: Ball, score: Score, options: Options) -> list[Claim]:
    known = engine_preactivations(subject.bounded("native"), subject.graph, ball)
    lower, upper = (
        optimised_bounds(subject.graph, ball, side, known, options["steps"], options["hidden steps"], score)
        for side in ("lower", "upper")
    )
    return _pair("alpha-crown", lower, upper)


def _branched(subject: Subject, ball: Ball, score: Score, options: Options) -> list[Claim]:
    side, gamma, sign = options["side"], options["gamma"], 1.0 if options["side"] == "upper" else -1.0
    found = branch_and_bound(subject.graph, ball, gamma, side, options["nodes"], steps=options["steps"], score=score)
    stage = "branch-and-bound"
    decided = torch.where(found.decided, 0.0, torch.nan).double()
    return [
        Claim(stage, side, sign * found.bound),
        # decided: no point of the ball has the other decision
        Claim(stage, f"decided {side}", decided, gamma=gamma),
        Claim(
            f"{stage}, points",
            f"found {side}",
            torch.where(found.refuted, 0.0, torch.nan).double(),
            gamma=gamma,
            points=found.points,
        ),
    ]


def _lipschitz(subject: Subject, ball: Ball, score: Score, options: Options) -> list[Claim]:
    known = engine_preactivations(subject.bounded("native"), subject.graph, ball)
    found = local_lipschitz(subject.graph, ball, known, options["methods"], True, score=score)
    claims = []
    for name, bound in found.methods.items():
        claims += [Claim(f"lipschitz {name}", kind, bound) for kind in ("slope", "secant")]
    if found.fixed_head is not None:
        claims.append(Claim("lipschitz fixed head", "rise", found.fixed_head))
    return claims


def _cascade(subject: Subject, ball: Ball, score: Score, options: Options) -> list[Claim]:
    """Radii, envelopes and outcomes of whole certifications, on the grid of all radii of the balls."""
    network = Rebuilt(subject.graph)
    gamma, kind = options["gamma"], options["kind"]
    settings = Settings(tuple(options["eps"]), ball.norm, effort=options["effort"], stages=tuple(options["stages"]))
    cascade = Cascade(Detector(network, gamma, subject.graph.shape, score=score), settings)
    found = cascade.certify(ball.center, kind, torch.Generator().manual_seed(options["seed"]))
    claims = []
    for name in ("certified", "lipschitz_fixed_point", "lipschitz_path"):
        radius = getattr(found, f"radius_{name}")
        claims.append(Claim(f"radius {name.replace('_', ' ')}", f"radius {kind}", radius, gamma=gamma))
    for column, eps in enumerate(settings.eps):
        larger = ball.eps <= eps  # a bound of the larger ball holds on the smaller
        for claim in _pair("envelope", found.s_lb[:, column], found.s_ub[:, column]):
            claims.append(Claim(claim.stage, claim.kind, torch.where(larger, claim.limit, torch.nan)))
    low, high = (torch.nan_to_num(part, nan=sign * torch.inf) for part, sign in ((found.s_lb, -1), (found.s_ub, 1)))
    nested = (low.diff(dim=1) <= 0).all(1) & (high.diff(dim=1) >= 0).all(1) & (low <= high).all(1)
    claims.append(Claim("envelope, nested", "true", torch.where(nested, 0.0, -1.0).double()))
    return claims


STAGES: dict[str, Callable[[Subject, Ball, Score, Options], list[Claim]]] = {
    "linear": _linear,
    "alpha": _alpha,
    "branched": _branched,
    "lipschitz": _lipschitz,
    "cascade": _cascade,
}


def claims_of(stage: str, subject: Subject, ball: Ball, score: Score, options: Options) -> list[Claim]:
    """Run a stage."""
    return STAGES[stage](subject, ball, score, options)


def onnx_copy(network: nn.Module, images: Tensor) -> Subject:
    """The network written as ONNX and read again."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "network.onnx"
        write_onnx(network, images, path, any_batch=True)
        graph = read_onnx(path)
    return Subject(Rebuilt(graph), graph)
