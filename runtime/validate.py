"""Run policies on the engine, replay the same routing in the simulator, and print both side by side.

    python -m runtime.validate --policy on_demand --policy speculative

For every cell (policy x slots x bits x link pace) the engine generates with each policy in turn, several times; the
simulator then replays the routing and the guesses of that very run with this machine's profile. The two load logs
must be equal line by line. Exit code 1 when a gate fails (quiet machine, load logs, TPOT error, order of policies,
choice).
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from runtime import calibrate, models, prompts, provenance
from runtime.calibration.idle import OtherWork, check_idle
from runtime.calibration.runs import CONTEXT, DEFAULT_LINK_GB_S, POLICIES, TOKENS, Runs
from runtime.calibration.steadiness import Control
from runtime.cells import Cell, Validation, save_traces
from runtime.copier import CopierError
from runtime.devices import names
from runtime.executor import check_options
from runtime.verdict import judge, locked, recheck
from sim.choice import made_for_another, read_choice
from sim.machine import HardwareProfile, load_machine
from sim.planner import check_slots
from sim.run import written
from sim.spec import SpecError, comparable
from sim.timeline import merge
from sim.timing import check_within_reach
from traces.cli import Parser


def print_table(cells: list[dict[str, Any]], verdict: dict[str, Any], profile: HardwareProfile, repeats: int) -> None:
    """Measured beside simulated, one line a cell."""
    name = max(12, *(len(c["policy"]) for c in cells))
    print(f"machine {profile.name} ({profile.evidence}); per decode token; measured | simulated\n")
    print(
        f"{'policy':{name}} {'bits':>4} {'slots':>5} {'GB/s':>5} {'TPOT ms':>15} {'error':>7} {'spread':>7} "
        f"{'stall ms':>15} {'hit %':>11} {'late %':>11} {'miss %':>11} {'floor ms':>8} {'logs':>6}  regime"
    )
    for c in cells:
        m, s = c["measured"], c["simulated"]

        def both(key: str, scale: float, form: str, m: dict[str, Any] = m, s: dict[str, Any] = s) -> str:
            return f"{m[key] * scale:{form}}|{s[key] * scale:<{form}}"

        share = 100 / max(1, m["accesses"])
        floor = s["bounds"]["joint_floor_s"] * 1e3
        spread = f"{c['repeat_spread'] * 100:.1f}%" if repeats > 1 else "-"
        print(
            f"{c['policy']:{name}} {c['bits']:4} {c['slots']:5} {c['link_gb_s'] or 0:5g} {both('tpot_s', 1e3, '7.2f')} "
            f"{c['tpot_error'] * 100:+6.1f}% {spread:>7} {both('stall_s', 1e3, '7.2f')} "
            f"{both('hits', share, '5.1f')} {both('late', share, '5.1f')} {both('misses', share, '5.1f')} {floor:8.2f} "
            f"{'equal' if c['load_log_equal'] else 'DIFFER':>6}  {c['regime']}"
        )
    kept, of = (sum(c["undisturbed"][key] for c in cells) for key in ("passes", "of"))
    share = min(c["undisturbed"]["share"] for c in cells)
    print(
        f"\nTPOT over {kept} of {of} decode passes: of their repeats, those that nothing outside disturbed "
        f"({share:.0%} or more in every cell)"
    )
    print(
        f"TPOT error: median {verdict['median_abs_tpot_error']:.1%}, worst {verdict['max_abs_tpot_error']:.1%} "
        "(absolute, simulated against measured)"
    )
    if verdict["kendall_tau"] is not None:
        print(f"order of policies: Kendall tau {verdict['kendall_tau']:.2f} (differences within the spread are ties)")
    if verdict["regret"] is not None:
        print(f"regret of the simulator's choice: {verdict['regret']:.1%}")
    covered = verdict["scope"]
    print(
        f"{covered['decisions']} load decisions compared; {covered['cells']} cells, of them "
        f"{covered['link_bound']} link-bound, {covered['near_balance']} within 2 x of balance, "
        f"{covered['policy_matters']} where policies differ"
    )
    for c in cells:
        if c["first_divergence"]:
            print(f"load logs of {c['policy']} at {c['slots']} slots differ: {json.dumps(c['first_divergence'])}")
    for claim in locked(verdict["gates"]):
        print(f"this locks the claim {claim}")
    print()


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m runtime.validate", description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, default=models.DEMO, metavar="DIR", help="default: the demonstration model")
    p.add_argument("--device", choices=names(), default="cpu", help="where experts are computed (default %(default)s)")
    p.add_argument("--profile", metavar="NAME|FILE", help="measured profile (default: calibrates before and between)")
    p.add_argument("--allow-busy", action="store_true", help="measure although others use the processor")
    p.add_argument("--bits", type=int, choices=(16, 8, 4, 3, 2), action="append", help="repeatable (default 4)")
    p.add_argument(
        "--slots", type=int, action="append", metavar="N", help="per layer, repeatable (default: half of the experts)"
    )
    p.add_argument("--policy", action="append", metavar="SPEC", help=f"repeatable (default {', '.join(POLICIES)})")
    p.add_argument(
        "--link-gb-s",
        type=float,
        action="append",
        metavar="X",
        help=f"pace of the link, repeatable (default {DEFAULT_LINK_GB_S:g}; on cuda its own speed)",
    )
    p.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, or JSON lines (default: built in)")
    p.add_argument(
        "--tokens", type=int, default=48, metavar="N", help="new tokens after each prompt (default %(default)s)"
    )
    p.add_argument("--repeats", type=int, default=3, metavar="N", help="engine runs of each cell (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default %(default)s)")
    p.add_argument("--timeline", metavar="FILE.json.gz", help="write both sides' timelines for Perfetto")
    p.add_argument(
        "--out", type=Path, metavar="FILE", help="write the whole result as JSON, and each cell's trace beside it"
    )
    p.add_argument(
        "--recheck",
        type=Path,
        metavar="FILE",
        help="only replay what --out wrote: its simulated figures must come again",
    )
    p.add_argument("--choice", metavar="FILE", help="take policy, bits, slots, chunk_bytes from a choice file")
    return p


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """All combinations asked for; policies that are compared get the same slots.

    Raises:
        SpecError: a policy, slot count or pace out of range.
    """
    choice = read_choice(args.choice) if args.choice else {}
    for key in ("policy", "bits", "slots"):
        if key in choice and not getattr(args, key):
            setattr(args, key, [choice[key]])
        elif key in choice:
            print(f"--{key} on the command line wins over the choice file's {choice[key]}", file=sys.stderr)
    spec = models.spec_of(args.model)
    if other := made_for_another(choice, spec):
        print(other, file=sys.stderr)
    extra = {"chunk_bytes": choice["chunk_bytes"]} if "chunk_bytes" in choice else {}
    runs = comparable(list(args.policy or POLICIES), **extra)
    for run in runs:
        check_options(run)
    for slots in args.slots or []:
        check_slots(spec, slots)
    for gb_s in args.link_gb_s or []:
        if not 1e-4 <= gb_s <= 100:
            raise SpecError(f"--link-gb-s is {gb_s}; it must be 0.0001 to 100")
    paces: list[float | None] = [*(args.link_gb_s or ([DEFAULT_LINK_GB_S] if args.device == "cpu" else [None]))]
    return [
        Cell(run, slots, bits, gb_s)
        for bits in args.bits or [4]
        for gb_s in paces
        for slots in args.slots or [spec.num_experts // 2]
        for run in runs
    ]


def profile_for(name_or_file: str, model_dir: Path) -> HardwareProfile:
    """A measured profile of this model.

    Raises:
        SpecError: not found, or of other models.
    """
    profile = load_machine(name_or_file)
    model = models.spec_of(model_dir).name
    if model not in profile.operators:
        raise SpecError(
            f"--profile {name_or_file} holds no measurements of {model}; make one with python -m runtime.calibrate"
        )
    return profile


def validate(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and simulate everything asked for; prints the table and returns the JSON document."""
    provenance.check_folder("--out", args.out)
    provenance.check_folder("--timeline", args.timeline and Path(args.timeline))
    cells = cells_of(args)
    asked = prompts.read(args.prompts) if args.prompts else list(prompts.BUILT_IN)
    for name, value, least in (("tokens", args.tokens, 3), ("repeats", args.repeats, 1)):
        if value < least:
            raise SpecError(f"--{name} is {value}; it must be at least {least}")
    tokenizer = models.tokenizer_of(args.model)
    if tokenizer is None:
        raise SpecError(f"--model {args.model} has no tokenizer; name a directory that holds one")
    longest = max(len(tokenizer.encode(prompt.text)) for prompt in asked)
    context = longest + args.tokens
    with ExitStack() as ends:
        control, others = Control(), OtherWork()
        runs: Runs | None = None
        if args.profile:
            clock = profile_for(args.profile, args.model)
            check_within_reach(clock, models.spec_of(args.model), longest, context)
        else:
            print("calibrating, before and between the runs (--profile names a profile instead) ...", file=sys.stderr)
            check_idle(args.allow_busy)
            runs = ends.enter_context(
                Runs(
                    args.model,
                    sorted({cell.bits for cell in cells}),
                    TOKENS,
                    policies=[cell.options.text for cell in cells],
                    gb_s=median_low(cell.gb_s or DEFAULT_LINK_GB_S for cell in cells),
                    device=args.device,
                    context=max(CONTEXT, context),
                    control=control,
                )
            )
            runs.round()
            clock = calibrate.profile_of(runs, others, args.device).profile
        work = Validation(
            args.model,
            clock,
            asked,
            args.tokens,
            args.seed,
            bool(args.timeline),
            args.device,
            control,
            runs.stores if runs else None,
        )
        ends.callback(work.close)
        work.measure_all(cells, args.repeats, runs)
        if runs:
            work.profile = calibrate.profile_of(runs, others, args.device).profile
        compared = [work.compare(cell) for cell in cells]
    if work.timelines is not None:
        with written(args.timeline) as file:
            assert file is not None
            merge(work.timelines, file)
    if args.out:
        for result, name in zip(compared, save_traces([cell.trace for cell in cells], args.out), strict=True):
            result["trace"] = name
    verdict = judge(compared)
    print_table(compared, verdict, work.profile, args.repeats)
    return {
        "device": args.device,
        "cells": compared,
        **verdict,
        "profile": work.profile.to_json(),
        "clock": work.clock.to_json(),
        "others_share": others.share(),
        "tokens": args.tokens,
        "repeats": args.repeats,
        "decisions": verdict["scope"]["decisions"],
        "command": provenance.command(),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
    }


def print_recheck(path: Path) -> int:
    """Replay a stored validation and say what differs; 0 when nothing does."""
    result = recheck(path)
    for one in result["differences"]:
        print(f"cell {one['cell']}, {one['key']}: stored {one['stored']}, now {one['now']}")
    print(f"{path.name}: {result['cells']} cells replayed, {len(result['differences'])} figures differ")
    print(json.dumps(result))
    return 1 if result["differences"] else 0


def main() -> int:
    """0 when every gate holds (--recheck: every figure comes again), 1 when one fails, 2 on bad input."""
    args = parser().parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    try:
        if args.recheck:
            return print_recheck(args.recheck)
        document = validate(args)
    except (ValueError, OSError, CopierError) as error:
        print(f"runtime.validate: {error}", file=sys.stderr)
        return 2
    if args.out:
        with written(str(args.out)) as file:
            assert file is not None
            json.dump(document, file, indent=1)
            file.write("\n")
    print(json.dumps(document))
    return 1 if locked(document["gates"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
