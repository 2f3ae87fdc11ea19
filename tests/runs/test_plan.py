from __future__ import annotations

from grood_cert.runs.plan import outline
from tests.runs.work import BATCHES, Worker


def test_a_plan_names_the_work_and_tries_a_little_of_it():
    worker = Worker()
    lines = outline("working", BATCHES, (0.1, 0.2), worker)
    assert lines[:2] == ["working: 18 samples of 3 sets x 2 eps = 36 balls, in 10 batches", "  z (id): 11 samples"]
    assert worker.done == [0, 9] and "from 3 samples tried" in lines[-1]
    assert outline("working", [], (), worker) == ["working: 0 samples of 0 sets, in 0 batches"]
