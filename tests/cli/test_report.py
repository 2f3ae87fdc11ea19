"""`grood-cert report` and `grood-cert sweep` as somebody gives them."""

from __future__ import annotations

import json

import pytest

from tests.results.test_card import runs

__all__ = ["runs"]  # a fixture


def test_a_report_of_folders(runs, call):
    out = runs / "all.html"
    code, said, err = call("report", runs, "--out", out, "--title", "For <the> audit")
    assert (code, err) == (0, "") and said.startswith(f"wrote {out} (")
    text, card = out.read_text(), json.loads((runs / "all.json").read_text())
    assert "<h1>For &lt;the&gt; audit</h1>" in text and text.rstrip().endswith("</html>")
    assert [page["name"] for page in card["detectors"]] == ["one", "two"]
    assert {figure["form"] for figure in card["figures"]} == {"proved", "probabilistic"}
    assert "report" in card["command"] and card["command"].split()[0] == "grood-cert"


def test_what_reports_refuse(runs, refused):
    rows = runs / "two" / "rows.csv"
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    assert "written as .html" in refused("report", runs, "--out", runs / "report.pdf")
    assert "exists already" in refused("report", rows, "--out", rows.with_suffix(".html"))  # rows.json
    assert "would overwrite" in refused("report", rows, "--out", rows.with_suffix(".html"), "--force")
    assert "no such file" in refused("report", runs / "nothing.csv", "--out", runs / "x.html")
    assert "3 labels" in refused(
        "report", rows, "--label", "a", "--label", "b", "--label", "c", "--out", runs / "x.html"
    )
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--grid", "objective.lambda_grad"), "expected KEY=VALUE,VALUE"),
        (("--grid", "objective.lambda_grad=0", "--grid", "objective.lambda_grad=1"), "names a setting twice"),
        (("--grid", "objective.lambda_gra=0"), "did you mean objective.lambda_grad"),
        (("--grid", "objective.lambda_grad=0", "--eps", "x"), "expected a number"),
        (("--grid", "objective.lambda_grad=0", "--eps", "0.2,0.1"), "eps must be ascending"),
        (("--grid", "objective.lambda_grad=0", "--eps", "1.5"), "eps 1.5: expected a number from 0 to 1"),
        (("--grid", "objective.lambda_grad=0", "--norm", "l2", "--eps", "-1"), "eps -1.0: expected a number from 0"),
        (("--grid", "objective.lambda_grad=0", "--lipschitz-eps", "-0.1"), "eps -0.1: expected a number from 0 to 1"),
        (("--grid", "objective.lambda_grad=0", "--effort", "much"), "unknown effort"),
        (("--grid", "objective.lambda_grad=0", "--no-certify", "--no-lipschitz", "--effort", "max"), "leave it out"),
        (("--grid", "objective.lambda_grad=0", "--stages", "ibp,magic"), "unknown stage 'magic'; use some of ibp"),
        (("--grid", "objective.lambda_grad=0", "--stages", "alpha-crown"), "the stages need one of ibp"),
        (("--grid", "objective.lambda_grad=0", "--stages", ","), "--stages ',' names none; use some of ibp"),
        (("--grid", "objective.lambda_grad=0", "--engine", "magic"), "unknown engine 'magic'; use one of auto"),
        (
            ("--grid", "objective.lambda_grad=0", "--no-certify", "--stages", "ibp", "--engine", "native"),
            "--stages and --engine: for certifying, which --no-certify leaves out; leave it out",
        ),
        (("--grid", "objective.lambda_grad=0", "--shard", "3/2"), "expected i/n"),
        (("--grid", "objective.lambda_grad=0", "--limit", "-1"), "limit must be 0 (all) or more"),
        (("--grid", "objective.lambda_grad=0", "--limit", "9", "--no-certify"), "leave it out"),
        (("--grid", "objective.lambda_grad=0", "--lipschitz-limit", "9", "--no-lipschitz"), "leave it out"),
    ],
)
def test_what_sweeps_refuse(arguments, message, tmp_path, refused):
    """Before they begin, and so in a dry run too."""
    for more in ((), ("--dry-run",)):
        assert message in refused("sweep", "digits-greg", *arguments, *more, "--out", tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_dry_run_names_the_cells(tmp_path, call):
    grid = ("--grid", "objective.lambda_grad=0,0.1", "--seeds", 2)
    code, out, err = call("sweep", "digits-greg", *grid, "--out", tmp_path / "sweep", "--dry-run", "--shard", "2/2")
    assert (code, err) == (0, "") and not (tmp_path / "sweep").exists()
    assert out.splitlines() == [f"lambda_grad={value}-seed=1: train, certify, lipschitz" for value in ("0", "0.1")]


def test_a_sweep_certifies_by_the_stages_and_the_engine_that_it_is_given(tmp_path, call):
    small = ("--set", "optimizer.epochs=1", "--set", "network.name=mlp", "--set", "network.width=8", "--no-lipschitz")
    given = ("--stages", "crown, ibp", "--engine", "native", "--effort", "fast", "--eps", "0.01", "--limit", 1)
    grid = ("--grid", "objective.lambda_grad=0")
    code, _, err = call("sweep", "digits-greg", *grid, *small, *given, "--out", tmp_path / "sweep")
    assert code == 0, err
    manifest = json.loads(next((tmp_path / "sweep").glob("*/rows.json")).read_text())
    assert (manifest["engine"], manifest["stages"]) == ("native", ["ibp", "crown"])
