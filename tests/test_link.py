"""Both links, the SimPy driver's and the virtual one, against a slow one that handles every chunk, event by event."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import wire
from sim.link import NEVER, ChunkTimes, Copy, Link
from sim.state import BUSY, D2H_FREE, HEAD_END, HEAD_NS, HOST_END, LINK_NOW, SUBMITTED_CHUNKS, Times, Wire, new_wire

END, SUBMIT = 0, 2  # events at equal nanoseconds: chunk ends, then (1) what the caller does, then submissions


class SlowLink:
    """Every chunk is an object; a heap holds every event; the next chunk is the least of all that wait."""

    def __init__(self, chunks: ChunkTimes, max_submitted: int, write_back_ns: int) -> None:
        self.chunks, self.limit, self.write_back_ns = chunks, max_submitted, write_back_ns
        self.now = self.busy = self.sent_bytes = self.sent = self.turn = self.d2h_end = self.began = 0
        self.events: list[tuple[int, int]] = []
        self.waiting: dict[tuple[int, int], tuple] = {}  # (load, chunk) -> priority
        self.engine: list[tuple[int, int]] = []
        self.left: dict[int, int] = {}
        self.done: dict[int, int] = {}
        self.dead: set[int] = set()
        self.host_end = 0
        self.slot_ready: dict[int, int] = {}
        self.ready: dict[int, int] = {}

    def queue(self, load: int, slot: int, priority: tuple) -> None:
        self.left[load] = self.chunks.number
        self.ready[load] = self.slot_ready.get(slot, 0)
        for chunk in range(self.chunks.number):
            self.waiting[load, chunk] = (*priority, chunk)
        heappush(self.events, (self.now, SUBMIT))

    def demand(self, load: int, slot: int) -> None:
        self.turn += 1
        self.queue(load, slot, (0, self.turn))

    def prefetch(self, load: int, slot: int, key: tuple) -> None:
        self.queue(load, slot, (1, key))

    def join(self, load: int) -> None:
        self.turn += 1
        for other, chunk in self.waiting:
            if other == load:
                self.waiting[other, chunk] = (0, self.turn, chunk)
        heappush(self.events, (self.now, SUBMIT))

    def retract(self, load: int) -> None:
        self.dead.add(load)
        self.waiting = {k: v for k, v in self.waiting.items() if k[0] != load}
        heappush(self.events, (self.now, SUBMIT))

    def write_back(self, slot: int) -> None:
        self.d2h_end = self.slot_ready[slot] = max(self.d2h_end, self.now) + self.write_back_ns

    def start(self, at: int) -> None:
        last = self.engine[0][1] == self.chunks.number - 1
        chunks, took = self.chunks, [self.chunks.last_ns if last else self.chunks.full_ns]
        if at < self.d2h_end:
            took.append(chunks.last_duplex_ns if last else chunks.full_duplex_ns)
        if at < self.host_end:
            took.append(chunks.last_host_ns if last else chunks.full_host_ns)
        self.began = at
        heappush(self.events, (at + max(took), END))

    def step(self, at: int, kind: int) -> None:
        if kind == END:
            load, _ = self.engine.pop(0)
            self.busy += at - self.began
            self.left[load] -= 1
            if not self.left[load] and load not in self.dead:
                self.done[load] = at
            if self.engine:
                self.start(at)
            heappush(self.events, (at, SUBMIT))
            return
        while self.waiting and len(self.engine) < self.limit:
            chosen = min(self.waiting, key=lambda k: self.waiting[k])
            if self.ready[chosen[0]] > at:
                heappush(self.events, (self.ready[chosen[0]], SUBMIT))
                return
            del self.waiting[chosen]
            self.engine.append(chosen)
            self.sent += 1
            self.sent_bytes += self.chunks.last_size if chosen[1] == self.chunks.number - 1 else self.chunks.size
            if len(self.engine) == 1:
                self.start(at)

    def advance(self, now: int) -> None:
        while self.events and self.events[0] < (now, 1):
            self.step(*heappop(self.events))
        self.now = now

    def busy_so_far(self) -> int:
        return self.busy + (self.now - self.began if self.engine else 0)


class Virtual:
    """The virtual link, with the methods of the others."""

    def __init__(self, chunks: ChunkTimes, max_submitted: int, write_back_ns: int) -> None:
        lengths = {name: value for name, value in chunks._asdict().items() if name.endswith("_ns")}
        shared = {"full_shared_ns": lengths.pop("full_host_ns"), "last_shared_ns": lengths.pop("last_host_ns")}
        unused = Times._make([0] * len(Times._fields))
        self.times = unused._replace(
            chunks=chunks.number,
            load_ns=chunks.total_ns(),
            write_back_ns=write_back_ns,
            max_submitted=max_submitted,
            **lengths,
            **shared,
        )
        self.wire: Wire = new_wire(30, 4, max_submitted)
        self.copies: dict[int, int] = {}

    def add(self, load: int, slot: int, key: tuple[int, float, int]) -> int:
        self.copies[load] = wire.new_copy(self.wire, self.times, slot, key[0], -key[1], key[2])
        return self.copies[load]

    def retract(self, load: int) -> None:
        wire.retract(self.wire, self.times, self.copies.pop(load))

    def done(self) -> dict[int, int]:
        ends = {load: self.wire.done[copy] for load, copy in self.copies.items()}
        return {load: end for load, end in ends.items() if end != NEVER}

    def busy(self) -> int:
        i = self.wire.i
        return i[BUSY] + (i[LINK_NOW] - i[HEAD_END] + i[HEAD_NS] if i[HEAD_END] != NEVER else 0)


OPERATION = st.tuples(
    st.integers(0, 60),  # nanoseconds since the one before
    st.sampled_from(["demand", "prefetch", "prefetch", "join", "retract", "write_back", "host", "ask", "look"]),
    st.integers(0, 100),  # which load, the layer a prefetch is for, nanoseconds of host work
    st.integers(0, 2),  # slot
)


@settings(deadline=None, max_examples=500)
@given(
    number=st.integers(1, 12),
    times=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 8), st.integers(0, 8)),
    max_submitted=st.integers(1, 4),
    write_back_ns=st.integers(1, 80),
    operations=st.lists(OPERATION, max_size=25),
)
def test_same_arrivals_busy_time_and_bytes_as_chunk_by_chunk(
    number: int, times: tuple[int, int, int, int], max_submitted: int, write_back_ns: int, operations: list
) -> None:
    full, last, slower, shared = times
    if number == 1:
        full = last
    size = 7 if number == 1 else 100
    chunks = ChunkTimes(number, size, 7, full, last, full + slower, last + slower, full + shared, last + shared)
    link, slow = Link(chunks, max_submitted, write_back_ns), SlowLink(chunks, max_submitted, write_back_ns)
    virtual = Virtual(chunks, max_submitted, write_back_ns)
    w, t = virtual.wire, virtual.times
    copies: list[Copy] = []
    stretches: list[tuple[Copy, int, int]] = []
    link.watch(lambda *stretch: stretches.append(stretch))
    open_prefetches: list[int] = []
    dropped: set[int] = set()
    now = 0

    def same() -> None:
        assert {i: c.done_ns for i, c in enumerate(copies) if c.done_ns != NEVER} == slow.done
        assert virtual.done() == {load: end for load, end in slow.done.items() if load not in dropped}
        assert link.busy_so_far_ns() == slow.busy_so_far() == virtual.busy()
        assert link.submitted_chunks == slow.sent == w.i[SUBMITTED_CHUNKS]
        assert sum(map(link.bytes_submitted, copies)) == slow.sent_bytes

    for gap, what, which, slot in [*operations, (100_000, "look", 0, 0)]:
        if what == "ask":
            before = len(slow.done)
            found = link.next_arrival(now + gap)
            slow.advance(now + gap)
            expected = sorted(slow.done.values())[before:]
            assert found == (expected[0] if expected else NEVER)
        now += gap
        link.advance(now)
        slow.advance(now)
        wire.advance(w, t, now)
        load = len(copies)
        if what == "demand":
            copies.append(Copy(0, 0, number, (0, 0.0, load)))
            link.demand(copies[-1], slot)
            slow.demand(load, slot)
            wire.demand(w, virtual.add(load, slot, (0, 0.0, load)))
        elif what == "prefetch":
            key = (which % 4, -float(which % 3), load)
            copies.append(Copy(0, 0, number, key))
            open_prefetches.append(load)
            link.prefetch(copies[-1], slot)
            slow.prefetch(load, slot, key)
            wire.prefetch(w, virtual.add(load, slot, key))
        elif what == "write_back":
            end = link.write_back(slot)[1]
            slow.write_back(slot)
            wire.write_back(w, t, slot)
            assert end == slow.d2h_end == w.i[D2H_FREE]
        elif what == "host":
            link.host_end = slow.host_end = w.i[HOST_END] = now + which
        elif what in ("join", "retract") and open_prefetches:
            load = open_prefetches.pop(which % len(open_prefetches))
            getattr(link, what)(copies[load])
            getattr(slow, what)(load)
            if what == "join":
                wire.join(w, virtual.copies[load])
            else:
                virtual.retract(load)
                dropped.add(load)
        same()
    assert sum(end - begin for _, begin, end in stretches) == slow.busy
    assert all(a[2] <= b[1] for a, b in pairwise(stretches))


def test_a_demand_load_waits_for_submitted_chunks_only() -> None:
    link = Link(ChunkTimes(4, 10, 10, 5, 5, 5, 5, 5, 5), max_submitted=2)
    early, wanted = Copy(1, 0, 4, (1, 0.0, 0)), Copy(0, 1, 4, (0, 0.0, 1))
    link.prefetch(early)
    link.advance(1)
    link.demand(wanted)
    link.advance(100)
    assert (wanted.started_ns, wanted.done_ns, early.done_ns) == (10, 30, 40)


def test_effects_come_before_submissions_at_the_same_nanosecond() -> None:
    """At 5 the first chunk ends; the demand load of that instant goes before the prefetch's second chunk,
    however often the link was brought to 5 before."""
    link = Link(ChunkTimes(2, 10, 10, 5, 5, 5, 5, 5, 5), max_submitted=1)
    early, wanted = Copy(1, 0, 2, (1, 0.0, 0)), Copy(0, 1, 2, (0, 0.0, 1))
    link.prefetch(early)
    link.advance(5)
    link.advance(5)
    assert link.next_arrival(5) == NEVER
    link.demand(wanted)
    link.advance(100)
    assert (wanted.done_ns, early.done_ns) == (15, 20)


@pytest.mark.parametrize("max_submitted", [1, 2, 4])
def test_the_clock_may_stand_still_between_chunks(max_submitted: int) -> None:
    """Many short steps and one long one give the same times."""
    ends = []
    for step in (1, 1000):
        link = Link(ChunkTimes(94, 10, 3, 7, 2, 7, 2, 7, 2), max_submitted)
        copies = [Copy(0, e, 94, (0, 0.0, e)) for e in range(3)]
        for copy in copies:
            link.demand(copy)
        for now in range(0, 3000, step):
            link.advance(now)
        link.advance(3000)
        ends.append([copy.done_ns for copy in copies])
    assert ends[0] == ends[1] == [653, 1306, 1959]
