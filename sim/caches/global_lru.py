"""Least recently used over one pool of slots for all layers.

A token visits the layers in a ring, the worst order for this rule: with (layers - 1) * top_k slots or fewer an expert
has left before its layer comes again, so batch-1 decode never hits.
"""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Experts, Now

SOURCE = "the textbook rule; what a single cache shared by all layers does if nobody thinks about it"
POOLED = True


class Params(NamedTuple):
    """No parameters."""


def score(params: Params, experts: Experts, x: int, now: Now) -> float:
    """Higher is more recent."""
    return float(experts.last_use[x])
