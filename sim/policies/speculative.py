"""Prefetch the guessed experts of the next layers while that is expected to save more time than it costs.

A guess of probability p is worth p times the part of its copy that can be done before its routing is known, less
(1 - p) times the chunks a demand load may have to wait for. Guesses the link cannot get to in time are worth nothing.
Prefetches land in slots of their own, give way to every demand load between two chunks, and are dropped when their
layer is routed without them, so a wrong guess costs at most ``max_submitted`` chunks.
"""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = "our reconstruction of the speculative expert scheduling of Ou et al. 2025 (doi 10.1016/j.csi.2025.103996)"
OPTIONS = {"landing_slots": 2, "stale": "retract"}


class Params(NamedTuple):
    """``lookahead``: layers ahead; ``min_score``: guesses less likely than this are never issued."""

    lookahead: int = 3
    min_score: float = 0.3


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """Expected nanoseconds saved by issuing ``guess`` now."""
    if guess.score < params.min_score:
        return 0.0
    hidden_ns = min(link.load_ns, link.window_ns - link.backlog_ns)
    if hidden_ns <= 0:
        return 0.0
    blocked_ns = link.chunk_ns * link.max_submitted
    return guess.score * hidden_ns - (1.0 - guess.score) * blocked_ns
