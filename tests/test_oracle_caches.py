"""Four cache rules against libcachesim, an independent implementation, on random traces.

libcachesim knows no visits. A visit of one expert is one request. A visit of several is asked so that its plain caches
do what a cache does that protects all experts of a visit: its residents are brought out of the victim's way, the
missing ones are requested, then everything is put back where the rule wants it. Which expert leaves is libcachesim's
choice throughout; after every visit both caches must hold the same experts.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from conftest import random_trace, round_machine, tiny_model

from sim.bounds import next_uses
from sim.experiment import Setting, planner
from sim.spec import options
from sim.timing import Timing
from traces import Trace

lcs = pytest.importorskip("libcachesim", reason="libcachesim is not installed; pip install 'expert-lookahead[oracle]'")

TRACES = int(os.environ.get("ORACLE_TRACES", "40"))  # for each rule and top_k; the figures in the log used 1000
NEVER = (1 << 63) - 1


class Plain:
    """One layer's slots in libcachesim; requests of size 1."""

    def __init__(self, rule: str, slots: int) -> None:
        self.cache = getattr(lcs, rule)(cache_size=slots, hashpower=10)

    def ask(self, expert: int, next_use: int = NEVER) -> bool:
        """One request; whether it hit."""
        request = lcs.Request()
        request.obj_id, request.obj_size, request.next_access_vtime = expert, 1, next_use
        return bool(self.cache.get(request))

    def has(self, expert: int) -> bool:
        request = lcs.Request()
        request.obj_id, request.obj_size = expert, 1
        return self.cache.find(request, False) is not None

    def drop(self, expert: int) -> None:
        assert self.cache.remove(expert)


class Protecting:
    """A layer under one rule: ``visit`` returns the hits; ``after`` is the next use of each expert, for Belady."""

    def __init__(self, rule: str, slots: int, experts: int) -> None:
        self.plain = Plain(rule, slots)
        self.experts = experts
        self.clock = 0

    def visit(self, routed: list[int], after: list[int]) -> int:
        here = [e for e in routed if self.plain.has(e)]
        missing = [e for e in routed if e not in here]
        self.clock += 1
        self.load(here, missing, routed, after)
        return len(here)

    def content(self) -> set[int]:
        return {e for e in range(self.experts) if self.plain.has(e)}

    def load(self, here: list[int], missing: list[int], routed: list[int], after: list[int]) -> None:
        raise NotImplementedError


class Lru(Protecting):
    """Residents, then misses, then all in router order: what is touched first is not the least recent."""

    def load(self, here: list[int], missing: list[int], routed: list[int], after: list[int]) -> None:
        for expert in (*here, *missing):
            self.plain.ask(expert)
        assert all(self.plain.ask(expert) for expert in routed)


class Belady(Protecting):
    """Everything is needed at once while the misses come; then each has its next use. Of equal ones the lower id
    leaves.
    """

    def load(self, here: list[int], missing: list[int], routed: list[int], after: list[int]) -> None:
        for expert in (*here, *missing):
            self.plain.ask(expert, 0)
        for expert, use in zip(routed, after, strict=True):
            assert self.plain.ask(expert, (use + 1) * self.experts - expert)


class Fifo(Protecting):
    """Residents of the visit go to the end of the queue; afterwards all are queued again as they came."""

    def __init__(self, rule: str, slots: int, experts: int) -> None:
        super().__init__(rule, slots, experts)
        self.came: dict[int, int] = {}

    def load(self, here: list[int], missing: list[int], routed: list[int], after: list[int]) -> None:
        for expert in here if missing else ():
            self.plain.drop(expert)
            self.plain.ask(expert)
        for expert in missing:
            self.plain.ask(expert)
            self.came[expert] = len(self.came) and max(self.came.values()) + 1
        self.queue_again()

    def queue_again(self) -> None:
        held = sorted(self.content(), key=lambda e: self.came[e])
        for expert in held:
            self.plain.drop(expert)
        for expert in held:
            assert not self.plain.ask(expert)


class Lfu(Protecting):
    """Experts of the visit are requested until nobody has fewer uses; afterwards each gets its own number again, in
    order of recency, by which equal ones leave."""

    def __init__(self, rule: str, slots: int, experts: int) -> None:
        super().__init__(rule, slots, experts)
        self.uses: dict[int, int] = {}
        self.last: dict[int, int] = {}

    def load(self, here: list[int], missing: list[int], routed: list[int], after: list[int]) -> None:
        enough = max(self.uses.values(), default=0) + 1 if missing else 0
        for expert in (*here, *missing):
            for _ in range(enough):
                self.plain.ask(expert)
        for expert in missing:
            self.uses[expert] = 0
        for place, expert in enumerate(routed):
            self.uses[expert] += 1
            self.last[expert] = self.clock * len(routed) + place
        held = sorted(self.content(), key=lambda e: self.last[e])
        for expert in held:
            self.plain.drop(expert)
        for turn in range(max(self.uses[e] for e in held)):
            for expert in held:
                if self.uses[expert] > turn:
                    self.plain.ask(expert)


RULES = {
    "lru": ("LRU", "lru", Lru),
    "fifo": ("FIFO", "fifo", Fifo),
    "lfu": ("LFU", "lfu:resident=1", Lfu),
    "belady": ("Belady", "belady", Belady),
}


def some_trace(seed: int, top_k: int) -> tuple[Trace, int]:
    """A random trace and a number of slots."""
    experts = 4 + seed % 9
    trace = random_trace(seed, sequences=1 + seed % 3, length=25, layers=1 + seed % 2, experts=experts, top_k=top_k)
    return trace, top_k + seed * 7 % (experts - top_k + 1)


def planned(trace: Trace, slots: int, cache: str) -> tuple[Any, Any]:
    run = options("on_demand", cache=cache)
    setting = Setting(trace, round_machine(), trace.model, 4, slots, run)
    return planner(setting, Timing(setting.machine, tiny_model(), 4, run)), trace.visits()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_same_experts_are_resident_after_every_visit(rule: str, top_k: int) -> None:
    theirs, ours, kind = RULES[rule]
    accesses = 0
    for seed in range(TRACES):
        trace, slots = some_trace(1000 * top_k + seed, top_k)
        decide, visits = planned(trace, slots, ours)
        experts = trace.model.num_experts
        layers = [kind(theirs, slots, experts) for _ in range(trace.model.num_layers)]
        following = next_uses(trace)[1]
        done = 0
        for visit in visits:
            after = [min(use, 1 << 40) for use in following[done : done + len(visit.experts)]]
            done += len(visit.experts)
            hits = layers[visit.layer].visit(visit.experts, after)
            plan = decide.plan(visit)
            assert len(plan.resident) == hits, f"seed {seed}, visit {visit.index}"
            assert set(decide.resident_slots(visit.layer)) == layers[visit.layer].content(), f"seed {seed}"
        accesses += done
    assert accesses >= TRACES * 25


@pytest.mark.parametrize("rule", RULES)
def test_top_1_hits_by_plain_requests(rule: str) -> None:
    """Nothing is brought out of the way and nothing put back: every access is one request, never is never."""
    theirs, ours, _ = RULES[rule]
    for seed in range(TRACES):
        trace, slots = some_trace(seed, 1)
        decide, visits = planned(trace, slots, ours)
        layers = [Plain(theirs, slots) for _ in range(trace.model.num_layers)]
        following = next_uses(trace)[1]
        for access, visit in enumerate(visits):
            use = NEVER if following[access] >= 1 << 40 else following[access]
            hit = layers[visit.layer].ask(visit.experts[0], use)
            assert len(decide.plan(visit).resident) == hit, f"seed {seed}, visit {visit.index}"
