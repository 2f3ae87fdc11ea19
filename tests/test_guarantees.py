"""Metrics of samples that move: against brute force over all moves, and their order on any samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from grood_cert import guarantees
from grood_cert.errors import InputError, SoundnessError
from grood_cert.guarantees import Worst, brackets
from grood_cert.metrics import Ranking

METRICS = {
    "auroc": lambda ranking: ranking.auroc,
    "aupr_in": lambda ranking: ranking.aupr("id"),
    "aupr_out": lambda ranking: ranking.aupr("ood"),
    "fpr95_id": lambda ranking: ranking.fpr(),
    "fpr95_ood": lambda ranking: ranking.fpr(positive="ood"),
}
ERRORS = ("fpr95_id", "fpr95_ood", "fpr_at_gamma")


def random_side(rng, kind, moved, samples=4):
    """A side whose every score may take any of three steps on the way to its bound; what it may take, by sample."""
    sign = 1 if kind == "id" else -1
    score = rng.integers(0, 5, samples) + (0 if kind == "id" else 2.0)
    if not moved:
        return Worst.still(kind, score), [[value] for value in score]
    reach = rng.integers(0, 3, samples)
    moves = [[value + sign * step for step in range(far + 1)] for value, far in zip(score, reach, strict=True)]
    seen = [rng.choice(options) for options in moves]
    return Worst.within(kind, score, score + sign * reach, seen), moves


@pytest.mark.parametrize(("id_moves", "ood_moves"), [(False, True), (True, False), (True, True)])
def test_the_worst_case_lies_between_proof_and_attack(id_moves, ood_moves):
    """Of every metric the worst value over all moves of all samples, by enumeration, ties included."""
    rng = np.random.default_rng(2 * id_moves + ood_moves)
    for _ in range(25):
        inside, moves_id = random_side(rng, "id", id_moves, 3)
        outside, moves_ood = random_side(rng, "ood", ood_moves, 3)
        found = brackets(inside, outside, gamma=2.0)
        clean = Ranking.of(inside.clean, outside.clean)
        cases = [
            Ranking.of(list(a), list(b))
            for a, b in itertools.product(itertools.product(*moves_id), itertools.product(*moves_ood))
        ]
        for name, metric in METRICS.items():
            values = [metric(case) for case in cases]
            if name in ERRORS:
                assert found[name].attacked <= max(values) <= found[name].certified
            else:
                assert found[name].certified <= min(values) + 1e-15
                if name == "auroc":
                    assert min(values) <= found[name].attacked
            if "aupr" not in name:
                assert found[name].clean == metric(clean)
        rates = [np.mean([t <= 2 for t in a]) for a in itertools.product(*moves_id)]
        assert found["tpr_at_gamma"].certified <= min(rates) <= found["tpr_at_gamma"].attacked
        rates = [np.mean([t <= 2 for t in b]) for b in itertools.product(*moves_ood)]
        assert found["fpr_at_gamma"].attacked <= max(rates) == found["fpr_at_gamma"].certified


def test_gauc_counts_a_tie_as_an_error():
    inside = Worst.within("id", [0.0, 0.0], [1.0, 2.0], [0.0, 0.0])
    outside = Worst.within("ood", [3.0, 3.0], [1.0, 2.0], [3.0, 3.0])
    assert brackets(inside, outside)["auroc"] == guarantees.Bracket(1.0, 1.0, 0.25)


@pytest.mark.parametrize("nothing", [math.nan, math.inf, -math.inf])
def test_a_bound_that_is_not_finite_proves_nothing(nothing):
    inside, outside = Worst.still("id", range(20)), Worst.within("ood", [30.0], [nothing], [math.nan])
    found = brackets(inside, outside, gamma=25.0)
    assert [found[name].certified for name in ("auroc", *ERRORS)] == [0.0, 1.0, 1.0, 1.0]
    assert [found[name].attacked for name in ("auroc", *ERRORS)] == [1.0, 0.0, 0.0, 0.0]
    inside, outside = Worst.within("id", [0.0] * 20, [nothing] * 20, [0.0] * 20), Worst.still("ood", [30.0])
    found = brackets(inside, outside, gamma=25.0)
    assert [found[name].certified for name in ("auroc", "tpr_at_gamma", "fpr95_id", "fpr95_ood")] == [
        0.0,
        0.0,
        1.0,
        1.0,
    ]
    both = brackets(inside, Worst.within("ood", [30.0], [nothing], [30.0]))
    assert both["auroc"].certified == 0.0 and both["aupr_out"].certified == 1 / 21


def test_a_bound_on_the_threshold_proves_nothing():
    inside, outside = Worst.within("id", [0.0], [2.0], [0.0]), Worst.within("ood", [3.0], [2.0], [3.0])
    found = brackets(inside, outside, gamma=2.0)
    assert (found["tpr_at_gamma"].certified, found["fpr_at_gamma"].certified) == (0.0, 1.0)
    assert brackets(Worst.still("id", [2.0]), outside, gamma=2.0)["tpr_at_gamma"].certified == 1.0


def test_what_contradicts_a_proof_is_an_error():
    for kind, score, bound, attacked in (
        ("ood", [1.0, 3.0], [0.0, 2.5], [0.5, 2.0]),  # an attack below the bound
        ("ood", [1.0, 2.0], [0.0, 2.5], [0.5, math.nan]),  # the score itself
        ("id", [1.0, 3.0], [2.0, 3.5], [1.0, 4.0]),
        ("id", [1.0, 4.0], [2.0, 3.5], [1.0, 1.0]),
    ):
        with pytest.raises(
            SoundnessError, match=r"1 (ID|OOD) scores are worse than what is proved, at first .* sample 1"
        ):
            Worst.within(kind, score, bound, attacked)
    with pytest.raises(SoundnessError) as caught:
        Worst.within("id", [1.0, 4.0], [2.0, 3.5], [1.0, 1.0])
    assert {name: values.tolist() for name, values in caught.value.evidence.items()} == {
        "sample": [1],
        "seen": [4.0],
        "bound": [3.5],
    }


@pytest.mark.parametrize("name", ["clean", "attacked"])
def test_figures_out_of_order_are_an_error(name):
    """Scores put together by hand, not by `within`, whose attack or clean score beats the proof."""
    inside, lowered = Worst.still("id", [0.0, 1.0]), {"clean": [2.0], "attacked": [2.0], "proved": [2.0]}
    lowered[name] = [-1.0]
    outside = Worst("ood", *(np.array(lowered[part]) for part in ("clean", "attacked", "proved")), True)
    with pytest.raises(SoundnessError, match=r"auroc: .* should ascend"):
        brackets(inside, outside)


def test_sides_must_be_of_the_same_samples_and_in_their_place():
    with pytest.raises(InputError, match=r"OOD: scores \(2,\), bounds \(1,\) and attacks \(2,\)"):
        Worst.within("ood", [1.0, 2.0], [0.0], [1.0, 2.0])
    with pytest.raises(InputError, match="ID scores: 1 of 1 are NaN"):
        Worst.within("id", [math.nan], [0.0], [1.0])
    with pytest.raises(InputError, match="the first side is ID"):
        brackets(Worst.still("ood", [1.0]), Worst.still("id", [1.0]))
