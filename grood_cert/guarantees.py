r"""Detection metrics when samples may move within balls: certified <= worst case <= attacked <= clean, on the same samples.

Of each side that moves, proofs give S_ub (ID) or S_lb (OOD), and an attack gives the worst score that it saw. Metrics are
monotone in the scores, so those of the proved scores bound the worst case from one side and those of the attacked ones
from the other; an error rate has the reverse order, clean <= attacked <= worst case <= certified. A bound that is NaN or
infinite proves nothing: its sample counts as worse than all others, never as certified.

| | certified | attacked, clean |
|---|---|---|
| AUROC | GAUC = P(S_ub(in) < S_lb(out)): a tie is an error | AAUC, AUROC: a tie counts 1/2 |
| AUPR, ID or OOD positive | GAUPR: average precision, negatives first in a tie | the same rule |
| FPR at 95 % TPR | threshold and rate from proved scores | from attacked, clean scores |
| TPR, FPR at a fixed gamma | mean[S_ub < gamma], 1 - mean[S_lb > gamma] | mean[S <= gamma] |

scikit-learn's average precision can *rise* when a positive loses score out of a tie, so it has no such order; without
ties the two rules agree.

References:
    Bitterwolf et al. (GOOD), NeurIPS 2020 (GAUC, AAUC); Meinke et al. (ProoD), NeurIPS 2022 (GAUPR, GFPR).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grood_cert.confidence import LEVEL, bootstrap, clopper_pearson
from grood_cert.errors import InputError, SoundnessError
from grood_cert.metrics import TPR_PERCENT, Class, Ranking, checked

_Floats = NDArray[np.float64]
_CLASSES: dict[Class, str] = {"id": "aupr_in", "ood": "aupr_out"}
_PARTS = ("clean", "attacked", "certified")


@dataclass(frozen=True, eq=False)
class Worst:
    """Scores of the samples of one class: low = ID, high = OOD.

    Attributes:
        kind: "id" or "ood".
        clean: S(x), shape (N,).
        attacked: The worst S that was seen in the ball around x: highest of ID, lowest of OOD.
        proved: Nothing in the ball is worse than that; infinite where nothing is proved.
        moved: Whether samples may move at all; if not, all three are the same.
    """

    kind: Class
    clean: _Floats
    attacked: _Floats
    proved: _Floats
    moved: bool

    @classmethod
    def still(cls, kind: Class, score: ArrayLike) -> Worst:
        """Samples that do not move.

        Raises:
            InputError: On empty or NaN scores.
        """
        clean = checked(score, f"{kind.upper()} scores")
        return cls(kind, clean, clean, clean, False)

    @classmethod
    def within(cls, kind: Class, score: ArrayLike, bound: ArrayLike, attacked: ArrayLike) -> Worst:
        """Samples that may move within balls.

        Args:
            kind: "id" or "ood".
            score: S(x), shape (N,).
            bound: S_ub of ID, S_lb of OOD on the ball; NaN or infinite: nothing is proved.
            attacked: Highest S of ID, lowest S of OOD that an attack saw there; NaN: it saw none but x.

        Raises:
            InputError: On empty or NaN scores, or if bounds and attacks are not of the same samples.
            SoundnessError: If a score, clean or attacked, is worse than what is proved.

        Example:
            >>> worst = Worst.within("ood", [3.0, 4.0], [1.0, np.nan], [2.0, np.nan])
            >>> worst.attacked.tolist(), worst.proved.tolist()
            ([2.0, 4.0], [1.0, -inf])
        """
        clean = checked(score, f"{kind.upper()} scores")
        limit, seen = np.asarray(bound, dtype=np.float64), np.asarray(attacked, dtype=np.float64)
        if not clean.shape == limit.shape == seen.shape:
            raise InputError(
                f"{kind.upper()}: scores {clean.shape}, bounds {limit.shape} and attacks {seen.shape} must be of the same "
                "samples"
            )
        sign = 1.0 if kind == "id" else -1.0  # towards what is worse
        reached = np.fmax(sign * seen, sign * clean)
        proved = np.where(np.isfinite(limit), sign * limit, np.inf)
        wrong = reached > proved
        if bool(wrong.any()):
            first = int(np.flatnonzero(wrong)[0])
            raise SoundnessError(
                f"{int(wrong.sum())} {kind.upper()} scores are worse than what is proved, at first that of sample "
                f"{first}: {sign * reached[first]:.9g} against {limit[first]:.9g}",
                {"sample": np.flatnonzero(wrong), "seen": sign * reached[wrong], "bound": limit[wrong]},
            )
        return cls(kind, clean, sign * reached, sign * proved, True)


@dataclass(frozen=True)
class Bracket:
    """One metric on the same samples: the worst case lies between `certified` and `attacked`.

    Attributes:
        clean: Nothing moves.
        attacked: An attack reached this.
        certified: Proved: no perturbation makes it worse than this.
    """

    clean: float
    attacked: float
    certified: float


def brackets(
    inside: Worst, outside: Worst, *, gamma: float | None = None, tpr: float = TPR_PERCENT
) -> dict[str, Bracket]:
    r"""Metrics of ID against OOD samples, each clean, attacked and certified.

    Args:
        inside: ID samples.
        outside: OOD samples.
        gamma: A threshold; adds `tpr_at_gamma` and `fpr_at_gamma`.
        tpr: TPR in percent of `fpr95_id` and `fpr95_ood`, which are named after it.

    Returns:
        `auroc`, `aupr_in` and `aupr_out` (average precision, pessimistic in ties, ID or OOD positive), `fpr95_id`,
        `fpr95_ood`.

    Raises:
        InputError: If the sides are exchanged, or on another TPR.
        SoundnessError: If the order is broken.

    Example:
        >>> inside = Worst.still("id", [0.0, 1.0, 2.0])
        >>> outside = Worst.within("ood", [3.0, 4.0, 5.0], [0.5, 1.0, np.nan], [1.5, 4.0, 5.0])
        >>> found = brackets(inside, outside)["auroc"]
        >>> print(f"{found.clean:.3f} {found.attacked:.3f} {found.certified:.3f}")
        1.000 0.889 0.222
    """
    if (inside.kind, outside.kind) != ("id", "ood"):
        raise InputError("the first side is ID, the second OOD")
    rankings = _rankings(inside, outside)
    found = _areas(rankings)
    errors = {
        f"fpr{tpr:g}_{positive}": Bracket(*(each.fpr(tpr, positive) for each in rankings)) for positive in _CLASSES
    }
    if gamma is not None:
        stays = inside.proved < gamma if inside.moved else inside.clean <= gamma
        found["tpr_at_gamma"] = _rates(inside.clean <= gamma, inside.attacked <= gamma, stays)
        errors["fpr_at_gamma"] = _rates(outside.clean <= gamma, outside.attacked <= gamma, ~(outside.proved > gamma))
    for name, value in found.items():
        _check_order(name, value.certified, value.attacked, value.clean)
    for name, value in errors.items():
        _check_order(name, value.clean, value.attacked, value.certified)
    return found | errors


def intervals(
    inside: Worst,
    outside: Worst,
    *,
    gamma: float | None = None,
    tpr: float = TPR_PERCENT,
    level: float = LEVEL,
) -> dict[str, tuple[Bracket, Bracket]]:
    """Low and high ends of intervals for what `brackets` gives of the same sides.

    Of shares exact (Clopper-Pearson; of an FPR at its threshold as it is), of areas a bootstrap, which draws whole
    samples: clean, attacked and proved scores together.

    Raises:
        InputError: If the level is outside (0, 1), or as `brackets` says.
    """

    def areas(drawn_id: _Floats, drawn_ood: _Floats) -> dict[str, float]:
        found = _areas(_rankings(_drawn(inside, drawn_id), _drawn(outside, drawn_ood)))
        return {f"{name}/{part}": getattr(value, part) for name, value in found.items() for part in _PARTS}

    spread = bootstrap(
        areas, *(np.stack([side.clean, side.attacked, side.proved], 1) for side in (inside, outside)), level=level
    )
    samples = {"id": len(inside.clean), "ood": len(outside.clean)}
    counted = {f"fpr{tpr:g}_id": "ood", f"fpr{tpr:g}_ood": "id", "tpr_at_gamma": "id", "fpr_at_gamma": "ood"}
    ends = {}
    for name, value in brackets(inside, outside, gamma=gamma, tpr=tpr).items():
        if name in counted:
            n = samples[counted[name]]
            pairs = [clopper_pearson(round(getattr(value, part) * n), n, level) for part in _PARTS]
        else:
            pairs = [spread[f"{name}/{part}"] for part in _PARTS]
        low, high = np.stack(pairs, axis=1).tolist()
        ends[name] = Bracket(*low), Bracket(*high)
    return ends


def _rankings(inside: Worst, outside: Worst) -> tuple[Ranking, Ranking, Ranking]:
    """Clean, attacked and proved."""
    return (
        Ranking.of(inside.clean, outside.clean),
        Ranking.of(inside.attacked, outside.attacked),
        Ranking.of(inside.proved, outside.proved),
    )


def _areas(rankings: tuple[Ranking, Ranking, Ranking]) -> dict[str, Bracket]:
    clean, attacked, proved = rankings
    found = {"auroc": Bracket(clean.auroc, attacked.auroc, proved.auroc_strict)}
    for positive, name in _CLASSES.items():
        found[name] = Bracket(*(each.aupr(positive, "pessimistic") for each in rankings))
    return found


def _drawn(side: Worst, columns: _Floats) -> Worst:
    clean, attacked, proved = columns.T
    return Worst(side.kind, clean, attacked, proved, side.moved)


def _rates(clean: NDArray[np.bool_], attacked: NDArray[np.bool_], certified: NDArray[np.bool_]) -> Bracket:
    return Bracket(float(clean.mean()), float(attacked.mean()), float(certified.mean()))


def _check_order(name: str, *ascending: float) -> None:
    if not ascending[0] <= ascending[1] <= ascending[2]:
        raise SoundnessError(
            f"{name}: {', '.join(f'{value:.9g}' for value in ascending)} should ascend; clean, attacked and certified "
            "figures of the same samples contradict one another",
            {name: np.array(ascending)},
        )
