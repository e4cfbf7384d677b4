"""The virtual link as plain functions over tables: the same rules as `sim.link.Link`, written to be compiled.

Times are integer nanoseconds. At equal ones: chunk ends, then the effects of a plan and the host's next expert, then
submissions. Chunk ends are computed when somebody asks; equal chunks of one load are skipped in one step.
"""

from __future__ import annotations

from sim.state import (
    BUSY,
    D2H_FREE,
    DEMAND_HEAD,
    DEMAND_LEN,
    EARLY_LEN,
    FIFO_LEN,
    FREE_COPIES,
    HEAD_END,
    HEAD_NS,
    HOST_BUSY,
    HOST_END,
    HOST_HEAD,
    HOST_LEN,
    HOST_NEXT,
    LINK_NOW,
    NEVER,
    SUBMITTED_CHUNKS,
    Times,
    Wire,
)

# --- effects of a plan, all at w.i[LINK_NOW] --------------------------------------------------------------------------


def new_copy(w: Wire, t: Times, slot: int, target: int, worth: float, number: int) -> int:
    """A copy of one load into ``slot``, in no queue yet."""
    w.i[FREE_COPIES] -= 1
    copy = w.free[w.i[FREE_COPIES]]
    w.unsubmitted[copy] = t.chunks
    w.unfinished[copy] = t.chunks
    w.submitted[copy] = 0
    w.done[copy] = NEVER
    w.started[copy] = NEVER
    w.cancelled[copy] = 0
    w.demanded[copy] = 0
    w.ready[copy] = w.slot_ready[slot]
    w.target[copy] = target
    w.worth[copy] = worth
    w.number[copy] = number
    return copy


def free_copy(w: Wire, copy: int) -> None:
    """Nobody asks for a finished copy any more."""
    w.free[w.i[FREE_COPIES]] = copy
    w.i[FREE_COPIES] += 1


def demand(w: Wire, copy: int) -> None:
    """Queue a load behind all demand loads."""
    i = w.i
    w.demanded[copy] = 1
    if i[DEMAND_LEN] == 0:
        i[DEMAND_HEAD] = 0
    w.demand[i[DEMAND_HEAD] + i[DEMAND_LEN]] = copy
    i[DEMAND_LEN] += 1


def prefetch(w: Wire, copy: int) -> None:
    """Queue a load behind all demand loads: nearest layer first, then worth, then age."""
    place = w.i[EARLY_LEN]
    while place > 0:
        other = w.early[place - 1]
        if w.target[other] != w.target[copy]:
            behind = w.target[other] < w.target[copy]
        elif w.worth[other] != w.worth[copy]:
            behind = w.worth[other] > w.worth[copy]
        else:
            behind = w.number[other] < w.number[copy]
        if not behind:
            break
        w.early[place] = other
        place -= 1
    w.early[place] = copy
    w.i[EARLY_LEN] += 1


def leave_early(w: Wire, copy: int) -> None:
    """Take a copy out of the queue of prefetches."""
    place = 0
    while w.early[place] != copy:
        place += 1
    w.i[EARLY_LEN] -= 1
    while place < w.i[EARLY_LEN]:
        w.early[place] = w.early[place + 1]
        place += 1


def join(w: Wire, copy: int) -> None:
    """Raise the unsubmitted rest of a prefetch to demand."""
    if w.unsubmitted[copy]:
        leave_early(w, copy)
        demand(w, copy)
    w.demanded[copy] = 1


def retract(w: Wire, t: Times, copy: int) -> int:
    """Skip the unsubmitted chunks of a prefetch; it never arrives unless it already has. Bytes copied in vain."""
    moved = bytes_submitted(w, t, copy)
    if w.unsubmitted[copy]:
        leave_early(w, copy)
        w.unfinished[copy] -= w.unsubmitted[copy]
        w.unsubmitted[copy] = 0
    w.cancelled[copy] = 1
    if w.unfinished[copy] == 0:
        free_copy(w, copy)
    return moved


def bytes_submitted(w: Wire, t: Times, copy: int) -> int:
    """Bytes of a load that the copy engine has been given so far."""
    return t.expert_bytes if w.submitted[copy] == t.chunks else w.submitted[copy] * t.chunk_bytes


def busy_so_far_ns(w: Wire) -> int:
    """Nanoseconds the way to the device has been busy up to now, the chunk on the wire included."""
    i = w.i
    on_wire = i[LINK_NOW] - (i[HEAD_END] - i[HEAD_NS]) if i[FIFO_LEN] else 0
    return i[BUSY] + max(0, on_wire)


def write_back(w: Wire, t: Times, slot: int) -> None:
    """Queue the copy of a slot's expert to the host; the next load into the slot waits for it."""
    begin = w.i[D2H_FREE]
    if begin < w.i[LINK_NOW]:
        begin = w.i[LINK_NOW]
    w.i[D2H_FREE] = begin + t.write_back_ns
    w.slot_ready[slot] = begin + t.write_back_ns


def host_expert(w: Wire, tokens: int) -> None:
    """Queue one expert for the host, for ``tokens`` tokens."""
    i = w.i
    if i[HOST_LEN] == 0:
        i[HOST_HEAD] = 0
        i[HOST_NEXT] = i[LINK_NOW]
    w.host[i[HOST_HEAD] + i[HOST_LEN]] = tokens
    i[HOST_LEN] += 1


# --- time -------------------------------------------------------------------------------------------------------------


def advance(w: Wire, t: Times, now: int) -> None:
    """Go on to ``now``: chunk ends and host experts up to and at ``now``, submissions before it."""
    i = w.i
    if now <= i[LINK_NOW]:
        return
    settle(w, t)
    while True:
        at = next_event(w, t)
        if at > now:
            break
        step(w, t, at, now, now)
    i[LINK_NOW] = now


def until_arrival(w: Wire, t: Times) -> None:
    """Go on to the end of the next load that is not cancelled."""
    i = w.i
    settle(w, t)
    while True:
        at = next_event(w, t)
        if i[HEAD_END] == at:
            jump(w, t, NEVER)
            at = i[HEAD_END]
            head = w.fifo[0]
            if w.unfinished[head] == 1 and w.cancelled[head] == 0:
                finish_head(w, t)
                i[LINK_NOW] = at
                return
        step(w, t, at, NEVER, NEVER)


def settle(w: Wire, t: Times) -> None:
    """What is due at this very moment after all effects: the host's next expert, then submissions."""
    if w.i[HOST_NEXT] == w.i[LINK_NOW]:
        begin_on_host(w, t, w.i[LINK_NOW])
    submit(w, t, w.i[LINK_NOW])


def next_event(w: Wire, t: Times) -> int:
    """When the next chunk ends, the host begins an expert, or a load may be submitted that had to wait."""
    i = w.i
    at = i[HEAD_END]
    if i[HOST_NEXT] < at:
        at = i[HOST_NEXT]
    if i[FIFO_LEN] < t.max_submitted and i[DEMAND_LEN] + i[EARLY_LEN] > 0:
        ready = w.ready[w.demand[i[DEMAND_HEAD]] if i[DEMAND_LEN] else w.early[i[EARLY_LEN] - 1]]
        if i[LINK_NOW] < ready < at:
            at = ready
    return at


def step(w: Wire, t: Times, at: int, limit: int, before: int) -> None:
    """What happens at ``at``; equal chunks that follow up to ``limit``; submissions only before ``before``."""
    i = w.i
    if i[HEAD_END] == at:
        if limit < NEVER:
            jump(w, t, limit)
            at = i[HEAD_END]
        finish_head(w, t)
    if i[HOST_NEXT] == at:
        begin_on_host(w, t, at)
    i[LINK_NOW] = at
    if at < before:
        submit(w, t, at)


def begin_on_host(w: Wire, t: Times, at: int) -> None:
    """The host's next expert; its slowdown is fixed here: whether the link has anything to do."""
    i = w.i
    tokens = w.host[i[HOST_HEAD]]
    i[HOST_HEAD] += 1
    i[HOST_LEN] -= 1
    busy = i[FIFO_LEN] + i[DEMAND_LEN] + i[EARLY_LEN] > 0
    i[HOST_END] = at + (t.host_shared_ns[tokens] if busy else t.host_expert_ns[tokens])
    i[HOST_BUSY] += i[HOST_END] - at
    i[HOST_NEXT] = i[HOST_END] if i[HOST_LEN] else NEVER


def backlog_ns(w: Wire, t: Times) -> int:
    """Time from now until the link is through with what is submitted and with demand loads."""
    i = w.i
    ns = 0 if i[HEAD_END] == NEVER else i[HEAD_END] - i[LINK_NOW]
    if i[FIFO_LEN] > 1:
        ns += (i[FIFO_LEN] - 1) * t.full_ns
    for k in range(i[DEMAND_LEN]):
        copy = w.demand[i[DEMAND_HEAD] + k]
        ns += (w.unsubmitted[copy] - 1) * t.full_ns + t.last_ns
    return ns


# --- inside -----------------------------------------------------------------------------------------------------------


def start(w: Wire, t: Times, at: int) -> None:
    """Put the first of the FIFO on the wire; its slowdown is fixed here."""
    i = w.i
    copy = w.fifo[0]
    last = w.unfinished[copy] == 1 and w.submitted[copy] == t.chunks
    ns = t.last_ns if last else t.full_ns
    if at < i[D2H_FREE]:
        ns = max(ns, t.last_duplex_ns if last else t.full_duplex_ns)
    if at < i[HOST_END]:
        ns = max(ns, t.last_shared_ns if last else t.full_shared_ns)
    i[HEAD_NS] = ns
    i[HEAD_END] = at + ns
    if w.started[copy] == NEVER:
        w.started[copy] = at


def finish_head(w: Wire, t: Times) -> None:
    """The chunk on the wire ends; the next submitted one starts."""
    i = w.i
    copy = w.fifo[0]
    end = i[HEAD_END]
    left = i[FIFO_LEN] - 1
    i[FIFO_LEN] = left
    for k in range(left):
        w.fifo[k] = w.fifo[k + 1]
    i[BUSY] += i[HEAD_NS]
    unfinished = w.unfinished[copy] - 1
    w.unfinished[copy] = unfinished
    if unfinished == 0:
        if w.cancelled[copy]:
            free_copy(w, copy)
        else:
            w.done[copy] = end
    if left:
        start(w, t, end)
    else:
        i[HEAD_END] = NEVER


def submit(w: Wire, t: Times, at: int) -> None:
    """Fill the copy engine's FIFO from the queues; nothing overtakes a load that has to wait for its slot."""
    i = w.i
    while i[FIFO_LEN] < t.max_submitted:
        demanded = i[DEMAND_LEN] > 0
        if demanded:
            copy = w.demand[i[DEMAND_HEAD]]
        elif i[EARLY_LEN] > 0:
            copy = w.early[i[EARLY_LEN] - 1]
        else:
            return
        if w.ready[copy] > at:
            return
        w.unsubmitted[copy] -= 1
        w.submitted[copy] += 1
        i[SUBMITTED_CHUNKS] += 1
        if w.unsubmitted[copy] == 0:
            if demanded:
                i[DEMAND_HEAD] += 1
                i[DEMAND_LEN] -= 1
            else:
                i[EARLY_LEN] -= 1
        w.fifo[i[FIFO_LEN]] = copy
        i[FIFO_LEN] += 1
        if i[FIFO_LEN] == 1:
            start(w, t, at)


def jump(w: Wire, t: Times, limit: int) -> None:
    """Skip whole chunks of the load on the wire while nothing but its own equal chunks comes and goes before
    ``limit``."""
    i = w.i
    head = w.fifo[0]
    if i[DEMAND_LEN] > 0:
        following = w.demand[i[DEMAND_HEAD]]
    elif i[EARLY_LEN] > 0:
        following = w.early[i[EARLY_LEN] - 1]
    else:
        return
    if following != head or i[FIFO_LEN] != t.max_submitted:
        return
    if i[HEAD_END] < i[D2H_FREE] or i[HEAD_END] < i[HOST_END] or i[HOST_NEXT] < NEVER:
        return
    for k in range(1, t.max_submitted):
        if w.fifo[k] != head:
            return
    skip = w.unsubmitted[head] if t.max_submitted > 1 else w.unsubmitted[head] - 1
    if skip * t.full_ns >= limit - i[HEAD_END]:
        skip = (limit - i[HEAD_END] - 1) // t.full_ns
    if skip <= 0:
        return
    w.unsubmitted[head] -= skip
    w.submitted[head] += skip
    w.unfinished[head] -= skip
    i[SUBMITTED_CHUNKS] += skip
    i[BUSY] += i[HEAD_NS] + (skip - 1) * t.full_ns
    i[HEAD_NS] = t.full_ns
    i[HEAD_END] += skip * t.full_ns
    if w.unsubmitted[head] == 0:
        if i[DEMAND_LEN] > 0:
            i[DEMAND_HEAD] += 1
            i[DEMAND_LEN] -= 1
        else:
            i[EARLY_LEN] -= 1
