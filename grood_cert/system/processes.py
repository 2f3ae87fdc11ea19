"""One run in several processes that share its work, as `torchrun` starts them; without torchrun, one process.

Every process holds the whole network and works on its part of each batch. What the parts add up to is summed over the
processes explicitly, in one all-reduce a step: nothing wraps the network, so second derivatives, several forward
passes and compiled networks need no special care.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as groups

from grood_cert.errors import InputError, StoppedError

_WAIT = datetime.timedelta(days=365)  # however long a download or the other shards take
_waiting: groups.ProcessGroup | None = None  # beside the group that exchanges tensors, which gives up after minutes


def count() -> int:
    """Number of processes of this run."""
    return groups.get_world_size() if groups.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; the first alone writes and prints."""
    return groups.get_rank() if groups.is_initialized() else 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the other processes while the block runs, if torchrun started several and they have not met yet.

    Args:
        device: Any "cuda..." gives each process of a machine the GPU of its local number, and NCCL; anything else is
            used as it is, with gloo.

    Yields:
        The device of this process.

    Raises:
        InputError: If the machine has fewer GPUs than processes.

    Example:
        >>> with joined("cpu") as device:
        ...     device, rank(), count()
        ('cpu', 0, 1)
    """
    global _waiting
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.startswith("cuda"):
        local, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= available:
            raise InputError(f"this machine has {available} GPUs; start at most as many processes, or add --device cpu")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if groups.is_initialized():
        yield device
        return
    with _exchange_failures_told():
        groups.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        with _exchange_failures_told():
            _waiting = groups.new_group(backend="gloo", timeout=_WAIT)
        yield device
    finally:
        _waiting = None
        groups.destroy_process_group()
        gc.collect()  # a group that lived on in a reference cycle would abort the process at its exit


@contextlib.contextmanager
def _exchange_failures_told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of NCCL, gloo or the store: a connection was closed, or a timeout passed
        reason = re.sub(r"^\[[^]]*\] ", "", str(error).strip().splitlines()[0])  # without the line of torch's code
        raise StoppedError(
            f"another process of this run has stopped ({reason}); the same command goes on (train: with --resume)"
        ) from error


def wait() -> None:
    """Wait until every process has come here, however long that takes.

    Raises:
        StoppedError: If another process has died.
    """
    if count() == 1:
        return
    with _exchange_failures_told():
        group = _waiting or groups.new_group(
            backend="gloo", timeout=_WAIT
        )  # where somebody else gathered the processes
        try:
            groups.monitored_barrier(group, timeout=_WAIT)
        finally:
            if group is not _waiting:
                groups.destroy_process_group(group)


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace tensors, in place, by their sums over all processes."""
    _as_one(tensors, groups.all_reduce)


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Replace tensors, in place, by those of the first process."""
    _as_one(tensors, lambda flat: groups.broadcast(flat, src=0))


def _as_one(tensors: Iterable[Tensor], exchange: Callable[[Tensor], object]) -> None:
    """Exchange tensors laid end to end, in one message for each type of number."""
    if count() == 1:
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor.detach())
    for parts in kinds.values():
        flat = torch.cat([part.reshape(-1) for part in parts])
        with _exchange_failures_told():
            exchange(flat)
        for part, value in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(value.view_as(part))


def value_of_first(value: Any) -> Any:
    """The value that the first process gives, on all of them; it is pickled on the way."""
    if count() == 1:
        return value
    box = [value]
    with _exchange_failures_told():
        groups.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """A block that the first process leaves before the others enter it, so that one alone downloads what is missing.

    All leave it together: however long one of them takes, no exchange of tensors is kept waiting.

    Raises:
        StoppedError: If another process has died.
    """
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()
    wait()
