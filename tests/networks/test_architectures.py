from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch
from torch import nn

from grood_cert import recipe
from grood_cert.ball import Ball
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.score import score_bounds
from grood_cert.errors import InputError
from grood_cert.networks import architectures
from grood_cert.networks.architectures import NETWORKS, Classifier, Normalize, build
from grood_cert.networks.capture import capture

SMALL = {  # of each network the thinnest that is worth testing, and images it takes
    "conv-small": ((1, 8, 8), {"width": 4}),
    "kw-small": ((1, 8, 8), {"width": 4}),
    "mlp": ((1, 8, 8), {"width": 4}),
    "resnet-small": ((1, 8, 8), {"width": 4}),
    "cnn-7": ((1, 8, 8), {"width": 4}),
    "good-s": ((1, 8, 8), {"width": 4}),
    "good-l": ((1, 8, 8), {"width": 4}),
    "good-xl": ((1, 8, 8), {"width": 4}),
    "resnet18": ((1, 8, 8), {"width": 4}),
    "wrn-40-2": ((1, 8, 8), {"width": 2}),
    "resnet20": ((1, 8, 8), {"width": 4}),
    "resnet56": ((1, 8, 8), {"width": 2}),
    "densenet-bc-100": ((1, 8, 8), {"width": 2}),
    "resnet18-imagenet": ((3, 32, 32), {}),
    "densenet121": ((3, 32, 32), {}),
}
ALL = [name for name in NETWORKS if name not in ("resnet32", "resnet44", "resnet56")]  # resnet20 with more blocks
THIN = [name for name in ALL if SMALL[name][1]]


def small(name: str, classes: int = 4, mean: float = 0.5, std: float = 0.3) -> Classifier:
    torch.manual_seed(0)
    shape, options = SMALL[name]
    return build(name, shape, classes, [mean] * shape[0], [std] * shape[0], **options).double()


def images_for(name: str, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(number, *SMALL[name][0], dtype=torch.float64, generator=generator)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_recipes_know_every_network(name):
    assert recipe.from_dict({"network": {"name": name}}).network.name == name


@pytest.mark.parametrize("name", THIN)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 7, 5)])
@pytest.mark.parametrize("classes", [1, 6])
def test_shapes(name, shape, classes):
    network = build(name, shape, classes, [0.5] * shape[0], [0.2] * shape[0], **SMALL[name][1]).eval()
    with torch.no_grad():
        logits = network(torch.rand(3, *shape))
    assert logits.shape == (3, classes)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "shape", "classes", "published", "features"),
    [
        ("resnet18", (3, 32, 32), 10, 11_173_962, 512),  # the CIFAR literature, as OpenOOD's resnet18_32x32
        ("resnet18-imagenet", (3, 224, 224), 1000, 11_689_512, 512),  # torchvision's table of models
        ("densenet121", (3, 224, 224), 1000, 7_978_856, 1024),  # torchvision's table of models
        ("wrn-40-2", (3, 32, 32), 10, 2_243_546, 128),  # 2.2 M in Zagoruyko & Komodakis, table 3
        ("densenet-bc-100", (3, 32, 32), 10, 769_162, 342),  # 0.8 M in Huang et al., table 2
        ("resnet20", (3, 32, 32), 10, 269_722, 64),  # 0.27, 0.46, 0.66 and 0.85 M in He et al., table 6
        ("resnet32", (3, 32, 32), 10, 464_154, 64),
        ("resnet44", (3, 32, 32), 10, 658_586, 64),
        ("resnet56", (3, 32, 32), 10, 853_018, 64),
        ("kw-small", (1, 28, 28), 10, 166_406, 100),  # .17 M and .21 M in the literature
        ("kw-small", (3, 32, 32), 10, 214_918, 100),
        ("good-l", (1, 28, 28), 10, 13_257_290, 512),
        ("good-xl", (3, 32, 32), 10, 35_449_226, 512),
        ("good-s", (3, 32, 32), 10, 2_987_402, 128),
        ("cnn-7", (3, 32, 32), 10, 17_192_650, 512),
    ],
)
def test_published_sizes(name, shape, classes, published, features):
    with torch.device("meta"):
        body = NETWORKS[name](nn.Identity(), shape, classes)
        logits, last = body.eval()(torch.empty(2, *shape), return_feature=True)
    assert parameters(body) == published
    assert (logits.shape, last.shape) == ((2, classes), (2, features))


def test_sizes_by_hand():
    """Weights and biases of the layers that the papers list: 3x3 convolutions, then linear layers."""

    def chain(channels, convolutions, linear):
        sizes = [channels, *convolutions]
        total = sum(9 * a * b + b for a, b in zip(sizes, convolutions, strict=False))
        return total + sum(a * b + b for a, b in itertools.pairwise(linear))

    five = [64, 64, 128, 128, 128]
    assert chain(1, five, [128 * 14**2, 512, 10]) == 13_257_290
    assert chain(3, [2 * size for size in five], [256 * 16**2, 512, 512, 10]) == 35_449_226
    assert chain(3, [128, 256, 256], [256 * 8**2, 128, 10]) == 2_987_402
    batch_norm = 2 * (sum(five) + 512)
    assert chain(3, five, [128 * 16**2, 512, 10]) + batch_norm == 17_192_650
    assert parameters(build("conv-small", (1, 8, 8), 6, [0.5], [0.2])) == chain(1, [8, 16], [16 * 4**2, 64, 6])
    assert parameters(build("mlp", (1, 8, 8), 6, [0.5], [0.2])) == chain(1, [], [64, 128, 128, 6])
    one = build("mlp", (1, 8, 8), 6, [0.5], [0.2], hidden_layers=1, width=10)
    assert parameters(one) == 64 * 10 + 10 + 60 + 6


@pytest.mark.parametrize("name", ALL)
def test_features_and_head_make_the_logits(name):
    network = small(name).eval()
    images = images_for(name, 3)
    with torch.no_grad():
        logits, features = network(images, return_feature=True)
        assert torch.equal(logits, network(images))
        assert features.dim() == 2 and torch.equal(network[-1](features), logits)
    assert isinstance(network[-1], nn.Linear) and network[-1].in_features == features.shape[1]
    assert (features >= 0).all(), "penultimate features come after a ReLU"
    assert list(inspect.signature(network.forward).parameters) == ["input"], "tracers see one argument"


@pytest.mark.parametrize("name", ALL)
def test_normalisation_comes_first(name):
    """Pixels x under (mean, std) give the logits of the normalised pixels under (0, 1)."""
    network = small(name, mean=0.4, std=0.2).eval()
    assert isinstance(network[0], Normalize)
    assert not list(network[0].parameters()), "mean and std are not trained"
    identity = copy.deepcopy(network)
    identity[0].mean.zero_(), identity[0].std.fill_(1.0)
    images = images_for(name, 2)
    with torch.no_grad():
        by_hand = torch.stack(
            [(images[:, c] - network[0].mean[c]) / network[0].std[c] for c in range(images.shape[1])], 1
        )
        torch.testing.assert_close(network(images), identity(by_hand), rtol=1e-10, atol=1e-10)
    assert network[0].std.flatten().tolist() == pytest.approx([0.2] * images.shape[1])


@pytest.mark.parametrize("name", THIN)
def test_eval_mode_is_deterministic_and_samples_do_not_mix(name):
    network = small(name)
    network(images_for(name, 4).flip(0))  # gives BatchNorm statistics of its own
    network.eval()
    images = images_for(name, 3)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        together = network(images)
        assert torch.equal(together, network(images))
        alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("train", [True, False])
def test_gradients_of_gradients(name, train):
    """GReg differentiates the input gradient: check the double backward by a difference quotient in the weights."""
    network = small(name).train(train)
    images = images_for(name, 2).requires_grad_(True)
    weight = network[-1].weight

    def slope() -> torch.Tensor:
        (gradient,) = torch.autograd.grad(network(images).logsumexp(1).sum(), images, create_graph=True)
        return gradient.square().sum()

    (derivative,) = torch.autograd.grad(slope(), weight)
    step = 1e-5 * derivative / derivative.norm()
    sides = []
    for sign in (1, -2):
        with torch.no_grad():
            weight += sign * step
        sides.append(slope().detach())
    rise = (sides[0] - sides[1]) / 2e-5
    torch.testing.assert_close(rise, derivative.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("densenet")])
def test_graphs_can_be_traced(name):
    network = small(name)
    network(images_for(name, 4))
    graph = capture(network.eval(), SMALL[name][0])
    images = images_for(name, 2)
    with torch.no_grad():
        torch.testing.assert_close(graph(images), network(images), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("conv-small", "crown"),
        ("kw-small", "crown"),
        ("mlp", "crown"),
        ("resnet-small", "crown"),
        ("cnn-7", "crown"),
        ("good-l", "crown"),
        ("good-s", "crown-ibp"),  # auto_LiRPA 0.3 cannot push CROWN through its pooling
    ],
)
def test_scores_can_be_bounded(name, method):
    network = small(name)
    network(images_for(name, 8))
    network.eval()
    images = images_for(name, 2)
    ball = Ball(images, torch.full((2,), 0.01, dtype=torch.float64), "linf")
    bounds = score_bounds(LirpaNetwork(network, SMALL[name][0], method), ball)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        move = 0.02 * torch.rand(images.shape, dtype=torch.float64, generator=generator) - 0.01
        with torch.no_grad():
            score = -network((images + move).clamp(0, 1)).logsumexp(1)
        assert (bounds.lower <= score).all() and (score <= bounds.upper).all()
    assert (bounds.lower < bounds.upper).all()


def test_residual_block_adds_its_input():
    """With the last convolution zero the block passes relu(x) on, and relu(BN(conv1x1(x))) where the shape changes."""
    for block in (architectures._Residual(3, 3, 1), architectures._Residual(3, 6, 2)):
        block = block.double().eval()
        with torch.no_grad():
            block.conv2.weight.zero_()
        images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        torch.testing.assert_close(block(images), block.shortcut(images).relu(), rtol=1e-12, atol=0)
    assert len(architectures._Residual(3, 3, 1).shortcut) == 0


def test_short_cuts_without_weights_keep_every_second_pixel_between_channels_of_zero():
    """With the last convolution zero the block passes relu(x) on; an odd number of new channels has one more behind."""
    for inputs, outputs in ((3, 6), (2, 4)):
        block = architectures._PlainResidual(inputs, outputs, 2).double().eval()
        with torch.no_grad():
            block.conv2.weight.zero_()
        images = torch.randn(2, inputs, 5, 4, dtype=torch.float64)
        before, expected = (outputs - inputs) // 2, torch.zeros(2, outputs, 3, 2, dtype=torch.float64)
        expected[:, before : before + inputs] = images[:, :, ::2, ::2].relu()
        assert torch.equal(block(images), expected)
    same = architectures._PlainResidual(3, 3, 1).double().eval()
    with torch.no_grad():
        same.conv2.weight.zero_()
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(same(images), images.relu())


def test_pre_activation_block_adds_its_input():
    """With the last convolution zero the block passes x on, untouched; or a convolution of relu(BN(x))."""
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    same, wider = (
        architectures._WideResidual(3, 3, 1).double().eval(),
        architectures._WideResidual(3, 6, 2).double().eval(),
    )
    with torch.no_grad():
        same.conv2.weight.zero_(), wider.conv2.weight.zero_()
    assert torch.equal(same(images), images)
    active = (images / (1 + same.bn1.eps) ** 0.5).relu()
    expected = nn.functional.conv2d(active, wider.convShortcut.weight, stride=2)
    torch.testing.assert_close(wider(images), expected, rtol=1e-12, atol=1e-12)


def test_dense_layer_keeps_its_input():
    block = architectures._Bottleneck(5, 3).double().eval()
    images = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    output = block(images)
    assert output.shape == (2, 8, 4, 4) and torch.equal(output[:, :5], images)


@pytest.mark.parametrize(
    ("name", "convolutions"), [("wrn-40-2", 40), ("densenet-bc-100", 99), ("resnet20", 19), ("resnet56", 55)]
)
def test_depth_is_what_the_name_says(name, convolutions):
    """Convolutions and, for DenseNet, the head; WideResNet's 6 n + 4 layers are convolutions, short cuts included."""
    assert sum(isinstance(module, nn.Conv2d) for module in small(name).modules()) == convolutions


def test_convolutions_of_the_cifar_networks_start_at_the_published_scale():
    torch.manual_seed(0)
    weight = build("wrn-40-2", (3, 32, 32), 10, [0.5] * 3, [0.2] * 3).block3.layer[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("name", ["resnet18-imagenet", "densenet121"])
def test_torchvision_agrees(name):
    """The same parameters under the same names give torchvision's logits."""
    from torchvision import models

    theirs = {"resnet18-imagenet": models.resnet18, "densenet121": models.densenet121}[name](num_classes=4)
    theirs = theirs.double().eval()
    ours = small(name, mean=0.0, std=1.0).eval()
    keys = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert (keys.unexpected_keys, keys.missing_keys) == ([], ["normalize.mean", "normalize.std"])
    images = images_for(name, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-12, atol=1e-12)


def test_old_checkpoints_keep_their_names():
    """Format version 1 of a checkpoint stores these names."""
    names = {
        "conv-small": {
            "0.mean",
            "0.std",
            *(f"{layer}.{kind}" for layer in (1, 3, 6, 8) for kind in ("weight", "bias")),
        },
        "mlp": {"0.mean", "0.std", *(f"{layer}.{kind}" for layer in (2, 4, 6) for kind in ("weight", "bias"))},
    }
    for name, expected in names.items():
        assert set(small(name).state_dict()) == expected
    assert {"4.conv1.weight", "4.norm1.running_mean", "4.shortcut.0.weight", "8.bias"} <= set(
        small("resnet-small").state_dict()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("resnet19", (1, 8, 8), 4, [0.5], [0.3]),
            "unknown network 'resnet19'; use one of conv-small, mlp, resnet18",
        ),
        (("mlp", (3, 8, 8), 4, [0.5], [0.3]), "normalisation has 1 channels, the images have 3"),
        (("mlp", (1, 8, 8), 4, [0.5], [0.0]), "one positive std for each channel"),
        (("mlp", (1, 8, 8), 4, [0.5], [float("nan")]), "one positive std for each channel"),
        (("mlp", (1, 8, 8), 4, [0.5], [0.3, 0.3]), "one mean and one positive std for each channel"),
        (("resnet18-imagenet", (1, 32, 32), 4, [0.5], [0.3]), "takes RGB images; these have 1 channel"),
        (("densenet121", (3, 28, 32), 4, [0.5] * 3, [0.3] * 3), "needs images of 29x29 or more; these are 28x32"),
        (("densenet-bc-100", (1, 3, 8), 4, [0.5], [0.3]), "needs images of 4x4 or more; these are 3x8"),
        (("kw-small", (1, 8, 3), 4, [0.5], [0.3]), "needs images of 4x4 or more; these are 8x3"),
        (("good-s", (1, 2, 8), 4, [0.5], [0.3]), "needs images of 3x3 or more; these are 2x8"),
    ],
)
def test_bad_architectures_are_refused(arguments, message):
    with pytest.raises(InputError) as caught:
        build(*arguments)
    assert message in str(caught.value)


def test_the_smallest_images_pass():
    for name, shape in [
        ("densenet121", (3, 29, 29)),
        ("densenet-bc-100", (1, 4, 4)),
        ("good-s", (1, 3, 3)),
        ("kw-small", (1, 4, 4)),
    ]:
        options = {key: 2 for key in SMALL[name][1]}
        network = build(name, shape, 4, [0.5] * shape[0], [0.3] * shape[0], **options).eval()
        assert network(torch.rand(1, *shape)).isfinite().all()
