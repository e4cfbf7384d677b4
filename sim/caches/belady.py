"""Belady with forced admission: the expert whose next use is farthest away leaves. Needs the future: a reference."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Experts, Now

SOURCE = "Belady 1966; every miss is admitted"
NEEDS_FUTURE = True


class Params(NamedTuple):
    """No parameters."""


def score(params: Params, experts: Experts, x: int, now: Now) -> float:
    """Higher is used again sooner."""
    return -float(experts.next_use[x])
