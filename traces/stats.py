"""Figures of a trace: load balance, locality in time, differences between domains, recall, LRU hits.

Shape letters as in ``traces.trace``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from traces.trace import Ids, Trace
from traces.vocabulary import DECODE

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


class Balance(NamedTuple):
    """How evenly a layer's experts are used, each [L].

    ``busiest_share`` is the largest share of accesses (even: 1 / E), ``entropy`` that of the shares over log E
    (even: 1), ``unused`` counts experts never routed.
    """

    busiest_share: Floats
    entropy: Floats
    unused: Counts


class Repeat(NamedTuple):
    """Probability that an expert of a decode token was also used by the token before it, each [L].

    ``shuffled`` is what it would be with all decode tokens in random order, ``shuffled_within`` with each sequence's:
    exact means over all orders, from how often each expert is used.
    """

    in_order: Floats
    shuffled: Floats
    shuffled_within: Floats


def use(ids: Ids, num_experts: int) -> Counts:
    """Accesses of every expert, int64 [L, E], from ids [T, L, K]."""
    layers = ids.shape[1]
    cells = ids + np.arange(layers, dtype=np.int64)[:, None] * num_experts
    return np.bincount(cells.ravel(), minlength=layers * num_experts).reshape(layers, num_experts)


def balance(trace: Trace) -> Balance:
    """Load balance over all tokens, prefill and decode."""
    counts = use(trace.ids, trace.model.num_experts)
    shares = counts / counts.sum(axis=1, keepdims=True)
    most = np.log2(trace.model.num_experts)
    entropy = _entropy(shares) / most if most else np.ones(len(shares))
    return Balance(shares.max(axis=1), entropy, (counts == 0).sum(axis=1))


def repeat(trace: Trace) -> Repeat:
    """Locality in time; NaN where no sequence has two decode tokens."""
    layers, experts, top_k = trace.model.num_layers, trace.model.num_experts, trace.model.top_k
    rows, starts = _decode(trace)
    follows = np.setdiff1d(np.arange(len(rows)), starts)
    in_order = np.full(layers, np.nan)
    if not len(follows):
        return Repeat(in_order, in_order, in_order)
    for layer in range(layers):
        ids = trace.ids[rows, layer].astype(np.int64)
        used = np.zeros((len(rows), experts), bool)
        np.put_along_axis(used, ids, True, axis=1)
        in_order[layer] = np.take_along_axis(used[follows - 1], ids[follows], axis=1).mean()
    total = np.zeros((layers, experts), np.int64)
    met_within = np.zeros(layers)
    for begin, end in zip(starts, np.append(starts[1:], len(rows)), strict=True):
        counts = use(trace.ids[rows[begin:end]], experts)
        total += counts
        met_within += _met(counts, end - begin) / top_k
    return Repeat(in_order, _met(total, len(rows)) / (top_k * (len(rows) - 1)), met_within / len(follows))


def _met(counts: Counts, tokens: int) -> Floats:
    """Experts that two neighbours share, summed over the places of a sequence of ``tokens`` in random order, [L].

    Of tokens * (tokens - 1) ordered pairs, n * (n - 1) share an expert used n times; tokens - 1 of them are neighbours.
    """
    met: Floats = (counts * (counts - 1)).sum(axis=1) / tokens
    return met


def domain_divergence(trace: Trace) -> Floats | None:
    """Jensen-Shannon divergence between the domains' shares of expert use, in bits [L].

    All tokens, every domain weighted alike: the entropy of the mean shares less the mean of the entropies (Lin 1991);
    from 0 (alike) to log2 of the number of domains. None with fewer than two domains.
    """
    names = sorted(set(trace.domains))
    if len(names) < 2:
        return None
    domain = np.repeat([names.index(d) for d in trace.domains], trace.sequence_lengths)
    counts = np.stack([use(trace.ids[domain == i], trace.model.num_experts) for i in range(len(names))])
    shares = counts / counts.sum(axis=2, keepdims=True)
    divergence: Floats = _entropy(shares.mean(axis=0)) - _entropy(shares).mean(axis=0)
    return divergence


def recall(trace: Trace, predictor: str) -> Floats:
    """Share of routed experts among the first m guesses, float64 [D, L, M].

    Entry [d - 1, l, m - 1] is of the guesses made at layer l for layer l + d, over decode tokens; NaN where there is
    no target. With ``wrap``, a target past the last layer is the next token's, if its sequence has one.
    """
    table = trace.guesses[predictor]
    _, layers, distances, guesses = table.ids.shape
    rows = np.flatnonzero(trace.phase == DECODE)
    followed = np.setdiff1d(rows, trace.sequence_starts()[1:] - 1)
    result = np.full((distances, layers, guesses), np.nan)
    for distance in range(1, distances + 1):
        for layer in range(layers):
            next_token, target = divmod(layer + distance, layers)
            if next_token and not table.wrap:
                continue
            at = followed if next_token else rows
            if not len(at):
                continue
            guessed = table.ids[at, layer, distance - 1]
            routed = trace.ids[at + next_token, target]
            found = sum((guessed == routed[:, rank, None]).mean(axis=0) for rank in range(routed.shape[1]))
            result[distance - 1, layer] = np.cumsum(found) / routed.shape[1]
    return result


def lru_hits(trace: Trace, cold_sequences: bool = False) -> Counts:
    """Decode hits of one LRU cache per layer, int64 [L, E - K + 1]: entry [l, n] with K + n slots.

    A visit is one access to all its experts: none of them is a victim meanwhile, and recency afterwards is router
    order. So the contents with n slots are always the n most recent experts, and one pass counts the hits of every n
    (a stack algorithm: Mattson et al. 1970). Slots below top_k are left out: there a visit streams. Prefill neither
    counts nor changes the contents. ``cold_sequences`` empties the caches where a sequence starts.
    """
    layers, experts, top_k = trace.model.num_layers, trace.model.num_experts, trace.model.top_k
    rows, starts = _decode(trace)
    cold = set(starts.tolist()) if cold_sequences else set()
    cells = trace.ids[rows] + np.arange(layers, dtype=np.int64)[:, None] * experts
    never = -1
    last_use = np.full((layers, experts), never, np.int32)
    by_expert = last_use.reshape(-1)
    ranks = np.arange(top_k, dtype=np.int32)
    depths = np.empty((len(rows), layers, top_k), np.int32)
    for token, now in enumerate(cells):
        if token in cold:
            last_use.fill(never)
        before = by_expert[now]
        deeper = (last_use[:, None, :] > before[:, :, None]).sum(axis=2, dtype=np.int32)
        deeper[before == never] = experts
        depths[token] = deeper
        by_expert[now] = token * top_k + ranks
    return _hits_by_slots(depths, experts)[:, top_k - 1 :]


def _hits_by_slots(depths: npt.NDArray[np.int32], experts: int) -> Counts:
    """Hits with 1..E slots, [L, E], from the recency rank of every access [T, L, K] (E: never used before)."""
    layers = depths.shape[1]
    cells = depths + np.arange(layers)[:, None] * (experts + 1)
    found = np.bincount(cells.ravel(), minlength=layers * (experts + 1)).reshape(layers, experts + 1)
    return np.cumsum(found[:, :experts], axis=1)


def _decode(trace: Trace) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Rows of the decode tokens, and where among them each sequence that has some starts."""
    rows = np.flatnonzero(trace.phase == DECODE)
    sequence = np.searchsorted(trace.sequence_starts(), rows, side="right")
    return rows, np.flatnonzero(np.diff(sequence, prepend=-1))


def _entropy(shares: npt.NDArray[Any]) -> Floats:
    """Entropy in bits over the last axis."""
    logs = np.log2(shares, out=np.zeros(shares.shape), where=shares > 0)
    entropy: Floats = -(shares * logs).sum(axis=-1)
    return entropy
