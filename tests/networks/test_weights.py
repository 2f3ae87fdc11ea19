from __future__ import annotations

import collections
import re
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from grood_cert.errors import InputError
from grood_cert.networks.architectures import Classifier, Normalize, build
from grood_cert.networks.weights import WRAPPERS, load_into, published_state, read_state

SHARED = Path(__file__).parents[3] / "shared/data"


def densenet(classes: int = 4, seed: int = 0, mean: float = 0.5) -> Classifier:
    torch.manual_seed(seed)
    return build("densenet-bc-100", (3, 8, 8), classes, [mean] * 3, [0.3] * 3, width=2)


def conv(classes: int = 4, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return build("conv-small", (1, 8, 8), classes, [0.5], [0.3], width=2)


def published(network: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters as a file of somebody else would hold them, without our normalisation."""
    return {name: tensor for name, tensor in network.state_dict().items() if not name.endswith((".mean", ".std"))}


def same_logits(first: nn.Module, second: nn.Module, shape=(3, 8, 8)) -> bool:
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return torch.equal(first.eval()(images), second.eval()(images))


def refusal(network: nn.Module, path, allow=()) -> str:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_into(network, path, allow)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items()), "left as it was"
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and message.startswith(str(path))
    return message.removeprefix(str(path)).removeprefix(": ")


@pytest.mark.parametrize("wrap", [None, *WRAPPERS])
def test_a_state_dict_is_loaded_whole(tmp_path, wrap):
    trained, fresh = densenet(seed=1), densenet(seed=2)
    state = published(trained)
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "w.pth")
    assert not same_logits(trained, fresh)
    loaded = load_into(fresh, tmp_path / "w.pth")
    assert same_logits(trained, fresh)
    assert (set(loaded.loaded), loaded.kept, loaded.ignored) == (set(state), (), ())
    assert str(loaded) == "596 tensors loaded" + (f"; found under {wrap}" if wrap else "")


def test_the_authors_trap_of_data_parallel(tmp_path):
    """method.md 8.1: strict=False loaded nothing, silently, of a file with `module.` before all 596 names."""
    trained, fresh = densenet(seed=1), densenet(seed=2)
    state = {f"module.{name}": tensor for name, tensor in published(trained).items()}
    torch.save(state, tmp_path / "w.pth")
    assert len(load_into(fresh, tmp_path / "w.pth").loaded) == 596
    assert same_logits(trained, fresh)
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "mixed.pth")
    message = refusal(fresh, tmp_path / "mixed.pth")
    assert "497 missing from the file: conv1.weight, block1.layer.0.bn1.weight" in message  # all but the 99 counters
    assert "597 unknown to the network: module.conv1.weight" in message


def test_the_authors_trap_of_the_head(tmp_path):
    """method.md 8.1: strict=False left the head untrained, silently, where it is called `fc` and not `linear`."""
    trained, fresh = densenet(seed=1), densenet(seed=2)
    for name in ("fc", "linear", "classifier"):
        torch.save({key.replace("linear.", f"{name}."): t for key, t in published(trained).items()}, tmp_path / "w.pth")
        load_into(fresh, tmp_path / "w.pth")
        assert same_logits(trained, fresh)
    state = published(trained)
    state["top.weight"], state["top.bias"] = state.pop("linear.weight"), state.pop("linear.bias")
    torch.save(state, tmp_path / "w.pth")
    assert refusal(fresh, tmp_path / "w.pth") == (
        "these weights do not fit the network: 2 missing from the file: linear.weight, linear.bias; "
        "2 unknown to the network: top.weight, top.bias (to start linear afresh, allow 'head')"
    )
    torch.save({**published(trained), "fc.weight": torch.zeros(4, 38)}, tmp_path / "w.pth")
    assert refusal(fresh, tmp_path / "w.pth") == "linear.weight and fc.weight are both linear.weight of this network"


def test_a_head_of_another_size_needs_leave(tmp_path):
    trained, fresh = densenet(classes=100, seed=1), densenet(classes=4, seed=2)
    torch.save(
        {name.replace("linear.", "fc."): tensor for name, tensor in published(trained).items()}, tmp_path / "w.pth"
    )
    message = refusal(fresh, tmp_path / "w.pth", ["conv1"])
    size = fresh[-1].in_features
    assert f"2 of another shape: linear.weight (100, {size}) for (4, {size}), linear.bias (100,) for (4,)" in message
    assert message.endswith("(to start linear afresh, allow 'head')")
    for allow in (["head"], ["linear"], ["linear."], ["fc"], ["linear.weight", "linear.bias"]):
        fresh = densenet(classes=4, seed=2)
        before = fresh[-1].weight.clone()
        loaded = load_into(fresh, tmp_path / "w.pth", allow)
        assert loaded.kept == ("linear.weight", "linear.bias") and len(loaded.loaded) == 594
        assert str(loaded) == "594 tensors loaded; kept as they were: linear.weight, linear.bias"
        assert torch.equal(fresh[-1].weight, before)
        assert torch.equal(fresh.block3.layer[15].conv2.weight, trained.block3.layer[15].conv2.weight)
    assert "linear.bias" in refusal(fresh, tmp_path / "w.pth", ["linear.weight"])
    assert "linear.weight" in refusal(fresh, tmp_path / "w.pth", ["lin", ""]), "a part of a name is no module"


def test_leave_is_for_what_is_named_only(tmp_path):
    state = published(conv(seed=1))
    del state["1.bias"]
    state["old.scale"], state["old.shift"] = torch.ones(1), torch.ones(1)
    torch.save(state, tmp_path / "w.pth")
    network = conv(seed=2)
    before = network[1].bias.clone()
    assert refusal(network, tmp_path / "w.pth", ["old"]).endswith(": 1 missing from the file: 1.bias")
    assert refusal(network, tmp_path / "w.pth", ["1", "old.scale"]).endswith(": 1 unknown to the network: old.shift")
    loaded = load_into(network, tmp_path / "w.pth", ["1.bias", "old"])
    assert (loaded.kept, loaded.ignored) == (("1.bias",), ("old.scale", "old.shift"))
    assert torch.equal(network[1].bias, before)
    assert torch.equal(network[1].weight, conv(seed=1)[1].weight)


def test_another_architecture_is_refused_with_names(tmp_path):
    torch.save(published(conv()), tmp_path / "w.pth")
    message = refusal(densenet(), tmp_path / "w.pth")
    assert "497 missing from the file" in message and "and 489 more" in message
    assert "8 unknown to the network: 1.weight, 1.bias, 3.weight, 3.bias" in message
    assert len(message) < 600


def test_normalisation_comes_from_the_recipe(tmp_path):
    trained, fresh = densenet(seed=1, mean=0.1), densenet(seed=2, mean=0.7)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    assert load_into(fresh, tmp_path / "w.pth").ignored == ("normalize.mean", "normalize.std")
    assert fresh[0].mean.flatten().tolist() == pytest.approx([0.7] * 3)
    assert torch.equal(fresh[1].weight, trained[1].weight)
    torch.save(conv(seed=1).state_dict(), tmp_path / "ours.pth")
    assert load_into(conv(seed=2), tmp_path / "ours.pth").ignored == ("0.mean", "0.std")


def test_our_own_checkpoints(tmp_path):
    from grood_cert.detector import Architecture, Detector

    network = conv(seed=1).double().eval()
    architecture = Architecture("conv-small", (1, 8, 8), 4, (0.5,), (0.3,), {"width": 2})
    Detector(network, -1.0, (1, 8, 8), architecture=architecture).save(tmp_path / "model.pt")
    fresh = conv(seed=2).double()
    load_into(fresh, tmp_path / "model.pt")
    assert same_logits(fresh.float(), network.float(), (1, 8, 8))


def test_counters_of_batches_may_be_missing(tmp_path):
    """Files of torch < 0.4.1, such as torchvision's first ones, have none."""
    trained, fresh = densenet(seed=1), densenet(seed=2)
    state = {name: tensor for name, tensor in published(trained).items() if "num_batches" not in name}
    torch.save(state, tmp_path / "w.pth")
    assert len(load_into(fresh, tmp_path / "w.pth").loaded) == 497
    assert same_logits(trained, fresh)


@pytest.mark.parametrize("name", ["resnet18-imagenet", "densenet121"])
def test_files_of_torchvision(tmp_path, name):
    from torchvision import models

    torch.manual_seed(1)
    theirs = {"resnet18-imagenet": models.resnet18, "densenet121": models.densenet121}[name](num_classes=5)
    state = theirs.state_dict()
    if name == "densenet121":  # the names in densenet121-a639ec97.pth
        old = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])")
        state = collections.OrderedDict((old.sub(r"\1.\2", key), value) for key, value in state.items())
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "w.pth")
    network = build(name, (3, 32, 32), 5, [0.0] * 3, [1.0] * 3)
    assert len(load_into(network, tmp_path / "w.pth").loaded) == len(state)
    assert same_logits(network, theirs, (3, 32, 32))


@pytest.mark.parametrize(("shortcut", "head"), [("downsample", "fc"), ("shortcut", "linear")])
def test_files_of_cifar_resnets(tmp_path, shortcut, head):
    """torchvision's ResNet-18 with the stem of the CIFAR literature, under both families of names."""
    from torchvision.models import resnet18

    torch.manual_seed(1)
    theirs = resnet18(num_classes=4)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    state = {
        name.replace("downsample", shortcut).replace("fc.", f"{head}."): tensor
        for name, tensor in theirs.state_dict().items()
    }
    torch.save(state, tmp_path / "w.pth")
    network = build("resnet18", (3, 8, 8), 4, [0.0] * 3, [1.0] * 3)
    assert len(load_into(network, tmp_path / "w.pth").loaded) == len(state) == 122
    assert same_logits(network, theirs)


def test_types_are_converted_and_bad_numbers_refused(tmp_path):
    state = published(conv(seed=1))
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.pth")
    network = conv(seed=2).double()
    load_into(network, tmp_path / "half.pth")
    assert network[1].weight.dtype == torch.float64
    assert torch.equal(network[1].weight, state["1.weight"].half().double())
    state["3.bias"] = state["3.bias"].clone()
    state["3.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    assert refusal(network, tmp_path / "nan.pth") == "values that are NaN or infinite in 3.bias"


def test_what_is_no_state_dict(tmp_path):
    network = conv()
    assert refusal(network, tmp_path / "none.pth") == "no such file of weights"
    for content, found in (
        ({}, "nothing but a dict"),
        ([torch.zeros(1)], "nothing but a list"),
        ([{"a": torch.zeros(1)}] * 2, "a list of 2: dict, dict"),
        ({"epoch": 3}, "entries epoch (int)"),
        ({"state_dict": {"a": 1}, "lr": 0.1}, "entries state_dict (dict), lr (float)"),
        ({"a": torch.zeros(1), "epoch": 3}, "entries a (Tensor), epoch (int)"),
        ({1: torch.zeros(1)}, "entries 1 (Tensor)"),
        (torch.zeros(2), "nothing but a Tensor"),
    ):
        torch.save(content, tmp_path / "w.pth")
        expected = f"holds no state dict, but {found}; expected names with tensors, plain or under state_dict, model_"
        assert refusal(network, tmp_path / "w.pth").startswith(expected)


@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_the_suffix_does_not_matter(tmp_path, suffix):
    trained, fresh = conv(seed=1), conv(seed=2)
    save_file(published(trained), tmp_path / f"safe.{suffix}")
    torch.save(published(trained), tmp_path / f"torch.{suffix}")
    torch.save(published(trained), tmp_path / f"old.{suffix}", _use_new_zipfile_serialization=False)
    for name in ("safe", "torch", "old"):
        fresh = conv(seed=2)
        assert str(load_into(fresh, tmp_path / f"{name}.{suffix}")) == "8 tensors loaded"
        assert same_logits(trained, fresh, (1, 8, 8))


class Own(nn.Module):
    """A stranger's network, whose parameters all lie in modules whose names are also prefixes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Module()
        self.model.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))

    def forward(self, images):
        return self.model.net(images)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "backbone.network.", "encoder.0."],
)
@pytest.mark.parametrize("network", [Own, lambda seed: conv(3, seed)], ids=["own", "ours"])
def test_any_one_prefix_is_taken_off_and_named(tmp_path, prefix, network):
    trained, fresh = network(1), network(2)
    torch.save({prefix + name: tensor for name, tensor in published(trained).items()}, tmp_path / "w.pth")
    loaded = load_into(fresh, tmp_path / "w.pth")
    assert loaded.prefix == prefix and str(loaded).endswith(f" tensors loaded; {prefix} taken off all names")
    assert same_logits(trained, fresh, (1, 8, 8))


def test_no_more_is_taken_off_than_has_to_be(tmp_path):
    trained = Own(1)
    for prefix, state in (("", trained), ("", trained.model), ("", trained.model.net)):
        fresh = {id(trained): Own(2), id(trained.model): Own(2).model, id(trained.model.net): Own(2).model.net}[
            id(state)
        ]
        torch.save(state.state_dict(), tmp_path / "w.pth")
        assert load_into(fresh, tmp_path / "w.pth").prefix == prefix
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    fresh = Own(2)
    assert load_into(fresh.model.net, tmp_path / "w.pth").prefix == "model.net."
    assert same_logits(trained, fresh, (1, 8, 8))


def test_a_stranger_says_nothing_of_heads_and_reads_no_other_names(tmp_path):
    state = {name.replace("net.4.", "fc."): tensor for name, tensor in Own(1).state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    assert refusal(Own(2), tmp_path / "w.pth") == (
        "these weights do not fit the network: 2 missing from the file: model.net.4.weight, model.net.4.bias; "
        "2 unknown to the network: model.fc.weight, model.fc.bias"
    )


def test_nested_wrappers_and_lists_of_one(tmp_path):
    """Files of the convex-adversarial, ERAN and oval networks hold a list of one state dict."""
    trained = Own(1)
    state = trained.state_dict()
    for content, place in (
        ([state], "item 0"),
        ((state,), "item 0"),
        ({"state_dict": [state], "epoch": 1}, "state_dict / item 0"),
        ({"model": {"state_dict": state}, "optimizer": {"state": {}}}, "model / state_dict"),
    ):
        torch.save(content, tmp_path / "w.pth")
        fresh = Own(2)
        loaded = load_into(fresh, tmp_path / "w.pth")
        assert str(loaded) == f"9 tensors loaded; found under {place}" and same_logits(trained, fresh, (1, 8, 8))
    torch.save({"params_ema": Own(3).state_dict(), "params": state}, tmp_path / "w.pth")
    found = read_state(tmp_path / "w.pth")
    assert (found.place, found.others) == (("params",), ("params_ema",))
    assert torch.equal(found.tensors["model.net.0.bias"], state["model.net.0.bias"])
    assert str(load_into(Own(2), tmp_path / "w.pth")).endswith("found under params; not looked at: params_ema")


def kinds() -> dict[str, tuple[str, torch.Tensor, str]]:
    ones, weight = torch.ones(2), torch.ones(3, 72)
    return {
        "complex": ("0.bias", ones.to(torch.complex64), "complex numbers in 0.bias"),
        "integer": ("0.bias", ones.int(), "int32 for float32 in 0.bias"),
        "bool": ("0.bias", ones.bool(), "bool for float32 in 0.bias"),
        "counter": ("1.num_batches_tracked", torch.tensor(0.5), "float32 for int64 in 1.num_batches_tracked"),
        "sparse": ("4.weight", weight.to_sparse(), "sparse tensors (call to_dense first) in 4.weight"),
        "quantised": (
            "4.weight",
            torch.quantize_per_tensor(weight, 0.1, 0, torch.quint8),
            "quantised tensors (call dequantize first) in 4.weight",
        ),
        "meta": ("0.bias", ones.to("meta"), "no values, only shapes (device meta) in 0.bias"),
        "infinite": ("0.bias", ones * torch.inf, "values that are NaN or infinite in 0.bias"),
        "too large": ("0.bias", ones.double() * 1e300, "values that are NaN or infinite in 0.bias"),
        "variance": ("1.running_var", torch.tensor([1.0, -1e-9]), "a negative variance in 1.running_var"),
    }


@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:TypedStorage is deprecated")
@pytest.mark.filterwarnings("ignore:.*torch.quantize_per_tensor.*", "ignore:.*quantization.*")
@pytest.mark.parametrize(
    "kind",
    ["complex", "integer", "bool", "counter", "sparse", "quantised", "meta", "infinite", "too large", "variance"],
)
def test_what_weights_cannot_be(tmp_path, kind):
    name, tensor, message = kinds()[kind]
    torch.save({**Own(1).model.net.state_dict(), name: tensor}, tmp_path / "w.pth")
    assert refusal(Own(2).model.net, tmp_path / "w.pth") == message


def test_a_network_without_values_cannot_be_loaded_into(tmp_path):
    torch.save(Own(1).state_dict(), tmp_path / "w.pth")
    with torch.device("meta"):
        network = Own(2)
    with pytest.raises(InputError, match=r"parameters without values: model\.net\.0\.weight, .*; build it on the CPU"):
        load_into(network, tmp_path / "w.pth")
    with pytest.raises(InputError, match="parameters without values: weight, bias"):
        load_into(nn.LazyLinear(2), tmp_path / "w.pth")


# Published files


class OptionA(nn.Module):
    """A residual block whose short cut takes every second pixel and fills up with empty channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1 if inputs == outputs else 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.more = outputs - inputs

    def forward(self, images):
        short = images
        if self.more:
            short = nn.functional.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return torch.relu(short + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(images))))))


def resnet20() -> nn.Module:
    layers = {
        f"layer{i}": nn.Sequential(OptionA(inputs, 8 * 2**i), *[OptionA(8 * 2**i, 8 * 2**i) for _ in range(2)])
        for i, inputs in ((1, 16), (2, 16), (3, 32))
    }
    begin = {"conv1": nn.Conv2d(3, 16, 3, 1, 1, bias=False), "bn1": nn.BatchNorm2d(16), "relu": nn.ReLU()}
    end = {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "linear": nn.Linear(64, 10)}
    return nn.Sequential(collections.OrderedDict({**begin, **layers, **end}))


@pytest.fixture(scope="module")
def cifar() -> tuple[torch.Tensor, torch.Tensor]:
    if not SHARED.is_dir():
        pytest.skip("no shared/data next to the repository")
    loaded = runpy.run_path(str(SHARED / "load.py"))["load"]("cifar10_test", SHARED)
    return torch.from_numpy(loaded[0][:200]).permute(0, 3, 1, 2) / 255, torch.from_numpy(loaded[1]["y"][:200])


def accuracy(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((network.eval()(images).argmax(1) == labels).float().mean())


def test_a_published_resnet_20(cifar):
    """Of another author's code; 91.7 % on the whole test set."""
    images, labels = cifar
    network = nn.Sequential(Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), resnet20())
    loaded = load_into(network[1], SHARED / "weights/cifar10_resnet20.th")
    assert str(loaded) == "97 tensors loaded; found under state_dict; module. taken off all names"
    assert accuracy(network, images, labels) > 0.85
    ours = build("resnet20", (3, 32, 32), 10, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).eval()
    assert str(load_into(ours, SHARED / "weights/cifar10_resnet20.th")) == str(loaded)
    file = read_state(SHARED / "weights/cifar10_resnet20.th").tensors
    counters = {name for name in published_state(ours) if name.endswith("num_batches_tracked")}
    assert {f"module.{name}" for name in published_state(ours).keys() - counters} == file.keys()
    with torch.no_grad():
        torch.testing.assert_close(ours(images[:20]), network(images[:20]), rtol=1e-5, atol=1e-4)


def test_a_published_densenet_bc_100(cifar):
    """Into our own architecture; 94.0 % on the whole test set."""
    images, labels = (part[:32] for part in cifar)
    mean, std = [125.3 / 255, 123 / 255, 113.9 / 255], [63 / 255, 62.1 / 255, 66.7 / 255]
    network = build("densenet-bc-100", (3, 32, 32), 10, mean, std)
    loaded = load_into(network, SHARED / "weights/cifar10_densenet_bc_100.pth.tar")
    assert str(loaded) == "596 tensors loaded; found under state_dict"
    assert accuracy(network, images, labels) > 0.88
