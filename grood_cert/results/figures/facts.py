"""What a figure says of the runs it is made from, and which runs may share a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from grood_cert.confidence import clopper_pearson
from grood_cert.errors import InputError
from grood_cert.results.columns import NORMS
from grood_cert.results.figures.style import WIDTHS, Width, small_type, wrapped
from grood_cert.results.seeds import Groups, Runs, each_of, groups_of
from grood_cert.results.table import Table

MIXED = "different grids or samples are drawn together"


def common_norm(tables: Mapping[str, Table]) -> str:
    """The norm that all tables share.

    Raises:
        InputError: If they differ, or there is none.
    """
    norms = {table.norm for table in tables.values()}
    if not norms:
        raise InputError("no rows given; write some with: grood-cert certify MODEL --out FOLDER")
    if len(norms) > 1:
        raise InputError(
            f"the rows were made in different norms ({', '.join(NORMS[norm] for norm in sorted(norms))}); draw one norm at a time"
        )
    return norms.pop()


def _samples(table: Table) -> Any:
    hashes = {(entry.get("set"), entry.get("kind")): entry.get("sha256") for entry in table.manifest.get("data", ())}
    drawn = table.of_kind("id") | table.of_kind("ood")
    names = zip(*(table[name][drawn].tolist() for name in ("set", "kind", "index")), strict=True)
    return frozenset((*name, hashes.get(name[:2])) for name in names)


def _counts(table: Table) -> str:
    groups = []
    for kind in ("id", "ood"):
        sets = [f"{len(set(table['index'][mask].tolist()))} {name}" for name, mask in table.sets(kind).items()]
        groups += [f"{', '.join(sets)} ({kind.upper()})"] if sets else []
    return ", ".join(groups)


def is_mixed(tables: Mapping[str, Table], mixed: bool) -> bool:
    """Whether the runs differ in their grids of eps or in their samples.

    Args:
        tables: Results of one kind by the name to print.
        mixed: Whether they may.

    Raises:
        InputError: If they do and may not.
    """
    checks: dict[str, Callable[[Table], Any]] = {"grids of eps": lambda table: table.eps, "samples": _samples}
    shown: dict[str, Callable[[Table], str]] = {
        "grids of eps": lambda table: ", ".join(f"{eps:g}" for eps in table.eps),
        "samples": _counts,
    }
    for what, of in checks.items():
        if len({of(table) for table in tables.values()}) > 1:
            if not mixed:
                alike: dict[Any, list[str]] = {}
                for name, table in tables.items():
                    alike.setdefault(of(table), []).append(name)
                each = "; ".join(
                    f"{name}{f' and {len(others)} more' if others else ''}: {shown[what](tables[name])}"
                    for name, *others in alike.values()
                )
                raise InputError(
                    f"the rows have different {what} ({each}); --mixed (in Python mixed=True) draws them together, and "
                    "the figure says so"
                )
            return True
    return False


def _balls(table: Table) -> str:
    return NORMS[table.norm]


def _gamma(table: Table) -> str:
    return f"{table.gamma:.4g}"


def _effort(table: Table) -> str:
    about = table.manifest
    return f"{about['effort']} ({', '.join(about['stages'])})" if "effort" in about and "stages" in about else ""


def _engine(table: Table) -> str:
    about = table.manifest
    check = about.get("cross_check") or {}
    checked = f" cross-checked by auto_LiRPA {check['version']}" if "version" in check else ""
    return f"{about.get('bounded_by') or about.get('engine') or ''}{checked}"


def _sigma(table: Table) -> str:
    return f"{float(table['sigma'].max()):g}"


def _draws(table: Table) -> str:
    return f"{int(table['n'].max())} a sample, each sample with probability 1 - {float(table['alpha'].max()):g}"


def _method(table: Table) -> str:
    return str(table.manifest.get("method") or "")


_FACTS: dict[str, dict[str, Callable[[Table], str]]] = {
    "certification": {"n": _counts, "norm": _balls, "gamma": _gamma, "effort": _effort, "engine": _engine},
    "lipschitz": {"n": _counts, "norm": _balls, "hidden layers": _method, "engine": _engine},
    "smoothing": {"n": _counts, "norm": _balls, "gamma": _gamma, "sigma": _sigma, "draws": _draws},
}


def spread_words(counts: Iterable[int]) -> str:
    """That means over so many seeds are shown, and what the bands or bars around them are."""
    return (
        f"mean of {' / '.join(map(str, dict.fromkeys(counts)))} seeds, and the range from the smallest to the largest"
    )


def _sampling(groups: Groups) -> str:
    """What one share is known to, over the sampling of images: the 95 % interval that is not drawn, where it is widest."""
    sizes = {int(mask.sum()) for group in groups.values() for mask in group[0].sets("id", "ood").values()}
    low, high = clopper_pearson(np.array([min(sizes) // 2]), min(sizes))
    width = 50 * float(high[0] - low[0])
    return f"that range is not the sampling of images: of {min(sizes)} a share is known to ±{width:.0f} points (95 %)"


def facts(runs: Runs) -> str:
    """Size of each set, norm, gamma, effort or noise, engine, and that the runs are complete, in one line.

    Where models differ, each has its value, in order. Of several seeds the smallest and the largest gamma are given.
    """
    groups, found, several = groups_of(runs), [], False
    first = next(iter(groups.values()))[0]
    seeds = any(len(group) > 1 for group in groups.values())
    for word, fact in _FACTS[first.kind].items():
        if word == "gamma" and seeds:
            gammas = [table.gamma for group in groups.values() for table in group]
            found.append(f"gamma {min(gammas):.4g} to {max(gammas):.4g}, of each run its own")
            continue
        values = [" or ".join(dict.fromkeys(map(fact, group))) for group in groups.values()]
        if len(set(values)) == 1:
            found += [f"{word} {values[0]}"] if values[0] else []
        else:
            found.append(f"{word} {' / '.join(value or '-' for value in values)}")
            several = True
    if seeds:
        found.append(spread_words(map(len, groups.values())))
        found += [_sampling(groups)] if first.kind != "lipschitz" else []
    found += ["complete"] if all(table.complete for group in groups.values() for table in group) else []
    return "; ".join(found) + (" (/: model by model)" if several else "")


def state(figure: Figure, runs: Runs, mixed: bool, width: Width) -> None:
    """Print the facts above a figure, and what of it is unfinished or mixed before them, in bold type."""
    each = each_of(groups_of(runs))
    unfinished = [f"{name}: {table.progress} samples" for name, table in each.items() if not table.complete]
    warnings = [f"not finished: {'; '.join(unfinished)}"] if unfinished else []
    warnings += [MIXED] if mixed else []
    characters = int(WIDTHS[width] / 2.54 * 72 / ((0.68 if warnings else 0.57) * small_type()))
    lines = [wrapped(text, characters) for text in (*warnings, facts(runs))]
    figure.suptitle("\n".join(lines), fontweight="bold" if warnings else "normal", linespacing=1.25)
