"""Any way to write a network becomes the same function as a graph, or is refused by name."""

import subprocess
import sys
import warnings

import pytest
import torch
import torchvision.transforms.v2
from torch import nn
from torch.nn import functional

from grood_cert.errors import InputError, RunError
from grood_cert.networks.aten import ATEN
from grood_cert.networks.capture import capture, live_graph

SHAPE = (1, 4, 4)


class Function(nn.Module):
    """A function behind a convolution, and a linear head in front of the logits."""

    def __init__(self, function, channels=1, outputs=16):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.function, self.last = nn.Conv2d(1, channels, 3, padding=1), function, nn.Linear(outputs, 2)
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, images):
        return self.last(self.function(self.first(images), self).flatten(1))


def net(function, channels=1, outputs=16):
    return Function(function, channels, outputs).double().eval()


def images(count=7):
    return torch.rand(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def same(network, shape=SHAPE):
    graph = capture(network, shape)
    x = torch.rand(6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(graph(x), network.double()(x), rtol=1e-9, atol=1e-9)
    return graph


FUNCTIONS = {
    "arithmetic": lambda x, m: (2 * x - 1) / 0.5 + (1 - x) - -x * torch.tensor([3.0]),
    "broadcast constant": lambda x, m: x * m.matrix + m.matrix[0],
    "subtraction": lambda x, m: x.relu() - x.tanh(),
    "alpha": lambda x, m: torch.add(x, x.relu(), alpha=-3) + torch.sub(x, x.relu(), alpha=2),
    "concatenation": lambda x, m: torch.cat([x[:, :, :2], x.relu()[:, :, 2:]], 2),
    "chunks": lambda x, m: torch.cat(torch.chunk(x, 2, dim=-1)[::-1], -1),
    "stack": lambda x, m: torch.stack([x, x.relu()], 1).sum(1),
    "strided slice": lambda x, m: functional.interpolate(x[..., ::2, ::2], scale_factor=2),
    "flip and roll": lambda x, m: x.flip(-1).roll(1, 2) + x,
    "mean": lambda x, m: x - x.mean((2, 3), keepdim=True),
    "sum over one axis": lambda x, m: x + x.sum(3, keepdim=True) + x.mean(dim=1, keepdim=True),
    "maximum over axes": lambda x, m: x + x.amax((2, 3), keepdim=True) + x.max(dim=2, keepdim=True)[0],
    "matrix": lambda x, m: x @ m.matrix + torch.matmul(x, m.matrix),
    "matrix from the left": lambda x, m: m.matrix @ x + torch.matmul(m.matrix, x[:, 0]).unsqueeze(1),
    "linear on rows": lambda x, m: functional.linear(x, m.matrix),
    "transpose": lambda x, m: x.transpose(2, 3) + x.permute(0, 1, 3, 2),
    "views": lambda x, m: x.view(x.size(0), -1).reshape(-1, 2, 8).unsqueeze(1).squeeze(1).view(x.shape[0], 1, 4, 4),
    "select": lambda x, m: x[:, 0].unsqueeze(1) + x[:, :, 1:2].expand(-1, -1, 4, -1),
    "pad": lambda x, m: functional.pad(x, (1, 0, 0, 2), value=0.5)[:, :, 2:, 1:],
    "reflect": lambda x, m: functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1),
    "circular": lambda x, m: functional.pad(x, (1, 0, 1, 0), mode="circular")[..., :4, :4],
    "replicate": lambda x, m: functional.pad(x, (0, 1, 1, 0), mode="replicate")[..., :4, 1:],
    "clamp": lambda x, m: (
        x.clamp(-0.1, 0.2) + functional.relu6(10 * x) + x.clamp(min=0.1) + x.clamp(max=-0.1) + x.clip(-0.2, 0.1)
    ),
    "hard": lambda x, m: functional.hardtanh(x) + functional.hardsigmoid(8 * x) + functional.hardswish(6 * x),
    "leaks": lambda x, m: (
        functional.leaky_relu(x, 0.2) + functional.leaky_relu(x, 1.5) + functional.leaky_relu(x, -1.0)
    ),
    "absolute": lambda x, m: x.abs() + torch.maximum(x, -x) + torch.minimum(x, 2 * x),
    "smooth": lambda x, m: (
        functional.silu(x) + functional.gelu(x) + functional.gelu(x, approximate="tanh") + x.sigmoid()
    ),
    "exponential": lambda x, m: (
        functional.elu(x, 0.5) + functional.selu(x) + functional.celu(x, 2.0) + functional.softplus(x)
    ),
    "log sigmoid": lambda x, m: functional.logsigmoid(x) + functional.threshold(x, 0.0, 0.0),
    "in place": lambda x, m: functional.relu_(x) + x,
    "in place on a copy": lambda x, m: x.clone().add_(1).mul_(2) + x,
    "pixels": lambda x, m: functional.pixel_shuffle(functional.pixel_unshuffle(x, 2), 2) + x.repeat(1, 2, 1, 1)[:, 1:],
    "adaptive": lambda x, m: functional.interpolate(
        functional.adaptive_avg_pool2d(x, (3, 2)), size=(4, 4), mode="bilinear"
    ),
    "corners": lambda x, m: (
        functional.interpolate(x, size=(4, 4), mode="bilinear", align_corners=True)
        + functional.interpolate(
            functional.interpolate(x, scale_factor=2.0, mode="bicubic"), size=4, mode="nearest-exact"
        )
    ),
    "pool": lambda x, m: (
        functional.interpolate(functional.avg_pool2d(x, 3, 2, 1, True, False), size=4)
        + functional.interpolate(functional.max_pool2d(x, 2, 2, 1, 2), size=4)
        + functional.interpolate(functional.max_pool2d(x, 3, 2, 0, ceil_mode=True), size=4)
        + functional.interpolate(functional.avg_pool2d(x, 2, divisor_override=3), size=4)
    ),
    "numbers in float32": lambda x, m: (
        x / torch.full((4, 4), 0.7, dtype=torch.float32)
        + torch.add(x, torch.full((4, 4), 0.1, dtype=torch.float32), alpha=0.3)
    ),
    "no limits": lambda x, m: x.clamp(-torch.inf, 0.1) + x.clamp(min=-torch.inf) + x.clamp(max=torch.inf),
    "one number an image": lambda x, m: x - 2 * x.relu().mean((1, 2, 3))[:, None, None, None],
    "no entries": lambda x, m: torch.cat([x[:, :0], x], 1),
    "constants in place": lambda x, m: x * torch.full((4, 4), 2.0).mul_(3).add_(torch.tensor([1.0]).neg_()),
    "series": lambda x, m: functional.avg_pool1d(functional.max_pool1d(x.flatten(2), 3, 1, 1), 2).repeat(1, 1, 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_captured(name):
    same(net(FUNCTIONS[name]))


LAYERS = {
    "same": nn.Conv2d(1, 1, (4, 3), padding="same"),
    "reflected": nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
    "grouped and dilated": nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2), nn.Conv2d(4, 1, 1)
    ),
    "transposed": nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.ConvTranspose2d(4, 1, 3, 2, 1, output_padding=1, groups=1)
    ),
    "transposed in groups": nn.Sequential(
        nn.Conv2d(1, 4, 2, 2), nn.ConvTranspose2d(4, 2, 2, 2, groups=2), nn.Conv2d(2, 1, 1)
    ),
    "series": nn.Sequential(
        nn.Flatten(2), nn.Conv1d(1, 2, 3, padding=1), nn.BatchNorm1d(2), nn.ConvTranspose1d(2, 1, 3, padding=1)
    ),
    "plain BatchNorm": nn.BatchNorm2d(1, affine=False),
    "PReLU": nn.Sequential(nn.PReLU(), nn.PReLU(1, init=1.7)),
    "upsampled": nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear")),
    "random in training": nn.Sequential(nn.Dropout(), nn.AlphaDropout(), nn.Dropout2d(), nn.RReLU()),
    "padded": nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), nn.ReflectionPad2d((0, 1, 0, 1)), nn.Conv2d(1, 1, 3)),
    "shuffled": nn.Sequential(nn.Conv2d(1, 4, 1), nn.ChannelShuffle(2), nn.Conv2d(4, 1, 1)),
    "weight norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1)),
    "spectral norm": nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 1, 1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_captured(name):
    torch.manual_seed(0)
    layer = LAYERS[name]
    for module in layer.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    same(nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).double().eval())


def changed_constant(x, m):
    limit = torch.full((4, 4), 5.0, dtype=x.dtype)
    first = (x - limit).relu()  # 0 on every image that is tried
    limit.fill_(-5.0)
    return x + first


def written_out(x, m):
    found = x.relu()
    torch.mul(x, 2.0, out=found)
    return found


def own_state(x, m):
    m.matrix.detach().t().fill_(1.0)
    return x @ m.matrix


def test_a_parameter_cut_out_of_another_is_compared_with_itself():
    """One column of a weight is contiguous to torch, and its stride is not 1."""
    layer = nn.Linear(1, 1).double()
    layer.weight = nn.Parameter(torch.rand(1, 8, dtype=torch.float64)[:, ::8])
    assert layer.weight.is_contiguous() and layer.weight.stride() != (1, 1)
    network = nn.Sequential(nn.Flatten(), layer).eval()
    images = torch.rand(3, 1, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(capture(network, (1, 1, 1))(images), network(images))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (changed_constant, "fill_ cannot be bounded: it changes a constant that has been used"),
        (written_out, "mul cannot be bounded: it writes to out="),
        (own_state, "cannot be bounded: the network changes its own state"),
        (lambda x, m: functional.elu(x, -1.0), "alpha that is not positive"),
        (lambda x, m: functional.celu(x, -1.0), "alpha that is not positive"),
        (lambda x, m: x + (x - 9).relu().sum((2, 3), True, dtype=torch.int64), "sum cannot be bounded: it rounds"),
        (lambda x, m: x.mean((2, 3), True, dtype=torch.float32) + x, "mean cannot be bounded: it rounds"),
        (lambda x, m: x + 1 if torch.is_grad_enabled() else x, "something else where gradients are taken"),
        (lambda x, m: x + 1 if x.requires_grad else x, "something else where gradients are taken"),
        (lambda x, m: torch.cat([x[:, :0].repeat(1, 2, 1, 1), x], 1), "repeat cannot be bounded"),
        (lambda x, m: x + functional.pad(x[:, :0], (0, 0, 0, 0, x.shape[1], 0)), "no elements, shape"),
        (lambda x, m: x * x, "mul cannot be bounded: a product of two values"),
        (lambda x, m: x * x.sigmoid(), "product of two values"),
        (lambda x, m: x @ x.transpose(2, 3), "matmul cannot be bounded: a product of two values"),
        (lambda x, m: 1 / (x + 9), "division by a value|reciprocal"),
        (lambda x, m: x.exp(), "exp cannot be bounded"),
        (lambda x, m: functional.layer_norm(x, (4, 4)), "layer_norm cannot be bounded: it divides by a spread"),
        (lambda x, m: functional.group_norm(x, 1), "group_norm cannot be bounded: it divides by a spread"),
        (lambda x, m: functional.instance_norm(x), "instance_norm"),
        (lambda x, m: x.softmax(-1), "softmax cannot be bounded: scores are made of logits"),
        (lambda x, m: torch.where(x > 0, x, 0.0), "it may jump"),
        (lambda x, m: x.float().double(), "it rounds to another type"),
        (lambda x, m: x - x.mean(), "mean cannot be bounded: without dims it goes over the batch"),
        (lambda x, m: x - x.mean(0), "images would influence each other"),
        (lambda x, m: torch.cat([x, x])[: len(x)], "along the batch|apart|batch alone"),
        (lambda x, m: x.flip(0), "along the batch"),
        (lambda x, m: x * x.shape[0], "the size of the batch"),
        (lambda x, m: functional.dropout(x, 0.5, True), "dropout cannot be bounded: it is random"),
        (lambda x, m: x + torch.rand(4, 4), "rand cannot be bounded: it is random"),
        (lambda x, m: x if x.sum() > 0 else -x, "Python conditions or numbers hang on values"),
        (lambda x, m: x + int(x.mean() * 4), "Python conditions or numbers hang on values|size of the batch"),
        (lambda x, m: x + x.mean().item(), "mean|values"),
        (lambda x, m: functional.softplus(x, threshold=5), "threshold other than 20"),
        (lambda x, m: functional.batch_norm(x, None, None, training=True), "depends on the batch"),
    ],
)
def test_what_cannot_be_bounded_is_refused_by_name(function, message):
    with pytest.raises(InputError, match=message) as found:
        capture(net(function), SHAPE)
    assert "\n" not in str(found.value) and "\x1b" not in str(found.value)


def test_a_refusal_says_where():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Sequential(nn.LayerNorm(4)), nn.Linear(4, 2)).eval()
    with pytest.raises(InputError, match=r"^layer 2\.0: layer_norm cannot be bounded"):
        capture(network, SHAPE)


def test_capturing_leaves_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    network = net(FUNCTIONS["clamp"])
    torch.manual_seed(5)
    capture(network, SHAPE)
    live_graph(network, SHAPE)
    assert torch.equal(torch.rand(3), expected)


def test_a_layer_called_twice_on_the_same_value_is_computed_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(16, 4), nn.Linear(4, 2)

        def forward(self, images):
            return self.last(self.layer(images.flatten(1)).relu() + self.layer(images.flatten(1)))

    assert [node.name for node in same(Twice().eval()).nodes].count("layer") == 1


def test_capturing_is_silent(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError):
            capture(net(lambda x, m: x if x.sum() > 0 else -x), SHAPE)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm2d(1), nn.ReLU()])
def test_train_mode_anywhere_is_refused(layer):
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(16, 2)).eval()
    layer.train()
    with pytest.raises(InputError, match="train mode"):
        capture(network, SHAPE)


@pytest.mark.parametrize("version", [torchvision.transforms, torchvision.transforms.v2])
def test_torchvision_normalisation_is_ours_if_it_is_exactly_that(version):
    class Inverted(version.Normalize):
        def forward(self, images):
            return -super().forward(images)

    tail = [nn.Flatten(), nn.Linear(16, 2)]
    x = images()
    network = nn.Sequential(version.Normalize([0.4], [0.3]), *tail).double().eval()
    torch.testing.assert_close(  # to the last digits: 0.4 in float32 is another network
        capture(network, SHAPE)(x), network[2](network[1]((x - 0.4) / 0.3)), rtol=1e-12, atol=1e-12
    )
    try:
        graph = capture(nn.Sequential(Inverted([0.4], [0.3]), *tail).eval(), SHAPE)
    except InputError:
        return
    torch.testing.assert_close(graph(x), network[2](network[1](-(x - 0.4) / 0.3)), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("version", [torchvision.transforms, torchvision.transforms.v2])
@pytest.mark.parametrize("how", ["nothing", "hook", "pre-hook", "forward"])
def test_torchvision_normalisation_is_replaced_with_what_hangs_on_it(version, how):
    network = nn.Sequential(version.Normalize([0.485], [0.229]), nn.Flatten(), nn.Linear(16, 2)).double().eval()
    if how == "hook":
        network[0].register_forward_hook(lambda module, inputs, output: output.relu())
    elif how == "pre-hook":
        network[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
    elif how == "forward":
        network[0].forward = lambda values: values * 3
    try:
        graph = capture(network, SHAPE)
    except InputError:
        assert how != "nothing"
        return
    torch.testing.assert_close(graph(images()), network(images()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda y: {"logits": y}, "one tensor, its logits, not a dict"),
        (lambda y: (y,), "not a tuple"),
        (lambda y: (y, y), "one tensor"),
        (lambda y: y[:, :0], "logits of shape"),
        (lambda y: y + 1e13 - 1e13, "leave nothing of the logits"),
    ],
)
def test_answers_that_are_no_logits_are_refused(wrap, message):
    class Wrapped(nn.Linear):
        def forward(self, images):
            return wrap(super().forward(images.flatten(1)))

    with pytest.raises((InputError, RunError), match=message):
        capture(Wrapped(16, 2).eval(), SHAPE)

    program = torch.export.export(Wrapped(16, 2).eval(), (images(2).float(),))
    with pytest.raises((InputError, RunError), match=message):
        capture(program, SHAPE)


class Passing(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Passing, nn.DataParallel])
def test_wrappers_that_pass_all_arguments_on_are_seen_through(wrap):
    same(wrap(nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 2))).eval())


def test_what_is_no_module_is_refused():
    with pytest.raises(InputError, match=r"expected a torch\.nn\.Module or an exported program, got function"):
        capture(lambda x: x, SHAPE)
    scripted = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval())
    with pytest.raises(InputError, match="cannot be copied in float64"):
        capture(scripted, SHAPE)


# Memory.


def test_changes_in_place_reach_whoever_reads_the_value_later():
    def shared(x, m):
        view = x.view(x.size(0), 16)
        x.relu_()
        return view + 1

    with pytest.raises(InputError, match="in place"):
        capture(net(shared), SHAPE)

    class Overwrites(nn.Module):
        def forward(self, images):
            return images.mul_(2).flatten(1)

    with pytest.raises(InputError, match="it changes the images it was given"):
        capture(nn.Sequential(Overwrites(), nn.Linear(16, 2)).eval(), SHAPE)


def test_a_graph_that_differs_on_given_images_is_refused(monkeypatch):
    """A ReLU that is wrong above 6, in front of which only a chessboard gets so far."""
    monkeypatch.setitem(ATEN, "relu", lambda call: call.builder.clamp(call.value, 0.0, 6.0))
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 1), nn.ReLU()).double().eval()
    chessboard = (torch.arange(16) // 4 + torch.arange(16)) % 2
    with torch.no_grad():
        network[1].weight.copy_(2 * chessboard - 1), network[1].bias.zero_()
    capture(network, SHAPE)
    with pytest.raises(RunError, match="does not reproduce the network"):
        capture(network, SHAPE, chessboard.reshape(1, *SHAPE).double())


def test_tied_weights_and_reused_layers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(16, 16)
            self.second = nn.Linear(16, 16)
            self.second.weight = self.first.weight
            self.last = nn.Linear(16, 2)

        def forward(self, images):
            values = self.first(images.flatten(1)).relu()
            return self.last(self.first(self.second(values).relu()))

    same(Tied().eval())
    network = Tied()
    graph = live_graph(network, SHAPE)
    graph(images().float()).sum().backward()
    expected = torch.autograd.grad(network(images().float()).sum(), network.first.weight)[0]
    torch.testing.assert_close(network.first.weight.grad, expected)


def test_a_live_graph_follows_training_in_eval_mode():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.PReLU(2), nn.Dropout(), nn.Flatten(), nn.Linear(32, 2)
    )
    optimiser = torch.optim.SGD(network.parameters(), 0.001)
    for _ in range(3):
        network.train()
        network(images().float()).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        graph = live_graph(network, SHAPE)
        assert network.training
        got = torch.autograd.grad(graph(images().float()).sum(), list(network.parameters()))
        network.eval()
        expected = torch.autograd.grad(network(images().float()).sum(), list(network.parameters()))
        for one, two in zip(got, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        network.train()


CHANGES = {
    "hook": lambda network: network[2].register_forward_hook(lambda module, inputs, output: output * 2),
    "pre-hook": lambda network: network[3].register_forward_pre_hook(lambda module, inputs: (inputs[0] - 1,)),
    "module": lambda network: network.__setitem__(2, nn.Tanh()),
    "appended module": lambda network: network.append(nn.Linear(2, 2)),
    "number": lambda network: setattr(network[2], "negative_slope", 0.7),
    "forward": lambda network: setattr(network[2], "forward", torch.tanh),
    "weight": lambda network: setattr(network[1], "weight", nn.Parameter(torch.ones(4, 16))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_live_graph_follows_changes_of_the_network(name):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.LeakyReLU(0.1), nn.Linear(4, 2)).eval()
    before = live_graph(network, SHAPE)(images().float())
    CHANGES[name](network)
    expected = network(images().float())
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(live_graph(network, SHAPE)(images().float()), expected)


def test_a_live_graph_is_exported_once(monkeypatch):
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Dropout(), nn.Linear(4, 2))
    live_graph(network, SHAPE)
    monkeypatch.setattr("grood_cert.networks.capture._export", None)
    network.eval(), network[1].weight.data.zero_()
    live_graph(network, SHAPE)


def test_an_exported_program_is_captured():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    batch = torch.export.Dim("batch")
    moving = torch.export.export(network, (images().float(),), dynamic_shapes=({0: batch},))
    fixed = torch.export.export(network, (images(1).float(),))
    for program in (moving, fixed):
        graph = capture(program, SHAPE)
        torch.testing.assert_close(graph(images()), network.double()(images()), rtol=1e-9, atol=1e-9)
        network.float()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(17, 2)), "does not take images of shape"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), "must return logits of shape"),
        (nn.Sequential(nn.Flatten(), nn.Unflatten(1, (16, 1)), nn.LSTM(1, 2)), "layer 2|one tensor|captured"),
    ],
)
def test_what_is_no_classifier_is_refused(network, message):
    with pytest.raises(InputError, match=message):
        capture(network.eval(), SHAPE)


def test_numbers_that_are_not_finite_are_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        network[1].weight[0, 0] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        capture(network, SHAPE)


def test_detectors_are_loaded_without_torchvision():
    """Its import takes longer than that of torch itself."""
    code = "import sys, grood_cert.detector; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
