"""One run of the simulator from a setting to a result, with the bounds and references that stand beside it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import IO, Any

import numpy as np

from sim import bounds, compiled, registry
from sim.ledger import Counts, Ledger, LoadLog
from sim.machine import HardwareProfile
from sim.planner import Fitted, Planner, group_sizes
from sim.simpy_driver import Predict, Simulation
from sim.spec import Options, Spec, SpecError, bind, options, parse
from sim.timeline import Timeline
from sim.timing import Timing
from traces import DECODE, PREFILL, Guesses, GuessTable, ModelSpec, Trace, Visit
from traces.trace import merged


@dataclass(frozen=True)
class Setting:
    """Everything a run depends on.

    Attributes:
        trace: routing to replay; its layers, experts and top_k must be the model's.
        machine, model, bits, slots, options: what is timed and how it is scheduled.
        cold_sequences: caches are emptied where a sequence starts.
        context: tokens the KV cache has room for, counted in VRAM; None is the longest sequence of the trace.
    """

    trace: Trace
    machine: HardwareProfile
    model: ModelSpec
    bits: int
    slots: int
    options: Options
    cold_sequences: bool = False
    context: int | None = None


@lru_cache(maxsize=8)
def guess_table(trace: Trace, text: str) -> GuessTable:
    """The guesses of a predictor: a plug-in by name, or guesses recorded in the trace under that name.

    Raises:
        SpecError: neither.
    """
    spec = parse(text)
    known = registry.plugins("predictor")
    if spec.name not in known and spec.name not in known.left_out:
        if spec.name not in trace.guesses:
            recorded = ", ".join(trace.guesses) or "none"
            raise SpecError(
                f"predictor {spec.name!r} is neither a plug-in ({', '.join(known)}) nor recorded in the trace "
                f"({recorded})"
            )
        spec = Spec("recorded", {"name": spec.name})
    chosen = bind("predictor", spec)
    try:
        table: GuessTable = chosen.module.table(chosen.params, trace)
    except Exception as error:
        registry.name_plugin(error, f"while predictor {text!r} made its table")
        raise
    return table


def predictor(setting: Setting) -> Predict | None:
    """The guesses a policy asks for, visit by visit; None for one that never prefetches.

    Raises:
        SpecError: as `guess_table`.
    """
    options, trace = setting.options, setting.trace
    if not options.prefetches:
        return None
    table = guess_table(trace, options.predictor)
    layers = trace.model.num_layers
    reach = min(options.lookahead, table.ids.shape[2])
    block = max(1, 4096 // max(1, layers))
    begin, end = 0, 0
    ids: list[Any] = []
    scores: list[Any] = []

    def guess(visit: Visit, row: int) -> list[Guesses]:
        nonlocal begin, end, ids, scores
        if row < begin or row + visit.tokens > end:
            begin, end = row, row + max(visit.tokens, block)
            ids = table.ids[begin:end, :, :reach].tolist()
            scores = table.scores[begin:end, :, :reach].tolist()
        here = row - begin
        distances = reach if table.wrap else min(reach, layers - 1 - visit.layer)
        if visit.tokens == 1:
            found, sure = ids[here][visit.layer], scores[here][visit.layer]
            return [Guesses(found[d], sure[d]) for d in range(distances)]
        rows = range(here, here + visit.tokens)
        return [
            merged([ids[r][visit.layer][d] for r in rows], [scores[r][visit.layer][d] for r in rows])
            for d in range(distances)
        ]

    return guess


@lru_cache(maxsize=2)
def _future(trace: Trace) -> tuple[list[int], list[int]]:
    return bounds.next_uses(trace)


def fitted(setting: Setting) -> Fitted:
    """What the cache rule learns from the trace beforehand, and the future if it needs it."""
    cache, trace = setting.options.cache, setting.trace
    first_use: list[int] = []
    following: list[int] = []
    if cache.needs_future:
        first_use, following = _future(trace)
    try:
        table = cache.module.fit(cache.params, trace) if hasattr(cache.module, "fit") else []
        sizes = cache.module.sizes(cache.params, trace, setting.slots) if hasattr(cache.module, "sizes") else []
    except Exception as error:
        registry.name_plugin(error, f"while cache {cache.name!r} was fitted")
        raise
    return Fitted(table, sizes, first_use, following)


def fit(model: ModelSpec, trace: Trace) -> ModelSpec:
    """``model`` at the trace's depth.

    Raises:
        SpecError: other experts or top_k than the trace, or fewer layers.
    """
    routed = trace.model
    if (model.num_experts, model.top_k) != (routed.num_experts, routed.top_k):
        raise SpecError(
            f"the trace routes top-{routed.top_k} of {routed.num_experts} experts, {model.name} top-{model.top_k} of "
            f"{model.num_experts}; name a model of the trace's shape, or a trace of the model's"
        )
    try:
        return model.at_depth(routed.num_layers)
    except ValueError as error:
        raise SpecError(f"{error}; name a model at least as deep as the trace") from None


def planner(setting: Setting, timing: Timing, keep_time: bool = False) -> Planner:
    """A fresh planner for one run."""
    return Planner(
        setting.model, setting.options, setting.slots, timing, fitted(setting), keep_time, setting.cold_sequences
    )


def replay(
    setting: Setting,
    log: IO[str] | None = None,
    timeline: Timeline | None = None,
    clock: HardwareProfile | None = None,
) -> Ledger:
    """Run the SimPy driver once; ``clock`` times the planner's virtual link clock in place of the setting's machine."""
    timing = Timing(setting.machine, setting.model, setting.bits, setting.options)
    known = Timing(clock, setting.model, setting.bits, setting.options) if clock else timing
    simulation = Simulation(
        setting.trace,
        planner(setting, known),
        timing,
        setting.options,
        predictor(setting),
        Ledger(log=LoadLog(log)),
        timeline,
    )
    return simulation.run()


@lru_cache(maxsize=2)
def _arrays(trace: Trace) -> compiled.Arrays:
    return compiled.arrays_of(trace)


@lru_cache(maxsize=8)
def _guess_arrays(trace: Trace, predictor: str | None) -> compiled.GuessArrays:
    return compiled.guess_arrays(guess_table(trace, predictor) if predictor else None, _arrays(trace))


def compiled_replay(setting: Setting, log: IO[str] | None = None, logged: bool = True) -> Ledger:
    """Run the compiled driver once; without ``logged`` the ledger's load log stays empty.

    Raises:
        CompileError: a plug-in numba cannot compile.
        SpecError: numba is not installed.
    """
    trace, run = setting.trace, setting.options
    timing = Timing(setting.machine, setting.model, setting.bits, run)
    guessed = _guess_arrays(trace, run.predictor if run.prefetches else None)
    lines = LoadLog(log) if logged else None
    arrays = _arrays(trace)
    found = compiled.run(
        arrays, guessed, setting.model, run, setting.slots, timing, fitted(setting), setting.cold_sequences, lines
    )
    return compiled.ledger(found, arrays, lines)


def pass_ends_ns(setting: Setting) -> list[int]:
    """End of every forward pass on the planner's virtual clock: the SimPy driver's times by arithmetic alone."""
    timing = Timing(setting.machine, setting.model, setting.bits, setting.options)
    decide = planner(setting, timing, keep_time=True)
    predict = predictor(setting)
    visits = setting.trace.visits()
    ends = []
    for forward in setting.trace.passes():
        for _ in range(setting.model.num_layers):
            visit = next(visits)
            if predict is not None and decide.looks(visit.phase):
                visit.guesses = predict(visit, forward.first)
            decide.plan(visit)
        ends.append(decide.now_ns)
    return ends


def quick_tpot_s(setting: Setting) -> float | None:
    """TPOT alone, without the SimPy driver; None when no pass is timed."""
    ends = pass_ends_ns(setting)
    starts = [0, *ends[:-1]]
    weights = bounds.timed_passes(setting.trace)
    total = sum((end - start) * weight for start, end, weight in zip(starts, ends, weights, strict=True))
    return total / sum(weights) / 1e9 if any(weights) else None


def _compiled_tpot_s(setting: Setting) -> float | None:
    try:
        ledger = compiled_replay(setting, logged=False)
    except compiled.CompileError:
        return quick_tpot_s(setting)
    total = sum(ns * weight for ns, weight in zip(ledger.decode_ns, ledger.timed, strict=True))
    return total / sum(ledger.timed) / 1e9 if any(ledger.timed) else None


@dataclass
class Experiment:
    """Runs settings that share a trace, a machine and a model; references are simulated once and remembered.

    Attributes:
        references: simulate them too.
        driver: ``simpy`` or ``compiled``; what cannot be compiled runs in SimPy, and its result says so.
    """

    references: bool = True
    driver: str = "simpy"
    _tpot: dict[tuple[Any, ...], float | None] = field(default_factory=dict)

    def run(
        self,
        setting: Setting,
        log: IO[str] | None = None,
        timeline: Timeline | None = None,
        clock: HardwareProfile | None = None,
    ) -> dict[str, Any]:
        """The JSON object of one run (interface contract); ``clock`` as for `replay`, in SimPy."""
        used = self.driver if timeline is None and clock is None else "simpy"
        if used == "compiled":
            try:
                ledger = compiled_replay(setting, log)
            except compiled.CompileError as error:
                print(error, file=sys.stderr)
                used = "simpy"
        if used == "simpy":
            ledger = replay(setting, log, timeline, clock)
        result = summary(setting, ledger) | {"driver": used}
        self._tpot[_key(setting)] = result["tpot_s"]
        result["bounds"] = self.bounds(setting)
        floor, tpot = result["bounds"]["joint_floor_s"], result["tpot_s"]
        if tpot is not None and tpot < floor * (1 - 1e-9):
            raise AssertionError(f"TPOT {tpot} is below the joint floor {floor}: the simulator is wrong")
        return result

    def tpot_s(self, setting: Setting) -> float | None:
        """TPOT alone; None when no pass is timed."""
        return quick_tpot_s(setting) if self.driver == "simpy" else _compiled_tpot_s(setting)

    def bounds(self, setting: Setting) -> dict[str, float | None]:
        """The bounds of a setting and, if they are wanted, its references, in seconds per decode token."""
        timing = Timing(setting.machine, setting.model, setting.bits, setting.options)
        trace, run = setting.trace, setting.options
        weights = bounds.timed_passes(trace)
        tokens = sum(weights)
        if not tokens:
            return dict.fromkeys(BOUNDS, 0.0)
        landing = run.landing_slots if run.prefetches else 0
        sizes = group_sizes(setting.model, run, setting.slots, fitted(setting).sizes)
        loads = _fewest_loads(trace, tuple(sizes), landing)
        resident_ns = bounds.all_resident_ns(trace, timing)
        link_ns = bounds.link_floor_ns(loads, setting.machine, timing.expert_bytes)
        compute_ns = resident_ns
        if hasattr(run.miss_rule.module, "loads"):
            compute_ns, link_ns = bounds.with_host_ns(trace, timing, resident_ns, link_ns, loads)
        link_s = link_ns * min(weight for weight in weights if weight) / tokens / 1e9
        values: dict[str, float | None] = {
            "all_resident_s": resident_ns / tokens / 1e9,
            "link_floor_s": link_s,
            "joint_floor_s": max(compute_ns / tokens / 1e9, link_s),
        }
        if self.references:
            values |= {name: self.reference(setting, name) for name in BOUNDS[3:]}
        return values

    def reference(self, setting: Setting, name: str) -> float | None:
        """TPOT of a run that knows the future, or never looks ahead, with the same slots."""
        if name == "zero_overhead_s":
            return self.tpot_s(replace(setting, machine=without_overhead(setting.machine)))
        run = setting.options
        distance = 0 if name == "demand_only_s" else run.lookahead
        cache = "belady" if name.endswith("belady_s") else "lru"
        shared = {"landing_slots": run.landing_slots, "stream_slots": run.stream_slots}
        chunks = {"chunk_bytes": run.chunk_bytes, "max_submitted": run.max_submitted} if run.copy_stream else {}
        text = f"perfect:lookahead={distance}" if distance else "on_demand"
        perfect = options(text, cache=cache, predictor=f"oracle:reach={max(1, distance)}", **shared, **chunks)
        perfect = perfect.replace(extra_slots=run.extra_slots)
        other = replace(setting, options=perfect)
        key = _key(other)
        if key not in self._tpot:
            self._tpot[key] = self.tpot_s(other)
        return self._tpot[key]


@lru_cache(maxsize=64)
def _fewest_loads(trace: Trace, sizes: tuple[int, ...], landing_slots: int) -> int:
    return bounds.fewest_loads(trace, sizes, landing_slots)


BOUNDS = (
    "all_resident_s",
    "link_floor_s",
    "joint_floor_s",
    "demand_only_s",
    "perfect_lookahead_s",
    "perfect_lookahead_belady_s",
    "zero_overhead_s",
)


def _key(setting: Setting) -> tuple[Any, ...]:
    run = setting.options.replace(text="")
    plugins = (run.policy.text(), run.cache.text(), run.predictor if run.prefetches else "")
    rest = (
        run.stale,
        run.miss,
        run.guarded,
        run.extra_slots,
        run.landing_slots,
        run.stream_slots,
        run.write_back,
        run.copy_stream,
    )
    return (*plugins, *rest, run.chunk_bytes, run.max_submitted, setting.slots, setting.bits, setting.cold_sequences)


def without_overhead(machine: HardwareProfile) -> HardwareProfile:
    """The machine with a host that plans, wakes and synchronises in no time, and lookahead gates that cost nothing."""
    laws = {
        model: replace(law, gates=(), host_s=dict.fromkeys(law.host_s, 0.0), displaced={})
        for model, law in machine.operators.items()
    }
    return replace(machine, host_s=0.0, sync_s=0.0, wake_s=0.0, serial_s=0.0, operators=laws)


def context_tokens(setting: Setting) -> int:
    """Tokens the KV cache is counted for."""
    return int(setting.trace.sequence_lengths.max(initial=0)) if setting.context is None else setting.context


def memory(setting: Setting) -> tuple[int, int]:
    """Bytes on the device (dense weights, slots, KV cache) and on the host (every expert)."""
    model, run = setting.model, setting.options
    expert_bytes = model.expert_bytes(setting.bits)
    slots = sum(group_sizes(model, run, setting.slots)) + run.stream_slots
    slots += run.landing_slots if run.prefetches else 0
    kv_bytes = model.kv_bytes * model.num_layers * context_tokens(setting)
    return model.dense_bytes + slots * expert_bytes + kv_bytes, model.num_layers * model.num_experts * expert_bytes


def at_full_depth(setting: Setting) -> Setting:
    """The setting with all layers of its model, for sizes only; itself where nothing was cut off."""
    model = setting.model
    if not model.full_layers:
        return setting
    cut = model.full_layers - model.num_layers
    dense_bytes = model.dense_bytes + cut * (model.attention_bytes + model.shared_bytes)
    whole = replace(model, num_layers=model.full_layers, full_layers=0, dense_bytes=dense_bytes)
    return replace(setting, model=whole)


def summary(setting: Setting, ledger: Ledger) -> dict[str, Any]:
    """All figures of a run but its bounds, as JSON values; times in seconds per decode token unless named otherwise."""
    trace, run = setting.trace, setting.options
    decode, prefill = ledger.phases[DECODE], ledger.phases[PREFILL]
    timing = Timing(setting.machine, setting.model, setting.bits, run)
    timed = np.repeat(ledger.decode_ns, ledger.timed) if ledger.decode_ns else np.empty(0)
    tpot_s = int(timed.sum()) / len(timed) / 1e9 if len(timed) else None
    p50, p99 = np.percentile(timed, (50, 99)).tolist() if len(timed) else (0.0, 0.0)
    measured = timing.measured
    vram_bytes, host_bytes = memory(setting)
    return {
        "policy": run.text,
        "cache": run.cache.text(),
        "predictor": run.predictor if run.prefetches else None,
        "model": setting.model.name,
        "machine": setting.machine.name,
        "bits": setting.bits,
        "slots": setting.slots,
        "tokens": trace.num_tokens,
        "decode_tokens": decode.tokens,
        **phase_keys(decode),
        "ttft_s": float(np.mean(ledger.ttft_ns)) / 1e9 if ledger.ttft_ns else None,
        "tpot_s": tpot_s,
        "itl_p50_s": p50 / 1e9 if len(timed) else None,
        "itl_p99_s": p99 / 1e9 if len(timed) else None,
        "tokens_per_s": 1 / tpot_s if tpot_s else None,
        "vram_bytes": vram_bytes,
        "host_bytes": host_bytes,
        "regime": regime(decode),
        "evidence": "SIMULATED" if measured and setting.machine.evidence.startswith("MEASURED") else "ESTIMATED",
        "routing": trace.routing,
        "load_log_sha256": ledger.log.sha256,
        "landing_slots": run.landing_slots,
        "stream_slots": run.stream_slots,
        "expert_bytes": timing.expert_bytes,
        "prefill": phase_keys(prefill),
    }


def phase_keys(counts: Counts) -> dict[str, Any]:
    """The keys that stand once for decode and once under ``prefill``; seconds are per token of the phase's passes."""
    passes = max(1, counts.passes)
    elapsed = max(1, counts.elapsed_ns)
    loads = counts.prefetch_loads
    stall_ns = counts.stall_miss_ns + counts.stall_late_ns
    useful = (counts.h2d_bytes - counts.wasted_bytes) / counts.h2d_bytes if counts.h2d_bytes else 0.0
    would_miss = counts.prefetch_used + counts.misses
    return {
        "accesses": counts.accesses,
        "token_accesses": counts.token_accesses,
        "hits": counts.hits,
        "late": counts.late,
        "misses": counts.misses,
        "host_computed": counts.host_computed,
        "demand_loads": counts.demand_loads,
        "prefetch_loads": loads,
        "prefetch_used": counts.prefetch_used,
        "retracted": counts.retracted,
        "h2d_bytes": counts.h2d_bytes,
        "wasted_bytes": counts.wasted_bytes,
        "prefetch_precision": counts.prefetch_used / loads if loads else None,
        "prefetch_coverage": counts.prefetch_used / would_miss if would_miss else None,
        "overlap": max(0.0, 1 - stall_ns / counts.link_busy_ns) if counts.link_busy_ns else None,
        "stall_s": stall_ns / passes / 1e9,
        "stall_miss_s": counts.stall_miss_ns / passes / 1e9,
        "stall_late_s": counts.stall_late_ns / passes / 1e9,
        "link_busy": counts.link_busy_ns / elapsed,
        "link_useful": counts.link_busy_ns / elapsed * useful,
        "compute_busy": counts.compute_ns / elapsed,
    }


def regime(counts: Counts) -> str:
    """Which resource is busy longest: ``compute``, ``link``, ``latency`` (planning, synchronisation), or ``host`` where
    it computes experts."""
    busy = {
        "compute": counts.compute_ns,
        "link": counts.link_busy_ns,
        "latency": counts.latency_ns,
        "host": counts.host_busy_ns,
    }
    return max(busy, key=lambda name: busy[name])
