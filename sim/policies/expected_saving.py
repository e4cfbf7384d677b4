"""Prefetch a guess when the stall it is expected to save outweighs what it costs when wrong.

`speculative` without its guard and without its trust in scores: these are believed as they are.
"""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = "ours: issue when p * stall saved > head-of-line cost + eviction loss"
OPTIONS = {"landing_slots": 2}


class Params(NamedTuple):
    """``lookahead``: layers ahead; ``reuse``: probability that what gives way would have been a hit (0 where early
    loads have landing slots)."""

    lookahead: int = 3
    reuse: float = 0.0


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """Expected nanoseconds saved."""
    hidden_ns = min(link.load_ns, link.window_ns - link.backlog_ns)
    if hidden_ns <= 0:
        return 0.0
    lost_ns = link.chunk_ns * link.max_submitted + params.reuse * link.load_ns
    return guess.score * hidden_ns - (1.0 - guess.score) * lost_ns
