r"""The columns of all results, by the kind of result: the one place where they are documented, with their types.

A result is one CSV with a JSON manifest beside it, which names its kind and the version of its schema. A grid column
occurs once for each eps, as `NAME@EPS`. Radii and eps are in pixel units ([0, 1]) of the run's norm.

Columns of `smoothing` are about the *smoothed* detector and hold with probability at least 1 - alpha over the draws of
their row (`grood_cert.certification.smoothing` has the statement); but for what names a row, they share no name with
those of `certification`, which are proved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from grood_cert.certification.outcomes import STAGES, Outcome

KINDS = ("id", "ood", "noise")
NORMS = {"linf": "l_inf", "l2": "l_2", "l1": "l_1"}  # as people read them, by what files and options say
LOOKED_UP = Outcome.ENVELOPE.word  # what decided a ball at a threshold other than that of the run
OUTCOMES = tuple(outcome.word for outcome in Outcome if outcome.word != LOOKED_UP)
LIPSCHITZ_METHODS = ("product", "product-active", "hull", "interval", "jacobian-crown", "jacobian-crown-corners")
DECISIONS = ("accepted", "rejected", "abstained")


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        words: What it holds.
        type: "number" is float64, NaN where nothing is known.
        allowed: The texts that may occur; empty: any.
        finite: Whether it must be a finite number.
        never_infinite: Whether it must be a finite number or NaN.
        least: Smallest number that may occur, NaN excluded; None: any.
    """

    words: str
    type: Literal["text", "integer", "number"] = "number"
    allowed: tuple[str, ...] = ()
    finite: bool = False
    never_infinite: bool = False
    least: float | None = None


@dataclass(frozen=True)
class Schema:
    """What the files of one kind of result look like.

    Attributes:
        words: What the rows are.
        command: The command that writes them.
        columns: Columns that occur once, by name, in order.
        grid: Columns that occur once for each eps.
        manifest: Keys of the manifest that readers need, beside `kind`, `schema` and `eps`.
        version: Counts the changes after which earlier files are no longer read.
    """

    words: str
    command: str
    columns: Mapping[str, Column]
    grid: Mapping[str, Column] = field(default_factory=dict)
    manifest: tuple[str, ...] = ("norm", "model")
    version: int = 1


_NAMES = {
    "set": Column("name of the image set", "text"),
    "kind": Column("id, ood or noise", "text", KINDS),
    "index": Column("position of the image in its test set", "integer"),
    "file": Column("name of the picture's file, for images of a folder; else empty", "text"),
}
_CERTIFICATION = {
    "label": Column("class index within the set", "integer"),
    "prediction": Column("class of the largest logit", "integer"),
    "score": Column("S(x), clean", finite=True),
    "accepted": Column("1 if S(x) <= gamma, else 0", "integer"),
    "status": Column(
        "certified (a positive radius was proved), undecided (none was), misdecided (wrong already at x)",
        "text",
        ("certified", "undecided", "misdecided"),
    ),
    "stage": Column(
        "what decided: the stage that proved radius_certified, envelope (looked up at another gamma), misdecision, "
        "undecided",
        "text",
        (*STAGES, LOOKED_UP, "misdecision", "undecided"),
    ),
    "radius_certified": Column(
        "formal: largest eps found for which the decision was proved on the whole ball; 0 if none", finite=True, least=0
    ),
    "radius_certified_per_logit": Column(
        "formal: the same from bounds of each logit alone (U0, L0); nan if not asked for"
    ),
    "radius_lipschitz_fixed_point": Column(
        "formal: root of eps L(eps) = |S(x) - gamma|, L a Lipschitz bound; nan if not asked for"
    ),
    "radius_lipschitz_path": Column(
        "formal: where the integral of L reaches |S(x) - gamma|; nan if not asked for",
    ),
    "radius_attack": Column(
        "upper bracket: distance of the nearest point found with the other decision; inf if none", least=0
    ),
    "radius_gradient_norm_estimate": Column("estimate, proves nothing: |S(x) - gamma| / ||grad S(x)||_q"),
    "gradient_norm_estimate": Column(
        "estimate of the local Lipschitz constant from below: ||grad S(x)||_q, q dual to the norm"
    ),
}
_CERTIFICATION_GRID = {
    "s_lb": Column("formal: S_lb <= S on the ball of radius eps; nan if not proved", never_infinite=True),
    "s_ub": Column("formal: S <= S_ub on the ball of radius eps; nan if not proved", never_infinite=True),
    "s_attack_min": Column("smallest S an attack saw in the ball", never_infinite=True),
    "s_attack_max": Column("largest S an attack saw in the ball", never_infinite=True),
    "outcome": Column(
        "what decided the ball of radius eps: a stage (or envelope) certified it, attack broke it, misdecision: wrong "
        "at x itself, timeout, undecided",
        "text",
        (*OUTCOMES, LOOKED_UP),
    ),
}
_MEDIAN = Column("estimate, proves nothing: median of the scores drawn; nan if one of them is")
_SMOOTHING = {
    "label": Column("class index within the set", "integer"),
    "score": Column("S(x) of the network without noise, float64"),
    "median_estimate": _MEDIAN,
    "draws_below": Column("scores drawn below gamma; 0 if one is nan", "integer"),
    "draws_above": Column("scores drawn above gamma; 0 if one is nan", "integer"),
    "decision": Column(
        "of the smoothed detector, at confidence 1 - alpha: accepted, rejected, abstained (neither is certain)",
        "text",
        DECISIONS,
    ),
    "status": Column(
        "certified (the decision is right), misdecided (it is wrong), abstained",
        "text",
        ("certified", "abstained", "misdecided"),
    ),
    "radius_smoothed": Column(
        "probability 1 - alpha: no l_2 perturbation shorter than this changes the decision; 0 if not right",
        finite=True,
        least=0,
    ),
    "sigma": Column("standard deviation of the noise, pixel units"),
    "n": Column("scores drawn", "integer"),
    "alpha": Column(
        "largest probability, over the draws, that the decision or the radius is false; the same for bounds"
    ),
}
_SMOOTHING_GRID = {
    "s_lb_smoothed": Column(
        "probability 1 - alpha for all bounds of the row: below the median on the whole ball; -inf if none"
    ),
    "s_ub_smoothed": Column(
        "probability 1 - alpha for all bounds of the row: above the median on the whole ball; inf if none"
    ),
}
_LIPSCHITZ = {
    "score": Column("S(x)"),
    "eps": Column("radius of the ball, pixel units"),
    "gradient_norm_estimate": Column("estimate from below: ||grad S(x)||_q, what GReg penalises"),
    "sampled_estimate": Column("estimate from below: largest gradient norm at points sampled in the ball"),
    "ascended_estimate": Column(
        "estimate from below: largest gradient norm found by ascent; the reference for tightness"
    ),
    "secant_estimate": Column("estimate from below: largest |S(x') - S(x)| / ||x' - x||_p seen"),
    "clever_estimate": Column("estimate, neither below nor above: extreme-value fit (CLEVER)"),
    "clever_p_value": Column("goodness of that fit (Kolmogorov-Smirnov); nan where there is none"),
    "clever_fitted": Column("1 if the fit was usable, 0 if the sample maximum stands in; nan without CLEVER"),
    **{
        f"bound_{name.replace('-', '_')}": Column(f"formal upper bound: {name}; nan if not proved")
        for name in LIPSCHITZ_METHODS
    },
    "bound": Column(
        "formal upper bound: the smallest of all, and of those at larger eps; inf if nothing was proved",
    ),
    "provenance": Column("the method that gave the bound at this eps; none if nothing was proved", "text"),
    "bound_fixed_head": Column("formal, upwards only: S(x') <= S(x) + bound ||x' - x||_p; enough for ID"),
}
SCHEMAS: dict[str, Schema] = {
    "certification": Schema(
        "the rows of a certification",
        "certify",
        _NAMES | _CERTIFICATION,
        _CERTIFICATION_GRID,
        ("norm", "gamma", "model"),
    ),
    "smoothing": Schema(
        "the rows of median smoothing",
        "smooth",
        _NAMES | _SMOOTHING,
        _SMOOTHING_GRID,
        ("norm", "gamma", "gamma_base", "model"),
    ),
    "smoothing-calibration": Schema(
        "the calibration of median smoothing",
        "smooth",
        _NAMES | {"score": _SMOOTHING["score"], "median_estimate": _MEDIAN},
    ),
    "lipschitz": Schema("the rows of a Lipschitz analysis", "lipschitz", _NAMES | _LIPSCHITZ),
}


def grid_column(name: str, eps: float) -> str:
    """Name of a grid column.

    Example:
        >>> grid_column("s_lb", 0.01)
        's_lb@0.01'
    """
    return f"{name}@{eps!r}"


def header(kind: str, eps: Sequence[float]) -> list[str]:
    """All columns of a file with this eps grid, in order.

    Example:
        >>> header("smoothing-calibration", (0.1, 0.2))
        ['set', 'kind', 'index', 'file', 'score', 'median_estimate']
    """
    schema = SCHEMAS[kind]
    return [*schema.columns, *(grid_column(name, value) for value in eps for name in schema.grid)]
