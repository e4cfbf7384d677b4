"""A run as a document in Chrome's trace event format, which Perfetto opens; written piece by piece into a stream.

Tracks are threads of one process: compute, both directions of the link, the host when it computes, and one for every
place of every layer's cache. A residency is one complete event ("X") on its place's track: async events ("b", "e")
would take two, and Perfetto draws those of different names on tracks of their own, not side by side in their layer.
Places are numbered within a layer because slots may wander from layer to layer; the slot stands in the name.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import IO, NamedTuple

from sim.link import Copy
from sim.planner import DEMAND, PREFETCH, Load, Plan

Residents = Callable[[int], dict[int, int]]

COMPUTE, H2D, D2H, HOST = "compute", "link H2D", "link D2H", "host"
BATCH = 512
LENGTHS = 4096
FIXED = {COMPUTE: 1, H2D: 2, D2H: 3, HOST: 4}
HEAD = '{"displayTimeUnit":"ns","traceEvents":[\n'
FOOT = "\n]}\n"
SLICE = ',\n{"ph":"X","pid":1,"tid":%d,"name":"%s","ts":%.3f,"dur":%s}'
SLICES = SLICE * BATCH
FLOW = (
    ',\n{"ph":"s","pid":1,"tid":%d,"name":"use","cat":"prefetch","id":%d,"ts":%.3f}'
    ',\n{"ph":"f","pid":1,"tid":%d,"bp":"e","name":"use","cat":"prefetch","id":%d,"ts":%.3f}'
)
QUEUE = ',\n{"ph":"C","pid":1,"tid":%d,"name":"queue","ts":%.3f,"args":{"demand":%d,"prefetch":%d}}'
BYTES = ',\n{"ph":"C","pid":1,"tid":%d,"name":"bytes","ts":%.3f,"args":{"%s":%d}}'
IDENTITY = re.compile(r'"pid":1,"tid":(\d+)')
ARROW = re.compile(r'"cat":"prefetch","id":(\d+)')
TRACKS, ARROWS = 1_000_000, 1_000_000_000  # at most, of one process


class Residency(NamedTuple):
    """An expert in a slot: the group it is drawn in (its layer; -1 for landing slots), its place there, since when."""

    layer: int
    expert: int
    group: int
    place: int
    since_ns: int


class Timeline:
    """Writes slices, counters and arrows as they come; memory does not grow with the run.

    Times are nanoseconds from the start of the run, below 2**52; they are written as microseconds with three decimals,
    which is exact.

    Args:
        stream: text file that gets the document; closed by whoever opened it.
        process: name of the whole.
    """

    def __init__(self, stream: IO[str], process: str) -> None:
        self.stream = stream
        self._useful_bytes = 0
        self._wasted_bytes = 0
        self._wasted_at = 0
        self._slices: list[int | float | str] = []
        self._lengths: dict[int, str] = {}
        self._others: list[str] = []
        self._tracks: dict[str, int] = {}
        self._wire: tuple[Copy, int, int] | None = None
        self._queue = (-1, 0, 0)
        self._queue_written = (0, 0)
        self._begun: dict[int, int] = {}
        self._claimed: dict[int, int] = {}
        self._resident: dict[int, Residency] = {}
        self._taken: dict[int, list[bool]] = {}
        stream.write(HEAD + _meta("process_name", FIXED[COMPUTE], "name", process))
        for track in (COMPUTE, H2D):
            self._track(track)

    # --- slices -----------------------------------------------------------------------------------------------

    def slice(self, track: str, name: str, start_ns: int, end_ns: int) -> None:
        """One slice on a track; slices of one track must not overlap."""
        number = self._tracks.get(track) or self._track(track)
        length_ns = end_ns - start_ns
        length = self._lengths.get(length_ns) or self._length(length_ns)
        self._slices += (number, name, start_ns / 1000, length)
        if len(self._slices) == 4 * BATCH:
            self._flush()

    def expert(self, layer: int, expert: int, start_ns: int, end_ns: int) -> None:
        """A routed expert of the visit last planned is computed; an arrow leads to it from its prefetch."""
        self.slice(COMPUTE, f"expert {layer}.{expert}", start_ns, end_ns)
        number = self._claimed.pop(expert, -1)
        begun = self._begun.pop(number, None)
        if begun is not None:
            link, compute = self._tracks[H2D], self._tracks[COMPUTE]
            self._others.append(FLOW % (link, number, begun / 1000, compute, number, start_ns / 1000))

    def computed(self, layer: int, shared_ns: int, experts: list[tuple[int, int]], start_ns: int) -> None:
        """Shared experts, then routed ones (expert, length), back to back from ``start_ns``."""
        if shared_ns:
            self.slice(COMPUTE, f"shared {layer}", start_ns, start_ns + shared_ns)
        start_ns += shared_ns
        for expert, length_ns in experts:
            self.expert(layer, expert, start_ns, start_ns + length_ns)
            start_ns += length_ns

    def _length(self, length_ns: int) -> str:
        """In microseconds; the last ones are remembered, since most come again."""
        if len(self._lengths) == LENGTHS:
            self._lengths.clear()
        text = self._lengths[length_ns] = f"{length_ns / 1000:.3f}"
        return text

    # --- the link ---------------------------------------------------------------------------------------------

    def on_link(self, copy: Copy, start_ns: int, end_ns: int) -> None:
        """One load had the wire; what follows on without a gap becomes one stretch."""
        wire = self._wire
        if wire is not None:
            if wire[0] is copy and wire[2] == start_ns:
                start_ns = wire[1]
            else:
                self._stretch(*wire)
        self._wire = (copy, start_ns, end_ns)
        if copy.unfinished == 0:
            self._stretch(copy, start_ns, end_ns)
            self._wire = None

    def _stretch(self, copy: Copy, start_ns: int, end_ns: int) -> None:
        kind = DEMAND
        if copy.key[1] < 0:  # its worth: only a prefetch has one
            kind = PREFETCH
            if not copy.cancelled:
                self._begun.setdefault(copy.key[2], start_ns)
        self._copied(kind, copy.layer, copy.expert, start_ns, end_ns)

    def _copied(self, kind: str, layer: int, expert: int, start_ns: int, end_ns: int) -> None:
        """``kind`` becomes the slice's category, a field beside its name."""
        self.slice(H2D, f'{layer}.{expert}","cat":"{kind}', start_ns, end_ns)

    def copied(self, load: Load, start_ns: int, end_ns: int) -> None:
        """A whole load in one stretch."""
        kind = DEMAND
        if load.kind == PREFETCH:
            kind = PREFETCH
            self._begun[load.number] = start_ns
        self._copied(kind, load.layer, load.expert, start_ns, end_ns)

    def serial(self, loads: list[Load], load_ns: int, start_ns: int) -> int:
        """Loads one after the other from ``start_ns`` on; returns their end."""
        for load in loads:
            self.copied(load, start_ns, start_ns + load_ns)
            start_ns += load_ns
        return start_ns

    def written_back(self, slots: list[int], copy_ns: int, start_ns: int) -> None:
        """The experts of these slots go to the host one after the other from ``start_ns`` on."""
        for slot in slots:
            self.slice(D2H, f"slot {slot}", start_ns, start_ns + copy_ns)
            start_ns += copy_ns

    def dropped(self, number: int, at_ns: int, nbytes: int) -> None:
        """A prefetch is of no use: no arrow will start from it, and ``nbytes`` were copied in vain."""
        self._begun.pop(number, None)
        if nbytes:
            self.wasted(at_ns, nbytes)

    def queues(self, at_ns: int, demand: int, prefetch: int) -> None:
        """Loads with bytes not yet handed to the copy engine; of equal times the last counts."""
        if self._queue[0] != at_ns:
            self._write_queue()
        self._queue = (at_ns, demand, prefetch)

    def _write_queue(self) -> None:
        at_ns, demand, prefetch = self._queue
        if (demand, prefetch) != self._queue_written:
            self._others.append(QUEUE % (FIXED[COMPUTE], at_ns / 1000, demand, prefetch))
            self._queue_written = (demand, prefetch)

    def wasted(self, at_ns: int, nbytes: int) -> None:
        """Bytes that are known now to be copied in vain; a counter of its own, for drivers tell it later than plans."""
        self._wasted_at = max(self._wasted_at, at_ns)
        self._wasted_bytes += nbytes
        self._others.append(BYTES % (FIXED[COMPUTE], self._wasted_at / 1000, "wasted", self._wasted_bytes))

    # --- caches -----------------------------------------------------------------------------------------------

    def planned(self, plan: Plan, at_ns: int, residents: Residents, expert_bytes: int) -> None:
        """What a plan changes in the caches, and the bytes it needs.

        ``residents``: experts with a cache slot of a layer after the plan, and which.
        """
        visit, places = plan.visit, self._resident
        used = len(plan.demand) + len(plan.stream) + len(plan.claimed)
        if used:
            self._useful_bytes += used * expert_bytes
            self._others.append(BYTES % (FIXED[COMPUTE], at_ns / 1000, "useful", self._useful_bytes))
        self._claimed = {load.expert: load.number for load in plan.claimed}
        if visit.starts_sequence:
            self._forget(at_ns, residents)
        for load in plan.retract:
            if (there := places.get(load.slot)) and (there.layer, there.expert) == (load.layer, load.expert):
                self._leave(load.slot, at_ns)
        for slot in plan.displaced:
            self._leave(slot, at_ns)
        for load in (*plan.demand, *plan.prefetch):
            self._leave(load.slot, at_ns)
        for load in plan.claimed:
            if (there := places.get(load.slot)) and there.group < 0:
                self._leave(load.slot, at_ns)
                if residents(load.layer).get(load.expert) == load.slot:
                    self._enter(load.layer, load, at_ns)
        for load in plan.demand:
            self._enter(load.layer, load, at_ns)
        for load in plan.prefetch:
            cached = residents(load.layer).get(load.expert) == load.slot
            self._enter(load.layer if cached else -1, load, at_ns)

    def _forget(self, at_ns: int, residents: Residents) -> None:
        """Where a sequence starts with empty caches, what was there is gone without a word in the plan."""
        groups = {one.group for one in self._resident.values() if one.group >= 0}
        kept = {(group, *item) for group in groups for item in residents(group).items()}
        for slot, one in sorted(self._resident.items()):
            if one.group >= 0 and (one.group, one.expert, slot) not in kept:
                self._leave(slot, at_ns)

    def _enter(self, group: int, load: Load, at_ns: int) -> None:
        taken = self._taken.setdefault(group, [])
        place = taken.index(False) if False in taken else len(taken)
        taken[place:] = [True, *taken[place + 1 :]]
        self._resident[load.slot] = Residency(load.layer, load.expert, group, place, at_ns)

    def _leave(self, slot: int, at_ns: int) -> None:
        one = self._resident.pop(slot, None)
        if one is not None:
            self._taken[one.group][one.place] = False
            track = f"cache {one.group}, place {one.place}" if one.group >= 0 else f"landing, place {one.place}"
            self.slice(track, f"{one.layer}.{one.expert} in slot {slot}", one.since_ns, at_ns)

    # --- the document -----------------------------------------------------------------------------------------

    def end(self, at_ns: int, wasted: int) -> None:
        """The run ends, and whatever is still open; ``wasted`` bytes were copied for prefetches nobody used."""
        if wasted:
            self.wasted(at_ns, wasted)
        if self._wire is not None:
            self._stretch(*self._wire)
            self._wire = None
        for slot in sorted(self._resident):
            self._leave(slot, at_ns)

    def close(self) -> None:
        """Complete the document; the stream stays open."""
        self._write_queue()
        self._flush()
        self.stream.write(FOOT)

    def _flush(self) -> None:
        number = len(self._slices) // 4
        template = SLICES if number == BATCH else SLICE * number
        self.stream.write(template % tuple(self._slices))
        self._slices.clear()
        if self._others:
            self.stream.write("".join(self._others))
            self._others.clear()

    def _track(self, track: str) -> int:
        """Number of a new track; Perfetto orders them by it."""
        kind, _, place = track.partition(", place ")
        number = FIXED.get(kind)
        if number is None:
            number = 2000 + 1000 * int(kind.removeprefix("cache ")) if kind != "landing" else 1000
        number += int(place or 0)
        self._tracks[track] = number
        self._others.append(",\n" + _meta("thread_name", number, "name", track))
        return number


def _meta(what: str, track: int, key: str, value: str | int) -> str:
    event = {"ph": "M", "pid": 1, "tid": track, "name": what, "args": {key: value}}
    return json.dumps(event, separators=(",", ":"))


def merge(documents: Sequence[IO[str]], stream: IO[str]) -> None:
    """Several finished documents as one, the processes 1, 2, ... in this order.

    Tracks and arrows get numbers of their own in every process, because Perfetto looks them up by these alone.

    Raises:
        ValueError: a stream that no closed `Timeline` has written.
    """
    stream.write(HEAD)
    comma = ""
    for before, document in enumerate(documents):
        document.seek(0)
        if document.readline() != HEAD:
            raise ValueError("a document to merge is no timeline; pass streams that a closed Timeline has written")
        order = _meta("process_sort_index", FIXED[COMPUTE], "sort_index", before)
        for line in itertools.chain([order], document):
            if line.startswith("{"):
                stream.write(comma + _renumbered(line.rstrip(",\n"), before))
                comma = ",\n"
    stream.write(FOOT)


def _renumbered(event: str, before: int) -> str:
    """An event of process 1 as that of the process which has ``before`` others before it."""

    def identity(found: re.Match[str]) -> str:
        return f'"pid":{before + 1},"tid":{before * TRACKS + int(found[1])}'

    def arrow(found: re.Match[str]) -> str:
        return f'"cat":"prefetch","id":{before * ARROWS + int(found[1])}'

    return ARROW.sub(arrow, IDENTITY.sub(identity, event, count=1), count=1)
