"""What every policy and every cache rule promises, over the registries, and the planner's rules one by one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from by_hand import eager
from conftest import random_trace, round_machine, tiny_model, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st
from watcher import Watcher, plans, timing_of, watched

from sim import registry
from sim.experiment import Setting, planner
from sim.planner import Load, Planner
from sim.spec import Bound, options
from sim.state import ACCOUNT
from sim.timing import Timing
from traces import DECODE, Guesses, Visit
from traces.vocabulary import router_order

TRUSTING = "speculative:evidence=0,min_score=0.05"
CACHES = list(registry.plugins("cache"))
PLUGINS = [
    *((policy, "lru") for policy in registry.plugins("policy")),
    *((policy, cache) for policy in ("on_demand", TRUSTING) for cache in CACHES),
]


@pytest.mark.parametrize(("policy", "cache"), PLUGINS)
@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 10_000),
    slots=st.integers(2, 6),
    landing=st.integers(0, 3),
    stale=st.sampled_from(["retract", "keep"]),
    guard=st.booleans(),
    prefill=st.sampled_from([0, 5]),
    cold=st.booleans(),
    guesser=st.sampled_from(["router", "oracle"]),
)
def test_every_slot_is_accounted_for(
    policy: str, cache: str, seed: int, slots: int, landing: int, stale: str, guard: bool, prefill: int, cold: bool,
    guesser: str,
) -> None:  # fmt: skip
    trace = random_trace(seed, layers=4, prefill=prefill)
    run = options(policy, cache=cache, predictor=guesser, landing_slots=landing, stale=stale, guard=guard)
    setting = Setting(trace, round_machine(), trace.model, 4, slots, run, cold)
    watched(setting)
    decide, made = plans(setting)
    if not run.whole_layer:
        total = 4 * slots + landing + run.stream_slots
        assert decide.num_slots == total if run.prefetches else 4 * slots <= decide.num_slots <= total
    assert plans(setting)[1] == made, "the same visits, other plans"


@pytest.mark.parametrize(
    "cache", [c for c, m in registry.plugins("cache").items() if not {"NEEDS_FUTURE", "fit", "sizes"} & set(dir(m))]
)
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10_000), slots=st.integers(2, 4), landing=st.integers(0, 4), stale=st.booleans())
def test_batches_that_stream_and_prefetch_at_once(cache: str, seed: int, slots: int, landing: int, stale: bool) -> None:
    """Decode passes of one to three tokens, more experts than slots among them, every visit with guesses."""
    rng = np.random.default_rng(seed)
    model = tiny_model(layers=3, experts=8)
    run = eager(2, cache, landing_slots=landing, stale="keep" if stale else "retract")
    watcher = Watcher(Planner(model, run, slots, Timing(round_machine(), model, 4, run)), cold=False, wraps=True)
    issued = 0
    for index in range(60):
        tokens = int(rng.integers(1, 4))
        ids = [rng.permutation(8)[:2].tolist() for _ in range(tokens)]
        guesses = [
            Guesses(rng.permutation(8)[:4].tolist(), sorted(rng.random(4).tolist(), reverse=True)) for _ in range(2)
        ]
        plan = watcher.decide.plan(Visit(index, index % 3, DECODE, tokens, index, *router_order(ids), guesses))
        watcher.see(plan)
        issued += len(plan.prefetch)
    assert issued > 0


def test_wrong_guesses_give_their_landing_slot_back() -> None:
    """One slot to land in and a wrong guess in every token: each is issued, each is retracted."""
    scores = [[[[0, 0, 0, 1.0], [0.0] * 4], [[0.0] * 4] * 2]] * 5
    trace = trace_of([[[0], [1]]] * 5, scores=scores)
    for run in (eager(), options("speculative:lookahead=1,landing_slots=1,trust=0,guard=0", predictor="router")):
        _, made = plans(Setting(trace, round_machine(), trace.model, 4, 1, run))
        assert [len(plan.prefetch) for plan in made] == [1, 0] * 5
        assert [len(plan.retract) for plan in made] == [0, 1] * 5


def test_speculative_trusts_nobody_before_it_has_seen_enough() -> None:
    """Certain and right guesses from the first token on: none is issued before 16 of them were scored."""
    scores = [[[[0, 1.0, 0, 0], [0.0] * 4], [[0.0] * 4] * 2]] * 24
    trace = trace_of([[[token % 4], [1]] for token in range(24)], scores=scores)
    run = options("speculative:lookahead=1,landing_slots=1,guard=0", predictor="router", stale="retract")
    cold = Setting(trace, round_machine(), trace.model, 4, 1, run)
    decide = planner(cold, timing_of(cold))
    issued = []
    for visit in trace.visits():
        if visit.layer == 0:
            visit.guesses = [Guesses([1 + visit.index // 2 % 2], [1.0])]
        else:
            visit.experts = [1 + visit.index // 2 % 2]
        issued.append(len(decide.plan(visit).prefetch))
    assert issued[:32] == [0] * 32
    assert sum(issued[32:]) > 0


def test_an_expert_on_its_way_is_not_prefetched_again_by_the_visit_that_claims_it() -> None:
    """One layer of one slot, guesses for the next token. Visit 1 streams 1 and 2 past resident 0; 1 is claimed and
    passes through its landing slot, so it is not resident, yet guessed again: its copy is waited for under its own
    number.
    """
    model = tiny_model(1, 4, 1)
    run = eager(landing_slots=2)
    decide = Planner(model, run, 1, Timing(round_machine(), model, 4, run))
    first = decide.plan(Visit(0, 0, DECODE, 1, 0, [0], [1], [Guesses([1], [1.0])]))
    second = decide.plan(Visit(1, 0, DECODE, 2, 1, [1, 2], [1, 1], [Guesses([1, 3], [1.0, 0.5])]))
    assert [load.number for load in first.prefetch] == [load.number for load in second.claimed] == [2]
    assert [load.expert for load in second.prefetch] == [3]


def test_an_expert_guessed_for_two_visits_is_issued_once() -> None:
    """Two layers, lookahead 3 past the last one: distances 1 and 3 speak of one layer, for this token and the next."""
    model = tiny_model(2, 4, 1)
    run = eager(3, landing_slots=4)
    decide = Planner(model, run, 1, Timing(round_machine(), model, 4, run))
    guesses = [Guesses([1], [1.0]), Guesses([], []), Guesses([1, 2], [1.0, 0.5])]
    plan = decide.plan(Visit(0, 0, DECODE, 1, 0, [0], [1], guesses))
    assert [(load.layer, load.expert, load.target) for load in plan.prefetch] == [(1, 1, 1), (1, 2, 3)]


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


def test_recency_after_a_visit_is_router_order() -> None:
    """[0, 1], then [1, 0], then [2, 3] in three slots: 2 takes the free one, 3 that of 1, which came before 0."""
    trace = trace_of([[[0, 1]], [[1, 0]], [[2, 3]]])
    _, made = plans(Setting(trace, round_machine(), trace.model, 4, 3, options("on_demand")))
    assert [(load.expert, load.evicted) for load in made[2].demand] == [(2, None), (3, 1)]


def test_of_equal_scores_the_lower_expert_id_leaves() -> None:
    """A rule that says 0 of everybody."""
    trace = trace_of([[[2, 0, 1]], [[5, 4, 3]]], experts=6)
    indifferent = SimpleNamespace(__name__="tests.indifferent", score=lambda params, experts, x, now: 0.0)
    run = options("on_demand").replace(cache=Bound(indifferent, options("on_demand").cache.params))
    _, made = plans(Setting(trace, round_machine(), trace.model, 4, 3, run))
    assert [(load.expert, load.evicted) for load in made[1].demand] == [(5, 0), (4, 1), (3, 2)]


def test_first_in_first_out_goes_by_router_order() -> None:
    """2, 0, 1 were loaded in one visit, in that order; so they leave, though 2 was routed again since."""
    trace = trace_of([[[2, 0, 1]], [[2, 0, 1]], [[5, 4, 3]]], experts=6)
    _, made = plans(Setting(trace, round_machine(), trace.model, 4, 3, options("on_demand", cache="fifo")))
    assert [(load.expert, load.evicted) for load in made[2].demand] == [(5, 2), (4, 0), (3, 1)]


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
    _, made = plans(Setting(trace, round_machine(), trace.model, 4, 1, eager(stale="keep"), cold_sequences=True))
    assert [(load.layer, load.expert) for load in made[0].prefetch] == [(1, 3)]
    assert [(load.layer, load.expert) for load in made[2].retract] == [(1, 3)]
    assert [load.evicted for plan in made for load in plan.demand] == [None] * 4


@pytest.mark.parametrize("displaced", [(0.0, 0.0), (5e-6, 2e-6)])
@pytest.mark.parametrize("host_s", [1e-6, 9e-6])
def test_what_every_visit_of_a_policy_costs_is_not_held_against_its_guesses(
    displaced: tuple[float, float], host_s: float
) -> None:
    """Guesses that nobody would issue: the guard's account holds what looking at them cost, however long the policy
    plans and whatever that displaces.
    """
    trace = random_trace(3, sequences=4, length=20, layers=3)
    machine = round_machine(displaced=displaced)
    laws = machine.operators["tiny"]
    laws = replace(laws, host_s={"default": 1e-6, "prefetching": host_s})
    machine = replace(machine, operators={"tiny": laws})
    run = options("speculative:lookahead=1,min_score=2,guard=1")
    decide, _ = plans(Setting(trace, machine, trace.model, 4, 2, run), keep_time=True)
    gates_ns = 100  # of one distance, on this machine
    assert -gates_ns * 3 * 80 < decide._s.n[ACCOUNT] < 0
    assert decide._s.n[ACCOUNT] % gates_ns == 0
