from __future__ import annotations

import dataclasses
import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from grood_cert import detector
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.data import experiment_of
from grood_cert.errors import InputError, RunError
from grood_cert.results.table import Table
from grood_cert.runs import vnnlib
from grood_cert.runs.vnnlib import Instance, Specification
from grood_cert.scores import MSP, energy


class Property:
    """An independent reader of the VNNLIB written: exact rational bounds of the box, one relation of one output."""

    def __init__(self, text):
        self.lower, self.upper, self.relations = {}, {}, []
        self.declared = set(re.findall(r"\(declare-const (\w+) Real\)", text))
        body = "".join(line for line in text.splitlines() if not line.startswith(";"))
        assert body.count("(") == body.count(")")
        for relation, name, value in re.findall(r"\(assert \((<=|>=) (\w+) (\S+?)\)\)", body):
            assert name in self.declared
            if name.startswith("X_"):
                (self.lower if relation == ">=" else self.upper)[int(name[2:])] = Fraction(value)
            else:
                self.relations.append((relation, int(name[2:]), Fraction(value)))
        assert body.count("assert") == len(self.lower) + len(self.upper) + len(self.relations)

    def violated(self, outputs):
        """Which rows of outputs, shape (N, outputs), satisfy the assertion."""
        ((relation, index, threshold),) = self.relations
        exact = [Fraction(value) for value in outputs[:, index].tolist()]
        return torch.tensor([value <= threshold if relation == "<=" else value >= threshold for value in exact])


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        layers[3].weight.mul_(6)
    return layers.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def bounded(network):
    return LirpaNetwork(network, (1, 2, 2), "crown")


def points_of(prop, number=4000):
    """Corners and interior points of the box of a property."""
    low = torch.tensor([float(prop.lower[i]) for i in range(4)]).double()
    high = torch.tensor([float(prop.upper[i]) for i in range(4)]).double()
    share = torch.rand(number, 4, generator=torch.Generator().manual_seed(0)).double()
    share[: number // 2] = share[: number // 2].round()
    return (low + share * (high - low)).reshape(-1, 1, 2, 2)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("kind", ["id", "ood"])
def test_where_the_property_is_unsatisfiable_the_score_is_on_the_right_side(network, bounded, kind, temperature):
    """Over thresholds and radii, so that properties of both truth values occur; single points obey it as well."""
    images = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(3)).double()
    truths = []
    for image in images:
        for eps in (0.02, 0.1, 0.3):
            for offset in (0.02, 0.2, 1.0):
                score = float(energy(network(image[None]), temperature))
                gamma = score + offset if kind == "id" else score - offset
                spec = vnnlib.specification(bounded, image, eps, gamma, kind, temperature)
                instance = Instance("a", "set", kind, 0, spec)
                prop = Property(vnnlib.property_text(instance, 1, 2, image, eps, gamma, "crown"))
                points = points_of(prop)
                logits = network(points)
                row = logits @ torch.tensor(spec.row).double()
                violated = prop.violated(torch.stack([torch.zeros_like(row), row], 1))
                scores = energy(logits, temperature)
                right = scores < gamma if kind == "id" else scores > gamma
                assert bool((right | violated).all())  # where the property holds not, S is on the right side
                truths.append(bool(violated.any()))
    assert any(truths) and not all(truths)


def test_the_id_row_is_a_point_of_the_simplex_and_tight():
    logits = torch.tensor([3.0, 1.0, -20.0, 2.5]).double()
    gamma = float(energy(logits)) + 0.25
    spec = vnnlib.id_specification(logits, gamma)
    assert sum(map(Fraction, spec.row)) == 1 and min(spec.row) >= 0
    assert all(float(np.float32(value)) == value for value in (*spec.row, spec.threshold))
    # At f(x) the tangent plane of logsumexp touches: p . f exceeds the threshold by the margin of S.
    slack = float(torch.tensor(spec.row).double() @ logits) - spec.threshold
    assert slack == pytest.approx(0.25, abs=1e-6)


def test_the_ood_row_is_exact_at_corners_of_the_logit_box():
    """At f = u, and wherever each logit is at an end, the chords equal the exponentials."""
    lower, upper = torch.tensor([-1.0, 0.0, 2.0]).double(), torch.tensor([0.5, 0.0, 2.5]).double()
    for corner in (lower, upper, torch.stack([lower[0], lower[1], upper[2]])):
        score = float(energy(corner))
        inside = vnnlib.ood_specification(lower, upper, score - 1e-5)
        outside = vnnlib.ood_specification(lower, upper, score + 1e-5)
        for spec, certified in ((inside, True), (outside, False)):
            value = sum(Fraction(c) * Fraction(z) for c, z in zip(spec.row, corner.tolist(), strict=True))
            assert (value < Fraction(spec.threshold)) == certified


def test_no_chord_without_an_interval():
    low, high = torch.tensor([0.0, math.nan]).double(), torch.tensor([1.0, 1.0]).double()
    with pytest.raises(RunError, match="no chord"):
        vnnlib.ood_specification(low, high, -1.0)
    with pytest.raises(RunError, match="no chord"):
        vnnlib.ood_specification(high + 1, high, -1.0)


def test_the_box_contains_the_ball_and_survives_any_reader():
    """Exact rational arithmetic: x +- eps lies inside, in [0, 1], and float32 reads the decimals without change."""
    image = torch.tensor([0.0, 1.0, 0.1, 1 / 3, 127 / 255, 0.9999999]).double()
    eps = 0.0123456789
    for pixel, low, high in zip(image.tolist(), *vnnlib.box(image, eps), strict=True):
        for end in (low, high):
            text = vnnlib.decimal(end)
            assert "e" not in text and Fraction(text) == Fraction(end) == Fraction(float(np.float32(text)))
        assert 0 <= low <= high <= 1
        assert Fraction(low) <= max(Fraction(pixel) - Fraction(eps), 0)
        assert Fraction(high) >= min(Fraction(pixel) + Fraction(eps), 1)
        assert low >= max(pixel - eps, 0) - 1e-7 and high <= min(pixel + eps, 1) + 1e-7


def test_single_precision_neighbours():
    for value in (0.1, -0.1, 0.0, 1.0, 1e-50, -1e-50, 123456.789):
        below, above = vnnlib.single_below(value), vnnlib.single_above(value)
        assert below <= value <= above
        assert float(np.float32(below)) == below and float(np.float32(above)) == above
        assert np.nextafter(np.float32(below), np.float32(math.inf)) >= above


@pytest.fixture(scope="module")
def undecided(model, rows_file):
    """A detector, its sets, and an eps at which something is left open."""
    loaded, read = detector.load(model), Table.read(rows_file)
    experiment = experiment_of(loaded.origin.recipe)
    gap = read["radius_attack"] - np.maximum(read["radius_certified"], 1e-3)
    at = int(np.argmax(np.where(read["status"] == "misdecided", -1, gap)))
    eps = float((max(read["radius_certified"][at], 1e-3) + read["radius_attack"][at]) / 2)
    return loaded, read, [experiment.test, *experiment.ood], eps


def test_undecided_rows(undecided):
    _, read, _, eps = undecided
    positions = vnnlib.undecided(read, eps)
    chosen = np.zeros(len(read), bool)
    chosen[positions] = True
    for position in range(len(read)):
        decided = read["radius_certified"][position] >= eps or read["radius_attack"][position] <= eps
        assert chosen[position] == (read["status"][position] != "misdecided" and not decided)
    assert vnnlib.undecided(read, eps, 1) == positions[:1]
    with pytest.raises(InputError, match="no sample is undecided"):
        vnnlib.undecided(read, 1e-9)
    with pytest.raises(InputError, match="at most 1"):
        vnnlib.undecided(read, 2.0)
    with pytest.raises(InputError, match="boxes only"):
        vnnlib.undecided(dataclasses.replace(read, manifest={**read.manifest, "norm": "l2"}), eps)


def test_export_refuses_what_a_verifier_would_see_otherwise(network, undecided, model, tmp_path):
    loaded, read, sets, eps = undecided
    awkward = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        awkward[1].weight.fill_(0.1)
    with pytest.raises(InputError, match="float32 cannot hold"):
        vnnlib._with_rows(awkward, [[0.5, 0.5]])
    with pytest.raises(InputError, match="not given"):
        vnnlib.export(loaded, model, read, [], None, eps, tmp_path)
    with pytest.raises(InputError, match="properties are of the energy only; the detector's score is msp"):
        vnnlib.export(dataclasses.replace(loaded, score=MSP()), model, read, sets, None, eps, tmp_path)
    other = dataclasses.replace(read, manifest={**read.manifest, "gamma": loaded.gamma + 1})
    with pytest.raises(InputError, match="the rows are not of"):
        vnnlib.export(loaded, model, other, sets, None, eps, tmp_path)


def test_the_exported_network_is_the_network_followed_by_the_rows(undecided, model, tmp_path):
    """onnx's own reference evaluator runs the file; the properties of the folder refer to its outputs."""
    reference = pytest.importorskip("onnx.reference", reason="needs the optional package onnx")
    loaded, read, sets, eps = undecided
    bounded = LirpaNetwork(loaded.network, loaded.shape, "crown")
    instances = vnnlib.export(loaded, model, read, sets, bounded, eps, tmp_path, limit=3)
    session = reference.ReferenceEvaluator(str(tmp_path / "model.onnx"))
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    table = torch.tensor([instance.specification.row for instance in instances]).double()
    wanted = loaded.network(images.double()) @ table.T
    for image, row in zip(images, wanted, strict=True):
        (got,) = session.run(["Y"], {"X": image[None].numpy()})
        np.testing.assert_allclose(got[0], row.numpy(), rtol=1e-4, atol=1e-4)
    lines = (tmp_path / "instances.csv").read_text().splitlines()
    assert lines == [f"model.onnx,{instance.name}.vnnlib,300" for instance in instances]
    for output, instance in enumerate(instances):
        prop = Property((tmp_path / f"{instance.name}.vnnlib").read_text())
        assert len(prop.lower) == len(prop.upper) == 64
        assert prop.relations[0][1] == output and f"Y_{len(instances) - 1}" in prop.declared
    with pytest.raises(InputError, match="exists already"):
        vnnlib.export(loaded, model, read, sets, bounded, eps, tmp_path, limit=3)
    assert Specification(**json.loads((tmp_path / "instances.json").read_text())["instances"][0]["specification"])
