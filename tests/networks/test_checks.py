from __future__ import annotations

import pytest
import torch
from torch import nn

from grood_cert import attacks
from grood_cert.ball import Ball
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.detector import Detector
from grood_cert.errors import InputError
from grood_cert.networks.capture import capture

IMAGES = torch.rand(20, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ENTRIES = {
    "Detector": lambda network: Detector(network, 0.0, (1, 2, 2)),
    "calibrate": lambda network: Detector.calibrate(network, IMAGES),
    "native": lambda network: NativeNetwork(network, (1, 2, 2), "crown"),
    "auto_lirpa": lambda network: LirpaNetwork(network, (1, 2, 2), "crown"),
    "trace": lambda network: capture(network, (1, 2, 2)),
    "minimum_norm": lambda network: attacks.minimum_norm(network, IMAGES, 0.0, "linf", torch.Generator()),
    "extremes": lambda network: attacks.extremes(network, [Ball(IMAGES, 0.1, "linf")], torch.Generator()),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_module_in_train_mode_is_refused_by_every_entry(entry):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Sequential(nn.ReLU()), nn.Linear(3, 2)).double().eval()
    ENTRIES[entry](network)
    network[2].train()
    with pytest.raises(InputError, match=r"module .*2.* is in train mode; call network.eval\(\) first"):
        ENTRIES[entry](network)
    assert network[2].training
