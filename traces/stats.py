"""Figures of a trace: load balance, locality in time, differences between domains, recall, hits of LRU and Belady.

Shape letters as in ``traces.trace``; P decode passes, W the most distinct experts of one of their visits (K where
sequences do not decode together).
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from traces.trace import Ids, Trace
from traces.vocabulary import DECODE

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Depths = npt.NDArray[np.int32]

REPLAYS: Final = ("visit", "access")
_NEVER: Final = 1 << 30  # a visit that never comes


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


class Reuse(NamedTuple):
    """How far back the expert of a decode access was last used, each [L]: the median and the 90th percentile.

    ``visits`` counts visits of the layer back to the one that last used the expert (1: the visit before);
    ``experts`` counts the distinct experts used more recently (the LRU stack distance of visit-atomic replay: a hit
    with more slots than that). Accesses never used before have no distance; ``first_share`` is their share.
    NaN where there is none to count.
    """

    visits_median: Floats
    visits_p90: Floats
    experts_median: Floats
    experts_p90: Floats
    first_share: Floats


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
    decode = trace.phase == DECODE
    following = trace.next_rows()
    before = np.flatnonzero(decode & (following >= 0))
    in_order = np.full(layers, np.nan)
    if not len(before):
        return Repeat(in_order, in_order, in_order)
    for layer in range(layers):
        used = np.zeros((len(before), experts), bool)
        np.put_along_axis(used, trace.ids[before, layer].astype(np.int64), True, axis=1)
        ids = trace.ids[following[before], layer].astype(np.int64)
        in_order[layer] = np.take_along_axis(used, ids, axis=1).mean()
    total = np.zeros((layers, experts), np.int64)
    met_within = np.zeros(layers)
    for sequence in range(len(trace.sequence_lengths)):
        rows = trace.rows_of(sequence)
        rows = rows[decode[rows]]
        if len(rows):
            counts = use(trace.ids[rows], experts)
            total += counts
            met_within += _met(counts, len(rows)) / top_k
    tokens = int(np.count_nonzero(decode))
    return Repeat(in_order, _met(total, tokens) / (top_k * (tokens - 1)), met_within / len(before))


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
    domain = np.empty(trace.num_tokens, np.int64)
    for sequence, name in enumerate(trace.domains):
        domain[trace.rows_of(sequence)] = names.index(name)
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
    following = trace.next_rows()
    followed = rows[following[rows] >= 0]
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
            routed = trace.ids[following[at] if next_token else at, target]
            found = sum((guessed == routed[:, rank, None]).mean(axis=0) for rank in range(routed.shape[1]))
            result[distance - 1, layer] = np.cumsum(found) / routed.shape[1]
    return result


def depths(trace: Trace, cold_sequences: bool = False, replay: str = "visit") -> Depths:
    """How many experts of its layer were used more recently than that of each decode access, int32.

    E stands for never used, -1 for no access. ``replay`` says what one access is:

    ``visit`` [P, L, W]: a visit is one access to all its distinct experts: none of them is a victim meanwhile, and
    recency afterwards is router order. ``access`` [T', L, K]: every expert of every decode token is an access of its
    own, in router order, and may be evicted for a later one of the same visit.

    Either way an LRU cache holds the most recent experts, so an access hits with more slots than its depth (a stack
    algorithm: Mattson et al. 1970). Prefill neither counts nor changes recency. ``cold_sequences`` forgets everything
    in a pass that starts a sequence.
    """
    layers, experts = trace.model.num_layers, trace.model.num_experts
    visits, cold = _decode_visits(trace)
    if replay == "access":
        passes = np.repeat(np.arange(len(cold)), [p.tokens for p in trace.passes() if p.phase == DECODE])
        cold = cold[passes] & (np.diff(passes, prepend=-1) > 0)
        visits = trace.ids[trace.phase == DECODE].astype(np.int64)
    width = visits.shape[2]
    cells = visits + np.arange(layers)[:, None] * (experts + 1)
    never = -1
    last_use = np.full((layers, experts + 1), never, np.int32)  # the last column is for no access
    by_expert = last_use.reshape(-1)
    ranks = np.arange(width, dtype=np.int32)
    result = np.empty(visits.shape, np.int32)
    for visit, now in enumerate(cells):
        if cold_sequences and cold[visit]:
            last_use.fill(never)
        before = by_expert[now]
        deeper = (last_use[:, None, :] > before[:, :, None]).sum(axis=2, dtype=np.int32)
        deeper[before == never] = experts
        result[visit] = deeper
        by_expert[now] = visit * width + ranks
        last_use[:, experts] = never
    result[visits == experts] = -1
    return _one_by_one(result) if replay == "access" else result


def _one_by_one(at_once: Depths) -> Depths:
    """Depths when the experts of a token are taken one after the other, from those when they are taken at once.

    Earlier ones have moved to the top; those that lay deeper before now stand above.
    """
    result = at_once.copy()
    for rank in range(1, at_once.shape[2]):
        passed = at_once[..., :rank] > at_once[..., rank, None]
        result[..., rank] += passed.sum(axis=2, dtype=np.int32)
    return result


def hits_by_slots(of: Depths, experts: int) -> Counts:
    """Hits of one LRU cache per layer with 1..E slots, int64 [L, E], from the depths of its accesses."""
    layers = of.shape[1]
    cells = np.where(of < 0, experts, of) + np.arange(layers)[:, None] * (experts + 1)
    found = np.bincount(cells.ravel(), minlength=layers * (experts + 1)).reshape(layers, experts + 1)
    return np.cumsum(found[:, :experts], axis=1)


def lru_hits(trace: Trace, cold_sequences: bool = False, replay: str = "visit") -> Counts:
    """Decode hits of one LRU cache per layer, int64 [L, E - K + 1]: entry [l, n] with K + n slots.

    Slots below top_k are left out: there a visit streams. Where sequences decode together, figures below W slots are
    not those of a cache that streams. The other arguments are those of ``depths``.
    """
    experts = trace.model.num_experts
    return hits_by_slots(depths(trace, cold_sequences, replay), experts)[:, trace.model.top_k - 1 :]


def belady_hits(trace: Trace, bypass: bool, cold_sequences: bool = False) -> Counts:
    """Decode hits of one cache per layer that knows the future, int64 [L, E]: entry [l, n] with n + 1 slots.

    Visit-atomic, from empty caches. Forced admission: every miss takes a slot, a free one or that of the expert
    outside the visit whose next use is farthest away (equal ones give the same hits); entries below W slots, where a
    visit does not fit, are 0. ``bypass``: a miss may pass without being inserted, so that after a visit the slots hold
    those experts, of the residents and the visit, whose next use comes first: the most hits any schedule of demand
    loads has (Belady 1966). Prefill and ``cold_sequences`` as in ``depths``.

    One pass for all slot counts, because contents with n slots are contained in those with n + 1 (the stack of
    Mattson et al. 1970): ``stack[l, i]`` is the next use of the expert that i + 1 slots hold and i do not. An expert
    that enters goes down the stack, changing places with every one that is used later. What is never used again
    counts as a free slot.
    """
    layers, experts = trace.model.num_layers, trace.model.num_experts
    upcoming, there = next_uses(trace, cold_sequences)
    width = upcoming.shape[2]
    first = np.where(there, -1, _NEVER)  # sooner than anything else: an expert of the visit
    stack = np.full((layers, experts), _NEVER, np.int32)
    pushed = np.empty((layers, experts + 1), np.int32)
    hits = np.zeros((layers, experts), np.int64)
    for visit, soonest in enumerate(upcoming):
        found = stack == visit
        hits += found
        stack[found] = _NEVER
        entering = soonest if bypass else first[visit]
        for rank in range(width):
            pushed[:, 0] = entering[:, rank]
            np.maximum.accumulate(stack, axis=1, out=pushed[:, 1:])
            np.maximum(pushed[:, 1:], pushed[:, :1], out=pushed[:, 1:])
            np.minimum(stack, pushed[:, :-1], out=stack)
        if not bypass:
            np.copyto(stack[:, :width], soonest, where=there[visit])
    hits = np.cumsum(hits, axis=1)
    if not bypass:
        hits[:, : width - 1] = 0
    return hits


def next_uses(trace: Trace, cold_sequences: bool = False) -> tuple[Depths, npt.NDArray[np.bool_]]:
    """For every decode access the decode pass that next uses its expert, and whether it is one, both [P, L, W].

    Passes count from 0 over all decode passes, 2**30 if none does; with ``cold_sequences`` none does from the next
    pass on that starts a sequence.
    """
    experts = trace.model.num_experts
    visits, cold = _decode_visits(trace)
    passes, layers, width = visits.shape
    result = np.full(visits.shape, _NEVER, np.int32)
    for layer in range(layers):
        ids = visits[:, layer].astype(np.uint16).ravel()
        order = np.argsort(ids, kind="stable")
        same = (ids[order[1:]] == ids[order[:-1]]) & (ids[order[1:]] < experts)
        visit, rank = np.divmod(order, width)
        result[visit[:-1][same], layer, rank[:-1][same]] = visit[1:][same]
    if cold_sequences:
        starts = np.append(np.flatnonzero(cold), passes)
        end = starts[np.searchsorted(starts, np.arange(passes), side="right")]
        result[result >= end[:, None, None]] = _NEVER
    return result, visits < experts


def reuse(trace: Trace, of: Depths, cold_sequences: bool = False) -> Reuse:
    """Reuse distances of decode accesses; ``of`` are their visit-atomic ``depths`` with the same ``cold_sequences``."""
    experts = trace.model.num_experts
    upcoming, _ = next_uses(trace, cold_sequences)
    gaps = upcoming - np.arange(len(upcoming), dtype=np.int32)[:, None, None]
    columns = np.full((5, trace.model.num_layers), np.nan)
    for layer in range(trace.model.num_layers):
        depth = of[:, layer][of[:, layer] >= 0]
        columns[:2, layer] = _quantiles(gaps[:, layer][upcoming[:, layer] < _NEVER])
        columns[2:4, layer] = _quantiles(depth[depth < experts])
        columns[4, layer] = (depth == experts).mean() if len(depth) else np.nan
    return Reuse(*columns)


def _quantiles(values: npt.NDArray[np.int32]) -> list[float]:
    """The smallest values that half, and nine tenths, do not exceed."""
    if not len(values):
        return [np.nan, np.nan]
    found: list[float] = np.quantile(values, [0.5, 0.9], method="inverted_cdf").tolist()
    return found


def _decode_visits(trace: Trace) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Distinct experts of every decode visit in router order, filled up with E, [P, L, W]; and whether a sequence has
    started since the decode pass before, [P]."""
    layers, experts, top_k = trace.model.num_layers, trace.model.num_experts, trace.model.top_k
    passes = trace.passes()
    decode = [p for p in passes if p.phase == DECODE]
    opened = np.cumsum([p.opens for p in passes])[[p.phase == DECODE for p in passes]]
    cold = np.diff(opened, prepend=0) > 0
    tokens = np.array([p.tokens for p in decode], np.int64)
    if not len(decode) or tokens.max() == 1:
        return trace.ids[trace.phase == DECODE].astype(np.int64), cold
    first = np.array([p.first for p in decode])
    visits = np.full((len(decode), layers, min(experts, int(tokens.max()) * top_k)), experts, np.int64)
    for count in np.unique(tokens).tolist():
        which = np.flatnonzero(tokens == count)
        ids = trace.ids[first[which, None] + np.arange(count)].astype(np.int64)  # [passes, tokens, L, K]
        ids = ids.transpose(0, 2, 1, 3).reshape(len(which), layers, count * top_k)
        for rank in range(count * top_k - 1, 0, -1):
            again = (ids[..., :rank] == ids[..., rank, None]).any(axis=-1)
            ids[..., rank][again] = experts
        order = np.argsort(ids == experts, axis=-1, kind="stable")[..., : visits.shape[2]]
        visits[which, :, : order.shape[2]] = np.take_along_axis(ids, order, axis=-1)
    return visits[..., : int((visits < experts).sum(axis=-1).max())], cold


def _entropy(shares: npt.NDArray[Any]) -> Floats:
    """Entropy in bits over the last axis."""
    logs = np.log2(shares, out=np.zeros(shares.shape), where=shares > 0)
    entropy: Floats = -(shares * logs).sum(axis=-1)
    return entropy
