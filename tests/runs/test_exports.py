from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from grood_cert.detector import Architecture, Detector
from grood_cert.errors import InputError, RunError
from grood_cert.networks.architectures import NETWORKS
from grood_cert.networks.weights import load_into
from grood_cert.runs.exports import FORMATS, PUBLISHED, export

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def make(name: str, shape=(3, 32, 32), **options) -> Detector:
    torch.manual_seed(1)
    mean, std = MEAN[: shape[0]], STD[: shape[0]]
    architecture = Architecture(name, shape, 5, mean, std, options)
    network = architecture.build()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return Detector(network.double().eval().requires_grad_(False), -1.5, shape, tuple("abcde"), architecture)


def images(shape=(3, 32, 32), number: int = 2) -> torch.Tensor:
    return torch.rand(number, *shape, generator=torch.Generator().manual_seed(3)).double()


def normalised(values: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1) for numbers in (MEAN, STD))
    return (values - mean) / std


# The networks of others, written anew: what counts are the names and the order of operations.


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def resnet18_32x32(classes: int) -> nn.Module:
    layers = OrderedDict(conv1=nn.Conv2d(3, 64, 3, 1, 1, bias=False), bn1=nn.BatchNorm2d(64), relu=nn.ReLU())
    for number, (inputs, outputs) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], 1):
        stride = 1 if number == 1 else 2
        layers[f"layer{number}"] = nn.Sequential(Block(inputs, outputs, stride), Block(outputs, outputs, 1))
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(512, classes)}
    return nn.Sequential(layers)


BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def names_of_resnet18_32x32() -> set[str]:
    """As they stand in openood/networks/resnet18_32x32.py."""
    names = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{part}" for part in BATCH_NORM)}
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            begin = f"layer{layer}.{block}"
            names |= {f"{begin}.conv1.weight", f"{begin}.conv2.weight"}
            names |= {f"{begin}.bn{number}.{part}" for number in (1, 2) for part in BATCH_NORM}
            if layer > 1 and block == 0:
                names |= {f"{begin}.shortcut.0.weight", *(f"{begin}.shortcut.1.{part}" for part in BATCH_NORM)}
    return names


def test_our_resnet18_is_that_of_openood(tmp_path):
    detector = make("resnet18")
    written = export(detector, tmp_path / "r.ckpt", "openood")
    state = torch.load(tmp_path / "r.ckpt", weights_only=True)
    assert state.keys() == names_of_resnet18_32x32() and len(state) == 122
    theirs = resnet18_32x32(5)
    theirs.load_state_dict(state, strict=True)
    x = images()
    torch.testing.assert_close(theirs.double().eval()(normalised(x)), detector.network(x), rtol=1e-5, atol=1e-6)
    assert written.said == (
        "122 tensors for openood.networks.ResNet18_32x32(num_classes=5), which loads them strictly; normalisation is "
        "not among them: they want (x - mean) / std with mean (0.5, 0.4, 0.3) and std (0.2, 0.25, 0.3)"
    )


def test_what_stands_beside(tmp_path):
    detector = make("resnet18", width=4)
    export(detector, tmp_path / "r.pt", "state-dict")
    found = json.loads((tmp_path / "r.pt.json").read_text())
    assert found["sha256"] == hashlib.sha256((tmp_path / "r.pt").read_bytes()).hexdigest()
    assert (found["input"], found["mean"], found["std"]) == (
        "(pixels - mean) / std",
        pytest.approx(MEAN),
        pytest.approx(STD),
    )
    assert (found["score"], found["gamma"], found["class_names"]) == (str(detector.score), -1.5, list("abcde"))
    assert (found["shape"], found["classes"]) == ([3, 32, 32], 5)
    assert found["architecture"] == {"name": "resnet18", "options": {"width": 4}}


def test_the_wide_residual_network_is_that_of_pytorch_ood_and_openood(tmp_path):
    model = pytest.importorskip("pytorch_ood.model", reason="needs the optional package pytorch-ood")
    detector = make("wrn-40-2")
    for form in ("pytorch-ood", "openood"):  # both took it from the code of the energy paper
        export(detector, tmp_path / form, form)
        theirs = model.WideResNet(num_classes=5, in_channels=3)
        theirs.load_state_dict(torch.load(tmp_path / form, weights_only=True), strict=True)
        x = images(number=1)
        torch.testing.assert_close(theirs.double().eval()(normalised(x)), detector.network(x), rtol=1e-5, atol=1e-6)


def test_torchvisions_resnet18_is_that_of_pytorch_ood(tmp_path):
    model = pytest.importorskip("pytorch_ood.model", reason="needs the optional package pytorch-ood")
    detector = make("resnet18-imagenet")
    written = export(detector, tmp_path / "x", "pytorch-ood")
    assert "pytorch_ood.model.ResNet18(num_classes=5)" in written.said
    theirs = model.ResNet18(num_classes=5)
    theirs.load_state_dict(torch.load(tmp_path / "x", weights_only=True), strict=True)
    x = images()
    torch.testing.assert_close(theirs.double().eval()(normalised(x)), detector.network(x), rtol=1e-5, atol=1e-6)


def test_the_densenet_is_that_of_openood(tmp_path):
    """DenseNet3: names of the blocks as ours, head `fc`; so do the files of DICE have them."""
    export(make("densenet-bc-100"), tmp_path / "x", "openood")
    names = set(torch.load(tmp_path / "x", weights_only=True))
    expected = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{part}" for part in BATCH_NORM)}
    for block in (1, 2, 3):
        for layer in range(16):
            for number in (1, 2):
                begin = f"block{block}.layer.{layer}"
                expected |= {f"{begin}.conv{number}.weight", *(f"{begin}.bn{number}.{part}" for part in BATCH_NORM)}
        if block < 3:
            expected |= {f"trans{block}.conv1.weight", *(f"trans{block}.bn1.{part}" for part in BATCH_NORM)}
    assert names == expected and len(names) == 596


@pytest.mark.parametrize("form", ["state-dict", "safetensors"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet18", {"width": 4}), ("densenet-bc-100", {"width": 2}), ("wrn-40-2", {"width": 2}), ("conv-small", {})],
)
def test_what_is_written_can_be_read_again(tmp_path, name, options, form):
    detector = make(name, (3, 8, 8), **options)
    export(detector, tmp_path / "x", form)
    if form == "safetensors":
        assert (
            load_file(tmp_path / "x").keys()
            == load_into(detector.architecture.build(), tmp_path / "x").state.tensors.keys()
        )
    fresh = detector.architecture.build().double().eval()
    loaded = load_into(fresh, tmp_path / "x")
    assert not (loaded.kept or loaded.ignored or loaded.prefix)
    x = images((3, 8, 8))
    assert torch.equal(fresh(x), detector.network(x))


def test_a_network_behind_a_normalisation_keeps_its_own_names(tmp_path):
    torch.manual_seed(0)
    own = nn.Sequential(OrderedDict(flat=nn.Flatten(), head=nn.Linear(12, 5))).eval()
    detector = Detector.calibrate(own, torch.rand(99, 3, 2, 2), mean=MEAN, std=STD)
    written = export(detector, tmp_path / "x", "state-dict")
    own.load_state_dict(torch.load(tmp_path / "x", weights_only=True), strict=True)
    assert "normalisation is not among them" in written.said
    with pytest.raises(InputError, match=r"openood has no network 'of your own \(Sequential\)'"):
        export(detector, tmp_path / "o", "openood")
    plain = Detector.calibrate(own, torch.rand(99, 3, 2, 2))
    written = export(plain, tmp_path / "y", "state-dict")
    assert written.said == "2 tensors"
    with torch.no_grad():
        plain.network.head.weight += 1e-12
    assert export(plain, tmp_path / "z", "safetensors").said == "2 tensors, rounded to float32"
    assert json.loads((tmp_path / "z.json").read_text())["input"] == "pixels in [0, 1]"


def test_onnx_holds_the_normalisation(tmp_path):
    reference = pytest.importorskip("onnx.reference", reason="needs the optional package onnx")
    detector = make("resnet-small", (3, 8, 8), width=2)
    written = export(detector, tmp_path / "x.onnx", "onnx")
    assert written.said.startswith(
        "the logits of pixels in [0, 1], normalisation inside, float32, any number of images"
    )
    x = images((3, 8, 8))
    (got,) = reference.ReferenceEvaluator(str(tmp_path / "x.onnx")).run(None, {"X": x.float().numpy()})
    torch.testing.assert_close(torch.from_numpy(got).double(), detector.network(x), rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "x.onnx.json").read_text())["input"] == "pixels in [0, 1]"


@pytest.mark.parametrize(
    ("detector", "form", "message"),
    [
        (
            ("conv-small", (1, 8, 8)),
            "tf",
            "unknown format 'tf'; use one of onnx, safetensors, state-dict, openood, pytorch",
        ),
        (
            ("conv-small", (1, 8, 8)),
            "openood",
            "openood has no network 'conv-small'; it has resnet18, resnet18-imagenet",
        ),
        (("resnet18", (3, 8, 8)), "pytorch-ood", "has no network 'resnet18'; it has .* use --format state-dict"),
        (("resnet18", (3, 8, 8), 4), "openood", r"openood.networks.ResNet18_32x32 has 512 features, this one 32"),
        (("wrn-40-2", (3, 28, 28)), "openood", "images of 32x32, this one 28x28"),
        (("wrn-40-2", (1, 32, 32)), "openood", "RGB images, this one 1 channels"),
    ],
)
def test_refusals(tmp_path, detector, form, message):
    name, shape, *width = detector
    with pytest.raises(InputError, match=message):
        export(make(name, shape, **({"width": width[0]} if width else {})), tmp_path / "x", form)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(tmp_path, monkeypatch):
    detector = make("conv-small", (1, 8, 8))
    for folder in (Path("."), tmp_path):
        with pytest.raises(InputError, match="is a folder; expected the name of a file"):
            export(detector, folder, "state-dict", force=True)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match=r"x\.json exists already; choose another --out, or add --force"):
        export(detector, tmp_path / "x", "state-dict")
    export(detector, tmp_path / "x", "state-dict", force=True)
    with pytest.raises(InputError, match="x exists already"):
        export(detector, tmp_path / "x", "onnx")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(RunError, match="pip install safetensors"):
        export(detector, tmp_path / "y", "safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.json"]


def test_the_tables_agree():
    command = importlib.import_module("grood_cert.cli.export")
    assert command._FORMATS == FORMATS
    assert PUBLISHED.keys() <= set(FORMATS)
    assert all(name in NETWORKS for names in PUBLISHED.values() for name in names)
