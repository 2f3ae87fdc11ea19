"""Results made up for tests."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from grood_cert.results.columns import SCHEMAS, grid_column
from grood_cert.results.table import Table

EPS = (0.1, 0.2)


def sample(kind, name, score, bounds, radius=0.0, attack=math.inf, status="certified"):
    """One record; bounds = [(s_lb, s_ub, s_attack_min, s_attack_max) for each eps]."""
    record = {
        "set": name,
        "kind": kind,
        "index": 0,
        "file": "",
        "label": 0,
        "prediction": 0,
        "accepted": 0,
        "status": status,
    }
    record |= {"score": score, "radius_certified": radius, "radius_certified_per_logit": radius / 2}
    record |= {"radius_lipschitz_fixed_point": math.nan, "radius_lipschitz_path": math.nan}
    record |= {"radius_attack": attack, "radius_gradient_norm_estimate": 1.0, "gradient_norm_estimate": 1.0}
    record["stage"] = "crown"
    for eps, values in zip(EPS, bounds, strict=True):
        record[grid_column("outcome", eps)] = "crown"
        record |= {
            grid_column(name, eps): value
            for name, value in zip(("s_lb", "s_ub", "s_attack_min", "s_attack_max"), values, strict=True)
        }
    return record


def certification(records, **manifest):
    given = {"kind": "certification", "schema": 1, "norm": "linf", "gamma": 0.0, "model": {"name": "m"}}
    return Table.of(records, given | {"method": "crown", "eps": list(EPS)} | manifest)


def random_certification(
    seed, share_nan=0.0, samples=40, kinds=(("id", "in"), ("ood", "a"), ("ood", "b"), ("noise", "n"))
):
    generator = np.random.default_rng(seed)
    records = []
    for kind, name in kinds:
        for _ in range(samples):
            score = float(np.round(generator.normal(-2 if kind == "id" else 1, 1.5), 1))
            steps = np.cumsum(generator.random((2, 4)) * [1, 1, 0.5, 0.5], axis=0)
            bounds = [(score - a - c, score + b + d, score - c, score + d) for a, b, c, d in steps]
            if generator.random() < share_nan:
                bounds[1] = (math.nan, math.nan, *bounds[1][2:])
            records.append(as_written(sample(kind, name, score, bounds), generator) | {"index": len(records)})
    return certification(records)


def as_written(record, generator):
    """The record with random radii, and with all that follows from them, from gamma = 0 and from its bounds."""
    inside, score = record["kind"] == "id", record["score"]
    right = (score <= 0) == inside
    bound, seen = ("s_ub", "s_attack_max") if inside else ("s_lb", "s_attack_min")
    proved = [e for e in EPS if (record[f"{bound}@{e}"] < 0 if inside else record[f"{bound}@{e}"] > 0)]
    broken = [e for e in EPS if (record[f"{seen}@{e}"] > 0 if inside else record[f"{seen}@{e}"] <= 0)]
    least, most = max(proved, default=0.0), min(broken, default=1.0)
    radius = max(least, float(generator.random() * (generator.random() < 0.9) * most))
    attack = min(broken, default=float(radius + (1 - radius) * generator.random()))
    radius, attack = (radius, attack) if right else (0.0, 0.0)
    record |= {"accepted": int(score <= 0), "radius_certified": radius, "radius_attack": attack}
    record |= {"radius_certified_per_logit": radius / 2}
    record["radius_gradient_norm_estimate"] = abs(score) * right
    record["status"] = "misdecided" if not right else "certified" if radius else "undecided"
    record["stage"] = "misdecision" if not right else "crown" if radius else "undecided"
    for eps in EPS:
        found = "crown" if 0 < eps <= radius else "attack" if eps >= attack else "undecided"
        record[grid_column("outcome", eps)] = found if right else "misdecision"
    return record


def smoothing(records, **manifest):
    """Rows of smoothing from (kind, set, score, median, decision, status, radius, lower bounds for each eps)."""
    given = {"kind": "smoothing", "schema": 1, "norm": "l2", "gamma": 0.0, "gamma_base": 0.0, "model": {"name": "m"}}
    names = ("kind", "set", "score", "median_estimate", "decision", "status", "radius_smoothed")
    rows = []
    for *values, lower in records:
        row = {"index": len(rows), "file": "", "label": 0, "draws_below": 9, "draws_above": 1} | dict(
            zip(names, values, strict=True)
        )
        row |= {"sigma": 0.1, "n": 10, "alpha": 0.01}
        for eps, bound in zip(EPS, lower, strict=True):
            row |= {grid_column("s_lb_smoothed", eps): bound, grid_column("s_ub_smoothed", eps): math.inf}
        rows.append(row)
    return Table.of(rows, given | {"eps": list(EPS)} | manifest)


def slopes(records, **manifest):
    """Rows of a Lipschitz analysis from (kind, eps, gradient norm, ascended estimate, bound)."""
    given = {"kind": "lipschitz", "schema": 1, "norm": "linf", "model": {"name": "m"}, "eps": list(EPS)}
    rows = []
    for kind, eps, gradient, ascended, bound in records:
        row = dict.fromkeys(SCHEMAS["lipschitz"].columns, math.nan) | {"set": kind, "kind": kind, "index": len(rows)}
        row |= {"file": "", "eps": eps, "gradient_norm_estimate": gradient, "ascended_estimate": ascended}
        rows.append(row | {"bound": bound, "bound_interval": bound, "provenance": "interval"})
    return Table.of(rows, given | manifest)


def changed(table, row, manifest=None, **cells):
    """The table with other cells in a row; a grid column takes one value for each eps, None for what it was."""
    columns = {name: values.copy() for name, values in table.columns.items()}
    grid = {name: values.copy() for name, values in table.grid.items()}
    for name, value in cells.items():
        if name in columns:
            columns[name] = columns[name].astype(object)
            columns[name][row] = value
            columns[name] = columns[name].astype(table.columns[name].dtype if not isinstance(value, str) else str)
        else:
            for place, part in enumerate(value):
                if part is not None:
                    grid[name] = grid[name].astype("U20") if isinstance(part, str) else grid[name]
                    grid[name][row, place] = part
    return replace(table, manifest={**table.manifest, **(manifest or {})}, columns=columns, grid=grid)
