"""The compiled driver's loop: passes, visits and what is counted of them, over the arrays of one trace.

Written to be compiled (`sim.compiled`) and never run as it stands; arrays are flat. P passes, T rows, L layers, K
routed experts of a row, D lookahead distances, M guesses.
"""

from __future__ import annotations

from typing import Any

from sim import clock, guard, wire
from sim.decide import Rules
from sim.state import (
    CLAIM_HITS,
    CLAIMS,
    COOLED,
    DEMANDED,
    HOST_BUSY,
    HOSTED,
    LOOKING,
    NOW,
    PREFETCHES,
    RESIDENT,
    RETRACTS,
    SERIAL_COPIES,
    SERIAL_HOST,
    STALL_LATE,
    STALL_MISS,
    STREAMED,
    WASTED,
    Config,
    State,
    Times,
    Wire,
)

Array = Any

# rows of the counts, in the order of `sim.ledger.Counts`
(
    PASSES_DONE,
    TOKENS,
    ELAPSED,
    ACCESSES_SEEN,
    TOKEN_ACCESSES,
    HITS,
    LATE,
    MISSES,
    HOST_COMPUTED,
    DEMAND_LOADS,
    PREFETCH_LOADS,
    PREFETCH_USED,
    RETRACTED,
    H2D_BYTES,
    WASTED_BYTES,
    STALLED_MISS,
    STALLED_LATE,
    COMPUTE,
    LATENCY,
    LINK_BUSY,
    HOST_COMPUTING,
    TOTAL_COUNTS,
) = range(22)

LOG_DEMAND, LOG_PREFETCH, LOG_RETRACT, LOG_STREAM = 0, 1, 2, 3


def run(
    s: State,
    w: Wire,
    c: Config,
    t: Times,
    o: State,
    ow: Wire,
    oc: Config,
    ot: Times,
    rules: Rules,
    ids: Array,
    pass_rows: Array,
    pass_tokens: Array,
    pass_decode: Array,
    pass_opens: Array,
    pass_guesses: Array,
    guess_ids: Array,
    guess_scores: Array,
    distances: int,
    guesses: int,
    no_guess: int,
    wraps: bool,
    dense_ns: Array,
    head_ns: Array,
    following: Array,
    knows_future: bool,
    whole_layer: bool,
    cold: bool,
    first_pass: int,
    last_pass: int,
    access: int,
    counts: Array,
    lengths: Array,
    log: Array,
    logs: bool,
    seen: Array,
) -> tuple[int, int]:
    """Passes ``first_pass`` up to ``last_pass``; s, w, c, t the run's, o, ow, oc, ot the guard's shadow.

    ``ids`` [T, L, K]; ``pass_*`` [P]: first row, tokens, decode, opens a sequence, row of the guess table;
    ``guess_*`` [rows, L, D, M] with D ``distances`` and M ``guesses``, ``no_guess`` marks none; ``dense_ns``,
    ``head_ns`` [P]; ``following`` by access; ``access``: accesses before. Fills ``counts`` [2, TOTAL_COUNTS],
    ``lengths`` [P] and, if it ``logs``, ``log`` [lines, 5]; ``seen`` [E] is scratch. Returns accesses and log lines.
    """
    lines = 0
    layers = c.layers
    for p in range(first_pass, last_pass):
        decode = pass_decode[p] > 0
        tokens = pass_tokens[p]
        k = TOTAL_COUNTS if decode else 0
        start = s.n[NOW]
        busy = 0
        on_host = w.i[HOST_BUSY]
        if c.copy_stream:
            wire.advance(w, t, start)
            busy = wire.busy_so_far_ns(w)
        for layer in range(layers):
            index = p * layers + layer
            used = enter(s, c, ids, pass_rows[p], tokens, layer, seen)
            routed = used
            if whole_layer:
                routed = enter_rest(s, c, used)
            if knows_future:
                for i in range(used):
                    s.following[i] = following[access + i]
            access += used
            if c.guard:
                share(s, o, routed)
            looks = decode and s.n[LOOKING] > 0
            if looks:
                row = pass_guesses[p] * layers + layer
                enter_guesses(s, c, guess_ids, guess_scores, row, layer, distances, guesses, no_guess, wraps)
            head = head_ns[p] if layer == layers - 1 else 0
            opens = pass_opens[p] > 0 and layer == 0
            clock.visit(s, w, c, t, rules, index, layer, decode, opens, cold, routed, used, dense_ns[p], head)
            count(s, c, t, counts, k, routed, used)
            counts[k + COMPUTE] += dense_ns[p] + t.longer_ns + t.shared_ns + (t.gates_ns if looks else 0)
            counts[k + LATENCY] += t.sync_ns + t.host_ns
            if logs:
                lines = write_log(s, c, log, lines, index, layer, routed)
            if c.guard:
                clock.visit(o, ow, oc, ot, rules, index, layer, decode, opens, cold, routed, used, dense_ns[p], head)
        if c.guard:
            guard.end_pass(s, c, decode, o.n[NOW], t.load_ns)
        elapsed = s.n[NOW] - start
        lengths[p] = elapsed
        counts[k + HOST_COMPUTING] += w.i[HOST_BUSY] - on_host
        counts[k + PASSES_DONE] += 1
        counts[k + TOKENS] += tokens
        counts[k + ELAPSED] += elapsed
        counts[k + COMPUTE] += head_ns[p]
        if c.copy_stream:
            wire.advance(w, t, s.n[NOW])
            counts[k + LINK_BUSY] += wire.busy_so_far_ns(w) - busy
    return access, lines


def share(s: State, o: State, routed: int) -> None:
    """The shadow gets the same visit."""
    for i in range(routed):
        o.routed[i] = s.routed[i]
        o.counts[i] = s.counts[i]
        o.following[i] = s.following[i]


def step(
    s: State,
    w: Wire,
    c: Config,
    t: Times,
    o: State,
    ow: Wire,
    oc: Config,
    ot: Times,
    rules: Rules,
    index: int,
    layer: int,
    decode: bool,
    opens: bool,
    cold: bool,
    routed: int,
    used: int,
    dense_ns: int,
    head_ns: int,
) -> None:
    """One visit that stands in the input tables, as `run` does it; for a planner that is asked visit by visit."""
    if c.guard:
        share(s, o, routed)
    clock.visit(s, w, c, t, rules, index, layer, decode, opens, cold, routed, used, dense_ns, head_ns)
    if c.guard:
        clock.visit(o, ow, oc, ot, rules, index, layer, decode, opens, cold, routed, used, dense_ns, head_ns)
        if layer == c.layers - 1:
            guard.end_pass(s, c, decode, o.n[NOW], t.load_ns)


def enter(s: State, c: Config, ids: Array, row: int, tokens: int, layer: int, seen: Array) -> int:
    """The routed experts of a visit in router order, and the tokens of each; returns how many there are."""
    top_k = c.top_k
    first = (row * c.layers + layer) * top_k
    if tokens == 1:
        for i in range(top_k):
            s.routed[i] = ids[first + i]
            s.counts[i] = 1
        return top_k
    used = 0
    for expert in range(c.experts):
        seen[expert] = -1
    for token in range(tokens):
        for i in range(top_k):
            expert = ids[first + token * c.layers * top_k + i]
            if seen[expert] < 0:
                seen[expert] = used
                s.routed[used] = expert
                s.counts[used] = 0
                used += 1
            s.counts[seen[expert]] += 1
    return used


def enter_rest(s: State, c: Config, used: int) -> int:
    """The other experts of the layer, by id, with no tokens; returns how many take part in all."""
    routed = used
    for expert in range(c.experts):
        known = False
        for i in range(used):
            known = known or s.routed[i] == expert
        if not known:
            s.routed[routed] = expert
            s.counts[routed] = 0
            routed += 1
    return routed


def enter_guesses(
    s: State,
    c: Config,
    guess_ids: Array,
    guess_scores: Array,
    row: int,
    layer: int,
    distances: int,
    guesses: int,
    no_guess: int,
    wraps: bool,
) -> None:
    """This visit's guesses into the state's input tables."""
    for d in range(c.lookahead):
        length = 0
        if d < distances and (wraps or layer + d + 1 < c.layers):
            first = (row * distances + d) * guesses
            for rank in range(guesses):
                expert = guess_ids[first + rank]
                if expert == no_guess:
                    break
                s.offer_id[d * c.max_guesses + rank] = expert
                s.offer_score[d * c.max_guesses + rank] = guess_scores[first + rank]
                length += 1
        s.offer_len[d] = length


def count(s: State, c: Config, t: Times, counts: Array, k: int, routed: int, used: int) -> None:
    """Add the visit just planned to the counts of its phase, which begin at ``k``."""
    n = s.n
    demand = 0
    hosted = 0
    resident = 0
    tokens = 0
    for i in range(routed):
        fate = s.fate[i]
        if fate in (DEMANDED, STREAMED):
            demand += 1
        elif fate == RESIDENT and i < used:
            resident += 1
        elif fate == HOSTED:
            hosted += 1
        if fate != HOSTED:
            counts[k + COMPUTE] += t.expert_ns[s.counts[i]]
        tokens += s.counts[i]
    counts[k + ACCESSES_SEEN] += used
    counts[k + TOKEN_ACCESSES] += tokens
    counts[k + HITS] += resident + n[CLAIM_HITS]
    counts[k + LATE] += n[CLAIMS] - n[CLAIM_HITS]
    counts[k + MISSES] += used - resident - n[CLAIMS]
    counts[k + HOST_COMPUTED] += hosted
    counts[k + DEMAND_LOADS] += demand
    counts[k + PREFETCH_LOADS] += n[PREFETCHES]
    counts[k + PREFETCH_USED] += n[CLAIMS]
    counts[k + RETRACTED] += n[RETRACTS]
    counts[k + H2D_BYTES] += (demand + n[CLAIMS]) * t.expert_bytes + n[WASTED]
    counts[k + WASTED_BYTES] += n[WASTED]
    counts[k + COMPUTE] += n[COOLED]
    counts[k + STALLED_MISS] += n[STALL_MISS]
    counts[k + STALLED_LATE] += n[STALL_LATE]
    counts[k + LINK_BUSY] += n[SERIAL_COPIES] * t.load_ns
    counts[k + HOST_COMPUTING] += n[SERIAL_HOST]


def write_log(s: State, c: Config, log: Array, lines: int, index: int, layer: int, routed: int) -> int:
    """One row for every load of the visit: kind, visit, layer * experts + expert, slot, evicted x or -1."""
    base = layer * c.experts
    for k in range(s.n[RETRACTS]):
        lines = write_row(log, lines, LOG_RETRACT, index, s.retract_x[k], s.retract_slot[k], -1)
    for i in range(routed):
        if s.fate[i] == DEMANDED:
            lines = write_row(log, lines, LOG_DEMAND, index, base + s.routed[i], s.slot[i], s.evicted[i])
    for i in range(routed):
        if s.fate[i] == STREAMED:
            lines = write_row(log, lines, LOG_STREAM, index, base + s.routed[i], s.slot[i], -1)
    for k in range(s.n[PREFETCHES]):
        x = s.prefetch_x[k]
        lines = write_row(log, lines, LOG_PREFETCH, index, x, s.early_slot[x], s.prefetch_evicted[k])
    return lines


def write_row(log: Array, lines: int, kind: int, index: int, x: int, slot: int, evicted: int) -> int:
    """One row; returns the rows written so far."""
    first = lines * 5
    log[first] = kind
    log[first + 1] = index
    log[first + 2] = x
    log[first + 3] = slot
    log[first + 4] = evicted
    return lines + 1


def unused_bytes(s: State, w: Wire, c: Config, t: Times) -> int:
    """Bytes copied for early loads that are still waiting for their use."""
    moved = 0
    for x in range(c.layers * c.experts):
        if s.early[x]:
            moved += wire.bytes_submitted(w, t, s.early_copy[x]) if c.copy_stream else t.expert_bytes
    return moved
