r"""Proofs for `grood_cert.certification.checker`: a network as it reads one, and what it needs to prove a decision anew.

Stored are the choices of alpha-CROWN (`grood_cert.bounds.alpha_crown`): of the row of the logits and of the slopes below
ReLUs for this row and, where S > gamma is claimed, for both ends of every logit. They are optimised here, and a proof is
kept only if the checker accepts it: what is wrong here makes a proof weaker, never wrong.

The chord of e^z and the multipliers of the ends of its interval are one row there: for z in [l, u] and nu, mu >= 0

    kappa . z + beta <= r . z + max over the ends of e^z - r z,        r = kappa + mu - nu.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grood_cert.ball import Ball, Norm
from grood_cert.bounds.alpha_crown import ScoreProof, optimise
from grood_cert.bounds.domains import Domains, root
from grood_cert.bounds.engine import Side
from grood_cert.bounds.folding import folded
from grood_cert.bounds.free_pullback import SLOPE_RATE, FreePullback, Passage, descend
from grood_cert.bounds.hidden import preactivations
from grood_cert.bounds.reduction import reduction
from grood_cert.certification import checker
from grood_cert.certification.search import search_radius
from grood_cert.errors import InputError
from grood_cert.interval import intersect
from grood_cert.networks.activations import LeakyReLU
from grood_cert.networks.graph import Graph, Node
from grood_cert.networks.operations import (
    Addition,
    AveragePool,
    Convolution,
    Dense,
    LinearMap,
    Reshape,
    Scale,
    channelwise,
)
from grood_cert.scores import Energy, Score

Arrays = dict[str, np.ndarray[Any, Any]]
_STEPS = 20
_EVALUATIONS = 8  # balls that are tried for one sample
_PRECISION = 1e-2


@dataclass(frozen=True, eq=False)
class Proof:
    """A claim that the checker accepts.

    Attributes:
        claim: What is claimed: `decision`, `norm`, `eps`, `gamma`, `temperature`.
        arrays: The image `x`, the `row` of the logits and the `slopes` in steps of 1 / 255.
    """

    claim: Mapping[str, Any]
    arrays: Arrays


def stored(graph: Graph) -> Arrays:
    """A network as the checker reads it: every linear layer a grouped convolution over its input.

    Raises:
        InputError: If it has an operation that the checker does not know, naming it.

    Example:
        >>> from grood_cert.networks.capture import capture
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).eval()
        >>> arrays = stored(capture(network, (1, 2, 2)))
        >>> arrays["weight1"].shape, arrays["bias1"].shape
        ((1, 3, 4, 1, 1), (3,))
    """
    layers: list[dict[str, Any]] = [{"reads": []}]
    arrays: Arrays = {}
    place = {0: 0}
    for number, node in enumerate(graph.nodes[1:], 1):
        source, operation = graph.nodes[node.inputs[0]], node.operation
        reads = [place[i] for i in node.inputs]
        if isinstance(operation, Reshape) and operation.bias is None:
            place[number] = reads[0]
            continue
        if isinstance(operation, Addition):
            layer: dict[str, Any] = {}
        elif isinstance(operation, LeakyReLU):
            layer = {"leak": operation.slope}
        else:
            weight, layer = _convolution(node, source)
            assert isinstance(operation, LinearMap)
            bias = weight.new_zeros(()) if operation.bias is None else operation.bias
            arrays[f"weight{len(layers)}"] = _array(weight)
            arrays[f"bias{len(layers)}"] = _array(bias.expand(node.shape).flatten())
        place[number] = len(layers)
        layers.append({"reads": reads, **layer})
    return arrays | {"text": np.array(json.dumps(layers))}


def _convolution(node: Node, source: Node) -> tuple[Tensor, dict[str, Any]]:
    """A linear layer as a grouped convolution: weight (groups, outs, ins, kh, kw), and its geometry."""
    operation = node.operation
    window: dict[str, Any] = {"stride": [1, 1], "pad": [0, 0], "size": [1, 1], "out": [1, 1]}
    if isinstance(operation, Dense) and len(source.shape) == 1:
        return operation.weight[None, :, :, None, None], window
    if isinstance(operation, Scale):
        factor = channelwise(operation.factor, node.shape) if len(node.shape) == 3 else None
        if factor is None:
            factor = operation.factor.expand(node.shape).flatten()
        else:
            window |= {"size": list(node.shape[1:]), "out": list(node.shape[1:])}
        return factor[:, None, None, None, None], window
    if not isinstance(operation, Convolution | AveragePool):
        raise InputError(f"layer {node.name} ({type(operation).__name__}) cannot be stored in a proof")
    window |= {"stride": list(operation.stride), "pad": list(operation.padding)}
    window |= {"size": list(source.shape[1:]), "out": list(node.shape[1:])}
    if isinstance(operation, AveragePool):
        kernel = operation.kernel
        area = kernel[0] * kernel[1]
        return torch.full((source.shape[0], 1, 1, *kernel), 1 / area, dtype=torch.float64), window
    grouped = operation.weight.unflatten(0, (operation.groups, -1))
    (kh, kw), (dy, dx) = operation.kernel, operation.dilation
    weight = grouped.new_zeros((*grouped.shape[:3], dy * (kh - 1) + 1, dx * (kw - 1) + 1))
    weight[..., ::dy, ::dx] = grouped
    return weight, window


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Float64, or float32 where that loses nothing."""
    tensor = tensor.detach().cpu().double()
    single = tensor.float()
    return (single if torch.equal(single.double(), tensor) else tensor).contiguous().numpy()


class Prover:
    """Makes proofs of decisions of one detector.

    Args:
        graph: The network.
        score: S.
        gamma: Threshold.

    Attributes:
        arrays: The network as the checker reads it.

    Raises:
        InputError: If the checker knows no such score, or an operation of the network; the message names it.
    """

    def __init__(self, graph: Graph, score: Score, gamma: float) -> None:
        if not isinstance(score, Energy):
            raise InputError(f"proofs are stored of the energy, not of the score {score}")
        self.arrays = stored(graph)
        self._network: dict[str, Any] = {
            **{name: part.astype(np.float64) for name, part in self.arrays.items() if name != "text"},
            "text": json.loads(str(self.arrays["text"])),
        }
        self._graph, self._score, self._gamma = folded(graph), score, gamma
        relus = [(node.size, node.operation.slope) for node in graph.nodes if isinstance(node.operation, LeakyReLU)]
        parts = [torch.full((size,), slope, dtype=torch.float64) for size, slope in relus]
        self._leaks = torch.cat([torch.zeros(0, dtype=torch.float64), *parts])

    def prove(self, image: Tensor, inside: bool, norm: Norm, largest: float) -> Proof | None:
        """A proof on the largest ball found on which the checker accepts one; None if there is none.

        Args:
            image: x, shape (C, H, W).
            inside: Whether S < gamma is to be proved, or S > gamma.
            norm: Of the ball.
            largest: Largest eps to try, > 0.
        """
        image = image.detach().double()
        sign = 1.0 if inside else -1.0
        with torch.no_grad():
            score = float(self._score.value(self._graph(image[None]))[0])
        kept: list[Proof] = []

        def deviation(index: Tensor, eps: Tensor) -> Tensor:
            del index
            claim = {
                "decision": "id" if inside else "ood",
                "norm": norm,
                "eps": float(eps[0]),
                "gamma": float(self._gamma),
                "temperature": float(self._score.temperature),
            }
            row, slopes = self._choices(Ball(image[None], eps, norm), "upper" if inside else "lower")
            arrays = {"x": _array(image), "row": row, "slopes": slopes}
            with np.errstate(all="ignore"):
                bound = checker.bound(self._network, claim, image.cpu().numpy(), row, slopes)
            if bound < self._gamma if inside else bound > self._gamma:
                kept.append(Proof(claim, arrays))
            return eps.new_full((1,), sign * (bound - score))

        zero = image.new_zeros(1)
        search_radius(
            deviation,
            margin=zero + sign * (self._gamma - score),
            low=zero,
            low_deviation=zero,
            high=zero + torch.inf,
            high_deviation=zero + torch.nan,
            first=zero + largest,
            limit=largest,
            precision=_PRECISION,
            evaluations=_EVALUATIONS,
        )
        return max(kept, key=lambda proof: float(proof.claim["eps"]), default=None)

    def _choices(self, ball: Ball, side: Side) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The row of the logits, shape (K,), and the slopes of all rows that the checker bounds, shape (R, N)."""
        whole, _ = root(self._graph, ball, preactivations(self._graph, ball))
        slopes: list[Tensor] = []
        if side == "lower":
            whole, found = _with_ends(whole)
            slopes.append(found)
        reduced = reduction(self._score, side)
        with torch.no_grad():
            _, head = reduced.cases(self._graph(ball.center), *whole.outputs)
        proof = ScoreProof(replace(whole, outputs=head.interval(*whole.outputs), head=head), reduced)
        _, values, _ = optimise(proof, _STEPS)
        lines = whole.signs.shape[1]
        tail = values[:, lines:]
        if side == "upper":
            row = torch.softmax(tail, 1)
        else:
            kappa, low, high = proof.parts(tail)
            row = (kappa + low - high) / head.divisor
        slopes.insert(0, values[:, :lines])
        shares = (torch.cat(slopes) - self._leaks) / (1 - self._leaks)
        steps = (shares.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
        return row[0].detach().cpu().numpy(), steps.cpu().numpy()


def _with_ends(domains: Domains) -> tuple[Domains, Tensor]:
    """One domain with both ends of every logit optimised, and the slopes of the rows -e_k, then e_k, shape (2 K, N)."""
    graph, last = domains.graph, len(domains.graph.nodes) - 1
    pullback = FreePullback(graph, domains.ball, domains.inputs, domains.signs)
    units = torch.eye(graph.classes).to(domains.ball.center)
    rows = torch.cat([-units, units])[None]

    def each(part: Tensor) -> Tensor:
        return part.unsqueeze(1).expand(-1, rows.shape[1], -1)

    search = pullback.single()
    where = descend(
        lambda values: search.upper({last: rows.float()}, values),
        each(pullback.start),
        each(pullback.smallest),
        each(pullback.largest),
        SLOPE_RATE,
        _STEPS,
    )
    best = pullback.upper({last: rows}, where, Passage())
    lower, upper = intersect(domains.outputs, (-best[:, : graph.classes], best[:, graph.classes :]))
    return replace(domains, outputs=(lower, upper)), where[0]
