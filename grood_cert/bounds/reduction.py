r"""What has to be bounded to bound a score: log-sum-exps of linear images z of the logits, one a *case*.

With sign = 1 for an upper and -1 for a lower bound of S,

    sign * S  <=  max over the cases of outer(b),       b >= -LSE(z)  (a "gibbs" proof)   or   b >= LSE(z)  ("chord"):

                 upper bound of S                                 lower bound of S
    Energy(T)    gibbs, z = f / T              T b                chord, z = f / T                        T b
    MaxLogit     gibbs, z = f, no entropy      b                  gibbs, z = -f_k, a case for each k      b
    MSP(T)       chord, z = Q's, one k         -1 / (1 + e^b)     gibbs, z = Q's, a case for each k       1 / (1 + e^-b)

* MaxLogit: -max_k f_k <= -p . f for any p in the simplex, and max_k f_k is the largest of its cases.
* MSP: with z_j = (f_j - f_k) / T for j != k, softmax(f / T)_k = 1 / (1 + e^LSE(z)) (`grood_cert.scores`). S is at most
  minus the probability of one class, that of the largest logit at x, and minus the largest of all. The former is the
  truth while that logit stays the largest; where it does not, branch and bound cannot close the gap.
* A class that is never the largest logit on the ball, u_k < max_j l_j, needs no case.

`outer` increases and adds 1e-15 for its own rounding; what is inside has been moved outward already.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from grood_cert.bounds.engine import Side, sign_of
from grood_cert.errors import InputError
from grood_cert.interval import Interval, outward
from grood_cert.scores import MSP, Energy, MaxLogit, Score

_LOGISTIC_ROUNDING = 1e-15


@dataclass(frozen=True)
class Head:
    """The images z of the logits, one a sample: f / divisor, f_k / divisor, or (f_j - f_k) / divisor for all j != k.

    Attributes:
        kind: "all", "one" or "others".
        divisor: What they are divided by.
        case: k, shape (B,); without meaning for "all".

    Example:
        >>> head = Head("others", 2.0, torch.tensor([1]))
        >>> head.image(torch.tensor([[5.0, 1.0, 2.0]])), head.rows(torch.tensor([[[1.0, 3.0]]]), 3)
        (tensor([[2.0000, 0.5000]]), tensor([[[ 0.5000, -2.0000,  1.5000]]]))
    """

    kind: Literal["all", "one", "others"]
    divisor: float
    case: Tensor

    def at(self, index: Tensor) -> Head:
        """Those of some samples."""
        return replace(self, case=self.case[index])

    def size(self, classes: int) -> int:
        """Length of z."""
        return {"all": classes, "one": 1, "others": classes - 1}[self.kind]

    def _members(self, classes: int) -> Tensor:
        """Which logits z is made of, shape (B, size)."""
        own = self.case.unsqueeze(1)
        if self.kind == "one":
            return own
        index = torch.arange(classes - 1, device=own.device).expand(len(own), -1)
        return index + (index >= own)

    def image(self, logits: Tensor) -> Tensor:
        """z, shape (B, size), of logits of shape (B, K)."""
        if self.kind == "all":
            return logits / self.divisor
        members = logits.gather(1, self._members(logits.shape[1]))
        return (members - logits.gather(1, self.case.unsqueeze(1)) if self.kind == "others" else members) / self.divisor

    def rows(self, rows: Tensor, classes: int) -> Tensor:
        """Rows c of the logits with c . f = r . z, shape (B, R, K), of rows r of shape (B, R, size)."""
        rows = rows / self.divisor
        if self.kind == "all":
            return rows
        shape = len(rows), rows.shape[1], classes
        found = rows.new_zeros(shape).scatter(2, self._members(classes).unsqueeze(1).expand_as(rows), rows)
        if self.kind == "one":
            return found
        own = self.case.reshape(-1, 1, 1).expand(*shape[:2], 1)
        return found.scatter(2, own, -rows.sum(2, keepdim=True))

    def interval(self, lower: Tensor, upper: Tensor) -> Interval:
        """What intervals of the logits say of z."""
        if self.kind == "all" and self.divisor == 1:
            return lower, upper
        own = self.case.unsqueeze(1)
        if self.kind != "all":
            members = self._members(lower.shape[1])
            ends = lower.gather(1, own), upper.gather(1, own)
            lower, upper = lower.gather(1, members), upper.gather(1, members)
            if self.kind == "others":
                size = torch.maximum(lower.abs(), upper.abs()) + torch.maximum(*(end.abs() for end in ends))
                lower, upper = outward(lower - ends[1], upper - ends[0], size)
        lower, upper = lower / self.divisor, upper / self.divisor
        lower, upper = (lower, upper) if self.divisor > 0 else (upper, lower)
        return outward(lower, upper, torch.maximum(lower.abs(), upper.abs()))


@dataclass(frozen=True)
class Reduction:
    """How a bound of a score on one side is reduced; see `reduction`.

    Attributes:
        score: S.
        side: Of the bound.
        proof: Of every case.
        entropy: Weight of the entropy in a gibbs proof, 0 or 1.
        kind: Of the head.
        divisor: Of the head.
        scale: What multiplies b; None: b goes through the logistic function.
    """

    score: Score
    side: Side
    proof: Literal["gibbs", "chord"]
    kind: Literal["all", "one", "others"]
    divisor: float
    entropy: float = 1.0
    scale: float | None = 1.0

    def constant(self, classes: int) -> float | None:
        """S where there is nothing to prove, since it is the same everywhere; else None."""
        return -1.0 if isinstance(self.score, MSP) and classes == 1 else None

    def cases(self, logits: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Head]:
        """The cases of all samples: which sample each is of, and their heads.

        Args:
            logits: f(x), shape (B, K).
            lower: Lower ends of the logits on the balls, shape (B, K).
            upper: Upper ends.
        """
        everyone = torch.arange(len(logits), device=logits.device)
        if self.kind == "all" or self.side == "upper":
            return everyone, Head(self.kind, self.divisor, logits.argmax(1))
        sample, case = possible_winners(lower, upper).nonzero(as_tuple=True)
        return sample, Head(self.kind, self.divisor, case)

    def outer(self, bound: Tensor) -> Tensor:
        """A bound of sign * S from those of its cases, shape (...)."""
        if self.scale is not None:
            return self.scale * bound
        sign = sign_of(self.side)
        return -sign * torch.sigmoid(-sign * bound) + _LOGISTIC_ROUNDING

    def inner(self, gamma: float) -> float:
        """Where `outer` reaches sign * gamma, up to rounding; finite."""
        return sign_of(self.side) * self.score.order_at(gamma) / (self.scale or 1.0)


def possible_winners(lower: Tensor, upper: Tensor) -> Tensor:
    """Which logits may be the largest somewhere on the ball, shape (B, K); all where an interval is NaN."""
    return ~(upper < lower.amax(1, keepdim=True))


def worst(bounds: Tensor, sample: Tensor, count: int) -> Tensor:
    """The largest bound of each sample's cases, shape (count,)."""
    return bounds.new_full((count,), -torch.inf).scatter_reduce(0, sample, bounds, "amax")


def reduction(score: Score, side: Side) -> Reduction:
    """The reduction of a score; table and proof at the top of this module.

    Raises:
        InputError: If the side is unknown, or there is no proof for the score.
    """
    upper = sign_of(side) > 0
    match score:
        case Energy(temperature):
            proof: Literal["gibbs", "chord"] = "gibbs" if upper else "chord"
            return Reduction(score, side, proof, "all", temperature, scale=temperature)
        case MaxLogit():
            return Reduction(score, side, "gibbs", "all" if upper else "one", 1.0 if upper else -1.0, entropy=0.0)
        case MSP(temperature):
            return Reduction(score, side, "chord" if upper else "gibbs", "others", temperature, scale=None)
    raise InputError(f"there is no proof for the score {score}")
