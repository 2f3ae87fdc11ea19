"""How far a run has come, as its manifest tells it, and whether two manifests speak of the same run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grood_cert.system.files import as_json


@dataclass(frozen=True)
class Progress:
    """How a run has gone so far. These keys of a manifest say that; all other keys say what the run is.

    Attributes:
        complete: Whether all batches are done.
        batches: Batches done.
        rows: Rows saved.
        bytes: Length of the file of rows; what follows was not finished.
        seconds: Time spent, over all interruptions and shards.
        peak_memory: Most bytes a process held, on the device that computed.
        failures: Messages of exceptions that cost bounds, with the number of bounds lost to each.
        finished: When the run was complete.
        shard: Which part of a run this is, such as "1/4"; None: all of it.
        shards: From how many parts it was merged.
    """

    complete: bool = False
    batches: int = 0
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    finished: str | None = None
    shard: str | None = None
    shards: int = 1

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Progress:
        """The progress a manifest tells of; manifests of earlier versions were written at the end only."""
        known = {item.name: manifest[item.name] for item in dataclasses.fields(cls) if item.name in manifest}
        return cls(**({"complete": True} | known))


FORCE = "choose another --out, or add --force to overwrite it"
_PROGRESS = {item.name for item in dataclasses.fields(Progress)}
_ELSEWHERE = {  # may change as a run goes on
    *("model.path", "device", "machine", "versions.python", "versions.numpy"),
    "cross_check.largest_disagreement",
}


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The first thing in which two manifests describe different runs, and what each says; None if there is none."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if pairs is None:
            return {name: value}
        return {key: item for part, inner in pairs for key, item in flat(inner, f"{name}.{part}").items()}

    one, other = (
        {key: item for name, value in page.items() if name not in _PROGRESS for key, item in flat(value, name).items()}
        for page in (as_json(one), as_json(other))
    )
    for name in dict.fromkeys([*other, *one]):
        if one.get(name) != other.get(name) and name not in _ELSEWHERE:
            return name, str(one.get(name))[:60], str(other.get(name))[:60]
    return None
