"""The thread copier's own: a link that watches copies, what the streams are given, errors, and its end."""

from __future__ import annotations

import gc
import math
import os
import random
import signal
import threading
import time
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the runtime extra is not installed")

from copy_streams import Done, Held, HeldStream, MemoryStream  # noqa: E402

from runtime.copier import CopierError  # noqa: E402
from runtime.copier_process import Batch, Link, Request  # noqa: E402
from runtime.cuda_copier import ThreadCopier  # noqa: E402
from runtime.devices import open_device  # noqa: E402
from runtime.store import ExpertRows, SlotPool  # noqa: E402

SIZE = 4000  # bytes of an expert


# The link that watches, no clock


class Watched:
    """A link of 1 byte a nanosecond (None: unpaced), whose copies are done when ``copied`` says so."""

    def __init__(self, bytes_per_s: int | None = 10**9, max_submitted: int = 2) -> None:
        self.submitted: list[tuple[int, int, int]] = []  # now, load, offset
        self.ended: list[tuple[int, int, int]] = []  # load, offset, end
        self.copied = 0  # of the submitted, first in first out
        self.link = Link(100, 50, bytes_per_s, 0, max_submitted, self._submit, self._took, self._end)

    def _submit(self, chunk) -> None:
        chunk.ticket = len(self.submitted)
        self.submitted.append((self.link.now, chunk.request.load, chunk.offset))

    def _took(self, chunk) -> int | None:
        return 7 if chunk.ticket < self.copied else None

    def _end(self, chunk) -> None:
        self.ended.append((chunk.request.load, chunk.offset, chunk.end_ns))


def test_a_copied_chunk_ends_when_it_is_due():
    watched = Watched()
    watched.copied = 99
    watched.link.apply(Batch(1000, demand=[Request(0, 0, 0), Request(1, 1, 1)]))
    watched.link.advance(1180)
    assert watched.submitted == [(1000, 0, 0), (1000, 0, 50), (1050, 1, 0), (1100, 1, 50)]
    assert watched.ended == [(0, 0, 1050), (0, 50, 1100), (1, 0, 1150)]
    watched.link.advance(1200)
    assert watched.ended[-1] == (1, 50, 1200)
    assert watched.link.busy_ns == 200


def test_a_late_copy_ends_when_it_is_seen_and_pushes_back_those_behind_it():
    watched = Watched()
    watched.link.apply(Batch(0, demand=[Request(0, 0, 0), Request(1, 1, 1)]))
    for now in (50, 60, 90):
        watched.link.advance(now)
    assert watched.ended == []
    watched.copied = 99
    watched.link.advance(100)
    assert watched.ended == [(0, 0, 100)]
    watched.link.advance(149)
    assert len(watched.ended) == 1
    watched.link.advance(1000)
    assert watched.ended[1:] == [(0, 50, 150), (1, 0, 200), (1, 50, 250)]
    assert watched.link.busy_ns == 200


def test_without_a_pace_chunks_end_when_they_are_seen_and_were_busy_as_long_as_they_took():
    watched = Watched(bytes_per_s=None)
    watched.link.apply(Batch(0, prefetch=[Request(0, 0, 0), Request(1, 1, 1)]))
    watched.link.advance(40)
    assert (watched.ended, len(watched.submitted)) == ([], 2)
    watched.copied = 1
    watched.link.advance(70)
    assert watched.ended == [(0, 0, 70)]
    assert watched.submitted[2:] == [(70, 1, 0)]
    watched.copied = 3
    watched.link.advance(90)
    assert watched.ended[1:] == [(0, 50, 90), (1, 0, 90)]
    assert watched.link.busy_ns == 21


plans = st.lists(
    st.tuples(
        st.integers(0, 200),  # nanoseconds since the one before
        st.lists(st.integers(0, 3), max_size=2),  # joins and
        st.lists(st.integers(0, 3), max_size=2),  # retractions, as distances back from the newest load
        st.integers(0, 2),
        st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.5])), max_size=3),
        st.integers(0, 4),  # copies done meanwhile, for the link whose copies are not always done
    ),
    max_size=12,
)


def batches(plan):
    now, load = 0, 0
    for wait, joins, retracts, demand, prefetch, copied in plan:
        now += wait
        first = load + 1
        load += demand + len(prefetch)
        yield (
            Batch(
                now,
                [first - 1 - back for back in retracts],
                [first - 1 - back for back in joins],
                [Request(first + i, 0, 0) for i in range(demand)],
                [Request(first + demand + i, 0, 0, *p) for i, p in enumerate(prefetch)],
            ),
            copied,
        )


@settings(max_examples=150, deadline=None)
@given(plans, st.integers(1, 3))
def test_when_copies_are_never_late_it_is_the_link_of_the_process(plan, max_submitted):
    log = []
    plain = Link(100, 50, 10**9, 0, max_submitted, lambda c: log.append((c.request.load, c.offset, c.end_ns)))
    watched = Watched(max_submitted=max_submitted)
    watched.copied = 10**9
    for batch, _ in batches(plan):
        plain.apply(batch)
        watched.link.apply(batch)
    for link in (plain, watched.link):
        link.advance(10**6)
    assert watched.ended == log
    assert watched.link.busy_ns == plain.busy_ns


@settings(max_examples=150, deadline=None)
@given(plans, st.integers(1, 3), st.sampled_from([None, 10**9]))
def test_late_copies_change_no_rule(plan, max_submitted, pace):
    """Chunks end in the order of submission, none before it is copied or due, and no more are out than allowed."""
    watched = Watched(pace, max_submitted)
    now = 0
    for batch, copied in batches(plan):
        watched.copied = min(watched.copied + copied, len(watched.submitted))
        now = batch.sent_ns
        watched.link.apply(batch)
        assert len(watched.ended) <= watched.copied
        assert len(watched.submitted) - len(watched.ended) <= max_submitted
    watched.copied = 10**9
    for step in range(1000):
        watched.link.advance(now + 60 * step)
    assert not watched.link.submitted
    assert [(load, offset) for load, offset, _ in watched.ended] == [(load, at) for _, load, at in watched.submitted]
    ends = [end for *_, end in watched.ended]
    assert ends == sorted(ends)
    took = 0 if pace is None else 50
    for i, (end, (at, *_)) in enumerate(zip(ends, watched.submitted, strict=True)):
        assert end >= max(at, ends[i - 1] if i else 0) + took


# The thread


@pytest.fixture
def memory():
    """A store of 8 experts, each of its own byte, and 4 slots."""
    with ExpertRows(8, SIZE) as store, SlotPool(4, SIZE) as slots:
        for row in range(8):
            store.row(row).fill_(row + 1)
        yield store, slots


def started(memory, h2d, d2h=None, bytes_per_s=math.inf, chunk_bytes=1000, **options) -> ThreadCopier:
    return ThreadCopier(*memory, h2d, d2h, bytes_per_s=bytes_per_s, fixed_s=0.0, chunk_bytes=chunk_bytes, **options)


def gone(copier) -> bool:
    return not copier.thread.is_alive() and all(t.name != "copier" for t in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_left():
    yield
    assert all(t.name != "copier" for t in threading.enumerate())


@pytest.mark.parametrize("max_submitted", [1, 2, 3])
def test_no_more_chunks_than_allowed_are_submitted(memory, max_submitted):
    stream = HeldStream()
    with started(memory, stream, max_submitted=max_submitted) as copier:
        copier.apply(demand=[Request(i, i, i) for i in range(3)])
        for released in range(12):
            tickets = stream.wait_for(min(12, released + max_submitted))
            assert len(tickets) == min(12, released + max_submitted)
            tickets[released].release()
        assert [copier.wait().load for _ in range(3)] == [0, 1, 2]
        assert all((memory[1].row(i) == i + 1).all() for i in range(3))
        stats = copier.stats()
        assert (stats.chunks, stats.busy_ns, stats.demand_bytes, stats.late_chunks) == (12, 12_000, 3 * SIZE, 0)


def test_only_a_loads_first_chunk_waits_for_the_slots_reader(memory):
    stream, read = HeldStream(), threading.Event()
    with started(memory, stream, max_submitted=4) as copier:
        copier.apply(demand=[Request(0, 5, 2, after=read)])
        tickets = stream.wait_for(4)
        assert [t.after for t in tickets] == [read, None, None, None]
        read.set()
        for ticket in tickets:
            ticket.release()
        assert copier.wait().load == 0
    assert (memory[1].row(2) == 6).all()


def test_plans_are_obeyed_while_copies_are_under_way(memory):
    """One chunk of a prefetch is out; the rest of it is dropped, another one joins, demand goes first."""
    stream = HeldStream()
    with started(memory, stream, max_submitted=1) as copier:
        copier.apply(prefetch=[Request(0, 0, 0, 1), Request(1, 1, 1, 2), Request(2, 2, 2, 3)])
        stream.wait_for(1)
        copier.apply(retract=[0], demand=[Request(3, 3, 3)])
        copier.apply(join=[2])
        for count in range(1, 14):
            stream.wait_for(count)[-1].release()
        assert [copier.wait().load for _ in range(3)] == [3, 2, 1]
        stats = copier.stats()
        assert (stats.demand_bytes, stats.prefetch_bytes) == (2 * SIZE, SIZE + 1000)
        assert (memory[1].row(0)[:1000] == 1).all()
        assert (memory[1].row(0)[1000:] == 0).all()


def test_a_message_reaches_a_link_with_room_while_another_copy_is_held(memory):
    stream = HeldStream()
    with started(memory, stream, chunk_bytes=SIZE, max_submitted=2) as copier:
        copier.apply(demand=[Request(0, 0, 0)])
        stream.wait_for(1)
        copier.apply(demand=[Request(1, 1, 1)])
        assert stream.wait_for(2)[1].after is None
        for ticket in stream.tickets:
            ticket.release()
        copier.drain()


def test_an_expert_that_is_due_does_not_arrive_before_it_is_copied(memory):
    stream = HeldStream()
    with started(memory, stream, bytes_per_s=1e9, chunk_bytes=SIZE) as copier:
        copier.apply(demand=[Request(0, 0, 0)])
        (ticket,) = stream.wait_for(1)
        time.sleep(0.05)
        assert copier.arrived() == []
        before = time.monotonic_ns()
        ticket.release()
        assert copier.wait().end_ns >= before
        stats = copier.stats()
        assert stats.late_chunks == 1
        assert stats.worst_late_ns >= 40_000_000
        assert stats.busy_ns == SIZE  # the stated pace, not how long it took


def test_a_copied_expert_does_not_arrive_before_it_is_due(memory):
    with started(memory, MemoryStream(), bytes_per_s=40_000) as copier:
        begun = time.monotonic_ns()
        copier.apply(demand=[Request(0, 0, 0)])
        assert copier.wait().end_ns - begun >= 100_000_000


class Sleepy(MemoryStream):
    """Copies within ``submit``, which takes 30 ms."""

    def submit(self, target, source, after):
        time.sleep(0.03)
        return super().submit(target, source, after)


def test_a_thread_that_is_late_itself_does_not_date_arrivals_back(memory):
    with started(memory, Sleepy(), bytes_per_s=1e9, chunk_bytes=SIZE) as copier:
        begun = time.monotonic_ns()
        copier.apply(demand=[Request(i, i, i) for i in range(3)])
        ends = [copier.wait().end_ns - begun for _ in range(3)]
        assert [end >= 30_000_000 * (i + 1) for i, end in enumerate(ends)] == [True, True, True]
        assert copier.stats().late_chunks == 3


def test_both_directions_have_their_own_stream_and_pace(memory):
    h2d, d2h = HeldStream(), HeldStream()
    with started(memory, h2d, d2h, write_back_bytes_per_s=math.inf, chunk_bytes=SIZE) as copier:
        memory[1].row(3).fill_(99)
        copier.apply(demand=[Request(0, 0, 0)], write_back=[3, 2])
        down, up = h2d.wait_for(1), d2h.wait_for(2)
        assert len(h2d.tickets) == 1
        up[0].release()
        assert (up[0].target == 99).all()
        down[0].release()
        assert copier.wait().load == 0
        with pytest.raises(CopierError, match=r"longer than 0.1 s to finish its queue"):
            copier.drain(timeout_s=0.1)
        up[1].release()
        copier.drain()
        assert copier.stats().write_back_bytes == 2 * SIZE
    with pytest.raises(ValueError, match="needs a stream back"):
        started(memory, h2d, write_back_bytes_per_s=math.inf)


class Broken:
    """A stream or a ticket that fails in one of its methods, and is otherwise done."""

    def __init__(self, where: str) -> None:
        self.where = where

    def _try(self, name: str):
        if name == self.where:
            raise RuntimeError(f"broken in {name}")
        return {"submit": self, "done": self.where != "wait", "took_ns": 1, "wait": None}[name]

    def submit(self, *_):
        return self._try("submit")

    def done(self):
        return self._try("done")

    def wait(self):
        return self._try("wait")

    def took_ns(self):
        return self._try("took_ns")


@pytest.mark.parametrize("where", ["submit", "done", "wait", "took_ns"])
@pytest.mark.parametrize("call", ["wait", "drain", "stats", "apply"])
def test_an_exception_in_the_thread_reaches_the_caller_with_its_traceback(memory, where, call):
    copier = started(memory, Broken(where))
    copier.apply(demand=[Request(0, 0, 0)])
    copier.thread.join(30)
    calls = {"apply": lambda: copier.apply(demand=[Request(1, 1, 1)])}
    with pytest.raises(CopierError, match=rf"ended with [12] loads on their way[^$]*Traceback[^$]*broken in {where}"):
        calls.get(call, lambda: getattr(copier, call)())()
    with pytest.raises(CopierError, match="closed"):
        copier.wait()
    assert gone(copier)


def test_an_exception_wakes_a_caller_who_waits(memory):
    class LaterBroken(HeldStream):
        def submit(self, target, source, after):
            if self.tickets:
                raise RuntimeError("out of memory")
            return super().submit(target, source, after)

    stream = LaterBroken()
    with started(memory, stream, max_submitted=1) as copier:
        copier.apply(demand=[Request(0, 0, 0)])
        (ticket,) = stream.wait_for(1)
        threading.Timer(0.05, ticket.release).start()
        with pytest.raises(CopierError, match="out of memory"):
            copier.wait()


def test_close_drops_the_queue_and_waits_for_what_is_submitted(memory):
    """Slots may be freed as soon as it returns, so no copy into them may be under way."""
    stream = HeldStream()
    copier = started(memory, stream, bytes_per_s=1.0)
    copier.apply(demand=[Request(i, i, i) for i in range(4)])
    tickets = stream.wait_for(2)
    closing = threading.Thread(target=copier.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    for ticket in tickets:
        ticket.release()
    closing.join(30)
    assert not closing.is_alive()
    assert len(stream.tickets) == 2
    assert gone(copier)
    copier.close()
    with pytest.raises(CopierError, match="closed"):
        copier.apply(demand=[Request(9, 0, 0)])


@pytest.mark.parametrize("call", ["wait", "drain"])
def test_ctrl_c_leaves_no_thread(memory, call):
    stop = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    with started(memory, MemoryStream(), bytes_per_s=1.0) as copier:
        copier.apply(demand=[Request(0, 0, 0)])
        stop.start()
        with pytest.raises(KeyboardInterrupt):
            getattr(copier, call)()
    stop.join()
    assert gone(copier)


def test_a_copier_that_is_forgotten_ends_its_thread(memory):
    copier = started(memory, MemoryStream(), bytes_per_s=1.0)
    copier.apply(demand=[Request(0, 0, 0)])
    thread = copier.thread
    del copier
    gc.collect()
    assert not thread.is_alive()


class SlowStream:
    """Copies in a thread, in order, after random short delays; ends with the first None."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._queue: deque[Held | None] = deque()
        self._grown = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def submit(self, target, source, after) -> Held:
        ticket = Held(target, source, after)
        self._queue.append(ticket)
        self._grown.release()
        return ticket

    def stop(self) -> None:
        self._queue.append(None)
        self._grown.release()
        self.thread.join()

    def _run(self) -> None:
        while True:
            self._grown.acquire()
            ticket = self._queue.popleft()
            if ticket is None:
                return
            time.sleep(self._random.choice([0, 0, 0, 0, 1e-5, 3e-4]))
            ticket.release()


@pytest.mark.parametrize(("seed", "pace"), [(0, math.inf), (1, 4e7), (2, math.inf)])
def test_every_arrived_expert_is_whole_under_random_delays(memory, seed, pace):
    """Slots are reused as soon as their load has arrived or was retracted; each arrival's bytes are its own."""
    _, slots = memory
    draw = random.Random(seed)
    stream = SlowStream(seed)
    in_slot: dict[int, tuple[int, int]] = {}  # slot -> load, row; loads on their way
    free = [0, 1, 2, 3]
    load = 0
    with started(memory, stream, bytes_per_s=pace) as copier:
        while load < 400 or in_slot:
            plan: dict[str, list] = {"retract": [], "join": [], "demand": [], "prefetch": []}
            for slot, (number, _) in list(in_slot.items()):
                what = draw.choice(["", "", "", "", "join", "retract"])
                if what:
                    plan[what].append(number)
                if what == "retract":
                    del in_slot[slot]
                    free.append(slot)
            while load < 400 and free and draw.random() < 0.7:
                slot, row = free.pop(draw.randrange(len(free))), draw.randrange(8)
                in_slot[slot] = load, row
                plan[draw.choice(["demand", "prefetch"])].append(Request(load, row, slot, draw.randrange(3), 0.5))
                load += 1
            copier.apply(**plan)
            arrivals = copier.arrived()
            if in_slot and not arrivals and (not free or load == 400):
                arrivals = [copier.wait()]
            for arrival in arrivals:
                ((slot, row),) = [(s, r) for s, (number, r) in in_slot.items() if number == arrival.load]
                assert (slots.row(slot) == row + 1).all()
                del in_slot[slot]
                free.append(slot)
        copier.drain()
    stream.stop()


# A GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_on_a_gpu_a_load_waits_for_the_event_and_its_time_is_the_copys_own():
    device = open_device("cuda")
    size = 1 << 24
    with ExpertRows(2, size) as store, device.slots(1, size) as slots, device.hold(store):
        store.row(0).fill_(1)
        store.row(1).fill_(2)
        assert store.row(0).is_pinned()
        with device.copier(store, slots, chunk_bytes=1 << 22) as copier:
            copier.apply(demand=[Request(0, 0, 0)])
            copier.wait()
            torch.cuda._sleep(200_000_000)  # clock cycles, about 0.1 s
            seen = slots.row(0).clone()  # what reads the slot, behind the sleep
            copier.apply(demand=[Request(1, 1, 0, after=device.mark())])
            copier.wait()
            device.synchronize()
            assert (seen == 1).all()
            assert (slots.row(0) == 2).all()
            assert copier.stats().busy_ns < 50_000_000


def test_the_stand_ins_are_tickets():
    assert Done().done()
    assert not Held(torch.zeros(1), torch.zeros(1), None).done()
