"""Keeps its own account of who owns which slot, from the plans alone, and objects; and planners without a driver."""

from __future__ import annotations

from sim.experiment import Setting, planner, predictor
from sim.planner import Load, Plan, Planner
from sim.timing import Timing


class Watcher:
    """Shown every plan in order, it asserts what DESIGN.md promises of each.

    Args:
        decide: the planner whose plans it sees, for its sizes and for who it says is resident.
        cold: the caches are emptied where a sequence starts.
        wraps: guesses may speak of the next token's first layers.
    """

    def __init__(self, decide: Planner, cold: bool, wraps: bool = False) -> None:
        self.decide, self.cold, self.wraps = decide, cold, wraps
        self.options, self.model = decide.options, decide.model
        self.owner: dict[int, tuple[int, int]] = {}
        self.pending: dict[tuple[int, int], int] = {}
        self.passing: list[int] = []
        self.first_stream = decide.num_slots - self.options.stream_slots
        self.bypass = hasattr(self.options.cache.module, "admit")

    def see(self, plan: Plan) -> None:
        visit, layer = plan.visit, plan.visit.layer
        routed = set(range(self.model.num_experts)) if self.options.whole_layer else set(visit.experts)
        for slot in self.passing:
            del self.owner[slot]
        for load in plan.retract:
            assert self.owner.pop(load.slot) == (load.layer, load.expert), "it had another slot"
        gone = {(load.layer, load.expert) for load in plan.retract}
        if self.cold and visit.starts_sequence:
            self.owner.clear()
            self.pending.clear()
        judged = {x: target for x, target in self.pending.items() if target == visit.index and x[0] == layer}
        assert all(target >= visit.index for target in self.pending.values()), "a prefetch was never judged"
        self.pending = {x: target for x, target in self.pending.items() if x not in judged and x not in gone}
        if self.options.stale == "retract":
            assert all(x[1] in routed or x in gone for x in judged), "a stale prefetch stays"

        fates = [*plan.resident, *(load.expert for load in (*plan.claimed, *plan.demand, *plan.stream)), *plan.host]
        assert sorted(fates) == sorted(routed), "every routed expert has one fate"
        for expert in plan.resident:
            assert (layer, expert) in self.owner.values(), "resident without a slot"
        for load in plan.claimed:
            assert load.layer == layer
            assert self.owner[load.slot] == (layer, load.expert)
        assert [load.key for load in plan.claimed] == sorted(load.key for load in plan.claimed)
        for slot in plan.displaced:
            victim = self.owner.pop(slot)
            assert victim[0] == layer or self.options.pooled or self.options.guard
            self.may_leave(victim, layer, routed)
        for loads in (plan.demand, plan.stream):
            order = [visit.experts.index(load.expert) for load in loads if load.expert in visit.experts]
            assert order == sorted(order), "misses load in router order"
        for load in plan.demand:
            assert load.layer == layer
            self.take(load, gone, layer, routed)
        for load in plan.stream:
            assert load.slot >= self.first_stream
            assert (layer, load.expert) not in self.owner.values()
        streaming = len(routed) > self.size(layer) + self.decide.landing_slots * self.options.guard
        if plan.stream and not (self.bypass or self.options.pooled or self.wraps):
            assert len(routed) > self.size(layer), "a visit that fits its slots streams"
        if streaming:
            assert all(load.evicted is None for load in plan.demand), "a streamed visit evicts"
            assert not plan.displaced or self.options.guard
        held = self.decide.resident_slots(layer)
        streamed = {load.expert: load.slot for load in plan.stream}
        for expert, slot in zip(visit.experts, plan.slots, strict=True):
            if expert in plan.host:
                assert slot == -1
                assert expert not in held or any((p.layer, p.expert) == (layer, expert) for p in plan.prefetch)
            elif expert in streamed:
                assert streamed[expert] == slot
            else:
                assert self.owner[slot] == (layer, expert)
        self.prefetches(plan, gone, routed)
        self.passing = [load.slot for load in plan.claimed if load.expert not in held]
        self.agree()

    def prefetches(self, plan: Plan, gone: set[tuple[int, int]], routed: set[int]) -> None:
        """Highest worth first; into a free slot or over somebody nobody needs now."""
        visit, layers = plan.visit, self.model.num_layers
        assert [-load.worth for load in plan.prefetch] == sorted(-load.worth for load in plan.prefetch)
        for load in plan.prefetch:
            assert load.worth > 0
            assert load.target > visit.index
            distance = load.target - visit.index
            assert distance <= self.options.lookahead
            assert load.layer == (visit.layer + distance) % layers
            assert self.wraps or load.layer > visit.layer
            self.take(load, gone, visit.layer, routed)
            self.pending[load.layer, load.expert] = load.target

    def take(self, load: Load, gone: set[tuple[int, int]], layer: int, routed: set[int]) -> None:
        """A load takes its slot."""
        assert load.slot < self.first_stream
        assert (load.layer, load.expert) not in self.owner.values(), "it is resident already"
        if load.evicted is not None:
            victim = (load.evicted_layer, load.evicted)
            assert victim[0] == load.layer or self.options.pooled
            self.may_leave(victim, layer, routed)
            assert victim in gone or self.owner.pop(load.slot) == victim
        assert load.slot not in self.owner, "two experts in one slot"
        self.owner[load.slot] = (load.layer, load.expert)

    def may_leave(self, victim: tuple[int, int], layer: int, routed: set[int]) -> None:
        assert victim[0] != layer or victim[1] not in routed, "a routed expert is evicted"
        assert victim not in self.pending, "an expert on its way is evicted"

    def size(self, layer: int) -> int:
        return self.decide.sizes[0 if len(self.decide.sizes) == 1 else layer]

    def agree(self) -> None:
        """The planner's residents have the slots this account gives them, and no group more than its size."""
        held = [self.decide.resident_slots(layer) for layer in range(self.model.num_layers)]
        for layer, slots in enumerate(held):
            for expert, slot in slots.items():
                assert self.owner[slot] == (layer, expert)
        counts = [len(slots) for slots in held]
        counts = [sum(counts)] if len(self.decide.sizes) == 1 else counts
        excess = sum(max(0, count - size) for count, size in zip(counts, self.decide.sizes, strict=True))
        assert excess <= (self.decide.landing_slots if self.options.guarded else 0), "more residents than slots"


def timing_of(setting: Setting) -> Timing:
    return Timing(setting.machine, setting.model, setting.bits, setting.options)


def plans(setting: Setting, keep_time: bool = False) -> tuple[Planner, list[Plan]]:
    """Every plan of a run, without a driver and without its clock; guesses at every visit, asked for or not."""
    decide, predict = planner(setting, timing_of(setting), keep_time), predictor(setting)
    made = []
    visits = setting.trace.visits()
    for forward in setting.trace.passes():
        for _ in range(setting.model.num_layers):
            visit = next(visits)
            visit.guesses = predict(visit, forward.first) if predict else []
            made.append(decide.plan(visit))
    return decide, made


def watched(setting: Setting) -> None:
    decide, predict = planner(setting, timing_of(setting)), predictor(setting)
    tables = setting.trace.guesses
    watcher = Watcher(decide, setting.cold_sequences, wraps=any(table.wrap for table in tables.values()))
    visits = setting.trace.visits()
    for forward in setting.trace.passes():
        for _ in range(setting.model.num_layers):
            visit = next(visits)
            visit.guesses = predict(visit, forward.first) if predict else []
            watcher.see(decide.plan(visit))
