"""Norms to train on: whose slope they are, and that every way of differentiating them gives the same derivative."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch._functorch import config as functorch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from grood_cert.networks import architectures
from grood_cert.sections import ObjectiveSection
from grood_cert.training import penalty
from grood_cert.training.objective import objective
from grood_cert.training.penalty import BatchStatistics, SampleWise
from grood_cert.training.step import tf32
from tests.training.examples import with_batch_statistics

ALL_ACTIVE = ObjectiveSection(lambda_S=0.0, lambda_grad=1.0, m_in=100.0, m_out=-100.0)


def normed_network(activation: nn.Module, pool: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.BatchNorm2d(4), nn.BatchNorm2d(6, affine=False)
    layers = [nn.Conv2d(2, 4, 3, padding=1), first, activation, pool, nn.Conv2d(4, 6, 3), second, activation]
    network = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3)).double()
    network(torch.rand(2, 2, 8, 8, dtype=torch.float64))
    with torch.no_grad():
        first.weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.3]))
        first.bias.normal_()
    return network


def smooth() -> nn.Sequential:
    return normed_network(nn.Tanh(), nn.AvgPool2d(2))


def kinked() -> nn.Sequential:
    return normed_network(nn.LeakyReLU(0.2), nn.MaxPool2d(3, 2, 1))


def images_of(count: int = 10) -> torch.Tensor:
    return torch.rand(count, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def flat_gradient(loss: torch.Tensor, network: nn.Module) -> torch.Tensor:
    parts = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None]).double()


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(functional.cosine_similarity(first, second, dim=0))


def slope(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    image = image[None].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(-network(image).logsumexp(1).sum(), image)
    return gradient.norm()


@pytest.mark.parametrize("build", [smooth, kinked])
@pytest.mark.parametrize("used", [range(10), [7, 0, 3], [5]])
@pytest.mark.parametrize("method", ["exact", "fast"])
@pytest.mark.parametrize("frozen", [[], [1], [5]])
def test_shared_statistics_are_constants_of_each_sample_s_slope(build, used, method, frozen):
    """As if every sample went alone through the network with these statistics in its buffers: no sample leaks.

    A layer that its owner keeps in eval mode reads its own buffers.
    """
    network, images, used = build(), images_of(), torch.tensor(list(used))
    for number in frozen:
        network[number].eval()
    fixed = with_batch_statistics(network, images)
    norms = SampleWise(network, images, method).norms(used)
    expected = torch.stack([slope(fixed, image) for image in images[used]])
    torch.testing.assert_close(norms.detach(), expected, rtol=1e-9, atol=0)


def test_the_pass_under_shared_statistics_is_the_ordinary_one():
    network, images = kinked(), images_of()
    twin = copy.deepcopy(network)
    function, logits = SampleWise(network, images, "exact"), twin(images)
    torch.testing.assert_close(function.logits, logits, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        flat_gradient(function.logits.square().sum(), network),
        flat_gradient(logits.square().sum(), twin),
        rtol=1e-9,
        atol=1e-12,
    )
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], value, rtol=1e-12, atol=0)


def test_statistics_pass_their_own_gradient_on():
    """Mean and 1 / std are outputs too: gradcheck of all three, with respect to values, weight and bias."""
    mode = BatchStatistics()
    generator = torch.Generator().manual_seed(0)
    values, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((3, 2, 2, 2), (2,), (2,))
    )

    def all_outputs(values, weight, bias):
        with mode:
            result = functional.batch_norm(values, None, None, weight, bias, True)
        return (result, *mode._found.pop()[:2])

    assert torch.autograd.gradcheck(all_outputs, (values, weight, bias))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("penalty", ["exact", "fast"])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_total_has_the_derivative_of_its_value(frozen, penalty, share):
    """Finite differences over the parameters, through the batch statistics too; on the loss's pass and on its own."""
    network, images = smooth(), images_of()
    if frozen:
        network.eval()
    with torch.no_grad():
        scores = -with_batch_statistics(network, images)(images).logsumexp(1)
    threshold = 100.0 if share == 1 else float(scores[:5].sort().values[1:3].mean())
    weights = replace(ALL_ACTIVE, penalty=penalty, m_in=threshold, m_out=2 * threshold + 200)
    state, labels = copy.deepcopy(network.state_dict()), torch.tensor([0, 1, 2, 0, 1])

    def total() -> torch.Tensor:
        for key, value in state.items():  # the buffers, not the parameters
            if "running" in key:
                network.state_dict()[key].copy_(value)
        terms = objective(network, images[:5], labels, images[5:], weights)
        assert terms.gradient > 0
        return terms.total

    gradient = flat_gradient(total(), network)
    parameters = list(network.parameters())
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        directions = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in parameters]
        values = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += sign * 1e-5 * direction
            values.append(float(total().detach()))
        expected = (values[0] - values[1]) / 2e-5
        got = float(gradient @ torch.cat([direction.flatten() for direction in directions]))
        assert got == pytest.approx(expected, rel=1e-5)


def test_what_batch_norm_takes_out_again_does_not_lower_the_penalty():
    """Values shifted and scaled before BatchNorm: the loss is the same, and so must the penalty be."""
    network, images = smooth(), images_of()
    losses, penalties = [], []
    for scale in (1.0, 0.5):
        with torch.no_grad():
            for layer in network.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.weight.mul_(scale)
                    layer.bias.add_(1 - scale)
        terms = objective(network, images[:5], torch.tensor([0, 1, 2, 0, 1]), images[5:], ALL_ACTIVE)
        losses.append(float(terms.cross_entropy))
        penalties.append(float(terms.gradient))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert penalties[1] == pytest.approx(penalties[0], rel=1e-2)


@pytest.mark.parametrize(
    ("frozen", "active", "passes"),
    [(True, 6, [10]), (True, 1, [10, 1]), (False, 10, [10, 10]), (False, 3, [10, 3])],
)
def test_only_active_samples_take_a_second_pass_and_only_where_they_must_or_it_pays(frozen, active, passes):
    network, images = smooth().train(not frozen), images_of()
    seen = []
    network.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    SampleWise(network, images, "exact").norms(torch.arange(active))
    assert seen == passes
    assert all(layer.training is not frozen for layer in network.modules())
    assert network[1].num_batches_tracked == (1 if frozen else 2), "one for the lazy layer, one for this step"


def trained(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Some steps of energy training on digits: 0 to 5 are ID, 6 and 7 outliers. In float64, or machines would differ."""
    digits = load_digits()
    images = torch.tensor(digits.images).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    inside, outside = (labels < 6).nonzero().squeeze(1), ((labels == 6) | (labels == 7)).nonzero().squeeze(1)
    torch.manual_seed(0)
    network = architectures.build(name, (1, 8, 8), 6, [0.3], [0.37]).double()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(80):
        first, second = inside[torch.randperm(len(inside))[:48]], outside[torch.randperm(len(outside))[:48]]
        terms = objective(network, images[first], labels[first], images[second], ObjectiveSection(lambda_grad=0.0))
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    return network.float(), torch.cat([images[inside[:24]], images[outside[:24]]]).float()


@pytest.fixture(scope="module")
def conv_small():
    torch.set_num_threads(1)
    return trained("conv-small")


@pytest.fixture(scope="module")
def resnet_small():
    torch.set_num_threads(1)
    return trained("resnet-small")


def parameter_gradients(network, images, methods, autocast=False):
    """Of the mean norm."""
    found = []
    for method in methods:
        twin = copy.deepcopy(network)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            function = SampleWise(twin, images, method)
            found.append(flat_gradient(function.norms(torch.arange(0, len(images), 2)).mean(), twin))
    return found


@pytest.mark.parametrize("fixture", ["conv_small", "resnet_small"])
def test_fast_agrees_with_exact_on_a_trained_network_in_float32(fixture, request):
    network, images = request.getfixturevalue(fixture)
    exact, fast = parameter_gradients(network, images, ["exact", "fast"])
    assert cosine(exact, fast) > 0.999
    assert float(fast.norm() / exact.norm()) == pytest.approx(1, abs=0.03)


class RoundedProducts(TorchFunctionMode):
    """Factors and results of products rounded to bfloat16, and their gradients too; sums within a product are exact."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (torch.conv2d, functional.linear):
            return func(*args, **(kwargs or {}))
        first, second, *others = args
        return (
            func(first.bfloat16().to(first), second.bfloat16().to(second), *others, **(kwargs or {}))
            .bfloat16()
            .to(first)
        )


@pytest.mark.parametrize("fixture", ["conv_small", "resnet_small"])
def test_fast_works_in_bfloat16(fixture, request, monkeypatch):
    """In float64 with products rounded as bfloat16 rounds them, which every machine does alike."""
    network, images = (item.double() for item in copy.deepcopy(request.getfixturevalue(fixture)))
    (exact,) = parameter_gradients(network, images, ["exact"])
    found = []
    for difference in (penalty._DIFFERENCE[torch.bfloat16], penalty._DIFFERENCE[torch.float32]):
        monkeypatch.setitem(penalty._DIFFERENCE, torch.float64, difference)
        with RoundedProducts():
            found += parameter_gradients(network, images, ["fast"])
    assert cosine(exact, found[0]) > 0.97
    assert cosine(exact, found[1]) < 0.9, "so small a difference drowns in the rounding"


class _Factor(torch.autograd.Function):
    """Rounded to 10 bits of mantissa."""

    @staticmethod
    def forward(ctx, values):
        mantissa, exponent = torch.frexp(values)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _Product(torch.autograd.Function):
    """As it is; its gradient, a factor of the products that go back, is rounded."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return _Factor.forward(ctx, gradient)


class TF32Products(TorchFunctionMode):
    """Factors of products rounded to TF32, forwards and backwards; what is summed and what comes out is not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (torch.conv2d, functional.linear):
            return func(*args, **(kwargs or {}))
        first, second, *others = args
        return _Product.apply(func(_Factor.apply(first), _Factor.apply(second), *others, **(kwargs or {})))


def test_tf32_has_ten_bits():
    values = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11 + 2**-20, -3 - 2**-10, 0.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-10, -3.0, 0.0], dtype=torch.float64)
    assert torch.equal(_Factor.apply(values), expected)


@pytest.mark.parametrize("fixture", ["conv_small", "resnet_small"])
def test_fast_works_in_tf32_at_its_own_difference(fixture, request, monkeypatch):
    """At float32's the error is several times as large: the rounding of TF32 is divided by the difference."""
    network, images = (item.double() for item in copy.deepcopy(request.getfixturevalue(fixture)))
    (exact,) = parameter_gradients(network, images, ["exact"])
    errors = []
    for arithmetic in (penalty._TF32, torch.float32):
        monkeypatch.setitem(penalty._DIFFERENCE, torch.float64, penalty._DIFFERENCE[arithmetic])
        with TF32Products():
            (fast,) = parameter_gradients(network, images, ["fast"])
        errors.append(1 - cosine(exact, fast))
    assert errors[0] < 0.002 and errors[1] > 3 * errors[0]


def test_the_difference_is_that_of_the_arithmetic_in_force():
    on_gpu, wide = (
        SimpleNamespace(device=torch.device("cuda"), dtype=dtype) for dtype in (torch.float32, torch.float64)
    )
    for allowed, arithmetic in ((False, torch.float32), (True, penalty._TF32)):
        with tf32(allowed):
            assert penalty.score_difference(on_gpu) == penalty._DIFFERENCE[arithmetic]
            assert penalty.score_difference(wide) == penalty._DIFFERENCE[torch.float64]
            assert penalty.score_difference(torch.zeros(1)) == penalty._DIFFERENCE[torch.float32], "a CPU has no TF32"
    with torch.autocast("cpu", torch.bfloat16):
        assert penalty.score_difference(torch.zeros(1)) == penalty._DIFFERENCE[torch.bfloat16]


@pytest.mark.parametrize("fixture", ["conv_small", "resnet_small"])
def test_fast_is_as_exact_under_autocast_as_bfloat16_allows(fixture, request, monkeypatch):
    r"""However a processor does its bfloat16: the error is that of the difference, plus that of two rounded passes.

    A sample's term is ||grad S|| [g(x + h v) - g(x)] / d, with g = dS / d theta and d the difference of S aimed at.
    A rounding is off by 2^-8 at most, by u = 0.42 2^-8 in root mean square; R independent ones give a pass a relative
    error of u sqrt(R). A layer with weights rounds input, weight, output and two gradients, a BatchNorm output and
    gradient. Twice the error that is expected is allowed.
    """
    network, images = request.getfixturevalue(fixture)
    (exact,) = parameter_gradients(network, images, ["exact"])
    (fast,) = parameter_gradients(network, images, ["fast"], autocast=True)
    difference = penalty._DIFFERENCE[torch.bfloat16]
    monkeypatch.setitem(penalty._DIFFERENCE, torch.float32, difference)
    (unrounded,) = parameter_gradients(network, images, ["fast"])
    network, used = copy.deepcopy(network).eval(), images[::2]
    sizes = [slope(network, x) * flat_gradient(network(x[None]).logsumexp(1).sum(), network).norm() for x in used]
    roundings = sum(
        5 if isinstance(layer, nn.Conv2d | nn.Linear) else 2 * isinstance(layer, nn.BatchNorm2d)
        for layer in network.modules()
    )
    rounding = 0.42 * 2**-8 * (2 * roundings) ** 0.5 * torch.stack(sizes).norm() / len(used) / difference
    assert (fast - exact).norm() <= (unrounded - exact).norm() + 2 * rounding


def test_without_kept_signs_a_difference_quotient_is_no_derivative(conv_small):
    """Why the kinks are kept: the plain quotient jumps where a ReLU changes sign, by about 1 / h each."""
    network, images = conv_small
    (exact,) = parameter_gradients(network, images, ["exact"])
    used = images[::2]
    norms = SampleWise(network, used, "exact").norms(torch.arange(len(used))).detach()
    points = used.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(-network(points).logsumexp(1).sum(), points)
    moved = used + 1e-2 * gradient / norms.square().reshape(-1, 1, 1, 1)
    quotient = (network(used).logsumexp(1) - network(moved).logsumexp(1)) / (1e-2 / norms)
    assert cosine(exact, flat_gradient(quotient.mean(), network)) < 0.9


def test_fast_needs_no_second_order_graph(conv_small):
    """torch.compile refuses to differentiate twice; the fast penalty does not ask it to."""
    network, images = conv_small
    compiled = torch.compile(copy.deepcopy(network), backend="aot_eager")
    labels = torch.zeros(24, dtype=torch.long)
    weights = replace(ALL_ACTIVE, penalty="fast")
    with warnings.catch_warnings(), functorch.patch(donated_buffer=False):  # as a step of a run does
        warnings.simplefilter("ignore")  # of the compiler, about itself
        terms = objective(compiled, images[:24], labels, images[24:], weights)
        gradient = flat_gradient(terms.total, compiled)
        with pytest.raises(RuntimeError, match="double backward"):
            objective(compiled, images[:24], labels, images[24:], replace(weights, penalty="exact")).total.backward()
    plain = objective(network, images[:24], labels, images[24:], weights)
    torch.testing.assert_close(terms.total, plain.total, rtol=1e-5, atol=0)
    assert cosine(gradient, flat_gradient(plain.total, network)) > 0.9999


def test_the_stochastic_penalty_is_unbiased():
    """Mean of many draws, value and derivative, against the whole; z-scores below 5 (one in 10^6 beyond)."""
    network, images = smooth().eval(), images_of()
    labels = torch.tensor([0, 1, 2, 0, 1])
    generator = torch.Generator().manual_seed(0)

    def terms(weights: ObjectiveSection) -> torch.Tensor:
        result = objective(network, images[:5], labels, images[5:], weights, generator=generator)
        return torch.cat([result.gradient[None], flat_gradient(result.total - result.cross_entropy, network)])

    whole = terms(ALL_ACTIVE)
    draws = torch.stack([terms(replace(ALL_ACTIVE, penalty="stochastic")) for _ in range(400)])
    error = draws.std(0) / 400**0.5
    assert error[0] > 0, "draws must differ"
    assert bool(((draws.mean(0) - whole).abs() <= 5 * error + 1e-12).all())


def test_a_share_of_one_is_everything():
    network, images = smooth().eval(), images_of()
    labels = torch.tensor([0, 1, 2, 0, 1])
    whole = objective(network, images[:5], labels, images[5:], ALL_ACTIVE)
    again = objective(
        network, images[:5], labels, images[5:], replace(ALL_ACTIVE, penalty="stochastic", penalty_share=1.0)
    )
    assert torch.equal(whole.total, again.total)


@pytest.mark.parametrize("penalty", ["exact", "fast", "stochastic"])
def test_a_flat_network_has_finite_gradients(penalty):
    network, images = smooth(), images_of()
    with torch.no_grad():
        network[-1].weight.zero_()
    weights = replace(ALL_ACTIVE, penalty=penalty)
    terms = objective(network, images[:5], torch.tensor([0, 1, 2, 0, 1]), images[5:], weights)
    assert terms.gradient == 0
    assert flat_gradient(terms.total, network).isfinite().all()
