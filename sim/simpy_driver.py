"""The readable specification: a decoder and a link (and a host that computes experts), driven by the planner.

One visit: dense part -> the host learns the routing -> plan -> its effects reach the link -> experts in order of
arrival. The decoder is a process; link and host have no events of their own: what is due on them up to a moment is
worked off, in order of time, when the decoder asks. The only file that imports simpy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import simpy

from sim.ledger import Counts, Ledger
from sim.link import NEVER, Copy, Link
from sim.planner import Load, Plan, Planner
from sim.spec import Options
from sim.timeline import COMPUTE, D2H, HOST, Timeline
from sim.timing import Timing
from traces import DECODE, PREFILL, Guesses, Trace, Visit

Process = Generator[simpy.Event, Any, None]
Predict = Callable[[Visit, int], list[Guesses]]


class Simulation:
    """Replays a trace's routing through the planner with modelled time.

    Args:
        trace: routing to replay.
        planner: decides; used up by the run.
        timing: what each step takes.
        options: the run's options (the same as the planner's).
        predict: guesses of a visit; None for none.
        ledger: counts and load log to write into.
        timeline: slices are added to it when given.
    """

    def __init__(
        self,
        trace: Trace,
        planner: Planner,
        timing: Timing,
        options: Options,
        predict: Predict | None = None,
        ledger: Ledger | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self.env = simpy.Environment(initial_time=0)
        self.ledger = ledger or Ledger()
        self._trace = trace
        self._planner = planner
        self._timing = timing
        self._options = options
        self._predict = predict
        self._timeline = timeline
        self._link = Link(timing.chunks, options.max_submitted, timing.write_back_ns)
        if timeline:
            self._link.watch(timeline.on_link, timeline.queues)
        self._copies: dict[int, Copy] = {}
        self._due: deque[tuple[int, Callable[[int], None]]] = deque()
        self._host: deque[tuple[int, int, int, Counts]] = deque()
        self._host_next = NEVER
        self._effects_at = 0

    def run(self) -> Ledger:
        """Simulate to the end of the trace; what the last plan started is on the link by then."""
        self.env.run(self.env.process(self._decoder()))
        unused = [c for c in self._copies.values() if not c.demand and not c.cancelled]
        moved = sum(self._link.bytes_submitted(c) for c in unused)
        self.ledger.phases[DECODE].wasted_bytes += moved
        self.ledger.phases[DECODE].h2d_bytes += moved
        if self._timeline:
            self._link.tell_rest()
            self._timeline.end(self.now, moved)
        return self.ledger

    @property
    def now(self) -> int:
        return int(self.env.now)

    # --- the decoder ------------------------------------------------------------------------------------------

    def _decoder(self) -> Process:
        env, ledger, planner, timing = self.env, self.ledger, self._planner, self._timing
        visits = self._trace.visits()
        layers = range(self._trace.model.num_layers)
        for forward in self._trace.passes():
            counts = ledger.phases[forward.phase]
            start, busy = self.now, self._busy_ns()
            for _ in layers:
                visit = next(visits)
                looks = planner.looks(visit.phase)
                if looks and self._predict is not None:
                    visit.guesses = self._predict(visit, forward.first)
                plan = planner.plan(visit)
                ledger.log.record(plan)
                counts.planned(plan)
                known_at = self.now + timing.routed_ns(visit.tokens, visit.context, looks)
                yield from self._compute(plan, known_at, counts)
            head_ns = timing.head_ns(forward.tokens)
            if self._timeline:
                self._timeline.slice(COMPUTE, "head", self.now, self.now + head_ns)
            yield env.timeout(head_ns)
            counts.compute_ns += head_ns
            counts.passes += 1
            counts.tokens += forward.tokens
            counts.elapsed_ns += self.now - start
            counts.link_busy_ns += self._busy_ns() - busy
            if forward.phase == PREFILL:
                ledger.ttft_ns.append(self.now - start)
            else:
                ledger.decode_ns.append(self.now - start)
                ledger.timed.append(forward.following)

    def _compute(self, plan: Plan, known_at: int, counts: Counts) -> Process:
        """From the start of a visit, whose routing is known at ``known_at``, to the end of its last expert.

        Residents first, then each expert as it arrives, while the copier works.
        """
        env, timing, visit = self.env, self._timing, plan.visit
        start = self.now
        planned = known_at + timing.host_ns
        self._effects_at = planned + timing.wake_ns
        counts.compute_ns += known_at - start - timing.sync_ns + timing.shared_ns
        counts.latency_ns += timing.sync_ns + timing.host_ns
        counts.h2d_bytes += (len(plan.demand) + len(plan.stream) + len(plan.claimed)) * timing.expert_bytes
        if self._timeline:
            self._timeline.slice(COMPUTE, f"attention {visit.layer}", start, known_at)
            self._timeline.slice(COMPUTE, f"plan {visit.layer}", known_at, planned)
            self._timeline.planned(plan, planned, self._planner.resident_slots, timing.expert_bytes)
        if not self._options.copy_stream:
            yield from self._serial(plan, planned, counts)
            return
        tokens = dict(zip(visit.experts, visit.counts, strict=True))
        there = plan.resident
        late: tuple[int, ...] = ()
        waiting: dict[int, Copy] = {}
        if plan.claimed:
            there, late, waiting = self._claims(plan, known_at, planned, counts)
        queued = self._issue(plan, self._effects_at, waiting, counts)
        at_once = timing.shared_ns + sum([timing.expert_ns(tokens[e]) for e in there])
        counts.compute_ns += at_once - timing.shared_ns
        if self._timeline:
            lengths = [(e, timing.expert_ns(tokens[e])) for e in there]
            self._timeline.computed(visit.layer, timing.shared_ns, lengths, planned)
        yield env.timeout(planned + at_once - start)
        while waiting:
            now = self.now
            expert, there_at = self._first(waiting, now)
            del waiting[expert]
            stall_ns = max(0, there_at - now)
            expert_ns = timing.cooled_ns(stall_ns) + timing.expert_ns(tokens[expert])
            counts.compute_ns += expert_ns
            if expert in late:
                counts.stall_late_ns += stall_ns
            else:
                counts.stall_miss_ns += stall_ns
            if self._timeline:
                if stall_ns:
                    self._timeline.slice(COMPUTE, f"stall {visit.layer}", now, there_at)
                self._timeline.expert(visit.layer, expert, now + stall_ns, now + stall_ns + expert_ns)
            yield env.timeout(stall_ns + expert_ns)
            if queued and any(load.expert == expert for load in plan.stream):
                load = queued.popleft()
                waiting[load.expert] = self._follow(load)
        if plan.host:
            stall_ns = self._host_end() - self.now
            if stall_ns > 0:
                if self._timeline:
                    self._timeline.slice(COMPUTE, f"stall {visit.layer}", self.now, self.now + stall_ns)
                cooled_ns = timing.cooled_ns(stall_ns)
                yield env.timeout(stall_ns + cooled_ns)
                counts.stall_miss_ns += stall_ns
                counts.compute_ns += cooled_ns

    def _claims(
        self, plan: Plan, known_at: int, planned: int, counts: Counts
    ) -> tuple[list[int], tuple[int, ...], dict[int, Copy]]:
        """Experts that are there, those that are late, and the copies of the latter."""
        there: list[int] = []
        waiting: dict[int, Copy] = {}
        self._advance(planned)
        for load in plan.claimed:
            copy = self._copies.pop(load.number)
            if copy.done_ns <= known_at:
                there.append(load.expert)
            else:
                waiting[load.expert] = copy
        counts.hits += len(there)
        counts.late += len(waiting)
        return there + plan.resident, tuple(waiting), waiting

    def _issue(self, plan: Plan, at: int, waiting: dict[int, Copy], counts: Counts) -> deque[Load]:
        """Let the plan's effects reach the link at ``at``; returns streamed loads that must wait for a slot."""
        joins = list(waiting.values())
        loads = plan.demand
        queued: deque[Load] = deque()
        if plan.stream:
            loads = plan.demand + plan.stream[: self._options.stream_slots]
            queued.extend(plan.stream[self._options.stream_slots :])
        demand = [(load, self._copy(load)) for load in loads]
        for load, copy in demand:
            waiting[load.expert] = copy
        early = [(load, self._copies.setdefault(load.number, self._copy(load))) for load in plan.prefetch]
        if waiting or early or plan.retract or plan.host or plan.displaced:
            self._due.append((at, lambda at: self._effects(at, plan, joins, demand, early, counts)))
        return queued

    def _follow(self, load: Load) -> Copy:
        """A streamed load whose slot is free now."""
        copy = self._copy(load)
        self._due.append((self.now + self._timing.wake_ns, lambda _: self._link.demand(copy, load.slot)))
        return copy

    def _first(self, waiting: dict[int, Copy], now: int) -> tuple[int, int]:
        """Of the experts waited for, the first that is there, and when."""
        self._advance(now)
        while True:
            expert = min(waiting, key=lambda e: waiting[e].done_ns) if len(waiting) > 1 else next(iter(waiting))
            there_at = waiting[expert].done_ns
            if there_at < NEVER:
                return expert, there_at
            self._next_arrival()

    def _host_end(self) -> int:
        """When the host has computed its last expert."""
        while self._due or self._host_next < NEVER:
            self._advance(min(self._due[0][0] if self._due else NEVER, self._host_next))
        return self._link.host_end

    def _copy(self, load: Load) -> Copy:
        return Copy(load.layer, load.expert, self._timing.chunks.number, load.key)

    def _serial(self, plan: Plan, planned: int, counts: Counts) -> Process:
        """Without a copy stream, from the end of the plan: all copies in turn, both directions, then compute."""
        timing, visit = self._timing, plan.visit
        loads = [*plan.demand, *plan.stream, *plan.prefetch]
        counts.hits += len(plan.claimed)
        for load in plan.claimed:
            del self._copies[load.number]
        for load in plan.retract:
            self._retract(self.now, load, counts)
        for load in plan.prefetch:
            copy = self._copies[load.number] = self._copy(load)
            copy.unsubmitted, copy.submitted = 0, timing.chunks.number
        each = timing.chunks.total_ns()
        counts.link_busy_ns += len(loads) * each
        together = len(plan.demand) + len(plan.prefetch)
        victims = len(plan.written_back()) if self._options.write_back else 0
        waits = [timing.serial_ns + timing.write_back_ns * victims] if victims else []
        waits += [timing.serial_ns + each * together] if together else []
        waits += [timing.serial_ns + each] * len(plan.stream)
        copies = sum(waits)
        if self._timeline:
            loads_end = self._timeline.serial(loads, timing.chunks.total_ns(), planned)
            if self._options.write_back:
                self._timeline.written_back(plan.written_back(), timing.write_back_ns, loads_end)
            if copies:
                self._timeline.slice(COMPUTE, f"stall {visit.layer}", planned, planned + copies)
        counts.stall_miss_ns += copies
        tokens = dict(zip(visit.experts, visit.counts, strict=True))
        host_ns = sum(timing.host_expert_ns(tokens[e]) for e in plan.host)
        device_ns = sum(timing.expert_ns(n) for e, n in tokens.items() if e not in plan.host)
        counts.compute_ns += device_ns
        counts.stall_miss_ns += host_ns
        counts.host_busy_ns += host_ns
        cooled_ns = sum(timing.cooled_ns(wait) for wait in (*waits, host_ns))
        counts.compute_ns += cooled_ns
        end = planned + copies + timing.shared_ns + cooled_ns + device_ns + host_ns
        yield self.env.timeout(end - self.now)
        if self._timeline:
            device = [(e, timing.expert_ns(n)) for e, n in tokens.items() if e not in plan.host]
            if device:
                device[0] = (device[0][0], device[0][1] + cooled_ns)
            self._timeline.computed(visit.layer, timing.shared_ns, device, planned + copies)
            if host_ns:
                self._timeline.slice(COMPUTE, f"stall {visit.layer}", end - host_ns, end)

    # --- the link, and the host beside it -----------------------------------------------------------------------

    def _advance(self, now: int) -> None:
        """Work off what is due up to now: at equal times chunk ends, the host's next expert, the effects of a plan."""
        due = self._due
        while due or self._host_next < NEVER:
            at = min(due[0][0] if due else NEVER, self._host_next)
            if at > now:
                break
            self._link.advance(at)
            if self._host_next == at:
                self._begin_on_host(at)
            if due and due[0][0] == at:
                due.popleft()[1](at)
        self._link.advance(now)

    def _next_arrival(self) -> None:
        """Go on, on the link, until the next load is there."""
        while True:
            limit = NEVER
            if self._due or self._host_next < NEVER:
                limit = min(self._due[0][0] if self._due else NEVER, self._host_next)
            if self._link.next_arrival(limit) < NEVER:
                return
            self._advance(limit)

    def _effects(
        self,
        at: int,
        plan: Plan,
        joins: list[Copy],
        demand: list[tuple[Load, Copy]],
        early: list[tuple[Load, Copy]],
        counts: Counts,
    ) -> None:
        """All effects of a plan on the link, together."""
        for load in plan.retract:
            self._retract(at, load, counts)
        for copy in joins:
            self._link.join(copy)
        if self._options.write_back:
            for slot in plan.written_back():
                begin, end = self._link.write_back(slot)
                if self._timeline:
                    self._timeline.slice(D2H, f"slot {slot}", begin, end)
        for load, copy in demand:
            self._link.demand(copy, load.slot)
        for load, copy in early:
            self._link.prefetch(copy, load.slot)
        if plan.host:
            tokens = dict(zip(plan.visit.experts, plan.visit.counts, strict=True))
            self._host.extend((plan.visit.layer, expert, tokens[expert], counts) for expert in plan.host)
            self._begin_on_host(at)
        if self._timeline:
            self._timeline.queues(at, *self._link.queue_lengths())

    def _begin_on_host(self, at: int) -> None:
        """The host's next expert; its slowdown is fixed here: whether the link has anything to do."""
        layer, expert, tokens, counts = self._host.popleft()
        end = self._link.host_end = at + self._timing.host_expert_ns(tokens, shared=self._link.is_busy())
        counts.host_busy_ns += end - at
        self._host_next = end if self._host else NEVER
        if self._timeline:
            self._timeline.slice(HOST, f"expert {layer}.{expert}", at, end)

    def _retract(self, at: int, load: Load, counts: Counts) -> None:
        copy = self._copies.pop(load.number, None)
        if copy is not None:
            self._link.retract(copy)
            moved = self._link.bytes_submitted(copy)
            counts.wasted_bytes += moved
            counts.h2d_bytes += moved
            if self._timeline:
                self._timeline.dropped(load.number, at, moved)

    def _busy_ns(self) -> int:
        if not self._options.copy_stream:
            return 0
        self._advance(max(self.now, self._effects_at))
        return self._link.busy_so_far_ns()
