"""The copier: what it copies in which order (Link, no clock), and those that do it (loose clocks only).

What every copier promises is tested on the process, on the thread with memory for a GPU, and on a GPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the runtime extra is not installed")

from copy_streams import MemoryStream  # noqa: E402

from runtime.copier import CopierError  # noqa: E402
from runtime.copier_process import Batch, Link, Request, decode  # noqa: E402
from runtime.cuda_copier import ThreadCopier  # noqa: E402
from runtime.devices import open_device  # noqa: E402
from runtime.store import ExpertRows, SlotPool  # noqa: E402

ROOT = Path(__file__).parents[1]
SIZE = 10_000  # bytes of an expert


# The link by itself, times worked by hand


def link(expert_bytes=100, chunk_bytes=50, bytes_per_s=10**9, fixed_ns=10, max_submitted=2):
    log = []
    made = Link(
        expert_bytes,
        chunk_bytes,
        bytes_per_s,
        fixed_ns,
        max_submitted,
        lambda c: log.append((made.now, c.request.load, c.offset, c.size, c.end_ns)),
    )
    return made, log


def request(load, target=0, worth=0.0):
    return Request(load, load, load, target, worth)


def test_chunks_follow_each_other_without_a_gap():
    """Each lasts fixed_ns + size: 60, 60, 30; an idle link starts when the next batch is sent."""
    made, log = link(expert_bytes=120)
    made.apply(Batch(1000, demand=[request(0)]))
    made.advance(5000)
    made.apply(Batch(6000, demand=[request(1)]))
    assert log == [
        (1000, 0, 0, 50, 1060),
        (1000, 0, 50, 50, 1120),
        (1060, 0, 100, 20, 1150),
        (6000, 1, 0, 50, 6060),
        (6000, 1, 50, 50, 6120),
    ]
    assert made.next_submission_ns == 6060
    assert made.idle_from_ns is None
    made.advance(6060)
    assert made.next_submission_ns is None
    assert made.idle_from_ns == 6150


def test_a_chunk_ends_before_a_batch_takes_effect_before_the_next_is_submitted():
    """The batch sent at the very nanosecond of a chunk's end still comes before the prefetch's next chunk."""
    made, log = link(max_submitted=1)
    made.apply(Batch(0, prefetch=[request(0)]))
    made.apply(Batch(60, demand=[request(1)]))
    made.advance(10_000)
    assert [(load, offset) for _, load, offset, _, _ in log] == [(0, 0), (1, 0), (1, 50), (0, 50)]


def test_submitted_chunks_are_not_overtaken():
    made, log = link(expert_bytes=150)
    made.apply(Batch(0, prefetch=[request(0)]))
    made.apply(Batch(30, demand=[request(1)]))
    made.advance(10_000)
    assert [(load, offset) for _, load, offset, _, _ in log] == [(0, 0), (0, 50), (1, 0), (1, 50), (1, 100), (0, 100)]


def test_prefetches_go_by_target_then_worth_then_number():
    made, log = link(chunk_bytes=100, max_submitted=1)
    requests = [request(0, 9, 0.9), request(1, 8, 0.1), request(2, 8, 0.5), request(3, 8, 0.1), request(4, 7, 0.0)]
    made.apply(Batch(0, demand=[request(5)], prefetch=requests))
    made.advance(10_000)
    assert [load for _, load, *_ in log] == [5, 4, 2, 1, 3, 0]


def test_joined_prefetches_go_behind_earlier_demand_and_before_the_batchs_own():
    made, log = link(chunk_bytes=100, max_submitted=1)
    made.apply(Batch(0, demand=[request(0), request(1)], prefetch=[request(2, 5), request(3, 6), request(4, 7)]))
    made.apply(Batch(10, join=[4, 3, 99, 0], demand=[request(5)]))
    made.advance(10_000)
    assert [load for _, load, *_ in log] == [0, 1, 4, 3, 5, 2]
    assert made.copied_bytes == [500, 100, 0]


def test_retracting_drops_only_what_is_not_submitted():
    made, log = link(expert_bytes=200)
    made.apply(Batch(0, demand=[request(0)], prefetch=[request(1)]))
    made.apply(Batch(70, retract=[0, 1, 99], demand=[request(2)]))
    made.advance(10_000)
    chunks = [(load, offset) for _, load, offset, _, _ in log]
    assert chunks == [(0, 0), (0, 50), (0, 100), (2, 0), (2, 50), (2, 100), (2, 150)]
    assert made.busy_ns == 7 * 60
    assert made.chunks == 7


batches = st.lists(
    st.tuples(
        st.integers(0, 300),
        st.lists(st.integers(0, 3), max_size=2),  # joins, as distances back from the newest load
        st.lists(st.integers(0, 3), max_size=2),  # retractions
        st.integers(0, 2),
        st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.5, 1.0])), max_size=3),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(batches, st.integers(1, 3), st.sampled_from([1, 7, 40]))
def test_how_often_the_process_wakes_changes_nothing(plan, max_submitted, step):
    """Told the time every few nanoseconds, a link submits the same chunks at the same times as told at batches only."""
    seldom, expected = link(max_submitted=max_submitted)
    often, log = link(max_submitted=max_submitted)
    now, load = 0, 0
    retracted, started = set(), 0
    for wait, joins, retracts, demand, prefetch in plan:
        for t in range(now, now + wait, step):
            often.advance(t)
        now += wait
        retract = [load - back for back in retracts]
        retracted |= set(retract)
        requests = [request(load + 1 + i) for i in range(demand)]
        guesses = [request(load + 1 + demand + i, *p) for i, p in enumerate(prefetch)]
        batch = Batch(now, retract, [load - back for back in joins], requests, guesses)
        load += demand + len(prefetch)
        started += demand + len(prefetch)
        seldom.apply(batch)
        often.apply(batch)
    for made in (seldom, often):
        made.advance(10**9)
    assert log == expected
    assert [end for *_, end in log] == sorted({end for *_, end in log})
    copied = {n: sum(size for _, each, _, size, _ in log if each == n) for n in range(1, load + 1)}
    assert all(copied[n] == 100 for n in copied if n not in retracted)
    ends = [end for *_, end in log]
    for i, (at, *_) in enumerate(log):
        assert sum(end > at for end in ends[:i]) < max_submitted, "too many chunks submitted"


@given(st.lists(st.integers(-(2**60), 2**60), max_size=3), st.integers(0, 3), st.binary(max_size=5))
def test_messages_survive_the_wire(numbers, count, rest):
    requests = [Request(2**40 + i, i, 7, 3, 0.25) for i in range(count)]
    batch = Batch(123, numbers, numbers[1:], requests[1:], requests, [4, 5][:count])
    buffer = bytearray(batch.encode())
    whole = bytearray(buffer)
    for cut in range(len(whole)):
        assert decode(bytearray(whole[:cut])) is None
    buffer += rest
    _, got = decode(buffer)
    assert [list(part) for part in got[1:]] == [list(part) for part in batch[1:]]
    assert got.sent_ns == 123
    assert buffer == rest


# What every copier promises


@pytest.fixture(params=["process", "thread", pytest.param("cuda", marks=pytest.mark.gpu)])
def kind(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return request.param


@pytest.fixture
def memory(kind):
    """A store of 12 experts, each filled with its own pattern, and 6 slots."""
    device = open_device("cuda" if kind == "cuda" else "cpu")
    with ExpertRows(12, SIZE) as store, device.slots(6, SIZE) as slots, device.hold(store):
        for row in range(12):
            store.row(row).copy_(pattern(row))
        yield store, slots


@pytest.fixture
def started(kind):
    """Starts a copier of this kind; on its default link an expert takes 10 ms."""

    def start(memory, bytes_per_s=1e6, chunk_bytes=1000, **options):
        figures = {"bytes_per_s": bytes_per_s, "fixed_s": 0.0, "chunk_bytes": chunk_bytes} | options
        if kind == "thread":
            return ThreadCopier(*memory, MemoryStream(), MemoryStream(), **figures)
        return open_device("cuda" if kind == "cuda" else "cpu").copier(*memory, **figures)

    return start


def pattern(row: int) -> torch.Tensor:
    return torch.randint(0, 256, (SIZE,), generator=torch.Generator().manual_seed(row), dtype=torch.uint8)


def holds(slots, slot: int, row: int) -> bool:
    """Whether the slot has exactly the bytes of the store's row."""
    return torch.equal(slots.row(slot).cpu(), pattern(row))


def test_experts_arrive_whole_and_in_order(memory, started):
    slots = memory[1]
    with started(memory, bytes_per_s=1e5) as copier:
        begun = time.monotonic_ns()
        copier.apply(demand=[Request(i, 11 - i, i) for i in range(6)])
        assert copier.arrived() == []
        arrivals = []
        for i in range(6):
            arrivals.append(copier.wait())
            assert holds(slots, i, 11 - i)
            assert arrivals[i].end_ns <= time.monotonic_ns()
        assert [a.load for a in arrivals] == list(range(6))
        assert arrivals[-1].end_ns - begun >= 600_000_000
        assert copier.arrived() == []
        stats = copier.stats()
        assert (stats.demand_bytes, stats.prefetch_bytes, stats.write_back_bytes) == (6 * SIZE, 0, 0)
        assert (stats.chunks, stats.busy_ns) == (60, 600_000_000)


def test_demand_and_joined_prefetches_overtake(memory, started):
    _, slots = memory
    with started(memory, bytes_per_s=5e4) as copier:
        copier.apply(prefetch=[Request(0, 0, 0, 1), Request(1, 1, 1, 2), Request(2, 2, 2, 3), Request(3, 3, 3, 4)])
        copier.apply(join=[3], demand=[Request(4, 4, 4)])
        assert [copier.wait().load for _ in range(5)] == [3, 4, 0, 1, 2]
        assert all(holds(slots, i, i) for i in range(5))
        stats = copier.stats()
        assert (stats.demand_bytes, stats.prefetch_bytes) == (2 * SIZE, 3 * SIZE)


def test_a_retracted_loads_slot_ends_with_the_later_loads_bytes(memory, started):
    """Half a retracted expert may be in the slot, or still be submitted, when another is sent there."""
    _, slots = memory
    with started(memory) as copier:
        for load in range(0, 20, 2):
            copier.apply(prefetch=[Request(load, load % 12, 0, 1)])
            time.sleep(0.001 * (load % 7))
            copier.apply(retract=[load], demand=[Request(load + 1, (load + 1) % 12, 0)])
            assert copier.wait().load == load + 1
            assert holds(slots, 0, (load + 1) % 12)
        copier.drain()
        assert copier.arrived() == []
        assert holds(slots, 0, 19 % 12)


def test_a_load_retracted_after_its_last_byte_never_arrives_either(memory, started):
    with started(memory, bytes_per_s=1e9) as copier:
        copier.apply(demand=[Request(0, 0, 0), Request(1, 1, 1)])
        copier.drain()
        copier.apply(retract=[0])
        assert [a.load for a in copier.arrived()] == [1]
        with pytest.raises(CopierError, match="no load is on its way"):
            copier.wait()


def test_drain_waits_for_both_directions(memory, started):
    with started(memory, write_back_bytes_per_s=2e5) as copier:
        begun = time.monotonic_ns()
        copier.apply(demand=[Request(0, 0, 0)], write_back=[1, 2])
        copier.drain()
        assert time.monotonic_ns() - begun >= 100_000_000
        assert [a.load for a in copier.arrived()] == [0]
        stats = copier.stats()
        assert (stats.write_back_bytes, stats.write_back_busy_ns) == (2 * SIZE, 100_000_000)
        copier.drain()


def test_a_reader_who_is_slow_does_not_stop_the_link(memory, started):
    """More arrivals than a socket holds, none read before the end."""
    with started(memory, bytes_per_s=1e12, chunk_bytes=SIZE) as copier:
        for first in range(0, 20_000, 1000):
            copier.apply(demand=[Request(first + i, i % 12, i % 6) for i in range(1000)])
        copier.drain()
        assert [a.load for a in copier.arrived()] == list(range(20_000))


def test_misuse_is_refused_before_anything_is_sent(memory, started):
    store = memory[0]
    with started(memory) as copier:
        for wrong in (Request(0, 12, 0), Request(0, 0, 6), Request(0, -1, 0)):
            with pytest.raises(ValueError, match="rows are 0 to 11, slots 0 to 5"):
                copier.apply(demand=[wrong])
        with pytest.raises(ValueError, match="set write_back_bytes_per_s"):
            copier.apply(write_back=[0])
        with pytest.raises(ValueError, match="slot 6 is out of range"):
            copier.apply(write_back=[6])
        copier.apply(demand=[Request(0, 0, 0)])
        with pytest.raises(ValueError, match="load 0 is already on its way"):
            copier.apply(demand=[Request(0, 1, 1)])
        assert copier.wait().load == 0
    with pytest.raises(CopierError, match="closed"):
        copier.apply(demand=[Request(1, 0, 0)])
    with pytest.raises(CopierError, match="closed"):
        copier.arrived()
    with pytest.raises(ValueError, match="bytes_per_s is 0"):
        started(memory, bytes_per_s=0)
    with SlotPool(1, SIZE + 1) as other, pytest.raises(ValueError, match="make them equal"):
        started((store, other))


def test_waiting_ends(memory, started):
    with started(memory, bytes_per_s=1000) as copier:
        copier.apply(demand=[Request(7, 0, 0)])
        with pytest.raises(CopierError, match=r"none of the loads 7 .* within 0.1 s"):
            copier.wait(timeout_s=0.1)
        with pytest.raises(CopierError, match=r"longer than 0.1 s to finish its queue"):
            copier.drain(timeout_s=0.1)


# The process


@pytest.mark.parametrize("kind", ["process"], indirect=True)
def test_an_event_to_wait_for_is_refused_by_the_process(memory, started):
    with started(memory) as copier:
        with pytest.raises(ValueError, match="load 0 is to wait for an event"):
            copier.apply(demand=[Request(0, 0, 0, after=object())])
        copier.apply(demand=[Request(0, 0, 0)])
        assert copier.wait().load == 0


@pytest.mark.parametrize("kind", ["process"], indirect=True)
def test_the_end_of_the_process_reaches_the_caller(memory, started):
    with started(memory, bytes_per_s=1000) as copier:
        copier.apply(demand=[Request(0, 0, 0)])
        os.kill(copier.pid, signal.SIGKILL)
        with pytest.raises(CopierError, match=r"ended \(exit code -9\) with 1 loads"):
            copier.wait()
        with pytest.raises(CopierError, match="closed"):
            copier.wait()


@pytest.mark.parametrize("kind", ["process"], indirect=True)
def test_an_exception_in_the_process_reaches_the_caller_with_its_traceback(memory, started):
    with started(memory) as copier:
        copier._send(Batch(0, demand=[Request(0, 10**6, 0)]).encode())  # a row that apply would have refused
        with pytest.raises(CopierError, match="Traceback"):
            copier.drain()


@pytest.mark.parametrize("kind", ["process"], indirect=True)
def test_close_ends_the_process_in_the_middle_of_its_queue(memory, started):
    copier = started(memory, bytes_per_s=1000)
    copier.apply(demand=[Request(i, i, i) for i in range(6)])
    copier.close()
    with pytest.raises(ProcessLookupError):
        os.kill(copier.pid, 0)
    copier.close()


def test_the_process_needs_the_standard_library_only():
    path = ROOT / "runtime" / "copier_process.py"
    code = (
        f"import runpy, sys; runpy.run_path({str(path)!r}); "
        "print(sorted(m for m in sys.modules if m.split('.')[0] not in sys.stdlib_module_names | {'__main__'}))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_callers_script_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\n"
        "from runtime.copier import Copier, Request\n"
        "from runtime.store import ExpertRows, SlotPool\n"
        "with ExpertRows(1, 64) as store, SlotPool(1, 64) as slots:\n"
        "    with Copier(store, slots, bytes_per_s=1e9, fixed_s=0, chunk_bytes=64) as copier:\n"
        "        copier.apply(demand=[Request(0, 0, 0)])\n"
        "        print(copier.wait().load)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "once\n0\n", done.stderr
