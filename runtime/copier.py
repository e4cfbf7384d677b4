"""The copier: brings experts from the host store into slots over a link of stated speed, beside the computation.

device=cpu: the link is a process (``runtime.copier_process``). A chunk's bytes are in place before the chunk is due,
and the copier reports a load at the instant its last chunk is due, never earlier.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from runtime import copier_process as wire
from runtime.copier_process import Batch, Request
from runtime.store import ExpertRows, SlotPool

__all__ = ["Arrival", "BaseCopier", "Copier", "CopierError", "CopierStats", "Request"]

_SLOWEST_READ = 1e8  # bytes/s of a disk from which a mapped store comes
_SPIN_S = 0.05  # a wait is spun so long: a processor that sleeps wakes late, and slow for some 0.05 ms


class CopierError(RuntimeError):
    """The copier was misused, died or kept its caller waiting; one sentence, then its own traceback if any."""


class Arrival(NamedTuple):
    """All bytes of ``load`` are in its slot since ``end_ns`` (``time.monotonic_ns`` clock)."""

    load: int
    end_ns: int


@dataclass(frozen=True)
class CopierStats:
    """Totals over all submitted chunks, since the copier was started.

    ``demand_bytes`` counts what was submitted as demand, joined prefetches' remainders included. ``late_chunks`` were
    copied after they were due, by at most ``worst_late_ns``: the machine kept the process waiting.
    """

    demand_bytes: int
    prefetch_bytes: int
    write_back_bytes: int
    chunks: int
    busy_ns: int
    write_back_busy_ns: int
    late_chunks: int
    worst_late_ns: int


class BaseCopier(ABC):
    """What every copier promises its caller, and what it keeps account of on the caller's side.

    ``apply`` never waits for a copy. A load arrives when its last byte is in its slot, is told once, and never if it
    was retracted before it was told.
    """

    _what = "copier"  # for messages
    _heeds_events = False

    def __init__(self, store: ExpertRows, slots: SlotPool, writes_back: bool) -> None:
        if store.expert_bytes != slots.expert_bytes:
            raise ValueError(
                f"the store's experts have {store.expert_bytes} bytes, the slots {slots.expert_bytes}; make them equal"
            )
        self._num_rows = store.count
        self._num_slots = slots.num_slots
        self._writes_back = writes_back
        self._outstanding: dict[int, None] = {}
        self._announced: deque[Arrival] = deque()  # the first may still be due in the future
        self._replies: dict[tuple[int, int], tuple[int, bytes]] = {}  # by kind and token
        self._queries = 0

    def apply(
        self,
        retract: Sequence[int] = (),
        join: Sequence[int] = (),
        demand: Sequence[Request] = (),
        prefetch: Sequence[Request] = (),
        write_back: Sequence[int] = (),
    ) -> None:
        """One plan, reaching the link at one instant; its parts take effect in this order.

        Args:
            retract: loads whose unsubmitted chunks are dropped; they never arrive.
            join: prefetches that go to the end of the demand queue, in this order; those fully submitted stay.
            demand: loads, first in, first out, before any prefetch.
            prefetch: loads, by nearest target, then highest worth, then lowest number.
            write_back: slots whose bytes are copied back, in this order.

        Raises:
            ValueError: a row, slot or load number out of range; nothing is sent.
            CopierError: the copier has ended.
        """
        if not (retract or join or demand or prefetch or write_back):
            return
        for request in (*demand, *prefetch):
            if not 0 <= request.row < self._num_rows or not 0 <= request.slot < self._num_slots:
                raise ValueError(
                    f"{request} is out of range; rows are 0 to {self._num_rows - 1}, slots 0 to {self._num_slots - 1}"
                )
            if request.load in self._outstanding:
                raise ValueError(f"load {request.load} is already on its way; give every load its own number")
            if request.after is not None and not self._heeds_events:
                raise ValueError(
                    f"load {request.load} is to wait for an event, which this device has not; leave it out"
                )
        for slot in write_back:
            if not 0 <= slot < self._num_slots:
                raise ValueError(f"write_back of slot {slot} is out of range; slots are 0 to {self._num_slots - 1}")
        if write_back and not self._writes_back:
            raise ValueError("write_back needs a link back; set write_back_bytes_per_s")
        for load in retract:
            self._outstanding.pop(load, None)
        self._outstanding.update(dict.fromkeys(r.load for r in (*demand, *prefetch)))
        self._deliver(Batch(time.monotonic_ns(), retract, join, demand, prefetch, write_back))

    def arrived(self) -> list[Arrival]:
        """Loads that have arrived since the last call of this or ``wait``, in order; never blocks.

        Raises:
            CopierError: the copier has ended.
        """
        self._receive(0)
        now = time.monotonic_ns()
        arrivals = []
        while self._announced and self._announced[0].end_ns <= now:
            arrivals.append(self._pop())
        return [a for a in arrivals if a is not None]

    def wait(self, timeout_s: float = 30.0) -> Arrival:
        """The next arrival; blocks until it is there.

        Raises:
            CopierError: no load is on its way, none arrived within ``timeout_s``, or the copier has ended.
        """
        limit_ns = time.monotonic_ns() + round(timeout_s * 1e9)
        while True:
            self._receive(0)
            if self._announced and self._announced[0].end_ns <= limit_ns:
                _spin_until(self._announced[0].end_ns)
                if (arrival := self._pop()) is not None:
                    return arrival
                continue
            if not self._outstanding:
                raise CopierError("waited for an arrival, but no load is on its way; apply one first")
            left_s = (limit_ns - time.monotonic_ns()) / 1e9
            if left_s <= 0:
                loads = ", ".join(map(str, list(self._outstanding)[:8]))
                raise CopierError(
                    f"none of the loads {loads} ({len(self._outstanding)} on their way) arrived within {timeout_s:g} s"
                    "; give a longer timeout if the link is this slow"
                )
            self._receive(left_s)

    def drain(self, timeout_s: float = 60.0) -> None:
        """Wait until both directions are idle; what arrived is still told by ``arrived``.

        Raises:
            CopierError: still busy after ``timeout_s``, or the copier has ended.
        """
        token = self._query(wire.DRAIN)
        idle_ns, _ = self._await((wire.IDLE, token), "to finish its queue", timeout_s)
        _spin_until(idle_ns)

    def stats(self) -> CopierStats:
        """Totals so far.

        Raises:
            CopierError: the copier has ended.
        """
        token = self._query(wire.STATS)
        _, body = self._await((wire.COUNTS, token), "to tell its totals", timeout_s=30)
        return CopierStats(**json.loads(body))

    @abstractmethod
    def close(self) -> None:
        """End the copier, whatever it is doing; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def _deliver(self, batch: Batch) -> None:
        """Bring a plan's effects to the link."""

    @abstractmethod
    def _ask(self, kind: int, token: int) -> None:
        """Bring a DRAIN or STATS query to the link."""

    @abstractmethod
    def _receive(self, timeout_s: float) -> None:
        """``_take`` what the link has sent, waiting up to ``timeout_s`` for the first message."""

    def _take(self, kind: int, number: int, at_ns: int, body: bytes) -> None:
        """One message of the link: an arrival of load ``number``, or the reply to query ``number``."""
        if kind == wire.ARRIVAL:
            self._announced.append(Arrival(number, at_ns))
        else:
            self._replies[kind, number] = at_ns, body

    def _pop(self) -> Arrival | None:
        """The first announced arrival; None if its load was retracted meanwhile."""
        arrival = self._announced.popleft()
        if arrival.load not in self._outstanding:
            return None
        del self._outstanding[arrival.load]
        return arrival

    def _query(self, kind: int) -> int:
        self._queries += 1
        self._ask(kind, self._queries)
        return self._queries

    def _await(self, reply: tuple[int, int], purpose: str, timeout_s: float) -> tuple[int, bytes]:
        """Nanoseconds and body of the reply of this kind and token."""
        limit_ns = time.monotonic_ns() + round(timeout_s * 1e9)
        while reply not in self._replies:
            left_s = (limit_ns - time.monotonic_ns()) / 1e9
            if left_s <= 0:
                raise CopierError(f"the {self._what} took longer than {timeout_s:g} s {purpose}; is it stopped?")
            self._receive(left_s)
        return self._replies.pop(reply)


class Copier(BaseCopier):
    """One link per direction, in a process of its own; at most ``max_submitted`` chunks of each are beyond recall.

    Args:
        store, slots: blocks with buffers of one size.
        bytes_per_s: speed of the link to the device.
        fixed_s: time every chunk takes on top of its bytes.
        chunk_bytes: an expert is copied in pieces of this size.
        max_submitted: chunks that are handed over at a time, first in, first out.
        write_back_bytes_per_s: speed of the link back; None when nothing is written back.

    Raises:
        ValueError: a figure out of range, or buffers of different sizes.
        CopierError: the process does not start.
    """

    _what = "copier process"

    def __init__(
        self,
        store: ExpertRows,
        slots: SlotPool,
        *,
        bytes_per_s: float,
        fixed_s: float,
        chunk_bytes: int,
        max_submitted: int = 2,
        write_back_bytes_per_s: float | None = None,
    ) -> None:
        super().__init__(store, slots, write_back_bytes_per_s is not None)
        if store.fd < 0 or slots.fd < 0:
            raise ValueError("the store or the slots are closed; keep both open while the copier starts")
        check_figures(bytes_per_s, fixed_s, chunk_bytes, max_submitted, write_back_bytes_per_s)
        self._in = bytearray()
        config = {
            "store_fd": store.fd,
            "slots_fd": slots.fd,
            "store_row_bytes": store.row_bytes,
            "slot_row_bytes": slots.row_bytes,
            "expert_bytes": store.expert_bytes,
            "chunk_bytes": chunk_bytes,
            "bytes_per_s": round(bytes_per_s),
            "fixed_ns": round(fixed_s * 1e9),
            "max_submitted": max_submitted,
            "write_back_bytes_per_s": round(write_back_bytes_per_s or 1),
        }
        self._socket, self._process = _start(config)
        self._close = weakref.finalize(self, _end, self._socket, self._process)
        try:
            self._await((wire.READY, 0), "to start", timeout_s=30 + store.count * store.row_bytes / _SLOWEST_READ)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the link."""
        return self._process.pid

    def close(self) -> None:
        self._close()

    def _deliver(self, batch: Batch) -> None:
        self._send(batch.encode())

    def _ask(self, kind: int, token: int) -> None:
        self._send(wire.encode_query(kind, token))

    def _send(self, message: bytes) -> None:
        if not self._close.alive:
            raise CopierError("the copier is closed; start another")
        try:
            self._socket.sendall(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None

    def _receive(self, timeout_s: float) -> None:
        if not self._close.alive:
            raise CopierError("the copier is closed; start another")
        if timeout_s and not self._readable(timeout_s):
            return
        try:
            data = self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            raise self._died()
        self._in += data
        taken = 0
        while len(self._in) >= taken + wire.REPLY.size:
            kind, size, load_or_token, at_ns = wire.REPLY.unpack_from(self._in, taken)
            body = taken + wire.REPLY.size
            if len(self._in) < body + size:
                break
            self._take(kind, load_or_token, at_ns, bytes(self._in[body : body + size]))
            taken = body + size
        del self._in[:taken]

    def _readable(self, timeout_s: float) -> bool:
        """Whether a message comes within ``timeout_s``; the first ``_SPIN_S`` of it are spun."""
        spin_until = time.monotonic() + min(_SPIN_S, timeout_s)
        while time.monotonic() < spin_until:
            if select.select([self._socket], [], [], 0)[0]:
                return True
        return bool(select.select([self._socket], [], [], max(0.0, timeout_s - _SPIN_S))[0])

    def _died(self) -> CopierError:
        """What ended the process, with what it wrote to its standard error."""
        try:
            _, text = self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            _, text = self._process.communicate()
        self.close()
        return CopierError(
            f"the copier process ended (exit code {self._process.returncode}) with {len(self._outstanding)} loads on "
            f"their way; start another copier\n{text.decode(errors='replace')}".rstrip()
        )


def check_figures(
    bytes_per_s: float, fixed_s: float, chunk_bytes: int, max_submitted: int, write_back_bytes_per_s: float | None
) -> None:
    """Refuse what no link can be.

    Raises:
        ValueError: a figure out of range.
    """
    for name, value, least in (
        ("bytes_per_s", bytes_per_s, 1),
        ("chunk_bytes", chunk_bytes, 1),
        ("max_submitted", max_submitted, 1),
        ("fixed_s", fixed_s, 0),
        ("write_back_bytes_per_s", 1 if write_back_bytes_per_s is None else write_back_bytes_per_s, 1),
    ):
        if not least <= value < 1e18:
            raise ValueError(f"{name} is {value}; it must be a number from {least} up")


def _start(config: dict[str, int]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Run ``copier_process`` by its file, without site packages: no __main__ is imported again, nor numpy or torch."""
    ours, theirs = socket.socketpair()
    with theirs:
        config = config | {"socket": theirs.fileno()}
        command = [sys.executable, "-I", "-S", wire.__file__, json.dumps(config)]
        descriptors = (config["socket"], config["store_fd"], config["slots_fd"])
        try:
            process = subprocess.Popen(
                command, pass_fds=descriptors, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, close_fds=True
            )
        except BaseException:
            ours.close()
            raise
    return ours, process


def _end(connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """Close the connection, on which the process exits, and see that it has."""
    with contextlib.suppress(OSError):  # the other end has gone already
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stderr is not None:
        process.stderr.close()


def _spin_until(at_ns: int) -> None:
    """Return at ``at_ns``; other threads of this interpreter go on meanwhile."""
    while time.monotonic_ns() < at_ns:
        time.sleep(0)
