"""The checker of proofs that travel, against exact rationals, attacks and tampering."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from grood_cert import attacks
from grood_cert.ball import NORMS, Ball
from grood_cert.certification import checker
from grood_cert.certification.proofs import Prover, stored
from grood_cert.errors import InputError
from grood_cert.networks.activations import Tanh
from grood_cert.networks.capture import capture
from grood_cert.networks.graph import Graph, Node
from grood_cert.networks.operations import Permute, Reshape
from grood_cert.runs.proofs import packed
from grood_cert.scores import ENERGY, Energy, MaxLogit

SOURCE = Path(checker.__file__)


class Residual(nn.Module):
    """Everything a stored network may hold."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False)
        self.pool = nn.AvgPool2d(2, stride=1, padding=1)
        self.last = nn.Linear(4 * 9, 3)

    def forward(self, x):
        x = self.norm(self.first(x - 0.4))
        x = x + nn.functional.leaky_relu(self.second(x.relu()), 0.25)
        return self.last(self.pool(x).flatten(1))


@functools.cache
def network_of(kind):
    """A small random network in float64, its graph, and the shape of its images; all read it, none changes it."""
    torch.manual_seed(hash_of(kind))
    if kind == "residual":
        network, shape = Residual(), (2, 4, 4)
        network.norm.running_mean.normal_()
        network.norm.running_var.uniform_(0.5, 2)
    elif kind == "deep":
        layers = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5), nn.LeakyReLU(0.1)]
        network, shape = nn.Sequential(nn.Flatten(), *layers, nn.Linear(5, 3)), (1, 2, 2)
    else:
        network, shape = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (1, 2, 2)
    for part in network.parameters():
        part.data *= 2.5
    network = network.double().eval().requires_grad_(False)
    return network, capture(network, shape), shape


def hash_of(kind):
    return sum(map(ord, kind))


def as_read(graph):
    return checker.unpacked(packed(stored(graph)))


def score_of(network, points, temperature=1.0):
    return Energy(temperature).value(network(points))


def claim_of(decision, norm, eps, gamma=0.0, temperature=1.0):
    return {"decision": decision, "norm": norm, "eps": eps, "gamma": gamma, "temperature": temperature}


def bounds(read, claim, x, row, slopes):
    with np.errstate(all="ignore"):
        return checker.bound(read, claim, x.numpy(), row, slopes)


# The file itself


def test_it_is_short_and_imports_numpy_and_the_standard_library_alone():
    text = SOURCE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    found = set()
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, ast.ImportFrom) or (node.level == 0 and node.module)
        found |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        found |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    assert found - {"numpy"} <= sys.stdlib_module_names and "numpy" in found
    assert not {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)} & {
        "__import__",
        "exec",
        "eval",
    }


@pytest.fixture(scope="module")
def proof_files(tmp_path_factory):
    """Proofs of both decisions on a small network, with the network, images, scores and attack radii."""
    network, graph, shape = network_of("plain")
    folder = tmp_path_factory.mktemp("proofs")
    images = torch.rand(24, *shape, generator=torch.Generator().manual_seed(5)).double()
    scores = score_of(network, images)
    gamma = float(scores.median()) + 1e-3
    prover = Prover(graph, ENERGY, gamma)
    content = packed(prover.arrays)
    (folder / "network.npz").write_bytes(content)
    found = {}
    for decision, number in (("id", int(scores.argmin())), ("ood", int(scores.argmax()))):
        image = images[number]
        radius = attacks.minimum_norm(
            network, image[None], gamma, "linf", torch.Generator().manual_seed(0), attacks.AttackEffort.preset("fast")
        ).radius[0]
        proof = prover.prove(image, decision == "id", "linf", float(radius))
        claim = {**proof.claim, "network": hashlib.sha256(content).hexdigest(), "name": "image"}
        save(folder / f"{decision}.npz", claim, proof.arrays)
        found[decision] = (image, float(radius))
    return folder, network, gamma, found


def save(path, claim, arrays):
    path.write_bytes(packed(arrays | {"text": np.array(json.dumps(claim))}))


def read(path):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(str(arrays.pop("text"))), arrays


def check(path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["checker.py", str(path)])
    code = checker.main()
    return code, "".join(capsys.readouterr())


BLOCKED = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        allowed = {allowed!r}
        if name.split(".")[0] in ("torch", "scipy", "grood_cert") and name not in allowed:
            raise ImportError(f"blocked: {{name}}")
sys.meta_path.insert(0, Block())
sys.argv = ["checker", {proof!r}]
{run}
"""


def test_it_runs_as_a_module_and_as_a_file_alone_without_torch_and_without_this_package(proof_files, tmp_path):
    folder, *_ = proof_files
    name = "grood_cert.certification.checker"
    allowed = ("grood_cert", "grood_cert.certification", name)
    alone = shutil.copy(SOURCE, tmp_path / "checker.py")
    for names, run in (
        (allowed, f"runpy.run_module({name!r}, run_name='__main__')"),
        ((), f"runpy.run_path({str(alone)!r}, run_name='__main__')"),
    ):
        script = BLOCKED.format(allowed=names, proof=str(folder / "ood.npz"), run=run)
        found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert found.returncode == 0 and found.stdout.startswith("proved: S > "), found.stderr


# What it proves is true


@pytest.mark.parametrize("kind", ["plain", "deep", "residual"])
@pytest.mark.parametrize("norm", NORMS)
def test_no_point_of_the_ball_crosses_a_bound_whatever_rows_and_slopes_are_claimed(kind, norm):
    network, graph, shape = network_of(kind)
    read, random = as_read(graph), np.random.default_rng(hash_of(norm))
    neurons = sum(graph.nodes[number].size for number in graph.nonlinear)
    x = torch.from_numpy(random.random(shape))
    eps, temperature = {"linf": 0.15, "l2": 0.4, "l1": 0.7}[norm], 1.5
    ball = Ball(x[None].expand(400, *shape), eps, norm)
    points = ball.project(
        x + eps * torch.from_numpy(random.choice([-1.0, 1.0], (400, *shape)) * random.random((400, 1, 1, 1)) ** 0.2)
    )
    one = torch.zeros(400, *shape, dtype=torch.float64)
    one.flatten(1)[torch.arange(400), torch.from_numpy(random.integers(0, x.numel(), 400))] = eps
    points = torch.cat([points, ball.project(x + one), ball.project(x - one)])
    values = score_of(network, points, temperature)
    for trial in range(2):
        row = random.random(3) if trial else np.full(3, 1 / 3)
        slopes = random.integers(0, 256, (7, neurons)).astype(np.uint8)
        upper = bounds(read, claim_of("id", norm, eps, 0, temperature), x, row, slopes)
        lower = bounds(read, claim_of("ood", norm, eps, 0, temperature), x, row - 0.2 * trial, slopes)
        assert lower <= values.min() and values.max() <= upper
        assert np.isfinite(upper)


@pytest.mark.parametrize("kind", ["plain", "deep", "residual"])
def test_values_and_rows_are_those_of_the_network(kind):
    network, graph, shape = network_of(kind)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1)).double()
    relaxed = checker.Relaxation(as_read(graph), x.numpy(), "linf", 1e-9)
    low, high = relaxed.ends[-1]
    expected = network(x[None])[0].numpy()
    assert ((low <= expected) & (expected <= high)).all() and (high - low).max() < 1e-6
    found = relaxed.upper(len(relaxed.ends) - 1, np.eye(3))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (found >= expected).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_network_has_its_true_extremes(norm):
    """Against what a linear program or the dual norm gives: the ball lies in the box, or the box decides."""
    weight = torch.tensor([[3.0, -4.0]]).double()
    layer = {"reads": [0], "stride": [1, 1], "pad": [0, 0], "size": [1, 1], "out": [1, 1]}
    read = {"text": [{"reads": []}, layer], "weight1": weight.numpy()[None, :, :, None, None], "bias1": np.zeros(1)}
    none = np.zeros((3, 0), np.uint8)
    eps = 0.25
    for x, expected in (
        ([0.5, 0.5], {"linf": 7 * eps, "l2": 5 * eps, "l1": 4 * eps}),
        ([0.5, 0.95], {"linf": 3 * eps + 4 * 0.05, "l2": 3 * (eps**2 - 0.05**2) ** 0.5 + 0.2, "l1": 0.2 + 3 * 0.2}),
    ):
        center = torch.tensor(x).double().reshape(1, 1, 2)
        score = -float(weight[0] @ center.flatten())  # S = -f
        upper = bounds(read, claim_of("id", norm, eps), center, np.array([1.0]), none)
        assert expected[norm] <= upper - score <= expected[norm] * 1.01


def test_the_extremes_of_one_hidden_layer_in_one_dimension_are_enclosed_and_met():
    """Between break points S of a line is smooth: a fine grid and all break points are the truth."""
    torch.manual_seed(3)
    network = (
        nn.Sequential(nn.Flatten(), nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval().requires_grad_(False)
    )
    graph = capture(network, (1, 1, 1))
    for center, eps in ((0.4, 0.05),):
        x = torch.full((1, 1, 1), center).double()
        breaks = (-network[1].bias / network[1].weight[:, 0]).clamp(center - eps, center + eps)
        points = torch.cat([torch.linspace(center - eps, center + eps, 2001).double(), breaks]).reshape(-1, 1, 1, 1)
        values = score_of(network, points)
        for inside, extreme in ((True, float(values.max())), (False, float(values.min()))):
            gap = 0.02 if inside else -0.02
            proof = Prover(graph, ENERGY, extreme + gap).prove(x, inside, "linf", eps)
            assert proof is not None and proof.claim["eps"] > 0.5 * eps


@pytest.mark.parametrize("leak", [0.0, 0.3])
@pytest.mark.parametrize("shift", [0.3, 0.5, 0.6])
def test_one_neuron_is_met_at_both_ends(leak, shift):
    """Chords meet the function at the ends of an interval, lines below at 0 or at an end."""
    layer = {"stride": [1, 1], "pad": [0, 0], "size": [1, 1], "out": [1, 1]}
    layers = [{"reads": []}, layer | {"reads": [0]}, {"reads": [1], "leak": leak}]
    read = {"text": layers, "weight1": np.ones((1, 1, 1, 1, 1)), "bias1": np.array([-shift])}
    relaxed = checker.Relaxation(read, np.array([0.5]), "linf", 0.25)
    low, high = 0.25 - shift, 0.75 - shift
    largest, smallest = high, leak * low
    assert largest <= relaxed.upper(2, np.ones((1, 1)))[0] <= largest + 1e-9
    lowest = -relaxed.upper(2, -np.ones((1, 1)), np.zeros((1, 1)))[0]
    assert smallest - 1e-9 <= lowest <= smallest
    for slope in (1.0, 3.0):  # beyond 1 it counts as 1
        assert low - 1e-9 <= -relaxed.upper(2, -np.ones((1, 1)), np.full((1, 1), slope))[0] <= smallest


# Rounding


def exact_upper(read, relaxed, node, row, slopes):
    """The bound of one row by the checker's lines, in exact rationals; linf."""
    pending, total = {node: [Fraction(v) for v in row]}, Fraction(0)
    for number in range(node, 0, -1):
        row = pending.pop(number)
        (source,) = read["text"][number]["reads"]
        if number in relaxed.lines:
            chord, constant, _, part = relaxed.lines[number]
            moved = []
            for a, k, c, share in zip(row, chord, constant, slopes[part], strict=True):
                low = Fraction(share) if c > 0 else Fraction(k)
                moved.append(a * (Fraction(k) if a > 0 else low))
                total += a * Fraction(c) if a > 0 else 0
        else:
            weight, bias = read[f"weight{number}"][0, :, :, 0, 0], read[f"bias{number}"]
            total += sum(a * Fraction(b) for a, b in zip(row, bias, strict=True))
            moved = [sum(a * Fraction(w) for a, w in zip(row, column, strict=True)) for column in weight.T]
        pending[source] = moved
    eps = Fraction(relaxed.eps)
    for a, x in zip(pending[0], relaxed.x, strict=True):
        low, high = max(Fraction(x) - eps, Fraction(0)), min(Fraction(x) + eps, Fraction(1))
        total += max(a * low, a * high)
    return total


@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-160])
def test_bounds_lie_outside_exact_rational_ones_of_the_same_lines(scale):
    """Also where what is added is 1e15 times what is left, and where products underflow."""
    random = np.random.default_rng(0)
    for _ in range(2):
        read = as_read(network_of("plain")[1])
        read["bias1"] = read["bias1"] + scale * random.normal(size=8)
        read["weight3"] = random.normal(size=(1, 3, 8, 1, 1)) * max(scale, 1) ** 0.5
        x = random.random(4)
        relaxed = checker.Relaxation(read, x, "linf", 0.1)
        slopes = random.integers(0, 2, (3, 8)).astype(float)
        rows = random.normal(size=(3, 3)) * (1e-160 if scale < 1 else 1)
        found = relaxed.upper(len(relaxed.ends) - 1, rows, slopes)
        for value, row, share in zip(found, rows, slopes, strict=True):
            assert Fraction(float(value)) >= exact_upper(read, relaxed, len(relaxed.ends) - 1, row, share)


def test_what_cancels_is_not_proved():
    """The float64 evaluation of (x + 1e16) - 1e16 is off by up to 1: bounds hold for it and for x."""
    network = (
        nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double().eval().requires_grad_(False)
    )
    for layer, bias in ((network[1], 1e16), (network[3], -1e16)):
        layer.weight.fill_(1.0)
        layer.bias.fill_(bias)
    x = torch.full((1, 1, 1), 0.8).double()
    exact, evaluated = -0.8, float(score_of(network, x[None])[0])
    assert abs(exact - evaluated) > 0.1  # naive arithmetic is wrong here
    layer = {"stride": [1, 1], "pad": [0, 0], "size": [1, 1], "out": [1, 1]}
    layers = [{"reads": []}, layer | {"reads": [0]}, {"reads": [1], "leak": 0.0}, layer | {"reads": [2]}]
    one, slopes = np.ones((1, 1, 1, 1, 1)), np.full((3, 1), 255, np.uint8)
    read = {"text": layers, "weight1": one, "weight3": one, "bias1": np.array([1e16]), "bias3": np.array([-1e16])}
    upper = bounds(read, claim_of("id", "linf", 1e-3), x, np.ones(1), slopes)
    lower = bounds(read, claim_of("ood", "linf", 1e-3), x, np.ones(1), slopes)
    assert upper >= max(exact, evaluated) and lower <= min(exact, evaluated)


def test_what_is_not_finite_is_not_proved():
    _, graph, shape = network_of("plain")
    read, x = as_read(graph), torch.full(shape, 0.5).double()
    slopes = np.zeros((7, 8), np.uint8)
    for changed in (np.nan, np.inf, 1e308):
        spoiled = {**read, "weight1": np.full_like(read["weight1"], changed)}
        for decision in ("id", "ood"):
            value = bounds(spoiled, claim_of(decision, "linf", 0.1), x, np.ones(3), slopes)
            assert not abs(value) < np.inf
    assert np.isnan(bounds(read, claim_of("id", "linf", 0.1), x, np.zeros(3), slopes))
    assert np.isnan(bounds(read, claim_of("ood", "linf", 0.1), x, np.full(3, np.nan), slopes))


# Tampering


@pytest.mark.parametrize("decision", ["id", "ood"])
def test_a_proof_is_accepted_and_its_radius_lies_below_the_attack(proof_files, decision, capsys, monkeypatch):
    folder, _, gamma, found = proof_files
    code, said = check(folder / f"{decision}.npz", capsys, monkeypatch)
    assert code == 0 and said.startswith(f"proved: S {'<' if decision == 'id' else '>'} {gamma}")
    eps, radius = read(folder / f"{decision}.npz")[0]["eps"], found[decision][1]
    assert 0.5 * radius < eps < radius


@pytest.mark.parametrize("decision", ["id", "ood"])
def test_a_bound_on_gamma_proves_nothing(proof_files, decision, capsys, monkeypatch):
    folder, *_ = proof_files
    claim, arrays = read(folder / f"{decision}.npz")
    _, said = check(folder / f"{decision}.npz", capsys, monkeypatch)
    value = float(said.split("= ")[1].split()[0])
    for gamma, code in ((value, 1), (np.nextafter(value, np.inf if decision == "id" else -np.inf), 0)):
        save(folder / "equal.npz", claim | {"gamma": gamma}, arrays)
        assert check(folder / "equal.npz", capsys, monkeypatch)[0] == code


@pytest.mark.parametrize("decision", ["id", "ood"])
def test_false_claims_are_not_proved(proof_files, decision, capsys, monkeypatch):
    folder, network, _, found = proof_files
    claim, arrays = read(folder / f"{decision}.npz")
    image, radius = found[decision]
    other = "ood" if decision == "id" else "id"
    beyond = float(score_of(network, image[None])[0]) + (-1e-9 if decision == "id" else 1e-9)
    for changes in ({"eps": radius * 1.0001}, {"decision": other}, {"gamma": beyond}):
        save(folder / "false.npz", claim | changes, arrays)
        code, said = check(folder / "false.npz", capsys, monkeypatch)
        assert code in (1, 2) and "NOT proved" in said if "decision" not in changes else code in (1, 2), said
    for changes in ({"x": found[other][0].numpy()}, {"row": np.full(3, np.nan)}):  # of the other decision; no number
        save(folder / "false.npz", claim, arrays | changes)
        assert check(folder / "false.npz", capsys, monkeypatch)[0] == 1


@pytest.mark.parametrize("decision", ["id", "ood"])
def test_what_is_changed_at_random_is_refused_or_true(proof_files, decision, capsys, monkeypatch):
    """What is accepted after a change speaks of the image in the file: no point of its ball contradicts it."""
    folder, network, gamma, _ = proof_files
    random, accepted = np.random.default_rng(1), 0
    for trial in range(30):
        claim, arrays = read(folder / f"{decision}.npz")
        if trial % 3 == 0:
            arrays["slopes"] = random.integers(0, 256, arrays["slopes"].shape).astype(np.uint8)
        elif trial % 3 == 1:
            arrays["x"] = np.clip(arrays["x"] + 0.05 * random.normal(size=arrays["x"].shape), 0, 1)
        else:
            arrays["row"] = arrays["row"] * random.normal(1, 0.5, arrays["row"].shape)
        claim["eps"] *= random.uniform(0.5, 1.5)
        save(folder / "changed.npz", claim, arrays)
        code, _ = check(folder / "changed.npz", capsys, monkeypatch)
        if code == 0:
            accepted += 1
            x = torch.from_numpy(arrays["x"]).double()
            ball = Ball(x[None].expand(200, *x.shape), claim["eps"], "linf")
            ends = torch.from_numpy(random.random((200, *x.shape))).round()
            values = score_of(network, torch.where(ends > 0, ball.upper, ball.lower))
            assert bool((values < gamma).all() if decision == "id" else (values > gamma).all())
        assert code in (0, 1)
    assert accepted > 3


ARRAYS = ("slopes above 1", "slopes of another number", "no slopes", "pixels", "another shape", "a row too long")


def spoil(claim, arrays, what):
    slopes = arrays["slopes"]
    changes = {
        "slopes above 1": {"slopes": slopes.astype(float)},
        "slopes of another number": {"slopes": slopes[:, :-1]},
        "no slopes": {"slopes": slopes[:0]},
        "pixels": {"x": arrays["x"] + 2},
        "another shape": {"x": arrays["x"][..., :-1]},
        "a row too long": {"row": np.append(arrays["row"], 1.0)},
    }
    values = {
        "eps": [0, -1, 1e9, float("nan"), "0.1"],
        "gamma": [float("inf"), None],
        "temperature": [0, -1],
        "norm": ["l3", None],
        "decision": ["both"],
        "network": ["0" * 64, "a\n\x1b[2J"],
    }
    if what in ARRAYS:
        return [(claim, arrays | changes[what])]
    return [(claim | {what: value}, arrays) for value in values[what]]


@pytest.mark.parametrize("what", [*ARRAYS, "eps", "gamma", "temperature", "norm", "decision", "network"])
def test_what_is_no_proof_is_refused_in_one_line(proof_files, what, capsys, monkeypatch):
    folder, *_ = proof_files
    for claim, arrays in spoil(*read(folder / "ood.npz"), what):
        save(folder / "spoiled.npz", claim, arrays)
        code, said = check(folder / "spoiled.npz", capsys, monkeypatch)
        assert code == 2 and said.startswith("no proof (") and len(said.splitlines()) == 1


def test_another_network_and_other_files_are_refused(proof_files, tmp_path, capsys, monkeypatch):
    folder, *_ = proof_files
    shutil.copy(folder / "ood.npz", tmp_path)
    assert check(tmp_path / "ood.npz", capsys, monkeypatch)[0] == 2  # no network.npz
    arrays = dict(np.load(folder / "network.npz"))
    (tmp_path / "network.npz").write_bytes(packed(arrays | {"bias1": arrays["bias1"] + 1e-6}))
    assert check(tmp_path / "ood.npz", capsys, monkeypatch)[0] == 2
    for name, content in (("text.npz", b"no archive"), ("none.npz", b""), ("pickle.npz", b"\x80\x04N.")):
        (tmp_path / name).write_bytes(content)
        assert check(tmp_path / name, capsys, monkeypatch)[0] == 2
    np.savez(tmp_path / "object.npz", text=np.array([{"a": 1}], dtype=object))
    assert check(tmp_path / "object.npz", capsys, monkeypatch)[0] == 2
    np.savez_compressed(tmp_path / "bomb.npz", text=np.array("{}"), x=np.zeros(2**10))
    monkeypatch.setattr(checker, "LARGEST", 2**12)
    code, said = check(tmp_path / "bomb.npz", capsys, monkeypatch)
    assert code == 2 and "too large" in said


@pytest.mark.parametrize("reads", [[-1], [2], [9], [0.5]])
def test_a_layer_reads_earlier_ones_alone(reads):
    read = as_read(network_of("plain")[1])
    read["text"][2]["reads"] = reads
    with pytest.raises(ValueError):
        checker.Relaxation(read, np.full(4, 0.5), "linf", 0.1)


@pytest.mark.parametrize(
    ("operation", "score", "reason"),
    [
        (Tanh(), ENERGY, "layer odd (Tanh) cannot be stored in a proof"),
        (Permute((1, 0, 2)), ENERGY, "layer odd (Permute) cannot be stored in a proof"),
        (Reshape((1, 2, 2), (4,)), MaxLogit(), "proofs are stored of the energy, not of the score max-logit"),
    ],
)
def test_what_the_checker_does_not_know_is_named(operation, score, reason):
    graph = Graph((Node(None, (), (1, 2, 2), "image"), Node(operation, (0,), (4,), "odd")))
    with pytest.raises(InputError) as error:
        Prover(graph, score, 0.0)
    assert str(error.value) == reason
