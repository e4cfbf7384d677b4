"""The host computes every miss from its own copy; no demand load is issued once all slots are filled."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Misses

SOURCE = "re-implementation from its description: Fiddler (Kamahori et al. 2024), which computes misses on the CPU"


class Params(NamedTuple):
    """No parameters."""


def loads(params: Params, misses: Misses) -> int:
    """None."""
    return 0
