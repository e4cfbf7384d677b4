"""How often experts of a layer were followed by experts of a later one: the mean over the token's experts.

Counts grow as the trace is replayed; the share of the later expert among all tokens is believed at first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sim.predicting import before, blank, chosen, pass_of, ranked, reach_of
from traces import GuessTable, Trace

SOURCE = "the textbook first-order chain between layers; needs routing alone, no hidden state"


class Params(NamedTuple):
    """``reach``: layers ahead; ``guesses``: of one distance (0: twice top_k); ``prior``: tokens by which an expert's
    use regardless of the earlier layer is believed at first."""

    reach: int = 4
    guesses: int = 0
    prior: float = 4.0


def table(params: Params, trace: Trace) -> GuessTable:
    """``guesses`` guesses for every distance, best first; scores of all experts would sum to top_k."""
    layers, experts, top_k = trace.model.num_layers, trace.model.num_experts, trace.model.top_k
    guesses = min(experts, params.guesses if params.guesses > 0 else 2 * top_k)
    result = blank(trace, reach_of(trace, params.reach), guesses)
    passes = pass_of(trace)
    tokens = before(passes, np.ones(trace.num_tokens))[:, None]
    routed = [chosen(trace.ids[:, layer], experts) for layer in range(layers)]
    shares = [(before(passes, used) + top_k / experts) / (tokens + 1) for used in routed]
    for layer in range(layers - 1):
        rows_of = [np.flatnonzero(routed[layer][:, expert]) for expert in range(experts)]
        for distance in range(1, min(result.ids.shape[2], layers - 1 - layer) + 1):
            used, share = routed[layer + distance], shares[layer + distance]
            scores = np.zeros(used.shape)
            for rows in rows_of:
                seen = before(passes[rows], np.ones(len(rows)))[:, None]
                followed = before(passes[rows], used[rows])
                scores[rows] += (followed + params.prior * share[rows]) / (seen + params.prior) / top_k
            ids, best = ranked(np.minimum(scores, 1.0), guesses)
            result.ids[:, layer, distance - 1] = ids
            result.scores[:, layer, distance - 1] = best
    return result
