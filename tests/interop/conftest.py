from __future__ import annotations

import pytest
import torch
from torch import nn

from grood_cert.detector import Detector


@pytest.fixture(scope="package")
def detector() -> Detector:
    """Trained on two kinds of pictures of 4x4 pixels; paler ones are OOD."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2))
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for step in range(200):
        images, labels = pictures(64, step)
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Detector.calibrate(network.eval(), pictures(199, 1000)[0])


def pictures(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bright above (class 0) or below (class 1), with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (number,), generator=generator)
    images = torch.rand(number, 1, 4, 4, generator=generator) * 0.4
    for label in (0, 1):
        images[labels == label, :, 2 * label : 2 * label + 2] += 0.6
    return images, labels


@pytest.fixture(scope="package")
def inside() -> tuple[torch.Tensor, torch.Tensor]:
    return pictures(60, 2000)


@pytest.fixture(scope="package")
def outside() -> torch.Tensor:
    """The same pictures with less contrast."""
    return pictures(60, 3000)[0] * 0.5 + 0.25
