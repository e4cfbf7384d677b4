"""Demand loads before speculative ones, in three chunks each; what is queued for a layer is purged at its routing.

The first top_k guesses of the next layers are issued, nearest layer first, whatever they cost.
"""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = "re-implementation from its description: ProMoE (Song et al. 2024)"
OPTIONS = {"landing_slots": 2, "chunk_bytes": -3, "stale": "retract"}


class Params(NamedTuple):
    """``lookahead``: layers ahead."""

    lookahead: int = 3


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """The score, nearest layer first."""
    return guess.score / guess.distance if guess.rank < guess.top_k else 0.0
