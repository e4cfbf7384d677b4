"""What a plan says is done: its loads go to the copier, its experts are computed as their bytes come, the host's in a
thread beside.

From the end of the plan to the end of the last expert every nanosecond is counted as compute or as a stall.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from runtime.copier import Arrival, BaseCopier, CopierError, Request
from runtime.devices import Device, Slots
from runtime.experts import SlotExperts
from runtime.host_experts import HostThread
from runtime.observe import EngineTimeline, ExpertSpan, Span, Spans
from sim.ledger import Ledger
from sim.planner import PREFETCH, STREAM, Load, Plan
from sim.spec import Options
from traces import PREFILL, ModelSpec, Visit

PATIENCE_S = 60.0  # a load or an expert of the host that takes longer ends the run with a list of who waits for what


class PlanRunner:
    """Issues the loads of plans, waits for them, computes experts and keeps account of it.

    Args:
        spec: the model's shape.
        device: where experts are computed.
        options: of the run.

    Attributes:
        pool, experts: the slots, and what computes the experts in them.
        host: computes experts on the host; None where the run leaves none to it.
        copier: brings experts into slots.
        ledger, spans, timeline: what happened; the last two where they are wanted.
    """

    pool: Slots
    experts: SlotExperts
    host: HostThread | None
    copier: BaseCopier

    def __init__(self, spec: ModelSpec, device: Device, options: Options) -> None:
        self.spec = spec
        self.device = device
        self.options = options
        self.ledger = Ledger()
        self.spans: Spans | None = None
        self.timeline: EngineTimeline | None = None
        self.host = None
        self._there: dict[int, int] = {}
        self._phase = PREFILL
        self._mark = 0
        self._sent_ns: int | None = None
        self._waited_ns = 0

    def _request(self, load: Load, after: object = None) -> Request:
        """``after``: what must be done on the device before the slot may be written."""
        row = load.layer * self.spec.num_experts + load.expert
        return Request(load.number, row, load.slot, load.target, load.worth, after)

    def _issue(self, plan: Plan, known: int) -> dict[int, int]:
        """Send the plan's effects to the copier; returns what must be waited for: expert -> load number."""
        phase = self.ledger.phases[self._phase]
        self._sent_ns = None
        if not self.options.copy_stream:
            phase.hits += len(plan.claimed)
            return {}
        self._collect()
        waiting: dict[int, int] = {}
        for load in plan.claimed:
            if self._there.get(load.number, known + 1) <= known:
                del self._there[load.number]
                phase.hits += 1
            else:
                phase.late += 1
                waiting[load.expert] = load.number
        for load in plan.retract:
            self._there.pop(load.number, None)
        at_once = plan.demand + plan.stream[: self.options.stream_slots]
        if self.spans is not None and at_once:
            self._sent_ns = time.monotonic_ns()
        self.copier.apply(
            [load.number for load in plan.retract],
            list(waiting.values()),
            [self._request(load) for load in at_once],
            [self._request(load) for load in plan.prefetch],
            plan.written_back() if self.options.write_back else [],
        )
        if self.timeline:
            self.timeline.issued((*at_once, *plan.prefetch), time.monotonic_ns())
        for load in at_once:
            waiting[load.expert] = load.number
        return waiting

    def _copy_serially(self, loads: list[Load], write_back: list[int], start: int) -> int:
        """Both directions in turn, with nothing else going on since ``start``; returns when it ended."""
        if not loads and not write_back:
            return start
        self.device.synchronize()  # a serial copy begins when everything before it is computed
        if write_back:
            self.copier.apply(write_back=write_back)
            self.copier.drain()
            if self.timeline:
                self.timeline.written_back(start, time.monotonic_ns())
        if loads:
            self.copier.apply(demand=[self._request(load) for load in loads])
            if self.timeline:
                self.timeline.issued(loads, time.monotonic_ns())
            self.copier.drain()
            for arrival in self.copier.arrived():
                if self.timeline:
                    self.timeline.arrived(arrival.load, arrival.end_ns)
        end = time.monotonic_ns()
        self._waited_ns += end - start
        self.ledger.phases[self._phase].stall_miss_ns += end - start
        if self.timeline and end > start:
            self.timeline.compute(f"stall {loads[0].layer}" if loads else "stall", start, end)
        return end

    def _arrived(self, arrival: Arrival) -> None:
        self._there[arrival.load] = arrival.end_ns
        if self.timeline:
            self.timeline.arrived(arrival.load, arrival.end_ns)

    def _collect(self) -> None:
        for arrival in self.copier.arrived():
            self._arrived(arrival)

    def _compute(
        self,
        plan: Plan,
        waiting: dict[int, int],
        hidden: torch.Tensor,
        ids: torch.Tensor,
        id_rows: list[list[int]],
        at: int,
    ) -> torch.Tensor:
        """Outputs of every routed expert, [T, K, H]: residents first, then in order of arrival, the host's last.

        From ``at`` (the end of the plan) to ``self._mark`` (the end of the last expert) every nanosecond is counted
        as compute or as a stall.
        """
        visit = plan.visit
        self._waited_ns = 0
        slot_of = dict(zip(visit.experts, plan.slots, strict=True))
        out = torch.empty(*ids.shape, hidden.shape[-1], dtype=torch.float32, device=hidden.device)
        phase = self.ledger.phases[self._phase]

        def compute(expert: int, start: int) -> int:
            tokens = self.experts.compute(visit.layer, expert, slot_of[expert], hidden, ids, id_rows, out)
            end = time.monotonic_ns()
            phase.compute_ns += end - start
            if self.spans is not None:
                self.spans.expert.append(ExpertSpan(tokens, self._waited_ns, end - start))
            self._waited_ns = 0
            if self.timeline:
                self.timeline.expert(visit.layer, expert, start, end)
            return end

        if not self.options.copy_stream:
            write_back = plan.written_back() if self.options.write_back else []
            at = self._copy_serially([*plan.demand, *plan.prefetch], write_back, at)
        at_once = self.options.stream_slots if self.options.copy_stream else 0
        queued = deque(plan.stream[at_once:])
        loads = {load.expert: load for load in (*plan.claimed, *plan.demand, *plan.stream)}
        later = waiting.keys() | {load.expert for load in queued} | set(plan.host)
        for expert in visit.experts:
            if expert not in later:
                at = compute(expert, at)
        if not self.options.copy_stream:
            for load in queued:
                at = self._copy_serially([load], [], at)
                at = compute(load.expert, at)
        while waiting:
            expert = self._next_arrived(waiting)
            if expert is None:
                at = start = self._computed(visit, at)
                while expert is None:
                    arrival = self._wait(visit, waiting, queued)
                    self._arrived(arrival)
                    expert = self._next_arrived(waiting)
                at = time.monotonic_ns()
                if self.spans is not None and arrival.end_ns >= start:
                    self.spans.notice_ns.append(at - arrival.end_ns)
                self._waited_ns += at - start
                if loads[expert].kind == PREFETCH:
                    phase.stall_late_ns += at - start
                else:
                    phase.stall_miss_ns += at - start
                if self.timeline:
                    self.timeline.compute(f"stall {visit.layer}", start, at)
            self._take(waiting.pop(expert))
            at = compute(expert, at)
            if loads[expert].kind == STREAM and queued:
                load = queued.popleft()
                self.copier.apply(demand=[self._request(load, self.device.mark())])
                waiting[load.expert] = load.number
                if self.timeline:
                    self.timeline.issued([load], at)
            if waiting:
                self._collect()
        if self.host and plan.host:
            at = self._take_from_host(self.host, plan, hidden, id_rows, out, at)
        self._mark = at
        return out

    def _take_from_host(
        self,
        host: HostThread,
        plan: Plan,
        hidden: torch.Tensor,
        id_rows: list[list[int]],
        out: torch.Tensor,
        at: int,
    ) -> int:
        """What the host has computed, into ``out`` [T, K, H]; the wait for it is a stall. Returns when it stands there.

        Without a copy stream nothing goes on beside anything else: the host begins only here.
        """
        phase, visit = self.ledger.phases[self._phase], plan.visit
        if not self.options.copy_stream:
            at = self._computed(visit, at)
            host.begin(visit.layer, plan.host, hidden, id_rows)
        if host.done():
            taken = [host.take(PATIENCE_S) for _ in plan.host]
        else:
            at = start = self._computed(visit, at)
            taken = [host.take(PATIENCE_S) for _ in plan.host]
            at = time.monotonic_ns()
            phase.stall_miss_ns += at - start
            if self.timeline:
                self.timeline.compute(f"stall {visit.layer}", start, at)
        for job, computed in taken:
            phase.host_busy_ns += computed.end_ns - computed.begin_ns
            if self.spans is not None:
                self.spans.host_expert.append(Span(len(job.rows), computed.end_ns - computed.begin_ns))
            if self.timeline:
                self.timeline.hosted(visit.layer, job.expert, computed.begin_ns, computed.end_ns)
        rows = torch.cat([job.rows for job, _ in taken]).to(out.device)
        ranks = torch.cat([job.ranks for job, _ in taken]).to(out.device)
        out[rows, ranks] = torch.cat([computed.outputs for _, computed in taken]).to(out.device, out.dtype)
        end = time.monotonic_ns()
        phase.compute_ns += end - at
        return end

    def _settle_compute(self) -> None:
        """Return when what was given to the device is computed; copies may go on."""
        done = self.device.mark()
        if done is not None:
            done.synchronize()

    def _computed(self, visit: Visit, at: int) -> int:
        """Before a stall begins: on a device that computes by itself, what it still does is no stall."""
        if self.device.torch_device.type == "cpu":
            return at
        self._settle_compute()
        end = time.monotonic_ns()
        self.ledger.phases[self._phase].compute_ns += end - at
        return end

    def _next_arrived(self, waiting: dict[int, int]) -> int | None:
        """Of the experts waited for, the one whose bytes came first; None when none are there yet."""
        there = [(self._there[number], number, expert) for expert, number in waiting.items() if number in self._there]
        return min(there)[2] if there else None

    def _take(self, number: int) -> None:
        """A load's bytes are about to be used."""
        del self._there[number]

    def _wait(self, visit: Visit, waiting: dict[int, int], queued: Sequence[Load]) -> Arrival:
        """The next arrival.

        Raises:
            CopierError: none in ``PATIENCE_S``, or the copier has ended; with who waits for what.
        """
        try:
            return self.copier.wait(PATIENCE_S)
        except CopierError as error:
            wanted = ", ".join(f"expert {e} (load {n})" for e, n in waiting.items())
            behind = ", ".join(f"expert {load.expert}" for load in queued) or "nothing"
            there = ", ".join(map(str, self._there)) or "none"
            raise CopierError(
                f"visit {visit.index}, layer {visit.layer}, waits for {wanted}; queued behind stream slots: {behind}; "
                f"loads arrived and not yet used: {there}\n{error}"
            ) from None
