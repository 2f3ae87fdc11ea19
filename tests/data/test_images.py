from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from grood_cert.data import ImageSet, StoredImages, load_set


def test_select_and_content_hash():
    digits = load_set("digits")
    for indices in ([2, 0], np.array([2, 0]), torch.tensor([2, 0])):
        assert torch.equal(digits.select(indices).images, digits.images[[2, 0]])
        assert torch.equal(digits.select(indices).labels, digits.labels[[2, 0]])
    assert len(digits.select(digits.labels == 1)) == 182
    assert len(digits.select([])) == 0
    small = digits.select([0, 1])
    assert small.content_hash() == ImageSet("other", "id", small.images.clone(), small.labels, ()).content_hash()
    transposed = ImageSet("t", "ood", small.images.transpose(2, 3).contiguous().transpose(2, 3), small.labels, ())
    assert transposed.content_hash() == small.content_hash()
    expected = hashlib.sha256(b"2,1,8,8" + small.images.numpy().tobytes() + small.labels.numpy().tobytes())
    assert small.content_hash() == expected.hexdigest()
    assert small.select([1, 0]).content_hash() != small.content_hash()
    relabelled = ImageSet("t", "ood", small.images, small.labels + 1, ())
    assert relabelled.content_hash() != small.content_hash()


def test_channel_statistics(monkeypatch):
    colour = load_set("photo-patches", shape=(3, 9, 7))
    monkeypatch.setattr("grood_cert.data.images._CHUNK", 5000)  # many parts
    mean, std = colour.channel_statistics()
    for channel in range(3):
        values = colour.images[:, channel].double().numpy()
        assert mean[channel].item() == pytest.approx(values.mean(), rel=1e-12)
        assert std[channel].item() == pytest.approx(values.std(), rel=1e-12)
    constant = ImageSet("c", "id", torch.full((4, 1, 3, 3), 0.1), torch.zeros(4, dtype=torch.int64), ("c",))
    assert constant.channel_statistics()[1].item() < 1e-15


def test_stored_images_stand_for_a_tensor(monkeypatch):
    tensor = load_set("digits").images
    monkeypatch.setattr("grood_cert.data.images.IN_MEMORY", 0)
    stored = load_set("digits").images
    assert isinstance(stored, StoredImages) and stored.shape == tensor.shape and len(stored) == len(tensor)
    for index in (3, -1, slice(5, 90, 7), [4, 2, 2], torch.tensor([[1, 2], [3, 4]])[0], tensor[:, 0, 3, 3] > 0.5, []):
        assert torch.equal(stored[index], tensor[index])
    assert torch.equal(torch.cat(list(stored.split(100))), tensor)
    assert torch.equal(torch.stack(list(stored)), tensor)
    assert stored[:].dtype == torch.float32
    with pytest.raises(IndexError):
        stored[1797]
