from __future__ import annotations

import gzip
import io
import itertools
import os
import pickle
import struct
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from grood_cert.errors import InputError, RunError
from grood_cert.system.torch_files import Format, fingerprint, opened

KIND = Format("box of numbers", 3, expected="one of ours", absent="no box there")


def test_whatever_is_different_has_another_fingerprint():
    ones = torch.ones(4)
    contents = [
        None,
        False,
        0,
        0.0,
        -0.0,
        "",
        "0",
        [],
        {},
        ["a", "b"],
        ["ab"],
        [["a"], "b"],
        {"a": "b"},
        {"a": 1, "b": 2},
        {"b": 2, "a": 1},
        ones,
        ones.double(),
        ones.reshape(2, 2),
        ones.int(),
        -ones,
        {"a": ones, "b": -ones},
        {"b": ones, "a": -ones},
        torch.tensor(1.0),
        torch.tensor([1.0]),
        torch.empty(0),
        ones.bool(),
    ]
    found = [fingerprint(content) for content in contents]
    for (one, a), (other, b) in itertools.combinations(enumerate(found), 2):
        assert a != b, (contents[one], contents[other])


def test_how_a_tensor_lies_in_memory_does_not_matter():
    grid = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(grid.T) == fingerprint(grid.T.contiguous())
    assert fingerprint(grid[:, 1]) == fingerprint(torch.tensor([1.0, 4.0]))
    for one in (grid[:1, ::3], torch.arange(8.0)[::2][:1]):  # contiguous to torch, with a stride that is not 1
        assert fingerprint(one) == fingerprint(one.clone(memory_format=torch.contiguous_format))
    assert fingerprint(torch.nn.Parameter(grid)) == fingerprint(grid)
    assert fingerprint(grid.to(torch.bfloat16)) != fingerprint(grid.half())


def test_a_round_trip(tmp_path):
    content = {"a": torch.ones(2), "b": [1, (2.5, None)], "c": {"d": "text"}}
    (tmp_path / "x").write_bytes(KIND.packed(content).getbuffer())
    found = KIND.unpacked(tmp_path / "x")
    assert list(found) == ["format", "format_version", *content] and found["b"] == content["b"]
    assert fingerprint({name: found[name] for name in content}) == fingerprint(content)


def test_what_is_refused(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(InputError, match="x: no box there"):
        KIND.unpacked(path)
    path.write_bytes(Format("jar", 3, "", "").packed({}).getbuffer())
    with pytest.raises(InputError, match="x: not a box of numbers; expected one of ours"):
        KIND.unpacked(path)
    path.write_bytes(Format("box of numbers", 2, "", "").packed({}).getbuffer())
    with pytest.raises(InputError, match="x: box of numbers of format 2; this version reads 3"):
        KIND.unpacked(path)
    with pytest.raises(InputError, match="holds plain values, not ndarray"):
        KIND.packed({"a": np.ones(2)})


# What is no file of tensors


class Rude:
    def __reduce__(self):
        return os.mkdir, (os.environ["RUDE"],)


def zipped(**parts: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, text in parts.items():
            archive.writestr(name.replace("__", "/"), text)
    return stream.getvalue()


def saved(value, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def scripted() -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), stream)
    return stream.getvalue()


def as_onnx() -> bytes:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "empty", [], [])
    return onnx.helper.make_model(graph, producer_name="test").SerializeToString()


ALONE = "save the weights alone, where its code is: torch.save(model.state_dict(), FILE)"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"hello", "a text file"),
        (b"a,b\n1,2\n", "a CSV file"),
        (b'{"weight_map": {}}', "a JSON file"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page (HTML or XML), not the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer, .* git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
        (b"\x89PNG\r\n", "a picture (PNG)"),
        (gzip.compress(b"weights", mtime=0), "compressed by gzip; unpack it first"),
        (bytes(range(256)) * 20, "no file of tensors; expected one that torch.save or safetensors wrote"),
        (zipped(a__b="x"), "a zip archive without weights of PyTorch in it; it holds a/b"),
        (zipped(), "a zip archive without weights of PyTorch in it; it holds nothing"),
        (zipped(**{"a.npy": "", "b.npy": ""}), "a NumPy archive"),
        (saved({"a": torch.ones(3)})[:-40], "a truncated or damaged archive; fetch it again"),
        (b"PK\x03\x04", "a truncated or damaged archive; fetch it again"),
        (pickle.dumps({"a": 1}), "a plain pickle; write it with torch.save instead"),
        (
            pickle.dumps({"a": np.ones(1)}),
            "a pickle that runs numpy._core.multiarray._reconstruct when it is opened; " + ALONE,
        ),
        (pickle.dumps(Rude), r"a pickle that runs tests.system.test_torch_files.Rude when it is opened; " + ALONE),
        (
            saved({"best": np.float64(1)}),
            "a pickle that runs numpy._core.multiarray.scalar when it is opened; " + ALONE,
        ),
        (saved(nn.Linear(1, 1)), "a whole pickled module (torch.nn.modules.linear.Linear), which runs code"),
        (
            saved(nn.Linear(1, 1), _use_new_zipfile_serialization=False),
            "a whole pickled module (torch.nn.modules.linear.Linear), which runs code",
        ),
        (struct.pack("<Q", 30) + b'{"a":{"dtype":"F32"', "a damaged or truncated safetensors file"),
        (scripted, "a TorchScript archive, a program; save the weights alone: torch.save(module.state_dict(), FILE)"),
        (zipped(**{"w/models/model.json": "{}"}), "a program that torch.export saved"),
        (as_onnx, "an ONNX file"),
    ],
)
def test_foreign_files_are_called_what_they_are(tmp_path, content, expected):
    (tmp_path / "w.pt").write_bytes(content() if callable(content) else content)
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "w.pt")
    message = str(caught.value)
    start, _, end = expected.partition(".*")
    assert message.startswith(start) and end in message
    assert "\n" not in message and "\x1b" not in message and len(message) < 250


def test_no_pickle_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv("RUDE", str(tmp_path / "made"))
    for content in (saved({"a": Rude()}), pickle.dumps(Rude()), pickle.dumps(Rude(), 2)):
        (tmp_path / "w.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"a pickle that runs posix\.mkdir when it is opened"):
            opened(tmp_path / "w.pt")
    assert not (tmp_path / "made").exists()


def test_other_refusals(tmp_path):
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / "w.pt")
    with pytest.raises(InputError, match="a folder"):
        opened(tmp_path)


def test_files_of_safetensors_without_the_package(tmp_path, monkeypatch):
    tensors = {"a": torch.ones(2), "b": torch.zeros(1, dtype=torch.int64)}
    save_file(tensors, tmp_path / "w.bin", {"origin": "a test"})
    found = opened(tmp_path / "w.bin")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(RunError, match=r"w\.bin: this file needs the package safetensors: pip install safetensors"):
        opened(tmp_path / "w.bin")
