"""What every policy and every cache rule promises, over the registries, and what a run conserves."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from conftest import random_setting, random_trace, round_machine, tiny_model, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

import traces
from sim import registry
from sim.experiment import Setting, pass_ends_ns, planner, predictor, replay
from sim.ledger import Ledger
from sim.planner import Load, Plan, Planner
from sim.simpy_driver import Simulation
from sim.spec import options
from sim.timing import Timing
from traces import DECODE, Guesses, Visit
from traces.vocabulary import router_order

ROOT = Path(__file__).parent.parent
EXPERT_BYTES = 13824
PLUGINS = list(product(registry.plugins("policy"), registry.plugins("cache")))


def plans(setting: Setting, keep_time: bool = False) -> tuple[Planner, list[Plan]]:
    """Every plan of a run, without a driver."""
    decide = planner(setting, Timing(setting.machine, setting.model, setting.bits, setting.options), keep_time)
    predict = predictor(setting)
    made = []
    visits = setting.trace.visits()
    for forward in setting.trace.passes():
        for _ in range(setting.model.num_layers):
            visit = next(visits)
            visit.guesses = predict(visit, forward.first) if predict else []
            made.append(decide.plan(visit))
    return decide, made


class Watcher:
    """Keeps its own account of who owns which slot, from the plans alone, and objects."""

    def __init__(self, decide: Planner, cold: bool) -> None:
        self.decide, self.cold = decide, cold
        self.owner: dict[int, tuple[int, int]] = {}
        self.pending: set[tuple[int, int]] = set()
        self.passing: list[int] = []
        self.first_stream = decide.num_slots - decide.options.stream_slots

    def see(self, plan: Plan) -> None:
        visit, layer = plan.visit, plan.visit.layer
        for slot in self.passing:
            del self.owner[slot]
        self.passing = []
        for load in plan.retract:
            assert self.owner.pop(load.slot) == (load.layer, load.expert)
        if self.cold and visit.starts_sequence:
            self.owner.clear()
        self.pending = {p for p in self.pending if p[0] != layer}
        gone = {(load.layer, load.expert) for load in plan.retract}
        assert len(plan.resident) + len(plan.claimed) + len(plan.demand) + len(plan.stream) == len(visit.experts)
        streaming = len(visit.experts) > self.decide.sizes[layer]
        assert streaming or not plan.stream
        assert [load.key for load in plan.claimed] == sorted(load.key for load in plan.claimed)
        assert [-load.worth for load in plan.prefetch] == sorted(-load.worth for load in plan.prefetch)
        assert all(load.worth > 0 for load in plan.prefetch)
        for load in plan.claimed:
            assert load.layer == layer
            assert load.expert in visit.experts
            assert self.owner[load.slot] == (layer, load.expert)
        for slot in plan.displaced:
            victim_layer, victim = self.owner.pop(slot)
            assert victim_layer == layer
            assert victim not in visit.experts
        order = {expert: place for place, expert in enumerate(visit.experts)}
        for loads in (plan.demand, plan.stream):
            assert [order[load.expert] for load in loads] == sorted(order[load.expert] for load in loads)
        for load in plan.demand:
            assert load.layer == layer
            self.take(load, gone)
            assert load.evicted not in visit.experts
        for load in plan.stream:
            assert load.slot >= self.first_stream
            assert (layer, load.expert) not in self.owner.values()
        if streaming:
            assert not plan.displaced
            assert all(load.evicted is None for load in plan.demand)
        streamed = {load.expert: load.slot for load in plan.stream}
        for expert, slot in zip(visit.experts, plan.slots, strict=True):
            assert streamed[expert] == slot if expert in streamed else self.owner[slot] == (layer, expert)
        for load in plan.prefetch:
            assert layer < load.layer <= layer + self.decide.options.lookahead
            assert load.target == visit.index + load.layer - layer
            self.take(load, gone)
            self.pending.add((load.layer, load.expert))
        held = self.decide.resident_slots(layer)
        self.passing = [load.slot for load in plan.claimed if load.expert not in held]
        assert streaming or not self.passing
        for number, size in enumerate(self.decide.sizes):
            slots = self.decide.resident_slots(number)
            assert len(slots) <= size
            for expert, slot in slots.items():
                assert self.owner[slot] == (number, expert)

    def take(self, load, gone) -> None:
        assert load.slot < self.first_stream
        assert (load.layer, load.expert) not in self.owner.values(), "already resident"
        if load.evicted is not None and (load.layer, load.evicted) not in gone:
            assert self.owner.pop(load.slot) == (load.layer, load.evicted)
        assert load.slot not in self.owner
        assert (load.layer, load.evicted) not in self.pending
        self.owner[load.slot] = (load.layer, load.expert)


@pytest.mark.parametrize(("policy", "cache"), PLUGINS)
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    slots=st.integers(2, 6),
    landing=st.integers(0, 3),
    stale=st.sampled_from(["retract", "keep"]),
    prefill=st.sampled_from([0, 5]),
    cold=st.booleans(),
    guesser=st.sampled_from(["router", "oracle"]),
)
def test_every_slot_is_accounted_for(
    policy: str, cache: str, seed: int, slots: int, landing: int, stale: str, prefill: int, cold: bool, guesser: str
) -> None:
    trace = random_trace(seed, layers=4, prefill=prefill)
    run = options(policy, cache=cache, predictor=guesser, landing_slots=landing, stale=stale)
    setting = Setting(trace, round_machine(), trace.model, 4, slots, run, cold)
    watcher = Watcher(planner(setting, Timing(setting.machine, trace.model, 4, run)), cold)
    decide, made = plans(setting)
    assert watcher.decide.num_slots == decide.num_slots == 4 * slots + landing + run.stream_slots or not run.prefetches
    fresh, predict = watcher.decide, predictor(setting)
    visits = trace.visits()
    index = 0
    for forward in trace.passes():
        for _ in range(4):
            visit = next(visits)
            visit.guesses = predict(visit, forward.first) if predict else []
            plan = fresh.plan(visit)
            watcher.see(plan)
            assert plan == made[index], "the same visits, other plans"
            index += 1


@pytest.mark.parametrize("cache", [c for c, m in registry.plugins("cache").items() if not hasattr(m, "NEEDS_FUTURE")])
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), slots=st.integers(2, 4), landing=st.integers(0, 4), stale=st.booleans())
def test_batches_that_stream_and_prefetch_at_once(cache: str, seed: int, slots: int, landing: int, stale: bool) -> None:
    """Decode passes of one to three tokens, more experts than slots among them, every visit with guesses."""
    rng = np.random.default_rng(seed)
    model = tiny_model(layers=3, experts=8)
    fate = "keep" if stale else "retract"
    run = options(f"speculative:lookahead=2,min_score=0,landing_slots={landing},stale={fate}", cache=cache)
    watcher = Watcher(Planner(model, run, slots, Timing(round_machine(), model, 4, run)), cold=False)
    for index in range(60):
        tokens = int(rng.integers(1, 4))
        ids = [rng.permutation(8)[:2].tolist() for _ in range(tokens)]
        guesses = [
            Guesses(rng.permutation(8)[:4].tolist(), sorted(rng.random(4).tolist(), reverse=True)) for _ in range(2)
        ]
        watcher.see(watcher.decide.plan(Visit(index, index % 3, DECODE, tokens, index, *router_order(ids), guesses)))


def test_wrong_guesses_give_their_landing_slot_back() -> None:
    """One slot to land in and a wrong guess in every token: each is issued, each is retracted."""
    scores = [[[[0, 0, 0, 1.0], [0.0] * 4], [[0.0] * 4] * 2]] * 5
    trace = trace_of([[[0], [1]]] * 5, scores=scores)
    run = options("speculative:lookahead=1,landing_slots=1", predictor="router")
    _, made = plans(Setting(trace, round_machine(), trace.model, 4, 1, run))
    assert [len(plan.prefetch) for plan in made] == [1, 0] * 5
    assert [len(plan.retract) for plan in made] == [0, 1] * 5


def test_the_link_carries_the_nearest_layer_first_then_the_worthiest() -> None:
    near, likely, less = (
        Load(layer, 0, 0, "prefetch", None, 0, layer, worth, number)
        for layer, worth, number in ((1, 5.0, 3), (2, 9.0, 2), (2, 7.0, 1))
    )
    assert sorted([less, likely, near], key=lambda load: load.key) == [near, likely, less]


@pytest.mark.parametrize(("policy", "cache"), PLUGINS)
def test_plans_do_not_depend_on_whether_anybody_reads_the_time(policy: str, cache: str) -> None:
    trace = random_trace(5, layers=4, prefill=5)
    setting = Setting(trace, round_machine(), trace.model, 4, 3, options(policy, cache=cache, predictor="router"))
    assert plans(setting)[1] == plans(setting, keep_time=True)[1]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_more_slots_never_lose_an_lru_hit(seed: int) -> None:
    """The resident experts of n slots are among those of n + 1: LRU over whole visits is a stack algorithm."""
    trace = random_trace(seed, layers=2, experts=8)
    settings_ = [Setting(trace, round_machine(), trace.model, 4, n, options("on_demand")) for n in range(2, 9)]
    hits = [[set(p.resident) for p in plans(s)[1]] for s in settings_]
    for fewer, more in pairwise(hits):
        assert all(a <= b for a, b in zip(fewer, more, strict=True))


def test_recency_after_a_visit_is_router_order() -> None:
    """[0, 1], then [1, 0], then [2, 3] in three slots: 2 takes the free one, 3 that of 1, which came before 0."""
    trace = trace_of([[[0, 1]], [[1, 0]], [[2, 3]]])
    _, made = plans(Setting(trace, round_machine(), trace.model, 4, 3, options("on_demand")))
    assert [(load.expert, load.evicted) for load in made[2].demand] == [(2, None), (3, 1)]


def test_recency_does_not_depend_on_what_was_resident() -> None:
    """[0, 1] then [2, 0]: 2 is loaded and 0 a hit, yet 0 is the more recent; [3, 1] evicts 2 first, then 0."""
    trace = trace_of([[[0, 1]], [[2, 0]], [[3, 1]]])
    _, made = plans(Setting(trace, round_machine(), trace.model, 4, 2, options("on_demand")))
    assert [(load.expert, load.evicted) for load in made[1].demand] == [(2, 1)]
    assert [(load.expert, load.evicted) for load in made[2].demand] == [(3, 2), (1, 0)]


def test_a_cold_sequence_starts_with_nothing_and_its_drops_are_in_the_plan() -> None:
    """A kept prefetch of the first sequence is retracted by the first plan of the second."""
    scores = [[[[0.0] * 4] * 2 for _ in range(2)] for _ in range(2)]
    scores[0][0][0] = [0, 0, 0, 1.0]
    trace = trace_of([[[0], [1]], [[0], [1]]], lengths=[1, 1], scores=scores)
    run = options("speculative:lookahead=1,landing_slots=1,stale=keep", predictor="router")
    _, made = plans(Setting(trace, round_machine(), trace.model, 4, 1, run, cold_sequences=True))
    assert [(load.layer, load.expert) for load in made[0].prefetch] == [(1, 3)]
    assert [(load.layer, load.expert) for load in made[2].retract] == [(1, 3)]
    assert [load.evicted for plan in made for load in plan.demand] == [None] * 4


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_what_a_run_conserves(first: int) -> None:
    """Accesses and bytes add up, the ledger's bytes are the link's, and nobody is busier than time allows."""
    for seed in range(first, first + 40):
        setting = random_setting(seed)
        timing = Timing(setting.machine, setting.model, 4, setting.options)
        simulation = Simulation(
            setting.trace, planner(setting, timing), timing, setting.options, predictor(setting), Ledger()
        )
        ledger = simulation.run()
        why = f"seed {seed}: {setting.options.text}"
        h2d = 0
        for counts in ledger.phases:
            assert counts.hits + counts.late + counts.misses == counts.accesses, why
            used = (counts.demand_loads + counts.prefetch_used) * EXPERT_BYTES
            assert counts.h2d_bytes == used + counts.wasted_bytes, why
            assert counts.link_busy_ns <= counts.elapsed_ns, why
            assert counts.compute_ns + counts.stall_miss_ns + counts.stall_late_ns <= counts.elapsed_ns, why
            h2d += counts.h2d_bytes
        chunks = timing.chunks
        if setting.options.copy_stream and chunks.size * chunks.number == EXPERT_BYTES:
            assert simulation._link.submitted_chunks * chunks.size == h2d, why


def test_on_demand_is_never_slower_with_more_bandwidth() -> None:
    trace = random_trace(3, prefill=4)
    last = None
    for gb_s in (0.1, 0.3, 1.0, 1.1, 3.0, 100.0):
        link = replace(round_machine().link, h2d_gb_s=gb_s, h2d_duplex_gb_s=gb_s)
        setting = Setting(trace, round_machine(link=link), trace.model, 4, 3, options("on_demand"))
        ends = pass_ends_ns(setting)
        assert last is None or all(now <= before for now, before in zip(ends, last, strict=True))
        last = ends


def test_no_loads_when_everything_fits() -> None:
    trace = random_trace(1, sequences=1, length=30, layers=2, experts=4)
    setting = Setting(trace, round_machine(), trace.model, 4, 4, options("on_demand"))
    assert replay(setting).phases[1].misses <= 2 * 4


def test_hash_seeds_change_nothing(tmp_path: Path) -> None:
    """Two processes with different string hashing print and write the same bytes."""
    traces.save(random_trace(2, sequences=3, length=20, prefill=4), tmp_path / "t.safetensors")
    found = []
    for seed in ("1", "2"):
        log = tmp_path / f"log{seed}"
        command = [sys.executable, "-m", "sim.run", "--trace", str(tmp_path / "t.safetensors"), "--load-log", str(log)]
        done = subprocess.run(
            [*command, "--policy", "speculative:lookahead=2,stale=keep"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        )
        found.append((done.stdout, log.read_bytes()))
    assert found[0] == found[1]
    assert found[0][1].count(b"\n") > 50
