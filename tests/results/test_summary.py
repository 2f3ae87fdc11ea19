from __future__ import annotations

import pytest

from tests.results.certifications import certification, sample


def test_radius_summary():
    records = [
        sample("id", "in", -1.0, [(0.0,) * 4] * 2, radius=0.2, attack=0.4),
        sample("id", "in", -1.0, [(0.0,) * 4] * 2, radius=0.3, attack=0.4),
        sample("id", "in", -1.0, [(0.0,) * 4] * 2, radius=0.0, attack=0.5, status="undecided"),
        sample("id", "in", 1.0, [(0.0,) * 4] * 2, radius=0.0, attack=0.0, status="misdecided"),
        sample("ood", "a", -1.0, [(0.0,) * 4] * 2, radius=0.0, attack=0.0, status="misdecided"),
    ]
    inside, outside = certification(records).summary()
    assert (inside["samples"], inside["certified"], inside["undecided"], inside["misdecided"]) == (4, 2, 1, 1)
    assert inside["radius_certified"] == 0.2 and inside["radius_attack"] == 0.4
    assert inside["certified_to_attack"] == pytest.approx(0.5)
    assert outside["radius_certified"] is None and outside["certified_to_attack"] is None
