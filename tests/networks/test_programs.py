"""Files of `torch.export.save` whose loading, left to torch, runs what they bring along."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from grood_cert.errors import InputError
from grood_cert.networks.capture import capture
from grood_cert.networks.programs import read_program


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


BOMB = io.BytesIO()
torch.save({"a": Bomb()}, BOMB)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A program with a batch of any size, and the network."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    images = torch.rand(3, 1, 4, 4)
    dynamic = {"input": {0: torch.export.Dim("batch", min=2)}}
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=dynamic), path)
    return path, network, images


def changed(path, target, change):
    """A copy with one part of the archive changed."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w") as copy:
        found = 0
        for name in archive.namelist():
            content = archive.read(name)
            new = change(name.partition("/")[2], content)
            found += new is not None
            copy.writestr(name, content if new is None else new)
    assert found, "the archive has no such part"
    return target


def bomb(name, content):
    return BOMB.getvalue() if name.endswith(".pt") else None


def plain_bomb(name, content):
    return pickle.dumps(Bomb()) if name.endswith(".pt") else None


def in_model(replace):
    def change(name, content):
        if not name.startswith("models/"):
            return None
        model = json.loads(content)
        replace(model)
        return json.dumps(model).encode()

    return change


def expression(model):
    text = json.dumps(model)
    start = text.index('"expr_str": "') + len('"expr_str": "')
    evil = text[:start] + "open('exploded', 'w')" + text[text.index('"', start) :]
    model.clear()
    model.update(json.loads(evil))


def call(model):
    node = model["graph_module"]["graph"]["nodes"][0]
    model["graph_module"]["graph"]["nodes"].append({**node, "target": "torch.serialization.os.system", "name": "x"})


def placeholder(model):
    model["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"] = "x=open('exploded','w')"


def parameter(model):
    text = json.dumps(model).replace('"parameter_name": "0.weight"', '"parameter_name": "0.w\\"), open(\\"exploded"')
    model.clear()
    model.update(json.loads(text))


def test_a_program_is_read(saved):
    path, network, images = saved
    graph = capture(read_program(path), (1, 4, 4))
    torch.testing.assert_close(graph(images.double()), network(images).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bomb, r"whose part .* is a pickle that runs \w+\.mkdir when it is opened"),
        (plain_bomb, r"whose part .* is "),
        (in_model(expression), "an expression that is not arithmetic"),
        (in_model(call), r"calls 'torch\.serialization\.os\.system', which is no operator of torch"),
        (in_model(placeholder), "is a name"),
        (in_model(parameter), "is a name"),
    ],
)
def test_what_would_run_code_is_refused_and_not_run(saved, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    file = changed(saved[0], tmp_path / "evil.pt2", change)
    with pytest.raises(InputError, match=message) as caught:
        read_program(file)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["evil.pt2"]


def test_torch_itself_would_run_it(saved, tmp_path, monkeypatch):
    """Else the look-through could go."""
    monkeypatch.chdir(tmp_path)
    file = changed(saved[0], tmp_path / "evil.pt2", bomb)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    with contextlib.suppress(Exception):  # an open file is no list of images
        torch.export.load(file)
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"{}", b"\x80\x02."])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "net.pt2").write_bytes(content)
    with pytest.raises(InputError, match=r"net\.pt2: not a program saved by torch\.export\.save"):
        read_program(tmp_path / "net.pt2")
