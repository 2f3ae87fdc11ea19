"""Runs of two processes on one machine, against the same run in one."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grood_cert import detector
from grood_cert.cli import options
from grood_cert.data import experiment_of
from grood_cert.errors import InputError
from grood_cert.recipe import Recipe, from_dict, load
from grood_cert.system import processes
from grood_cert.training import run as training
from grood_cert.training.step import check_batches

SETTINGS = {
    "name": "shared",
    "data": {"train_limit": 160, "ood": ["digits:8,9"]},
    "network": {"name": "conv-small", "width": 2},
    "optimizer": {"epochs": 5, "batch_size": 40},
    "augmentation": {"flip": True, "crop_padding": 1, "noise_sigma": 0.1},
}


def recipe_of(**sections) -> Recipe:
    return from_dict({**SETTINGS, **{name: {**SETTINGS.get(name, {}), **values} for name, values in sections.items()}})


def assert_close(path: Path, other: Path) -> None:
    one, two = (detector.load(file / "model.pt").network.state_dict() for file in (path, other))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=1e-5)


def losses(folder: Path) -> list[float]:
    with (folder / "log.csv").open(newline="") as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


SCRIPT = """
import sys
from pathlib import Path
import torch
from grood_cert import cli, detector
from grood_cert.recipe import load
from grood_cert.system import processes
from grood_cert.training import run as training

folder = Path(sys.argv[1])
torch.set_num_threads(1)
with processes.joined("cpu") as device:
    sys.argv = ["grood-cert", "train", str(folder / "plain.toml"), "--out", str(folder / "plain"), "--device", device]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code
    rank = processes.rank()
    original = detector.Architecture.build

    def build(architecture):  # every process starts elsewhere; the first must overrule the others
        network = original(architecture)
        with torch.no_grad():
            for weight in network.parameters():
                weight += rank
        return network

    detector.Architecture.build = build
    result = training.run(load(folder / "norm.toml"), folder / "norm", device=device)
    torch.save(result.network.state_dict(), folder / f"{rank}.pt")
    parts = [torch.full((3,), float(rank + 1)), torch.full((2, 2), rank + 1.0, dtype=torch.float64)]
    processes.add_up(parts)
    assert parts[0].tolist() == [3.0] * 3 and parts[1].tolist() == [[3.0] * 2] * 2
    assert processes.value_of_first({"rank": rank}) == {"rank": 0}
"""


PATIENT = """
import datetime, json, os, signal, socket, sys, time
import torch
from torch import distributed
from grood_cert.cli import run_script
from grood_cert.system import processes

folder, dies = sys.argv.pop(), ""

def main() -> None:
    with processes.joined("cpu"):
        distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=3), distributed.group.WORLD)
        rank = processes.rank()
        with processes.first_goes_ahead():
            if rank == 0 and dies == "first":
                os.kill(os.getpid(), signal.SIGKILL)
            if not dies:
                time.sleep(4)  # a download of the first process, a folder that the second one reads
        if rank == 1 and dies == "second":
            os.kill(os.getpid(), signal.SIGKILL)
        processes.add_up([total := torch.ones(1)])
    assert total.item() == 2

found = {}
for dies in ("", "first", "second"):  # one import of torch for all of them
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            os.environ["RANK"] = str(rank)
            os.dup2(os.open(f"{folder}/{dies}-{rank}", os.O_CREAT | os.O_WRONLY), 2)
            run_script(main)
        children.append(child)
    found[dies] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(json.dumps(found))
"""


def test_who_waits_outlasts_the_timeout_of_the_exchange(tmp_path):
    """Three seconds in place of NCCL's ten minutes; a process that dies meanwhile ends the other with a line."""
    (tmp_path / "script.py").write_text(PATIENT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert json.loads(done.stdout) == {"": [0, 0], "first": [-signal.SIGKILL, 1], "second": [1, -signal.SIGKILL]}
    for survivor in ("first-1", "second-0"):
        said = (tmp_path / survivor).read_text()
        (line,) = (line for line in said.splitlines() if line.startswith("script.py: error: "))
        assert "another process of this run has stopped (" in line and "Traceback" not in said


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """What two processes leave of two runs: one of a plain network, one with BatchNorm and picked outliers."""
    folder = tmp_path_factory.mktemp("two")
    norm = recipe_of(
        network={"name": "resnet-small", "width": 2}, optimizer={"epochs": 1}, sampling={"method": "energy", "pool": 96}
    )
    (folder / "plain.toml").write_text(recipe_of().to_toml())
    (folder / "norm.toml").write_text(norm.to_toml())
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder / "script.py"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_two_processes_are_one_process_with_their_batches_together(two, tmp_path):
    """20 steps of 40 images, 20 in each process; an augmentation is drawn for each part of a batch, wherever it is."""
    folder, done = two
    assert done.stdout.count("ID accuracy") == 1 and done.stderr.count("epoch   5") == 1, "the first process speaks"
    training.run(recipe_of(optimizer={"accumulate": 2}), tmp_path)
    assert_close(folder / "plain", tmp_path)
    assert losses(folder / "plain") == pytest.approx(losses(tmp_path), abs=1e-5)


def test_batch_norm_and_picked_outliers_in_two_processes(two):
    """Each process normalises its own part; weights and running statistics agree all the same, to the last bit."""
    folder, _ = two
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert any("running_var" in name for name in first)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    stored = detector.load(folder / "norm" / "model.pt").network.state_dict()
    assert all(torch.equal(value, stored[name].to(value)) for name, value in first.items())


def test_batch_norm_in_two_processes_is_batch_norm_in_two_parts(two, tmp_path):
    folder, _ = two
    recipe = load(folder / "norm.toml", ["optimizer.accumulate=2"])
    training.run(recipe, tmp_path)
    assert_close(folder / "norm", tmp_path)


def test_parts_of_a_batch_make_the_step_of_the_batch(tmp_path):
    """Without random changes of the images, a batch in parts is the batch in one piece."""
    plain = {"augmentation": {"flip": False, "crop_padding": 0, "noise_sigma": 0.0}}
    training.run(recipe_of(**plain), tmp_path / "one")
    training.run(recipe_of(**plain, optimizer={"accumulate": 3}), tmp_path / "three")  # 14, 13 and 13 images
    assert_close(tmp_path / "one", tmp_path / "three")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "three"), abs=1e-5)


def test_one_process_has_no_one_to_wait_for(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes.joined("cuda") as device:
        assert (device, processes.count()) == ("cuda", 1)
    tensor = torch.arange(3.0)
    processes.add_up([tensor])
    processes.copy_from_first([tensor])
    assert tensor.tolist() == [0, 1, 2] and processes.value_of_first("x") == "x"
    with processes.first_goes_ahead():
        pass


def test_fewer_gpus_than_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    message = "GPUs; start at most as many processes, or add --device cpu"
    for device in ("cuda", "cuda:1"):
        with pytest.raises(InputError, match=message), processes.joined(device):
            pass


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_each_process_has_the_gpu_of_its_number(monkeypatch, device):
    """As torchrun starts the second of two processes on a machine with two GPUs; nothing but the calls to torch is played."""
    called: list[object] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", called.append)
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend, timeout: called.append(f"{backend} beside it"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: called.append("left"))
    with processes.joined(options.device_name(device)) as place:
        assert place == "cuda:1" and called == ["cuda:1", "nccl", "gloo beside it"]
    assert called[3:] == ["left"]


@pytest.mark.parametrize(
    ("count", "sections", "message"),
    [
        (64, {}, "a batch of 40 ID images cannot be cut into 64 parts (processes: 64, optimizer.accumulate = 1)"),
        (2, {"objective": {"reduction": "reference"}}, 'reduction = "reference" divides by the size of the batch'),
        (4, {"sampling": {"method": "energy", "pool": 79}}, "a pool of 19 candidates is too small: a step of 10 ID"),
    ],
)
def test_what_cannot_be_shared_is_refused(monkeypatch, count, sections, message):
    monkeypatch.setattr(processes, "count", lambda: count)
    recipe = recipe_of(**sections)
    with pytest.raises(InputError) as caught:
        check_batches(recipe, experiment_of(recipe))
    assert message in str(caught.value)
