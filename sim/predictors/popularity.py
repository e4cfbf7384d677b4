"""The experts that were used most so far, layer by layer; the score is the share of tokens that used them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sim.predicting import before, chosen, pass_of, ranked, reach_of, repeated
from traces import GuessTable, Trace

SOURCE = "what static placement assumes (Fiddler); per sequence, the counts MoE-Infinity keeps of the present request"


class Params(NamedTuple):
    """``reach``: layers ahead; ``wrap``: past the last layer it speaks of the next token; ``guesses``: of one distance
    (0: twice top_k); ``per_sequence``: counts start again with every sequence; ``prior``: tokens by which equal use
    is believed at first."""

    reach: int = 8
    wrap: bool = False
    guesses: int = 0
    per_sequence: bool = False
    prior: float = 4.0


def table(params: Params, trace: Trace) -> GuessTable:
    """``guesses`` guesses for every distance."""
    layers, experts, top_k = trace.model.num_layers, trace.model.num_experts, trace.model.top_k
    guesses = min(experts, params.guesses if params.guesses > 0 else 2 * top_k)
    passes = pass_of(trace)
    groups = [np.arange(trace.num_tokens)]
    if params.per_sequence:
        groups = [trace.rows_of(sequence) for sequence in range(len(trace.sequence_lengths))]
    by_layer = []
    for layer in range(layers):
        used = chosen(trace.ids[:, layer], experts)
        scores = np.empty(used.shape)
        for rows in groups:
            tokens = before(passes[rows], np.ones(len(rows)))
            counts = before(passes[rows], used[rows])
            scores[rows] = (counts + params.prior * top_k / experts) / (tokens + params.prior)[:, None]
        by_layer.append(ranked(scores, guesses))
    return repeated(trace, reach_of(trace, params.reach), by_layer, by_layer if params.wrap else [])
