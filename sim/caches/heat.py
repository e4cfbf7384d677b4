"""A use count that fades by a factor at each visit of the layer; the coldest expert leaves.

Between frequency (``decay`` near 1) and recency (near 0).
"""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Experts, Now, power

SOURCE = "LRFU (Lee et al. 2001) with time counted in visits of the layer"


class Params(NamedTuple):
    """``decay``: what is left of a use one visit later."""

    decay: float = 0.95


def touch(params: Params, experts: Experts, x: int, tokens: int, now: Now) -> float:
    """The faded count, and one access more."""
    return experts.memory[x] * power(params.decay, now.layer_visits - experts.visits[x]) + 1.0


def score(params: Params, experts: Experts, x: int, now: Now) -> float:
    """The count at its last access, faded since."""
    return experts.memory[x] * power(params.decay, now.layer_visits - experts.visits[x])
