"""Cells of a validation: what the engine does with a setting, several times, and what the simulator says of it."""

from __future__ import annotations

import hashlib
import io
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

import traces
from runtime import models, prompts, provenance
from runtime.calibration.runs import TEMPERATURE, Runs
from runtime.calibration.steadiness import Control, uncollected, undisturbed, usual
from runtime.devices import open_device
from runtime.engine import Engine
from runtime.lookahead import rung_of
from runtime.observe import EngineTimeline
from runtime.store import HostStore
from runtime.verdict import average, first_divergence, over_passes, replayed, steady
from sim.experiment import Setting, summary
from sim.ledger import LoadLog
from sim.machine import HardwareProfile, paced
from sim.spec import Options
from sim.timeline import Timeline
from traces import Trace

ENOUGH, MORE_REPEATS = 0.5, 2  # least share of undisturbed passes; how often a cell is repeated until it has them
BETWEEN = 10  # engine runs after which the machine is measured again: its speed drifts by some per cent in minutes


@dataclass
class Cell:
    """One setting, what the engine measured with it, and what the simulator says.

    Attributes:
        options, slots, bits, gb_s: the setting.
        runs: the engine's figures, one per repeat, keys of a ``sim.run`` line.
        trace: routing and guesses of the first repeat.
        logs: the load log of every repeat.
        pass_ns: durations of the decode passes of every repeat.
        looks: of the same passes, the number of the look at the control before each.
        timeline: of the first repeat, where one is wanted.
    """

    options: Options
    slots: int
    bits: int
    gb_s: float | None
    runs: list[dict[str, Any]] = field(default_factory=list)
    trace: Trace | None = None
    logs: list[str] = field(default_factory=list)
    pass_ns: list[list[int]] = field(default_factory=list)
    looks: list[list[int]] = field(default_factory=list)
    timeline: Timeline | None = None

    @property
    def name(self) -> str:
        pace = "" if self.gb_s is None else f", {self.gb_s:g} GB/s"
        return f"{self.options.text}, {self.bits} bits, {self.slots} slots{pace}"


class Validation:
    """All cells of one call.

    Args:
        model_dir, asked, tokens, seed: what is generated.
        clock: what the planner of the engine takes for this machine, measured for this model; sets ``profile`` too.
        device, control, stores: where; looked at before and after every pass; expert stores by bits to be shared.
        timelines: keep a timeline of every cell's first repeat, and of its simulation.

    Attributes:
        profile: this machine as it was meanwhile; what the simulator's times come from.
    """

    def __init__(
        self,
        model_dir: Path,
        clock: HardwareProfile,
        asked: Sequence[prompts.Prompt],
        tokens: int,
        seed: int,
        timelines: bool = False,
        device: str = "cpu",
        control: Control | None = None,
        stores: dict[int, HostStore] | None = None,
    ) -> None:
        self.model_dir = model_dir
        self.device = device
        self.clock = self.profile = clock
        self.asked = asked
        self.tokens = tokens
        self.seed = seed
        self.timelines: list[IO[str]] | None = [] if timelines else None
        self.control = control or Control()
        self._shared = stores or {}
        self._stores: dict[int, HostStore] = {}

    def measure(self, cell: Cell) -> None:
        """One engine run; the first of a cell keeps its trace and timeline."""
        store = self._shared.get(cell.bits) or self._stores.get(cell.bits)
        if store is None:
            order = open_device(self.device).order
            store = HostStore.build(self.model_dir, models.spec_of(self.model_dir), cell.bits, order=order)
            self._stores[cell.bits] = store
        log = io.StringIO()
        looks: list[int] = []
        machine = paced(self.clock, cell.gb_s)
        with (
            Engine(
                self.model_dir,
                bits=cell.bits,
                slots=cell.slots,
                options=cell.options,
                machine=machine,
                store=store,
                record=cell.options.lookahead,
                record_all=False,
                compiled=True,
                device=self.device,
                paced=cell.gb_s is not None,
            ) as engine,
            uncollected(),
        ):
            engine.ledger.log = LoadLog(log)
            if self.timelines is not None and not cell.runs:
                engine.timeline = EngineTimeline(scratch(), f"measured: {cell.name}")
                cell.timeline = engine.timeline.timeline
            for number, prompt in enumerate(self.asked):
                ids = engine.tokenizer.encode(prompt.text)
                self.control.begin()
                before = len(self.control.looks)
                for _ in engine.generate(
                    ids, self.tokens, temperature=TEMPERATURE, seed=self.seed + number, domain=prompt.domain
                ):
                    self.control.look()
                looks += range(before, len(self.control.looks) - 1)  # the first pass is prefill
            ledger = engine.finish()
            assert engine.recorder is not None
            trace = engine.recorder.trace({"model": self.model_dir.name}, rung_of(cell.options.predictor))
        setting = Setting(trace, machine, trace.model, cell.bits, cell.slots, cell.options)
        measured = summary(setting, ledger) | {"evidence": "MEASURED", "driver": "engine", "machine": self.profile.name}
        cell.runs.append(measured)
        cell.logs.append(log.getvalue())
        cell.pass_ns.append(ledger.decode_ns)
        cell.looks.append(looks)
        if cell.trace is None:
            cell.trace = trace

    def measure_all(self, cells: Sequence[Cell], repeats: int, machine: Runs | None = None) -> None:
        """Every cell once, then every cell again, ...; the machine in between, if it is calibrated. Cells that had too
        few undisturbed passes are measured again in the end.
        """
        self.measure(replace(cells[0], runs=[], logs=[], pass_ns=[], looks=[]))  # a warm-up that nobody keeps
        for number, cell in enumerate(
            tqdm([*cells] * repeats, "engine runs", file=sys.stderr, unit="run", mininterval=5)
        ):
            if machine and number and number % BETWEEN == 0:
                machine.round(whole=number % (4 * BETWEEN) == 0)
            self.measure(cell)
        for _ in range(MORE_REPEATS):
            again = [cell for cell in cells if self.share(cell) < ENOUGH * repeats]
            for cell in again:
                self.measure(cell)
            if machine and again:
                machine.round(whole=False)
        if machine:
            machine.round()

    def good(self, cell: Cell) -> list[list[bool]]:
        """Of every repeat, which decode passes nothing outside disturbed."""
        kept = undisturbed(self.control.looks, usual(self.control.looks))
        return [[kept[look] for look in looks] for looks in cell.looks]

    def share(self, cell: Cell) -> float:
        """Undisturbed passes in units of one whole repeat."""
        good = self.good(cell)
        return sum(map(sum, good)) / max(1, len(good[0]))

    def compare(self, cell: Cell) -> dict[str, Any]:
        """The cell's JSON object: measured (mean over repeats), simulated, errors, load logs."""
        assert cell.trace is not None
        log = io.StringIO()
        timeline = Timeline(scratch(), f"simulated: {cell.name}") if self.timelines is not None else None
        machine, clock = (paced(one, cell.gb_s) for one in (self.profile, self.clock))
        simulated, simulated_ns = replayed(
            cell.trace, machine, cell.bits, cell.slots, cell.options, log, timeline, clock
        )
        if self.timelines is not None:
            for drawn in (cell.timeline, timeline):
                if drawn is not None:
                    drawn.close()
                    self.timelines.append(drawn.stream)
        measured = average(cell.runs) | {"bounds": simulated["bounds"]}
        good = self.good(cell)
        pass_ns, spread = steady(cell.pass_ns, good)
        measured, simulated = over_passes(measured, simulated, pass_ns, simulated_ns)
        found = (first_divergence(ours, log.getvalue()) for ours in cell.logs)
        divergence = next((d for d in found if d is not None), None)
        return {
            "policy": cell.options.text,
            "bits": cell.bits,
            "slots": cell.slots,
            "link_gb_s": cell.gb_s,
            "options": {"landing_slots": cell.options.landing_slots, "chunk_bytes": cell.options.chunk_bytes},
            "extra_slots": cell.options.extra_slots,
            "prompts": len(self.asked),
            "regime": simulated["regime"],
            "measured": measured,
            "simulated": simulated,
            "undisturbed": {
                "passes": len(pass_ns) - pass_ns.count(None),
                "of": len(pass_ns),
                "share": sum(map(sum, good)) / max(1, sum(map(len, good))),
            },
            "pass_ns": pass_ns,
            "tpot_error": simulated["tpot_s"] / measured["tpot_s"] - 1,
            "repeat_spread": spread,
            "repeats": len(cell.runs),
            "decisions": sum(ours.count("\n") for ours in cell.logs),
            "load_log_equal": divergence is None,
            "first_divergence": divergence,
        }

    def close(self) -> None:
        for store in self._stores.values():
            store.close()


def save_traces(kept: Sequence[Trace | None], out: Path) -> list[str]:
    """Write traces beside ``out``, equal ones once; returns the file name of each."""
    made = {"command": provenance.command(), "commit": provenance.commit()}
    names: list[str] = []
    seen: dict[str, str] = {}
    for number, trace in enumerate(kept):
        assert trace is not None
        beside = out.with_name(f"{out.stem}.cell{number}.safetensors")
        traces.save(replace(trace, provenance=trace.provenance | made), beside)
        digest = hashlib.sha256(beside.read_bytes()).hexdigest()
        if digest in seen:
            beside.unlink()
        names.append(seen.setdefault(digest, beside.name))
    return names


def scratch() -> IO[str]:
    """A nameless text file that is gone when nobody holds it."""
    return tempfile.TemporaryFile("w+", encoding="utf-8")
