"""Memory: how much was used, how many samples fit, and what to do when it runs out."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from grood_cert.errors import InputError

_T = TypeVar("_T")
_STATUS = Path("/proc/self/status")
_WORDS = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")  # of torch's allocators


def peak_memory(device: str | torch.device = "cpu") -> int:
    """Most bytes this process has held so far: resident memory of the host, or memory that tensors took on a GPU.

    Linux hands the peak that `getrusage` reports on from a parent process to its child, so there it is read from the
    kernel's account of this process alone. Windows has no `getrusage`; psutil tells the peak there.

    Args:
        device: "cpu" or a CUDA device.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="ascii", errors="replace"))
        if found:
            return int(found[1]) * 1024
    if sys.platform == "win32":
        return int(importlib.import_module("psutil").Process().memory_info().peak_wset)
    resource = importlib.import_module("resource")
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024


def batch_for_memory(measure: Callable[[int], int], budget: int, largest: int) -> int:
    """Most samples that fit into a budget of memory together, from measurements of a few.

    The peak is taken to be linear in the samples, base + n cost. It is measured for 1, 2, 4, ... samples, as long as
    the line through the last two measurements predicts that the next one fits; the answer is read off the last line.
    Every measurement but the second is therefore made only where it is expected to stay within the budget.

    Args:
        measure: Peak in bytes with this many samples together; called with growing numbers, so a peak since the start
            of the process will do.
        budget: Bytes.
        largest: Most samples asked for.

    Returns:
        From 1 to `largest`.

    Raises:
        InputError: If one sample alone exceeds the budget.

    Example:
        >>> batch_for_memory(lambda samples: 1000 + 70 * samples, budget=4000, largest=64)
        42
    """
    samples, peak, cost = 1, measure(1), 0.0
    if peak > budget:
        raise InputError(
            f"memory {_megabytes(budget)}: one sample alone takes {_megabytes(peak)}; allow more, or use a cheaper method"
        )
    while samples < largest:
        following = min(2 * samples, largest)
        if peak + cost * (following - samples) > budget:
            break
        grown = measure(following)
        cost = max(grown - peak, 0) / (following - samples)
        if grown > budget:
            break
        samples, peak = following, grown
    return min(largest, samples + int((budget - peak) / cost)) if cost > 0 else samples


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.0f}M"


def is_memory_error(error: BaseException | None) -> bool:
    """Whether memory ran out, on a GPU or on the CPU: the exception says so, or another one that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def split_on_memory_error(
    function: Callable[..., _T], items: Sequence[Tensor], failed: Callable[[Exception, int], _T]
) -> list[_T]:
    """Call `function(*items)`; where memory runs out, on each half of the samples instead, down to a single sample.

    Args:
        function: What to do with samples.
        items: Tensors with the samples along the first axis, which are cut alike.
        failed: (exception, number of samples) -> what stands in for the result. Asked when a single sample is still
            too much, and for every other exception.

    Returns:
        The results of the parts, in the order of the samples; one result if nothing had to be cut.

    Example:
        >>> def at_most_two(x):
        ...     if len(x) > 2:
        ...         raise MemoryError
        ...     return x.tolist()
        >>> split_on_memory_error(at_most_two, [torch.arange(5)], lambda error, samples: [])
        [[0, 1], [2], [3, 4]]
    """
    samples = len(items[0])
    try:
        return [function(*items)]
    except Exception as error:  # noqa: BLE001  (what it means is for `failed` to say)
        if samples <= 1 or not is_memory_error(error):
            return [failed(error, samples)]
    # The exception is gone by now, and with it the frames that held on to memory.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    halves = zip(*(item.tensor_split(2) for item in items), strict=True)
    return [part for half in halves for part in split_on_memory_error(function, half, failed)]
