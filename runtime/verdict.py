"""Judging a validation: engine against simulator, cell by cell and over all; and replaying one that was stored."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import traces
from runtime.engine import paced
from runtime.lookahead import rung_of
from sim.experiment import Experiment, Setting
from sim.machine import HardwareProfile, machine_from
from sim.spec import Options, options
from sim.timeline import Timeline
from traces import Trace


def replayed(
    trace: Trace,
    machine: HardwareProfile,
    bits: int,
    slots: int,
    run: Options,
    log: IO[str] | None = None,
    timeline: Timeline | None = None,
) -> dict[str, Any]:
    """What the simulator says of an engine run, from its recorded routing and guesses: a ``sim.run`` object."""
    chosen = run.replace(predictor=rung_of(run.predictor))
    return Experiment(references=False).run(Setting(trace, machine, trace.model, bits, slots, chosen), log, timeline)


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
        dy = (y[i] > y[j]) - (y[i] < y[j])
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
        stored = document["profile"]
        profile = machine_from(stored["machine"], stored["evidence"], stored["sources"])
        for number, cell in enumerate(document["cells"]):
            trace = traces.load(path.with_name(Path(cell["trace"]).name))
            run = options(cell["policy"], **cell["options"])
            machine = paced(profile, cell["link_gb_s"])
            now = json.loads(json.dumps(replayed(trace, machine, cell["bits"], cell["slots"], run)))
            cell_now = {
                "simulated": now,
                "tpot_error": now["tpot_s"] / cell["measured"]["tpot_s"] - 1,
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


def changed(stored: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, stored, now) of everything that differs between two JSON values; None for what is missing."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for name in stored | now:
            yield from changed(stored.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif stored != now:
        yield key, stored, now
