"""How long traces take to load and to visit: medians of one run, and the spread.

python tests/bench_traces.py    (not a test: no test depends on a clock)
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from traces import ModelSpec, Trace, load, save
from traces.trace import check

TOKENS, LAYERS, EXPERTS, TOP_K, SEQUENCES, PREFILL_TOKENS, BATCH = 20_000, 48, 128, 8, 20, 200, 4


def routing(batches: bool) -> Trace:
    """Even random routing of 20 sequences of 1,000 tokens, one after the other or four decoding together."""
    rng = np.random.default_rng(0)
    shape = (TOKENS, LAYERS, TOP_K)
    ids = np.argsort(rng.random((TOKENS * LAYERS, EXPERTS), dtype=np.float32), axis=1)[:, :TOP_K].astype(np.uint8)
    length = TOKENS // SEQUENCES
    sequence = np.repeat(np.arange(SEQUENCES), length)
    place = np.tile(np.arange(length), SEQUENCES)
    batch = {}
    if batches:
        group, decode = sequence // BATCH, place >= PREFILL_TOKENS
        order = np.lexsort((sequence, np.where(decode, place, 0), group))
        sequence, place, group = sequence[order], place[order], group[order]
        number = np.cumsum(np.diff(group * length + np.where(place >= PREFILL_TOKENS, place, 0), prepend=-1) != 0)
        batch = {
            "pass_lengths": np.bincount(number)[1:].astype(np.int32),
            "token_sequence": sequence.astype(np.int32),
        }
    return Trace(
        ModelSpec("bench", LAYERS, EXPERTS, TOP_K, 2048, 768),
        ids.reshape(shape),
        rng.random(shape).astype(np.float16),
        np.full(SEQUENCES, length, np.int32),
        (place >= PREFILL_TOKENS).astype(np.uint8),
        **batch,
        routing="SYNTHETIC",
    )


def timed(what: str, call: Callable[[], object], repeats: int) -> dict[str, float]:
    spent = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        spent.append((time.perf_counter() - begin) * 1e3)
    low, median, high = min(spent), statistics.median(spent), max(spent)
    print(f"{what:44} {median:8.2f} ms  ({low:.2f} to {high:.2f}, {repeats} times)")
    return {"median_ms": round(median, 3), "min_ms": round(low, 3), "max_ms": round(high, 3)}


def main() -> None:
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("alone", "batches"):
            path = Path(folder) / kind
            trace = routing(batches=kind == "batches")
            save(trace, path)
            size = path.stat().st_size / 1e6
            print(f"{kind}: {TOKENS} tokens x {LAYERS} layers x top-{TOP_K}, {size:.1f} MB")
            head = trace.head(2000)
            visits = sum(1 for _ in head.visits())
            figures[kind] = {
                "load_unverified": timed("  load, not verified", lambda p=path: load(p, verify=False), 25),
                "load_verified": timed("  load, verified", lambda p=path: load(p), 11),
                "digest": timed("    of it sha256", lambda t=trace: [sha256(a.data) for a in (t.ids, t.weights)], 11),
                "values": timed("    of it values", lambda t=trace: check(t), 11),
                "passes": timed("  passes()", trace.passes, 11),
                "visits": timed(f"  visits(), {visits} visits", lambda h=head: sum(1 for _ in h.visits()), 11),
            }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
