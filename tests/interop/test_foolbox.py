"""Against the package itself."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import grood_cert as gc
from grood_cert.interop.foolbox import DecisionLogits
from grood_cert.scores import MSP, MaxLogit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # on names of SciPy, at import
    foolbox = pytest.importorskip("foolbox", reason="needs the optional package foolbox")


@pytest.mark.parametrize("score", [None, MaxLogit(), MSP()], ids=str)
def test_the_class_is_the_decision(detector, inside, outside, score):
    x = torch.cat([inside[0], outside])
    if score:
        detector = dataclasses.replace(detector, score=score)
        detector = dataclasses.replace(detector, gamma=float(detector.scores(inside[0]).quantile(0.95)))
    view, found = DecisionLogits(detector), detector.predict(x)
    assert not view.training and torch.equal(view(x).argmax(1) == 0, found.accepted)
    if score is None:
        excess = found.score - detector.gamma
        torch.testing.assert_close(view(x), torch.stack([-excess, excess], 1), rtol=1e-12, atol=1e-14)
    point = x[:1].clone().requires_grad_()
    view(point)[0, 1].backward()
    assert bool(point.grad.abs().sum() > 0)


def test_no_attack_of_foolbox_gets_inside_a_certified_ball(detector, inside, outside):
    x = torch.cat([inside[0][:20], outside[:20]])
    proved = gc.certify(detector, x, eps=0.02, effort="fast")
    view = DecisionLogits(detector)
    model = foolbox.PyTorchModel(view, bounds=(0, 1), device="cpu")
    decisions = view(x).argmax(1)
    assert foolbox.accuracy(model, x, decisions) == 1
    broken = 0
    for eps in (0.02, 0.1, 0.3):
        for attack in (foolbox.attacks.LinfPGD(steps=20), foolbox.attacks.FGSM()):
            _, points, success = attack(model, x, decisions, epsilons=eps)
            changed = detector.predict(points).accepted != detector.predict(x).accepted
            assert torch.equal(changed, success)
            distance = (points - x).abs().flatten(1).amax(1)
            assert bool((distance[changed] > proved.radius[changed] - 1e-6).all())
            broken += int(changed.sum())
    assert broken > 20
