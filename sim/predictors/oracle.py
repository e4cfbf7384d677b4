"""The true routing of the next layers of the same token, with probability 1. Needs the future: a reference."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from traces import GuessTable, Trace
from traces.trace import padding

SOURCE = "bound on any predictor"
NEEDS_FUTURE = True


class Params(NamedTuple):
    """``reach``: how many layers ahead it speaks."""

    reach: int = 8


def table(params: Params, trace: Trace) -> GuessTable:
    """Routed experts of layers + 1 ... + reach by id, since their scores are equal."""
    tokens, layers, top_k = trace.ids.shape
    reach = max(1, min(params.reach, layers))
    ids = np.full((tokens, layers, reach, top_k), padding(trace.model.num_experts), trace.ids.dtype)
    scores = np.zeros(ids.shape, np.float16)
    for distance in range(1, min(reach, layers - 1) + 1):
        ids[:, :-distance, distance - 1] = np.sort(trace.ids[:, distance:], axis=-1)
        scores[:, :-distance, distance - 1] = 1
    return GuessTable(ids, scores)
