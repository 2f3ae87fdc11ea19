"""The scripts of analysis/ and benchmarks/ run on a small result."""

from __future__ import annotations

import numpy as np

from analysis import radius_scatter
from benchmarks import bounds
from grood_cert import rows


def test_radius_scatter(rows_file, tmp_path):
    radius_scatter.main(rows_file, tmp_path / "scatter.png")
    assert (tmp_path / "scatter.png").read_bytes()[:4] == b"\x89PNG"
    drawing = radius_scatter.figure(rows.read(rows_file))
    for axes in drawing.axes:
        assert axes.get_legend_handles_labels()[1][1] == "certified: 0% refuted"


def test_bounds_benchmark(model):
    records = bounds.measure(model, samples=4, repeats=1, methods=("ibp", "crown"))
    assert len(records) == 2 * sum(map(len, bounds.EPS.values()))
    for record in records:
        assert tuple(record) == bounds.COLUMNS
        for side in ("upper", "lower"):  # no bound is tighter than what an attack reached
            assert 1 <= record[f"{side}_joint"] <= record[f"{side}_per_logit"] + 1e-9
    assert np.isfinite([record["ms_per_sample"] for record in records]).all()
