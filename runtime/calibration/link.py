"""What copies between host and device take: laws by size and direction, and how late their end is known."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from runtime.calibration.laws import law, trimmed_mean
from runtime.copier import Copier, Request
from runtime.devices import Device
from runtime.store import ExpertRows, SlotPool
from sim.spec import options

LINK_S = 1.0  # of copies of whole experts on a paced link, at most
LINK_COPIES = 200  # of each size
LINK_PIECES = (16, 8, 4, 2, 1)  # an expert in so many chunks


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


def pageable_gb_s(device: Device, size: int) -> float:
    """Decimal GB/s of copies of ``size`` bytes from memory that is not page-locked, the median of `LINK_COPIES`."""
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty(size, dtype=torch.uint8, device=device.torch_device)
    rates = []
    for _ in range(LINK_COPIES):
        device.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        rates.append(size / (time.perf_counter() - start) / 1e9)
    return float(np.median(rates))
