"""What every run promises, over random traces, machines, policies, caches, predictors and options."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from io import StringIO
from itertools import pairwise

import numpy as np
import pytest
from by_hand import EAGER, Eager
from conftest import random_setting, random_trace, round_machine, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st
from log_checker import LogChecker
from watcher import plans, timing_of, watched

from sim import registry
from sim.experiment import Experiment, Setting, pass_ends_ns, planner, predictor, replay
from sim.ledger import Ledger, LoadLog
from sim.planner import Fitted, Planner
from sim.simpy_driver import Simulation
from sim.spec import Bound, SpecError, options
from sim.timing import Timing
from traces import PREFILL, GuessTable, Trace
from traces.trace import rank

EXPERT_BYTES = 13824
RUN_KEYS = (
    "miss",
    "guard",
    "stale",
    "landing_slots",
    "stream_slots",
    "write_back",
    "copy_stream",
    "chunk_bytes",
    "max_submitted",
)


def batched(trace: Trace) -> Trace:
    """The same sequences decoding together, after one prefill pass each."""
    starts = trace.sequence_starts()
    rows = [list(range(a, b)) for a, b in pairwise(starts.tolist())]
    prefill = [[row for row in sequence if trace.phase[row] == PREFILL] for sequence in rows]
    decode = [sequence[len(first) :] for sequence, first in zip(rows, prefill, strict=True)]
    passes = [first for first in prefill if first]
    passes += [list(step) for step in zip(*decode, strict=True)]
    order = np.array([row for one in passes for row in one])
    sequence = np.repeat(np.arange(len(rows)), trace.sequence_lengths).astype(np.int32)
    tables = {name: GuessTable(t.ids[order], t.scores[order], t.wrap) for name, t in trace.guesses.items()}
    return replace(
        trace,
        ids=trace.ids[order],
        weights=trace.weights[order],
        phase=trace.phase[order],
        guesses=tables,
        pass_lengths=np.array([len(one) for one in passes], np.int32),
        token_sequence=sequence[order],
    )


def any_setting(seed: int) -> Setting:
    """`random_setting` with any plug-ins of the registries, sequences that decode together, guesses past the last
    layer; where a guard has a long trace to try on, a policy that issues everything."""
    draw = random.Random(f"any {seed}")
    base = random_setting(seed)
    trace, old = base.trace, base.options
    longer = False
    if old.guard and draw.random() < 0.5:
        shape = {"layers": trace.model.num_layers, "experts": trace.model.num_experts, "top_k": trace.model.top_k}
        trace = random_trace(seed, sequences=draw.choice([1, 2]), length=40, prefill=0, **shape)
        longer = True
    if draw.random() < 0.2:
        tokens, layers, _ = trace.ids.shape
        scores = np.random.default_rng(seed).random(
            (tokens, layers, draw.choice([1, min(3, layers), layers]), trace.model.num_experts)
        )
        trace = replace(trace, guesses={"router": rank(scores, trace.model.num_experts, wrap=True)})
    if draw.random() < 0.3 and len(trace.sequence_lengths) > 1:
        trace = batched(trace)
    kept = {key: getattr(old, key) for key in RUN_KEYS}
    policy = draw.choice(["speculative:evidence=0,min_score=0.05", *registry.plugins("policy")])
    if policy == "naive":
        kept |= {"copy_stream": False, "miss": "load"}
    cache = "lru" if policy == "naive" else draw.choice(list(registry.plugins("cache")))
    guesser = draw.choice(["router", *registry.plugins("predictor")])
    run = options(policy, cache=cache, predictor=guesser, **kept)
    if longer:
        run = run.replace(policy=Bound(EAGER, Eager(draw.randint(1, 3))), copy_stream=True)
    return replace(base, trace=trace, options=run)


def why(seed: int, setting: Setting) -> str:
    run = setting.options
    keys = ",".join(f"{key}={getattr(run, key)}" for key in RUN_KEYS)
    return f"seed {seed}: {run.policy.text()} cache={run.cache.text()} predictor={run.predictor} {keys}"


def simulated(setting: Setting) -> tuple[Simulation, Ledger, list[dict]]:
    stream = StringIO()
    timing = timing_of(setting)
    simulation = Simulation(
        setting.trace,
        planner(setting, timing),
        timing,
        setting.options,
        predictor(setting),
        Ledger(log=LoadLog(stream)),
    )
    ledger = simulation.run()
    return simulation, ledger, [json.loads(line) for line in stream.getvalue().splitlines()]


def conserved(setting: Setting, simulation: Simulation, ledger: Ledger) -> None:
    """Accesses, bytes and time add up, and the ledger's bytes are the link's."""
    h2d = 0
    for counts in ledger.phases:
        assert counts.hits + counts.late + counts.misses == counts.accesses
        loads = counts.demand_loads + counts.prefetch_used
        assert counts.h2d_bytes == loads * EXPERT_BYTES + counts.wasted_bytes
        assert 0 <= counts.link_busy_ns <= counts.elapsed_ns
        assert counts.compute_ns + counts.stall_miss_ns + counts.stall_late_ns <= counts.elapsed_ns
        if not setting.options.whole_layer:
            assert counts.misses == counts.demand_loads + counts.host_computed
        h2d += counts.h2d_bytes
    decode, prefill = ledger.phases[1], ledger.phases[0]
    everything = decode.prefetch_used + prefill.prefetch_used + decode.retracted + prefill.retracted
    assert everything <= decode.prefetch_loads
    chunks = timing_of(setting).chunks
    if setting.options.copy_stream and chunks.size * chunks.number == EXPERT_BYTES:
        assert simulation._link.submitted_chunks * chunks.size == h2d


def check(setting: Setting) -> None:
    """Slots, protection and fates by the plans; slots again by the load log alone; accesses, bytes and time; the
    virtual clock against the SimPy driver pass by pass; the same log from the planner alone.
    """
    run, trace = setting.options, setting.trace
    watched(setting)
    simulation, ledger, lines = simulated(setting)
    conserved(setting, simulation, ledger)
    prefills, decodes = iter(ledger.ttft_ns), iter(ledger.decode_ns)
    now, ends = 0, []
    for forward in trace.passes():
        now += next(prefills if forward.phase == PREFILL else decodes)
        ends.append(now)
    assert pass_ends_ns(setting) == ends
    decide, made = plans(setting)
    log = LoadLog()
    for plan in made:
        log.record(plan)
    assert log.sha256 == ledger.log.sha256
    hosted, cold = run.miss != "load", setting.cold_sequences
    LogChecker(trace, sum(decide.sizes), decide.landing_slots, run.guarded, cold, run.whole_layer, hosted).read(lines)


@pytest.mark.parametrize("first", range(0, 500, 100))
def test_every_run(first: int) -> None:
    for seed in range(first, first + 100):
        setting = any_setting(seed)
        try:
            check(setting)
        except Exception as error:
            raise AssertionError(why(seed, setting)) from error


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_no_run_is_below_its_joint_floor(first: int) -> None:
    """`Experiment.run` raises for one that is."""
    for seed in range(first, first + 40):
        setting = any_setting(seed)
        found = Experiment(references=False).run(setting)
        assert found["tpot_s"] is None or found["tpot_s"] >= found["bounds"]["joint_floor_s"] * (1 - 1e-9), why(
            seed, setting
        )


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    slots=st.integers(2, 6),
    chunk=st.sampled_from([0, -3, -16]),
    submitted=st.integers(1, 4),
    slow=st.floats(0.05, 5.0),
    faster=st.floats(1.0, 4.0),
)
def test_on_demand_is_never_slower_with_more_bandwidth(
    seed: int, slots: int, chunk: int, submitted: int, slow: float, faster: float
) -> None:
    trace = random_trace(seed, prefill=4)
    run = options("on_demand", chunk_bytes=chunk, max_submitted=submitted, stream_slots=1 + seed % 3)
    ends = []
    for gb_s in (slow, slow * faster):
        machine = round_machine(link=replace(round_machine().link, h2d_gb_s=gb_s))
        ends.append(pass_ends_ns(Setting(trace, machine, trace.model, 4, slots, run)))
    assert all(quick <= late for late, quick in zip(*ends, strict=True))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_more_slots_never_lose_an_lru_hit(seed: int) -> None:
    """The resident experts of n slots are among those of n + 1: LRU over whole visits is a stack algorithm."""
    trace = random_trace(seed, layers=2, experts=8)
    found = [plans(Setting(trace, round_machine(), trace.model, 4, n, options("on_demand"))) for n in range(2, 9)]
    for (_, fewer), (_, more) in pairwise(found):
        assert all(set(a.resident) <= set(b.resident) for a, b in zip(fewer, more, strict=True))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_pooled_lru_falls_off_a_cliff(top_k: int) -> None:
    """Batch-1 decode visits the layers in a ring: with (layers - 1) x top_k slots every expert has left before its
    layer comes again, whatever is routed; with one more slot the first hits come.
    """
    layers, experts = 5, 8
    trace = random_trace(top_k, sequences=1, length=40, layers=layers, experts=experts, top_k=top_k)
    hits = []
    for slots in range(1, (layers - 1) * top_k + 2):
        if slots < top_k:
            continue
        sizes = [slots] + [0] * (layers - 1)
        run = options("on_demand", cache="global_lru")
        decide = Planner(trace.model, run, top_k, Timing(round_machine(), trace.model, 4, run), Fitted(sizes=sizes))
        hits.append(sum(len(decide.plan(visit).resident) for visit in trace.visits()))
    assert hits[:-1] == [0] * (len(hits) - 1)
    assert hits[-1] > 0


def test_no_loads_when_everything_fits() -> None:
    trace = random_trace(1, sequences=1, length=30, layers=2, experts=4)
    setting = Setting(trace, round_machine(), trace.model, 4, 4, options("on_demand"))
    assert replay(setting).phases[1].misses <= 2 * 4


def test_fewer_slots_than_one_token_needs_are_refused() -> None:
    trace = trace_of([[[0, 1]]])
    for slots in (1, 5):
        setting = Setting(trace, round_machine(), trace.model, 4, slots, options("on_demand"))
        with pytest.raises(SpecError, match=f"slots is {slots}"):
            planner(setting, timing_of(setting))
