"""The command line, called within the tests' process."""

from __future__ import annotations

import sys

import pytest

from grood_cert import cli


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line in this process; returns exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["grood-cert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def refused(call):
    """A call that must end with exit code 2 and one clear line."""

    def run(*arguments):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("grood-cert: error: ") and err.count("\n") == 1 and "Traceback" not in err
        return err

    return run
