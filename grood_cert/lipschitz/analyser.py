r"""A Lipschitz analysis: every estimate and every bound of the local constant, for each sample and each eps.

The product is one row for each sample and eps in `lipschitz.csv`, with a manifest beside it. `COLUMNS` is the one
place where the columns are documented. Constants are per pixel unit, in the dual of the ball's norm.

On every batch the chain (gradient norm, sampled, ascended, secant) <= every bound is checked; a violation raises
`SoundnessError`. CLEVER extrapolates and may exceed the truth, so it is outside the chain.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grood_cert import attacks
from grood_cert.ball import Ball, Norm, check_eps
from grood_cert.bounds.engine import Method
from grood_cert.bounds.engines import build
from grood_cert.bounds.graph import trace
from grood_cert.bounds.hidden import DEFAULT_MEMORY, engine_preactivations
from grood_cert.data import ImageSet
from grood_cert.detector import Detector, check_network
from grood_cert.errors import InputError, SoundnessError
from grood_cert.lipschitz.bound import METHODS, local_lipschitz, running_minimum
from grood_cert.lipschitz.clever import clever_estimate
from grood_cert.lipschitz.estimates import (
    ascended_gradient_norm_estimate,
    gradient_norm_estimate,
    sampled_gradient_norm_estimate,
    secant_estimate,
)
from grood_cert.results.rows import read_files
from grood_cert.runs import saving as runs
from grood_cert.scores import energy

COLUMNS: dict[str, str] = {
    "set": "name of the image set",
    "kind": "id, ood or noise",
    "index": "position of the image in its test set",
    "score": "S(x)",
    "eps": "radius of the ball, pixel units",
    "gradient_norm_estimate": "estimate from below: ||grad S(x)||_q, what GReg penalises",
    "sampled_estimate": "estimate from below: largest gradient norm at points sampled in the ball",
    "ascended_estimate": "estimate from below: largest gradient norm found by ascent; the reference for tightness",
    "secant_estimate": "estimate from below: largest |S(x') - S(x)| / ||x' - x||_p seen",
    "clever_estimate": "estimate, neither below nor above: extreme-value fit (CLEVER)",
    "clever_p_value": "goodness of that fit (Kolmogorov-Smirnov); nan where there is none",
    "clever_fitted": "1 if the fit was usable, 0 if the sample maximum stands in",
    **{f"bound_{name.replace('-', '_')}": f"formal upper bound: {name}; nan if not proved" for name in METHODS},
    "bound": "formal upper bound: the smallest of all, and of those at larger eps; inf if nothing was proved",
    "provenance": "the method that gave the bound at this eps",
    "bound_fixed_head": "formal, upwards only: S(x') <= S(x) + bound ||x' - x||_p; enough for ID",
}
_TEXT = ("set", "kind", "provenance")
_LOWER = ("gradient_norm_estimate", "sampled_estimate", "ascended_estimate", "secant_estimate")
_CLEVER = ("clever_estimate", "clever_p_value", "clever_fitted")
_SHARES = (0.01, 0.1, 0.3, 0.6, 1.0)  # of the way to where an attack or the ascent ended: where secants are taken
_SLACK = 1e-9
_COPIES = 8  # arrays of the size of a layer that interval propagation holds for each logit


QUANTITIES: dict[str, str] = {
    "samples": "samples",
    "gradient_norm_estimate": "gradient norm at x (estimate)",
    "sampled_estimate": "sampled maximum (estimate)",
    "ascended_estimate": "ascended maximum (estimate)",
    "clever_estimate": "CLEVER (estimate)",
    "bound": "best bound (proved)",
    "bound_jacobian_crown": "Jacobian-CROWN (proved)",
    "bound_interval": "intervals (proved)",
    "bound_hull": "softmax hull (proved)",
    "bound_product_active": "product, active neurons (proved)",
    "bound_product": "product of norms (proved)",
    "tightness": "best bound / ascended maximum",
}


@dataclass(frozen=True)
class Settings:
    """What to analyse.

    Attributes:
        eps: Radii in pixel units, ascending, without repetition.
        norm: Norm of the balls.
        method: Engine method for the pre-activation bounds.
        samples: Points sampled in each ball.
        clever_batches: Batch maxima of CLEVER; 0 leaves CLEVER out.
        ascents: Starting points of the gradient ascent.
        memory: Bytes that blocks of rows, and the interval Jacobians of a batch, may take each.
        batch_size: Most samples analysed together.
        seed: Seed of all sampling.
    """

    eps: tuple[float, ...]
    norm: Norm = "linf"
    method: Method = "crown"
    samples: int = 256
    clever_batches: int = 50
    ascents: int = 4
    memory: int = DEFAULT_MEMORY
    batch_size: int = 64
    seed: int = 0

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse settings that make no sense.

        Raises:
            InputError: Naming what is wrong.
        """
        check_eps(self.eps, self.norm, shape)
        if self.batch_size < 1:
            raise InputError(f"batch size must be 1 or more, got {self.batch_size}")
        if self.method not in ("ibp", "crown-ibp", "crown"):
            raise InputError(f"unknown method {self.method!r}; use ibp, crown-ibp or crown")
        for name, least in (("samples", 1), ("clever_batches", 0), ("ascents", 1), ("memory", 2**16)):
            if getattr(self, name) < least:
                raise InputError(f"{name.replace('_', ' ')} must be {least} or more, got {getattr(self, name)}")


class Analyser:
    """Analyses batches of images against one detector.

    Args:
        detector: Network; gamma plays no part.
        settings: What to analyse.

    Raises:
        InputError: If the settings make no sense for the detector, or a layer of its network is not supported.
        RunError: If the bound engine is missing or cannot convert the network.
    """

    def __init__(self, detector: Detector, settings: Settings) -> None:
        shape = detector.shape
        settings.check(shape)
        check_network(detector.network)
        self.settings = settings
        self.graph = trace(detector.network, shape)
        self._bounded = build("auto", detector.network, shape, settings.method).bounded

    @property
    def batch_size(self) -> int:
        """Samples analysed together: as set, or fewer if the interval Jacobians of so many would exceed the memory."""
        neurons = max(node.size for node in self.graph.nodes)
        sample = _COPIES * 8 * self.graph.classes * neurons
        return max(1, min(self.settings.batch_size, self.settings.memory // sample))

    def analyse(self, images: Tensor, batch: int = 0) -> list[dict[str, Any]]:
        """All columns but `set`, `kind` and `index`, as one dictionary of lists for each eps.

        Args:
            images: Shape (B, C, H, W), pixels in [0, 1].
            batch: Number of the batch; with the settings' seed it fixes the sampling.

        Raises:
            SoundnessError: If an estimate from below exceeds a formal bound.
        """
        images = images.to(next(self.graph.network.parameters()))
        with torch.no_grad():
            score = energy(self.graph.network(images))
        generator = runs.generator(self.settings.seed, batch)
        pages: list[dict[str, Any]] = []
        best: list[Tensor] = []
        for value in self.settings.eps:
            ball = Ball(images, torch.full_like(score, value), self.settings.norm)
            page: dict[str, Any] = {"score": score, "eps": torch.full_like(score, value)}
            page |= self._estimates(ball, generator)
            known = engine_preactivations(self._bounded, self.graph, ball)
            bounds = local_lipschitz(self.graph, ball, known, fixed_head=True, memory=self.settings.memory)
            page |= {f"bound_{name.replace('-', '_')}": bound for name, bound in bounds.methods.items()}
            page |= {"bound": bounds.auto, "provenance": bounds.provenance, "bound_fixed_head": bounds.fixed_head}
            _check_chain(images, page)
            pages.append(page)
            best.append(bounds.auto)
        for page, bound in zip(pages, running_minimum(torch.stack(best, 1)).T, strict=True):
            page["bound"] = bound
            _check_chain(images, page)
        return [{k: v.tolist() if isinstance(v, Tensor) else list(v) for k, v in page.items()} for page in pages]

    def _estimates(self, ball: Ball, generator: torch.Generator) -> dict[str, Tensor]:
        settings = self.settings
        at_center = gradient_norm_estimate(self.graph, ball)
        ascended, argument = ascended_gradient_norm_estimate(self.graph, ball, generator, settings.ascents)
        seen = attacks.extremes(self.graph.network, ball, generator, ball.center, ball.center)
        ends = torch.stack([argument, seen.argmax, seen.argmin])
        segments = torch.cat([ball.center + share * (ends - ball.center) for share in _SHARES])
        found = {
            "gradient_norm_estimate": at_center,
            "sampled_estimate": sampled_gradient_norm_estimate(self.graph, ball, settings.samples, generator),
            "ascended_estimate": ascended,
            "secant_estimate": secant_estimate(self.graph, ball, segments),
        }
        nan = torch.full_like(at_center, torch.nan)
        if settings.clever_batches:
            clever = clever_estimate(self.graph, ball, generator, settings.clever_batches, settings.samples)
            fitted = clever.fitted.to(at_center)
            return found | dict(zip(_CLEVER, (clever.lipschitz_estimate, clever.p_value, fitted), strict=True))
        return found | dict.fromkeys(_CLEVER, nan)


def _check_chain(images: Tensor, page: dict[str, Any]) -> None:
    largest = torch.stack([page[name] for name in _LOWER]).amax(0)
    for name, bound in page.items():
        if not name.startswith("bound") or name == "bound_fixed_head":
            continue
        wrong = largest > bound * (1 + _SLACK) + _SLACK * (bound == 0)
        if bool(wrong.any()):
            raise SoundnessError(
                f"{int(wrong.sum())} slopes found by search exceed {name} at eps {float(page['eps'][0]):g}: no bound of "
                "this run can be trusted",
                {
                    "image": images[wrong].cpu().numpy(),
                    name: bound[wrong].cpu().numpy(),
                    **{lower: page[lower][wrong].cpu().numpy() for lower in _LOWER},
                },
            )


def analyse(analyser: Analyser, batch: runs.Batch) -> list[dict[str, Any]]:
    """Analyse one batch of a run.

    Args:
        analyser: Detector and settings.
        batch: Images and their names.

    Returns:
        One record for each sample and eps, with the columns of `COLUMNS`.

    Raises:
        SoundnessError: If an estimate from below exceeds a formal bound.
    """
    pages = analyser.analyse(batch.images.images, batch.number)
    return [
        name | {column: values[position] for column, values in page.items()}
        for position, name in enumerate(batch.names)
        for page in pages
    ]


@dataclass(frozen=True, eq=False)
class Analysis:
    """An analysis, or as much of it as has been saved.

    Attributes:
        manifest: What the run was: model, norm, method, eps, data, versions, ...
        records: One for each sample and eps, with the columns of `COLUMNS`.
    """

    manifest: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    @property
    def norm(self) -> str:
        """Norm of the balls."""
        return str(self.manifest["norm"])

    def kinds(self) -> list[str]:
        """The kinds of image sets, in the order of the file."""
        return list(dict.fromkeys(record["kind"] for record in self.records))

    def summary(self, kind: str) -> list[dict[str, Any]]:
        """Medians over the samples of one kind: one record for each eps, with the keys `eps` and `QUANTITIES`."""
        found = []
        for eps in dict.fromkeys(record["eps"] for record in self.records):
            chosen = [record for record in self.records if record["eps"] == eps and record["kind"] == kind]
            page: dict[str, Any] = {"eps": eps, "samples": len(chosen)}
            page |= {
                name: float(np.median([record[name] for record in chosen])) for name in QUANTITIES if name in COLUMNS
            }
            slopes = [(record["bound"], record["ascended_estimate"]) for record in chosen]
            ratios = [bound / found for bound, found in slopes if found > 0]
            page["tightness"] = float(np.median(ratios)) if ratios else None
            found.append(page)
        return found


def read(path: Path) -> Analysis:
    """Read a `lipschitz.csv` and its manifest.

    Raises:
        InputError: If a file is missing, empty, or not what an analysis writes.
    """
    try:
        manifest, rows = read_files(path, "lipschitz")
        kinds: dict[str, type] = dict.fromkeys(_TEXT, str) | {"index": int}
        records = [{name: kinds.get(name, float)(row[name]) for name in COLUMNS} for row in rows]
        if not {"norm", "model"} <= manifest.keys():
            raise ValueError("a manifest that no analysis writes")
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not the rows of a Lipschitz analysis ({reason})") from None
    if not records:
        raise InputError(f"{path}: holds no rows; analyse at least one sample")
    return Analysis(manifest, records)


def run(
    detector: Detector,
    model: Path,
    sets: Sequence[ImageSet],
    settings: Settings,
    out: Path,
    *,
    limit: int = 0,
    shard: runs.Shard = runs.WHOLE,
    force: bool = False,
    begin: Callable[[int], None] = lambda samples: None,
    advance: Callable[[int], None] = lambda samples: None,
    report: Callable[[str], None] = lambda line: None,
) -> Analysis:
    """Analyse a detector and write `lipschitz.csv` and its manifest `lipschitz.json` to a folder.

    An analysis that was interrupted goes on where it was.

    Args:
        detector: The detector.
        model: The checkpoint it came from, named and hashed in the manifest.
        sets: Image sets.
        settings: What to analyse.
        out: Folder; made if absent.
        limit: Most images of each set, 0 for all.
        shard: Which part of the batches to do.
        force: Start afresh, whatever is there.
        begin: Called once with the number of samples, unless everything is done already.
        advance: Called after every batch with its size.
        report: Called with a line about an earlier run that was found.

    Returns:
        The analysis, as written.

    Raises:
        InputError: If settings, sets, folder or a layer of the network are unusable.
        RunError: If the bound engine is missing or cannot convert the network.
        SoundnessError: If an estimate from below exceeds a formal bound; the evidence is saved.
    """
    analyser = Analyser(detector, settings)
    path = runs.execute(
        out / "lipschitz.csv",
        list(COLUMNS),
        runs.batches(sets, limit, analyser.batch_size, settings.seed),
        lambda batch: analyse(analyser, batch),
        runs.manifest(detector, model, sets, limit, settings),
        dict,
        shard=shard,
        force=force,
        begin=begin,
        advance=lambda samples, counts: advance(samples),
        report=report,
    )
    return read(path)
