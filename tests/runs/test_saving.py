"""Runs that are killed, interrupted, shared out: the rows must be those of a run in one go, byte by byte."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from grood_cert import detector
from grood_cert.attacks import AttackEffort
from grood_cert.certification.settings import EFFORTS, Settings
from grood_cert.data import experiment_of
from grood_cert.errors import InputError, SoundnessError
from grood_cert.results.table import Table, read_cells
from grood_cert.runs import certify as certification
from grood_cert.runs.progress import Progress
from grood_cert.runs.shards import Shard
from grood_cert.system import files
from tests.recorder import Recorder
from tests.runs.work import DESCRIPTION, Worker, execute, manifest

# Interruptions, seen from inside one process


@pytest.mark.parametrize("last", range(10))
def test_a_run_goes_on_where_it_was(whole, tmp_path, last):
    first, second = Worker(last), Worker()
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path, first)
    path, heard = tmp_path / "rows.csv", Recorder()
    saved, records = read_cells(path)
    assert (saved["complete"], saved["batches"], saved["rows"]) == (False, last, len(records))
    assert path.read_bytes() == whole.read_bytes()[: saved["bytes"]]
    execute(tmp_path, second, reporter=heard)
    assert path.read_bytes() == whole.read_bytes()
    assert first.done + second.done == list(range(10))
    assert heard.stages == [("working", 18, "samples")] and sum(heard.steps) == 18
    assert len(heard.lines) == 1 + (last > 0) and heard.lines[0] == "18 samples of 3 sets"
    final = manifest(path)
    assert (final["complete"], final["batches"], final["rows"]) == (True, 10, 18)
    assert (final["of_batches"], final["samples_done"], final["of_samples"]) == (10, 18, 18)
    assert final["failures"] == {"boom": 10} and final["bytes"] == path.stat().st_size
    assert {entry.name for entry in tmp_path.iterdir()} == {"rows.csv", "rows.json"}


def test_a_torn_end_is_cut_off(whole, tmp_path):
    """Death between the append and the manifest: the rows hold more than the manifest speaks of."""
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path, Worker(3))
    path = tmp_path / "rows.csv"
    with path.open("ab") as stream:
        stream.write(b'"torn,\xff\xfe' + whole.read_bytes()[-20:])
    assert len(read_cells(path)[1]) == 6
    execute(tmp_path)
    assert path.read_bytes() == whole.read_bytes()


def test_a_complete_run_is_left_alone(whole, tmp_path):
    for file in (whole, whole.with_suffix(".json")):
        shutil.copy(file, tmp_path)
    before = [file.stat().st_mtime_ns for file in sorted(tmp_path.iterdir())]
    heard = Recorder()
    assert execute(tmp_path, Worker(0, AssertionError("work")), reporter=heard).exists()
    assert not heard.stages and len(heard.lines) == 1 and "complete already" in heard.lines[0]
    assert [file.stat().st_mtime_ns for file in sorted(tmp_path.iterdir())] == before
    execute(tmp_path, again := Worker(), force=True)
    assert again.done == list(range(10)) and (tmp_path / "rows.csv").read_bytes() == whole.read_bytes()


def test_manifests_of_earlier_versions_count_as_complete(whole, tmp_path):
    shutil.copy(whole, tmp_path)
    kept = {key: value for key, value in manifest(whole).items() if key not in vars(Progress())}
    (tmp_path / "rows.json").write_text(json.dumps(kept | {"seconds": 1.5, "failures": {}}))
    execute(tmp_path, Worker(0, AssertionError("work")))


def test_counts_are_those_of_all_rows(tmp_path):
    def tally(record):
        return ["large"] if float(record["score"]) > 2.5 else ["small", "weak"]

    heard = Recorder()
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path, Worker(4), tally=tally)
    path = execute(tmp_path, tally=tally, reporter=heard)
    values = [float(record["score"]) for record in read_cells(path)[1]]
    done = 0
    for samples, counts in zip(heard.steps, heard.counts, strict=True):
        done += samples
        large = sum(value > 2.5 for value in values[:done])
        assert counts == {
            key: n for key, n in {"large": large, "small": done - large, "weak": done - large}.items() if n
        }
    assert done == 18 and len(heard.steps) == 1 + 6


# Another run is never touched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"path": "model.pt", "sha256": "cd"}}, r"\(model.sha256: ab there, cd now\)"),
        ({"eps": (0.1, 0.3)}, r"\(eps.1: 0.2 there, 0.3 now\)"),
        ({"eps": (0.1, 0.2, 0.3)}, r"\(eps.2: None there, 0.3 now\)"),
        ({"data": DESCRIPTION["data"][:2]}, r"\(data.2.set: m there, None now\)"),
        ({"versions": {"torch": "3", "python": "3"}}, r"\(versions.torch: 2 there, 3 now\)"),
        ({"lipschitz": True}, r"\(lipschitz: None there, True now\)"),
    ],
)
@pytest.mark.parametrize("last", [3, None])
def test_another_run_is_refused(tmp_path, change, message, last):
    if last is None:
        execute(tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            execute(tmp_path, Worker(last))
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(InputError, match=f"holds another run {message}; choose another --out, or add --force"):
        execute(tmp_path, description=DESCRIPTION | change)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
    assert manifest(execute(tmp_path, description=DESCRIPTION | change, force=True))["complete"]


def test_another_place_or_python_is_the_same_run(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path, Worker(3))
    moved = {"model": {"path": "elsewhere.pt", "sha256": "ab"}, "versions": {"torch": "2", "python": "4"}}
    assert execute(tmp_path, description=DESCRIPTION | moved).read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.with_suffix(".json").unlink(), "exists already"),
        (lambda path: path.with_suffix(".json").write_text("{"), "cannot be continued"),
        (lambda path: path.with_suffix(".json").write_text("[1]"), "rows.json is no JSON object"),
        (lambda path: path.with_suffix(".json").write_text('{"complete": false}'), "cannot be continued"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "holds 5 rows, rows.json speaks of 6|rows"),
        (lambda path: path.write_bytes(b""), "holds no rows, rows.json speaks of 6"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"score", b"price")), "other columns"),
    ],
)
def test_damaged_files_are_refused_and_kept(tmp_path, damage, message):
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path, Worker(3))
    path = tmp_path / "rows.csv"
    damage(path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message) as caught:
        execute(tmp_path)
    assert "--force" in str(caught.value) and "\n" not in str(caught.value)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


@pytest.mark.parametrize("writes", range(3, 12))
def test_a_full_disk_leaves_what_was_saved(whole, tmp_path, monkeypatch, writes):
    """No room for rows (odd) or for the manifest (even); the same command goes on once there is room."""
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(InputError, match=r"cannot write .*: No space left on device"):
            execute(tmp_path)
    saved, records = read_cells(tmp_path / "rows.csv")
    done = (writes - 3) // 2  # before the first batch: the manifest, the header, the manifest
    assert saved["complete"] is False and saved["batches"] == done and len(records) == 2 * done
    assert execute(tmp_path).read_bytes() == whole.read_bytes()


def test_a_full_disk_at_the_start_of_a_forced_run_leaves_the_old_one(whole, tmp_path, monkeypatch):
    execute(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        execute(tmp_path, force=True)
    assert (tmp_path / "rows.csv").read_bytes() == whole.read_bytes() and manifest(tmp_path / "rows.csv")["complete"]


def test_an_unsound_run_leaves_evidence_and_no_rows(tmp_path):
    error = SoundnessError("a contradiction", {"image": np.ones(3)})
    with pytest.raises(SoundnessError) as caught:
        execute(tmp_path, Worker(3, error))
    with np.load(caught.value.counterexample) as archive:
        assert archive["image"].tolist() == [1, 1, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["counterexample.npz"]


def test_a_run_that_is_being_written_is_refused(tmp_path):
    class Rival(Worker):
        def __call__(self, batch):
            with pytest.raises(InputError, match=r"another process is writing .*rows.csv; wait until it ends"):
                execute(tmp_path, force=True)
            return super().__call__(batch)

    assert manifest(execute(tmp_path, Rival()))["complete"]


def test_more_shards_than_batches_are_refused(tmp_path):
    with pytest.raises(InputError, match="11 shards for 10 batches; use fewer"):
        execute(tmp_path, shard=Shard(0, 11))
    assert not list(tmp_path.iterdir())


# Real processes, really killed

LIMIT = 3  # of each set: four batches in all
ATTACK = 4, 0, 1, 4, 0  # steps, restarts, rounds, ascent, logits: what is saved counts here
SCRIPT = """
import json, os, signal, socket, sys
from dataclasses import replace
from pathlib import Path
import torch
from grood_cert import detector
from grood_cert.attacks import AttackEffort
from grood_cert.certification.settings import EFFORTS, Settings
from grood_cert.cli import run_script
from grood_cert.data import experiment_of
from grood_cert.networks.capture import capture
from grood_cert.runs import certify as certification
from grood_cert.runs import shards

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
model, folder = map(Path, sys.argv[1:])
sys.argv[1:] = []
torch.set_num_threads(1)
EFFORTS["fast"] = replace(EFFORTS["fast"], attack=AttackEffort(*ATTACK))
loaded, real = detector.load(model), certification.certify
experiment = experiment_of(loaded.origin.recipe)
capture(loaded.network, loaded.shape)  # the first one loads the compiler


def started(name, number=None, **environment):
    if child := os.fork():
        return child
    torch.set_num_threads(1)  # two threads that first touch its pool after a fork can find none
    os.environ.update(environment)
    os.dup2(os.open(f"{folder}/{name}.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)

    def certify(certifier, batch, *rest):
        if number and batch.number == 3:
            os.kill(os.getpid(), number)
        return real(certifier, batch, *rest)

    def main() -> None:
        certification.certify = certify
        sets = [experiment.test, experiment.ood[0]]
        settings = Settings(
            eps=(0.01,), stages=("ibp",), effort="fast", precision=0.1, batch_size=2, engine="native"
        )
        result = certification.run(
            loaded, model, sets, settings, folder / name, limit=LIMIT, shard=shards.shard_of_environment()
        )
        assert len(result) == 2 * LIMIT and result.complete

    run_script(main)


def pair(number=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [started("pair", number, RANK=str(rank), **together) for rank in range(2)]


def codes(*children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


found = {name: codes(started(name, getattr(signal, name))) for name in ("SIGKILL", "SIGINT")}
found["pair"] = codes(*pair(signal.SIGKILL))
left = {file.name: json.loads(file.read_text()) for file in (folder / "pair").glob("*.json")}
print(json.dumps([found, left, codes(*pair())]))
"""


def certify(model, out):
    """The same run as that of the script, in this process."""
    loaded = detector.load(model)
    experiment = experiment_of(loaded.origin.recipe)
    settings = Settings(eps=(0.01,), stages=("ibp",), effort="fast", precision=0.1, batch_size=2, engine="native")
    return certification.run(loaded, model, [experiment.test, experiment.ood[0]], settings, out, limit=LIMIT)


def test_killed_certifications_go_on(model, tmp_path, monkeypatch):
    """Alone, by SIGKILL and SIGINT; and one of two processes: the other one ends and says so, and two processes go on.

    All are forked off one process: one import of torch for all of them.
    """
    monkeypatch.setitem(EFFORTS, "fast", dataclasses.replace(EFFORTS["fast"], attack=AttackEffort(*ATTACK)))
    certify(model, tmp_path / "whole")
    (tmp_path / "certify.py").write_text(SCRIPT.replace("LIMIT", str(LIMIT)).replace("ATTACK", repr(ATTACK)))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "certify.py"), str(model), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    ends, saved, at_last = json.loads(done.stdout)
    assert ends == {"SIGKILL": [-signal.SIGKILL], "SIGINT": [130], "pair": [1, -signal.SIGKILL]}
    said = {name: (tmp_path / f"{name}.err").read_text() for name in ends}
    assert said["SIGKILL"] == ""
    assert said["SIGINT"] == "certify.py: error: interrupted; the same command goes on (train: with --resume)\n"
    assert "error: another process of this run has stopped" in said["pair"]
    for name in ("SIGKILL", "SIGINT"):
        partial = Table.read(tmp_path / name / "rows.csv", partial=True)
        assert not partial.complete and len(partial) == 5
        assert certify(model, tmp_path / name).complete
    assert saved["rows-1-of-2.json"]["complete"] and not saved["rows-2-of-2.json"]["complete"]
    assert saved["rows-2-of-2.json"]["batches"] == 1 and saved.keys() == {"rows-1-of-2.json", "rows-2-of-2.json"}
    assert at_last == [0, 0] and manifest(tmp_path / "pair" / "rows.csv")["shards"] == 2
    for name in ends:
        assert (tmp_path / name / "rows.csv").read_bytes() == (tmp_path / "whole" / "rows.csv").read_bytes()
        assert {entry.name for entry in (tmp_path / name).iterdir()} == {"rows.csv", "rows.json"}


def test_work_that_was_done_in_other_parts_is_not_done_anew_unasked(tmp_path):
    joint = Shard(0, 2, joint=True)
    execute(tmp_path / "parts", shard=Shard(1, 3))
    for shard in (Shard(), joint):
        with pytest.raises(
            InputError, match=r"rows-2-of-3.csv is one of 3 parts of a run; go on in as many, remove it, or"
        ):
            execute(tmp_path / "parts", shard=shard)
    assert {file.name for file in (tmp_path / "parts").glob("*.csv")} == {"rows-2-of-3.csv"}
    assert execute(tmp_path / "parts", force=True).name == "rows.csv"
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path / "whole", Worker(2))
    before = (tmp_path / "whole" / "rows.csv").read_bytes()
    with pytest.raises(InputError, match=r"rows.csv was begun by one process; let one go on with it, or add --force"):
        execute(tmp_path / "whole", shard=joint)
    assert (tmp_path / "whole" / "rows.csv").read_bytes() == before
