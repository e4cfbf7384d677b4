"""Walk to the first layer with a predicted expert that is missing, and prefetch what that layer misses."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = "re-implementation from its description: HOBBIT (Tang et al. 2024)"
OPTIONS = {"landing_slots": 2}


class Params(NamedTuple):
    """``lookahead``: layers the walk goes at most."""

    lookahead: int = 3


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """The score, if the guess is among the first top_k and no nearer layer misses one of these."""
    return guess.score if guess.rank < guess.top_k and guess.missing_nearer == 0 else 0.0
