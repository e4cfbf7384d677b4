"""Least recently used: the expert whose last routed access is longest ago leaves."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Experts, Now

SOURCE = "the eviction rule of Mixtral-offloading (Eliseev and Mazur 2023), per layer"


class Params(NamedTuple):
    """No parameters."""


def score(params: Params, experts: Experts, x: int, now: Now) -> float:
    """Higher is more recent."""
    return float(experts.last_use[x])
