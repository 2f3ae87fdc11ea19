"""A small run over small sets, whose rows are those of its seed and images."""

from __future__ import annotations

import json

import torch

from grood_cert.data import ImageSet
from grood_cert.runs import saving
from grood_cert.runs.batches import batches, generator

COLUMNS = ["set", "kind", "index", "file", "score", "median_estimate"]


def image_set(name, size, kind="id"):
    pixels = torch.rand(size, 1, 2, 2, generator=torch.Generator().manual_seed(size))
    return ImageSet(name, kind, pixels, torch.zeros(size).long(), ("0",))


SETS = [image_set("z", 11), image_set('a "b", c', 6, "ood"), image_set("m", 1, "noise")]
BATCHES = batches(SETS, 0, 2, 0)  # 6 + 3 + 1
DESCRIPTION = {
    "kind": "smoothing-calibration",
    "norm": "l2",
    "schema": 1,
    "model": {"path": "model.pt", "sha256": "ab"},
    "data": [{"set": images.name, "kind": images.kind, "images": len(images)} for images in SETS],
    "eps": (0.1, 0.2),
    "seed": 0,
    "device": "cpu",
    "versions": {"torch": "2", "python": "3"},
}


class Worker:
    """Work whose rows come from the seed and the images, with a failure in every batch; it may end in an exception."""

    def __init__(self, last=None, error=KeyboardInterrupt):
        self.done, self.last, self.error = [], last, error

    def __call__(self, batch):
        if len(self.done) == self.last:
            raise self.error
        self.done.append(batch.number)
        noise = torch.rand(len(batch), generator=generator(0, batch.number), dtype=torch.float64)
        values = batch.images.images.double().sum((1, 2, 3)) + noise
        return [
            name | {"score": value, "median_estimate": value}
            for name, value in zip(batch.names, values.tolist(), strict=True)
        ]

    def failures(self):
        return {"boom": len(self.done)}


def execute(folder, worker=None, description=DESCRIPTION, **options):
    worker = worker or Worker()
    return saving.execute(
        folder / "rows.csv", COLUMNS, BATCHES, worker, description, worker.failures, stage="working", **options
    )


def manifest(path):
    return json.loads(path.with_suffix(".json").read_text())
