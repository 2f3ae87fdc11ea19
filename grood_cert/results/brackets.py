r"""Detection metrics read off tables, for each OOD set and eps: clean, attacked and certified, of the same samples.

*Certifications*: `grood_cert.guarantees` on score, envelope and attack of the rows. *Smoothing*: metrics of the medians,
which are estimates, beside what holds with the probability that the rows state; the two kinds share no column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grood_cert.confidence import bootstrap, clopper_pearson
from grood_cert.errors import InputError
from grood_cert.guarantees import Bracket, Worst, brackets, intervals
from grood_cert.metrics import Ranking
from grood_cert.results.curves import PERTURBED, Perturbed, middle_eps, ood_sets
from grood_cert.results.table import Table


def brackets_of(
    rows: Table, perturbed: Perturbed = "ood", eps: Sequence[float] = (), with_intervals: bool = False
) -> list[dict[str, Any]]:
    r"""Metrics of a certification: one record an OOD set and eps.

    Args:
        rows: A certification.
        perturbed: Which side moves within eps: "ood", "id" or "both".
        eps: Values of the grid; its middle by default.
        with_intervals: Whether to add 95 % intervals (`grood_cert.guarantees.intervals`).

    Returns:
        Records with `set`, `eps`, `samples_id`, `samples_ood` and, of every metric of `guarantees.brackets` (with
        `tpr_at_gamma` and `fpr_at_gamma` at the gamma of the rows), `NAME`, `NAME_attacked` and `NAME_certified`, each
        perhaps with `_low` and `_high`.

    Raises:
        InputError: If `perturbed` is unknown, an eps is not on the grid, or ID or OOD rows are missing.
        SoundnessError: If proof, attack and score contradict one another.
    """
    if perturbed not in PERTURBED:
        raise InputError(f"unknown side {perturbed!r}; perturb one of {', '.join(PERTURBED)}")
    sets, places = ood_sets(rows), _places(rows, eps)
    inside = rows.of_kind("id")
    records = []
    for place in places:
        within = _side(rows, "id", inside, place, perturbed != "ood")
        for name, mask in sets.items():
            without = _side(rows, "ood", mask, place, perturbed != "id")
            record = _head(rows, name, place, mask)
            found = brackets(within, without, gamma=rows.gamma)
            ends = intervals(within, without, gamma=rows.gamma) if with_intervals else {}
            for metric, value in found.items():
                record |= _flat(metric, "", value)
                for suffix, end in zip(("_low", "_high"), ends.get(metric, ()), strict=False):
                    record |= _flat(metric, suffix, end)
            records.append(record)
    return records


def smoothed_metrics(rows: Table, eps: Sequence[float] = (), with_intervals: bool = False) -> list[dict[str, Any]]:
    r"""Metrics of the smoothed detector as OOD moves: one record an OOD set and eps.

    FPR95 certified is 1 - mean[s_lb_smoothed > gamma'], gamma' accepting 95 % of the clean ID medians; GAUC is
    P(median(in) < s_lb_smoothed(out)). Medians are estimates, and each bound holds with probability 1 - alpha.

    Args:
        rows: A smoothing.
        eps: Values of the grid; its middle by default.
        with_intervals: Whether to add 95 % intervals over the sampling of images, as of `brackets_of`.

    Returns:
        Records with `set`, `eps`, `samples_id`, `samples_ood`, `sigma`, `n`, `alpha`, `auroc_estimate`,
        `auroc_smoothed`, `fpr95_id_estimate` and `fpr95_id_smoothed`.

    Raises:
        InputError: If an eps is not on the grid, ID or OOD rows are missing, or a median is NaN.
    """
    sets, places = ood_sets(rows), _places(rows, eps)
    medians = rows["median_estimate"]
    inside = medians[rows.of_kind("id")]

    def areas(drawn_id: Any, drawn_ood: Any) -> Mapping[str, float]:
        return {
            "auroc_estimate": Ranking.of(drawn_id, drawn_ood[:, 0]).auroc,
            "auroc_smoothed": Ranking.of(drawn_id, drawn_ood[:, 1]).auroc_strict,
        }

    records = []
    for place in places:
        for name, mask in sets.items():
            lower = rows.grid["s_lb_smoothed"][mask, place]
            outside = np.stack([medians[mask], np.where(np.isfinite(lower), lower, -np.inf)], axis=1)
            shares = {
                "fpr95_id_estimate": Ranking.of(inside, outside[:, 0]).fpr(),
                "fpr95_id_smoothed": Ranking.of(inside, outside[:, 1]).fpr(),
            }
            record = _head(rows, name, place, mask)
            record |= {"sigma": float(rows["sigma"][0]), "n": int(rows["n"][0]), "alpha": float(rows["alpha"].max())}
            record |= {**areas(inside, outside), **shares}
            if with_intervals:
                ends = bootstrap(areas, inside, outside)
                ends |= {
                    key: clopper_pearson(round(share * len(outside)), len(outside)) for key, share in shares.items()
                }
                for key, pair in ends.items():
                    record |= {f"{key}_low": float(pair[0]), f"{key}_high": float(pair[1])}
            records.append(record)
    return records


def _places(rows: Table, eps: Sequence[float]) -> list[int]:
    """Where those eps are on the grid."""
    wanted = list(dict.fromkeys(eps)) or [middle_eps(rows)]
    for value in wanted:
        if value not in rows.eps:
            raise InputError(
                f"eps {value:g} is not on the grid of the rows; use one of {', '.join(map(repr, rows.eps))}"
            )
    return [rows.eps.index(value) for value in wanted]


def _head(rows: Table, name: str, place: int, mask: Any) -> dict[str, Any]:
    sizes = {"samples_id": int(rows.of_kind("id").sum()), "samples_ood": int(mask.sum())}
    return {"set": name, "eps": rows.eps[place], **sizes}


def _side(rows: Table, kind: Any, mask: Any, place: int, moved: bool) -> Worst:
    score = rows["score"][mask]
    if not moved:
        return Worst.still(kind, score)
    bound, seen = ("s_ub", "s_attack_max") if kind == "id" else ("s_lb", "s_attack_min")
    return Worst.within(kind, score, rows.grid[bound][mask, place], rows.grid[seen][mask, place])


def _flat(metric: str, suffix: str, value: Bracket) -> dict[str, float]:
    return {
        f"{metric}{suffix}": value.clean,
        f"{metric}_attacked{suffix}": value.attacked,
        f"{metric}_certified{suffix}": value.certified,
    }
