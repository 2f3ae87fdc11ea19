"""Each convention against the toolkit itself where it is installed, else against its rule told with scikit-learn.

The toolkits take confidences (high = ID) or outlier scores (high = OOD); theirs are made of S by its sign.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_ood.metrics import OODMetrics
from sklearn import metrics as sk

from grood_cert import conventions
from grood_cert.conventions import CONVENTIONS, evaluate
from grood_cert.errors import InputError

LOW, MID, TOP = 0.0, 1.0, 2.0
HARD = {  # (ID scores, OOD scores), low = ID: ties within and between classes about the 95 % point, and tiny sets
    "one of each, apart": ([LOW], [TOP]),
    "one of each, the wrong way round": ([TOP], [LOW]),
    "one of each, tied": ([LOW], [LOW]),
    "all tied": ([LOW] * 7, [LOW] * 5),
    "92 % of ID in the first group": ([LOW] * 92 + [TOP] * 8, [LOW] * 50 + [TOP] * 50),
    "97 % of ID in the first group": ([LOW] * 97 + [TOP] * 3, [LOW] * 50 + [TOP] * 50),
    "exactly 95 % of ID in the first group": ([LOW] * 95 + [TOP] * 5, [LOW] * 10 + [TOP] * 90),
    "92 % of OOD in the last group": ([LOW] * 50 + [TOP] * 50, [LOW] * 8 + [TOP] * 92),
    "exactly 95 % of OOD in the last group": ([LOW] * 90 + [TOP] * 10, [LOW] * 5 + [TOP] * 95),
    "95 % lies in the middle group": ([LOW] * 90 + [MID] * 8 + [TOP] * 2, [LOW] * 5 + [MID] * 20 + [TOP] * 75),
    "three groups, all shared": ([LOW, MID, TOP] * 10, [LOW, MID, TOP] * 10),
    "equal steps of both classes": (list(range(20)), list(range(20))),
    "equal steps of both classes, twice": (list(range(40)) * 2, list(range(40)) * 3),
    "equal steps, then OOD alone": (list(range(19)), list(range(19)) + [30.0] * 21),
    "equal steps after ID alone": ([-1.0] * 30 + list(range(10)), list(range(10))),
    "ID quantised, OOD between": (list(np.repeat(range(10), 10)), list(np.arange(100) / 10 + 0.05)),
    "OOD quantised, ID between": (list(np.arange(100) / 10 + 0.05), list(np.repeat(range(10), 10))),
    "both quantised": (list(np.repeat(range(10), 10)), list(np.repeat(range(5, 15), 7))),
    "19 ID samples": (list(range(19)), list(np.arange(19) + 0.5)),
    "20 ID samples, OOD tied with the 19th": (list(range(20)), [18.0] * 10 + [30.0] * 10),
    "20 ID samples, OOD tied with the last": (list(range(20)), [19.0] * 10 + [30.0] * 10),
    "21 ID samples, OOD between": (list(range(21)), [18.5] * 5 + [19.5] * 5 + [30.0] * 10),
    "zeros of both signs": ([-0.0, 0.0, 0.0, 1.0], [0.0, -0.0, 2.0]),
    "scores that float32 cannot tell apart": ([1.0, 1.0 + 1e-12], [1.0 + 1e-12, 1.0 + 2e-12]),
    "large scores, where a sigmoid is 1": ([-900.0, -40.0, -39.0], [-40.0, 50.0, 900.0, 901.0]),
}


def labelled(inside, outside):
    """Labels (ID 1, OOD 0) and confidences."""
    return np.array([1] * len(inside) + [0] * len(outside)), -np.array([*inside, *outside])


def openood(inside, outside):
    label, confidence = labelled(inside, outside)
    fpr, tpr, _ = sk.roc_curve(1 - label, -confidence)  # drops points between others, as is the default
    return {
        "FPR@95": fpr[(tpr >= 0.95).nonzero()[0][0]],
        "AUROC": sk.auc(fpr, tpr),
        "AUPR_IN": sk.auc(*sk.precision_recall_curve(label, confidence)[1::-1]),
        "AUPR_OUT": sk.auc(*sk.precision_recall_curve(1 - label, -confidence)[1::-1]),
    }


def pytorch_ood(inside, outside):
    outlier = torch.tensor([*inside, *outside], dtype=torch.float64)
    measured = OODMetrics()
    measured.update(outlier, torch.tensor([0] * len(inside) + [-1] * len(outside)))
    return measured.compute()


def energy_ood(inside, outside):
    label, confidence = labelled(inside, outside)
    fpr, tpr, _ = sk.roc_curve(label, confidence, drop_intermediate=False)
    full = tpr.argmax()  # of two thresholds as near: more recall, then, but at full recall, more false positives
    points = zip(fpr[1 : full + 1], tpr[1 : full + 1], strict=True)
    nearest = min((abs(recall - 0.95), -recall, -false) for false, recall in points)
    return {
        "FPR": -nearest[2],
        "AUROC": sk.roc_auc_score(label, confidence),
        "AUPR": sk.average_precision_score(label, confidence),
    }


def dos(inside, outside):
    label, confidence = labelled(inside, outside)
    of_id, of_ood = confidence[label == 1], confidence[label == 0]
    threshold = np.sort(of_id)[-int(0.95 * len(of_id))]
    fpr, tpr, _ = sk.roc_curve(label, confidence)
    precision, recall, _ = sk.precision_recall_curve(label, confidence)
    return {"FPR": (of_ood > threshold).mean(), "AUROC": sk.auc(fpr, tpr), "AUPR": sk.auc(recall, precision)}


def prood(inside, outside):
    label, confidence = labelled(inside, outside)
    of_id, of_ood = confidence[label == 1], confidence[label == 0]
    return {
        "AUC": np.mean([[out < own for out in of_ood] for own in of_id]),
        "AUPR": sk.average_precision_score(label, confidence),
        "FPR@95": (of_ood >= np.quantile(of_id, 1 - 0.95)).mean(),
    }


TOOLKITS = {
    "openood": openood,
    "pytorch-ood": pytorch_ood,
    "energy_ood": energy_ood,
    "greg": energy_ood,
    "dos": dos,
    "prood": prood,
}


def agree(convention, inside, outside):
    found, expected = evaluate(inside, outside, convention), TOOLKITS[convention](inside, outside)
    assert list(found) == list(expected)
    for name, value in expected.items():
        if name.startswith("FPR"):
            assert found[name] == value, (convention, name)
        else:
            assert found[name] == pytest.approx(value, abs=1e-14, nan_ok=True), (convention, name)


@pytest.mark.filterwarnings("ignore:AUTC is undefined")
@pytest.mark.parametrize("convention", TOOLKITS)
def test_hard_ties(convention):
    assert len(HARD) == 25
    for inside, outside in HARD.values():
        agree(convention, inside, outside)


@pytest.mark.filterwarnings("ignore:AUTC is undefined")
@pytest.mark.parametrize("convention", TOOLKITS)
def test_random_scores(convention):
    rng = np.random.default_rng(0)
    for trial in range(50):
        sizes = rng.integers(1, 80, 2)
        inside, outside = (rng.normal(mean, 1, size) for mean, size in zip((0, 1), sizes, strict=True))
        if trial % 2:
            inside, outside = np.round(inside, trial % 3), np.round(outside, trial % 3)
        agree(convention, inside, outside)


@pytest.mark.filterwarnings("ignore:AUTC is undefined")
def test_the_hard_cases_tell_every_toolkit_from_this_package_but_pytorch_ood():
    own = {"openood": "fpr95_ood", "pytorch-ood": "fpr95_ood"}
    differ = dict.fromkeys(TOOLKITS, 0)
    for inside, outside in HARD.values():
        for convention, told in TOOLKITS.items():
            fpr = next(value for name, value in told(inside, outside).items() if name.startswith("FPR"))
            differ[convention] += fpr != evaluate(inside, outside)[own.get(convention, "fpr95_id")]
    assert differ.pop("pytorch-ood") == 0 and min(differ.values()) > 0, differ


def test_the_convention_of_this_package():
    found = evaluate([0.0, 1.0], [1.0, 2.0], labels=[3, 4], predictions=[3, 3])
    assert found == {
        "auroc": 0.875,
        "aupr_in": pytest.approx(5 / 6),
        "aupr_out": pytest.approx(5 / 6),
        "aupr_in_trapezoid": pytest.approx(11 / 12),
        "aupr_out_trapezoid": pytest.approx(11 / 12),
        "detection_error": 0.25,
        "oscr": 0.5,
        "fpr95_id": 0.5,
        "fpr95_ood": 0.5,
        "accuracy": 0.5,
    }
    assert evaluate([0.0, 1.0], [1.0, 2.0], tpr=50)["fpr50_id"] == 0.0


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_confidence_is_a_score_of_the_other_sign(convention):
    rng = np.random.default_rng(1)
    inside, outside = rng.integers(0, 9, 50) / 4, rng.integers(3, 12, 40) / 4
    assert evaluate(-inside, -outside, convention, high="id") == evaluate(inside, outside, convention)


@pytest.mark.parametrize("convention", ["openood", "pytorch-ood", "prood"])
def test_accuracy_is_printed_where_the_toolkit_prints_it(convention):
    found = evaluate([0.0, 1.0], [2.0], convention, labels=[0, 1], predictions=[0, 0])
    assert list(found.values())[-1] == 0.5


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_single_precision_counts_as_it_is(convention):
    """Scores in float32 tie as float32; ProoD's quantile is then of float32, as its own is."""
    rng = np.random.default_rng(2)
    inside, outside = (rng.normal(mean, 1, 59).astype(np.float32) for mean in (0, 1))
    found = evaluate(inside, outside, convention)
    if convention == "prood":
        assert found["FPR@95"] == (-outside >= np.quantile(-inside, 1 - 0.95)).mean()
    else:
        assert found == evaluate(inside.astype(float), outside.astype(float), convention)


def test_infinite_scores_have_no_figure_where_scikit_learn_refuses_them():
    inside, outside = [-np.inf, 0.0, 1.0], [1.0, np.inf]
    assert evaluate(inside, outside)["auroc"] == 1 - 1 / 12
    assert evaluate(inside, outside, "pytorch-ood")["AUROC"] == 1 - 1 / 12
    for convention in ("openood", "energy_ood", "greg", "dos", "prood"):
        with pytest.raises(InputError, match=f"infinite scores: {convention} refuses them"):
            evaluate(inside, outside, convention)


def test_intervals():
    rng = np.random.default_rng(3)
    inside, outside = rng.normal(0, 1, 200), rng.normal(2, 1, 100)
    labels, predictions = rng.integers(0, 2, 200), np.zeros(200)
    found = evaluate(inside, outside, labels=labels, predictions=predictions, intervals=True)
    plain = evaluate(inside, outside, labels=labels, predictions=predictions)
    assert {name: found[name] for name in plain} == plain and len(found) == 3 * len(plain)
    for name, value in plain.items():
        assert found[f"{name}_low"] < value < found[f"{name}_high"]
    count = round(plain["fpr95_id"] * 100)
    assert [found["fpr95_id_low"], found["fpr95_id_high"]] == conventions.clopper_pearson(count, 100).tolist()
    # DeLong's standard error of the AUROC, from placements
    placed_id = np.array([(outside > s).mean() for s in inside])
    placed_ood = np.array([(inside < s).mean() for s in outside])
    error = np.sqrt(placed_id.var(ddof=1) / 200 + placed_ood.var(ddof=1) / 100)
    assert found["auroc_high"] - found["auroc_low"] == pytest.approx(2 * 1.96 * error, rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"convention": "robustbench"}, "unknown convention 'robustbench'; use one of grood, openood"),
        ({"high": "noise"}, "the class with high scores is id or ood, not 'noise'"),
        ({"labels": [0, 1]}, "labels and predictions go together"),
        ({"labels": [0], "predictions": [0]}, "1 labels for 2 ID scores"),
        ({"labels": [0, 1], "predictions": [0]}, "expected two lists of the same length"),
        ({"tpr": 90, "convention": "dos"}, "are for the convention grood; dos prints FPR at 95 % alone"),
        ({"intervals": True, "convention": "dos"}, "are for the convention grood"),
        ({"tpr": 0.95}, "percent: expected a number from 1 to 100, got 0.95"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate([0.0, 1.0], [1.0, 2.0], **arguments)
