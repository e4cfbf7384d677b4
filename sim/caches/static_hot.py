"""The most used experts of an earlier part of the trace stay for good; the others pass through.

Fitted on the first ``share`` of the decode tokens and what comes before them; this share is replayed too, so figures
are a little flattered.
"""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Experts, Now
from traces import Trace
from traces.stats import use

SOURCE = "re-implementation from its description: Fiddler (Kamahori et al. 2024) places experts by popularity, once"


class Params(NamedTuple):
    """``share``: part of the decode tokens whose use is counted."""

    share: float = 0.25


def fit(params: Params, trace: Trace) -> list[float]:
    """Tokens routed to every x within the share."""
    decode = trace.num_decode_tokens
    known = trace.head(max(1, int(params.share * decode))) if decode else trace
    counts: list[float] = use(known.ids, trace.model.num_experts).astype(float).ravel().tolist()
    return counts


def score(params: Params, experts: Experts, x: int, now: Now) -> float:
    """Hotter is higher."""
    return experts.table[x]


def admit(params: Params, experts: Experts, x: int, victim: int, now: Now) -> bool:
    """Only what is hotter replaces."""
    return experts.table[x] > experts.table[victim]
