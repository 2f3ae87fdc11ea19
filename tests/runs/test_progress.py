from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from grood_cert.certification.settings import Settings as CertificationSettings
from grood_cert.certification.smoothing import SmoothingSettings
from grood_cert.errors import InputError
from grood_cert.lipschitz.analyser import AnalysisSettings
from grood_cert.runs.progress import Progress, command_line, describe, status
from grood_cert.runs.shards import Shard
from grood_cert.system.files import locked
from tests.runs.work import DESCRIPTION, Worker, execute, manifest

KIND = DESCRIPTION | {"kind": "certification"}


def interrupted(folder, last, **options):
    with pytest.raises(KeyboardInterrupt):
        execute(folder, Worker(last), KIND, **options)


def test_a_dead_run_says_how_far_it_came_and_what_goes_on_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/grood-cert", "certify", "my model.pt"])
    interrupted(tmp_path, 3)
    (found,) = status(tmp_path)
    assert (found.kind, found.progress.samples_done, found.progress.batches, found.busy) == (
        "certification",
        6,
        3,
        False,
    )
    (line,) = describe(tmp_path)
    assert line.startswith("rows.csv: certification, 33%: 6/18 samples, 3/10 batches in ")
    assert line.endswith("no process is at work on it; go on with: grood-cert certify 'my model.pt'")
    assert manifest(tmp_path / "rows.csv")["command"] == "grood-cert certify 'my model.pt'"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("complete", "yes"), ("batches", -1), ("rows", True), ("rows", 1.5), ("seconds", []), ("seconds", 10**400)),
        *(("failures", [1]), ("failures", {"a": "b"}), ("shard", True), ("shard", "x/y"), ("command", 7)),
    ],
)
def test_entries_that_no_run_writes_are_no_progress(tmp_path, name, value):
    interrupted(tmp_path, 3)
    page = tmp_path / "rows.json"
    page.write_text(json.dumps(json.loads(page.read_text()) | {name: value}))
    assert status(tmp_path) == []
    with pytest.raises(InputError, match=r"rows.csv exists already and cannot be continued \(.*\); choose another"):
        execute(tmp_path, Worker(), KIND)


@pytest.mark.parametrize(
    ("program", "joint", "command"),
    [
        ("/env/grood_cert/__main__.py", False, "grood-cert certify model.pt"),
        ("/env/grood_cert/__main__.py", True, "torchrun --nproc-per-node 3 -m grood_cert certify model.pt"),
        ("/home/me/study.py", False, None),  # a script of the user's: what it does is not for us to say
    ],
)
def test_the_command_that_goes_on_is_one_that_can_be_given(monkeypatch, program, joint, command):
    monkeypatch.setattr(sys, "argv", [program, "certify", "model.pt"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert command_line(joint) == command


def test_processes_that_a_command_started_are_continued_by_that_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/env/bin/grood-cert", "certify", "model.pt", "--jobs", "3"])
    for name in ("GROOD_CERT_JOBS", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    assert command_line(joint=True) == "grood-cert certify model.pt --jobs 3"


def test_a_run_at_work_is_known_by_its_lock(tmp_path):
    interrupted(tmp_path, 3)
    with locked(tmp_path / "rows.csv"):
        assert status(tmp_path)[0].busy and "a process is at work on it" in describe(tmp_path)[0]
    assert not status(tmp_path)[0].busy


def test_the_time_left_is_that_of_the_samples_left(tmp_path):
    interrupted(tmp_path, 3)
    page = tmp_path / "rows.json"
    page.write_text(json.dumps(json.loads(page.read_text()) | {"seconds": 30.0}))
    assert status(tmp_path)[0].left == 60 and "(0.2 samples/s, 0:01:00 left)" in describe(tmp_path)[0]


def test_shards_that_are_missing_or_wait_to_be_merged(tmp_path):
    execute(tmp_path, description=KIND, shard=Shard(0, 3))
    interrupted(tmp_path, 1, shard=Shard(2, 3))
    assert describe(tmp_path)[-1] == "rows.csv: of 3 shards, 2/3 not here"
    for index in (1, 2):
        execute(tmp_path, description=KIND, shard=Shard(index, 3))
    assert describe(tmp_path)[-1].startswith("rows.csv: all 3 shards are complete; grood-cert merge ")
    assert describe(tmp_path)[-1].endswith(f" --out {tmp_path / 'rows.csv'}")


def test_a_complete_run_and_what_is_none(tmp_path):
    execute(tmp_path, description=KIND)
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    (line,) = describe(tmp_path)
    assert line.startswith("rows.csv: certification, complete: 18 rows in 0:00:0")
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "no run is here"), ("none", "no such folder")):
        with pytest.raises(InputError, match=message):
            describe(tmp_path / folder)


def test_an_unfinished_training_is_named(tmp_path):
    (tmp_path / "last.pt").touch()
    assert describe(tmp_path) == ["model.pt: training is unfinished; its command with --resume goes on"]
    with locked(tmp_path / "model.pt"):
        assert describe(tmp_path) == ["model.pt: a process is training it"]


def test_runs_in_folders_below_are_told_too(tmp_path):
    execute(tmp_path / "greg", description=KIND)
    (tmp_path / "greg/model.pt").touch()
    first, second = describe(tmp_path)
    assert first.startswith("greg/rows.csv: certification, complete: 18 rows") and second == "greg/model.pt: trained"


def test_no_setting_hides_behind_a_key_of_progress():
    """What a run is and how far it has come stand in one manifest: a shared key would let another run be continued."""
    settings = (CertificationSettings, AnalysisSettings, SmoothingSettings)
    described = {item.name for kind in settings for item in dataclasses.fields(kind)}
    assert not described & {item.name for item in dataclasses.fields(Progress)}


def test_looking_needs_no_torch():
    code = "import sys, grood_cert.runs.progress; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_damaged_manifest_is_said(tmp_path):
    execute(tmp_path)
    path = tmp_path / "rows.json"
    assert describe(tmp_path)[0].startswith("rows.csv: smoothing-calibration, complete")
    path.write_text(path.read_text()[:100])
    (line,) = describe(tmp_path)
    assert line.startswith("rows.json: damaged (") and line.endswith("begin again with --force")
    path.write_text('{"complete": "no", "batches": 1}')
    assert "rows.json: damaged (its manifest's complete is 'no')" in describe(tmp_path)[0]
