"""The whole programme: every part in turn, within its time, results kept as they come.

On CUDA a second process does the work and this one watches it: a crash, a device that is lost or a cell that stands
still ends that process, the cell counts as failed, and another goes on with the next.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from runtime.bench import forced_cells, kernel, link, model_parts, planners, targets
from runtime.bench.book import FAILED, REFUSED, SKIPPED, Book, DeviceLostError
from runtime.bench.conditions import card_now, conditions
from runtime.devices import Device, DeviceError, open_device
from sim.spec import SpecError

BUDGETS_S = {"link": 35, "kernels": 70, "forced": 270, "calibrate": 35, "validate": 35, "record": 20}  # at 480 s in all
BUDGET_S = 480
START_S = 15.0  # of the budget: starting, loading libraries, the summary
STILL_S = 100.0  # without a word in the result file: its process is ended
LOST = 75  # exit code of a process whose device is lost
RESTARTS = 6
LADDER_BITS = (4, 3, 2)


def parts(device: Device, args: argparse.Namespace, ready: planners.Ready) -> dict[str, Callable[[Book], None]]:
    """What every part does."""
    smoke = args.smoke
    return {
        "link": lambda book: link.run(book, device, smoke),
        "kernels": lambda book: kernel.run(book, device, smoke),
        "forced": lambda book: forced_cells.run(book, device, smoke, ready, args.trace),
        "calibrate": lambda book: model_parts.run_calibrate(book, device, smoke),
        "validate": lambda book: model_parts.run_validate(book, device, smoke),
        "record": lambda book: model_parts.run_record(book, device, smoke),
    }


def run(args: argparse.Namespace) -> int:
    """Do what was asked; 0, or 1 when a part failed.

    Raises:
        ValueError: a result file of something else, or no such device.
    """
    out = args.out or Path(f"bench-{args.device}{'-smoke' if args.smoke else ''}.json")
    if args.device == "cuda" and not args.child:
        return watch(args, out)
    device = open_device(args.device)
    started = time.monotonic()
    book = Book(
        out,
        {"programme": "runtime.bench", "device": args.device, "smoke": args.smoke},
        refusals=(SpecError, DeviceError),
        again=(SKIPPED, REFUSED) if args.keep_failed else (SKIPPED, REFUSED, FAILED),
        alive=lambda: check(device),
        say=lambda line: print(line, flush=True),
    )
    book.note("conditions", [*book.content.get("conditions", []), conditions(args.device)])
    told = book.content["conditions"][-1]
    print(f"{told.get('card', 'cpu')}, torch {told['versions']['torch']}, commit {told['commit'][:12] or 'unknown'}")
    wanted = [name for name in BUDGETS_S if not args.part or name in args.part]
    smoke_or_other = args.smoke or "forced" not in wanted
    ready = planners.Ready(forced_cells.policies_of(forced_cells.blocks(False)), wanted=not smoke_or_other)
    try:
        in_turn(book, device, wanted, parts(device, args, ready), args.budget_s, started)
    except DeviceLostError as error:
        print(f"runtime.bench: {error}", file=sys.stderr)
        return LOST
    finally:
        ready.close()
    summary = summarise(book)
    print(json.dumps(summary))
    return 1 if summary["cells"].get("failed") else 0


def in_turn(
    book: Book,
    device: Device,
    wanted: list[str],
    work: dict[str, Callable[[Book], None]],
    budget_s: float,
    started: float,
) -> None:
    """Every part within its time; what one leaves over goes to those after it."""
    end = started + budget_s
    scale = budget_s / BUDGET_S
    for number, name in enumerate(wanted):
        later = sum(BUDGETS_S[n] for n in wanted[number + 1 :]) * scale
        begin = time.monotonic()
        book.deadline = max(begin + min(BUDGETS_S[name] * scale, end - begin), end - START_S * scale - later)
        book.deadline = min(book.deadline, end - START_S * scale)
        before = card_now() if device.name == "cuda" else {}
        failure = book.guard(f"{name}/part", lambda name=name: work[name](book))
        about = {"seconds": time.monotonic() - begin, "given_s": book.deadline - begin, "failure": failure}
        book.content["parts"][name] = about | {"card_before": before}
        book.write()
        if device.torch_device.type == "cuda":
            torch.cuda.empty_cache()
    book.deadline = float("inf")


def check(device: Device) -> None:
    """After a failure.

    Raises:
        DeviceLostError: the device does nothing any more.
    """
    if device.torch_device.type != "cuda":
        return
    try:
        torch.cuda.empty_cache()
        torch.ones(1, device=device.torch_device).add_(1).item()
    except RuntimeError as error:
        raise DeviceLostError(f"the device answers no more ({str(error).splitlines()[0]})") from None


def summarise(book: Book) -> dict[str, Any]:
    """Speed-ups, floors and targets from what is there; printed, kept, and returned in short."""
    groups = dict(forced_cells.by_group(book))
    table = []
    for name, cells in groups.items():
        released = cells.get(targets.RELEASED)
        rung = targets.best(cells, targets.REPAIRED)
        for policy, cell in sorted(cells.items(), key=lambda item: item[1]["tpot_s"]):
            over_released = released["tpot_s"] / cell["tpot_s"] if released else None
            over_rung = rung[1] / cell["tpot_s"] if rung else None
            cell |= {"over_released": over_released, "over_best_repaired": over_rung}
            table.append((name, policy, cell))
    if table:
        book.say(
            f"\n{'cell':78} {'TPOT ms':>8} {'x releas.':>9} {'x repair.':>9} {'floor':>6} {'link':>5} {'bytes/LRU':>9} "
            f"{'sim. err':>8}"
        )
    for name, policy, cell in table:
        error = cell["simulated_error"]
        words = [
            f"{name.removeprefix('forced/')} {policy}".ljust(78),
            f"{cell['tpot_s'] * 1e3:8.2f}",
            *(f"{_number(cell[k]):>9}" for k in ("over_released", "over_best_repaired")),
            f"{_number(cell['floor_share']):>6}",
            f"{cell['link_busy']:5.2f}",
            f"{_number(cell['copied_of_lru']):>9}",
            f"{100 * error:+7.1f}%" if isinstance(error, float) else f"{'-':>8}",
        ]
        book.say(" ".join(words))
    errors = sorted(abs(c["simulated_error"]) for *_, c in table if isinstance(c["simulated_error"], float))
    equal = [c["load_log_equal"] for *_, c in table if c["load_log_equal"] is not None]
    if errors:
        book.say(
            f"simulated against measured TPOT: median error {errors[len(errors) // 2]:.1%}, worst {errors[-1]:.1%}; "
            f"load logs equal in {sum(equal)} of {len(equal)} cells"
        )
    judged = targets.judged(targets.mixtral(groups), LADDER_BITS)
    measured = [t for t in judged if t.passed is not None]
    for line in targets.lines(judged if not book.content["smoke"] else measured):
        book.say(line)
    states = book.states()
    book.note("targets", [t._asdict() for t in judged])
    failed = [name for name, cell in book.cells.items() if cell["state"] == "failed"]
    book.say(f"{book.path.name}: {', '.join(f'{n} {state}' for state, n in states.items())}")
    short = {
        "out": str(book.path),
        "device": book.content["device"],
        "cells": states,
        "failed": failed,
        "parts": {name: round(about["seconds"], 1) for name, about in book.content["parts"].items()},
        "median_abs_tpot_error": errors[len(errors) // 2] if errors else None,
        "load_logs_equal": [sum(equal), len(equal)],
        "targets": {t.name: t.passed for t in judged},
    }
    book.note("summary", short)
    return short


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def watch(args: argparse.Namespace, out: Path) -> int:
    """Have a process of its own do the work, and others after it where it breaks off; the last one's exit code."""
    end = time.monotonic() + args.budget_s
    words = ["--device", args.device, "--out", str(out), "--child"]
    words += [word for name in args.part or () for word in ("--part", name)]
    words += ["--trace", str(args.trace)] if args.trace else []
    broken: list[str] = []
    keep_failed = args.keep_failed
    code = 1
    for _ in range(RESTARTS):
        left = max(30.0, end - time.monotonic())
        command = [sys.executable, "-m", "runtime.bench", *words, "--budget-s", f"{left:.0f}"]
        process = subprocess.Popen(command + ["--keep-failed"] * keep_failed)
        code, why = attend(process, out, end + 30)
        keep_failed = True
        if code in (0, 1, 2):
            break
        broken.append(why)
        print(f"runtime.bench: {why}; going on with the next cell", file=sys.stderr)
        if time.monotonic() > end - 20:
            break
    if code == 2:
        return 2
    if broken:
        return aftermath(out, broken)
    return code


def attend(process: subprocess.Popen[bytes], out: Path, end: float) -> tuple[int, str]:
    """Wait for it; end it when its result file stands still or the time is up. Its exit code (-1: ended), and why."""
    seen, moved = 0.0, time.monotonic()
    try:
        while True:
            try:
                code = process.wait(0.5)
                return code, f"the measuring process ended with code {code}"
            except subprocess.TimeoutExpired:
                pass
            now = time.monotonic()
            written = out.stat().st_mtime if out.exists() else 0.0
            if written != seen:
                seen, moved = written, now
            if now > end or now - moved > STILL_S:
                process.kill()
                process.wait()
                return -1, "the time was up" if now > end else f"nothing was written for {STILL_S:.0f} s"
    except BaseException:
        process.kill()
        process.wait()
        raise


def aftermath(out: Path, broken: list[str]) -> int:
    """The summary of a file whose last process may not have come to it; always 1."""
    if not out.exists():
        print(json.dumps({"out": str(out), "broken": broken}))
        return 1
    content = json.loads(out.read_text())
    header = {key: content[key] for key in ("programme", "device", "smoke")}
    book = Book(out, header, again=(), say=lambda line: print(line, flush=True))
    book.note("broken", broken)
    print(json.dumps(summarise(book) | {"broken": broken}))
    return 1
