"""Two engines agree where they must, meet elsewhere, and an error of 1e-6 in one of them is seen."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from grood_cert.ball import NORMS, Ball
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.crosscheck import TOLERANCE, cross_check
from grood_cert.bounds.crown import NativeNetwork, NativeRelaxation
from grood_cert.errors import SoundnessError
from grood_cert.networks.architectures import _Residual, build
from grood_cert.networks.capture import capture

SHAPE = (1, 6, 6)
EPS = {"linf": 0.03, "l2": 0.2, "l1": 0.5}


def networks():
    torch.manual_seed(0)
    pools = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)]
    paths = [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), _Residual(3, 4, 2), nn.Flatten(), nn.Linear(36, 3)]
    smooth = [nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 3)]
    return {
        "mlp": build("mlp", SHAPE, 3, [0.5], [0.25], width=12),
        "conv-small": build("conv-small", SHAPE, 3, [0.5], [0.25], width=3),
        "leaky": nn.Sequential(nn.Flatten(), nn.Linear(36, 9), nn.LeakyReLU(0.2), nn.Linear(9, 3)),
        "residual": nn.Sequential(*paths),
        "pools": nn.Sequential(*pools),
        "smooth": nn.Sequential(*smooth),
    }


NETWORKS = {name: network.double().eval() for name, network in networks().items()}


@functools.cache
def graph_of(name):
    return capture(NETWORKS[name], SHAPE)


def engines(name, method):
    return tuple(kind(NETWORKS[name], SHAPE, method, graph=graph_of(name)) for kind in (NativeNetwork, LirpaNetwork))


def balls(norm="linf", count=2):
    images = torch.rand(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [Ball(images, EPS[norm] * scale, norm) for scale in (0.1, 1.0)]


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("name", NETWORKS)
def test_they_agree_where_the_lines_are_the_same_and_meet_elsewhere(name, method):
    native, other = engines(name, method)
    for norm in NORMS if method == "crown" else NORMS[:2]:
        found = cross_check(native, other, balls(norm))
        same = method != "ibp" and name not in ("pools", "smooth") and (norm == "linf" or name != "residual")
        assert (found.balls, found.same_lines) == (4, 4 if same else 0)
        assert found.largest_disagreement < TOLERANCE / 10 if same else found.largest_disagreement is None


def shift(monkeypatch, upper=0.0, lower=0.0):
    rows = NativeRelaxation.rows

    def shifted(self, coefficients, method=None):
        found = rows(self, coefficients, method)
        return found[0] + lower, found[1] - upper

    monkeypatch.setattr(NativeRelaxation, "rows", shifted)


@pytest.mark.parametrize("ends", [{"upper": 1e-6}, {"lower": 1e-6}, {"upper": -1e-6}])
def test_a_bound_that_is_wrong_by_a_millionth_contradicts(monkeypatch, ends):
    shift(monkeypatch, **ends)
    with pytest.raises(SoundnessError, match=r"contradict each other on 2 balls of eps 0\.003:") as caught:
        cross_check(*engines("mlp", "crown"), balls())
    evidence = caught.value.evidence
    assert evidence["image"].shape == (2, *SHAPE) and evidence["eps"].tolist() == [0.003, 0.003]
    moved = max(
        np.abs(evidence[f"native_{side}"][:, 1:] - evidence[f"other_{side}"][:, 1:]).max()
        for side in ("lower", "upper")
    )
    assert moved == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_where_lines_differ_a_looser_bound_passes_and_one_that_misses_a_point_does_not(monkeypatch, method):
    native, other = engines("smooth", method)
    shift(monkeypatch, upper=-0.1)
    assert cross_check(native, other, balls()).balls == 4
    monkeypatch.undo()
    shift(monkeypatch, upper=10.0, lower=-10.0)
    with pytest.raises(SoundnessError):
        cross_check(native, other, balls())


def test_what_an_engine_does_not_bound_is_not_counted(monkeypatch):
    native, other = engines("mlp", "crown")

    class Failing:
        network, graph, method = other.network, other.graph, "crown"

        def relax(self, ball):
            if float(ball.eps[0]) > 0.01:
                raise MemoryError
            return other.relax(ball)

    assert cross_check(native, Failing(), balls()).balls == 2
