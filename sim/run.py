"""Simulate scheduling policies on a routing trace.

python -m sim.run --policy speculative
python -m sim.run --policy on_demand --policy speculative:lookahead=2 --machine rtx4090 --bits 3
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import traces
from sim import compiled, registry, sensitivity
from sim import machine as machines
from sim.experiment import BOUNDS, Experiment, Setting, at_full_depth, context_tokens, fit, memory
from sim.presets import PRESETS
from sim.spec import Options, SpecError, comparable, parse
from sim.timeline import Timeline
from sim.timing import Timing, check_reach
from traces import ModelSpec, TraceError
from traces.cli import Parser
from traces.format import shipped

BASELINES = ("on_demand", "mixtral_offloading")
DEFAULT_MODEL = "mixtral-8x7b"
DEFAULT_POLICY = "speculative"
EVERY = "all"
MOST_SOURCES = 4  # presets whose sources are printed below the table
CHOICE_KEYS = ("policy", "bits", "slots", "chunk_bytes", "context")


def parser() -> argparse.ArgumentParser:
    """Flags of ``sim.run``; plug-ins and presets are listed from the registry."""
    presets = "\n".join(f"  {name} = {preset.spec}\n    {preset.source}" for name, preset in PRESETS.items())
    epilog = (
        f"policies:\n{registry.describe('policy')}\npresets:\n{presets}\ncaches:\n{registry.describe('cache')}\n"
        f"predictors (or the name of guesses recorded in the trace):\n{registry.describe('predictor')}\n"
        f"machines: {', '.join(machines.names(machines.PROFILES))}\n"
        f"models: {', '.join(machines.names(machines.MODELS))}"
    )
    p = Parser(
        prog="python -m sim.run",
        description="Simulate scheduling policies on a routing trace.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--trace", metavar="FILE", help="routing trace (default: the shipped recorded one)")
    p.add_argument("--machine", default="rtx3090", metavar="NAME|FILE", help="default %(default)s")
    p.add_argument("--model", metavar="NAME|FILE", help=f"default {DEFAULT_MODEL}; with --trace, the trace's own")
    p.add_argument("--bits", type=int, choices=(16, 8, 4, 3, 2), help="width of the routed experts (default 4)")
    p.add_argument("--slots", type=int, metavar="N", help="cache slots per layer (default: half of the experts)")
    p.add_argument(
        "--policy",
        action="append",
        metavar="SPEC",
        help=f"name or name:key=value,...; {EVERY} for every one; repeatable (default speculative)",
    )
    p.add_argument("--no-baselines", action="store_true", help=f"leave out {' and '.join(BASELINES)}")
    p.add_argument(
        "--cache", default="lru", metavar="SPEC", help="eviction, for policies that name none (default %(default)s)"
    )
    p.add_argument(
        "--predictor", default="recorded", metavar="SPEC", help="source of guesses, likewise (default %(default)s)"
    )
    p.add_argument("--tokens", type=int, metavar="N", help="first N decode tokens only")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of anything random (default %(default)s)")
    p.add_argument("--driver", choices=("simpy", "compiled"), default="simpy", help="default %(default)s")
    p.add_argument("--jit-cache", metavar="DIR", help="where compiled drivers are kept (default: the user's cache)")
    p.add_argument("--timeline", metavar="FILE.json.gz", help="write a timeline for Perfetto (one --policy)")
    p.add_argument("--load-log", metavar="FILE", help="write every load as a JSON line (one --policy)")
    p.add_argument("--cold-sequences", action="store_true", help="empty the caches where a sequence starts")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a field: machine.link.h2d_gb_s=12.4, model.X",
    )
    p.add_argument(
        "--sensitivity", action="store_true", help="vary recall, link speed and chunk size of the first policy"
    )
    p.add_argument("--choice", metavar="FILE", help=f"JSON file with {', '.join(CHOICE_KEYS)}; flags win")
    return p


def read_choice(path: str) -> dict[str, Any]:
    """The known keys of a choice file.

    Raises:
        SpecError: unreadable, not a JSON object, none of the keys, or a value of the wrong kind.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise SpecError(f"--choice {path}: {error}; it must be a JSON file with {', '.join(CHOICE_KEYS)}") from None
    if not isinstance(content, dict):
        raise SpecError(f"--choice {path} holds no JSON object; it must have {', '.join(CHOICE_KEYS)}")
    found = {k: content[k] for k in CHOICE_KEYS if content.get(k) is not None}
    if not found:
        raise SpecError(f"--choice {path} chooses nothing; it must have one or more of {', '.join(CHOICE_KEYS)}")
    for key, value in found.items():
        kind = str if key == "policy" else int
        if type(value) is not kind:
            needed = "a string" if kind is str else "an integer"
            raise SpecError(f"--choice {path}: {key} is {value!r}; it must be {needed}")
    return found


def apply_choice(args: argparse.Namespace) -> None:
    """Fill flags that were not given from ``--choice``; an explicit flag wins and is reported."""
    for key, value in (read_choice(args.choice) if args.choice else {}).items():
        if key == "policy" and not args.policy:
            args.policy = [value]
        elif key in ("chunk_bytes", "context") or (key in ("bits", "slots") and getattr(args, key) is None):
            setattr(args, key, value)
        else:
            print(f"--{key} on the command line wins over the choice file's {value}", file=sys.stderr)


def prepare(args: argparse.Namespace) -> tuple[Setting, list[Options]]:
    """The setting shared by all runs, and the options of each.

    Raises:
        SpecError, TraceError: any input that cannot be used.
    """
    apply_choice(args)
    for flag, path in (("--load-log", args.load_log), ("--timeline", args.timeline)):
        check_target(flag, path)
    trace = traces.load(args.trace or shipped())
    if args.tokens is not None:
        if args.tokens < 1:
            raise SpecError(f"--tokens is {args.tokens}; it must be at least 1")
        trace = trace.head(args.tokens)
    named = machines.load_model(args.model or DEFAULT_MODEL) if args.model or not args.trace else trace.model
    machine, named = machines.override(machines.load_machine(args.machine), named, args.set)
    model = fit(named, trace)
    try:
        model.expert_bytes(args.bits or 4)
    except ValueError as error:
        raise SpecError(str(error)) from None
    extra = {"chunk_bytes": args.chunk_bytes} if getattr(args, "chunk_bytes", None) is not None else {}
    policies = expand(args.policy)
    if len(policies) > 1 and (args.timeline or args.load_log):
        raise SpecError("--timeline and --load-log describe one run; give exactly one --policy with them")
    alone = len(policies) == 1 and not args.no_baselines
    runs = comparable([*policies, *(BASELINES if alone else ())], args.cache, args.predictor, **extra)
    slots = args.slots if args.slots is not None else model.num_experts // 2
    context = getattr(args, "context", None)
    setting = Setting(trace, machine, model, args.bits or 4, slots, runs[0], args.cold_sequences, context)
    check_reach(machine, model, trace)
    return setting, runs


def expand(policies: list[str] | None) -> list[str]:
    """``all`` stands for every policy and preset, one that cannot be used too; nothing for the default."""
    found = registry.plugins("policy")
    names = [*found.left_out, *found, *PRESETS]
    return [name for text in policies or [DEFAULT_POLICY] for name in (names if text == EVERY else [text])]


def check_target(flag: str, path: str | None) -> None:
    """Before anything runs: can a file be written there?

    Raises:
        SpecError: its folder does not exist, or it is a folder itself.
    """
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise SpecError(f"{flag} {path}: its folder does not exist; make it first")
    if path is not None and Path(path).is_dir():
        raise SpecError(f"{flag} {path} is a folder; name a file")


@contextmanager
def written(path: str | None) -> Iterator[IO[str] | None]:
    """A text file that appears under its name only when it is complete; gzip for ``.gz``; None without a path."""
    if path is None:
        yield None
        return
    temporary = Path(f"{path}.tmp")
    try:
        with temporary.open("wb") as raw:
            if path.endswith(".gz"):
                with (
                    gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=raw, mtime=0) as packed,
                    io.TextIOWrapper(packed, encoding="utf-8") as text,
                ):
                    yield text
            else:
                with io.TextIOWrapper(raw, encoding="utf-8") as text:
                    yield text
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Simulate everything asked for and print it; the returned document is the last line of output."""
    if args.jit_cache:
        os.environ[compiled.JIT_CACHE] = args.jit_cache
    setting, runs = prepare(args)
    for chosen in runs:
        note_short_guesses(setting, chosen)
    print_setting(setting, args.set)
    experiment = Experiment(driver=args.driver)
    results = []
    for number, chosen in enumerate(runs):
        first = number == 0
        print(f"simulating {chosen.text} ...", file=sys.stderr)
        one = Setting(**{**vars(setting), "options": chosen})
        with written(args.load_log if first else None) as log, written(args.timeline if first else None) as file:
            timeline = Timeline(file, "simulated") if file else None
            results.append(experiment.run(one, log, timeline))
            if timeline:
                timeline.close()
        results[-1] |= {"seed": args.seed, "set": args.set, "trace": trace_name(args)}
        results[-1]["scaled"] = scaled(one, results[-1])
    single = len(expand(args.policy)) == 1
    print_table(setting, results, single)
    if args.sensitivity:
        changed = list(sensitivity.rows(Setting(**{**vars(setting), "options": runs[0]}), experiment))
        results[0]["sensitivity"] = [row._asdict() for row in changed]
        print(sensitivity.table(changed) + "\n")
    if single:
        document = results[0]
        if not args.no_baselines:
            document = document | {"baselines": results[1:]}
        return document
    return {"runs": results}


def note_short_guesses(setting: Setting, chosen: Options) -> None:
    """Say it when a policy looks farther ahead than any guess in the trace."""
    guesses = setting.trace.guesses
    recorded = chosen.prefetches and parse(chosen.predictor).name in ("recorded", *guesses)
    reach = max((table.ids.shape[2] for table in guesses.values()), default=0)
    if recorded and guesses and chosen.lookahead > reach:
        print(f"{chosen.text}: the trace records guesses for {reach} layers ahead, none farther", file=sys.stderr)


def trace_name(args: argparse.Namespace) -> str:
    return Path(args.trace or shipped()).name


def scaled(setting: Setting, result: dict[str, Any]) -> dict[str, Any] | None:
    """The figures carried over to all layers of a model that was run at reduced depth; ESTIMATED."""
    layers, full = setting.model.num_layers, setting.model.full_layers
    if not full or result["tpot_s"] is None:
        return None
    head_s = Timing(setting.machine, setting.model, setting.bits, setting.options).head_ns(1) / 1e9
    tpot_s = (result["tpot_s"] - head_s) * full / layers + head_s
    vram_bytes, host_bytes = memory(at_full_depth(setting))
    return {
        "layers": full,
        "tpot_s": tpot_s,
        "tokens_per_s": 1 / tpot_s,
        "vram_bytes": vram_bytes,
        "host_bytes": host_bytes,
        "evidence": "ESTIMATED",
    }


def shape_text(model: ModelSpec) -> str:
    depth = f"{model.num_layers} of {model.full_layers} layers" if model.full_layers else f"{model.num_layers} layers"
    return f"{model.name}, {depth}"


def print_setting(setting: Setting, changes: list[str]) -> None:
    """What is replayed on what, and how far each part can be trusted; ``changes`` of ``--set``."""
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
    if changes:
        print(f"set      {', '.join(changes)}")


def size_text(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def print_memory(setting: Setting) -> None:
    """Whether the whole model fits the machine; where it does not, the most slots that do."""
    whole, machine = at_full_depth(setting), setting.machine
    vram_bytes, host_bytes = memory(whole)
    print(
        f"memory for all {whole.model.num_layers} layers (ESTIMATED): {size_text(vram_bytes)} of {machine.vram_gb:g} "
        f"GB on the device (KV cache of {context_tokens(whole)} tokens), {size_text(host_bytes)} of "
        f"{machine.host_gb:g} GB on the host"
    )
    if vram_bytes > machine.vram_gb * 1e9:
        smaller = (s for s in range(whole.slots - 1, whole.model.top_k - 1, -1))
        most = next((s for s in smaller if memory(replace(whole, slots=s))[0] <= machine.vram_gb * 1e9), None)
        advice = "no slot count does at this width" if most is None else f"--slots {most} does"
        print(f"does not fit the device: {advice}")
    if host_bytes > machine.host_gb * 1e9:
        print("does not fit the host: take fewer --bits")


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
    print_memory(setting)
    print()


def main() -> int:
    """Command line entry; 2 on bad input."""
    args = parser().parse_args()
    try:
        document = run(args)
    except (SpecError, TraceError, OSError) as error:
        print(f"sim.run: {error}", file=sys.stderr)
        return 2
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
