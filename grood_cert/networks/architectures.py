r"""Networks: normalisation is the first layer, inputs are pixels in [0, 1], outputs are logits.

Every network is a `Classifier`, a chain of layers that ends in a linear head: f(x) = W h(x) + b with the penultimate
features h(x). ``network(images)`` gives the logits; ``network(images, return_feature=True)`` gives logits and
features, as in OpenOOD.

| name | what it is | parameters |
|---|---|---|
| ``conv-small``, ``mlp`` | small ReLU networks for tight bounds | - |
| ``kw-small`` | the small network of Wong & Kolter (ICML 2018) | 166,406 MNIST, 214,918 CIFAR-10 |
| ``resnet-small`` | two residual blocks, thin enough for linear bounds | - |
| ``cnn-7`` | CNN-7 of certified training, with BatchNorm (Shi et al., NeurIPS 2021) | 17.2 M, CIFAR-10 |
| ``good-l``, ``good-xl`` | CNN L and XL of GOOD (Bitterwolf et al., NeurIPS 2020) | 13.3 M MNIST, 35.4 M CIFAR-10 |
| ``good-s`` | CNN S of ProoD, GOOD's successor (Meinke et al., NeurIPS 2022) | 3.0 M, CIFAR-10 |
| ``resnet18`` | ResNet-18 with a 3x3 stem, for 32x32 images | 11.17 M, 10 classes |
| ``resnet20``, ``resnet32``, ``resnet44``, ``resnet56`` | He et al.'s own for 32x32, short cuts without weights | 0.27 to 0.85 M, 10 classes |
| ``wrn-40-2`` | WideResNet-40-2 (Zagoruyko & Komodakis, BMVC 2016) | 2.24 M, 10 classes |
| ``densenet-bc-100`` | DenseNet-BC, depth 100, growth 12 (Huang et al., CVPR 2017) | 0.77 M, 10 classes |
| ``resnet18-imagenet``, ``densenet121`` | torchvision's, for 224x224 RGB images | 11.69 M, 7.98 M, 1000 classes |

All but the small ones, those of certified training and ``resnet18`` carry the parameter names of the published files,
so that those load as they are (`grood_cert.networks.weights`). All activations are ReLU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grood_cert.errors import InputError

_Shape = tuple[int, int, int]


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


class Classifier(nn.Sequential):
    """A chain of layers; the last one is the linear head, the value before it the penultimate features.

    ``network(images)`` gives the logits, shape (B, K). ``network(images, return_feature=True)`` gives the logits and
    the features, shape (B, F), the convention of OpenOOD. The choice belongs to the call: `forward` has one argument,
    as tracers (torch.fx, auto_LiRPA) want it.

    Example:
        >>> network = Classifier(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> logits, features = network(torch.zeros(5, 1, 2, 2), return_feature=True)
        >>> logits.shape, features.shape
        (torch.Size([5, 2]), torch.Size([5, 3]))
    """

    def __call__(self, images: Tensor, *, return_feature: bool = False) -> Any:
        """The logits, or with `return_feature` the logits and the penultimate features."""
        if not return_feature:
            return super().__call__(images)
        *body, head = self
        for layer in body:
            images = layer(images)
        return head(images), images


# Feed-forward networks


def _feed_forward(
    normalize: Normalize,
    shape: _Shape,
    classes: int,
    convolutions: Sequence[tuple[int, int]],
    hidden: Sequence[int],
    *,
    kernel: int = 3,
    pool: int = 1,
    batch_norm: bool = False,
) -> Classifier:
    """Convolutions of (outputs, stride), padded by 1, average pooling, then linear layers; ReLU after all but the last."""
    size, height, breadth = shape
    layers: list[nn.Module] = [normalize]
    for outputs, stride in convolutions:
        layers.append(nn.Conv2d(size, outputs, kernel, stride, 1))
        layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
        layers.append(nn.ReLU())
        size, height, breadth = outputs, *((side + 2 - kernel) // stride + 1 for side in (height, breadth))
    if pool > 1:
        layers.append(nn.AvgPool2d(pool))
        height, breadth = height // pool, breadth // pool
    layers.append(nn.Flatten())
    size *= height * breadth
    for outputs in hidden:
        layers.append(nn.Linear(size, outputs))
        layers += [nn.BatchNorm1d(outputs)] if batch_norm else []
        layers.append(nn.ReLU())
        size = outputs
    return Classifier(*layers, nn.Linear(size, classes))


def conv_small(normalize: Normalize, shape: _Shape, classes: int, width: int = 8) -> Classifier:
    """Two convolutions and two linear layers with ReLU, sized for linear bound propagation.

    The shape family of "conv-small" in the certification literature (Wong & Kolter, ICML 2018), thinner by default.
    """
    return _feed_forward(normalize, shape, classes, [(width, 1), (2 * width, 2)], [8 * width])


def kw_small(normalize: Normalize, shape: _Shape, classes: int, width: int = 16) -> Classifier:
    """Two 4x4 convolutions of stride 2, 16 and 32 wide, and a layer of 100.

    The small network of Wong & Kolter (ICML 2018), "conv-small" in much of the literature since. Its strides keep training and
    bounds of 28x28 images cheap.

    Raises:
        InputError: If a side of the images is below 4 pixels.
    """
    _check_size("kw-small", shape, 4)
    return _feed_forward(normalize, shape, classes, [(width, 2), (2 * width, 2)], [25 * width // 4], kernel=4)


def mlp(normalize: Normalize, shape: _Shape, classes: int, width: int = 128, hidden_layers: int = 2) -> Classifier:
    """Fully connected ReLU network with `hidden_layers` layers of `width` neurons."""
    return _feed_forward(normalize, shape, classes, [], [width] * hidden_layers)


def _five_convolutions(width: int) -> list[tuple[int, int]]:
    return [(width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)]


def cnn_7(normalize: Normalize, shape: _Shape, classes: int, width: int = 64) -> Classifier:
    """CNN-7: five convolutions (64, 64, 128 with stride 2, 128, 128), a layer of 512, BatchNorm after each of the six.

    The fully normalised variant of "Fast Certified Robust Training with Short Warmup" (Shi et al., NeurIPS 2021), the
    standard network of certified training since; without BatchNorm it is the "large" network of Gowal et al. (ICCV
    2019) and ``good-l``. Certified training wants both: BatchNorm keeps its ReLUs balanced.
    """
    return _feed_forward(normalize, shape, classes, _five_convolutions(width), [8 * width], batch_norm=True)


def good_s(normalize: Normalize, shape: _Shape, classes: int, width: int = 128) -> Classifier:
    """CNN S: convolutions 128, 256 (stride 2), 256, average pooling by 2, a layer of 128.

    The discriminator of ProoD ("Provably Robust Detection of Out-of-distribution Data (almost) for free", Meinke et
    al., NeurIPS 2022), in the family that GOOD began; GOOD itself has the sizes L and XL.

    Raises:
        InputError: If a side of the images is below 3 pixels, which leaves nothing to pool.
    """
    _check_size("good-s", shape, 3)
    convolutions = [(width, 1), (2 * width, 2), (2 * width, 1)]
    return _feed_forward(normalize, shape, classes, convolutions, [width], pool=2)


def good_l(normalize: Normalize, shape: _Shape, classes: int, width: int = 64) -> Classifier:
    """CNN L of GOOD (Bitterwolf et al., NeurIPS 2020), its MNIST network: 64, 64, 128 (stride 2), 128, 128, then 512."""
    return _feed_forward(normalize, shape, classes, _five_convolutions(width), [8 * width])


def good_xl(normalize: Normalize, shape: _Shape, classes: int, width: int = 128) -> Classifier:
    """CNN XL of GOOD, for SVHN and CIFAR-10: convolutions 128, 128, 256 (stride 2), 256, 256, then 512 and 512."""
    return _feed_forward(normalize, shape, classes, _five_convolutions(width), [4 * width, 4 * width])


# Residual networks


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
) -> Classifier:
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
    return Classifier(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def resnet18(normalize: Normalize, shape: _Shape, classes: int, width: int = 64) -> Classifier:
    """ResNet-18 with the 3x3 stem for 32x32 images (He et al., CVPR 2016; 11.17 M parameters for 10 classes)."""
    stages = [(width * 2**stage, 2 if stage and not block else 1) for stage in range(4) for block in range(2)]
    return _resnet(normalize, shape[0], classes, width, stages)


def resnet_small(normalize: Normalize, shape: _Shape, classes: int, width: int = 8) -> Classifier:
    """ResNet-18's stem and two of its blocks, thin enough for linear bound propagation."""
    return _resnet(normalize, shape[0], classes, width, [(2 * width, 2), (2 * width, 1)])


class _PlainResidual(nn.Module):
    """relu(x + BN(conv(relu(BN(conv(x)))))); where the shape changes, x is every second pixel, between channels of 0."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.before = stride, (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(images)))))
        if self.stride > 1:
            images = functional.pad(images[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))
        return functional.relu(hidden + images)


def cifar_resnet(normalize: Normalize, shape: _Shape, classes: int, width: int = 16, depth: int = 20) -> Classifier:
    """ResNet of He et al. (CVPR 2016, section 4.2) for 32x32 images: depth 6 n + 2, three stages of n blocks.

    Stages are 1, 2 and 4 times `width` = 16 wide. Short cuts have no weights ("option A"): where the shape changes they
    keep every second pixel and add channels of 0, as many before as after.
    """
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(shape[0], width, 3, 1, 1, bias=False),
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(),
    }
    inputs = width
    for stage, stride in enumerate((1, 2, 2)):
        blocks = [_PlainResidual(inputs, width * 2**stage, stride)]
        inputs = width * 2**stage
        blocks += [_PlainResidual(inputs, inputs, 1) for _ in range((depth - 2) // 6 - 1)]
        layers[f"layer{stage + 1}"] = nn.Sequential(*blocks)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": nn.Linear(inputs, classes)}
    network = Classifier(OrderedDict({"normalize": normalize, **layers}))
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return network


class _WideResidual(nn.Module):
    """Pre-activation block: a + conv(relu(BN(conv(r)))) with r = relu(BN(x)).

    a is x, or a 1x1 convolution of r where the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        active = self.relu1(self.bn1(images))
        shortcut = images if self.convShortcut is None else self.convShortcut(active)
        hidden: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return shortcut + hidden


def wrn_40_2(normalize: Normalize, shape: _Shape, classes: int, width: int = 16) -> Classifier:
    """WideResNet-40-2 (Zagoruyko & Komodakis, BMVC 2016): three groups of six pre-activation blocks, no dropout.

    Groups are 2, 4 and 8 times `width` wide: 32, 64 and 128 channels, hence 128 features. The network of Outlier
    Exposure and "Energy-based Out-of-distribution Detection" (Liu et al., NeurIPS 2020), whose parameter names it has.
    """
    layers: dict[str, nn.Module] = {"conv1": nn.Conv2d(shape[0], width, 3, 1, 1, bias=False)}
    inputs = width
    for group, stride in enumerate((1, 2, 2), 1):
        outputs = 2**group * width
        blocks = [
            _WideResidual(inputs if block == 0 else outputs, outputs, stride if block == 0 else 1) for block in range(6)
        ]
        layers[f"block{group}"] = _group(blocks)
        inputs = outputs
    return _pooled(normalize, layers, inputs, "fc", classes)


def _group(blocks: Iterable[nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks)))


def _pooled(normalize: Normalize, layers: dict[str, nn.Module], size: int, head: str, classes: int) -> Classifier:
    """The layers, BatchNorm, ReLU, global average pooling and a head; convolutions start as He et al. (ICCV 2015)."""
    end = {"bn1": nn.BatchNorm2d(size), "relu": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    network = Classifier(OrderedDict({"normalize": normalize, **layers, **end, head: nn.Linear(size, classes)}))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return network


# Densely connected networks


class _Bottleneck(nn.Module):
    """The input, and beside it `growth` channels made of it: conv3x3(relu(BN(conv1x1(relu(BN(x))))))."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv1(functional.relu(self.bn1(images)))
        return torch.cat([images, self.conv2(functional.relu(self.bn2(hidden)))], 1)


def _transition(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 1, bias=False)
    return nn.Sequential(
        OrderedDict(bn1=nn.BatchNorm2d(inputs), relu=nn.ReLU(), conv1=convolution, pool=nn.AvgPool2d(2))
    )


def densenet_bc_100(normalize: Normalize, shape: _Shape, classes: int, width: int = 12) -> Classifier:
    """DenseNet-BC of depth 100 (Huang et al., CVPR 2017): growth `width` = 12, compression 0.5, hence 342 features.

    Three dense blocks of 16 bottleneck layers. The "DenseNet-101" of the OOD literature and of the GReg paper, whose
    parameter names it has. Their code starts all convolutions at the same, far larger, scale by accident of a shadowed
    variable; here each starts at sqrt(2 / (k^2 outputs)), as published.

    Raises:
        InputError: If a side of the images is below 4 pixels, which leaves nothing to pool.
    """
    _check_size("densenet-bc-100", shape, 4)
    size = 2 * width
    layers: dict[str, nn.Module] = {"conv1": nn.Conv2d(shape[0], size, 3, 1, 1, bias=False)}
    for block in (1, 2, 3):
        layers[f"block{block}"] = _group(_Bottleneck(size + layer * width, width) for layer in range(16))
        size += 16 * width
        if block < 3:
            layers[f"trans{block}"] = _transition(size, size // 2)
            size //= 2
    return _pooled(normalize, layers, size, "linear", classes)


# Networks of torchvision


def resnet18_imagenet(normalize: Normalize, shape: _Shape, classes: int) -> Classifier:
    """ResNet-18 with a 7x7 stem of stride 2 and maximum pooling: ``torchvision.models.resnet18``, RGB only.

    The authors of GReg ran it on 32x32 images too, where its stem leaves 8x8 pixels.

    Raises:
        InputError: If the images are not RGB.
    """
    from torchvision.models import resnet18

    _check_rgb("resnet18-imagenet", shape)
    *body, head = resnet18(num_classes=classes).named_children()
    return Classifier(OrderedDict([("normalize", normalize), *body, ("flatten", nn.Flatten()), head]))


def densenet121(normalize: Normalize, shape: _Shape, classes: int) -> Classifier:
    """DenseNet-121 (Huang et al., CVPR 2017): ``torchvision.models.densenet121``, RGB images of 29x29 or more.

    The network of the paper's ImageNet experiments, with 1024 features.

    Raises:
        InputError: If the images are not RGB or too small.
    """
    from torchvision.models import densenet121

    _check_rgb("densenet121", shape)
    _check_size("densenet121", shape, 29)
    model = densenet121(num_classes=classes)
    end = {"relu": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return Classifier(OrderedDict(normalize=normalize, features=model.features, **end, classifier=model.classifier))


def _check_rgb(name: str, shape: _Shape) -> None:
    if shape[0] != 3:
        raise InputError(f"network {name!r} takes RGB images; these have {shape[0]} channel{'s' * (shape[0] != 1)}")


def _check_size(name: str, shape: _Shape, least: int) -> None:
    if min(shape[1:]) < least:
        raise InputError(f"network {name!r} needs images of {least}x{least} or more; these are {shape[1]}x{shape[2]}")


_CIFAR_DEPTHS = (20, 32, 44, 56)
NETWORKS: dict[str, Callable[..., Classifier]] = {
    "conv-small": conv_small,
    "mlp": mlp,
    "resnet18": resnet18,
    "resnet18-imagenet": resnet18_imagenet,
    "resnet-small": resnet_small,
    **{f"resnet{depth}": partial(cifar_resnet, depth=depth) for depth in _CIFAR_DEPTHS},
    "wrn-40-2": wrn_40_2,
    "densenet-bc-100": densenet_bc_100,
    "densenet121": densenet121,
    "kw-small": kw_small,
    "cnn-7": cnn_7,
    "good-s": good_s,
    "good-l": good_l,
    "good-xl": good_xl,
}

# Bounds of these networks are true and say nothing, however they are trained: intervals grow at every layer.
DEEP = frozenset({"resnet18", "resnet18-imagenet", "wrn-40-2", "densenet-bc-100", "densenet121"}) | {
    f"resnet{depth}" for depth in _CIFAR_DEPTHS
}


def build(
    name: str, shape: _Shape, classes: int, mean: Sequence[float], std: Sequence[float], **options: Any
) -> Classifier:
    """Build a network by name.

    Args:
        name: One of `NETWORKS`.
        shape: (C, H, W) of an image.
        classes: Number of logits K.
        mean: Normalisation, one value a channel.
        std: Normalisation, one value a channel.
        options: Further arguments of the network, for example `width`.

    Raises:
        InputError: If the name is unknown, the normalisation does not fit the channels, or the network cannot take
            images of this shape.

    Example:
        >>> build("mlp", (1, 8, 8), 6, [0.3], [0.4])(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 6])
    """
    if name not in NETWORKS:
        raise InputError(f"unknown network {name!r}; use one of {', '.join(NETWORKS)}")
    if len(mean) != shape[0]:
        raise InputError(f"normalisation has {len(mean)} channels, the images have {shape[0]}")
    return NETWORKS[name](Normalize(mean, std), shape, classes, **options)
