"""The copier of device=cuda: a thread of the engine's process that feeds copy streams and waits without the GIL.

The queue, its order and the pace are ``Link``'s, the same as in the copier process; here a chunk's copy is made by a
stream, and the link watches when it is done. A link may be paced below the hardware's speed: a chunk then ends when it
is due and copied, so that a fast link stands in for a slow one, in both directions.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
import weakref
from collections import deque
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch

from runtime import copier_process as wire
from runtime.copier import BaseCopier, CopierError, check_figures
from runtime.copier_process import Batch, Chunk, Link

_POLL_NS = 50_000  # between two looks at a copy that is late, while there is room to submit another


class Ticket(Protocol):
    """One submitted copy."""

    def done(self) -> bool:
        """Whether every byte is in place; never blocks."""

    def wait(self) -> None:
        """Block until it is done, without holding the GIL."""

    def took_ns(self) -> int:
        """How long the copy itself took, waits before it left out; asked once it is done."""


class CopyStream(Protocol):
    """Copies in the order of submission."""

    def submit(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Ticket:
        """Queue a copy of bytes, to start when the event ``after`` (None: at once) has passed; returns at once."""


class Rows(Protocol):
    """Equal buffers: a store or a slot pool."""

    count: int
    expert_bytes: int

    def row(self, index: int) -> torch.Tensor:
        """Buffer ``index``: uint8 [expert_bytes]."""


class CudaTicket(NamedTuple):
    begin: torch.cuda.Event
    end: torch.cuda.Event

    def done(self) -> bool:
        return self.end.query()

    def wait(self) -> None:
        self.end.synchronize()

    def took_ns(self) -> int:
        return round(self.begin.elapsed_time(self.end) * 1e6)


class CudaStream:
    """A stream of its own on ``device``. From pageable host memory ``submit`` returns only once the bytes are read."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def submit(self, target: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event | None) -> CudaTicket:
        ticket = CudaTicket(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True, blocking=True))
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            ticket.begin.record(self._stream)
            target.copy_(source, non_blocking=True)
            ticket.end.record(self._stream)
        return ticket


class ThreadCopier(BaseCopier):
    """One link per direction, fed by a thread; at most ``max_submitted`` chunks of each are beyond recall.

    ``busy_ns`` of its stats is the paced time, or at the hardware's own speed the copies' time by the device's clock.
    Only chunks of a paced link can be late: copied after they were due.

    Args:
        store, slots: buffers of one size, both kept open until this is closed.
        h2d: makes the copies to the slots.
        d2h: makes those back, into a scratch buffer of the host; None when nothing is written back.
        bytes_per_s: pace of the link to the device; infinite: as fast as the hardware goes.
        fixed_s: time every chunk takes on top of its bytes (paced links only).
        chunk_bytes: an expert is copied in pieces of this size.
        max_submitted: chunks that are handed over at a time, first in, first out.
        write_back_bytes_per_s: pace of the link back; None when nothing is written back.

    Raises:
        ValueError: a figure out of range, or buffers of different sizes.
    """

    _what = "copier thread"
    _heeds_events = True

    def __init__(
        self,
        store: Rows,
        slots: Rows,
        h2d: CopyStream,
        d2h: CopyStream | None = None,
        *,
        bytes_per_s: float,
        fixed_s: float,
        chunk_bytes: int,
        max_submitted: int = 2,
        write_back_bytes_per_s: float | None = None,
    ) -> None:
        super().__init__(store, slots, write_back_bytes_per_s is not None)
        paces = [1 if pace == math.inf else pace for pace in (bytes_per_s, write_back_bytes_per_s)]
        check_figures(paces[0], fixed_s, chunk_bytes, max_submitted, paces[1])
        if self._writes_back and d2h is None:
            raise ValueError("write_back_bytes_per_s needs a stream back; give d2h")
        self._worker = _Worker(
            _mover(store, slots, h2d),
            _back_mover(slots, d2h) if self._writes_back and d2h else None,
            (store.expert_bytes, chunk_bytes),
            (_whole(bytes_per_s), _whole(write_back_bytes_per_s or 1)),
            (round(fixed_s * 1e9), max_submitted),
        )
        self._close = weakref.finalize(self, _end, self._worker)
        self._worker.start()

    @property
    def thread(self) -> threading.Thread:
        """What feeds the link."""
        return self._worker

    def close(self) -> None:
        """Drop what is queued, wait for what is submitted (it writes into the slots), and end the thread."""
        self._close()

    def _deliver(self, batch: Batch) -> None:
        self._put((wire.BATCH, batch))

    def _ask(self, kind: int, token: int) -> None:
        self._put((kind, token))

    def _put(self, message: tuple[int, Any]) -> None:
        self._check_open()
        worker = self._worker
        with worker.changed:
            if not worker.ended:
                worker.inbox.append(message)
                worker.changed.notify_all()
                return
        raise self._died()

    def _receive(self, timeout_s: float) -> None:
        self._check_open()
        worker = self._worker
        with worker.changed:
            if timeout_s:
                worker.changed.wait_for(lambda: worker.outbox or worker.ended, timeout_s)
            messages = list(worker.outbox)
            worker.outbox.clear()
        for message in messages:
            self._take(*message)
        if not messages and worker.ended:
            raise self._died()

    def _check_open(self) -> None:
        if not self._close.alive:
            raise CopierError("the copier is closed; start another")

    def _died(self) -> CopierError:
        self.close()
        return CopierError(
            f"the copier thread ended with {len(self._outstanding)} loads on their way; start another copier\n"
            f"{self._worker.failure}".rstrip()
        )


class _Worker(threading.Thread):
    """The thread: messages in, chunks to the streams, arrivals out. Knows nothing of its ``ThreadCopier``."""

    def __init__(
        self,
        move: Any,
        move_back: Any,
        sizes: tuple[int, int],
        paces: tuple[int | None, int | None],
        limits: tuple[int, int],
    ) -> None:
        super().__init__(name="copier", daemon=True)  # an engine that is never closed does not keep the program alive
        self.changed = threading.Condition()  # guards the four below
        self.inbox: deque[tuple[int, Any]] = deque()  # a kind of message and its batch or token
        self.outbox: deque[tuple[int, int, int, bytes]] = deque()
        self.stopping = False
        self.ended = False
        self.failure = ""
        self._max_submitted = limits[1]
        self._h2d = Link(*sizes, paces[0], *limits, move, self._took, self._ended)
        self._d2h = Link(*sizes, paces[1], *limits, move_back, self._took, self._note)
        self._links = (self._h2d, self._d2h)
        self._out: list[tuple[int, int, int, bytes]] = []
        self._drains: list[int] = []  # tokens still to answer
        self._as_of_ns = 0  # the time the links are told; copies are looked at after it
        self._told_ns = 0  # end of the last chunk
        self._late_chunks = 0
        self._worst_late_ns = 0

    def run(self) -> None:
        try:
            with torch.inference_mode():
                self._serve()
        except BaseException:
            self.failure = traceback.format_exc()
        for chunk in chain(*(link.submitted for link in self._links)):
            try:
                if chunk.ticket is not None:  # None: its submission failed
                    chunk.ticket.wait()
            except RuntimeError:
                self.failure = self.failure or traceback.format_exc()
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self.changed:
                if self.stopping:
                    return
                messages = list(self.inbox)
                self.inbox.clear()
            for kind, what in messages:
                self._obey(kind, what)
            now = self._as_of_ns = time.monotonic_ns()
            for link in self._links:
                link.advance(now)
            self._answer_drains(now)
            if self._out:
                with self.changed:
                    self.outbox.extend(self._out)
                    self.changed.notify_all()
                self._out.clear()
            self._rest()

    def _obey(self, kind: int, what: Any) -> None:
        if kind == wire.DRAIN:
            self._drains.append(what)
        elif kind == wire.STATS:
            body = wire.totals(self._h2d, self._d2h, self._late_chunks, self._worst_late_ns)
            self._out.append((wire.COUNTS, what, time.monotonic_ns(), body))
        else:
            self._apply(self._h2d, what)
            if what.write_back:
                self._apply(self._d2h, what, write_back=True)

    def _apply(self, link: Link, batch: Batch, write_back: bool = False) -> None:
        """Unpaced copies end when they are looked at, so there a batch takes effect now, not when it was sent."""
        if link.bytes_per_s is None:
            batch = batch._replace(sent_ns=time.monotonic_ns())
        self._as_of_ns = batch.sent_ns
        link.apply(batch, write_back)

    def _took(self, chunk: Chunk) -> int | None:
        """None too for what was not even submitted at the time the link is told: it is looked at again."""
        if chunk.submitted_ns > self._as_of_ns or not chunk.ticket.done():
            return None
        return chunk.ticket.took_ns()

    def _rest(self) -> None:
        """Until the next chunk ends or a message comes.

        A copy that is due and not done is waited for where it is made, unless a link has room for a chunk that a
        message may bring: then it is looked at now and then.
        """
        busy = [link for link in self._links if link.submitted]
        first = min((link.submitted[0] for link in busy), key=lambda chunk: chunk.end_ns, default=None)
        if first is None:
            timeout_s = None
        elif (left_ns := first.end_ns - time.monotonic_ns()) > 0:
            timeout_s = left_ns / 1e9
        elif all(len(link.submitted) == self._max_submitted for link in busy):
            first.ticket.wait()
            return
        else:
            timeout_s = _POLL_NS / 1e9
        with self.changed:
            self.changed.wait_for(lambda: self.inbox or self.stopping, timeout_s)

    def _ended(self, chunk: Chunk) -> None:
        self._note(chunk)
        self._told_ns = max(self._told_ns, self._as_of_ns if chunk.behind else chunk.end_ns)
        if chunk.last:
            self._out.append((wire.ARRIVAL, chunk.request.load, self._told_ns, b""))

    def _note(self, chunk: Chunk) -> None:
        paced = (self._d2h if chunk.kind == wire.WRITE_BACK else self._h2d).bytes_per_s is not None
        if paced and (chunk.late or chunk.behind):
            self._late_chunks += 1
            self._worst_late_ns = max(self._worst_late_ns, chunk.late_ns, self._as_of_ns - chunk.end_ns)

    def _answer_drains(self, now: int) -> None:
        if self._drains and not any(link.submitted for link in self._links):
            self._out += [(wire.IDLE, token, now, b"") for token in self._drains]
            self._drains.clear()


def _end(worker: _Worker) -> None:
    """Tell the thread to stop and see that it has."""
    with worker.changed:
        worker.stopping = True
        worker.changed.notify_all()
    if worker.ident is not None:  # None: it was never started
        worker.join()


def _whole(bytes_per_s: float) -> int | None:
    return None if bytes_per_s == math.inf else round(bytes_per_s)


def _submitted(chunk: Chunk, ticket: Ticket) -> None:
    """Note when; a chunk of a paced link may be submitted only after it was due."""
    chunk.ticket = ticket
    chunk.submitted_ns = time.monotonic_ns()
    chunk.behind = not chunk.late and chunk.submitted_ns > chunk.end_ns  # unpaced ones are late from the start


def _mover(store: Rows, slots: Rows, stream: CopyStream) -> Any:
    def move(chunk: Chunk) -> None:
        request, end = chunk.request, chunk.offset + chunk.size
        source = store.row(request.row)[chunk.offset : end]
        target = slots.row(request.slot)[chunk.offset : end]
        _submitted(chunk, stream.submit(target, source, None if chunk.offset else request.after))

    return move


def _back_mover(slots: Rows, stream: CopyStream) -> Any:
    """Experts are never written, so what comes back is not kept: one buffer takes it all."""
    scratch = torch.empty(slots.expert_bytes, dtype=torch.uint8, pin_memory=slots.row(0).is_cuda)

    def move(chunk: Chunk) -> None:
        end = chunk.offset + chunk.size
        source = slots.row(chunk.request.slot)[chunk.offset : end]
        _submitted(chunk, stream.submit(scratch[chunk.offset : end], source, None))

    return move
