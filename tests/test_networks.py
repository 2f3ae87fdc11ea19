from __future__ import annotations

import pytest
import torch
from torch import nn

from grood_cert import networks, recipe
from grood_cert.errors import InputError
from grood_cert.networks import NETWORKS, Normalize, build

ALL = list(NETWORKS)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_recipes_know_the_same_networks():
    assert set(recipe._CHOICES["network.name"]) == set(NETWORKS)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 7, 5)])
@pytest.mark.parametrize("classes", [1, 6])
def test_shapes(name, shape, classes):
    network = build(name, shape, classes, [0.5] * shape[0], [0.2] * shape[0], width=4).eval()
    logits = network(torch.rand(3, *shape))
    assert logits.shape == (3, classes)
    assert logits.isfinite().all()


def test_parameter_counts():
    """By hand for the small ones; 11,173,962 is the ResNet-18 with a 3x3 stem of the CIFAR literature."""
    assert parameters(build("resnet18", (3, 32, 32), 10, [0.5] * 3, [0.2] * 3)) == 11_173_962
    convolutions = (9 * 8 + 8) + (9 * 8 * 16 + 16)
    assert parameters(build("conv-small", (1, 8, 8), 6, [0.5], [0.2])) == convolutions + (256 * 64 + 64) + (64 * 6 + 6)
    hidden = (64 * 128 + 128) + (128 * 128 + 128) + (128 * 6 + 6)
    assert parameters(build("mlp", (1, 8, 8), 6, [0.5], [0.2])) == hidden
    assert parameters(build("mlp", (1, 8, 8), 6, [0.5], [0.2], hidden_layers=1, width=10)) == 64 * 10 + 10 + 60 + 6


@pytest.mark.parametrize("name", ALL)
def test_normalisation_comes_first(name):
    """Pixels x under (mean, std) give the logits of the normalised pixels under (0, 1)."""
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    torch.manual_seed(0)
    network = build(name, (3, 8, 8), 4, mean, std, width=4).double().eval()
    assert isinstance(network[0], Normalize)
    assert not list(network[0].parameters()), "mean and std are not trained"
    identity = build(name, (3, 8, 8), 4, [0.0] * 3, [1.0] * 3, width=4).double().eval()
    weights = {key: value for key, value in network.state_dict().items() if key not in ("0.mean", "0.std")}
    assert identity.load_state_dict(weights, strict=False).missing_keys == ["0.mean", "0.std"]
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    by_hand = torch.stack([(images[:, c] - network[0].mean[c]) / network[0].std[c] for c in range(3)], 1)
    torch.testing.assert_close(network(images), identity(by_hand), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network[0].std.flatten().tolist(), std, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_eval_mode_is_deterministic_and_samples_do_not_mix(name):
    torch.manual_seed(0)
    network = build(name, (1, 8, 8), 4, [0.5], [0.3], width=4).double()
    network(torch.rand(16, 1, 8, 8, dtype=torch.float64))  # gives BatchNorm statistics of its own
    network.eval()
    images = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    together = network(images)
    assert torch.equal(together, network(images))
    torch.testing.assert_close(together, torch.cat([network(image[None]) for image in images]), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_residual_block_adds_its_input():
    """With both convolutions zero the block passes relu(x) on, and relu(BN(conv1x1(x))) where the shape changes."""
    for block in (networks._Residual(3, 3, 1), networks._Residual(3, 6, 2)):
        block = block.double().eval()
        with torch.no_grad():
            block.conv2.weight.zero_()
        images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        torch.testing.assert_close(block(images), block.shortcut(images).relu(), rtol=1e-12, atol=0)
    assert len(networks._Residual(3, 3, 1).shortcut) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet19", (1, 8, 8), 4, [0.5], [0.3]), "unknown network 'resnet19'; use one of conv-small, mlp, resnet18"),
        (("mlp", (3, 8, 8), 4, [0.5], [0.3]), "normalisation has 1 channels, the images have 3"),
        (("mlp", (1, 8, 8), 4, [0.5], [0.0]), "one positive std for each channel"),
        (("mlp", (1, 8, 8), 4, [0.5], [float("nan")]), "one positive std for each channel"),
        (("mlp", (1, 8, 8), 4, [0.5], [0.3, 0.3]), "one mean and one positive std for each channel"),
    ],
)
def test_bad_architectures_are_refused(arguments, message):
    with pytest.raises(InputError) as caught:
        build(*arguments)
    assert message in str(caught.value)
