from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from tests.mutants.catalogue import MUTANTS
from tests.mutants.runner import Mutant, Tree, hunt

ROOT = Path(__file__).parents[2]


def test_the_list_fits_the_tree():
    """Every old text is there once, every new one compiles, every test file exists; no name stands for two."""
    assert len(MUTANTS) >= 80
    for mutant in MUTANTS:
        mutant.planted(ROOT)
        assert all((ROOT / name).is_file() for name in mutant.tests), mutant.name
    assert Counter(mutant.name for mutant in MUTANTS).most_common(1)[0][1] == 1
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


def test_a_mutant_whose_line_has_changed_is_refused_by_name(tmp_path):
    (tmp_path / "sign.py").write_text("def sign(x):\n    return x > 0\n\n\ndef small(x):\n    return x > 0\n")
    for old, new, message in (
        ("x < 0", "x <= 0", "mutant lost: sign.py must hold its old text once, not 0 times"),
        ("x > 0", "x >= 0", "not 2 times"),
        ("def sign(x):\n    return x > 0", "def sign(y):\n    return y > 0", "one line must change, not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Mutant("lost", "sign.py", old, new, ()).planted(tmp_path)
    kept = Mutant("kept", "sign.py", "def sign(x):\n    return x > 0", "def sign(x):\n    return x < 0", ())
    assert kept.line(tmp_path) == 2 and kept.planted(tmp_path).count("x < 0") == 1


@pytest.fixture
def toy(tmp_path) -> Path:
    """A tree with a package of one function that is tested at 3 and at -2 alone."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    root = tmp_path / "toy"
    for name, text in {
        "toy/__init__.py": "def sign(x):\n    return (x > 0) - (x < 0)\n",
        "tests/test_sign.py": "from toy import sign\n\n\ndef test_sign():\n    assert sign(3) == 1 and sign(-2) == -1\n",
    }.items():
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    return root


def mutant(name, old, new):
    return Mutant(name, "toy/__init__.py", old, new, ("tests/test_sign.py",))


def test_who_lives_and_who_does_not(toy, tmp_path):
    said: list[str] = []
    mutants = [mutant("zero is positive", "x > 0", "x >= 0"), mutant("nothing is negative", "x < 0", "x < x")]
    found = hunt(toy, mutants, tmp_path / "copies", said=said.append, heavy=())
    killer = "tests/test_sign.py::test_sign"
    assert [(result.fate, result.by) for result in found] == [("survived", ""), ("killed", killer)]
    assert found[1].place == "toy/__init__.py:2" and len(said) == 3
    assert (toy / "toy/__init__.py").read_text() == (tmp_path / "copies/0/toy/__init__.py").read_text()


def test_tests_that_do_not_end_and_those_that_fail_already(toy, tmp_path):
    endless = mutant("it never ends", "return (x > 0) - (x < 0)", "exec('while True: pass')")
    with closing(Tree(toy, tmp_path / "copy", ["toy"], ())) as tree:
        assert tree.fate(endless, 0.1).fate == "timeout"
        (tree.root / "toy/__init__.py").write_text("def sign(x):\n    return 2\n")
        assert tree.failing(["tests/test_sign.py"], 600) == "tests/test_sign.py::test_sign"
