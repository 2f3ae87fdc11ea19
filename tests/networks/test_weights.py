from __future__ import annotations

import collections
import re

import pytest
import torch
from torch import nn

from grood_cert.errors import InputError
from grood_cert.networks.architectures import Classifier, build
from grood_cert.networks.weights import load_pretrained


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


def refusal(network: Classifier, path, allow=()) -> str:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_pretrained(network, path, allow)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items()), "left as it was"
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "net"])
def test_a_state_dict_is_loaded_whole(tmp_path, wrap):
    trained, fresh = densenet(seed=1), densenet(seed=2)
    state = published(trained)
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "w.pth")
    assert not same_logits(trained, fresh)
    loaded = load_pretrained(fresh, tmp_path / "w.pth")
    assert same_logits(trained, fresh)
    assert (set(loaded.loaded), loaded.kept, loaded.ignored) == (set(state), (), ())
    assert str(loaded) == "596 tensors loaded"


def test_the_authors_trap_of_data_parallel(tmp_path):
    """method.md 8.1: strict=False loaded nothing, silently, of a file with `module.` before all 596 names."""
    trained, fresh = densenet(seed=1), densenet(seed=2)
    state = {f"module.{name}": tensor for name, tensor in published(trained).items()}
    torch.save(state, tmp_path / "w.pth")
    assert len(load_pretrained(fresh, tmp_path / "w.pth").loaded) == 596
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
        load_pretrained(fresh, tmp_path / "w.pth")
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
        loaded = load_pretrained(fresh, tmp_path / "w.pth", allow)
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
    loaded = load_pretrained(network, tmp_path / "w.pth", ["1.bias", "old"])
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
    assert load_pretrained(fresh, tmp_path / "w.pth").ignored == ("normalize.mean", "normalize.std")
    assert fresh[0].mean.flatten().tolist() == pytest.approx([0.7] * 3)
    assert torch.equal(fresh[1].weight, trained[1].weight)
    torch.save(conv(seed=1).state_dict(), tmp_path / "ours.pth")
    assert load_pretrained(conv(seed=2), tmp_path / "ours.pth").ignored == ("0.mean", "0.std")


def test_our_own_checkpoints(tmp_path):
    from grood_cert.detector import Architecture, Detector

    network = conv(seed=1).double().eval()
    architecture = Architecture("conv-small", (1, 8, 8), 4, (0.5,), (0.3,), {"width": 2})
    Detector(network, -1.0, (1, 8, 8), architecture=architecture).save(tmp_path / "model.pt")
    fresh = conv(seed=2).double()
    load_pretrained(fresh, tmp_path / "model.pt")
    assert same_logits(fresh.float(), network.float(), (1, 8, 8))


def test_counters_of_batches_may_be_missing(tmp_path):
    """Files of torch < 0.4.1, such as torchvision's first ones, have none."""
    trained, fresh = densenet(seed=1), densenet(seed=2)
    state = {name: tensor for name, tensor in published(trained).items() if "num_batches" not in name}
    torch.save(state, tmp_path / "w.pth")
    assert len(load_pretrained(fresh, tmp_path / "w.pth").loaded) == 497
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
    assert len(load_pretrained(network, tmp_path / "w.pth").loaded) == len(state)
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
    assert len(load_pretrained(network, tmp_path / "w.pth").loaded) == len(state) == 122
    assert same_logits(network, theirs)


def test_types_are_converted_and_bad_numbers_refused(tmp_path):
    state = published(conv(seed=1))
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.pth")
    network = conv(seed=2).double()
    load_pretrained(network, tmp_path / "half.pth")
    assert network[1].weight.dtype == torch.float64
    assert torch.equal(network[1].weight, state["1.weight"].half().double())
    state["3.bias"] = state["3.bias"].clone()
    state["3.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    assert refusal(network, tmp_path / "nan.pth") == "values that are NaN or infinite in 3.bias"


def test_what_is_no_state_dict(tmp_path):
    network = conv()
    assert refusal(network, tmp_path / "none.pth") == "no such file of weights"
    (tmp_path / "text.pth").write_text("weights")
    assert "not a file of weights that opens without running code" in refusal(network, tmp_path / "text.pth")
    torch.save(network, tmp_path / "pickled.pth")
    assert "not a file of weights that opens without running code" in refusal(network, tmp_path / "pickled.pth")
    for content in ({}, [torch.zeros(1)], {"epoch": 3}, {"state_dict": {"a": 1}}, {1: torch.zeros(1)}, torch.zeros(2)):
        torch.save(content, tmp_path / "w.pth")
        assert "holds no state dict; expected names with tensors" in refusal(network, tmp_path / "w.pth")
