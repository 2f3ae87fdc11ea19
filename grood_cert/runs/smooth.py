"""A smoothing run: detector, calibration images and image sets in, one row a sample out.

`grood_cert.certification.smoothing` draws the scores and says what they prove.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grood_cert import metrics
from grood_cert.certification.smoothing import Smoother, SmoothingSettings, median_estimate
from grood_cert.data import ImageSet
from grood_cert.detector import Detector
from grood_cert.errors import RunError
from grood_cert.metrics import TPR_PERCENT
from grood_cert.results.columns import SCHEMAS, grid_column, header
from grood_cert.results.table import Table
from grood_cert.results.thresholds import calibrated_gamma
from grood_cert.runs.batches import Batch, batches
from grood_cert.runs.manifest import manifest
from grood_cert.runs.plan import outline
from grood_cert.runs.saving import execute
from grood_cert.runs.shards import WHOLE, Shard
from grood_cert.system.reporting import SILENT, Reporter

GUARANTEE = (
    "With probability at least 1 - alpha over the draws of a row, its decision and radius_smoothed are true of the "
    "smoothed detector; with probability at least 1 - alpha, all its bounds are. Up to alpha of the rows are expected "
    "to be false."
)


def calibrate(smoother: Smoother, batch: Batch) -> list[dict[str, Any]]:
    """Estimate the smoothed score of calibration images; gamma is the `metrics.calibrated_threshold` of all of them.

    Returns:
        One record a sample, with the columns of a smoothing-calibration.

    Raises:
        RunError: If a score is NaN, so that there is no gamma.
    """
    records = batch.names
    for image, record in zip(batch.images.images, records, strict=True):
        median = float(median_estimate(smoother.draws(image, "calibration", record["set"], record["index"])))
        if math.isnan(median):
            raise RunError(
                f"calibration image {record['index']} of {record['set']} scores NaN under noise, so there is no gamma; "
                f"try dtype float64 instead of {smoother.settings.dtype}, or a smaller sigma"
            )
        record |= {"score": smoother.score(image), "median_estimate": median}
    return records


def certify(smoother: Smoother, gamma: float, batch: Batch) -> list[dict[str, Any]]:
    """Certify one batch of a run.

    Args:
        smoother: Detector and settings.
        gamma: Threshold of the smoothed score.
        batch: Images and their names; the `kind` says which decision is right.

    Returns:
        One record a sample, with the columns of smoothing.
    """
    images, records = batch.images, batch.names
    for image, label, record in zip(images.images, images.labels.tolist(), records, strict=True):
        draws = smoother.draws(image, "test", record["set"], record["index"])
        found = smoother.certify(draws, gamma, images.kind)
        for name in SCHEMAS["smoothing"].grid:
            values = zip(smoother.settings.eps, found.pop(name), strict=True)
            record |= {grid_column(name, eps): value for eps, value in values}
        record |= {"label": label, "score": smoother.score(image)} | found
    return records


def run(
    detector: Detector,
    model: Path,
    calibration: ImageSet,
    sets: Sequence[ImageSet],
    settings: SmoothingSettings,
    out: Path,
    *,
    limit: int = 0,
    shard: Shard = WHOLE,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Table:
    """Smooth a detector, calibrate it anew and certify it.

    Writes the medians of the calibration images to `smoothing-calibration.csv` and the rows to `smoothing.csv`, each
    with a manifest (`.json`) beside it. A run that was interrupted goes on where it was.

    Args:
        detector: The detector whose score is smoothed.
        model: The checkpoint it came from, named and hashed in the manifests.
        calibration: ID images that were neither trained nor tested on.
        sets: Image sets to certify.
        settings: What to certify.
        out: Folder; made if absent.
        limit: Most images of each set, 0 for all.
        shard: Which part of the batches to certify. Shards that run jointly share the calibration too; of others, the
            first to run in a folder calibrates, and those that start before it is done are refused.
        force: Start afresh, whatever is there.
        reporter: Hears of the stages, "calibrating" and "certifying", of every batch, and of an earlier run that was
            found.

    Raises:
        InputError: If settings, sets or folder are unusable, or there are fewer than 19 calibration images.
        RunError: If a calibration image has no smoothed score.
    """
    smoother = Smoother(detector, settings)
    inside, tested = (
        batches(images, most, settings.batch_size, settings.seed)
        for images, most in (([calibration], settings.calibration_limit), (sets, limit))
    )
    samples = sum(map(len, inside))
    metrics.calibrated_threshold(range(samples), TPR_PERCENT)  # refuses too small a split
    about = {"norm": "l2", "method": settings.method, "gamma_base": detector.gamma, "dtype": settings.dtype}
    medians = execute(
        out / "smoothing-calibration.csv",
        header("smoothing-calibration", settings.eps),
        inside,
        functools.partial(calibrate, smoother),
        manifest("smoothing-calibration", detector, model, [calibration], settings.calibration_limit, settings) | about,
        dict,
        stage="calibrating",
        shard=shard if shard.joint else WHOLE,
        force=force,
        reporter=reporter,
    )
    gamma = calibrated_gamma(Table.read(medians, "smoothing-calibration"))
    about |= {
        "gamma": gamma,
        "calibration": {"set": calibration.name, "samples": samples, "percent": TPR_PERCENT},
        "guarantee": GUARANTEE,
    }
    path = execute(
        out / "smoothing.csv",
        header("smoothing", settings.eps),
        tested,
        functools.partial(certify, smoother, gamma),
        manifest("smoothing", detector, model, sets, limit, settings) | about,
        dict,
        stage="certifying",
        shard=shard,
        force=force,
        eps=settings.eps,
        tally=lambda record: [record["status"]],
        reporter=reporter,
    )
    return Table.read(path, "smoothing")


def plan(
    detector: Detector,
    calibration: ImageSet,
    sets: Sequence[ImageSet],
    settings: SmoothingSettings,
    *,
    limit: int = 0,
    shard: Shard = WHOLE,
) -> list[str]:
    """Lines on what `run` would do, and about how long; nothing is written.

    Raises:
        InputError: If settings or sets are unusable.
        RunError: If a calibration image has no smoothed score.
    """
    smoother = Smoother(detector, settings)
    inside = batches([calibration], settings.calibration_limit, settings.batch_size, settings.seed)
    tested = shard.of(batches(sets, limit, settings.batch_size, settings.seed))
    return [
        *outline("calibrating", inside, (), functools.partial(calibrate, smoother)),
        *outline("certifying", tested, settings.eps, functools.partial(certify, smoother, detector.gamma)),
    ]
