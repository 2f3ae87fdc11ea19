"""The mutations of the fuzzer; a few cases of it run beside the faults, `make fuzz` runs all. What it found has a test of its own."""

from __future__ import annotations

import random

from tests.fuzz.mutation import of_bytes, of_text, of_value


def test_mutations_change_and_are_those_of_their_seed():
    value, changed = {"a": [1, 2.5, {"b": "x"}], "c": True}, 0
    for seed in range(200):
        one, two = (of_value(value, random.Random(seed)) for _ in range(2))
        assert repr(one) == repr(two)
        changed += repr(one) != repr(value)
        assert of_bytes(b"content", random.Random(seed)) == of_bytes(b"content", random.Random(seed))
        assert of_text("a = 1\nb = 2", random.Random(seed)) == of_text("a = 1\nb = 2", random.Random(seed))
    assert changed > 180 and value == {"a": [1, 2.5, {"b": "x"}], "c": True}
