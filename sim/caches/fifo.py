"""First in, first out: the expert that was loaded longest ago leaves."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Experts, Now

SOURCE = "the textbook rule; a lower reference for rules that look at use"


class Params(NamedTuple):
    """No parameters."""


def score(params: Params, experts: Experts, x: int, now: Now) -> float:
    """Higher was loaded later."""
    return float(experts.loaded[x])
