"""Prefetch the likeliest guess, one at a time, when the link has nothing else to do."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = "the simplest prefetch that never queues; the link is idle by the planner's virtual clock"
OPTIONS = {"landing_slots": 2}


class Params(NamedTuple):
    """``lookahead``: layers ahead; ``least``: probability a guess must have."""

    lookahead: int = 3
    least: float = 0.3


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """The score on an idle link."""
    return guess.score if link.queued_ns == 0 and guess.score >= params.least else 0.0
