"""How the campaign tells ends apart, what damage it does, and a few faults of it; `make faults` runs all."""

from __future__ import annotations

import pytest

from tests.faults.campaign import damage, end_of
from tests.faults.forks import Ended
from tests.faults.tally import printed


@pytest.mark.parametrize(
    ("code", "said", "end"),
    [
        (0, "", "finished"),
        (-9, "", "died of SIGKILL"),
        (-14, "", "broken: hung"),
        (2, "grood-cert: error: cannot", "one line, exit 2"),
        (2, "grood-cert: error: cannot\ngrood-cert: error: either", "broken: exit 2"),
        (1, "Traceback (most recent call last):\nx: error: y", "broken: exit 1"),
        (70, "x: error: y", "broken: exit 70"),
        (1, "", "broken: exit 1"),
    ],
)
def test_ends_are_told_apart(code, said, end):
    assert end_of(Ended(code, said, (), 0.0)) == end


def test_damage_is_one_accident():
    import random

    content = bytes(range(200))
    for seed in range(50):
        draw = random.Random(seed)
        found = damage(content, "a bit inverted", draw)
        assert sum((one ^ two).bit_count() for one, two in zip(found, content, strict=True)) == 1
        assert content.startswith(damage(content, "cut", draw)) and not damage(content, "emptied", draw)


def test_a_merge_survives_a_few_faults_and_a_few_cases_of_the_fuzzer_are_refused_in_one_line_or_read_aright():
    faults = "killed", "terminated", "disk", "damaged"
    merge = "--jobs", "merge", "--moments", "1", "--seed", "1", "--faults", *faults
    said = printed(("tests.faults", *merge), ("tests.fuzz", "--cases", "50", "--seed", "1"))
    assert " faults, 0 violations" in said and "50 cases, 0 violations" in said
