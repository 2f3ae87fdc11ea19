from __future__ import annotations

import pytest

from grood_cert import metrics
from grood_cert.data import experiment_of
from grood_cert.detector import load
from grood_cert.scores import named
from grood_cert.training import run as training
from grood_cert.training.evaluation import best_epoch
from tests.training.examples import small


def test_best_epoch():
    def row(epoch, accuracy, fpr):
        return {"epoch": epoch, "accuracy": accuracy, "fpr95_id": fpr}

    rows = [
        row(1, 0.1, 0.0),
        row(2, 0.9, 0.2),
        row(3, 0.8, 0.1),
        row(4, 0.85, 0.1),
        row(5, 0.85, 0.1),
        row(6, 0.9, 0.3),
    ]
    assert best_epoch(rows, 0.5) == 5
    assert best_epoch(rows[:3], 0.5) == 3
    assert best_epoch(rows, 0.0) == 1
    assert best_epoch(rows, 0.95) is None


@pytest.mark.parametrize("chosen", ["energy", "msp"])
def test_the_recipe_names_the_score_and_its_temperature(tmp_path, chosen):
    recipe = small(evaluation={"score": chosen, "temperature": 10.0})
    detector = training.run(recipe, tmp_path)
    data = experiment_of(recipe)
    inside = detector.network(data.test.images.double())
    for item in data.ood:
        outside = detector.network(item.images.double())
        found = detector.origin.metrics["ood"][item.name]
        expected = {
            "energy": [-10 * (logits / 10).exp().sum(1).log() for logits in (inside, outside)],
            "max-logit": [-logits.max(1).values for logits in (inside, outside)],
            "msp": [-(logits / 10).softmax(1).max(1).values for logits in (inside, outside)],
        }
        assert set(found["scores"]) == set(expected)
        for name, (low, high) in expected.items():
            record = found["scores"][name]
            assert record["auroc"] == pytest.approx(metrics.auroc(low.numpy(), high.numpy()), abs=1e-9)
            assert record["fpr95_id"] == pytest.approx(metrics.fpr95_id(low.numpy(), high.numpy()), abs=1e-9)
        assert found["auroc"] == found["scores"][chosen]["auroc"]
    assert load(tmp_path / "model.pt").score == detector.score == named(chosen, 10.0)
    calibration = detector.scores(data.calibration.images).numpy()
    assert detector.gamma == metrics.calibrated_threshold(calibration, 95)
