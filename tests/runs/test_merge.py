from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from grood_cert.cli.merge import merge as merge_command
from grood_cert.errors import InputError
from grood_cert.results.table import read_cells
from grood_cert.runs.merge import merge
from grood_cert.runs.progress import status
from grood_cert.runs.shards import Shard
from tests.runs.work import DESCRIPTION, Worker, execute, manifest


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_shards_merge_to_the_bytes_of_the_whole(whole, tmp_path, count):
    paths = [execute(tmp_path, shard=Shard(index, count)) for index in reversed(range(count))]
    if count == 1:
        assert paths == [tmp_path / "rows.csv"] and paths[0].read_bytes() == whole.read_bytes()
        return
    assert min(path.name for path in paths) == f"rows-1-of-{count}.csv"
    merged = merge(paths, tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_bytes() == whole.read_bytes()
    assert merged == manifest(tmp_path / "rows.csv")
    for key, value in manifest(whole).items():
        if key not in ("seconds", "peak_memory", "finished", "shards", "sha256"):
            assert merged[key] == value, key
    assert merged["shards"] == count and merged["failures"] == {"boom": 10}
    assert abs(merged["seconds"] - sum(manifest(path)["seconds"] for path in paths)) < 1e-9
    execute(tmp_path, Worker(0, AssertionError("the merged rows are those of the run")))


def test_a_shard_goes_on_too(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path, Worker(2), shard=Shard(1, 3))
    second = Worker()
    execute(tmp_path, second, shard=Shard(1, 3))
    assert second.done == [7]
    paths = [execute(tmp_path, shard=Shard(index, 3)) for index in range(3)]
    merge(paths, tmp_path / "all.csv")
    assert (tmp_path / "all.csv").read_bytes() == whole.read_bytes()


def test_the_command_says_what_it_merged(whole, tmp_path, capsys):
    paths = [execute(tmp_path, shard=Shard(index, 2)) for index in range(2)]
    merge_command(paths, tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_bytes() == whole.read_bytes()
    assert capsys.readouterr().out.endswith("rows.json: 18 rows of 2 shards\n")


def test_what_is_no_division_is_not_merged(whole, tmp_path):
    one, two = (execute(tmp_path, shard=Shard(index, 2)) for index in range(2))
    out = tmp_path / "merged.csv"
    other = tmp_path / "other"
    foreign = execute(other, description=DESCRIPTION | {"seed": 1}, shard=Shard(1, 2))
    third = execute(other, shard=Shard(1, 3))
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path, Worker(2), shard=Shard(0, 4))
    copy = shutil.copy(one, other / "copy.csv")
    shutil.copy(one.with_suffix(".json"), other / "copy.json")
    for paths, message in [
        ([], "no shards given"),
        ([one], "shard 2/2 is missing"),
        ([one, two, one], "are the same shard, 1/2"),
        ([one, two, Path(copy)], "are the same shard, 1/2"),
        ([one, foreign], "are of different runs .seed: 0, 1."),
        ([one, third], "1/2, 2/3: shard 2/2 is missing"),
        ([one, two, third], "shards of different divisions"),
        ([one, whole], "not a shard"),
        ([tmp_path / "rows-1-of-4.csv", two], "not complete yet"),
        ([one, tmp_path / "none.csv"], "none.csv: no such file"),
    ]:
        with pytest.raises(InputError, match=message):
            merge(paths, out)
    copy_path = Path(copy)
    copy_path.write_bytes(copy_path.read_bytes()[:-30])
    with pytest.raises(InputError, match="damaged"):
        merge([copy_path, two], out)
    assert not out.exists()
    out.write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        merge([one, two], out)
    assert out.read_text() == "precious"
    merge([one, two], out, force=True)
    assert out.read_bytes() == whole.read_bytes()


def test_a_killed_merge_goes_on(whole, tmp_path):
    """It leaves a manifest alone, and neither a reader nor `status` takes that for a result."""
    paths = [execute(tmp_path / "parts", shard=Shard(index, 2)) for index in range(2)]
    merge(paths, tmp_path / "rows.csv")
    (tmp_path / "rows.csv").unlink()
    assert not status(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read_cells(tmp_path / "rows.csv")
    merge(paths, tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_bytes() == whole.read_bytes()
    (tmp_path / "rows.csv").unlink()
    (tmp_path / "rows.json").write_text('{"complete": true, "shards": 2, "model": "another"}')
    with pytest.raises(InputError, match=r"rows\.json exists already"):
        merge(paths, tmp_path / "rows.csv")
