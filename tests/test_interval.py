"""One margin for rounding, and one meaning of ordered and crossed."""

import re
from pathlib import Path

import pytest
import torch

import grood_cert
from grood_cert.interval import ROUNDING, crossed, intersect, ordered, outward


def test_outward_moves_both_ends_by_a_share_of_the_magnitude():
    lower, upper = outward(torch.tensor([1.0]).double(), torch.tensor([2.0]).double(), torch.tensor([1e6]).double())
    assert float(1 - lower) == pytest.approx(1e6 * ROUNDING, rel=1e-3)
    assert float(upper - 2) == pytest.approx(1e6 * ROUNDING, rel=1e-3)


@pytest.mark.parametrize("bad", [(torch.nan, 1.0), (0.0, torch.inf), (-torch.inf, 0.0), (1.0, 0.0), (1.0 + 1e-14, 1.0)])
def test_one_bad_pair_makes_a_sample_not_ordered(bad):
    lower, upper = torch.zeros(2, 3).double(), torch.ones(2, 3).double()
    lower[1, 2], upper[1, 2] = bad
    assert ordered(lower, upper).tolist() == [True, False]


@pytest.mark.parametrize(
    ("pair", "answer"),
    [
        ((1.0, 0.0), True),
        ((1.0 + 1e-14, 1.0), False),
        ((0.0, 1.0), False),
        ((torch.nan, 0.0), False),
        ((torch.inf, 0.0), False),
    ],
)
def test_only_what_rounding_cannot_explain_is_crossed(pair, answer):
    assert bool(crossed(*(torch.tensor(end).double() for end in pair))) is answer


def test_intersections_keep_the_tighter_ends():
    first, second = (torch.tensor([0.0]), torch.tensor([2.0])), (torch.tensor([1.0]), torch.tensor([3.0]))
    assert [float(end) for end in intersect(first, second)] == [1.0, 2.0]


def test_the_margin_is_defined_once():
    root = Path(grood_cert.__file__).parent
    found = [
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(r"^\w+\s*(?::[^=]*)?=\s*(?:1\s*[-+]\s*)?1e-12", path.read_text(), re.MULTILINE)
    ]
    assert found == ["interval.py"]
