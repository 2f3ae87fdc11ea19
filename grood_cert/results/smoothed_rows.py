r"""The result of median smoothing: one row a sample in `smoothing.csv`, with a manifest, and what is read off the rows.

Nothing here is a proof about the detector itself. Every certificate is about the *smoothed* detector and holds with
probability at least 1 - alpha over the draws of its row (`grood_cert.certification.smoothing` has the statement), so of N rows up to
alpha N are expected to claim too much, and rates below are certified up to alpha on average. These columns share no
file and no name with those of `grood_cert.results.rows`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grood_cert import metrics
from grood_cert.errors import InputError
from grood_cert.results.rows import KINDS, column_values, grid_column, grid_values, read_files

COLUMNS: dict[str, str] = {
    "set": "name of the image set",
    "kind": "id, ood or noise",
    "index": "position of the image in its test set",
    "label": "class index within the set",
    "score": "S(x) of the network without noise, float64",
    "median_estimate": "estimate, proves nothing: median of the scores drawn; nan if one of them is",
    "draws_below": "scores drawn below gamma; 0 if one is nan",
    "draws_above": "scores drawn above gamma; 0 if one is nan",
    "decision": "of the smoothed detector, at confidence 1 - alpha: accepted, rejected, abstained (neither is certain)",
    "status": "certified (the decision is right), misdecided (it is wrong), abstained",
    "radius_smoothed": "probability 1 - alpha: no l2 perturbation shorter than this changes the decision; 0 if not right",
    "sigma": "standard deviation of the noise, pixel units",
    "n": "scores drawn",
    "alpha": "largest probability, over the draws, that the decision or the radius is false; the same for the bounds",
}
GRID_COLUMNS: dict[str, str] = {
    "s_lb_smoothed": "probability 1 - alpha for all bounds of the row: below the median on the whole ball; -inf if none",
    "s_ub_smoothed": "probability 1 - alpha for all bounds of the row: above the median on the whole ball; inf if none",
}
CALIBRATION_COLUMNS = ("set", "kind", "index", "score", "median_estimate")
DECISIONS = ("accepted", "rejected", "abstained")
STATUSES = ("certified", "abstained", "misdecided")
TPR_PERCENT = 95
_TEXT = ("set", "kind", "decision", "status")
_INTEGERS = ("index", "label", "draws_below", "draws_above", "n")


def header(eps: Sequence[float]) -> list[str]:
    """All columns of a file with this eps grid, in order."""
    return [*COLUMNS, *(grid_column(name, value) for value in eps for name in GRID_COLUMNS)]


@dataclass(frozen=True, eq=False)
class SmoothedRows:
    """Rows in memory, column by column.

    Attributes:
        manifest: What the run was: model, sigma, n, alpha, eps, gamma, gamma_base, calibration, data, versions, ...
        eps: The eps grid, ascending.
        columns: The single columns by name, each of shape (N,).
        grid: The grid columns by name, each of shape (N, len(eps)).
    """

    manifest: Mapping[str, Any]
    eps: tuple[float, ...]
    columns: Mapping[str, NDArray[Any]]
    grid: Mapping[str, NDArray[np.float64]]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns["score"])

    @property
    def gamma(self) -> float:
        """Threshold of the smoothed score."""
        return float(self.manifest["gamma"])

    @property
    def norm(self) -> str:
        """Norm of the balls: always l2."""
        return str(self.manifest["norm"])

    @property
    def complete(self) -> bool:
        """Whether the run is done, so that the rows are all of its samples."""
        return bool(self.manifest["complete"])

    def sets(self, *kinds: str) -> dict[str, NDArray[np.bool_]]:
        """Masks of the sets of some kinds, by name, in the order of the file."""
        chosen = np.isin(self["kind"], kinds)
        names = dict.fromkeys(self["set"][chosen].tolist())
        return {name: np.asarray((self["set"] == name) & chosen) for name in names}


def from_records(records: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> SmoothedRows:
    """Arrange records (as written or as read, values may be text) by column.

    Raises:
        KeyError: If a column is missing.
        ValueError: If a value does not read as a number.
    """
    eps = tuple(float(value) for value in manifest["eps"])
    kinds: dict[str, type] = dict.fromkeys(_TEXT, str) | dict.fromkeys(_INTEGERS, int)
    grid = {name: grid_values(records, name, eps) for name in GRID_COLUMNS}
    return SmoothedRows(manifest, eps, column_values(records, COLUMNS, kinds), grid)


def calibrated_gamma(path: Path) -> float:
    """Threshold of the smoothed score: the conformal quantile of the medians in a `smoothing-calibration.csv`.

    Raises:
        InputError: If a file is missing, or the medians hold no such quantile.
    """
    _, records = read_files(path, "certify")
    return metrics.calibrated_threshold([float(record["median_estimate"]) for record in records], TPR_PERCENT)


def read(path: Path) -> SmoothedRows:
    """Read a `smoothing.csv` and its manifest.

    Raises:
        InputError: If a file is missing, is empty, or is not what smoothing writes.
    """
    try:
        manifest, records = read_files(path, "certify")
        if not records:
            raise InputError(f"{path}: holds no rows; certify at least one sample")
        rows = from_records(records, manifest)
        values = (("kind", KINDS), ("decision", DECISIONS), ("status", STATUSES))
        known = {"gamma", "gamma_base", "norm", "model", "complete"} <= manifest.keys()
        if not known or not all(set(rows[name]) <= set(allowed) for name, allowed in values):
            raise ValueError("values that smoothing does not write")
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not the rows of median smoothing ({reason})") from None
    if not ((rows["radius_smoothed"] >= 0) & (rows["radius_smoothed"] < np.inf)).all():
        raise InputError(f"{path}: holds radii that are not finite numbers of at least 0")
    return rows


DETECTION: dict[str, str] = {  # what `detection` returns, in words
    "kind": "kind",
    "auroc_base": "AUROC, base",
    "auroc_smoothed_estimate": "AUROC, smoothed (estimate)",
    "fpr95_id_base": "fpr95_id, base",
    "fpr95_id_smoothed_estimate": "fpr95_id, smoothed (estimate)",
}


def summary(rows: SmoothedRows) -> list[dict[str, Any]]:
    """One record a set: `set`, `kind`, `samples`, the count of each status, and `radius_smoothed`.

    The radius is the median over the samples that are not misdecided, abstentions with radius 0; None if there are none.
    """
    records = []
    for name, mask in rows.sets(*KINDS).items():
        status = rows["status"][mask]
        radii = rows["radius_smoothed"][mask][status != "misdecided"]
        record = {"set": name, "kind": str(rows["kind"][mask][0]), "samples": int(mask.sum())}
        record |= {value: int((status == value).sum()) for value in STATUSES}
        records.append(record | {"radius_smoothed": float(np.median(radii)) if len(radii) else None})
    return records


def detection(rows: SmoothedRows) -> list[dict[str, Any]]:
    """Clean metrics of the smoothed score beside those of the network it was made from, for each OOD and noise set.

    Returns:
        Records with `set`, `kind`, `auroc_base`, `auroc_smoothed_estimate`, `fpr95_id_base` and
        `fpr95_id_smoothed_estimate`; the smoothed score is the median estimated from the draws.

    Raises:
        InputError: If there are no ID rows, or a score is NaN.
    """
    inside = np.isin(rows["kind"], "id")
    records = []
    for name, mask in rows.sets("ood", "noise").items():
        record: dict[str, Any] = {"set": name, "kind": str(rows["kind"][mask][0])}
        for metric in (metrics.auroc, metrics.fpr95_id):
            for column, label in (("score", "base"), ("median_estimate", "smoothed_estimate")):
                record[f"{metric.__name__}_{label}"] = metric(rows[column][inside], rows[column][mask])
        records.append(record)
    return records


def not_certified(rows: SmoothedRows, mask: NDArray[np.bool_], eps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the samples whose right decision is not certified against perturbations of length eps.

    At the smoothed gamma: for OOD it bounds the worst-case FPR from above, for ID 1 - TPR. Abstentions and wrong
    decisions count as not certified at every eps. Shape (len(eps),); each row errs with probability at most alpha.
    """
    return np.asarray((rows["radius_smoothed"][mask][:, None] <= eps).mean(0))


def fpr95_curve(rows: SmoothedRows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """FPR at 95 % TPR of the smoothed detector as OOD moves: 1 - mean[s_lb_smoothed > gamma'], mean over OOD sets.

    gamma' accepts 95 % of the clean ID medians (estimates). The bounds of a row hold all together, whatever gamma', so
    it may be chosen after the draws.

    Returns:
        eps, from 0, and the certified FPR, both of shape (J,); at 0 it is the clean FPR of the estimated medians.

    Raises:
        InputError: If there are no ID or no OOD rows, or an ID median is NaN.
    """
    sets = rows.sets("ood")
    if not sets:
        raise InputError("the rows hold no OOD set (noise is reported apart); certify at least one")
    gamma = metrics.threshold_at_tpr(rows["median_estimate"][rows["kind"] == "id"], TPR_PERCENT)
    moved = np.array(rows.eps) > 0
    rates = []
    for mask in sets.values():
        lower = np.concatenate([rows["median_estimate"][mask][:, None], rows.grid["s_lb_smoothed"][mask][:, moved]], 1)
        rates.append(1 - (lower > gamma).mean(0))
    return np.append(0.0, np.array(rows.eps)[moved]), np.asarray(np.mean(rates, axis=0))
