"""The table of models: part of it, refusals, and what a wrong bound does."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import models as benchmark
from benchmarks.zoo import GREY, Model, models
from grood_cert.ball import Ball
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.errors import SoundnessError
from grood_cert.networks.aten import ATEN
from grood_cert.scores import energy

REFUSED = {
    "if x.mean() > 0.9": "conditions",
    "if x.shape[0] == 1": "one image",
    "gate x * sigmoid(g(x))": "a product of two values",
    "LayerNorm": "layer_norm",
    "softmax at the end": "logits",
}
CAPTURED = (
    "torchvision Normalize in front",
    "forward hook (ReAct clamp)",
    "Dropout subclass with its own forward",
    "residual +=, relu in place",
    "max-pool with ceil_mode",
    "permute, Linear over channels, transpose",
    "ZeroPad2d, padding='same', average pool without padding",
    "maxout of two halves (chunk, maximum)",
    "small convolutional, Hardswish",
    "U-Net: upsampling, concatenation",
)


def named(name):
    return next(model for model in models() if model.name == name)


@pytest.mark.parametrize("name", CAPTURED)
def test_bounds_contain_all_points(name):
    row = benchmark.row_of(replace(named(name), native=("ibp", "crown-ibp")))
    assert not row.refused and row.points > 50 and row.nodes > 1
    widths = row.cells["native"]
    assert 1 <= widths["crown-ibp"] <= widths["ibp"] * 1.05 < math.inf


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name):
    row = benchmark.row_of(named(name))
    assert REFUSED[name] in row.refused and row.points == 0
    assert "refused" in row.markdown() and row.markdown().count("|") == len(benchmark.COLUMNS) + 1


def test_there_are_enough_models_and_the_docs_name_each():
    names = [model.name for model in models()]
    text = (Path(benchmark.__file__).parents[1] / "docs" / "models.md").read_text()
    assert len(names) == len(set(names)) >= 45
    assert [name for name in names if f"| {name} |" not in text] == []


def test_the_docs_name_every_operator():
    text = (Path(benchmark.__file__).parents[1] / "docs" / "models.md").read_text()
    part = text[text.index("## What is captured") : text.index("## What is refused")]
    assert set(re.findall(r"`(\w+)`", part)) - {"nn", "torch"} == set(ATEN)


def test_a_point_outside_ends_the_run():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double().eval()
    ball = Ball(torch.rand(2, *GREY, dtype=torch.float64), 0.01, "linf")
    points = list(benchmark.points_of(network, ball, torch.Generator().manual_seed(0)))
    assert max(float(ball.distance(point).max()) for point in points) <= 0.01 * (1 + 1e-12)
    with torch.no_grad():
        logits = torch.stack([network(point) for point in points])
    bounded = NativeNetwork(network, GREY, "crown")
    found = benchmark.bounded_width(bounded, "crown", ball, points, energy(logits), logits)
    assert 1 <= found < 1.1
    with pytest.raises(SoundnessError, match=r"^2 of \d+ points"):
        benchmark.bounded_width(
            bounded,
            "crown",
            ball,
            points,
            energy(logits),
            logits + 1000 * (torch.arange(len(points)) == 3)[:, None, None],
        )


def test_what_takes_too_long_is_said(monkeypatch):
    def slow(*arguments):
        while True:
            pass

    monkeypatch.setattr(benchmark, "bounded_width", slow)
    model = Model("small", "own", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), GREY, ("ibp",))
    row = benchmark.row_of(model, seconds=0.05)
    assert row.cells["native"] == {"all:": "over 0 s"} and row.points == 0
