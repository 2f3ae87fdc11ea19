"""The face of the package: what `import grood_cert` offers, and what it costs."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import grood_cert
from grood_cert.certification.settings import EFFORTS

ROOT = Path(grood_cert.__file__).parent


def outcome_of(code: str, **options) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, grood_cert; dir(grood_cert); print(sorted({'torch', 'numpy', 'scipy', 'typer'} & set(sys.modules)))"
    assert outcome_of(code) == "[]\n"


def test_every_public_name_is_there_and_no_module_hides_one():
    found = pkgutil.walk_packages(grood_cert.__path__, "grood_cert.")
    modules = [importlib.import_module(module.name) for module in found if module.name != "grood_cert.__main__"]
    for name in grood_cert.__all__:
        value = getattr(grood_cert, name)
        assert name in dir(grood_cert) and (name == "figures" or callable(value)), (name, value)
    assert grood_cert.figures.__name__ == "grood_cert.results.figures" and len(modules) > 60


def test_the_lazy_names_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == sorted(grood_cert.__all__)
    for name, module in seen.items():
        assert getattr(grood_cert, name) is getattr(importlib.import_module(module), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'grood_cert' has no attribute 'certfy'"):
        grood_cert.certfy  # noqa: B018


def test_the_types_are_part_of_the_package():
    assert (ROOT / "py.typed").read_bytes() == b""
    project = (ROOT.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'\[tool\.hatch\.build\.targets\.wheel\]\ninclude = \["/grood_cert",', project)  # the whole folder


def test_the_example_of_the_readme_runs_as_it_stands(model, tmp_path, monkeypatch, capsys):
    little = dataclasses.replace(EFFORTS["default"], attack=EFFORTS["fast"].attack, steps=4, nodes=4, rounds=1)
    monkeypatch.setitem(EFFORTS, "default", little)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT.parent / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (path,) = re.findall(r'"(\S+/model\.pt)"', example)
    (tmp_path / path).parent.mkdir(parents=True)
    shutil.copy(model, tmp_path / path)
    monkeypatch.chdir(tmp_path)
    exec(example, {})  # noqa: S102
    printed = capsys.readouterr().out
    proved, attacked = (
        [float(number) for number in re.findall(r"\d+\.\d+|inf", line)] for line in printed.splitlines()[:2]
    )
    assert len(proved) == len(attacked) == 4 and max(proved) > 0
    assert all(0 <= one <= other for one, other in zip(proved, attacked, strict=True))
