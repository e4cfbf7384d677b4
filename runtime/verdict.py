"""Judging a validation: engine against simulator, cell by cell and over all; and replaying one that was stored."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import traces
from runtime.lookahead import rung_of
from sim.experiment import Experiment, Setting, replay, summary
from sim.machine import HardwareProfile, machine_from, paced
from sim.spec import Options, options
from sim.timeline import Timeline
from traces import Trace

QUIET = 0.7  # least share of a cell's passes that must have been undisturbed in one repeat at least
MEDIAN_ERROR, WORST_ERROR, LEAST_TAU, MOST_REGRET = 0.03, 0.05, 0.9, 0.02
CLAIMS = {
    "quiet": "any figure of time: something outside slowed the machine down",
    "load_logs": "that the simulator decides as the engine does",
    "median_error": f"that simulated TPOT is usually within {MEDIAN_ERROR:.0%}",
    "worst_error": f"that simulated TPOT is always within {WORST_ERROR:.0%} (or twice what repeats differ by)",
    "order": "which of two policies is faster",
    "choice": f"that the recommended setting is within {MOST_REGRET:.0%} of the best (or what repeats differ by)",
}


def replayed(
    trace: Trace,
    machine: HardwareProfile,
    bits: int,
    slots: int,
    run: Options,
    log: IO[str] | None = None,
    timeline: Timeline | None = None,
    clock: HardwareProfile | None = None,
) -> tuple[dict[str, Any], list[int]]:
    """What the simulator says of an engine run, from its recorded routing and guesses: a ``sim.run`` object, and the
    nanoseconds of every decode pass. ``clock``: the profile the engine's planner had, if it is not ``machine``.
    """
    setting = Setting(trace, machine, trace.model, bits, slots, run.replace(predictor=rung_of(run.predictor)))
    ledger = replay(setting, log, timeline, clock)
    bounds = Experiment(references=False).bounds(setting)
    return summary(setting, ledger) | {"driver": "simpy", "bounds": bounds}, ledger.decode_ns


def steady(repeats: Sequence[Sequence[int]], kept: Sequence[Sequence[bool]]) -> tuple[list[int | None], float]:
    """Mean duration of every pass over the repeats in which nothing disturbed it (None: there are none), and how far
    repeats differ: the largest less the smallest of their mean ratios to these means, over passes that count in two
    repeats at least (0 without such). Where everything was disturbed, everything counts.
    """
    if not any(map(any, kept)):
        kept = [[True] * len(times) for times in repeats]
    means: list[int | None] = []
    for times, good in zip(zip(*repeats, strict=True), zip(*kept, strict=True), strict=True):
        chosen = list(itertools.compress(times, good))
        means.append(round(sum(chosen) / len(chosen)) if chosen else None)
    ratios = []
    often = [sum(good) > 1 for good in zip(*kept, strict=True)]
    for times, good in zip(repeats, kept, strict=True):
        own = [ns / mean for ns, ok, two, mean in zip(times, good, often, means, strict=True) if ok and two and mean]
        if own:
            ratios.append(sum(own) / len(own))
    return means, max(ratios) - min(ratios) if ratios else 0.0


def over_passes(
    measured: dict[str, Any], simulated: dict[str, Any], measured_ns: Sequence[int | None], simulated_ns: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides with TPOT and tokens/s over the passes measured undisturbed; ``tpot_all_s`` keeps TPOT of all."""
    pairs = [(m, s) for m, s in zip(measured_ns, simulated_ns, strict=True) if m is not None]
    sides = []
    for side, ns in ((measured, [m for m, _ in pairs]), (simulated, [s for _, s in pairs])):
        tpot_s = sum(ns) / len(ns) / 1e9
        sides.append(side | {"tpot_s": tpot_s, "tokens_per_s": 1 / tpot_s, "tpot_all_s": side["tpot_s"]})
    return sides[0], sides[1]


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
    """Rank agreement of two orders; differences within ``ties`` (relative, per item) count as ties on either side.

    None when either order is all ties. Source: Kendall 1945.
    """
    agree = ties_x = ties_y = pairs = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        pairs += 1
        within = max(ties[i], ties[j])
        dx, dy = (0 if abs(z[i] - z[j]) <= within * max(z[i], z[j]) else (z[i] > z[j]) - (z[i] < z[j]) for z in (x, y))
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
    taus, regrets, excusable = [], [], []
    for group in groups.values():
        measured = [c["measured"]["tpot_s"] for c in group]
        simulated = [c["simulated"]["tpot_s"] for c in group]
        spreads = [c["repeat_spread"] for c in group]
        tau = kendall_tau_b(measured, simulated, spreads)
        if tau is not None:
            taus.append(tau)
        if len(group) > 1:
            chosen, best = simulated.index(min(simulated)), measured.index(min(measured))
            regrets.append(measured[chosen] / measured[best] - 1)
            excusable.append(max(MOST_REGRET, spreads[chosen], spreads[best]))
    excess = max(abs(c["tpot_error"]) - max(WORST_ERROR, 2 * c["repeat_spread"]) for c in cells)
    middle = len(errors) // 2
    median = errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2
    return {
        "median_abs_tpot_error": median,
        "max_abs_tpot_error": errors[-1],
        "kendall_tau": sum(taus) / len(taus) if taus else None,
        "regret": max(regrets) if regrets else None,
        "gates": {
            "quiet": all(c["undisturbed"]["passes"] >= QUIET * c["undisturbed"]["of"] for c in cells),
            "load_logs": all(c["load_log_equal"] for c in cells),
            "median_error": median <= MEDIAN_ERROR,
            "worst_error": excess <= 0,
            "order": sum(taus) / len(taus) >= LEAST_TAU if taus else None,
            "choice": all(r <= most for r, most in zip(regrets, excusable, strict=True)) if regrets else None,
        },
        "scope": scope(groups.values()),
    }


def scope(groups: Iterable[Sequence[dict[str, Any]]]) -> dict[str, int]:
    """How much cells cover: regimes, decisions, and in how many the choice of the policy matters."""
    cells = [cell for group in groups for cell in group]
    busy = [(c["simulated"]["link_busy"], c["simulated"]["compute_busy"]) for c in cells]
    told = 0
    for group in groups:
        times = [c["measured"]["tpot_s"] for c in group]
        told += len(group) * (max(times) / min(times) - 1 > max(0.1, 3 * max(c["repeat_spread"] for c in group)))
    return {
        "cells": len(cells),
        "decisions": sum(c["decisions"] for c in cells),
        "policies": len({c["policy"] for c in cells}),
        "link_bound": sum(c["regime"] == "link" for c in cells),
        "near_balance": sum(link <= 2 * compute and compute <= 2 * link for link, compute in busy),
        "policy_matters": told,
    }


def locked(gates: dict[str, bool | None]) -> list[str]:
    """What must not be claimed after gates that failed; None is a gate that nothing was there to judge by."""
    return [CLAIMS[name] for name, passed in gates.items() if passed is False]


def recheck(path: Path) -> dict[str, Any]:
    """Replay every cell of a stored validation from the traces beside it; no engine runs.

    Returns ``cells`` (how many), ``differences`` (cell, key, stored, now: every simulated figure, load log and verdict
    that does not come out exactly as stored) and the verdict.

    Raises:
        ValueError: not a validation file, or its traces are not beside it.
    """
    differences: list[dict[str, Any]] = []
    try:
        document = json.loads(path.read_text())
        profile, known = (_profile(document[name]) for name in ("profile", "clock"))
        for number, cell in enumerate(document["cells"]):
            trace = traces.load(path.with_name(Path(cell["trace"]).name))
            run = options(cell["policy"], **cell["options"]).replace(extra_slots=cell.get("extra_slots", 0))
            machine, clock = (paced(one, cell["link_gb_s"]) for one in (profile, known))
            found_now, passes = replayed(trace, machine, cell["bits"], cell["slots"], run, clock=clock)
            now = json.loads(json.dumps(found_now))
            measured = cell["measured"] | {"tpot_s": cell["measured"]["tpot_all_s"]}
            measured, now = over_passes(measured, now, cell["pass_ns"], passes)
            cell_now = {
                "simulated": now,
                "tpot_error": now["tpot_s"] / measured["tpot_s"] - 1,
                "load_log_equal": now["load_log_sha256"] == cell["measured"]["load_log_sha256"],
            }
            found = changed({key: cell[key] for key in cell_now}, cell_now)
            differences += [{"cell": number, "key": key, "stored": old, "now": new} for key, old, new in found]
        verdict = judge(document["cells"])
        found = changed({key: document[key] for key in verdict}, verdict)
        differences += [{"cell": None, "key": key, "stored": old, "now": new} for key, old, new in found]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--recheck {path.name}: {type(error).__name__} {error}; name a file written by --out, its traces beside it"
        ) from None
    return {"recheck": path.name, "cells": len(document["cells"]), "differences": differences, **verdict}


def _profile(stored: dict[str, Any]) -> HardwareProfile:
    return machine_from(stored["machine"], stored["evidence"], stored["sources"])


def changed(stored: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, stored, now) of everything that differs between two JSON values; None for what is missing."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for name in stored | now:
            yield from changed(stored.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif stored != now:
        yield key, stored, now


def equal_cells(cells: Sequence[dict[str, Any]]) -> str:
    """In how many the load logs were equal."""
    return f"{sum(c['load_log_equal'] for c in cells)} of {len(cells)} cells"


def table(document: dict[str, Any], policies: Sequence[str]) -> str:
    """A stored validation in Markdown: its cells of ``policies``, its worst case, and the verdict; slots where cells
    differ in them."""
    cells = document["cells"]
    worst = max(cells, key=lambda c: abs(c["tpot_error"]))
    slots = len({c["slots"] for c in cells}) > 1
    lines = [
        f"| policy | {'slots | ' * slots}link GB/s | TPOT measured ms | simulated | error | repeats differ "
        "| stall measured | simulated |",
        f"| --- | {'---: | ' * slots}---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in cells:
        if cell["policy"] not in policies and cell is not worst:
            continue
        m, s = cell["measured"], cell["simulated"]
        mark = " (worst)" if cell is worst else ""
        where = f"{cell['slots']} | " if slots else ""
        lines.append(
            f"| {cell['policy']}{mark} | {where}{cell['link_gb_s'] or 0:g} | {m['tpot_s'] * 1e3:.2f} "
            f"| {s['tpot_s'] * 1e3:.2f} | {cell['tpot_error']:+.1%} | {cell['repeat_spread']:.1%} "
            f"| {m['stall_s'] * 1e3:.2f} | {s['stall_s'] * 1e3:.2f} |"
        )
    scope, tau, regret = document["scope"], document["kendall_tau"], document["regret"]
    once = min(c["undisturbed"]["passes"] / c["undisturbed"]["of"] for c in cells)
    share = min(c["undisturbed"]["share"] for c in cells)
    fewest, most = (pick(c["repeats"] for c in cells) for pick in (min, max))
    often = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    ordered = "" if tau is None else f"; Kendall tau of the policies' order {tau:.2f}"
    chosen = "" if regret is None else f"; regret of the simulator's choice {regret:.1%} at most"
    lines += [
        "",
        f"Of all {scope['cells']} cells ({scope['policies']} policies and presets, {scope['link_bound']} cells "
        f"link-bound, {scope['near_balance']} within 2 x of balance), {often} repeats: TPOT "
        f"error median {document['median_abs_tpot_error']:.1%}, worst {document['max_abs_tpot_error']:.1%}{ordered}"
        f"{chosen}; load logs equal in {equal_cells(cells)}, {scope['decisions']:,} decisions. TPOT is of undisturbed "
        f"passes alone: {share:.0%} or more of those of a cell, in {once:.0%} or more of its tokens at least one; "
        "stalls are of all.",
    ]
    return "\n".join(lines)
