"""The state of an unfinished run, `last.pt`, and the weights of its best epoch, `best.pt`.

Every random number of a run follows from its seed and from how far it has got, so that epoch, step, network, optimiser
and what the epoch has measured so far are all there is to keep: on the CPU, a run that is resumed ends with the same
bytes as one that was never interrupted. Both files are replaced in one move, never written into, and
`torch.load(weights_only=True)` opens them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from grood_cert.detector import Architecture
from grood_cert.errors import InputError, RunError
from grood_cert.recipe import Recipe, first_difference, from_dict
from grood_cert.system.files import replacing
from grood_cert.system.torch_files import Format

_STATE = Format(
    "state of a grood-cert run",
    version=2,
    expected="the last.pt of a run that was interrupted",
    absent="no such file, so there is nothing to resume; start without --resume",
)
_WEIGHTS = Format(
    "file of grood-cert weights",
    version=2,
    expected="the best.pt of a run that was interrupted",
    absent="no such file, and it held the weights of the best epoch so far; begin again with --force",
)


@dataclass(frozen=True)
class TrainingState:
    """How far a training run has got; its tensors are the run's own and change with its next step.

    Attributes:
        epoch: The epoch in progress, from 1; one more than there are when all is done but the evaluation.
        step: Steps of it that are done.
        network: State of the network.
        optimizer: State of the optimiser.
        history: Terms of the objective in those steps, shape (step, terms).
        seconds: Time spent on those steps.
    """

    epoch: int
    step: int
    network: dict[str, Tensor]
    optimizer: dict[str, Any]
    history: Tensor
    seconds: float


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What goes on with a run one of whose files cannot be written is said.

    Args:
        folder: Of the run.

    Raises:
        RunError: In place of the `InputError`.
    """
    try:
        yield
    except InputError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        kept = "what it last saved is kept: make room, then add --resume"
        if not (folder / "last.pt").exists():
            kept = "nothing of it is saved yet: make room, then give the same command"
        raise RunError(f"{error}; the run stops, {kept}") from error


def _write(path: Path, kind: Format, content: dict[str, Any]) -> None:
    stream = kind.packed(content)
    with writing(path.parent), replacing(path) as temporary:
        temporary.write_bytes(stream.getbuffer())


def _described(architecture: Architecture) -> dict[str, Any]:
    return {**vars(architecture), "shape": list(architecture.shape)}


def save(
    path: Path, recipe: Recipe, architecture: Architecture, state: TrainingState, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write the state of a run.

    Args:
        path: `last.pt`.
        recipe: Its settings.
        architecture: Its network; the normalisation in it tells one set of images from another.
        state: How far it has got.
        rows: The records of the epochs that are done.

    Raises:
        RunError: If the file cannot be written, for want of room for example; the older one is then still there.
    """
    _write(
        path,
        _STATE,
        {
            "recipe": recipe.to_dict(),
            "architecture": _described(architecture),
            "progress": {field.name: getattr(state, field.name) for field in dataclasses.fields(TrainingState)},
            "rows": [dict(row) for row in rows],
        },
    )


def load(path: Path, recipe: Recipe, architecture: Architecture) -> tuple[TrainingState, list[dict[str, Any]]]:
    """Read the state of a run that is to go on.

    Args:
        path: `last.pt`.
        recipe: The settings asked for; they must be those that the run began with.
        architecture: The network asked for; likewise.

    Returns:
        How far the run has got, and the records of the epochs that are done.

    Raises:
        InputError: If there is no such run, or it began with another recipe or other images.
    """
    content = _STATE.unpacked(path)
    begun = from_dict(content["recipe"], f"{path}: recipe")
    difference = first_difference(begun, recipe)
    if difference:
        raise InputError(f"{path}: the run began with {difference}; resume it with its own recipe, or start another")
    if content["architecture"] != _described(architecture):
        raise InputError(f"{path}: the run began with other training images; resume it with those")
    return TrainingState(**content["progress"]), content["rows"]


def save_weights(path: Path, epoch: int, weights: dict[str, Tensor]) -> None:
    """Write the weights of an epoch.

    Raises:
        RunError: If the file cannot be written; the older one is then still there.
    """
    _write(path, _WEIGHTS, {"epoch": epoch, "state_dict": weights})


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights of an epoch.

    Raises:
        InputError: If they are missing or damaged.
    """
    weights: dict[str, Tensor] = _WEIGHTS.unpacked(path)["state_dict"]
    return weights
