"""Timelines worked by hand, to the nanosecond, and the two drivers' agreement on random settings.

The machine of the worked timelines: dense part 2000 (+ 100 a token in the prefill example), planning 1000, wake-up 500,
one expert 2000 + 1000 a token, head 5000. An expert of 13,824 bytes goes in four chunks of 3456 at 1.728 bytes a
nanosecond + 500: 2500 a chunk, 10,000 a load. One chunk is submitted at a time.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import random_setting, trace_of

from sim.experiment import Setting, pass_ends_ns, replay
from sim.ledger import Ledger, Timeline
from sim.machine import HardwareProfile, LinkProfile, Operators
from sim.spec import options
from traces import DECODE, PREFILL, Trace


def hand_machine(per_token_s: float = 0.0) -> HardwareProfile:
    laws = Operators((2e-6, per_token_s, 0.0), {"4": (2e-6, 1e-6)}, (5e-6, 0.0), host_s={"default": 1e-6})
    link = LinkProfile(h2d_gb_s=1.728, h2d_fixed_s=5e-7, d2h_gb_s=1.728, d2h_fixed_s=5e-7, h2d_duplex_gb_s=0.864)
    return HardwareProfile("by hand", 1.0, 1.0, link, wake_s=5e-7, operators={"tiny": laws})


def by_hand(trace: Trace, spec: str, slots: int, machine: HardwareProfile | None = None) -> tuple[Ledger, list]:
    """The ledger, and the timeline as (track, name, start, end) in nanoseconds."""
    run = options(spec, chunk_bytes=3456, max_submitted=1)
    setting = Setting(trace, machine or hand_machine(), trace.model, 4, slots, run)
    timeline = Timeline("by hand")
    ledger = replay(setting, timeline=timeline)
    times = ledger.ttft_ns + ledger.decode_ns
    assert pass_ends_ns(setting) == [sum(times[: i + 1]) for i in range(len(times))]
    return ledger, slices(json.loads(timeline.text()))


def slices(document: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    events = document["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found = [e for e in events if e["ph"] == "X"]
    return [
        (tracks[e["tid"]], e["name"], round(e["ts"] * 1000), round(e["ts"] * 1000) + round(e["dur"] * 1000))
        for e in found
    ]


def test_on_demand_with_misses_and_a_resident() -> None:
    """One layer, three slots; tokens route [0, 1] and [1, 2].

    Token 1: routing known 2000, planned 3000, effects 3500. Expert 0 on the link 3500-13500, expert 1 13500-23500.
    Stall 3000-13500 (10500), expert 0 13500-16500, stall 16500-23500 (7000), expert 1 23500-26500, head to 31500.
    Token 2: known 33500, planned 34500, effects 35000. Resident expert 1 34500-37500; expert 2 on the link
    35000-45000, stall 37500-45000 (7500), expert 2 45000-48000, head to 53000: the pass takes 21500.
    """
    ledger, timeline = by_hand(trace_of([[[0, 1]], [[1, 2]]]), "on_demand", slots=3)
    assert ledger.decode_ns == [31500, 21500]
    assert timeline == [
        ("compute", "attention 0", 0, 2000),
        ("compute", "plan 0", 2000, 3000),
        ("compute", "stall 0", 3000, 13500),
        ("link H2D", "0.0", 3500, 13500),
        ("compute", "expert 0.0", 13500, 16500),
        ("compute", "stall 0", 16500, 23500),
        ("link H2D", "0.1", 13500, 23500),
        ("compute", "expert 0.1", 23500, 26500),
        ("compute", "attention 0", 31500, 33500),
        ("compute", "plan 0", 33500, 34500),
        ("compute", "expert 0.1", 34500, 37500),
        ("compute", "stall 0", 37500, 45000),
        ("link H2D", "0.2", 35000, 45000),
        ("compute", "expert 0.2", 45000, 48000),
    ]
    counts = ledger.phases[DECODE]
    assert (counts.hits, counts.late, counts.misses) == (1, 0, 3)
    assert (counts.stall_miss_ns, counts.stall_late_ns, counts.link_busy_ns) == (25000, 0, 30000)
    assert (counts.compute_ns, counts.latency_ns) == (2 * 2000 + 4 * 3000 + 2 * 5000, 2 * 1000)
    assert (counts.h2d_bytes, counts.wasted_bytes) == (3 * 13824, 0)


def test_speculative_with_a_late_prefetch_and_one_retracted_on_the_wire() -> None:
    """Three layers, top-1, one slot a layer and two to land in; one token routes 0, 1, 2; guesses 1.1 (certain, right)
    from layer 0 and 2.3 (0.9, wrong) from layer 1.

    Layer 0: known 2000, planned 3000, effects 3500. 0.0 on the link 3500-13500, then the prefetch 1.1 from 13500, chunk
    ends 16000, 18500, 21000. Stall 3000-13500 (10500), expert 13500-16500.
    Layer 1: known 18500, when 1.1 is on its way: late. Planned 19500, effects 20000: its third chunk is on the wire,
    the fourth joins the demand loads; 2.3 is queued. 1.1 is there at 23500, stall 19500-23500 (4000), expert until
    26500. 2.3 from 23500, chunk ends 26000, 28500, 31000.
    Layer 2: known 28500, planned 29500, effects 30000: 2.3 is retracted while its third chunk is on the wire until
    31000, its fourth is skipped. 2.2 31000-41000, stall 29500-41000 (11500), expert 41000-44000, head to 49000.
    """
    scores = [[[[0.0] * 4] * 3 for _ in range(3)]]
    scores[0][0] = [[0, 1.0, 0, 0], [0.0] * 4, [0.0] * 4]
    scores[0][1] = [[0, 0, 0, 0.9], [0.0] * 4, [0.0] * 4]
    trace = trace_of([[[0], [1], [2]]], scores=scores)
    ledger, timeline = by_hand(trace, "speculative:lookahead=1,landing_slots=2", slots=1)
    assert ledger.decode_ns == [49000]
    assert [s for s in timeline if s[0] == "link H2D"] == [
        ("link H2D", "0.0", 3500, 13500),
        ("link H2D", "1.1", 13500, 23500),
        ("link H2D", "2.2", 31000, 41000),
    ]
    assert [s for s in timeline if s[1].startswith("stall")] == [
        ("compute", "stall 0", 3000, 13500),
        ("compute", "stall 1", 19500, 23500),
        ("compute", "stall 2", 29500, 41000),
    ]
    counts = ledger.phases[DECODE]
    assert (counts.hits, counts.late, counts.misses) == (0, 1, 2)
    assert (counts.prefetch_loads, counts.prefetch_used, counts.retracted) == (2, 1, 1)
    assert (counts.stall_miss_ns, counts.stall_late_ns) == (22000, 4000)
    assert counts.link_busy_ns == 15 * 2500
    assert (counts.h2d_bytes, counts.wasted_bytes) == (3 * 13824 + 3 * 3456, 3 * 3456)


def test_a_late_prefetch_is_computed_before_the_effects_of_its_own_plan() -> None:
    """As above without the wrong guess, but a wake-up of 6000 in place of 500: everything of layer 0 is 5500 later on
    the link, so 1.1 travels 19000-29000. Layer 1 begins at 22000, knows at 24000 and plans until 25000; 1.1 is there
    at 29000, before the effects of layer 1's plan reach the link at 31000, and is computed at once, until 32000.
    """
    scores = [[[[0.0] * 4] * 2 for _ in range(2)]]
    scores[0][0] = [[0, 1.0, 0, 0], [0.0] * 4]
    machine = replace(hand_machine(), wake_s=6e-6)
    trace = trace_of([[[0], [1]]], scores=scores)
    ledger, timeline = by_hand(trace, "speculative:lookahead=1,landing_slots=2", 1, machine)
    assert ("compute", "stall 1", 25000, 29000) in timeline
    assert ("compute", "expert 1.1", 29000, 32000) in timeline
    assert ledger.decode_ns == [37000]


def test_a_prefetch_that_arrives_while_the_host_plans_is_late_but_stalls_nobody() -> None:
    """Dense part 6500: layer 0 is planned at 7500, 0.0 travels 8000-18000, 1.1 18000-28000; layer 1 begins at 21000,
    knows at 27500, plans until 28500 and computes at once."""
    machine = hand_machine()
    laws = Operators((6.5e-6, 0.0, 0.0), {"4": (2e-6, 1e-6)}, (5e-6, 0.0), host_s={"default": 1e-6})
    machine = replace(machine, operators={"tiny": laws})
    scores = [[[[0.0] * 4] * 2 for _ in range(2)]]
    scores[0][0] = [[0, 1.0, 0, 0], [0.0] * 4]
    trace = trace_of([[[0], [1]]], scores=scores)
    ledger, timeline = by_hand(trace, "speculative:lookahead=1,landing_slots=2", 1, machine)
    assert ("link H2D", "1.1", 18000, 28000) in timeline
    assert ("compute", "expert 1.1", 28500, 31500) in timeline
    counts = ledger.phases[DECODE]
    assert (counts.hits, counts.late, counts.misses, counts.stall_late_ns) == (0, 1, 1, 0)


def test_lookahead_gates_take_their_time_and_nothing_else_does() -> None:
    """Gates of 100, 300 and 700 for one, two and three layers ahead; no guess is recorded, so only they differ."""
    machine = hand_machine()
    laws = replace(machine.operators["tiny"], gates=(1e-7, 3e-7, 7e-7))
    machine = replace(machine, operators={"tiny": laws})
    trace = trace_of([[[0], [1], [2]]] * 3, scores=[[[[0.0] * 4] * 3] * 3] * 3)
    plain, *looking = (
        by_hand(trace, spec, 1, machine)[0].decode_ns
        for spec in ("on_demand", *(f"speculative:lookahead={d},landing_slots=0" for d in (1, 2, 3, 4)))
    )
    for gates, found in zip((100, 300, 700, 700), looking, strict=True):
        assert [a - b for a, b in zip(found, plain, strict=True)] == [3 * gates] * 3


def test_a_prefill_streams_through_one_slot_and_leaves_the_cache_alone() -> None:
    """One layer, top-1, one cache slot and one stream slot; prefill routes 0, 1, 2, 0 and the next token 0.

    Known 2400, planned 3400, effects 3900: 0 (a free slot) and 1 (streamed) are queued, 2 must wait for the stream
    slot. 0 on the link 3900-13900, stall 10500, two tokens 13900-17900. 1 13900-23900, stall 6000, 23900-26900. Then 2
    may come, from 27400 to 37400: stall 10500, 37400-40400; head to 45400.
    The next token: 2100, planning to 48500, expert 0 to 51500, head to 56500: a hit.
    """
    trace = trace_of([[[0]], [[1]], [[2]], [[0]], [[0]]], prefill=4)
    ledger, timeline = by_hand(trace, "on_demand:stream_slots=1", 1, hand_machine(per_token_s=1e-7))
    assert ledger.ttft_ns == [45400]
    assert ledger.decode_ns == [11100]
    assert [s for s in timeline if s[0] == "link H2D"] == [
        ("link H2D", "0.0", 3900, 13900),
        ("link H2D", "0.1", 13900, 23900),
        ("link H2D", "0.2", 27400, 37400),
    ]
    prefill, decode = ledger.phases[PREFILL], ledger.phases[DECODE]
    assert (prefill.accesses, prefill.token_accesses, prefill.misses, prefill.stall_miss_ns) == (3, 4, 3, 27000)
    assert (decode.hits, decode.misses, decode.link_busy_ns) == (1, 0, 0)


def test_as_released_every_copy_and_its_victim_come_before_compute() -> None:
    """One copy an expert (500 + 8000) each way, none beside compute: token 1 takes 2000 + 1000 + 8500 + 3000 + 5000,
    token 2 also 8500 for the victim."""
    trace = trace_of([[[0]], [[1]]])
    ledger, _ = by_hand(trace, "mixtral_offloading", slots=1)
    assert ledger.decode_ns == [19500, 28000]
    assert ledger.phases[DECODE].stall_miss_ns == 8500 + 17000


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_the_virtual_clock_is_the_simpy_driver_to_the_nanosecond(first: int) -> None:
    for seed in range(first, first + 50):
        setting = random_setting(seed)
        ledger = replay(setting)
        lengths = sorted(ledger.ttft_ns + ledger.decode_ns)
        ends = pass_ends_ns(setting)
        assert sorted(end - start for start, end in zip([0, *ends], ends, strict=False)) == lengths, (
            f"seed {seed}: {setting.options.text}"
        )
