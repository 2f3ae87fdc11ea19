"""Networks as people write them, small or well known, with random weights: what `benchmarks/models.py` captures and bounds.

Each is written anew, in the idiom of those it stands for: ordinary PyTorch, torchvision, the libraries of OOD detection,
the verification competition.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from grood_cert.bounds.engine import METHODS, Method
from grood_cert.networks import architectures

Shape = tuple[int, int, int]
ALL: tuple[Method, ...] = tuple(METHODS)
QUICK: tuple[Method, ...] = ("ibp", "crown-ibp")
GREY, RGB = (1, 8, 8), (3, 8, 8)
DIGIT, CIFAR = (1, 28, 28), (3, 32, 32)


@dataclass(frozen=True)
class Model:
    """One network of the table.

    Attributes:
        name: What it is.
        group: What it stands for.
        make: Builds it, with whatever weights.
        shape: Shape (C, H, W) of one image.
        native: Methods that the native engine is asked for.
        lirpa: Methods that auto_LiRPA is asked for.
        eps: l_inf radius of the balls.
        images: How many balls.
    """

    name: str
    group: str
    make: Callable[[], nn.Module]
    shape: Shape
    native: tuple[Method, ...] = ALL
    lirpa: tuple[Method, ...] = ALL
    eps: float = 2 / 255
    images: int = 2

    def build(self) -> nn.Module:
        """The network in eval mode; BatchNorm has the statistics of random images, so that values do not vanish."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self.make().eval()
            norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.train().momentum = 1.0
            if norms:
                with torch.no_grad():
                    network(torch.rand(8, *self.shape))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.eval().momentum = momentum
        return network


class Written(nn.Module):
    """Modules by name and a forward function that uses them.

    Args:
        forward: Called with this module and the images.
        layers: The modules.
    """

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self._forward(self, images)
        return logits


# Ordinary ways to write a network of ReLUs


def _conv(inputs: int = 3, outputs: int = 4, size: int = 3, stride: int = 2, padding: int | str = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding)


def _plain(*front: nn.Module, inputs: int = 3) -> nn.Sequential:
    return nn.Sequential(*front, _conv(inputs), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 4))


def _two(forward: Callable[..., Any], size: int = 64) -> nn.Module:
    return Written(forward, conv=_conv(), one=nn.Linear(size, 10), two=nn.Linear(10, 4))


def _view(self: Any, x: Tensor) -> Any:
    x = functional.relu(self.conv(x))
    x = x.view(x.size(0), -1)
    return self.two(functional.relu(self.one(x)))


def _reshape(self: Any, x: Tensor) -> Any:
    x = torch.relu(self.conv(x)).reshape(-1, 64)
    return self.two(self.one(x).clamp(min=0))


def _flatten(self: Any, x: Tensor) -> Any:
    x = torch.flatten(functional.max_pool2d(functional.relu(self.conv(x)), 2), 1)
    return self.two(functional.relu(self.one(x)))


def _inline(self: Any, x: Tensor) -> Any:
    mean, std = x.new_tensor([0.4, 0.5, 0.6]), x.new_tensor([0.2, 0.25, 0.3])
    x = (x - mean[None, :, None, None]) / std.view(1, 3, 1, 1)
    return _view(self, 2.0 * x - 1.0)


def _torchvision_normalize() -> nn.Module:
    from torchvision.transforms import Normalize

    return _plain(Normalize([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))


def _react() -> nn.Module:
    network = _plain()
    network[4].register_forward_hook(lambda module, inputs, output: output.clamp(max=0.2))
    return network


class _Shrink(nn.Dropout):
    """Dropout as Monte-Carlo code has it: in eval mode it scales."""

    def forward(self, images: Tensor) -> Tensor:
        """The images, scaled by what is kept."""
        return (1 - self.p) * images


def _dropped(self: Any, x: Tensor) -> Any:
    x = functional.relu(self.conv(x)).flatten(1)
    x = functional.dropout(x, 0.5, training=self.training)
    return self.two(functional.dropout(functional.relu(self.one(x)), 0.1, self.training))


def _skip(self: Any, x: Tensor) -> Any:
    first = functional.relu(self.conv(x))
    x = torch.cat([first, functional.relu(self.next(first))], dim=1)
    return self.head(x.flatten(1))


def _residual(self: Any, x: Tensor) -> Any:
    x = functional.relu(self.conv(x), inplace=True)
    y = self.next(x)
    y += x
    return self.head(functional.relu_(y).flatten(1))


def _listed(self: Any, x: Tensor) -> Any:
    x = x.flatten(start_dim=1)
    for i, layer in enumerate(self.layers):
        x = layer(x)
        if i < len(self.layers) - 1:
            x = functional.relu(x)
    return x


def _layers(*sizes: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(one, two) for one, two in itertools.pairwise(sizes))


def _weight_norm() -> nn.Module:
    network = _plain()
    parametrizations.weight_norm(network[0])
    parametrizations.spectral_norm(network[3])
    return network


def _ceil() -> nn.Module:
    body = _conv(padding=0), nn.ReLU(), nn.MaxPool2d(2, 2, ceil_mode=True), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(16, 4))


def _adaptive(self: Any, x: Tensor) -> Any:
    x = functional.adaptive_avg_pool2d(functional.relu(self.conv(x)), (3, 2))
    return self.head(functional.relu(self.next(x)).mean(dim=(2, 3)))


def _channels_last(self: Any, x: Tensor) -> Any:
    x = functional.relu(self.conv(x)).permute(0, 2, 3, 1)
    x = functional.relu(self.mix(x))
    return self.head(x.transpose(1, 3).contiguous().flatten(1))


def _same() -> nn.Module:
    body = nn.Conv2d(3, 4, 4, padding="same"), nn.ReLU(), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Flatten()
    return nn.Sequential(nn.ZeroPad2d((0, 1, 1, 0)), *body, nn.Linear(100, 4))


def _maxout(self: Any, x: Tensor) -> Any:
    first, second = self.conv(x).flatten(1).chunk(2, dim=1)
    return self.two(functional.relu(self.one(torch.maximum(first, second))))


def _patches(self: Any, x: Tensor) -> Any:
    x = functional.relu(self.conv(functional.pixel_unshuffle(x, 2)))
    return self.head(functional.relu(self.group(x)).sum(-1).flatten(1))


def _shared(self: Any, x: Tensor) -> Any:
    x = functional.relu(self.conv(x))
    for _ in range(2):
        x = functional.relu(self.next(x) + x)
    return self.head(x.flatten(1))


def _on_values(self: Any, x: Tensor) -> Any:
    found = _view(self, x)
    if x.mean() > 0.9:
        found = found + 3
    return found


def _on_batch(self: Any, x: Tensor) -> Any:
    return _view(self, x) + (3 if x.shape[0] == 1 else 0)


def _length(self: Any, x: Tensor) -> Any:
    x = functional.relu(self.conv(x)).view(len(x), -1)
    return self.two(functional.relu(self.one(x)))


def _gate(self: Any, x: Tensor) -> Any:
    x = self.conv(x)
    return self.head((x * torch.sigmoid(self.next(x))).flatten(1))


def _blocks(forward: Callable[..., Any], head: int, inputs: int = 4) -> nn.Module:
    return Written(forward, conv=_conv(), next=nn.Conv2d(inputs, 4, 3, padding=1), head=nn.Linear(head, 4))


def _idioms() -> list[Model]:
    made: dict[str, Callable[[], nn.Module]] = {
        "nn.Sequential": _plain,
        "functional relu, x.view(x.size(0), -1)": lambda: _two(_view),
        "torch.relu, reshape(-1, n), clamp(min=0)": lambda: _two(_reshape),
        "torch.flatten, functional max_pool2d": lambda: _two(_flatten, 16),
        "normalisation in forward": lambda: _two(_inline),
        "torchvision Normalize in front": _torchvision_normalize,
        "forward hook (ReAct clamp)": _react,
        "Dropout subclass with its own forward": lambda: _plain(_Shrink(0.25)),
        "functional dropout(training=self.training)": lambda: _two(_dropped),
        "torch.cat skip": lambda: _blocks(_skip, 128),
        "residual +=, relu in place": lambda: _blocks(_residual, 64),
        "ModuleList in a loop": lambda: Written(_listed, layers=_layers(192, 16, 16, 4)),
        "weight_norm, spectral_norm": _weight_norm,
        "max-pool with ceil_mode": _ceil,
        "adaptive pool, mean over dims": lambda: _blocks(_adaptive, 4),
        "permute, Linear over channels, transpose": lambda: Written(
            _channels_last, conv=_conv(), mix=nn.Linear(4, 4), head=nn.Linear(64, 4)
        ),
        "ZeroPad2d, padding='same', average pool without padding": _same,
        "maxout of two halves (chunk, maximum)": lambda: _two(_maxout, 32),
        "pixel_unshuffle, grouped convolution, sum": lambda: Written(
            _patches, conv=_conv(12, 8, 3, 1), group=nn.Conv2d(8, 8, 3, 1, 2, 2, 4), head=nn.Linear(32, 4)
        ),
        "one module called twice": lambda: _blocks(_shared, 64),
        "if x.mean() > 0.9": lambda: _two(_on_values),
        "if x.shape[0] == 1": lambda: _two(_on_batch),
        "x.view(len(x), -1)": lambda: _two(_length),
        "gate x * sigmoid(g(x))": lambda: _blocks(_gate, 64),
        "LayerNorm": lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4)
        ),
        "GroupNorm": lambda: nn.Sequential(_conv(), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)),
        "softmax at the end": lambda: nn.Sequential(_plain(), nn.Softmax(1)),
    }
    return [Model(name, "idiom", make, RGB) for name, make in made.items()]


# Torchvision


def _torchvision(name: str, **options: object) -> nn.Module:
    import torchvision

    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    return network


def _classifiers() -> list[Model]:
    # By how deep they are: what intervals blow up to is no measure of anything, so the balls are small.
    light = "resnet18", "alexnet", "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5"
    sides = {"alexnet": 64, "vit_b_16": 32}
    options: dict[str, dict[str, object]] = {
        "googlenet": {"init_weights": False, "aux_logits": False},
        "vit_b_16": {"image_size": 32},
    }
    names = (
        *("alexnet", "vgg11", "vgg11_bn", "resnet18", "resnet34", "resnext50_32x4d", "densenet121"),
        *("mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x0_5", "googlenet", "mnasnet0_5"),
        *("regnet_x_400mf", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "vit_b_16"),
        *("swin_t",),
    )
    models = []
    for name in names:
        lirpa: tuple[Method, ...] = ("ibp",) if name in light else ()
        side = sides.get(name, 32)
        make = functools.partial(_torchvision, name, **options.get(name, {}))
        native: tuple[Method, ...] = QUICK if name in light else ("ibp",)
        models.append(Model(f"torchvision {name}", "torchvision", make, (3, side, side), native, lirpa, 1e-5, 1))
    return models


# Networks of out-of-distribution detection


class _Basic(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a short cut, as in ResNet-18 for 32x32 images."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The block's value."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return functional.relu(out)


def _resnet_forward(self: Any, x: Tensor) -> Any:
    x = self.blocks(functional.relu(self.bn(self.conv(x))))
    x = functional.avg_pool2d(x, x.size(2))
    return self.fc(x.view(x.size(0), -1))


def _resnet(width: int, blocks: int = 2, stages: int = 4) -> nn.Module:
    made, inputs = [], width
    for stage in range(stages):
        for block in range(blocks):
            outputs = width * 2**stage
            made.append(_Basic(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    conv, bn = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
    return Written(_resnet_forward, conv=conv, bn=bn, blocks=nn.Sequential(*made), fc=nn.Linear(inputs, 10))


def _lenet_forward(self: Any, x: Tensor) -> Any:
    x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
    x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
    x = x.view(-1, 400)
    return self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(x)))))


def _lenet() -> nn.Module:
    return Written(
        _lenet_forward,
        conv1=nn.Conv2d(1, 6, 5, padding=2),
        conv2=nn.Conv2d(6, 16, 5),
        fc1=nn.Linear(400, 120),
        fc2=nn.Linear(120, 84),
        fc3=nn.Linear(84, 10),
    )


def _small_cnn() -> nn.Module:
    def part(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2)]

    return nn.Sequential(*part(1, 8), *part(8, 16), *part(16, 16), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 10))


def _own(name: str, shape: Shape, **options: int) -> nn.Module:
    return architectures.build(name, shape, 10, [0.5] * shape[0], [0.25] * shape[0], **options)


def _ash() -> nn.Module:
    network = copy.deepcopy(_resnet(4, 1, 3))
    network.get_submodule("blocks").register_forward_hook(lambda module, inputs, output: output.clip(max=1.0))
    return network


def _detectors() -> list[Model]:
    deep = QUICK, (), 1e-4, 1

    def own(name: str, shape: Shape = CIFAR, **options: int) -> Callable[[], nn.Module]:
        return lambda: _own(name, shape, **options)

    found = [
        Model("LeNet", "OOD", _lenet, DIGIT),
        Model("small CNN with BatchNorm", "OOD", _small_cnn, DIGIT),
        Model("ResNet18_32x32", "OOD", lambda: _resnet(64), CIFAR, *deep),
        Model("ResNet of 3 blocks, width 4", "OOD", lambda: _resnet(4, 1, 3), (3, 16, 16), eps=1 / 255),
        Model("ResNet of 3 blocks, ReAct hook", "OOD", _ash, (3, 16, 16), eps=1 / 255),
        Model("WideResNet-40-2", "OOD", own("wrn-40-2"), CIFAR, *deep),
        Model("WideResNet-40, width 1", "OOD", own("wrn-40-2", RGB, width=1), RGB, eps=1e-3),
        Model("DenseNet-BC-100", "OOD", own("densenet-bc-100"), CIFAR, *deep),
        Model("DenseNet-BC-100, growth 1", "OOD", own("densenet-bc-100", RGB, width=1), RGB, ALL, (), 1e-3, 1),
        Model("CNN-7, width 4", "OOD", own("cnn-7", (3, 16, 16), width=4), (3, 16, 16)),
    ]
    return found


# Networks of the verification competition


def _competition_block(inputs: int, outputs: int, stride: int, norm: bool) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Any:
        out = self.conv2(functional.relu(self.bn1(self.conv1(x))))
        return functional.relu(self.bn2(out) + self.shortcut(x))

    return Written(
        forward,
        conv1=nn.Conv2d(inputs, outputs, 3, stride, 1),
        bn1=nn.BatchNorm2d(outputs) if norm else nn.Identity(),
        conv2=nn.Conv2d(outputs, outputs, 3, 1, 1),
        bn2=nn.BatchNorm2d(outputs) if norm else nn.Identity(),
        shortcut=nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity(),
    )


def _competition_resnet(blocks: int, norm: bool, features: int) -> nn.Module:
    body = [_competition_block(8, 16, 2, norm)] + [_competition_block(16, 16, 1, norm) for _ in range(blocks - 1)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), *body, nn.Flatten(), nn.Linear(features, 50), nn.ReLU(),
                         nn.Linear(50, 10))  # fmt: skip


def _mlp(
    sizes: tuple[int, ...], activation: Callable[[], nn.Module], inputs: int = 784, outputs: int = 10
) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for one, two in zip((inputs, *sizes), sizes, strict=False):
        layers += [nn.Linear(one, two), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def _conv_net(
    channels: tuple[int, int], activation: Callable[[], nn.Module], inputs: int = 1, size: int = 7
) -> nn.Module:
    first, second = channels
    return nn.Sequential(
        *(nn.Conv2d(inputs, first, 4, 2, 1), activation(), nn.Conv2d(first, second, 4, 2, 1), activation()),
        *(nn.Flatten(), nn.Linear(second * size**2, 64), activation(), nn.Linear(64, 10)),
    )


def _conv_big() -> nn.Module:
    sides = ((1, 32, 3, 1), (32, 32, 4, 2), (32, 64, 3, 1), (64, 64, 4, 2))
    layers: list[nn.Module] = []
    for one, two, kernel, stride in sides:
        layers += [nn.Conv2d(one, two, kernel, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, _mlp((512, 512), nn.ReLU, 3136))


def _autoencoder() -> nn.Module:
    down = nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU()
    up = nn.ConvTranspose2d(8, 4, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(4, 1, 3, 2, 1, 1), nn.Sigmoid()
    return nn.Sequential(*down, *up, nn.Flatten(), nn.Linear(256, 10))


def _unet_forward(self: Any, x: Tensor) -> Any:
    high = functional.relu(self.one(x))
    low = functional.relu(self.two(functional.max_pool2d(high, 2)))
    low = functional.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
    x = functional.relu(self.three(torch.cat([high, functional.interpolate(low, size=high.shape[-2:])], 1)))
    return self.head(functional.adaptive_max_pool2d(x, 2).flatten(1))


def _unet() -> nn.Module:
    convolutions = {"one": nn.Conv2d(3, 4, 3, padding=1), "two": nn.Conv2d(4, 6, 3, padding=1)}
    return Written(_unet_forward, **convolutions, three=nn.Conv2d(10, 4, 3, padding=1), head=nn.Linear(16, 10))


def _verified() -> list[Model]:
    def both(name: str, make: Callable[[], nn.Module], shape: Shape = DIGIT, eps: float = 2 / 255) -> Model:
        return Model(name, "verification", make, shape, eps=eps)

    def activated(name: str, activation: Callable[[], nn.Module]) -> Model:
        return both(f"small convolutional, {name}", lambda: _conv_net((4, 8), activation, 3, 4), (3, 16, 16))

    return [
        both("ResNet-2B", lambda: _competition_resnet(2, False, 1024), CIFAR),
        both("ResNet-4B with BatchNorm", lambda: _competition_resnet(4, True, 256), (3, 16, 16), 1 / 255),
        Model("conv-big", "verification", _conv_big, DIGIT, QUICK, QUICK),
        both("MLP 4 x 256", lambda: _mlp((256,) * 4, nn.ReLU)),
        both("MLP 6 x 100, sigmoid", lambda: _mlp((100,) * 6, nn.Sigmoid)),
        both("MLP 6 x 100, tanh", lambda: _mlp((100,) * 6, nn.Tanh)),
        both("MLP 6 x 50 of 5 numbers", lambda: _mlp((50,) * 6, nn.ReLU, 5, 5), (1, 1, 5)),
        both("convolutional 16-32", lambda: _conv_net((16, 32), nn.ReLU)),
        activated("leaky ReLU", lambda: nn.LeakyReLU(0.1)),
        activated("PReLU", nn.PReLU),
        activated("ReLU6", nn.ReLU6),
        activated("ELU", nn.ELU),
        activated("SELU", nn.SELU),
        activated("GELU", nn.GELU),
        activated("GELU (tanh)", lambda: nn.GELU("tanh")),
        activated("SiLU", nn.SiLU),
        activated("Hardswish", nn.Hardswish),
        activated("softplus", nn.Softplus),
        both("autoencoder with ConvTranspose2d", _autoencoder, (1, 16, 16)),
        both("U-Net: upsampling, concatenation", _unet, (3, 16, 16)),
    ]


def models() -> list[Model]:
    """All of them."""
    return [*_idioms(), *_verified(), *_detectors(), *_classifiers()]
