from __future__ import annotations

import math

import torch

from grood_cert.certification.envelope import Envelope
from grood_cert.certification.outcomes import Outcome


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


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


def test_ood_is_certified_by_lower_bounds_strictly():
    envelope = Envelope((0.1, 0.2), tensor([3.0, 3.0]), 1.0, "ood")
    both, nan = torch.arange(2), tensor([math.nan] * 2)
    envelope.record(both, tensor([0.15, 0.15]), tensor([1.0, 1.0 + 1e-9]), nan, "crown")
    assert envelope.radius.tolist() == [0.0, 0.15]  # S_lb = gamma proves nothing
    assert envelope.outcome.tolist() == [[0, 0], [Outcome.CROWN, 0]]
    assert envelope.stage.tolist() == [0, Outcome.CROWN]
    assert envelope.upper.tolist() == [[math.inf] * 2] * 2


def test_a_ball_of_radius_zero_certifies_nothing():
    """What found no radius says 0; the image itself may still be on gamma."""
    envelope = Envelope((0.0, 0.1), tensor([1.0]), 1.0, "id")
    envelope.certify(torch.tensor([0]), tensor([0.0]), "lipschitz")
    assert envelope.outcome.tolist() == [[0, 0]] and envelope.radius.tolist() == [0.0]


def test_a_smaller_ball_proved_later_changes_no_radius():
    envelope = Envelope((0.1, 0.2), tensor([-3.0]), -1.0, "id")
    first, nan = torch.tensor([0]), tensor([math.nan])
    for eps, stage in ((0.2, "ibp"), (0.1, "crown")):
        envelope.record(first, tensor([eps]), nan, tensor([-2.0]), stage)
    assert envelope.radius.tolist() == [0.2] and envelope.stage.tolist() == [Outcome.IBP]
    assert envelope.outcome.tolist() == [[Outcome.IBP] * 2]
