"""Residency: which expert takes which slot, which leaves, and which are loaded before they are routed.

Plain functions over the tables of `sim.state`; ``rules`` holds the plug-ins' functions and parameters. No clock, stream
or tensor; what is known of the link comes through `sim.clock`.
"""

from __future__ import annotations

from typing import Any

from sim.plugin import Guess, LinkView, Misses, Now
from sim.state import (
    ACCESSES,
    ADMITTED,
    CLAIM_HITS,
    CLAIMED,
    CLAIMS,
    COOLED,
    DEMANDED,
    DISPLACED,
    HANDED,
    HOSTED,
    KEPT,
    KEPT_LOADS,
    LANDING_FREE,
    LENT,
    LIMIT,
    LOADS,
    PENDING,
    PREFETCHES,
    RANKS,
    RELEASED,
    RESIDENT,
    RETRACTS,
    SERIAL_COPIES,
    SERIAL_HOST,
    STALL_LATE,
    STALL_MISS,
    STREAMED,
    STREAMS,
    WASTED,
    Config,
    State,
)

Rules = Any

# --- one visit --------------------------------------------------------------------------------------------------------


def begin_plan(s: State, c: Config, index: int, layer: int, cold: bool) -> None:
    """Start the plan of visit ``index``: marks what is routed; ``cold`` empties the caches first."""
    n = s.n
    n[CLAIMS] = n[STREAMS] = n[DISPLACED] = n[RETRACTS] = n[PREFETCHES] = n[HANDED] = 0
    n[CLAIM_HITS] = n[STALL_MISS] = n[STALL_LATE] = n[COOLED] = n[SERIAL_COPIES] = n[SERIAL_HOST] = n[WASTED] = 0
    if cold:
        forget(s, c)
    for k in range(n[RELEASED]):
        s.landing[n[LANDING_FREE]] = s.released[k]
        n[LANDING_FREE] += 1
    n[RELEASED] = 0
    s.layer_visits[layer] += 1


def mark(s: State, c: Config, index: int, layer: int, routed: int, used: int) -> None:
    """Protect the first ``routed`` experts of the visit; where the future is known, look past it."""
    base = layer * c.experts
    for i in range(routed):
        s.routed_at[base + s.routed[i]] = index
    if len(s.e.next_use) > 1:
        for i in range(used):
            s.e.next_use[base + s.routed[i]] = s.following[i]


def forget(s: State, c: Config) -> None:
    """Empty the caches: nothing is resident and nothing was ever used; early loads are retracted."""
    n = s.n
    for k in range(n[KEPT_LOADS]):
        drop(s, s.kept[k])
    n[KEPT_LOADS] = 0
    for layer in range(c.layers):
        for k in range(s.pending_count[layer]):
            drop(s, s.pending[layer * c.places + k])
        s.pending_count[layer] = 0
    for x in range(c.layers * c.experts):
        s.early[x] = 0
        s.slot_of[x] = -1
        s.e.last_use[x] = -1
        s.e.uses[x] = 0
        s.e.uses_resident[x] = 0
        s.e.loaded[x] = 0
        s.e.memory[x] = 0.0
        s.e.visits[x] = 0
    slot = 0
    for group in range(c.groups):
        size = s.size[group]
        s.residents[group] = 0
        s.free_count[group] = size
        s.lent[group] = 0
        for k in range(size):
            s.free[s.start[group] + k] = slot + size - 1 - k
        slot += size
    for k in range(c.landing_slots):
        s.landing[k] = slot + c.landing_slots - 1 - k
    n[LANDING_FREE] = c.landing_slots
    n[RELEASED] = n[LENT] = 0


def forget_sequence(s: State, c: Config) -> None:
    """Counts within a sequence start again."""
    for x in range(c.layers * c.experts):
        s.e.uses_sequence[x] = 0


def judge(s: State, c: Config, index: int, layer: int) -> None:
    """Every prefetch issued for this layer is routed now, or stale: retracted or kept."""
    first = layer * c.places
    routed = 0
    for k in range(s.pending_count[layer]):
        x = s.pending[first + k]
        if s.routed_at[x] == index:
            s.pending[first + routed] = x
            routed += 1
        elif c.keep_stale:
            s.early[x] = KEPT
            s.kept[s.n[KEPT_LOADS]] = x
            s.n[KEPT_LOADS] += 1
        else:
            drop(s, x)
            s.early[x] = 0
            if c.landing_slots:
                s.landing[s.n[LANDING_FREE]] = s.early_slot[x]
                s.n[LANDING_FREE] += 1
            else:
                leave(s, group_of(c, layer), x)
                give_back(s, group_of(c, layer), s.early_slot[x])
    s.pending_count[layer] = routed


def place(s: State, c: Config, rules: Rules, index: int, layer: int, routed: int, loads: int) -> None:
    """A slot for every routed expert; of those that would need a victim, the first ``loads`` are loaded."""
    n = s.n
    group = group_of(c, layer)
    base = layer * c.experts
    streams = routed > s.size[group] + s.lent[group]
    now = Now(index, s.layer_visits[layer], n[ACCESSES])
    for i in range(routed):
        x = base + s.routed[i]
        s.evicted[i] = -1
        slot = s.slot_of[x]
        if s.early[x]:
            slot = claim(s, c, rules, now, group, x, i, streams)
        elif slot >= 0:
            s.fate[i] = RESIDENT
        elif s.free_count[group]:
            slot = take(s, group)
            admit(s, group, x, slot)
            issue(s, i, DEMANDED)
        elif loads <= 0:
            s.fate[i] = HOSTED
        else:
            loads -= 1
            victim = -1
            if not streams:
                victim = find_victim(s, c, rules, now, group)
                if c.bypass and victim >= 0 and not rules.admit(rules.cache, s.e, x, victim, now):
                    victim = -1
            if victim < 0:
                slot = c.first_stream + n[STREAMS] % c.stream_slots
                n[STREAMS] += 1
                issue(s, i, STREAMED)
            else:
                slot = evict(s, c, group, victim)
                s.evicted[i] = victim
                admit(s, group, x, slot)
                issue(s, i, DEMANDED)
        s.slot[i] = slot


def claim(s: State, c: Config, rules: Rules, now: Now, group: int, x: int, i: int, streams: bool) -> int:
    """A routed expert that was loaded early: it joins the cache, and what gives way leaves its slot to land in."""
    n = s.n
    remove_early(s, c, x)
    s.fate[i] = CLAIMED
    s.claims[n[CLAIMS]] = i
    n[CLAIMS] += 1
    slot = s.slot_of[x]
    if slot >= 0:
        return slot
    slot = s.early_slot[x]
    if s.free_count[group]:
        s.landing[n[LANDING_FREE]] = take(s, group)
        n[LANDING_FREE] += 1
        admit(s, group, x, slot)
        return slot
    victim = -1
    if not streams:
        victim = find_victim(s, c, rules, now, group)
        if c.bypass and victim >= 0 and not rules.admit(rules.cache, s.e, x, victim, now):
            victim = -1
    if victim < 0:
        s.released[n[RELEASED]] = slot
        n[RELEASED] += 1
        return slot
    freed = evict(s, c, group, victim)
    s.displaced[n[DISPLACED]] = freed
    n[DISPLACED] += 1
    s.landing[n[LANDING_FREE]] = freed
    n[LANDING_FREE] += 1
    admit(s, group, x, slot)
    return slot


def sort_claims(s: State, base: int) -> None:
    """Claimed loads in the order in which they are joined: nearest target, then worth, then age."""
    for k in range(1, s.n[CLAIMS]):
        i = s.claims[k]
        place = k
        while place > 0 and goes_before(s, base + s.routed[i], base + s.routed[s.claims[place - 1]]):
            s.claims[place] = s.claims[place - 1]
            place -= 1
        s.claims[place] = i


def goes_before(s: State, x: int, y: int) -> bool:
    """Whether the early load of x goes before that of y."""
    if s.early_target[x] != s.early_target[y]:
        return s.early_target[x] < s.early_target[y]
    if s.early_worth[x] != s.early_worth[y]:
        return s.early_worth[x] > s.early_worth[y]
    return s.early_number[x] < s.early_number[y]


def remember(s: State, c: Config, rules: Rules, index: int, layer: int, routed: int) -> None:
    """Recency and counts after the visit, in router order, whatever was resident."""
    e = s.e
    base = layer * c.experts
    for i in range(routed):
        x = base + s.routed[i]
        if c.touches:
            now = Now(index, s.layer_visits[layer], s.n[ACCESSES])
            e.memory[x] = rules.touch(rules.cache, e, x, s.counts[i], now)
        s.n[ACCESSES] += 1
        e.last_use[x] = s.n[ACCESSES]
        e.uses[x] += s.counts[i]
        e.uses_sequence[x] += s.counts[i]
        e.uses_resident[x] += 1
        e.visits[x] = s.layer_visits[layer]


# --- slots ------------------------------------------------------------------------------------------------------------


def group_of(c: Config, layer: int) -> int:
    """Group of slots a layer's experts live in."""
    return layer if c.groups > 1 else 0


def take(s: State, group: int) -> int:
    """A free slot of the group."""
    s.free_count[group] -= 1
    return s.free[s.start[group] + s.free_count[group]]


def give_back(s: State, group: int, slot: int) -> None:
    """The group has a free slot more."""
    s.free[s.start[group] + s.free_count[group]] = slot
    s.free_count[group] += 1


def admit(s: State, group: int, x: int, slot: int) -> None:
    """x becomes resident in ``slot``."""
    s.slot_of[x] = slot
    s.member_of[x] = s.residents[group]
    s.members[s.start[group] + s.residents[group]] = x
    s.residents[group] += 1
    s.n[ADMITTED] += 1
    s.e.loaded[x] = s.n[ADMITTED]
    s.e.uses_resident[x] = 0


def leave(s: State, group: int, x: int) -> int:
    """x is no longer resident; returns the slot it had."""
    s.residents[group] -= 1
    other = s.members[s.start[group] + s.residents[group]]
    s.members[s.start[group] + s.member_of[x]] = other
    s.member_of[other] = s.member_of[x]
    slot = s.slot_of[x]
    s.slot_of[x] = -1
    return slot


def evict(s: State, c: Config, group: int, victim: int) -> int:
    """Take the victim's slot; an early load of it that was kept is retracted."""
    if s.early[victim] == KEPT:
        remove_early(s, c, victim)
        drop(s, victim)
    return leave(s, group, victim)


def find_victim(s: State, c: Config, rules: Rules, now: Now, group: int) -> int:
    """The resident expert (x) with the lowest score that is neither routed now nor on its way; -1 if there is none."""
    best, lowest = -1, 0.0
    first = s.start[group]
    for k in range(first, first + s.residents[group]):
        x = s.members[k]
        if s.routed_at[x] == now.visit or s.early[x] == PENDING:
            continue
        score = rules.score(rules.cache, s.e, x, now)
        if best < 0 or score < lowest or (score == lowest and x < best):
            best, lowest = x, score
    return best


def issue(s: State, i: int, fate: int) -> None:
    """A load for the i-th routed expert."""
    s.n[LOADS] += 1
    s.fate[i] = fate
    s.number[i] = s.n[LOADS]


def drop(s: State, x: int) -> None:
    """Note that the early load of x is retracted."""
    k = s.n[RETRACTS]
    s.retract_x[k] = x
    s.retract_number[k] = s.early_number[x]
    s.retract_slot[k] = s.early_slot[x]
    s.retract_copy[k] = s.early_copy[x]
    s.n[RETRACTS] += 1


def remove_early(s: State, c: Config, x: int) -> None:
    """x is no longer an early load: out of the list it stands in."""
    layer = x // c.experts
    if s.early[x] == PENDING:
        first = layer * c.places
        k = first
        while s.pending[k] != x:
            k += 1
        s.pending_count[layer] -= 1
        while k < first + s.pending_count[layer]:
            s.pending[k] = s.pending[k + 1]
            k += 1
    else:
        remove_kept(s, x)
    s.early[x] = 0


def remove_kept(s: State, x: int) -> None:
    """x leaves the list of kept prefetches."""
    k = 0
    while s.kept[k] != x:
        k += 1
    s.n[KEPT_LOADS] -= 1
    while k < s.n[KEPT_LOADS]:
        s.kept[k] = s.kept[k + 1]
        k += 1


def lend(s: State, c: Config) -> None:
    """Free landing slots become cache slots, each group as many as its limit allows."""
    n = s.n
    group = 0
    while n[LANDING_FREE] and n[LENT] < n[LIMIT] and group < c.groups:
        if s.lent[group] < s.lend_limit[group]:
            n[LANDING_FREE] -= 1
            give_back(s, group, s.landing[n[LANDING_FREE]])
            s.lent[group] += 1
            n[LENT] += 1
        else:
            group += 1


def reclaim(s: State, c: Config, rules: Rules, index: int) -> None:
    """Lent slots are for landing again; where none is free the cache rule says who leaves."""
    n = s.n
    for group in range(c.groups):
        while s.lent[group]:
            if s.free_count[group]:
                slot = take(s, group)
            else:
                layer = group if c.groups > 1 else 0
                victim = find_victim(s, c, rules, Now(index, s.layer_visits[layer], n[ACCESSES]), group)
                if victim < 0:
                    break
                slot = evict(s, c, group, victim)
                s.displaced[n[DISPLACED]] = slot
                n[DISPLACED] += 1
            s.lent[group] -= 1
            n[LENT] -= 1
            s.landing[n[LANDING_FREE]] = slot
            n[LANDING_FREE] += 1


# --- guesses ----------------------------------------------------------------------------------------------------------


def score_guesses(s: State, c: Config, index: int, layer: int) -> None:
    """How the guesses about this visit did, by distance and rank; older evidence fades (a 256th each time)."""
    for d in range(c.lookahead):
        about = layer * c.lookahead + d
        if s.about_visit[about] != index:
            continue
        for rank in range(RANKS):
            expert = s.about_id[about * RANKS + rank]
            if expert < 0:
                break
            cell = d * RANKS + rank
            hit = 1.0 if s.routed_at[layer * c.experts + expert] == index else 0.0
            s.seen[cell] = s.seen[cell] * 0.99609375 + 1.0
            s.right[cell] = s.right[cell] * 0.99609375 + hit
            s.claimed[cell] = s.claimed[cell] * 0.99609375 + s.about_score[about * RANKS + rank]


def note_guesses(s: State, c: Config, index: int, layer: int) -> None:
    """Keep this visit's guesses: to be scored later, and for eviction rules and policies that want them."""
    for d in range(c.lookahead):
        target = (layer + d + 1) % c.layers
        base = target * c.experts
        visit = index + d + 1
        about = target * c.lookahead + d
        length = s.offer_len[d]
        if c.trust:
            s.about_visit[about] = visit if length else -1
            for rank in range(RANKS):
                place = d * c.max_guesses + rank
                known = rank < length
                s.about_id[about * RANKS + rank] = s.offer_id[place] if known else -1
                s.about_score[about * RANKS + rank] = s.offer_score[place] if known else 0.0
        if c.hints:
            for rank in range(length):
                x = base + s.offer_id[d * c.max_guesses + rank]
                score = s.offer_score[d * c.max_guesses + rank]
                if s.e.guess_visit[x] != visit:
                    s.e.guess_visit[x] = visit
                    s.e.guess_score[x] = score
                    s.agreed[x] = 0
                elif score > s.e.guess_score[x]:
                    s.e.guess_score[x] = score
                if rank < c.top_k:
                    s.agreed[x] += 1


def wanted(s: State, c: Config, rules: Rules, layer: int, load_ns: int, chunk_ns: int, max_submitted: int) -> int:
    """Guesses worth issuing, unordered, in the candidate tables; returns how many.

    An expert of this visit is no guess for the next visit of its layer: its present copy may still be on its way.

    ``s.ahead[d]`` is the link time before a prefetch for distance d; ``s.ahead[0]`` all of it.
    """
    found = 0
    nearer = 0
    for d in range(1, c.lookahead + 1):
        target = (layer + d) % c.layers
        base = target * c.experts
        first = (d - 1) * c.max_guesses
        mass = 0.0
        missing = 0
        missing_first = 0
        for rank in range(s.offer_len[d - 1]):
            score = s.offer_score[first + rank]
            if score <= 0.0:
                break
            x = base + s.offer_id[first + rank]
            routed_now = target == layer and s.e.visits[x] == s.layer_visits[layer]
            if s.slot_of[x] < 0 and s.early[x] == 0 and not routed_now:
                link = LinkView(s.ahead[d], s.ahead[0], load_ns, chunk_ns, max_submitted, s.window[d])
                worth = value(s, c, rules, link, x, d, rank, missing, nearer, mass, score)
                if worth > 0.0:
                    s.candidate_x[found] = x
                    s.candidate_distance[found] = d
                    s.candidate_worth[found] = worth
                    s.candidate_rank[found] = rank
                    s.candidate_missing[found] = missing
                    s.candidate_nearer[found] = nearer
                    s.candidate_mass[found] = mass
                    s.candidate_score[found] = score
                    found += 1
                missing += 1
                if rank < c.top_k:
                    missing_first += 1
            mass += score
        nearer += missing_first
    return found


def worth_of(s: State, c: Config, rules: Rules, k: int, load_ns: int, chunk_ns: int, max_submitted: int) -> float:
    """What the policy says of candidate ``k`` now."""
    d = s.candidate_distance[k]
    return value(
        s,
        c,
        rules,
        LinkView(s.ahead[d], s.ahead[0], load_ns, chunk_ns, max_submitted, s.window[d]),
        s.candidate_x[k],
        d,
        s.candidate_rank[k],
        s.candidate_missing[k],
        s.candidate_nearer[k],
        s.candidate_mass[k],
        s.candidate_score[k],
    )


def value(
    s: State,
    c: Config,
    rules: Rules,
    link: LinkView,
    x: int,
    d: int,
    rank: int,
    missing: int,
    nearer: int,
    mass: float,
    score: float,
) -> float:
    """What the policy says of the guess that x is routed ``d`` layers ahead (see `sim.plugin.Guess`)."""
    cell = (d - 1) * RANKS + min(rank, RANKS - 1)
    guess = Guess(
        score, d, rank, missing, nearer, mass, s.agreed[x], s.seen[cell], s.right[cell], s.claimed[cell], c.top_k
    )
    worth: float = rules.worth(rules.policy, guess, link)
    return worth


def issue_prefetches(
    s: State, c: Config, rules: Rules, index: int, layer: int, load_ns: int, chunk_ns: int, max_submitted: int
) -> None:
    """Issue what is worth most first, as many as there are places.

    A guess is valued again once another has been put before it on the link.
    """
    found = wanted(s, c, rules, layer, load_ns, chunk_ns, max_submitted)
    while found:
        best = 0
        for k in range(1, found):
            if goes_first(s, k, best):
                best = k
        if s.n[PREFETCHES]:
            again = worth_of(s, c, rules, best, load_ns, chunk_ns, max_submitted)
            if again < s.candidate_worth[best]:
                s.candidate_worth[best] = again
                if again <= 0.0:
                    found -= 1
                    move_candidate(s, found, best)
                continue
        x = s.candidate_x[best]
        d = s.candidate_distance[best]
        if s.early[x]:  # guessed for two visits of its layer, and issued for one
            found -= 1
            move_candidate(s, found, best)
            continue
        slot, evicted = landing_place(s, c, rules, index, x // c.experts)
        if slot >= 0:
            start_early(s, c, x, slot, evicted, index + d, s.candidate_worth[best])
            s.ahead[0] += load_ns
            for further in range(d, c.lookahead + 1):
                s.ahead[further] += load_ns
        elif c.landing_slots:
            break
        found -= 1
        move_candidate(s, found, best)


def goes_first(s: State, k: int, other: int) -> bool:
    """Whether candidate ``k`` is issued before ``other``: higher worth, then lower layer and expert id."""
    if s.candidate_worth[k] != s.candidate_worth[other]:
        return s.candidate_worth[k] > s.candidate_worth[other]
    return s.candidate_x[k] < s.candidate_x[other]


def move_candidate(s: State, source: int, target: int) -> None:
    """Put one candidate in another's place."""
    s.candidate_x[target] = s.candidate_x[source]
    s.candidate_distance[target] = s.candidate_distance[source]
    s.candidate_worth[target] = s.candidate_worth[source]
    s.candidate_rank[target] = s.candidate_rank[source]
    s.candidate_missing[target] = s.candidate_missing[source]
    s.candidate_nearer[target] = s.candidate_nearer[source]
    s.candidate_mass[target] = s.candidate_mass[source]
    s.candidate_score[target] = s.candidate_score[source]


def landing_place(s: State, c: Config, rules: Rules, index: int, layer: int) -> tuple[int, int]:
    """Slot for a prefetch, and the expert (x) it evicts or -1; slot -1 when there is no place."""
    n = s.n
    if c.landing_slots:
        if n[LANDING_FREE]:
            n[LANDING_FREE] -= 1
            return s.landing[n[LANDING_FREE]], -1
        if n[KEPT_LOADS]:
            oldest = s.kept[0]
            remove_early(s, c, oldest)
            drop(s, oldest)
            return s.early_slot[oldest], -1
        return -1, -1
    group = group_of(c, layer)
    if s.free_count[group]:
        return take(s, group), -1
    victim = find_victim(s, c, rules, Now(index, s.layer_visits[layer], n[ACCESSES]), group)
    if victim < 0:
        return -1, -1
    return evict(s, c, group, victim), victim


def start_early(s: State, c: Config, x: int, slot: int, evicted: int, target: int, worth: float) -> None:
    """An early load of x."""
    n = s.n
    layer = x // c.experts
    n[LOADS] += 1
    s.early[x] = PENDING
    s.early_slot[x] = slot
    s.early_number[x] = n[LOADS]
    s.early_target[x] = target
    s.early_worth[x] = worth
    s.pending[layer * c.places + s.pending_count[layer]] = x
    s.pending_count[layer] += 1
    if not c.landing_slots:
        admit(s, group_of(c, layer), x, slot)
    s.prefetch_x[n[PREFETCHES]] = x
    s.prefetch_evicted[n[PREFETCHES]] = evicted
    n[PREFETCHES] += 1


def missing(s: State, c: Config, layer: int, routed: int) -> tuple[int, int]:
    """Routed experts with no slot and no load on its way: how many would need a victim, and how many find a free slot.

    Claimed prefetches take free slots too, in router order.
    """
    base = layer * c.experts
    free = s.free_count[group_of(c, layer)]
    count = 0
    filling = 0
    for i in range(routed):
        x = base + s.routed[i]
        if s.slot_of[x] >= 0:
            continue
        if free > 0:
            free -= 1
            if s.early[x] == 0:
                filling += 1
        elif s.early[x] == 0:
            count += 1
    return count, filling


def loads_for(rules: Rules, misses: Misses) -> int:
    """How many of the misses are loaded, by the run's rule for misses."""
    number: int = rules.loads(rules.miss, misses)
    return min(misses.number, max(0, number))
