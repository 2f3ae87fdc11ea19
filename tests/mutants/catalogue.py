"""All planted bugs."""

from __future__ import annotations

from tests.mutants import bounds, certification, lipschitz, networks, scores, training
from tests.mutants.runner import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *certification.MUTANTS,
    *bounds.MUTANTS,
    *lipschitz.MUTANTS,
    *networks.MUTANTS,
    *scores.MUTANTS,
    *training.MUTANTS,
)
