"""The guard through which every proof goes: memory, time, and whatever else goes wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from grood_cert.ball import Ball
from grood_cert.certification.state import State
from grood_cert.errors import InputError
from grood_cert.system.memory import split_on_memory_error

_Proof = TypeVar("_Proof", bound=Any)


class Guard:
    """Bounds what is proved at once. A ball for which no proof comes back counts as not proved.

    Args:
        together: Most balls in one call of a bound engine, None: all of a batch.

    Attributes:
        failures: Messages of exceptions, with the number of balls lost to each.

    Raises:
        InputError: If no ball may be bounded.
    """

    def __init__(self, together: int | None = None) -> None:
        if together is not None and together < 1:
            raise InputError(f"at least one ball must be bounded at once, got {together}")
        self.together = together
        self.failures: dict[str, int] = {}

    def prove(
        self,
        prove: Callable[[Ball], _Proof],
        unproved: Callable[[int], _Proof],
        state: State,
        index: Tensor,
        eps: Tensor,
        timed: bool = True,
    ) -> _Proof:
        """Prove something about balls of some samples, as many at once as memory allows.

        Where memory runs out, the balls are halved. Any other exception proves nothing and is counted.

        Args:
            prove: Answers a dataclass of tensors, one entry a ball.
            unproved: The same for so many balls about which nothing is proved.
            state: The batch.
            index: Which samples.
            eps: Radius of each ball.
            timed: Whether nothing more is proved once time is up.
        """

        def attempt(index: Tensor, eps: Tensor) -> _Proof:
            return unproved(len(index)) if timed and state.late(index) else prove(state.ball(index, eps))

        def failed(error: Exception, balls: int) -> _Proof:
            message = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            self.failures[message] = self.failures.get(message, 0) + balls
            return unproved(balls)

        size = self.together or len(index)
        parts = [
            part
            for items in zip(index.split(size), eps.split(size), strict=True)
            for part in split_on_memory_error(attempt, items, failed)
        ]
        joined = (torch.cat([getattr(part, item.name) for part in parts]) for item in dataclasses.fields(parts[0]))
        whole: _Proof = type(parts[0])(*joined)
        return whole
