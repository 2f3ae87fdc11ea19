from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from grood_cert.errors import InputError
from grood_cert.system.torch_files import Format, fingerprint

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
