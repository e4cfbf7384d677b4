"""Least frequently used: the expert with the fewest uses leaves, of equals the one last used longest ago."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Experts, Now

SOURCE = "the textbook rule in its three variants; MoE-Infinity (Xue et al. 2024) counts within a sequence"


class Params(NamedTuple):
    """``resident``: count accesses since the expert was loaded; else ``per_sequence``: tokens of the present sequence;
    else tokens of the whole run."""

    resident: bool = False
    per_sequence: bool = False


def score(params: Params, experts: Experts, x: int, now: Now) -> float:
    """Uses, then recency: exact below 2**21 uses and 2**31 accesses."""
    uses = experts.uses[x]
    if params.resident:
        uses = experts.uses_resident[x]
    elif params.per_sequence:
        uses = experts.uses_sequence[x]
    return 2147483648.0 * uses + experts.last_use[x]
