"""Prefetch an expert once the guesses of several layers name it for the same visit."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = "re-implementation from a summary of FIRM-MoE; what its layers must agree on is our reading"
OPTIONS = {"landing_slots": 2}
WANTS_AGREEMENT = True


class Params(NamedTuple):
    """``lookahead``: layers ahead; ``layers``: how many must rank it among the first top_k (no more than looked at)."""

    lookahead: int = 3
    layers: int = 2


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """The score, if enough agree."""
    return guess.score if guess.rank < guess.top_k and guess.agreed >= params.layers else 0.0
