"""The timeline of the recommended setting, simulated anew where its trace and machine are at hand."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import traces
from sim import settings
from sim.experiment import Experiment, Setting
from sim.machine import HardwareProfile, machine_from, paced
from sim.report.events import Process, processes
from sim.report.reading import ABOVE_0, COUNT, FEW, FLAG, INTEGER, OBJECT, TEXT, TEXTS, Kind, fault, or_null
from sim.spec import RUN_KEYS, SpecError, options
from sim.timeline import Timeline
from traces import TraceError
from traces.format import shipped

TOKENS = 24  # decode tokens simulated for the few that are shown: by then the caches are warm

Record = dict[str, Any]

WIDTH = Kind(f"one of {', '.join(map(str, settings.WIDTHS))}", lambda v: v in settings.WIDTHS and INTEGER.fits(v))
PACE = Kind("GB/s from 0.0001 to 100000", lambda v: ABOVE_0.fits(v) and 1e-4 <= v <= 1e5)
RECORD = (
    dict.fromkeys(("trace_sha256", "machine", "machine_sha256", "model", "model_sha256", "policy", "cache"), TEXT)
    | {"predictor": or_null(TEXT), "set": TEXTS, "bits": WIDTH, "chunk_bytes": INTEGER, "cold_sequences": FLAG}
    | dict.fromkeys(("slots", "landing_slots", "stream_slots"), FEW)
    | {"context": or_null(COUNT)}
)
CELL = {
    "trace": TEXT,
    "policy": TEXT,
    "options": OBJECT,
    "bits": WIDTH,
    "slots": FEW,
    "extra_slots": FEW._replace(optional=True),
    "link_gb_s": or_null(PACE),
    "simulated": OBJECT,
}
OF_TYPE = {str: TEXT, bool: FLAG, int: FEW}
OPTIONS = {key: OF_TYPE[type(f.default)]._replace(optional=True) for key, f in RUN_KEYS.items() if key != "cache"} | {
    "chunk_bytes": INTEGER._replace(optional=True)
}


class NotHereError(Exception):
    """What a setting ran on is not here; the text says what."""


def of_record(record: Record) -> Process:
    """The first tokens of a sweep's record, on the shipped trace.

    Raises:
        NotHereError: another trace, machine or model than this installation has, or a record that does not say enough.
    """
    _check("the setting", record, RECORD)
    path, sha256 = str(shipped()), record["trace_sha256"]
    try:
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
    except (SpecError, TraceError) as error:
        raise NotHereError(str(error)) from None


def of_cell(document: Record, cell: Record, folder: Path) -> Process:
    """A cell of a validation, from its trace beside the file; its load log must come again.

    Raises:
        NotHereError: no trace there, another result, or a cell that does not say enough.
    """
    _check("the cell", cell, CELL)
    _check("the cell's 'options'", cell["options"], OPTIONS)
    if others := sorted(cell["options"].keys() - OPTIONS.keys()):
        raise NotHereError(f"the cell sets {others[0]!r}, which is no option of a run")
    _check("the cell's 'simulated'", cell["simulated"], {"load_log_sha256": TEXT})
    profile, known = (_profile(document, name) for name in ("profile", "clock" if document.get("clock") else "profile"))
    pace, path = cell["link_gb_s"], folder / Path(cell["trace"]).name
    if not path.is_file():
        raise NotHereError(f"its trace {path.name!r} does not lie beside the file")
    try:
        trace = traces.load(path)
        run = options(cell["policy"], **cell["options"]).replace(extra_slots=cell.get("extra_slots", 0))
        if run.predictor == "recorded":
            run = run.replace(predictor="router")
        setting = Setting(trace, paced(profile, pace), trace.model, cell["bits"], cell["slots"], run)
        name = f"{cell['policy']}, {cell['bits']} bits, {cell['slots']} slots" + (f", {pace:g} GB/s" if pace else "")
        process, result = _simulated(setting, f"simulated: {name}", paced(known, pace))
    except (SpecError, TraceError) as error:
        raise NotHereError(str(error)) from None
    if result["load_log_sha256"] != cell["simulated"]["load_log_sha256"]:
        raise NotHereError("this version of the simulator issues other loads than the file says")
    return process


def _check(what: str, record: Record, fields: dict[str, Kind]) -> None:
    """What a simulation needs of a file is there, and of its kind.

    Raises:
        NotHereError: it is not.
    """
    if wrong := fault(record, fields):
        raise NotHereError(f"{what} has {wrong}")


def _profile(document: Record, name: str) -> HardwareProfile:
    _check("the validation", document, {name: OBJECT})
    stored = document[name]
    try:
        return machine_from(stored.get("machine"), stored.get("evidence"), stored.get("sources") or {})
    except SpecError as error:
        raise NotHereError(str(error)) from None


def _simulated(setting: Setting, name: str, clock: HardwareProfile | None = None) -> tuple[Process, Record]:
    stream = io.StringIO()
    timeline = Timeline(stream, name)
    result = Experiment(references=False).run(setting, None, timeline, clock)
    timeline.close()
    found = processes(json.loads(stream.getvalue())["traceEvents"])
    if not found:
        raise NotHereError("no token of that trace is complete")
    return found[0], result
