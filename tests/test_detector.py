from __future__ import annotations

import copy
import dataclasses
import math
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import grood_cert
from grood_cert.detector import Architecture, Detector, Provenance, check_device, load, logits, probes, versions
from grood_cert.errors import InputError
from grood_cert.networks import architectures
from grood_cert.networks.weights import read_state
from grood_cert.recipe import Recipe
from grood_cert.scores import energy
from grood_cert.system.torch_files import fingerprint


def make(name: str = "conv-small", seed: int = 0) -> Detector:
    architecture = Architecture(name, (1, 8, 8), 3, (0.3,), (0.37,), {"width": 4})
    torch.manual_seed(seed)
    network = architecture.build()
    network(torch.rand(16, 1, 8, 8))  # gives BatchNorm statistics of its own
    return Detector(
        network=network.double().eval().requires_grad_(False),
        gamma=-1.0625,
        shape=(1, 8, 8),
        class_names=("zero", "one", "two"),
        architecture=architecture,
        provenance=Provenance(
            recipe=Recipe(name="made by hand"),
            calibration={"samples": 40, "percent": 95},
            metrics={"accuracy": 0.5, "ood": {"a": {"auroc": 0.75}}},
            versions=versions(),
        ),
    )


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.pt"
    make().save(path)
    return path


def rewrite(path, *missing, **changes) -> None:
    """Another content under a fingerprint of its own, as only a program that means it writes."""
    content = {**torch.load(path, weights_only=True), **changes}
    for name in ("content_sha256", *missing):
        del content[name]
    torch.save({**content, "content_sha256": fingerprint(content)}, path)


def refusal(path, **options) -> str:
    with pytest.raises(InputError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(
    "name", [name for name in architectures.NETWORKS if name not in ("resnet18-imagenet", "densenet121")]
)
def test_round_trip_gives_the_same_scores_to_the_last_bit(name, tmp_path):
    detector = make(name)
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    detector.save(tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt")
    assert torch.equal(loaded.scores(images), detector.scores(images))
    assert loaded.scores(images).dtype == torch.float64
    for item in dataclasses.fields(Detector):
        if item.name != "network":
            assert getattr(loaded, item.name) == getattr(detector, item.name), item.name
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    loaded.save(tmp_path / "again.pt")
    assert torch.equal(load(tmp_path / "again.pt").scores(images), detector.scores(images))


def test_the_architecture_carries_the_normalisation():
    normalize = make().network[0]
    assert normalize.mean.item() == pytest.approx(0.3) and normalize.std.item() == pytest.approx(0.37)


def test_weights_that_need_float64_keep_it(tmp_path):
    detector = make()
    with torch.no_grad():
        detector.network[1].weight += 1e-12
    images = torch.rand(5, 1, 8, 8)
    detector.save(tmp_path / "model.pt")
    assert torch.equal(load(tmp_path / "model.pt").scores(images), detector.scores(images))


def test_the_file_is_plain_and_small(saved):
    """What torch.load(weights_only=True) opens without any class of ours; float32 weights."""
    content = torch.load(saved, weights_only=True)
    assert content["architecture"]["name"] == "conv-small"
    assert content["architecture"]["mean"] == (0.3,)
    assert content["class_names"] == ["zero", "one", "two"]
    assert content["gamma"] == -1.0625
    assert content["recipe"]["objective"]["lambda_grad"] == Recipe().objective.lambda_grad
    assert content["versions"] == {
        "grood_cert": grood_cert.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": ".".join(map(str, __import__("sys").version_info[:3])),
    }
    assert {tensor.dtype for tensor in content["state_dict"].values()} == {torch.float32}


def test_score_in_batches(tmp_path):
    detector = make()
    images = torch.rand(600, 1, 8, 8, dtype=torch.float64)
    whole = -torch.logsumexp(detector.network(images), 1)
    torch.testing.assert_close(detector.scores(images), whole, rtol=1e-13, atol=0)
    assert torch.equal(energy(logits(detector.network, images)), detector.scores(images))


def test_logits_follow_the_network_in_type():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).float()
    assert logits(network, torch.rand(3, 1, 2, 2, dtype=torch.float64)).dtype == torch.float32
    assert not logits(network, torch.rand(3, 1, 2, 2)).requires_grad


def test_missing(tmp_path):
    assert "no such checkpoint; make one with grood-cert train RECIPE --out FOLDER, or grood-cert import" in refusal(
        tmp_path / "model.pt"
    )


def test_a_folder(tmp_path):
    assert "not a grood-cert checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    assert "not a grood-cert checkpoint, but " in refusal(saved)


def test_damaged_bytes_never_pass_as_another_kind_of_error(saved):
    """Whatever is overwritten, the answer is the same checkpoint (bytes between its parts) or one clear line."""
    content, detector = saved.read_bytes(), load(saved)
    images = torch.rand(5, 1, 8, 8)
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(60):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), 4):
            damaged[position] = rng.integers(256)
        saved.write_bytes(damaged)
        try:
            loaded = load(saved)
        except InputError as error:
            refused += 1
            assert str(saved) in str(error) and "\n" not in str(error), trial
        else:
            assert loaded.gamma == detector.gamma and torch.equal(loaded.scores(images), detector.scores(images))
    assert refused > 30


def test_inverted_weights_are_damage(saved):
    """400 bytes inside the weights: torch opens the file without a word, and all scores would be wrong."""
    content = saved.read_bytes()
    weight = torch.load(saved, weights_only=True)["state_dict"]["6.weight"].numpy().tobytes()
    begin = content.index(weight)
    saved.write_bytes(content[:begin] + bytes(255 - byte for byte in weight[:400]) + content[begin + 400 :])
    assert torch.load(saved, weights_only=True)["state_dict"]["6.weight"].numpy().tobytes() != weight
    assert refusal(saved) == (
        f"{saved}: not a grood-cert checkpoint, but damaged: its content is not what was written (SHA-256 differs)"
    )
    with pytest.raises(InputError, match=r"is not a file of weights, but damaged: .* \(SHA-256 differs\)"):
        read_state(saved)


def test_every_value_is_under_the_fingerprint(saved):
    content = torch.load(saved, weights_only=True)
    for changes in ({"gamma": -1.0}, {"class_names": ["one", "zero", "two"]}, {"more": 1}, {"content_sha256": "0"}):
        torch.save({**content, **changes}, saved)
        assert "damaged: its content is not what was written" in refusal(saved)
    torch.save({name: value for name, value in content.items() if name != "content_sha256"}, saved)
    assert "a grood-cert checkpoint without a SHA-256 of its content" in refusal(saved)


def test_a_network_that_computes_something_else_is_noticed(saved, monkeypatch):
    """What no hash of the weights can see: another normalisation, or another version's code."""
    content = torch.load(saved, weights_only=True)
    detector = load(saved)
    expected = -torch.logsumexp(detector.network(probes((1, 8, 8))), 1)
    torch.testing.assert_close(content["probe_scores"], expected, rtol=1e-13, atol=0)
    rewrite(saved, probe_scores=expected * (1 + 1e-12))
    load(saved)  # summed in another order
    for scores in (expected * (1 + 1e-7), expected * math.nan):
        rewrite(saved, probe_scores=scores)
        assert "its network computes other scores now than when it was saved" in refusal(saved)
    for scores in (expected[:2], 3):
        rewrite(saved, probe_scores=scores)
        assert "no scores of 4 probe images" in refusal(saved)
    rewrite(saved, probe_scores=expected)
    with monkeypatch.context() as patch:
        patch.setattr(nn.ReLU, "forward", lambda self, x: nn.functional.leaky_relu(x))
        assert "its network computes other scores now" in refusal(saved)
    load(saved)


def test_the_probe_images_are_the_same_everywhere():
    images = probes((3, 32, 32))
    assert images.shape == (4, 3, 32, 32) and 0 <= images.min() < 0.01 and 0.99 < images.max() < 1
    golden = (math.sqrt(5) - 1) / 2
    assert images.flatten().tolist() == [(n * golden) % 1 for n in range(1, 4 * 3 * 32 * 32 + 1)]


class Rude:
    def __reduce__(self):
        return os.mkdir, (os.environ["RUDE"],)


def test_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("RUDE", str(tmp_path / "made"))
    with (tmp_path / "model.pt").open("wb") as stream:
        pickle.dump(Rude(), stream)
    assert "not a grood-cert checkpoint" in refusal(tmp_path / "model.pt")
    torch.save({"format": "grood-cert checkpoint", "x": Rude()}, tmp_path / "model.pt")
    assert "not a grood-cert checkpoint" in refusal(tmp_path / "model.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content", [{"a": 1}, [1, 2], torch.zeros(3), {"format": "another"}, nn.Linear(1, 1).state_dict()]
)
def test_foreign_torch_files(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    assert "not a grood-cert checkpoint; expected a model.pt" in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", bytes(range(256)) * 20])
def test_foreign_bytes(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    assert "not a grood-cert checkpoint" in refusal(tmp_path / "model.pt")


def test_another_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    assert "not a grood-cert checkpoint" in refusal(tmp_path / "model.pt")


def test_another_format_version(saved):
    rewrite(saved, format_version=1)
    assert "grood-cert checkpoint of format 1; this version reads 2" in refusal(saved)
    rewrite(saved, format_version=torch.zeros(3, 3))
    assert "grood-cert checkpoint of format a Tensor; this version reads 2" in refusal(saved)


def test_nan_and_infinite_weights(saved):
    state = torch.load(saved, weights_only=True)["state_dict"]
    for value in (float("nan"), float("inf")):
        damaged = {key: tensor.clone() for key, tensor in state.items()}
        damaged["1.weight"][0, 0, 0, 0] = value
        rewrite(saved, state_dict=damaged)
        assert "weights or a gamma that are not finite" in refusal(saved)
    rewrite(saved, state_dict=state, gamma=float("nan"))
    assert "weights or a gamma that are not finite" in refusal(saved)


def changed(saved, section: str, **changes):
    return {**torch.load(saved, weights_only=True)[section], **changes}


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("state_dict", {"1.weight": torch.zeros(1)}, "size mismatch for 1.weight"),
        ("state_dict", {"extra": torch.zeros(1)}, "extra"),
        ("architecture", {"name": "vgg"}, "unknown network 'vgg'"),
        ("architecture", {"options": {"depth": 3}}, "does not take these options"),
        ("architecture", {"options": 3}, "TypeError"),
        ("architecture", {"shape": [1, 8]}, "damaged checkpoint"),
        ("architecture", {"mean": [0.1, 0.2]}, "normalisation has 2 channels"),
        ("architecture", {"std": [0.0]}, "one positive std"),
        ("architecture", {"classes": 4}, "size mismatch"),
        (
            "recipe",
            {"objective": {"lambda": 1}},
            "another version of grood-cert, which reads it (recipe: objective.lambda: unkn",
        ),
    ],
)
def test_contents_that_do_not_fit(saved, section, changes, message):
    rewrite(saved, **{section: changed(saved, section, **changes)})
    text = refusal(saved)
    assert message in text and text.startswith(f"{saved}: ")


@pytest.mark.parametrize("key", ["architecture", "state_dict", "gamma", "class_names", "recipe", "calibration"])
def test_missing_parts(saved, key):
    rewrite(saved, key)
    assert f"damaged checkpoint (KeyError: '{key}')" in refusal(saved)


def test_class_names_must_match_the_logits(saved):
    rewrite(saved, class_names=["zero", "one"])
    assert "2 class names for 3 logits" in refusal(saved)


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:99"])
def test_devices_that_are_not_there(saved, device):
    assert f"device '{device}' cannot be used here; use cpu" in refusal(saved, device=device)
    with pytest.raises(InputError):
        check_device(device)


def test_saving_where_nothing_can_be_saved(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        make().save(tmp_path / "file" / "model.pt")


# Networks of the user's own


def linear(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, classes)).double().eval()


def test_gamma_and_shape_are_numbers_whatever_they_were_given_as():
    detector = Detector(linear(), torch.tensor(-1.0), [1, 2, 2])
    assert (type(detector.gamma), detector.gamma, detector.shape) == (float, -1.0, (1, 2, 2))


def test_a_plain_module_is_a_detector():
    detector = Detector(linear(), -1.0, (1, 2, 2))
    assert (detector.name, detector.classes, detector.provenance) == ("Sequential", 3, None)
    images = torch.rand(5, 1, 2, 2)
    found, logit = detector.predict(images), detector.network(images.double())
    assert torch.equal(found.score, -torch.logsumexp(logit, 1)) and torch.equal(found.label, logit.argmax(1))
    assert torch.equal(found.accepted, found.score <= -1.0)
    with pytest.raises(InputError, match="came without a recipe"):
        detector.origin  # noqa: B018


def test_a_detector_without_provenance_is_saved_and_loaded(tmp_path):
    detector = dataclasses.replace(make(), provenance=None, class_names=())
    detector.save(tmp_path / "model.pt")
    loaded = load(str(tmp_path / "model.pt"))
    assert (loaded.provenance, loaded.class_names, loaded.name) == (None, (), "Classifier")
    images = torch.rand(5, 1, 8, 8)
    assert torch.equal(loaded.scores(images), detector.scores(images))


class Foreign(nn.Module):
    """A network that no architecture of the package builds: views, a hook, an activation of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.act, self.last = nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Linear(8, 3)
        self.act.register_forward_hook(lambda module, inputs, output: output.clamp(max=0.4))

    def forward(self, images):
        return self.last(self.act(self.first(2 * images - 1)).view(images.size(0), -1))


def test_a_network_of_ones_own_is_saved_as_a_graph_that_needs_no_code(tmp_path):
    images = torch.rand(99, 1, 4, 4)
    detector = Detector.calibrate(Foreign().eval(), images, mean=[0.5], std=[0.25], class_names=("a", "b", "c"))
    detector.save(tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert "graph" in content and "state_dict" not in content
    loaded = load(tmp_path / "model.pt")
    torch.testing.assert_close(loaded.scores(images), detector.scores(images), rtol=1e-12, atol=1e-12)
    assert (loaded.gamma, loaded.class_names, loaded.shape) == (detector.gamma, ("a", "b", "c"), (1, 4, 4))
    loaded.save(tmp_path / "again.pt")
    assert torch.equal(load(tmp_path / "again.pt").scores(images), loaded.scores(images))


def test_a_network_that_cannot_be_captured_is_not_saved(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 2)).double().eval()
    with pytest.raises(InputError, match="layer 1: layer_norm cannot be bounded"):
        Detector(network, 0.0, (1, 4, 4)).save(tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    detector = make()
    changed = copy.deepcopy(detector.network)
    changed.append(nn.Tanh().eval())
    wrong = copy.deepcopy(detector.network)
    wrong[-1].weight += torch.nan
    foreign = dataclasses.replace(detector.provenance, metrics={"accuracy": np.float64(0.5)})
    for changes, message in (
        ({"network": changed}, "what would be loaded again is not its network"),
        ({"network": wrong}, "cannot be saved, .* weights or a gamma that are not finite"),
        ({"gamma": math.inf}, "gamma is inf; expected a finite number"),
        ({"provenance": foreign}, "cannot be saved, because it could not be loaded again"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(detector, **changes).save(tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("network", "shape", "options", "message"),
    [
        (linear().train(), (1, 2, 2), {}, r"the network \(Sequential\) is in train mode; call network.eval"),
        (
            nn.Sequential(nn.Flatten(), nn.Sequential(nn.Dropout(), nn.Linear(4, 2)).train()),
            (1, 2, 2),
            {},
            "train mode",
        ),
        (linear().float(), (1, 2, 2), {}, "need a float64 network, got torch.float32; call network.double"),
        (nn.Flatten().eval(), (1, 2, 2), {}, "without parameters"),
        (linear(), (1, 2, 3), {}, r"does not take images of shape \(1, 2, 3\)"),
        (nn.Conv2d(1, 1, 1).double().eval(), (1, 2, 2), {}, r"logits of shape \(B, K\), got \(1, 1, 2, 2\)"),
        (linear(), (1, 2, 2), {"class_names": ("a",)}, "1 class names for 3 logits"),
        (linear(), (1, 2, 2), {"gamma": math.nan}, "gamma is nan; expected a finite number"),
        (linear(), (1, 2, 2), {"architecture": make().architecture}, r"images of shape \(1, 8, 8\), not \(1, 2, 2\)"),
    ],
)
def test_parts_that_make_no_detector(network, shape, options, message):
    with pytest.raises(InputError, match=message):
        Detector(network, **({"gamma": -1.0, "shape": shape} | options))


def test_calibration_takes_the_conformal_quantile():
    model, images = linear().float(), torch.rand(99, 1, 2, 2)
    detector = Detector.calibrate(model, images, class_names=("a", "b", "c"))
    assert detector.gamma == float(detector.scores(images).sort().values[94])  # ceil(0.95 * 100)-th smallest
    assert detector.shape == (1, 2, 2) and detector.class_names == ("a", "b", "c")
    assert model[1].weight.dtype == torch.float32 and model[1].weight.requires_grad  # a copy was changed
    assert not any(parameter.requires_grad for parameter in detector.network.parameters())
    assert Detector.calibrate(model, images, tpr=50).gamma == float(detector.scores(images).sort().values[49])


def test_calibration_puts_the_normalisation_in_front():
    model, images = linear(), torch.rand(30, 1, 2, 2).double()
    detector = Detector.calibrate(model, images, mean=[0.25], std=[0.5])
    torch.testing.assert_close(detector.network(images), model((images - 0.25) / 0.5))


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.rand(99, 1, 2, 2) * 255, {}, r"images: pixels from .* to 25\d.*; all must lie in \[0, 1\]"),
        (torch.zeros(99, 1, 2, 2, dtype=torch.uint8), {}, "type torch.uint8; divide them by 255"),
        (torch.full((99, 1, 2, 2), math.nan), {}, r"all must lie in \[0, 1\]"),
        (torch.rand(1, 2, 2), {}, r"shape \(N, C, H, W\), got \(1, 2, 2\); add the axis of the batch"),
        (torch.rand(0, 1, 2, 2), {}, "got none"),
        (np.zeros((99, 1, 2, 2)), {}, "expected a tensor, got ndarray"),
        (torch.rand(99, 1, 3, 3), {}, r"does not take images of shape \(1, 3, 3\)"),
        (torch.rand(18, 1, 2, 2), {}, "18 calibration scores cannot hold a 95 % quantile; use at least 19"),
        (torch.rand(99, 1, 2, 2), {"tpr": 0.95}, "percent: expected a whole number from 1 to 99, got 0.95"),
        (torch.rand(99, 1, 2, 2), {"mean": [0.5]}, "both mean and std"),
        (torch.rand(99, 1, 2, 2), {"mean": [0.5] * 3, "std": [0.5] * 3}, "3 channels, the images have 1"),
    ],
)
def test_calibration_refuses(images, options, message):
    with pytest.raises(InputError, match=message):
        Detector.calibrate(linear(), images, **options)


def test_a_model_in_train_mode_is_not_calibrated():
    with pytest.raises(InputError, match="train mode"):
        Detector.calibrate(linear().train(), torch.rand(99, 1, 2, 2))
