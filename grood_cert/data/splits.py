"""The splits that a source comes with, and the part of an experiment that each plays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from grood_cert.errors import InputError

Part = Literal["train", "calibration", "test"]
_ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval"), "val"),
    **dict.fromkeys(("test", "testing", "t10k"), "test"),
}
_INSTEAD: dict[Part, tuple[Part, ...]] = {
    "train": ("train", "calibration", "test"),
    "calibration": ("calibration", "test", "train"),
    "test": ("test", "calibration", "train"),
}


def is_split(name: str) -> bool:
    """Whether a name is one that splits have, such as "val"."""
    return name.casefold() in _ROLES


def parts_of(names: Iterable[str], source: str) -> dict[Part, str]:
    """Which of a source's splits plays which part.

    Of train, validation and test splits each plays its own; a validation split is the test where there is no test
    split, and a single split is all there is.

    Raises:
        InputError: If two splits would play one part.

    Example:
        >>> parts_of(["train", "val", "test"], "x")
        {'train': 'train', 'calibration': 'val', 'test': 'test'}
        >>> parts_of(["Training", "Validation"], "x"), parts_of(["test"], "x")
        ({'train': 'Training', 'test': 'Validation'}, {'train': 'test'})
    """
    found: dict[str, str] = {}
    for name in names:
        role = _ROLES.get(name.casefold())
        if role and role in found:
            raise InputError(
                f"'{source}' has splits '{found[role]}' and '{name}', which mean the same; keep one of them"
            )
        if role:
            found[role] = name
    if len(found) == 1:
        return {"train": next(iter(found.values()))}
    parts: dict[str, Part] = {"train": "train", "val": "calibration" if "test" in found else "test", "test": "test"}
    return {parts[role]: found[role] for role in parts if role in found}


def chosen(parts: Mapping[Part, str], wanted: Part) -> str:
    """The name of the split to read: the wanted one, or what comes nearest; "" where a source has no splits.

    >>> chosen({"train": "train", "test": "val"}, "calibration"), chosen({}, "test")
    ('val', '')
    """
    return next((parts[part] for part in _INSTEAD[wanted] if part in parts), "")
