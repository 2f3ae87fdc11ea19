from __future__ import annotations

import math

import torch

from grood_cert.certification.envelope import Envelope
from grood_cert.certification.outcomes import Outcome


def test_an_envelope_counts_each_bound_for_all_smaller_balls():
    def tensors(*values):
        return [torch.tensor(value, dtype=torch.float64) for value in values]

    envelope = Envelope((0.1, 0.2, 0.3), *tensors([-3.0, -3.0]), -1.0, "id")
    both = torch.arange(2)
    envelope.record(both, *tensors([0.25, 0.05], [-9.0, -4.0], [-2.0, -2.5]), "ibp")
    assert envelope.upper.tolist() == [[-2, -2, math.inf], [math.inf] * 3]
    envelope.record(both, *tensors([0.1, 0.3], [math.nan] * 2, [-2.5, -1.0]), "crown")
    assert envelope.upper.tolist() == [[-2.5, -2, math.inf], [-1, -1, -1]]
    assert envelope.lower[:, 0].tolist() == [-9, -math.inf]
    assert envelope.radius.tolist() == [0.25, 0.05]  # S_ub = gamma proves nothing
    assert [[Outcome.numbered(code).word for code in row] for row in envelope.outcome.tolist()] == [
        ["ibp", "ibp", "undecided"],
        ["undecided"] * 3,
    ]
