"""Prefetch the best guesses for the next layer, whatever it costs."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = (
    "re-implementation from its description: speculative loading of Mixtral-offloading's paper (Eliseev and Mazur "
    "2023), the likeliest one or two experts; its released code has none"
)
OPTIONS = {"landing_slots": 2}


class Params(NamedTuple):
    """``lookahead``: layers ahead; ``count``: guesses of each layer that are considered, resident ones included."""

    lookahead: int = 1
    count: int = 2  # type: ignore[assignment]  # the tuple method of that name is not used


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """The score, nearest layer first."""
    return guess.score / guess.distance if guess.rank < params.count else 0.0
