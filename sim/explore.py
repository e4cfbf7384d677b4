"""Sweeps for a notebook or a program: results in memory, by function calls in place of flags.

The same settings, records and drivers as ``python -m sim.sweep``. The default driver here is SimPy, which needs no
numba and nothing compiled: best for some dozens of settings over some hundred tokens.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sim import choice as choices
from sim import machine as machines
from sim.axes import Axis
from sim.experiment import guess_table
from sim.results import Store
from sim.results import trace_sha256 as sha256_of
from sim.settings import DEFAULT_MACHINE, FitError, Space, trace_of
from sim.spec import SpecError
from sim.sweep import Progress, Sweep
from traces import Trace, load, save, stats
from traces.format import shipped
from traces.presets import PRESETS, Statistics
from traces.synthesize import synthesize

Record = dict[str, Any]

SIZES = 4
FOLLOW_LINK = ("h2d_gb_s", "d2h_gb_s", "h2d_duplex_gb_s", "h2d_host_gb_s")  # what a link's speed scales


class _Quiet(Progress):
    """Says nothing."""

    def say(self) -> None:
        """Nothing."""


def sweep(
    policies: Sequence[str],
    vary: Mapping[str, Iterable[Any]] | None = None,
    fixed: Mapping[str, Any] | None = None,
    changes: Sequence[str] = (),
    vram_gb: float | None = None,
    references: bool = False,
    driver: str = "simpy",
) -> list[Record]:
    """Records of every policy with every combination of what varies, in the order of the grid.

    Args:
        policies: SPECs.
        vary, fixed: values, or one value, by the keys of ``sim.sweep --grid``: slots, bits, machine, model, trace,
            tokens, landing_slots, policy.lookahead, machine.link.h2d_gb_s, ...; the machine is an rtx3090 if neither
            names one.
        changes: ``--set`` items, KEY=VALUE.
        vram_gb: the whole model must fit into so many decimal GB; decides bits and slots that nothing else does.
        references: simulate the references too.
        driver: ``simpy`` or ``compiled``.

    Raises:
        SpecError, TraceError: a value nobody can use; FitError, a SpecError: nothing fits.
    """
    if not policies:
        raise SpecError("there is no policy to simulate; name at least one, such as 'speculative'")
    base = {"machine": DEFAULT_MACHINE} | {key: str(value) for key, value in (fixed or {}).items()}
    axes = [Axis("policy", tuple(dict.fromkeys(policies)))]
    for key, values in (vary or {}).items():
        base.pop(key, None)
        axes.append(Axis(key, tuple(map(str, values))))
    vram_bytes = None if vram_gb is None else round(vram_gb * 1e9)
    space = Space(base, tuple(axes), tuple(changes), vram_bytes, references, driver)
    workers = len(os.sched_getaffinity(0))
    with Store(None) as store, ThreadPoolExecutor(workers) as pool:
        found = Sweep(space, store, pool, workers, _Quiet(space.size()))
        found.run(found.cases(space.grid()))
    if not found.records():
        raise FitError(f"no setting could be simulated: {next(iter(found.left_out), 'there is none')}")
    return found.records()


def link(machine: str, gb_s: float | None) -> list[str]:
    """``changes`` that give a machine a link of this speed to the device, other rates in proportion; None: its own.

    Raises:
        SpecError: no such machine, or no speed.
    """
    known = machines.load_machine(machine).link
    if gb_s is None or gb_s == known.h2d_gb_s:
        return []
    if not gb_s > 0:
        raise SpecError(f"the link's speed is {gb_s} GB/s; it must be above 0, or None for the machine's own")
    factor = gb_s / known.h2d_gb_s
    return [f"machine.link.{name}={getattr(known, name) * factor:.6g}" for name in FOLLOW_LINK if getattr(known, name)]


def routing(model: str, folder: str | os.PathLike[str], tokens: int = 300) -> str:
    """A trace of the model's shape: the shipped RECORDED one where it fits, else a SYNTHETIC one written to the folder.

    Statistics are the preset's of ``traces.synthesize`` where there is one, else the assumed ones.

    Raises:
        SpecError: no such model.
        StatisticsError: a shape that cannot be synthesized.
    """
    shape = machines.load_model(model)
    recorded = load(shipped()).model
    if (shape.num_experts, shape.top_k) == (recorded.num_experts, recorded.top_k):
        return str(shipped())
    preset = PRESETS.get(shape.name)
    statistics = preset.statistics if preset else Statistics()
    path = Path(folder) / f"{shape.name}-{tokens}.safetensors"
    if not path.exists():
        save(synthesize(shape, statistics, tokens), path)
    return str(path)


def with_guesses(trace: Trace, predictors: Sequence[str]) -> Trace:
    """The trace with what predictor plug-ins would have guessed beside what it has recorded, under their names."""
    reach = max((table.ids.shape[2] for table in trace.guesses.values()), default=4)
    made = {name: guess_table(trace, f"{name}:reach={reach}") for name in predictors}
    cut = {n: dataclasses.replace(g, ids=g.ids[:, :, :reach], scores=g.scores[:, :, :reach]) for n, g in made.items()}
    return dataclasses.replace(trace, guesses=trace.guesses | cut)


def recalls(trace: Trace) -> Record:
    """What every predictor of a trace recalls over its decode tokens, in the form of ``runtime.gates_report``."""
    tables = {name: stats.recall(trace, name).tolist() for name in trace.guesses}
    return {
        "evidence": f"MEASURED on {trace.routing} routing of {trace.model.name}",
        "bits": None,
        "tokens": trace.num_decode_tokens,
        "top_k": trace.model.top_k,
        "recall": {
            name: {"all": [[[None if np.isnan(v) else round(v, 4) for v in row] for row in rows] for rows in table]}
            for name, table in tables.items()
        },
    }


def with_recall(records: list[Record], path: str | os.PathLike[str]) -> list[Record]:
    """Records with ``recall``: the share of routed experts among their predictor's first top_k guesses, one layer
    ahead, mean over layers, on the decode tokens of the trace they were simulated on; None without a predictor.

    Raises:
        SpecError: a record of another trace.
    """
    name = os.fspath(path)
    found = []
    for record in records:
        if record["trace_sha256"] != sha256_of(name):
            raise SpecError(f"a result is of trace {record['trace']}, not of {Path(name).name}; name its own trace")
        share = None
        if record["predictor"] is not None:
            trace = trace_of(name, sha256_of(name), record["decode_tokens"])
            guesses = {"it": guess_table(trace, record["predictor"])}
            table = stats.recall(dataclasses.replace(trace, guesses=guesses), "it")[0]
            share = float(np.nanmean(table[:, min(trace.model.top_k, table.shape[1]) - 1]))
        found.append(record | {"recall": share})
    return found


def for_machine(
    machine: str,
    model: str,
    policies: Sequence[str],
    trace: str,
    link_gb_s: float | None = None,
    tokens: int = 245,
    bits: Sequence[int] = (4, 3, 2),
) -> list[Record]:
    """Records of a machine: at every width the policies with `SIZES` cache sizes, and with the most slots that fit.

    Raises:
        SpecError, TraceError: a value nobody can use, or nothing that fits the machine's memory.
    """
    fixed = {"machine": machine, "model": model, "trace": trace, "tokens": tokens}
    shape, vram_gb = machines.load_model(model), machines.load_machine(machine).vram_gb
    step = (shape.num_experts - shape.top_k) / (SIZES - 1)
    slots = sorted({round(shape.top_k + i * step) for i in range(SIZES)})
    found: dict[str, Record] = {}
    for vary in ({"bits": bits}, {"bits": bits, "slots": slots}):
        try:
            some = sweep(policies, vary, fixed, link(machine, link_gb_s), vram_gb)
        except FitError:
            continue
        found |= {record["key"]: record for record in some}
    if not found:
        raise SpecError(f"{model} does not fit {machine} ({vram_gb:g} GB) at {', '.join(map(str, bits))} bits")
    return list(found.values())


def recommendation(records: list[Record], best: str = "tpot") -> str:
    """The Pareto front and the choice, as ``sim.sweep`` prints them; ``best`` as its ``--best``.

    Raises:
        SpecError: records of several traces, machines or models, or no such wish.
    """
    return "\n".join(choices.report(_choice(records, best), choices.wish(best)))


def chosen(records: list[Record], best: str = "tpot") -> Record:
    """The record that `recommendation` names.

    Raises:
        SpecError: as there.
    """
    found = _choice(records, best)
    return found.records[found.chosen]


def _choice(records: list[Record], best: str) -> choices.Choice:
    comparable = choices.groups(records)
    if len(comparable) != 1:
        raise SpecError(f"the results are of {len(comparable)} traces, machines or models; choose among those of one")
    return choices.choose(next(iter(comparable.values())), choices.wish(best))
