"""The link: one copy engine per direction, a FIFO of submitted chunks fed by a software queue.

Times are integer nanoseconds. Chunk ends are computed when somebody asks, never scheduled: `Link.advance` jumps over
equal chunks of one load in one step. At equal nanoseconds chunk ends come first, then the effects of a plan (whoever
calls `advance(t)`, then `demand`, `prefetch`, `join`, `retract`), then submissions.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from typing import NamedTuple

NEVER = 1 << 62


class ChunkTimes(NamedTuple):
    """How one load is cut and how long its chunks take, in nanoseconds.

    ``number`` chunks, all of ``size`` bytes but the last of ``last_size``; ``*_duplex_ns`` apply to a chunk that starts
    while the other direction is busy.
    """

    number: int
    size: int
    last_size: int
    full_ns: int
    last_ns: int
    full_duplex_ns: int
    last_duplex_ns: int

    def total_ns(self) -> int:
        """One whole load on an idle link."""
        return (self.number - 1) * self.full_ns + self.last_ns


class Copy:
    """One load on its way: how many chunks are not yet submitted, how many not yet there.

    ``done_ns`` is the time its last chunk ended, `NEVER` before; ``key`` orders waiting prefetches.
    """

    __slots__ = (
        "cancelled",
        "demand",
        "done_ns",
        "expert",
        "key",
        "layer",
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
    """

    def __init__(self, chunks: ChunkTimes, max_submitted: int, write_back_ns: int = 0) -> None:
        self.chunks = chunks
        self.max_submitted = max_submitted
        self.write_back_ns = write_back_ns
        self.now = 0
        self.busy_ns = 0
        self.submitted_chunks = 0
        self._fifo: deque[Copy] = deque()
        self._head_end = NEVER
        self._head_ns = 0
        self._demand: deque[Copy] = deque()
        self._prefetch: list[Copy] = []
        self._d2h_free = 0

    # --- effects of a plan, all at self.now -------------------------------------------------------------------

    def demand(self, copy: Copy) -> None:
        """Queue a load behind all demand loads."""
        copy.demand = True
        self._demand.append(copy)

    def prefetch(self, copy: Copy) -> None:
        """Queue a load behind all demand loads, by its key among the prefetches."""
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

    def write_back(self) -> None:
        """Queue one expert's copy to the host."""
        self._d2h_free = max(self._d2h_free, self.now) + self.write_back_ns

    # --- time -------------------------------------------------------------------------------------------------

    def advance(self, now: int) -> None:
        """Go on to ``now``: chunk ends up to and at ``now``, submissions before it; nothing when already there."""
        if now <= self.now:
            return
        self._submit(self.now)
        while self._head_end <= now:
            self._jump(now)
            end = self._head_end
            self._finish_head()
            if end < now:
                self._submit(end)
        self.now = now

    def next_arrival(self, limit: int = NEVER) -> int:
        """Time of the next completed load up to ``limit``, where a plan may interfere; `NEVER` when there is none.

        Advances the link up to just before that time, or before ``limit``.
        """
        if limit <= self.now:
            return NEVER
        self._submit(self.now)
        while self._fifo and self._head_end <= limit:
            self._jump(limit)
            head = self._fifo[0]
            if head.unfinished == 1 and not head.cancelled:
                return self._head_end
            end = self._head_end
            if end == limit:
                break
            self._finish_head()
            self.now = end
            self._submit(end)
        return NEVER

    def backlog_ns(self, demand_only: bool = False) -> int:
        """Time until the link would be through with what it has been given, from `now` on."""
        ns = 0 if self._head_end == NEVER else self._head_end - self.now
        chunks = self.chunks
        ns += max(0, len(self._fifo) - 1) * chunks.full_ns
        waiting = list(self._demand) if demand_only else [*self._demand, *self._prefetch]
        for copy in waiting:
            ns += (copy.unsubmitted - 1) * chunks.full_ns + chunks.last_ns
        return ns

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
        """Put the first of the FIFO on the wire; its duplex slowdown is fixed here."""
        chunks = self.chunks
        last = copy.unsubmitted == 0 and self._fifo.count(copy) == 1 and copy.submitted == chunks.number
        if at < self._d2h_free:
            self._head_ns = chunks.last_duplex_ns if last else chunks.full_duplex_ns
        else:
            self._head_ns = chunks.last_ns if last else chunks.full_ns
        self._head_end = at + self._head_ns
        if copy.started_ns == NEVER:
            copy.started_ns = at

    def _finish_head(self) -> None:
        copy = self._fifo.popleft()
        end = self._head_end
        self.busy_ns += self._head_ns
        copy.unfinished -= 1
        if copy.unfinished == 0 and not copy.cancelled:
            copy.done_ns = end
        if self._fifo:
            self._start(self._fifo[0], end)
        else:
            self._head_end = NEVER

    def _submit(self, at: int) -> None:
        while len(self._fifo) < self.max_submitted:
            if self._demand:
                copy = self._demand[0]
            elif self._prefetch:
                copy = self._prefetch[0]
            else:
                return
            copy.unsubmitted -= 1
            copy.submitted += 1
            self.submitted_chunks += 1
            if copy.unsubmitted == 0:
                if copy.demand:
                    self._demand.popleft()
                else:
                    self._prefetch.pop(0)
            self._fifo.append(copy)
            if len(self._fifo) == 1:
                self._start(copy, at)

    def _jump(self, now: int) -> None:
        """Skip whole chunks of the load at the head while nothing but its own equal chunks comes and goes."""
        head = self._fifo[0]
        waiting = self._demand[0] if self._demand else self._prefetch[0] if self._prefetch else None
        if waiting is not head or head.unsubmitted < 3 or self._head_end < self._d2h_free:
            return
        if len(self._fifo) != self.max_submitted or any(copy is not head for copy in self._fifo):
            return
        full = self.chunks.full_ns
        skip = min(head.unsubmitted - 2, (now - self._head_end - 1) // full)
        if skip <= 0:
            return
        head.unsubmitted -= skip
        head.submitted += skip
        head.unfinished -= skip
        self.submitted_chunks += skip
        self.busy_ns += self._head_ns + (skip - 1) * full
        self._head_ns = full
        self._head_end += skip * full
