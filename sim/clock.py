"""One visit from its routing to its end: decisions, and their times on the planner's virtual link clock.

The clock is the SimPy driver's timeline by arithmetic alone: the same rules, the same integer nanoseconds. It advances
by the profile, so every driver sees the same plans.
"""

from __future__ import annotations

from sim import decide, wire
from sim.decide import Rules
from sim.plugin import Misses
from sim.state import (
    ACTIVE,
    APPETITE,
    CLAIM_HITS,
    CLAIMED,
    CLAIMS,
    COOLED,
    DEMANDED,
    DISPLACED,
    EARLY_LEN,
    EFFECTS,
    HANDED,
    HOST_END,
    HOST_NEXT,
    HOSTED,
    LENT,
    LIMIT,
    LINK_NOW,
    LOOKING,
    NEVER,
    NOW,
    PLANNED,
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


def visit(
    s: State,
    w: Wire,
    c: Config,
    t: Times,
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
    """Plan one visit, whose experts, tokens and guesses stand in the state's input tables, and let its time pass.

    ``routed`` experts take part, the first ``used`` of them were routed (fewer only where whole layers are loaded).
    ``opens``: a sequence starts; ``cold``: and the caches are emptied. ``head_ns``: after the last layer, else 0.
    """
    n = s.n
    looking = decode and n[LOOKING] > 0
    decide.begin_plan(s, c, index, layer, opens and cold)
    decide.mark(s, c, index, layer, routed, used)
    if opens:
        decide.forget_sequence(s, c)
    if c.trust:
        decide.score_guesses(s, c, index, layer)
    if s.pending_count[layer]:
        decide.judge(s, c, index, layer)
    if c.lends:
        if n[ACTIVE] == 0:
            if n[LENT] < n[LIMIT]:
                decide.lend(s, c)
        elif n[LENT]:
            decide.reclaim(s, c, rules, index)
    n[PLANNED] = n[NOW] + dense_ns + t.longer_ns + t.sync_ns + t.host_ns + (t.gates_ns if looking else 0)
    n[EFFECTS] = n[PLANNED] + t.wake_ns
    if c.clock and c.copy_stream:
        wire.advance(w, t, n[EFFECTS])
    loads = routed
    if c.has_rule:
        loads = loads_of_misses(s, w, c, t, rules, layer, routed, used)
    decide.place(s, c, rules, index, layer, routed, loads)
    if n[CLAIMS] > 1:
        decide.sort_claims(s, layer * c.experts)
    decide.remember(s, c, rules, index, layer, used)
    if c.clock and c.copy_stream:
        hand_over(s, w, c, t, layer, index, routed)
    if looking:
        decide.note_guesses(s, c, index, layer)
        look_ahead(s, w, c, t, rules, index, layer)
    if c.clock:
        if c.copy_stream:
            begin_early(s, w, c, t)
            n[NOW] = compute(s, w, c, t, layer, index, routed) + head_ns
        else:
            n[NOW] = serial(s, c, t, routed) + head_ns


def loads_of_misses(s: State, w: Wire, c: Config, t: Times, rules: Rules, layer: int, routed: int, used: int) -> int:
    """How many of the visit's misses are loaded; the host computes the others."""
    number, filling = decide.missing(s, c, layer, routed)
    if number == 0:
        return 0
    tokens = 0
    for i in range(used):
        tokens += s.counts[i]
    each = max(1, tokens // used)
    misses = Misses(
        number,
        filling,
        wire.backlog_ns(w, t),
        t.load_ns,
        t.expert_ns[each],
        t.host_expert_ns[each],
        t.host_shared_ns[each],
    )
    return decide.loads_for(rules, misses)


def hand_over(s: State, w: Wire, c: Config, t: Times, layer: int, index: int, routed: int) -> None:
    """The plan's effects on the link: retractions, joins, victims written back, demand loads, work for the host."""
    n = s.n
    base = layer * c.experts
    for k in range(n[RETRACTS]):
        n[WASTED] += wire.retract(w, t, s.retract_copy[k])
    n[HANDED] = n[RETRACTS]
    for k in range(n[CLAIMS]):
        wire.join(w, s.early_copy[base + s.routed[s.claims[k]]])
    if c.write_back:
        for k in range(n[DISPLACED]):
            wire.write_back(w, t, s.displaced[k])
        for i in range(routed):
            if s.evicted[i] >= 0 and s.fate[i] == DEMANDED:
                wire.write_back(w, t, s.slot[i])
    for i in range(routed):
        if s.fate[i] == DEMANDED:
            s.copies[i] = wire.new_copy(w, t, s.slot[i], index, 0.0, s.number[i])
            wire.demand(w, s.copies[i])
    at_once = 0
    for i in range(routed):
        if s.fate[i] == STREAMED and at_once < c.stream_slots:
            s.copies[i] = wire.new_copy(w, t, s.slot[i], index, 0.0, s.number[i])
            wire.demand(w, s.copies[i])
            at_once += 1
    for i in range(routed):
        if s.fate[i] == HOSTED:
            wire.host_expert(w, s.counts[i])


def look_ahead(s: State, w: Wire, c: Config, t: Times, rules: Rules, index: int, layer: int) -> None:
    """Value this visit's guesses on the virtual link, and issue what is worth it."""
    n = s.n
    this_visit = c.top_k * t.expert_ns[1]
    demand_ns = wire.backlog_ns(w, t)
    stalled = max(demand_ns + t.expert_ns[1] if demand_ns else 0, this_visit) - this_visit
    s.ahead[0] = demand_ns
    for d in range(1, c.lookahead + 1):
        s.ahead[d] = demand_ns
        s.window[d] = stalled + t.plain_ns * d if c.copy_stream else 0
    for k in range(w.i[EARLY_LEN]):
        copy = w.early[k]
        ns = (w.unsubmitted[copy] - 1) * t.full_ns + t.last_ns
        s.ahead[0] += ns
        for d in range(max(1, w.target[copy] - index), c.lookahead + 1):
            s.ahead[d] += ns
    if n[ACTIVE]:
        decide.issue_prefetches(s, c, rules, index, layer, t.load_ns, t.full_ns, t.max_submitted)
    else:
        found = decide.wanted(s, c, rules, layer, t.load_ns, t.full_ns, t.max_submitted)
        best = 0.0
        for k in range(found):
            best = max(best, s.candidate_worth[k])
        n[APPETITE] += int(best)


def begin_early(s: State, w: Wire, c: Config, t: Times) -> None:
    """The plan's prefetches are in the link's hands; what they retracted or evicted is gone."""
    n = s.n
    for k in range(n[HANDED], n[RETRACTS]):
        n[WASTED] += wire.retract(w, t, s.retract_copy[k])
    for k in range(n[PREFETCHES]):
        x = s.prefetch_x[k]
        if c.write_back and s.prefetch_evicted[k] >= 0:
            wire.write_back(w, t, s.early_slot[x])
        copy = wire.new_copy(w, t, s.early_slot[x], s.early_target[x], s.early_worth[x], s.early_number[x])
        s.early_copy[x] = copy
        wire.prefetch(w, copy)


def serial(s: State, c: Config, t: Times, routed: int) -> int:
    """Without a copy stream: every copy in turn, both directions, then compute; returns when the visit ends."""
    n = s.n
    loads = n[PREFETCHES]
    streamed = 0
    victims = n[DISPLACED]
    compute_ns = t.shared_ns
    host_ns = 0
    for i in range(routed):
        if s.fate[i] == HOSTED:
            host_ns += t.host_expert_ns[s.counts[i]]
            continue
        compute_ns += t.expert_ns[s.counts[i]]
        if s.fate[i] == DEMANDED:
            loads += 1
        elif s.fate[i] == STREAMED:
            streamed += 1
        if s.fate[i] == DEMANDED and s.evicted[i] >= 0:
            victims += 1
    for k in range(n[PREFETCHES]):
        if s.prefetch_evicted[k] >= 0:
            victims += 1
    back_ns = t.serial_ns + t.write_back_ns * victims if c.write_back and victims else 0
    loads_ns = t.serial_ns + loads * t.load_ns if loads else 0
    each_ns = t.serial_ns + t.load_ns
    copies_ns = back_ns + loads_ns + streamed * each_ns
    n[CLAIM_HITS] = n[CLAIMS]
    n[SERIAL_COPIES] = loads + streamed
    n[SERIAL_HOST] = host_ns
    n[STALL_MISS] = copies_ns + host_ns
    n[COOLED] = (
        cooled_ns(t, back_ns) + cooled_ns(t, loads_ns) + streamed * cooled_ns(t, each_ns) + cooled_ns(t, host_ns)
    )
    n[WASTED] = n[RETRACTS] * t.expert_bytes
    return n[PLANNED] + copies_ns + host_ns + n[COOLED] + compute_ns


def compute(s: State, w: Wire, c: Config, t: Times, layer: int, index: int, routed: int) -> int:
    """Experts in order of arrival; streamed ones free their slot for the next. Returns when the visit ends."""
    n = s.n
    base = layer * c.experts
    now = n[PLANNED] + t.shared_ns
    known_at = n[PLANNED] - t.host_ns
    waiting = 0
    streamed = 0
    hosted = 0
    for k in range(n[CLAIMS]):
        i = s.claims[k]
        s.copies[i] = s.early_copy[base + s.routed[i]]
        if w.done[s.copies[i]] <= known_at:
            now += t.expert_ns[s.counts[i]]
            wire.free_copy(w, s.copies[i])
            n[CLAIM_HITS] += 1
        else:
            s.waiting[waiting] = i
            waiting += 1
    for i in range(routed):
        if s.fate[i] == RESIDENT:
            now += t.expert_ns[s.counts[i]]
        elif s.fate[i] == DEMANDED:
            s.waiting[waiting] = i
            waiting += 1
        elif s.fate[i] == HOSTED:
            hosted += 1
    queued = routed
    for i in range(routed):
        if s.fate[i] == STREAMED:
            if streamed == c.stream_slots:
                queued = i
                break
            s.waiting[waiting] = i
            waiting += 1
            streamed += 1
    while waiting:
        best = first_done(s, w, waiting)
        while w.done[s.copies[s.waiting[best]]] == NEVER:
            wire.until_arrival(w, t)
            best = first_done(s, w, waiting)
        i = s.waiting[best]
        stall_ns = max(0, w.done[s.copies[i]] - now)
        n[STALL_LATE if s.fate[i] == CLAIMED else STALL_MISS] += stall_ns
        cooled = cooled_ns(t, stall_ns)
        n[COOLED] += cooled
        now += stall_ns + cooled + t.expert_ns[s.counts[i]]
        wire.free_copy(w, s.copies[i])
        waiting -= 1
        for k in range(best, waiting):
            s.waiting[k] = s.waiting[k + 1]
        if s.fate[i] == STREAMED and queued < routed:
            wire.advance(w, t, max(w.i[LINK_NOW], now + t.wake_ns))
            s.copies[queued] = wire.new_copy(w, t, s.slot[queued], index, 0.0, s.number[queued])
            wire.demand(w, s.copies[queued])
            s.waiting[waiting] = queued
            waiting += 1
            queued += 1
            while queued < routed and s.fate[queued] != STREAMED:
                queued += 1
    if hosted:
        while w.i[HOST_NEXT] < NEVER:
            if w.i[HOST_NEXT] == w.i[LINK_NOW]:
                wire.begin_on_host(w, t, w.i[LINK_NOW])
            else:
                wire.advance(w, t, w.i[HOST_NEXT])
        stall_ns = max(0, w.i[HOST_END] - now)
        n[STALL_MISS] += stall_ns
        cooled = cooled_ns(t, stall_ns)
        n[COOLED] += cooled
        now += stall_ns + cooled
    return now


def cooled_ns(t: Times, wait_ns: int) -> int:
    """How much longer computing takes right after a wait."""
    return min(t.cooling_max_ns, wait_ns * t.cooling_ppm // 1_000_000)


def first_done(s: State, w: Wire, waiting: int) -> int:
    """Of the places waited for, the one whose bytes came first; the first of equals."""
    best = 0
    for k in range(1, waiting):
        if w.done[s.copies[s.waiting[k]]] < w.done[s.copies[s.waiting[best]]]:
            best = k
    return best
