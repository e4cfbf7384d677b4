"""The virtual link clock: the timeline of a run by arithmetic alone, advanced plan by plan from the profile.

It follows the same rules as the SimPy driver, without events; the two must agree to the nanosecond.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.link import NEVER, Copy, Link
from sim.plugin import LinkView
from sim.spec import Options
from sim.timing import Timing

if TYPE_CHECKING:
    from sim.planner import Load, Plan


class Clock:
    """Virtual time, and a virtual link that carries what the planner has issued.

    Args:
        timing: times of every operator.
        options: copy stream, write-back and what is in flight at once.
    """

    def __init__(self, timing: Timing, options: Options) -> None:
        self.timing = timing
        self.options = options
        self.now = 0
        self.link = Link(timing.chunks, options.max_submitted, timing.write_back_ns)
        self._copies: dict[int, Copy] = {}
        self._planned = 0
        self._effects = 0

    def begin(self, plan: Plan) -> None:
        """Up to the end of this plan: the routing is known, its demand loads and joins are in the link's hands."""
        visit = plan.visit
        self._planned = self.now + self.timing.routed_ns(visit.tokens, visit.context) + self.timing.host_ns
        self._effects = self._planned + self.timing.wake_ns
        if not self.options.copy_stream:
            return
        self.link.advance(self._effects)
        self._retract(plan)
        for load in plan.claimed:
            self.link.join(self._copies[load.number])
        for load in plan.demand:
            self.link.demand(self._copy(load))
        for load in plan.stream[: self.options.stream_slots]:
            self.link.demand(self._copy(load))

    def view(self, distance: int) -> LinkView:
        """What a policy may know of the link now."""
        return LinkView(
            self.link.backlog_ns(),
            self.timing.chunks.total_ns(),
            self.timing.chunks.full_ns,
            self.options.max_submitted,
            self.window_ns(distance),
        )

    def window_ns(self, distance: int) -> int:
        """Expected time from now until the routing ``distance`` layers on is known."""
        plain = self.timing.plain_visit_ns()
        demand = self.link.backlog_ns(demand_only=True)
        this_visit = self.timing.model.top_k * self.timing.expert_ns(1)
        return max(demand + self.timing.expert_ns(1) if demand else 0, this_visit) + plain * distance - this_visit

    def finish(self, plan: Plan) -> None:
        """Issue the prefetches and go on to the end of the visit."""
        visit = plan.visit
        timing = self.timing
        if not self.options.copy_stream:
            self.now = self._serial(plan)
        else:
            self._retract(plan)
            for load in plan.prefetch:
                self.link.prefetch(self._copy(load))
            if self.options.write_back:
                for _ in range(plan.victims()):
                    self.link.write_back()
            self.now = self._compute(plan)
        if visit.layer == timing.model.num_layers - 1:
            self.now += timing.head_ns(visit.tokens)

    def _copy(self, load: Load) -> Copy:
        copy = Copy(load.layer, load.expert, self.timing.chunks.number, load.key)
        self._copies[load.number] = copy
        return copy

    def _retract(self, plan: Plan) -> None:
        for load in plan.retract:
            copy = self._copies.pop(load.number, None)
            if copy is not None:
                self.link.retract(copy)

    def _serial(self, plan: Plan) -> int:
        """Without a copy stream: every copy in turn, both directions, then compute."""
        loads = [*plan.demand, *plan.stream, *plan.prefetch]
        now = self._planned + len(loads) * self.timing.chunks.total_ns()
        if self.options.write_back:
            now += self.timing.write_back_ns * plan.victims()
        counts = plan.visit.counts
        return now + self.timing.shared_ns + sum(self.timing.expert_ns(n) for n in counts)

    def _compute(self, plan: Plan) -> int:
        """Experts in order of arrival; streamed ones free their slot for the next."""
        timing, visit, link = self.timing, plan.visit, self.link
        count_of = dict(zip(visit.experts, visit.counts, strict=True))
        now = self._planned + timing.shared_ns
        known_at = self._planned - timing.host_ns
        waiting: dict[int, Copy] = {}
        for load in plan.claimed:
            copy = self._copies.pop(load.number)
            if copy.done_ns > known_at:
                waiting[load.expert] = copy
        for load in plan.demand + plan.stream[: self.options.stream_slots]:
            waiting[load.expert] = self._copies.pop(load.number)
        queued = plan.stream[self.options.stream_slots :]
        streamed = {load.expert for load in plan.stream}
        not_there = waiting.keys() | {load.expert for load in queued}
        now += sum(timing.expert_ns(n) for expert, n in count_of.items() if expert not in not_there)
        while waiting:
            expert = min(waiting, key=lambda e: waiting[e].done_ns)
            while waiting[expert].done_ns == NEVER:
                link.advance(link.next_arrival())
                expert = min(waiting, key=lambda e: waiting[e].done_ns)
            now = max(now, waiting.pop(expert).done_ns) + timing.expert_ns(count_of[expert])
            if expert in streamed and queued:
                load = queued.pop(0)
                link.advance(max(link.now, now + timing.wake_ns))
                link.demand(self._copy(load))
                waiting[load.expert] = self._copies.pop(load.number)
        return now
