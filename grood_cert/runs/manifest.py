"""What a run is, as its manifest says it."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grood_cert.bounds.engines import lirpa_version
from grood_cert.data import ImageSet
from grood_cert.detector import Detector, versions
from grood_cert.results.columns import SCHEMAS
from grood_cert.system.files import sha256


def manifest(
    kind: str, detector: Detector, model: Path | None, sets: Sequence[ImageSet], limit: int, settings: Any
) -> dict[str, Any]:
    """What a run is: kind, model, data, settings, software, machine. `Progress` holds the other keys of a manifest."""
    weight, origin = next(detector.network.parameters()), detector.provenance
    file = {"path": str(model), "sha256": sha256(model)} if model else {"path": None, "sha256": None}
    return {
        "kind": kind,
        "schema": SCHEMAS[kind].version,
        "model": {**file, "name": detector.name},
        "recipe": origin.recipe.to_dict() if origin else None,
        "gamma": detector.gamma,
        "calibration": origin.calibration if origin else None,
        "data": [
            {"set": images.name, "kind": images.kind, "images": len(images), "sha256": images.content_hash()}
            for images in sets
        ],
        "limit": limit,
        **dataclasses.asdict(settings),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "versions": {**versions(), "auto_LiRPA": lirpa_version()},
        "machine": platform.machine(),
    }
