"""Simulate scheduling policies on a routing trace.

python -m sim.run --policy speculative
python -m sim.run --policy on_demand --policy speculative:lookahead=2 --machine rtx4090 --bits 3
python -m sim.run --machine rtx3060-12gb --vram 12GB --context 4096
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
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import traces
from sim import compiled, registry, sensitivity
from sim import machine as machines
from sim.choice import CHOSEN, read_choice
from sim.experiment import Experiment, Setting, at_full_depth, fit, memory
from sim.machine import HardwareProfile
from sim.presets import PRESETS
from sim.printing import print_memory, print_setting, print_table
from sim.settings import (
    DEFAULT_MACHINE,
    DEFAULT_MODEL,
    FitError,
    machine_text,
    most_slots,
    remedy,
    size_bytes,
    with_dense_part,
)
from sim.spec import Options, SpecError, comparable, parse
from sim.timeline import Timeline
from sim.timing import Timing, check_reach
from traces import ModelSpec, Trace, TraceError
from traces.cli import Parser
from traces.format import shipped

BASELINES = ("on_demand", "mixtral_offloading")
DEFAULT_POLICY = "speculative"
EVERY = "all"


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
    p.add_argument("--machine", metavar="NAME|FILE", help=f"default {DEFAULT_MACHINE}")
    p.add_argument("--model", metavar="NAME|FILE", help=f"default {DEFAULT_MODEL}; with --trace, the trace's own")
    p.add_argument("--bits", type=int, choices=(16, 8, 4, 3, 2), help="width of the routed experts (default 4)")
    p.add_argument("--slots", type=int, metavar="N", help="cache slots per layer (default: half of the experts)")
    p.add_argument("--vram", metavar="SIZE", help="take the most slots with which the whole model fits: 12GB")
    p.add_argument(
        "--context", type=int, metavar="N", help="tokens the KV cache has room for (default: the longest sequence)"
    )
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
    p.add_argument("--choice", metavar="FILE", help=f"of sim.sweep: {', '.join(CHOSEN)}, machine, model; flags win")
    p.set_defaults(chunk_bytes=None)
    return p


def apply_choice(args: argparse.Namespace) -> dict[str, Any]:
    """Fill flags that were not given from ``--choice``; an explicit flag wins and is reported.

    Returns the choice, without changes (``set``) of a machine or model that is not used.
    """
    choice = read_choice(args.choice) if args.choice else {}
    for key in CHOSEN:
        if key in choice and key == "slots" and args.slots is None and args.vram is not None:
            _wins("vram", f"{choice['slots']} slots")
        elif key in choice and getattr(args, key) is None:
            setattr(args, key, [choice[key]] if key == "policy" else choice[key])
        elif key in choice:
            _wins(key, choice[key])
    changes = choice.get("set", [])
    for kind in ("machine", "model"):
        if kind in choice and getattr(args, kind) is not None:
            own = [item for item in changes if item.startswith(f"{kind}.")]
            _wins(kind, ", ".join([choice[kind], *own]))
            changes = [item for item in changes if item not in own]
    given = {item.partition("=")[0] for item in args.set}
    for item in [item for item in changes if item.partition("=")[0] in given]:
        _wins("set", item)
    args.set = [item for item in changes if item.partition("=")[0] not in given] + args.set
    return choice | {"set": changes}


def _wins(flag: str, value: object) -> None:
    print(f"--{flag} on the command line wins over the choice file's {value}", file=sys.stderr)


def shapes(args: argparse.Namespace, choice: dict[str, Any], trace: Trace) -> tuple[HardwareProfile, ModelSpec]:
    """Machine and model with all changes: as flags say, else as the choice was made for, else by default.

    Raises:
        SpecError: not found, or a change that cannot be made.
    """
    chosen = {kind: choice.get(f"{kind}_file", choice.get(kind)) for kind in ("machine", "model")}
    try:
        machine = machines.load_machine(args.machine or chosen["machine"] or DEFAULT_MACHINE)
        if args.model is None and args.trace and chosen["model"] in (None, trace.model.name):
            model = with_dense_part(trace.model)
        else:
            model = machines.load_model(args.model or chosen["model"] or DEFAULT_MODEL)
        then, _ = machines.override(machine, model, choice["set"])
    except SpecError as error:
        named = args.machine or args.model or not args.choice
        raise SpecError(str(error) if named else f"--choice {args.choice}: {error}") from None
    made_with = choice.get("machine_sha256")
    if args.machine is None and made_with and made_with != sha256(machine_text(then).encode()).hexdigest():
        print(f"machine {machine.name} has changed since {args.choice} was made: choose again", file=sys.stderr)
    return machines.override(machine, model, args.set)


def prepare(args: argparse.Namespace) -> tuple[Setting, list[Options]]:
    """The setting shared by all runs, and the options of each.

    Raises:
        SpecError, TraceError: any input that cannot be used.
    """
    choice = apply_choice(args)
    for flag, path in (("--load-log", args.load_log), ("--timeline", args.timeline)):
        check_target(flag, path)
    trace = traces.load(args.trace or shipped())
    if args.tokens is not None:
        if args.tokens < 1:
            raise SpecError(f"--tokens is {args.tokens}; it must be at least 1")
        trace = trace.head(args.tokens)
    if args.context is not None and args.context < 0:
        raise SpecError(f"--context is {args.context}; it must be at least 0")
    machine, named = shapes(args, choice, trace)
    try:
        model = fit(named, trace)
    except SpecError as error:
        raise SpecError(f"{error} (python -m traces.synthesize makes one)") from None
    try:
        model.expert_bytes(args.bits or 4)
    except ValueError as error:
        raise SpecError(str(error)) from None
    extra = {"chunk_bytes": args.chunk_bytes} if args.chunk_bytes is not None else {}
    policies = expand(args.policy)
    if len(policies) > 1 and (args.timeline or args.load_log):
        raise SpecError("--timeline and --load-log describe one run; give exactly one --policy with them")
    alone = len(policies) == 1 and not args.no_baselines
    runs = comparable([*policies, *(BASELINES if alone else ())], args.cache, args.predictor, **extra)
    slots = args.slots if args.slots is not None else model.num_experts // 2
    setting = Setting(trace, machine, model, args.bits or 4, slots, runs[0], args.cold_sequences, args.context)
    check_reach(machine, model, trace)
    if args.vram is not None:
        setting = replace(setting, slots=fitting_slots(args, setting, runs))
    return setting, runs


def fitting_slots(args: argparse.Namespace, setting: Setting, runs: list[Options]) -> int:
    """The most slots with which the whole model fits ``--vram`` under every policy; ``--slots`` if that fits.

    Raises:
        SpecError: nothing fits, or not so many slots; what does is said.
    """
    limit = size_bytes(args.vram)
    most = setting.model.num_experts
    for one in (replace(setting, options=run) for run in runs):
        try:
            most = min(most, most_slots(one, limit))
        except FitError as error:
            raise SpecError(f"{error}: {remedy(one, limit)}") from None
    if args.slots is not None and args.slots > most:
        raise SpecError(f"--slots {args.slots} do not fit --vram {args.vram} with that context; {most} do")
    return most if args.slots is None else int(args.slots)


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
    print_setting(setting, args)
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
        results[-1] |= {"seed": args.seed, "set": args.set, "trace": trace_name(args), "context": setting.context}
        results[-1]["scaled"] = scaled(one, results[-1])
    single = len(expand(args.policy)) == 1
    print_table(setting, results, single)
    print_memory(setting, args.vram)
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
