"""Each hostile network is bounded rightly, which points of the ball and an attack on the module itself say, or refused."""

import re
import warnings
from collections import Counter

import pytest
import torch

from grood_cert.api import score_bounds
from grood_cert.errors import InputError, RunError, SoundnessError
from grood_cert.scores import energy
from tests.networks.hostile import EITHER, KINDS, SECRET, SHAPE

EPS = 0.05
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.03}


def images():
    found = 0.1 + 0.8 * torch.rand(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    found[:, 0, 0, 0] = 0.31
    return found


def scores(network, points, kind):
    return energy(network(points.to(kind)).double())


def points_of(network, x, kind):
    """Points of the balls, one batch each: inside, corners, with the secret pixel, and steps of an attack."""
    generator = torch.Generator().manual_seed(3)
    for turn in range(24):
        share = 2 * torch.rand(x.shape, dtype=torch.float64, generator=generator) - 1
        points = x + EPS * (share.sign() if turn % 2 else share)
        if turn % 3 == 0:
            points[:, 0, 0, 0] = SECRET
        yield points
    for sign in (1, -1):
        points = x
        for _ in range(4):
            inputs = points.to(kind).requires_grad_()
            try:
                (gradient,) = torch.autograd.grad(energy(network(inputs)).sum(), inputs)
            except RuntimeError:  # no gradient leads to the image
                break
            points = x + (points + 0.03 * sign * gradient.double().sign() - x).clamp(-EPS, EPS)
            yield points


def outcome(name):
    """What became of a kind: ("bounded", largest excess of a score over its bounds) or ("refused", message)."""
    maker, _ = KINDS[name]
    network = maker().eval()
    kind = next((weight.dtype for weight in network.parameters()), torch.float64)
    x = images()
    try:
        found = score_bounds(network, x, EPS)
    except (InputError, RunError, SoundnessError) as error:
        return "refused", str(error)
    excess = -torch.inf
    for points in points_of(network, x, kind):
        with torch.no_grad():
            score = scores(network, points.clone(), kind)
        assert bool((found.lower <= found.upper).all()) and bool(score.isfinite().all())
        excess = max(excess, float(torch.maximum(found.lower - score, score - found.upper).max()))
    return "bounded", excess - ROUNDING[kind]


@pytest.mark.parametrize("name", KINDS)
def test_each_is_bounded_rightly_or_refused_by_name(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what hostile modules make torch say
        word, said = outcome(name)
    _, refusal = KINDS[name]
    if word == "bounded":
        assert refusal in (None, EITHER) and said <= 0
    else:
        assert refusal is not None and "\n" not in said
        assert re.search(refusal, said), said


def test_there_are_many_kinds():
    counted = Counter(refusal is None for _, refusal in KINDS.values())
    assert counted[True] >= 40 and counted[False] >= 60
