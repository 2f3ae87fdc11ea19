"""Bounds against exact constants: autograd at eps = 0, enumeration of activation patterns, closed forms, LPs."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from grood_cert.ball import Ball, dual_norm
from grood_cert.bounds.hidden import preactivations
from grood_cert.bounds.simplex import SoftmaxWeights, difference_rows, softmax_weights
from grood_cert.lipschitz.bound import local_lipschitz
from grood_cert.lipschitz.jacobian_crown import chords, jacobian_crown
from grood_cert.lipschitz.product import operator_norm, product_bound, torus_norm, unrolled
from grood_cert.networks.architectures import build
from grood_cert.networks.capture import capture
from grood_cert.scores import score_gradient

NORMS = ("linf", "l2", "l1")
EXACT_AT_ZERO = ("interval", "jacobian-crown", "jacobian-crown-corners")
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.GELU)


def ball_of(images, eps, norm):
    eps = torch.full((len(images),), eps, dtype=torch.float64)
    return Ball(images, eps, norm)


def network_of(activation, seed):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3, 1, 1), activation(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2), activation()]
    layers += [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6, 8), activation(), nn.Linear(8, 5)]
    return nn.Sequential(*layers).double().eval().requires_grad_(False)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_at_eps_zero_the_bounds_equal_autograd(activation, norm):
    network = network_of(activation, 3)
    images = torch.rand(8, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bounds = local_lipschitz(capture(network, (1, 6, 6)), ball_of(images, 0.0, norm), fixed_head=True)
    exact = dual_norm(score_gradient(network, images)[1], norm)
    for name in EXACT_AT_ZERO:
        torch.testing.assert_close(bounds.methods[name], exact, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(bounds.fixed_head, exact, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("name", ["mlp", "conv-small", "resnet18"])
def test_at_eps_zero_the_packages_networks_are_exact(name):
    torch.manual_seed(0)
    options = {"width": 2} if name == "resnet18" else {}
    network = build(name, (1, 8, 8), 6, [0.3], [0.4], **options).double().eval().requires_grad_(False)
    images = torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bounds = local_lipschitz(capture(network, (1, 8, 8)), ball_of(images, 0.0, "linf"), methods=["jacobian-crown"])
    exact = dual_norm(score_gradient(network, images)[1], "linf")
    torch.testing.assert_close(bounds.auto, exact, rtol=1e-9, atol=0.0)


class _Regions:
    """All linear regions of a fully connected ReLU network that meet a ball with non-empty interior (LPs)."""

    def __init__(self, layers, ball, norm):
        self.layers, self.found = layers, []
        center, eps = ball.center.flatten().numpy(), float(ball.eps)
        self.size = len(center)
        # variables: x, and for l1 also y >= |x - center|; the last one is the slack t
        low, high = ball.lower.flatten().numpy(), ball.upper.flatten().numpy()
        self.extra = self.size if norm == "l1" else 0
        self.box = list(zip(low, high, strict=True)) + [(0, None)] * self.extra
        self.rows, self.limits = [], []
        if norm == "l1":
            identity = np.eye(self.size)
            self.rows = [*np.hstack([identity, -identity]), *np.hstack([-identity, -identity])]
            self.rows.append(np.hstack([np.zeros(self.size), np.ones(self.size)]))
            self.limits = [*center, *(-center), eps]
        self._descend(np.eye(self.size), np.zeros(self.size), 0, [], [])

    def solve(self, rows, limits, objective):
        """Minimise objective . x over the region."""
        pad = [np.hstack([row, np.zeros(self.extra)]) for row in rows]
        a = np.array(self.rows + pad) if self.rows or pad else None
        b = np.array(self.limits + limits) if self.rows or pad else None
        return linprog(np.hstack([objective, np.zeros(self.extra)]), A_ub=a, b_ub=b, bounds=self.box)

    def interior(self, rows, limits):
        """Whether the region has a point at a distance from all its walls."""
        pad = [np.hstack([row, np.zeros(self.extra), [np.linalg.norm(row)]]) for row in rows]
        own = [np.hstack([row, [0.0]]) for row in self.rows]
        a = np.array(own + pad)
        cost = np.zeros(self.size + self.extra + 1)
        cost[-1] = -1
        result = linprog(cost, A_ub=a, b_ub=np.array(self.limits + limits), bounds=[*self.box, (0, 1)])
        return result.status == 0 and -result.fun > 1e-7

    def _descend(self, matrix, offset, depth, rows, limits):
        weight, bias = self.layers[depth]
        z, constant = weight @ matrix, weight @ offset + bias
        if depth == len(self.layers) - 1:
            self.found.append((z, constant, rows, limits))
            return

        def choose(signs, rows, limits):
            """Unit after unit, so that a half without a point is left with all that lies in it."""
            if (unit := len(signs)) == len(z):
                on = np.array(signs)
                self._descend(on[:, None] * z, on * constant, depth + 1, rows, limits)
                return
            for sign in (0.0, 1.0):
                side = 2 * sign - 1
                half = [*rows, -side * z[unit]], [*limits, side * constant[unit]]
                if self.interior(*half):
                    choose([*signs, sign], *half)

        choose([], rows, limits)

    def constant(self, order):
        """sup ||J^T softmax f||: for two logits p_1 = sigmoid(z_1 - z_2) is an interval, and the norm is convex."""
        best = 0.0
        for jacobian, offset, rows, limits in self.found:
            heads = [np.ones(1)]
            if len(jacobian) == 2:
                difference, shift = jacobian[0] - jacobian[1], offset[0] - offset[1]
                ends = [self.solve(rows, limits, difference).fun, -self.solve(rows, limits, -difference).fun]
                shares = [1 / (1 + np.exp(-(end + shift))) for end in ends]
                heads = [np.array([share, 1 - share]) for share in shares]
            best = max(best, *(np.linalg.norm(head @ jacobian, ord=order) for head in heads))
        return best


@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize("widths", [(1, 6, 2), (2, 7, 1), (2, 5, 4, 2), (3, 4, 3, 2), (2, 3, 3, 3, 2)])
def test_bounds_lie_above_the_exact_constant(widths, norm, record_property):
    order = {"linf": 1, "l1": np.inf}[norm]
    ratios = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(100 * sum(widths) + seed)
        modules = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(widths):
            modules += [nn.Linear(inputs, outputs), nn.ReLU()]
        network = nn.Sequential(*modules[:-1]).double().eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        layers = [(m.weight.numpy(), m.bias.numpy()) for m in network if isinstance(m, nn.Linear)]
        images = torch.rand(1, 1, 1, widths[0], generator=generator, dtype=torch.float64)
        graph = capture(network, (1, 1, widths[0]))
        for eps in (0.02, 0.1, 0.5):
            ball = ball_of(images, eps, norm)
            exact = _Regions(layers, ball, norm).constant(order)
            bounds = local_lipschitz(graph, ball)
            for name, bound in bounds.methods.items():
                assert float(bound) >= exact * (1 - 1e-9), (seed, eps, name)
            ratios.append(float(bounds.auto) / exact if exact > 0 else 1.0)
            if exact == 0:
                assert float(bounds.auto) < 1e-9
    record_property("median ratio to the exact constant", float(np.median(ratios)))
    print(f"{norm} {widths}: bound / exact {np.round(ratios, 3)}")
    assert np.median(ratios) < 1.5  # tight enough to notice a bound that lost its relaxation


def test_absolute_value_by_hand():
    # f(x) = relu(x - 1/2) + relu(1/2 - x) = |x - 1/2| and one logit: S = -f, slope 1 everywhere
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double().eval()
    with torch.no_grad():
        network[1].weight[:, 0] = torch.tensor([1.0, -1.0])
        network[1].bias[:] = torch.tensor([-0.5, 0.5])
        network[3].weight[:] = 1.0
        network[3].bias[:] = 7.0
    images = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    bounds = local_lipschitz(capture(network, (1, 1, 1)), ball_of(images, 0.25, "linf"))
    assert bounds.methods["product"] == pytest.approx(2.0)  # 1 x |1| + |1|
    assert bounds.methods["interval"] == pytest.approx(1.0)  # [-1, 0] + [0, 1]
    assert bounds.methods["jacobian-crown"] == pytest.approx(1.0)


def test_branches_that_are_added_add_their_slopes():
    # f(x) = relu(x) + x, one logit: slope 2
    class Both(nn.Module):
        def forward(self, images):
            return torch.relu(images) + images

    network = nn.Sequential(Both(), nn.Flatten(), nn.Linear(1, 1)).double().eval().requires_grad_(False)
    network[2].weight[:] = 1.0
    images = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    for eps in (0.1, 0.5):  # the second ball touches the kink
        for bound in local_lipschitz(capture(network, (1, 1, 1)), ball_of(images, eps, "linf")).methods.values():
            assert float(bound) == pytest.approx(2.0, rel=1e-9)


def test_a_pixel_in_four_windows_counts_four_times():
    # the middle pixel wins all four windows; f is their sum, so its slope is 4 e_middle
    network = nn.Sequential(nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(4, 1)).double().eval().requires_grad_(False)
    network[2].weight[:] = 1.0
    images = torch.full((1, 1, 3, 3), 0.2, dtype=torch.float64)
    images[0, 0, 1, 1] = 0.8
    for norm in NORMS:
        bounds = local_lipschitz(capture(network, (1, 3, 3)), ball_of(images, 0.1, norm))
        for name, bound in bounds.methods.items():
            assert float(bound) >= 4.0, (norm, name)
        assert float(bounds.methods["jacobian-crown"]) == pytest.approx(4.0, rel=1e-9)


def test_linear_network_with_one_logit_has_its_dual_norm():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 1)).double().eval().requires_grad_(False)
    network[1].weight[0] = torch.tensor([3.0, -4.0, 12.0])
    graph = capture(network, (1, 1, 3))
    images = torch.full((2, 1, 1, 3), 0.5, dtype=torch.float64)
    for norm, exact in (("linf", 19.0), ("l2", 13.0), ("l1", 12.0)):
        for bound in local_lipschitz(graph, ball_of(images, 0.3, norm)).methods.values():
            assert bound.tolist() == pytest.approx([exact, exact], rel=1e-11)


def test_unit_on_the_kink_everywhere_counts():
    # z = 0 identically: autograd says slope 0, but the neighbouring functions have slope 1; the mask must be [0, 1]
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double().eval()
    with torch.no_grad():
        network[1].weight[:], network[1].bias[:] = 1.0, -0.5
        network[3].weight[:] = 3.0
    images = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    graph = capture(network, (1, 1, 1))
    known = preactivations(graph, ball_of(images, 0.0, "linf"))
    assert known.slopes[0][0].item() == 0.0
    assert known.slopes[0][1].item() == 1.0
    for bound in local_lipschitz(graph, ball_of(images, 0.0, "linf")).methods.values():
        assert float(bound) == pytest.approx(3.0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slope_and_value_ranges_hold_every_sampled_point(activation):
    graph = capture(nn.Sequential(nn.Flatten(), activation(), nn.Linear(1, 1)).double().eval(), (1, 1, 1))
    function = graph.nodes[2].operation
    generator = torch.Generator().manual_seed(0)
    lower = 8 * torch.randn(400, 1, generator=generator, dtype=torch.float64)
    width = (
        torch.rand(400, 1, generator=generator, dtype=torch.float64) * torch.logspace(-9, 1.3, 400).double()[:, None]
    )
    lower[:20], width[:20] = torch.where(torch.arange(20)[:, None] % 2 == 0, 0.0, -width[:20]), width[:20]
    upper = lower + width
    points = lower + width * torch.linspace(0, 1, 101, dtype=torch.float64)
    points.requires_grad_(True)
    values = function(points)
    (slopes,) = torch.autograd.grad(values.sum(), points)
    values, points = values.detach(), points.detach()
    low, high = function.slopes(lower, upper)
    assert bool(((slopes >= low - 1e-15) & (slopes <= high + 1e-15)).all())
    assert bool(((high - low) - (slopes.amax(1) - slopes.amin(1))[:, None] <= 0.02 + 3 * width * 0.01 * 2).sum() > 300)
    low, high = function.values(lower, upper)
    assert bool(((values >= low - 1e-15) & (values <= high + 1e-15)).all())
    below, below_constant, above, above_constant = function.lines(lower, upper)
    slack = 1e-13 * (1 + points.abs())
    assert bool((below * points + below_constant <= values + slack).all())
    assert bool((above * points + above_constant >= values - slack).all())
    assert float(slopes.max()) <= function.steepest
    assert float(slopes.min()) >= function.lowest_slope


def test_gelu_reaches_the_stated_extremes_of_its_derivative():
    from grood_cert.networks.activations import GELU

    turns = torch.tensor([-(2**0.5), 2**0.5], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(GELU()(turns).sum(), turns)
    assert GELU.lowest_slope <= slopes[0].item() <= GELU.lowest_slope + 1e-9
    assert GELU.steepest - 1e-9 <= slopes[1].item() <= GELU.steepest


def test_knapsack_equals_the_linear_programme():
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        classes = 1 + trial % 7
        center = torch.softmax(3 * torch.randn(1, classes, generator=generator, dtype=torch.float64), 1)
        lower = center * torch.rand(1, classes, generator=generator, dtype=torch.float64)
        upper = (center + (1 - center) * torch.rand(1, classes, generator=generator, dtype=torch.float64)).clamp(max=1)
        rows = torch.randn(1, 3, classes, generator=generator, dtype=torch.float64)
        if trial % 3 == 0:
            rows[..., 0] = rows[..., -1]  # ties
        found = SoftmaxWeights(lower, upper).maximum(rows)[0]
        for row, value in zip(rows[0], found, strict=True):
            limits = list(zip(lower[0].tolist(), upper[0].tolist(), strict=True))
            exact = linprog(-row.numpy(), A_eq=np.ones((1, classes)), b_eq=[1.0], bounds=limits)
            assert exact.status == 0
            assert float(value) == pytest.approx(-exact.fun, rel=1e-9, abs=1e-12)


def test_softmax_box_holds_sampled_weights_and_is_attained():
    generator = torch.Generator().manual_seed(0)
    lower = 3 * torch.randn(50, 4, generator=generator, dtype=torch.float64)
    upper = lower + 2 * torch.rand(50, 4, generator=generator, dtype=torch.float64)
    box = softmax_weights(lower, upper)
    for _ in range(200):
        share = torch.rand(50, 4, generator=generator, dtype=torch.float64).round(decimals=1)
        weights = torch.softmax(lower + share * (upper - lower), 1)
        assert bool(((weights >= box.lower) & (weights <= box.upper)).all())
    corner = upper.clone()
    corner[:, 2] = lower[:, 2]
    torch.testing.assert_close(torch.softmax(corner, 1)[:, 2], box.lower[:, 2], rtol=1e-11, atol=0.0)
    assert bool((box.lower.sum(1) <= 1).all() and (box.upper.sum(1) >= 1).all())


def test_softmax_box_at_extreme_logits_is_neither_nan_nor_too_small():
    lower = torch.tensor([[1e6, -1e6, 0.0], [800.0, -800.0, 0.0]], dtype=torch.float64)
    box = softmax_weights(lower, lower)
    assert bool(torch.isfinite(box.lower).all() and torch.isfinite(box.upper).all())
    assert bool((box.upper.sum(1) >= 1).all())


def test_differences_tighten_the_softmax_box():
    # both logits move together by 1: p does not move at all
    lower, upper = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    box = softmax_weights(lower, upper, (zero, zero))
    assert difference_rows(2).tolist() == [[1.0, -1.0]]
    torch.testing.assert_close(box.lower, torch.full((1, 2), 0.5).double(), rtol=1e-11, atol=0.0)
    torch.testing.assert_close(box.upper, torch.full((1, 2), 0.5).double(), rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("width", [0.0, 1e-300, 1e-15, 1e-3, 5.0])
def test_chords_enclose_the_product_even_on_degenerate_intervals(width):
    generator = torch.Generator().manual_seed(0)
    lower = torch.randn(300, generator=generator, dtype=torch.float64) * torch.logspace(-12, 3, 300).double()
    lower[:3] = torch.tensor([0.0, -width, -width / 2])
    upper = lower + width
    ends = torch.randn(2, 300, generator=generator, dtype=torch.float64)
    slopes = ends.amin(0), ends.amax(0)
    below, below_constant, above, above_constant = chords(slopes, lower, upper)
    for share in (0.0, 0.25, 1.0):
        for m in slopes:
            g = lower + share * (upper - lower)
            slack = 4e-16 * (g.abs() + width) * torch.maximum(slopes[0].abs(), slopes[1].abs())
            assert bool((m * g <= above * g + above_constant + slack).all())
            assert bool((m * g >= below * g + below_constant - slack).all())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3, 1, 1),
        nn.Conv2d(2, 4, 3, 2, 1, groups=2),
        nn.Conv2d(2, 3, (3, 2), (2, 1), (2, 0)),
        nn.Conv2d(2, 3, 2, 1, 1, dilation=2),
        nn.AvgPool2d(2, 1, 1),
        nn.AvgPool2d(3, 2),
        nn.BatchNorm2d(2),
    ],
)
def test_operator_norms_transpose_and_absolute_value_against_the_dense_matrix(layer):
    torch.manual_seed(0)
    layer = layer.double().eval().requires_grad_(False)
    shape = (2, 6, 5)
    images = torch.rand(1, *shape, dtype=torch.float64)
    features = layer(images).numel()
    graph = capture(nn.Sequential(layer, nn.Flatten(), nn.Linear(features, 1)).double().eval(), shape)
    operation = graph.nodes[1].operation
    basis = torch.eye(60, dtype=torch.float64).reshape(60, *shape)
    matrix = (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).T
    torch.testing.assert_close(unrolled(operation, shape), matrix)
    values = torch.randn(4, *graph.nodes[1].shape, dtype=torch.float64)
    torch.testing.assert_close(operation.transpose(values).flatten(1), values.flatten(1) @ matrix)
    torch.testing.assert_close(unrolled(operation.absolute(), shape), matrix.abs())
    for norm, order in (("linf", float("inf")), ("l2", 2), ("l1", 1)):
        exact = float(torch.linalg.matrix_norm(matrix, ord=order))
        assert exact <= operator_norm(operation, shape, norm) <= exact * (1 + 1e-9)
    if isinstance(layer, nn.Conv2d):
        exact = float(torch.linalg.matrix_norm(matrix, ord=2))
        assert exact <= torus_norm(operation)
        if layer.stride == (1, 1):
            assert torus_norm(operation) <= 1.3 * exact


def test_product_of_large_layers_does_not_unroll_and_stays_above(monkeypatch):
    network = network_of(nn.ReLU, 0)
    graph = capture(network, (1, 6, 6))
    small = {norm: product_bound(graph, norm) for norm in NORMS}
    monkeypatch.setattr("grood_cert.lipschitz.product._UNROLLED_ENTRIES", 0)
    for norm in NORMS:
        assert small[norm] <= product_bound(graph, norm) * (1 + 1e-9)


def test_fixed_head_bounds_the_climb_of_the_score():
    # S(x') <= S(x) + L_p0 ||x' - x||: the ID side
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).double().eval()
    network.requires_grad_(False)
    graph = capture(network, (1, 2, 2))
    images = torch.rand(30, 1, 2, 2, dtype=torch.float64)
    ball = ball_of(images, 0.3, "linf")
    head = local_lipschitz(graph, ball, fixed_head=True).fixed_head
    score = -torch.logsumexp(network(images), 1)
    for _ in range(300):
        offset = 0.3 * (2 * torch.rand_like(images) - 1)
        points = (images + (offset.sign() * 0.3 if _ % 2 else offset)).clamp(0, 1)
        climb = -torch.logsumexp(network(points), 1) - score
        assert bool((climb <= head * ball.distance(points) + 1e-12).all())


def test_corners_equal_the_fixed_head_when_the_weights_are_known():
    network = network_of(nn.ReLU, 1)
    graph = capture(network, (1, 6, 6))
    images = torch.rand(3, 1, 6, 6, dtype=torch.float64)
    known = preactivations(graph, ball_of(images, 0.05, "linf"))
    point = torch.softmax(graph(images), 1)
    fixed = jacobian_crown(graph, known, "linf", SoftmaxWeights.fixed(point))
    wide = jacobian_crown(graph, known, "linf")
    assert bool((fixed <= wide * (1 + 1e-9)).all())


@pytest.mark.parametrize(("stride", "padding", "size"), [(2, 0, 4), (1, 0, 9), (2, 1, 9)])
def test_every_sampled_winner_of_a_pool_is_a_candidate(stride, padding, size):
    pool = capture(nn.Sequential(nn.MaxPool2d(2, stride, padding), nn.Flatten(), nn.Linear(size, 1)).eval(), (1, 4, 4))
    pool = pool.nodes[1].operation
    generator = torch.Generator().manual_seed(0)
    lower = torch.rand(40, 1, 4, 4, generator=generator, dtype=torch.float64)
    upper = lower + torch.rand(40, 1, 4, 4, generator=generator, dtype=torch.float64) ** 2
    alone, possible = pool.routing(lower, upper)
    won = torch.zeros_like(possible)
    for turn in range(800):
        share = torch.rand(lower.shape, generator=generator, dtype=torch.float64)
        points = lower + (share.round() if turn % 2 else share) * (upper - lower)
        winner = pool.windows(points, -torch.inf).argmax(2, keepdim=True)
        won.scatter_(2, winner, 1.0)
    assert bool((won <= possible).all())
    assert bool((won.sum(2, keepdim=True) * alone == alone).all())  # alone: nobody else ever wins
    assert float(won.sum() / possible.sum()) > 0.85  # and hardly anybody is a candidate in vain
