"""The checksum of a result, which its manifest holds: of all that the manifest says and of all cells of the rows.

It shows what disks and copies do to a file, not what people do: who changes a number can change the checksum too. Cells
count by value, so rows that pandas or polars have written again keep theirs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from grood_cert.system.files import as_json

KEY = "sha256"


class Checksum:
    """SHA-256 over records that come bit by bit.

    Args:
        records: The first of them, as text: cells by the names of their columns.

    Example:
        >>> one, two = Checksum([{"a": "1.50", "b": ""}]), Checksum([{"b": "NaN", "a": "1.5"}])
        >>> one.of({"eps": (0.1,), KEY: "before"}) == two.of({"eps": [0.1]})
        True
        >>> one.of({"eps": [0.2]}) == two.of({"eps": [0.1]})
        False
    """

    def __init__(self, records: Iterable[Mapping[str, str]] = ()) -> None:
        self._rows = hashlib.sha256()
        self.add(records)

    def add(self, records: Iterable[Mapping[str, str]]) -> None:
        """Count further records in."""
        for record in records:
            cells = [f"{len(name)} {name} {_value(record[name])}" for name in sorted(record)]
            self._rows.update("\n".join([str(len(cells)), *cells, ""]).encode("utf-8", "surrogatepass"))

    def of(self, manifest: Mapping[str, Any]) -> str:
        """The checksum, in hexadecimal, of the records so far and a manifest; its own entry there does not count."""
        whole = self._rows.copy()
        rest = {name: value for name, value in manifest.items() if name != KEY}
        whole.update(json.dumps(as_json(rest), sort_keys=True).encode())
        return whole.hexdigest()


def _value(cell: str) -> str:
    try:
        return repr(float(cell or "nan"))
    except ValueError:
        return f"{len(cell)} {cell}"


def check_sum(manifest: Mapping[str, Any], records: Iterable[Mapping[str, str]]) -> None:
    """Make sure that manifest and rows are those that were written; manifests without a checksum pass.

    Raises:
        ValueError: If not.
    """
    if manifest.get(KEY) not in (None, Checksum(records).of(manifest)):
        raise ValueError("damaged: rows and manifest are not what was written, SHA-256 differs")
