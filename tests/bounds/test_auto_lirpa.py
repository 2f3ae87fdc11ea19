"""The adapter to auto_LiRPA against sampling, attacks, enumeration and a second, dense bound engine."""

import functools
import warnings

import pytest
import torch
from torch import nn

from grood_cert.ball import Ball
from grood_cert.bounds import auto_lirpa
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.auto_lirpa_repair import is_old
from grood_cert.bounds.engine import METHODS
from grood_cert.errors import InputError, RunError
from grood_cert.networks.architectures import Normalize, _Residual, build
from grood_cert.networks.capture import capture
from grood_cert.networks.operations import Dense

pytestmark = [pytest.mark.filterwarnings("error")]
SHAPE = (1, 4, 4)
CLASSES = 3


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomised(network, seed, scale=1.0):
    """Weights that leave many neurons unstable, and BatchNorm statistics that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * scale * (2 / fan) ** 0.5)
                if module.bias is not None:
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.2 * scale)
            elif isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
                for tensor in (module.bias, module.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return network.double().eval()


def normalize():
    return Normalize([0.3], [0.4])


def odd_net(activation):
    """Max-pool, average pool and global pool, another activation."""
    return nn.Sequential(
        normalize(),
        nn.Conv2d(1, 3, 3, padding=1),
        activation,
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2, padding=1),
        activation,
        nn.AvgPool2d(2, 1) if isinstance(activation, nn.Identity) else nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    )


def residual_net():
    """The blocks of ResNet-18, one of each kind, and its head."""
    stem = [normalize(), nn.Conv2d(1, 2, 3, 1, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU()]
    blocks = [_Residual(2, 2, 1), _Residual(2, 3, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES))


def networks():
    mean, std = [0.3], [0.4]
    return {
        "mlp": randomised(build("mlp", SHAPE, CLASSES, mean, std, width=8), 0),
        "deep-mlp": randomised(build("mlp", SHAPE, CLASSES, mean, std, width=6, hidden_layers=4), 1),
        "conv-small": randomised(build("conv-small", SHAPE, CLASSES, mean, std, width=2), 2),
        "residual": randomised(residual_net(), 3),
        "relu-pools": randomised(odd_net(nn.ReLU()), 4),
        "leaky": randomised(odd_net(nn.LeakyReLU(0.1)), 5),
        "sigmoid": randomised(odd_net(nn.Sigmoid()), 6, 3.0),
        "tanh": randomised(odd_net(nn.Tanh()), 7, 3.0),
        "no-normalisation": randomised(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), 8),
        "linear-head-only": randomised(nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)), 9),
    }


NETWORKS = networks()


if not is_old():  # refused there
    NETWORKS = {name: network for name, network in NETWORKS.items() if name not in ("sigmoid", "tanh")}


@functools.cache
def graph_of(name):
    return capture(NETWORKS[name], SHAPE)


@functools.cache
def bounded(name, method):
    return LirpaNetwork(NETWORKS[name], SHAPE, method, graph=graph_of(name))


def images(number, seed=0):
    """Images, some with pixels on the box."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(number, *SHAPE, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(x.shape, generator=generator) < 0.2, x.round(), x)


def ball_of(number, eps, norm, seed=0):
    return Ball(images(number, seed), torch.full((number,), eps, dtype=torch.float64), norm)


def rows_of(number, seed=0, rows=4):
    generator = torch.Generator().manual_seed(seed + 100)
    random = torch.randn(number, rows, CLASSES, generator=generator, dtype=torch.float64)
    return torch.cat([torch.eye(CLASSES, dtype=torch.float64).expand(number, -1, -1), random], 1)


def extremes(network, ball, rows, samples=100, steps=8):
    """Smallest and largest c . f found in the ball, (B, S) each: samples, vertices, and gradient ascent from them."""
    generator = torch.Generator().manual_seed(7)
    shape = (samples, *ball.center.shape)
    corner = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
    inside = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    direction = torch.cat([corner, inside])
    if ball.norm != "linf":
        length = torch.linalg.vector_norm(direction.flatten(2), ord={"l2": 2, "l1": 1}[ball.norm], dim=2)
        direction = direction / length[..., None, None, None]
    many = repeated(ball, len(direction))
    points = many.project(many.center + direction.flatten(0, 1) * many.per_pixel(many.eps))
    with torch.no_grad():
        logits = network(torch.cat([ball.center, points])).reshape(-1, len(ball.center), CLASSES)
    values = (rows @ logits.unsqueeze(-1)).squeeze(-1)
    low, high = values.amin(0), values.amax(0)
    count = rows.shape[1]
    each = repeated(ball, 2 * count)  # every row, once up and once down
    direction = torch.cat([rows, -rows], 1).transpose(0, 1).flatten(0, 1)
    x = each.center
    for _ in range(steps):
        x = x.detach().requires_grad_()
        value = (direction * network(x)).sum(1)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        up, down = value.detach().reshape(2, count, -1).transpose(1, 2)
        low, high = torch.minimum(low, -down), torch.maximum(high, up)
        length = torch.linalg.vector_norm(gradient.flatten(1), dim=1) + 1e-300
        step = gradient.sign() if ball.norm == "linf" else gradient / each.per_pixel(length)
        x = each.project(x.detach() + step * each.per_pixel(each.eps) / 2)
    return low, high


def repeated(ball, count):
    """The batch of balls, `count` times in a row."""
    return Ball(ball.center.repeat(count, 1, 1, 1), ball.eps.repeat(count), ball.norm)


def assert_contains(lower, upper, low, high):
    scale = 1e-11 * (1 + torch.maximum(low.abs(), high.abs()))
    assert (lower <= low + scale).all(), f"lower bound violated by {(lower - low).max():.3g}"
    assert (upper >= high - scale).all(), f"upper bound violated by {(high - upper).max():.3g}"


# --- the second engine: CROWN for a dense ReLU network, written from the formulas ------------------------------------


def support(rows, ball):
    """max a . (x' - x), exactly: for l_2 by bisection on the multiplier."""
    low, high = (-ball.center).flatten(1).unsqueeze(1), (1 - ball.center).flatten(1).unsqueeze(1)
    eps = ball.eps.reshape(-1, 1, 1)
    if ball.norm == "linf":
        low, high = low.clamp(min=-eps), high.clamp(max=eps)
        return torch.where(rows > 0, rows * high, rows * low).sum(-1)
    small, large = torch.full((*rows.shape[:2], 1), -60.0).double(), torch.full((*rows.shape[:2], 1), 60.0).double()
    for _ in range(200):
        middle = (small + large) / 2
        offset = torch.minimum(torch.maximum(rows * middle.exp(), low), high)
        inside = torch.linalg.vector_norm(offset, dim=-1, keepdim=True) <= eps
        small, large = torch.where(inside, middle, small), torch.where(inside, large, middle)
    return (rows * torch.minimum(torch.maximum(rows * small.exp(), low), high)).sum(-1)


def dense_layers(network):
    """[(W, b)] of an mlp of `grood_cert.networks.architectures`, normalisation folded into the first."""
    linear = [m for m in network if isinstance(m, nn.Linear)]
    weights = [(m.weight.detach().clone(), m.bias.detach().clone()) for m in linear]
    if isinstance(network[0], Normalize):
        mean, std = network[0].mean.item(), network[0].std.item()
        weight, bias = weights[0]
        weights[0] = weight / std, bias - (weight * mean / std).sum(1)
    return weights


def dense_backward(layers, lines, rows, ball):
    """Upper bound of rows . (last affine output), rows (B, S, n), through the ReLU lines (l, u) of all layers before."""
    constant = torch.zeros(rows.shape[:2], dtype=torch.float64)
    for index in range(len(layers) - 1, -1, -1):
        weight, bias = layers[index]
        constant, rows = constant + rows @ bias, rows @ weight
        if index:
            l, u = (bound.unsqueeze(1) for bound in lines[index - 1])
            unstable = (l < 0) & (u > 0)
            slope = torch.where(unstable, u / (u - l), (l >= 0).double())
            intercept = torch.where(unstable, -l * u / (u - l), torch.zeros_like(l))
            below = torch.where(unstable, (u > -l).double(), slope)
            constant = constant + (rows.clamp(min=0) * intercept).sum(-1)
            rows = rows.clamp(min=0) * slope + rows.clamp(max=0) * below
    return constant + (rows @ ball.center.flatten(1).unsqueeze(-1)).squeeze(-1) + support(rows, ball)


def dense_bounds(network, ball, rows, method):
    """Pre-activation bounds, and bounds of the rows, as `LirpaNetwork` documents each method."""
    layers = dense_layers(network)
    lines = []
    for depth, (weight, bias) in enumerate(layers):
        last = depth == len(layers) - 1
        if depth == 0:
            l = u = None
        else:
            l, u = (bound.clamp(min=0) for bound in lines[-1])
        matrix = (rows @ weight) if last else weight
        offset = (rows @ bias) if last else bias
        if l is None:
            box_low, box_high = ball.lower.flatten(1), ball.upper.flatten(1)
        else:
            box_low, box_high = l, u
        up = (matrix.clamp(min=0) @ box_high.unsqueeze(-1) + matrix.clamp(max=0) @ box_low.unsqueeze(-1)).squeeze(
            -1
        ) + offset
        down = (matrix.clamp(min=0) @ box_low.unsqueeze(-1) + matrix.clamp(max=0) @ box_high.unsqueeze(-1)).squeeze(
            -1
        ) + offset
        unit = rows if last else torch.eye(len(weight), dtype=torch.float64).expand(len(ball.center), -1, -1)
        linear_up = dense_backward(layers[: depth + 1], lines, unit, ball)
        linear_down = -dense_backward(layers[: depth + 1], lines, -unit, ball)
        if last:
            return lines, ((down, up) if method == "ibp" else (linear_down, linear_up))
        if method == "crown" or depth == 0:
            down, up = torch.maximum(down, linear_down), torch.minimum(up, linear_up)
        lines.append((down, up))
    raise AssertionError


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["mlp", "deep-mlp"])
def test_equals_the_dense_engine(name, norm, method):
    for eps in (0.0, 0.01, 0.1, 0.7):
        ball, rows = ball_of(3, eps, norm), rows_of(3)
        relaxation = bounded(name, method).relax(ball)
        lines, (low, high) = dense_bounds(NETWORKS[name], ball, rows, method)
        for got, want in zip(relaxation.preactivations(), lines, strict=True):
            for one, other in zip(got, want, strict=True):
                assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)
        lower, upper = relaxation.rows(rows)
        assert torch.allclose(lower, low, rtol=1e-9, atol=1e-7)
        assert torch.allclose(upper, high, rtol=1e-9, atol=1e-7)


# --- soundness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_no_point_of_the_ball_violates_a_bound(name, norm, method):
    network = bounded(name, method)
    assert network.method == method
    for eps in (0.1, 1.0) if norm == "linf" else (1.0,):
        ball, rows = ball_of(2, eps, norm, seed=int(eps * 100)), rows_of(2, rows=1)
        lower, upper = network.relax(ball).rows(rows)
        assert lower.dtype == torch.float64 and lower.shape == rows.shape[:2]
        assert_contains(lower, upper, *extremes(NETWORKS[name], ball, rows, samples=20, steps=4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp", "conv-small", "residual", "relu-pools", *(["sigmoid"] if is_old() else [])])
def test_at_eps_zero_the_bounds_are_the_logits(name, method):
    for norm in ("linf", "l2"):
        ball, rows = ball_of(3, 0.0, norm), rows_of(3)
        with torch.no_grad():
            value = (rows @ NETWORKS[name](ball.center).unsqueeze(-1)).squeeze(-1)
        for bound in bounded(name, method).relax(ball).rows(rows):
            assert torch.allclose(bound, value, rtol=0, atol=1e-8)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["mlp", "conv-small", "residual", "relu-pools", "leaky"])
@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_preactivations_hold_for_every_nonlinear_layer_in_order(name, norm, method):
    network, ball = NETWORKS[name], ball_of(2, 0.05, norm)
    pairs = bounded(name, method).relax(ball).preactivations()
    seen = []
    # networks.py calls functional.relu in its residual blocks, so the values are read off functional and modules alike
    original = torch.nn.functional.relu

    def relu(x, inplace=False):
        seen.append(x.detach())
        return original(x, inplace)

    kinds = (nn.LeakyReLU, nn.MaxPool2d)
    handles = [
        m.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        for m in network.modules()
        if isinstance(m, kinds)
    ]
    generator = torch.Generator().manual_seed(0)
    torch.nn.functional.relu = relu
    try:
        for _ in range(50):
            seen.clear()
            noise = torch.randn(ball.center.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                network(ball.project(ball.center + noise * ball.per_pixel(ball.eps)))
            assert [tuple(l.shape) for l, _ in pairs] == [tuple(z.shape) for z in seen]
            for (l, u), z in zip(pairs, seen, strict=True):
                assert not l.requires_grad
                assert ((l <= z + 1e-12) & (z <= u + 1e-12)).all()
    finally:
        torch.nn.functional.relu = original
        for handle in handles:
            handle.remove()


def two_pixel_net(seed, hidden=5):
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, 2)).double()
    return randomised(network, seed, 2.0)


def exact_range(network, ball, row):
    """Range of c . f on a two-pixel box: a piecewise linear function has its extremes on crossings of kinks and edges."""
    first = network[1]
    lines = [(*w.tolist(), b.item()) for w, b in zip(first.weight, first.bias, strict=True)]
    (x0, y0), (x1, y1) = ball.lower.flatten().tolist(), ball.upper.flatten().tolist()
    lines += [(1, 0, -x0), (1, 0, -x1), (0, 1, -y0), (0, 1, -y1)]
    points = []
    for i, (a, b, c) in enumerate(lines):
        for d, e, f in lines[:i]:
            if abs(a * e - b * d) > 1e-12:
                points.append([(b * f - c * e) / (a * e - b * d), (c * d - a * f) / (a * e - b * d)])
    points = torch.tensor(points, dtype=torch.float64)
    inside = ((points >= ball.lower.flatten() - 1e-12) & (points <= ball.upper.flatten() + 1e-12)).all(1)
    values = network(points[inside].reshape(-1, 1, 1, 2)) @ row
    return values.min().item(), values.max().item()


@pytest.mark.parametrize("method", METHODS)
def test_against_the_exact_range_of_small_networks(method):
    gaps = []
    for seed in range(4):
        network = two_pixel_net(seed)
        relaxed = LirpaNetwork(network, (1, 1, 2), method)
        for eps in (0.02, 0.3):
            ball = Ball(
                torch.full((1, 1, 1, 2), 0.45, dtype=torch.float64), torch.tensor([eps], dtype=torch.float64), "linf"
            )
            rows = torch.tensor([[[1.0, 0.0], [1.0, -1.0]]], dtype=torch.float64)
            lower, upper = relaxed.relax(ball).rows(rows)
            for j in range(2):
                low, high = exact_range(network, ball, rows[0, j])
                assert lower[0, j] <= low + 1e-12 and upper[0, j] >= high - 1e-12
                gaps.append(((upper[0, j] - lower[0, j]) / (high - low)).item())
    assert min(gaps) >= 1 - 1e-12
    if method != "ibp":
        assert sorted(gaps)[len(gaps) // 2] < 1.5  # a test that a bound of +-1e9 would not pass


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_linear_network_has_exact_bounds(norm, method):
    """K = 1 too: c . f(x) +- support, to what is left for rounding."""
    network = randomised(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), 0)
    ball, rows = ball_of(3, 0.2, norm), torch.tensor([1.0, -2.0]).double().reshape(1, 2, 1).expand(3, -1, -1)
    lower, upper = LirpaNetwork(network, SHAPE, method).relax(ball).rows(rows)
    with torch.no_grad():
        value = (rows @ network(ball.center).unsqueeze(-1)).squeeze(-1)
    if method == "ibp" and norm == "l2":
        assert (lower <= value).all() and (upper >= value).all()  # no hidden layer: only the box is used
        return
    slopes = rows @ network[1].weight
    assert torch.allclose(upper, value + support(slopes, ball), rtol=1e-11, atol=1e-11)
    assert torch.allclose(lower, value - support(-slopes, ball), rtol=1e-11, atol=1e-11)


def test_resnet18():
    """The whole network once, with a 2x2 map before its global pool."""
    shape = (1, 16, 16)
    network = randomised(build("resnet18", shape, CLASSES, [0.3], [0.4], width=1), 3)
    generator = torch.Generator().manual_seed(0)
    relaxed = LirpaNetwork(network, shape, "crown-ibp")
    for norm in ("linf", "l2"):
        x = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
        ball, rows = Ball(x, torch.full((2,), 1e-3, dtype=torch.float64), norm), rows_of(2, rows=1)
        lower, upper = relaxed.relax(ball).rows(rows, "crown")
        low, high = extremes(network, ball, rows, samples=10, steps=3)
        assert_contains(lower, upper, low, high)
        assert ((upper - lower) < 10 * (high - low)).all()


@pytest.mark.parametrize("layer", [nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 2, 2, stride=2), nn.Linear(16, 4)])
@pytest.mark.parametrize("first", [[normalize()], []], ids=["normalised", "plain"])
def test_the_first_layer_is_bounded_exactly_over_an_l2_ball(layer, first):
    """Padding and the pixel box included; a bound over the box around the ball would be several times as wide."""
    flat = [nn.Flatten()] if isinstance(layer, nn.Linear) else []
    network = nn.Sequential(*first, *flat, layer, nn.ReLU(), nn.Flatten())
    network.append(nn.Linear(network.float()(torch.zeros(1, *SHAPE)).shape[1], CLASSES))
    network = randomised(network, 1)
    affine = network[: len(first) + len(flat) + 1]
    ball = ball_of(2, 0.3, "l2")
    jacobian = torch.func.jacrev(lambda x: affine(x[None]).flatten())(ball.center[0]).flatten(1).detach()
    rows = jacobian.expand(2, -1, -1)
    with torch.no_grad():
        value = affine(ball.center).flatten(1)
    graph, above, below = capture(network, SHAPE), value + support(rows, ball), value - support(-rows, ball)
    for method in METHODS:
        ((lower, upper),) = LirpaNetwork(network, SHAPE, method, graph=graph).relax(ball).preactivations()
        assert torch.allclose(upper.flatten(1), above, rtol=1e-10, atol=1e-10), method
        assert torch.allclose(lower.flatten(1), below, rtol=1e-10, atol=1e-10), method


# --- bookkeeping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_relaxations_of_one_network_do_not_mix(norm, method):
    network = bounded("conv-small", method)
    balls = [ball_of(2, 0.05, norm, 0), ball_of(3, 0.2, norm, 1)]
    rows = [rows_of(2, 0), rows_of(3, 1)]
    fresh = [network.relax(ball).rows(c) for ball, c in zip(balls, rows, strict=True)]
    first, second = (network.relax(ball) for ball in balls)
    mixed = [None, None]
    first.rows(rows[0][:, :1])
    mixed[1] = second.rows(rows[1])
    mixed[0] = first.rows(rows[0])
    for got, want in zip(mixed, fresh, strict=True):
        assert all(torch.allclose(one, other, rtol=0, atol=1e-12) for one, other in zip(got, want, strict=True))
    parts = [torch.cat(pair, 1) for pair in zip(first.rows(rows[0][:, :2]), first.rows(rows[0][:, 2:]), strict=True)]
    assert all(torch.allclose(one, other, rtol=0, atol=1e-12) for one, other in zip(parts, fresh[0], strict=True))


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("name", ["conv-small", "mlp", "residual"])
def test_a_sample_does_not_depend_on_its_batch(name, method):
    for norm in ("linf", "l2"):
        ball = Ball(images(4), torch.tensor([0.0, 0.01, 0.2, 1.0], dtype=torch.float64), norm)
        rows = rows_of(4)
        network = bounded(name, method)
        whole = network.relax(ball).rows(rows)
        for i in (1, 3):
            single = network.relax(Ball(ball.center[i : i + 1], ball.eps[i : i + 1], norm)).rows(rows[i : i + 1])
            for one, other in zip(whole, single, strict=True):
                assert torch.allclose(one[i], other[0], rtol=1e-11, atol=1e-11)


def test_after_an_exception_the_bounds_are_right(monkeypatch):
    network = LirpaNetwork(NETWORKS["conv-small"], SHAPE, "crown")
    ball, rows = ball_of(2, 0.1, "linf"), rows_of(2)
    relaxation = network.relax(ball)
    want = relaxation.rows(rows)
    module = network._engine._module
    with pytest.raises(RuntimeError):
        relaxation.rows(torch.ones(2, 3, CLASSES + 5, dtype=torch.float64))
    assert network._engine._module is not module
    for again in (relaxation, network.relax(ball)):
        for one, other in zip(again.rows(rows), want, strict=True):
            assert torch.equal(one, other)


def test_the_given_network_is_left_alone():
    network = build("mlp", SHAPE, CLASSES, [0.3], [0.4], width=4).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    LirpaNetwork(network, SHAPE, "crown").relax(ball_of(1, 0.1, "l2")).rows(rows_of(1))
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(
        torch.equal(value, before[name]) and value.dtype == before[name].dtype
        for name, value in network.state_dict().items()
    )


def test_single_precision_balls_are_bounded_in_double():
    ball = Ball(images(2).float(), torch.full((2,), 0.1), "l2")
    lower, upper = bounded("mlp", "crown").relax(ball).rows(rows_of(2).float())
    double = Ball(ball.center.double(), ball.eps.double(), "l2")
    want = bounded("mlp", "crown").relax(double).rows(rows_of(2).float().double())
    assert lower.dtype == torch.float64
    assert torch.equal(lower, want[0]) and torch.equal(upper, want[1])


# --- degenerate networks and numbers --------------------------------------------------------------------------------


def degenerate_networks():
    plain = NETWORKS["mlp"]
    zero, dead, tiny, huge, flat = (
        randomised(build("mlp", SHAPE, CLASSES, [0.3], [0.4], width=6), 11) for _ in range(5)
    )
    with torch.no_grad():
        for parameter in zero.parameters():
            parameter.zero_()
        dead[2].bias.fill_(-1e3)
        for parameter in tiny.parameters():
            parameter.mul_(1e-8)
        huge[-1].weight.mul_(1e3)
        flat[2].weight.zero_()
        flat[2].bias.zero_()
    assert plain is not zero
    return {"zero": zero, "dead": dead, "tiny": tiny, "huge": huge, "flat": flat}


@functools.cache
def degenerate(name):
    network = degenerate_networks()[name]
    return network, capture(network, SHAPE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["zero", "dead", "tiny", "huge", "flat"])
def test_degenerate_networks(name, method):
    network, graph = degenerate(name)
    relaxed = LirpaNetwork(network, SHAPE, method, graph=graph)
    for norm in ("linf", "l2"):
        for eps in (0.1, 1.0):
            ball, rows = ball_of(2, eps, norm), rows_of(2, rows=1)
            lower, upper = relaxed.relax(ball).rows(rows)
            low, high = extremes(network, ball, rows, samples=10, steps=2)
            assert_contains(lower, upper, low, high)
            if name in ("zero", "dead", "flat"):
                assert torch.allclose(lower, low, rtol=0, atol=1e-8)
                assert torch.allclose(upper, high, rtol=0, atol=1e-8)
    if name == "huge":
        assert high.abs().max() > 88


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1)])
@pytest.mark.parametrize("method", METHODS)
def test_overflow_is_nan_and_stays_in_its_sample(method, activation):
    """0.3 itself answers a NaN constant term with 0, for the whole batch: a wrong bound for the healthy sample."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2), activation, nn.Linear(2, CLASSES)).double().eval()
    graph = capture(network, SHAPE)  # which would refuse the numbers that follow
    first, last = (node.operation for node in graph.nodes if isinstance(node.operation, Dense))
    with torch.no_grad():
        for one, other in ((network[1], network[3]), (first, last)):
            one.weight.fill_(1.1e307)
            one.bias.copy_(torch.tensor([-5.2e307, -5.3e307], dtype=torch.float64))
            other.weight.copy_(torch.tensor([[1e-308, -1e-308], [1e-308, 2e-308], [-1e-308, 0]], dtype=torch.float64))
        last.bias.copy_(network[3].bias)
    center = torch.full((2, *SHAPE), 0.3, dtype=torch.float64)
    ball = Ball(center, torch.tensor([1.0, 0.01], dtype=torch.float64), "linf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        relaxation = LirpaNetwork(network, SHAPE, method, graph=graph).relax(ball)
    lower, upper = relaxation.rows(rows_of(2))
    assert torch.isnan(lower[0]).all() and torch.isnan(upper[0]).all()
    assert any(not torch.isfinite(bound[0]).all() for pair in relaxation.preactivations() for bound in pair)
    healthy = Ball(center[1:], ball.eps[1:], "linf")
    rows = rows_of(2)[1:]
    assert_contains(lower[1:], upper[1:], *extremes(network, healthy, rows, samples=10, steps=2))
    assert torch.isfinite(lower[1]).all() and torch.isfinite(upper[1]).all()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Softplus(), "Softplus"),
        (nn.Softmax(1), "softmax cannot be bounded"),
        (nn.GELU(), "no bounds for|cannot convert"),
        (nn.ELU(), "Elu"),
    ],
)
@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_unsupported_layers_are_refused_by_name(layer, message, method):
    network = randomised(nn.Sequential(nn.Conv2d(1, 2, 3), layer, nn.Flatten(), nn.Linear(8, CLASSES)), 0)
    with pytest.raises((InputError, RunError), match=message):
        LirpaNetwork(network, SHAPE, method)


@pytest.mark.parametrize("slope", [1.5, -0.5])
def test_leaks_of_any_slope_are_made_of_relus(slope):
    layers = [nn.Conv2d(1, 2, 3), nn.LeakyReLU(slope), nn.Flatten(), nn.Linear(8, CLASSES)]
    network, ball = randomised(nn.Sequential(*layers), 0), ball_of(2, 0.05, "linf")
    rows = rows_of(len(ball.center))
    lower, upper = LirpaNetwork(network, SHAPE, "crown").relax(ball).rows(rows)
    assert_contains(lower, upper, *extremes(network, ball, rows, samples=20, steps=4))


class LogSumExp(nn.Module):
    def forward(self, x):
        return torch.logsumexp(x.flatten(1), 1, keepdim=True)


def test_a_logsumexp_inside_the_network_is_refused():
    with pytest.raises(InputError, match="logsumexp cannot be bounded"):
        LirpaNetwork(nn.Sequential(nn.Conv2d(1, 2, 3), LogSumExp()).eval(), SHAPE, "crown")


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(1, 2, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=2, dilation=2), nn.ReLU()],
        [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU()],
        [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2, 1), nn.Conv2d(2, 2, 2), nn.ReLU()],
        [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 1), nn.Conv2d(2, 2, 2), nn.ReLU()],
        [nn.Conv2d(1, 2, (1, 3), padding=(0, 1)), nn.ReLU(), nn.Conv2d(2, 2, 3, stride=(1, 2)), nn.ReLU()],
        [nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.5), nn.Dropout2d(0.5)],
    ],
    ids=["dilated", "grouped", "overlapping-average", "overlapping-max", "oblong", "batch-norm-dropout"],
)
def test_a_layer_is_bounded_right_or_refused(layers):
    """0.3 drops the dilation and the groups of a convolution in its patches, and the stride of an average pool."""
    network = nn.Sequential(*layers, nn.Flatten())
    with torch.no_grad():
        size = network.float().eval()(torch.zeros(1, *SHAPE)).shape[1]
    network = randomised(network.append(nn.Linear(size, CLASSES)), 1)
    try:
        relaxed = LirpaNetwork(network, SHAPE, "crown")
    except RunError:
        return
    for norm in ("linf", "l2"):
        ball, rows = ball_of(3, 0.1, norm), rows_of(3)
        assert_contains(*relaxed.relax(ball).rows(rows), *extremes(network, ball, rows, samples=20, steps=4))


def test_a_batch_norm_and_dropout_network_is_not_refused():
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(8, CLASSES)]
    LirpaNetwork(randomised(nn.Sequential(*layers), 0), SHAPE, "crown")


def test_a_conversion_that_changes_the_function_is_refused(monkeypatch):
    """The build compares with the model: forwards, and on a ball of radius 0 through the bounds."""
    rebuilt = auto_lirpa.Rebuilt

    def wrong(graph):
        copy = rebuilt(graph)
        with torch.no_grad():
            next(layer for layer in copy.layers if isinstance(layer, nn.Linear)).weight += 1e-3
        return copy

    monkeypatch.setattr(auto_lirpa, "Rebuilt", wrong)
    with pytest.raises(RunError, match="does not reproduce this network"):
        LirpaNetwork(NETWORKS["mlp"], SHAPE, "crown")


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_bounds_that_miss_the_model_are_refused(monkeypatch, method):
    bounds = auto_lirpa._Engine.bounds

    def shifted(self, ball, kind, known, rows=None, node=None):
        lower, upper = bounds(self, ball, kind, known, rows, node)
        return (lower + 1e-3, upper) if rows is not None and rows.shape[1] > 1 else (lower, upper)

    monkeypatch.setattr(auto_lirpa._Engine, "bounds", shifted)
    with pytest.raises(RunError, match="does not reproduce this network"):
        LirpaNetwork(NETWORKS["mlp"], SHAPE, method)


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_a_torch_on_which_the_engine_is_wrong_is_refused(monkeypatch, method):
    bounds = auto_lirpa._test_bounds

    def wrong(asked):
        lower, upper, samples = bounds(asked)
        return lower, upper - (1e-3 if asked == method else 0), samples

    auto_lirpa._self_test.cache_clear()
    try:
        monkeypatch.setattr(auto_lirpa, "_test_bounds", wrong)
        with pytest.raises(RunError, match=f"wrong {method} bounds on torch"):
            LirpaNetwork(NETWORKS["mlp"], SHAPE, "crown")
        monkeypatch.setattr(auto_lirpa, "_test_bounds", lambda method: 1 / 0)
        with pytest.raises(RunError, match="fails on torch"):
            LirpaNetwork(NETWORKS["mlp"], SHAPE, "crown")
    finally:
        auto_lirpa._self_test.cache_clear()


def test_bad_arguments():
    with pytest.raises(InputError, match="unknown method 'magic'; use one of ibp"):
        LirpaNetwork(NETWORKS["mlp"], SHAPE, "magic")
    with pytest.raises(InputError, match=r"is in train mode; call network\.eval\(\) first"):
        LirpaNetwork(build("mlp", SHAPE, CLASSES, [0.3], [0.4], width=4).train(), SHAPE, "crown")
    ball = Ball(torch.rand(2, 1, 5, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), "linf")
    with pytest.raises(InputError, match=r"expected images of shape \(1, 4, 4\), got \(1, 5, 5\)"):
        bounded("mlp", "crown").relax(ball)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8])
def test_a_wrong_conversion_is_seen_whatever_the_scale_of_the_logits(scale):
    """0.3 gets padded average pooling wrong; a check with an absolute tolerance lets it pass where logits are small."""
    torch.manual_seed(0)
    head = torch.nn.Linear(25, 2)
    with torch.no_grad():
        head.weight.mul_(scale)
        head.bias.mul_(scale)
    network = torch.nn.Sequential(torch.nn.AvgPool2d(2, 1, padding=1), torch.nn.Flatten(), head).double().eval()
    try:
        bound = LirpaNetwork(network, (1, 4, 4), "crown")
    except RunError:
        return  # refused
    ball = Ball(torch.rand(3, 1, 4, 4).double(), torch.zeros(3).double(), "linf")
    rows = torch.eye(2).double().expand(3, 2, 2)
    lower, upper = bound.relax(ball).rows(rows)
    expected = network(ball.center).detach()
    torch.testing.assert_close(lower, expected, rtol=1e-8, atol=1e-10 * scale)
    torch.testing.assert_close(upper, expected, rtol=1e-8, atol=1e-10 * scale)
