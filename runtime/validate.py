"""Run policies on the engine, replay the same routing in the simulator, and print both side by side.

    python -m runtime.validate --policy on_demand --policy speculative

For every cell (policy x slots x bits x link pace) the engine generates with each policy in turn, several times; the
simulator then replays the routing and the guesses of that very run with this machine's profile. The two load logs
must be equal line by line.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from runtime import calibrate, models, prompts, provenance
from runtime.engine import Engine, paced
from runtime.store import HostStore, StoreError
from sim.experiment import Experiment, Setting, summary
from sim.ledger import LoadLog
from sim.machine import HardwareProfile, load_machine
from sim.run import read_choice, written
from sim.spec import Options, SpecError, comparable
from traces import Trace

DEFAULT_POLICIES = ("on_demand", "speculative")


@dataclass
class Cell:
    """One setting, what the engine measured with it, and what the simulator says.

    Attributes:
        options, slots, bits, gb_s: the setting.
        runs: the engine's figures, one per repeat, keys of a ``sim.run`` line.
        trace: routing and guesses of the first repeat.
        log: its load log.
    """

    options: Options
    slots: int
    bits: int
    gb_s: float
    runs: list[dict[str, Any]] = field(default_factory=list)
    trace: Trace | None = None
    log: str = ""


class Validation:
    """All cells of one call.

    Args:
        model_dir, asked, tokens, seed: what is generated.
        profile: this machine, measured for this model.
    """

    def __init__(
        self, model_dir: Path, profile: HardwareProfile, asked: Sequence[prompts.Prompt], tokens: int, seed: int
    ) -> None:
        self.model_dir = model_dir
        self.profile = profile
        self.asked = asked
        self.tokens = tokens
        self.seed = seed
        self.experiment = Experiment(references=False)
        self._stores: dict[int, HostStore] = {}

    def measure(self, cell: Cell) -> None:
        """One engine run; the first of a cell keeps its trace and load log."""
        if cell.bits not in self._stores:
            self._stores[cell.bits] = HostStore.build(self.model_dir, models.spec_of(self.model_dir), cell.bits)
        log = io.StringIO()
        machine = paced(self.profile, cell.gb_s)
        with Engine(
            self.model_dir,
            bits=cell.bits,
            slots=cell.slots,
            options=cell.options,
            machine=machine,
            store=self._stores[cell.bits],
            record=cell.options.lookahead,
        ) as engine:
            engine.ledger.log = LoadLog(log)
            for number, prompt in enumerate(self.asked):
                ids = engine.tokenizer.encode(prompt.text)
                for _ in engine.generate(
                    ids, self.tokens, temperature=0.8, seed=self.seed + number, domain=prompt.domain
                ):
                    pass
            ledger = engine.finish()
            assert engine.recorder is not None
            trace = engine.recorder.trace({"model": self.model_dir.name}, "router")
        setting = Setting(trace, machine, trace.model, cell.bits, cell.slots, cell.options)
        measured = summary(setting, ledger) | {"evidence": "MEASURED", "driver": "engine", "machine": self.profile.name}
        cell.runs.append(measured)
        if cell.trace is None:
            cell.trace, cell.log = trace, log.getvalue()

    def compare(self, cell: Cell) -> dict[str, Any]:
        """The cell's JSON object: measured (mean over repeats), simulated, errors, load logs."""
        assert cell.trace is not None
        log = io.StringIO()
        chosen = dataclasses.replace(cell.options, predictor="router")
        setting = Setting(cell.trace, paced(self.profile, cell.gb_s), cell.trace.model, cell.bits, cell.slots, chosen)
        simulated = self.experiment.run(setting, log)
        measured = average(cell.runs)
        times = [run["tpot_s"] for run in cell.runs]
        divergence = first_divergence(cell.log, log.getvalue())
        return {
            "policy": cell.options.text,
            "bits": cell.bits,
            "slots": cell.slots,
            "link_gb_s": cell.gb_s,
            "prompts": len(self.asked),
            "regime": simulated["regime"],
            "measured": measured,
            "simulated": simulated,
            "tpot_error": simulated["tpot_s"] / measured["tpot_s"] - 1,
            "repeat_spread": (max(times) - min(times)) / measured["tpot_s"],
            "load_log_equal": divergence is None,
            "first_divergence": divergence,
        }

    def close(self) -> None:
        for store in self._stores.values():
            store.close()


def average(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of the times over repeats; counts are those of the first (they are the same in all but late and hit)."""
    result = dict(runs[0])
    for key, value in runs[0].items():
        if isinstance(value, float) and all(isinstance(run[key], float) for run in runs):
            result[key] = math.fsum(run[key] for run in runs) / len(runs)
    if result["tpot_s"]:
        result["tokens_per_s"] = 1 / result["tpot_s"]
    return result


def first_divergence(measured: str, simulated: str) -> dict[str, Any] | None:
    """The first line in which two load logs differ; None when they are equal."""
    pairs = itertools.zip_longest(measured.splitlines(), simulated.splitlines())
    for number, (ours, theirs) in enumerate(pairs):
        if ours != theirs:
            return {
                "line": number,
                "engine": json.loads(ours) if ours else None,
                "simulator": json.loads(theirs) if theirs else None,
            }
    return None


def kendall_tau_b(x: Sequence[float], y: Sequence[float], ties: Sequence[float]) -> float | None:
    """Rank agreement of two orders; differences in ``x`` within ``ties`` (relative, per item) count as ties.

    None when either order is all ties. Source: Kendall 1945.
    """
    agree = ties_x = ties_y = pairs = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        pairs += 1
        tie = abs(x[i] - x[j]) <= max(ties[i], ties[j]) * max(x[i], x[j])
        dx = 0 if tie else (x[i] > x[j]) - (x[i] < x[j])
        dy = 0 if tie else (y[i] > y[j]) - (y[i] < y[j])
        ties_x += dx == 0
        ties_y += dy == 0
        agree += dx * dy
    scale = math.sqrt((pairs - ties_x) * (pairs - ties_y))
    return agree / scale if scale else None


def judge(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors over all cells, and whether the simulator orders the policies of each setting as the engine does."""
    errors = sorted(abs(c["tpot_error"]) for c in cells)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["bits"], cell["slots"], cell["link_gb_s"]), []).append(cell)
    taus, regrets = [], []
    for group in groups.values():
        measured = [c["measured"]["tpot_s"] for c in group]
        simulated = [c["simulated"]["tpot_s"] for c in group]
        tau = kendall_tau_b(measured, simulated, [c["repeat_spread"] for c in group])
        if tau is not None:
            taus.append(tau)
        if len(group) > 1:
            regrets.append(measured[simulated.index(min(simulated))] / min(measured) - 1)
    middle = len(errors) // 2
    median = errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2
    return {
        "median_abs_tpot_error": median,
        "max_abs_tpot_error": errors[-1],
        "kendall_tau": sum(taus) / len(taus) if taus else None,
        "regret": max(regrets) if regrets else None,
    }


def print_table(cells: list[dict[str, Any]], verdict: dict[str, Any], profile: HardwareProfile) -> None:
    """Measured beside simulated, one line a cell."""
    name = max(12, *(len(c["policy"]) for c in cells))
    print(f"machine {profile.name} ({profile.evidence}); per decode token; measured | simulated\n")
    print(
        f"{'policy':{name}} {'bits':>4} {'slots':>5} {'GB/s':>5} {'TPOT ms':>15} {'error':>7} {'spread':>7} "
        f"{'stall ms':>15} {'hit %':>11} {'late %':>11} {'miss %':>11} {'floor ms':>8} {'logs':>6}"
    )
    for c in cells:
        m, s = c["measured"], c["simulated"]

        def both(key: str, scale: float, form: str, m: dict[str, Any] = m, s: dict[str, Any] = s) -> str:
            return f"{m[key] * scale:{form}}|{s[key] * scale:<{form}}"

        share = 100 / max(1, m["accesses"])
        floor = s["bounds"]["joint_floor_s"] * 1e3
        print(
            f"{c['policy']:{name}} {c['bits']:4} {c['slots']:5} {c['link_gb_s']:5g} {both('tpot_s', 1e3, '7.2f')} "
            f"{c['tpot_error'] * 100:+6.1f}% {c['repeat_spread'] * 100:6.1f}% {both('stall_s', 1e3, '7.2f')} "
            f"{both('hits', share, '5.1f')} {both('late', share, '5.1f')} {both('misses', share, '5.1f')} {floor:8.2f} "
            f"{'equal' if c['load_log_equal'] else 'DIFFER':>6}"
        )
    print(
        f"\nTPOT error: median {verdict['median_abs_tpot_error']:.1%}, worst {verdict['max_abs_tpot_error']:.1%} "
        "(absolute, simulated against measured)"
    )
    if verdict["kendall_tau"] is not None:
        print(f"order of policies: Kendall tau {verdict['kendall_tau']:.2f} (differences within the spread are ties)")
    if verdict["regret"] is not None:
        print(f"regret of the simulator's choice: {verdict['regret']:.1%}")
    for c in cells:
        if c["first_divergence"]:
            print(f"load logs of {c['policy']} at {c['slots']} slots differ: {json.dumps(c['first_divergence'])}")
    print()


def recheck(path: Path) -> dict[str, Any]:
    """Compare a stored validation's logs and verdict without an engine: its verdict is recomputed from its cells.

    Raises:
        ValueError: not a validation file.
    """
    try:
        document = json.loads(path.read_text())
        return document | judge(document["cells"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--recheck {path.name}: {error}; name a file written by --out") from None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m runtime.validate", description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, default=models.DEMO, metavar="DIR", help="default: the demonstration model")
    p.add_argument("--device", choices=("cpu",), default="cpu", help="where experts are computed (default %(default)s)")
    p.add_argument("--profile", metavar="NAME|FILE", help="measured profile (default: calibrates first)")
    p.add_argument("--bits", type=int, choices=(16, 8, 4, 3, 2), action="append", help="repeatable (default 4)")
    p.add_argument("--slots", type=int, action="append", help="per layer, repeatable (default: half of the experts)")
    p.add_argument(
        "--policy", action="append", metavar="SPEC", help=f"repeatable (default {', '.join(DEFAULT_POLICIES)})"
    )
    p.add_argument("--link-gb-s", type=float, action="append", help="pace of the link, repeatable (default 0.05)")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, or JSON lines (default: built in)")
    p.add_argument("--tokens", type=int, default=48, help="new tokens after each prompt (default %(default)s)")
    p.add_argument("--repeats", type=int, default=3, help="engine runs of each cell (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    p.add_argument("--out", type=Path, metavar="FILE", help="write the whole result as JSON")
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
    extra = {"chunk_bytes": choice["chunk_bytes"]} if "chunk_bytes" in choice else {}
    runs = comparable(list(args.policy or DEFAULT_POLICIES), **extra)
    for gb_s in args.link_gb_s or [calibrate.DEFAULT_LINK_GB_S]:
        if not 1e-4 <= gb_s <= 100:
            raise SpecError(f"--link-gb-s is {gb_s}; it must be 0.0001 to 100")
    return [
        Cell(run, slots, bits, gb_s)
        for bits in args.bits or [4]
        for gb_s in args.link_gb_s or [calibrate.DEFAULT_LINK_GB_S]
        for slots in args.slots or [spec.num_experts // 2]
        for run in runs
    ]


def validate(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and simulate everything asked for; prints the table and returns the JSON document."""
    cells = cells_of(args)
    widths = sorted({cell.bits for cell in cells})
    asked = prompts.read(args.prompts) if args.prompts else list(prompts.BUILT_IN)
    for name, value, least in (("tokens", args.tokens, 3), ("repeats", args.repeats, 1)):
        if value < least:
            raise SpecError(f"--{name} is {value}; it must be at least {least}")
    if args.profile:
        profile = load_machine(args.profile)
    else:
        print("calibrating (name a profile with --profile to skip this) ...", file=sys.stderr)
        profile = calibrate.calibrate(args.model, widths)
    work = Validation(args.model, profile, asked, args.tokens, args.seed)
    try:
        for _, cell in tqdm(
            list(itertools.product(range(args.repeats), cells)), "engine runs", file=sys.stderr, unit="run"
        ):
            work.measure(cell)
        compared = [work.compare(cell) for cell in cells]
    finally:
        work.close()
    verdict = judge(compared)
    print_table(compared, verdict, profile)
    return {
        "device": args.device,
        "cells": compared,
        **verdict,
        "profile": profile.to_json(),
        "tokens": args.tokens,
        "repeats": args.repeats,
        "decisions": sum(cell.log.count("\n") for cell in cells),
        "command": provenance.command(),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
    }


def main() -> int:
    """0 when every load log is equal, 1 when one differs, 2 on bad input."""
    args = parser().parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    try:
        document = validate(args)
    except (ValueError, OSError, SpecError, StoreError) as error:
        print(f"runtime.validate: {error}", file=sys.stderr)
        return 2
    if args.out:
        with written(str(args.out)) as file:
            assert file is not None
            json.dump(document, file, indent=1)
            file.write("\n")
    print(json.dumps(document))
    return 0 if all(cell["load_log_equal"] for cell in document["cells"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
