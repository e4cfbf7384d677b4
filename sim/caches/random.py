"""Any expert leaves: a hash of the seed, the moment and the expert decides."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Experts, Now, hashed

SOURCE = "the textbook rule; a lower reference for every other"


class Params(NamedTuple):
    """``seed``: another one, other victims."""

    seed: int = 0


def score(params: Params, experts: Experts, x: int, now: Now) -> float:
    """A number in [0, 1)."""
    return hashed(params.seed, now.accesses, x)
