"""Proofs of a certification run in files: one network, and one file a sample, for `grood_cert.certification.checker`."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grood_cert.certification.cascade import Cascade
from grood_cert.certification.proofs import Prover
from grood_cert.data import ImageSet
from grood_cert.errors import InputError, said
from grood_cert.runs.batches import Batch
from grood_cert.system.files import replacing

FOLDER = "proofs"
_LONGEST = 60  # of a set's name in the name of a file


def check_samples(samples: int) -> None:
    """Refuse a number of samples that makes no sense.

    Raises:
        InputError: If it is negative.
    """
    if samples < 0:
        raise InputError(f"--save-proofs must be 0 (none) or more samples of each set, got {samples}")


def remove_proofs(folder: Path) -> None:
    """Remove the proofs of an earlier run, from the folder of the run."""
    for path in (folder / FOLDER).glob("*.npz"):
        if re.fullmatch(r"network\.npz|\d+-[A-Za-z0-9._-]+-\d+\.npz", path.name):
            path.unlink(missing_ok=True)


class Proofs:
    """Where the proofs of the first samples of each set go.

    Args:
        folder: The run's; proofs lie in `proofs/` there.
        samples: How many samples of each set, those that come first; more than 0.
        cascade: Detector and settings.
        sets: All image sets of the run.

    Attributes:
        left_out: Why there are no proofs; None if there are.
        count: Proofs written since this process began.
        failures: Messages of exceptions that cost proofs, with the number lost to each.
    """

    def __init__(self, folder: Path, samples: int, cascade: Cascade, sets: Sequence[ImageSet]) -> None:
        self.left_out: str | None = None
        self.count, self.failures = 0, Counter[str]()
        self._folder, self._samples, self._norm = folder / FOLDER, samples, cascade.settings.norm
        self._names = [(images.kind, images.name) for images in sets]
        try:
            detector = cascade.detector
            self._prover = Prover(cascade.choice.bounded.graph, detector.score, detector.gamma)
            self._network = packed(self._prover.arrays)
            self._digest = hashlib.sha256(self._network).hexdigest()
        except InputError as error:
            self.left_out = str(error)

    @property
    def description(self) -> dict[str, Any]:
        """What the manifest says."""
        what: dict[str, Any] = {"samples_of_each_set": self._samples}
        if self.left_out is not None:
            return what | {"left_out": self.left_out}
        return what | {"folder": FOLDER, "network_sha256": self._digest}

    def save(self, batch: Batch, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the proofs of a batch; samples without a certified radius have none.

        Args:
            batch: Images.
            records: Their rows.
        """
        wanted = [number for number, position in enumerate(batch.positions.tolist()) if position < self._samples]
        if self.left_out is not None or not wanted:
            return
        self._write("network.npz", self._network)
        kind, name = batch.source.kind, batch.source.name
        words = f"{self._names.index((kind, name))}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:_LONGEST]}"
        for number in wanted:
            radius, index = records[number]["radius_certified"], batch.index[number]
            if not radius > 0:
                continue
            try:
                proof = self._prover.prove(batch.images.images[number], kind == "id", self._norm, radius)
            except (RuntimeError, MemoryError, ValueError, ArithmeticError) as error:
                self.failures[f"no proof is saved: {type(error).__name__}: {said(error)[:160]}"] += 1
                continue
            if proof is not None:
                claim = {
                    **proof.claim,
                    "network": self._digest,
                    "name": f"image {index} of {name}",
                    "set": name,
                    "index": index,
                }
                text = {"text": np.array(json.dumps(claim))}
                self._write(f"{words}-{index}.npz", packed(proof.arrays | text))
                self.count += 1

    def _write(self, name: str, content: bytes) -> None:
        path = self._folder / name
        if not path.is_file() or path.read_bytes() != content:
            with replacing(path) as temporary:
                temporary.write_bytes(content)


def packed(arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """Arrays as the content of an npz file, the same for the same arrays."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()
