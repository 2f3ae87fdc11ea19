from __future__ import annotations

import numpy as np
import pytest

from grood_cert.errors import InputError
from grood_cert.results import curves, figures
from grood_cert.results.sweeps import OBJECTIVE, objective_records, over_seeds, read_records, spread_text
from grood_cert.results.table import Table
from grood_cert.system.files import write_csv
from tests.results.examples import random_certification, slopes
from tests.results.test_figures import texts


def run(weight, seed):
    recipe = {"objective": {"lambda_grad": weight}, "seed": seed}
    rows = random_certification(seed)
    analysis = slopes(
        [(kind, eps, 1.0 / (1 + weight), 2.0, 3.0 + eps) for kind in ("id", "ood") for eps in (0.1, 0.2) for _ in "ab"]
    )
    analysis["score"][:] = rows.gamma + np.linspace(-1, 1, len(analysis)) * np.where(
        np.arange(len(analysis)) % 3, 1, -1
    )
    analysis["set"][analysis["kind"] == "id"] = "in"
    analysis["set"][analysis["kind"] == "ood"] = "a"
    more = {"recipe": recipe, "metrics": {"accuracy": 0.9 + seed / 100}}
    return [Table({**table.manifest, **more}, table.columns, table.grid) for table in (rows, analysis)]


RECORDS = [
    record for weight in (0.0, 0.01, 1.0) for seed in range(2) for record in objective_records(*run(weight, seed))
]


def test_records_by_brute_force():
    rows, analysis = run(0.1, 3)
    records = objective_records(rows, analysis, eps=0.2)
    assert [(record["kind"], record["set"]) for record in records] == [("id", "in"), ("ood", "a"), ("ood", "b")]
    for record in records:
        assert tuple(record) == tuple(OBJECTIVE) and (record["lambda_grad"], record["seed"]) == (0.1, 3)
        chosen = [
            row for row in range(len(rows)) if rows["set"][row] == record["set"] and rows["status"][row] != "misdecided"
        ]
        for key in ("radius_certified", "radius_attack", "gradient_norm_estimate"):
            assert record[key] == np.median([rows[key][row] for row in chosen])
        assert record["margin"] == np.median([abs(rows["score"][row] - rows.gamma) for row in chosen])
        if record["kind"] == "ood":
            fpr = curves.fpr_curve(rows, "ood", {"x": rows["set"] == record["set"]})
            assert [record[f"fpr95_id_{name}"] for name in ("clean", "attacked", "certified")] == [
                fpr.certified[0],
                fpr.attacked[2],
                fpr.certified[2],
            ]
        else:
            assert record["fpr95_id_clean"] is None
        assert record["accuracy"] == 0.93
    assert [record["constant_bound"] for record in records] == [3.2, 3.2, None]  # b was not analysed
    for record, kind in zip(records[:2], ("id", "ood"), strict=True):
        chosen = [row for row in range(len(analysis)) if (analysis["kind"][row], analysis["eps"][row]) == (kind, 0.2)]
        right = [row for row in chosen if (analysis["score"][row] - rows.gamma) * (-1 if kind == "id" else 1) > 0]
        ratios = [abs(analysis["score"][row] - rows.gamma) / analysis["bound"][row] for row in right]
        assert record["margin_over_constant_estimate"] == (np.median(ratios) if right else None)
    assert records[2]["margin_over_constant_estimate"] is None
    assert any(record["margin_over_constant_estimate"] for record in records)
    older = Table({**rows.manifest, "metrics": None}, rows.columns, rows.grid)
    assert objective_records(older, None)[0]["accuracy"] is None


def test_what_is_not_known_is_none():
    rows, analysis = run(0.1, 0)
    (alone, *_) = objective_records(None, analysis)
    assert alone["radius_certified"] is None and (alone["constant_bound"], alone["eps_constant"]) == (3.2, 0.2)
    (alone, *_) = objective_records(rows, None)
    assert alone["constant_bound"] is None and alone["margin"] > 0
    for tables, message in (
        ((None, None), "one of them is needed"),
        ((random_certification(0), None), "without a recipe"),
        (
            (rows, Table({**analysis.manifest, "norm": "l2"}, analysis.columns, {})),
            "certified in l_inf and analysed in l_2",
        ),
    ):
        with pytest.raises(InputError, match=message):
            objective_records(*tables)
    with pytest.raises(InputError, match=r"eps 0\.3 is not on the grid"):
        objective_records(rows, analysis, eps=0.3)


@pytest.mark.parametrize("width", ["single", "double"])
def test_the_page_shows_mean_and_spread_over_seeds(width):
    figure = figures.objective(RECORDS, width)
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert labels == ["slope of S, median", "margin, median", "radius, median", "ID accuracy", "FPR at 95 % TPR"]
    margins = figure.axes[3]  # ID, a and b in columns
    (line,) = margins.lines
    (band,) = margins.collections
    for weight, place, mean in zip((0.0, 0.01, 1.0), line.get_xdata(), line.get_ydata(), strict=True):
        each = [r["margin"] for r in RECORDS if r["kind"] == "id" and r["lambda_grad"] == weight]
        assert mean == pytest.approx(np.mean(each))
        heights = [y for x, y in band.get_paths()[0].vertices if x == place]
        assert (min(heights), max(heights)) == pytest.approx((min(each), max(each)))
    assert (np.diff(line.get_xdata()) > 0).all()
    said = texts(figure)
    assert "mean of 2 seeds, and the range from the smallest to the largest; complete" in said
    assert (
        "norm l_inf" in said
        and "constant at eps 0.2" in said
        and "FPR95 at eps 0.1" in said
        and "n 40 in (ID), 40 a (OOD)" in said
    )


def test_records_come_back_from_their_file(tmp_path):
    write_csv(tmp_path / "sweep.csv", ["cell", *OBJECTIVE], [{"cell": "x", **record} for record in RECORDS])
    assert read_records(tmp_path / "sweep.csv") == RECORDS
    for name, content, message in (
        ("missing.csv", None, "cannot be read"),
        ("rows.csv", b"set,kind\na,id\n", "has no column .*grood-cert sweep"),
        ("words.csv", (tmp_path / "sweep.csv").read_bytes().replace(b",in,", b",in,many"), "is no sweep.csv"),
        ("short.csv", (tmp_path / "sweep.csv").read_bytes()[:-40], "a row is not whole"),
        ("picture.csv", b"\x89PNG\xff", "cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_records(tmp_path / name)


def test_one_seed_one_weight_and_unfinished_runs_are_said(tmp_path):
    unfinished = [{**record, "complete": False} for record in RECORDS[:3]]
    figure = figures.objective(unfinished)
    assert "one seed; NOT FINISHED" in texts(figure)
    figures.save(figure, tmp_path / "x.svg")
    with pytest.raises(InputError, match="no records"):
        figures.objective([])
    with pytest.raises(InputError, match=r"the records differ in norm \(l2, linf\)"):
        figures.objective([RECORDS[0], {**RECORDS[1], "norm": "l2"}])


def test_seeds_of_a_group_are_told_together():
    told = over_seeds({"low": [r for r in RECORDS if r["lambda_grad"] < 1], "high": []})
    assert list(told) == ["in", "a", "b"] and [record["group"] for record in told["in"]] == ["low"]
    each = [r["margin"] for r in RECORDS if r["set"] == "a" and r["lambda_grad"] < 1]
    value = told["a"][0]["margin"]
    assert value == {"mean": pytest.approx(np.mean(each)), "least": min(each), "most": max(each), "seeds": 4}
    assert told["b"][0]["constant_bound"] is None and spread_text(None) is None
