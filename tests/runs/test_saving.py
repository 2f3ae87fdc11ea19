"""Runs that are killed, interrupted, shared out: the rows must be those of a run in one go, byte by byte."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from grood_cert import detector
from grood_cert.certification.settings import Settings
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

LIMIT = 5  # of each set: six batches in all
SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from grood_cert import detector
from grood_cert.certification.settings import Settings
from grood_cert.cli import run_script
from grood_cert.runs import certify as certification
from grood_cert.runs import shards
from grood_cert.data import experiment_of

def main(model: Path, out: Path, limit: int, dies: int = -1, waits: int = -1) -> None:
    loaded = detector.load(model)
    experiment = experiment_of(loaded.origin.recipe)
    sets = [experiment.test, experiment.ood[0]]
    settings = Settings(eps=(0.01,), stages=("ibp",), effort="fast", precision=0.1, batch_size=2)
    shard, real = shards.shard_of_environment(), certification.certify

    def certify(certifier, batch, *rest):
        if batch.number == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if batch.number == waits:
            signal.pause()
        return real(certifier, batch, *rest)

    certification.certify = certify
    result = certification.run(loaded, model, sets, settings, out, limit=limit, shard=shard)
    os.write(1, f"{len(result)} {result.complete}\\n".encode())  # two processes share the pipe: one write a line

run_script(main)
"""


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "certify.py"
    path.write_text(SCRIPT)
    return path


def start(command, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, *map(str, command), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def certify(model, out, limit):
    """The same run as that of the script, in this process."""
    loaded = detector.load(model)
    experiment = experiment_of(loaded.origin.recipe)
    settings = Settings(eps=(0.01,), stages=("ibp",), effort="fast", precision=0.1, batch_size=2)
    return certification.run(loaded, model, [experiment.test, experiment.ood[0]], settings, out, limit=limit)


def wait_for_batches(process, manifest, least):
    while not (manifest.exists() and json.loads(manifest.read_text())["batches"] >= least):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """The rows of the script's run in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    certify(model, folder, LIMIT)
    return folder / "rows.csv"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_killed_certification_goes_on(undisturbed, script, model, tmp_path, number, code):
    process = start([script], model, tmp_path, LIMIT, "--waits", 3)
    path = tmp_path / "rows.csv"
    wait_for_batches(process, path.with_suffix(".json"), 1)
    with pytest.raises(InputError, match=r"another process is writing .*rows.csv"), files.locked(path):
        pass
    process.send_signal(number)
    _, errors = process.communicate(timeout=1800)
    assert process.returncode == code
    assert errors == (
        ""
        if number == signal.SIGKILL
        else "certify.py: error: interrupted; the same command goes on (train: with --resume)\n"
    )
    partial = Table.read(path, partial=True)
    assert not partial.complete and 2 <= len(partial) < 2 * LIMIT
    assert certify(model, tmp_path, LIMIT).complete
    assert path.read_bytes() == undisturbed.read_bytes()
    assert {entry.name for entry in tmp_path.iterdir()} == {"rows.csv", "rows.json"}


def test_processes_together(undisturbed, script, model, tmp_path):
    """One of two processes dies: the other one ends and says so. Then torchrun goes on with what both have saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start([script], model, tmp_path, LIMIT, "--dies", 3, RANK=str(rank), **together) for rank in range(2)]
    errors = [process.communicate(timeout=1800)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, -signal.SIGKILL]
    assert "error: another process of this run has stopped" in errors[0]
    saved = {index: manifest(tmp_path / f"rows-{index}-of-2.csv") for index in (1, 2)}
    assert saved[1]["complete"] and not saved[2]["complete"] and saved[2]["batches"] == 1
    assert not (tmp_path / "rows.csv").exists()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    process = start(torchrun, model, tmp_path, LIMIT)
    output, error = process.communicate(timeout=1800)
    assert process.returncode == 0, error
    assert output.count("10 True") == 2
    assert (tmp_path / "rows.csv").read_bytes() == undisturbed.read_bytes()
    assert {entry.name for entry in tmp_path.iterdir()} == {"rows.csv", "rows.json"}
    assert manifest(tmp_path / "rows.csv")["shards"] == 2
