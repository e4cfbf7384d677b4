"""The copier's own process (device=cpu): a link of stated speed that copies expert chunks from store to slots.

Standard library only, so that it starts in a fraction of a second; ``runtime.copier`` starts and feeds it. ``Link``
is the engine's clock-free half: told what time it is, it says which chunk is submitted when.
"""

from __future__ import annotations

import bisect
import json
import mmap
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any, NamedTuple

BATCH, DRAIN, STATS = range(3)  # kinds of message to the process
READY, ARRIVAL, IDLE, COUNTS = range(4)  # kinds of message from it
# kind, numbers of retract, join, demand, prefetch, write_back entries, time sent (DRAIN and STATS: none, a token)
_HEADER = struct.Struct("<6Iq")
_REQUEST = struct.Struct("<qiiqd")
_ALERT_NS = 20_000_000  # so long after a message the process looks for the next every _LOOK_S: to send to one that
_LOOK_S = 5e-5  # waits for it costs the sender 0.05 ms, and one that never sleeps slows the sender's processor down
REPLY = struct.Struct("<iiqq")  # kind, size of what follows, load (ARRIVAL) or token, nanoseconds
DEMAND, PREFETCH, WRITE_BACK = range(3)  # classes of bytes


class Request(NamedTuple):
    """One load: copy the expert in store row ``row`` into slot ``slot``.

    ``load`` is its running number, unique and growing; ``target`` (index of the visit it is meant for) and ``worth``
    order prefetches: nearest target first, then highest worth, then lowest number. ``after`` (device=cuda): an event
    that the copy waits for, of the computation that still reads the slot.
    """

    load: int
    row: int
    slot: int
    target: int = 0
    worth: float = 0.0
    after: object = None


class Batch(NamedTuple):
    """One plan's effects; they reach the link together, at ``sent_ns``."""

    sent_ns: int
    retract: Sequence[int] = ()
    join: Sequence[int] = ()
    demand: Sequence[Request] = ()
    prefetch: Sequence[Request] = ()
    write_back: Sequence[int] = ()

    def encode(self) -> bytes:
        sizes = map(len, self[1:])
        numbers = (*self.retract, *self.join)
        requests = b"".join(_REQUEST.pack(*r[:5]) for r in chain(self.demand, self.prefetch))
        slots = struct.pack(f"<{len(self.write_back)}i", *self.write_back)
        head = _HEADER.pack(BATCH, *sizes, self.sent_ns)
        return head + struct.pack(f"<{len(numbers)}q", *numbers) + requests + slots


def encode_query(kind: int, token: int) -> bytes:
    """A DRAIN or STATS message; the reply carries ``token``."""
    return _HEADER.pack(kind, 0, 0, 0, 0, 0, token)


def decode(buffer: bytearray) -> tuple[int, Batch] | None:
    """Take the first message out of ``buffer``: its kind and batch; None while it is incomplete."""
    if len(buffer) < _HEADER.size:
        return None
    kind, retract, join, demand, prefetch, write_back, sent_ns = _HEADER.unpack_from(buffer)
    numbers = struct.Struct(f"<{retract + join}q")
    slots = struct.Struct(f"<{write_back}i")
    requests_at = _HEADER.size + numbers.size
    slots_at = requests_at + (demand + prefetch) * _REQUEST.size
    if len(buffer) < slots_at + slots.size:
        return None
    loads = numbers.unpack_from(buffer, _HEADER.size)
    requests = [Request(*r) for r in _REQUEST.iter_unpack(bytes(buffer[requests_at:slots_at]))]
    back = slots.unpack_from(buffer, slots_at)
    del buffer[: slots_at + slots.size]
    return kind, Batch(sent_ns, loads[:retract], loads[retract:], requests[:demand], requests[demand:], back)


@dataclass(slots=True)
class Chunk:
    """Submitted: bytes ``offset`` to ``offset + size`` of the load's expert, all there by ``end_ns``.

    ``late`` (links that watch only): it was not copied when it was due, so it ends when it is seen to be copied,
    ``late_ns`` after that; unless it was submitted ``behind`` its time, for which a paced link makes up.
    ``ticket`` and ``submitted_ns`` are the submitter's own.
    """

    request: Request
    kind: int
    offset: int
    size: int
    end_ns: int
    last: bool
    late: bool = False
    late_ns: int = 0
    ticket: Any = None
    submitted_ns: int = 0
    behind: bool = False


@dataclass(slots=True)
class _Load:
    request: Request
    kind: int
    offset: int = 0

    def order(self) -> tuple[int, float, int]:
        return self.request.target, -self.request.worth, self.request.load


@dataclass
class Link:
    """One copy engine: a FIFO of at most ``max_submitted`` chunks, fed by a software queue.

    Time is integer nanoseconds and only moves as the caller says. A chunk takes fixed_ns +
    ceil(size * 1e9 / bytes_per_s) from the end of the one before it, or from the moment it was submitted to an idle
    link. At equal times: chunk ends, then a batch's effects, then submissions. ``submit`` is called once per chunk, in
    order; a chunk it was called with is neither stopped nor overtaken.

    A link that watches copies made elsewhere is given ``took``: nanoseconds that a chunk's copy took, None while it
    is being made. A chunk then ends when it is due and copied, and pushes back those behind it; ``ended`` is told. With
    ``bytes_per_s`` None it ends when it is copied.
    """

    expert_bytes: int
    chunk_bytes: int
    bytes_per_s: int | None
    fixed_ns: int
    max_submitted: int
    submit: Callable[[Chunk], None]
    took: Callable[[Chunk], int | None] | None = None
    ended: Callable[[Chunk], None] | None = None
    now: int = 0
    busy_ns: int = 0
    chunks: int = 0
    copied_bytes: list[int] = field(default_factory=lambda: [0, 0, 0])
    _submitted: deque[Chunk] = field(default_factory=deque)
    _end_ns: int = 0
    _demand: deque[_Load] = field(default_factory=deque)
    _prefetch: list[_Load] = field(default_factory=list)

    def apply(self, batch: Batch, write_back: bool = False) -> None:
        """A batch's effects at ``batch.sent_ns``; a link of ``write_back`` heeds only those, any other all the rest."""
        self._end_chunks(batch.sent_ns)
        if write_back:
            self._demand.extend(_Load(Request(0, 0, slot), WRITE_BACK) for slot in batch.write_back)
        else:
            self._retract(set(batch.retract))
            self._join(batch.join)
            self._demand.extend(map(_Load, batch.demand, repeat(DEMAND)))
            for request in batch.prefetch:
                bisect.insort(self._prefetch, _Load(request, PREFETCH), key=_Load.order)
        self._fill()

    def advance(self, until_ns: int) -> None:
        """Let time pass: every chunk due by ``until_ns`` ends and the queue follows up."""
        self._end_chunks(until_ns)
        self._fill()

    @property
    def next_submission_ns(self) -> int | None:
        """When a queued chunk can be submitted; None with nothing queued."""
        return self._submitted[0].end_ns if self._demand or self._prefetch else None

    @property
    def submitted(self) -> Sequence[Chunk]:
        """Chunks that have not ended, first in, first out."""
        return self._submitted

    @property
    def idle_from_ns(self) -> int | None:
        """When the last chunk ends; None while some are queued."""
        return None if self._demand or self._prefetch else self._end_ns

    def _end_chunks(self, until_ns: int) -> None:
        while self._submitted and self._submitted[0].end_ns <= until_ns and self._copied(self._submitted[0], until_ns):
            chunk = self._submitted.popleft()
            self.now = chunk.end_ns
            if self.ended:
                self.ended(chunk)
            if self.now < until_ns:
                self._fill()
        self.now = max(self.now, until_ns)

    def _copied(self, chunk: Chunk, now_ns: int) -> bool:
        """Whether the first chunk, which is due, is copied; moves its end, and all behind it, if it is late."""
        if self.took is None:
            return True
        took_ns = self.took(chunk)
        if took_ns is None:
            chunk.late = True
            return False
        if chunk.late:
            chunk.late_ns = now_ns - chunk.end_ns
        if chunk.late and not chunk.behind:
            self._end_ns += chunk.late_ns
            for each in self._submitted:
                each.end_ns += chunk.late_ns
        if self.bytes_per_s is None:
            self.busy_ns += took_ns
        return True

    def _fill(self) -> None:
        while len(self._submitted) < self.max_submitted and (self._demand or self._prefetch):
            queue = self._demand or self._prefetch
            load = queue[0]
            size = min(self.chunk_bytes, self.expert_bytes - load.offset)
            duration = self.fixed_ns - (-size * 1_000_000_000 // self.bytes_per_s) if self.bytes_per_s else 0
            self._end_ns = max(self._end_ns, self.now) + duration
            last = load.offset + size == self.expert_bytes
            if last:
                del queue[0]
            chunk = Chunk(load.request, load.kind, load.offset, size, self._end_ns, last, late=not self.bytes_per_s)
            self._submitted.append(chunk)
            self.busy_ns += duration
            self.chunks += 1
            self.copied_bytes[load.kind] += size
            self.submit(chunk)
            load.offset += size

    def _retract(self, loads: set[int]) -> None:
        if loads:
            self._demand = deque(q for q in self._demand if q.request.load not in loads)
            self._prefetch = [q for q in self._prefetch if q.request.load not in loads]

    def _join(self, loads: Sequence[int]) -> None:
        for load in loads:
            for queued in self._prefetch:
                if queued.request.load == load:
                    self._prefetch.remove(queued)
                    queued.kind = DEMAND
                    self._demand.append(queued)
                    break


def totals(h2d: Link, d2h: Link, late_chunks: int, worst_late_ns: int) -> bytes:
    """Body of a COUNTS reply: ``CopierStats`` as JSON."""
    values = {
        "demand_bytes": h2d.copied_bytes[DEMAND],
        "prefetch_bytes": h2d.copied_bytes[PREFETCH],
        "write_back_bytes": d2h.copied_bytes[WRITE_BACK],
        "chunks": h2d.chunks,
        "busy_ns": h2d.busy_ns,
        "write_back_busy_ns": d2h.busy_ns,
        "late_chunks": late_chunks,
        "worst_late_ns": worst_late_ns,
    }
    return json.dumps(values).encode()


class Server:
    """The loop of the process: messages in, memory copied, arrivals out."""

    def __init__(self, config: dict[str, int]) -> None:
        self._socket = socket.socket(fileno=config["socket"])
        self._socket.setblocking(False)
        rows, slots = config["store_row_bytes"], config["slot_row_bytes"]
        store, pool = _map(config["store_fd"]), _map(config["slots_fd"])
        scratch = memoryview(bytearray(config["expert_bytes"]))
        self._worst_late_ns = 0
        self._late_chunks = 0
        self._out = bytearray()
        self._in = bytearray()
        self._drains: list[int] = []  # tokens still to answer

        def copy(chunk: Chunk) -> None:
            source = chunk.request.row * rows + chunk.offset
            target = chunk.request.slot * slots + chunk.offset
            pool[target : target + chunk.size] = store[source : source + chunk.size]
            copied_ns = self._note(chunk)
            if chunk.last:
                self._out += REPLY.pack(ARRIVAL, 0, chunk.request.load, max(chunk.end_ns, copied_ns))

        def copy_back(chunk: Chunk) -> None:
            source = chunk.request.slot * slots + chunk.offset
            scratch[chunk.offset : chunk.offset + chunk.size] = pool[source : source + chunk.size]
            self._note(chunk)

        common = (config["expert_bytes"], config["chunk_bytes"])
        limits = (config["fixed_ns"], config["max_submitted"])
        self._h2d = Link(*common, config["bytes_per_s"], *limits, copy)
        self._d2h = Link(*common, config["write_back_bytes_per_s"], *limits, copy_back)

    def _note(self, chunk: Chunk) -> int:
        """The time now, after the chunk's copy; chunks copied after they were due are counted."""
        now = time.monotonic_ns()
        if now > chunk.end_ns:
            self._late_chunks += 1
            self._worst_late_ns = max(self._worst_late_ns, now - chunk.end_ns)
        return now

    def run(self) -> None:
        """Serve until the other end of the socket is closed."""
        heard = time.monotonic_ns()
        self._out += REPLY.pack(READY, 0, 0, heard)
        while True:
            now = time.monotonic_ns()
            for link in (self._h2d, self._d2h):
                link.advance(now)
            self._answer_drain()
            self._send()
            due = [t for t in (self._h2d.next_submission_ns, self._d2h.next_submission_ns) if t is not None]
            timeout = max(0, min(due) - time.monotonic_ns()) / 1e9 if due else None
            if now < heard + _ALERT_NS:
                time.sleep(_LOOK_S if timeout is None else min(_LOOK_S, timeout))
                timeout = 0
            readable, _, _ = select.select([self._socket], [self._socket] if self._out else [], [], timeout)
            if readable:
                heard = now
                if not self._receive():
                    return

    def _receive(self) -> bool:
        """Read and obey what has come; False when the other end is closed."""
        try:
            data = self._socket.recv(1 << 16)
        except ConnectionResetError:
            return False
        self._in += data
        while (message := decode(self._in)) is not None:
            kind, batch = message
            if kind == DRAIN:
                self._drains.append(batch.sent_ns)
            elif kind == STATS:
                self._send_counts(batch.sent_ns)
            else:
                self._h2d.apply(batch)
                if batch.write_back:
                    self._d2h.apply(batch, write_back=True)
        return bool(data)

    def _answer_drain(self) -> None:
        h2d_ns, d2h_ns = self._h2d.idle_from_ns, self._d2h.idle_from_ns
        if self._drains and h2d_ns is not None and d2h_ns is not None:
            idle_ns = max(h2d_ns, d2h_ns, time.monotonic_ns())
            for token in self._drains:
                self._out += REPLY.pack(IDLE, 0, token, idle_ns)
            self._drains.clear()

    def _send_counts(self, token: int) -> None:
        body = totals(self._h2d, self._d2h, self._late_chunks, self._worst_late_ns)
        self._out += REPLY.pack(COUNTS, len(body), token, time.monotonic_ns()) + body

    def _send(self) -> None:
        """Send as much as the socket takes; the rest waits, so that a reader who is slow never stops the link."""
        try:
            while self._out:
                del self._out[: self._socket.send(self._out)]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self._out.clear()  # the reader is gone; the next receive ends the loop


def _map(fd: int) -> memoryview:
    """All of a shared block, its pages present from the start where the system can do that."""
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return memoryview(mmap.mmap(fd, 0, flags=flags))


def _wake_promptly() -> None:
    """Ask Linux not to round timers by its usual 50 microseconds; without that the copies are only a little later."""
    try:
        with open("/proc/self/timerslack_ns", "w") as file:
            file.write("1000")
    except OSError:
        pass


def main() -> None:
    _wake_promptly()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to handle; the process ends with the socket
    Server(json.loads(sys.argv[1])).run()


if __name__ == "__main__":
    main()
