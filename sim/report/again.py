"""The timeline of the recommended setting, simulated anew where its trace and machine are at hand."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import traces
from sim import settings
from sim.experiment import Experiment, Setting
from sim.machine import HardwareProfile, machine_from
from sim.report.events import Process, processes
from sim.spec import SpecError, options
from sim.timeline import Timeline
from traces import TraceError
from traces.format import shipped

TOKENS = 24  # decode tokens simulated for the few that are shown: by then the caches are warm

Record = dict[str, Any]


class NotHereError(Exception):
    """What a setting ran on is not here; the text says what."""


def of_record(record: Record) -> Process:
    """The first tokens of a sweep's record, on the shipped trace.

    Raises:
        NotHereError: another trace, machine or model than this installation has.
    """
    path = str(shipped())
    try:
        sha256 = record["trace_sha256"]
        trace = settings.trace_of(path, sha256, TOKENS)
        machine, model = settings.shapes(record["machine"], record["model"], path, sha256, tuple(record["set"]))
        for kind, text in (("machine", machine), ("model", model)):
            if hashlib.sha256(text.encode()).hexdigest() != record[f"{kind}_sha256"]:
                raise NotHereError(f"the {kind} {record[kind]} here is not the one of the sweep")
        keys = {name: record[name] for name in ("cache", "landing_slots", "stream_slots", "chunk_bytes")}
        if record["predictor"] is not None:
            keys["predictor"] = record["predictor"]
        setting = Setting(
            trace, settings.machine_of(machine), settings.model_of(model), record["bits"], record["slots"],
            options(record["policy"], **keys), record["cold_sequences"], record["context"],
        )  # fmt: skip
        name = f"{record['policy']}, {record['bits']} bits, {record['slots']} slots"
        return _simulated(setting, f"simulated: {name}")[0]
    except (SpecError, TraceError, KeyError, TypeError, ValueError) as error:
        raise NotHereError(str(error)) from None


def of_cell(document: Record, cell: Record, folder: Path) -> Process:
    """A cell of a validation, from its trace beside the file; its load log must come again.

    Raises:
        NotHereError: no trace there, or another result.
    """
    try:
        profile, known = (
            machine_from(stored["machine"], stored["evidence"], stored["sources"])
            for stored in (document["profile"], document.get("clock") or document["profile"])
        )
        pace = cell["link_gb_s"]
        trace = traces.load(folder / Path(cell["trace"]).name)
        run = options(cell["policy"], **cell["options"]).replace(extra_slots=cell.get("extra_slots", 0))
        if run.predictor == "recorded":
            run = run.replace(predictor="router")
        setting = Setting(trace, paced(profile, pace), trace.model, cell["bits"], cell["slots"], run)
        name = f"{cell['policy']}, {cell['bits']} bits, {cell['slots']} slots" + (f", {pace:g} GB/s" if pace else "")
        process, result = _simulated(setting, f"simulated: {name}", paced(known, pace))
        wanted = cell["simulated"]["load_log_sha256"]
    except (SpecError, TraceError, KeyError, TypeError, ValueError, OSError) as error:
        raise NotHereError(str(error)) from None
    if result["load_log_sha256"] != wanted:
        raise NotHereError("this version of the simulator issues other loads than the file says")
    return process


def paced(profile: HardwareProfile, gb_s: float | None) -> HardwareProfile:
    """The machine with its link at ``gb_s`` in both directions, as the engine paces it; unchanged for None."""
    if gb_s is None:
        return profile
    link = dataclasses.replace(profile.link, h2d_gb_s=gb_s, d2h_gb_s=gb_s, h2d_duplex_gb_s=gb_s)
    return dataclasses.replace(profile, link=link)


def _simulated(setting: Setting, name: str, clock: HardwareProfile | None = None) -> tuple[Process, Record]:
    stream = io.StringIO()
    timeline = Timeline(stream, name)
    result = Experiment(references=False).run(setting, None, timeline, clock)
    timeline.close()
    found = processes(json.loads(stream.getvalue())["traceEvents"])
    if not found:
        raise ValueError("no token of that trace is complete")
    return found[0], result
