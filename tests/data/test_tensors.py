from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, SubsetRandomSampler, TensorDataset

from grood_cert.data.tensors import image_set
from grood_cert.errors import InputError

IMAGES, LABELS = torch.rand(10, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3


class Backwards(BatchSampler):
    """Batches in another order."""

    def __iter__(self):
        return reversed(list(super().__iter__()))


class Few(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return IMAGES[index], int(LABELS[index]), "what else there is"


@pytest.mark.parametrize(
    "data",
    [
        (IMAGES, LABELS),
        [IMAGES.double(), LABELS],
        Few(),
        TensorDataset(IMAGES, LABELS),
        DataLoader(Few(), batch_size=4),
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=3),
    ],
)
def test_images_with_labels(data):
    found = image_set(data, "mine", "id")
    assert torch.equal(found.images, IMAGES) and torch.equal(found.labels, LABELS)
    assert (found.name, found.kind, found.class_names) == ("mine", "id", ("0", "1", "2"))


@pytest.mark.parametrize("data", [IMAGES, DataLoader(IMAGES, batch_size=4), TensorDataset(IMAGES)])
def test_images_alone(data):
    found = image_set(data, "svhn", "ood")
    assert torch.equal(found.images, IMAGES) and not found.labels.any() and found.class_names == ("0",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("digits", "'x': expected a tensor, .images, labels., a Dataset or a DataLoader, got str"),
        (np.zeros((3, 1, 2, 2)), "got ndarray"),
        (IMAGES * 255, r"'x': pixels from .* all must lie in \[0, 1\]"),
        ((IMAGES * 255).byte(), "'x': pixels of type torch.uint8; divide them by 255"),
        (IMAGES[0], r"'x': expected shape \(N, C, H, W\), got \(1, 2, 2\)"),
        (IMAGES[:0], "'x': expected one image or more, got none"),
        ((IMAGES, LABELS[:4]), "'x': expected one label a sample"),
        ((IMAGES, LABELS - 1), "'x': expected one label a sample, 0 or more"),
        (DataLoader(Few(), shuffle=True), "'x': the loader shuffles; give shuffle=False"),
        (DataLoader(Few(), sampler=SubsetRandomSampler([0, 1])), "the loader shuffles"),
        (DataLoader(Few(), batch_sampler=Backwards(SequentialSampler(Few()), 2, False)), "the loader shuffles"),
        (DataLoader(Few(), batch_size=2, drop_last=True), "the loader drops images; give drop_last=False"),
        ((torch.rand(3, 1, 2, 2), torch.rand(3, 1, 2, 2)), "what follows the images must be labels"),
        (DataLoader([IMAGES[0], IMAGES[1, :, :1]]), "'x': expected tensors of images of one shape"),
        (DataLoader([{"image": IMAGES[0]}]), "'x': expected tensors of images"),
    ],
)
def test_what_is_no_image_set(data, message):
    with pytest.raises(InputError, match=message) as caught:
        image_set(data, "x", "id")
    assert "\n" not in str(caught.value)
