from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grood_cert.cli.output import Bar, Shown, print_across


def test_the_time_left_follows_from_the_rate_since_the_first_report(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("grood_cert.cli.output.time.monotonic", lambda: now[0])
    stage = Shown("certifying", 1000, "samples", started=now[0])
    assert stage.line == "certifying: 0/1000 samples, 0 %, eta ? after 0:00:00"
    now[0] += 1
    stage.advance(900, {"certified": 5})  # of an earlier process
    assert stage.line == "certifying: 900/1000 samples, 90 %, eta ? after 0:00:01, 5 certified"
    now[0] += 20
    stage.advance(20, {"certified": 7, "attacked": 2})
    assert stage.left == "0:01:20"
    now[0] += 10
    assert stage.left == "0:01:10" and stage.spent == "0:00:31"
    stage.advance(80, {})
    assert stage.line == "certifying: 1000/1000 samples, 100 %, eta 0:00:00 after 0:00:31"


def test_plain_lines_where_there_is_no_terminal(capsys):
    with Bar() as bar:
        bar.say("4 samples of 1 set")
        bar.begin("certifying", 4)
        bar.advance(2, {"certified": 1})
        bar.advance(2, {"certified": 3, "undecided": 1})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "4 samples of 1 set" and lines[1].startswith("certifying: 0/4 samples, 0 %, eta ? after ")
    assert lines[-1].startswith("certifying: 4/4 samples, 100 %, eta 0:00:00 after ")
    assert lines[-1].endswith(", 3 certified  1 undecided") and all(line.isprintable() for line in lines)


def test_a_bar_of_eighty_columns_shows_the_time_left(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with Bar() as bar:
        bar.begin("certify greg", 123456)
        bar.advance(100, {"certified": 100, "misdecided": 20, "undecided": 300})
        bar.advance(100, {"certified": 200, "misdecided": 20, "undecided": 300})
    lines = capsys.readouterr().err.splitlines()
    assert any("eta" in line and "200/123456 samples" in line and "…" in line for line in lines)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_behind_what_is_printed_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "grood_cert", "recipe", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "grood-cert: error: cannot print: No space left on device\n")


def test_a_name_that_no_file_can_have_is_refused(refused, tmp_path):
    said = refused("train", "x" * 5000, "--out", tmp_path / "run")
    assert said == f"grood-cert: error: {'x' * 60}...: File name too long; give a shorter one\n"


def test_a_table_of_nothing_is_its_title(capsys):
    print_across([], "set", {"auroc": "AUROC"}, "x" * 200)
    assert capsys.readouterr().out == "x" * 200 + "\n"
