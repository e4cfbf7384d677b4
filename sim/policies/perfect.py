"""Prefetch every guess that is certain, nearest layer first: with the oracle, what perfect lookahead is worth.

A guess is issued when the whole or part of its copy can be done before its routing is known; nothing is weighed.
"""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = "the reference `perfect lookahead` of every result"
OPTIONS = {"landing_slots": 2}


class Params(NamedTuple):
    """``lookahead``: layers ahead."""

    lookahead: int = 3


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """The part of the copy that can be hidden, in nanoseconds."""
    hidden_ns = min(link.load_ns, link.window_ns - link.backlog_ns)
    return guess.score * max(0, hidden_ns)
