"""The planner: one plan per visit says what is resident, what to load, evict, prefetch and retract.

It knows expert ids, scores and the machine's profile; no clock, stream or tensor. Only it changes residency; the
drivers obey. Its virtual link clock (`sim.clock`) advances by the profile alone, so every driver sees the same plans.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sim.clock import Clock
from sim.plugin import Guess, LinkView, Resident
from sim.spec import Options, SpecError
from sim.timing import Timing
from traces import DECODE, Guesses, ModelSpec, Visit

DEMAND, PREFETCH, RETRACT, STREAM = "demand", "prefetch", "retract", "stream"


@dataclass(slots=True)
class Load:
    """One expert to copy: where from, where to, and what for.

    Attributes:
        layer, expert: which.
        slot: buffer it lands in.
        kind: ``demand``, ``prefetch`` or ``stream``.
        evicted: expert of the same layer that loses its slot; None when the slot was free.
        visit: visit it was issued in.
        target: visit it is meant for.
        worth: of a prefetch.
        number: running number of the load in its run.
    """

    layer: int
    expert: int
    slot: int
    kind: str
    evicted: int | None
    visit: int
    target: int
    worth: float = 0.0
    number: int = 0

    @property
    def key(self) -> tuple[int, float, int]:
        """Order among waiting prefetches: nearest layer, then worth, then age."""
        return (self.target, -self.worth, self.number)


@dataclass(slots=True)
class Plan:
    """All decisions of one visit.

    Attributes:
        visit: what was planned.
        slots: slot of each of ``visit.experts``, in that order.
        resident: routed experts that were resident and not on a pending prefetch.
        claimed: pending prefetches that were routed, in the order they are joined.
        demand: loads to issue now, in router order.
        stream: loads that pass through the stream slots, in router order; each waits until its slot is free.
        prefetch: loads to issue early, in issue order.
        retract: prefetches that are dropped.
        displaced: slots whose experts give way to claimed prefetches and become landing slots.
    """

    visit: Visit
    slots: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    claimed: list[Load] = field(default_factory=list)
    demand: list[Load] = field(default_factory=list)
    stream: list[Load] = field(default_factory=list)
    prefetch: list[Load] = field(default_factory=list)
    retract: list[Load] = field(default_factory=list)
    displaced: list[int] = field(default_factory=list)

    def victims(self) -> int:
        """Experts that lose their slot by this plan."""
        return len(self.displaced) + sum(load.evicted is not None for load in (*self.demand, *self.prefetch))


class Planner:
    """Residency of all experts, and the rules that change it.

    Args:
        model: layers, experts, top_k.
        options: policy, cache rule and run options.
        slots: cache slots per layer.
        timing: the machine's times; advances the virtual link clock.
        next_use: for a cache rule that needs the future: for each layer int64 [visits + 1, experts], the first visit
            of that layer, from this one on, that routes the expert (`sim.bounds.next_use_tables`).
        keep_time: advance the virtual clock even if the policy never prefetches.
        cold_sequences: the first visit of a sequence empties the caches.

    Raises:
        SpecError: fewer slots than top_k, or more than experts.
    """

    def __init__(
        self,
        model: ModelSpec,
        options: Options,
        slots: int,
        timing: Timing,
        next_use: list[npt.NDArray[np.int64]] | None = None,
        keep_time: bool = False,
        cold_sequences: bool = False,
    ) -> None:
        check_slots(model, slots)
        self.model = model
        self.options = options
        self.sizes = layer_sizes(model, options, slots)
        self.landing_slots = options.landing_slots if options.prefetches else 0
        cache_slots = sum(self.sizes)
        self.num_slots = cache_slots + self.landing_slots + options.stream_slots
        self._stream = list(range(cache_slots + self.landing_slots, self.num_slots))
        self.clock = Clock(timing, options)
        self._keeps_time = keep_time or options.prefetches
        self._next_use = next_use
        self._score = options.cache.module.score
        self._cache_params = options.cache.params
        self._accesses = 0
        self._loads = 0
        self._cold = cold_sequences
        self._visits = [0] * model.num_layers
        self._forget()

    def _forget(self) -> None:
        """Nothing is resident and nothing was ever used; the clock and load numbers go on."""
        layers, experts = self.model.num_layers, self.model.num_experts
        start = 0
        self._free: list[list[int]] = []
        for size in self.sizes:
            self._free.append(list(range(start + size - 1, start - 1, -1)))
            start += size
        self._landing_free = list(range(start + self.landing_slots - 1, start - 1, -1))
        self._resident: list[dict[int, int]] = [{} for _ in range(layers)]
        self._pending: list[dict[int, Load]] = [{} for _ in range(layers)]
        self._kept: dict[tuple[int, int], Load] = {}
        self._released: list[int] = []
        self._last_use = [[-1] * experts for _ in range(layers)]
        self._uses = [[0] * experts for _ in range(layers)]
        self._loaded = [[0] * experts for _ in range(layers)]

    # --- one visit --------------------------------------------------------------------------------------------

    def plan(self, visit: Visit) -> Plan:
        """Decide everything that follows from this visit's routing and guesses. Call once per visit, in order."""
        layer = visit.layer
        plan = Plan(visit)
        if self._cold and visit.starts_sequence:
            plan.retract.extend(self._kept.values())
            self._forget()
        if self._released:
            self._landing_free.extend(self._released)
            self._released.clear()
        pending = self._pending[layer]
        if pending:
            self._judge(plan, pending)
        if len(visit.experts) > self.sizes[layer]:
            self._place_streaming(plan)
        else:
            self._place(plan)
        self._visits[layer] += 1
        last_use, uses = self._last_use[layer], self._uses[layer]
        for expert, count in zip(visit.experts, visit.counts, strict=True):
            self._accesses += 1
            last_use[expert] = self._accesses
            uses[expert] += count
        if self._keeps_time:
            self.clock.begin(plan)
        if visit.guesses and visit.phase == DECODE and self.options.prefetches:
            self._prefetch(plan)
        if self._keeps_time:
            self.clock.finish(plan)
        return plan

    def _judge(self, plan: Plan, pending: dict[int, Load]) -> None:
        """Every prefetch issued for this layer is routed now, or stale."""
        layer = plan.visit.layer
        routed = set(plan.visit.experts)
        for expert, load in list(pending.items()):
            if expert in routed:
                continue
            del pending[expert]
            if self.options.stale == "retract":
                plan.retract.append(load)
                if self.landing_slots:
                    self._landing_free.append(load.slot)
                else:
                    del self._resident[layer][expert]
                    self._free[layer].append(load.slot)
            else:
                self._kept[layer, expert] = load

    def _place(self, plan: Plan) -> None:
        visit = plan.visit
        layer = visit.layer
        resident, pending, free = self._resident[layer], self._pending[layer], self._free[layer]
        routed = visit.experts
        for expert in routed:
            early = pending.pop(expert, None) or (self._kept.pop((layer, expert), None) if self._kept else None)
            slot = resident.get(expert)
            if early is not None:
                plan.claimed.append(early)
                if slot is None:
                    if free:
                        self._landing_free.append(free.pop())
                    else:
                        plan.displaced.append(self._evict(layer, routed, plan)[1])
                        self._landing_free.append(plan.displaced[-1])
                    slot = resident[expert] = early.slot
            elif slot is not None:
                plan.resident.append(expert)
            else:
                evicted = None
                if free:
                    slot = free.pop()
                else:
                    evicted, slot = self._evict(layer, routed, plan)
                resident[expert] = slot
                plan.demand.append(self._load(layer, expert, slot, DEMAND, evicted, visit.index, visit.index))
            plan.slots.append(slot)
        if len(plan.claimed) > 1:
            plan.claimed.sort(key=lambda load: load.key)

    def _place_streaming(self, plan: Plan) -> None:
        """More experts than slots: nothing resident leaves; what finds no free slot passes through."""
        visit = plan.visit
        layer, index = visit.layer, visit.index
        resident, pending, free = self._resident[layer], self._pending[layer], self._free[layer]
        for expert in visit.experts:
            early = pending.pop(expert, None) or self._kept.pop((layer, expert), None)
            slot = resident.get(expert)
            if early is not None:
                plan.claimed.append(early)
                if slot is None:
                    slot = early.slot
                    if free:
                        self._landing_free.append(free.pop())
                        resident[expert] = slot
                    else:
                        self._released.append(slot)
            elif slot is not None:
                plan.resident.append(expert)
            elif free:
                slot = resident[expert] = free.pop()
                plan.demand.append(self._load(layer, expert, slot, DEMAND, None, index, index))
            else:
                slot = self._stream[len(plan.stream) % len(self._stream)]
                plan.stream.append(self._load(layer, expert, slot, STREAM, None, index, index))
            plan.slots.append(slot)
        plan.claimed.sort(key=lambda load: load.key)

    def _load(
        self, layer: int, expert: int, slot: int, kind: str, evicted: int | None, visit: int, target: int
    ) -> Load:
        self._loads += 1
        if kind != STREAM:
            self._loaded[layer][expert] = self._accesses
        return Load(layer, expert, slot, kind, evicted, visit, target, 0.0, self._loads)

    def _evict(self, layer: int, protected: list[int], plan: Plan) -> tuple[int, int]:
        """Take the victim's slot: (victim, slot); (-1, -1) when nothing may leave."""
        victim = self._victim(layer, protected)
        if victim < 0:
            return -1, -1
        kept = self._kept.pop((layer, victim), None) if self._kept else None
        if kept is not None:
            plan.retract.append(kept)
        return victim, self._resident[layer].pop(victim)

    def _victim(self, layer: int, protected: list[int]) -> int:
        """Resident expert with the lowest score that is neither protected nor on a pending prefetch; -1 if none."""
        last_use = self._last_use[layer]
        pending = self._pending[layer]
        best, lowest = -1, 0.0
        uses, loaded = self._uses[layer], self._loaded[layer]
        future = self._next_use[layer][self._visits[layer]].tolist() if self._next_use else None
        for expert in self._resident[layer]:
            if expert in protected or expert in pending:
                continue
            next_use = future[expert] if future else -1
            view = Resident(expert, last_use[expert], uses[expert], loaded[expert], next_use)
            score = self._score(self._cache_params, view)
            if best < 0 or (score, expert) < (lowest, best):
                best, lowest = expert, score
        return best

    # --- prefetch ---------------------------------------------------------------------------------------------

    def _prefetch(self, plan: Plan) -> None:
        """Value every guess, highest worth first, as many as there are places to land."""
        worths = self._worths(plan.visit)
        worths.sort()
        index = plan.visit.index
        for negative, layer, expert in worths:
            slot, evicted = self._landing_place(layer, plan)
            if slot < 0:
                if self.landing_slots:
                    return
                continue
            target = index + layer - plan.visit.layer
            load = self._load(layer, expert, slot, PREFETCH, evicted, index, target)
            load.worth = -negative
            self._pending[layer][expert] = load
            if not self.landing_slots:
                self._resident[layer][expert] = slot
            plan.prefetch.append(load)

    def _worths(self, visit: Visit) -> list[tuple[float, int, int]]:
        """(-worth, layer, expert) of every guess worth issuing."""
        options, model = self.options, self.model
        worth, params = options.policy.module.worth, options.policy.params
        found = []
        view = self.clock.view(1)
        reach = min(options.lookahead, len(visit.guesses), model.num_layers - 1 - visit.layer)
        for distance in range(1, reach + 1):
            layer = visit.layer + distance
            guesses: Guesses = visit.guesses[distance - 1]
            resident, pending = self._resident[layer], self._pending[layer]
            if distance > 1:
                view = LinkView(*view[:4], self.clock.window_ns(distance))
            mass, missing = 0.0, 0
            for rank, (expert, score) in enumerate(zip(guesses.experts, guesses.scores, strict=True)):
                if score <= 0.0:
                    break
                if expert not in resident and expert not in pending and (layer, expert) not in self._kept:
                    value = worth(params, Guess(score, distance, rank, missing, mass), view)
                    missing += 1
                    if value > 0.0:
                        found.append((-value, layer, expert))
                mass += score
        return found

    def _landing_place(self, layer: int, plan: Plan) -> tuple[int, int | None]:
        """Slot for a prefetch and the expert it displaces; slot -1 when there is no place."""
        if self.landing_slots:
            if self._landing_free:
                return self._landing_free.pop(), None
            if self._kept:
                oldest = next(iter(self._kept))
                load = self._kept.pop(oldest)
                plan.retract.append(load)
                return load.slot, None
            return -1, None
        if self._free[layer]:
            return self._free[layer].pop(), None
        victim, slot = self._evict(layer, [], plan)
        return slot, victim if slot >= 0 else None

    def resident_slots(self, layer: int) -> dict[int, int]:
        """Experts of a layer that hold a cache slot, and which; a copy."""
        return dict(self._resident[layer])


def check_slots(model: ModelSpec, slots: int) -> None:
    """Refuse a slot count outside top_k to the number of experts.

    Raises:
        SpecError: with the range.
    """
    if not model.top_k <= slots <= model.num_experts:
        raise SpecError(
            f"slots is {slots}; {model.name} routes {model.top_k} of {model.num_experts} experts, "
            f"so it must be {model.top_k} to {model.num_experts}"
        )


def layer_sizes(model: ModelSpec, options: Options, slots: int) -> list[int]:
    """Cache slots of each layer: a policy that never prefetches spreads its landing slots over the first layers."""
    sizes = [slots] * model.num_layers
    if not options.prefetches:
        for i in range(options.landing_slots):
            layer = i % model.num_layers
            sizes[layer] = min(sizes[layer] + 1, model.num_experts)
    return sizes
