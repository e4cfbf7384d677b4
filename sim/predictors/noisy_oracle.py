"""The true routing with mistakes: each expert is known with probability ``recall``, else another is named in its place.

Needs the future: for traces without guesses, and for curves over recall. The score of every guess is the recall of its
distance. A higher recall knows what a lower one knows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sim.predicting import blank, chosen, ranked, reach_of
from traces import GuessTable, Trace

SOURCE = "sensitivity curves; a guess is right or wrong independently of all others, unlike a real predictor's"
NEEDS_FUTURE = True


class Params(NamedTuple):
    """``recall``: of the next layer; ``step``: less for each layer farther; ``reach``: layers ahead; ``seed``."""

    recall: float = 0.9
    step: float = 0.05
    reach: int = 8
    seed: int = 0


def table(params: Params, trace: Trace) -> GuessTable:
    """top_k guesses for every distance; where no other expert is left to name, the right one is named."""
    layers, experts, top_k = trace.model.num_layers, trace.model.num_experts, trace.model.top_k
    result = blank(trace, reach_of(trace, params.reach), top_k)
    for distance in range(1, result.ids.shape[2] + 1):
        recall = min(1.0, max(0.0, params.recall - params.step * (distance - 1)))
        for layer in range(layers - distance):
            noise = _noise((params.seed, layer, distance), trace.num_tokens, experts)
            routed = chosen(trace.ids[:, layer + distance], experts)
            known = 2 * (noise < recall) * routed
            ids, _ = ranked(known + (1 - routed) + noise / 4, top_k)
            sure = np.full(ids.shape, recall, np.float16)
            result.ids[:, layer, distance - 1] = np.sort(ids, axis=1)
            result.scores[:, layer, distance - 1] = sure
    return result


def _noise(key: tuple[int, int, int], rows: int, experts: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) by row and expert, [rows, E], a hash of these and ``key``."""
    values = np.zeros((rows, experts), np.uint64)
    parts = [np.array(part % 2**32, np.uint64) for part in key]
    parts += [np.arange(rows, dtype=np.uint64)[:, None], np.arange(experts, dtype=np.uint64)]
    for part in parts:  # splitmix64 (Steele et al. 2014)
        values = (values ^ part) + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        values = values ^ (values >> np.uint64(31))
    return (values >> np.uint64(11)) / 9007199254740992.0
