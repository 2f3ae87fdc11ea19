"""Files of tensors and plain values: read without running code; ours are checked against a fingerprint.

What is no such file is called what it is: a pointer of Git LFS, a web page, a program, a pickle that runs code.

The archives that torch writes carry a checksum of each part, but torch does not look at it: weights with inverted bytes
load, and what they then detect is wrong. So every file of ours holds a SHA-256 of all that is in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import pickle
import pickletools
import re
import struct
import textwrap
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from grood_cert.errors import InputError, RunError, said

_FINGERPRINT = "content_sha256"
_READ = 4096  # bytes that tell what a file is
_SCANNED = 2**24  # bytes of a pickle in which the object is looked for that would run code
_ALONE = "save the weights alone, where its code is: torch.save(model.state_dict(), FILE)"
_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch that with: git lfs pull",
    b"\x89HDF": "an HDF5 file, as Keras writes them; expected weights of PyTorch",
    b"\x93NUMPY": "a NumPy array; expected weights of PyTorch",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"%PDF": "a PDF document",
}


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
            plain = value.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
            digest.update(plain.view(torch.uint8).numpy().data)
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
    """What a file that `torch.save` or safetensors wrote holds; no code in it is run.

    Raises:
        FileNotFoundError: If there is none.
        InputError: Saying what it is instead, or why it cannot be opened, in words that continue "FILE is ..."; also if
            it is one of ours, and its fingerprint is not that of its content.
        RunError: If it is of safetensors, and that package is not installed.
    """
    if isinstance(file, Path) and file.is_dir():
        raise InputError("a folder")
    with file.open("rb") if isinstance(file, Path) else io.BytesIO() as stream:
        beginning = stream.read(_READ)
    if isinstance(file, Path) and _of_safetensors(beginning):
        return _safetensors(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what is refused below by name
            with (
                file.open("rb") if isinstance(file, Path) else contextlib.nullcontext(file) as stream
            ):  # not by its name
                content = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds on foreign and damaged files
        other = foreign(file, beginning) if isinstance(file, Path) else None
        raise InputError(unsafe(str(error)) or other or f"damaged: {_plain(error)}") from error
    if isinstance(content, dict) and _FINGERPRINT in content:
        rest = {name: value for name, value in content.items() if name != _FINGERPRINT}
        if content[_FINGERPRINT] != fingerprint(rest):
            raise InputError("damaged: its content is not what was written (SHA-256 differs)")
    return content


def _plain(error: Exception) -> str:
    """What an exception says, in one line, without colours and without torch's advice to run the file."""
    text = re.sub(r"^Weights only load failed.*?(?:WeightsUnpickler error:|$)", "", said(error))
    text = "".join(letter for letter in re.sub(r"\x1b\[[0-9;]*m", "", text) if letter.isprintable())
    return textwrap.shorten(f"{type(error).__name__}: {text}", 120, placeholder=" ...")


def unsafe(message: str) -> str | None:
    """What torch found in a pickle and did not run."""
    found = re.search(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)", message)
    return _would_run(found[1]) if found else None


def _would_run(name: str) -> str:
    name = "".join(letter for letter in name if letter.isprintable())
    if name.startswith("torch.nn.modules."):
        return f"a whole pickled module ({name}), which runs code when it is opened; {_ALONE}"
    return f"a pickle that runs {name} when it is opened; {_ALONE}"


def _of_safetensors(beginning: bytes) -> bool:
    return beginning[8:9] == b"{" and beginning[:8] != b"\0" * 8 and beginning[5:8] == b"\0" * 3


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        package = importlib.import_module("safetensors.torch")
    except ImportError:
        raise RunError(f"{path}: this file needs the package safetensors: pip install safetensors") from None
    try:
        tensors: dict[str, Tensor] = package.load_file(path)
    except Exception as error:
        raise InputError(f"a damaged or truncated safetensors file: {_plain(error)}") from error
    return tensors


def foreign(path: Path, beginning: bytes) -> str | None:
    """What a file is that torch does not open, as far as its first bytes, its parts or its pickle tell."""
    for start, what in _BEGINNINGS.items():
        if beginning.startswith(start):
            return what
    if not beginning:
        return "empty"
    if beginning.startswith(b"PK"):
        return _foreign_archive(path)
    if beginning[:1] == b"\x08" and beginning[1:2] < b"\x20" and beginning[2:3] in b"\x12\x1a\x22\x2a\x32\x3a\x42":
        return "an ONNX file; expected weights of PyTorch"
    if beginning[:1] == b"\x80":
        return _foreign_pickle(path)
    if beginning[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    try:
        text = beginning.decode("utf-8", "strict" if len(beginning) < _READ else "ignore").lstrip("\ufeff \t\r\n")
    except UnicodeDecodeError:
        return "no file of tensors; expected one that torch.save or safetensors wrote"
    if "\0" in text:
        return "no file of tensors; expected one that torch.save or safetensors wrote"
    if text.startswith("<"):
        return "a web page (HTML or XML), not the file itself; download that"
    if text.startswith(("{", "[")):
        return "a JSON file; expected weights of PyTorch"
    kind = "CSV" if re.match(r".*[,;\t]", text) else "text"
    return f"a {kind} file; expected weights of PyTorch"


def _foreign_archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, struct.error):
        return "a truncated or damaged archive; fetch it again"
    if any(part.endswith("/constants.pkl") for part in parts):
        return "a TorchScript archive, a program; save the weights alone: torch.save(module.state_dict(), FILE)"
    if any(part.endswith(("/models/model.json", "serialized_exported_program.json")) for part in parts):
        return "a program that torch.export saved; expected weights alone: torch.save(model.state_dict(), FILE)"
    if parts and all(part.endswith(".npy") for part in parts):
        return "a NumPy archive; expected weights of PyTorch"
    if not any(part.endswith("data.pkl") for part in parts):
        listed = textwrap.shorten(", ".join(parts), 60, placeholder=" ...") or "nothing"
        return f"a zip archive without weights of PyTorch in it; it holds {listed}"
    return None


def _foreign_pickle(path: Path) -> str | None:
    """The first object that a plain pickle would make; the pickle is read, not run."""
    texts: list[str] = []
    try:
        with path.open("rb") as stream:
            for operation, argument, _ in pickletools.genops(stream.read(_SCANNED)):
                if operation.name == "GLOBAL" or (operation.name == "STACK_GLOBAL" and len(texts) > 1):
                    name = ".".join(texts[-2:]) if operation.name == "STACK_GLOBAL" else str(argument).replace(" ", ".")
                    if not name.startswith(("collections.OrderedDict", "torch._utils.", "torch.FloatStorage")):
                        return _would_run(name)
                if isinstance(argument, str):
                    texts.append(argument)
    except (ValueError, UnicodeError, pickle.UnpicklingError, OSError):
        return "a damaged or very large pickle; write it with torch.save instead"
    return "a plain pickle; write it with torch.save instead"


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
            raise InputError(f"{path}: not a {self.name}, but {error}") from error
        if not isinstance(content, dict) or content.get("format") != self.name:
            raise InputError(f"{path}: not a {self.name}; expected {self.expected}")
        version = content.get("format_version")
        if type(version) is not int or version != self.version:
            given = version if isinstance(version, int) else f"a {type(version).__name__}"
            raise InputError(f"{path}: {self.name} of format {given}; this version reads {self.version}")
        if content.pop(_FINGERPRINT, None) is None:
            raise InputError(f"{path}: a {self.name} without a SHA-256 of its content; it was not written whole")
        return content
