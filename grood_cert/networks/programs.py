"""Programs that `torch.export.save` wrote, read without running what they bring along.

`torch.export.load` trusts its file: it unpickles parts of the archive, evaluates the expressions of sizes as Python, and
finds the operators by name among everything that torch can reach. So the archive is looked through first, by the reader
that torch itself uses: its pickles may hold tensors alone, its expressions names, numbers and arithmetic, and its nodes
call operators. What else there is, is refused.
"""

from __future__ import annotations

import ast
import io
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import PT2ArchiveReader, load_pt2

from grood_cert.errors import InputError, said
from grood_cert.system.torch_files import unsafe

_FUNCTIONS = {
    *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "Abs", "floor", "ceiling"),
    *(
        "PythonMod",
        "FloorDiv",
        "CeilDiv",
        "CeilToInt",
        "FloorToInt",
        "CleanDiv",
        "IntTrueDiv",
        "FloatTrueDiv",
        "ToFloat",
    ),
    *("TruncToInt", "TruncToFloat", "RoundToInt", "ModularIndexing", "Where", "Identity", "Piecewise", "true", "false"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan", "And", "Or", "Not"),
    *("StrictGreaterThan", "GreaterThan", "NegativeInfinity", "Infinity", "oo", "int_oo"),
}
_SYNTAX = (
    *(ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.UnaryOp, ast.BinOp, ast.Compare),
    *(ast.Tuple, ast.operator, ast.unaryop, ast.cmpop),
)
_SIZE = re.compile(r"[a-z]\w*\d+|[-+]?[\d.]+(?:e[-+]?\d+)?")  # s31, u0; a number
_PATH = re.compile(r"[\w .:/-]*")
_ARITHMETIC = "add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem"
_OPERATOR = re.compile(
    rf"torch\.ops\.[a-z]\w*\.[a-z_]\w*(?:\.[A-Za-z]\w*)?|_?operator\.(?:{_ARITHMETIC})|math\.\w+|torch\.sym_\w+"
)


def read_program(path: Path) -> ExportedProgram:
    """The program in a file.

    Raises:
        InputError: If it is no such file, or one that would run code when it is loaded; the message says what.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that its tensors lie in memory that cannot be written
            _check(PT2ArchiveReader(str(path)))
            programs = load_pt2(str(path)).exported_programs
            (program,) = programs.values()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        raise InputError(f"{path}: not a program saved by torch.export.save ({said(error)[:160]})") from error
    if hasattr(program, "_guards_code"):
        program._guards_code = []  # Python that would be run before each call
    found: ExportedProgram = program
    return found


def _check(archive: PT2ArchiveReader) -> None:
    """Refuse an archive that would run code when it is loaded.

    Raises:
        InputError: Naming what would.
    """
    names: list[str] = archive.get_file_names()
    pickles = {name for name in names if name.endswith(".pt")}
    for name in names:
        if name.endswith(".json"):
            content = json.loads(archive.read_bytes(name))
            for key, value in _entries(content):
                _check_entry(key, value)
            if name.endswith("_config.json"):
                folder = name.rpartition("/")[0]
                pickles |= {f"{folder}/{part}" for part in _pickled(content["config"])}
    for name in sorted(pickles):
        content = archive.read_bytes(name)
        try:
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:
            reason = unsafe(str(error)) or f"damaged: {said(error)[:120]}"
            raise InputError(f"a program whose part {name} is {reason}") from error


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """All pairs of key and value in nested JSON; those of a node's call have the key "call"."""
    if isinstance(content, list):
        for inner in content:
            yield from _entries(inner)
    elif isinstance(content, dict):
        for key, value in content.items():
            yield ("call" if key == "target" and "inputs" in content else key), value
            yield from _entries(value)


def _check_entry(key: str, value: Any) -> None:
    """What becomes Python: expressions are evaluated, names are written into the code of the graph."""
    text = value if isinstance(value, str) else ""
    if key == "expr_str" and not _is_arithmetic(text):
        raise InputError(f"a program with an expression that is not arithmetic: {str(value)[:60]!r}")
    if key == "call" and not _OPERATOR.fullmatch(text):
        raise InputError(f"a program that calls {str(value)[:60]!r}, which is no operator of torch")
    if key == "name" and text and not text.isidentifier():
        raise InputError(f"a program in which {text[:60]!r} is a name")
    if key.endswith("_name") and not _PATH.fullmatch(text):
        raise InputError(f"a program in which {text[:60]!r} is a name")


def _is_arithmetic(text: str) -> bool:
    """Whether a text holds numbers, names of sizes and functions of them, and no other Python."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(map(_is_plain, nodes))


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name)
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or bool(_SIZE.fullmatch(node.id))
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str | bytes) or bool(_SIZE.fullmatch(str(node.value)))
    return isinstance(node, _SYNTAX)


def _pickled(config: dict[str, dict[str, Any]]) -> list[str]:
    """The parts of an archive that torch unpickles, by the table of its weights or constants."""
    found = []
    for name, entry in config.items():
        part = str(entry["path_name"])
        if not _PATH.fullmatch(name):
            raise InputError(f"a program in which {name[:60]!r} is a name")
        if part.startswith("custom_obj"):
            raise InputError("a program with objects of classes of its own, which are made by running code")
        if entry.get("use_pickle", True):
            found.append(part)
    return found
