from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from grood_cert.errors import RunError
from grood_cert.runs.onnx_file import write_onnx

pytest.importorskip("onnx", reason="needs the optional package onnx")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    made = nn.Sequential(*layers)
    made(torch.rand(20, 1, 6, 6))
    return made.double().eval()


IMAGES = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("any_batch", [True, False])
def test_the_file_is_the_network(tmp_path, any_batch):
    """Run by onnx's reference evaluator, whatever ran it when it was written."""
    reference = pytest.importorskip("onnx.reference")
    made = network()
    difference = write_onnx(made, IMAGES, tmp_path / "x.onnx", any_batch=any_batch)
    session = reference.ReferenceEvaluator(str(tmp_path / "x.onnx"))
    assert made[0].weight.dtype == torch.float64
    for batch in (IMAGES[:1], IMAGES) if any_batch else (IMAGES[1:2],):
        (got,) = session.run(["Y"], {"X": batch.float().numpy()})
        np.testing.assert_allclose(got, made(batch).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert 0 < difference < 1e-5
    shape = session.proto_.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in shape] == ["N" if any_batch else 1, 1, 6, 6]
    names = {initializer.name for initializer in session.proto_.graph.initializer}
    assert "1.running_var" in names  # BatchNorm is left as it is


@pytest.mark.parametrize("runtime", [True, False])
def test_a_file_that_disagrees_is_not_written(tmp_path, monkeypatch, runtime):
    if runtime:
        pytest.importorskip("onnxruntime")
    else:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    export = torch.onnx.export
    monkeypatch.setattr(
        torch.onnx, "export", lambda module, *args, **options: export(network(1).float(), *args, **options)
    )
    with pytest.raises(RunError, match="disagrees with the model; nothing was written"):
        write_onnx(network(), IMAGES, tmp_path / "x.onnx", any_batch=True)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    class Inverse(nn.Linear):
        def forward(self, images):
            return torch.linalg.lu(super().forward(images.flatten(1))[:, None])[1][:, 0]

    with pytest.raises(RunError, match="the network could not be exported"):
        write_onnx(Inverse(36, 2).double(), IMAGES, tmp_path / "x.onnx", any_batch=True)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RunError, match="pip install onnx"):
        write_onnx(network(), IMAGES, tmp_path / "x.onnx", any_batch=True)
    assert not list(tmp_path.iterdir())
