r"""A certification run: detector and image sets in, one row a sample out; `grood_cert.certification.cascade` does the proving.

The product of a run is a *gamma-free envelope*, S_lb(x; eps_j) and S_ub(x; eps_j) on a grid of eps, beside which stand
the radii at the detector's gamma. Whatever depends on another gamma is read off it (`grood_cert.results.thresholds`,
`grood_cert.results.curves`); nothing is verified twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grood_cert import attacks
from grood_cert.ball import DEFAULT_EPS, Ball, Norm, largest_eps
from grood_cert.bounds.crosscheck import cross_check
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.engine import lirpa_version
from grood_cert.bounds.engines import Choice, build
from grood_cert.certification import checker
from grood_cert.certification.cascade import Cascade
from grood_cert.certification.outcomes import Outcome
from grood_cert.certification.settings import Settings
from grood_cert.data import ImageSet
from grood_cert.detector import Detector
from grood_cert.errors import InputError, RunError, SoundnessError
from grood_cert.networks.graph import Graph
from grood_cert.results.columns import SCHEMAS, grid_column, header
from grood_cert.results.table import Table
from grood_cert.runs.batches import Batch, batches, generator, subset
from grood_cert.runs.manifest import manifest
from grood_cert.runs.plan import outline
from grood_cert.runs.proofs import Proofs, check_samples, remove_proofs
from grood_cert.runs.saving import execute, save_evidence
from grood_cert.runs.shards import WHOLE, Shard
from grood_cert.scores import Score
from grood_cert.system.files import check_writable, is_locked, replacing
from grood_cert.system.memory import batch_for_memory, peak_memory
from grood_cert.system.reporting import SILENT, Reporter

_SHARES = (0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.2, 1.6)  # of the median attack radius
_PROBED, _ATTACKED = 16, 64  # images of each set, and how many of them are attacked at once
_CHECKED = 2  # images of each set
_TOGETHER = 8, 64  # balls checked at once: at least, and at most
_MATRIX = 1 << 28  # bytes of the largest matrix of a check with more than the least


def automatic_eps(detector: Detector, sets: Sequence[ImageSet], norm: Norm, seed: int = 0) -> tuple[float, ...]:
    """A grid of eps that fits the detector: shares of the median distance at which a quick attack flips decisions.

    It depends on the detector, a few images of each set and the seed, so every shard of a run finds the same one. Give
    eps explicitly where models shall be compared at the same radii.

    Args:
        detector: The detector.
        sets: Image sets; noise is left out.
        norm: Norm of the balls.
        seed: Draws the images and the attack's starting points.

    Returns:
        Radii in pixel units, ascending, rounded to two digits; a fixed grid if no attack succeeded.
    """
    right, distances = [], []
    for whole in (images for images in sets if images.kind != "noise"):
        images = subset(whole, _PROBED, seed)[0].images.to(next(detector.network.parameters()))
        with torch.no_grad():
            accepted = detector.score.value(detector.network(images)) <= detector.gamma
        right.append(images[accepted == (whole.kind == "id")])
    for number, images in enumerate(torch.cat(right).split(_ATTACKED) if right else ()):
        if len(images):
            found = attacks.minimum_norm(
                detector.network,
                images,
                detector.gamma,
                norm,
                generator(seed, number),
                attacks.AttackEffort.preset("fast"),
                detector.score,
            )
            distances += [value for value in found.radius.tolist() if np.isfinite(value)]
    if not distances:
        return DEFAULT_EPS[norm]
    limit, median = largest_eps(detector.shape, norm), float(np.median(distances))
    return tuple(dict.fromkeys(float(f"{min(share * median, limit):.2g}") for share in _SHARES))


def certify(
    cascade: Cascade, batch: Batch, adversarial: Path | None = None, proofs: Proofs | None = None
) -> list[dict[str, Any]]:
    """Certify one batch of a run.

    Args:
        cascade: Detector and settings.
        batch: Images and their names; the `kind` says which decision is right.
        adversarial: Folder in which the images and the nearest points with the other decision are saved, one file a batch
            (`grood_cert.results.adversarial`).
        proofs: Takes the proofs of samples that are to be checked elsewhere.

    Returns:
        One record a sample, with the columns of a certification.

    Raises:
        SoundnessError: If an attack contradicts a proof.
    """
    images, records, settings = batch.images, batch.names, cascade.settings
    found = cascade.certify(images.images, images.kind, generator(settings.seed, batch.number))
    if adversarial:
        with replacing(adversarial / f"{batch.number:06d}.npz") as temporary, temporary.open("wb") as stream:
            np.savez(
                stream,
                set=np.array(images.name),
                index=np.array(batch.index),
                images=images.images.cpu().numpy(),
                points=found.points.cpu().numpy(),
                radius_attack=found.radius_attack.cpu().numpy(),
            )
    names = [field.name for field in fields(found) if field.name != "points"]
    columns = {name: getattr(found, name).tolist() for name in names}
    columns["label"] = images.labels.tolist()
    columns["stage"] = [Outcome.numbered(code).word for code in columns["stage"]]
    columns["outcome"] = [[outcome.word for outcome in outcomes] for outcomes in found.outcomes]
    for position, record in enumerate(records):
        for name, values in columns.items():
            if name in SCHEMAS["certification"].grid:
                record |= {grid_column(name, eps): v for eps, v in zip(settings.eps, values[position], strict=True)}
            else:
                record[name] = values[position]
        proved = record["radius_certified"] > 0
        record["status"] = "misdecided" if not record.pop("right") else "certified" if proved else "undecided"
    if proofs:
        proofs.save(batch, records)
    return records


def balls_within(cascade: Cascade, images: ImageSet, memory: int) -> int:
    """How many balls may be bounded at once so that peak memory stays within a bound: a power of 2.

    Bounds of growing numbers of balls are measured. An answer that is not a power of 2 would change with the smallest
    fluctuation of the machine, and with it the rounding of every row.

    Args:
        cascade: Detector and settings.
        images: Images to try with.
        memory: Bytes: of the process on a CPU, of tensors on a GPU.

    Raises:
        InputError: If one ball does not fit.
    """
    device = next(cascade.detector.network.parameters()).device

    def measure(samples: int) -> int:
        cascade.probe(images.images[:samples])
        return peak_memory(device)

    fitting = batch_for_memory(measure, memory, min(cascade.settings.batch_size, len(images)))
    return 1 << (fitting.bit_length() - 1)


def balls_together(graph: Graph) -> int:
    """How many balls a cross-check bounds at once: few calls where matrices between layers are small.

    Example:
        >>> from grood_cert.networks.capture import capture
        >>> [balls_together(capture(torch.nn.Linear(d, d).double().eval(), (d,))) for d in (64, 2048)]
        [64, 8]
    """
    widest = max(node.size for node in graph.nodes)
    least, most = _TOGETHER
    return max(least, min(most, _MATRIX // (8 * widest**2)))


def cross_checked(
    choice: Choice, score: Score, sets: Sequence[ImageSet], eps: Sequence[float], norm: Norm
) -> dict[str, Any]:
    """How far auto_LiRPA agrees with the native engine on the first images of each set, at both ends of the grid.

    The balls depend on the sets and the grid alone: every shard of a run checks the same.

    Returns:
        What the manifest says: the engine and its version, the number of balls, how many of them had to agree to
        rounding, and the largest disagreement; or why the check was left out.

    Raises:
        SoundnessError: If the engines contradict each other.
    """
    native = choice.bounded
    if not isinstance(native, NativeNetwork):
        return {"left_out": "auto_LiRPA itself gives the bounds"}
    if lirpa_version() is None:
        return {"left_out": "auto_LiRPA is not installed"}
    try:
        other = build("auto_lirpa", native.network, native.shape, native.method, native.graph).bounded
    except (InputError, RunError) as error:
        return {"left_out": str(error)}
    images = torch.cat([whole.images[:_CHECKED] for whole in sets]).to(next(native.network.parameters()))
    ends = images.new_tensor(list(dict.fromkeys((eps[0], eps[-1]))))
    centers, radii = images.repeat_interleave(len(ends), 0), ends.repeat(len(images))
    together = balls_together(native.graph)
    parts = zip(centers.split(together), radii.split(together), strict=True)
    found = cross_check(native, other, (Ball(*part, norm) for part in parts), score=score)
    if not found.balls:
        return {"left_out": "there was no ball that both engines could bound"}
    return {"engine": "auto_lirpa", "version": lirpa_version(), **asdict(found)}


def run(
    detector: Detector,
    model: Path | None,
    sets: Sequence[ImageSet],
    settings: Settings,
    out: Path,
    *,
    limit: int = 0,
    shard: Shard = WHOLE,
    memory: int = 0,
    save_adversarial: bool = False,
    save_proofs: int = 0,
    force: bool = False,
    stage: str = "certifying",
    reporter: Reporter = SILENT,
) -> Table:
    """Certify a detector and write `rows.csv` and its manifest `rows.json` to a folder.

    A run that was interrupted goes on where it was.

    Args:
        detector: The detector.
        model: The checkpoint it came from, named and hashed in the manifest; None: there is none, and the network is
            hashed.
        sets: Image sets.
        settings: What to certify.
        out: Folder; made if absent.
        limit: Most images of each set, 0 for all.
        shard: Which part of the batches to do.
        memory: Bytes of peak memory to stay within, 0 for no bound; fewer balls are bounded at once.
        save_adversarial: Whether to keep the points that attacks found, and their images, in `adversarial/`.
        save_proofs: For how many samples of each set, the first ones, to write a proof that needs no engine to be
            checked, in `proofs/`.
        force: Start afresh, whatever is there.
        stage: What the reporter calls it.
        reporter: Hears of every batch, with the statuses of all samples so far, and of an earlier run that was found.

    Raises:
        InputError: If settings, sets or folder are unusable.
        RunError: If the bound engine is missing or cannot convert the network.
        SoundnessError: If an attack contradicts a proof, or the engines contradict each other; the evidence is saved
            as `counterexample.npz`.
    """
    settings.check(detector.shape)
    check_samples(save_proofs)
    cascade = Cascade(detector, settings)
    settings = cascade.settings
    check = None
    if settings.engine == "auto":
        check_writable(out)
        try:
            check = cross_checked(cascade.choice, detector.score, sets, settings.eps, settings.norm)
        except SoundnessError as error:
            save_evidence(error, out)
            raise
    if memory:
        cascade = Cascade(detector, settings, balls_within(cascade, max(sets, key=len), memory))
    adversarial = out / "adversarial" if save_adversarial else None
    if force and (shard.count == 1 or (shard.joint and shard.leads)) and not is_locked(shard.file(out / "rows.csv")):
        remove_proofs(out)  # separate shards share the folder, so they leave what is there
    proofs = Proofs(out, save_proofs, cascade, sets) if save_proofs else None
    if proofs and proofs.left_out:
        reporter.say(f"no proofs are saved: {proofs.left_out}")
    path = execute(
        out / "rows.csv",
        header("certification", settings.eps),
        batches(sets, limit, settings.batch_size, settings.seed),
        lambda batch: certify(cascade, batch, adversarial, proofs),
        manifest("certification", detector, model, sets, limit, settings)
        | {
            "stages": list(settings.cascade),
            "bounded_by": cascade.choice.engine,
            "cross_check": check,
            "largest_eps": largest_eps(detector.shape, settings.norm),
        }
        | ({"save_proofs": proofs.description} if proofs else {}),
        lambda: Counter(cascade.failures) + (proofs.failures if proofs else Counter()),
        proofs=lambda: proofs.count if proofs else 0,
        stage=stage,
        shard=shard,
        force=force,
        eps=settings.eps,
        tally=lambda record: [record["status"]],
        reporter=reporter,
    )
    return Table.read(path, "certification")


def plan(
    detector: Detector,
    sets: Sequence[ImageSet],
    settings: Settings,
    *,
    limit: int = 0,
    shard: Shard = WHOLE,
    memory: int = 0,
) -> list[str]:
    """Lines on what `run` would do, and about how long; nothing is written.

    Raises:
        InputError: If settings or sets are unusable.
        RunError: If the bound engine is missing or cannot convert the network.
        SoundnessError: If an attack contradicts a proof.
    """
    settings.check(detector.shape)
    cascade = Cascade(detector, settings)
    if memory:
        cascade = Cascade(detector, settings, balls_within(cascade, max(sets, key=len), memory))
    own = shard.of(batches(sets, limit, settings.batch_size, settings.seed))
    return outline("certifying", own, settings.eps, lambda batch: certify(cascade, batch))


def agreement(check: Mapping[str, Any]) -> str:
    """A line about the cross-check of a manifest.

    Example:
        >>> agreement({"engine": "auto_lirpa", "version": "0.3", "balls": 8, "same_lines": 8, "largest_disagreement": 2e-12})
        'bounds cross-checked by auto_LiRPA 0.3 on 8 balls: largest disagreement 2e-12 on the 8 with the same lines'
        >>> agreement({"left_out": "auto_LiRPA is not installed"})
        'no cross-check of the bounds: auto_LiRPA is not installed'
    """
    if "left_out" in check:
        return f"no cross-check of the bounds: {check['left_out']}"
    largest = check["largest_disagreement"]
    found = "intervals meet"
    if largest is not None:
        found = f"largest disagreement {largest:.2g} on the {check['same_lines']} with the same lines"
    return f"bounds cross-checked by auto_LiRPA {check['version']} on {check['balls']} balls: {found}"


def proved(manifest: Mapping[str, Any]) -> str:
    """A line about the proofs that a manifest tells of.

    Example:
        >>> proved({"save_proofs": {"samples_of_each_set": 2, "folder": "proofs"}, "proofs": 5})
        '5 proofs in proofs/; python -m grood_cert.certification.checker PROOF checks one'
        >>> proved({"save_proofs": {"samples_of_each_set": 2, "left_out": "no layer"}, "proofs": 0})
        'no proofs are saved: no layer'
    """
    found = manifest["save_proofs"]
    if "left_out" in found:
        return f"no proofs are saved: {found['left_out']}"
    return f"{manifest['proofs']} proofs in {found['folder']}/; python -m {checker.__name__} PROOF checks one"
