"""Uses within the sequence plus faded uses: the coldest expert leaves, and a newcomer must be warmer than the victim.

Within a sequence the frequency of an expert hardly moves, so it says most; faded uses say the rest and carry over to
the next sequence. A missing expert that is colder passes through: its load costs the same, and the warmer one stays.
"""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Experts, Now, power

SOURCE = "ours: the best of the rules without the future tried on the shipped trace"


class Params(NamedTuple):
    """``decay``: what is left of a use one visit of the layer later; ``weight``: of the faded uses against those within
    the sequence; ``newcomer``: what being routed now adds to a missing expert."""

    decay: float = 0.93
    weight: float = 2.0
    newcomer: float = 6.0


def touch(params: Params, experts: Experts, x: int, tokens: int, now: Now) -> float:
    """The faded uses, and one more."""
    return experts.memory[x] * power(params.decay, now.layer_visits - experts.visits[x]) + 1.0


def score(params: Params, experts: Experts, x: int, now: Now) -> float:
    """Warmer is higher."""
    faded = experts.memory[x] * power(params.decay, now.layer_visits - experts.visits[x])
    return experts.uses_sequence[x] + params.weight * faded


def admit(params: Params, experts: Experts, x: int, victim: int, now: Now) -> bool:
    """Whether the missing expert is warmer."""
    own = experts.memory[x] * power(params.decay, now.layer_visits - experts.visits[x])
    other = experts.memory[victim] * power(params.decay, now.layer_visits - experts.visits[victim])
    warmer = experts.uses_sequence[x] - experts.uses_sequence[victim] + params.weight * (own - other)
    return warmer + params.newcomer > 0.0
