"""Prefetch the first guesses for the next layer that are not resident."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = (
    "re-implementation from descriptions: AdapMoE (Zhong et al. 2024) and DALI, which finds one expert best for Mixtral"
)
OPTIONS = {"landing_slots": 2}


class Params(NamedTuple):
    """``lookahead``: layers ahead; ``count``: missing experts of each layer."""

    lookahead: int = 1
    count: int = 1  # type: ignore[assignment]  # the tuple method of that name is not used


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """The score, nearest layer first; guesses beyond top_k are left out."""
    if guess.missing_rank < params.count and guess.rank < guess.top_k:
        return guess.score / guess.distance
    return 0.0
