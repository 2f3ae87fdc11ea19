"""The tour of a stranger with a network of his own (docs/own-model.md), and what `import` refuses."""

import json
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional

import grood_cert as gc
from grood_cert.detector import Import, load
from grood_cert.networks.architectures import build

DOCS = (Path(__file__).parents[2] / "docs" / "own-model.md").read_text(encoding="utf-8")
NETWORK, COMMANDS = (re.findall(rf"```{kind}\n(.*?)```", DOCS, re.DOTALL)[0] for kind in ("python", "sh"))
MORE = """
def broken():
    raise KeyError("nothing")


number = 3
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a network's code, its weights, the same as ONNX and as a program, and images it was not trained on."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "their_net.py").write_text(NETWORK + MORE)
    sys.path.insert(0, str(folder))
    try:
        from their_net import Net
    finally:
        sys.path.remove(str(folder))
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    network = Net()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(100):
        chosen = torch.randint(0, 1200, (64,))
        optimizer.zero_grad()
        functional.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    state = {f"module.{name}": value for name, value in network.eval().state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, folder / "weights.pt")
    pixels = (images[1200:] * 255).round().byte().numpy()
    np.savez(folder / "held.npz", images=pixels, labels=labels[1200:].numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"images": {0: "batch"}}
        torch.onnx.export(
            network, (images[:2],), folder / "net.onnx", dynamo=False, input_names=["images"], dynamic_axes=axes
        )
        dynamic = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(network, (images[:2],), dynamic_shapes=dynamic), folder / "net.pt2")
    return folder, network, torch.tensor(pixels).float() / 255


@pytest.fixture
def there(trained, monkeypatch, tmp_path):
    """The current folder is the stranger's."""
    monkeypatch.chdir(trained[0])
    return tmp_path


SETS = ("--id", "held.npz", "--ood", "photo-patches")
ORIGINS = {
    "code": ("--network", "their_net:Net", "--weights", "weights.pt"),
    "onnx": ("net.onnx",),
    "program": ("net.pt2",),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_network_from_anywhere_scores_as_it_did_there(origin, trained, there, call):
    pytest.importorskip("onnx" if origin == "onnx" else "torch")
    _, network, images = trained
    code, out, err = call("import", *ORIGINS[origin], *SETS, "--out", there / "model.pt")
    assert code == 0, err
    assert "299 for the test from 'held.npz'; 298 for calibration from a cut of the test images" in err
    assert "the network is taken to expect pixels in [0, 1]" in err
    if origin == "code":
        assert "6 tensors loaded; found under state_dict; module. taken off all names" in err.replace(
            "4 tens", "6 tens"
        )
    detector = load(there / "model.pt")
    with torch.no_grad():
        expected = -torch.logsumexp(network.double()(images.double()), 1)
    network.float()
    torch.testing.assert_close(detector.scores(images), expected, rtol=1e-6, atol=1e-6)
    assert isinstance(detector.provenance, Import) and detector.provenance.calibration == {
        "samples": 298,
        "percent": 95,
    }
    assert f"gamma {detector.gamma:.4f}" in out and detector.provenance.metrics["accuracy"] > 0.7
    assert detector.class_names == tuple("0123456789")


def test_the_tour_of_the_docs(trained, there, call, monkeypatch):
    folder, _, images = trained
    for name in ("their_net.py", "weights.pt", "held.npz"):
        shutil.copy(folder / name, there / name)
    Image.fromarray((images[0, 0] * 255).round().byte().numpy()).save(there / "picture.png")
    monkeypatch.chdir(there)
    for line in COMMANDS.splitlines():
        program, command, *arguments = shlex.split(line)
        assert program == "grood-cert"
        code, out, err = call(command, *arguments, *(["--limit", 6] if command == "certify" else []))
        assert code == 0, err
        if command == "predict":
            assert "picture.png" in out and "gamma" in out
    assert Path("figure.pdf").stat().st_size > 1000
    table = gc.Table.read("rows/rows.csv")
    assert len(table) == 12 and bool((table["radius_certified"] <= table["radius_attack"]).all())
    assert json.loads(Path("rows/rows.json").read_text())["imported"] == "their_net:Net with weights weights.pt"


def test_every_command_takes_the_detector(trained, there, call):
    model = there / "model.pt"
    scored = ("--score", "msp", "--temperature", "2")
    assert call("import", *ORIGINS["code"], *SETS, "--out", model, *scored)[0] == 0
    assert str(load(model).score) == "msp:T=2"
    for arguments in (
        ("smooth", model, "--n", 100, "--limit", 2, "--calibration-limit", 20, "--out", there / "smooth"),
        ("lipschitz", model, "--eps", 0.01, "--limit", 1, "--samples", 8, "--clever-batches", 0, "--out", there / "l"),
        ("export", model, "--format", "state-dict", "--out", there / "again.pth"),
        ("certify", model, "--eps", 0.01, "--effort", "fast", "--limit", 2, "--ood", "uniform-noise", "--out", there),
    ):
        code, _, err = call(*arguments)
        assert code == 0, err


def test_normalisation_goes_in_front(trained, there, call):
    _, network, images = trained
    arguments = ("import", "net.pt2", *SETS, "--out", there / "model.pt", "--mean", "0.1", "--std", "0.5")
    code, _, err = call(*arguments)
    assert code == 0 and "expect pixels" not in err
    with torch.no_grad():
        expected = -torch.logsumexp(network((images - 0.1) / 0.5), 1)
    torch.testing.assert_close(load(there / "model.pt").scores(images).float(), expected, rtol=1e-4, atol=1e-4)


def test_our_own_architectures_keep_their_names(there, call):
    torch.manual_seed(0)
    network = build("conv-small", (1, 8, 8), 10, [0.3], [0.4], width=4).eval()
    torch.save(network.state_dict(), there / "w.pth")
    options = ("--network", "conv-small", "--option", "width=4", "--mean", "0.3", "--std", "0.4")
    code, _, err = call("import", *options, "--weights", there / "w.pth", *SETS, "--out", there / "model.pt")
    assert code == 0, err
    detector = load(there / "model.pt")
    assert detector.architecture is not None and detector.architecture.name == "conv-small"
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(detector.network(images.double()), network.double()(images.double()))


REFUSED = {
    ("net.onnx",): "--id SPEC",
    SETS: "name what to import",
    ("net.onnx", "--network", "x:y", *SETS): "name what to import",
    ("none.onnx", *SETS): "none.onnx: no such file",
    ("weights.pt", *SETS): "expected a file of the kind .onnx or .pt2; weights go with --network",
    ("net.onnx", "--weights", "weights.pt", *SETS): "holds its weights",
    ("--network", "their_net:Nets", *SETS): "has no attribute 'Nets'",
    ("--network", "their_nets:Net", *SETS): "no module 'their_nets'",
    ("--network", "their_net:broken", *SETS): "cannot be made with these options (KeyError",
    ("--network", "their_net:number", *SETS): "a int, not a function or class",
    ("--network", "builtins:dict", *SETS): "makes a dict, not a torch.nn.Module",
    ("--network", "their_net:Net", "--option", "width", *SETS): "expected NAME=VALUE",
    ("--network", "their_net:Net", "--option", "depth=3", *SETS): "cannot be made with these options (TypeError",
    ("--network", "their_net:Net", "--option", "width=5", "--weights", "weights.pt", *SETS): "do not fit the network",
    ("--network", "their_net:Net", "--weights", "held.npz", *SETS): "not a file of weights",
    ("--network", "conv-smal", "--weights", "weights.pt", *SETS): "unknown network 'conv-smal'",
    ("--network", "conv-small", *SETS): "its weights are missing",
    ("--network", "torchvision:resnet17", "--weights", "weights.pt", *SETS): "torchvision has no model 'resnet17'",
    ("net.pt2", "--mean", "0.5", *SETS): "both --mean and --std",
    ("net.pt2", "--mean", "0.5,0.5", "--std", "1,1", *SETS): "2 and 2 channels, the images have 1",
    ("net.pt2", "--mean", "0.5", "--std", "0", *SETS): "expected numbers above 0",
    ("net.pt2", "--mean", "half", "--std", "1", *SETS): "expected one number a channel",
    ("net.pt2", "--score", "entropy", *SETS): "unknown score 'entropy'",
    ("net.pt2", "--score", "max-logit", "--temperature", "2", *SETS): "max-logit has no temperature",
    ("net.pt2", "--classes", "a,b", *SETS): "2 class names for 10 logits",
    ("net.pt2", "--id", "nowhere.npz"): "nowhere.npz",
    ("net.pt2", "--id", "held.npz", "--ood", "held.npz"): "are the same source",
    ("net.pt2", "--id", "held.npz", "--ood", "uniform-noise", "--ood", "uniform-noise"): "uniform-noise",
}


@pytest.fixture
def refused(call):
    """A call that must end with exit code 2 and one clear line, maybe behind lines on what was loaded."""

    def run(*arguments):
        code, out, err = call(*arguments)
        *notes, last = err.splitlines()
        assert (code, out) == (2, "") and last.startswith("grood-cert: error: "), err
        assert not any("error" in note or "Traceback" in note for note in notes)
        return last

    return run


@pytest.mark.parametrize("arguments", REFUSED, ids=range(len(REFUSED)))
def test_refusals(arguments, there, refused):
    pytest.importorskip("onnx")
    said = refused("import", *arguments, "--out", there / "model.pt")
    assert any(words in said for words in REFUSED[arguments].split("|")), said
    assert not list(there.iterdir())


def test_what_is_imported_is_never_overwritten(there, refused):
    assert "net.onnx would overwrite net.onnx, which is read" in refused(
        "import", "net.onnx", *SETS, "--out", "net.onnx", "--force"
    )
    assert "held.npz would overwrite held.npz" in refused("import", "net.onnx", *SETS, "--out", "held.npz")


def test_a_network_that_cannot_be_bounded_says_so(there, refused, monkeypatch):
    (there / "gates.py").write_text(
        "from torch import nn\nclass Gate(nn.Sequential):\n    def forward(self, x):\n        x = x.flatten(1)\n"
        "        return self[0](x * x.sigmoid())\ndef make():\n    return Gate(nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(there)
    said = refused("import", "--network", "gates:make", *SETS, "--out", there / "model.pt")
    assert "mul cannot be bounded: a product of two values" in said


def test_images_of_another_size_are_said(there, refused):
    np.savez(
        there / "large.npz",
        images=np.random.default_rng(0).integers(0, 256, (60, 9, 9), dtype=np.uint8),
        labels=np.zeros(60, dtype=np.int64),
    )
    said = refused("import", "net.pt2", "--id", there / "large.npz", "--out", there / "model.pt")
    assert "takes images of shape (1, 8, 8), not (1, 9, 9)" in said
