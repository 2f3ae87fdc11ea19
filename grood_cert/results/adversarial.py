"""The points that attacks found, as `certify --save-adversarial` keeps them beside the rows, with the images they are of.

A folder `adversarial/` holds one NumPy archive a batch: `set`, and for each sample its `index`, its image (`images`), the
nearest point found with the other decision (`points`; the image itself where none was found) and `radius_attack`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grood_cert.errors import InputError, said
from grood_cert.results.table import Table

_ROUNDING = 1e-6  # of a distance computed again, in another order


@dataclass(frozen=True, eq=False)
class Twin:
    """A sample and the nearest counterexample found to its decision.

    Attributes:
        set: Name of its image set.
        index: Its position there.
        image: x, shape (C, H, W), pixels in [0, 1].
        twin: x', of the same shape: S(x') lies on the other side of gamma.
        score: S(x).
        radius_certified: No decision changes within.
        radius_attack: Distance of x' from x.
    """

    set: str
    index: int
    image: NDArray[np.float64]
    twin: NDArray[np.float64]
    score: float
    radius_certified: float
    radius_attack: float


def extreme_rows(rows: Table, mask: NDArray[np.bool_], samples: int) -> tuple[list[int], list[int]]:
    """The least and the most robust samples among those that are right at x and were attacked: numbers of their rows.

    Least robust: the smallest attack radii. Most robust: the largest certified radii. No sample is both.
    """
    known = np.flatnonzero(mask & (rows["status"] != "misdecided") & np.isfinite(rows["radius_attack"]))
    least = known[np.argsort(rows["radius_attack"][known], kind="stable")][: min(samples, (len(known) + 1) // 2)]
    rest = np.setdiff1d(known, least)
    most = rest[np.argsort(-rows["radius_certified"][rest], kind="stable")][:samples]
    return least.tolist(), most.tolist()


def read_twins(folder: Path, rows: Table, chosen: Iterable[int]) -> dict[int, Twin]:
    """Samples with their counterexamples, by the number of the row.

    Args:
        folder: `adversarial/` of the run.
        rows: Its rows.
        chosen: Numbers of rows.

    Raises:
        InputError: If the folder or a sample is missing, or a file is not of these rows.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; write it with: grood-cert certify MODEL --save-adversarial")
    wanted = {(str(rows["set"][row]), int(rows["index"][row])): row for row in chosen}
    found: dict[int, Twin] = {}
    for path in sorted(folder.glob("*.npz")):
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                name, indices = str(archive["set"]), archive["index"].tolist()
                if not any((name, index) in wanted for index in indices):
                    continue
                images, points = archive["images"].astype(np.float64), archive["points"].astype(np.float64)
            for place, index in enumerate(indices):
                row = wanted.get((name, index))
                if row is not None:
                    found[row] = _twin(rows, row, images[place], points[place])
        except KeyError as error:
            raise InputError(f"{path} lacks {said(error)}; certify again with --save-adversarial --force") from None
        except (OSError, ValueError, TypeError, IndexError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: not the points of these rows ({said(error)[:120]})") from None
    for (name, index), row in wanted.items():
        if row not in found:
            raise InputError(
                f"{folder} lacks sample {index} of {name}; it belongs to another run, or a part is missing"
            )
    return found


def _twin(rows: Table, row: int, image: NDArray[Any], twin: NDArray[Any]) -> Twin:
    """A sample, once its points are known to be those of the row."""
    if image.ndim != 3 or image.shape != twin.shape or not bool(np.isfinite(twin - image).all()):
        raise ValueError(f"images of shape {image.shape}, points of shape {twin.shape}")
    order = {"linf": np.inf, "l2": 2, "l1": 1}[rows.norm]
    distance, expected = float(np.linalg.norm((twin - image).ravel(), order)), float(rows["radius_attack"][row])
    if not abs(distance - expected) <= _ROUNDING * max(expected, 1.0):
        raise ValueError(f"a point lies {distance:.6g} from its image, the rows say {expected:.6g}")
    return Twin(
        str(rows["set"][row]),
        int(rows["index"][row]),
        image,
        twin,
        float(rows["score"][row]),
        float(rows["radius_certified"][row]),
        expected,
    )
