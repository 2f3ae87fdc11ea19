from __future__ import annotations

import pytest

from grood_cert.data import parse_spec
from tests.data.examples import refused


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("digits:0-5", ("digits", (0, 1, 2, 3, 4, 5))),
        ("digits:6,7", ("digits", (6, 7))),
        ("digits:7,0-2,5", ("digits", (7, 0, 1, 2, 5))),
        ("digits:3-3", ("digits", (3,))),
        ("mnist", ("mnist", None)),
        ("a:b/x.npz:0-1", ("a:b/x.npz", (0, 1))),
        ("a:1/x.npy", ("a:1/x.npy", None)),
        ("unheard-of:x", ("unheard-of:x", None)),
    ],
)
def test_grammar(spec, expected):
    assert parse_spec(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digits:", "'' in 'digits:' is not a class list; write it like digits:0-5"),
        ("digits:a", "'a' in 'digits:a' is not a class list"),
        ("digits:-1", "is not a class list"),
        ("digits:0, 1", "is not a class list"),
        ("digits:1,,2", "is not a class list"),
        ("digits:1,", "is not a class list"),
        ("digits:1-", "is not a class list"),
        ("digits:1-2-3", "is not a class list"),
        ("digits:0-99999999999", "is not a class list"),
        ("x.npz:cat", "is not a class list"),
        ("digits:5-2", "class range 5-2 in 'digits:5-2' runs backwards; write 2-5"),
        ("digits:0-3,2", "class 2 is listed twice"),
    ],
)
def test_malformed_class_list(spec, message):
    with refused(message):
        parse_spec(spec)
