"""Timelines worked by hand, to the nanosecond: compute, prefetches and what becomes of them, prefill, batches.

The machine and its round figures stand in `by_hand`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from by_hand import by_hand, eager, guesses, hand_machine
from conftest import random_setting, tiny_model, trace_of

from sim.experiment import Setting, pass_ends_ns, replay, summary
from sim.machine import HardwareProfile
from sim.spec import options
from sim.timing import Timing
from traces import DECODE, PREFILL, Trace

SPECULATIVE = "speculative:lookahead=1,landing_slots=2,guard=0,trust=0"


def test_on_demand_with_misses_and_a_resident() -> None:
    """One layer, three slots; tokens route [0, 1] and [1, 2].

    Token 1: routing known 2000, planned 3000, effects 3500. Expert 0 on the link 3500-13500, expert 1 13500-23500.
    Stall 3000-13500 (10500), expert 0 13500-16500, stall 16500-23500 (7000), expert 1 23500-26500, head to 31500.
    Token 2: known 33500, planned 34500, effects 35000. Resident expert 1 34500-37500; expert 2 on the link
    35000-45000, stall 37500-45000 (7500), expert 2 45000-48000, head to 53000: the pass takes 21500.
    """
    ledger, timeline, log = by_hand(trace_of([[[0, 1]], [[1, 2]]]), "on_demand", slots=3)
    assert ledger.decode_ns == [31500, 21500]
    assert timeline == sorted(
        [
            ("compute", "attention 0", 0, 2000),
            ("compute", "plan 0", 2000, 3000),
            ("compute", "stall 0", 3000, 13500),
            ("link H2D", "0.0", 3500, 13500),
            ("compute", "expert 0.0", 13500, 16500),
            ("compute", "stall 0", 16500, 23500),
            ("link H2D", "0.1", 13500, 23500),
            ("compute", "expert 0.1", 23500, 26500),
            ("compute", "head", 26500, 31500),
            ("compute", "attention 0", 31500, 33500),
            ("compute", "plan 0", 33500, 34500),
            ("compute", "expert 0.1", 34500, 37500),
            ("compute", "stall 0", 37500, 45000),
            ("link H2D", "0.2", 35000, 45000),
            ("compute", "expert 0.2", 45000, 48000),
            ("compute", "head", 48000, 53000),
        ],
        key=lambda s: (s[2], s[3]),
    )
    assert [(r["visit"], r["expert"], r["slot"], r["evicted"]) for r in log] == [
        (0, 0, 0, None),
        (0, 1, 1, None),
        (1, 2, 2, None),
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
    ledger, timeline, _ = by_hand(trace, SPECULATIVE, slots=1)
    assert ledger.decode_ns == [49000]
    assert [s for s in timeline if s[0] == "link H2D"] == [
        ("link H2D", "0.0", 3500, 13500),
        ("link H2D", "1.1", 13500, 23500),
        ("link H2D", "2.3", 23500, 31000),
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


def test_computing_after_a_wait_takes_longer_by_a_share_of_it_up_to_a_limit() -> None:
    """A tenth of a wait, at most 1200. One layer, one slot, tokens routed 0, 1.

    Token 0: planned 3000, 0.0 there at 13500, stall 10500: 1050 more, expert until 17550, head until 22550. Token 1 the
    same. With chunks twice as long, 0.0 is there at 23500, stall 20500: only 1200 more.
    Without a copy stream: copy 3000-13000, 1000 more, expert until 17000, head until 22000.
    """
    machine = hand_machine(cooling={"default": (0.1, 1.2e-6)})
    trace = trace_of([[[0]], [[1]]])
    ledger, timeline, _ = by_hand(trace, "on_demand", 1, machine)
    assert ("compute", "expert 0.0", 13500, 17550) in timeline
    assert ledger.decode_ns == [22550, 22550]
    assert ledger.phases[DECODE].compute_ns == 2 * (2000 + 3000 + 1050 + 5000)
    slow = replace(machine, link=replace(machine.link, h2d_gb_s=0.768))
    ledger, timeline, _ = by_hand(trace, "on_demand", 1, slow)
    assert ("compute", "expert 0.0", 23500, 27700) in timeline
    ledger, timeline, _ = by_hand(trace, "on_demand:copy_stream=0,chunk_bytes=3456", 1, machine)
    assert ledger.decode_ns == [22000, 22000]
    assert ("compute", "expert 0.0", 13000, 17000) in timeline


def test_a_late_prefetch_is_computed_before_the_effects_of_its_own_plan() -> None:
    """As above without the wrong guess, but a wake-up of 6000 in place of 500: everything of layer 0 is 5500 later on
    the link, so 1.1 travels 19000-29000. Layer 1 begins at 22000, knows at 24000 and plans until 25000; 1.1 is there
    at 29000, before the effects of layer 1's plan reach the link at 31000, and is computed at once, until 32000.
    """
    scores = [[[[0.0] * 4] * 2 for _ in range(2)]]
    scores[0][0] = [[0, 1.0, 0, 0], [0.0] * 4]
    machine = replace(hand_machine(), wake_s=6e-6)
    trace = trace_of([[[0], [1]]], scores=scores)
    ledger, timeline, _ = by_hand(trace, SPECULATIVE, 1, machine)
    assert ("compute", "stall 1", 25000, 29000) in timeline
    assert ("compute", "expert 1.1", 29000, 32000) in timeline
    assert ledger.decode_ns == [37000]


def test_a_prefetch_that_arrives_while_the_host_plans_is_late_but_stalls_nobody() -> None:
    """Dense part 6500: layer 0 is planned at 7500, 0.0 travels 8000-18000, 1.1 18000-28000; layer 1 begins at 21000,
    knows at 27500, plans until 28500 and computes at once."""
    machine = hand_machine(dense=(6.5e-6, 0.0, 0.0))
    scores = [[[[0.0] * 4] * 2 for _ in range(2)]]
    scores[0][0] = [[0, 1.0, 0, 0], [0.0] * 4]
    trace = trace_of([[[0], [1]]], scores=scores)
    ledger, timeline, _ = by_hand(trace, SPECULATIVE, 1, machine)
    assert ("link H2D", "1.1", 18000, 28000) in timeline
    assert ("compute", "expert 1.1", 28500, 31500) in timeline
    counts = ledger.phases[DECODE]
    assert (counts.hits, counts.late, counts.misses, counts.stall_late_ns) == (0, 1, 1, 0)


def test_lookahead_gates_take_their_time_and_nothing_else_does() -> None:
    """Gates of 100, 300 and 700 for one, two and three layers ahead; no guess is recorded, so only they differ."""
    machine = hand_machine(gates=(1e-7, 3e-7, 7e-7))
    trace = trace_of([[[0], [1], [2]]] * 3, scores=[[[[0.0] * 4] * 3] * 3] * 3)
    plain, *looking = (
        by_hand(trace, spec, 1, machine)[0].decode_ns
        for spec in ("on_demand", *(f"speculative:lookahead={d},landing_slots=0,guard=0" for d in (1, 2, 3, 4)))
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
    ledger, timeline, _ = by_hand(trace, "on_demand:stream_slots=1", 1, hand_machine(dense=(2e-6, 1e-7, 0.0)))
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


def test_a_streamed_visit_computes_residents_first_and_fills_all_stream_slots_at_once() -> None:
    """One layer, top-1, one slot, two stream slots. The first prefill routes 0 alone: 21500 with its head. The second
    routes 1, 0, 2: known 23500, planned 24500, effects 25000. Resident 0 24500-27500 though routed after 1; 1 streams
    25000-35000, stall 7500, 35000-38000; 2 35000-45000, stall 7000, 45000-48000; head to 53000. Nothing is evicted.
    """
    trace = trace_of([[[0]], [[1]], [[0]], [[2]]], lengths=[1, 3], prefill=3)
    found = by_hand(trace, "on_demand", 1)
    assert found.ledger.ttft_ns == [21500, 31500]
    assert found.stalls()[1:] == [("compute", "stall 0", 27500, 35000), ("compute", "stall 0", 38000, 45000)]
    assert ("compute", "expert 0.0", 24500, 27500) in found.timeline
    assert found.loads() == [
        (0, "demand", "0.0", 0, None),
        (1, "stream", "0.1", 1, None),
        (1, "stream", "0.2", 2, None),
    ]
    counts = found.ledger.phases[PREFILL]
    assert (counts.hits, counts.misses, counts.demand_loads) == (1, 3, 3)


def test_two_sequences_decoding_together_are_one_visit_and_two_tokens() -> None:
    """Dense part 2000 + 100 a token, head 5000 + 500 a token; one layer, top-1, two slots. Pass 1 routes 0 and 1: known
    2200, planned 3200, effects 3700; 0 3700-13700, computed to 16700; 1 13700-23700, to 26700; head 6000, to 32700.
    Pass 2 routes 1 twice: planned 35900, one expert for two tokens 4000, to 39900; head to 45900: 13200.
    Only pass 2 counts, both tokens of it.
    """
    trace = trace_of([[[0]], [[1]], [[1]], [[1]]], lengths=[2, 2])
    pairs = np.array([2, 2], np.int32)
    batch = replace(trace, pass_lengths=pairs, token_sequence=np.array([0, 1, 0, 1], np.int32))
    machine = hand_machine(dense=(2e-6, 1e-7, 0.0), head=(5e-6, 5e-7))
    found = by_hand(batch, "on_demand", 2, machine)
    assert found.ledger.decode_ns == [32700, 13200]
    assert found.ledger.timed == [0, 2]
    counts = found.ledger.phases[DECODE]
    assert (counts.passes, counts.tokens, counts.accesses, counts.token_accesses) == (2, 4, 3, 4)
    assert (counts.hits, counts.misses) == (1, 2)
    setting = Setting(batch, machine, batch.model, 4, 2, options("on_demand", chunk_bytes=3456, max_submitted=1))
    assert summary(setting, found.ledger)["tpot_s"] == pytest.approx(13.2e-6)


def test_attention_grows_with_the_context() -> None:
    """Dense part 2000 + 100 for every token of context and of the pass: a prefill of 3 takes 300 more, the tokens after
    it 400 and 500 more; one expert, resident from then on.
    """
    trace = trace_of([[[0]]] * 5, prefill=3)
    ledger = by_hand(trace, "on_demand", 1, hand_machine(dense=(2e-6, 0.0, 1e-7))).ledger
    assert ledger.ttft_ns == [2300 + 1000 + 500 + 10000 + 5000 + 5000]
    assert ledger.decode_ns == [2400 + 1000 + 3000 + 5000, 2500 + 1000 + 3000 + 5000]


def roofline() -> tuple[HardwareProfile, Trace]:
    """6.912 bytes a nanosecond on the device, arithmetic free: 13,824 bytes of attention 2000, of an expert 2000; 6912
    of shared experts 1000, of the KV cache 1000 a token; 34,560 of the head 5000. Synchronisation 500, planning 1000.
    """
    machine = replace(
        hand_machine(), operators={}, memory_gb_s=6.912, memory_efficiency=1.0, tflops=1e6, sync_s=5e-7, host_s=1e-6
    )
    trace = trace_of([[[0]]] * 3)
    shape = replace(
        tiny_model(1, 4, 1),
        shared_bytes=6912,
        attention_bytes=13824,
        kv_bytes=6912,
        head_bytes=34560,
        dense_bytes=60000,
    )
    return machine, replace(trace, model=shape)


def test_shared_experts_are_computed_at_once_and_hide_a_load() -> None:
    """Token 1: attention 2000 and a KV cache of one token 1000, synchronised 3500, planned 4500, effects 5000. Shared
    experts 4500-5500 while the expert travels 5000-15000; stall 9500, expert to 17000, head to 22000. Token 2, with
    another 1000 of KV cache: known 26500, planned 27500, shared 28500, expert 30500, head 35500. Token 3: 14500.
    """
    machine, trace = roofline()
    found = by_hand(trace, "on_demand", 1, machine)
    assert found.ledger.decode_ns == [22000, 13500, 14500]
    assert found.stalls() == [("compute", "stall 0", 5500, 15000)]
    assert ("compute", "shared 0", 27500, 28500) in found.timeline
    counts = found.ledger.phases[DECODE]
    assert counts.latency_ns == 3 * 1500
    assert counts.compute_ns == 22000 + 13500 + 14500 - 3 * 1500 - 9500
    assert Timing(machine, trace.model, 4, options("on_demand")).shared_ns == 1000


def test_a_late_guess_joins_the_demand_loads_before_the_new_ones() -> None:
    """Two layers, top-2, two slots each, two to land in. Layer 0 routes 0 and 1: on the link 3500-13500 and
    13500-23500, computed 13500-16500 and 23500-26500. Guesses 1.2 (certain) and 1.3 (half as likely) follow; 1.2 from
    23500. Layer 1 routes 1 and 2: known 28500, planned 29500, effects 30000, within the third chunk of 1.2, until
    31000. Its fourth joins and goes before the demand load of 1.1, though 1 was routed first; 1.3 is dropped without a
    byte. 1.2 is there at 33500 (stall 4000), computed to 36500; 1.1 33500-43500 (stall 7000), to 46500; head to 51500.
    """
    scores = guesses([[0, 0]], (0, 0, 1, {2: 1.0, 3: 0.5}))
    found = by_hand(trace_of([[[0, 1], [1, 2]]], scores=scores), eager(landing_slots=2), 2)
    assert found.ledger.decode_ns == [51500]
    assert [s[1:] for s in found.link()] == [
        ("0.0", 3500, 13500),
        ("0.1", 13500, 23500),
        ("1.2", 23500, 33500),
        ("1.1", 33500, 43500),
    ]
    counts = found.ledger.phases[DECODE]
    assert (counts.stall_late_ns, counts.stall_miss_ns) == (4000, 10500 + 7000 + 7000)
    assert (counts.hits, counts.late, counts.misses, counts.retracted) == (0, 1, 3, 1)
    assert (counts.h2d_bytes, counts.wasted_bytes) == (4 * 13824, 0)


CLAIMS = (
    [[[0], [0]], [[0], [1]], [[0], [2]]],
    ((1, 0, 1, {1: 1.0}), (2, 0, 1, {2: 1.0})),
)


def test_a_claim_displaces_a_victim_whose_slot_is_the_next_to_land_in() -> None:
    """Two layers, top-1, slots 0 and 1, landing slot 2. Token 1 loads 0.0 and 1.0: 16500 each, head to 38000.
    Token 2: planned 41000, effects 41500: 1.1 travels 41500-51500 into slot 2. Layer 1 begins 44000, plans until 47000,
    stalls until 51500 and takes 3000: the pass is 21500. 1.1 stays in slot 2, so 1.0 leaves slot 1, and token 3, which
    goes alike, lands 1.2 there.
    """
    routed, said = CLAIMS
    found = by_hand(trace_of(routed, scores=guesses(routed, *said)), eager(), 1)
    assert found.ledger.decode_ns == [38000, 21500, 21500]
    assert found.loads() == [
        (0, "demand", "0.0", 0, None),
        (1, "demand", "1.0", 1, None),
        (2, "prefetch", "1.1", 2, None),
        (4, "prefetch", "1.2", 1, None),
    ]
    assert found.stalls()[2:] == [("compute", "stall 1", 47000, 51500), ("compute", "stall 1", 68500, 73000)]


def test_without_landing_slots_a_prefetch_evicts_when_it_is_issued() -> None:
    """The same two tokens, but 1.1 takes the slot of 1.0 at once. In token 3 the guess 1.2 evicts 1.1, wrongly: it
    begins at 59500, plans until 62500, effects 63000. Layer 1 (65500) knows at 67500, plans until 68500, effects 69000:
    1.2 has its third chunk on the wire until 70500 and loses its fourth; 1.1 comes again 70500-80500, into a free slot;
    computed to 83500, head to 88500: 29000.
    """
    routed = [[[0], [0]], [[0], [1]], [[0], [1]]]
    run = eager(landing_slots=0)
    found = by_hand(trace_of(routed, scores=guesses(routed, *CLAIMS[1])), run, 1)
    assert found.ledger.decode_ns == [38000, 21500, 29000]
    assert found.loads()[2:] == [
        (2, "prefetch", "1.1", 1, 0),
        (4, "prefetch", "1.2", 1, 1),
        (5, "retract", "1.2", 1, None),
        (5, "demand", "1.1", 1, None),
    ]
    assert found.ledger.phases[DECODE].wasted_bytes == 3 * 3456


def test_a_kept_prefetch_goes_on_after_the_demand_load_and_is_a_hit_later() -> None:
    """Two layers, top-1. The guess 1.3 of token 1 is wrong: when layer 1's plan reaches the link at 20000 its third
    chunk is on the wire until 21000; 1.1 goes first, 21000-31000, then the fourth chunk, to 33500. Computed to 34000,
    head to 39000. Token 2 routes 3 in layer 1: two hits, 6000 each and the head.
    """
    routed = [[[0], [1]], [[0], [3]]]
    found = by_hand(trace_of(routed, scores=guesses(routed, (0, 0, 1, {3: 1.0}))), eager(stale="keep"), 1)
    assert found.ledger.decode_ns == [39000, 17000]
    assert [s[1:] for s in found.link()] == [
        ("0.0", 3500, 13500),
        ("1.3", 13500, 21000),
        ("1.1", 21000, 31000),
        ("1.3", 31000, 33500),
    ]
    counts = found.ledger.phases[DECODE]
    assert (counts.hits, counts.late, counts.misses) == (2, 0, 2)
    assert (counts.prefetch_used, counts.retracted, counts.wasted_bytes) == (1, 0, 0)


def test_the_guard_lends_its_landing_slot_and_ends_a_trial_that_loses() -> None:
    """Two layers, top-1; layer 0 routes 0 and 1 in turn, layer 1 always 0; every token guesses 1.3, wrongly. While the
    guard rests, layer 0 has the landing slot 2 beside its slot 0: tokens 1 and 2 load (38000, 27500), then all are
    hits: 17000, as on_demand with two slots. The first token of a trial finds the landing slot taken back, with the
    expert of the token before in it, and hurts nobody: 17000. Every other one must load: 27500. So does the first token
    after the trial, into the slot lent again.
    """
    routed = [[[token % 2], [0]] for token in range(60)]
    said = [(token, 0, 1, {3: 1.0}) for token in range(60)]
    found = by_hand(trace_of(routed, scores=guesses(routed, *said)), eager(guard=True), 1)
    loads = found.loads()
    trial = [visit // 2 for visit, kind, *_ in loads if kind == "prefetch"]
    first, last = trial[0], trial[-1]
    assert trial == list(range(first, last + 1))
    assert 6 <= first < last < 58
    times = [38000, 27500] + [17000] * 58
    times[first + 1 : last + 2] = [27500] * (last - first + 1)
    assert found.ledger.decode_ns == times
    assert loads[:3] == [(0, "demand", "0.0", 2, None), (1, "demand", "1.0", 1, None), (2, "demand", "0.1", 0, None)]
    landing = first % 2 * 2
    assert {slot for _, kind, _, slot, _ in loads if kind in ("prefetch", "retract")} == {landing}
    demands = [(visit // 2, slot, evicted) for visit, kind, _, slot, evicted in loads[3:] if kind == "demand"]
    inside = [(token, 2 - landing, 1 - token % 2) for token in range(first + 1, last + 1)]
    assert demands == [*inside, (last + 1, landing, None)]
    assert found.ledger.phases[DECODE].retracted == len(trial)


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
