from __future__ import annotations

import errno
import json
import math
import os
import sys

import numpy as np
import pandas
import polars
import pytest
from pyarrow import parquet

from grood_cert.errors import InputError, RunError
from grood_cert.results.columns import SCHEMAS, header
from grood_cert.results.table import Table, labelled, manifest_path, read_cells
from tests.results.examples import EPS, random_certification

EXTREME = (0.1, 1 / 3, -0.0, 1.0, 3.0, 5e-324, 1.7976931348623157e308, 1e-05, 1e22, 123456789.0, 2**53 + 2.0)


def table(kind, values, samples=3, **changes):
    """A table whose unchecked numbers cycle through some values, columns in different phases."""
    schema = SCHEMAS[kind]
    phase = iter(range(10**6))

    def cell(column):
        if column.type == "text":
            return column.allowed[0] if column.allowed else "text"
        if column.type == "integer":
            return next(phase)
        value = values[next(phase) % len(values)]
        if column.never_infinite and math.isinf(value):
            return math.nan
        return 0.5 if column.finite or column.least is not None else value

    manifest = dict.fromkeys(schema.manifest, 1.0) | {"kind": kind, "schema": schema.version, "eps": list(EPS)}
    records = []
    for _ in range(samples):
        record = {name: cell(column) for name, column in schema.columns.items()}
        record |= {f"{name}@{eps!r}": cell(column) for eps in EPS for name, column in schema.grid.items()}
        records.append(record | {"file": ""} | changes)
    return Table.of(records, manifest)


def assert_equal(one, other):
    assert one.manifest.items() <= other.manifest.items()
    for mine, others in ((one.columns, other.columns), (one.grid, other.grid)):
        assert list(mine) == list(others)
        for name, values in mine.items():
            assert values.dtype.kind == others[name].dtype.kind, name
            np.testing.assert_array_equal(values, others[name], err_msg=name)


NUMBERS = {
    "all digits": EXTREME,
    "all nan": (math.nan,),
    "all inf": (math.inf,),
    "all -inf": (-math.inf,),
    "like integers": (0.0, 3.0),
    "nan and infinities": (math.nan, math.inf, -math.inf, 0.1),
    "nan and like integers": (math.nan, 2.0),
}


@pytest.fixture
def any_numbers(monkeypatch):
    """Only cells are read, whatever they hold together."""
    monkeypatch.setattr("grood_cert.results.table.check_invariants", lambda table: None)


@pytest.mark.usefixtures("any_numbers")
@pytest.mark.parametrize("values", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("kind", SCHEMAS)
def test_pandas_and_polars_read_floats_and_write_what_reads_back(tmp_path, kind, values):
    path = tmp_path / "results.csv"
    written = table(kind, values)
    written.write(path)
    assert_equal(written, Table.read(path, kind))
    schema, text = SCHEMAS[kind], path.read_text()
    number = {*(name for name, column in schema.columns.items() if column.type == "number")}
    number |= {f"{name}@{eps}" for eps in EPS for name, column in schema.grid.items() if column.type == "number"}
    in_pandas = pandas.read_csv(path)
    in_polars = polars.read_csv(path)
    assert list(in_pandas.columns) == in_polars.columns == header(kind, EPS)
    assert {name for name in in_pandas if in_pandas[name].dtype == np.float64} - {"file"} == number
    assert {name for name in in_polars.columns if in_polars[name].dtype == polars.Float64} == number
    in_pandas.to_csv(path, index=False)
    assert_equal(written, Table.read(path))
    path.write_text(text)
    in_polars.write_csv(path)
    assert_equal(written, Table.read(path))


def test_integers_that_became_floats_and_empty_cells(tmp_path):
    """What pandas makes of integers once a frame has been joined, and of NaN."""
    path = tmp_path / "rows.csv"
    written = random_certification(0, share_nan=0.3)
    written.write(path)
    frame = pandas.read_csv(path)
    frame[["index", "label", "accepted"]] = frame[["index", "label", "accepted"]].astype(float)
    frame.to_csv(path, index=False)
    assert ",0.0,,0.0,0,-" in path.read_text()
    assert_equal(written, Table.read(path))
    path.write_text(path.read_text().replace(",0.0,,0.0,", ",0.5,,0.0,"))
    with pytest.raises(InputError, match=r"'0.5' is no integer"):
        Table.read(path)


@pytest.mark.usefixtures("any_numbers")
def test_files_of_pictures_are_text(tmp_path):
    written = table("certification", EXTREME, file="cat/7, \u00e4.png")
    written.write(tmp_path / "rows.csv")
    assert Table.read(tmp_path / "rows.csv")["file"].tolist() == ["cat/7, \u00e4.png"] * 3


def test_frames_and_parquet(tmp_path):
    certification = random_certification(0, share_nan=0.3)
    frame, long = certification.to_pandas(), certification.to_long()
    assert list(frame.columns) == header("certification", EPS) and len(frame) == len(certification)
    assert len(long) == len(certification) * len(EPS) and frame["radius_lipschitz_path"].dtype == np.float64
    single = list(SCHEMAS["certification"].columns)
    assert list(long.columns) == [*single, "eps", *SCHEMAS["certification"].grid]
    for column, eps in enumerate(EPS):
        page = long[long["eps"] == eps]
        np.testing.assert_array_equal(page["s_ub"], certification.grid["s_ub"][:, column])
        np.testing.assert_array_equal(page["score"], certification["score"])
    slopes = table("lipschitz", EXTREME)
    assert slopes.to_long().equals(slopes.to_pandas()) and "eps" in slopes.to_long()
    certification.to_parquet(tmp_path / "rows.parquet")
    back = parquet.read_table(tmp_path / "rows.parquet")
    assert json.loads(back.schema.metadata[b"grood-cert"])["kind"] == "certification"
    pandas.testing.assert_frame_equal(polars.read_parquet(tmp_path / "rows.parquet").to_pandas(), frame)


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    certification = random_certification(0)
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (certification.to_pandas, certification.to_long):
        with pytest.raises(RunError, match="pandas is not installed; install it with: pip install pandas"):
            call()
    with pytest.raises(RunError, match="pip install pyarrow"):
        certification.to_parquet(tmp_path / "rows.parquet")
    assert not list(tmp_path.iterdir())


def test_the_manifest_says_what_a_file_is_and_its_name_does_not(tmp_path):
    path = tmp_path / "smoothing.csv"
    random_certification(0).write(path)
    assert Table.read(path).kind == "certification"
    with pytest.raises(InputError, match=r"not the rows of median smoothing \(it holds the rows of a certification\)"):
        Table.read(path, "smoothing")
    manifest = json.loads(manifest_path(path).read_text())
    for changes, message in (
        ({"kind": None}, "names the kind None; known are certification, smoothing, smoothing-calibration, lipschitz"),
        ({"kind": "rows"}, "names the kind 'rows'"),
        ({"kind": ["x"]}, "names the kind"),
        ({"schema": None}, "names version None of the columns, this version reads 1"),
        ({"schema": 2}, "names version 2 of the columns"),
        ({"eps": [0.1]}, "unknown columns 'outcome@0.2', 's_attack_max@0.2'"),
        ({"eps": [0.1, 0.2, 0.3]}, "missing 's_lb@0.3'"),
        ({"eps": None}, "not the rows of a certification"),
        ({"gamma": None}, r"smoothing\.json lacks gamma"),
        ({"rows": 3}, "holds 160 rows, smoothing.json speaks of 3"),
    ):
        manifest_path(path).write_text(json.dumps(manifest | changes))
        with pytest.raises(InputError, match=message) as caught:
            Table.read(path)
        assert "\n" not in str(caught.value)
    del manifest["gamma"], manifest["model"]
    manifest_path(path).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"smoothing\.json lacks gamma, model"):
        Table.read(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda frame: frame.assign(extra=1), "unknown columns 'extra'"),
        (lambda frame: frame.reset_index(names=""), "unknown columns ''.*index=False"),
        (lambda frame: frame.drop(columns="s_ub@0.2"), "missing 's_ub@0.2'"),
        (lambda frame: frame.drop(columns="file"), "missing 'file'"),
        (lambda frame: frame.assign(label=str(2**70)), f"line 2, label: '{2**70}' is no integer"),
        (lambda frame: frame.assign(score="much"), "line 2, score: 'much' is no number"),
        (lambda frame: frame.assign(score=math.nan), "line 2, score: nan is not finite"),
        (
            lambda frame: frame.assign(radius_attack=math.nan),
            "line 2, radius_attack: nan is no number of at least 0",
        ),
        (
            lambda frame: frame.assign(radius_certified=-0.1),
            "line 2, radius_certified: -0.1 is no number of at least 0",
        ),
        (lambda frame: frame.assign(**{"s_lb@0.1": math.inf}), "line 2, s_lb@0.1: inf is infinite"),
        (lambda frame: frame.assign(**{"s_ub@0.1": -math.inf}), "line 2, s_ub@0.1: -inf is infinite"),
        (lambda frame: frame.assign(radius_attack=0.0), "damaged"),
        (lambda frame: frame.assign(stage="guess"), "line 2, stage: guess is none of ibp, "),
        (lambda frame: frame.assign(**{"outcome@0.1": "luck"}), "line 2, outcome@0.1: luck is none of undecided, ibp"),
        (lambda frame: frame.rename(columns={"label": "score"}), "two columns have the same name"),
        (lambda frame: frame[:0], "speaks of 160"),
    ],
)
def test_what_no_certification_writes_is_refused(tmp_path, damage, message):
    path = tmp_path / "rows.csv"
    random_certification(0).write(path)
    damage(pandas.read_csv(path)).to_csv(path, index=False)
    with pytest.raises(InputError, match=message):
        Table.read(path)


def test_lines_of_another_length_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    random_certification(0).write(path)
    text = path.read_text()
    for ending in (",7\n", "\n"):
        path.write_text(text[: text.rindex(",") if ending == "\n" else -1] + ending)
        with pytest.raises(InputError, match="a line has more or fewer cells than there are columns"):
            Table.read(path)


def test_of_a_run_that_goes_on_only_the_saved_bytes_count(tmp_path):
    path = tmp_path / "rows.csv"
    table = random_certification(0, samples=2)
    Table({**table.manifest, "complete": False}, table.columns, table.grid).write(path)
    with path.open("a") as stream:
        stream.write("torn")
    with pytest.raises(InputError, match=r"rows\.csv is unfinished, 8 of 8 samples: its command goes on with it"):
        Table.read(path)
    found = Table.read(path, partial=True)
    assert len(found) == len(read_cells(path)[1]) == 8 and not found.complete


def test_every_changed_number_is_noticed(tmp_path):
    """A digit of the rows or of the manifest that a disk has turned into another one."""
    path, table = tmp_path / "rows.csv", random_certification(0, samples=2)
    table.write(path)
    contents = {file: file.read_bytes() for file in (path, manifest_path(path))}
    changed = 0
    for file, content in contents.items():
        for position in [i for i, byte in enumerate(content) if 0x30 <= byte <= 0x38]:
            file.write_bytes(content[:position] + bytes([content[position] + 1]) + content[position + 1 :])
            try:
                assert Table.read(path)._wide().keys() == table._wide().keys()
                for name, values in Table.read(path)._wide().items():  # 0.30000000000000005 is 0.30000000000000004
                    np.testing.assert_array_equal(values, table._wide()[name])
            except InputError:
                changed += 1
        file.write_bytes(content)
    assert changed > 500 and len(Table.read(path)) == 8


def test_rows_without_a_checksum_are_read(tmp_path):
    """As earlier versions and other programs write them."""
    path = tmp_path / "rows.csv"
    random_certification(0, samples=2).write(path)
    manifest = json.loads(manifest_path(path).read_text())
    del manifest["sha256"]
    manifest_path(path).write_text(json.dumps(manifest))
    assert len(Table.read(path)) == 8


def test_a_result_that_is_replaced_stays_whole_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    random_certification(0, samples=2).write(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*: No space left on device"):
        random_certification(1, samples=3).write(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_sets_and_kinds():
    found = random_certification(0)
    assert list(found.sets("ood")) == ["a", "b"] and list(found.sets("noise", "id")) == ["in", "n"]
    assert found.sets("ood")["b"].sum() == found.of_kind("id").sum() == 40
    assert (found.norm, found.gamma, found.eps, found.complete) == ("linf", 0.0, EPS, True)


def test_labels(tmp_path):
    one, two = random_certification(0), random_certification(1)
    paths = [tmp_path / "a/rows.csv", tmp_path / "b/rows.csv"]
    assert list(labelled([one], paths[:1], [])) == ["m"]
    assert list(labelled([one, two], paths, [])) == ["a", "b"]
    assert list(labelled([one, two], paths, ["x", "y"])) == ["x", "y"]
    with pytest.raises(InputError, match="an empty label names no model"):
        labelled([one], paths[:1], [" "])
    with pytest.raises(InputError, match="2 labels for 1 rows files"):
        labelled([one], paths[:1], ["x", "y"])
    with pytest.raises(InputError, match="same name"):
        labelled([one, two], paths, ["x", "x"])
