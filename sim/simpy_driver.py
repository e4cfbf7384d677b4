"""The readable specification: a decoder as a SimPy process beside a link, driven by the planner.

One visit: dense part -> the host learns the routing -> plan -> its effects reach the link, an event of its own ->
experts in order of arrival. The only file that imports simpy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import simpy

from sim.ledger import Counts, Ledger, Timeline
from sim.link import NEVER, Copy, Link
from sim.planner import Load, Plan, Planner
from sim.spec import Options
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
        self._copies: dict[int, Copy] = {}
        self._due: deque[int] = deque()

    def run(self) -> Ledger:
        """Simulate to the end of the trace."""
        self.env.run(self.env.process(self._decoder()))
        unused = [c for c in self._copies.values() if not c.demand and not c.cancelled]
        moved = sum(self._link.bytes_submitted(c) for c in unused)
        self.ledger.phases[DECODE].wasted_bytes += moved
        self.ledger.phases[DECODE].h2d_bytes += moved
        return self.ledger

    @property
    def now(self) -> int:
        return int(self.env.now)

    # --- the decoder ------------------------------------------------------------------------------------------

    def _decoder(self) -> Process:
        visits = self._trace.visits()
        layers = self._trace.model.num_layers
        started: set[int] = set()
        for forward in self._trace.passes():
            counts = self.ledger.phases[forward.phase]
            start, busy = self.now, self._busy_ns()
            for _ in range(layers):
                visit = next(visits)
                if self._predict is not None:
                    visit.guesses = self._predict(visit, forward.first)
                yield from self._visit(visit, counts)
            yield self.env.timeout(self._timing.head_ns(forward.tokens))
            counts.compute_ns += self._timing.head_ns(forward.tokens)
            counts.passes += 1
            counts.tokens += forward.tokens
            counts.elapsed_ns += self.now - start
            counts.link_busy_ns += self._busy_ns() - busy
            if forward.phase == PREFILL:
                self.ledger.ttft_ns.append(self.now - start)
            else:
                self.ledger.decode_ns.append(self.now - start)
                self.ledger.timed.append(forward.sequence in started)
            started.add(forward.sequence)

    def _visit(self, visit: Visit, counts: Counts) -> Process:
        timing = self._timing
        start = self.now
        routed_ns = timing.routed_ns(visit.tokens, visit.context)
        yield self.env.timeout(routed_ns)
        known_at = self.now
        plan = self._planner.plan(visit)
        self.ledger.log.record(plan)
        counts.planned(plan)
        yield self.env.timeout(timing.host_ns)
        counts.compute_ns += routed_ns - timing.sync_ns + timing.shared_ns
        counts.latency_ns += timing.sync_ns + timing.host_ns
        counts.compute_ns += sum(timing.expert_ns(n) for n in visit.counts)
        counts.h2d_bytes += (len(plan.demand) + len(plan.stream) + len(plan.claimed)) * timing.expert_bytes
        if self._timeline:
            self._timeline.slice("compute", f"attention {visit.layer}", start, known_at)
            self._timeline.slice("compute", f"plan {visit.layer}", known_at, self.now)
        if self._options.copy_stream:
            yield from self._overlapped(plan, counts, known_at)
        else:
            yield from self._serial(plan, counts)

    def _overlapped(self, plan: Plan, counts: Counts, known_at: int) -> Process:
        """Residents first, then each expert as it arrives, while the copier works."""
        timing, visit = self._timing, plan.visit
        at_once = plan.demand + plan.stream[: self._options.stream_slots]
        queued = deque(plan.stream[self._options.stream_slots :])
        streamed = {load.expert for load in plan.stream}
        self._link.advance(self.now)
        waiting: dict[int, Copy] = {}
        for load in plan.claimed:
            copy = self._copies.pop(load.number)
            if copy.done_ns <= known_at:
                counts.hits += 1
                self._show_copy(copy)
            else:
                counts.late += 1
                waiting[load.expert] = copy
        joins = list(waiting.values())
        for load in at_once:
            waiting[load.expert] = self._copy(load)
        demand = [waiting[load.expert] for load in at_once]
        early = [self._copies.setdefault(load.number, self._copy(load)) for load in plan.prefetch]
        self._send(timing.wake_ns, lambda: self._effects(plan, joins, demand, early, counts))
        tokens = dict(zip(visit.experts, visit.counts, strict=True))
        if timing.shared_ns:
            yield self.env.timeout(timing.shared_ns)
        not_there = waiting.keys() | {load.expert for load in queued}
        for expert in [e for e in visit.experts if e not in not_there]:
            yield from self._expert(visit.layer, expert, tokens[expert])
        mine = dict(waiting)
        while mine:
            idle_from = self.now
            self._link.advance(idle_from)
            expert = min(mine, key=lambda e: mine[e].done_ns)
            while mine[expert].done_ns == NEVER:
                yield from self._next_arrival()
                expert = min(mine, key=lambda e: mine[e].done_ns)
            copy = mine.pop(expert)
            waited = self.now - idle_from
            if copy in joins:
                counts.stall_late_ns += waited
            else:
                counts.stall_miss_ns += waited
            if self._timeline and waited:
                self._timeline.slice("compute", f"stall {visit.layer}", idle_from, self.now)
            self._show_copy(copy)
            yield from self._expert(visit.layer, expert, tokens[expert])
            if expert in streamed and queued:
                load = queued.popleft()
                follow = mine[load.expert] = self._copy(load)
                self._send(timing.wake_ns, lambda c=follow: self._link.demand(c))  # type: ignore[misc]

    def _show_copy(self, copy: Copy) -> None:
        if self._timeline:
            self._timeline.slice("link H2D", f"{copy.layer}.{copy.expert}", copy.started_ns, copy.done_ns)

    def _copy(self, load: Load) -> Copy:
        return Copy(load.layer, load.expert, self._timing.chunks.number, load.key)

    def _expert(self, layer: int, expert: int, tokens: int) -> Process:
        start = self.now
        yield self.env.timeout(self._timing.expert_ns(tokens))
        if self._timeline:
            self._timeline.slice("compute", f"expert {layer}.{expert}", start, self.now)

    def _serial(self, plan: Plan, counts: Counts) -> Process:
        """Without a copy stream: all copies in turn, both directions, then compute."""
        timing, visit = self._timing, plan.visit
        loads = [*plan.demand, *plan.stream, *plan.prefetch]
        counts.hits += len(plan.claimed)
        for load in plan.claimed:
            del self._copies[load.number]
        for load in plan.retract:
            self._retract(load, counts)
        for load in plan.prefetch:
            copy = self._copies[load.number] = self._copy(load)
            copy.unsubmitted, copy.submitted = 0, timing.chunks.number
        copies = len(loads) * timing.chunks.total_ns()
        counts.link_busy_ns += copies
        if self._options.write_back:
            copies += timing.write_back_ns * plan.victims()
        start = self.now
        yield self.env.timeout(copies)
        if self._timeline and loads:
            self._timeline.slice("link H2D", f"serial {visit.layer}", start, self.now)
        counts.stall_miss_ns += copies
        yield self.env.timeout(timing.shared_ns + sum(timing.expert_ns(n) for n in visit.counts))

    # --- the link ---------------------------------------------------------------------------------------------

    def _send(self, delay_ns: int, effect: Callable[[], None]) -> None:
        """Let a plan's effect reach the link after the copier's wake-up."""
        self._due.append(self.now + delay_ns)
        self.env.timeout(delay_ns).callbacks.append(lambda _: self._receive(effect))

    def _receive(self, effect: Callable[[], None]) -> None:
        self._due.popleft()
        self._link.advance(self.now)
        effect()

    def _next_arrival(self) -> Process:
        """Until the next load is there, or the next effects have reached the link."""
        due = self._due[0] if self._due else NEVER
        yield self.env.timeout(min(self._link.next_arrival(due), due) - self.now)
        self._link.advance(self.now)

    def _effects(self, plan: Plan, joins: list[Copy], demand: list[Copy], early: list[Copy], counts: Counts) -> None:
        """All effects of a plan on the link, together."""
        for load in plan.retract:
            self._retract(load, counts)
        for copy in joins:
            self._link.join(copy)
        for copy in demand:
            self._link.demand(copy)
        for copy in early:
            self._link.prefetch(copy)
        if self._options.write_back:
            for _ in range(plan.victims()):
                self._link.write_back()

    def _retract(self, load: Load, counts: Counts) -> None:
        copy = self._copies.pop(load.number, None)
        if copy is not None:
            self._link.retract(copy)
            moved = self._link.bytes_submitted(copy)
            counts.wasted_bytes += moved
            counts.h2d_bytes += moved

    def _busy_ns(self) -> int:
        if not self._options.copy_stream:
            return 0
        self._link.advance(self.now)
        return self._link.busy_so_far_ns()
