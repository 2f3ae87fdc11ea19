"""What to certify, and how much work to spend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, get_args

from grood_cert import attacks
from grood_cert.ball import Norm, check_eps
from grood_cert.bounds.engine import Method
from grood_cert.bounds.engines import ENGINES, Engine
from grood_cert.certification.outcomes import LINEAR, STAGES
from grood_cert.errors import InputError
from grood_cert.networks.graph import Deployment


@dataclass(frozen=True)
class Effort:
    """How much work a certification spends.

    Attributes:
        stages: Stages of the cascade.
        everywhere: Whether the linear stages bound every ball of the grid, so that the envelope is as good at other
            thresholds; else they skip balls that a cheaper stage decided.
        steps: Optimisation steps of alpha-crown.
        nodes: Most cases that branch-and-bound may open for one ball.
        rounds: Balls that branch-and-bound may try for one sample.
        attack: How hard the attacks search.
        both_extremes: Whether the attacks on the grid search extremes of S away from the other decision too, which no rate
            depends on, but which a wrong bound would contradict.
    """

    stages: tuple[str, ...]
    everywhere: bool
    steps: int
    nodes: int
    rounds: int
    attack: attacks.AttackEffort
    both_extremes: bool = True


_DEFAULT = Effort(
    ("ibp", "crown", "alpha-crown", "branch-and-bound"), True, 20, 64, 4, attacks.AttackEffort.preset("default")
)
EFFORTS: dict[str, Effort] = {
    "fast": Effort(
        ("ibp", "crown"),
        False,
        _DEFAULT.steps,
        _DEFAULT.nodes,
        _DEFAULT.rounds,
        attacks.AttackEffort.preset("fast"),
        both_extremes=False,
    ),
    "default": _DEFAULT,
    "max": Effort(STAGES, True, 50, 512, 6, attacks.AttackEffort.preset("max")),
}


@dataclass(frozen=True)
class Settings:
    """What to certify.

    Attributes:
        eps: Grid of radii in pixel units, ascending, without repetition.
        norm: Norm of the balls.
        effort: "fast", "default" or "max", a key of `EFFORTS`.
        stages: Stages of the cascade in place of the effort's; empty: the effort's.
        engine: Who gives linear bounds: "native", "auto_lirpa", or "auto": the native one, cross-checked by the other in runs.
        precision: Relative precision at which a radius search stops.
        batch_size: Samples bounded together.
        seed: Seed of the attacks' starting points and of the choice of samples.
        time_limit: Seconds a sample may take on average over its batch before refining stages stop; 0: no limit. With
            a limit, results depend on the machine.
        deployment: "float64" or "float32": the arithmetic in which the network will be evaluated, whose rounding bounds
            cover beside that of float64.
        per_logit: Whether to search radii from bounds of each logit alone too, for comparison.
    """

    eps: tuple[float, ...]
    norm: Norm = "linf"
    effort: str = "default"
    stages: tuple[str, ...] = ()
    engine: Engine = "auto"
    precision: float = 1e-2
    batch_size: int = 64
    seed: int = 0
    time_limit: float = 0.0
    deployment: Deployment = "float64"
    per_logit: bool = False

    def check(self, shape: tuple[int, int, int] | None) -> None:
        """Refuse settings that make no sense for images of this shape; None: of any shape.

        Raises:
            InputError: Naming what is wrong.
        """
        check_eps(self.eps, self.norm, shape)
        if self.batch_size < 1:
            raise InputError(f"batch size must be 1 or more, got {self.batch_size}")
        if self.effort not in EFFORTS:
            raise InputError(f"unknown effort {self.effort!r}; use one of {', '.join(EFFORTS)}")
        for stage in self.stages:
            if stage not in STAGES:
                raise InputError(f"unknown stage {stage!r}; use some of {', '.join(STAGES)}")
        if not set(self.cascade) & set(LINEAR):
            raise InputError(f"the stages need one of {', '.join(LINEAR)}: the others stand on their bounds")
        if self.engine not in ENGINES:
            raise InputError(f"unknown engine {self.engine!r}; use one of {', '.join(ENGINES)}")
        if self.deployment not in get_args(Deployment):
            raise InputError(f"unknown deployment {self.deployment!r}; use one of {', '.join(get_args(Deployment))}")
        if not 0 < self.precision < 1:
            raise InputError(f"precision must lie between 0 and 1, got {self.precision!r}")
        if not 0 <= self.time_limit < float("inf"):
            raise InputError(f"time limit must be 0 (none) or more seconds, got {self.time_limit!r}")
        if self.time_limit > 0 and not set(self.cascade) - set(LINEAR):
            raise InputError(
                f"a time limit stops refining stages, and there are none among {', '.join(self.cascade)}; leave it out"
            )

    @property
    def cascade(self) -> tuple[str, ...]:
        """The stages in their order."""
        chosen = self.stages or EFFORTS[self.effort].stages
        return tuple(stage for stage in STAGES if stage in chosen)

    @property
    def linear(self) -> tuple[Method, ...]:
        """The linear stages, the tightest last."""
        return cast(tuple[Method, ...], tuple(stage for stage in self.cascade if stage in LINEAR))
