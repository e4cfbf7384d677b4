"""The engine: a transformers MoE model whose experts live in a host store and pass through device slots.

Each MoE block's experts are replaced by `OffloadedExperts`: once per visit the routing (and the guesses) come to the
host, one plan is made by the planner of `sim`, its loads go to the copier, and every expert is computed from its slot
as soon as its bytes are there. Outputs are summed in rank order, so they do not depend on what was resident.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from runtime import models
from runtime.copier import Arrival, Copier, Request
from runtime.experts import OffloadedExperts, SlotExperts
from runtime.lookahead import GATES_FILE, LADDER, gates_for, ranked
from runtime.observe import EngineTimeline, Spans
from runtime.recorder import Recorder
from runtime.store import HostStore, SlotPool
from sim.fast_planner import FastPlanner
from sim.ledger import Counts, Ledger
from sim.machine import HardwareProfile
from sim.planner import PREFETCH, STREAM, Load, Plan, Planner
from sim.spec import Options, SpecError, parse
from sim.timing import Timing
from traces import DECODE, PREFILL, Visit
from traces.vocabulary import router_order

PREDICTORS = ("recorded", *LADDER)  # recorded: the model's own routers, "router"


class Engine:
    """Generates with an offloaded model and keeps account of what it did.

    Args:
        model_dir: a transformers checkpoint.
        bits: width of the routed experts.
        slots: cache slots per layer.
        options: policy, cache rule and run options.
        machine: its link is the pace of the copier; its times advance the planner's virtual link clock.
        store: an expert store to share between engines; built (and owned) when None.
        record: keep the routing, with guesses up to this distance; None records nothing.
        record_logits: keep router logits too.
        record_all: record the guesses of every visit, not only of those at which the planner looks.
        gates: heads for a trained predictor; those of the model directory when None.
        compiled: decide with compiled functions where the policy prefetches and numba is there (`planner_class`).

    Raises:
        ModelError, SpecError, StoreError: inputs that cannot be used.
        CopierError: the copier does not start.
    """

    device = "cpu"

    def __init__(
        self,
        model_dir: Path,
        *,
        bits: int,
        slots: int,
        options: Options,
        machine: HardwareProfile,
        store: HostStore | None = None,
        record: int | None = None,
        record_logits: bool = False,
        record_all: bool = True,
        compiled: bool = False,
        gates: Path | None = None,
    ) -> None:
        check_options(options)
        self.spec = models.spec_of(model_dir)
        self.options = options
        self.slots = slots
        self.bits = bits
        self.timing = Timing(machine, self.spec, bits, options)
        kind = planner_class(options) if compiled else Planner
        self.planner = kind(self.spec, options, slots, self.timing)
        self.ledger = Ledger()
        self.spans: Spans | None = None
        self.timeline: EngineTimeline | None = None
        self._owns_store = store is None
        self.store = store or HostStore.build(model_dir, self.spec, bits)
        self.model, self.tokenizer = models.load(model_dir)
        blocks = models.moe_blocks(self.model)
        reach = min(max(options.lookahead, record or 0), self.spec.num_layers - 1)
        file = gates or model_dir / GATES_FILE
        self._gates = gates_for(
            options.predictor if options.prefetches else "router", self.model, self.spec.top_k, reach, file
        )
        self.recorder = Recorder(self.spec, reach, record_logits) if record is not None else None
        self._record_all = bool(record) and record_all
        act = blocks[0].block.experts.act_fn
        for layer, found in enumerate(blocks):
            found.block.experts = OffloadedExperts(self.visit, layer)
            if record_logits:
                found.router.register_forward_hook(self._keep_logits)
        self._logits: torch.Tensor | None = None
        pool = SlotPool(self.planner.num_slots, self.store.expert_bytes)
        self._experts = SlotExperts(pool, self.store.layout, act)
        link = machine.link
        self._copier = Copier(
            self.store,
            pool,
            bytes_per_s=link.h2d_gb_s * 1e9,
            fixed_s=link.h2d_fixed_s,
            chunk_bytes=options.chunk_size(self.store.expert_bytes),
            max_submitted=options.max_submitted,
            write_back_bytes_per_s=link.d2h_gb_s * 1e9 if options.write_back else None,
        )
        self._there: dict[int, int] = {}
        self._index = 0
        self._phase, self._tokens, self._context = PREFILL, 0, 0
        self._starts_sequence = False
        self._mark = 0

    # --- generating -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self, prompt: list[int], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0, domain: str = ""
    ) -> Iterator[int]:
        """Token ids one by one; greedy at temperature 0.

        One prefill pass gives the first, ``max_new_tokens - 1`` decode passes the others.

        Raises:
            ValueError: an empty prompt.
            CopierError: the copier has ended, or is slower than its waits allow.
        """
        if not prompt:
            raise ValueError("the prompt has no tokens; give it at least one")
        generator = torch.Generator().manual_seed(seed)
        self._starts_sequence = True
        if self.recorder:
            self.recorder.start_sequence(domain)
        cache = None
        ids = prompt
        context = 0
        for _ in range(max_new_tokens):
            phase = PREFILL if context == 0 else DECODE
            counts = self.ledger.phases[phase]
            before = self._copier.stats()
            start = time.monotonic_ns()
            self._begin_pass(phase, len(ids), context, start)
            out = self.model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token = choose(out.logits[0, -1], temperature, generator)
            end = time.monotonic_ns()
            if self.spans is not None:
                self.spans.head.append((len(ids), end - self._mark))
            if self.timeline:
                self.timeline.compute("head", self._mark, end)
                self.timeline.end_pass(end - start)
            counts.compute_ns += end - self._mark
            self._end_pass(counts, phase, len(ids), end - start, before.busy_ns)
            context += len(ids)
            ids = [token]
            yield token

    def _begin_pass(self, phase: int, tokens: int, context: int, start: int) -> None:
        self._phase, self._tokens, self._context, self._mark = phase, tokens, context, start
        if self.recorder:
            self.recorder.start_pass(tokens, phase)
        if self.timeline:
            self.timeline.begin_pass(start)

    def _end_pass(self, counts: Counts, phase: int, tokens: int, elapsed: int, busy_before: int) -> None:
        counts.passes += 1
        counts.tokens += tokens
        counts.elapsed_ns += elapsed
        counts.link_busy_ns += min(elapsed, self._copier.stats().busy_ns - busy_before)
        if phase == PREFILL:
            self.ledger.ttft_ns.append(elapsed)
        else:
            self.ledger.decode_ns.append(elapsed)
            self.ledger.timed.append(1)

    def finish(self) -> Ledger:
        """Wait for the link, count what was copied in vain, and return the ledger."""
        self._copier.drain()
        counts = self.ledger.phases
        used = sum((c.demand_loads + c.prefetch_used) for c in counts) * self.store.expert_bytes
        stats = self._copier.stats()
        counts[DECODE].wasted_bytes = max(0, stats.demand_bytes + stats.prefetch_bytes - used)
        for c in counts:
            c.h2d_bytes = (c.demand_loads + c.prefetch_used) * self.store.expert_bytes + c.wasted_bytes
        if self.timeline:
            self.timeline.end(counts[DECODE].wasted_bytes)
        return self.ledger

    # --- one visit --------------------------------------------------------------------------------------------

    def visit(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Plan, copy and compute one MoE layer: hidden [T, H], ids and weights [T, K] -> [T, H]."""
        tokens = hidden.shape[0]
        looking = self._gates is not None and (self._record_all or (tokens == 1 and self.planner.looks(self._phase)))
        id_rows = ids.tolist()
        before_gates = time.monotonic_ns()
        scores = self._gates.scores(layer, hidden) if looking and self._gates else None
        guesses = ranked(scores[0]) if scores is not None and tokens == 1 else []
        known = time.monotonic_ns()
        experts, counts = router_order(id_rows)
        visit = Visit(
            self._index, layer, self._phase, tokens, self._context, experts, counts, guesses, self._starts_sequence
        )
        self._index += 1
        self._starts_sequence = False
        plan = self.planner.plan(visit)
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
        phase.planned(plan)
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

    def _request(self, load: Load) -> Request:
        row = load.layer * self.spec.num_experts + load.expert
        return Request(load.number, row, load.slot, load.target, load.worth)

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
        self._copier.apply(
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
        if write_back:
            self._copier.apply(write_back=write_back)
            self._copier.drain()
            if self.timeline:
                self.timeline.written_back(start, time.monotonic_ns())
        if loads:
            self._copier.apply(demand=[self._request(load) for load in loads])
            if self.timeline:
                self.timeline.issued(loads, time.monotonic_ns())
            self._copier.drain()
            for arrival in self._copier.arrived():
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
        for arrival in self._copier.arrived():
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
        out = torch.empty(*ids.shape, hidden.shape[-1])
        phase = self.ledger.phases[self._phase]

        def compute(expert: int, start: int) -> int:
            tokens = self._experts.compute(expert, slot_of[expert], hidden, ids, id_rows, out)
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
                start = at
                while expert is None:
                    self._arrived(self._copier.wait())
                    expert = self._next_arrived(waiting)
                at = time.monotonic_ns()
                if loads[expert].kind == PREFETCH:
                    phase.stall_late_ns += at - start
                else:
                    phase.stall_miss_ns += at - start
                if self.timeline:
                    self.timeline.compute(f"stall {visit.layer}", start, at)
            del self._there[waiting.pop(expert)]
            at = compute(expert, at)
            if loads[expert].kind == STREAM and queued:
                load = queued.popleft()
                self._copier.apply(demand=[self._request(load)])
                waiting[load.expert] = load.number
                if self.timeline:
                    self.timeline.issued([load], at)
            if waiting:
                self._collect()
        self._mark = at
        return out

    def _next_arrived(self, waiting: dict[int, int]) -> int | None:
        """Of the experts waited for, the one whose bytes came first; None when none are there yet."""
        there = [(self._there[number], expert) for expert, number in waiting.items() if number in self._there]
        return min(there)[1] if there else None

    def _keep_logits(self, module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        self._logits = output[0]

    # --- end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the copier and let go of store and slots."""
        self._copier.close()
        self._experts.close()
        if self._owns_store:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


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


def choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """The next token from logits [V]: the largest at temperature 0, else sampled."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator))


def paced(machine: HardwareProfile, gb_s: float | None) -> HardwareProfile:
    """The machine with its link paced to ``gb_s`` in both directions; unchanged for None."""
    if gb_s is None:
        return machine
    link = dataclasses.replace(machine.link, h2d_gb_s=gb_s, d2h_gb_s=gb_s, h2d_duplex_gb_s=gb_s)
    return dataclasses.replace(machine, link=link)
