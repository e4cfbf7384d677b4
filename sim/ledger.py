"""What a driver counts: accesses, loads, bytes, times; one `Counts` per phase; and the load log."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import IO

from sim.planner import RETRACT, Plan


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
    host_computed: int = 0
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
    host_busy_ns: int = 0

    def planned(self, plan: Plan) -> None:
        """Count what a plan decided; hits and late of its claims are the driver's to tell (by clock)."""
        visit = plan.visit
        accesses, resident, claimed = len(visit.experts), len(plan.resident), len(plan.claimed)
        self.accesses += accesses
        self.token_accesses += sum(visit.counts)
        self.hits += resident
        self.misses += accesses - resident - claimed
        self.prefetch_used += claimed
        if plan.demand or plan.stream or plan.host:
            self.demand_loads += len(plan.demand) + len(plan.stream)
            self.host_computed += len(plan.host)
        if plan.prefetch or plan.retract:
            self.prefetch_loads += len(plan.prefetch)
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
        if not (plan.demand or plan.prefetch or plan.retract or plan.stream):
            return
        visit = plan.visit.index
        for load in plan.retract:
            self.line(visit, load.layer, load.expert, RETRACT, load.slot, None)
        for load in (*plan.demand, *plan.stream, *plan.prefetch):
            gone = None if load.evicted is None else (load.evicted_layer, load.evicted)
            self.line(visit, load.layer, load.expert, load.kind, load.slot, gone)

    def line(self, visit: int, layer: int, expert: int, kind: str, slot: int, evicted: tuple[int, int] | None) -> None:
        """Append one load; ``evicted``: layer and expert that lost the slot."""
        gone = "null" if evicted is None else str(evicted[1])
        if evicted is not None and evicted[0] != layer:
            gone += f', "evicted_layer": {evicted[0]}'
        line = (
            f'{{"visit": {visit}, "layer": {layer}, "expert": {expert}, "kind": "{kind}", "slot": {slot}, '
            f'"evicted": {gone}}}\n'
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
        decode_ns: duration of every decode pass, in order.
        timed: of every decode pass, how many of its tokens count into TPOT (not a sequence's first).
        ttft_ns: duration of every prefill.
    """

    phases: tuple[Counts, Counts] = field(default_factory=lambda: (Counts(), Counts()))
    decode_ns: list[int] = field(default_factory=list)
    timed: list[int] = field(default_factory=list)
    ttft_ns: list[int] = field(default_factory=list)
    log: LoadLog = field(default_factory=LoadLog)
