"""Files of tensors and plain values: read without running code, checked against a fingerprint of their content.

The archives that torch writes carry a checksum of each part, but torch does not look at it: weights with inverted bytes
load, and what they then detect is wrong. So every file of ours holds a SHA-256 of all that is in it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from grood_cert.errors import InputError, said

_FINGERPRINT = "sha256"


def fingerprint(content: Any) -> str:
    """SHA-256 of nested plain values and tensors: names, types, shapes and bytes, in their order.

    Args:
        content: None, numbers, strings, tensors, and lists, tuples and dictionaries of these.

    Raises:
        InputError: If there is anything else in it.

    Example:
        >>> fingerprint({"a": torch.ones(2)}) == fingerprint({"a": torch.ones(2)})
        True
        >>> fingerprint({"a": torch.ones(2)}) == fingerprint({"a": torch.ones(2, 1)})
        False
    """
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(f"names {len(value)}\n".encode())
            for name, inner in value.items():
                add(name)
                add(inner)
        elif isinstance(value, list | tuple):
            digest.update(f"items {len(value)}\n".encode())
            for inner in value:
                add(inner)
        elif value is None or isinstance(value, bool | int | float | str):
            text = repr(value)
            digest.update(f"value {len(text)} {text}\n".encode("utf-8", "surrogatepass"))
        else:
            raise InputError(f"a file of tensors holds plain values, not {type(value).__name__}")

    add(content)
    return digest.hexdigest()


def opened(file: Path | BinaryIO) -> Any:
    """What a file that `torch.save` wrote holds; no code in it is run.

    Raises:
        FileNotFoundError: If there is none.
        InputError: Saying why it cannot be opened.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises a dozen kinds on foreign and damaged files
        raise InputError(said(error)[:120]) from error


@dataclass(frozen=True)
class Format:
    """A kind of files of ours.

    Attributes:
        name: What such a file is called; it stands in the file.
        version: Of its content; another one is refused.
        expected: Where such files come from, for messages.
        absent: What to say where there is no file.
    """

    name: str
    version: int
    expected: str
    absent: str

    def packed(self, content: Mapping[str, Any]) -> io.BytesIO:
        """The file, fingerprint included.

        Raises:
            InputError: If there is anything but plain values and tensors in the content.
        """
        whole = {"format": self.name, "format_version": self.version, **content}
        stream = io.BytesIO()
        torch.save({**whole, _FINGERPRINT: fingerprint(whole)}, stream)
        stream.seek(0)
        return stream

    def unpacked(self, path: Path, stream: BinaryIO | None = None) -> dict[str, Any]:
        """What a file holds, without its fingerprint.

        Args:
            path: The file.
            stream: Where to read it from, if it is not there yet.

        Raises:
            InputError: If it is missing, damaged, of another kind or of another version.
        """
        try:
            content = opened(stream or path)
        except FileNotFoundError:
            raise InputError(f"{path}: {self.absent}") from None
        except InputError as error:
            raise InputError(f"{path}: not a {self.name}, or a truncated one ({error})") from error
        if not isinstance(content, dict) or content.get("format") != self.name:
            raise InputError(f"{path}: not a {self.name}; expected {self.expected}")
        if content.get("format_version") != self.version:
            raise InputError(
                f"{path}: {self.name} of format {content.get('format_version')}; this version reads {self.version}"
            )
        stored = content.pop(_FINGERPRINT, None)
        if stored != fingerprint(content):
            raise InputError(f"{path}: damaged: its content is not what was written (SHA-256 differs)")
        return content
