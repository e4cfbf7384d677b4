"""The link: one copy engine per direction, a FIFO of submitted chunks fed by a software queue.

Times are integer nanoseconds. Chunk ends are computed when somebody asks, never scheduled: `Link.advance` jumps over
equal chunks of one load in one step. At equal nanoseconds chunk ends come first, then the effects of a plan (whoever
calls `advance(t)`, then `demand`, `prefetch`, `join`, `retract`), then submissions.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

NEVER = 1 << 62


class ChunkTimes(NamedTuple):
    """How one load is cut and how long its chunks take, in nanoseconds.

    ``number`` chunks, all of ``size`` bytes but the last of ``last_size``; ``*_duplex_ns`` apply to a chunk that starts
    while the other direction is busy, ``*_host_ns`` to one that starts while the host computes an expert.
    """

    number: int
    size: int
    last_size: int
    full_ns: int
    last_ns: int
    full_duplex_ns: int
    last_duplex_ns: int
    full_host_ns: int
    last_host_ns: int

    def total_ns(self) -> int:
        """One whole load on an idle link."""
        return (self.number - 1) * self.full_ns + self.last_ns


class Copy:
    """One load on its way: how many chunks are not yet submitted, how many not yet there.

    ``done_ns`` is the time its last chunk ended, `NEVER` before; ``key`` orders waiting prefetches; no chunk is
    submitted before ``ready_ns``.
    """

    __slots__ = (
        "cancelled",
        "demand",
        "done_ns",
        "expert",
        "key",
        "layer",
        "ready_ns",
        "started_ns",
        "submitted",
        "unfinished",
        "unsubmitted",
    )

    def __init__(self, layer: int, expert: int, chunks: int, key: tuple[int, float, int]) -> None:
        self.layer = layer
        self.expert = expert
        self.unsubmitted = chunks
        self.unfinished = chunks
        self.submitted = 0
        self.started_ns = NEVER
        self.done_ns = NEVER
        self.ready_ns = 0
        self.demand = False
        self.cancelled = False
        self.key = key

    def __lt__(self, other: Copy) -> bool:
        return self.key < other.key


class Link:
    """State of the H2D copy engine and its queues, and of the D2H direction as far as write-back uses it.

    Args:
        chunks: how a load is cut into chunks and what they take.
        max_submitted: chunks handed to the copy engine at once; neither stopped nor overtaken.
        write_back_ns: one expert's copy to the host, for write-back.

    Attributes:
        now: all chunk ends up to here are known.
        host_end: the host computes an expert until then; chunks that start earlier are slowed.
    """

    def __init__(self, chunks: ChunkTimes, max_submitted: int, write_back_ns: int = 0) -> None:
        self.chunks = chunks
        self.max_submitted = max_submitted
        self.write_back_ns = write_back_ns
        self.now = 0
        self.host_end = 0
        self.busy_ns = 0
        self.submitted_chunks = 0
        self._fifo: deque[Copy] = deque()
        self._head_end = NEVER
        self._head_ns = 0
        self._demand: deque[Copy] = deque()
        self._prefetch: list[Copy] = []
        self._d2h_free = 0
        self._slot_ready: dict[int, int] = {}
        self._watcher: Callable[[Copy, int, int], None] | None = None
        self._queues: Callable[[int, int, int], None] | None = None
        self._on_wire: tuple[Copy, int] | None = None

    def watch(
        self, watcher: Callable[[Copy, int, int], None], queues: Callable[[int, int, int], None] | None = None
    ) -> None:
        """Tell ``watcher`` every stretch of time in which one load has the wire: copy, begin, end.

        ``queues`` is told when the last chunk of a load is submitted: time, lengths of both queues.
        """
        self._watcher = watcher
        self._queues = queues

    def tell_rest(self) -> None:
        """Tell the watcher of the stretch that has the wire now, as far as it has come."""
        if self._watcher is not None and self._on_wire is not None and self._fifo:
            self._watcher(self._fifo[0], self._on_wire[1], self.now)

    # --- effects of a plan, all at self.now -------------------------------------------------------------------

    def demand(self, copy: Copy, slot: int = -1) -> None:
        """Queue a load into ``slot`` behind all demand loads."""
        copy.demand = True
        copy.ready_ns = self._slot_ready.get(slot, 0)
        self._demand.append(copy)

    def prefetch(self, copy: Copy, slot: int = -1) -> None:
        """Queue a load into ``slot`` behind all demand loads, by its key among the prefetches."""
        copy.ready_ns = self._slot_ready.get(slot, 0)
        insort(self._prefetch, copy)

    def join(self, copy: Copy) -> None:
        """Raise the unsubmitted rest of a prefetch to demand."""
        copy.demand = True
        if copy.unsubmitted:
            self._prefetch.remove(copy)
            self._demand.append(copy)

    def retract(self, copy: Copy) -> None:
        """Skip the unsubmitted chunks of a prefetch; it never arrives unless it already has."""
        copy.cancelled = True
        if copy.unsubmitted:
            self._prefetch.remove(copy)
            copy.unfinished -= copy.unsubmitted
            copy.unsubmitted = 0

    def write_back(self, slot: int) -> tuple[int, int]:
        """Queue the copy of a slot's expert to the host; the next load into the slot waits for it. Begin and end."""
        begin = max(self._d2h_free, self.now)
        self._d2h_free = self._slot_ready[slot] = begin + self.write_back_ns
        return begin, self._d2h_free

    # --- time -------------------------------------------------------------------------------------------------

    def advance(self, now: int) -> None:
        """Go on to ``now``: chunk ends up to and at ``now``, submissions before it; nothing when already there."""
        if now <= self.now:
            return
        self._submit(self.now)
        while (at := self._next_event()) <= now:
            if at == self._head_end:
                self._jump(now)
                at = self._head_end
                self._finish_head()
            self.now = at
            if at < now:
                self._submit(at)
        self.now = now

    def next_arrival(self, limit: int = NEVER) -> int:
        """Go on to the end of the next load that completes by ``limit``, where somebody may interfere.

        `NEVER` when there is none: then the link is just before ``limit``. Nothing is submitted at that very time yet.
        """
        if limit <= self.now:
            return NEVER
        self._submit(self.now)
        while (at := self._next_event()) <= limit and at < NEVER:
            if at == self._head_end:
                self._jump(limit)
                at = self._head_end
                head = self._fifo[0]
                if head.unfinished == 1 and not head.cancelled:
                    self._finish_head()
                    self.now = at
                    return at
                if at == limit:
                    break
                self._finish_head()
            elif at == limit:
                break
            self.now = at
            self._submit(at)
        return NEVER

    def _next_event(self) -> int:
        """When the next chunk ends, or a load may be submitted that had to wait for its slot."""
        if self._demand or self._prefetch:
            waiting = self._demand[0] if self._demand else self._prefetch[0]
            if self.now < waiting.ready_ns < self._head_end and len(self._fifo) < self.max_submitted:
                return waiting.ready_ns
        return self._head_end

    def is_busy(self) -> bool:
        """Whether anything is on the wire or in a queue."""
        return bool(self._fifo or self._demand or self._prefetch)

    def queue_lengths(self) -> tuple[int, int]:
        """Demand loads and prefetches with chunks not yet submitted."""
        return len(self._demand), len(self._prefetch)

    def busy_so_far_ns(self) -> int:
        """Nanoseconds the H2D direction has been busy up to `now`, the chunk on the wire included."""
        on_wire = self.now - (self._head_end - self._head_ns) if self._fifo else 0
        return self.busy_ns + max(0, on_wire)

    def bytes_submitted(self, copy: Copy) -> int:
        """Bytes of a load that the copy engine has been given so far."""
        if copy.submitted == self.chunks.number:
            return (copy.submitted - 1) * self.chunks.size + self.chunks.last_size
        return copy.submitted * self.chunks.size

    # --- inside -----------------------------------------------------------------------------------------------

    def _start(self, copy: Copy, at: int) -> None:
        """Put the first of the FIFO on the wire; its slowdown is fixed here."""
        chunks = self.chunks
        last = copy.unfinished == 1 and copy.submitted == chunks.number
        self._head_ns = chunks.last_ns if last else chunks.full_ns
        if at < self._d2h_free:
            self._head_ns = max(self._head_ns, chunks.last_duplex_ns if last else chunks.full_duplex_ns)
        if at < self.host_end:
            self._head_ns = max(self._head_ns, chunks.last_host_ns if last else chunks.full_host_ns)
        self._head_end = at + self._head_ns
        if copy.started_ns == NEVER:
            copy.started_ns = at
        if self._watcher is not None and self._on_wire is None:
            self._on_wire = (copy, at)

    def _finish_head(self) -> None:
        copy = self._fifo.popleft()
        end = self._head_end
        self.busy_ns += self._head_ns
        copy.unfinished -= 1
        if copy.unfinished == 0 and not copy.cancelled:
            copy.done_ns = end
        if self._on_wire is not None and not (self._fifo and self._fifo[0] is copy):
            if self._watcher is not None:
                self._watcher(copy, self._on_wire[1], end)
            self._on_wire = None
        if self._fifo:
            self._start(self._fifo[0], end)
        else:
            self._head_end = NEVER

    def _submit(self, at: int) -> None:
        fifo, demand, prefetch = self._fifo, self._demand, self._prefetch
        while (demand or prefetch) and len(fifo) < self.max_submitted:
            copy = demand[0] if demand else prefetch[0]
            if copy.ready_ns > at:
                return
            copy.unsubmitted -= 1
            copy.submitted += 1
            self.submitted_chunks += 1
            if copy.unsubmitted == 0:
                if copy.demand:
                    demand.popleft()
                else:
                    prefetch.pop(0)
                if self._queues is not None:
                    self._queues(at, len(demand), len(prefetch))
            fifo.append(copy)
            if len(fifo) == 1:
                self._start(copy, at)

    def _jump(self, now: int) -> None:
        """Skip whole chunks of the load at the head while nothing but its own equal chunks comes and goes."""
        head = self._fifo[0]
        if not head.unsubmitted or self._head_end < self._d2h_free or self._head_end < self.host_end:
            return
        if (self._demand[0] if self._demand else self._prefetch[0]) is not head:
            return
        if len(self._fifo) != self.max_submitted or self._fifo.count(head) != len(self._fifo):
            return
        full = self.chunks.full_ns
        most = head.unsubmitted if self.max_submitted > 1 else head.unsubmitted - 1
        skip = min(most, (now - self._head_end - 1) // full)
        if skip <= 0:
            return
        head.unsubmitted -= skip
        head.submitted += skip
        head.unfinished -= skip
        self.submitted_chunks += skip
        self.busy_ns += self._head_ns + (skip - 1) * full
        self._head_ns = full
        self._head_end += skip * full
        if not head.unsubmitted:
            if head.demand:
                self._demand.popleft()
            else:
                self._prefetch.pop(0)
