"""What becomes of a ball: the words of the rows, and what they say. Needs no torch."""

from __future__ import annotations

from enum import IntEnum
from typing import Self


class Outcome(IntEnum):
    """What decided a ball, or that nothing did; printed, a sentence.

    The stages of the cascade stand here in their order.

    Attributes:
        word: How rows and settings call it.
        sentence: What it says.

    Example:
        >>> str(Outcome.CROWN), Outcome.CROWN.word, Outcome.of("crown") is Outcome.numbered(3)
        ('certified by linear bounds (CROWN)', 'crown', True)
    """

    UNDECIDED = "undecided", "undecided: neither a proof nor a counterexample was found"
    IBP = "ibp", "certified by interval bounds (IBP)"
    CROWN_IBP = "crown-ibp", "certified by linear bounds over interval bounds (CROWN-IBP)"
    CROWN = "crown", "certified by linear bounds (CROWN)"
    LIPSCHITZ = "lipschitz", "certified by local Lipschitz bounds"
    ALPHA_CROWN = "alpha-crown", "certified by optimised linear bounds (alpha-CROWN)"
    BRANCH_AND_BOUND = "branch-and-bound", "certified by branch and bound"
    MISDECISION = "misdecision", "misdecided: the decision is wrong at the image itself"
    ATTACK = "attack", "broken: an attack found a point of the ball with the other decision"
    TIMEOUT = "timeout", "undecided: the time limit came before a proof or a counterexample"
    ENVELOPE = "envelope", "certified at another gamma by the bounds of an earlier certification"

    word: str
    sentence: str

    def __new__(cls, word: str, sentence: str) -> Self:
        """A member numbered by its place, so that tensors can hold it."""
        member = int.__new__(cls, len(cls.__members__))
        member._value_ = len(cls.__members__)
        member.word, member.sentence = word, sentence
        return member

    def __str__(self) -> str:
        return self.sentence

    @property
    def certifies(self) -> bool:
        """Whether it is a proof of the decision."""
        return self.word in STAGES or self is Outcome.ENVELOPE

    @classmethod
    def of(cls, word: str) -> Outcome:
        """The outcome that rows call by this word.

        Raises:
            KeyError: If there is none.
        """
        return _BY_WORD[word]

    @classmethod
    def numbered(cls, number: int) -> Outcome:
        """The outcome that tensors hold as this number."""
        return _BY_NUMBER[number]


_BY_NUMBER = tuple(Outcome)
_BY_WORD = {outcome.word: outcome for outcome in Outcome}
STAGES = tuple(outcome.word for outcome in Outcome if Outcome.UNDECIDED < outcome < Outcome.MISDECISION)
LINEAR = STAGES[: STAGES.index("lipschitz")]
