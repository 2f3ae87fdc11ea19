"""The schemas, and that everything about results works where torch does not exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import grood_cert
from grood_cert.lipschitz.bound import METHODS
from grood_cert.results.columns import KINDS, LIPSCHITZ_METHODS, OUTCOMES, SCHEMAS, STAGES, grid_column, header
from tests.results.examples import random_certification

TORCHLESS = """
import importlib, pkgutil, sys
from pathlib import Path

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ImportError("there is no torch")

sys.meta_path.insert(0, NoTorch())
import grood_cert.results
for module in pkgutil.iter_modules(grood_cert.results.__path__):
    importlib.import_module("grood_cert.results." + module.name)
from grood_cert.cli.curve import curve
from grood_cert.cli.threshold import threshold
folder = Path(sys.argv[1])
curve([folder / "rows.csv"], folder / "figure.png")
threshold(folder / "rows.csv", 0.5)
print(sorted(entry.name for entry in folder.iterdir()))
"""


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_column_is_documented_once(kind):
    schema = SCHEMAS[kind]
    names = header(kind, (0.1, 1e-05))
    assert len(set(names)) == len(names) == len(schema.columns) + 2 * len(schema.grid)
    assert names[:4] == ["set", "kind", "index", "file"]
    assert not set(schema.columns) & set(schema.grid)
    for column in (*schema.columns.values(), *schema.grid.values()):
        assert column.words and column.type in ("text", "integer", "number")
        assert not column.allowed or column.type == "text"
        assert column.type == "number" or not (column.finite or column.least is not None)
    assert all(grid_column(name, 1e-05) == f"{name}@1e-05" for name in schema.grid)


def test_the_words_are_those_of_the_numerics():
    assert LIPSCHITZ_METHODS == METHODS
    assert set(STAGES) < set(OUTCOMES) and len(set(OUTCOMES)) == len(OUTCOMES)
    assert SCHEMAS["smoothing"].columns["kind"].allowed == KINDS


def test_results_are_read_drawn_and_looked_up_without_torch(tmp_path):
    random_certification(0).write(tmp_path / "rows.csv")
    done = subprocess.run(
        [sys.executable, "-c", TORCHLESS, tmp_path],
        cwd=Path(grood_cert.__file__).parents[1],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = ["figure-curve.csv", "figure.png", "rows-gamma0.5.csv", "rows-gamma0.5.json", "rows.csv", "rows.json"]
    assert done.stdout.splitlines()[-1] == str(made)
