"""Prefetch guesses above a confidence, nearest layer first."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = "re-implementation from its description: Fate (Fang et al. 2025), the next layer alone and only when sure"
OPTIONS = {"landing_slots": 2}


class Params(NamedTuple):
    """``lookahead``: layers ahead; ``least``: probability a guess must have."""

    lookahead: int = 1
    least: float = 0.6


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """The score, nearest layer first."""
    return guess.score / guess.distance if guess.score >= params.least else 0.0
