"""Part `forced`: policies on engines of Mixtral's and gpt-oss's exact shapes, routed as a trace says.

A block is one shape at one width (one store); its groups differ in slots, pace of the link and trace; a cell is one
policy of a group. Policies of a group have the same slots in all and decode the same tokens.
"""

from __future__ import annotations

import io
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import traces
from runtime import forced
from runtime.bench import forced_profile, planners
from runtime.bench.book import Book, UnavailableError
from runtime.bench.link import PACES_GB_S
from runtime.bench.targets import OTHERS, OURS, RELEASED, REPAIRED, SPLIT
from runtime.devices import Device
from runtime.forced import Checked, Dense, ForcedEngine, Run
from runtime.verdict import first_divergence
from sim.bounds import fewest_loads
from sim.experiment import Setting, replay
from sim.machine import HardwareProfile, machine_from
from sim.planner import group_sizes
from sim.spec import Options, comparable
from sim.timing import Timing, copy_ns
from traces import DECODE, ModelSpec, Trace
from traces.presets import PRESETS, Statistics, repeating
from traces.synthesize import synthesize

SYNTHETIC = "synthetic"
LADDER_TRACE = Path(traces.__file__).parent / "shipped" / "demo-12x8-top2-ladder.safetensors"
TOY_PACES_GB_S = {"own": 0.2, "gen4": 0.05, "gen3": 0.02}  # of a link that has no speed of its own
BALANCE = {"balance1": 1.0, "balance3": 3.0}  # link floor over the TPOT with all experts resident
NEAR_OWN = 0.98  # of the link's own speed: a pace above cannot be held
STATISTICS = {  # of shapes without a preset in traces
    # LRU at 8 of 32 slots has 65 % hits on a recorded gpt-oss-20b (MEASURED here); the rest of the curve is ASSUMED.
    "gpt-oss-20b": Statistics(recent=(*repeating(0.45, 4), 0.51, 0.56, 0.605, 0.65)),
    "mixtral-toy": Statistics(distances=3, recall=(0.8,)),
    "gpt-oss-toy": Statistics(distances=2, recall=(0.8,)),
}


class Asked(NamedTuple):
    """One cell of a group: a policy, and whose guesses it gets ("": the trace's own)."""

    policy: str
    guesses: str = ""

    @property
    def name(self) -> str:
        return f"{self.policy}@{self.guesses}" if self.guesses else self.policy


class Group(NamedTuple):
    """Cells that are compared: slots a layer, link (``own``, a pace by name, or a balance point), trace."""

    slots: int
    link: str
    asked: tuple[Asked, ...]
    source: str = SYNTHETIC


class Block(NamedTuple):
    """One store, and the share of the part's time it may take."""

    shape: str
    bits: int
    share: float
    groups: tuple[Group, ...]

    @property
    def name(self) -> str:
        return f"forced/{self.shape}/{self.bits}b"

    def group_name(self, group: Group) -> str:
        source = "" if group.source == SYNTHETIC else f"/{group.source}"
        return f"{self.name}/{group.slots}s/{group.link}{source}"

    def names(self) -> list[str]:
        """Of all cells that policies make."""
        return [f"{self.group_name(g)}/{a.name}" for g in self.groups for a in g.asked]


class Size(NamedTuple):
    """How long cells are: decode tokens before measuring, the least and most measured, seconds aimed at, tokens of
    the trace, loads of a burst on the link."""

    warm: int
    least: int
    most: int
    cell_s: float
    trace: int
    loads: int


FULL, SMOKE = Size(16, 16, 48, 3.0, 72, 24), Size(2, 4, 4, 0.1, 24, 4)


def asked(*policies: str) -> tuple[Asked, ...]:
    return tuple(Asked(policy) for policy in policies)


ALL = (*asked(*REPAIRED, *OURS, *SPLIT, RELEASED, *OTHERS), Asked("speculative", forced.PERFECT))
CORE = asked(REPAIRED[1], REPAIRED[2], OURS[0], OURS[2], SPLIT[0], RELEASED)
BALANCED = asked(*REPAIRED, *OURS)
LADDER = (
    Asked(REPAIRED[2], "router"), Asked("speculative", "router"), Asked("speculative", "aligned"),
    Asked("speculative", forced.PERFECT),
)  # fmt: skip


def blocks(smoke: bool) -> list[Block]:
    """What is measured, the most wanted first."""
    if smoke:
        few = asked(RELEASED, REPAIRED[1], "speculative", "speculative:miss=split")
        toy = (
            Group(4, "own", few),
            Group(4, "balance1", asked("on_demand", "speculative")),
            Group(4, "gen4", LADDER[2:], "demo-ladder"),
        )
        return [
            Block("mixtral-toy", 4, 0.7, toy),
            Block("gpt-oss-toy", 4, 0.3, (Group(4, "gen4", asked("on_demand", "speculative")),)),
        ]
    targets = (Group(4, "gen4", ALL), Group(4, "balance3", BALANCED), Group(4, "balance1", BALANCED))
    more = (
        Group(4, "own", CORE), Group(4, "gen4", LADDER, "demo-ladder"), Group(6, "gen4", CORE), Group(2, "gen4", CORE),
        Group(4, "gen3", CORE),
    )  # fmt: skip
    quick = (Group(4, "gen4", asked(*REPAIRED, *OURS, *SPLIT, RELEASED)), *targets[1:], Group(4, "own", CORE))
    small = (Group(16, "gen4", CORE), Group(8, "gen4", CORE), Group(16, "own", CORE), Group(24, "gen4", CORE))
    return [
        Block("mixtral-8x7b", 4, 0.42, (*targets, *more)),
        Block("mixtral-8x7b", 3, 0.19, quick),
        Block("mixtral-8x7b", 2, 0.17, quick),
        Block("gpt-oss-20b", 4, 0.14, small),
        Block("gpt-oss-20b", 3, 0.04, small[:1]),
        Block("gpt-oss-20b", 2, 0.04, small[:1]),
    ]


def run(book: Book, device: Device, smoke: bool, ready: planners.Ready, trace_file: Path | None = None) -> None:
    """All blocks; a dense part is kept from one width to the next."""
    size = SMOKE if smoke else FULL
    made: dict[str, Dense] = {}
    start, whole_s = time.monotonic(), min(book.left_s, 1e6)
    end, used = book.deadline, 0.0
    for block in blocks(smoke):
        used += block.share
        names = [n for n in block.names() if n not in book.cells]
        if not names:
            continue
        book.deadline = min(end, start + used * whole_s)  # what an earlier block left over is the next one's
        if block.shape not in made:
            made.clear()
            empty(device)
        work = Work(book, device, size, block, ready, trace_file)
        book.guard(f"{block.name}/block", lambda work=work: work.all(made))
    book.deadline = end


def policies_of(found: list[Block]) -> list[str]:
    """Every policy of the blocks, once, and that of the profile."""
    asked_for = [a.policy for block in found for group in block.groups for a in group.asked]
    return list(dict.fromkeys([*asked_for, forced_profile.ALWAYS]))


@cache
def source_trace(name: str, shape: str, tokens: int, file: Path | None) -> Trace:
    """Where a group's routing comes from."""
    if name != SYNTHETIC:
        return traces.load(LADDER_TRACE)
    if file is not None:
        found = traces.load(file)
        if (found.model.num_experts, found.model.top_k) == (spec_of(shape).num_experts, spec_of(shape).top_k):
            return found
    if shape in PRESETS:
        return synthesize(PRESETS[shape].model, PRESETS[shape].statistics, tokens)
    return synthesize(spec_of(shape), STATISTICS[shape], tokens)


@cache
def spec_of(shape: str) -> ModelSpec:
    """A shape without its weights."""
    from transformers import AutoConfig

    from runtime.models import spec_of_config

    config = AutoConfig.for_model(forced.SHAPES[shape].model_type, **forced.SHAPES[shape].changes)
    return spec_of_config(config, shape)


def empty(device: Device) -> None:
    """Give memory back to the device."""
    if device.torch_device.type == "cuda":
        torch.cuda.empty_cache()


class Work:
    """One block.

    Args:
        made: dense parts by shape, filled as they are needed.
    """

    def __init__(
        self, book: Book, device: Device, size: Size, block: Block, ready: planners.Ready, trace_file: Path | None
    ) -> None:
        self.book, self.device, self.size, self.block, self.ready = book, device, size, block, ready
        self.trace_file = trace_file

    def all(self, made: dict[str, Dense]) -> None:
        """Build the store and run every group."""
        block, book = self.block, self.book
        engine: list[ForcedEngine] = []
        needs_s = 0.1 if self.size is SMOKE else 20.0

        def build() -> dict[str, Any]:
            start = time.monotonic()
            place = self.device.torch_device
            dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
            if block.shape not in made:
                made[block.shape] = forced.dense(block.shape, place, dtype)
            dense_s = time.monotonic() - start
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                engine.append(ForcedEngine(made[block.shape], block.bits, self.device, compiled=False))
            store = engine[0].store
            built = {"experts": store.count, "expert_bytes": store.expert_bytes, "host_bytes": store.block.nbytes}
            built["warnings"] = [str(w.message) for w in told if issubclass(w.category, UserWarning)]  # not page-locked
            return built | {"dense_s": dense_s, "store_s": time.monotonic() - start - dense_s}

        book.cells.pop(f"{block.name}/build", None)  # what it makes is not kept by the file
        built = book.cell(f"{block.name}/build", build, needs_s)
        if built is None or not engine:
            for name in block.names():
                book.skip(name, "its engine was not built")
            return
        book.say(
            f"{block.name}: {built['experts']} experts of {built['expert_bytes']:,} bytes, built in "
            f"{built['dense_s'] + built['store_s']:.1f} s"
        )
        with engine[0]:
            self.groups(engine[0])
        empty(self.device)

    def groups(self, engine: ForcedEngine) -> None:
        """Profile, bytes, then the groups."""
        name, book = self.block.name, self.book
        trace = self.trace(SYNTHETIC, "", self.size.warm + self.size.least)
        pace = math.inf if self.device.name == "cuda" else TOY_PACES_GB_S["own"]

        def profile() -> dict[str, Any]:
            compiled = self.ready.is_compiled(forced_profile.ALWAYS)
            found = forced_profile.measure(engine, trace, f"forced-{self.device.name}", pace, self.size.loads, compiled)
            machine = found.pop("machine")
            machine, host = forced_profile.with_host(machine, engine, pace == math.inf)
            return found | {"machine": machine.to_json(), "host": host}

        def own_bytes() -> dict[str, Any]:
            few = self.trace(SYNTHETIC, "", 3)
            wrapped: list[Checked] = []

            def wrap(experts: Any, pool: Any) -> Checked:
                wrapped.append(Checked(experts, pool, engine.store))
                return wrapped[0]

            run = comparable(["speculative:guard=0,trust=0"])[0]
            engine.run(few, run, self.block.groups[0].slots, machine, paced=pace != math.inf, wrap=wrap)
            return {"experts_compared": wrapped[0].compared, "foreign": 0}

        found = book.cell(f"{name}/profile", profile)
        if found is None:
            for cell in self.block.names():
                book.skip(cell, "no profile of this shape")
            return
        stored = found["machine"]
        machine = machine_from(stored["machine"], stored["evidence"], stored["sources"])
        pieces = found["pieces"]
        book.say(
            f"{name}: all resident {found['resident_tpot_s'] * 1e3:.2f} ms a token (a layer's dense part "
            f"{pieces['dense_s'] * 1e6:.0f} us, an expert {pieces['expert_s'] * 1e6:.0f} us, planning "
            f"{pieces['host_s'] * 1e6:.0f} us); link {machine.link.h2d_gb_s:.2f} GB/s + "
            f"{machine.link.h2d_fixed_s * 1e6:.1f} us a chunk; host experts: {found['host']}"
        )
        book.cell(f"{name}/own_bytes", own_bytes)
        for group in self.block.groups:
            broken = f"{self.block.group_name(group)}/group"
            book.guard(broken, lambda g=group: self.group(engine, g, machine, found["resident_tpot_s"]))

    def trace(self, source: str, guesses: str, tokens: int) -> Trace:
        found = source_trace(source, self.block.shape, self.size.trace, self.trace_file)
        return forced.forced_trace(found, spec_of(self.block.shape), tokens, guesses)

    def group(self, engine: ForcedEngine, group: Group, machine: HardwareProfile, resident_s: float) -> None:
        """All cells of a group, and their table."""
        book, name = self.book, self.block.group_name(group)
        runs = comparable([a.policy for a in group.asked])
        demand = comparable([*[a.policy for a in group.asked], "on_demand"])[-1]
        wanted = [f"{name}/{a.name}" for a in group.asked if f"{name}/{a.name}" not in book.cells]
        if book.left_s <= 0:
            for cell in wanted:
                book.skip(cell, "time: none is left to its block")
        if not wanted or book.left_s <= 0:
            return
        try:
            base = self.trace(group.source, group.asked[0].guesses, self.size.warm + self.size.most)
            linked, paced, own = self.linked(group, machine, base, demand, resident_s)
        except UnavailableError as error:
            for one in group.asked:
                book.skip(f"{name}/{one.name}", str(error))
            return
        floor_s = max(resident_s, link_floor_s(base, linked, engine.spec, engine.bits, group.slots, demand))
        measured = int(self.size.cell_s / (2 * floor_s)) - self.size.warm
        tokens = self.size.warm + max(self.size.least, min(self.size.most, measured))
        lru = lru_loads(forced.window(base, 0).head(tokens), linked, engine, group.slots, demand, self.size.warm)
        about = {"own_link_gb_s": own, "link_gb_s": linked.link.h2d_gb_s, "paced": paced, "resident_tpot_s": resident_s}
        for one, run in zip(group.asked, runs, strict=True):
            cell = f"{name}/{one.name}"
            if cell in book.cells:
                continue
            if book.left_s <= 0:
                book.skip(cell, "time: none is left to its block")
                continue
            trace = self.trace(group.source, one.guesses, tokens)
            predicted = predict(trace, linked, engine.spec, engine.bits, group.slots, run, self.size.warm)
            seconds = 1.0 + 1.3 * predicted.get("tpot_s", 4 * floor_s) * tokens
            work = self.one(engine, trace, run, group.slots, linked, paced, predicted, about | {"lru_loads": lru}, one)
            row = book.cell(cell, work, needs_s=seconds if self.size is FULL else 0.0)
            if row:
                book.say(f"{cell}: {told(row)}")

    def linked(
        self, group: Group, machine: HardwareProfile, trace: Trace, demand: Options, resident_s: float
    ) -> tuple[HardwareProfile, bool, float]:
        """The machine with the group's link, whether that is paced, and the link's own GB/s.

        Raises:
            UnavailableError: a pace the link cannot reach.
        """
        real = self.device.name == "cuda"
        own = machine.link.h2d_gb_s
        if group.link == "own":
            return (machine, False, own) if real else (machine, True, own)
        floor_s = 0.0
        if group.link in BALANCE:
            spec, bits = spec_of(self.block.shape), self.block.bits
            at_one = forced_profile.paced(machine, 1.0)
            floor_s = link_floor_s(trace, at_one, spec, bits, group.slots, demand)
            pace = floor_s / (BALANCE[group.link] * resident_s)
        else:
            pace = PACES_GB_S[group.link] if real else TOY_PACES_GB_S[group.link]
        if real and pace > NEAR_OWN * own:
            at_own = (
                "" if not floor_s else f"; at its own speed the floor is {floor_s / own / resident_s:.2f} x compute"
            )
            raise UnavailableError(f"this needs a link of {pace:.1f} GB/s, this one reaches {own:.1f}{at_own}")
        return forced_profile.paced(machine, max(1e-3, pace)), True, own

    def one(
        self,
        engine: ForcedEngine,
        trace: Trace,
        run: Options,
        slots: int,
        machine: HardwareProfile,
        paced: bool,
        predicted: dict[str, Any],
        about: dict[str, Any],
        asked: Asked,
    ) -> Callable[[], dict[str, Any]]:
        """The work of a cell."""

        def work() -> dict[str, Any]:
            compiled = self.ready.is_compiled(asked.policy)
            found = engine.run(trace, run, slots, machine, first=self.size.warm, paced=paced, compiled=compiled)
            return figures(found, engine, predicted, about) | {"guesses": trace.provenance["guesses"]}

        return work


def predict(
    trace: Trace, machine: HardwareProfile, spec: ModelSpec, bits: int, slots: int, run: Options, first: int
) -> dict[str, Any]:
    """What the simulator says of the passes from ``first`` on; ``error`` alone where it cannot."""
    log = io.StringIO()
    try:
        ledger = replay(Setting(trace, machine, spec, bits, slots, run), log)
        copied = ledger.phases[DECODE].h2d_bytes
        if first:
            before = replay(Setting(trace.head(first), machine, spec, bits, slots, run))
            copied -= before.phases[DECODE].h2d_bytes
    except Exception as error:  # a prediction that fails must not cost the measurement; it is kept in the cell
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "tpot_s": float(np.mean(ledger.decode_ns[first:])) / 1e9,
        "copied": copied / spec.expert_bytes(bits),
        "log": log.getvalue(),
    }


def link_floor_s(
    trace: Trace, machine: HardwareProfile, spec: ModelSpec, bits: int, slots: int, run: Options, first: int = 0
) -> float:
    """Seconds a token that the fewest loads of any schedule take (`sim.bounds`), from decode token ``first`` on."""
    part = forced.window(trace, first)
    landing = run.landing_slots if run.prefetches else 0
    loads = fewest_loads(part, group_sizes(spec, run, slots), landing)
    size = spec.expert_bytes(bits)
    return loads * copy_ns(size, machine.link.h2d_gb_s, machine.link.h2d_fixed_s) / (part.num_tokens - 1) / 1e9


def lru_loads(
    trace: Trace, machine: HardwareProfile, engine: ForcedEngine, slots: int, run: Options, first: int
) -> int:
    """Loads of on-demand LRU with as many slots in all."""
    return round(predict(trace, machine, engine.spec, engine.bits, slots, run, first).get("copied", 0))


def figures(run: Run, engine: ForcedEngine, predicted: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """A cell's figures, MEASURED; the simulator's beside them."""
    counts, spec = run.counts, engine.spec
    times = np.array(run.ledger.decode_ns[run.first :]) / 1e9
    half = len(times) // 2
    timing = Timing(run.machine, spec, engine.bits, run.options)
    load_s = timing.chunks.total_ns() / 1e9
    hosted = hasattr(run.options.miss_rule.module, "loads")
    floor_s = link_floor_s(run.trace, run.machine, spec, engine.bits, run.slots, run.options, run.first)
    joint_s = None if hosted else max(about["resident_tpot_s"], floor_s)
    divergence = first_divergence(run.log, predicted["log"]) if "log" in predicted else None
    simulated_s = predicted.get("tpot_s")
    return about | {
        "policy": run.options.text,
        "evidence": "MEASURED",
        "routing": run.trace.routing,
        "bits": engine.bits,
        "slots": run.slots,
        "landing_slots": run.options.landing_slots,
        "tokens": len(times),
        "tpot_s": run.tpot_s,
        "tokens_per_s": 1 / run.tpot_s,
        "itl_p50_s": float(np.median(times)),
        "itl_p99_s": float(np.quantile(times, 0.99)),
        "halves_s": [float(times[:half].mean()), float(times[half:].mean())],
        "loads": run.loads,
        "copied": run.copied,
        "copied_of_lru": run.copied / about["lru_loads"] if about["lru_loads"] else None,
        "own_loads_s": run.copied * load_s / len(times),
        "link_floor_s": floor_s,
        "joint_floor_s": joint_s,
        "floor_share": joint_s / run.tpot_s if joint_s else None,
        "link_busy": counts.link_busy_ns / max(1, counts.elapsed_ns),
        "stall_s": (counts.stall_miss_ns + counts.stall_late_ns) / max(1, counts.passes) / 1e9,
        "plan_s": counts.latency_ns / max(1, counts.passes) / 1e9,
        **{k: getattr(counts, k) for k in (
            "accesses", "hits", "late", "misses", "host_computed", "demand_loads", "prefetch_loads", "prefetch_used",
            "retracted",
        )},
        "planner": run.planner,
        "simulated_tpot_s": simulated_s,
        "simulated_error": simulated_s / run.tpot_s - 1 if simulated_s else predicted.get("error"),
        "simulated_copied": predicted.get("copied"),
        "load_log_equal": divergence is None if "log" in predicted else None,
        "first_divergence": divergence,
    }  # fmt: skip


def told(row: dict[str, Any]) -> str:
    """A cell in words."""
    error = row["simulated_error"]
    simulated = f"simulated {100 * error:+.1f} %" if isinstance(error, float) else f"not simulated ({error})"
    floor = "" if row["floor_share"] is None else f", floor share {row['floor_share']:.2f}"
    equal = {True: "logs equal", False: "LOGS DIFFER", None: "logs not compared"}[row["load_log_equal"]]
    of_lru = "" if row["copied_of_lru"] is None else f" ({row['copied_of_lru']:.2f} of LRU's bytes)"
    return (
        f"{row['tpot_s'] * 1e3:.2f} ms a token, {simulated}{floor}, link busy {row['link_busy']:.2f}, "
        f"{row['loads']} loads{of_lru}, {equal}"
    )


def by_group(book: Book) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Done cells of policies by group name, then policy (with guesses)."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for name, cell in book.cells.items():
        group, _, policy = name.rpartition("/")
        if name.startswith("forced/") and cell["state"] == "done" and "tpot_s" in cell["result"]:
            groups.setdefault(group, {})[policy] = cell["result"]
    yield from groups.items()
