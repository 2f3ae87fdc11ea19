r"""What holds between the columns of every result that grood-cert writes, and between its rows and its manifest.

*Certifications*, with right = (S(x) <= gamma) for ID and S(x) > gamma otherwise: `accepted`, `status` and `stage` say what
score, gamma and `radius_certified` say; every proved radius is at most `radius_certified`, and that at most `radius_attack`;
the gradient-norm radius is |S(x) - gamma| over the gradient norm; proofs are by stages of the manifest;

    S_lb(eps) <= S(x) <= S_ub(eps),        S_lb(eps) <= s_attack_min(eps),        s_attack_max(eps) <= S_ub(eps);

S_lb and s_attack_min never rise with eps, S_ub and s_attack_max never fall; the outcome of a ball is a proof exactly up to
`radius_certified`, and an attack exactly from `radius_attack` on; what decides a ball, bound or attack, counts in the radii.

*Smoothing*: counts of draws and decisions go together, only right decisions have a radius, bounds are in order; sigma, n and
alpha are the manifest's.

*Lipschitz analyses*: no estimate from below exceeds the bound, no bound of a method lies below it; it never falls with eps;
`provenance` names the method with the smallest bound at its eps.

Of all: no sample occurs twice, every image set is one that the manifest names, of its kind and with so many images; there are
as many samples as the manifest says are done, and of a complete run all are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grood_cert.certification.outcomes import STAGES, Outcome
from grood_cert.results.columns import LIPSCHITZ_METHODS, LOOKED_UP, SCHEMAS, Column, grid_column

if TYPE_CHECKING:
    from grood_cert.results.table import Table

_PROOFS = (*STAGES, LOOKED_UP)
_ENGINES = ("native", "auto_lirpa")
_NORMS = ("linf", "l2", "l1")
_SLACK = 1e-9  # relative: what rounding may do between a score and one computed in another batch
_Mask = NDArray[np.bool_]


def check_invariants(table: Table) -> None:
    """Make sure that a result is one that grood-cert can have written.

    Raises:
        ValueError: Naming line and column of the first row that it cannot have written, or the entry of the manifest.
    """
    _check_manifest(table)
    _check_names(table)
    if table.kind in _CHECKS:
        _CHECKS[table.kind](table)


def check_columns(table: Table) -> None:
    """Make sure that every column holds what such a column may hold, see `Column`.

    Raises:
        ValueError: Naming line and column of the first value that it may not hold.
    """
    schema = SCHEMAS[table.kind]
    for columns, values in ((schema.columns, table.columns), (schema.grid, table.grid)):
        for name, column in columns.items():
            _check_column(table, name, column, values[name])


def _check_column(table: Table, name: str, column: Column, values: NDArray[Any]) -> None:
    if column.allowed:
        _refuse(table, ~np.isin(values, column.allowed), name, f"is none of {', '.join(column.allowed)}")
    if column.finite:
        _refuse(table, ~np.isfinite(values), name, "is not finite")
    if column.never_infinite:
        _refuse(table, np.isinf(values), name, "is infinite")
    if column.least is not None:
        _refuse(table, ~(values >= column.least), name, f"is no number of at least {column.least:g}")


def line(row: int) -> str:
    """How messages call a row, by its line in the file, below the header.

    Example:
        >>> line(0)
        'line 2'
    """
    return f"line {row + 2}"


def _refuse(table: Table, wrong: _Mask, column: str, words: str) -> None:
    """Refuse rows, or rows at some eps; `column` may be a single column or one of the grid."""
    for row, *place in np.argwhere(wrong)[:1].tolist():
        name = grid_column(column, table.eps[place[0]]) if place else column
        value = (table.grid if place else table.columns)[column][row, *place]
        raise ValueError(f"{line(row)}, {name}: {value} {words}")


def _check_manifest(table: Table) -> None:
    eps = table.eps
    if not all(math.isfinite(value) and value >= 0 for value in eps) or list(eps) != sorted(set(eps)):
        raise ValueError(f"its manifest's eps {list(eps)} are not ascending numbers of at least 0")
    norms = ("l2",) if table.kind.startswith("smoothing") else _NORMS
    if table.norm not in norms:
        raise ValueError(f"its manifest's norm is {table.norm!r}, not {' or '.join(norms)}")
    engine = table.manifest.get("bounded_by", _ENGINES[0])
    if engine not in _ENGINES:
        raise ValueError(f"its manifest's bounded_by is {engine!r}, not {' or '.join(_ENGINES)}")
    for name in ("gamma", "gamma_base"):
        value: Any = table.manifest.get(name)
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"its manifest's {name} is {value!r}, not a finite number")


def _check_names(table: Table) -> None:
    index = table["index"]
    _refuse(table, index < 0, "index", "is no position of an image")
    key = np.stack([_numbered(table[name]) for name in ("kind", "set", "index")], axis=1)
    _check_progress(table, len(np.unique(key, axis=0)))
    if "eps" in table.columns:
        key = np.concatenate([key, _numbered(table["eps"])[:, None]], axis=1)
    first = np.unique(key, axis=0, return_index=True)[1]
    again = np.ones(len(table), bool)
    again[first] = False
    _refuse(table, again, "index", "occurs for the second time in its set")
    data = table.manifest.get("data")
    if not isinstance(data, list) or not data:
        return
    images = {(entry["set"], entry["kind"]): int(entry["images"]) for entry in data}
    for (name, kind), mask in _groups(table).items():
        if (name, kind) not in images:
            _refuse(table, mask, "set", f"of kind {kind} is none of the manifest's image sets")
        _refuse(table, mask & (index >= images[name, kind]), "index", f"is beyond the {images[name, kind]} images")


def _check_progress(table: Table, samples: int) -> None:
    """What the manifest says of how far the run has come, where it says so, is what there is."""
    manifest = table.manifest
    if (done := manifest.get("samples_done", samples)) != samples:
        raise ValueError(f"its manifest's samples_done is {done}, but there are {samples}")
    for part, whole in (("samples_done", "of_samples"), ("batches", "of_batches")):
        if table.complete and manifest.get(part) != manifest.get(whole):
            raise ValueError(
                f"its manifest is of a complete run, but speaks of {manifest.get(part)} of {manifest.get(whole)} {part.removesuffix('_done')}"
            )


def _numbered(values: NDArray[Any]) -> NDArray[np.int64]:
    return np.asarray(np.unique(values, return_inverse=True)[1])


def _groups(table: Table) -> dict[tuple[str, str], _Mask]:
    pairs = dict.fromkeys(zip(table["set"].tolist(), table["kind"].tolist(), strict=True))
    return {(name, kind): (table["set"] == name) & (table["kind"] == kind) for name, kind in pairs}


def _check_certification(table: Table) -> None:
    score, radius, attack = table["score"], table["radius_certified"], table["radius_attack"]
    accepted = score <= table.gamma
    right = accepted == table.of_kind("id")
    proved = right & (radius > 0)
    against = f"does not follow from the score and gamma {table.gamma:.6g}"
    _refuse(table, table["accepted"] != accepted, "accepted", against)
    _refuse(table, ~right & (radius != 0), "radius_certified", "certifies a wrong decision")
    status = np.where(~right, "misdecided", np.where(proved, "certified", "undecided"))
    _refuse(table, table["status"] != status, "status", "does not follow from score, gamma and radius_certified")
    stage, proofs = table["stage"], np.isin(table["stage"], _PROOFS)
    fits = np.where(~right, stage == Outcome.MISDECISION.word, np.where(proved, proofs, stage == "undecided"))
    _refuse(table, ~fits, "stage", "does not follow from score, gamma and radius_certified")
    for name in table.columns:
        if name.startswith("radius_") and name not in ("radius_attack", "radius_gradient_norm_estimate"):
            _refuse(table, table[name] < 0, name, "is negative")
            _refuse(table, table[name] > attack, name, "exceeds the attack radius")
            _refuse(table, table[name] > radius, name, "exceeds radius_certified, which counts all proofs")
    _check_envelopes(table)
    _check_outcomes(table, right)
    _check_stages(table)
    _check_estimate(table, right)


def _check_estimate(table: Table, right: _Mask) -> None:
    name, found = "radius_gradient_norm_estimate", table["radius_gradient_norm_estimate"]
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where(right, np.abs(table["score"] - table.gamma) / table["gradient_norm_estimate"], 0.0)
        fits = (np.abs(found - expected) <= _SLACK * (1 + np.abs(expected))) | (found == expected)
    fits |= np.isnan(found) & np.isnan(expected)
    _refuse(table, ~fits, name, "does not follow from score, gamma and gradient_norm_estimate")


def _check_stages(table: Table) -> None:
    stages = table.manifest.get("stages")
    if isinstance(stages, list):
        for name, values in (("stage", table["stage"]), ("outcome", table.grid["outcome"])):
            _refuse(table, np.isin(values, STAGES) & ~np.isin(values, stages), name, "is none of the manifest's stages")


def _check_envelopes(table: Table) -> None:
    score, grid = table["score"][:, None], table.grid
    near = _SLACK * (1 + np.abs(score))
    _refuse(table, grid["s_lb"] > score, "s_lb", "exceeds the score")
    _refuse(table, grid["s_ub"] < score, "s_ub", "lies below the score")
    _refuse(table, grid["s_attack_min"] > score + near, "s_attack_min", "exceeds the score")
    _refuse(table, grid["s_attack_max"] < score - near, "s_attack_max", "lies below the score")
    _refuse(table, grid["s_lb"] > grid["s_attack_min"], "s_lb", "exceeds what an attack reached")
    _refuse(table, grid["s_ub"] < grid["s_attack_max"], "s_ub", "lies below what an attack reached")
    _check_order(table, "s_lb", -1, 0 * near)
    _check_order(table, "s_ub", 1, 0 * near)
    _check_order(table, "s_attack_min", -1, near)
    _check_order(table, "s_attack_max", 1, near)


def _check_order(table: Table, name: str, sign: int, near: NDArray[np.float64]) -> None:
    """A column of the grid moves one way as eps grows, NaN left out."""
    values = sign * table.grid[name]
    largest = np.fmax.accumulate(np.where(np.isnan(values), -np.inf, values), axis=1)
    words = "lies below the one of a smaller eps" if sign > 0 else "exceeds the one of a smaller eps"
    _refuse(table, values < largest - near, name, words)


def _check_outcomes(table: Table, right: _Mask) -> None:
    inside, gamma, outcome = table.of_kind("id")[:, None], table.gamma, table.grid["outcome"]
    eps = np.broadcast_to(np.array(table.eps), outcome.shape)
    radius, attack = table["radius_certified"][:, None], table["radius_attack"][:, None]
    known = right[:, None]
    certified = known & (radius > 0) & (eps <= radius)
    attacked = known & (eps >= attack)
    _refuse(table, np.isin(outcome, _PROOFS) != certified, "outcome", "does not follow from radius_certified")
    _refuse(table, (outcome == "attack") != attacked, "outcome", "does not follow from radius_attack")
    _refuse(table, (outcome == Outcome.MISDECISION.word) == known, "outcome", "does not follow from score and gamma")
    for name, decides in (
        ("s_ub", inside & (table.grid["s_ub"] < gamma)),
        ("s_lb", ~inside & (table.grid["s_lb"] > gamma)),
    ):
        _refuse(table, known & decides & (eps > radius), name, "decides a ball beyond radius_certified")
    beyond = known & (attack > eps * (1 + _SLACK))
    _refuse(
        table,
        beyond & inside & (table.grid["s_attack_max"] > gamma),
        "s_attack_max",
        "breaks a ball within radius_attack",
    )
    _refuse(
        table,
        beyond & ~inside & (table.grid["s_attack_min"] <= gamma),
        "s_attack_min",
        "breaks a ball within radius_attack",
    )


def _check_smoothing(table: Table) -> None:
    n, below, above = table["n"], table["draws_below"], table["draws_above"]
    _refuse(table, n < 1, "n", "is no number of draws")
    _refuse(table, (below < 0) | (below > n), "draws_below", "is no count of the draws")
    _refuse(table, (above < 0) | (above > n - below), "draws_above", "is no count of the draws")
    _refuse(table, ~((table["alpha"] > 0) & (table["alpha"] < 1)), "alpha", "is no probability")
    _refuse(table, ~(table["sigma"] > 0), "sigma", "is no standard deviation")
    for name in ("sigma", "n", "alpha"):
        _refuse(table, table[name] != table.manifest.get(name, table[name]), name, "is not the manifest's")
    inside, decision, status = table.of_kind("id"), table["decision"], table["status"]
    _refuse(table, (decision == "accepted") & (2 * below < n), "decision", "contradicts the draws")
    _refuse(table, (decision == "rejected") & (2 * above < n), "decision", "contradicts the draws")
    right = decision == np.where(inside, "accepted", "rejected")
    expected = np.where(decision == "abstained", "abstained", np.where(right, "certified", "misdecided"))
    _refuse(table, status != expected, "status", "does not follow from the decision")
    _refuse(
        table,
        (table["radius_smoothed"] > 0) & (status != "certified"),
        "radius_smoothed",
        "certifies what is not right",
    )
    lower, upper = table.grid["s_lb_smoothed"], table.grid["s_ub_smoothed"]
    _refuse(table, lower > upper, "s_lb_smoothed", "exceeds the upper bound")
    _check_order(table, "s_lb_smoothed", -1, np.zeros((len(table), 1)))
    _check_order(table, "s_ub_smoothed", 1, np.zeros((len(table), 1)))


def _check_lipschitz(table: Table) -> None:
    bound, near = table["bound"], _SLACK * (1 + np.abs(np.nan_to_num(table["bound"], posinf=0.0)))
    _refuse(table, ~(bound >= 0), "bound", "is no constant")
    for name in ("gradient_norm_estimate", "sampled_estimate", "ascended_estimate", "secant_estimate"):
        _refuse(table, table[name] > bound + near, name, "exceeds the proved bound")
    for method in LIPSCHITZ_METHODS:
        name = f"bound_{method.replace('-', '_')}"
        _refuse(table, table[name] < bound - near, name, "lies below the smallest of all bounds")
    _refuse(table, ~np.isin(table["eps"], table.eps), "eps", "is not on the manifest's grid")
    bounds = np.stack([table[f"bound_{method.replace('-', '_')}"] for method in LIPSCHITZ_METHODS], axis=1)
    bounds = np.where(np.isfinite(bounds), bounds, np.inf)
    named = np.where(table["provenance"][:, None] == np.array(LIPSCHITZ_METHODS), bounds, np.inf).min(1)
    least = bounds.min(1)
    fits = np.where(np.isinf(least), table["provenance"] == "none", named <= least + _SLACK * (1 + least))
    _refuse(table, ~fits, "provenance", "is not the method with the smallest bound")
    order = np.lexsort([table["eps"], table["index"], table["set"], table["kind"]])
    same = np.ones(len(table) - 1, bool)
    for name in ("kind", "set", "index"):
        same &= table[name][order][1:] == table[name][order][:-1]
    falls = np.zeros(len(table), bool)
    falls[order[1:]] = same & (bound[order][1:] < (bound - near)[order][:-1])
    _refuse(table, falls, "bound", "lies below the one of a smaller eps")


_CHECKS: dict[str, Callable[[Table], None]] = {
    "certification": _check_certification,
    "smoothing": _check_smoothing,
    "lipschitz": _check_lipschitz,
}
