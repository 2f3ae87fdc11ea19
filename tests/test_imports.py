"""Dependencies point one way. All imports of the package count, also those inside functions and for types."""

from __future__ import annotations

import ast
import functools
import graphlib
from pathlib import Path

import pytest

import grood_cert

ROOT = Path(grood_cert.__file__).parent
NUMERICS = (
    *("ball", "scores", "metrics", "conventions", "guarantees", "confidence"),
    *("attacks", "networks", "bounds", "lipschitz", "certification"),
)
HEAVY = ("torch", "torchvision", "scipy", "matplotlib", "sklearn", "auto_LiRPA")


def name_of(path: Path) -> str:
    parts = ("grood_cert", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@functools.cache
def imports(name: str, types: bool = True, local: bool = True) -> frozenset[str]:
    """Modules that a module imports; `types`, `local`: also those only for types, or inside functions."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        for child in ast.iter_child_nodes(node):
            skipped = (is_for_types(child) and not types) or (
                isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not local
            )
            if not skipped:
                visit(child)

    visit(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    return frozenset(found - {name})


def at_import(name: str) -> set[str]:
    """Modules that are there once a module is imported, itself included, with what they import from elsewhere."""
    found, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        if module in MODULES:
            waiting += imports(module, types=False, local=False)
            waiting += [parent for parent in MODULES if module.startswith(parent + ".")]
    return found


def rooms(*names: str) -> list[str]:
    return [name for name in MODULES if name.split(".")[1:2] and name.split(".")[1] in names]


def into(name: str, *rooms: str) -> set[str]:
    """What a module imports from some rooms, or parts of rooms, of the package."""
    prefixes = tuple(f"grood_cert.{room}" for room in rooms)
    return {found for found in imports(name) if any(f"{found}.".startswith(f"{prefix}.") for prefix in prefixes)}


def test_the_search_finds_imports():
    assert len(MODULES) > 60 and {"grood_cert", "grood_cert.bounds.crown", "grood_cert.cli.certify"} <= set(MODULES)
    assert "grood_cert.ball" in imports("grood_cert.bounds.crown")
    assert "grood_cert.detector" in imports("grood_cert.cli.certify")  # inside a function
    assert "torch" in at_import("grood_cert.bounds.crown")
    assert into("grood_cert.bounds.crown", "ball") == {"grood_cert.ball"}


@pytest.mark.parametrize("name", rooms(*NUMERICS))
def test_numerics_know_no_files_no_runs_no_pictures_and_no_commands(name):
    assert not into(name, "system.files", "cli", "results", "runs", "training", "demo", "api")


@pytest.mark.parametrize("name", rooms("results"))
def test_results_need_no_torch(name):
    assert not at_import(name) & {"torch", "torchvision"}
    assert not into(name, "bounds", "lipschitz", "attacks", "networks", "training", "runs", "detector", "cli")


@pytest.mark.parametrize("name", MODULES)
def test_only_commands_know_commands(name):
    if name.split(".")[1:2] not in (["cli"], ["__main__"]):
        assert not into(name, "cli")


@pytest.mark.parametrize("name", rooms("cli"))
def test_commands_import_heavy_packages_late(name):
    assert not {found.split(".")[0] for found in at_import(name)} & set(HEAVY)


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_no_module_is_imported_while_it_imports():
    graph = {name: imports(name, types=False, local=False) - {"grood_cert"} for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_rooms_stand_above_one_another():
    """Also where an import is late, or for types alone; a room is a folder, or a module beside the folders."""
    graph: dict[str, set[str]] = {}
    for name in MODULES.keys() - {"grood_cert"}:
        others = {room_of(found) for found in imports(name) if found in MODULES and found != "grood_cert"}
        graph.setdefault(room_of(name), set()).update(others - {room_of(name)})
    graphlib.TopologicalSorter(graph).prepare()
