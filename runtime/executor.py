"""The executor: one visit at a time, what the planner of `sim` decides is done on a model's experts.

Each MoE block's experts are replaced by `OffloadedExperts`: once per visit the routing (and the guesses) come to the
host, one plan is made, its loads go to the copier, and every expert is computed from its slot as soon as its bytes are
there. Outputs are summed in rank order, so they do not depend on what was resident.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from runtime import models
from runtime.copier import Arrival, CopierError, Request
from runtime.devices import Device, Slots
from runtime.experts import OffloadedExperts, SlotExperts
from runtime.lookahead import LADDER, Gates, gates_for, merged_guesses
from runtime.observe import EngineTimeline, Spans
from runtime.recorder import Recorder
from runtime.store import HostStore
from sim.fast_planner import FastPlanner
from sim.ledger import Ledger
from sim.machine import HardwareProfile
from sim.planner import PREFETCH, STREAM, Load, Plan, Planner
from sim.spec import Options, SpecError, parse
from sim.timing import Timing
from traces import DECODE, PREFILL, ModelSpec, Visit
from traces.vocabulary import router_order

PREDICTORS = ("recorded", *LADDER)  # recorded: the model's own routers, "router"
PATIENCE_S = 60.0  # a load that takes longer than this ends the run with a list of who waits for what


class Executor:
    """Plans, copies and computes the MoE layers of a model, and keeps account of it.

    The model's experts are replaced when this is made. Passes are announced with ``begin_pass`` and ended with
    ``end_pass``; one that is not ended (an exception, Ctrl-C) is noticed by the next, which starts with empty slots.

    Args:
        model: a transformers MoE model; of its experts only the activation is used.
        spec: its shape.
        store: its experts, quantized; it must outlive this.
        device: where they are computed.
        bits: width of the routed experts, for the planner's clock (of mixed widths the largest).
        slots: cache slots per layer.
        options: policy, cache rule and run options.
        machine: its link is the pace of the copier; its times advance the planner's virtual link clock.
        gates: what guesses (`gates_of`); None where nothing looks ahead.
        record: keep the routing, with guesses up to this distance; None records nothing.
        record_logits: keep router logits too.
        record_all: record the guesses of every visit, not only of those at which the planner looks.
        compiled: decide with compiled functions where the policy prefetches and numba is there (`planner_class`).
        experts: makes from the slots what computes them, in place of the model's own.
        paced: hold the copier to the machine's link; False: as fast as the device's own link goes.

    Raises:
        SpecError: inputs that cannot be used.
        CopierError: the copier does not start.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        spec: ModelSpec,
        store: HostStore,
        device: Device,
        *,
        bits: int,
        slots: int,
        options: Options,
        machine: HardwareProfile,
        gates: Gates | None,
        record: int | None = None,
        record_logits: bool = False,
        record_all: bool = True,
        compiled: bool = False,
        experts: Callable[[Slots], SlotExperts] | None = None,
        paced: bool = True,
    ) -> None:
        check_options(options)
        self.spec = spec
        self.device = device
        self.options = options
        self.slots = slots
        self.bits = bits
        self.timing = Timing(machine, spec, bits, options)
        self._kind = planner_class(options) if compiled else Planner
        self.planner = self._kind(spec, options, slots, self.timing)
        if self._kind is FastPlanner:  # compiling takes seconds: now, not while the first token is waited for
            first = Visit(0, 0, DECODE, 1, 0, list(range(spec.top_k)), [1] * spec.top_k)
            self._kind(spec, options, slots, self.timing).plan(first)
        self.ledger = Ledger()
        self.spans: Spans | None = None
        self.timeline: EngineTimeline | None = None
        self.store = store
        blocks = models.moe_blocks(model)
        self.gates = gates
        reach = gates.lookahead if gates else 0
        self.recorder = Recorder(spec, reach, record_logits) if record is not None else None
        self._record_all = bool(record) and record_all
        self._logits: torch.Tensor | None = None
        self._ends = ExitStack()
        try:
            self.pool = self._ends.enter_context(closing(device.slots(self.planner.num_slots, store.expert_bytes)))
            if experts is None:
                dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
                self.experts = SlotExperts(self.pool, store.layouts, blocks[0].gated, dtype)
            else:
                self.experts = experts(self.pool)
            self._ends.callback(self.experts.close)
            self._ends.enter_context(device.hold(store))
            link = machine.link
            back_bytes_per_s = link.d2h_gb_s * 1e9 if paced else math.inf
            copier = device.copier(
                store,
                self.pool,
                bytes_per_s=link.h2d_gb_s * 1e9 if paced else math.inf,
                fixed_s=link.h2d_fixed_s if paced else 0.0,
                chunk_bytes=options.chunk_size(store.expert_bytes),
                max_submitted=options.max_submitted,
                write_back_bytes_per_s=back_bytes_per_s if options.write_back else None,
            )
            self.copier = self._ends.enter_context(closing(copier))
        except BaseException:
            self._ends.close()
            raise
        for layer, found in enumerate(blocks):
            found.block.experts = OffloadedExperts(self.visit, layer)
            if record_logits:
                found.router.register_forward_hook(self._keep_logits)
        self._there: dict[int, int] = {}
        self._index = 0
        self._phase, self._tokens, self._context = PREFILL, 0, 0
        self._starts_sequence = False
        self._mark = 0
        self._pass_start = 0
        self._busy_before = 0
        self._open = False
        self._closed = False

    # --- passes -----------------------------------------------------------------------------------------------

    def begin_pass(self, phase: int, tokens: int, context: int, batch: int = 1, domain: str = "") -> None:
        """A forward pass of ``tokens`` begins, after ``context`` tokens in the KV caches (both over all sequences).

        With ``context`` 0 it starts ``batch`` sequences, of the kind of text ``domain``.

        Raises:
            CopierError: closed, or the copier has ended.
        """
        if self._closed:
            raise CopierError("the offloaded model is closed; make another with offload()")
        if self._open:
            self._abandon()
        self._phase, self._tokens, self._context = phase, tokens, context
        self._starts_sequence = self._starts_sequence or not context
        self._busy_before = self.copier.stats().busy_ns
        self._mark = self._pass_start = time.monotonic_ns()
        if self.gates and not context:
            self.gates.start(batch)
        if self.recorder:
            if not context:
                self.recorder.start_sequences(batch, domain)
            self.recorder.start_pass(tokens, phase)
        self._open = True
        if self.timeline:
            self.timeline.begin_pass(self._mark)

    def end_pass(self) -> None:
        """The pass has given its logits (or its token)."""
        self._settle_compute()
        end = time.monotonic_ns()
        elapsed = end - self._pass_start
        counts = self.ledger.phases[self._phase]
        if self.spans is not None:
            self.spans.head.append((self._tokens, end - self._mark))
        if self.timeline:
            self.timeline.compute("head", self._mark, end)
            self.timeline.end_pass(elapsed)
        counts.compute_ns += end - self._mark
        counts.passes += 1
        counts.tokens += self._tokens
        counts.elapsed_ns += elapsed
        counts.link_busy_ns += min(elapsed, self.copier.stats().busy_ns - self._busy_before)
        if self._phase == PREFILL:
            self.ledger.ttft_ns.append(elapsed)
        else:
            self.ledger.decode_ns.append(elapsed)
            self.ledger.timed.append(self._tokens)
        self._open = False

    def _abandon(self) -> None:
        """Forget a pass that did not end: what it had on the link is let in, then every slot counts as empty."""
        self.copier.drain()
        self.copier.arrived()
        self._there.clear()
        self.planner = self._kind(self.spec, self.options, self.slots, self.timing)
        self._index = 0
        if self.recorder:
            self.recorder.drop_pass()

    def settle(self) -> Ledger:
        """Wait for the link, count what was copied in vain so far, and return the ledger."""
        self.copier.drain()
        counts = self.ledger.phases
        used = sum((c.demand_loads + c.prefetch_used) for c in counts) * self.store.expert_bytes
        stats = self.copier.stats()
        counts[DECODE].wasted_bytes = max(0, stats.demand_bytes + stats.prefetch_bytes - used)
        for c in counts:
            c.h2d_bytes = (c.demand_loads + c.prefetch_used) * self.store.expert_bytes + c.wasted_bytes
        return self.ledger

    def finish(self) -> Ledger:
        """`settle`, and the timeline's end."""
        self.settle()
        if self.timeline:
            self.timeline.end(self.ledger.phases[DECODE].wasted_bytes)
        return self.ledger

    # --- one visit --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def visit(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Plan, copy and compute one MoE layer: hidden [T, H], ids and weights [T, K] -> [T, H]."""
        tokens = hidden.shape[0]
        looks = self.planner.looks(self._phase)
        id_rows = ids.tolist()
        before_gates = time.monotonic_ns()
        scores = self.gates.scores(layer, hidden, ids) if self.gates and (looks or self._record_all) else None
        if self.gates:
            self.gates.saw(layer, hidden)
        guesses = merged_guesses(scores) if scores is not None and looks else []
        known = time.monotonic_ns()
        experts, counts = router_order(id_rows)
        visit = Visit(
            self._index, layer, self._phase, tokens, self._context, experts, counts, guesses, self._starts_sequence
        )
        self._index += 1
        self._starts_sequence = False
        plan = self.planner.plan(visit)
        self.ledger.phases[self._phase].planned(plan)
        if self.timeline:
            self.timeline.planned(plan, time.monotonic_ns(), self.planner.resident_slots, self.store.expert_bytes)
        waiting = self._issue(plan, known)
        planned = time.monotonic_ns()
        started = self._mark
        out = self._compute(plan, waiting, hidden, ids, id_rows, planned)
        result = (out * weights.unsqueeze(-1).to(out.dtype)).sum(1).to(hidden.dtype)
        self._account(plan, started, before_gates, known, planned)
        if self.recorder:
            self.recorder.visit(ids, weights, self._logits, scores)
        return result

    def _account(self, plan: Plan, started: int, before_gates: int, known: int, planned: int) -> None:
        visit = plan.visit
        phase = self.ledger.phases[self._phase]
        self.ledger.log.record(plan)
        phase.compute_ns += known - started
        phase.latency_ns += planned - known
        if self.spans is not None:
            self.spans.dense.append((visit.layer, visit.tokens, visit.context, before_gates - started))
            self.spans.gates.append((visit.tokens, known - before_gates))
            self.spans.host.append((visit.tokens, planned - known))
        if self.timeline:
            self.timeline.compute(f"attention {visit.layer}", started, known)
            self.timeline.compute(f"plan {visit.layer}", known, planned)

    def _request(self, load: Load, after: object = None) -> Request:
        """``after``: what must be done on the device before the slot may be written."""
        row = load.layer * self.spec.num_experts + load.expert
        return Request(load.number, row, load.slot, load.target, load.worth, after)

    def _issue(self, plan: Plan, known: int) -> dict[int, int]:
        """Send the plan's effects to the copier; returns what must be waited for: expert -> load number."""
        phase = self.ledger.phases[self._phase]
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
        """Outputs of every routed expert, [T, K, H]: residents first, then in order of arrival.

        From ``at`` (the end of the plan) to ``self._mark`` (the end of the last expert) every nanosecond is counted
        as compute or as a stall.
        """
        visit = plan.visit
        slot_of = dict(zip(visit.experts, plan.slots, strict=True))
        out = torch.empty(*ids.shape, hidden.shape[-1], dtype=torch.float32, device=hidden.device)
        phase = self.ledger.phases[self._phase]

        def compute(expert: int, start: int) -> int:
            tokens = self.experts.compute(visit.layer, expert, slot_of[expert], hidden, ids, id_rows, out)
            end = time.monotonic_ns()
            phase.compute_ns += end - start
            if self.spans is not None:
                self.spans.expert.append((tokens, end - start))
            if self.timeline:
                self.timeline.expert(visit.layer, expert, start, end)
            return end

        if not self.options.copy_stream:
            write_back = plan.written_back() if self.options.write_back else []
            at = self._copy_serially([*plan.demand, *plan.prefetch], write_back, at)
        at_once = self.options.stream_slots if self.options.copy_stream else 0
        queued = deque(plan.stream[at_once:])
        loads = {load.expert: load for load in (*plan.claimed, *plan.demand, *plan.stream)}
        later = waiting.keys() | {load.expert for load in queued}
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
                    self._arrived(self._wait(visit, waiting, queued))
                    expert = self._next_arrived(waiting)
                at = time.monotonic_ns()
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
        self._mark = at
        return out

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

    def _keep_logits(self, module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        self._logits = output[0]

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

    # --- end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the copier and let go of the slots; a second call does nothing."""
        self._closed = True
        self._ends.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def gates_of(
    model: torch.nn.Module, spec: ModelSpec, options: Options, file: Path | None = None, record: int = 0
) -> Gates | None:
    """The gates of the run's predictor, as far ahead as the policy looks, or ``record`` if that is farther; None where
    nobody looks. ``file`` holds the trained heads.

    Raises:
        GateError: heads that are not there, of another model, or that look less far.
    """
    reach = min(max(options.lookahead, record), spec.num_layers - 1)
    return gates_for(options.predictor if options.prefetches else "router", model, spec.top_k, reach, file)


def planner_class(options: Options) -> type[Planner]:
    """The planner that decides fastest: compiled for a policy that prefetches, if numba is installed."""
    return FastPlanner if options.prefetches and importlib.util.find_spec("numba") else Planner


def check_options(options: Options) -> None:
    """Refuse what only a replay can do.

    Raises:
        SpecError: a plug-in that needs the future, or guesses the engine does not make.
    """
    if future := options.needs_future():
        raise SpecError(f"{', '.join(future)} needs the future, which only a replay knows; use it in the simulator")
    cache = options.cache
    if hasattr(cache.module, "fit") or hasattr(cache.module, "sizes"):
        raise SpecError(f"cache {cache.name!r} is fitted to a trace beforehand, which the engine has not; simulate it")
    if hasattr(options.miss_rule.module, "loads"):
        raise SpecError(f"miss={options.miss} computes experts on the host, which the engine does not; simulate it")
    if options.prefetches and parse(options.predictor).name not in PREDICTORS:
        raise SpecError(f"predictor {options.predictor!r} does not run on the engine; name one of {', '.join(LADDER)}")
