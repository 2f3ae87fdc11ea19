from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from grood_cert.errors import InputError
from grood_cert.system import files
from grood_cert.system.files import (
    appending,
    check_writable,
    csv_text,
    is_locked,
    locked,
    numbers,
    replacing,
    sha256,
    write_csv,
    write_json,
)


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "deep" / "folder" / "notes.txt"
    with replacing(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".txt"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["notes.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_block_leaves_the_old_file_and_no_other(tmp_path, error):
    target = tmp_path / "notes.txt"
    target.write_text("old")
    with pytest.raises(error), replacing(target) as temporary:
        temporary.write_text("half of")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    write_json(tmp_path / "ours.json", 1)
    assert (tmp_path / "ours.json").stat().st_mode == ordinary.stat().st_mode


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(tmp_path / "link.json", [1])
    assert json.loads((tmp_path / "real.json").read_text()) == [1]
    assert (tmp_path / "link.json").is_symlink()


def test_a_folder_and_a_device_are_refused(tmp_path):
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(InputError, match=r"cannot write .*: there is something there that is not a file"):
            write_json(path, 1)
    assert Path("/dev/null").is_char_device()
    assert os.listdir(tmp_path) == []


def test_an_unusable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*file/rows.csv: "):
        write_csv(tmp_path / "file" / "rows.csv", ["a"], [])
    with pytest.raises(InputError, match=r"cannot write to .*file: it is no folder"):
        check_writable(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    for act in (check_writable, lambda folder: write_json(folder / "a.json", 1)):
        with pytest.raises(InputError, match=r"cannot write .*locked.*: Permission denied"):
            act(tmp_path / "locked")


def test_permission_denied_is_an_input_error(tmp_path, monkeypatch):
    """The same as above for root, with the refusal played by a stand-in."""

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"cannot write to .*: Permission denied"):
        check_writable(tmp_path)


def test_check_writable_makes_the_folder_and_nothing_else(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_csv_keeps_every_digit(tmp_path):
    values = [0.1, 1 / 3, 1e-300, -0.0, float("inf"), np.float64(2) / 3]
    write_csv(tmp_path / "a.csv", ["value", "note"], [{"value": value, "note": None} for value in values])
    text = (tmp_path / "a.csv").read_bytes()
    assert b"\r" not in text
    with (tmp_path / "a.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["value"]) for row in rows] == values
    assert {row["note"] for row in rows} == {""}


def test_numbers_come_back_as_they_were(tmp_path):
    path, rows = tmp_path / "a.csv", [{"set": "a, b", "rate": 1 / 3}, {"set": "1", "rate": -1e-300}]
    write_csv(path, ["set", "rate"], rows)
    assert numbers(path, ("set", "rate"), {"set"}) == rows
    for columns, words, message in (
        (("rate", "set"), {"set"}, "expected the columns rate, set"),
        (("set", "rate"), (), "could not convert string to float: 'a, b'"),
    ):
        with pytest.raises(InputError, match=message):
            numbers(path, columns, words)
    for value in (float("nan"), float("inf")):
        write_csv(path, ["set", "rate"], [{"set": "a", "rate": value}])
        with pytest.raises(InputError, match="a number is not finite"):
            numbers(path, ("set", "rate"), {"set"})
        with pytest.raises(InputError, match="a number is not finite"):
            numbers(tmp_path / "none.csv", ("set", "rate"), {"set"}, [{"set": "a", "rate": value}])
    assert numbers(tmp_path / "none.csv", ("set", "rate"), {"set"}, rows) == rows
    with pytest.raises(InputError, match="expected the columns set, rate"):
        numbers(path, ("set", "rate"), {"set"}, [*rows, {"set": "b"}])


def test_csv_refuses_unknown_columns_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="not in fieldnames"):
        write_csv(tmp_path / "a.csv", ["a"], [{"b": 1}])
    assert os.listdir(tmp_path) == []


def test_json_is_json_even_with_nan(tmp_path):
    """NaN is no JSON; the strict parser of any other language would refuse the whole file."""

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    write_json(tmp_path / "a.json", {"a": (float("nan"), 1.5), "b": {"c": float("-inf")}, "d": "é", "e": True})
    value = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert value == {"a": [None, 1.5], "b": {"c": None}, "d": "é", "e": True}


def test_sha256(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    with pytest.raises(InputError, match=r"cannot read .*missing: No such file"):
        sha256(tmp_path / "missing")


# Appending


def test_appending_cuts_and_adds(tmp_path):
    path = tmp_path / "log"
    with appending(path, 0) as append:
        assert append("äh\n") == 4
        assert path.read_text(encoding="utf-8") == "äh\n"  # on the disk already
        assert append("") == 4
        assert append("b\n") == 6
    with pytest.raises(ValueError, match="mine"), appending(path, 4) as append:
        append("c")
        raise ValueError("mine")
    assert path.read_text(encoding="utf-8") == "äh\nc"


def test_rows_appended_are_rows_written(tmp_path):
    records = [{"a": value, "b": text} for value, text in ((0.1, 'x,"y"'), (float("nan"), "two\nlines"), (3, None))]
    write_csv(tmp_path / "whole.csv", ["a", "b"], records)
    with appending(tmp_path / "parts.csv", 0) as append:
        append(csv_text(["a", "b"], [], header=True))
        for record in records:
            append(csv_text(["a", "b"], [record]))
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_write_that_is_cut_short_is_an_error(tmp_path):
    """The kernel takes what fits, as on a full disk, and refuses the rest."""
    path, (soft, hard) = tmp_path / "log", resource.getrlimit(resource.RLIMIT_FSIZE)
    with appending(path, 0) as append:
        append("good\n")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
            with pytest.raises(InputError, match=r"cannot write .*log: File too large"):
                append("torn apart\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "good\ntor"
    with appending(path, 5) as append:
        append("mended\n")
    assert path.read_text() == "good\nmended\n"


def test_appending_to_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "log"):
        with pytest.raises(InputError, match=r"cannot write "), appending(path, 0):
            pass


# Locks

HOLDER = """
import signal, sys
from pathlib import Path
from grood_cert.system.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "rows.csv"
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=r"another process is writing .*rows.csv; wait until it ends"),
            locked(path),
        ):
            pass
        with locked(tmp_path / "other.csv"):
            pass
        holder.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path) == [".rows.csv.lock"]
    with locked(path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    """Also while its file is being removed and made anew."""
    inside, worst = [], []

    def compete():
        mine = 0
        while mine < 75:
            try:
                with locked(tmp_path / "rows.csv"):
                    inside.append(1)
                    worst.append(len(inside))
                    inside.pop()
                    mine += 1
            except InputError:
                pass

    threads = [threading.Thread(target=compete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == [1] * 300
    assert os.listdir(tmp_path) == []


def test_who_only_looks_at_a_lock_keeps_nobody_out(tmp_path, monkeypatch):
    """A look holds the lock for an instant; whoever starts in it waits for its end."""
    with (tmp_path / ".rows.csv.lock").open("ab") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(files.time, "sleep", lambda pause: fcntl.flock(looking, fcntl.LOCK_UN))
        with locked(tmp_path / "rows.csv"):
            assert is_locked(tmp_path / "rows.csv")
    assert not is_locked(tmp_path / "rows.csv")


def test_what_a_killed_process_left_half_written_is_removed_under_the_lock(tmp_path):
    """But nothing of other targets, whose writers may be alive, and no file of the user's."""
    kept = [
        *(".rows-2-of-3-0123456789abcdef.csv", ".rows.csv", ".rows-0123456789abcde.csv", ".rows-0123456789abcdeg.csv"),
        *(".rows-0123456789abcdef.json", "rows-0123456789abcdef.csv", ".rowsx-0123456789abcdef.csv"),
    ]
    for name in (*kept, ".rows-0123456789abcdef.csv", ".log-00000000ffffffff.csv"):
        (tmp_path / name).write_text("half of")
    with locked(tmp_path / "rows.csv", tmp_path / "log.csv"):
        assert set(os.listdir(tmp_path)) == {*kept, ".rows.csv.lock"}


def test_a_temporary_file_is_one_that_the_lock_removes(tmp_path):
    with locked(tmp_path / "rows.csv"), pytest.raises(InputError), replacing(tmp_path / "rows.csv") as temporary:
        temporary.write_text("half of")
        with locked(tmp_path / "other.csv", tmp_path / "rows.csv"):
            assert not temporary.exists()


def test_a_lock_in_an_unusable_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*\.lock: No such file"), locked(tmp_path / "missing/rows.csv"):
        pass
