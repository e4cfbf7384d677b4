"""Timelines worked by hand of what the link and the host do: submission, write-back, no copy stream, host experts.

The machine and its round figures stand in `by_hand`.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from by_hand import by_hand, eager, guesses, hand_machine
from conftest import trace_of

from sim.caches import lru
from sim.machine import HardwareProfile
from sim.spec import Bound, options
from traces import DECODE


@pytest.mark.parametrize(("submitted", "starts", "ends"), [(1, 23000, 43000), (2, 24500, 44500), (4, 27500, 47500)])
def test_a_demand_load_waits_for_every_submitted_chunk(submitted: int, starts: int, ends: int) -> None:
    """Two layers, top-1, eight chunks of 1500 (1000 for 1728 bytes, 500 fixed), 12000 a load; 1.3 is guessed wrongly.
    0.0 travels 3500-15500, computed to 18500; 1.3 from 15500. Layer 1: known 20500, planned 21500, effects 22000, when
    the fifth chunk of 1.3 is on the wire until 23000. With one submitted, that is all; with two, the sixth follows to
    24500; with four, all eight to 27500. Then 1.1 takes 12000, is computed in 3000, and the head comes: +20000.
    """
    routed = [[[0], [1]]]
    run = eager(chunk_bytes=1728, max_submitted=submitted)
    found = by_hand(trace_of(routed, scores=guesses(routed, (0, 0, 1, {3: 1.0}))), run, 1)
    assert [s[1:] for s in found.link()] == [
        ("0.0", 3500, 15500),
        ("1.3", 15500, starts),
        ("1.1", starts, starts + 12000),
    ]
    assert found.ledger.decode_ns == [ends]
    chunks = (starts - 15500) // 1500
    counts = found.ledger.phases[DECODE]
    assert (counts.wasted_bytes, counts.link_busy_ns) == (chunks * 1728, (16 + chunks) * 1500)


def one_way(gb_s: float) -> HardwareProfile:
    """The machine by hand whose H2D moves ``gb_s`` while D2H is busy."""
    machine = hand_machine()
    return replace(machine, link=replace(machine.link, h2d_duplex_gb_s=gb_s))


def test_a_load_waits_until_its_slot_is_written_back() -> None:
    """One layer, top-1, one slot; 0 then 1. Token 1 takes 21500. Token 2: effects at 25000, the victim travels back
    25000-33500, and only then 1 comes, 33500-43500; computed to 46500, head to 51500: 30000, the link idle meanwhile.
    """
    found = by_hand(trace_of([[[0]], [[1]]]), "on_demand:write_back=1", 1)
    assert found.ledger.decode_ns == [21500, 30000]
    assert [s[1:] for s in found.link()] == [("0.0", 3500, 13500), ("0.1", 33500, 43500)]
    assert [s[2:] for s in found.timeline if s[0] == "link D2H"] == [(25000, 33500)]
    assert found.ledger.phases[DECODE].link_busy_ns == 20000


@pytest.mark.parametrize(
    ("gb_s", "first", "second", "length"), [(1.728, 53500, 63500, 40000), (0.864, 57500, 67500, 44000)]
)
def test_writing_back_beside_a_load_with_and_without_duplex_slowdown(
    gb_s: float, first: int, second: int, length: int
) -> None:
    """One layer, top-2, two slots; [0, 1] then [2, 3]. Token 1 takes 31500. Token 2: effects at 35000; the victim of 2
    travels back 35000-43500, that of 3 43500-52000. Load 2 waits until 43500: without slowdown 43500-53500, load 3 to
    63500. With it, its chunks that start at 43500 and 48000 take 4500 each, those at 52500 and 55000 again 2500: 57500;
    load 3 to 67500. The last expert takes 3000, the head 5000.
    """
    found = by_hand(trace_of([[[0, 1]], [[2, 3]]]), "on_demand:write_back=1", 2, one_way(gb_s))
    assert found.ledger.decode_ns == [31500, length]
    assert [s[1:] for s in found.link()][2:] == [("0.2", 43500, first), ("0.3", first, second)]
    assert [s[2:] for s in found.timeline if s[0] == "link D2H"] == [(35000, 43500), (43500, 52000)]


def test_what_a_claim_displaces_is_written_back_and_slows_the_rest_of_its_copy() -> None:
    """Two layers, top-1, one slot each, one to land in. Token 1 takes 38000. In token 2, 1.1 travels from 41500; when
    the plan of layer 1 reaches the link at 47500, 1.0 gives way and travels back 47500-56000. The third chunk of 1.1
    started at 46500 and is quick, until 49000; the fourth takes 4500, until 53500. Computed to 56500, head to 61500:
    23500.
    """
    routed = [[[0], [0]], [[0], [1]]]
    trace = trace_of(routed, scores=guesses(routed, (1, 0, 1, {1: 1.0})))
    found = by_hand(trace, eager(write_back=True), 1)
    assert found.ledger.decode_ns == [38000, 23500]
    assert found.link()[-1] == ("link H2D", "1.1", 41500, 53500)
    assert [s[1:] for s in found.timeline if s[0] == "link D2H"] == [("slot 1", 47500, 56000)]


@pytest.mark.parametrize(("write_back", "second"), [(0, 21000), (1, 29500)])
def test_without_a_copy_stream_copies_and_compute_take_turns(write_back: int, second: int) -> None:
    """One layer, top-1, one slot; 0 then 1. Each token 2000 + 1000 + a load of 10000 + 3000 + 5000; with write-back the
    second also waits 8500 for its victim. No copier is woken."""
    found = by_hand(trace_of([[[0]], [[1]]]), f"on_demand:copy_stream=0,write_back={write_back}", 1)
    assert found.ledger.decode_ns == [21000, second]
    counts = found.ledger.phases[DECODE]
    assert (counts.link_busy_ns, counts.stall_miss_ns) == (20000, 20000 + 8500 * write_back)


def test_as_released_every_copy_and_its_victim_come_before_compute() -> None:
    """One copy an expert (500 + 8000) each way, none beside compute: token 1 takes 2000 + 1000 + 8500 + 3000 + 5000,
    token 2 also 8500 for the victim."""
    ledger = by_hand(trace_of([[[0]], [[1]]]), "mixtral_offloading", 1).ledger
    assert ledger.decode_ns == [19500, 28000]
    assert ledger.phases[DECODE].stall_miss_ns == 8500 + 17000


def with_host(fixed_s: float, efficiency: float) -> HardwareProfile:
    """One expert on the host: ``fixed_s`` + 2000 a token. Of the 0.85 of the memory's 3.456 bytes a nanosecond that
    host and link reach together, the link leaves 1.2096: half of what a host of ``efficiency`` 0.7 reaches alone, four
    fifths for one of 0.4375. By that an expert takes longer beside the link.
    """
    machine = hand_machine(host_expert={"4": (fixed_s, 2e-6)})
    return replace(machine, host_memory_gb_s=3.456, host_memory_efficiency=efficiency)


def test_the_host_and_the_link_slow_each_other() -> None:
    """One layer, top-2, three slots, misses on the host; an expert takes it 6000, or 12000 beside the link. Token 1
    fills two free slots: 31500. Token 2 routes 2 and 3: known 33500, planned 34500, effects 35000. 2 takes the free
    slot; its chunks start at 35000, 38500, 42000 and 45500, all before the host is done with 3 at 47000, so each takes
    3500: 49000. Stall 14500, computed to 52000, head to 57000: 25500. Token 3 routes 3 and 0: planned 60000, effects
    60500; 0 is computed to 63000, 3 on the host with the link idle 60500-66500: stall 3500, head to 71500: 14500.
    """
    trace = trace_of([[[0, 1]], [[2, 3]], [[3, 0]]])
    found = by_hand(trace, "on_demand:miss=cpu", 3, with_host(4e-6, 0.7))
    assert found.ledger.decode_ns == [31500, 25500, 14500]
    assert [s[1:] for s in found.timeline if s[0] == "host"] == [
        ("expert 0.3", 35000, 47000),
        ("expert 0.3", 60500, 66500),
    ]
    assert found.link()[-1] == ("link H2D", "0.2", 35000, 49000)
    counts = found.ledger.phases[DECODE]
    assert (counts.hits, counts.misses, counts.host_computed, counts.demand_loads) == (1, 5, 2, 3)


def test_a_split_loads_the_first_miss_and_computes_the_second_on_the_host() -> None:
    """One layer, top-2, two slots; an expert takes the host 10000, or 12500 beside the link. Token 1 fills both slots:
    31500. Token 2 routes 2 and 3. Foreseen ends: both on the host 20000, one loaded max(10000 + 3000, 12500), both
    loaded 23000; so 2 is loaded. 3 on the host 35000-47500 slows all four chunks of 2, 35000-49000; computed to 52000,
    head to 57000: 25500.
    """
    found = by_hand(trace_of([[[0, 1]], [[2, 3]]]), "on_demand:miss=split", 2, with_host(8e-6, 0.4375))
    assert found.ledger.decode_ns == [31500, 25500]
    assert found.loads()[2:] == [(1, "demand", "0.2", 0, 0)]
    assert ("host", "expert 0.3", 35000, 47500) in found.timeline
    assert found.link()[-1] == ("link H2D", "0.2", 35000, 49000)


def test_without_a_copy_stream_the_host_takes_its_turn_too() -> None:
    """As the split above, serial: token 1 takes 2000 + 1000 + 2 loads + 2 experts + 5000 = 34000; token 2 one load, one
    expert on the host at 10000 (the link idle by then), one on the device: 31000."""
    found = by_hand(trace_of([[[0, 1]], [[2, 3]]]), "on_demand:miss=split,copy_stream=0", 2, with_host(8e-6, 0.4375))
    assert found.ledger.decode_ns == [34000, 2000 + 1000 + 10000 + 10000 + 3000 + 5000]


class Nothing(NamedTuple):
    """No parameters."""


def test_a_pool_gives_a_layer_the_slot_of_another() -> None:
    """Two layers, top-1, two slots each in one pool of four. Layer 0 routes 0, 1, 2, 2, layer 1 routes 0, 0, 0, 1. A
    layer with a load takes 2000 + 1000 + 500 + 10000 + 3000, one without 6000: 38000, 27500, 27500. Token 4 finds the
    pool full of 0.0, 0.1, 0.2 and 1.0; 1.1 takes the slot of 0.0, the least recent of all: 27500.
    """
    pooled = SimpleNamespace(__name__="tests.pool", score=lru.score, POOLED=True)
    run = options("on_demand", chunk_bytes=3456, max_submitted=1).replace(cache=Bound(pooled, Nothing()))
    found = by_hand(trace_of([[[0], [0]], [[1], [0]], [[2], [0]], [[2], [1]]]), run, 2)
    assert found.ledger.decode_ns == [38000, 27500, 27500, 27500]
    assert found.loads()[-1] == (7, "demand", "1.1", 0, 0)
    assert found.log[-1]["evicted_layer"] == 0
    assert found.ledger.phases[DECODE].hits == 3
