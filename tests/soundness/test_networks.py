"""The generator makes every operation that the front end takes."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from grood_cert.errors import InputError, RunError
from grood_cert.networks import activations, capture, operations
from grood_cert.networks.aten import ATEN
from tests.soundness.networks import FAMILY, PROFILES, SMOOTH, STEPS, Dice, dressed, random_network

TURNS = 24
SHAPES = (4, 4, 2), (3, 6), (8,)
UNREACHED = {
    "cudnn_batch_norm": "runs on a GPU only",
    "lift_fresh": "torch.export writes lift_fresh_copy",
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # what torch thinks of odd networks


class InTurn(Dice):
    """Every option of a choice has its turn; `picked` says what was chosen, numbers apart."""

    def __init__(self, turn, *seed):
        super().__init__(turn, *seed)
        self.turn, self.picked = turn, ()

    def pick(self, *options):
        self.picked += (self.turn % len(options),)
        return options[self.picked[-1]]

    def chance(self, share):
        self.picked += (super().chance(share),)
        return self.picked[-1]

    def integer(self, low, high):
        self.picked += (super().integer(low, high),)
        return self.picked[-1]


def classes_of(module, *bases):
    found = (kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, bases))
    return {kind.__name__ for kind in found if dataclasses.is_dataclass(kind)}


def operators(network, shape):
    """Names of the operators that a network calls, without capturing it."""
    images = torch.full((3, *shape), 0.5, dtype=torch.float64)
    with torch.no_grad():
        graph = make_fx(network, pre_dispatch=True)(images).graph
    targets = (node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload))
    return {target._schema.name.split("::")[-1].removesuffix("_") for target in targets}


def test_every_operation_is_made(monkeypatch):
    reached, kinds, seen = set(), set(), set()

    class Noting(dict):
        def __getitem__(self, name):
            reached.add(name)
            return super().__getitem__(name)

    monkeypatch.setattr(capture, "ATEN", Noting(ATEN))
    wanted = set(ATEN) - set(UNREACHED)
    everything = classes_of(operations, operations.LinearMap, operations.MaxPool, operations.Addition)
    everything |= classes_of(activations, activations.Activation)
    for turn, shape, name in itertools.product(range(TURNS), SHAPES, STEPS):
        if turn and STEPS[name].__name__ == "maker":  # a step without choices
            continue
        dice = InTurn(turn, shape)
        step = STEPS[name](dice, shape)
        if step is None or (made := (name, shape, dice.picked)) in seen:
            continue
        seen.add(made)
        step = step.double().eval().requires_grad_(False)
        try:
            found = operators(step, shape)
        except RuntimeError:  # too small for what it does; networks are made without such a step
            continue
        if not (found & wanted) - reached and not (name in SMOOTH and everything - kinds):
            continue
        with torch.no_grad():
            size = step(torch.zeros(2, *shape, dtype=torch.float64))[0].numel()
        into_image = nn.Unflatten(1, shape)
        network = nn.Sequential(nn.Flatten(), into_image, step, nn.Flatten(), nn.Linear(size, 2)).double().eval()
        try:
            graph = capture.capture(network, (1, 1, math.prod(shape)))
        except (InputError, RunError):
            continue
        kinds |= {type(node.operation).__name__ for node in graph.nodes}
        if wanted <= reached and everything <= kinds:
            break
    assert wanted - reached == set()
    assert everything - kinds == set()
    assert not reached & set(UNREACHED)


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
