"""What the simulator expects of the targets' cells on a machine: the groups of part `forced`, nothing measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime import forced
from runtime.bench import forced_cells, forced_profile, targets
from runtime.bench.forced_cells import BALANCE, FULL, Block, Group, link_floor_s, predict
from runtime.bench.link import PACES_GB_S
from sim.machine import HardwareProfile, load_machine
from sim.spec import Options, comparable, options
from sim.timing import Timing

SHAPE, SLOTS = "mixtral-8x7b", 4
TOKENS = FULL.warm + FULL.most


def expect(name: str, trace_file: Path | None = None) -> dict[str, Any]:
    """Targets on profile ``name``, by simulation; printed and returned.

    Raises:
        SpecError: no such profile, or one that cannot time the shape.
    """
    machine = load_machine(name)
    source = forced_cells.source_trace(forced_cells.SYNTHETIC, SHAPE, FULL.trace, trace_file)
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    cells = []
    for block in forced_cells.blocks(False):
        if block.shape != SHAPE:
            continue
        trace = forced.forced_trace(source, forced_cells.spec_of(SHAPE), TOKENS)
        for group in block.groups:
            if group.slots == SLOTS and group.source == forced_cells.SYNTHETIC and not group.asked[0].guesses:
                found, about = simulated(machine, trace, block, group)
                groups[f"{block.bits}b/{group.link}"] = found
                cells += [{"bits": block.bits, "link": group.link, "policy": p} | c for p, c in found.items()]
                print(about)
                for policy, cell in sorted(found.items(), key=lambda item: item[1].get("tpot_s", 1e9)):
                    print(f"  {policy:36} {told(cell)}")
    judged = targets.judged({k: {p: c for p, c in v.items() if "tpot_s" in c} for k, v in groups.items()}, (4, 3, 2))
    print("\n".join(targets.lines(judged)))
    label = "SIMULATED" if machine.evidence.startswith("MEASURED") else "ESTIMATED"
    about = {"machine": machine.name, "evidence": label, "routing": trace.routing, "tokens": FULL.most}
    return about | {"cells": cells, "targets": [t._asdict() for t in judged]}


def told(cell: dict[str, Any]) -> str:
    """A cell in words."""
    if "error" in cell:
        return str(cell["error"])
    lru = cell["copied"] / max(1, cell["lru_loads"])
    return f"{cell['tpot_s'] * 1e3:8.2f} ms a token, copied {lru:.2f} of LRU's loads"


def simulated(
    machine: HardwareProfile, trace: Any, block: Block, group: Group
) -> tuple[dict[str, dict[str, Any]], str]:
    """Figures by policy as part `forced` would find them, and a line about the group."""
    spec, bits = trace.model, block.bits
    runs = comparable([a.policy for a in group.asked if not a.guesses])
    demand = comparable([*[a.policy for a in group.asked], "on_demand"])[-1]
    resident_s = resident(machine, trace, bits)
    if group.link == "own":
        linked = machine
    else:
        pace = PACES_GB_S.get(group.link)
        if pace is None:
            at_one = forced_profile.paced(machine, 1.0)
            pace = link_floor_s(trace, at_one, spec, bits, SLOTS, demand) / (BALANCE[group.link] * resident_s)
        linked = forced_profile.paced(machine, pace)
    lru = predict(trace, linked, spec, bits, SLOTS, demand, FULL.warm)["copied"]
    found = {}
    for run in runs:
        cell = predict(trace, linked, spec, bits, SLOTS, run, FULL.warm)
        cell.pop("log", None)
        if "tpot_s" in cell:
            cell |= {"lru_loads": lru, "resident_tpot_s": resident_s}
            cell["own_loads_s"] = cell["copied"] * load_s(linked, spec, bits, run) / FULL.most
        found[run.text] = cell
    own = machine.link.h2d_gb_s
    beyond = ", beyond the link's own" if linked.link.h2d_gb_s > own else ""
    return found, (
        f"\n{SHAPE}, {bits} bits, {SLOTS} slots, link {group.link}: {linked.link.h2d_gb_s:.1f} GB/s{beyond}; all "
        f"resident {resident_s * 1e3:.2f} ms a token"
    )


def load_s(machine: HardwareProfile, spec: Any, bits: int, run: Options) -> float:
    """Seconds of one load."""
    return Timing(machine, spec, bits, run).chunks.total_ns() / 1e9


def resident(machine: HardwareProfile, trace: Any, bits: int) -> float:
    """TPOT with every expert on the device, planning included."""
    whole, first = forced.with_sweep(trace)
    found = predict(whole, machine, trace.model, bits, trace.model.num_experts, options("on_demand"), first)
    return float(found["tpot_s"])
