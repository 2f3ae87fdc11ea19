r"""A finished run checked again from outside: its files, its samples, and what its rows claim.

The files must be those that were written (`Table.read`), the model and the image sets those of the manifest, and the rows
those of the samples that the manifest's limit, seed and shard draw. Scores are computed again for all rows. What costs more is
tried on every k-th sample by `grood_cert.runs.verification.claims`, with random numbers that the run did not have.

A *contradiction* is found, or not: where there is none, nothing is proved but what was repeated. Two words tell them apart:

* *contradicted*: the record is false, or what it is compared with is. Of n checks on the same samples none errs on a true
  record, but for those by chance (fresh noise), which say with what probability they do.
* *repeated*: another computation says the same: the same number, or a proof at least as strong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from grood_cert.ball import Norm, largest_eps
from grood_cert.certification.smoothing import SmoothingSettings
from grood_cert.data import ImageSet, spec
from grood_cert.detector import Detector, Import, Provenance, logits
from grood_cert.errors import InputError
from grood_cert.metrics import TPR_PERCENT
from grood_cert.results.checksum import KEY
from grood_cert.results.table import Table
from grood_cert.results.thresholds import calibrated_gamma
from grood_cert.runs.batches import batches
from grood_cert.runs.manifest import model_hash
from grood_cert.runs.shards import WHOLE, Shard
from grood_cert.runs.smooth import GUARANTEE
from grood_cert.runs.verification.claims import CLAIMS
from grood_cert.runs.verification.findings import Findings, Part
from grood_cert.system.files import as_json
from grood_cert.system.reporting import SILENT, Reporter

SAMPLES = 20  # of each set, about, unless `every` says otherwise
_ROUNDING = 1e-9  # relative: what other machines and batches do to a score


def verify(
    table: Table,
    detector: Detector,
    model: Path | None,
    sets: Sequence[ImageSet],
    *,
    calibration: Table | None = None,
    every: int = 0,
    limit: int = 0,
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> Findings:
    """Check a finished run again.

    Args:
        table: What `Table.read` gives: checksum and invariants hold.
        detector: The detector that the rows are said to be about.
        model: The checkpoint it came from, whose hash the manifest must hold; None: the hash of the network.
        sets: The image sets of the run, perhaps with others among them; of a smoothing-calibration, the calibration images.
        calibration: Of smoothed rows, the calibration that their gamma came from.
        every: Every k-th sample of a set is tried, from one on that the seed draws; 0: so that about 20 of each set are.
        limit: Most samples of each set to try, 0 for no limit.
        seed: Seed of the choice and of all attempts.
        reporter: Hears of every batch that is tried.

    Raises:
        InputError: If the model or a set is not that of the manifest, or an argument makes no sense.
    """
    if every < 0 or limit < 0:
        raise InputError(f"--every and --limit must be 0 or more, got {every} and {limit}")
    check_model(table, detector, model)
    chosen = _check_sets(table, sets)
    found = Findings()
    if table.manifest.get(KEY):
        found.add("checksum of rows and manifest", [False], "", {}, [True])
    else:
        found.note("checksum of rows and manifest", "the manifest holds none")
    found.add("hash of the model", [False], "", {}, [True])
    found.add("hashes of the image sets", [False] * len(chosen), "", {}, [True] * len(chosen))
    _check_description(found, table, detector, list(chosen.values()))
    _check_gamma(found, table, detector, calibration)
    detector = replace(detector, gamma=table.gamma)
    claims = CLAIMS[table.kind](table, detector, found)
    _check_samples(found, table, list(chosen.values()), claims.batch_size)
    if found.checks["samples"].contradicted:
        return found  # what cannot be matched with images cannot be tried
    _check_scores(found, table, detector, chosen)
    parts = _parts(table, chosen, every, limit, seed, claims.together)
    reporter.begin("verifying", sum(len(part.rows) for part in parts))
    for part in parts:
        claims.check(part)
        reporter.advance(len(part.rows), {"contradictions": sum(c.contradicted for c in found.checks.values())})
    return found


def check_model(table: Table, detector: Detector, model: Path | None) -> None:
    """Make sure that rows are about a model.

    Raises:
        InputError: If their manifest names another.
    """
    recorded = table.manifest["model"].get("sha256")
    if recorded != model_hash(detector, model):
        raise InputError(
            f"{model or 'the detector'} is not the model of these rows: their manifest names {table.manifest['model'].get('path')} "
            f"with SHA-256 {str(recorded)[:12]}..., this one has another; give the checkpoint that was certified"
        )


def _check_sets(table: Table, sets: Sequence[ImageSet]) -> dict[tuple[str, str], ImageSet]:
    """The image sets of the manifest, in its order, by name and kind."""
    given, found = {(images.name, images.kind): images for images in sets}, {}
    for entry in table.manifest.get("data") or ():
        key = entry["set"], entry["kind"]
        if key not in given:
            raise InputError(
                f"the rows are of image set {key[0]} of kind {key[1]}, which is not given; name it with --ood"
            )
        if given[key].content_hash() != entry["sha256"]:
            raise InputError(
                f"image set {key[0]} holds other images or labels than that of the rows (SHA-256 differs from the "
                "manifest's); give the same with --ood and --data-dir"
            )
        found[key] = given[key]
    if not found:
        raise InputError("the manifest names no image sets, so nothing can be computed again")
    return found


def _check_description(found: Findings, table: Table, detector: Detector, sets: Sequence[ImageSet]) -> None:
    """What the manifest says of the detector and the image sets must be what they are."""
    origin, manifest, smoothed = detector.provenance, table.manifest, table.kind.startswith("smoothing")
    said: dict[str, Any] = {
        "recipe": origin.recipe.to_dict() if isinstance(origin, Provenance) else None,
        "imported": origin.source if isinstance(origin, Import) else None,
        "score": str(detector.score),
        "name": detector.name,
        "images": [len(images) for images in sets],
    }
    told: dict[str, Any] = {name: manifest.get(name) for name in said}
    told |= {"name": manifest["model"].get("name"), "images": [entry["images"] for entry in manifest["data"]]}
    if table.kind != "smoothing":  # that of the smoothed detector: `_check_calibration`
        said["calibration"], told["calibration"] = origin.calibration if origin else None, manifest.get("calibration")
    if table.kind == "certification":
        _also(said, told, manifest, largest_eps=largest_eps(detector.shape, cast(Norm, table.norm)))
    _also(said, told, manifest, metrics=origin.metrics if origin else None)
    if smoothed:
        _also(said, told, manifest, method=SmoothingSettings.method, gamma_base=detector.gamma, guarantee=GUARANTEE)
    else:
        dtype = str(next(detector.network.parameters()).dtype)
        _also(said, told, manifest, dtype=dtype.removeprefix("torch."))
    _compare(found, "what the manifest says of model and images", said, told, "differ from what they are")


def _also(said: dict[str, Any], told: dict[str, Any], manifest: Mapping[str, Any], **expected: Any) -> None:
    """Entries that a manifest may lack, as those of earlier versions do."""
    for name in expected.keys() & manifest.keys():
        said[name], told[name] = expected[name], manifest[name]


def _compare(found: Findings, claim: str, said: Mapping[str, Any], told: Mapping[str, Any], words: str) -> None:
    """Count entries of the manifest, `told`, that must be those of `said`."""
    wrong = [as_json(said[name]) != as_json(told[name]) for name in said]
    names = " and ".join(name for name, differs in zip(said, wrong, strict=True) if differs)
    found.add(claim, wrong, f"{names} {words}", {}, [not differs for differs in wrong])


def _check_calibration(found: Findings, table: Table, calibration: Table) -> None:
    """Of smoothed rows and their calibration: both must be of one run."""
    manifest, other = table.manifest, calibration.manifest
    name = next((entry["set"] for entry in other.get("data") or ()), None)
    samples = {"set": name, "samples": len(calibration), "percent": TPR_PERCENT}
    shared = [field.name for field in fields(SmoothingSettings) if field.name not in ("batch_size", "memory")]
    said = {"calibration": samples, "model": other["model"].get("sha256")} | {name: other.get(name) for name in shared}
    told = {"calibration": manifest["calibration"], "model": manifest["model"].get("sha256")}
    told |= {name: manifest.get(name) for name in shared}
    _compare(found, "what the manifest says of the calibration", said, told, "differ from the calibration's")


def _check_gamma(found: Findings, table: Table, detector: Detector, calibration: Table | None) -> None:
    """Gamma must be the checkpoint's; of smoothed rows, that of their calibration."""
    claim, own, expected = "gamma", table.gamma, detector.gamma
    if table.kind == "smoothing":
        if calibration is None:
            found.note(claim, "the calibration that it came from is not here")
            return
        _check_calibration(found, table, calibration)
        expected = calibrated_gamma(calibration)
    elif table.kind == "certification" and own != expected:
        found.note(claim, f"the rows are at {own:.6g}, the checkpoint's is {expected:.6g}")
        return
    found.add(claim, [own != expected], f"it is {own}, but {expected} was calibrated", {}, [own == expected])


def _check_samples(found: Findings, table: Table, sets: Sequence[ImageSet], batch_size: int) -> None:
    """The rows must be those of the samples that limit, seed and shard draw: none left out, none added."""
    manifest = table.manifest
    shard = Shard.parse(manifest["shard"]) if manifest.get("shard") else WHOLE
    drawn = shard.of(batches(sets, int(manifest["limit"]), batch_size, int(manifest["seed"])))
    names = [name for batch in drawn for name in batch.names]
    if not table.complete:
        names = names[: int(manifest.get("samples_done", len(names)))]
    pages = len(table.eps) if "eps" in table.columns else 1
    keys = ("kind", "set", "index", "file")
    wanted = {tuple(name[key] for key in keys) for name in names}
    present = list(zip(*(table[key].tolist() for key in keys), strict=True))
    missing, stray = wanted - set(present), [key for key in present if key not in wanted]
    short = len(present) != pages * len(wanted)
    wrong = [*(key in missing for key in wanted), *(True for _ in stray)] or [False]
    wrong[0] |= short
    found.add(
        "samples",
        wrong,
        f"limit {manifest['limit']}, seed {manifest['seed']} and shard {shard} draw {len(wanted)} samples, of which "
        f"{len(missing)} have no row; {len(stray)} rows are of none of them",
        {
            "missing": np.array(sorted(missing), dtype=object).astype(str),
            "stray": np.array(stray, dtype=object).astype(str),
        },
        [not value for value in wrong],
    )


def _check_scores(found: Findings, table: Table, detector: Detector, sets: Mapping[tuple[str, str], ImageSet]) -> None:
    """Score, prediction and label of all rows."""
    for (name, kind), images in sets.items():
        rows = np.flatnonzero((table["set"] == name) & (table["kind"] == kind))
        if not len(rows):
            continue
        index = table["index"][rows]
        values = logits(detector.network, images.images[torch.from_numpy(index)])
        again, score = detector.score.value(values).numpy(), table["score"][rows]
        found.compare(table, "score", rows, ~(np.abs(again - score) <= _ROUNDING * (1 + np.abs(again))), again)
        if "label" in table.columns:
            labels = images.labels[torch.from_numpy(index)].numpy()
            found.compare(table, "label", rows, table["label"][rows] != labels, labels)
        if "prediction" in table.columns:
            label, largest = table["prediction"][rows], values.amax(1)
            known = (label >= 0) & (label < values.shape[1])
            own = values[torch.arange(len(rows)), torch.from_numpy(np.where(known, label, 0))]
            tied = (own >= largest - _ROUNDING * (1 + largest.abs())).numpy()
            found.compare(table, "prediction", rows, ~(known & tied), values.argmax(1).numpy())


def _parts(
    table: Table,
    sets: Mapping[tuple[str, str], ImageSet],
    every: int,
    limit: int,
    seed: int,
    together: int,
) -> list[Part]:
    """The samples to try."""
    found: list[Part] = []
    for number, ((name, kind), images) in enumerate(sets.items()):
        rows = np.flatnonzero((table["set"] == name) & (table["kind"] == kind))
        rows = rows[np.unique(table["index"][rows], return_index=True)[1]]
        step = every or max(1, len(rows) // SAMPLES)
        start = int(np.random.default_rng([seed, number]).integers(min(step, max(1, len(rows)))))
        rows = rows[start::step][: limit or None]
        for begin in range(0, len(rows), together):
            some = rows[begin : begin + together]
            index = table["index"][some]
            state = np.random.SeedSequence([seed, number, begin, int(table.manifest["seed"]), 1])
            source = torch.Generator().manual_seed(int(state.generate_state(1, np.uint64)[0]))
            found.append(Part(some, images.images[torch.from_numpy(index)], kind, name, index, source))
    return found


def specs(table: Table, detector: Detector) -> list[str] | None:
    """What to call the OOD sets of some rows by: as the checkpoint's data do, else by their names.

    Returns:
        One spec a set; None where the rows are of none.
    """
    origin = detector.provenance
    data = None if origin is None else origin.data if isinstance(origin, Import) else origin.recipe.data
    known = {spec.name_of(text): text for text in (data.ood if data else ())}
    names = [entry["set"] for entry in table.manifest.get("data") or () if entry["kind"] != "id"]
    return [known.get(name, name) for name in names] or None
