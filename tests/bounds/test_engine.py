"""The table of methods, and the sides."""

import pytest

from grood_cert.bounds.engine import METHODS, sign_of, way_of
from grood_cert.errors import InputError


def test_methods_and_sides_are_known_by_name():
    assert {name: (way.hidden, way.rows) for name, way in METHODS.items()} == {
        "ibp": ("ibp", "ibp"),
        "crown-ibp": ("ibp", "crown"),
        "crown": ("crown", "crown"),
    }
    with pytest.raises(InputError, match="unknown method 'crwon'; use one of ibp, crown-ibp, crown"):
        way_of("crwon")
    with pytest.raises(InputError, match="unknown side 'both'; use upper or lower"):
        sign_of("both")
