"""Proofs that a run leaves, in files."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from grood_cert.certification import cascade, checker
from grood_cert.certification.settings import Settings
from grood_cert.data import ImageSet
from grood_cert.detector import Detector
from grood_cert.errors import InputError
from grood_cert.networks.capture import capture
from grood_cert.runs import certify as certification
from grood_cert.runs.merge import merge
from grood_cert.runs.shards import Shard
from grood_cert.system.reporting import Silent

SETTINGS = Settings(eps=(0.02,), effort="fast", engine="native", batch_size=2)


@pytest.fixture(scope="module")
def sets():
    generator = torch.Generator().manual_seed(0)
    return [
        ImageSet(name, kind, images, torch.zeros(len(images)).long(), ("0",))
        for name, kind, images in (
            ("in/side:1", "id", torch.rand(4, 1, 2, 2, generator=generator)),
            ("out", "ood", torch.rand(4, 1, 2, 2, generator=generator) ** 8),
        )
    ]


@pytest.fixture(scope="module", autouse=True)
def captured_once():
    """To capture a network costs a second."""
    graphs = {}

    def of(network, shape):
        if network not in graphs:
            graphs[network] = capture(network, shape)
        return graphs[network]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascade, "capture", of)
        yield


def detector_of(*layers):
    torch.manual_seed(1)
    for layer in layers:  # they were made before, with whatever random numbers were next
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    network = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        images = torch.rand(64, 1, 2, 2).double()
    return Detector.calibrate(network, images, tpr=60)


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
        assert f"around 'image {row['index']} of {row['set']}'" in capsys.readouterr().out
        with np.load(folder / "proofs" / name) as file:
            claim = json.loads(str(file["text"]))
        assert claim["gamma"] == manifest["gamma"] and claim["network"] == manifest["save_proofs"]["network_sha256"]
        radius = float(row["radius_certified"])
        assert 0.9 * radius < claim["eps"] <= radius <= float(row["radius_attack"])


def test_shards_one_of_them_killed_leave_the_same_proofs_and_their_counts_add_up(
    detector, sets, folder, tmp_path, monkeypatch
):
    whole, shards = certification.certify, [Shard(index, 2) for index in range(2)]
    monkeypatch.setattr(
        certification, "certify", lambda c, batch, *rest: whole(c, batch, *rest) if not batch.number else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        certification.run(detector, None, sets, SETTINGS, tmp_path, save_proofs=3, shard=shards[0])
    monkeypatch.setattr(certification, "certify", whole)
    with pytest.raises(InputError, match="another run"):
        certification.run(detector, None, sets, SETTINGS, tmp_path, shard=shards[0])
    for shard in shards:
        certification.run(detector, None, sets, SETTINGS, tmp_path, save_proofs=3, shard=shard)
    merged = merge([shard.file(tmp_path / "rows.csv") for shard in shards], tmp_path / "rows.csv")
    assert files(tmp_path) == files(folder)
    assert merged["proofs"] == len(expected(folder))


def test_a_run_begun_afresh_leaves_no_proofs_of_another(detector, sets, tmp_path):
    certification.run(detector, None, sets, SETTINGS, tmp_path, save_proofs=4)
    (tmp_path / "proofs" / "notes.npz").touch()
    assert len([*tmp_path.glob("proofs/*.npz")]) > 3
    certification.run(detector, None, sets, SETTINGS, tmp_path, force=True)
    assert [path.name for path in tmp_path.glob("proofs/*")] == ["notes.npz"]


def test_what_cannot_be_stored_is_said_and_the_run_goes_on(sets, tmp_path):
    said = []

    class Reporter(Silent):
        def say(self, line):
            said.append(line)

    tanh = detector_of(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    reason = "layer 2 (Tanh) cannot be stored in a proof"
    found = certification.run(tanh, None, sets, SETTINGS, tmp_path, limit=1, save_proofs=2, reporter=Reporter())
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
