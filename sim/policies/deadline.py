"""Prefetch the likeliest guesses whose copies can be done before their layer is routed; no other.

The link takes nearer layers first, so what is accepted for a nearer layer may make an earlier, farther one late.
"""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = "re-implementation from a summary of SeqMoE: the most probability that meets all deadlines on the link"
OPTIONS = {"landing_slots": 2}


class Params(NamedTuple):
    """``lookahead``: layers ahead; ``least``: probability a guess must have."""

    lookahead: int = 4
    least: float = 0.0


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """The score, if the whole copy is in time."""
    if guess.score < params.least or link.backlog_ns + link.load_ns > link.window_ns:
        return 0.0
    return guess.score
