"""No gradient norm or secant found in a ball exceeds a bound proved for it: random networks of every kind of layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from grood_cert.ball import NORMS, Ball
from grood_cert.lipschitz.bound import METHODS, local_lipschitz
from grood_cert.lipschitz.estimates import _norms, ascended_gradient_norm_estimate, secant_estimate, uniform_in_ball
from grood_cert.networks.architectures import Normalize
from grood_cert.networks.capture import capture
from grood_cert.scores import ENERGY

NETWORKS = 36  # each kind with each activation; `python -m tests.soundness` has more
GROUPS = 4
EPS = [0.0, 1e-6, 1e-3, 0.02, 0.2, 1.0]
ACTIVATIONS = [nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.GELU]


class Residual(nn.Module):
    """relu(x + BN(conv(act(x)))) with a convolution on the short cut if asked for."""

    def __init__(self, channels, activation, shortcut):
        super().__init__()
        self.activation = activation
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels, channels, 1, bias=False) if shortcut else nn.Sequential()

    def forward(self, images):
        return functional.relu(self.norm(self.conv(self.activation(images))) + self.shortcut(images))


def random_network(seed):
    """A network, the shape of its images, and the name of its kind; every choice follows from the seed."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    torch.manual_seed(seed)
    activation = ACTIVATIONS[seed % len(ACTIVATIONS)]
    kind = ("mlp", "conv", "residual", "average-pool", "max-pool", "batch-norm")[(seed // len(ACTIVATIONS)) % 6]
    classes = pick(1, 2, 3, 10)
    width = pick(1, 2, 3, 6) if kind != "mlp" else pick(1, 2, 5, 16, 64)
    channels = pick(1, 2)
    shape = (channels, 5, 5) if kind != "mlp" else (channels, 2, 3)
    layers = [Normalize([0.4] * channels, [0.3] * channels)]
    if kind == "mlp":
        layers.append(nn.Flatten())
        size = 6 * channels
        for _ in range(pick(1, 2, 3)):
            layers += [nn.Linear(size, width), activation()]
            size = width
        if pick(True, False):
            layers.insert(3, nn.BatchNorm1d(width))
    else:
        layers += [nn.Conv2d(channels, width, 3, pick(1, 2), pick(0, 1)), activation()]
        extra = {
            "conv": [nn.Conv2d(width, 2 * width, 3, 1, 1, groups=pick(1, width)), activation()],
            "residual": [Residual(width, activation(), pick(True, False)), Residual(width, activation(), False)],
            "average-pool": [nn.AvgPool2d(2, pick(1, 2), pick(0, 1)), nn.Conv2d(width, width, 1), activation()],
            "max-pool": [nn.MaxPool2d(2, pick(1, 2), pick(0, 1)), nn.Conv2d(width, width, 1), activation()],
            "batch-norm": [nn.BatchNorm2d(width), nn.Conv2d(width, width, 2), nn.BatchNorm2d(width), activation()],
        }[kind]
        layers += extra
        layers += [nn.AdaptiveAvgPool2d(1)] if pick(True, False) else []
        layers.append(nn.Flatten())
        with torch.no_grad():
            size = nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).shape[1]
    network = nn.Sequential(*layers, nn.Linear(size, classes)).double().eval().requires_grad_(False)
    scale = pick(1e-3, 0.1, 1.0, 1.0, 3.0, 30.0, 1e3)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight *= scale
            if module.bias is not None:
                module.bias *= scale
                if pick(True, False):
                    module.bias[0] = -20 * scale  # a dead unit
            if pick(True, False):
                module.weight[-1] = 0.0  # a unit whose input is exactly its bias ...
                if module.bias is not None:
                    module.bias[-1] = 0.0  # ... that is 0: on the kink everywhere
            if len(module.weight) > 2 and pick(True, False):
                module.weight[1] = module.weight[0]
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.2, 2.0)
            module.weight.uniform_(-1.5, 1.5)
            module.bias.uniform_(-0.3, 0.3)
    return network, shape, kind


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_ball(images, eps, norm):
    return Ball(images, eps, norm)


def images_of(shape, count, generator):
    images = torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    images[1] = images[1].round()  # touches the pixel box
    images[-1] = 0.0
    return images


def norms_of(seed):
    """One norm each; every activation, and every kind of network, is met in all three."""
    return NORMS[(seed + seed // len(ACTIVATIONS)) % 3 :][:1]


@pytest.mark.parametrize("group", range(GROUPS))
def test_nothing_found_exceeds_a_bound(group):
    generator = torch.Generator().manual_seed(group)
    for seed in range(group, NETWORKS, GROUPS):
        network, shape, kind = random_network(seed)
        graph = capture(network, shape)
        eps = torch.tensor(EPS, dtype=torch.float64)
        images = images_of(shape, len(EPS), generator)
        for norm in norms_of(seed):
            ball = make_ball(images, eps * (shape[0] * 6 if norm == "l1" else 1), norm)
            bounds = local_lipschitz(graph, ball, methods=METHODS if seed % 4 == 0 else METHODS[:-1])
            points = uniform_in_ball(ball, 12, generator)
            found = _norms(graph, points.flatten(0, 1), norm, ENERGY).reshape(len(points), -1).amax(0)
            ascended, argument = ascended_gradient_norm_estimate(graph, ball, generator, restarts=1, steps=3)
            secant = secant_estimate(graph, ball, torch.cat([points, argument[None], ball.project(1 - images)[None]]))
            # a secant carries the rounding of S divided by the distance; distances are close to eps
            largest = torch.stack([value.flatten(1).abs().amax(1) for value in graph.values(images)[1:]]).amax(0)
            noise = 1e-13 * largest / eps.clamp(min=1e-300)
            for name, bound in {**bounds.methods, "auto": bounds.auto}.items():
                where = f"seed {seed} ({kind}), {norm}, {name}"
                assert bool(torch.isfinite(bound).all()), where
                for what, value in (("sampled", found), ("ascended", ascended)):
                    assert bool((value <= bound).all()), f"{where}, {what}: {value} > {bound}"
                assert bool((secant <= bound + noise).all()), f"{where}, secant: {secant} > {bound}"
            parts = torch.stack(list(bounds.methods.values()))
            assert bool((bounds.auto == parts.amin(0)).all())
