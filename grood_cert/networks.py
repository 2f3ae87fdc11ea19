"""Networks: normalisation is the first layer, inputs are pixels in [0, 1], outputs are logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grood_cert.errors import InputError


class Normalize(nn.Module):
    """(x - mean) / std for each channel, so that every radius is in pixel units.

    Args:
        mean: One value a channel.
        std: One positive value a channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise InputError("normalisation needs one mean and one positive std for each channel")
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images of shape (B, C, H, W)."""
        return (images - self.mean) / self.std


def conv_small(normalize: Normalize, shape: tuple[int, int, int], classes: int, width: int = 8) -> nn.Sequential:
    """Two convolutions and two linear layers with ReLU, sized for linear bound propagation.

    The shape family of "conv-small" in the certification literature (Wong & Kolter, ICML 2018), thinner by default.
    """
    channels, height, breadth = shape
    features = 2 * width * ((height + 1) // 2) * ((breadth + 1) // 2)
    return nn.Sequential(
        normalize,
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 8 * width),
        nn.ReLU(),
        nn.Linear(8 * width, classes),
    )


def mlp(
    normalize: Normalize, shape: tuple[int, int, int], classes: int, width: int = 128, hidden_layers: int = 2
) -> nn.Sequential:
    """Fully connected ReLU network with `hidden_layers` layers of `width` neurons."""
    layers: list[nn.Module] = [normalize, nn.Flatten()]
    size = shape[0] * shape[1] * shape[2]
    for _ in range(hidden_layers):
        layers += [nn.Linear(size, width), nn.ReLU()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, classes))


class _Residual(nn.Module):
    """relu(x + BN(conv(relu(BN(conv(x)))))), with a 1x1 convolution on the short cut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.norm1(self.conv1(images)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(images))


def _resnet(
    normalize: Normalize, channels: int, classes: int, width: int, stages: Sequence[tuple[int, int]]
) -> nn.Sequential:
    """A 3x3 stem, one residual block for each (outputs, stride), global average pooling and a linear head."""
    layers: list[nn.Module] = [
        normalize,
        nn.Conv2d(channels, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    inputs = width
    for outputs, stride in stages:
        layers.append(_Residual(inputs, outputs, stride))
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def resnet18(normalize: Normalize, shape: tuple[int, int, int], classes: int, width: int = 64) -> nn.Sequential:
    """ResNet-18 with the 3x3 stem for 32x32 images (He et al., CVPR 2016; 11.17 M parameters for 10 classes)."""
    stages = [(width * 2**stage, 2 if stage and not block else 1) for stage in range(4) for block in range(2)]
    return _resnet(normalize, shape[0], classes, width, stages)


def resnet_small(normalize: Normalize, shape: tuple[int, int, int], classes: int, width: int = 8) -> nn.Sequential:
    """ResNet-18's stem and two of its blocks, thin enough for linear bound propagation."""
    return _resnet(normalize, shape[0], classes, width, [(2 * width, 2), (2 * width, 1)])


NETWORKS: dict[str, Callable[..., nn.Sequential]] = {
    "conv-small": conv_small,
    "mlp": mlp,
    "resnet18": resnet18,
    "resnet-small": resnet_small,
}


def build(
    name: str, shape: tuple[int, int, int], classes: int, mean: Sequence[float], std: Sequence[float], **options: Any
) -> nn.Sequential:
    """Build a network by name.

    Args:
        name: One of `NETWORKS`.
        shape: (C, H, W) of an image.
        classes: Number of logits K.
        mean: Normalisation, one value a channel.
        std: Normalisation, one value a channel.
        options: Further arguments of the network, for example `width`.

    Raises:
        InputError: If the name is unknown or the normalisation does not fit the channels.

    Example:
        >>> build("mlp", (1, 8, 8), 6, [0.3], [0.4])(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 6])
    """
    if name not in NETWORKS:
        raise InputError(f"unknown network {name!r}; use one of {', '.join(NETWORKS)}")
    if len(mean) != shape[0]:
        raise InputError(f"normalisation has {len(mean)} channels, the images have {shape[0]}")
    return NETWORKS[name](Normalize(mean, std), shape, classes, **options)
