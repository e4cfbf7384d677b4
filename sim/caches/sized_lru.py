"""Least recently used in caches of different size: slots go to the layers where they save most loads.

Sizes are chosen by dynamic programming on the layers' LRU hit curves over the first ``share`` of the decode tokens;
this share is replayed too, so figures are a little flattered.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sim.plugin import Experts, Now
from traces import Trace
from traces.stats import lru_hits

SOURCE = "re-implementation from its description: AdapMoE (Zhong et al. 2024) sizes layers by dynamic programming"


class Params(NamedTuple):
    """``share``: part of the decode tokens whose hit curves are known."""

    share: float = 0.25


def sizes(params: Params, trace: Trace, slots: int) -> list[int]:
    """Slots of every layer, top_k to all experts each, slots * layers in all."""
    layers, least = trace.model.num_layers, trace.model.top_k
    decode = trace.num_decode_tokens
    curves = lru_hits(trace.head(max(1, int(params.share * decode))) if decode else trace)  # [L, E - K + 1]
    extra = (slots - least) * layers
    best = np.zeros(1, np.int64)  # most hits with that many slots beyond top_k in the layers so far
    choices = []
    for curve in curves:
        room = min(extra + 1, len(best) + len(curve) - 1)
        total = np.full(room, -1, np.int64)
        choice = np.zeros(room, np.int64)
        for more, hits in enumerate(curve.tolist()):
            end = min(room, more + len(best))
            found = best[: max(0, end - more)] + hits
            better = found > total[more:end]
            total[more:end][better] = found[better]
            choice[more:end][better] = more
        best = total
        choices.append(choice)
    result = []
    for choice in reversed(choices):
        more = int(choice[extra])
        result.append(least + more)
        extra -= more
    return result[::-1]


def score(params: Params, experts: Experts, x: int, now: Now) -> float:
    """Higher is more recent."""
    return float(experts.last_use[x])
