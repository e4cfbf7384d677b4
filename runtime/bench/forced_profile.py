"""A profile of the device for one forced shape: what the simulator is told before it predicts the cells.

Experts, dense part and head are taken from runs with all experts resident, planning from two short runs at half of
the slots, the link from bursts of the engine's own copier: no time of a cell that is predicted goes into it.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np

from runtime.bench.link import copier_rate
from runtime.calibration.host import host_figures
from runtime.calibration.laws import trimmed_mean
from runtime.devices import Device
from runtime.experts import Waited
from runtime.forced import ForcedEngine, Held, with_sweep
from runtime.skeleton import moe_blocks
from sim.machine import HardwareProfile, LinkProfile, Operators
from sim.spec import options
from traces import Trace

ALWAYS = "speculative:guard=0,trust=0"  # looks ahead at every visit


def paced(machine: HardwareProfile, gb_s: float) -> HardwareProfile:
    """The machine with its link paced, as a paced copier does it: both ways alike, chunks without a fixed cost."""
    return replace(machine, link=LinkProfile(gb_s, 0.0, gb_s, 0.0, gb_s))


def measured_link(engine: ForcedEngine, device: Device, pace: float, loads: int) -> tuple[LinkProfile, float]:
    """The link as the copier has it, and seconds until a waiter knows of an arrival.

    A chunk's fixed cost and the bandwidth follow from whole copies and from copies in the default chunks.
    """
    store = engine.store
    size = store.expert_bytes
    chunk = options("on_demand").chunk_size(size)
    slots = device.slots(4, size)
    try:
        whole = copier_rate(device, store, slots, loads, size, 2, pace)
        pieces = copier_rate(device, store, slots, loads, chunk, 2, pace)
        back_s = write_back_s(device, store, slots, pace)
    finally:
        slots.close()
    if pace != math.inf:
        return LinkProfile(pace, 0.0, pace, 0.0, pace), pieces["notice_s"]
    times = {1: size / whole["gb_s"] / 1e9, -(-size // chunk): size / pieces["gb_s"] / 1e9}
    (few, few_s), (many, many_s) = sorted(times.items())
    fixed_s = max(0.0, (many_s - few_s) / (many - few)) if many > few else 0.0
    rate = size / (few_s - few * fixed_s) / 1e9
    back = size / back_s / 1e9
    return LinkProfile(rate, fixed_s, back, 0.0, min(rate, back)), pieces["notice_s"]


def write_back_s(device: Device, store: Any, slots: Any, pace: float) -> float:
    """Seconds of one copy back, as the engine makes it: handed over and waited for; the fastest of 3."""
    limit = math.inf if pace == math.inf else pace * 1e9
    link = device.copier(store, slots, bytes_per_s=limit, chunk_bytes=store.expert_bytes, write_back_bytes_per_s=limit)
    try:
        found = []
        for _ in range(3):
            start = time.monotonic_ns()
            link.apply(write_back=[0])
            link.drain()
            found.append((time.monotonic_ns() - start) / 1e9)
    finally:
        link.close()
    return min(found)


def measure(
    engine: ForcedEngine, trace: Trace, name: str, pace: float = math.inf, loads: int = 24, compiled: bool = False
) -> dict[str, Any]:
    """The profile, and TPOT with every expert resident.

    Experts are timed one by one, each waited for, since a GPU computes beside the host. What the pieces come to more or
    less than the run in which nothing is waited for is given to the dense part, so that its TPOT is the run's.

    Args:
        trace: what is decoded along; all experts are loaded before it.
        pace: of the link, where it has no speed of its own.
        loads: of a burst on the link.
        compiled: decide with the compiled planner where guesses are looked at.

    Returns:
        ``machine``: the `HardwareProfile`; ``resident_tpot_s``; ``pieces``: seconds of each piece.
    """
    spec, device = engine.spec, engine.device
    link, notice_s = measured_link(engine, device, pace, loads)
    rough = HardwareProfile(
        name, 0, 0, link, memory_gb_s=1e3, tflops=50, layer_fixed_s=3e-4, host_s=1e-4, wake_s=notice_s
    )
    whole, first = with_sweep(trace)
    own_link = pace == math.inf
    run = options("on_demand")
    shared: dict[str, Any] = {"first": first, "paced": not own_link, "spans": True}
    engine.run(whole, run, spec.num_experts, rough, **shared)  # a warm-up: kernels are compiled, memory is touched
    resident = engine.run(whole, run, spec.num_experts, rough, **shared)
    waited = engine.run(
        whole, run, spec.num_experts, rough, wrap=lambda experts, pool: Waited(experts, device), **shared
    )
    half = max(spec.top_k, spec.num_experts // 2)  # planning with loads to hand over takes longer
    demand, looking = (
        engine.run(trace, options(policy), half, rough, paced=not own_link, spans=True, compiled=compiled)
        for policy in ("on_demand", ALWAYS)
    )
    assert resident.spans and waited.spans and demand.spans and looking.spans
    tpot_s = float(np.median(resident.ledger.decode_ns[first:])) / 1e9
    expert_s = trimmed_mean([s.ns / 1e9 for s in waited.spans.expert])
    head_s = trimmed_mean([s.ns / 1e9 for s in resident.spans.head])
    idle_s, host_s = (trimmed_mean([s.ns / 1e9 for s in r.spans.host]) for r in (resident, demand) if r.spans)
    looking_s = trimmed_mean([s.ns / 1e9 for s in looking.spans.host])
    routing_s = trimmed_mean([s.ns / 1e9 for s in resident.spans.gates])  # brought to the host anyway: part of dense_s
    gates_s = max(0.0, trimmed_mean([s.ns / 1e9 for s in looking.spans.gates]) - routing_s)
    visit_s = (tpot_s - head_s) / spec.num_layers
    dense_s = max(1e-7, visit_s - idle_s - spec.top_k * expert_s)
    laws = Operators(
        dense=(dense_s, 0.0, 0.0),
        expert={str(engine.bits): (expert_s, 0.0)},
        head=(head_s, 0.0),
        gates=(gates_s,),
        host_s={"default": host_s, "prefetching": looking_s},
    )
    machine = replace(rough, operators={spec.name: laws}, host_s=host_s, evidence="MEASURED")
    pieces = {
        "dense_s": dense_s,
        "dense_alone_s": trimmed_mean([s.ns / 1e9 for s in waited.spans.dense]),
        "expert_s": expert_s,
        "expert_launch_s": trimmed_mean([s.ns / 1e9 for s in resident.spans.expert]),
        "head_s": head_s,
        "host_without_loads_s": idle_s,
        "host_s": host_s,
        "host_looking_s": looking_s,
        "gates_s": gates_s,
        "waited_tpot_s": waited.tpot_s,
    }
    return {"machine": machine, "resident_tpot_s": tpot_s, "pieces": pieces}


def with_host(machine: HardwareProfile, engine: ForcedEngine, own_link: bool) -> tuple[HardwareProfile, str]:
    """The machine with measured times of experts on the host; and what was measured."""
    engine.dense.restore()
    found = host_figures(
        {engine.bits: engine.store},
        Held(engine.device),
        link=machine.link,
        paced=not own_link,
        gated=moe_blocks(engine.dense.model)[0].gated,
        dtype=engine.dense.dtype,
        tokens=(1,),
        seconds=0.3,
    )
    told = ", ".join(f"{n} token {s * 1e3:.2f} ms" for s_n in found.seconds.values() for n, s in s_n.items())
    return found.into(machine, engine.spec), f"{told}, {found.slowdown:.2f} x that beside the link"
