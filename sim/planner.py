"""The planner: one plan per visit says what is resident, what to load, evict, prefetch and retract.

It knows expert ids, scores and the machine's profile; no clock, stream or tensor. Only it changes residency; the
drivers obey. The decisions stand in `sim.decide`, their times in `sim.clock`; here they are put into objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sim import clock, guard, registry
from sim.plugin import Experts, Misses, Now
from sim.spec import Options, SpecError
from sim.state import (
    ACTIVE,
    CLAIMS,
    DEMANDED,
    DISPLACED,
    HOSTED,
    LOOKING,
    NOW,
    PREFETCHES,
    RESIDENT,
    RETRACTS,
    STREAMED,
    Config,
    State,
    Wire,
    new_state,
    new_wire,
)
from sim.timing import Timing
from traces import DECODE, ModelSpec, Visit

DEMAND, PREFETCH, RETRACT, STREAM = "demand", "prefetch", "retract", "stream"
CREDIT_PERCENT = 50
PROBE = 8


@dataclass(slots=True)
class Load:
    """One expert to copy: where from, where to, and what for.

    Attributes:
        layer, expert: which.
        slot: buffer it lands in.
        kind: ``demand``, ``prefetch`` or ``stream``.
        evicted: expert that loses its slot; None when the slot was free.
        visit: visit it was issued in.
        target: visit it is meant for.
        worth: of a prefetch.
        number: running number of the load in its run.
        evicted_layer: layer of ``evicted``; another one only where all layers share one pool of slots.
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
    evicted_layer: int = -1

    @property
    def key(self) -> tuple[int, float, int]:
        """Order among waiting prefetches: nearest layer, then worth, then age."""
        return (self.target, -self.worth, self.number)


@dataclass(slots=True)
class Plan:
    """All decisions of one visit.

    Attributes:
        visit: what was planned.
        slots: slot of each of ``visit.experts``, in that order; -1 for those the host computes.
        resident: routed experts that were resident and not on a pending prefetch.
        claimed: pending prefetches that were routed, in the order they are joined.
        demand: loads to issue now, in router order.
        stream: loads that pass through the stream slots, in router order; each waits until its slot is free.
        host: routed experts that the host computes.
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
    host: list[int] = field(default_factory=list)
    prefetch: list[Load] = field(default_factory=list)
    retract: list[Load] = field(default_factory=list)
    displaced: list[int] = field(default_factory=list)

    def written_back(self) -> list[int]:
        """Slots whose experts lose their place by this plan, in the order in which write-back copies them."""
        loads = (*self.demand, *self.prefetch)
        return self.displaced + [load.slot for load in loads if load.evicted is not None]


class Rules(NamedTuple):
    """The plug-ins' functions, and their parameters."""

    score: Callable[..., float]
    touch: Callable[..., float]
    admit: Callable[..., bool]
    worth: Callable[..., float]
    loads: Callable[..., int]
    cache: Any
    policy: Any
    miss: Any


def touch_nothing(params: object, experts: Experts, x: int, tokens: int, now: Now) -> float:
    """For cache rules that remember nothing."""
    return 0.0


def admit_all(params: object, experts: Experts, x: int, victim: int, now: Now) -> bool:
    """For cache rules that take in every missing expert."""
    return True


def worth_nothing(params: object, guess: object, link: object) -> float:
    """For policies that never prefetch."""
    return 0.0


def load_all(params: object, misses: Misses) -> int:
    """For runs that load every miss."""
    return misses.number


def rules_of(options: Options) -> Rules:
    """The functions a run decides by."""
    cache, policy, miss = options.cache, options.policy, options.miss_rule
    return Rules(
        score=cache.module.score,
        touch=getattr(cache.module, "touch", touch_nothing),
        admit=getattr(cache.module, "admit", admit_all),
        worth=getattr(policy.module, "worth", worth_nothing),
        loads=getattr(miss.module, "loads", load_all),
        cache=cache.params,
        policy=policy.params,
        miss=miss.params,
    )


class Fitted(NamedTuple):
    """What a cache rule learned from a trace beforehand.

    Attributes:
        table: its own number for every x; empty for none.
        sizes: cache slots of every layer; empty for equal ones.
        first_use, following: for rules that need the future: first visit that routes each x (1 << 40 for never), and
            for every access of the run, in order, the next visit that routes that expert; empty for none.
    """

    table: Sequence[float] = ()
    sizes: Sequence[int] = ()
    first_use: Sequence[int] = ()
    following: Sequence[int] = ()


def config_of(model: ModelSpec, options: Options, sizes: list[int], max_guesses: int, keep_time: bool) -> Config:
    """The constants of a run."""
    cache, policy = options.cache.module, options.policy.module
    has_rule = hasattr(options.miss_rule.module, "loads")
    landing = options.landing_slots if options.prefetches else 0
    return Config(
        layers=model.num_layers,
        experts=model.num_experts,
        top_k=model.top_k,
        groups=1 if options.pooled else model.num_layers,
        places=(landing or sum(sizes)) if options.prefetches else 1,
        landing_slots=landing,
        stream_slots=options.stream_slots,
        first_stream=sum(sizes) + landing,
        max_guesses=max(1, max_guesses),
        lookahead=options.lookahead,
        keep_stale=int(options.stale == "keep"),
        copy_stream=int(options.copy_stream),
        write_back=int(options.write_back),
        hints=int(getattr(cache, "WANTS_GUESSES", False) or getattr(policy, "WANTS_AGREEMENT", False)),
        trust=int(options.prefetches and getattr(policy, "WANTS_TRUST", False)),
        guard=int(options.guarded),
        lends=int(options.guarded and landing > 0),
        bypass=int(hasattr(cache, "admit")),
        touches=int(hasattr(cache, "touch")),
        has_rule=int(has_rule),
        clock=int(keep_time or options.prefetches or has_rule),
        credit_percent=CREDIT_PERCENT,
        probe=PROBE,
    )


class Planner:
    """Residency of all experts, and the rules that change it.

    Args:
        model: layers, experts, top_k.
        options: policy, cache rule and run options.
        slots: cache slots per layer.
        timing: the machine's times; advances the virtual link clock.
        fitted: what the cache rule learned from a trace.
        keep_time: advance the virtual clock even if the policy never prefetches.
        cold_sequences: the first visit of a sequence empties the caches.
        max_guesses: most guesses of one visit and distance.

    Raises:
        SpecError: fewer slots than top_k, or more than experts.
    """

    def __init__(
        self,
        model: ModelSpec,
        options: Options,
        slots: int,
        timing: Timing,
        fitted: Fitted = Fitted(),  # noqa: B008 (immutable)
        keep_time: bool = False,
        cold_sequences: bool = False,
        max_guesses: int = 0,
    ) -> None:
        check_slots(model, slots)
        self.model = model
        self.options = options
        self.timing = timing
        self.sizes = group_sizes(model, options, slots, fitted.sizes)
        self._c = config_of(model, options, self.sizes, max_guesses or model.num_experts, keep_time)
        self.landing_slots = self._c.landing_slots
        self.num_slots = sum(self.sizes) + self.landing_slots + options.stream_slots
        self._rules = rules_of(options)
        self._times = timing.tables()
        self._cold = cold_sequences
        self._whole = options.whole_layer
        extra = self.landing_slots if self._c.lends else 0
        most = model.num_experts * (model.num_layers if options.pooled else 1)
        limits = spread(extra, [0] * len(self.sizes), [most] * len(self.sizes), self.sizes)
        self._s = new_state(self._c, self.sizes, limits, fitted.table, fitted.first_use)
        self._w = new_wire(self.num_slots, model.num_experts, options.max_submitted)
        self._following = fitted.following
        self._accesses = 0
        guard.begin_run(self._s, self._c)
        self._shadow: tuple[State, Wire, Config, Rules] | None = None
        if self._c.guard:
            self._shadow = self._on_demand(slots, fitted)

    def _on_demand(self, slots: int, fitted: Fitted) -> tuple[State, Wire, Config, Rules]:
        """The guard's shadow: the same visits without prefetching, with the same total slots."""
        plain = self.options.without_prefetching()
        sizes = group_sizes(self.model, plain, slots, fitted.sizes)
        c = config_of(self.model, plain, sizes, 1, True)
        s = new_state(c, sizes, [0] * len(sizes), fitted.table, fitted.first_use)
        w = new_wire(sum(sizes) + plain.stream_slots, self.model.num_experts, plain.max_submitted)
        guard.begin_run(s, c)
        return s, w, c, rules_of(plain)

    @property
    def now_ns(self) -> int:
        """The virtual clock."""
        return self._s.n[NOW]

    @property
    def prefetching(self) -> bool:
        """Whether prefetches are issued in this pass (a guard may say no)."""
        return self._s.n[ACTIVE] > 0

    def looks(self, phase: int) -> bool:
        """Whether the next visit's guesses are used: its lookahead gates need not run otherwise."""
        return phase == DECODE and self._s.n[LOOKING] > 0

    def plan(self, visit: Visit) -> Plan:
        """Decide everything that follows from this visit's routing and guesses. Call once per visit, in order."""
        s, c = self._s, self._c
        last = visit.layer == c.layers - 1
        dense_ns = self.timing.dense_ns(visit.tokens, visit.context) if c.clock else 0
        head_ns = self.timing.head_ns(visit.tokens) if c.clock and last else 0
        decode = visit.phase == DECODE
        used = len(visit.experts)
        routed = self._enter(s, visit)
        if decode and s.n[LOOKING]:
            self._enter_guesses(visit)
        try:
            self._decide(visit, decode, routed, used, dense_ns, head_ns)
        except Exception as error:
            run = self.options
            names = f"policy {run.policy.name!r}, cache {run.cache.name!r} and miss {run.miss!r}"
            registry.name_plugin(error, f"while {names} decided visit {visit.index}")
            raise
        self._accesses += used
        return self._plan(visit, routed)

    def _decide(self, visit: Visit, decode: bool, routed: int, used: int, dense_ns: int, head_ns: int) -> None:
        """The visit in the input tables, its time, and the guard's shadow."""
        s, c = self._s, self._c
        if c.clock:
            self._times.make_room(max(visit.counts))
        clock.visit(
            s, self._w, c, self._times.times, self._rules, visit.index, visit.layer, decode, visit.starts_sequence,
            self._cold, routed, used, dense_ns, head_ns,
        )  # fmt: skip
        if self._shadow is not None:
            other, wire, config, rules = self._shadow
            self._enter(other, visit)
            clock.visit(
                other, wire, config, self._times.times, rules, visit.index, visit.layer, decode, visit.starts_sequence,
                self._cold, routed, used, dense_ns, head_ns,
            )  # fmt: skip
            if visit.layer == c.layers - 1:
                guard.end_pass(s, c, decode, other.n[NOW], self._times.times.load_ns)

    def _enter(self, s: State, visit: Visit) -> int:
        """Write a visit into the input tables; returns the experts that take part."""
        routed = len(visit.experts)
        s.routed[:routed] = visit.experts
        s.counts[:routed] = visit.counts
        if self._following:
            s.following[:routed] = self._following[self._accesses : self._accesses + routed]
        if self._whole:
            for expert in range(self._c.experts):
                if expert not in visit.experts:
                    s.routed[routed], s.counts[routed] = expert, 0
                    routed += 1
        return routed

    def _enter_guesses(self, visit: Visit) -> None:
        s, c = self._s, self._c
        for d in range(c.lookahead):
            guesses = visit.guesses[d] if d < len(visit.guesses) else None
            length = min(c.max_guesses, len(guesses.experts)) if guesses else 0
            s.offer_len[d] = length
            if guesses:
                first = d * c.max_guesses
                s.offer_id[first : first + length] = guesses.experts[:length]
                s.offer_score[first : first + length] = guesses.scores[:length]

    def _plan(self, visit: Visit, routed: int) -> Plan:
        """The tables of the visit just planned, as objects."""
        s, n, experts = self._s, self._s.n, self._c.experts
        layer, index = visit.layer, visit.index
        plan = Plan(visit, s.slot[: len(visit.experts)])
        for i in range(routed):
            fate = s.fate[i]
            if fate == RESIDENT:
                if i < len(visit.experts):
                    plan.resident.append(s.routed[i])
            elif fate == DEMANDED:
                gone = s.evicted[i]
                evicted, where = (gone % experts, gone // experts) if gone >= 0 else (None, -1)
                plan.demand.append(
                    Load(layer, s.routed[i], s.slot[i], DEMAND, evicted, index, index, 0.0, s.number[i], where)
                )
            elif fate == STREAMED:
                plan.stream.append(Load(layer, s.routed[i], s.slot[i], STREAM, None, index, index, 0.0, s.number[i]))
            elif fate == HOSTED:
                plan.host.append(s.routed[i])
        for k in range(n[CLAIMS]):
            plan.claimed.append(self._early(layer * experts + s.routed[s.claims[k]], index))
        if n[DISPLACED]:
            plan.displaced = s.displaced[: n[DISPLACED]]
        for k in range(n[RETRACTS]):
            x = s.retract_x[k]
            load = Load(x // experts, x % experts, s.retract_slot[k], PREFETCH, None, index, index)
            load.number = s.retract_number[k]
            plan.retract.append(load)
        for k in range(n[PREFETCHES]):
            load = self._early(s.prefetch_x[k], index)
            gone = s.prefetch_evicted[k]
            if gone >= 0:
                load.evicted, load.evicted_layer = gone % experts, gone // experts
            plan.prefetch.append(load)
        return plan

    def _early(self, x: int, index: int) -> Load:
        s, experts = self._s, self._c.experts
        return Load(
            x // experts, x % experts, s.early_slot[x], PREFETCH, None, index, s.early_target[x], s.early_worth[x],
            s.early_number[x],
        )  # fmt: skip

    def resident_slots(self, layer: int) -> dict[int, int]:
        """Experts of a layer that hold a cache slot, and which; a copy."""
        experts = self._c.experts
        slots = self._s.slot_of[layer * experts : (layer + 1) * experts]
        return {expert: slot for expert, slot in enumerate(slots) if slot >= 0}


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


def group_sizes(model: ModelSpec, options: Options, slots: int, fitted: Sequence[int] = ()) -> list[int]:
    """Cache slots of each group (a layer, or one pool); a policy that never prefetches has its landing slots there.

    ``fitted``: sizes per layer chosen by the cache rule, summing to slots x layers.
    """
    layers, experts = model.num_layers, model.num_experts
    if options.whole_layer:
        return [experts]
    sizes = list(fitted) if fitted else [slots] * layers
    extra = options.extra_slots + (0 if options.prefetches else options.landing_slots)
    if options.pooled:
        sizes = [sum(sizes)]
    most = layers * experts if options.pooled else experts
    added = spread(extra, [0] * len(sizes), [most] * len(sizes), sizes)
    return [size + more for size, more in zip(sizes, added, strict=True)]


def spread(extra: int, added: list[int], most: list[int], sizes: list[int]) -> list[int]:
    """``extra`` slots over the groups, one each in turn, none beyond ``most``."""
    for i in range(extra):
        group = i % len(sizes)
        if sizes[group] + added[group] < most[group]:
            added[group] += 1
    return added
