from __future__ import annotations

import csv

import numpy as np
import pytest

from grood_cert.errors import InputError
from grood_cert.results import curves, figures
from tests.results.examples import certification, random_certification, sample, slopes
from tests.results.test_curves import smoothed


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg", ".PNG"])
def test_figures_are_written_by_file_name_and_reproducible(tmp_path, suffix):
    models = {"one": random_certification(0), "two": random_certification(1, 0.2)}
    content = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}{suffix}"
        figures.save(figures.robustness(models), path)
        content.append(path.read_bytes())
    assert content[0] == content[1]
    assert content[0][:4] == {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xm"}[suffix.lower()]
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == [f"a{suffix}", f"b{suffix}"]


def test_the_figure_draws_what_the_curves_say():
    models = {"one": random_certification(0), "two": random_certification(1)}
    figure = figures.robustness(models, "both", 0.2)
    first, inside, outside, sweep = figure.axes
    marked = [line.get_ydata() for line in first.lines if line.get_linestyle() == "None" and len(line.get_ydata()) == 3]
    for values, result in zip(marked, models.values(), strict=True):
        np.testing.assert_array_equal(values, curves.fpr_curve(result, "both").certified)
    for name, style, where in (("certified", "-", np.ceil), ("attacked", "--", np.floor)):
        steps = [line for line in first.lines if line.get_linestyle() == style and len(line.get_ydata()) == 6]
        for line, result in zip(steps, models.values(), strict=True):
            values, eps = getattr(curves.fpr_curve(result, "both"), name), line.get_xdata()
            for left in range(5):  # proved up to the next eps of the grid, shown from the last one on
                if eps[left] < eps[left + 1]:
                    place = int(where(np.interp((eps[left] + eps[left + 1]) / 2, (0, 0.1, 0.2), (0, 1, 2))))
                    assert line.get_ydata()[left] == line.get_ydata()[left + 1] == values[place]
    np.testing.assert_array_equal(inside.lines[0].get_ydata(), curves.radius_curve(models["one"], "id").certified)
    np.testing.assert_array_equal(outside.lines[0].get_ydata(), curves.radius_curve(models["one"], "ood").certified)
    assert sweep.get_title().endswith("eps = 0.2")
    colours = {line.get_color() for line in first.lines}
    assert len(colours) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["one", "two"]


def test_the_table_beside_the_figure(tmp_path):
    models = {"one": random_certification(0), "two": random_certification(1)}
    figures.write_numbers(figures.numbers(models), tmp_path / "x.csv")
    with (tmp_path / "x.csv").open() as stream:
        records = list(csv.DictReader(stream))
    assert len(records) == 2 * 2 * 3 and list(records[0])[:4] == ["model", "set", "eps", "samples"]
    means = [float(r["fpr95_id_certified"]) for r in records if r["model"] == "two" and float(r["eps"]) == 0.2]
    assert np.mean(means) == pytest.approx(curves.fpr_curve(models["two"]).certified[2])


def test_what_figures_refuse(tmp_path):
    with pytest.raises(InputError, match=r"figures are written as \.png, \.pdf, \.svg"):
        figures.check_format(tmp_path / "x.gif")
    other = certification([sample("id", "in", 0.0, [(0.0,) * 4] * 2)], norm="l2")
    with pytest.raises(InputError, match="different norms"):
        figures.robustness({"a": random_certification(0), "b": other})


SLOPES = slopes([(kind, eps, 1.0, 2.0, 3.0 + eps) for kind in ("id", "ood", "noise") for eps in (0.1, 0.2)])


def test_the_kind_of_result_chooses_the_figure():
    certified, analysed, smoothly = random_certification(0), SLOPES, smoothed(0)
    for one, title in (
        (certified, "Worst-case FPR95, OOD moved"),
        (analysed, "ID"),
        (smoothly, "Certified FPR95, OOD moved"),
    ):
        assert figures.draw({"one": one}).axes[0].get_title() == title
    assert figures.draw({"one": certified}, "id", 0.2).axes[3].get_title() == "ID robustness at eps = 0.2"
    for one in (analysed, smoothly):
        for options in ({"perturbed": "ood"}, {"eps": 0.1}):
            with pytest.raises(InputError, match=f"are for certifications, not for {one.kind}; leave them out"):
                figures.draw({"one": one}, **options)
    with pytest.raises(InputError, match="certification and lipschitz make different figures; give files of one kind"):
        figures.draw({"one": certified, "two": analysed})
    with pytest.raises(InputError, match="no results given"):
        figures.draw({})
    calibration = {"kind": "smoothing-calibration", "norm": "l2", "eps": [0.1]}
    with pytest.raises(InputError, match="there is no figure of smoothing-calibration"):
        figures.draw({"one": type(certified).of([], calibration)})


def test_numbers_behind_the_other_figures():
    numbers = figures.numbers({"one": SLOPES, "two": SLOPES})
    assert [(record["model"], record["kind"], record["eps"]) for record in numbers] == [
        (name, kind, eps) for name in ("one", "two") for kind in ("id", "ood", "noise") for eps in (0.1, 0.2)
    ]
    result = smoothed(1)
    numbers = figures.numbers({"one": result})
    assert [record["eps"] for record in numbers] == [0.0, 0.1, 0.2] and numbers[0]["alpha"] == 0.01
    assert [record["fpr95_id_smoothed"] for record in numbers] == curves.fpr95_curve(result)[1].tolist()
