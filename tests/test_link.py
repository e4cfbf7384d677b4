"""The link against a slow one that handles every chunk, one event at a time."""

from __future__ import annotations

from heapq import heappop, heappush

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.link import NEVER, ChunkTimes, Copy, Link

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

    def queue(self, load: int, priority: tuple) -> None:
        self.left[load] = self.chunks.number
        for chunk in range(self.chunks.number):
            self.waiting[load, chunk] = (*priority, chunk)
        heappush(self.events, (self.now, SUBMIT))

    def demand(self, load: int) -> None:
        self.turn += 1
        self.queue(load, (0, self.turn))

    def prefetch(self, load: int, key: tuple) -> None:
        self.queue(load, (1, key))

    def join(self, load: int) -> None:
        self.turn += 1
        for other, chunk in self.waiting:
            if other == load:
                self.waiting[other, chunk] = (0, self.turn, chunk)

    def retract(self, load: int) -> None:
        self.dead.add(load)
        self.waiting = {k: v for k, v in self.waiting.items() if k[0] != load}

    def write_back(self) -> None:
        self.d2h_end = max(self.d2h_end, self.now) + self.write_back_ns

    def start(self, at: int) -> None:
        last = self.engine[0][1] == self.chunks.number - 1
        alone = self.chunks.last_ns if last else self.chunks.full_ns
        both = self.chunks.last_duplex_ns if last else self.chunks.full_duplex_ns
        self.began = at
        heappush(self.events, (at + (both if at < self.d2h_end else alone), END))

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


OPERATION = st.tuples(
    st.integers(0, 60),  # nanoseconds since the one before
    st.sampled_from(["demand", "prefetch", "prefetch", "join", "retract", "write_back", "ask", "look"]),
    st.integers(0, 100),  # which load, or the layer a prefetch is for
)


@settings(deadline=None, max_examples=400)
@given(
    number=st.integers(1, 12),
    times=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 8)),
    max_submitted=st.integers(1, 4),
    write_back_ns=st.integers(1, 80),
    operations=st.lists(OPERATION, max_size=25),
)
def test_same_arrivals_busy_time_and_bytes_as_chunk_by_chunk(
    number: int, times: tuple[int, int, int], max_submitted: int, write_back_ns: int, operations: list
) -> None:
    full, last, slower = times
    chunks = ChunkTimes(number, 100, 7, full, last, full + slower, last + slower)
    if number == 1:
        chunks = chunks._replace(size=7, full_ns=last, full_duplex_ns=last + slower)
    link, slow = Link(chunks, max_submitted, write_back_ns), SlowLink(chunks, max_submitted, write_back_ns)
    copies: list[Copy] = []
    open_prefetches: list[int] = []
    now = 0

    def same() -> None:
        assert {i: c.done_ns for i, c in enumerate(copies) if c.done_ns != NEVER} == slow.done
        assert link.busy_so_far_ns() == slow.busy_so_far()
        assert link.submitted_chunks == slow.sent
        assert sum(map(link.bytes_submitted, copies)) == slow.sent_bytes

    for gap, what, which in [*operations, (100_000, "look", 0)]:
        if what == "ask":
            before = len(slow.done)
            found = link.next_arrival(now + gap)
            slow.advance(now + gap)
            expected = sorted(slow.done.values())[before:]
            assert found == (expected[0] if expected else NEVER)
        now += gap
        link.advance(now)
        slow.advance(now)
        if what == "demand":
            copies.append(Copy(0, 0, number, (0, 0.0, 0)))
            link.demand(copies[-1])
            slow.demand(len(copies) - 1)
        elif what == "prefetch":
            key = (which % 4, 0.0, len(copies))
            copies.append(Copy(0, 0, number, key))
            open_prefetches.append(len(copies) - 1)
            link.prefetch(copies[-1])
            slow.prefetch(len(copies) - 1, key)
        elif what == "write_back":
            link.write_back()
            slow.write_back()
        elif what in ("join", "retract") and open_prefetches:
            load = open_prefetches.pop(which % len(open_prefetches))
            getattr(link, what)(copies[load])
            getattr(slow, what)(load)
        same()


def test_a_demand_load_waits_for_submitted_chunks_only() -> None:
    link = Link(ChunkTimes(4, 10, 10, 5, 5, 5, 5), max_submitted=2)
    early, wanted = Copy(1, 0, 4, (1, 0.0, 0)), Copy(0, 1, 4, (0, 0.0, 1))
    link.prefetch(early)
    link.advance(1)
    link.demand(wanted)
    link.advance(100)
    assert (wanted.started_ns, wanted.done_ns, early.done_ns) == (10, 30, 40)


def test_effects_come_before_submissions_at_the_same_nanosecond() -> None:
    """At 5 the first chunk ends; the demand load of that instant goes before the prefetch's second chunk,
    however often the link was brought to 5 before."""
    link = Link(ChunkTimes(2, 10, 10, 5, 5, 5, 5), max_submitted=1)
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
        link = Link(ChunkTimes(94, 10, 3, 7, 2, 7, 2), max_submitted)
        copies = [Copy(0, e, 94, (0, 0.0, e)) for e in range(3)]
        for copy in copies:
            link.demand(copy)
        for now in range(0, 3000, step):
            link.advance(now)
        link.advance(3000)
        ends.append([copy.done_ns for copy in copies])
    assert ends[0] == ends[1] == [653, 1306, 1959]
