from __future__ import annotations

import pytest

from grood_cert.errors import InputError
from grood_cert.results.table import labelled
from tests.results.certifications import random_certification


def test_labels(tmp_path):
    one, two = random_certification(0), random_certification(1)
    paths = [tmp_path / "a/rows.csv", tmp_path / "b/rows.csv"]
    assert list(labelled([one], paths[:1], [])) == ["m"]
    assert list(labelled([one, two], paths, [])) == ["a", "b"]
    assert list(labelled([one, two], paths, ["x", "y"])) == ["x", "y"]
    with pytest.raises(InputError, match="2 labels for 1 rows files"):
        labelled([one], paths[:1], ["x", "y"])
    with pytest.raises(InputError, match="same name"):
        labelled([one, two], paths, ["x", "x"])
