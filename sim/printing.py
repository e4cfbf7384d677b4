"""What ``sim.run`` prints: setting, table, bounds and memory."""

from __future__ import annotations

import argparse
from typing import Any

from sim.experiment import BOUNDS, Setting, at_full_depth, context_tokens, memory
from sim.presets import PRESETS
from sim.settings import FitError, most_slots, remedy, size_bytes
from traces import ModelSpec

MOST_SOURCES = 4  # presets whose sources are printed below the table


def shape_text(model: ModelSpec) -> str:
    depth = f"{model.num_layers} of {model.full_layers} layers" if model.full_layers else f"{model.num_layers} layers"
    return f"{model.name}, {depth}"


def print_setting(setting: Setting, args: argparse.Namespace) -> None:
    """What is replayed on what, and how far each part can be trusted."""
    trace, model, machine = setting.trace, setting.model, setting.machine
    made = trace.provenance.get("model") or trace.model.name
    print(
        f"routing  {trace.routing}: {trace.num_decode_tokens:,} decode tokens in {len(trace.sequence_lengths)} "
        f"sequences of {made}, {trace.model.num_layers} layers x {model.num_experts} experts, top-{model.top_k}"
    )
    size = model.expert_bytes(setting.bits) / 1e6
    print(f"model    {shape_text(model)}, {setting.bits}-bit experts of {size:.3g} MB")
    link = machine.link
    copy_ms = (model.expert_bytes(setting.bits) / link.h2d_gb_s / 1e9 + link.h2d_fixed_s) * 1e3
    print(
        f"machine  {machine.name} ({machine.evidence}): {machine.vram_gb:g} GB, link {link.h2d_gb_s:g} GB/s to the "
        f"device, {copy_ms:.3g} ms for one expert"
    )
    print(f"slots    {setting.slots} of {model.num_experts} a layer{why_slots(setting, args)}")
    if args.set:
        print(f"set      {', '.join(args.set)}")


def why_slots(setting: Setting, args: argparse.Namespace) -> str:
    """What decided the slots, if no flag and no choice named them."""
    if args.slots is not None:
        return ""
    if args.vram is None:
        return " (half, the default)"
    room = f"fit {size_text(size_bytes(args.vram))} with {context_tokens(setting):,} tokens of context"
    if setting.slots == setting.model.num_experts:
        return f": all {room}; every miss is an expert's first use"
    return f": the most that {room}"


def size_text(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def print_memory(setting: Setting, vram: str | None) -> None:
    """Whether the whole model fits ``vram``, by default the machine's; where it does not, what does."""
    whole, machine = at_full_depth(setting), setting.machine
    limit = round(machine.vram_gb * 1e9) if vram is None else size_bytes(vram)
    own = "" if limit == round(machine.vram_gb * 1e9) else f" (--vram; {machine.name} has {machine.vram_gb:g})"
    vram_bytes, host_bytes = memory(whole)
    print(
        f"memory for all {whole.model.num_layers} layers (ESTIMATED): {size_text(vram_bytes)} of {limit / 1e9:.3g} GB"
        f"{own} on the device (KV cache of {context_tokens(whole):,} tokens), {size_text(host_bytes)} of "
        f"{machine.host_gb:g} GB on the host"
    )
    if not whole.model.dense_bytes:
        print(f"experts alone: the trace states no dense part of {whole.model.name}; --model names a shape that does")
    if vram_bytes > limit:
        try:
            advice = f"--slots {most_slots(setting, limit)} does"
        except FitError:
            advice = f"no slot count does at this width and context; {remedy(setting, limit)}"
        print(f"does not fit the device: {advice}")
    if host_bytes > machine.host_gb * 1e9:
        print("does not fit the host: take fewer --bits")
    print()


def print_table(setting: Setting, results: list[dict[str, Any]], compared: bool) -> None:
    """One line per run, best first, then bounds and references of the best; or, if ``compared``, of the first, and
    how it stands against the others."""
    print()
    name = max(24, *(len(r["policy"]) for r in results))
    unit, unit_bytes = ("GB", 1e9) if results[0]["vram_bytes"] >= 1e9 else ("MB", 1e6)
    model = setting.model
    if model.full_layers:
        print(f"the first {model.num_layers} of {model.full_layers} layers; tokens/s of all of them stands last")
    whole = f"all {model.full_layers}" if model.full_layers else ""
    head = (
        f"{'policy':{name}} {'tokens/s':>9} {'TPOT ms':>8} {'stall ms':>9} {'= miss+late':>15} {'hit %':>6} "
        f"{'miss %':>6} {'late %':>6} {unit + '/token':>9} {'link busy':>9} {'VRAM ' + unit:>8}  {'regime':7} {whole}"
    )
    print(head.rstrip())
    for r in sorted(results, key=lambda r: r["tpot_s"] or 0):
        share = 100 / max(1, r["accesses"])
        line = (
            f"{r['policy']:{name}} {r['tokens_per_s'] or 0:9.2f} {(r['tpot_s'] or 0) * 1e3:8.2f} "
            f"{r['stall_s'] * 1e3:9.2f} {r['stall_miss_s'] * 1e3:7.2f}+{r['stall_late_s'] * 1e3:<7.2f} "
            f"{r['hits'] * share:6.1f} {r['misses'] * share:6.1f} {r['late'] * share:6.1f} "
            f"{r['h2d_bytes'] / max(1, r['decode_tokens']) / unit_bytes:9.3f} {r['link_busy'] * 100:8.0f}% "
            f"{r['vram_bytes'] / unit_bytes:8.2f}  {r['regime']:7}"
        )
        print((line + (f" {r['scaled']['tokens_per_s']:6.2f}" if r["scaled"] else "")).rstrip())
    named = [name for r in results if (name := r["policy"].partition(":")[0]) in PRESETS]
    for name in named if len(named) <= MOST_SOURCES else []:
        print(f"{name}: {PRESETS[name].source}")
    if len(named) > MOST_SOURCES:
        print("what each preset stands for, and what it lacks of the system it is named after: --help")
    evidence = results[0]["evidence"]
    print(f"all figures per decode token, {evidence} (simulated on the profile above, with the hits of its routing)\n")
    first = results[0] if compared else min(results, key=lambda r: r["tpot_s"] or 0)
    bounds = first["bounds"]
    labels = {
        "all_resident_s": "all resident (compute only)",
        "link_floor_s": "link floor (fewest loads any schedule with these slots needs)",
        "joint_floor_s": "joint floor: no schedule is faster",
        "demand_only_s": "reference: on demand, LRU, same slots",
        "perfect_lookahead_s": "reference: perfect guesses at the same distance, LRU",
        "perfect_lookahead_belady_s": "reference: the same with Belady eviction",
        "zero_overhead_s": f"reference: {first['policy']} with no time for planning, waking and synchronising",
    }
    print(f"TPOT in ms beside {first['policy']} at {(first['tpot_s'] or 0) * 1e3:.2f}:")
    for key in BOUNDS:
        print(f"  {bounds[key] * 1e3:8.2f}  {labels[key]}")
    for other in results[1:] if compared else []:
        if other["tpot_s"] and first["tpot_s"]:
            gain = (other["tpot_s"] / first["tpot_s"] - 1) * 100
            print(f"{first['policy']} against {other['policy']}: {gain:+.1f} % tokens/s ({evidence})")
