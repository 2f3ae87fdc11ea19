from __future__ import annotations

import pytest

from grood_cert.cli import main
from grood_cert.runs.plan import outline
from tests.runs.work import BATCHES, Worker


def test_a_plan_names_the_work_and_tries_a_little_of_it():
    worker = Worker()
    lines = outline("working", BATCHES, (0.1, 0.2), worker)
    assert lines[:2] == ["working: 18 samples of 3 sets x 2 eps = 36 balls, in 10 batches", "  z (id): 11 samples"]
    assert worker.done == [0, 9] and "from 3 samples tried" in lines[-1]
    assert outline("working", [], (), worker) == ["working: 0 samples of 0 sets, in 0 batches"]


def test_a_dry_run_writes_nothing(model, mlp_model, tmp_path, monkeypatch, capsys):
    certify = ["certify", str(model), "--eps", "0.01", "--effort", "fast", "--engine", "native"]
    smooth, lipschitz = ["smooth", str(model), "--n", "20"], ["lipschitz", str(mlp_model), "--eps", "0.01"]
    lipschitz += ["--samples", "8", "--clever-batches", "0"]
    for command, word in ((certify, "certifying"), (smooth, "calibrating"), (lipschitz, "analysing")):
        arguments = [*command, "--limit", "4", "--out", str(tmp_path / "x"), "--dry-run", "--device", "cpu"]
        monkeypatch.setattr("sys.argv", ["grood-cert", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr().out
        assert ended.value.code == 0 and printed.startswith(f"{word}: ") and "  about 0:0" in printed
    assert not list(tmp_path.iterdir())
