"""What predictors share: counting over earlier passes, ranking, filling a table. Shape letters as in `traces.trace`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from traces import GuessTable, Trace
from traces.trace import Ids, id_dtype, padding, rank

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Ranked = tuple[Ids, npt.NDArray[np.float16]]


def pass_of(trace: Trace) -> Rows:
    """The forward pass of every row, counted from 0, [T]."""
    lengths = [forward.tokens for forward in trace.passes()]
    return np.repeat(np.arange(len(lengths)), lengths)


def before(passes: Rows, values: npt.NDArray[Any]) -> Floats:
    """Sums of ``values`` [N, ...] over all rows of earlier passes; ``passes`` [N] never falls."""
    sums = np.zeros((len(values) + 1, *values.shape[1:]))
    np.cumsum(values, axis=0, out=sums[1:])
    return sums[np.searchsorted(passes, passes)]


def chosen(ids: Ids, experts: int) -> Floats:
    """1 for the experts of a row, else 0: [N, E] from ids [N, K]."""
    result = np.zeros((len(ids), experts))
    np.put_along_axis(result, ids.astype(np.int64), 1.0, axis=1)
    return result


def ranked(scores: Floats, guesses: int) -> Ranked:
    """The best guesses of every row, ids and scores [N, M], from the scores of all experts [N, E]."""
    best = rank(scores[:, None, None], guesses, wrap=True)
    return best.ids[:, 0, 0], best.scores[:, 0, 0]


def blank(trace: Trace, reach: int, guesses: int, wrap: bool = False) -> GuessTable:
    """A table without guesses, padding throughout, ``reach`` at most the layers."""
    experts = trace.model.num_experts
    shape = (trace.num_tokens, trace.model.num_layers, reach, guesses)
    return GuessTable(np.full(shape, padding(experts), id_dtype(experts)), np.zeros(shape, np.float16), wrap)


def reach_of(trace: Trace, reach: int) -> int:
    """``reach`` within 1 to the layers."""
    return max(1, min(reach, trace.model.num_layers))


def repeated(trace: Trace, reach: int, now: list[Ranked], next_token: list[Ranked]) -> GuessTable:
    """Guesses that depend on the target layer alone, [L] of ids and scores [T, M]: about the same token, and about the
    next one (empty: the table does not wrap)."""
    layers = trace.model.num_layers
    table = blank(trace, reach, now[0][0].shape[1], bool(next_token))
    for layer in range(layers):
        for distance in range(1, reach + 1):
            if layer + distance < layers:
                ids, scores = now[layer + distance]
            elif next_token:
                ids, scores = next_token[layer + distance - layers]
            else:
                continue
            table.ids[:, layer, distance - 1] = ids
            table.scores[:, layer, distance - 1] = scores
    return table
