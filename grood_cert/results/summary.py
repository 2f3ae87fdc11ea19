"""What commands print about a result: one record a set, or a kind and eps, with medians and counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from grood_cert import metrics
from grood_cert.results.columns import KINDS, LOOKED_UP, OUTCOMES, SCHEMAS
from grood_cert.results.table import Table
from grood_cert.results.thresholds import calibrated_gamma

RADII: dict[str, str] = {  # what `radius_summary` takes medians of, in words
    "radius_gradient_norm_estimate": "gradient-norm estimate",
    "radius_certified_per_logit": "certified, per logit",
    "radius_certified": "certified",
    "radius_lipschitz_fixed_point": "Lipschitz, fixed point",
    "radius_lipschitz_path": "Lipschitz, path integral",
    "radius_attack": "attack",
    "certified_to_attack_per_logit": "ratio per logit / attack",
    "certified_to_attack": "ratio certified / attack",
}
DETECTION: dict[str, str] = {  # what `detection` returns, in words
    "kind": "kind",
    "auroc_base": "AUROC, base",
    "auroc_smoothed_estimate": "AUROC, smoothed (estimate)",
    "fpr95_id_base": "fpr95_id, base",
    "fpr95_id_smoothed_estimate": "fpr95_id, smoothed (estimate)",
}
SLOPES: dict[str, str] = {  # what `lipschitz_summary` takes medians of, in words
    "samples": "samples",
    "gradient_norm_estimate": "gradient norm at x (estimate)",
    "sampled_estimate": "sampled maximum (estimate)",
    "ascended_estimate": "ascended maximum (estimate)",
    "clever_estimate": "CLEVER (estimate)",
    "bound": "best bound (proved)",
    "bound_jacobian_crown": "Jacobian-CROWN (proved)",
    "bound_interval": "intervals (proved)",
    "bound_hull": "softmax hull (proved)",
    "bound_product_active": "product, active neurons (proved)",
    "bound_product": "product of norms (proved)",
    "tightness": "best bound / ascended maximum",
}


def radius_summary(rows: Table) -> list[dict[str, Any]]:
    """One record a set: how many samples were decided how, and medians over those that are right at x.

    Returns:
        Records with `set`, `kind`, `samples`, `certified`, `undecided`, `misdecided`, the medians of the radii,
        `certified_to_attack` (median ratio of certified and attack radius; an unfound attack counts with ratio 0) and
        `certified_to_attack_per_logit`. Medians of no sample are None.
    """
    records = []
    for kind in KINDS:
        for name, mask in rows.sets(kind).items():
            status = rows["status"][mask]
            right = mask & (rows["status"] != "misdecided")
            record: dict[str, Any] = {"set": name, "kind": kind, "samples": int(mask.sum())}
            record |= {value: int((status == value).sum()) for value in ("certified", "undecided", "misdecided")}
            for column in (name for name in RADII if name.startswith("radius")):
                radii = rows[column][right & ~np.isnan(rows[column])]
                record[column] = float(np.median(radii)) if len(radii) else None
            for label, column in (
                ("certified_to_attack", "radius_certified"),
                ("certified_to_attack_per_logit", "radius_certified_per_logit"),
            ):
                known = right & ~np.isnan(rows[column])
                ratio = rows[column][known] / rows["radius_attack"][known]
                record[label] = float(np.median(ratio)) if len(ratio) else None
            records.append(record)
    return records


def balls_decided(rows: Table) -> list[dict[str, Any]]:
    """What became of the balls of the grid: one record a set, counts by the values of the column `outcome`."""
    outcomes = rows.grid["outcome"]
    names = [name for name in (*OUTCOMES, LOOKED_UP) if (outcomes == name).any()]
    return [
        {"set": name, "kind": kind, **{outcome: int((outcomes[mask] == outcome).sum()) for outcome in names}}
        for kind in KINDS
        for name, mask in rows.sets(kind).items()
    ]


def smoothing_summary(rows: Table) -> list[dict[str, Any]]:
    """One record a set: `set`, `kind`, `samples`, the count of each status, and `radius_smoothed`.

    The radius is the median over the samples that are not misdecided, abstentions with radius 0; None if there are none.
    """
    records = []
    for name, mask in rows.sets(*KINDS).items():
        status = rows["status"][mask]
        radii = rows["radius_smoothed"][mask][status != "misdecided"]
        record = {"set": name, "kind": str(rows["kind"][mask][0]), "samples": int(mask.sum())}
        record |= {value: int((status == value).sum()) for value in SCHEMAS["smoothing"].columns["status"].allowed}
        records.append(record | {"radius_smoothed": float(np.median(radii)) if len(radii) else None})
    return records


def detection(rows: Table) -> list[dict[str, Any]]:
    """Clean metrics of the smoothed score beside those of the network it was made from, for each OOD and noise set.

    Returns:
        Records with `set`, `kind`, `auroc_base`, `auroc_smoothed_estimate`, `fpr95_id_base` and
        `fpr95_id_smoothed_estimate`; the smoothed score is the median estimated from the draws.

    Raises:
        InputError: If there are no ID rows, or a score is NaN.
    """
    inside = rows.of_kind("id")
    records = []
    for name, mask in rows.sets("ood", "noise").items():
        record: dict[str, Any] = {"set": name, "kind": str(rows["kind"][mask][0])}
        for metric in (metrics.auroc, metrics.fpr95_id):
            for column, label in (("score", "base"), ("median_estimate", "smoothed_estimate")):
                record[f"{metric.__name__}_{label}"] = metric(rows[column][inside], rows[column][mask])
        records.append(record)
    return records


def calibration_summary(medians: Table) -> list[dict[str, Any]]:
    """One record a calibration set: `set`, `kind`, `samples`, and the `gamma` that comes of its medians.

    Raises:
        InputError: If a median is NaN, or there are too few.
    """
    gamma = calibrated_gamma(medians)
    return [
        {"set": name, "kind": "id", "samples": int(mask.sum()), "gamma": gamma}
        for name, mask in medians.sets("id").items()
    ]


def lipschitz_summary(rows: Table) -> list[dict[str, Any]]:
    """Medians over the samples of each kind: one record a kind and eps, with `kind`, `eps` and the keys of `SLOPES`."""
    records = []
    for kind in dict.fromkeys(rows["kind"].tolist()):
        for eps in dict.fromkeys(rows["eps"][rows.of_kind(kind)].tolist()):
            mask = rows.of_kind(kind) & (rows["eps"] == eps)
            record: dict[str, Any] = {"kind": kind, "eps": eps, "samples": int(mask.sum())}
            record |= {name: float(np.median(rows[name][mask])) for name in SLOPES if name in rows.columns}
            bound, found = rows["bound"][mask], rows["ascended_estimate"][mask]
            moved = found > 0
            record["tightness"] = float(np.median(bound[moved] / found[moved])) if moved.any() else None
            records.append(record)
    return records


SUMMARIES: dict[str, Callable[[Table], list[dict[str, Any]]]] = {
    "certification": radius_summary,
    "smoothing": smoothing_summary,
    "smoothing-calibration": calibration_summary,
    "lipschitz": lipschitz_summary,
}
