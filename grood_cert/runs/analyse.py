"""A run of Lipschitz analysis: detector and image sets in, one row for each sample and eps out.

`grood_cert.lipschitz.analyser` does the estimating and bounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grood_cert.data import ImageSet
from grood_cert.detector import Detector
from grood_cert.lipschitz.analyser import Analyser, AnalysisSettings
from grood_cert.results.columns import header
from grood_cert.results.table import Table
from grood_cert.runs.batches import Batch, batches, generator
from grood_cert.runs.manifest import manifest
from grood_cert.runs.plan import outline
from grood_cert.runs.saving import execute
from grood_cert.runs.shards import WHOLE, Shard
from grood_cert.system.reporting import SILENT, Reporter


def analyse(analyser: Analyser, batch: Batch) -> list[dict[str, Any]]:
    """Analyse one batch of a run.

    Args:
        analyser: Detector and settings.
        batch: Images and their names.

    Returns:
        One record for each sample and eps, with the columns of a Lipschitz analysis.

    Raises:
        SoundnessError: If an estimate from below exceeds a formal bound.
    """
    pages = analyser.analyse(batch.images.images, generator(analyser.settings.seed, batch.number))
    return [
        name | {column: values[position] for column, values in page.items()}
        for position, name in enumerate(batch.names)
        for page in pages
    ]


def run(
    detector: Detector,
    model: Path,
    sets: Sequence[ImageSet],
    settings: AnalysisSettings,
    out: Path,
    *,
    limit: int = 0,
    shard: Shard = WHOLE,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Table:
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
        reporter: Hears of every batch, and of an earlier run that was found.

    Returns:
        The analysis, as written.

    Raises:
        InputError: If settings, sets, folder or a layer of the network are unusable.
        RunError: If the bound engine is missing or cannot convert the network.
        SoundnessError: If an estimate from below exceeds a formal bound; the evidence is saved.
    """
    analyser = Analyser(detector, settings)
    path = execute(
        out / "lipschitz.csv",
        header("lipschitz", settings.eps),
        batches(sets, limit, analyser.batch_size, settings.seed),
        lambda batch: analyse(analyser, batch),
        manifest("lipschitz", detector, model, sets, limit, settings) | {"bounded_by": analyser.choice.engine},
        dict,
        stage="analysing",
        shard=shard,
        force=force,
        eps=settings.eps,
        reporter=reporter,
    )
    return Table.read(path, "lipschitz")


def plan(
    detector: Detector, sets: Sequence[ImageSet], settings: AnalysisSettings, *, limit: int = 0, shard: Shard = WHOLE
) -> list[str]:
    """Lines on what `run` would do, and about how long; nothing is written.

    Raises:
        InputError: If settings, sets or a layer of the network are unusable.
        RunError: If the bound engine is missing or cannot convert the network.
        SoundnessError: If an estimate from below exceeds a formal bound.
    """
    analyser = Analyser(detector, settings)
    own = shard.of(batches(sets, limit, analyser.batch_size, settings.seed))
    return outline("analysing", own, settings.eps, lambda batch: analyse(analyser, batch))
