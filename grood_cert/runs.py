"""What every run over a detector's test sets shares: which samples, the manifest, and the evidence of a violation."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grood_cert import lirpa
from grood_cert.ball import NORMS, Norm, largest_eps
from grood_cert.data import ImageSet
from grood_cert.detector import Detector, versions
from grood_cert.errors import InputError, SoundnessError
from grood_cert.files import check_writable, replacing, sha256, write_csv, write_json
from grood_cert.rows import manifest_path

DEFAULT_EPS: dict[str, tuple[float, ...]] = {
    "linf": (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15),
    "l2": (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5),
    "l1": (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0),
}


def check_balls(eps: Sequence[float], norm: Norm, method: str, batch_size: int, shape: tuple[int, int, int]) -> None:
    """Refuse an eps grid, norm, engine method or batch size that makes no sense for images of this shape.

    Raises:
        InputError: Naming what is wrong.
    """
    if norm not in NORMS:
        raise InputError(f"unknown norm {norm!r}; use one of {', '.join(NORMS)}")
    if method not in lirpa.METHODS:
        raise InputError(f"unknown method {method!r}; use one of {', '.join(lirpa.METHODS)}")
    limit = largest_eps(shape, norm)
    for value in eps:
        if not (math.isfinite(value) and 0 <= value <= limit):
            raise InputError(f"eps {value!r}: expected a number from 0 to {limit:g} (pixels lie in [0, 1])")
    if not eps:
        raise InputError("no eps given; add for example --eps 0.01 --eps 0.02")
    for before, after in itertools.pairwise(eps):
        if not before < after:
            raise InputError(f"eps must be ascending and without repetition, got {before!r} before {after!r}")
    if batch_size < 1:
        raise InputError(f"batch size must be 1 or more, got {batch_size}")


def check_network(network: nn.Module) -> None:
    """Refuse a network that is not the one that proofs are about: eval mode, float64.

    Raises:
        InputError: If a module is in train mode or a parameter is not float64.
    """
    if any(module.training for module in network.modules()):
        raise InputError("the network is in train mode; call network.eval() first")
    wrong = {str(value.dtype) for value in network.parameters() if value.dtype != torch.float64}
    if wrong:
        raise InputError(f"proofs need a float64 network, got {', '.join(sorted(wrong))}; call network.double() first")


def subset(images: ImageSet, limit: int, seed: int) -> tuple[ImageSet, Tensor]:
    """At most `limit` images (0: all), drawn without replacement by the seed, in their order in the set.

    Returns:
        The images and their positions in the set.
    """
    index = torch.arange(len(images))
    if 0 < limit < len(images):
        index = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
    return images.select(index), index


def size(sets: Sequence[ImageSet], limit: int) -> int:
    """Number of samples of a run."""
    return sum(min(len(images), limit) if limit else len(images) for images in sets)


def batches(
    sets: Sequence[ImageSet], limit: int, batch_size: int, seed: int
) -> Iterator[tuple[ImageSet, list[dict[str, Any]]]]:
    """The samples of a run, batch by batch, never across sets.

    Yields:
        The images of a batch, and the columns that name each of them: `set`, `kind`, `index`.
    """
    for whole in sets:
        images, index = subset(whole, limit, seed)
        for part in torch.arange(len(images)).split(batch_size):
            names = [{"set": whole.name, "kind": whole.kind, "index": int(index[sample])} for sample in part]
            yield images.select(part), names


def check_target(target: Path, limit: int, force: bool) -> None:
    """Refuse to start a run that could not be written, or would overwrite another.

    Raises:
        InputError: If so.
    """
    if target.exists() and not force:
        raise InputError(f"{target} exists already; choose another --out, or add --force to overwrite it")
    if limit < 0:
        raise InputError(f"limit must be 0 (all) or more, got {limit}")
    check_writable(target.parent)


@contextlib.contextmanager
def evidence_saved(folder: Path) -> Iterator[None]:
    """Save the evidence of a `SoundnessError` as `counterexample.npz` in the folder, and let the error go on."""
    try:
        yield
    except SoundnessError as error:
        error.counterexample = folder / "counterexample.npz"
        with replacing(error.counterexample) as temporary:
            np.savez(temporary, **error.evidence)
        raise


def execute(
    target: Path,
    columns: Sequence[str],
    batches: Iterable[list[dict[str, Any]]],
    manifest: Callable[[], dict[str, Any]],
    samples: int,
    begin: Callable[[int], None],
    advance: Callable[[int], None],
    rows_per_sample: int = 1,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run all batches, then write rows and manifest; a `SoundnessError` leaves its evidence in the folder instead.

    Args:
        target: Where the rows go; the manifest goes beside them (`.json`).
        columns: Columns of the rows.
        batches: Records, a batch at a time.
        manifest: Asked for once the batches are done, since a method may have had to fall back; the time is added.
        samples: Number of samples.
        begin: Called once with the number of samples.
        advance: Called after every batch with its number of samples.
        rows_per_sample: Records for each sample.

    Returns:
        The records and the manifest, as written.

    Raises:
        InputError: If a file cannot be written.
        SoundnessError: From a batch.
    """
    started = time.perf_counter()
    begin(samples)
    records: list[dict[str, Any]] = []
    with evidence_saved(target.parent):
        for batch in batches:
            records += batch
            advance(len(batch) // rows_per_sample)
    written = manifest() | {"seconds": round(time.perf_counter() - started, 3)}
    write_csv(target, columns, records)
    write_json(manifest_path(target), written)
    return records, written


def manifest(detector: Detector, model: Path, sets: Sequence[ImageSet], limit: int, settings: Any) -> dict[str, Any]:
    """What was run on what: model, data, settings, software, machine and time."""
    weight = next(detector.network.parameters())
    return {
        "model": {"path": str(model), "sha256": sha256(model), "name": detector.recipe.name},
        "recipe": detector.recipe.to_dict(),
        "gamma": detector.gamma,
        "calibration": detector.calibration,
        "data": [
            {"set": images.name, "kind": images.kind, "images": len(images), "sha256": images.content_hash()}
            for images in sets
        ],
        "limit": limit,
        **dataclasses.asdict(settings),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "versions": {**versions(), "auto_LiRPA": lirpa.version()},
        "machine": platform.machine(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
