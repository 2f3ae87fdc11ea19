"""Applies planted bugs to copies of the tree, one at a time, and runs the tests that should notice."""

from __future__ import annotations

import compileall
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode
from queue import SimpleQueue
from typing import Literal

from tests.mutants.server import TIMEOUT

Fate = Literal["killed", "timeout", "survived"]
HEAVY = (  # what most tests import; each costs seconds
    *("torch", "torch.export", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "torchvision"),
    *("scipy.stats", "sklearn.datasets", "auto_LiRPA", "matplotlib.pyplot", "onnx", "hypothesis", "typer"),
)
_EARLY = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"  # as `HEAVY` is
_OPTIONS = "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-W", _EARLY
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """A bug: a line of source replaced by another.

    Attributes:
        name: What goes wrong, in a few words.
        file: Source file below the root of the tree.
        old: The text that is replaced; it occurs once. Lines around the one that changes may tell it from others.
        new: What stands there instead: one line differs.
        tests: Test files that should notice, the quickest and likeliest first.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def line(self, root: Path) -> int:
        """Number of the line that is changed.

        Raises:
            ValueError: If the old text is not there once, or not one line of it changes.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"mutant {self.name}: {self.file} must hold its old text once, not {count} times")
        before, after = self.old.split("\n"), self.new.split("\n")
        changed = [place for place, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]]
        if len(before) != len(after) or len(changed) != 1:
            raise ValueError(f"mutant {self.name}: one line must change, not {len(changed)}")
        return text[: text.index(self.old)].count("\n") + 1 + changed[0]

    def planted(self, root: Path) -> str:
        """The source with the bug in it."""
        self.line(root)
        text = (root / self.file).read_text(encoding="utf-8").replace(self.old, self.new)
        compile(text, self.file, "exec")
        return text


def planted(file: str, tests: tuple[str, ...], changes: Mapping[str, tuple[str, str]]) -> tuple[Mutant, ...]:
    """Mutants of one source file of the package, noticed by test files below `tests`: name to old and new text."""
    files = tuple(f"tests/{name}" for name in tests)
    return tuple(Mutant(name, f"grood_cert/{file}", old, new, files) for name, (old, new) in changes.items())


@dataclass(frozen=True)
class Result:
    """What became of a mutant.

    Attributes:
        mutant: Which.
        place: File and line.
        fate: "killed" by a test, "timeout": the tests did not end, which is noticed too, or "survived".
        by: The test that failed.
    """

    mutant: Mutant
    place: str
    fate: Fate
    by: str = ""


class Tree:
    """A copy of the tree that can be changed, with a server of tests in it.

    Args:
        root: The tree.
        target: Where to put the copy; an empty folder.
        packages: What must be imported from the copy.
        heavy: What the server imports once for all.

    Raises:
        RuntimeError: If the tests would import a package from somewhere else.
    """

    def __init__(self, root: Path, target: Path, packages: Sequence[str], heavy: Sequence[str] = HEAVY) -> None:
        self.root, self._log = target, target.with_suffix(".log")
        options = "-z", "--cached", "--others", "--exclude-standard"
        listed = subprocess.run(["git", "ls-files", *options], cwd=root, check=True, capture_output=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (root / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / name, target / name)
        for package in packages:  # bytecode that holds for unchanged sources alone; no other is written
            compileall.compile_dir(target / package, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        own = {"PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        environment = os.environ | own
        for package in packages:
            command = [sys.executable, "-c", f"import {package}; print({package}.__file__)"]
            found = subprocess.run(command, cwd=target, env=environment, check=True, capture_output=True, text=True)
            if not Path(found.stdout.strip()).is_relative_to(target):
                raise RuntimeError(f"tests would import {package} from {found.stdout.strip()}")
        server = Path(__file__).with_name("server.py")
        self._server = subprocess.Popen(
            [sys.executable, str(server), *heavy],
            cwd=target,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the server."""
        self._server.communicate()

    def failing(self, tests: Sequence[str], seconds: float) -> str | None:
        """The first test that fails, None if all pass.

        Raises:
            TimeoutError: If they take longer.
            RuntimeError: If pytest could not run them.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        self._log.write_text("", encoding="utf-8")
        print(json.dumps([seconds, str(self._log), [*_OPTIONS, *tests]]), file=self._server.stdin, flush=True)
        code = int(self._server.stdout.readline())
        if code == 0:
            return None
        if code == TIMEOUT:
            raise TimeoutError
        said = self._log.read_text(encoding="utf-8", errors="replace")
        found = _FAILED.search(said)
        if code != 1 or found is None:
            raise RuntimeError(f"pytest stopped with {code}:\n{said[-3000:]}")
        return found[1]

    def fate(self, mutant: Mutant, seconds: float) -> Result:
        """Plant a bug, run its tests, and take it out again."""
        path, place = self.root / mutant.file, f"{mutant.file}:{mutant.line(self.root)}"
        text = path.read_text(encoding="utf-8")
        path.write_text(mutant.planted(self.root), encoding="utf-8")
        try:
            by = self.failing(mutant.tests, seconds)
        except TimeoutError:
            return Result(mutant, place, "timeout")
        except RuntimeError as error:
            raise RuntimeError(f"mutant {mutant.name}: {error}") from error
        finally:
            path.write_text(text, encoding="utf-8")
        return Result(mutant, place, "survived" if by is None else "killed", by or "")


def hunt(
    root: Path,
    mutants: Sequence[Mutant],
    folder: Path,
    jobs: int = 1,
    seconds: float = 900.0,
    said: Callable[[str], object] = lambda text: None,
    heavy: Sequence[str] = HEAVY,
) -> list[Result]:
    """What becomes of each mutant; first all their tests must pass without any.

    Args:
        root: The tree.
        mutants: Which bugs.
        folder: Where copies of the tree are put; an empty folder.
        jobs: Copies that work side by side.
        seconds: Most that the tests of one mutant may take.
        said: Hears of every result.
        heavy: What the servers of tests import once for all.

    Raises:
        ValueError: If the old text of a mutant is not in the tree once.
        RuntimeError: If a test fails without a mutant, or pytest cannot run one.
    """
    for mutant in mutants:
        mutant.planted(root)
    packages = sorted({mutant.file.split("/")[0] for mutant in mutants})
    trees = [Tree(root, folder / str(number), packages, heavy) for number in range(max(1, min(jobs, len(mutants))))]
    free: SimpleQueue[Tree] = SimpleQueue()
    for tree in trees:
        free.put(tree)
    files = list(dict.fromkeys(name for mutant in mutants for name in mutant.tests))

    def sound(part: Sequence[str]) -> None:
        tree = free.get()
        failed = tree.failing(part, seconds * len(part)) if part else None
        free.put(tree)
        if failed is not None:
            raise RuntimeError(f"{failed} fails without any mutant")
        said(f"{len(part)} test files pass without any mutant")

    def tried(mutant: Mutant) -> Result:
        tree = free.get()
        result = tree.fate(mutant, seconds)
        free.put(tree)
        said(f"{result.fate}: {mutant.name} {result.by}")
        return result

    try:
        with ThreadPoolExecutor(len(trees)) as pool:
            list(pool.map(sound, [files[number :: len(trees)] for number in range(len(trees))]))
            return list(pool.map(tried, mutants))
    finally:
        for tree in trees:
            tree.close()


def table(results: Sequence[Result]) -> str:
    """Markdown: what became of the mutants.

    Example:
        >>> mutant = Mutant("a sign is lost", "ball.py", "-x", "x", ("tests/test_ball.py",))
        >>> print(table([Result(mutant, "ball.py:7", "killed", "tests/test_ball.py::test_sign")]))
        | mutant | where | killed by |
        |---|---|---|
        | a sign is lost | `ball.py:7` | `test_ball.py::test_sign` |
        <BLANKLINE>
        1 mutants: 1 killed (0 of them by a timeout), 0 survived.
    """
    rows = ["| mutant | where | killed by |", "|---|---|---|"]
    for result in results:
        by = f"`{result.by.removeprefix('tests/')}`"
        by = {"killed": by, "timeout": "its tests do not end", "survived": "**survived**"}[result.fate]
        rows.append(f"| {result.mutant.name} | `{result.place.removeprefix('grood_cert/')}` | {by} |")
    killed, late, lived = (sum(r.fate == fate for r in results) for fate in ("killed", "timeout", "survived"))
    count = f"{len(results)} mutants: {killed + late} killed ({late} of them by a timeout), {lived} survived."
    return "\n".join([*rows, "", count])
