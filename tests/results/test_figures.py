from __future__ import annotations

import csv
import dataclasses
import math

import matplotlib as mpl
import numpy as np
import pytest

from grood_cert.errors import InputError
from grood_cert.results import curves, figures
from grood_cert.results.table import Table
from tests.results.examples import certification, random_certification, sample, slopes
from tests.results.test_curves import smoothed

SLOPES = slopes([(kind, eps, 1.0, 2.0, 3.0 + eps) for kind in ("id", "ood", "noise") for eps in (0.1, 0.2)])


def drawn(axes, style, points=2):
    """The curves of an axes in one style, model by model; single marks are left out."""
    return [line for line in axes.lines if line.get_linestyle() == style and len(line.get_xdata()) >= points]


def texts(figure):
    """Everything that is written on a figure, line breaks as spaces."""
    found = (text.get_text() for text in figure.findobj(mpl.text.Text))
    return " ".join(" ".join(found).split())


@pytest.mark.parametrize("suffix", [".pdf", ".svg", ".PNG"])
def test_figures_are_written_by_file_name_and_reproducible(tmp_path, suffix):
    models = {"one": random_certification(0), "two": random_certification(1, 0.2)}
    content = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}{suffix}"
        figures.save(figures.robustness(models, panel="id-radius"), path)
        content.append(path.read_bytes())
    assert content[0] == content[1]
    assert content[0][:4] == {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xm"}[suffix.lower()]
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == [f"a{suffix}", f"b{suffix}"]
    if suffix == ".svg":
        assert b">gamma of the run<" in content[0]  # text as text


def test_fpr95_is_drawn_in_steps():
    """Between two eps of the grid the proof of the larger ball holds, and the attack in the smaller one."""
    models = {"one": random_certification(0), "two": random_certification(1)}
    figure = figures.robustness(models, "both", panel="fpr95", mean=True)
    (axes,) = figure.axes
    for name, style, where in (("certified", "-", np.ceil), ("attacked", "--", np.floor)):
        for line, result in zip(drawn(axes, style, 6), models.values(), strict=True):
            values, eps = getattr(curves.fpr_curve(result, "both"), name), line.get_xdata()
            for left in range(5):
                if eps[left] < eps[left + 1]:
                    place = int(where(np.interp((eps[left] + eps[left + 1]) / 2, (0, 0.1, 0.2), (0, 1, 2))))
                    assert line.get_ydata()[left] == line.get_ydata()[left + 1] == values[place]
    assert len({line.get_color() for line in axes.lines}) == 2


@pytest.mark.parametrize("cumulative", [False, True])
def test_radii_fall_or_accumulate(cumulative):
    models = {"one": random_certification(0), "two": random_certification(1)}
    figure = figures.robustness(models, panel="ood-radius", cumulative=cumulative)
    assert [axes.get_title() for axes in figure.axes] == ["a: rejected within eps", "b: rejected within eps"]
    for axes, name in zip(figure.axes, "ab", strict=True):
        for style, column in (("-", "radius_certified"), ("--", "radius_attack")):
            for line, result in zip(drawn(axes, style), models.values(), strict=True):
                assert line.get_drawstyle() == "steps-post"
                radii = result[column][result["set"] == name]
                for eps, share in zip(line.get_xdata()[:-1], line.get_ydata()[:-1], strict=True):
                    expected = np.mean(radii <= eps) if cumulative else np.mean(radii > eps)
                    assert share == pytest.approx(expected, abs=1e-12)


def test_each_ood_set_has_panels_and_the_mean_one():
    rows = {"one": random_certification(0)}
    titles = [axes.get_title() for axes in figures.robustness(rows, eps=0.2).axes]
    assert titles == [
        "in: accepted within eps",
        *(f"{name}: FPR95, OOD moved" for name in "ab"),
        *(f"{name}: rejected within eps" for name in "ab"),
        *(f"{name}: ID robustness, eps 0.2" for name in "ab"),
        "",  # the legend
    ]
    titles = [axes.get_title() for axes in figures.robustness(rows, mean=True).axes]
    assert len(titles) == 4 and titles[0] == "mean of 2 sets: FPR95, OOD moved"
    sweep = figures.robustness(rows, eps=0.2, panel="sweep", mean=True).axes[0]
    curve = curves.robustness_curve(rows["one"], 0.2)
    assert drawn(sweep, "-")[0].get_ydata().tolist() == curve.certified.tolist()
    assert [text.get_text() for text in sweep.get_legend().get_texts()] == [f"{curve.auroc:.3f}"]
    assert sweep.get_xlim()[1] <= 1


def test_a_figure_says_what_it_was_made_from():
    about = {"effort": "fast", "stages": ["ibp", "crown"], "bounded_by": "native", "gamma": -1.25}
    rows = random_certification(0)
    one, two = (Table({**rows.manifest, **about, **more}, rows.columns, rows.grid) for more in ({}, {"gamma": -2.5}))
    said = texts(figures.robustness({"a": one}))
    facts = "n 40 in (ID), 40 a, 40 b (OOD); norm l_inf; gamma -1.25; effort fast (ibp, crown); engine native; complete"
    assert facts in said and "gamma accepts 95 % of these clean ID samples" in said and "gamma of the run" in said
    assert "gamma -1.25 / -2.5; effort" in texts(figures.robustness({"a": one, "b": two}))
    partial = {"complete": False, "samples_done": 160, "of_samples": 900}
    unfinished = Table({**rows.manifest, **partial}, rows.columns, rows.grid)
    said = texts(figures.robustness({"a": one, "b": unfinished}, width="single"))
    assert "not finished: b: 160 of 900 samples" in said and "complete" not in said
    said = texts(figures.smoothing({"a": smoothed(0)}))
    assert "sigma 0.1; draws 10 a sample, each sample with probability 1 - 0.01; complete" in said
    assert "norm l_inf; complete" in texts(figures.lipschitz({"a": SLOPES}))


def test_names_wrap_and_are_taken_literally(tmp_path):
    names = ["a name that is far longer than its place in a legend", "$^ {_", "_hidden", "C:\\new\\table"]
    models = {name: random_certification(seed) for seed, name in enumerate(names)}
    for width in ("single", "double"):
        figure = figures.robustness(models, panel="sweep", width=width, mean=True)
        figures.save(figure, tmp_path / "x.png")
        found = [text.get_text() for text in figure.legends[0].get_texts()][:4]
        assert [" ".join(text.split()).replace(r"\$", "$") for text in found] == names
        assert max(len(line) for text in found for line in text.split("\n")) <= 27


def test_where_the_draws_of_smoothing_end_is_marked():
    result = smoothed(0)
    figure = figures.smoothing({"one": result})
    for axes in figure.axes[:-1]:
        (line,) = [line for line in axes.lines if line.get_linestyle() == "-."]
        level = 0.01 / 4 if "FPR95" in axes.get_title() else 0.01 / 2
        assert line.get_xdata()[0] == pytest.approx(curves.largest_smoothed_radius(10, 0.1, level))
    (inside,) = figures.smoothing({"one": result}, panel="id-radius").axes
    (line,) = drawn(inside, "-")
    radii = result["radius_smoothed"][result.of_kind("id")]
    assert line.get_drawstyle() == "steps-post"
    assert all(y == pytest.approx(np.mean(radii > x)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_slopes_have_legible_ticks():
    for bounds in ((2.0, 2.1), (1.0, 40.0), (1e-3, 1e9), (3.0, math.inf)):
        analysis = slopes([("id", eps, 1.0, 1.5, bound) for eps, bound in zip((0.1, 0.2), bounds, strict=True)])
        (axes,) = figures.lipschitz({"one": analysis}).axes
        ticks = [tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
        assert 2 <= len(ticks) <= 7 and len(axes.get_yticks(minor=True)) == 0
        assert "median" in axes.get_ylabel()


def test_the_table_beside_the_figure(tmp_path):
    models = {"one": random_certification(0), "two": random_certification(1)}
    figures.write_numbers(figures.numbers(models, panel="fpr95"), tmp_path / "x.csv")
    with (tmp_path / "x.csv").open() as stream:
        records = list(csv.DictReader(stream))
    assert len(records) == 2 * 2 * 3 and list(records[0])[:4] == ["model", "panel", "set", "eps"]
    means = [float(r["certified"]) for r in records if r["model"] == "two" and float(r["eps"]) == 0.2]
    assert np.mean(means) == pytest.approx(curves.fpr_curve(models["two"]).certified[2])
    whole = figures.numbers(models)
    assert {record["panel"] for record in whole} == {"fpr95", "id-radius", "ood-radius", "sweep"}
    for record in whole:
        rate = record["panel"] == "fpr95"
        ends = [record[name] for name in ("certified_limit", "certified", "attacked", "attacked_limit")]
        assert ends == sorted(ends, reverse=rate)
        assert (record["clean_fpr"] is None) == (record["panel"] != "sweep")


def test_what_figures_refuse(tmp_path):
    with pytest.raises(InputError, match=r"figures are written as \.png, \.pdf, \.svg"):
        figures.check_format(tmp_path / "x.gif")
    other = certification([sample("id", "in", 0.0, [(0.0,) * 4] * 2)], norm="l2")
    with pytest.raises(InputError, match="different norms"):
        figures.robustness({"a": random_certification(0), "b": other})
    with pytest.raises(InputError, match="unknown width 'wide'; use one of single, double"):
        figures.robustness({"a": random_certification(0)}, width="wide")
    for one, panel, known in (
        (random_certification(0), "roc", "certifications have no panel 'roc'; use one of fpr95, id-radius, ood-radius"),
        (SLOPES, "fpr95", "Lipschitz analyses have no panel 'fpr95'; use one of id, ood"),
        (smoothed(0), "sweep", "smoothing has no panel 'sweep'; use one of fpr95, id-radius, ood-radius"),
    ):
        for function in (figures.draw, figures.numbers):
            with pytest.raises(InputError, match=known):
                function({"a": one}, panel=panel)


def test_other_samples_and_grids_are_drawn_together_only_with_a_word():
    rows = random_certification(0)
    fewer = random_certification(0, samples=39)
    manifest = {**rows.manifest, "data": [{"set": "in", "kind": "id", "sha256": "x"}]}
    for other, what in (
        (fewer, r"different samples \(one: 40 in \(ID\), 40 a, 40 b \(OOD\); two: 39 in"),
        (Table({**rows.manifest, "eps": [0.1, 0.3]}, rows.columns, rows.grid), "different grids of eps .*0.1, 0.3"),
        (Table(manifest, rows.columns, rows.grid), "different samples"),
    ):
        with pytest.raises(InputError, match=f"the rows have {what}.*--mixed"):
            figures.draw({"one": rows, "two": other})
        figure = figures.draw({"one": rows, "two": other}, eps=0.1, mixed=True)
        assert "different grids or samples are drawn together" in texts(figure)
    assert "drawn together" not in texts(figures.draw({"one": rows, "two": rows}, mixed=True))
    for eps, panels in (([0.1, 0.3], 8), ([0.3, 0.4], 6)):  # the sweep needs an eps that all have
        other = Table({**rows.manifest, "eps": eps}, rows.columns, rows.grid)
        figure = figures.draw({"one": rows, "two": other}, mixed=True)
        assert len(figure.axes) == panels and ("robustness, eps 0.1" in texts(figure)) == (panels == 8)
    with pytest.raises(InputError, match="no value in common, so there is no eps to sweep gamma at"):
        figures.draw({"one": rows, "two": other}, panel="sweep", mixed=True)


def test_the_kind_of_result_chooses_the_figure():
    certified, analysed, smoothly = random_certification(0), SLOPES, smoothed(0)
    for one, title in (
        (certified, "in: accepted within eps"),
        (analysed, "id (ID)"),
        (smoothly, "in: accepted within eps"),
    ):
        assert figures.draw({"one": one}).axes[0].get_title() == title
    for one in (analysed, smoothly):
        for options in ({"perturbed": "ood"}, {"eps": 0.1}):
            with pytest.raises(InputError, match=f"are for certifications, not for {one.kind}; leave them out"):
                figures.draw({"one": one}, **options)
    for options in ({"mean": True}, {"cumulative": True}):
        with pytest.raises(InputError, match="are not for lipschitz; leave them out"):
            figures.draw({"one": analysed}, **options)
    with pytest.raises(InputError, match="certification and lipschitz make different figures; give files of one kind"):
        figures.draw({"one": certified, "two": analysed})
    with pytest.raises(InputError, match="no results given"):
        figures.draw({})
    calibration = {"kind": "smoothing-calibration", "norm": "l2", "eps": [0.1]}
    with pytest.raises(InputError, match="there is no figure of smoothing-calibration"):
        figures.draw({"one": type(certified).of([], calibration)})


def test_numbers_behind_the_other_figures():
    numbers = figures.numbers({"one": SLOPES, "two": SLOPES})
    assert [(record["set"], record["model"], record["eps"]) for record in numbers] == [
        (f"{kind} ({kind.upper()})", name, eps)
        for kind in ("id", "ood")
        for name in ("one", "two")
        for eps in (0.1, 0.2)
    ]
    result = smoothed(1)
    numbers = figures.numbers({"one": result}, panel="fpr95", mean=True)
    assert [record["eps"] for record in numbers] == [0.0, 0.1, 0.2] and numbers[0]["alpha"] == 0.01
    assert [record["certified"] for record in numbers] == curves.smoothed_fpr_curve(result).certified.tolist()


def test_seeds_are_drawn_as_mean_and_range():
    one = random_certification(0)
    nothing = dataclasses.replace(one, grid={**one.grid, "s_lb": one.grid["s_lb"] * 0 - 9})  # nothing is proved of OOD
    figure = figures.robustness({"a": [one, nothing], "b": [one]}, panel="fpr95")
    assert [axes.get_title() for axes in figure.axes] == [
        f"{name}, {shown}: FPR95, OOD moved" for shown in ("certified", "attacked") for name in ("a", "b")
    ]
    proved = curves.fpr_curve(one, "ood", {"a": one.sets("ood")["a"]})
    marked = [line.get_ydata() for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    np.testing.assert_allclose(marked[0], np.r_[proved.certified[0], (proved.certified[1:] + 1) / 2])
    np.testing.assert_array_equal(marked[1], proved.certified)
    (band, _) = figure.axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == 1 and heights.min() == proved.certified[0]
    said = texts(figure)
    assert "mean of 2 / 1 seeds, and the range from the smallest to the largest" in said and "40 in (ID)" in said
    assert "of 40 a share is known to ±16 points (95 %)" in said and "limits" not in said
    with pytest.raises(InputError, match="different samples"):
        figures.robustness({"a": [one, random_certification(1, samples=20)]})


@pytest.mark.parametrize("width", ["single", "double"])
def test_every_figure_knows_seeds(width):
    rows = [random_certification(seed) for seed in range(3)]
    figure = figures.draw({"one": rows, "two": rows[:1]}, width=width)
    assert len(figure.axes) == 14 + (width == "double") * 0 and "0.9" in texts(figure)
    numbers = figures.numbers({"one": rows, "two": rows[:1]}, panel="id-radius")
    survive = [curves.radius_curve(table, table.sets("id")) for table in rows]
    for record in numbers[:: max(1, len(numbers) // 50)]:
        assert record["least"] <= record["mean"] <= record["most"] and record["seeds"] == (
            3 if record["model"] == "one" else 1
        )
        if record["model"] == "one" and record["shown"] == "attacked":
            each = [curve.attacked[curve.eps <= record["eps"]][-1] for curve in survive]
            assert (record["mean"], record["least"], record["most"]) == pytest.approx(
                (np.mean(each), min(each), max(each))
            )
    figure = figures.draw({"one": [SLOPES, SLOPES]}, width=width)
    assert "smallest to largest seed" in texts(figure) and "known to" not in texts(figure)
    assert [record["shown"] for record in figures.numbers({"one": [SLOPES, SLOPES]}, panel="id")][::2] == [
        *("bound", "ascended_estimate", "gradient_norm_estimate")
    ]
    alone = slopes([("id", 0.1, 1.0, 2.0, 3.0)] * 7)
    for runs in ({"one": alone, "two": alone}, {"one": [alone, alone]}):
        figure = figures.draw(runs, width=width)  # at one eps side by side
        assert "within eps 0.1" in texts(figure) and "best bound (proved)" in texts(figure)
    figure = figures.draw({"one": [smoothed(1), smoothed(2)]}, width=width, cumulative=True)
    assert "smallest to largest seed" in texts(figure) and "limits" not in texts(figure)
    records = figures.numbers({"one": [smoothed(1), smoothed(2)]}, panel="fpr95", mean=True)
    each = [curves.smoothed_fpr_curve(smoothed(seed)).certified for seed in (1, 2)]
    assert [record["mean"] for record in records] == pytest.approx(np.mean(each, axis=0).tolist())
