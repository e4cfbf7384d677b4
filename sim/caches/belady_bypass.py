"""Belady with bypass: what is used again last leaves, or never enters. Needs the future: a reference."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Experts, Now

SOURCE = "Belady 1966; a missing expert passes through when it is used again later than the victim"
NEEDS_FUTURE = True


class Params(NamedTuple):
    """No parameters."""


def score(params: Params, experts: Experts, x: int, now: Now) -> float:
    """Higher is used again sooner."""
    return -float(experts.next_use[x])


def admit(params: Params, experts: Experts, x: int, victim: int, now: Now) -> bool:
    """Whether the missing expert is used again sooner than the victim."""
    return experts.next_use[x] < experts.next_use[victim]
