"""One setting of a sweep: from a case to its record. What settings share is made once: arrays, guesses, bounds."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sim import bounds, compiled, noise
from sim.experiment import BOUNDS, Experiment, Setting, fitted, guess_table, replay, summary
from sim.ledger import Ledger
from sim.planner import Fitted, group_sizes
from sim.results import SCHEMA, version
from sim.run import scaled
from sim.settings import Case, options_of
from sim.spec import SpecError
from sim.timing import Timing
from traces import Trace, TraceError

_compiling = threading.Lock()  # a driver is compiled once, however many threads want it
_making = threading.Lock()  # of what settings share
_compiled: dict[str, bool] = {}  # whether numba can, by version


@lru_cache(maxsize=1 << 16)
def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def key(case: Case) -> str:
    """What a record is known by: sha256 of trace, machine, model, setting and the version of the code."""
    run = options_of(case.spec)
    parts = (
        case.trace_sha256, case.tokens, _sha256(case.machine), _sha256(case.model), _decided(case.spec), case.bits,
        case.slots, case.cold_sequences, case.context, case.references, version(run),
    )  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@lru_cache(maxsize=4096)
def _decided(spec: str) -> str:
    """Options as text; two specs that mean the same give the same."""
    run = options_of(spec)
    values = {name: value for name, value in vars(run).items() if name not in ("policy", "cache", "text")}
    if not run.prefetches:
        values["predictor"] = None
    plugins = {kind: (bound.name, *bound.params) for kind, bound in (("policy", run.policy), ("cache", run.cache))}
    return json.dumps(plugins | values, sort_keys=True)


class Shared(NamedTuple):
    """What all settings of a trace share.

    Attributes:
        arrays: the trace for the compiled driver.
        starts, block_tokens: blocks for resampling: first decode pass, tokens that count into TPOT.
        weights: of every pass, how many of its tokens count into TPOT.
        timed: their sum; least: the smallest of them above 0.
        counted: accesses of passes that count, by the tokens of an access, each as often as its pass counts.
    """

    arrays: compiled.Arrays
    starts: Any
    block_tokens: list[int]
    weights: list[int]
    timed: int
    least: int
    counted: dict[int, int]


@lru_cache(maxsize=4)
def shared(trace: Trace) -> Shared:
    """Made once for a trace."""
    arrays = compiled.arrays_of(trace)
    weights = bounds.timed_passes(trace)
    counted: Counter[int] = Counter()
    layers = trace.model.num_layers
    for index, visit in enumerate(trace.visits()):
        weight = weights[index // layers]
        for tokens in visit.counts if weight else ():
            counted[tokens] += weight
    starts = noise.block_starts(trace)
    block_tokens = noise.block_sums(starts, arrays.weights[arrays.decode > 0]).tolist()
    least = min((weight for weight in weights if weight), default=0)
    return Shared(arrays, starts, block_tokens, weights, sum(weights), least, dict(counted))


@lru_cache(maxsize=8)
def _guesses(trace: Trace, predictor: str | None) -> compiled.GuessArrays:
    return compiled.guess_arrays(guess_table(trace, predictor) if predictor else None, shared(trace).arrays)


class Laws(NamedTuple):
    """What settings of one machine and model share: times by pass, and the sum over all timed passes and layers."""

    times: compiled.PassTimes
    total_ns: int


@lru_cache(maxsize=4096)
def _without_link(machine: str) -> str:
    content = json.loads(machine)
    content["machine"].pop("link")
    return json.dumps(content)


_laws: dict[tuple[str, str, Trace], Laws] = {}
_MOST_LAWS = 64


def _laws_of(case: Case, trace: Trace, timing: Timing) -> Laws:
    where = (_without_link(case.machine), case.model, trace)
    found = _laws.get(where)
    if found is None:
        of = shared(trace)
        dense, head = compiled.pass_times(of.arrays, timing)
        found = Laws((dense, head), int(np.dot(of.weights, timing.model.num_layers * dense + head)))
        with _making:
            if len(_laws) >= _MOST_LAWS:
                _laws.clear()
            _laws[where] = found
    return found


@lru_cache(maxsize=256)
def _fewest_loads(trace: Trace, sizes: tuple[int, ...], landing_slots: int) -> int:
    return bounds.fewest_loads(trace, sizes, landing_slots)


_learned: dict[tuple[Any, ...], Fitted] = {}
_MOST_LEARNED = 16


def _learn(case: Case, setting: Setting) -> Fitted:
    """`sim.experiment.fitted`, remembered: it depends on the trace, the cache rule and the slots alone."""
    module = setting.options.cache.module
    if not (setting.options.cache.needs_future or hasattr(module, "fit") or hasattr(module, "sizes")):
        return Fitted()
    where = (case.trace_sha256, case.tokens, setting.options.cache.text(), case.slots)
    with _making:
        if where not in _learned:
            if len(_learned) >= _MOST_LEARNED:
                _learned.clear()
            _learned[where] = fitted(setting)
        return _learned[where]


def floors(case: Case, setting: Setting, timing: Timing, laws: Laws, learned: Fitted) -> dict[str, float]:
    """The bounds of `Experiment`, from what settings share."""
    trace, run, of = setting.trace, setting.options, shared(setting.trace)
    tokens = of.timed
    if not tokens:
        return dict.fromkeys(BOUNDS[:3], 0.0)
    landing = run.landing_slots if run.prefetches else 0
    loads = _fewest_loads(trace, tuple(group_sizes(setting.model, run, setting.slots, learned.sizes)), landing)
    resident_ns = laws.total_ns + setting.model.num_layers * tokens * timing.shared_ns
    resident_ns += sum(times * timing.undisturbed_expert_ns(n) for n, times in of.counted.items())
    link_ns = bounds.link_floor_ns(loads, setting.machine, timing.expert_bytes)
    compute_ns = resident_ns
    if hasattr(run.miss_rule.module, "loads"):
        compute_ns, link_ns = bounds.with_host_ns(trace, timing, resident_ns, link_ns, loads)
    link_s = link_ns * of.least / tokens / 1e9
    return {
        "all_resident_s": resident_ns / tokens / 1e9,
        "link_floor_s": link_s,
        "joint_floor_s": max(compute_ns / tokens / 1e9, link_s),
    }


_experiments: dict[tuple[str, ...], Experiment] = {}


def _ledger(case: Case, setting: Setting, timing: Timing, laws: Laws, learned: Fitted) -> tuple[Ledger, str]:
    """A run by the driver the case names; what cannot be compiled runs in SimPy."""
    if case.driver == "simpy":
        return replay(setting), "simpy"
    trace, run = setting.trace, setting.options
    of = shared(trace)
    inputs = (of.arrays, _guesses(trace, run.predictor if run.prefetches else None), setting.model, run, setting.slots)
    code = version(run)
    with nullcontext() if code in _compiled else _compiling:
        if _compiled.get(code, True):
            try:
                found = compiled.run(*inputs, timing, learned, setting.cold_sequences, times=laws.times)
                _compiled[code] = True
                return compiled.ledger(found, of.arrays), "compiled"
            except compiled.CompileError as error:
                print(error, file=sys.stderr)
                _compiled[code] = False
    return replay(setting), "simpy"


def record(case: Case) -> dict[str, Any]:
    """Simulate one case.

    Raises:
        SpecError, TraceError: it cannot be run.
    """
    setting = case.setting
    run = setting.options
    timing = Timing(setting.machine, setting.model, setting.bits, run)
    laws = _laws_of(case, setting.trace, timing)
    learned = _learn(case, setting)
    ledger, driver = _ledger(case, setting, timing, laws, learned)
    result = summary(setting, ledger)
    del result["load_log_sha256"]
    if not ledger.ttft_ns:
        del result["prefill"]
    known: dict[str, float | None] = dict(floors(case, setting, timing, laws, learned))
    if result["tpot_s"] is not None and result["tpot_s"] < (known["joint_floor_s"] or 0) * (1 - 1e-9):
        raise AssertionError(f"TPOT {result['tpot_s']} is below the joint floor {known['joint_floor_s']}: {case}")
    if case.references:
        known |= _references(case, setting)
    of = shared(setting.trace)
    lengths = np.array(ledger.decode_ns, np.int64) * np.array(ledger.timed, np.int64)
    return {
        "key": key(case),
        "schema": SCHEMA,
        "version": version(run),
        "trace": Path(case.trace).name,
        "trace_sha256": case.trace_sha256,
        "machine_sha256": _sha256(case.machine),
        "model_sha256": _sha256(case.model),
        "axes": dict(case.axes),
        "set": list(case.changes),
        "context": case.context,
        "cold_sequences": case.cold_sequences,
        "lookahead": run.lookahead,
        "chunk_bytes": run.chunk_bytes,
        **result,
        "driver": driver,
        "bounds": known,
        "scaled": scaled(setting, result),
        "shares": shares(ledger, laws, of, setting.model.num_layers),
        **_residuals(setting),
        "blocks": {"ns": noise.block_sums(of.starts, lengths).tolist(), "tokens": of.block_tokens},
    }


def shares(ledger: Ledger, laws: Laws, of: Shared, layers: int) -> dict[str, float]:
    """Of the decode passes' time: dense part and head, experts, planning, and waiting for the link (or the host)."""
    counts = ledger.phases[1]
    elapsed = max(1, counts.elapsed_ns)
    decode = of.arrays.decode > 0
    dense_ns = int((layers * laws.times[0] + laws.times[1])[decode].sum())
    parts = {
        "dense": dense_ns,
        "expert": counts.compute_ns - dense_ns,
        "host": counts.latency_ns,
        "link": counts.stall_miss_ns + counts.stall_late_ns,
    }
    return {name: round(ns / elapsed, 6) for name, ns in parts.items()}


def _residuals(setting: Setting) -> dict[str, dict[str, list[float]]]:
    laws = setting.machine.operators.get(setting.model.name)
    if laws is None or not laws.residuals:
        return {}
    return {"residuals": {name: list(ratios) for name, ratios in laws.residuals.items()}}


def _references(case: Case, setting: Setting) -> dict[str, float | None]:
    where = (case.trace_sha256, str(case.tokens), case.machine, case.model)
    experiment = _experiments.setdefault(where, Experiment(driver=case.driver))
    with _compiling:
        return {name: experiment.reference(setting, name) for name in BOUNDS[3:]}


class Failed(NamedTuple):
    """A case that could not be run, and why."""

    key: str
    reason: str


def records(cases: list[Case]) -> tuple[list[dict[str, Any]], list[Failed], float]:
    """Simulate several cases, in a thread here or in another process; those that cannot be run are named.

    Returns records, failures, and the seconds all of it took.
    """
    begin = time.perf_counter()
    found, failed = [], []
    for case in cases:
        try:
            found.append(record(case))
        except (SpecError, TraceError) as error:
            failed.append(Failed(key(case), str(error)))
    return found, failed, time.perf_counter() - begin
