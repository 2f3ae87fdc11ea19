"""Networks of the generator follow from their numbers, and are float32 networks in float64."""

import pytest
import torch
from torch import nn

from tests.soundness.networks import FAMILY, PROFILES, Dice, dressed, random_network


def test_networks_follow_from_their_numbers():
    images = torch.rand(2, 1, 1, 1).double()
    one, two = (random_network(3, 4, "line").network for _ in range(2))
    assert torch.equal(one(images), two(images))
    assert len({random_network(0, FAMILY * number, "any").name for number in range(20)}) > 15
    made = random_network(3, 0, "line")
    other = random_network(3, 1, "line").network(images)
    assert not torch.equal(made.network(images), other)
    assert torch.equal(dressed(made, 3, 1).network(images), other)


@pytest.mark.parametrize("profile", PROFILES)
def test_weights_are_float32_numbers(profile):
    for number in range(10):
        made = random_network(1, FAMILY * number, profile)
        for tensor in (*made.network.parameters(), *made.network.buffers()):
            if tensor.is_floating_point():
                assert torch.equal(tensor.float().double(), tensor)
        assert not any(module.training for module in made.network.modules())


def test_dice_follow_from_their_seed():
    assert Dice("a", 1).seed() == Dice("a", 1).seed() != Dice("a", 2).seed()
    assert isinstance(random_network(0, 0).network, nn.Module)
