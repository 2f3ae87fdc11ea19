"""The native engine against auto_LiRPA, sampling, vertices, gradient ascent, hand arithmetic and itself in other ways."""

import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks import engines
from grood_cert.ball import NORMS, Ball
from grood_cert.bounds import backward
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.engine import METHODS
from grood_cert.bounds.folding import folded
from grood_cert.bounds.score import score_bounds
from grood_cert.bounds.windows import Window, windows
from grood_cert.errors import InputError
from grood_cert.networks.architectures import Normalize, _Residual
from grood_cert.networks.capture import capture
from grood_cert.networks.operations import Convolution, Dense, Scale

SHAPE = (2, 6, 6)
CLASSES = 3
EPS = {"linf": 0.03, "l2": 0.2, "l1": 0.5}


class Shortcuts(nn.Module):
    """Paths of different windows meet before an activation, one of them without any layer."""

    def __init__(self):
        super().__init__()
        self.first, self.wide, self.slim = (
            nn.Conv2d(2, 3, 3, padding=1),
            nn.Conv2d(3, 3, 5, padding=2),
            nn.Conv2d(3, 3, 1),
        )
        self.norm, self.last = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, stride=2, padding=1)

    def forward(self, images):
        hidden = functional.relu(self.first(images))
        hidden = self.norm(self.wide(hidden) + self.slim(hidden))
        return functional.relu(self.last(functional.relu(hidden + self.first(images))))


def head(features):
    return [nn.Flatten(), nn.Linear(features, 5), nn.ReLU(), nn.Linear(5, CLASSES)]


NETWORKS = {
    "linear": lambda: [nn.Flatten(), nn.Linear(72, CLASSES)],
    "mlp": lambda: [nn.Flatten(), nn.Linear(72, 9), nn.ReLU(), nn.Linear(9, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, CLASSES)],
    "conv": lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), *head(36)],
    "leaky": lambda: [nn.Conv2d(2, 3, 3), nn.LeakyReLU(0.2), nn.Conv2d(3, 3, 3, padding=1), nn.LeakyReLU(0.1), *head(48)],
    "batch norm": lambda: [
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.ReLU(),
        *head(108),
    ],
    "residual": lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), _Residual(3, 4, 2), _Residual(4, 4, 1), *head(36)],
    "shortcuts": lambda: [Shortcuts(), *head(18)],
    "average pool": lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(3, 3, 2, padding=1), nn.ReLU(), *head(48)],
    "global pool": lambda: [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), *head(4)],
    "max pool": lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 2, padding=1), nn.ReLU(), *head(48)],
    "dilated": lambda: [nn.Conv2d(2, 4, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1, groups=2), nn.ReLU(), *head(144)],
    "linear in a row": lambda: [
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), *head(72),
    ],
    "smooth": lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(27, 5), nn.Softplus(), nn.Linear(5, CLASSES)],
}  # fmt: skip


ONE_NORM_EACH = [(name, NORMS[place % 3]) for place, name in enumerate(NETWORKS)]


@functools.cache
def built(name, seed=0):
    """A network and its graph, to be left as they are."""
    network = build(name, seed)
    return network, capture(network, SHAPE)


def build(name, seed=0):
    """Weights that leave many units unstable, and BatchNorm statistics that are not the identity."""
    network = nn.Sequential(Normalize([0.4, 0.6], [0.3, 0.2]), *NETWORKS[name]())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                fan = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * (2 / fan) ** 0.5)
                if module.bias is not None:
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.2)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
                for tensor in (module.bias, module.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return network.double().eval()


def ball_of(norm="linf", batch=3, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, *SHAPE, dtype=torch.float64, generator=generator)
    images[0, :, :3] = images[0, :, :3].round()  # touches the walls of the box
    return Ball(images, scale * EPS[norm] * torch.linspace(0.5, 1, batch, dtype=torch.float64), norm)


def rows_of(batch, classes=CLASSES):
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(batch, 2, classes, dtype=torch.float64, generator=generator)
    return torch.cat([torch.eye(classes, dtype=torch.float64).expand(batch, -1, -1), random], 1)


def assert_not_looser(ours, theirs, tolerance=1e-6):
    for mine, other, sign in zip(ours, theirs, (1, -1), strict=True):
        assert bool((sign * (mine - other) >= -tolerance * other.abs().max()).all())


@pytest.mark.parametrize(
    ("name", "norm"), [(name, norm) for name, norm in ONE_NORM_EACH if name not in ("dilated", "smooth")]
)
def test_auto_lirpa_agrees(name, norm):
    """To 1e-6 of the scale: rows by CROWN and CROWN-IBP, unstable hidden units by CROWN, intervals in l_inf.

    Not for dilated convolutions, where auto_LiRPA 0.3 fails in l_2, and smooth functions, whose lines differ.
    """
    network, graph = built(name)
    engines = {
        method: tuple(engine(network, SHAPE, method, graph=graph) for engine in (NativeNetwork, LirpaNetwork))
        for method in METHODS
    }
    for kind, scale in (("linf", 0.2), (norm, 1.0)):
        ball, rows = ball_of(kind, scale=scale), rows_of(3)
        for method, (native, oracle) in engines.items():
            ours, theirs = native.relax(ball), oracle.relax(ball)
            mine, other = ours.rows(rows), theirs.rows(rows)
            assert_not_looser(mine, other)
            if method != "ibp":  # there auto_LiRPA closes earlier, and knows fewer linear layers of the ball
                assert_not_looser(other, mine)
            for hidden, reference in zip(ours.preactivations(), theirs.preactivations(), strict=True):
                crossed = (hidden[0] < 0) & (hidden[1] > 0)
                for one, two in zip(hidden, reference, strict=True):
                    if method == "crown":
                        torch.testing.assert_close(one[crossed], two[crossed], rtol=1e-6, atol=1e-6)
                    else:
                        assert float((one - two).abs().max()) < 1e-6 or kind != "linf"


def repeated(ball, count):
    """The batch of balls, `count` times in a row."""
    return Ball(ball.center.repeat(count, 1, 1, 1), ball.eps.repeat(count), ball.norm)


def extremes(network, ball, rows):
    """Smallest and largest c . f seen at random points, vertices and along 8 steps of signed or plain gradient."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.cat([rows, -rows], 1)
    starts = []
    for kind in range(24):
        noise = torch.randn(ball.center.shape, dtype=torch.float64, generator=generator)
        if ball.norm == "linf":
            noise = noise.sign() if kind % 2 else noise.clamp(-1, 1)
            starts.append(ball.center + ball.per_pixel(ball.eps) * noise)
        elif ball.norm == "l2":
            starts.append(ball.center + ball.per_pixel(ball.eps) * noise / ball.per_pixel(noise.flatten(1).norm(dim=1)))
        else:
            spike = (
                functional.one_hot(noise.flatten(1).abs().argmax(1), noise[0].numel()).double()
                * noise.flatten(1).sign()
            )
            starts.append(ball.center + ball.per_pixel(ball.eps) * spike.reshape(noise.shape))
    with torch.no_grad():
        logits = network(repeated(ball, len(starts)).project(torch.cat(starts)))
    best = (weight @ logits.reshape(len(starts), len(weight), -1, 1)).squeeze(-1).amax(0)
    each = repeated(ball, weight.shape[1])
    points, ascended = each.center, weight.transpose(0, 1).flatten(0, 1)
    for _ in range(8):
        points = points.detach().requires_grad_(True)
        value = (ascended * network(points)).sum(1)
        (gradient,) = torch.autograd.grad(value.sum(), points)
        best = torch.maximum(best, value.detach().reshape(weight.shape[1], -1).T)
        step = (
            gradient.sign()
            if ball.norm == "linf"
            else gradient / each.per_pixel(gradient.flatten(1).norm(dim=1) + 1e-30)
        )
        points = each.project(points.detach() + 0.3 * each.per_pixel(each.eps) * step)
    half = rows.shape[1]
    return -best[:, half:], best[:, :half]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_point_found_lies_inside(name, norm):
    (network, graph), ball, rows = built(name, seed=3), ball_of(norm, seed=4), rows_of(3)
    low, high = extremes(network, ball, rows)
    for method in METHODS:
        lower, upper = NativeNetwork(network, SHAPE, method, graph=graph).relax(ball).rows(rows)
        assert bool((lower <= low).all() and (high <= upper).all())
        if name == "linear":  # exact there, and ascent of a linear function arrives
            assert norm != "linf" or float((upper - high).max()) < 1e-9


@pytest.mark.parametrize("name", NETWORKS)
def test_radius_zero_is_the_network(name):
    (network, graph), images = built(name), ball_of().center
    for norm, method in itertools.product(NORMS, METHODS):
        relaxation = NativeNetwork(network, SHAPE, method, graph=graph).relax(
            Ball(images, torch.zeros(3).double(), norm)
        )
        lower, upper = relaxation.rows(rows_of(3))
        with torch.no_grad():
            value = (rows_of(3) @ network(images).unsqueeze(-1)).squeeze(-1)
        assert bool((lower <= value).all() and (value <= upper).all())
        assert float((upper - lower).max()) < 1e-7  # the margin for rounding; intervals of nine layers add up


@pytest.mark.parametrize(("name", "norm"), ONE_NORM_EACH)
def test_windows_and_whole_layers_memory_and_batches_give_the_same(name, norm, monkeypatch):
    (network, graph), ball, rows = built(name), ball_of(norm), rows_of(3)
    expected = NativeNetwork(network, SHAPE, "crown", graph=graph).relax(ball).rows(rows)

    def same(got, samples=slice(None)):
        for one, two in zip(got, expected, strict=True):
            torch.testing.assert_close(one, two[samples], rtol=1e-9, atol=1e-9)

    same(NativeNetwork(network, SHAPE, "crown", 1, graph).relax(ball).rows(rows))
    same(NativeNetwork(network, SHAPE, "crown", 2**30, graph).relax(ball).rows(rows))
    alone = Ball(ball.center[1:2], ball.eps[1:2], norm)
    same(NativeNetwork(network, SHAPE, "crown", graph=graph).relax(alone).rows(rows[1:2]), slice(1, 2))
    monkeypatch.setattr(backward, "windows", lambda graph, node: None)
    same(NativeNetwork(network, SHAPE, "crown", graph=graph).relax(ball).rows(rows))


@pytest.mark.parametrize(("name", "norm"), ONE_NORM_EACH)
def test_every_layer_through_windows_is_that_layer_through_whole_layers(name, norm):
    network, graph = built(name)
    native, ball = NativeNetwork(network, SHAPE, "crown", graph=graph), ball_of(norm)
    relaxed = native.relax(ball).hidden().relaxed
    for node, current in enumerate(native.folded.nodes[1:], 1):
        if windows(native.folded, node) is not None:
            through = relaxed._through_windows(node, 100, 2**14)
            whole = relaxed._through_layers(node, torch.ones(len(ball.center), current.size, dtype=torch.bool), 2**20)
            for one, two in zip(through, whole, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_windows_are_used_and_are_what_gradients_reach():
    """The window of a unit is where its gradient can be other than zero, clipped to the image."""
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, dilation=2, padding=1), nn.AvgPool2d(2, 1)
    ).double()
    network[0].weight.data.abs_().add_(0.1), network[1].weight.data.abs_().add_(0.1)
    graph = capture(nn.Sequential(network, nn.Flatten(), nn.Linear(18, 2)).double().eval(), (1, 12, 12))
    window = windows(graph, 3)[0]
    images = torch.zeros(1, 1, 12, 12, dtype=torch.float64, requires_grad=True)
    output = network(images)[0, 0]
    assert window.places == tuple(output.shape)
    for row, column in itertools.product(*map(range, output.shape)):
        (gradient,) = torch.autograd.grad(output[row, column], images, retain_graph=True)
        seen = torch.zeros(12, 12, dtype=torch.bool)
        top, left = (window.step[axis] * place - window.before[axis] for axis, place in ((0, row), (1, column)))
        seen[max(top, 0) : top + window.size[0], max(left, 0) : left + window.size[1]] = True
        reached = gradient[0, 0] != 0
        assert bool((reached <= seen).all())
        ends = (
            [(end.min(), end.max()) for end in reached.nonzero().T],
            [(end.min(), end.max()) for end in seen.nonzero().T],
        )
        assert ends[0] == ends[1]
    assert windows(graph, 4) is None


def test_gather_is_what_the_places_see():
    maps = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert Window((2, 2), (2, 2), (2, 2), (1, 1)).gather(maps)[0].tolist() == [
        [0, 0, 0, 0], [0, 0, 1, 2], [0, 4, 0, 8], [5, 6, 9, 10],
    ]  # fmt: skip
    one, other = Window((2, 2), (3, 1), (2, 2), (1, 0)), Window((2, 2), (1, 4), (2, 2), (0, 1))
    assert one.union(other) == Window((2, 2), (3, 4), (2, 2), (1, 1))


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_keeps_the_function_and_leaves_no_diagonal_layer_behind_a_linear_one(name):
    _, graph = built(name)
    small = folded(graph)
    images = torch.rand(4, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(small(images), graph(images), rtol=1e-12, atol=1e-12)
    assert [small.nodes[i].name for i in small.nonlinear] == [graph.nodes[i].name for i in graph.nonlinear]
    assert all(
        small.nodes[i].shape == graph.nodes[j].shape for i, j in zip(small.nonlinear, graph.nonlinear, strict=True)
    )
    kinds = [type(node.operation) for node in small.nodes]
    assert Scale not in kinds or name == "shortcuts"  # the image and a sum are read twice there
    if name == "conv":  # a shift in front of zero padding is another bias at the border
        bias = next(node.operation for node in small.nodes if isinstance(node.operation, Convolution)).bias
        assert float((bias[:, 0, 0] - bias[:, 2, 2]).abs().max()) > 1e-3


def test_hand_arithmetic():
    # z = (x1 + x2, x1 - x2) in [.8, 1.2] x [-.2, .2], f = relu(z1) + relu(z2); see test_native_graph
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval().requires_grad_(False)
    network[1].weight[:], network[1].bias[:] = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), 0.0
    network[3].weight[:], network[3].bias[:] = 1.0, 0.0
    ball = Ball(torch.full((1, 1, 1, 2), 0.5).double(), torch.tensor([0.1]).double(), "linf")
    for method, bounds in (("ibp", (0.8, 1.4)), ("crown-ibp", (0.8, 1.3)), ("crown", (0.8, 1.3))):
        got = NativeNetwork(network, (1, 1, 2), method).relax(ball).rows(torch.ones(1, 1, 1))
        assert [float(end) for end in got] == pytest.approx(bounds, abs=1e-6)  # 0.1 is rounded
    # l_2: (x1, x2) moves by .1 in any direction, so |dz2| <= .1 sqrt 2 by every method (the box gives .2)
    ball = Ball(ball.center, ball.eps, "l2")
    for method in METHODS:
        lower, upper = NativeNetwork(network, (1, 1, 2), method).relax(ball).preactivations()[0]
        assert (float(lower[0, 1]), float(upper[0, 1])) == pytest.approx((-0.1 * math.sqrt(2), 0.1 * math.sqrt(2)))


@pytest.mark.parametrize("norm", NORMS)
def test_dead_units_zero_weights_and_one_logit(norm):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4), nn.ReLU(), nn.Linear(4, 1)
    )
    network.double().eval().requires_grad_(False)
    network[0].weight[0], network[0].bias[0] = 0.0, 0.0  # z = 0 identically
    network[0].weight[1], network[0].bias[1] = 0.0, -1.0  # dead
    network[3].weight[0], network[3].bias[0] = 0.0, 0.0
    ball, rows = ball_of(norm), torch.tensor([[[1.0], [0.0], [-2.0]]]).double().expand(3, -1, -1)
    low, high = extremes(network, ball, rows)
    for method in METHODS:
        native = NativeNetwork(network, SHAPE, method)
        lower, upper = native.relax(ball).rows(rows)
        assert bool((lower <= low).all() and (high <= upper).all())
        torch.testing.assert_close(lower[:, 2], -2 * upper[:, 0], rtol=1e-9, atol=1e-9)
        assert float(upper[:, 1].abs().max()) == float(lower[:, 1].abs().max()) == 0


def test_overflow_proves_nothing_for_its_sample_only():
    layers = [nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)]
    network = nn.Sequential(*layers).eval()
    images = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    images[0, 0, 0, 0] = 0.0
    for norm, method in itertools.product(NORMS, METHODS):
        native = NativeNetwork(network, (1, 2, 2), method)
        first, second = [node.operation for node in native.folded.nodes if isinstance(node.operation, Dense)][:2]
        # a unit that is off in the first image, whose left upper pixel is black
        first.weight[0], first.bias[0] = torch.tensor([1e200, 0, 0, 0], dtype=torch.float64), -1.0
        second.weight[:, 0] = 1e200
        bounds = native.relax(Ball(images, torch.zeros(2).double(), norm)).rows(torch.ones(2, 1, 2))
        for bound in bounds:
            assert torch.isnan(bound).tolist() == [[False], [True]]


def test_a_hidden_bound_that_is_not_proved_makes_its_sample_nan():
    relaxation = NativeNetwork(build("conv"), SHAPE, "crown").relax(ball_of())
    relaxation.hidden().proved[1] = False
    for bound in relaxation.rows(rows_of(3)):
        assert torch.isnan(bound).all(1).tolist() == [False, True, False]


def test_score_bounds_runs_on_it():
    network, ball = build("residual"), ball_of()
    ours = score_bounds(NativeNetwork(network, SHAPE, "crown"), ball)
    theirs = score_bounds(LirpaNetwork(network, SHAPE, "crown"), ball)
    for name in ("lower", "upper", "lower_per_logit", "upper_per_logit"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-6)


def test_the_network_is_copied_and_evaluated_in_float64():
    network = build("batch norm").float()
    native = NativeNetwork(network, SHAPE, "crown")
    assert next(network.parameters()).dtype == torch.float32
    assert not native.network.training and next(native.network.parameters()).dtype == torch.float64
    lower, _ = native.relax(Ball(ball_of().center.float(), torch.zeros(3), "linf")).rows(rows_of(3).float())
    assert lower.dtype == torch.float64
    with pytest.raises(InputError, match=r"is in train mode; call network\.eval\(\) first"):
        NativeNetwork(network.train(), SHAPE, "crown")


def test_wrong_calls_are_refused():
    network = build("conv")
    with pytest.raises(InputError, match="unknown method 'alpha-crown'; use one of ibp, crown-ibp, crown"):
        NativeNetwork(network, SHAPE, "alpha-crown")
    with pytest.raises(InputError, match="unknown method 'crwon'; use one of ibp, crown-ibp, crown"):
        NativeNetwork(network, SHAPE, "crwon")
    with pytest.raises(InputError, match="positive number of bytes"):
        NativeNetwork(network, SHAPE, "crown", memory=0)
    with pytest.raises(InputError, match="layer 1: layer_norm cannot be bounded"):
        NativeNetwork(nn.Sequential(nn.Flatten(), nn.LayerNorm(72), nn.Linear(72, 2)).eval(), SHAPE, "crown")
    native = NativeNetwork(network, SHAPE, "crown")
    with pytest.raises(InputError, match=r"expected images of shape \(2, 6, 6\), got \(2, 6, 5\)"):
        native.relax(Ball(torch.rand(1, 2, 6, 5), torch.zeros(1), "linf"))
    with pytest.raises(InputError, match=r"expected rows of shape \(3, S, 3\), got \(3, 1, 4\)"):
        native.relax(ball_of()).rows(torch.ones(3, 1, 4))
    with pytest.raises(InputError, match="alpha-crown"):
        native.relax(ball_of()).rows(rows_of(3), "alpha-crown")


def test_hidden_bounds_are_computed_once_for_each_kind(monkeypatch):
    relaxation = NativeNetwork(build("conv"), SHAPE, "crown").relax(ball_of())
    first = relaxation.hidden("crown-ibp")
    assert relaxation.hidden("ibp") is first and relaxation.hidden("crown") is not first
    assert relaxation.hidden() is relaxation.hidden("crown")


def test_benchmark():
    names = []
    for name, network, images in engines.cases([], 2):
        if "8x8" in name and "resnet" not in name:
            for norm, eps in engines.EPS.items():
                record = engines.measure(network, images, norm, eps, repeats=1)
                assert tuple(record) == engines.COLUMNS[1:]
                assert record["difference"] < 1e-6 and record["native_ms"] > 0 and record["auto_lirpa_ms"] > 0
            names.append(name)
    assert names == ["mlp 8x8", "conv-small 8x8"]


def test_matrices_of_layers_and_of_windows_are_not_confused():
    """Windows and whole layers pull rows of the same shape back through the same layer, with other padding."""
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 4, 4, 4, 1), nn.ReLU(), nn.Conv2d(4, 256, 2, padding=1), nn.ReLU(), nn.Flatten()
    network = nn.Sequential(*layers, nn.Linear(2304, 16), nn.ReLU(), nn.Linear(16, 3)).eval().double()
    with torch.no_grad():
        for weight in network.parameters():
            weight *= 1.5
    images = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    for norm, eps in (("linf", 0.01), ("linf", 0.1), ("l2", 0.3)):
        ball = Ball(images, torch.full((4,), eps, dtype=torch.float64), norm)
        lower, upper = (
            NativeNetwork(network, (1, 8, 8), "crown").relax(ball).rows(torch.eye(3).double().expand(4, 3, 3))
        )
        logits = network(images)
        assert bool((lower <= logits).all() and (logits <= upper).all())


def test_windows_outside_the_layer():
    """A kernel of 1 with padding 2: whole strips of windows see nothing but padding."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1, padding=2), nn.ReLU(), nn.Flatten())
    network = nn.Sequential(*network, nn.Linear(200, 2)).eval().double()
    ball = Ball(torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.full((3,), 0.1, dtype=torch.float64), "linf")
    rows = torch.eye(2).double().expand(3, 2, 2)
    wide = NativeNetwork(network, (1, 8, 8), "crown").relax(ball).rows(rows)
    narrow = NativeNetwork(network, (1, 8, 8), "crown", memory=4096).relax(ball).rows(rows)
    for one, other in zip(wide, narrow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
