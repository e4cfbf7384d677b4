"""The executor: one visit at a time, what the planner of `sim` decides is done on a model's experts.

Each MoE block's experts are replaced by `OffloadedExperts`: once per visit the routing (and the guesses) come to the
host, one plan is made and done (`runtime.plan_runner`): loads go to the copier, every expert is computed from its slot
as soon as its bytes are there, or on the host. Outputs are summed in rank order, so they do not depend on what was
resident.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch

from runtime import models
from runtime.copier import CopierError
from runtime.devices import Device, Slots
from runtime.experts import OffloadedExperts, SlotExperts
from runtime.host_experts import HostCompute, HostExperts, HostThread, computes_on_host
from runtime.lookahead import LADDER, Gates, LinearGates, gates_for, merged_guesses
from runtime.observe import DenseSpan, GatesSpan, HostSpan, Span
from runtime.plan_runner import PlanRunner
from runtime.recorder import Recorder
from runtime.store import HostStore
from sim.fast_planner import FastPlanner
from sim.ledger import Ledger
from sim.machine import HardwareProfile
from sim.planner import Plan, Planner
from sim.spec import Options, SpecError, parse
from sim.timing import Timing
from traces import DECODE, PREFILL, ModelSpec, Visit
from traces.vocabulary import router_order

PREDICTORS = ("recorded", *LADDER)  # recorded: the model's own routers, "router"


class Looked(NamedTuple):
    """What a visit begins with, on the device: hidden [T, H], ids and weights [T, K], and what the gates say [T, D, E]
    (None: not asked); ``at_ns``: when they were asked.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    said: torch.Tensor | None
    at_ns: int


class Executor(PlanRunner):
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
        host_experts: computes misses on the host, in place of the model's own experts (``miss=cpu``, ``miss=split``).
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
        host_experts: HostCompute | None = None,
        paced: bool = True,
    ) -> None:
        check_options(options)
        super().__init__(spec, device, options)
        self.slots = slots
        self.bits = bits
        self.timing = Timing(machine, spec, bits, options)
        self._kind = planner_class(options) if compiled else Planner
        self.planner = self._kind(spec, options, slots, self.timing)
        if self._kind is FastPlanner:  # compiling takes seconds: now, not while the first token is waited for
            first = Visit(0, 0, DECODE, 1, 0, list(range(spec.top_k)), [1] * spec.top_k)
            self._kind(spec, options, slots, self.timing).plan(first)
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
            dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
            if experts is None:
                self.experts = SlotExperts(self.pool, store.layouts, blocks[0].gated, dtype, device.fused)
            else:
                self.experts = experts(self.pool)
            self._ends.callback(self.experts.close)
            self._ends.enter_context(device.hold(store))
            if computes_on_host(options):
                same_code = device.torch_device.type == "cpu"
                self.host = self._ends.enter_context(
                    closing(
                        HostThread(
                            host_experts
                            or HostExperts(store, spec.num_experts, store.layouts, blocks[0].gated, dtype, same_code)
                        )
                    )
                )
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
        self._index = 0
        self._tokens, self._context = 0, 0
        self._starts_sequence = False
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
        if self.gates and not context:
            self.gates.start(batch)
        if self.recorder:
            if not context:
                self.recorder.start_sequences(batch, domain)
            self.recorder.start_pass(tokens, phase)
        self._mark = self._pass_start = time.monotonic_ns()
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
            self.spans.head.append(Span(self._tokens, end - self._mark))
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

    def restart_pass(self) -> None:
        """The open pass begins once more, with empty slots; decode passes only."""
        self.begin_pass(self._phase, self._tokens, self._context)

    def _abandon(self) -> None:
        """Forget a pass that did not end: what it had on the link is let in, then every slot counts as empty."""
        if self.host:
            self.host.drop()
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
        guessing = bool(self.gates) and (self.planner.looks(self._phase) or self._record_all)
        return self.meet(layer, self.look(layer, hidden, ids, weights, guessing))

    @torch.no_grad()
    def look(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, guessing: bool
    ) -> Looked:
        """The part of a visit that the device does before the host must know; nothing is waited for."""
        now = time.monotonic_ns()
        said = self.gates.logits(layer, hidden) if guessing and isinstance(self.gates, LinearGates) else None
        return Looked(hidden, ids, weights, said, now)

    @torch.no_grad()
    def meet(self, layer: int, looked: Looked) -> torch.Tensor:
        """The rest of it, from the one copy that tells the host; returns [T, H]."""
        hidden, ids, weights, said, before_gates = looked
        tokens = hidden.shape[0]
        looks = self.planner.looks(self._phase)
        ids_here, weights_here, *said_here = self.device.to_host(ids, weights, *([] if said is None else [said]))
        if self.device.torch_device.type != "cpu":
            before_gates = time.monotonic_ns()  # the device's part of the gates ends with all before them
        id_rows = ids_here.tolist()
        scores = None
        if self.gates and (looks or self._record_all):
            scores = self.gates.rated(said_here[0]) if said_here else self.gates.scores(layer, hidden, ids)
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
        self.ledger.log.record(plan)
        if self.host and plan.host and self.options.copy_stream:
            self.host.begin(layer, plan.host, hidden, id_rows)
        planned = time.monotonic_ns()
        started = self._mark
        out = self._compute(plan, waiting, hidden, ids, id_rows, planned)
        result = (out * weights.unsqueeze(-1).to(out.dtype)).sum(1).to(hidden.dtype)
        self._account(plan, looks, started, before_gates, known, planned)
        if self.recorder:
            self.recorder.visit(ids_here, weights_here, self._logits, scores)
        return result

    def _account(self, plan: Plan, looks: bool, started: int, before_gates: int, known: int, planned: int) -> None:
        visit = plan.visit
        phase = self.ledger.phases[self._phase]
        phase.compute_ns += known - started
        phase.latency_ns += planned - known
        if self.spans is not None:
            after = 0 if self._sent_ns is None else planned - self._sent_ns
            self.spans.dense.append(DenseSpan(visit.layer, visit.tokens, visit.context, before_gates - started))
            self.spans.gates.append(GatesSpan(visit.tokens, looks, known - before_gates))
            self.spans.host.append(HostSpan(visit.tokens, after, planned - known))
        if self.timeline:
            self.timeline.compute(f"attention {visit.layer}", started, known)
            self.timeline.compute(f"plan {visit.layer}", known, planned)

    def _keep_logits(self, module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        self._logits = output[0]

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
    if options.prefetches and parse(options.predictor).name not in PREDICTORS:
        raise SpecError(f"predictor {options.predictor!r} does not run on the engine; name one of {', '.join(LADDER)}")
