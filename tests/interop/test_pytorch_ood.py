"""Against the package itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

api = pytest.importorskip("pytorch_ood.api", reason="needs the optional package pytorch-ood")

from pytorch_ood.detector import EnergyBased
from pytorch_ood.metrics import OODMetrics

from grood_cert.interop.pytorch_ood import CertifiedDetector


def test_without_balls_it_is_their_energy(detector, inside):
    ours, theirs = CertifiedDetector(detector), EnergyBased(detector.network)
    assert isinstance(ours, api.Detector) and not ours.requires_fit
    assert ours.fit(DataLoader(TensorDataset(*inside))) is ours
    torch.testing.assert_close(ours(inside[0]), theirs.predict(inside[0].double()), rtol=1e-13, atol=0)
    assert ours.to("cpu") is ours and ours.device == torch.device("cpu")


def test_their_metrics_of_proved_scores_are_guarantees(detector, inside, outside):
    """No attack on the OOD images can lower the AUROC below that of their lower bounds."""
    labels = torch.cat([inside[1], -torch.ones(len(outside), dtype=torch.long)])
    found = {}
    x = outside.double().requires_grad_()
    uphill = torch.autograd.grad(-torch.logsumexp(detector.network(x), 1).sum(), x)[0].sign().float()
    for eps in (0.0, 0.1, 0.2):
        attacked = outside - eps * uphill
        for name, scores in (
            ("proved", CertifiedDetector(detector, eps)(outside)),
            ("attacked", CertifiedDetector(detector)(attacked)),
        ):
            metrics = OODMetrics()
            metrics.update(torch.cat([CertifiedDetector(detector)(inside[0]), scores]), labels)
            found[name, eps] = float(metrics.compute()["AUROC"])
        assert found["proved", eps] <= found["attacked", eps] + 1e-9
    assert found["proved", 0.2] < found["proved", 0.1] < found["proved", 0.0]
    assert found["proved", 0.0] == found["attacked", 0.0] > 0.9
