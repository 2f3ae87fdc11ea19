from __future__ import annotations

import csv
import functools
import io
from dataclasses import replace

import pytest

from grood_cert.confidence import bootstrap
from grood_cert.errors import InputError
from grood_cert.results.brackets import brackets_of
from grood_cert.results.comparison import as_csv, as_latex, as_markdown, compare
from tests.results.examples import EPS, random_certification, smoothing


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    few = functools.partial(bootstrap, resamples=60)
    monkeypatch.setattr("grood_cert.guarantees.bootstrap", few)
    monkeypatch.setattr("grood_cert.results.brackets.bootstrap", few)


A, B = random_certification(1), random_certification(2, share_nan=0.4)
SMOOTHED = smoothing(
    [
        ("id", "in", -1.0, -1.0, "accepted", "certified", 0.3, (-1.5, -2.0)),
        ("ood", "a", 1.0, 1.0, "rejected", "certified", 0.3, (0.5, 0.4)),
    ]
)


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


def test_markdown_has_a_line_for_each_model_set_and_eps_and_their_means():
    header, _, *lines = cells(as_markdown(compare({"energy": A, "greg": B}, eps=EPS)))
    assert header[:5] == ["model", "OOD set", "eps", "n ID", "n OOD"]
    assert header[5:] == ["FPR95 clean", "FPR95 attacked", "FPR95 certified", "AUROC", "AAUC", "GAUC"]
    assert [line[:3] for line in lines] == [
        [model, name, f"{eps:g}"] for model in ("energy", "greg") for eps in EPS for name in ("a", "b", "mean of 2")
    ]
    records = brackets_of(B, eps=EPS)
    shown = ("fpr95_id", "fpr95_id_attacked", "fpr95_id_certified", "auroc", "auroc_attacked", "auroc_certified")
    assert lines[6][5:] == [f"{100 * records[0][name]:.2f}" for name in shown]
    assert float(lines[8][7]) == pytest.approx(50 * sum(r["fpr95_id_certified"] for r in records[:2]), abs=0.006)
    assert len({len(line) for line in as_markdown(compare({"m": A})).splitlines()[:5]}) == 1  # aligned on a screen


def test_names_cannot_break_out_of_their_cells():
    comparison = compare({r"a|b_<i>50 %\ ": A})
    assert r"| a\|b_&lt;i>50 %\\ | a" in as_markdown(comparison)
    assert r"a|b\_\textless{}i\textgreater{}50 \%\textbackslash{} & a & 0.1 & 40 & 40 &" in as_latex(comparison)


def test_latex_is_a_tabular_of_booktabs():
    text = as_latex(compare({"energy": A, "greg": B}, "both"))
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    assert lines[0] == r"\begin{tabular}{llrrrrrrrrr}" and lines[-1] == r"\end{tabular}"
    assert (lines[1], lines[3], lines[-2]) == (r"\toprule", r"\midrule", r"\bottomrule")
    assert all(line.count(" & ") == 10 and line.endswith(r" \\") for line in lines if "&" in line)
    assert "% l_inf, ID and OOD move within eps" in text


def test_csv_holds_all_metrics_with_all_digits():
    comparison = compare({"m": A}, "id", EPS, with_intervals=True)
    read = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert len(read) == 4
    for before, after in zip(brackets_of(A, "id", EPS, with_intervals=True), read, strict=True):
        assert after.pop("model") == "m" and after.pop("set") == before.pop("set")
        assert {name: float(value) for name, value in after.items()} == before


def test_intervals_are_shown_in_brackets():
    line = cells(as_markdown(compare({"m": A}, with_intervals=True)))[2]
    record = brackets_of(A, with_intervals=True)[0]
    low, high = (100 * record[f"fpr95_id_certified_{end}"] for end in ("low", "high"))
    assert line[7] == f"{100 * record['fpr95_id_certified']:.2f} [{low:.1f}, {high:.1f}]"


def test_smoothing_has_a_table_of_its_own_that_says_its_alpha():
    text = as_markdown(compare({"m": SMOOTHED}))
    assert cells(text)[0][5:] == ["FPR95 (estimate)", "FPR95 (1 - alpha)", "AUROC (estimate)", "GAUC (1 - alpha)"]
    assert "hold with probability 0.99 a sample" in text and "not proved" in text and "sigma 0.1, 10 draws" in text
    with pytest.raises(InputError, match="certification and smoothing make different tables"):
        compare({"m": A, "s": SMOOTHED})
    with pytest.raises(InputError, match="leave --perturb away"):
        compare({"s": SMOOTHED}, "id")


def test_results_that_do_not_go_together_are_refused():
    other = replace(A, manifest={**A.manifest, "norm": "l2"})
    with pytest.raises(InputError, match="l2 and linf do not compare"):
        compare({"m": A, "n": other})
    finer = replace(A, manifest={**A.manifest, "eps": [0.15, 0.2]})
    with pytest.raises(InputError, match=r"name one that all have with --eps \(they share 0\.2\)"):
        compare({"m": A, "n": finer})
    assert len(compare({"m": A, "n": finer}, eps=[0.2]).records) == 4
    with pytest.raises(InputError, match="there is no table of nothing"):
        compare({})


def test_what_is_unfinished_is_said():
    part = replace(A, manifest={**A.manifest, "complete": False, "samples_done": 160, "of_samples": 400})
    assert "m is unfinished: 160 of 400 samples." in as_markdown(compare({"m": part}))
    assert "% m is unfinished: 160 of 400 samples." in as_latex(compare({"m": part}))
