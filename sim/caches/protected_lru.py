"""Least recently used, but experts guessed for a coming visit leave last.

It differs from ``lru`` where a victim is sought between guess and routing: prefetches without landing slots, guesses
that reach the next token. Without a policy that looks at guesses it is ``lru``.
"""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Experts, Now

SOURCE = "re-implementation from its description: HOBBIT (Tang et al. 2024) protects predicted experts from eviction"
WANTS_GUESSES = True


class Params(NamedTuple):
    """``min_score``: probability from which a guess protects."""

    min_score: float = 0.3


def score(params: Params, experts: Experts, x: int, now: Now) -> float:
    """Recency; 2**50 more while a coming visit is likely to route it."""
    recency = float(experts.last_use[x])
    if experts.guess_visit[x] > now.visit and experts.guess_score[x] >= params.min_score:
        return recency + 1125899906842624.0
    return recency
