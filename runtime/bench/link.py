"""Part `link`: what copies between host and device reach, page-locked and pageable, whole and in chunks, both ways."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch

from runtime.bench.book import Book, UnavailableError
from runtime.bench.conditions import seconds
from runtime.copier import Request
from runtime.devices import Device
from runtime.store import ExpertRows
from sim.spec import options
from traces import ModelSpec

AIM = 0.95  # share of one large copy's bandwidth that chunked copies are to reach
PACES_GB_S = {"gen4": 25.5, "gen3": 12.4}


class Sizes(NamedTuple):
    """``copies``: bytes of single copies, the largest last; ``total``: bytes of the chunked ones; ``chunks``: of these.
    ``expert``: bytes of an expert; ``loads``: experts copied by the copier; ``pace``: where the link has no speed."""

    copies: tuple[int, ...]
    total: int
    chunks: tuple[int, ...]
    expert: int
    loads: int
    pace: float


FULL = Sizes(
    (1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28),
    1 << 28,
    (1 << 16, 1 << 18, 1 << 20, 1 << 21, 1 << 22, 1 << 23, 1 << 24),
    ModelSpec("mixtral-8x7b", 32, 8, 2, 4096, 14336).expert_bytes(4),
    48,
    math.inf,
)
SMOKE = Sizes((1 << 12, 1 << 16), 1 << 16, (1 << 12, 1 << 14), 1 << 14, 8, 0.2)


def run(book: Book, device: Device, smoke: bool) -> None:
    """All cells of the part."""
    sizes = SMOKE if smoke else FULL
    place = device.torch_device
    for locked in (True, False):
        kind = "locked" if locked else "pageable"
        for way in ("h2d", "d2h"):
            book.cell(f"link/{way}/{kind}", lambda w=way, k=locked: single(place, sizes.copies, w, k))
    book.cell("link/both/locked", lambda: both(place, sizes.copies[-1]))
    large = book.result("link/h2d/locked")
    best = large["gb_s"][str(sizes.copies[-1])] if large else None
    for chunk in sizes.chunks:
        book.cell(f"link/chunks/{chunk}", lambda c=chunk: chunked(place, sizes.total, c, best))
    chunk_bytes = [options("on_demand").chunk_size(sizes.expert), sizes.expert]
    if not smoke:
        chunk_bytes += [1 << 21, 1 << 23, 1 << 24]
    pace = sizes.pace
    for number, chunk in enumerate(chunk_bytes):
        for submitted in (2, 4) if number == 0 else (2,):
            name = f"link/copier/{chunk}x{submitted}"
            book.cell(name, lambda c=chunk, s=submitted: copier(device, sizes, c, s, pace, best))
    for name, gb_s in {} if smoke else PACES_GB_S.items():
        if best is not None and best < gb_s * 1.02:
            book.skip(f"link/paced/{name}", f"the link reaches {best:.1f} GB/s, which is no room for {gb_s}")
        else:
            book.cell(f"link/paced/{name}", lambda g=gb_s: copier(device, sizes, chunk_bytes[0], 2, g, None))
    summary(book, sizes, best)


def summary(book: Book, sizes: Sizes, best: float | None) -> None:
    """Lines for people, and the aim."""
    for way in ("h2d", "d2h"):
        for kind in ("locked", "pageable"):
            found = book.result(f"link/{way}/{kind}")
            if found:
                rates = ", ".join(f"{int(n):,} B {rate:.2f}" for n, rate in found["gb_s"].items())
                book.say(f"link {way} {kind:8} GB/s by size: {rates}")
    found = book.result("link/both/locked")
    if found:
        book.say(f"link both at once: h2d {found['h2d_gb_s']:.2f}, d2h {found['d2h_gb_s']:.2f} GB/s")
    for name in [n for n in book.cells if n.startswith(("link/chunks", "link/copier", "link/paced"))]:
        found = book.result(name)
        if found:
            share = found.get("share")
            of = "one large copy" if found.get("stated_gb_s") is None else "its pace"
            told = "" if share is None else f", {100 * share:.1f} % of {of}"
            book.say(f"{name}: {found['gb_s']:.3f} GB/s{told}")
    default = options("on_demand").chunk_size(sizes.expert)
    found = book.result(f"link/copier/{default}x2")
    if found and found["share"] is not None and sizes is FULL:
        verdict = "pass" if found["share"] >= AIM else "miss"
        aim = {"aim": AIM, "share": found["share"], "of_gb_s": best, "chunk_bytes": default, "verdict": verdict}
        book.note("link_aim", aim)
        book.say(f"aim: chunked copies reach {AIM:.0%} of a large copy: {found['share']:.1%}, {verdict}")


def _host(size: int, place: torch.device, locked: bool) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=locked and place.type == "cuda").fill_(1)


def single(place: torch.device, sizes: tuple[int, ...], way: str, locked: bool) -> dict[str, Any]:
    """Decimal GB/s of copies of each size, one after the other on one stream."""
    host, there = _host(sizes[-1], place, locked), torch.ones(sizes[-1], dtype=torch.uint8, device=place)
    found = {}
    for size in sizes:
        source, target = (host[:size], there[:size]) if way == "h2d" else (there[:size], host[:size])
        repeats = max(3, min(200, (sizes[-1] * 2) // size))
        target.copy_(source, non_blocking=locked)
        rates = [size / seconds(place, lambda t=target, s=source: t.copy_(s, non_blocking=locked), repeats)]
        rates += [size / seconds(place, lambda t=target, s=source: t.copy_(s, non_blocking=locked), repeats)]
        found[str(size)] = max(rates) / 1e9
    return {"gb_s": found, "page_locked": locked and place.type == "cuda"}


def both(place: torch.device, size: int) -> dict[str, Any]:
    """Each direction's GB/s while the other copies too.

    Raises:
        UnavailableError: no device with copy engines.
    """
    if place.type != "cuda":
        raise UnavailableError("device=cpu has no copy engines that work both ways at once")
    host = [_host(size, place, True) for _ in range(2)]
    there = [torch.ones(size, dtype=torch.uint8, device=place) for _ in range(2)]
    streams = [torch.cuda.Stream(place) for _ in range(2)]
    spans = []
    torch.cuda.synchronize(place)
    for target, source, stream in ((there[0], host[0], streams[0]), (host[1], there[1], streams[1])):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            begin.record(stream)
            for _ in range(8):
                target.copy_(source, non_blocking=True)
            end.record(stream)
        spans.append((begin, end))
    torch.cuda.synchronize(place)
    rates = [8 * size / begin.elapsed_time(end) / 1e6 for begin, end in spans]
    return {"h2d_gb_s": rates[0], "d2h_gb_s": rates[1]}


def chunked(place: torch.device, total: int, chunk: int, best: float | None) -> dict[str, Any]:
    """GB/s of one buffer copied in pieces that are all handed over at once: what the copy engine makes of pieces."""
    host, there = _host(total, place, True), torch.ones(total, dtype=torch.uint8, device=place)

    def work() -> None:
        for start in range(0, total, chunk):
            there[start : start + chunk].copy_(host[start : start + chunk], non_blocking=True)

    work()
    rate = total / min(seconds(place, work, 1) for _ in range(4)) / 1e9
    return {"gb_s": rate, "chunk_bytes": chunk, "share": rate / best if best else None}


def copier(device: Device, sizes: Sizes, chunk: int, submitted: int, pace: float, best: float | None) -> dict[str, Any]:
    """GB/s of the engine's own copier: loads of one expert each, in chunks, at ``pace`` (infinite: the link's own)."""
    with ExpertRows(8, sizes.expert) as rows, device.hold(rows):
        slots = device.slots(4, sizes.expert)
        try:
            return copier_rate(device, rows, slots, sizes.loads, chunk, submitted, pace, best)
        finally:
            slots.close()


def copier_rate(
    device: Device,
    rows: Any,
    slots: Any,
    loads: int,
    chunk: int,
    submitted: int,
    pace: float,
    best: float | None = None,
) -> dict[str, Any]:
    """The same for a store and slots that are there; three bursts, the fastest; ``notice_s``: from an arrival until a
    waiter knows of it (median)."""
    size = rows.expert_bytes
    rates, waits = [], []
    limit = math.inf if pace == math.inf else pace * 1e9
    link = device.copier(rows, slots, bytes_per_s=limit, chunk_bytes=chunk, max_submitted=submitted)
    try:
        for burst in range(3):
            asked = [Request(burst * loads + i, i % rows.count, i % slots.count) for i in range(loads)]
            start = time.monotonic_ns()
            link.apply(demand=asked)
            for _ in asked:
                end_ns = link.wait().end_ns
                waits.append(time.monotonic_ns() - end_ns)
            rates.append(loads * size / (end_ns - start))
        stats = link.stats()
    finally:
        link.close()
    waits.sort()
    stated = None if pace == math.inf else pace
    rate = max(rates)
    reference = best if stated is None else stated
    return {
        "gb_s": rate,
        "median_gb_s": sorted(rates)[1],
        "chunk_bytes": chunk,
        "max_submitted": submitted,
        "stated_gb_s": stated,
        "share": rate / reference if reference else None,
        "notice_s": waits[len(waits) // 2] / 1e9,
        "late_chunks": stats.late_chunks,
        "chunks": stats.chunks,
    }
