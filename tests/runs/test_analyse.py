from __future__ import annotations

from dataclasses import replace

import numpy as np

from grood_cert import detector
from grood_cert.data import experiment_of
from grood_cert.lipschitz import analyser as analysis
from grood_cert.results.table import Table
from grood_cert.runs import analyse
from grood_cert.runs.merge import merge
from grood_cert.runs.shards import Shard


def test_shards_of_a_lipschitz_analysis(mlp_model, tmp_path):
    loaded = detector.load(mlp_model)
    sets = [experiment_of(loaded.origin.recipe).test]
    settings = analysis.AnalysisSettings(
        eps=(0.01, 0.05), method="ibp", samples=8, clever_batches=0, ascents=1, batch_size=1
    )
    whole = analyse.run(loaded, mlp_model, sets, settings, tmp_path, limit=2)
    parts = [tmp_path / f"lipschitz-{index}-of-2.csv" for index in (1, 2)]
    for index in range(2):
        analyse.run(loaded, mlp_model, sets, settings, tmp_path, limit=2, shard=Shard(index, 2))
    merge(parts, tmp_path / "merged.csv")
    assert (tmp_path / "merged.csv").read_bytes() == (tmp_path / "lipschitz.csv").read_bytes()
    assert len(Table.read(tmp_path / "merged.csv", "lipschitz")) == len(whole) == 4


def test_the_engine_is_named_and_both_agree(mlp_model, tmp_path):
    loaded = detector.load(mlp_model)
    sets = [experiment_of(loaded.origin.recipe).test]
    settings = analysis.AnalysisSettings(eps=(0.02,), samples=8, clever_batches=0, ascents=1)
    found = {
        engine: analyse.run(loaded, mlp_model, sets, replace(settings, engine=engine), tmp_path / engine, limit=2)
        for engine in ("auto", "native", "auto_lirpa")
    }
    assert [table.manifest["bounded_by"] for table in found.values()] == ["native", "native", "auto_lirpa"]
    assert np.array_equal(found["auto"]["bound"], found["native"]["bound"])
    np.testing.assert_allclose(found["native"]["bound"], found["auto_lirpa"]["bound"], rtol=1e-8)
