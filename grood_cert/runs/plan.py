"""What a run would do, and about how long it would take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from grood_cert.runs.batches import Batch, extent
from grood_cert.system.reporting import clock

_TRIED = 4  # samples of a batch that are worked on


def outline(
    stage: str, batches: Sequence[Batch], eps: Sequence[float], work: Callable[[Batch], list[dict[str, Any]]]
) -> list[str]:
    """Lines on the batches of a run, and on its time as a few samples of the first and the last of them foretell it.

    Args:
        stage: What is done, in a word.
        batches: The batches to do.
        eps: Radii of the balls around each sample.
        work: Computes the records of a batch, and writes nothing.
    """
    counts: dict[tuple[str, str], list[int]] = {}
    for batch in batches:
        counts.setdefault((batch.source.name, batch.source.kind), []).append(len(batch))
    lines = [f"{stage}: {extent(batches, eps)}, in {len(batches)} batches"]
    lines += [f"  {name} ({kind}): {sum(sizes)} samples" for (name, kind), sizes in counts.items()]
    if not batches:
        return lines
    paces, tried = [], 0
    for batch in dict.fromkeys((batches[0], batches[-1])):
        few = replace(batch, positions=batch.positions[:_TRIED], index=batch.index[:_TRIED])
        started = time.perf_counter()
        work(few)
        paces.append((time.perf_counter() - started) / len(few))
        tried += len(few)
    shortest, longest = (pace * sum(map(len, batches)) for pace in (min(paces), max(paces)))
    lines.append(
        f"  about {clock(shortest)} to {clock(longest)}, from {tried} samples tried in small batches; large ones are "
        "often faster"
    )
    return lines
