"""What a driver counts: accesses, loads, bytes, times; one `Counts` per phase; and the load log."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import IO

from sim.planner import RETRACT, Load, Plan


@dataclass(slots=True)
class Counts:
    """Totals over the visits of one phase; times in nanoseconds, see the interface contract for the meaning."""

    passes: int = 0
    tokens: int = 0
    elapsed_ns: int = 0
    accesses: int = 0
    token_accesses: int = 0
    hits: int = 0
    late: int = 0
    misses: int = 0
    demand_loads: int = 0
    prefetch_loads: int = 0
    prefetch_used: int = 0
    retracted: int = 0
    h2d_bytes: int = 0
    wasted_bytes: int = 0
    stall_miss_ns: int = 0
    stall_late_ns: int = 0
    compute_ns: int = 0
    latency_ns: int = 0
    link_busy_ns: int = 0

    def planned(self, plan: Plan) -> None:
        """Count what a plan decided; hits and late of its claims are the driver's to tell (by clock)."""
        visit = plan.visit
        self.accesses += len(visit.experts)
        self.token_accesses += sum(visit.counts)
        missed = len(plan.demand) + len(plan.stream)
        self.misses += missed
        self.demand_loads += missed
        self.hits += len(plan.resident)
        self.prefetch_loads += len(plan.prefetch)
        self.prefetch_used += len(plan.claimed)
        self.retracted += len(plan.retract)


class LoadLog:
    """Loads in issue order as JSON lines, hashed as they come.

    Args:
        stream: text file that gets the lines; None to hash only.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._hash = hashlib.sha256()
        self._stream = stream
        self.lines = 0

    def record(self, plan: Plan) -> None:
        """Append all lines of one plan: retractions, demand, streamed, prefetches."""
        visit = plan.visit.index
        for load in plan.retract:
            self._line(visit, load, RETRACT, None)
        for load in (*plan.demand, *plan.stream, *plan.prefetch):
            self._line(visit, load, load.kind, load.evicted)

    def _line(self, visit: int, load: Load, kind: str, evicted: int | None) -> None:
        gone = "null" if evicted is None else evicted
        line = (
            f'{{"visit": {visit}, "layer": {load.layer}, "expert": {load.expert}, "kind": "{kind}", '
            f'"slot": {load.slot}, "evicted": {gone}}}\n'
        )
        self._hash.update(line.encode())
        self.lines += 1
        if self._stream is not None:
            self._stream.write(line)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@dataclass
class Ledger:
    """All a run leaves behind.

    Attributes:
        phases: counts of prefill (0) and decode (1).
        decode_ns: duration of every decode pass, in order; ``timed`` says which count into TPOT.
        ttft_ns: duration of every prefill.
    """

    phases: tuple[Counts, Counts] = field(default_factory=lambda: (Counts(), Counts()))
    decode_ns: list[int] = field(default_factory=list)
    timed: list[bool] = field(default_factory=list)
    ttft_ns: list[int] = field(default_factory=list)
    log: LoadLog = field(default_factory=LoadLog)


class Timeline:
    """Slices in Chrome's trace format, for Perfetto; tracks appear in order of first use."""

    def __init__(self, process: str) -> None:
        self._events: list[str] = [_meta("process_name", 0, process)]
        self._tracks: dict[str, int] = {}

    def slice(self, track: str, name: str, start_ns: int, end_ns: int) -> None:
        """One slice on a track, nanoseconds from the start of the run."""
        number = self._tracks.get(track)
        if number is None:
            number = self._tracks[track] = len(self._tracks) + 1
            self._events.append(_meta("thread_name", number, track))
        start, length = start_ns / 1000, (end_ns - start_ns) / 1000
        self._events.append(f'{{"ph":"X","pid":1,"tid":{number},"name":"{name}","ts":{start:.3f},"dur":{length:.3f}}}')

    def text(self) -> str:
        """The whole document."""
        return '{"displayTimeUnit":"ns","traceEvents":[\n' + ",\n".join(self._events) + "\n]}\n"


def _meta(what: str, track: int, name: str) -> str:
    return json.dumps({"ph": "M", "pid": 1, "tid": track, "name": what, "args": {"name": name}})
