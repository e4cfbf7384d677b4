"""Belady on probabilities: the expert whose expected next use is farthest away leaves.

Uses fade by ``decay`` at each visit of the layer and give the probability f of a use at any visit, so the next one is
expected 1 / f visits away; a guess of probability p about a coming visit takes that share of the wait away. Without a
policy that looks at guesses the order is that of ``heat``.
"""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Experts, Now, power

SOURCE = "after the description of SeqMoE's eviction (farthest predicted next use); the estimate of f is ours"
WANTS_GUESSES = True


class Params(NamedTuple):
    """``decay``: what is left of a use one visit later."""

    decay: float = 0.95


def touch(params: Params, experts: Experts, x: int, tokens: int, now: Now) -> float:
    """The faded count, and one access more."""
    return experts.memory[x] * power(params.decay, now.layer_visits - experts.visits[x]) + 1.0


def score(params: Params, experts: Experts, x: int, now: Now) -> float:
    """Minus the visits until it is expected again."""
    heat = experts.memory[x] * power(params.decay, now.layer_visits - experts.visits[x])
    wait = 1.0 / ((1.0 - params.decay) * heat + 0.000001)
    if experts.guess_visit[x] > now.visit:
        wait = wait * (1.0 - experts.guess_score[x])
    return -wait
