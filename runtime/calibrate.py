"""Measure this machine for one model: link, dense part, lookahead gates, experts, head, host time.

    python -m runtime.calibrate --out profile.json

Runs the engine itself on prompts of its own and fits laws fixed + slope x quantity to what each step took. Nothing
else of ours may run beside it; how busy others kept the processor is measured and written into the profile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from transformers.utils import logging as transformers_logging

from runtime import models, provenance
from runtime.copier import Copier, CopierError, Request
from runtime.engine import Engine, paced
from runtime.observe import Spans
from runtime.store import ExpertRows, HostStore, SlotPool
from sim.machine import HardwareProfile, LinkProfile, Operators
from sim.spec import options
from traces.cli import Parser

DEFAULT_LINK_GB_S = 0.05
BUSY_SHARE = 0.1  # of the cores, used by others, above which a profile is labelled
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


def trimmed_mean(samples: Sequence[float]) -> float:
    """Mean without the largest 2 %: waits that the machine, not the step, caused."""
    ordered = np.sort(np.asarray(samples, float))
    return float(ordered[: max(1, int(len(ordered) * 0.98))].mean())


def law(points: Iterable[tuple[tuple[float, ...], float, float]]) -> tuple[float, ...]:
    """Least squares of value = fixed + slopes . quantities over (quantities, value, weight); nothing below zero.

    Errors count relative to the value. A coefficient that would be negative is fixed at 0.
    """
    rows = list(points)
    design = np.array([[1.0, *q] for q, _, _ in rows])
    values = np.array([v for _, v, _ in rows])
    scale = np.array([w for _, _, w in rows]) / values
    free = list(range(design.shape[1]))
    solution: npt.NDArray[np.float64] = np.zeros(design.shape[1])
    while free:
        found, *_ = np.linalg.lstsq(design[:, free] * scale[:, None], values * scale, rcond=None)
        if (found >= 0).all():
            solution[free] = found
            break
        free.pop(int(found.argmin()))
    return tuple(float(x) for x in solution)


def grouped(samples: Iterable[tuple[tuple[int, ...], int]]) -> list[tuple[tuple[int, ...], float, int]]:
    """(quantities, trimmed mean in seconds, count) of samples with equal quantities."""
    groups: dict[tuple[int, ...], list[float]] = {}
    for key, ns in samples:
        groups.setdefault(key, []).append(ns / 1e9)
    return [(key, trimmed_mean(values), len(values)) for key, values in sorted(groups.items())]


QUANTILES = 21


def residuals(points: Iterable[tuple[tuple[int, ...], float]], found: Sequence[float]) -> tuple[float, ...]:
    """Quantiles of measured / predicted of (quantities, seconds) under a law, without the largest 2 %."""
    ratios = np.sort(
        [v / max(1e-12, found[0] + sum(a * b for a, b in zip(found[1:], q, strict=True))) for q, v in points]
    )
    kept = ratios[: max(1, int(len(ratios) * 0.98))]
    return tuple(round(float(x), 5) for x in np.quantile(kept, np.linspace(0, 1, QUANTILES)))


class Calibration:
    """Engine runs with spans on, and the laws fitted to them.

    Args:
        model_dir, bits: what is measured.
        tokens: decode tokens of each run.
    """

    def __init__(self, model_dir: Path, bits: Sequence[int], tokens: int) -> None:
        self.model_dir = model_dir
        self.spec = models.spec_of(model_dir)
        self.tokens = tokens
        link = LinkProfile(DEFAULT_LINK_GB_S, 0.0, DEFAULT_LINK_GB_S, 0.0, DEFAULT_LINK_GB_S)
        self.rough = HardwareProfile(
            "rough", 0, 0, link, memory_gb_s=8.0, tflops=0.05, layer_fixed_s=5e-4, expert_fixed_s=5e-5, host_s=2e-4
        )
        self.stores = {b: HostStore.build(model_dir, self.spec, b) for b in bits}

    def run(self, policy: str, bits: int, slots: int, gb_s: float, prompts: Sequence[int]) -> list[Spans]:
        """One engine run per prompt length; the first pass of each engine is a warm-up and is left out."""
        spans = []
        machine = paced(self.rough, gb_s)
        engine = Engine(
            self.model_dir,
            bits=bits,
            slots=slots,
            options=options(policy),
            machine=machine,
            store=self.stores[bits],
            record=0,
            compiled=True,
        )
        with engine:
            ids = engine.tokenizer.encode(PROMPT)
            for _ in engine.generate(ids, 4):
                pass
            for length in prompts:
                engine.spans = Spans()
                for _ in engine.generate((ids * (length // len(ids) + 1))[:length], self.tokens):
                    pass
                spans.append(engine.spans)
        return spans

    def operators(self) -> Operators:
        """All laws of this model."""
        widths = list(self.stores)
        whole, half = self.spec.num_experts, max(self.spec.top_k, self.spec.num_experts // 2)
        resident: list[Spans] = []
        expert: dict[str, tuple[float, float]] = {}
        expert_ratios: list[tuple[tuple[int, ...], float]] = []
        for bits in widths:
            spans = self.run("on_demand", bits, whole, 10.0, (8, 24, 64))
            resident += spans
            points = grouped(((n,), ns) for s in spans for n, ns in s.expert)
            fixed, slope = law((q, v, count**0.5) for q, v, count in points)
            expert[str(bits)] = (fixed, slope)
            expert_ratios += [((), ns / 1e9 / (fixed + slope * n)) for s in spans for n, ns in s.expert]
        dense = [((n, c // 16 * 16 + 8 + n), ns) for s in resident for layer, n, c, ns in s.dense if layer]
        fixed, per_token, per_context = law((q, v, count**0.5) for q, v, count in grouped(dense))
        first = [(n, c, ns) for s in resident for layer, n, c, ns in s.dense if not layer]
        extra = [((n,), ns - round(1e9 * (fixed + per_token * n + per_context * (c + n)))) for n, c, ns in first]
        head_points = grouped(((n,), ns) for s in resident for n, ns in s.head)
        embed = {q: v for q, v, _ in grouped(extra)}
        head = law((q, max(1e-9, v + embed.get(q, 0.0)), count**0.5) for q, v, count in head_points)
        gates = []
        host: dict[str, float] = {}
        usual = options("speculative").lookahead
        for distance in range(1, min(4, self.spec.num_layers - 1) + 1):
            always = f"speculative:lookahead={distance},guard=0,trust=0"  # every visit looks ahead
            for s in self.run(always, widths[0], half, DEFAULT_LINK_GB_S, (24,)):
                gates.append(trimmed_mean([ns / 1e9 for n, ns in s.gates if n == 1]))
                if distance <= usual:
                    host["speculative"] = trimmed_mean([ns / 1e9 for n, ns in s.host if n == 1])
        for s in self.run("on_demand", widths[0], half, DEFAULT_LINK_GB_S, (24,)):
            host_s = [ns / 1e9 for n, ns in s.host if n == 1]
            host["on_demand"] = trimmed_mean(host_s)
        spread = {
            "dense": residuals(((q, ns / 1e9) for q, ns in dense), (fixed, per_token, per_context)),
            "expert": residuals(expert_ratios, (1.0,)),
            "host": residuals((((), seconds) for seconds in host_s), (host["on_demand"],)),
        }
        host["default"] = host["on_demand"]
        return Operators((fixed, per_token, per_context), expert, (head[0], head[1]), tuple(gates), host, {}, spread)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for store in self.stores.values():
            store.close()


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


def memory_gb_s() -> float:
    """Bytes read and written per second by a large copy on one thread, decimal GB/s."""
    source = torch.ones(64_000_000, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * len(source) / min(times) / 1e9


def tflops() -> float:
    """float32 matrix product on one thread."""
    a = torch.ones(768, 768)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 768**3 / min(times) / 1e12


def calibrate(
    model_dir: Path, bits: Sequence[int], *, gb_s: float = DEFAULT_LINK_GB_S, tokens: int = 48, name: str = "cpu"
) -> HardwareProfile:
    """A MEASURED profile of this machine for this model, its link paced to ``gb_s``.

    Raises:
        ModelError, StoreError, SpecError: inputs that cannot be used.
    """
    others_work = OtherWork()
    with Calibration(model_dir, bits, tokens) as calibration:
        operators = calibration.operators()
        rate, wait_s = paced_link(next(iter(calibration.stores.values())), gb_s)
    memory, arithmetic = memory_gb_s(), tflops()
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    others = others_work.share()
    made = f"{provenance.machine()}, commit {provenance.commit()}"
    busy = "not known" if others is None else f"{others:.0%} of the cores"
    measured = f"measured: {made}; used by other processes meanwhile: {busy}"
    sources = {
        "link.h2d_gb_s": f"stated: the copier's pace; bursts reached {rate:.5g} GB/s",
        "link.h2d_fixed_s": "stated: paced copies have no fixed cost",
        "link.d2h_gb_s": "stated: as h2d",
        "link.d2h_fixed_s": "stated: as h2d",
        "link.h2d_duplex_gb_s": "stated: as h2d",
        "memory_gb_s": measured + "; a 64 MB copy on one thread, bytes read and written",
        "tflops": measured + "; a 768 x 768 float32 product on one thread",
        "wake_s": measured + "; from the end of a load until the waiting engine knows of it, mean",
        "host_s": measured + "; planning and bookkeeping of one visit, on_demand",
        "operators": measured + f"; engine runs of {tokens} tokens, trimmed means, least squares",
        "vram_gb": "the device is the host's memory",
        "host_gb": "the system's figure",
    }
    link = LinkProfile(gb_s, 0.0, gb_s, 0.0, gb_s)
    evidence = "MEASURED" if others is not None and others <= BUSY_SHARE else "MEASURED (busy machine)"
    return HardwareProfile(
        name=name,
        vram_gb=round(host_bytes / 1e9, 1),
        host_gb=round(host_bytes / 1e9, 1),
        link=link,
        memory_gb_s=memory,
        tflops=arithmetic,
        host_s=operators.host_s["on_demand"],
        wake_s=wait_s,
        evidence=evidence,
        operators={calibration.spec.name: operators},
        sources=sources,
    )


def save(profile: HardwareProfile, path: Path) -> None:
    """Write a profile file, complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(profile.to_json(), indent=2) + "\n")
    os.replace(temporary, path)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m runtime.calibrate", description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, default=models.DEMO, metavar="DIR", help="default: the demonstration model")
    p.add_argument("--bits", type=int, choices=(16, 8, 4, 3, 2), action="append", help="repeatable (default 4)")
    p.add_argument(
        "--link-gb-s", type=float, default=DEFAULT_LINK_GB_S, metavar="X", help="pace of the link (default %(default)s)"
    )
    p.add_argument(
        "--tokens", type=int, default=48, metavar="N", help="decode tokens of each run (default %(default)s)"
    )
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
        if args.tokens < 8:
            raise ValueError(f"--tokens is {args.tokens}; it must be at least 8")
        profile = calibrate(args.model, args.bits or [4], gb_s=args.link_gb_s, tokens=args.tokens, name=args.name)
        save(profile, args.out)
    except (ValueError, OSError, CopierError) as error:
        print(f"runtime.calibrate: {error}", file=sys.stderr)
        return 2
    laws = next(iter(profile.operators.values()))
    print(f"{profile.name}, {profile.evidence}: {profile.sources['operators']}")
    print(f"dense part of a layer   {laws.dense[0] * 1e6:8.1f} us + {laws.dense[2] * 1e9:.1f} ns per token of context")
    for width, (fixed, slope) in laws.expert.items():
        print(
            f"expert at {width:>2} bits       {(fixed + slope) * 1e6:8.1f} us for one token, {slope * 1e6:.2f} us each"
        )
    print(f"head and embedding      {(laws.head[0] + laws.head[1]) * 1e6:8.1f} us")
    print("lookahead gates         " + ", ".join(f"d={d} {s * 1e6:.1f} us" for d, s in enumerate(laws.gates, 1)))
    print("host, per visit         " + ", ".join(f"{k} {v * 1e6:.1f} us" for k, v in laws.host_s.items()))
    print(f"arrival notice          {profile.wake_s * 1e6:8.1f} us; link: {profile.sources['link.h2d_gb_s']}")
    print(json.dumps({"out": str(args.out), **dataclasses.asdict(profile)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
