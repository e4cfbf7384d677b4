"""Prefetch every guess that is possible at all, by score and nearness."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = "re-implementation from its description: MoE-Infinity (Xue et al. 2024), whose priorities fall with distance"
OPTIONS = {"landing_slots": 2}


class Params(NamedTuple):
    """``lookahead``: layers ahead."""

    lookahead: int = 3


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """The score, falling linearly to nothing one layer past the lookahead."""
    return guess.score * (params.lookahead + 1 - guess.distance) / params.lookahead
