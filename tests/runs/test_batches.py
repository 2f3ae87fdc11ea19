from __future__ import annotations

import pytest
import torch

from grood_cert.errors import InputError
from grood_cert.runs.batches import batches, generator
from tests.runs.work import BATCHES, SETS, image_set


def test_batches_hold_every_sample_once_in_order():
    names = [name for batch in BATCHES for name in batch.names]
    assert names == [
        {"set": images.name, "kind": images.kind, "index": index, "file": ""}
        for images in SETS
        for index in range(len(images))
    ]
    assert [batch.number for batch in BATCHES] == list(range(10)) and sum(map(len, BATCHES)) == 18
    assert torch.equal(torch.cat([batch.images.images for batch in BATCHES[:6]]), SETS[0].images)


def test_a_limited_batch_carries_its_images_and_their_positions():
    found = batches(SETS, 4, 3, seed=5)
    assert [len(batch) for batch in found] == [3, 1, 3, 1, 1]
    for batch in found:
        (whole,) = [images for images in SETS if images.name == batch.names[0]["set"]]
        assert torch.equal(batch.images.images, whole.images[list(batch.index)])
    with pytest.raises(InputError, match="limit must be 0"):
        batches(SETS, -1, 3, 0)


def test_streams_differ_between_batches_and_seeds():
    pairs = [(seed, batch) for seed in (-1, 0, 1, 2**63) for batch in (0, 1, 2, 10**6)]
    drawn = {float(torch.rand(1, generator=generator(*pair), dtype=torch.float64)) for pair in pairs}
    assert len(drawn) == len(pairs)
    assert generator(3, 4).initial_seed() == generator(3, 4).initial_seed()


def test_the_first_set_starts_small():
    """The list is a function of sets, limit, batch size and seed; every sample is in it once."""
    sets = [image_set("a", 50), image_set("b", 40, "ood")]
    found = batches(sets, 0, 16, 0)
    assert [len(batch) for batch in found] == [4, 8, 16, 16, 6, 16, 16, 8]
    assert [name["index"] for batch in found for name in batch.names] == [*range(50), *range(40)]
    assert [len(batch) for batch in batches(sets, 20, 64, 0)] == [4, 8, 8, 20]
    assert [len(batch) for batch in batches(sets[:1], 3, 1, 0)] == [1, 1, 1]
