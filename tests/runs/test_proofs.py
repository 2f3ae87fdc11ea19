"""Proofs that a run leaves, in files."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from grood_cert.certification import checker
from grood_cert.certification.settings import Settings
from grood_cert.data import ImageSet
from grood_cert.detector import Detector
from grood_cert.errors import InputError
from grood_cert.runs import certify as certification
from grood_cert.runs.merge import merge
from grood_cert.runs.shards import Shard
from grood_cert.scores import MaxLogit

SETTINGS = Settings(eps=(0.02,), effort="fast", engine="native", batch_size=3)


@pytest.fixture(scope="module")
def sets():
    generator = torch.Generator().manual_seed(0)
    return [
        ImageSet(name, kind, images, torch.zeros(len(images)).long(), ("0",))
        for name, kind, images in (
            ("in/side:1", "id", torch.rand(5, 1, 2, 2, generator=generator)),
            ("out", "ood", torch.rand(5, 1, 2, 2, generator=generator) ** 8),
        )
    ]


def detector_of(*layers, score=None):
    torch.manual_seed(1)
    network = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        images = torch.rand(64, 1, 2, 2).double()
    chosen = {"score": score} if score else {}
    return Detector.calibrate(network, images, tpr=60, **chosen)


@pytest.fixture(scope="module")
def detector():
    return detector_of(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture(scope="module")
def folder(detector, sets, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    certification.run(detector, None, sets, SETTINGS, out, save_proofs=3)
    return out


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "proofs").iterdir()}


def expected(folder):
    """Names of proofs by the rows: the first three of each set, where there is a radius."""
    with (folder / "rows.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    places = {"in/side:1": "0-in-side-1", "out": "1-out"}
    return {
        f"{places[row['set']]}-{row['index']}.npz": row
        for row in rows
        if int(row["index"]) < 3 and float(row["radius_certified"]) > 0
    }


def test_the_first_samples_of_each_set_have_proofs_that_hold_and_the_manifest_counts_them(folder, monkeypatch, capsys):
    wanted = expected(folder)
    assert set(files(folder)) == {*wanted, "network.npz"} and len(wanted) > 2
    manifest = json.loads((folder / "rows.json").read_text())
    assert manifest["proofs"] == len(wanted) and manifest["save_proofs"]["folder"] == "proofs"
    for name, row in wanted.items():
        monkeypatch.setattr(sys, "argv", ["checker.py", str(folder / "proofs" / name)])
        assert checker.main() == 0
        assert f"around image {row['index']} of {row['set']}" in capsys.readouterr().out
        with np.load(folder / "proofs" / name) as file:
            claim = json.loads(str(file["text"]))
        assert claim["gamma"] == manifest["gamma"] and claim["network"] == manifest["save_proofs"]["network_sha256"]
        radius = float(row["radius_certified"])
        assert 0.9 * radius < claim["eps"] <= radius <= float(row["radius_attack"])


def test_shards_leave_the_same_proofs_and_their_counts_add_up(detector, sets, folder, tmp_path):
    for index in range(2):
        certification.run(detector, None, sets, SETTINGS, tmp_path, save_proofs=3, shard=Shard(index, 2))
    merged = merge([Shard(index, 2).file(tmp_path / "rows.csv") for index in range(2)], tmp_path / "rows.csv")
    assert files(tmp_path) == files(folder)
    assert merged["proofs"] == len(expected(folder))


def test_a_run_that_was_killed_ends_with_the_same_proofs(detector, sets, folder, tmp_path, monkeypatch):
    whole = certification.certify
    monkeypatch.setattr(
        certification, "certify", lambda c, batch, *rest: whole(c, batch, *rest) if batch.number < 2 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        certification.run(detector, None, sets, SETTINGS, tmp_path, save_proofs=3)
    monkeypatch.setattr(certification, "certify", whole)
    with pytest.raises(InputError, match="another run"):
        certification.run(detector, None, sets, SETTINGS, tmp_path)
    certification.run(detector, None, sets, SETTINGS, tmp_path, save_proofs=3)
    assert files(tmp_path) == files(folder)
    assert json.loads((tmp_path / "rows.json").read_text())["proofs"] == len(expected(folder))


@pytest.mark.parametrize(
    ("layers", "score", "reason"),
    [
        (
            (nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
            None,
            "layer 2 (Tanh) cannot be stored in a proof",
        ),
        ((nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 2)), None, "layer 0 (MaxPool) cannot be stored in a proof"),
        ((nn.Flatten(), nn.Linear(4, 2)), MaxLogit(), "proofs are stored of the energy, not of the score max-logit"),
    ],
)
def test_what_cannot_be_stored_is_said_and_the_run_goes_on(layers, score, reason, sets, tmp_path):
    said = []

    class Reporter(certification.SILENT.__class__):
        def say(self, line):
            said.append(line)

    found = certification.run(
        detector_of(*layers, score=score), None, sets, SETTINGS, tmp_path, limit=1, save_proofs=2, reporter=Reporter()
    )
    assert f"no proofs are saved: {reason}" in said and len(found) == 2
    assert (
        found.manifest["save_proofs"] == {"samples_of_each_set": 2, "left_out": reason}
        and found.manifest["proofs"] == 0
    )
    assert not (tmp_path / "proofs").exists()


def test_a_proof_that_fails_costs_nothing_else(detector, sets, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("too\nlarge")

    monkeypatch.setattr("grood_cert.certification.proofs.optimise", fail)
    found = certification.run(detector, None, sets, SETTINGS, tmp_path, limit=1, save_proofs=1)
    assert len(found) == 2 and found.manifest["proofs"] == 0
    assert list(found.manifest["failures"]) == ["no proof is saved: RuntimeError: too large"]


def test_a_negative_number_is_refused(detector, sets, tmp_path):
    with pytest.raises(InputError, match="--save-proofs must be 0"):
        certification.run(detector, None, sets, SETTINGS, tmp_path, save_proofs=-1)
    assert not list(tmp_path.iterdir())
