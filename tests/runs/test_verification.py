"""True records are not contradicted; a record with any one cell changed is found out, or the docs say why it is not."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import grood_cert
from grood_cert import detector
from grood_cert.certification.settings import Settings
from grood_cert.certification.smoothing import SmoothingSettings
from grood_cert.data import experiment_of
from grood_cert.errors import InputError
from grood_cert.lipschitz.analyser import AnalysisSettings
from grood_cert.results.columns import SCHEMAS
from grood_cert.results.table import Table
from grood_cert.runs import analyse, certify, smooth
from grood_cert.runs.merge import merge
from grood_cert.runs.shards import Shard
from grood_cert.runs.verification.run import specs, verify
from tests.recorder import Recorder

DOCS = Path(grood_cert.__file__).parents[1] / "docs" / "trust.md"


class Runs:
    """One small run of each kind, and what it takes to check them."""

    def __init__(self, model, folder):
        self.model, self.folder, self.detector = model, folder, detector.load(model)
        experiment = experiment_of(self.detector.origin.recipe)
        self.sets, self.calibration = [experiment.test, experiment.ood[0]], experiment.calibration
        about = self.detector, model
        bounds = Settings(eps=(0.01, 0.03), effort="fast", per_logit=True, batch_size=4)
        self.tables = {"certification": certify.run(*about, self.sets, bounds, folder / "whole", limit=6)}
        noise = SmoothingSettings(sigma=0.25, eps=(0.1, 1.0), n=100, calibration_limit=30)
        self.tables["smoothing"] = smooth.run(*about, self.calibration, self.sets, noise, folder, limit=6)
        self.tables["smoothing-calibration"] = Table.read(folder / "smoothing-calibration.csv")
        slopes = AnalysisSettings((0.01, 0.03), samples=8, clever_batches=2, ascents=1)
        self.tables["lipschitz"] = analyse.run(*about, self.sets[:1], slopes, folder, limit=2)

    def verify(self, table, **options):
        sets = [self.calibration] if table.kind == "smoothing-calibration" else self.sets
        if table.kind == "smoothing":
            options["calibration"] = self.tables["smoothing-calibration"]
        return verify(table, self.detector, self.model, sets, **{"every": 1, **options})


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    return Runs(model, tmp_path_factory.mktemp("runs"))


def contradicted(found):
    return {claim for claim, check in found.checks.items() if check.contradicted}


def missed(found):
    """Checks that did not find again all that they looked for."""
    return {claim for claim, check in found.checks.items() if check.repeated not in (None, check.checked)}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_true_record_is_not_contradicted(runs, kind):
    heard = Recorder()
    found = runs.verify(runs.tables[kind], reporter=heard)
    assert not contradicted(found) and not missed(found) and not found.contradictions
    samples = len(set(zip(runs.tables[kind]["set"].tolist(), runs.tables[kind]["index"].tolist(), strict=True)))
    assert found.checks["samples"].checked == samples == sum(heard.steps)
    assert found.checks["score, computed again"].checked == len(runs.tables[kind])


def test_what_is_tried(runs):
    table = runs.tables["certification"]
    assert runs.verify(table, every=4).checks["s_lb and s_ub, attacked afresh"].checked in (4, 6, 8)
    assert runs.verify(table, every=100, limit=1).checks["s_lb and s_ub, attacked afresh"].checked in (0, 2, 4)
