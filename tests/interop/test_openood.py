"""After the protocol of openood/postprocessors/base_postprocessor.py and of its evaluator."""

from __future__ import annotations

import copy
import importlib
import sys
import types

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from grood_cert.errors import InputError
from grood_cert.interop import openood
from grood_cert.interop.openood import CertifiedPostprocessor

MEAN, STD = [0.45], [0.3]


class Items(Dataset):
    """Items as OpenOOD's datasets give them, normalised by its preprocessor."""

    def __init__(self, images, labels) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):
        data = (self.images[index] - MEAN[0]) / STD[0]
        return {"data": data, "label": int(self.labels[index]), "index": index, "image_name": str(index)}


def loader(images, labels) -> DataLoader:
    return DataLoader(Items(images, labels), batch_size=25)


@pytest.fixture(scope="module")
def net(detector):
    """Takes normalised images, in float32: the detector's network after the inverse of the preprocessor."""
    inverse = torch.nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        inverse.weight.fill_(STD[0])
        inverse.bias.fill_(MEAN[0])
    return torch.nn.Sequential(inverse, copy.deepcopy(detector.network).float()).eval()


@pytest.fixture(scope="module")
def loaders(inside, outside):
    ood = loader(outside, -torch.ones(len(outside)))
    return {"val": loader(*inside), "test": loader(*inside)}, {"near": {"a": ood}}


def test_the_protocol(net, detector, inside, outside, loaders):
    ours = CertifiedPostprocessor(MEAN, STD)
    with pytest.raises(InputError, match="call setup"):
        ours.postprocess(net, torch.zeros(1, 1, 4, 4))
    ours.setup(net, *loaders)
    classes, confidence, labels = ours.inference(net, loaders[0]["test"], progress=False)
    np.testing.assert_allclose(confidence, -detector.scores(inside[0]).numpy(), rtol=1e-5)
    np.testing.assert_array_equal(classes, net((inside[0] - MEAN[0]) / STD[0]).argmax(1).numpy())
    np.testing.assert_array_equal(labels, inside[1].numpy())
    assert classes.dtype == labels.dtype == np.int64 and (classes == labels).mean() > 0.95
    assert not ours.APS_mode and next(net.parameters()).dtype == torch.float32
    below = (-confidence <= ours.detector.gamma).mean()
    assert 0.9 < below <= 1  # calibrated on the same images

    ood = ours.inference(net, loaders[1]["near"]["a"])[1]
    proved = CertifiedPostprocessor(MEAN, STD, eps=0.02)
    proved.setup(net, *loaders)
    worst = proved.inference(net, loaders[1]["near"]["a"])[1]
    attacked = outside + 0.02 * torch.sign(torch.randn(outside.shape, generator=torch.Generator().manual_seed(0)))
    hit = ours.inference(net, loader(attacked, torch.zeros(len(attacked))))[1]
    assert (worst > ood).all() and (worst >= hit - 1e-9).all()


def test_another_normalisation_is_noticed(net, loaders):
    with pytest.raises(InputError, match="mean and std are not those of the preprocessor"):
        CertifiedPostprocessor([0.5], [1.0]).setup(net, *loaders)


def test_a_network_in_train_mode(net, loaders):
    with pytest.raises(InputError, match="train mode"):
        CertifiedPostprocessor(MEAN, STD).setup(copy.deepcopy(net).train(), *loaders)


def test_where_openood_is_installed_it_is_one_of_its_own(monkeypatch):
    """Its evaluator asks isinstance(postprocessor, BasePostprocessor)."""
    package, theirs = types.ModuleType("openood"), types.ModuleType("openood.postprocessors")
    theirs.BasePostprocessor = type("BasePostprocessor", (), {"__init__": lambda self, config: None})
    try:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "openood", package)
            patch.setitem(sys.modules, "openood.postprocessors", theirs)
            made = importlib.reload(openood).CertifiedPostprocessor(MEAN, STD)
        assert isinstance(made, theirs.BasePostprocessor) and made.detector is None
    finally:
        importlib.reload(openood)
