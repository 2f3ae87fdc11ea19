"""What a run is, as its manifest says it."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from grood_cert.bounds.engine import lirpa_version
from grood_cert.data import ImageSet
from grood_cert.detector import Detector, Import, Provenance, logits, versions
from grood_cert.results.columns import SCHEMAS
from grood_cert.system.files import sha256


def manifest(
    kind: str, detector: Detector, model: Path | None, sets: Sequence[ImageSet], limit: int, settings: Any
) -> dict[str, Any]:
    """What a run is: kind, model, data, settings, software, machine. `Progress` holds the other keys of a manifest."""
    weight, origin = next(detector.network.parameters()), detector.provenance
    return {
        "kind": kind,
        "schema": SCHEMAS[kind].version,
        "model": {
            "path": str(model) if model else None,
            "sha256": model_hash(detector, model),
            "name": detector.name,
        },
        "recipe": origin.recipe.to_dict() if isinstance(origin, Provenance) else None,
        "imported": origin.source if isinstance(origin, Import) else None,
        "score": str(detector.score),
        "gamma": detector.gamma,
        "calibration": origin.calibration if origin else None,
        "metrics": origin.metrics if origin else None,
        "data": [
            {"set": images.name, "kind": images.kind, "images": len(images), "sha256": images.content_hash()}
            | ({"note": images.note} if images.note else {})
            for images in sets
        ],
        "limit": limit,
        **dataclasses.asdict(settings),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "versions": {**versions(), "auto_LiRPA": lirpa_version()},
        "machine": platform.machine(),
    }


def model_hash(detector: Detector, model: Path | None) -> str:
    """How manifests name a model: the hash of its checkpoint, or of the network where there is none."""
    return sha256(model) if model else _hash_of(detector)


def _hash_of(detector: Detector) -> str:
    """SHA-256, in hex, of a network's layers, weights and buffers, and of what it makes of two random images.

    The images tell networks apart that differ in the code of `forward` alone.
    """
    network = detector.network
    digest = hashlib.sha256(str(network).encode())
    for name, tensor in (*network.state_dict().items(), *network.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    images = torch.rand(2, *detector.shape, generator=torch.Generator().manual_seed(0))
    digest.update(" ".join(f"{value:.6g}" for value in logits(network, images).flatten().tolist()).encode())
    return digest.hexdigest()
