from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
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


class Items(Dataset):
    """A data set of a list."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


BYTES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (10, 3, 4, 5), dtype=np.uint8))
PICTURES = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in BYTES]


@pytest.mark.parametrize(
    "data",
    [
        (BYTES, LABELS),
        TensorDataset(BYTES, LABELS),
        Items([(picture, int(label)) for picture, label in zip(PICTURES, LABELS, strict=True)]),
        Items([{"image": picture, "label": label} for picture, label in zip(PICTURES, LABELS, strict=True)]),
        Items([{"img": image, "fine_label": int(label)} for image, label in zip(BYTES, LABELS, strict=True)]),
        DataLoader(Items([{"x": image, "y": int(label)} for image, label in zip(BYTES, LABELS, strict=True)])),
    ],
)
def test_bytes_pictures_and_items_with_names(data):
    found = image_set(data, "mine", "id")
    assert torch.equal(found.images, BYTES / 255) and torch.equal(found.labels, LABELS)


def test_grey_pictures_and_pictures_of_sixteen_bits():
    grey = Items([picture.convert("L") for picture in PICTURES])
    assert image_set(grey, "x", "id").shape == (1, 4, 5)
    deep = Items([Image.fromarray(np.array([[0, 257], [32896, 65535]], np.uint16))])
    assert (image_set(deep, "x", "id").images * 255).flatten().tolist() == [0, 1, 128, 255]


def test_a_data_set_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"image": PICTURES, "label": LABELS.tolist()},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(3)}),
    )
    for data in (table, table.with_format("torch")):
        found = image_set(data, "x", "id")
        assert torch.equal(found.images, BYTES / 255) and torch.equal(found.labels, LABELS)
    with pytest.raises(InputError, match="got DatasetDict; give one of train"):
        image_set(datasets.DatasetDict({"train": table}), "x", "id")


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
        ((IMAGES > 0.5).byte(), "'x': uint8 pixels of 0 and 1 only; white is 255"),
        ((IMAGES * 255).int(), "'x': pixels of type torch.int32; make them floats"),
        ({"train": IMAGES, "test": IMAGES}, "got dict; give one of train, test"),
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
        (DataLoader([{"pixels": IMAGES[0]}]), "images of one shape .no image, .* among pixels"),
        (Items([{"image": IMAGES[0].numpy()}]), "an image must be a tensor or a PIL picture, got ndarray"),
        (Items([(IMAGES[0], 0.5)]), "what follows the images must be labels"),
        (Items([(IMAGES[0], "cat")]), "'x': expected tensors of images"),
        (Items([(IMAGES[0], 1), (IMAGES[0], None)]), "what follows the images must be labels"),
    ],
)
def test_what_is_no_image_set(data, message):
    with pytest.raises(InputError, match=message) as caught:
        image_set(data, "x", "id")
    assert "\n" not in str(caught.value)
