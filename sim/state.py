"""The planner's memory as flat tables: Python lists in plain Python, numpy arrays where the drivers are compiled.

Letters: L layers, E experts of a layer, x = layer * E + expert, G groups of slots (one a layer, or one for all), P
places in which early loads can be, D lookahead distances, M guesses of one distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sim.plugin import Experts

NEVER = 1 << 62
RANKS = 8  # ranks scored apart by the shadow evaluation; later ones share the last

# fate of a routed expert
RESIDENT, CLAIMED, DEMANDED, STREAMED, HOSTED = 0, 1, 2, 3, 4

# state of an early load
PENDING, KEPT = 1, 2

# places in State.n
(
    ACCESSES,  # routed accesses so far
    LOADS,  # loads issued so far
    ADMITTED,  # experts taken in by the caches so far
    LANDING_FREE,  # landing slots nothing is in
    RELEASED,  # landing slots that become free with the next plan
    KEPT_LOADS,  # prefetches kept although their layer was routed without them
    CLAIMS,  # of this plan, like the following
    STREAMS,
    DISPLACED,
    RETRACTS,
    HANDED,  # retractions the link has been told of
    PREFETCHES,
    LOOKING,  # guesses are used in this pass
    ACTIVE,  # prefetches are issued in this pass
    APPETITE,  # nanoseconds that guesses of this pass are worth
    LENT,  # landing slots lent to the caches
    LIMIT,  # landing slots that may be lent
    PASSES,  # decode passes so far
    REST,  # passes until the next trial, by the guard
    REST_LENGTH,
    BALANCE,  # nanoseconds won against the guard's shadow in this trial
    ACCOUNT,  # the same in all decode passes
    ENTRY,  # nanoseconds that beginning the trial costs, until it has paid back
    SHADOW_TIME,
    PASS_START,
    SHADOW_START,
    NOW,
    PLANNED,
    EFFECTS,
    CLAIM_HITS,  # claimed experts whose bytes were there; of this visit, like the following
    STALL_MISS,
    STALL_LATE,
    SERIAL_COPIES,
    COOLED,  # nanoseconds that computing took longer because it had waited
    SERIAL_HOST,  # nanoseconds of experts on the host
    WASTED,  # bytes of retracted prefetches
    TOTAL_SCALARS,
) = range(37)


class Config(NamedTuple):
    """What does not change during a run.

    Attributes:
        layers, experts, top_k: L, E and routed experts of a token.
        groups: 1 for one pool of slots, else L.
        places: P, room for early loads about one layer.
        landing_slots, stream_slots, first_stream: how many, and the first stream slot's number.
        max_guesses: M of the guess buffers.
        lookahead: D.
        keep_stale, copy_stream, write_back, hints, trust, guard: switches.
        lends: landing slots are lent to the caches until the policy prefetches.
        bypass: the cache rule may refuse to admit a missing expert.
        touches: the cache rule remembers something at each access.
        has_rule: a rule for misses other than loading them all.
        clock: the virtual link clock runs.
        credit_percent: of a decode token's time, what the guard lets a trial lose.
        probe: while resting, guesses are looked at in one pass of this many.
    """

    layers: int
    experts: int
    top_k: int
    groups: int
    places: int
    landing_slots: int
    stream_slots: int
    first_stream: int
    max_guesses: int
    lookahead: int
    keep_stale: int
    copy_stream: int
    write_back: int
    hints: int
    trust: int
    guard: int
    lends: int
    bypass: int
    touches: int
    has_rule: int
    clock: int
    credit_percent: int
    probe: int


class State(NamedTuple):
    """Residency, recency, guesses and the plan being made; ``x`` tables have L * E entries.

    Attributes:
        n: scalars, by the names above.
        e: tables that eviction rules see.
        slot_of: cache slot of each x; -1 when not resident.
        members, member_of: residents of every group, and the place of x among them.
        start, residents, size: of every group: its first place in ``members`` and ``free``, how many are resident,
            slots.
        free, free_count: free slots of every group, a stack.
        landing, released: free landing slots (a stack), and those used for the last time by this visit.
        early, early_slot, early_number, early_target, early_copy, early_worth: an early load of x, and its state.
        pending, pending_count: early loads about every layer, oldest first, P to a layer.
        kept: x of kept prefetches, oldest first.
        routed_at: the last visit that routed x.
        layer_visits: visits of every layer.
        lent: landing slots lent to every group; ``lend_limit`` how many it may be lent.
        routed, counts: experts of this visit in router order and their tokens, input; E entries.
        following: number of the next visit that routes each of them, input for rules that need the future.
        offer_len, offer_id, offer_score: guesses of this visit, input: D, D * M, D * M.
        fate, slot, number, evicted: of each routed expert: what happens, its slot, its load, the expert (x) that left.
        claims: places in ``routed`` of the claimed ones, in the order they are joined.
        copies: copy of each routed expert on the virtual link.
        waiting: places in ``routed`` that compute waits for.
        displaced: slots whose experts give way to claimed prefetches.
        retract_x, retract_number, retract_slot, retract_copy: prefetches dropped by this plan.
        prefetch_x, prefetch_evicted: x of this plan's prefetches, and the expert (x) each evicted or -1.
        candidate_*: guesses worth issuing: expert, distance, worth, and what `sim.plugin.Guess` says of them.
        ahead, window: for every distance, nanoseconds of link time that go before a prefetch for it (0: in all), and
            until its target's routing is known.
        about_visit, about_id, about_score: guesses about coming visits, by layer, distance and rank.
        seen, right, claimed: how guesses of each distance and rank did.
        agreed: visits that guessed x for ``e.guess_visit``.
    """

    n: list[int]
    e: Experts
    slot_of: list[int]
    members: list[int]
    member_of: list[int]
    start: list[int]
    residents: list[int]
    size: list[int]
    free: list[int]
    free_count: list[int]
    landing: list[int]
    released: list[int]
    early: list[int]
    early_slot: list[int]
    early_number: list[int]
    early_target: list[int]
    early_copy: list[int]
    early_worth: list[float]
    pending: list[int]
    pending_count: list[int]
    kept: list[int]
    routed_at: list[int]
    layer_visits: list[int]
    lent: list[int]
    lend_limit: list[int]
    routed: list[int]
    counts: list[int]
    following: list[int]
    offer_len: list[int]
    offer_id: list[int]
    offer_score: list[float]
    fate: list[int]
    slot: list[int]
    number: list[int]
    evicted: list[int]
    claims: list[int]
    copies: list[int]
    waiting: list[int]
    displaced: list[int]
    retract_x: list[int]
    retract_number: list[int]
    retract_slot: list[int]
    retract_copy: list[int]
    prefetch_x: list[int]
    prefetch_evicted: list[int]
    candidate_x: list[int]
    candidate_distance: list[int]
    candidate_worth: list[float]
    candidate_rank: list[int]
    candidate_missing: list[int]
    candidate_nearer: list[int]
    candidate_mass: list[float]
    candidate_score: list[float]
    ahead: list[int]
    window: list[int]
    about_visit: list[int]
    about_id: list[int]
    about_score: list[float]
    seen: list[float]
    right: list[float]
    claimed: list[float]
    agreed: list[int]


Table = Callable[..., Any]


def lists(length: int, fill: float = 0) -> Any:
    """A table as a Python list."""
    return [fill] * length


def new_state(
    c: Config,
    sizes: list[int],
    lend_limit: list[int],
    fitted: Sequence[float] = (),
    first_use: Sequence[int] = (),
    table: Table = lists,
) -> State:
    """Nothing resident, nothing ever used.

    Args:
        c: the run's constants.
        sizes: cache slots of every group.
        lend_limit: landing slots each group may be lent.
        fitted: an eviction rule's own numbers by x.
        first_use: first visit that routes x, for rules that need the future.
        table: makes a table of a length and a value: `lists`, or one that makes numpy arrays.
    """
    total = c.layers * c.experts
    groups = len(sizes)
    room = [size + lent for size, lent in zip(sizes, lend_limit, strict=True)]
    cache_slots = sum(sizes)
    experts = Experts(
        last_use=table(total, -1),
        uses=table(total, 0),
        uses_sequence=table(total, 0),
        uses_resident=table(total, 0),
        loaded=table(total, 0),
        memory=table(total, 0.0),
        visits=table(total, 0),
        guess_score=table(total, 0.0),
        guess_visit=table(total, -1),
        next_use=table(total if first_use else 1, 0),
        table=table(total if fitted else 1, 0.0),
    )
    for x, value in enumerate(fitted):
        experts.table[x] = value
    for x, visit in enumerate(first_use):
        experts.next_use[x] = visit
    guesses = max(1, c.lookahead * c.max_guesses)
    early = c.landing_slots if c.landing_slots else cache_slots
    cells = max(1, c.lookahead) * RANKS
    s = State(
        n=table(TOTAL_SCALARS, 0),
        e=experts,
        slot_of=table(total, -1),
        members=table(sum(room), 0),
        member_of=table(total, -1),
        start=table(groups, 0),
        residents=table(groups, 0),
        size=table(groups, 0),
        free=table(sum(room), 0),
        free_count=table(groups, 0),
        landing=table(max(1, c.landing_slots), 0),
        released=table(max(1, c.landing_slots), 0),
        early=table(total, 0),
        early_slot=table(total, -1),
        early_number=table(total, 0),
        early_target=table(total, 0),
        early_copy=table(total, -1),
        early_worth=table(total, 0.0),
        pending=table(c.layers * c.places, 0),
        pending_count=table(c.layers, 0),
        kept=table(early + 1, 0),
        routed_at=table(total, -1),
        layer_visits=table(c.layers, 0),
        lent=table(groups, 0),
        lend_limit=table(groups, 0),
        routed=table(c.experts, 0),
        counts=table(c.experts, 0),
        following=table(c.experts, 0),
        offer_len=table(max(1, c.lookahead), 0),
        offer_id=table(guesses, 0),
        offer_score=table(guesses, 0.0),
        fate=table(c.experts, 0),
        slot=table(c.experts, 0),
        number=table(c.experts, 0),
        evicted=table(c.experts, -1),
        claims=table(c.experts, 0),
        copies=table(c.experts, -1),
        waiting=table(c.experts, 0),
        displaced=table(c.experts + c.landing_slots, 0),
        retract_x=table(early + cache_slots + 1, 0),
        retract_number=table(early + cache_slots + 1, 0),
        retract_slot=table(early + cache_slots + 1, 0),
        retract_copy=table(early + cache_slots + 1, 0),
        prefetch_x=table(max(guesses, early) + 1, 0),
        prefetch_evicted=table(max(guesses, early) + 1, -1),
        candidate_x=table(guesses, 0),
        candidate_distance=table(guesses, 0),
        candidate_worth=table(guesses, 0.0),
        candidate_rank=table(guesses, 0),
        candidate_missing=table(guesses, 0),
        candidate_nearer=table(guesses, 0),
        candidate_mass=table(guesses, 0.0),
        candidate_score=table(guesses, 0.0),
        ahead=table(c.lookahead + 1, 0),
        window=table(c.lookahead + 1, 0),
        about_visit=table(c.layers * max(1, c.lookahead), -1),
        about_id=table(c.layers * cells, -1),
        about_score=table(c.layers * cells, 0.0),
        seen=table(cells, 0.0),
        right=table(cells, 0.0),
        claimed=table(cells, 0.0),
        agreed=table(total, 0),
    )
    place = slot = 0
    for group, (size, limit) in enumerate(zip(sizes, lend_limit, strict=True)):
        s.start[group], s.size[group], s.lend_limit[group] = place, size, limit
        s.free_count[group] = size
        for k in range(size):
            s.free[place + k] = slot + size - 1 - k
        place, slot = place + room[group], slot + size
    for k in range(c.landing_slots):
        s.landing[k] = slot + c.landing_slots - 1 - k
    s.n[LANDING_FREE] = c.landing_slots
    s.n[LIMIT] = sum(lend_limit)
    return s


class Times(NamedTuple):
    """Nanoseconds of everything but the dense part (that depends on context), and how a load is cut.

    Attributes:
        expert_ns, host_expert_ns, host_shared_ns: one expert by number of tokens (0 at 0): on the device; on the host;
            on the host while the link is busy.
        shared_ns: shared experts of a layer.
        host_ns: planning one visit.
        wake_ns: until a plan reaches the link.
        serial_ns: until the end of serial copies in one direction is known.
        cooling_ppm, cooling_max_ns: computing after a wait takes longer: by this share of it, at most by so much.
        sync_ns, gates_ns: bringing the routing to the host; the lookahead gates.
        longer_ns: the dense part takes so much longer beside this policy's planning and loads.
        plain_ns: a decode visit without any stall, the unit in which the planner looks ahead.
        chunks, full_ns, last_ns: of one load: how many chunks, a full one's time, the last one's.
        full_duplex_ns, last_duplex_ns: the same for a chunk that starts while the other direction is busy.
        full_shared_ns, last_shared_ns: the same while the host computes an expert.
        load_ns: one whole load on an idle link.
        write_back_ns: one expert's copy to the host.
        max_submitted: chunks in the copy engine's hands at once.
        expert_bytes, chunk_bytes: one load, one full chunk.
    """

    expert_ns: list[int]
    host_expert_ns: list[int]
    host_shared_ns: list[int]
    shared_ns: int
    host_ns: int
    wake_ns: int
    serial_ns: int
    cooling_ppm: int
    cooling_max_ns: int
    sync_ns: int
    longer_ns: int
    gates_ns: int
    plain_ns: int
    chunks: int
    full_ns: int
    last_ns: int
    full_duplex_ns: int
    last_duplex_ns: int
    full_shared_ns: int
    last_shared_ns: int
    load_ns: int
    write_back_ns: int
    max_submitted: int
    expert_bytes: int
    chunk_bytes: int


# places in Wire.i
(
    LINK_NOW,
    HEAD_END,  # end of the chunk on the wire; NEVER when idle
    HEAD_NS,
    BUSY,  # nanoseconds of finished chunks
    FIFO_LEN,
    DEMAND_HEAD,
    DEMAND_LEN,
    EARLY_LEN,
    FREE_COPIES,
    D2H_FREE,  # the other direction is busy until then
    HOST_NEXT,  # the host starts its next expert then; NEVER when it has none
    HOST_HEAD,
    HOST_LEN,
    HOST_END,  # the host is done with the one it computes
    HOST_BUSY,  # nanoseconds of experts computed on the host
    SUBMITTED_CHUNKS,
    WIRE_SCALARS,
) = range(17)


class Wire(NamedTuple):
    """A link and a host executor: one copy engine to the device with its queues, the way back, experts on the host.

    Attributes:
        i: scalars, by the names above.
        fifo: copies of submitted chunks, the one on the wire first.
        demand: copies with unsubmitted chunks that are demanded, from ``i[DEMAND_HEAD]`` on
            (no visit leaves any behind).
        early: copies with unsubmitted chunks that are not, the most urgent last.
        free: copies not in use, a stack.
        unsubmitted, unfinished, submitted, done, started, cancelled, demanded, ready: of every copy; ``done`` and
            ``started`` in ns (`NEVER` before); no chunk is submitted before ``ready``.
        target, worth, number: of every copy: order among the early ones.
        slot_ready: when the victim of each slot is written back.
        host: tokens of the experts the host computes, a queue filled per visit.
    """

    i: list[int]
    fifo: list[int]
    demand: list[int]
    early: list[int]
    free: list[int]
    unsubmitted: list[int]
    unfinished: list[int]
    submitted: list[int]
    done: list[int]
    started: list[int]
    cancelled: list[int]
    demanded: list[int]
    ready: list[int]
    target: list[int]
    worth: list[float]
    number: list[int]
    slot_ready: list[int]
    host: list[int]


def new_wire(slots: int, experts: int, max_submitted: int, table: Table = lists) -> Wire:
    """An idle link for ``slots`` slots in all and layers of ``experts``."""
    copies = 2 * slots + 2 * experts + max_submitted + 4
    w = Wire(
        i=table(WIRE_SCALARS, 0),
        fifo=table(max_submitted, 0),
        demand=table(copies, 0),
        early=table(copies, 0),
        free=table(copies, 0),
        unsubmitted=table(copies, 0),
        unfinished=table(copies, 0),
        submitted=table(copies, 0),
        done=table(copies, NEVER),
        started=table(copies, NEVER),
        cancelled=table(copies, 0),
        demanded=table(copies, 0),
        ready=table(copies, 0),
        target=table(copies, 0),
        worth=table(copies, 0.0),
        number=table(copies, 0),
        slot_ready=table(slots, 0),
        host=table(experts, 0),
    )
    for copy in range(copies):
        w.free[copy] = copies - 1 - copy
    w.i[FREE_COPIES] = copies
    w.i[HEAD_END] = w.i[HOST_NEXT] = NEVER
    return w
