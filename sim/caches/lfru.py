"""Frequency over age: uses so far, divided by the visits of the layer since the last one; the lowest leaves."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Experts, Now

SOURCE = "a plain mix of frequency and recency; not the cache in two partitions that Bilal and Kang (2017) call LFRU"


class Params(NamedTuple):
    """``per_sequence``: uses within the present sequence, plus one, in place of the whole run's."""

    per_sequence: bool = False


def score(params: Params, experts: Experts, x: int, now: Now) -> float:
    """Uses per visit of age."""
    uses = experts.uses_sequence[x] + 1 if params.per_sequence else experts.uses[x]
    return uses / (now.layer_visits - experts.visits[x] + 1.0)
