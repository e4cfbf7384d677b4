"""Least recently used: the expert whose last routed access is longest ago leaves."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Resident

SOURCE = "the eviction rule of Mixtral-offloading (Eliseev and Mazur 2023), per layer"


class Params(NamedTuple):
    """No parameters."""


def score(params: Params, resident: Resident) -> float:
    """Higher is more recent."""
    return float(resident.last_use)
