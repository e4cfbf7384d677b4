"""Measure this machine for one model: link, dense part, lookahead gates, experts, head, host time, waits.

    python -m runtime.calibrate --out profile.json

Runs the engine itself on prompts of its own and fits laws fixed + slope x quantity to what each step took; prompts of
other lengths, which nothing is fitted to, tell the error. Nothing else may run beside it: that is checked first.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean as mean
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from runtime import models, provenance
from runtime.copier import Copier, CopierError, Request
from runtime.devices import Device, names, open_device
from runtime.engine import Engine, paced
from runtime.experts import Waited
from runtime.host_calibration import host_figures
from runtime.host_experts import computes_on_host
from runtime.laws import error, fitted, grouped, law, predicted, residuals, trimmed_mean
from runtime.observe import Spans
from runtime.steadiness import Control, uncollected, undisturbed, usual
from runtime.store import ExpertRows, HostStore, SlotPool
from sim.machine import HardwareProfile, LinkProfile, Operators
from sim.spec import Options, options
from traces.cli import Parser

DEFAULT_LINK_GB_S = 0.05
BUSY_SHARE = 0.1  # of the cores, used by others, above which nothing is measured, or the profile is labelled
LOOK_S = 1.0  # how long others are watched beforehand
CONTEXT = 200  # tokens of the longest prompt
PAUSES_MS = (0.3, 1.0, 3.0, 10.0)  # waits between visits
HELD_OUT_PAUSE_MS = 2.0
TOKENS = 32  # of each engine run
POLICIES = ("on_demand", "speculative")
TEMPERATURE = 0.8  # of the sampling, whose time is part of the head
LARGE_EXPERT = 16 << 20  # bytes
SERIAL_COPIES = 100
LINK_S = 1.0  # of copies of whole experts on a paced link, at most
LINK_COPIES = 200  # of each size
LINK_PIECES = (16, 8, 4, 2, 1)  # an expert in so many chunks
MAPE = 0.05  # held-out error above which an operator is named
PROMPT = (
    "import random\n\n\ndef shuffle(deck):\n    for i in range(len(deck) - 1, 0, -1):\n"
    "        j = random.randint(0, i)\n"
    "        deck[i], deck[j] = deck[j], deck[i]\n    return deck\n"
)


class OtherWork:
    """Share of all cores that other processes used since it was made; None where the system does not tell."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        busy = (sum(fields) - fields[3] - fields[4]) / ticks
        own = os.times()
        return busy, own.user + own.system + own.children_user + own.children_system, time.monotonic()

    def share(self) -> float | None:
        """Ask when our own children have ended; those that still run count as others."""
        end = self._read()
        if self._start is None or end is None:
            return None
        wall = (end[2] - self._start[2]) * (os.cpu_count() or 1)
        return max(0.0, (end[0] - self._start[0]) - (end[1] - self._start[1])) / wall


def check_idle(allow_busy: bool = False) -> None:
    """Watch for a second what others do.

    Raises:
        ValueError: they use more than `BUSY_SHARE` of the processor, and that is not allowed.
    """
    others = OtherWork()
    time.sleep(LOOK_S)
    share = others.share()
    if share is not None and share > BUSY_SHARE and not allow_busy:
        raise ValueError(
            f"other processes use {share:.0%} of the processor; at most {BUSY_SHARE:.0%} is allowed: end them, or "
            "take a profile labelled as of a busy machine with --allow-busy"
        )


class PausingEngine(Engine):
    """Waits after every visit of a decode pass for a load that nobody needs, as it would wait for an expert.

    Attributes:
        link: the copier that brings it, into slots of its own; None: no waits.
    """

    link: Copier | None = None
    _loads = 0

    def visit(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = super().visit(layer, hidden, ids, weights)
        if self.link is not None and len(ids) == 1:
            self.link.apply(demand=[Request(self._loads, self._loads % self.store.count, self._loads % self.slots)])
            self._loads += 1
            self.link.wait()
            self._mark = time.monotonic_ns()
        return result


class Seen(NamedTuple):
    """Spans of one pass, and the number of the look at the control before it."""

    spans: Spans
    look: int


@dataclass
class Measured:
    """Passes of engine runs: those that laws are fitted to, and those held out.

    Attributes:
        resident, held_out: by bits, every expert in a slot.
        pauses: by pause in ns, the same at the first width.
        policies: by SPEC, half of the experts in slots; ``gates`` by lookahead distance.
    """

    resident: dict[int, list[list[Seen]]] = field(default_factory=dict)
    held_out: dict[int, list[list[Seen]]] = field(default_factory=dict)
    pauses: dict[int, list[list[Seen]]] = field(default_factory=dict)
    policies: dict[str, list[list[Seen]]] = field(default_factory=dict)
    policies_held_out: dict[str, list[list[Seen]]] = field(default_factory=dict)
    gates: dict[int, list[list[Seen]]] = field(default_factory=dict)
    gates_held_out: dict[int, list[list[Seen]]] = field(default_factory=dict)


class Undisturbed(NamedTuple):
    """`Measured` without the passes in which something outside slowed the machine down."""

    resident: dict[int, list[Spans]]
    held_out: dict[int, list[Spans]]
    pauses: dict[int, list[Spans]]
    policies: dict[str, list[Spans]]
    policies_held_out: dict[str, list[Spans]]
    gates: dict[int, list[Spans]]
    gates_held_out: dict[int, list[Spans]]


class Calibration:
    """Engine runs with spans on, in rounds, and the laws fitted to all of them.

    Args:
        model_dir, bits: what is measured.
        tokens: decode tokens of each run.
        policies: SPECs whose host time is measured.
        gb_s: pace of the link where policies run.
        device: where.
        context: tokens of the longest prompt.
        control: looked at before and after every pass, also by others.
        stores: expert stores by bits, to be shared; built (and owned) where they are missing.

    Raises:
        ModelError, StoreError, SpecError: inputs that cannot be used.
    """

    def __init__(
        self,
        model_dir: Path,
        bits: Sequence[int],
        tokens: int,
        *,
        policies: Sequence[str] = POLICIES,
        gb_s: float = DEFAULT_LINK_GB_S,
        device: str = "cpu",
        context: int = CONTEXT,
        control: Control | None = None,
        stores: dict[int, HostStore] | None = None,
    ) -> None:
        self.model_dir = model_dir
        self.spec = models.spec_of(model_dir)
        self.tokens = tokens
        self.device = device
        self.gb_s = gb_s
        self.lengths = (8, 8 + context // 4, context)  # of the prompts that laws are fitted to
        self.held_out = (24, context * 3 // 5)  # and of those that test them
        self.policies = {text: options(text) for text in dict.fromkeys((*POLICIES, *policies))}
        link = LinkProfile(gb_s, 0.0, gb_s, 0.0, gb_s)
        self.rough = HardwareProfile(
            "rough",
            0,
            0,
            link,
            memory_gb_s=8.0,
            tflops=0.05,
            layer_fixed_s=5e-4,
            expert_fixed_s=5e-5,
            host_s=1e-4,
            host_memory_gb_s=4.0,
        )
        self.rounds = 0
        self.control = control or Control()
        self.measured = Measured()
        self._owned: list[HostStore] = []
        self.stores: dict[int, HostStore] = {}
        for width in bits:
            store = (stores or {}).get(width)
            if store is None:
                store = HostStore.build(model_dir, self.spec, width, order=open_device(device).order)
                self._owned.append(store)
            self.stores[width] = store

    @property
    def widths(self) -> list[int]:
        return list(self.stores)

    def engine(self, run: Options, bits: int, slots: int, gb_s: float) -> PausingEngine:
        """An engine that has warmed up."""
        engine = PausingEngine(
            self.model_dir,
            bits=bits,
            slots=slots,
            options=run,
            machine=paced(self.rough, gb_s),
            store=self.stores[bits],
            record=0,
            compiled=True,
            device=self.device,
            paced=self.device == "cpu",
        )
        if self.device != "cpu":
            engine.experts = Waited(engine.experts, engine.device)  # type: ignore[assignment]
        try:
            for _ in engine.generate(engine.tokenizer.encode(PROMPT), 6):
                pass
        except BaseException:
            engine.close()
            raise
        return engine

    def spans(self, engine: PausingEngine, length: int, tokens: int) -> list[Seen]:
        """What the passes of one prompt of ``length`` tokens and of ``tokens`` new ones took."""
        ids = engine.tokenizer.encode(PROMPT)
        found = []
        engine.spans = Spans()
        with uncollected():
            self.control.begin()
            for _ in engine.generate((ids * (length // len(ids) + 1))[:length], tokens, temperature=TEMPERATURE):
                self.control.look()
                found.append(Seen(engine.spans, len(self.control.looks) - 2))
                engine.spans = Spans()
        return found

    def round(self, policies: bool = True) -> None:
        """Measure everything once more; without ``policies`` no other than on_demand, nor gates."""
        found = self.measured
        whole, half = self.spec.num_experts, max(self.spec.top_k, self.spec.num_experts // 2)
        fast = 10.0 if self.device == "cpu" else self.gb_s
        for bits in self.widths:
            with self.engine(self.policies["on_demand"], bits, whole, fast) as engine:
                for length in self.lengths:
                    found.resident.setdefault(bits, []).append(self.spans(engine, length, self.tokens))
                for length in self.held_out:
                    found.held_out.setdefault(bits, []).append(self.spans(engine, length, self.tokens // 2 + 2))
                if bits == self.widths[0] and self.device == "cpu":
                    self._pause(engine)
        for text, run in self.policies.items():
            if not policies and text != "on_demand":
                continue
            with self.engine(run, self.widths[0], half, self.gb_s) as engine:
                found.policies.setdefault(text, []).append(self.spans(engine, 24, self.tokens))
                found.policies_held_out.setdefault(text, []).append(self.spans(engine, 40, self.tokens // 2 + 2))
        for distance in range(1, min(4, self.spec.num_layers - 1) + 1) if policies else ():
            run = options(f"speculative:lookahead={distance},guard=0,trust=0")  # every visit looks ahead
            with self.engine(run, self.widths[0], half, 4 * self.gb_s) as engine:
                found.gates.setdefault(distance, []).append(self.spans(engine, 24, self.tokens // 2 + 2))
                found.gates_held_out.setdefault(distance, []).append(self.spans(engine, 40, self.tokens // 2 + 2))
        self.rounds += 1

    def _pause(self, engine: PausingEngine) -> None:
        store = self.stores[engine.bits]
        chunk = options("on_demand").chunk_size(store.expert_bytes)
        for ms in (0.0, *PAUSES_MS, HELD_OUT_PAUSE_MS):
            tokens = max(6, min(self.tokens, round(48 / max(1.0, ms))))
            with ExitStack() as ends:
                if ms:
                    pool = ends.enter_context(SlotPool(engine.slots, store.expert_bytes))
                    pace = store.expert_bytes / ms * 1e3
                    engine.link = ends.enter_context(
                        Copier(store, pool, bytes_per_s=pace, fixed_s=0.0, chunk_bytes=chunk)
                    )
                self.measured.pauses.setdefault(round(ms * 1e6), []).append(self.spans(engine, 24, tokens))
                engine.link = None

    def undisturbed(self) -> Undisturbed:
        """The spans of passes that were; of a kind where none was, all."""
        looks = self.control.looks
        kept = undisturbed(looks, usual(looks))
        found: dict[str, dict[Any, list[Spans]]] = {}
        for kind in dataclasses.fields(self.measured):
            runs: dict[Any, list[list[Seen]]] = getattr(self.measured, kind.name)
            seen = {key: list(itertools.chain(*of_key)) for key, of_key in runs.items()}
            found[kind.name] = {key: _quiet(of_key, kept) for key, of_key in seen.items()}
        return Undisturbed(**found)

    # --- laws -------------------------------------------------------------------------------------------------

    def operators(self) -> tuple[Operators, dict[str, float | None]]:
        """All laws of this model, and their errors on what was held out, by operator."""
        found = self.undisturbed()
        errors: dict[str, float | None] = {}
        expert: dict[str, tuple[float, float]] = {}
        ratios: list[tuple[tuple[int, ...], int]] = []
        for bits in self.widths:
            first = fitted(_experts(found.resident[bits]))
            expert[str(bits)] = (first[0], first[1])
            errors[f"expert at {bits} bits"] = error(_experts(found.held_out[bits]), first)
            ratios += [((), round(ns / predicted(first, q))) for q, ns in _experts(found.resident[bits])]
        spans = [s for by_bits in found.resident.values() for s in by_bits]
        held = [s for by_bits in found.held_out.values() for s in by_bits]
        dense = fitted(_dense(spans))
        errors["dense part"] = error(_dense(held), dense)
        head = law((q, v, count**0.5) for q, v, count in _heads(spans, dense))
        wrong = [(abs(predicted(head, q) / v - 1), count) for q, v, count in _heads(held, dense)]
        errors["head"] = sum(e * count for e, count in wrong) / max(1, sum(count for _, count in wrong))
        host = {text: mean(_host(runs)) for text, runs in found.policies.items()}
        for text, runs in found.policies_held_out.items():
            errors[f"host, {text}"] = abs(host[text] / mean(_host(runs)) - 1)
        host["default"] = host["on_demand"]
        gates = tuple(mean(_gates(found.gates[d])) for d in sorted(found.gates))
        for d, runs in found.gates_held_out.items():
            errors[f"gates, {d} ahead"] = abs(gates[d - 1] / mean(_gates(runs)) - 1)
        cooling, errors["after a wait"] = self._cooling()
        spread = {
            "dense": residuals(_dense(spans), dense),
            "expert": residuals(ratios, (1.0,)),
            "host": residuals([((), ns) for ns in _host_ns(found.policies["on_demand"])], (host["on_demand"],)),
        }
        reach = {"tokens": max(n for s in spans for _, n, _, _ in s.dense), "context": max(map(_context, spans))}
        laws = Operators(
            dense=(dense[0], dense[1], dense[2]),
            expert=expert,
            head=(head[0], head[1]),
            gates=gates,
            host_s=host,
            cooling=cooling,
            residuals=spread,
            reach=reach,
            control_s=usual(self.control.looks),
        )
        return laws, errors

    def _cooling(self) -> tuple[tuple[float, float, float], float | None]:
        """How much longer a visit takes after a wait: fixed, per second of it, at most; the error on a visit."""
        pauses = self.undisturbed().pauses
        if not pauses:
            return (0.0, 0.0, 0.0), None
        visit = {pause / 1e9: _visit_s(runs, self.spec.top_k) for pause, runs in pauses.items()}
        extra = {pause: max(1e-9, seconds - visit[0.0]) for pause, seconds in visit.items() if pause}
        held, longest = HELD_OUT_PAUSE_MS / 1e3, max(extra)
        fitted_to = {pause: seconds for pause, seconds in extra.items() if pause not in (held, longest)}
        once, share = law(((pause,), seconds, seconds) for pause, seconds in fitted_to.items())  # absolute errors
        most = max(extra.values())
        return (once, share, most), abs((visit[0.0] + min(most, once + share * held)) / visit[held] - 1)

    def spread(self) -> float | None:
        """How far rounds differ in a visit with every expert resident: (largest - smallest) / mean; None for one."""
        if self.rounds < 2:
            return None
        looks = self.control.looks
        kept = undisturbed(looks, usual(looks))
        runs, each = self.measured.resident[self.widths[0]], len(self.lengths)
        visits = []
        for i in range(0, len(runs), each):
            spans = [s.spans for seen in runs[i : i + each] for s in seen if kept[s.look]]
            if any(n == 1 for s in spans for n, _ in s.host):
                visits.append(_visit_s(spans, self.spec.top_k))
        return (max(visits) - min(visits)) / float(np.mean(visits))

    def kept_share(self) -> float:
        """Share of passes during which nothing outside slowed the machine down."""
        looks = self.control.looks
        kept = undisturbed(looks, usual(looks))
        return sum(kept) / len(kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for store in self._owned:
            store.close()


def _quiet(seen: Sequence[Seen], kept: Sequence[bool]) -> list[Spans]:
    """The undisturbed passes; of passes with as many tokens, among which none was, all."""
    groups: dict[int, list[Seen]] = {}
    for one in seen:
        groups.setdefault(one.spans.dense[0][1], []).append(one)
    return [one.spans for group in groups.values() for one in ([x for x in group if kept[x.look]] or group)]


def _experts(runs: Sequence[Spans]) -> list[tuple[tuple[int, ...], int]]:
    return [((n,), ns) for s in runs for n, ns in s.expert]


def _dense(runs: Sequence[Spans]) -> list[tuple[tuple[int, ...], int]]:
    """By tokens and context (in steps of 16); without the first layer, which follows the head."""
    return [((n, c // 16 * 16 + 8 + n), ns) for s in runs for layer, n, c, ns in s.dense if layer]


def _heads(runs: Sequence[Spans], dense: Sequence[float]) -> list[tuple[tuple[int, ...], float, int]]:
    """Head by tokens, with what the first layer takes beyond the dense law: embedding, masks."""
    extra = [
        ((n,), ns - round(1e9 * predicted(dense, (n, c + n)))) for s in runs for layer, n, c, ns in s.dense if not layer
    ]
    first = {q: seconds for q, seconds, _ in grouped(extra)}
    heads = grouped(((n,), ns) for s in runs for n, ns in s.head)
    return [(q, max(1e-9, seconds + first.get(q, 0.0)), count) for q, seconds, count in heads]


def _host_ns(runs: Sequence[Spans]) -> list[int]:
    return [ns for s in runs for n, ns in s.host if n == 1]


def _host(runs: Sequence[Spans]) -> list[float]:
    return [ns / 1e9 for ns in _host_ns(runs)]


def _gates(runs: Sequence[Spans]) -> list[float]:
    return [ns / 1e9 for s in runs for n, ns in s.gates if n == 1]


def _context(spans: Spans) -> int:
    return max(n + c for _, n, c, _ in spans.dense)


def _visit_s(runs: Sequence[Spans], top_k: int) -> float:
    """A decode visit, everything resident."""
    dense = [ns / 1e9 for s in runs for layer, n, _, ns in s.dense if layer and n == 1]
    expert = [ns / 1e9 for s in runs for n, ns in s.expert if n == 1]
    return mean(dense) + mean(_host(runs)) + top_k * mean(expert)


# --- the link -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinkLaws:
    """MEASURED: fixed seconds and decimal GB/s of each direction's copies, alone, together, and beside computing.

    ``error`` is of the H2D law at sizes it was not fitted to.
    """

    h2d: tuple[float, float]
    d2h: tuple[float, float]
    h2d_duplex_gb_s: float
    h2d_computing_gb_s: float
    error: float
    copies: int


def _chunk_seconds(
    device: Device, store: ExpertRows, pace: float, chunk: int, count: int, h2d: bool, d2h: bool, busy: bool = False
) -> tuple[float, float]:
    """Seconds of one chunk in each direction (0: not copied), of ``count`` in a row that wait for nothing."""
    pieces = -(-store.expert_bytes // chunk)
    loads = max(1, -(-count // pieces))
    matrix = torch.ones(256, 256, device=device.torch_device)
    with (
        closing(device.slots(4, store.expert_bytes)) as pool,
        closing(
            device.copier(
                store,
                pool,
                bytes_per_s=pace,
                fixed_s=0.0,
                chunk_bytes=chunk,
                write_back_bytes_per_s=pace if d2h else None,
            )
        ) as copier,
    ):
        requests = [Request(i, i % store.count, i % 4) for i in range(loads if h2d else 0)]
        start = time.monotonic_ns()
        copier.apply(demand=requests, write_back=[i % 4 for i in range(loads if d2h else 0)])
        end = start
        for _ in requests:
            if busy:
                matrix @ matrix
            end = copier.wait().end_ns
        there = (end - start) / 1e9 / (loads * pieces) if h2d else 0.0
        copier.drain(60 + 2 * loads * store.expert_bytes / pace)
        back = (time.monotonic_ns() - start) / 1e9 / (loads * pieces) if d2h else 0.0
        return there, back


def link_laws(device: Device, store: ExpertRows, pace: float, copies: int = LINK_COPIES) -> LinkLaws:
    """Copies of five sizes, ``copies`` of each, each direction alone and both, with the processor idle and computing.

    ``pace`` in bytes/s; infinite: the link's own speed. Fixed times count per chunk.
    """
    sizes = [-(-store.expert_bytes // pieces) for pieces in LINK_PIECES]
    copies = max(16, min(copies, round(LINK_S * pace / store.expert_bytes))) if pace < float("inf") else copies
    runs = [(size, _chunk_seconds(device, store, pace, size, copies, True, False)[0]) for size in sizes]
    backs = [(size, _chunk_seconds(device, store, pace, size, copies, False, True)[1]) for size in sizes]
    fixed, slope = law(((size,), s, 1.0) for size, s in runs[::2])
    back_fixed, back_slope = law(((size,), s, 1.0) for size, s in backs)
    if slope <= 0 or back_slope <= 0:
        raise ValueError("the link takes no longer for larger copies; nothing can be fitted to that: measure again")
    wrong = [abs((fixed + slope * size) / s - 1) for size, s in runs[1::2]]
    whole = sizes[-1]
    together = _chunk_seconds(device, store, pace, whole, copies, True, True)[0]
    computing = _chunk_seconds(device, store, pace, whole, copies, True, False, busy=True)[0]
    return LinkLaws(
        (fixed, 1e-9 / slope),
        (back_fixed, 1e-9 / back_slope),
        min(whole / max(1e-12, together - fixed) / 1e9, 1e-9 / slope),
        whole / computing / 1e9,
        max(wrong),
        copies * (len(sizes) * 2 + 2),
    )


def paced_link(store: ExpertRows, gb_s: float, seconds: float = 1.0, most: int = 64) -> tuple[float, float]:
    """Measured decimal GB/s of paced copies in bursts, and seconds from a load's end until a waiter knows of it."""
    size = store.expert_bytes
    count = max(8, min(most, round(seconds * gb_s * 1e9 / size)))
    chunk = options("on_demand").chunk_size(size)
    with (
        SlotPool(4, size) as pool,
        Copier(store, pool, bytes_per_s=gb_s * 1e9, fixed_s=0.0, chunk_bytes=chunk) as copier,
    ):
        rates, waits = [], []
        for burst in range(3):
            start = time.monotonic_ns()
            loads = [Request(burst * count + i, i % store.count, i % 4) for i in range(count)]
            copier.apply(demand=loads)
            for _ in loads:
                end_ns = copier.wait().end_ns
                waits.append((time.monotonic_ns() - end_ns) / 1e9)
            rates.append(count * size / (end_ns - start))
        return float(np.median(rates)), trimmed_mean(waits)


def serial_s(store: ExpertRows, gb_s: float) -> float:
    """Seconds from the end of copies that are waited for one by one until the waiter knows of it."""
    chunk = options("on_demand").chunk_size(store.expert_bytes)
    with (
        SlotPool(4, store.expert_bytes) as pool,
        Copier(store, pool, bytes_per_s=gb_s * 1e9, fixed_s=0.0, chunk_bytes=chunk) as copier,
    ):
        found = []
        for i in range(SERIAL_COPIES):
            start = time.monotonic_ns()
            copier.apply(demand=[Request(i, i % store.count, i % 4)])
            copier.drain()
            found.append((time.monotonic_ns() - start) / 1e9 - store.expert_bytes / (gb_s * 1e9))
            copier.arrived()
        return trimmed_mean(found)


def memory_gb_s(device: Device) -> float:
    """Bytes read and written per second by a large copy on the device (a processor's: on one thread), decimal GB/s."""
    source = torch.ones(64_000_000, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        device.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * len(source) / min(times) / 1e9


def tflops(device: Device) -> float:
    """A matrix product on the device: bfloat16 of 4096; on a processor float32 of 768, on one thread."""
    cpu = device.torch_device.type == "cpu"
    size = 768 if cpu else 4096
    a = torch.ones(size, size, dtype=torch.float32 if cpu else torch.bfloat16, device=device.torch_device)
    times = []
    for _ in range(5):
        device.synchronize()
        start = time.perf_counter()
        a @ a
        device.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e12


# --- the profile --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A profile, and how well its laws say what they were not fitted to.

    Attributes:
        errors: held-out error (MAPE) by operator; None where nothing was held out.
        spread: of a resident visit over the rounds.
        kept_share: of passes that nothing outside disturbed; the others count nowhere.
    """

    profile: HardwareProfile
    errors: dict[str, float | None]
    spread: float | None
    kept_share: float


def profile_of(work: Calibration, others: OtherWork, name: str) -> Result:
    """The MEASURED profile of what a calibration has measured so far; measures the link now."""
    laws, errors = work.operators()
    first = next(iter(work.stores.values()))
    device = open_device(work.device)
    stated = work.device == "cpu"
    if stated:
        link = link_laws(device, first, work.gb_s * 1e9)
    else:  # copies as large as real experts: of small ones the bytes take no time beside the fixed cost
        with ExpertRows(8, max(first.expert_bytes, LARGE_EXPERT)) as rows, device.hold(rows):
            link = link_laws(device, rows, float("inf"))
    _, wait_s = paced_link(first, work.gb_s) if work.device == "cpu" else (0.0, 0.0)
    serial = serial_s(first, 4 * work.gb_s) if work.device == "cpu" else 0.0
    memory, arithmetic = memory_gb_s(device), tflops(device)
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    share = others.share()
    made = f"{provenance.machine()}, commit {provenance.commit()}"
    busy = "not known" if share is None else f"{share:.0%} of the cores"
    measured = f"measured: {made}; used by other processes meanwhile: {busy}"
    errors["link"] = link.error
    found = LinkProfile(work.gb_s, 0.0, work.gb_s, 0.0, work.gb_s)
    reached = (
        f"copies of five sizes reached {link.h2d[1]:.5g} GB/s to the device, {link.d2h[1]:.5g} back, "
        f"{link.h2d_duplex_gb_s:.5g} while both copy, {link.h2d_computing_gb_s:.5g} beside computing"
    )
    if not stated:
        found = LinkProfile(link.h2d[1], link.h2d[0], link.d2h[1], link.d2h[0], link.h2d_duplex_gb_s)
    sources = {
        "link.h2d_gb_s": f"stated: the copier's pace; {reached}" if stated else f"{measured}; {reached}",
        "link.h2d_fixed_s": "stated: paced copies have no fixed cost" if stated else measured,
        "link.d2h_gb_s": "stated: as h2d" if stated else measured,
        "link.d2h_fixed_s": "stated: as h2d" if stated else measured,
        "link.h2d_duplex_gb_s": "stated: as h2d" if stated else measured,
        "memory_gb_s": measured + "; a 64 MB copy, bytes read and written",
        "tflops": measured + "; a matrix product",
        "wake_s": measured + "; from the end of a load until the waiting engine knows of it, mean",
        "serial_s": measured + "; from the end of a copy that is waited for until that is known, mean",
        "host_s": measured + "; planning and bookkeeping of one visit, on_demand",
        "operators": f"{measured}; engine runs of {work.tokens} tokens in {work.rounds} rounds, of these what nothing "
        "outside disturbed; means, least squares",
        "vram_gb": "the device is the host's memory",
        "host_gb": "the system's figure",
    }
    vram_bytes = host_bytes
    if not stated:
        sources |= dict.fromkeys(("wake_s", "serial_s"), "not measured on this device: 0")
        sources["vram_gb"] = "the driver's figure"
        vram_bytes = torch.cuda.get_device_properties(device.torch_device).total_memory
    idle = share is not None and share <= BUSY_SHARE and work.kept_share() >= 0.5
    profile = HardwareProfile(
        name=name,
        vram_gb=round(vram_bytes / 1e9, 1),
        host_gb=round(host_bytes / 1e9, 1),
        link=found,
        memory_gb_s=memory,
        tflops=arithmetic,
        host_s=laws.host_s["on_demand"],
        wake_s=wait_s,
        serial_s=serial,
        evidence="MEASURED" if idle else "MEASURED (busy machine)",
        operators={work.spec.name: laws},
        sources=sources,
    )
    if any(map(computes_on_host, work.policies.values())):
        profile = host_figures(work.stores, device, link=found).into(profile, work.spec)
    return Result(profile, errors, work.spread(), work.kept_share())


def calibrate(
    model_dir: Path,
    bits: Sequence[int],
    *,
    gb_s: float = DEFAULT_LINK_GB_S,
    tokens: int = TOKENS,
    rounds: int = 2,
    policies: Sequence[str] = POLICIES,
    name: str = "cpu",
    device: str = "cpu",
    context: int = CONTEXT,
) -> Result:
    """A MEASURED profile of this machine for this model, its link paced to ``gb_s``.

    Raises:
        ModelError, StoreError, SpecError: inputs that cannot be used.
    """
    others = OtherWork()
    with Calibration(model_dir, bits, tokens, policies=policies, gb_s=gb_s, device=device, context=context) as work:
        for _ in range(rounds):
            work.round()
        return profile_of(work, others, name)


def save(profile: HardwareProfile, path: Path) -> None:
    """Write a profile file, complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(profile.to_json(), indent=2) + "\n")
    os.replace(temporary, path)


def lines(result: Result) -> Iterator[str]:
    """What was found, for people."""
    profile = result.profile
    laws = next(iter(profile.operators.values()))
    yield f"{profile.name}, {profile.evidence}: {profile.sources['operators']}"
    yield f"dense part of a layer   {laws.dense[0] * 1e6:8.1f} us + {laws.dense[2] * 1e9:.1f} ns per token of context"
    for width, (fixed, slope) in laws.expert.items():
        one = (fixed + slope) * 1e6
        yield f"expert at {width:>2} bits       {one:8.1f} us for one token, {slope * 1e6:.2f} us each"
    yield f"head and embedding      {(laws.head[0] + laws.head[1]) * 1e6:8.1f} us"
    yield "lookahead gates         " + ", ".join(f"d={d} {s * 1e6:.1f} us" for d, s in enumerate(laws.gates, 1))
    yield "host, per visit         " + ", ".join(f"{k} {v * 1e6:.1f} us" for k, v in laws.host_s.items())
    yield f"arrival notice          {profile.wake_s * 1e6:8.1f} us, of serial copies {profile.serial_s * 1e6:.1f} us"
    yield f"link                    {profile.sources['link.h2d_gb_s']}"
    yield (
        f"after a wait            a visit takes {laws.cooling[0] * 1e6:.1f} us and {laws.cooling[1]:.1%} of the wait "
        f"longer, at most {laws.cooling[2] * 1e6:.0f} us"
    )
    known = {k: e for k, e in result.errors.items() if e is not None}
    yield "error on what was held out: " + ", ".join(f"{k} {e:.1%}" for k, e in known.items())
    worse = [k for k, e in known.items() if e > MAPE]
    yield f"above {MAPE:.0%}: {', '.join(worse)}" if worse else f"none above {MAPE:.0%}"
    if result.spread is not None:
        yield f"rounds differ by {result.spread:.1%}"
    undisturbed_share = f"{result.kept_share:.0%} of the passes were undisturbed; only these count"
    yield f"control {laws.control_s * 1e6:.0f} us; {undisturbed_share}"
    yield f"simulates up to {' and '.join(f'{1.5 * v:.0f} tokens of {k}' for k, v in laws.reach.items())}".replace(
        "tokens of tokens", "tokens in a pass"
    ).replace("tokens of context", "of context")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m runtime.calibrate", description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, default=models.DEMO, metavar="DIR", help="default: the demonstration model")
    p.add_argument("--device", choices=names(), default="cpu", help="where experts are computed (default %(default)s)")
    p.add_argument("--bits", type=int, choices=(16, 8, 4, 3, 2), action="append", help="repeatable (default 4)")
    p.add_argument(
        "--policy",
        action="append",
        metavar="SPEC",
        help=f"whose host time is measured too, repeatable (always: {', '.join(POLICIES)})",
    )
    p.add_argument(
        "--link-gb-s", type=float, default=DEFAULT_LINK_GB_S, metavar="X", help="pace of the link (default %(default)s)"
    )
    p.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help="decode tokens of each run (default %(default)s)"
    )
    p.add_argument(
        "--rounds", type=int, default=2, metavar="N", help="everything is measured N times (default %(default)s)"
    )
    p.add_argument("--context", type=int, default=CONTEXT, metavar="N", help="longest prompt (default %(default)s)")
    p.add_argument("--allow-busy", action="store_true", help="measure although others use the processor, and say so")
    p.add_argument("--name", default="cpu", help="name of the profile (default %(default)s)")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the profile, a .json file")
    return p


def main() -> int:
    args = parser().parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    try:
        provenance.check_folder("--out", args.out)
        if not 1e-4 <= args.link_gb_s <= 100:
            raise ValueError(f"--link-gb-s is {args.link_gb_s}; it must be 0.0001 to 100")
        for flag, value, least in (
            ("tokens", args.tokens, 8),
            ("rounds", args.rounds, 1),
            ("context", args.context, 32),
        ):
            if value < least:
                raise ValueError(f"--{flag} is {value}; it must be at least {least}")
        check_idle(args.allow_busy)
        result = calibrate(
            args.model,
            args.bits or [4],
            gb_s=args.link_gb_s,
            tokens=args.tokens,
            rounds=args.rounds,
            policies=args.policy or (),
            name=args.name,
            device=args.device,
            context=args.context,
        )
        save(result.profile, args.out)
    except (ValueError, OSError, CopierError) as problem:
        print(f"runtime.calibrate: {problem}", file=sys.stderr)
        return 2
    print("\n".join(lines(result)))
    found = {
        "out": str(args.out),
        "held_out_errors": result.errors,
        "spread": result.spread,
        "kept_share": result.kept_share,
    }
    print(json.dumps(found | dataclasses.asdict(result.profile)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
