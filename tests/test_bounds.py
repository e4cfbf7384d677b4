"""The bounds: brute force on tiny cases, every random run above the floor, LRU counts of a public trace."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import random_setting, random_trace, round_machine, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import bounds
from sim.experiment import Experiment, Setting, planner
from sim.spec import options
from sim.timing import Timing
from traces import ModelSpec, Trace, stats

GPT_OSS = Path(__file__).parent.parent.parent / "shared/data/traces/gpt-oss-20b/gptoss20b_decode_sample64.npz"

State = frozenset[tuple[int, int]]


def fewest(visits: list[list[tuple[int, int]]], sizes: list[int], landing: int, bypass: bool) -> int:
    """Fewest loads over all schedules and all initial contents, by trying them all.

    A state holds at most ``sizes[l]`` experts of layer l and ``landing`` more of any. With ``bypass`` a routed expert
    may be computed without being kept; without, it is in the state during its visit.
    """

    def fits(state: State) -> bool:
        over = [max(0, sum(layer == l for layer, _ in state) - size) for l, size in enumerate(sizes)]  # noqa: E741
        return sum(over) <= landing

    universe = sorted({expert for visit in visits for expert in visit})
    states = [frozenset(c) for n in range(len(universe) + 1) for c in combinations(universe, n)]
    states = [s for s in states if fits(s)]
    cost = dict.fromkeys(states, 0)
    for visit in visits:
        routed = frozenset(visit)
        after: dict[State, int] = {}
        for state, loads in cost.items():
            loads += len(routed - state)
            for other in states:
                if other <= state | routed and (bypass or routed <= other):
                    after[other] = min(loads, after.get(other, loads))
        cost = after
    return min(cost.values())


def timed_visits(trace: Trace) -> list[list[tuple[int, int]]]:
    visits = [[(v.layer, e) for e in v.experts] for v in trace.visits()]
    return visits[trace.model.num_layers :]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.permutations(range(4)), min_size=2, max_size=7), st.integers(1, 2), st.integers(0, 3))
def test_fewest_loads_is_the_optimum_of_one_layer(rows: list, top_k: int, more: int) -> None:
    trace = trace_of([[row[:top_k]] for row in rows])
    slots = min(4, top_k + more)
    found = bounds.fewest_loads(trace, [slots], 0)
    assert found == fewest(timed_visits(trace), [slots], 0, bypass=True)
    assert found <= fewest(timed_visits(trace), [slots], 0, bypass=False)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 2), min_size=2, max_size=5), st.integers(1, 2), st.integers(0, 2))
def test_fewest_loads_is_below_every_schedule_of_two_layers(rows: list, slots: int, landing: int) -> None:
    trace = trace_of([[[a], [b]] for a, b in rows])
    assert bounds.fewest_loads(trace, [slots] * 2, landing) <= fewest(
        timed_visits(trace), [slots] * 2, landing, bypass=True
    )


def test_initial_content_is_free_for_every_sequence_but_bounded_by_the_slots() -> None:
    """Two sequences of tokens 0 | 1, 2, 1: the first pass is untimed. One slot keeps 1 and loads 2, once a sequence."""
    trace = trace_of([[[0]], [[1]], [[2]], [[1]]] * 2, lengths=[4, 4])
    assert bounds.fewest_loads(trace, [1], 0) == 2 * 1
    assert bounds.fewest_loads(trace, [2], 0) == 0


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_no_run_is_below_its_joint_floor(first: int) -> None:
    """`Experiment.run` raises below the floor; the references are runs too and obey the floor of their own slots.

    Without a host that computes experts, the joint floor is the larger of the other two; with one it takes its share
    of either, so the joint floor may be below compute on the device alone, and never above the floor without it.
    """
    for seed in range(first, first + 40):
        setting = random_setting(seed)
        found = Experiment().run(setting)
        if found["tpot_s"] is None:
            continue
        limits = found["bounds"]
        both = max(limits["all_resident_s"], limits["link_floor_s"])
        assert limits["joint_floor_s"] <= found["tpot_s"], f"seed {seed}: {setting.options.text}"
        if setting.options.miss == "load":
            assert limits["joint_floor_s"] == both
        else:
            without = replace(setting, options=setting.options.replace(miss="load"))
            alone = Experiment(references=False).run(without)["bounds"]
            assert 0 < limits["joint_floor_s"] < alone["joint_floor_s"]
            assert limits["link_floor_s"] <= alone["link_floor_s"]
        assert limits["all_resident_s"] <= limits["perfect_lookahead_belady_s"]


@settings(deadline=None, max_examples=60)
@given(
    works=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=6),
    expert=st.tuples(st.integers(1, 40), st.integers(0, 20)),
    host=st.tuples(st.integers(1, 60), st.integers(0, 30)),
)
def test_a_host_shares_the_work_no_better_than_its_floor_says(works: list, expert: tuple, host: tuple) -> None:
    """Every division of experts between device and host, tried: the later of the two is never below the floor."""

    def device_ns(tokens: int) -> int:
        return expert[0] + expert[1] * tokens

    def host_ns(tokens: int) -> int:
        return host[0] + host[1] * tokens

    timing = SimpleNamespace(undisturbed_expert_ns=device_ns, host_expert_ns=host_ns)
    passes = [SimpleNamespace(tokens=3, following=1)]
    trace = SimpleNamespace(passes=lambda: passes)
    tokens = [n for n, _ in works]
    resident = sum(map(device_ns, tokens))
    floor, _ = bounds.with_host_ns(trace, timing, resident, 0, 0)  # type: ignore[arg-type]
    for chosen in range(1 << len(tokens)):
        here = sum(device_ns(n) for k, n in enumerate(tokens) if chosen >> k & 1)
        there = sum(host_ns(n) for k, n in enumerate(tokens) if not chosen >> k & 1)
        assert max(here, there) >= floor
    loads, copy_ns = len(tokens), 25
    _, link = bounds.with_host_ns(trace, timing, resident, loads * copy_ns, loads)  # type: ignore[arg-type]
    for loaded in range(loads + 1):
        there = sum(sorted(map(host_ns, tokens))[: loads - loaded])
        assert max(loaded * copy_ns, there) >= link


def test_the_floor_is_reached_when_nothing_stands_in_the_way() -> None:
    """All experts in slots, no planning, no wake-up: the timed passes are compute alone."""
    trace = random_trace(4, sequences=1, length=40, layers=2, experts=4)
    machine = round_machine(wake_s=0.0)
    laws = machine.operators["tiny"]
    laws.host_s["default"] = 0.0
    found = Experiment().run(Setting(trace.head(40), machine, trace.model, 4, 4, options("on_demand")))
    assert found["bounds"]["link_floor_s"] == 0
    warm = bounds.all_resident_ns(trace, Timing(machine, trace.model, 4, options("on_demand")))
    assert found["bounds"]["all_resident_s"] == pytest.approx(warm / 39 / 1e9)
    assert found["itl_p50_s"] == pytest.approx(found["bounds"]["all_resident_s"])


@pytest.fixture(scope="module")
def gpt_oss() -> Trace:
    """Decode routing of gpt-oss-20b, 64 sequences."""
    if not GPT_OSS.exists():
        pytest.skip("../shared/data, with the public gpt-oss-20b trace, is not next to the project")
    with np.load(GPT_OSS) as arrays:
        ids, weights, lengths = arrays["experts"], arrays["probs"], arrays["lens"].astype(np.int32)
    model = ModelSpec("tiny", 24, 32, 4, 64, 128)
    return Trace(model, ids, weights, lengths, np.ones(len(ids), np.uint8), routing="RECORDED")


def planned_hits(trace: Trace, slots: int, cold: bool) -> int:
    setting = Setting(trace, round_machine(), trace.model, 4, slots, options("on_demand"), cold)
    decide = planner(setting, Timing(setting.machine, trace.model, 4, setting.options))
    return sum(len(decide.plan(visit).resident) for visit in trace.visits())


@pytest.mark.parametrize(("slots", "hits"), [(8, 1_921_810), (16, 2_651_137)])
def test_the_planner_gives_the_reference_counts_of_real_routing(gpt_oss: Trace, slots: int, hits: int) -> None:
    assert planned_hits(gpt_oss, slots, cold=True) == hits


@pytest.mark.parametrize("slots", [8, 16])
def test_warm_sequences_too(gpt_oss: Trace, slots: int) -> None:
    some = gpt_oss.head(3000)
    assert planned_hits(some, slots, cold=False) == stats.lru_hits(some, cold_sequences=False).sum(axis=0)[slots - 4]
