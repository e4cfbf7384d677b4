"""The engine: a transformers MoE model whose experts live in a host store and pass through device slots.

Each MoE block's experts are replaced by `OffloadedExperts`: once per visit the routing (and the guesses) come to the
host, one plan is made by the planner of `sim`, its loads go to the copier, and every expert is computed from its slot
as soon as its bytes are there. Outputs are summed in rank order, so they do not depend on what was resident.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from runtime import models
from runtime.copier import Copier, Request
from runtime.lookahead import RouterGates, ranked
from runtime.quantize import Workspace, forward, views
from runtime.recorder import Recorder
from runtime.store import HostStore, SlotPool
from sim.ledger import Counts, Ledger
from sim.machine import HardwareProfile
from sim.planner import Load, Plan, Planner
from sim.spec import Options, SpecError
from sim.timing import Timing
from traces import DECODE, PREFILL, Visit
from traces.vocabulary import router_order


@dataclass
class Spans:
    """Measured durations in nanoseconds, one entry per occurrence; what the columns are stands beside each list.

    ``dense`` runs from the end of the last expert of the visit before; it holds that visit's weighted sum too.
    """

    dense: list[tuple[int, int, int, int]] = field(default_factory=list)  # layer, tokens, context, ns
    gates: list[tuple[int, int]] = field(default_factory=list)  # tokens, ns
    host: list[tuple[int, int]] = field(default_factory=list)  # tokens, ns
    expert: list[tuple[int, int]] = field(default_factory=list)  # tokens, ns
    head: list[tuple[int, int]] = field(default_factory=list)  # tokens, ns


class OffloadedExperts(torch.nn.Module):
    """Stands where a block's experts stood; holds no weights."""

    def __init__(self, engine: Engine, layer: int) -> None:
        super().__init__()
        self._visit = engine.visit
        self._layer = layer

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [T, H], ids [T, K], weights [T, K] -> [T, H]."""
        return self._visit(self._layer, hidden, ids, weights)


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

    Raises:
        ModelError, SpecError, StoreError: inputs that cannot be used.
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
    ) -> None:
        if future := options.needs_future():
            raise SpecError(f"{', '.join(future)} needs the future, which only a replay knows; use it in the simulator")
        self.spec = models.spec_of(model_dir)
        self.options = options
        self.slots = slots
        self.bits = bits
        self.timing = Timing(machine, self.spec, bits, options)
        self.planner = Planner(self.spec, options, slots, self.timing)
        self.ledger = Ledger()
        self.spans: Spans | None = None
        self._owns_store = store is None
        self.store = store or HostStore.build(model_dir, self.spec, bits)
        self.model, self.tokenizer = models.load(model_dir)
        blocks = models.moe_blocks(self.model)
        routers = [b.router.weight.detach() for b in blocks]
        reach = max(options.lookahead, record or 0)
        self._gates = RouterGates(routers, self.spec.top_k, reach) if reach else None
        self.recorder = Recorder(self.spec, reach, record_logits) if record is not None else None
        self._record_all = bool(record)
        self._act = blocks[0].block.experts.act_fn
        for layer, found in enumerate(blocks):
            found.block.experts = OffloadedExperts(self, layer)
            if record_logits:
                found.router.register_forward_hook(self._keep_logits)
        self._logits: torch.Tensor | None = None
        self._pool = SlotPool(self.planner.num_slots, self.store.expert_bytes)
        self._views = [views(self._pool.row(i), self.store.layout) for i in range(self._pool.num_slots)]
        self._workspace = Workspace(self.store.layout)
        link = machine.link
        self._copier = Copier(
            self.store,
            self._pool,
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
        """
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
            counts.compute_ns += end - self._mark
            self._end_pass(counts, phase, len(ids), end - start, before.busy_ns)
            context += len(ids)
            ids = [token]
            yield token

    def _begin_pass(self, phase: int, tokens: int, context: int, start: int) -> None:
        self._phase, self._tokens, self._context, self._mark = phase, tokens, context, start
        if self.recorder:
            self.recorder.start_pass(tokens, phase)

    def _end_pass(self, counts: Counts, phase: int, tokens: int, elapsed: int, busy_before: int) -> None:
        counts.passes += 1
        counts.tokens += tokens
        counts.elapsed_ns += elapsed
        counts.link_busy_ns += min(elapsed, self._copier.stats().busy_ns - busy_before)
        if phase == PREFILL:
            self.ledger.ttft_ns.append(elapsed)
        else:
            self.ledger.decode_ns.append(elapsed)
            self.ledger.timed.append(True)

    def finish(self) -> Ledger:
        """Wait for the link, count what was copied in vain, and return the ledger."""
        self._copier.drain()
        counts = self.ledger.phases
        used = sum((c.demand_loads + c.prefetch_used) for c in counts) * self.store.expert_bytes
        stats = self._copier.stats()
        counts[DECODE].wasted_bytes = max(0, stats.demand_bytes + stats.prefetch_bytes - used)
        for c in counts:
            c.h2d_bytes = (c.demand_loads + c.prefetch_used) * self.store.expert_bytes + c.wasted_bytes
        return self.ledger

    # --- one visit --------------------------------------------------------------------------------------------

    def visit(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Plan, copy and compute one MoE layer: hidden [T, H], ids and weights [T, K] -> [T, H]."""
        tokens = hidden.shape[0]
        looking = self._gates is not None and (self._record_all or (self._phase == DECODE and tokens == 1))
        before_gates = time.monotonic_ns()
        scores = self._gates.scores(layer, hidden) if looking and self._gates else None
        guesses = ranked(scores[0]) if scores is not None and tokens == 1 else []
        id_rows = ids.tolist()
        known = time.monotonic_ns()
        experts, counts = router_order(id_rows)
        visit = Visit(
            self._index, layer, self._phase, tokens, self._context, experts, counts, guesses, self._starts_sequence
        )
        self._index += 1
        self._starts_sequence = False
        plan = self.planner.plan(visit)
        waiting = self._issue(plan, known)
        planned = time.monotonic_ns()
        out = self._compute(plan, waiting, hidden, ids, id_rows)
        started, self._mark = self._mark, time.monotonic_ns()
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

    def _request(self, load: Load) -> Request:
        row = load.layer * self.spec.num_experts + load.expert
        return Request(load.number, row, load.slot, load.target, load.worth)

    def _issue(self, plan: Plan, known: int) -> dict[int, int]:
        """Send the plan's effects to the copier; returns what must be waited for: expert -> load number."""
        phase = self.ledger.phases[self._phase]
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
        retract = [load.number for load in plan.retract]
        lost = [load.slot for load in (*plan.demand, *plan.prefetch) if load.evicted is not None]
        write_back = plan.displaced + lost if self.options.write_back else []
        if not self.options.copy_stream:
            self._copy_serially([*plan.demand, *plan.prefetch], write_back)
            return {}
        at_once = plan.demand + plan.stream[: self.options.stream_slots]
        self._copier.apply(
            retract,
            list(waiting.values()),
            [self._request(load) for load in at_once],
            [self._request(load) for load in plan.prefetch],
            write_back,
        )
        for load in at_once:
            waiting[load.expert] = load.number
        return waiting

    def _copy_serially(self, loads: list[Load], write_back: list[int]) -> None:
        """Both directions in turn, with nothing else going on."""
        start = time.monotonic_ns()
        if write_back:
            self._copier.apply(write_back=write_back)
            self._copier.drain()
        self._copier.apply(demand=[self._request(load) for load in loads])
        self._copier.drain()
        self._copier.arrived()
        self.ledger.phases[self._phase].stall_miss_ns += time.monotonic_ns() - start

    def _collect(self) -> None:
        for arrival in self._copier.arrived():
            self._there[arrival.load] = arrival.end_ns

    def _compute(
        self, plan: Plan, waiting: dict[int, int], hidden: torch.Tensor, ids: torch.Tensor, id_rows: list[list[int]]
    ) -> torch.Tensor:
        """Outputs of every routed expert, [T, K, H]: residents first, then in order of arrival."""
        visit = plan.visit
        slot_of = dict(zip(visit.experts, plan.slots, strict=True))
        out = torch.empty(*ids.shape, hidden.shape[-1])
        queued = deque(plan.stream[self.options.stream_slots :] if self.options.copy_stream else plan.stream)
        streamed = {load.expert: load for load in plan.stream}
        later = waiting.keys() | {load.expert for load in queued}
        for expert in visit.experts:
            if expert not in later:
                self._expert(expert, slot_of[expert], hidden, ids, id_rows, out)
        if not self.options.copy_stream:
            for load in queued:
                self._copy_serially([load], [])
                self._expert(load.expert, load.slot, hidden, ids, id_rows, out)
            return out
        late = {load.expert for load in plan.claimed}
        phase = self.ledger.phases[self._phase]
        while waiting:
            expert = self._next_arrived(waiting)
            if expert is None:
                start = time.monotonic_ns()
                while expert is None:
                    arrival = self._copier.wait()
                    self._there[arrival.load] = arrival.end_ns
                    expert = self._next_arrived(waiting)
                waited = time.monotonic_ns() - start
                if expert in late:
                    phase.stall_late_ns += waited
                else:
                    phase.stall_miss_ns += waited
            self._there.pop(waiting.pop(expert))
            self._expert(expert, slot_of[expert], hidden, ids, id_rows, out)
            if expert in streamed and queued:
                load = queued.popleft()
                self._copier.apply(demand=[self._request(load)])
                waiting[load.expert] = load.number
            if waiting:
                self._collect()
        return out

    def _next_arrived(self, waiting: dict[int, int]) -> int | None:
        """Of the experts waited for, the one whose bytes came first; None when none are there yet."""
        there = [(self._there[number], expert) for expert, number in waiting.items() if number in self._there]
        return min(there)[1] if there else None

    def _expert(
        self,
        expert: int,
        slot: int,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        id_rows: list[list[int]],
        out: torch.Tensor,
    ) -> None:
        start = time.monotonic_ns()
        if len(id_rows) == 1:
            tokens = 1
            out[0, id_rows[0].index(expert)] = forward(self._views[slot], hidden, self._act, self._workspace)[0]
        else:
            rows, ranks = (ids == expert).nonzero(as_tuple=True)
            tokens = len(rows)
            out[rows, ranks] = forward(self._views[slot], hidden[rows], self._act, self._workspace)
        elapsed = time.monotonic_ns() - start
        self.ledger.phases[self._phase].compute_ns += elapsed
        if self.spans is not None:
            self.spans.expert.append((tokens, elapsed))

    def _keep_logits(self, module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        self._logits = output[0]

    # --- end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the copier and let go of store and slots."""
        self._copier.close()
        self._views.clear()
        self._pool.close()
        if self._owns_store:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


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
